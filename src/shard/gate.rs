//! The gate of one clone on one shard: every request of a client passes it, and waits there while it is closed.
//!
//! Suspending a clone closes the gates of all shards and waits until nobody is inside; see
//! [`crate::coordinator::Coordinator::suspend`]. A request that waits is neither failed nor forgotten: it goes on
//! when the gate opens, and sees the clone as it is then (it may have grown). How many can wait is bounded by what
//! the frontends let in: a client's limits of requests and bytes in flight count those as well.

use crate::error::{Error, ErrorKind, Result};
use crate::local::{Notify, Raised};
use std::cell::Cell;
use std::rc::Rc;

/// See the head of this file.
#[derive(Default)]
pub struct Gate {
    closed: Cell<bool>,
    /// The clone is gone: nobody passes any more.
    shut: Cell<bool>,
    inside: Cell<u64>,
    waiting: Cell<u64>,
    changed: Notify,
    emptied: Notify,
}

/// A request that has passed; leaves when dropped.
pub struct Pass(Rc<Gate>);

impl Gate {
    /// Passes, once the gate is open. Fails with Shutdown when the clone is gone, or goes while this waits.
    pub async fn enter(self: &Rc<Self>) -> Result<Pass> {
        while self.closed.get() && !self.shut.get() {
            // Also when the wait is given up.
            let _waiting = Raised::new(&self.waiting);
            self.changed.notified().await;
        }
        if self.shut.get() {
            return Err(Error::new(ErrorKind::Shutdown, "the clone is stopping"));
        }
        self.inside.set(self.inside.get() + 1);
        Ok(Pass(self.clone()))
    }

    /// Passes if the gate is open.
    pub fn try_enter(self: &Rc<Self>) -> Option<Pass> {
        let is_open = !self.closed.get() && !self.shut.get();
        is_open.then(|| {
            self.inside.set(self.inside.get() + 1);
            Pass(self.clone())
        })
    }

    /// Lets nobody pass from now on.
    pub fn close(&self) {
        self.closed.set(true);
    }
    /// Lets everybody pass, those who wait first.
    pub fn open(&self) {
        self.closed.set(false);
        self.changed.notify();
        self.emptied.notify();
    }
    /// Fails everybody who waits and all who come later, for good.
    pub fn shut(&self) {
        self.shut.set(true);
        self.changed.notify();
    }

    /// Waits until nobody is inside, or the gate is open again.
    pub async fn emptied(&self) {
        while self.closed.get() && self.inside.get() > 0 {
            self.emptied.notified().await;
        }
    }

    /// Whether who leaves may be waited for.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Requests that wait at the gate now.
    pub fn waiting(&self) -> u64 {
        self.waiting.get()
    }
}

impl Pass {
    pub fn gate(&self) -> &Gate {
        &self.0
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let inside = self.0.inside.get() - 1;
        self.0.inside.set(inside);
        if inside == 0 && self.0.closed.get() {
            self.0.emptied.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    #[test]
    fn who_comes_while_it_is_closed_waits_and_passes_later() {
        block_on(async {
            let gate = Rc::<Gate>::default();
            let first = gate.enter().await.unwrap();
            gate.close();
            let mut emptied = Box::pin(gate.emptied());
            assert!(poll_once(&mut emptied).await.is_none());
            let mut given_up = Box::pin(gate.enter());
            let mut second = Box::pin(gate.enter());
            assert!(poll_once(&mut given_up).await.is_none() && poll_once(&mut second).await.is_none());
            assert_eq!(gate.waiting(), 2);
            drop(given_up);
            drop(first);
            emptied.await;
            assert!(poll_once(&mut second).await.is_none());
            gate.open();
            let second = second.await.unwrap();
            assert_eq!((gate.waiting(), gate.inside.get()), (0, 1));
            gate.close();
            gate.open();
            gate.emptied().await;
            drop(second);
            assert_eq!(gate.inside.get(), 0);
        });
    }

    #[test]
    fn a_shut_gate_fails_all() {
        block_on(async {
            let gate = Rc::<Gate>::default();
            gate.close();
            let mut waits = Box::pin(gate.enter());
            assert!(poll_once(&mut waits).await.is_none());
            gate.shut();
            assert_eq!(waits.await.err().unwrap().kind(), ErrorKind::Shutdown);
            gate.open();
            assert!(gate.enter().await.is_err());
        });
    }
}
