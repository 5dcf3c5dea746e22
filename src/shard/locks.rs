//! Holding bytes: [`super::inflight`] for tasks that wait.

use super::inflight::{Hold, Inflight, Ticket};
use crate::local::oneshot;
use crate::units::ByteRange;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// The bytes of one clone that operations of this shard hold.
#[derive(Default)]
pub struct Locks {
    inflight: RefCell<Inflight>,
    waiting: RefCell<HashMap<Ticket, oneshot::Sender<()>>>,
    waiting_max: Cell<u64>,
    waits: Cell<u64>,
}

/// Bytes held; released when dropped, also when the wait for them was abandoned.
pub struct Held {
    locks: Rc<Locks>,
    ticket: Ticket,
}

impl Locks {
    /// Waits until no earlier operation conflicts.
    pub async fn hold(self: &Rc<Self>, range: ByteRange, hold: Hold) -> Held {
        let (ticket, granted) = self.inflight.borrow_mut().begin(range, hold);
        let held = Held { locks: self.clone(), ticket };
        if !granted {
            let (sender, receiver) = oneshot();
            self.waiting.borrow_mut().insert(ticket, sender);
            self.waits.set(self.waits.get() + 1);
            self.waiting_max.set(self.waiting_max.get().max(self.waiting()));
            receiver.await.expect("the sender stays in the table until the ticket is granted");
        }
        held
    }

    /// Holds the bytes if nobody conflicts.
    pub fn try_hold(self: &Rc<Self>, range: ByteRange, hold: Hold) -> Option<Held> {
        let mut inflight = self.inflight.borrow_mut();
        inflight.is_free(range, hold).then(|| {
            let (ticket, granted) = inflight.begin(range, hold);
            debug_assert!(granted);
            Held { locks: self.clone(), ticket }
        })
    }

    pub fn is_free(&self, range: ByteRange, hold: Hold) -> bool {
        self.inflight.borrow().is_free(range, hold)
    }

    /// Operations that hold or wait.
    pub fn len(&self) -> usize {
        self.inflight.borrow().len()
    }
    /// Operations that wait.
    pub fn waiting(&self) -> u64 {
        self.waiting.borrow().len() as u64
    }
    /// The most that ever waited at once.
    pub fn waiting_max(&self) -> u64 {
        self.waiting_max.get()
    }
    /// How many ever had to.
    pub fn waits(&self) -> u64 {
        self.waits.get()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let freed = self.locks.inflight.borrow_mut().end(self.ticket);
        self.locks.waiting.borrow_mut().remove(&self.ticket);
        for ticket in freed {
            let sender = self.locks.waiting.borrow_mut().remove(&ticket);
            if let Some(sender) = sender {
                sender.send(());
            }
        }
    }
}
