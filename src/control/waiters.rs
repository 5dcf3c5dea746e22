//! Connections that wait for something to happen: bounded apart from the others, and given up when nobody listens.

use crate::bail;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::local::Notify;
use crate::net::Stream;
use futures_lite::future::or;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Connections that wait at a time; more are refused.
pub const WAITERS_MAX: usize = 256;
/// How often a wait looks whether its client is still there.
const HANGUP_LOOK: Duration = Duration::from_secs(1);

/// Those who wait.
#[derive(Default)]
pub struct Waiters {
    count: Cell<usize>,
    /// Notified when somebody begins to wait: there is room for another connection.
    pub begun: Rc<Notify>,
}

struct Waiting<'a>(&'a Waiters);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
    }
}

impl Waiters {
    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// The result of `wait`, which may take long. `Limit` when too many wait already; an error that nobody sees when the
    /// client has gone.
    pub async fn wait<T>(&self, client: &Stream, env: &dyn Env, wait: impl Future<Output = Result<T>>) -> Result<T> {
        if self.count.get() >= WAITERS_MAX {
            bail!(Limit, "{WAITERS_MAX} clients wait already, no more may: try again later");
        }
        self.count.set(self.count.get() + 1);
        let _waiting = Waiting(self);
        self.begun.notify();
        let gone = async {
            while !client.is_hung_up() {
                env.sleep(HANGUP_LOOK).await;
            }
            Err(Error::new(ErrorKind::Io, "the client has gone"))
        };
        or(wait, gone).await
    }
}
