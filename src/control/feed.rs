//! The feed of a daemon: its log of events, connected to the executor on which they are waited for.

use crate::env::Env;
use crate::error::{Error, Result};
use crate::event_log::{EventLog, Feed};
use crate::ring::doorbell::Doorbell;
use std::rc::Rc;

/// A new log, to be shared with all shards, that wakes those who wait on the current executor.
pub fn start(env: &Rc<dyn Env>) -> Result<Rc<Feed>> {
    let (doorbell, hearing) =
        Doorbell::new().map_err(|error| Error::from_io(error, "an eventfd for the events can't be made"))?;
    let instance = uuid::Uuid::new_v4().to_string();
    let feed = Feed::new(EventLog::new(instance, Box::new(move || doorbell.ring())));
    let waking = feed.clone();
    env.spawn(Box::pin(async move {
        // An error is the end of the executor.
        while hearing.heard().await.is_ok() {
            waking.wake();
        }
    }));
    Ok(feed)
}
