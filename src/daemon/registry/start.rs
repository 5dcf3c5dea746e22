//! How clones get to run: asked for at the daemon's start or later, and tried again when that failed for a reason that may pass.

use super::{AT_A_TIME, Claim, Daemon, Entry, Failed, WATCH_INTERVAL};
use crate::config::CloneConfig;
use crate::control::routes::MESSAGE_TIME_MAX;
use crate::daemon::activate::Shared;
use crate::daemon::mapped_node::{self, Before};
use crate::daemon::prepare;
use crate::daemon::running::RunningClone;
use crate::daemon::start_again::{passes_by_itself, start_delay};
use crate::error::{Error, Result};
use crate::event_log::CloneEvents;
use crate::events::EventKind;
use crate::hydration_share::{HydrationRate, Priority};
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::local::latch::Latch;
use crate::local::{Permit, Raised, Semaphore, oneshot};
use crate::service_manager;
use crate::shard::Mesh;
use crate::units::CloneId;
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// A try to start a clone that takes longer does not count among those at a time any more.
const SLOW_START: Duration = Duration::from_secs(1);

/// How the start of a clone went, when it did not fail.
pub enum Started {
    Serving,
    /// The daemon was told to stop before anything was changed.
    GivenUp,
    /// It is finished, and need not be started: why, in words.
    HandedOver(String),
}

/// The same, on its way.
enum BroughtUp {
    Running(Rc<RunningClone>),
    GivenUp,
    HandedOver(String),
}

type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

impl Daemon {
    /// Starts clones side by side. Those that can't be started stay listed as failed.
    pub async fn start_all(self: &Rc<Self>, clones: Vec<CloneConfig>) {
        // The only one: its failure is that of the daemon, which is told there.
        let is_told = clones.len() == 1;
        let slots = Semaphore::new(AT_A_TIME as u64);
        // All names are taken, and listed, at once.
        let starts: Vec<_> = clones.into_iter().map(|config| (config.name.clone(), self.start(config, true))).collect();
        let mut ended = Vec::new();
        for (name, start) in starts {
            let (daemon, slots) = (self.clone(), slots.clone());
            let (sender, receiver) = oneshot();
            ended.push(receiver);
            self.context.env.spawn(Box::pin(async move {
                let slot = daemon.hold_for_a_while(slots.acquire(1).await);
                let started = start.await;
                drop(slot.take());
                if let Err(error) = started
                    && (!is_told || daemon.may_start_later())
                {
                    let again = if daemon.tries_again(&name) { "; it is tried again" } else { "" };
                    log::error!("clone '{name}' can't be started: {error}{again}");
                }
                sender.send(());
            }));
        }
        for receiver in ended {
            // Of one that is gone with its executor nobody is told.
            let _ = receiver.await;
        }
    }

    /// A start that takes long, say from a server that says nothing, does not hold up the others: its slot is free then.
    fn hold_for_a_while(&self, slot: Permit) -> Rc<Cell<Option<Permit>>> {
        let slot = Rc::new(Cell::new(Some(slot)));
        let (late, env) = (slot.clone(), self.context.env.clone());
        self.context.env.spawn_background(Box::pin(async move {
            env.sleep(SLOW_START).await;
            drop(late.take());
        }));
        slot
    }

    /// Starts a clone under a name that is free, or that of one that could not be started. `keep`: list it as failed when
    /// it can't be started.
    pub fn start(self: &Rc<Self>, config: CloneConfig, keep: bool) -> LocalFuture<Result<Started>> {
        let (daemon, config) = (self.clone(), Rc::new(config));
        let is_tried = matches!(self.entries.borrow().get(&config.name), Some(Entry::Starting(_, _, Some(_))));
        let claimed = (!is_tried).then(|| self.claim(&config, false));
        Box::pin(async move {
            let claimed = match claimed {
                Some(claimed) => claimed,
                None => {
                    // Nobody asked for that try.
                    daemon.give_up(config.name.as_str()).await;
                    daemon.claim(&config, false)
                }
            };
            daemon.start_claimed(config, keep || is_tried, claimed).await
        })
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
                Ok(BroughtUp::Running(running)) => {
                    daemon.set(&config.name, Entry::Running(running));
                    daemon.set_events(&config.name, events);
                    Ok(Started::Serving)
                }
                Ok(BroughtUp::HandedOver(text)) => {
                    daemon.forget(&config.name);
                    log::info!("{text}");
                    daemon.note_handed_over(config.name.clone());
                    Ok(Started::HandedOver(text))
                }
                Ok(BroughtUp::GivenUp) => {
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
        let delay = (is_kept && passes_by_itself(error.kind(), tries)).then(|| start_delay(tries));
        let outlook = match delay {
            Some(_) if config.force => "; it is tried again, without force, with pauses of up to a minute",
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
        let slots = Semaphore::new(AT_A_TIME as u64);
        while !self.is_stopping() {
            for config in self.due(self.context.env.now()) {
                let Some(slot) = slots.try_acquire(1) else { break };
                self.clone().start_again(config, slot);
            }
            self.context.env.sleep(WATCH_INTERVAL).await;
        }
    }

    /// Those that are to be tried again, in the order of their times.
    fn due(&self, now: Duration) -> Vec<Rc<CloneConfig>> {
        let is_due = |entry: &Entry| match entry {
            Entry::Failed(failed) => failed.next_try.filter(|at| *at <= now).map(|at| (at, failed.config.clone())),
            _ => None,
        };
        let mut due: Vec<_> = self.entries.borrow().values().filter_map(is_due).collect();
        due.sort_by_key(|(at, _)| *at);
        due.into_iter().map(|(_, config)| config).collect()
    }

    fn start_again(self: Rc<Self>, config: Rc<CloneConfig>, slot: Permit) {
        log::debug!("clone '{}': trying to start it again", config.name);
        // Whoever wanted something overwritten wanted it then.
        let config = Rc::new(CloneConfig { force: false, ..(*config).clone() });
        let claimed = self.claim(&config, true);
        let slot = self.hold_for_a_while(slot);
        let daemon = self.clone();
        self.context.env.spawn(Box::pin(async move {
            // How it went is with the clone.
            if let Ok(Started::Serving) = daemon.start_claimed(config, true, claimed).await {
                service_manager::status(&daemon.in_words());
            }
            drop(slot.take());
        }));
    }

    /// How many clones are served.
    pub fn in_words(&self) -> String {
        format!("serving {} clones of {}", self.all_running().len(), self.entries.borrow().len())
    }

    async fn bring_up(
        &self,
        config: &Rc<CloneConfig>,
        events: &Arc<CloneEvents>,
        give_up: &Latch,
    ) -> Result<BroughtUp> {
        let rate = config.hydration_rate.map(HydrationRate::new).transpose()?;
        let priority = Priority::new(u64::from(config.priority))?;
        if let Before::HandedOver(path) = mapped_node::before_start(config).await? {
            let (name, path) = (&config.name, path.display());
            return Ok(BroughtUp::HandedOver(format!("clone '{name}' is finished: {path} is its destination")));
        }
        let prepared = async { prepare::prepare(&self.context, config, self.context.mesh.shards()).await.map(Some) };
        // Nothing is changed on disk yet, so a stop just gives up: a source may be slow to answer.
        let stopped = async {
            futures_lite::future::or(self.stopping.opened(), give_up.opened()).await;
            Ok(None)
        };
        let Some(prepared) = futures_lite::future::or(prepared, stopped).await? else {
            return Ok(BroughtUp::GivenUp);
        };
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
        let block = running.node().map(|node| node.user_path().display().to_string());
        let nbd = match &running.exported.listener.address {
            NbdAddress::None => None,
            address => Some(format!("NBD at {address}")),
        };
        let shown: Vec<_> = block.into_iter().chain(nbd).collect();
        let control = self.config.control.display();
        log::info!("clone '{}': serving {}, control at {control}", config.name, shown.join(" and "));
        Ok(BroughtUp::Running(running))
    }
}
