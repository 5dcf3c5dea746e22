//! A latch: closed at first, opened once, open for ever. How a daemon tells its connections to stop.
//!
//! Unlike [`super::Notify`] it keeps no trace of waiters that gave up, so a task may wait beside something else for
//! any number of short times, and any number of tasks may come and go.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

#[derive(Default)]
pub struct Latch {
    open: Cell<bool>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
    next_id: Cell<u64>,
}

impl Latch {
    /// Wakes everybody who waits. May be called again.
    pub fn open(&self) {
        self.open.set(true);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_values().for_each(Waker::wake);
    }

    pub fn is_open(&self) -> bool {
        self.open.get()
    }

    /// Waits until the latch is open; returns at once when it is.
    pub fn opened(&self) -> Opened<'_> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        Opened { latch: self, id }
    }
}

/// The future of [`Latch::opened`].
pub struct Opened<'a> {
    latch: &'a Latch,
    id: u64,
}

impl Future for Opened<'_> {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.latch.open.get() {
            return Poll::Ready(());
        }
        self.latch.waiting.borrow_mut().insert(self.id, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.latch.waiting.borrow_mut().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once, zip};

    #[test]
    fn wakes_all_stays_open_and_forgets_who_gave_up() {
        block_on(async {
            let latch = Latch::default();
            let mut gone = latch.opened();
            assert!(poll_once(&mut gone).await.is_none());
            assert_eq!(latch.waiting.borrow().len(), 1);
            drop(gone);
            assert_eq!(latch.waiting.borrow().len(), 0);
            zip(zip(latch.opened(), latch.opened()), async { latch.open() }).await;
            latch.opened().await;
            assert!(latch.is_open());
        });
    }
}
