//! What copying may use on one shard, all clones together: memory, and bytes in flight in the background.
//!
//! **Memory** (`io_memory`): whoever copies takes it before it reads the source and gives it back when the destination has
//! the data. Invariants:
//! * All together hold at most `io_memory`; beyond that, a clone that holds nothing always gets one piece, of at most
//!   [`COPY_UNIT_BYTES`]. So the bound of a shard is `io_memory` + 1 MiB for each clone, and no clone waits
//!   for another: one that waits holds something itself, and gets more at the latest when that comes back.
//! * While other clones are attached, a clone holds at most half of what they leave free: one whose source has stopped to
//!   answer for a minute keeps some memory, never all.
//! * Who holds memory waits for nothing but its own source and destination. Memory is the last thing taken, after the bytes
//!   of the regions are held; so there is no circle.
//!
//! **Bytes in flight**: background hydration keeps a pipeline of batches full. Its total is bounded for the shard, not for
//! each clone, and shared by weight among the clones that have batches in flight. A clone whose source has stalled does not
//! count: its share goes to the others. Each may always have one batch in flight. While clients use any clone the total is small:
//! enough to go on, little for them to wait behind.
//!
//! Not `Send`; costs O(clones) per decision.

use super::copy::COPY_UNIT_BYTES;
use crate::bail;
use crate::clone_state::CloneState;
use crate::error::Result;
use crate::local::oneshot;
use crate::units::ByteSize;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Memory for copies of one shard when nothing is configured, in bytes.
pub const IO_MEMORY_DEFAULT: u64 = 32 << 20;
/// The least that can be configured, in bytes: a few copy units.
pub const IO_MEMORY_MIN: u64 = 4 * COPY_UNIT_BYTES;
/// The most, in bytes: more is a mistake.
pub const IO_MEMORY_MAX: u64 = 64 << 30;

/// Bytes being copied in the background at a time on one shard when nobody uses any clone; at most half of the memory.
const PIPELINE_BYTES: u64 = 16 << 20;
/// The same while clients are at work.
const PIPELINE_BYTES_BUSY: u64 = 2 << 20;
/// Clients count as at work for this long after their last request.
const BUSY_WINDOW: Duration = Duration::from_millis(20);
/// Bytes of one batch when no batch size is set and there is no competitor.
pub(super) const BATCH_BYTES: u64 = COPY_UNIT_BYTES;
/// The least that batches shrink to, in bytes, so that many clones can have one in flight each.
const BATCH_BYTES_MIN: u64 = 64 << 10;
/// Batches in the share of a clone that has competitors: by so much finer the shares are.
const BATCHES_PER_SHARE: u64 = 4;
/// A clone of which no batch has ended for this long has stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// See the head of this file.
pub struct CopyPool {
    io_memory: u64,
    used: Cell<u64>,
    members: RefCell<Vec<Rc<Member>>>,
}

struct Member {
    state: Arc<CloneState>,
    used: Cell<u64>,
    waiting: RefCell<VecDeque<(u64, oneshot::Sender<CopyMemory>)>>,
    waiting_max: Cell<u64>,
    copies_in_flight: Cell<u64>,
    bytes_in_flight: Cell<u64>,
    /// When a batch last ended, or the only one was started.
    progress_at: Cell<Duration>,
}

impl Member {
    fn competes(&self, now: Duration) -> bool {
        self.copies_in_flight.get() > 0 && now.saturating_sub(self.progress_at.get()) <= STALLED_AFTER
    }
}

/// What background hydration of one clone may have in flight now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pipeline {
    /// Its share, in bytes.
    pub limit: u64,
    /// Bytes of a batch when no batch size is set.
    pub batch: u64,
}

/// One slice's part in a [`CopyPool`].
pub struct CopyShare {
    pool: Rc<CopyPool>,
    member: Rc<Member>,
}

/// Memory of a [`CopyPool`]; given back when dropped.
pub struct CopyMemory {
    pool: Rc<CopyPool>,
    member: Rc<Member>,
    bytes: u64,
}

/// A batch in flight, until it is dropped.
pub(super) struct BatchInFlight {
    member: Rc<Member>,
    bytes: u64,
}

impl Default for CopyPool {
    fn default() -> Self {
        Self::new(IO_MEMORY_DEFAULT)
    }
}

/// A configured `io_memory`, or the default. `Usage` when it is out of bounds.
pub fn checked_io_memory(configured: Option<u64>) -> Result<u64> {
    match configured.unwrap_or(IO_MEMORY_DEFAULT) {
        bytes if (IO_MEMORY_MIN..=IO_MEMORY_MAX).contains(&bytes) => Ok(bytes),
        bytes => bail!(
            Usage,
            "io_memory of {} is out of bounds: use {} to {}, for each shard",
            ByteSize(bytes),
            ByteSize(IO_MEMORY_MIN),
            ByteSize(IO_MEMORY_MAX)
        ),
    }
}

impl CopyPool {
    /// `io_memory` is in bytes; less than [`COPY_UNIT_BYTES`] counts as that.
    pub fn new(io_memory: u64) -> Self {
        let io_memory = io_memory.clamp(COPY_UNIT_BYTES, IO_MEMORY_MAX);
        Self { io_memory, used: Cell::new(0), members: RefCell::default() }
    }

    pub fn io_memory(&self) -> u64 {
        self.io_memory
    }
    /// Memory in use now, in bytes.
    pub fn used(&self) -> u64 {
        self.used.get()
    }

    /// The part of one slice, which is of the clone `state`.
    pub fn join(self: &Rc<Self>, state: Arc<CloneState>) -> CopyShare {
        let member = Rc::new(Member {
            state,
            used: Cell::new(0),
            waiting: RefCell::default(),
            waiting_max: Cell::new(0),
            copies_in_flight: Cell::new(0),
            bytes_in_flight: Cell::new(0),
            progress_at: Cell::new(Duration::ZERO),
        });
        self.members.borrow_mut().push(member.clone());
        CopyShare { pool: self.clone(), member }
    }

    /// Whether a clone may take so much more.
    fn fits(&self, member: &Member, bytes: u64) -> bool {
        let (free, own) = (self.io_memory.saturating_sub(self.used.get()), member.used.get());
        let is_alone = self.members.borrow().len() <= 1;
        own == 0 || (bytes <= free && (is_alone || own + bytes <= free))
    }

    fn take(self: &Rc<Self>, member: &Rc<Member>, bytes: u64) -> CopyMemory {
        self.used.set(self.used.get() + bytes);
        member.used.set(member.used.get() + bytes);
        CopyMemory { pool: self.clone(), member: member.clone(), bytes }
    }

    /// Serves who waits: the clone that holds least goes first, its own wishes in order.
    fn serve(self: &Rc<Self>) {
        loop {
            let next = {
                let members = self.members.borrow();
                let head = |member: &Member| member.waiting.borrow().front().map(|(bytes, _)| *bytes);
                let fitting = members.iter().filter(|m| head(m).is_some_and(|bytes| self.fits(m, bytes)));
                fitting.min_by_key(|member| member.used.get()).cloned()
            };
            let Some(member) = next else { return };
            let Some((bytes, sender)) = member.waiting.borrow_mut().pop_front() else { return };
            // A waiter that is gone drops the memory, which comes back here.
            sender.send(self.take(&member, bytes));
        }
    }
}

impl CopyShare {
    /// Waits for `bytes` of memory; at most one copy unit is given.
    pub async fn acquire(&self, bytes: u64) -> CopyMemory {
        if let Some(memory) = self.try_acquire(bytes) {
            return memory;
        }
        let (sender, receiver) = oneshot();
        self.member.waiting.borrow_mut().push_back((bytes.min(COPY_UNIT_BYTES), sender));
        self.member.waiting_max.set(self.member.waiting_max.get().max(self.waiting()));
        receiver.await.expect("the queue lives as long as its member, and self is borrowed")
    }

    /// The memory, if there is some and this clone does not wait for any.
    pub fn try_acquire(&self, bytes: u64) -> Option<CopyMemory> {
        let bytes = bytes.min(COPY_UNIT_BYTES);
        let fits = self.member.waiting.borrow().is_empty() && self.pool.fits(&self.member, bytes);
        fits.then(|| self.pool.take(&self.member, bytes))
    }

    /// Memory that this clone holds now, and the most that all together may hold, in bytes.
    pub fn used(&self) -> u64 {
        self.member.used.get()
    }
    pub fn io_memory(&self) -> u64 {
        self.pool.io_memory
    }
    /// Copies of this clone that wait for memory now, and the most that ever did.
    pub fn waiting(&self) -> u64 {
        self.member.waiting.borrow().len() as u64
    }
    pub fn waiting_max(&self) -> u64 {
        self.member.waiting_max.get()
    }

    /// What background hydration of this clone may have in flight.
    pub(super) fn pipeline(&self, now: Duration) -> Pipeline {
        let members = self.pool.members.borrow();
        let is_busy = members.iter().any(|member| member.state.is_foreground_active(now, BUSY_WINDOW));
        let total = if is_busy { PIPELINE_BYTES_BUSY } else { PIPELINE_BYTES }.min(self.pool.io_memory / 2);
        let others = members.iter().filter(|other| !Rc::ptr_eq(other, &self.member) && other.competes(now));
        let (own, others) =
            (self.member.state.budget().weight(), others.map(|m| m.state.budget().weight()).sum::<u64>());
        if others == 0 {
            return Pipeline { limit: total, batch: BATCH_BYTES };
        }
        let limit = total * own / (own + others);
        Pipeline { limit, batch: (limit / BATCHES_PER_SHARE).clamp(BATCH_BYTES_MIN, BATCH_BYTES) }
    }

    pub(super) fn copies_in_flight(&self) -> u64 {
        self.member.copies_in_flight.get()
    }
    pub(super) fn bytes_in_flight(&self) -> u64 {
        self.member.bytes_in_flight.get()
    }

    /// Counts a batch as in flight.
    pub(super) fn begin_batch(&self, bytes: u64, now: Duration) -> BatchInFlight {
        let member = self.member.clone();
        if member.copies_in_flight.get() == 0 {
            member.progress_at.set(now);
        }
        member.copies_in_flight.set(member.copies_in_flight.get() + 1);
        member.bytes_in_flight.set(member.bytes_in_flight.get() + bytes);
        BatchInFlight { member, bytes }
    }
}

impl BatchInFlight {
    pub(super) fn end(self, now: Duration) {
        self.member.progress_at.set(now);
    }
}

impl Drop for BatchInFlight {
    fn drop(&mut self) {
        let member = &self.member;
        member.copies_in_flight.set(member.copies_in_flight.get() - 1);
        member.bytes_in_flight.set(member.bytes_in_flight.get() - self.bytes);
    }
}

impl Drop for CopyMemory {
    fn drop(&mut self) {
        self.pool.used.set(self.pool.used.get() - self.bytes);
        self.member.used.set(self.member.used.get() - self.bytes);
        self.pool.serve();
    }
}

impl Drop for CopyShare {
    fn drop(&mut self) {
        self.pool.members.borrow_mut().retain(|member| !Rc::ptr_eq(member, &self.member));
        self.pool.serve();
    }
}

#[cfg(test)]
mod tests;
