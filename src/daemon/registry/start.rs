//! How clones get to run: asked for at the daemon's start or later, and tried again when that failed for a reason that may pass.

use super::{AT_A_TIME, Claim, Daemon, Entry, Failed, WATCH_INTERVAL};
use crate::config::CloneConfig;
use crate::control::routes::MESSAGE_TIME_MAX;
use crate::daemon::activate::Shared;
use crate::daemon::prepare;
use crate::daemon::running::RunningClone;
use crate::daemon::start_again::{passes_by_itself, start_delay};
use crate::error::{Error, Result};
use crate::event_log::CloneEvents;
use crate::events::EventKind;
use crate::hydration_share::{HydrationRate, Priority};
use crate::local::latch::Latch;
use crate::local::{Raised, join_some};
use crate::shard::Mesh;
use crate::units::CloneId;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

/// How the start of a clone went, when it did not fail.
pub enum Started {
    Serving,
    /// The daemon was told to stop before anything was changed.
    GivenUp,
}

type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

impl Daemon {
    /// Starts clones side by side. Those that can't be started stay listed as failed.
    pub async fn start_all(self: &Rc<Self>, clones: Vec<CloneConfig>) {
        // The only one: its failure is that of the daemon, which is told there.
        let is_told = clones.len() == 1;
        let starts = clones.into_iter().map(|config| {
            let daemon = self.clone();
            async move {
                let name = config.name.clone();
                if let Err(error) = daemon.start(config, true).await
                    && (!is_told || daemon.awaits_a_source())
                {
                    let again = if daemon.tries_again(&name) { "; it is tried again" } else { "" };
                    log::error!("clone '{name}' can't be started: {error}{again}");
                }
            }
        });
        join_some(starts, AT_A_TIME).await;
    }

    /// Starts a clone under a name that is free, or that of one that could not be started. `keep`: list it as failed when
    /// it can't be started.
    pub fn start(self: &Rc<Self>, config: CloneConfig, keep: bool) -> LocalFuture<Result<Started>> {
        let config = Rc::new(config);
        let claimed = self.claim(&config, false);
        self.start_claimed(config, keep, claimed)
    }

    fn start_claimed(
        self: &Rc<Self>,
        config: Rc<CloneConfig>,
        keep: bool,
        claimed: Result<Claim>,
    ) -> LocalFuture<Result<Started>> {
        let daemon = self.clone();
        Box::pin(async move {
            let Claim { again, replaced, events, give_up } = claimed?;
            let _busy = Raised::new(&daemon.busy);
            let begun = daemon.context.env.now();
            let started = daemon.bring_up(&config, &events, &give_up).await;
            // Who asked for it has been told that it goes on: how it ended is to be found.
            let keep = keep || replaced.is_some() || daemon.context.env.now() - begun >= MESSAGE_TIME_MAX;
            match started {
                Ok(Some(running)) => {
                    daemon.set(&config.name, Entry::Running(running));
                    daemon.set_events(&config.name, events);
                    Ok(Started::Serving)
                }
                Ok(None) => {
                    log::info!("clone '{}': stopped before it was started; nothing was changed", config.name);
                    match replaced {
                        // Its failure is part of how the daemon ends.
                        Some(failed) if daemon.is_stopping() => daemon.set(&config.name, Entry::Failed(failed)),
                        _ => daemon.forget(&config.name),
                    }
                    Ok(Started::GivenUp)
                }
                Err(error) => {
                    daemon.start_failed(config, &error, (events, again), keep, replaced);
                    Err(error)
                }
            }
        })
    }

    fn start_failed(
        &self,
        config: Rc<CloneConfig>,
        error: &Error,
        (events, again): (Arc<CloneEvents>, bool),
        keep: bool,
        replaced: Option<Failed>,
    ) {
        let tries = replaced.as_ref().map_or(0, |failed| failed.tries.saturating_add(1));
        // Of a daemon for one clone it is the end, and `hydrant clone` begins again.
        let is_kept = keep && !self.config.one_clone;
        let delay = (is_kept && passes_by_itself(error.kind())).then(|| start_delay(tries));
        let outlook = match delay {
            Some(_) => "; it is tried again, with pauses of up to a minute",
            None if is_kept => "; nothing tries again by itself: when that is mended, `hydrant create FILE` starts it",
            None => "",
        };
        // The same again, once a minute for hours, is no news.
        let is_news = !again || replaced.is_none_or(|failed| failed.error.to_string() != error.to_string());
        if is_news {
            events.record(EventKind::StartFailed, format!("could not be started: {error}{outlook}"));
        }
        if is_news && again {
            log::error!("clone '{}' still can't be started: {error}{outlook}", config.name);
        }
        events.set_ending();
        if !keep {
            return self.forget(&config.name);
        }
        if is_news {
            self.set_events(&config.name, events);
        }
        let next_try = delay.map(|delay| self.context.env.now() + delay);
        let name = config.name.clone();
        self.set(&name, Entry::Failed(Failed { config, error: error.clone(), tries, next_try }));
    }

    /// Tries those again that could not be started and may be now. Until the daemon stops.
    pub async fn start_failed_again(self: Rc<Self>) {
        while !self.is_stopping() {
            let now = self.context.env.now();
            let is_due = |entry: &Entry| match entry {
                Entry::Failed(failed) if failed.next_try.is_some_and(|at| at <= now) => Some(failed.config.clone()),
                _ => None,
            };
            let due: Vec<_> = self.entries.borrow().values().filter_map(is_due).collect();
            let tries = due.into_iter().map(|config| {
                let daemon = self.clone();
                async move {
                    // Nothing if it was removed or created meanwhile. How the try went is with the clone.
                    let is_failed = matches!(daemon.entries.borrow().get(&config.name), Some(Entry::Failed(_)));
                    if is_failed {
                        log::debug!("clone '{}': trying to start it again", config.name);
                        let claimed = daemon.claim(&config, true);
                        let _ = daemon.start_claimed(config, true, claimed).await;
                    }
                }
            });
            join_some(tries, AT_A_TIME).await;
            self.context.env.sleep(WATCH_INTERVAL).await;
        }
    }

    /// `None`: it was given up before anything was changed.
    async fn bring_up(
        &self,
        config: &Rc<CloneConfig>,
        events: &Arc<CloneEvents>,
        give_up: &Latch,
    ) -> Result<Option<Rc<RunningClone>>> {
        let rate = config.hydration_rate.map(HydrationRate::new).transpose()?;
        let priority = Priority::new(u64::from(config.priority))?;
        let prepared = async { prepare::prepare(&self.context, config, self.context.mesh.shards()).await.map(Some) };
        // Nothing is changed on disk yet, so a stop just gives up: a source may be slow to answer.
        let stopped = async {
            futures_lite::future::or(self.stopping.opened(), give_up.opened()).await;
            Ok(None)
        };
        let Some(prepared) = futures_lite::future::or(prepared, stopped).await? else { return Ok(None) };
        for (index, line) in prepared.describe(config).iter().enumerate() {
            // The first line names the clone; among many, the others need it too.
            match index > 0 && !self.config.one_clone {
                true => log::info!("clone '{}': {line}", config.name),
                false => log::info!("{line}"),
            }
        }
        let id = CloneId(self.next_id.replace(self.next_id.get() + 1));
        let shared =
            Shared { events: events.clone(), budget: self.budget.join(priority, rate, self.context.env.now()) };
        let config_now = (**config).clone();
        let running = RunningClone::start(&self.context, &self.listeners, id, config_now, prepared, shared).await?;
        let block = running.node().map(|node| format!("{} and ", node.path().display())).unwrap_or_default();
        log::info!(
            "clone '{}': serving {block}NBD at {}, control at {}",
            config.name,
            running.exported.listener.address,
            self.config.control.display()
        );
        Ok(Some(running))
    }
}
