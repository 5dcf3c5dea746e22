//! One hardware queue of a ublk device, served by the executor of one shard through its ring.
//!
//! A tag's request comes as the completion of a command, and is answered by the same command that waits for the next one.
//! What can be done straight on the destination (hydrated, whole blocks) is started where that completion is taken, with
//! the kernel's own pages where it registers them (AUTO_BUF_REG): no task, no copy, no allocation. For all else there is a
//! task; its data are copied between the kernel's pages and our buffers by pread and pwrite on /dev/ublkcN, which never
//! wait for anything.
//!
//! Invariants:
//! * All tags of a queue are fetched with one system call. A daemon that died between two would leave the device to nobody.
//! * A request that was begun is carried out to its end and answered. The one exception: a request that the ending clone
//!   turned away, when the device is left to the next daemon ([`Queue::begin_to_leave`]); it was not carried out, and comes again.
//! * What did not come to its end straight on the destination is done again, as a whole, by the clone: it knows what to make
//!   of an error. (So nothing goes straight there that may not be repeated: a FUA write, whose flush may have failed.)
//! * What was answered is in the engine's hands as any acknowledged request; nothing is held back here.
//! * Everything happens on the thread that fetched the tags: the kernel demands it.

use super::admit::{Verdict, admit, errno_of, is_turned_away};
use super::proto::{
    BUFFER_NONE, DESCRIPTOR_BYTES, Descriptor, Io, buffer_address, data_position, descriptors_bytes,
    descriptors_offset, io_command,
};
use super::stats::UblkStats;
use super::turn::turn;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::io_frontend::nbd::Counted;
use crate::io_frontend::request::{Completion, Request, RequestFlags, Volume};
use crate::local::Notify;
use crate::log_limit::LogLimit;
use crate::ring::sinks::{BufferTransfer, Completes, SinkId};
use crate::ring::{Ring, SQ_ENTRIES};
use crate::shard::dispatch::{DirectAccess, Dispatcher};
use crate::units::ByteRange;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::rc::Rc;

/// What a queue is made from, on its way to its shard.
pub struct QueueParts {
    /// A duplicate of the one open /dev/ublkcN.
    pub device: File,
    pub queue: u16,
    pub depth: u16,
    pub io_bytes_max: u32,
    /// The device was made with AUTO_BUF_REG.
    pub registers_buffers: bool,
    /// Counts the queues whose device file is open.
    pub counted: Counted,
    /// For messages: "clone 'vm1': /dev/ublkb0".
    pub label: String,
}

/// In the token of an operation: it is a tag's own transfer, not the command that waits for its request.
const TRANSFER: u32 = 1 << 16;

/// A tag's transfer between the kernel's pages and the destination.
struct Transfer {
    access: DirectAccess,
    range: ByteRange,
    writes: bool,
}

/// A queue; its device file is closed when it and its tasks are gone.
pub struct Queue {
    // First: unmapped before the file is closed.
    descriptors: Descriptors,
    file: File,
    fd: OwnedFd,
    ring: Rc<Ring>,
    sink: Cell<Option<SinkId>>,
    /// Where the kernel registers the tags' buffers, if it does: one after the other from here.
    buffers: Option<u16>,
    registers_buffers: bool,
    queue: u16,
    depth: u16,
    io_bytes_max: u32,
    label: String,
    volume: Rc<Dispatcher>,
    env: Rc<dyn Env>,
    stats: Rc<UblkStats>,
    log: RefCell<LogLimit>,
    /// By tag.
    transfers: RefCell<Vec<Option<Transfer>>>,
    /// Requests that are being carried out.
    busy: Cell<u64>,
    /// Commands that wait for a request.
    fetching: Cell<usize>,
    /// What the kernel said when it refused to wait for a tag's first request.
    refused: Cell<Option<(u16, i32)>>,
    leaving: Cell<bool>,
    changed: Notify,
    // Last: counts until the file is closed.
    _counted: Counted,
}

impl Queue {
    /// Everything that can fail, before the first tag is fetched.
    pub fn new(parts: QueueParts, volume: Rc<Dispatcher>, env: Rc<dyn Env>, stats: Rc<UblkStats>) -> Result<Rc<Self>> {
        let QueueParts { device, queue, depth, io_bytes_max, registers_buffers, counted, label } = parts;
        let failed = |error| Error::from_io(error, format!("{label}: queue {queue} can't be set up"));
        if u32::from(depth) > SQ_ENTRIES {
            let text = format!("{label}: queues of {depth} requests are not supported, {SQ_ENTRIES} are the most");
            return Err(Error::new(crate::error::ErrorKind::Limit, text));
        }
        let descriptors = Descriptors::map(&device, queue, depth).map_err(failed)?;
        let fd = OwnedFd::from(device.try_clone().map_err(failed)?);
        let ring = Ring::current();
        let buffers = if registers_buffers { ring.take_buffers(depth) } else { None };
        Ok(Rc::new(Self {
            descriptors,
            file: device,
            fd,
            ring,
            sink: Cell::new(None),
            buffers,
            registers_buffers,
            queue,
            depth,
            io_bytes_max,
            label,
            volume,
            env,
            stats,
            log: RefCell::default(),
            transfers: RefCell::new((0..depth).map(|_| None).collect()),
            busy: Cell::new(0),
            fetching: Cell::new(0),
            refused: Cell::new(None),
            leaving: Cell::new(false),
            changed: Notify::default(),
            _counted: counted,
        }))
    }

    /// Fetches all tags. Fails when the kernel refuses one.
    pub async fn start(self: &Rc<Self>) -> Result<()> {
        self.sink.set(Some(self.ring.add_sink(self.clone())));
        // Room for all of them.
        self.ring.submit_now();
        for tag in 0..self.depth {
            self.issue(Io::Fetch, tag, 0);
        }
        // What is refused is refused at once. Requests come later, as a rule, when the device is started.
        self.ring.submit_now();
        match self.refused.get() {
            None => Ok(()),
            Some((tag, errno)) => {
                let text = format!("{}: tag {tag} of queue {} can't be served", self.label, self.queue);
                Err(Error::from_io(io::Error::from_raw_os_error(errno), text))
            }
        }
    }

    fn issue(&self, io: Io, tag: u16, result: i32) {
        let Some(sink) = self.sink.get() else { return };
        self.fetching.set(self.fetching.get() + 1);
        let buffer = self.buffers.map_or(BUFFER_NONE, |first| first + tag);
        let addr = self.registers_buffers.then(|| buffer_address(buffer));
        let command = io_command(self.queue, tag, result);
        // SAFETY: with USER_COPY, which every device of ours has, the driver demands that the address in the command is 0, as
        // it is; the number beside it is a place in a table. The queue keeps the file open while its sink is there.
        unsafe { self.ring.command_for(sink, tag.into(), &self.fd, io.opcode(), command, addr) }
    }

    /// A tag's command has completed: there is a request, or there will be none any more.
    fn fetched(self: &Rc<Self>, tag: u16, result: i32) -> bool {
        self.fetching.set(self.fetching.get() - 1);
        if self.leaving.get() {
            self.ring.disregard(-1);
        }
        match result {
            // If it is left to the next daemon, it was not begun, and comes again there.
            0 if !self.leaving.get() => return self.begin(tag),
            0 => {}
            // The device stops.
            error if error == -libc::ENODEV => {}
            error if error < 0 => {
                self.refused.set(Some((tag, -error)));
                let error = io::Error::from_raw_os_error(-error);
                log::error!("{}: tag {tag} is not served any more: {error}", self.label);
            }
            other => log::error!("{}: the kernel wants {other} of tag {tag}", self.label),
        }
        self.end_if_over();
        false
    }

    /// When no tag is served any more, and it is not left to the next daemon.
    fn end_if_over(&self) {
        if self.fetching.get() == 0
            && self.busy.get() == 0
            && let Some(sink) = self.sink.take()
        {
            self.ring.remove_sink(sink);
        }
    }

    /// Begins a tag's request; returns whether that takes a task.
    fn begin(self: &Rc<Self>, tag: u16) -> bool {
        self.busy.set(self.busy.get() + 1);
        self.stats.in_flight.set(self.stats.in_flight.get() + 1);
        self.stats.count_request();
        let descriptor = self.descriptors.read(tag);
        let verdict = admit(&descriptor, self.io_bytes_max);
        if self.begin_transfer(tag, &descriptor, &verdict) {
            return false;
        }
        self.spawn(tag, verdict);
        true
    }

    /// Starts a transfer straight between the kernel's pages and the destination, if that is possible.
    fn begin_transfer(&self, tag: u16, descriptor: &Descriptor, verdict: &Verdict) -> bool {
        let (range, writes) = match verdict {
            Verdict::Read(range) => (*range, false),
            Verdict::Write { range, flags } if flags.is_empty() => (*range, true),
            _ => return false,
        };
        let (Some(first), Some(sink)) = (self.buffers, self.sink.get()) else { return false };
        if descriptor.flags & Descriptor::NEED_REG_BUF != 0 {
            return false;
        }
        let Some(access) = self.volume.begin_direct(range, writes) else { return false };
        // At most io_bytes_max, a u32.
        let transfer = BufferTransfer { writes, buffer: first + tag, offset: range.start(), len: range.len() as u32 };
        let mut transfers = self.transfers.borrow_mut();
        let kept = transfers[usize::from(tag)].insert(Transfer { access, range, writes });
        // SAFETY: the file is kept open beside the tag until the transfer has completed.
        unsafe { self.ring.transfer_for(sink, TRANSFER | u32::from(tag), kept.access.file(), transfer) };
        true
    }

    /// A tag's transfer has ended; returns whether that takes a task.
    fn transferred(self: &Rc<Self>, tag: u16, result: i32) -> bool {
        let transfer = self.transfers.borrow_mut()[usize::from(tag)].take();
        let Some(Transfer { access, range, writes }) = transfer else { return false };
        let wakes = access.is_waited_for();
        if i64::from(result) == range.len() as i64 {
            access.done();
            self.stats.count_direct();
            match writes {
                true => self.stats.count_written(range.len()),
                false => self.stats.count_read(range.len()),
            }
            return self.answer(tag, Some(result)) || wakes;
        }
        drop(access);
        let verdict = match writes {
            true => Verdict::Write { range, flags: RequestFlags::empty() },
            false => Verdict::Read(range),
        };
        self.spawn(tag, verdict);
        true
    }

    /// Has the clone carry the request out.
    fn spawn(self: &Rc<Self>, tag: u16, verdict: Verdict) {
        let queue = self.clone();
        self.env.spawn(Box::pin(async move {
            let result = queue.carry_out(tag, verdict).await;
            queue.answer(tag, result);
        }));
    }

    /// Answers a tag's request, and waits for the next one. `None`: it was turned away, and comes again to the next daemon.
    fn answer(&self, tag: u16, result: Option<i32>) -> bool {
        self.busy.set(self.busy.get() - 1);
        self.stats.in_flight.set(self.stats.in_flight.get() - 1);
        if let Some(result) = result {
            self.issue(Io::CommitAndFetch, tag, result);
        }
        if self.leaving.get() {
            self.ring.disregard(isize::from(result.is_some()));
            self.changed.notify();
            return true;
        }
        false
    }

    /// Carries the tag's request out; what the kernel is told. `None`: it was turned away, and comes again.
    async fn carry_out(&self, tag: u16, verdict: Verdict) -> Option<i32> {
        let position = data_position(self.queue, tag);
        let _turn = match &verdict {
            Verdict::Read(range) | Verdict::Write { range, .. } => Some(turn(range.start(), range.len()).await),
            _ => None,
        };
        let done = match verdict {
            Verdict::Nothing => Ok(0),
            Verdict::Refuse(errno) => {
                let descriptor = self.descriptors.read(tag);
                let text = format!("{}: {descriptor:?} is refused", self.label);
                Err(Error::os(errno, text))
            }
            Verdict::Submit(request) => self.volume.clone().submit(request).await.map(|_| 0),
            Verdict::Read(range) => match self.volume.clone().submit(Request::Read(range)).await {
                Ok(completion) => self.give(completion, position, range.len()),
                Err(error) => Err(error),
            },
            Verdict::Write { range, flags } => match self.take(range.start(), range.len() as usize, position) {
                Ok(data) => {
                    let request = Request::Write { offset: range.start(), data, flags };
                    let written = self.volume.clone().submit(request).await;
                    written.map(|_| {
                        self.stats.count_written(range.len());
                        // At most io_bytes_max, a u32 far below.
                        range.len() as i32
                    })
                }
                Err(error) => Err(error),
            },
        };
        match done {
            Ok(result) => Some(result),
            Err(error) if is_turned_away(&error) && self.leaving.get() => None,
            Err(error) => {
                self.stats.count_error();
                if let Some(line) = self.log.borrow_mut().line(self.env.now(), &error) {
                    log::warn!("{}: {line}", self.label);
                }
                Some(-errno_of(&error))
            }
        }
    }

    /// The data of a write, from the kernel, where they can be written without another copy.
    fn take(&self, offset: u64, len: usize, position: u64) -> Result<Bytes> {
        let mut data = DmaBuf::with_head((offset % DMA_ALIGN as u64) as usize, len);
        self.file.read_exact_at(&mut data, position).map_err(|error| self.copy_failed(error))?;
        Ok(data.into())
    }

    /// The data of a read, to the kernel: all that were asked for, or it is an error.
    fn give(&self, completion: Completion, position: u64, len: u64) -> Result<i32> {
        let Completion::Data(parts) = completion else { unreachable!("data answers a read") };
        let mut at = 0;
        for part in &parts {
            self.file.write_all_at(part, position + at).map_err(|error| self.copy_failed(error))?;
            at += part.len() as u64;
        }
        assert_eq!(at, len, "a read returns what it was asked for");
        self.stats.count_read(len);
        Ok(len as i32)
    }

    fn copy_failed(&self, error: io::Error) -> Error {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Error::io(errno, format!("{}: data can't be copied", self.label))
    }

    /// Begins no request any more. What the kernel still sends stays with it, for the daemon that takes the device over.
    pub fn begin_to_leave(&self) {
        if !self.leaving.replace(true) {
            self.ring.disregard(isize::try_from(self.fetching.get()).unwrap_or(isize::MAX));
        }
    }

    /// Waits until nothing that was begun is being carried out; after [`Self::begin_to_leave`].
    pub async fn left(&self) {
        while self.busy.get() > 0 {
            self.changed.notified().await;
        }
        // The last answers reach the kernel before anything else.
        self.ring.submit_now();
    }

    /// Which queue of its device it is.
    pub fn number(&self) -> u16 {
        self.queue
    }
}

impl Completes for Queue {
    fn completed(self: Rc<Self>, token: u32, result: i32) -> bool {
        // Less than the depth.
        let tag = (token & !TRANSFER) as u16;
        match token & TRANSFER {
            0 => self.fetched(tag, result),
            _ => self.transferred(tag, result),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(first) = self.buffers {
            self.ring.give_buffers_back(first);
        }
    }
}

/// The descriptors of a queue, in memory that the kernel writes.
struct Descriptors {
    memory: NonNull<u64>,
    bytes: usize,
    depth: u16,
}

/// A descriptor, as it is read.
const DESCRIPTOR_WORDS: usize = DESCRIPTOR_BYTES / 8;

impl Descriptors {
    fn map(device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).map_err(|_| io::Error::last_os_error())?;
        let bytes = descriptors_bytes(depth, page);
        let offset = i64::try_from(descriptors_offset(queue)).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping where the kernel likes it, of a file that is open.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, device.as_raw_fd(), offset) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, bytes, depth })
    }

    /// The descriptor of a tag whose command has completed: the kernel does not change it before the tag is answered.
    fn read(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth, "a tag of this queue");
        let mut bytes = [0; DESCRIPTOR_BYTES];
        for word in 0..DESCRIPTOR_WORDS {
            // SAFETY: inside the mapping, which has room for `depth` descriptors and begins at a page; volatile, since
            // the kernel has written it.
            let value = unsafe { self.memory.add(usize::from(tag) * DESCRIPTOR_WORDS + word).read_volatile() };
            bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_ne_bytes());
        }
        Descriptor::decode(&bytes)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, unmapped once; nobody else has the address.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}
