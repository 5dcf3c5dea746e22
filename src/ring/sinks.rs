//! Operations without a task: who does one after the other, and is told of each at once.
//!
//! A task costs a wake-up and a turn of the scheduler for each completion. A sink is called where completions are taken, and
//! what it starts there is handed to the kernel by the same system call that waits for the next one.
//!
//! Invariants:
//! * A sink stays until [`Ring::remove_sink`] was called and nothing that it has started is in flight.
//! * It is called on the ring's thread, with nothing of the ring borrowed; it must not block.

use super::{Inner, Ring};
use crate::metrics::record::count as add;
use io_uring::{opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// Marks completions of sinks; the others have the index of a slot.
const SINK: u64 = 1 << 63;
/// Registered buffers of one ring, all sinks together; a sink that finds no room does without.
const BUFFERS: u16 = 2048;

/// Is told of the completions of what it has started.
pub trait Completes {
    /// `token` is that of the operation, `result` what the kernel says: bytes, or a negative errno. Returns whether a task
    /// was woken or spawned.
    fn completed(self: Rc<Self>, token: u32, result: i32) -> bool;
}

/// Names a sink of one ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SinkId(u32);

struct Sink {
    /// `None`: the place is free.
    target: Option<Rc<dyn Completes>>,
    in_flight: usize,
    removed: bool,
}

/// All of a ring.
#[derive(Default)]
pub(super) struct Sinks {
    sinks: Vec<Sink>,
    /// Taken from the completion queue, not told yet. Reused.
    completed: Vec<(u32, u32, i32)>,
    buffers: Buffers,
}

/// The table of registered buffers: ranges that were given out.
#[derive(Default)]
struct Buffers {
    /// `None`: not tried yet.
    has_table: Option<bool>,
    taken: Vec<(u16, u16)>,
}

impl Buffers {
    /// The first place where `count` in a row are free.
    fn take(&mut self, count: u16) -> Option<u16> {
        let mut at = 0u16;
        self.taken.sort_unstable();
        for (start, len) in &self.taken {
            if start - at >= count {
                break;
            }
            at = start + len;
        }
        if BUFFERS - at < count {
            return None;
        }
        self.taken.push((at, count));
        Some(at)
    }
}

impl Sinks {
    /// Whether the completion is a sink's: then it is kept for [`Ring::tell_sinks`].
    pub fn take(&mut self, user_data: u64, result: i32) -> bool {
        if user_data & SINK == 0 {
            return false;
        }
        self.completed.push(((user_data & !SINK) as u32, ((user_data & !SINK) >> 32) as u32, result));
        true
    }
}

impl Ring {
    /// Adds a sink.
    pub fn add_sink(&self, target: Rc<dyn Completes>) -> SinkId {
        let mut inner = self.inner.borrow_mut();
        let sinks = &mut inner.sinks.sinks;
        let sink = Sink { target: Some(target), in_flight: 0, removed: false };
        let at = match sinks.iter().position(|sink| sink.target.is_none()) {
            Some(free) => {
                sinks[free] = sink;
                free
            }
            None => {
                sinks.push(sink);
                sinks.len() - 1
            }
        };
        // Far fewer than 2^31: each is a device's queue.
        SinkId(at as u32)
    }

    /// The sink is not needed any more, once what it has started has completed.
    pub fn remove_sink(&self, sink: SinkId) {
        let removed = {
            let mut inner = self.inner.borrow_mut();
            let entry = &mut inner.sinks.sinks[sink.0 as usize];
            entry.removed = true;
            if entry.in_flight == 0 { entry.target.take() } else { None }
        };
        drop(removed);
    }

    /// Tells the sinks what has completed; returns whether a task was woken.
    pub(super) fn tell_sinks(&self) -> bool {
        let mut completed = std::mem::take(&mut self.inner.borrow_mut().sinks.completed);
        if completed.is_empty() {
            return false;
        }
        let mut woke = false;
        self.telling.set(true);
        for (token, sink, result) in completed.drain(..) {
            let (target, removed) = {
                let mut inner = self.inner.borrow_mut();
                let entry = &mut inner.sinks.sinks[sink as usize];
                entry.in_flight -= 1;
                let is_last = entry.removed && entry.in_flight == 0;
                (entry.target.clone(), if is_last { entry.target.take() } else { None })
            };
            drop(removed);
            if let Some(target) = target {
                woke |= target.completed(token, result);
            }
        }
        self.telling.set(false);
        let mut inner = self.inner.borrow_mut();
        if inner.sinks.completed.is_empty() {
            inner.sinks.completed = completed;
        }
        woke
    }

    /// Queues an operation of a sink.
    ///
    /// # Safety
    /// Every pointer and descriptor in `entry` must stay valid for as long as the sink is there.
    unsafe fn start_for(&self, sink: SinkId, token: u32, entry: squeue::Entry) {
        let entry = entry.user_data(SINK | u64::from(sink.0) << 32 | u64::from(token));
        let mut inner = self.inner.borrow_mut();
        inner.sinks.sinks[sink.0 as usize].in_flight += 1;
        inner.in_flight += 1;
        add(&self.load.submitted, 1);
        // SAFETY: the caller vouches for the pointers.
        while unsafe { inner.uring.submission().push(&entry) }.is_err() {
            drop(inner);
            self.enter();
            inner = self.inner.borrow_mut();
        }
        drop(inner);
        if !self.telling.get() {
            self.request_submit();
        }
    }

    /// A command of the file's driver that takes its 16 bytes and the number `addr`, and points to nothing.
    ///
    /// # Safety
    /// The driver must take neither for an address; `fd` must stay open as long as the sink is there.
    pub unsafe fn command_for(
        &self,
        sink: SinkId,
        token: u32,
        fd: &OwnedFd,
        opcode: u32,
        command: [u8; 16],
        addr: Option<u64>,
    ) {
        let entry = opcode::UringCmd16::new(types::Fd(fd.as_raw_fd()), opcode).cmd(command).addr(addr).build();
        // SAFETY: by the caller no pointers, and a descriptor that stays open.
        unsafe { self.start_for(sink, token, entry) }
    }

    /// Reads `len` bytes at `offset` into a registered buffer of the kernel's, or writes them from there.
    ///
    /// # Safety
    /// `fd` must stay open until the completion.
    pub unsafe fn transfer_for(&self, sink: SinkId, token: u32, fd: &OwnedFd, transfer: BufferTransfer) {
        let BufferTransfer { writes, buffer, offset, len } = transfer;
        let fd = types::Fd(fd.as_raw_fd());
        let entry = match writes {
            true => opcode::WriteFixed::new(fd, std::ptr::null(), len, buffer).offset(offset).build(),
            false => opcode::ReadFixed::new(fd, std::ptr::null_mut(), len, buffer).offset(offset).build(),
        };
        // SAFETY: the address is an offset into the buffer, which the kernel checks; the descriptor stays open by the caller.
        unsafe { self.start_for(sink, token, entry) }
    }

    /// Takes `count` places for registered buffers, the kernel's to fill. `None` when there is no room, or no such thing.
    pub fn take_buffers(&self, count: u16) -> Option<u16> {
        let mut inner = self.inner.borrow_mut();
        let Inner { uring, sinks, .. } = &mut *inner;
        let has_table = *sinks.buffers.has_table.get_or_insert_with(|| {
            let registered = uring.submitter().register_buffers_sparse(u32::from(BUFFERS));
            if let Err(error) = &registered {
                log::debug!("io_uring: no table of buffers: {}", io::Error::kind(error));
            }
            registered.is_ok()
        });
        if has_table { sinks.buffers.take(count) } else { None }
    }

    /// Gives back what [`Self::take_buffers`] has returned.
    pub fn give_buffers_back(&self, start: u16) {
        self.inner.borrow_mut().sinks.buffers.taken.retain(|(taken, _)| *taken != start);
    }
}

/// What [`Ring::transfer_for`] moves.
#[derive(Clone, Copy, Debug)]
pub struct BufferTransfer {
    /// From the buffer to the file; else the other way.
    pub writes: bool,
    /// The registered buffer.
    pub buffer: u16,
    /// In the file, in bytes.
    pub offset: u64,
    /// From the start of the buffer, in bytes.
    pub len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_for_buffers_are_given_out_once_and_again() {
        let mut buffers = Buffers::default();
        let starts: Vec<_> = (0..16).map(|_| buffers.take(128)).collect();
        assert_eq!(starts, (0..16).map(|nr| Some(nr * 128)).collect::<Vec<_>>());
        assert_eq!(buffers.take(1), None);
        buffers.taken.retain(|(start, _)| ![128, 256, 512].contains(start));
        assert_eq!(
            (buffers.take(300), buffers.take(200), buffers.take(56), buffers.take(128)),
            (None, Some(128), Some(328), Some(512))
        );
        assert_eq!(buffers.take(1), None);
    }
}
