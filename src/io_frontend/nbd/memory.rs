//! The memory for payloads that connections share, and who has to give it back.
//!
//! Each connection has a little of its own ([`super::Limits::payload_bytes_own`]) for requests that fit into it, so that
//! a modest client never waits for greedy ones. Everything else comes from what all share, in order of asking.
//!
//! Invariants:
//! * While nobody waits for memory, a client may be as slow as it likes.
//! * While somebody does, those that hold shared memory and whose socket does not go on for
//!   [`super::Limits::stall_time_max`] lose their connections, the one stalled longest first, until what is wanted is on
//!   its way. Waiters look after that themselves: nobody waits without a look from time to time, and connections that
//!   don't wait have no timer.

use crate::env::Env;
use crate::local::latch::Latch;
use crate::local::{Permit, Semaphore};
use futures_lite::future::{self, or};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// In how many looks of those who wait the time passes after which others are stalled.
const LOOKS: u32 = 8;

/// Of all connections of a shard.
pub struct Memory {
    shared: Rc<Semaphore>,
    holders: RefCell<BTreeMap<u64, Rc<Holder>>>,
    next_id: Cell<u64>,
    /// However many wait, they look once at a time.
    next_look: Cell<Duration>,
}

/// What one connection holds of the shared memory, and whether its client goes on.
#[derive(Default)]
struct Holder {
    bytes: Cell<u64>,
    /// Since when the client is waited for: to take replies, to send a payload.
    sending: Cell<Option<Duration>>,
    receiving: Cell<Option<Duration>>,
    evicted: Latch,
}

impl Memory {
    /// `bytes` to share: at least the longest payload of any of the connections.
    pub fn new(bytes: u64) -> Rc<Self> {
        Rc::new(Self {
            shared: Semaphore::new(bytes),
            holders: RefCell::default(),
            next_id: Cell::new(0),
            next_look: Cell::default(),
        })
    }

    /// Makes the longest stalled give way, as many as it takes for those who wait.
    fn look(&self, now: Duration, stall_time_max: Duration) {
        if now < self.next_look.get() {
            return;
        }
        self.next_look.set(now + stall_time_max / LOOKS);
        let mut coming = self.shared.free();
        let mut stalled = Vec::new();
        for holder in self.holders.borrow().values().filter(|holder| holder.bytes.get() > 0) {
            if holder.evicted.is_open() {
                coming = coming.saturating_add(holder.bytes.get());
            } else if let Some(since) = holder.waited_for()
                && now.saturating_sub(since) >= stall_time_max
            {
                stalled.push((since, holder.clone()));
            }
        }
        stalled.sort_by_key(|(since, _)| *since);
        let wanted = self.shared.wanted();
        for (_, holder) in stalled {
            if coming >= wanted {
                break;
            }
            coming = coming.saturating_add(holder.bytes.get());
            holder.evicted.open();
        }
    }
}

impl Holder {
    fn waited_for(&self) -> Option<Duration> {
        self.sending.get().into_iter().chain(self.receiving.get()).min()
    }
}

/// A connection's access to memory.
pub(super) struct Share {
    memory: Rc<Memory>,
    id: u64,
    holder: Rc<Holder>,
    own: Rc<Semaphore>,
    own_bytes: u64,
}

/// Memory for one payload; given back when dropped.
pub(super) struct Held {
    permit: Option<Permit>,
    /// Of shared memory.
    holder: Option<(Rc<Holder>, u64)>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((holder, bytes)) = &self.holder {
            holder.bytes.set(holder.bytes.get().saturating_sub(*bytes));
        }
        drop(self.permit.take());
    }
}

impl Share {
    pub fn new(memory: Rc<Memory>, own_bytes: u64) -> Self {
        let (id, holder) = (memory.next_id.get(), Rc::new(Holder::default()));
        memory.next_id.set(id + 1);
        memory.holders.borrow_mut().insert(id, holder.clone());
        Self { memory, id, holder, own: Semaphore::new(own_bytes), own_bytes }
    }

    /// Waits for memory for a payload of `bytes`; when it has to wait, calls `look` from time to time and at the end.
    pub async fn acquire(&self, bytes: u64, env: &dyn Env, stall_time_max: Duration, look: impl Fn()) -> Held {
        let of_own = |permit| Held { permit: Some(permit), holder: None };
        let of_shared = |permit| {
            self.holder.bytes.set(self.holder.bytes.get().saturating_add(bytes));
            Held { permit: Some(permit), holder: Some((self.holder.clone(), bytes)) }
        };
        let is_small = bytes <= self.own_bytes;
        if is_small && let Some(permit) = self.own.try_acquire(bytes) {
            return of_own(permit);
        }
        if let Some(permit) = self.memory.shared.try_acquire(bytes) {
            return of_shared(permit);
        }
        let own = async {
            match is_small {
                true => of_own(self.own.acquire(bytes).await),
                false => future::pending().await,
            }
        };
        let shared = async { of_shared(self.memory.shared.acquire(bytes).await) };
        let looks = async {
            loop {
                self.memory.look(env.now(), stall_time_max);
                look();
                env.sleep(stall_time_max / LOOKS).await;
            }
        };
        let held = or(own, or(shared, looks)).await;
        look();
        held
    }

    /// The client is waited for from now on to take replies; `None`: it is not.
    pub fn set_sending(&self, since: Option<Duration>) {
        self.holder.sending.set(since);
    }

    /// The client is waited for from now on to send a payload; `None`: it is not.
    pub fn set_receiving(&self, since: Option<Duration>) {
        self.holder.receiving.set(since);
    }

    /// Returns when the connection has to give way; what its client did not do.
    pub async fn evicted(&self) -> &'static str {
        self.holder.evicted.opened().await;
        if self.holder.sending.get().is_some() { "took no replies" } else { "sent nothing of a payload" }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.holders.borrow_mut().remove(&self.id);
    }
}
