//! The end of a clone whose device was handed over to its destination: asked for, or by itself.

use super::{CLONES_MAX, DRAIN_MAX, Daemon, Entry};
use crate::config::CloneName;
use crate::daemon::running::RunningClone;
use crate::error::{ErrorKind, Result};
use crate::local::Raised;
use std::rc::Rc;
use std::time::Duration;

/// Between two tries to hand a clone over that says so.
const FINISH_RETRY: Duration = Duration::from_secs(30);

impl Daemon {
    /// Hands a clone over to its destination, and ends it; see [`crate::daemon::finish`]. Succeeds when that was done before.
    pub async fn finish(self: &Rc<Self>, name: &str) -> Result<()> {
        let running = match self.running(name) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let is_known = self.handed_over.borrow().iter().any(|known| known.as_str() == name);
                return if is_known { Ok(()) } else { Err(error) };
            }
            running => running?,
        };
        let _busy = Raised::new(&self.busy);
        running.hand_over(&self.context).await?;
        let name = running.config.name.clone();
        // Nobody new comes in.
        running.exported.set_hidden(&self.context, true).await;
        {
            let mut entries = self.entries.borrow_mut();
            match entries.get(&name) {
                Some(Entry::Running(now)) if Rc::ptr_eq(now, &running) => {}
                // Somebody else ends it already.
                _ => return Ok(()),
            }
            entries.insert(name.clone(), Entry::Removing(running.clone()));
        }
        let deadline = self.context.env.now() + DRAIN_MAX;
        let ended = running.end(&self.context, &self.listeners, deadline).await;
        self.tell_removed(&name);
        self.forget(&name);
        self.note_handed_over(name.clone());
        if self.config.one_clone {
            log::info!("clone '{name}': handed over: ending");
            self.stop.notify();
        }
        ended.map_err(|error| error.within(format!("clone '{name}': handed over")))
    }

    pub(super) fn note_handed_over(&self, name: CloneName) {
        let mut known = self.handed_over.borrow_mut();
        known.retain(|known| *known != name);
        known.push_back(name);
        if known.len() > CLONES_MAX {
            known.pop_front();
        }
    }

    /// Finishes a clone that says so, when it can be.
    pub(super) fn finish_by_itself(self: &Rc<Self>, running: &Rc<RunningClone>) {
        let (state, now) = (&running.clone.state, self.context.env.now());
        let is_ready = state.is_complete() && !state.is_suspended() && running.exported.connections() == 0;
        if !is_ready || running.finish_next.get().is_none_or(|next| now < next) {
            return;
        }
        running.finish_next.set(None);
        let (daemon, running) = (self.clone(), running.clone());
        self.context.env.spawn(Box::pin(async move {
            let name = running.config.name.to_string();
            log::info!("clone '{name}': hydrated: handing it over");
            if let Err(error) = daemon.finish(&name).await {
                let seconds = FINISH_RETRY.as_secs();
                log::warn!("clone '{name}': not handed over, it is tried again in {seconds} s: {error}");
            }
            running.finish_next.set(Some(daemon.context.env.now() + FINISH_RETRY));
        }));
    }
}
