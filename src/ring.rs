//! A private io_uring for each executor: the data path's way into the kernel.
//!
//! glommio drives the executor; this ring carries disk and socket I/O with our own buffers, flags (`RWF_DSYNC`)
//! and operations (`FALLOCATE` with any mode) that glommio's files do not offer, at a fraction of their cost per
//! operation. One task submits what a scheduler turn has queued with a single system call, another waits in the
//! ring for completions when nothing else can run: `ring/drive.rs` has the rules.
//!
//! Invariants:
//! * An operation owns what the kernel may touch (buffers, `msghdr`, the file) until its completion has been
//!   reaped. A future that is dropped leaves it in its slot, so the kernel never sees freed memory.
//! * Everything happens on the thread that made the ring.

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::local::Notify;
use crate::metrics::record::count as add;
use drive::Drive;
pub use drive::{Bell, Sleep};
use load::Load;
use sinks::Sinks;

pub mod doorbell;
mod drive;
mod load;
pub mod sinks;
mod watch;

/// Submission queue entries. More operations than this can be in flight: the queue is only passed through.
pub const SQ_ENTRIES: u32 = 512;
/// Completion queue entries; an overflow is kept by the kernel (IORING_FEAT_NODROP), this makes it rare.
const CQ_ENTRIES: u32 = 4096;
/// Shares of the background queue, beside the default queue's 1000: when both have work, the background gets a
/// tenth of the processor; alone, all of it.
const BACKGROUND_SHARES: usize = 100;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

enum Slot {
    Free(usize),
    /// In flight; somebody waits.
    Waiting(Option<Waker>),
    /// In flight; the future is gone, its memory stays here until the kernel is done.
    Abandoned(#[allow(dead_code, reason = "held, not read")] Box<dyn Any>),
    Done(i32),
}

struct Inner {
    uring: IoUring,
    slots: Vec<Slot>,
    free: usize,
    in_flight: usize,
    sinks: Sinks,
    /// Whom completions wake; reused.
    woken: Vec<Waker>,
}

/// The ring of one executor.
pub struct Ring {
    inner: RefCell<Inner>,
    submit: Notify,
    submit_pending: Cell<bool>,
    closing: Cell<bool>,
    stopping: Cell<bool>,
    /// Operations in flight that the end does not wait for.
    disregarded: Cell<usize>,
    taskrun: bool,
    /// Sinks are being told: what they start is handed to the kernel after that, by whoever takes completions.
    telling: Cell<bool>,
    background: glommio::TaskQueueHandle,
    drive: Drive,
    load: Load,
}

const NO_SLOT: usize = usize::MAX;

/// What taking completions came to.
#[derive(Clone, Copy, Default)]
struct Reaped {
    /// There were some.
    any: bool,
    /// Somebody was woken, perhaps: there may be tasks to run.
    woke: bool,
}

impl Ring {
    /// [`Ring::start_with`] a bell that nobody else knows.
    pub fn start() -> io::Result<Rc<Ring>> {
        Self::start_with(Bell::new()?)
    }

    /// Makes the ring of the current glommio executor and starts its tasks. Call [`Ring::shutdown`] before the
    /// executor ends.
    pub fn start_with(bell: Arc<Bell>) -> io::Result<Rc<Ring>> {
        // Kernels from 6.1 run completions only when asked for, on the submitting thread: fewer interruptions.
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(CQ_ENTRIES)
            .build(SQ_ENTRIES);
        let (uring, taskrun) = match modern {
            Ok(uring) => (uring, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (IoUring::builder().setup_cqsize(CQ_ENTRIES).build(SQ_ENTRIES)?, false)
            }
            Err(error) => return Err(error),
        };
        let background = glommio::executor().create_task_queue(
            glommio::Shares::Static(BACKGROUND_SHARES),
            glommio::Latency::NotImportant,
            "background",
        );
        let ring = Rc::new(Ring {
            inner: RefCell::new(Inner {
                uring,
                slots: Vec::new(),
                free: NO_SLOT,
                in_flight: 0,
                sinks: Sinks::default(),
                woken: Vec::new(),
            }),
            submit: Notify::default(),
            submit_pending: Cell::new(false),
            closing: Cell::new(false),
            stopping: Cell::new(false),
            disregarded: Cell::new(0),
            taskrun,
            telling: Cell::new(false),
            background,
            drive: Drive::new(bell),
            load: Load::new(),
        });
        CURRENT.with(|current| *current.borrow_mut() = Some(ring.clone()));
        ring.start_driving();
        Ok(ring)
    }

    /// The task queue for work that gives way to all other work.
    pub fn background(&self) -> glommio::TaskQueueHandle {
        self.background
    }

    /// The ring of this executor, also after its shutdown.
    ///
    /// # Panics
    /// When [`Ring::start`] was not called on this thread.
    pub fn current() -> Rc<Ring> {
        CURRENT.with(|current| current.borrow().clone()).expect("Ring::start was called on this executor")
    }

    /// Cancels what only waits (receives, accepts), and ends the ring's tasks once nothing is in flight any more.
    pub async fn shutdown(self: &Rc<Self>) {
        self.closing.set(true);
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        // SAFETY: the operation points to nothing.
        let (result, ()) = unsafe { self.operation(entry, ()) }.await;
        if let Err(error) = result {
            log::debug!("io_uring: nothing was cancelled: {error}");
        }
        // Bounded: a disk may never answer.
        for _ in 0..1000 {
            if self.inner.borrow().in_flight <= self.disregarded.get() {
                break;
            }
            self.sleep(Duration::from_millis(1)).await;
        }
        // Without a wait from here to the end of the executor's main task: nobody watches it any more.
        self.stopping.set(true);
        self.submit.notify();
        self.drive.stop();
        // It stays the current ring: what tasks still start never completes, as they have no time left to run in.
    }

    /// Hands queued entries to the kernel and lets it run finished work.
    fn enter(&self) {
        const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS
        let mut inner = self.inner.borrow_mut();
        loop {
            let queued = inner.uring.submission().len() as u32;
            let flags = if self.taskrun { GETEVENTS } else { 0 };
            if queued == 0 && flags == 0 {
                return;
            }
            add(&self.load.system_calls, 1);
            // SAFETY: no signal mask or other argument is passed.
            match unsafe { inner.uring.submitter().enter::<libc::sigset_t>(queued, 0, flags, None) } {
                Ok(_) if inner.uring.submission().is_empty() => return,
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The completion queue overflowed or memory is short: reap first, the submitter comes again.
                    Some(libc::EBUSY | libc::EAGAIN) => {
                        drop(inner);
                        self.request_submit();
                        return;
                    }
                    _ => {
                        log::error!("io_uring_enter: {error}");
                        std::process::abort();
                    }
                },
            }
        }
    }

    /// Sleeps until there is a completion, at most for `timeout`. Submits what is queued, too.
    fn wait(&self, timeout: Duration) {
        let inner = self.inner.borrow();
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        add(&self.load.system_calls, 1);
        match inner.uring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => {
                    log::error!("io_uring_enter: {error}");
                    std::process::abort();
                }
            },
        }
    }

    /// Hands queued entries to the kernel at once: all that were queued since the last call, with one system call when
    /// they are at most [`SQ_ENTRIES`]. Takes the completions of what could be answered at once.
    pub fn submit_now(&self) {
        self.enter();
        self.reap();
    }

    /// So many operations more (or fewer) that the end is not to wait for: they never complete by themselves.
    pub fn disregard(&self, operations: isize) {
        self.disregarded.set(self.disregarded.get().saturating_add_signed(operations));
    }

    fn request_submit(&self) {
        if !self.submit_pending.replace(true) {
            self.submit.notify();
        }
    }

    /// Takes the completions there are, and has the kernel finish what it holds back.
    ///
    /// The flag may stay set with nothing held back (the kernel sets it after it has added the work, which may be
    /// done by then), so it is no condition to loop on. What is left, of some twenty items at a time, is finished by
    /// the next call or by [`Self::wait`].
    fn reap(&self) -> Reaped {
        let mut all = Reaped::default();
        loop {
            if self.taskrun && self.inner.borrow_mut().uring.submission().taskrun() {
                self.enter();
            }
            let more = self.drain();
            if !more.any {
                return all;
            }
            all = Reaped { any: true, woke: all.woke || more.woke };
        }
    }

    /// Takes the completions that are in the queue.
    fn drain(&self) -> Reaped {
        let mut inner = self.inner.borrow_mut();
        let Inner { uring, slots, free, in_flight, sinks, woken } = &mut *inner;
        let mut wakers = std::mem::take(woken);
        let mut released: Vec<Slot> = Vec::new();
        let (mut count, mut woke) = (0, false);
        for cqe in uring.completion() {
            debug_assert!(!cqueue::more(cqe.flags()), "no multishot operation is used");
            count += 1;
            *in_flight -= 1;
            if sinks.take(cqe.user_data(), cqe.result()) {
                continue;
            }
            woke = true;
            let index = cqe.user_data() as usize;
            match std::mem::replace(&mut slots[index], Slot::Done(cqe.result())) {
                Slot::Waiting(waker) => wakers.extend(waker),
                abandoned @ Slot::Abandoned(_) => {
                    released.push(abandoned);
                    slots[index] = Slot::Free(*free);
                    *free = index;
                }
                Slot::Free(_) | Slot::Done(_) => unreachable!("one completion per operation"),
            }
        }
        drop(inner);
        add(&self.load.completed, count as u64);
        drop(released);
        wakers.drain(..).for_each(Waker::wake);
        if wakers.capacity() > 0 {
            self.inner.borrow_mut().woken = wakers;
        }
        woke |= self.tell_sinks();
        Reaped { any: count > 0, woke }
    }

    /// Queues an operation. `keep` holds everything that `entry` points to.
    ///
    /// # Safety
    /// Every pointer and descriptor in `entry` must stay valid for as long as `keep` lives, wherever `keep` is
    /// moved to.
    unsafe fn operation<K: 'static>(self: &Rc<Self>, entry: squeue::Entry, keep: K) -> Operation<K> {
        let mut inner = self.inner.borrow_mut();
        let index = match inner.free {
            NO_SLOT => {
                inner.slots.push(Slot::Waiting(None));
                inner.slots.len() - 1
            }
            index => {
                let Slot::Free(next) = inner.slots[index] else { unreachable!("free list holds free slots") };
                inner.free = next;
                inner.slots[index] = Slot::Waiting(None);
                index
            }
        };
        inner.in_flight += 1;
        add(&self.load.submitted, 1);
        let entry = entry.user_data(index as u64);
        // SAFETY: the caller vouches for the pointers; the slot (or the future) keeps `keep` until completion.
        while unsafe { inner.uring.submission().push(&entry) }.is_err() {
            drop(inner);
            self.enter();
            inner = self.inner.borrow_mut();
        }
        drop(inner);
        self.request_submit();
        Operation { ring: self.clone(), index, keep: Some(keep) }
    }

    /// Reads into the window of `buf` from `offset` (u64::MAX: the file's own position).
    pub fn read<B: IoBufMut>(
        self: &Rc<Self>,
        fd: &Rc<OwnedFd>,
        mut buf: B,
        offset: u64,
    ) -> Operation<(B, Rc<OwnedFd>)> {
        let (ptr, len) = buf.window();
        let entry = opcode::Read::new(types::Fd(fd.as_raw_fd()), ptr, len).offset(offset).build();
        // SAFETY: `window` is stable while `buf` lives; the descriptor is kept open beside it.
        unsafe { self.operation(entry, (buf, fd.clone())) }
    }

    /// Writes `data` at `offset`; `dsync` makes it durable before completion (RWF_DSYNC).
    pub fn write(
        self: &Rc<Self>,
        fd: &Rc<OwnedFd>,
        data: bytes::Bytes,
        offset: u64,
        dsync: bool,
    ) -> Operation<(bytes::Bytes, Rc<OwnedFd>)> {
        let rw_flags = if dsync { libc::RWF_DSYNC } else { 0 };
        let len = data.len().min(i32::MAX as usize & !4095) as u32;
        let entry =
            opcode::Write::new(types::Fd(fd.as_raw_fd()), data.as_ptr(), len).offset(offset).rw_flags(rw_flags).build();
        // SAFETY: the memory of `Bytes` does not move with the handle and lives as long as it.
        unsafe { self.operation(entry, (data, fd.clone())) }
    }

    /// fdatasync(2).
    pub fn fdatasync(self: &Rc<Self>, fd: &Rc<OwnedFd>) -> Operation<Rc<OwnedFd>> {
        let entry = opcode::Fsync::new(types::Fd(fd.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: only a descriptor, kept open by `keep`.
        unsafe { self.operation(entry, fd.clone()) }
    }

    /// fallocate(2) with `mode`.
    pub fn fallocate(self: &Rc<Self>, fd: &Rc<OwnedFd>, mode: i32, offset: u64, len: u64) -> Operation<Rc<OwnedFd>> {
        let entry = opcode::Fallocate::new(types::Fd(fd.as_raw_fd()), len).offset(offset).mode(mode).build();
        // SAFETY: only a descriptor, kept open by `keep`.
        unsafe { self.operation(entry, fd.clone()) }
    }

    /// recv(2) into `buf[window]`.
    pub fn recv<B: IoBufMut>(
        self: &Rc<Self>,
        fd: &Rc<OwnedFd>,
        mut buf: B,
        window: Range<usize>,
        flags: i32,
    ) -> Operation<(B, Rc<OwnedFd>)> {
        let (ptr, len) = buf.window();
        let end = window.end.min(len as usize);
        assert!(window.start < end, "receive into an empty window");
        // SAFETY: the start is inside the window.
        let ptr = unsafe { ptr.add(window.start) };
        let len = (end - window.start) as u32;
        let entry = opcode::Recv::new(types::Fd(fd.as_raw_fd()), ptr, len).flags(flags).build();
        // SAFETY: as for `read`.
        unsafe { self.operation(entry, (buf, fd.clone())) }
    }

    /// sendmsg(2) of all `parts` (at most IOV_MAX of them); returns how many bytes went.
    pub fn send(self: &Rc<Self>, fd: &Rc<OwnedFd>, parts: Vec<bytes::Bytes>) -> Operation<(Box<Message>, Rc<OwnedFd>)> {
        let message = Message::new(parts);
        let entry = opcode::SendMsg::new(types::Fd(fd.as_raw_fd()), &message.header)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build();
        // SAFETY: the header is boxed, so it does not move; it points into vectors that it owns, and those to
        // memory that the parts keep.
        unsafe { self.operation(entry, (message, fd.clone())) }
    }

    /// A command of the file's driver (IORING_OP_URING_CMD) that takes its 16 bytes and points to nothing.
    ///
    /// # Safety
    /// The driver must not take anything in `command` for an address.
    pub unsafe fn command(self: &Rc<Self>, fd: &Rc<OwnedFd>, opcode: u32, command: [u8; 16]) -> Operation<Rc<OwnedFd>> {
        let entry = opcode::UringCmd16::new(types::Fd(fd.as_raw_fd()), opcode).cmd(command).build();
        // SAFETY: by the caller no pointers; the descriptor is kept open by `keep`.
        unsafe { self.operation(entry, fd.clone()) }
    }

    /// accept4(2), close-on-exec.
    pub fn accept(self: &Rc<Self>, fd: &Rc<OwnedFd>) -> Operation<Rc<OwnedFd>> {
        let entry = opcode::Accept::new(types::Fd(fd.as_raw_fd()), std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build();
        // SAFETY: no address is asked for; the descriptor is kept open by `keep`.
        unsafe { self.operation(entry, fd.clone()) }
    }
}

/// Memory that the kernel may write into while it is owned by an operation.
///
/// # Safety
/// The window must be stable while the value lives, wherever the value is moved to.
pub unsafe trait IoBufMut: 'static {
    fn window(&mut self) -> (*mut u8, u32);
}
// SAFETY: a DmaBuf owns a heap allocation that does not move with it.
unsafe impl IoBufMut for crate::dma_buf::DmaBuf {
    fn window(&mut self) -> (*mut u8, u32) {
        let len = self.len().min(i32::MAX as usize & !4095) as u32;
        (self.as_mut_ptr(), len)
    }
}

/// A `msghdr` with what it points to.
pub struct Message {
    header: libc::msghdr,
    _iovecs: Vec<libc::iovec>,
    parts: Vec<bytes::Bytes>,
}

impl Message {
    fn new(parts: Vec<bytes::Bytes>) -> Box<Self> {
        let mut iovecs: Vec<libc::iovec> = parts
            .iter()
            .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
            .collect();
        // SAFETY: all zeros is a valid msghdr (null pointers, zero lengths).
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = iovecs.as_mut_ptr();
        header.msg_iovlen = iovecs.len();
        Box::new(Self { header, _iovecs: iovecs, parts })
    }
    /// The parts, to send the rest of them.
    pub fn into_parts(self) -> Vec<bytes::Bytes> {
        self.parts
    }
}

/// An operation in flight. Resolves to its result (bytes, or a descriptor) and what it kept.
pub struct Operation<K: 'static> {
    ring: Rc<Ring>,
    index: usize,
    keep: Option<K>,
}

impl<K> Unpin for Operation<K> {}

impl<K: 'static> Future for Operation<K> {
    type Output = (io::Result<u32>, K);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.ring.inner.borrow_mut();
        let index = self.index;
        match &mut inner.slots[index] {
            Slot::Waiting(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Slot::Done(result) => {
                let result = *result;
                inner.slots[index] = Slot::Free(inner.free);
                inner.free = index;
                drop(inner);
                let keep = self.keep.take().expect("an operation is polled to its end once");
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u32) };
                Poll::Ready((result, keep))
            }
            Slot::Free(_) | Slot::Abandoned(_) => unreachable!("the slot of a live operation"),
        }
    }
}

impl<K: 'static> Drop for Operation<K> {
    fn drop(&mut self) {
        let Some(keep) = self.keep.take() else { return };
        let mut inner = self.ring.inner.borrow_mut();
        let index = self.index;
        if matches!(inner.slots[index], Slot::Done(_)) {
            inner.slots[index] = Slot::Free(inner.free);
            inner.free = index;
        } else {
            inner.slots[index] = Slot::Abandoned(Box::new(keep));
        }
    }
}
