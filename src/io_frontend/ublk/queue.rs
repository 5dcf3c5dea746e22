//! One hardware queue of a ublk device, served by the executor of one shard through its ring.
//!
//! Every tag has a task for as long as the device runs: it waits for the tag's request, has it carried out, answers it and
//! waits for the next one with the same command. Data are copied between the kernel's pages and our buffers by pread and
//! pwrite on /dev/ublkcN, which never wait for anything.
//!
//! Invariants:
//! * All tags of a queue are fetched with one system call. A daemon that died between two would leave the device to nobody.
//! * A request that was begun is carried out to its end and answered. The one exception: a request that the ending clone
//!   turned away, when the device is left to the next daemon ([`Queue::begin_to_leave`]); it was not carried out, and comes again.
//! * What was answered is in the engine's hands as any acknowledged request; nothing is held back here.
//! * Everything happens on the thread that fetched the tags: the kernel demands it.

use super::admit::{Verdict, admit, errno_of, is_turned_away};
use super::proto::{
    DESCRIPTOR_BYTES, Descriptor, Io, data_position, descriptors_bytes, descriptors_offset, io_command,
};
use super::stats::UblkStats;
use super::turn::turn;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::io_frontend::nbd::Counted;
use crate::io_frontend::request::{Completion, Request, Volume};
use crate::local::{Notify, Raised};
use crate::log_limit::LogLimit;
use crate::ring::{Operation, Ring, SQ_ENTRIES};
use bytes::Bytes;
use futures_lite::future::poll_once;
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
    /// Counts the queues whose device file is open.
    pub counted: Counted,
    /// For messages: "clone 'vm1': /dev/ublkb0".
    pub label: String,
}

/// The commands that wait for requests, by tag.
type Fetches = Vec<Operation<Rc<OwnedFd>>>;

/// A queue; its device file is closed when it and its tasks are gone.
pub struct Queue {
    // First: unmapped before the file is closed.
    descriptors: Descriptors,
    file: File,
    fd: Rc<OwnedFd>,
    queue: u16,
    depth: u16,
    io_bytes_max: u32,
    label: String,
    volume: Rc<dyn Volume>,
    env: Rc<dyn Env>,
    stats: Rc<UblkStats>,
    log: RefCell<LogLimit>,
    /// Requests that are being carried out.
    busy: Cell<u64>,
    /// Commands that wait for a request.
    fetching: Cell<usize>,
    leaving: Cell<bool>,
    changed: Notify,
    // Last: counts until the file is closed.
    _counted: Counted,
}

impl Queue {
    /// Everything that can fail, before the first tag is fetched.
    pub fn new(parts: QueueParts, volume: Rc<dyn Volume>, env: Rc<dyn Env>, stats: Rc<UblkStats>) -> Result<Rc<Self>> {
        let QueueParts { device, queue, depth, io_bytes_max, counted, label } = parts;
        let failed = |error| Error::from_io(error, format!("{label}: queue {queue} can't be set up"));
        if u32::from(depth) > SQ_ENTRIES {
            let text = format!("{label}: queues of {depth} requests are not supported, {SQ_ENTRIES} are the most");
            return Err(Error::new(crate::error::ErrorKind::Limit, text));
        }
        let descriptors = Descriptors::map(&device, queue, depth).map_err(failed)?;
        let fd = Rc::new(OwnedFd::from(device.try_clone().map_err(failed)?));
        Ok(Rc::new(Self {
            descriptors,
            file: device,
            fd,
            queue,
            depth,
            io_bytes_max,
            label,
            volume,
            env,
            stats,
            log: RefCell::default(),
            busy: Cell::new(0),
            fetching: Cell::new(0),
            leaving: Cell::new(false),
            changed: Notify::default(),
            _counted: counted,
        }))
    }

    /// Fetches all tags and starts their tasks. Fails when the kernel refuses one.
    pub async fn start(self: &Rc<Self>) -> Result<()> {
        let ring = Ring::current();
        // Room for all of them.
        ring.submit_now();
        let mut fetches: Fetches = (0..self.depth).map(|tag| self.issue(&ring, Io::Fetch, tag, 0)).collect();
        ring.submit_now();
        let mut early = Vec::with_capacity(fetches.len());
        for (tag, fetch) in fetches.iter_mut().enumerate() {
            // What is refused is refused at once. Requests come later, as a rule, when the device is started.
            let fetched = match poll_once(&mut *fetch).await {
                Some((Err(error), _)) => {
                    let text = format!("{}: tag {tag} of queue {} can't be served", self.label, self.queue);
                    return Err(Error::from_io(error, text));
                }
                Some((Ok(fetched), _)) => Some(fetched),
                None => None,
            };
            early.push(fetched);
        }
        for ((tag, fetch), early) in (0..self.depth).zip(fetches).zip(early) {
            self.fetching.set(self.fetching.get() + 1);
            self.env.spawn(Box::pin(self.clone().serve(ring.clone(), tag, fetch, early)));
        }
        Ok(())
    }

    fn issue(&self, ring: &Rc<Ring>, io: Io, tag: u16, result: i32) -> Operation<Rc<OwnedFd>> {
        // SAFETY: with USER_COPY, which every device of ours has, the driver demands that the address is 0, as it is.
        unsafe { ring.command(&self.fd, io.opcode(), io_command(self.queue, tag, result)) }
    }

    /// Serves a tag until the device stops, or is left to another daemon. `early`: the first fetch has ended already.
    async fn serve(
        self: Rc<Self>,
        ring: Rc<Ring>,
        tag: u16,
        mut fetch: Operation<Rc<OwnedFd>>,
        mut early: Option<u32>,
    ) {
        loop {
            let fetched = match early.take() {
                Some(fetched) => Ok(fetched),
                None => fetch.await.0,
            };
            self.fetching.set(self.fetching.get() - 1);
            if self.leaving.get() {
                ring.disregard(-1);
            }
            match fetched {
                Ok(0) => {}
                Ok(other) => return log::error!("{}: the kernel wants {other} of tag {tag}", self.label),
                // The device stops.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(error) => return log::error!("{}: tag {tag} is not served any more: {error}", self.label),
            }
            if self.leaving.get() {
                // Not begun: it comes again to the next daemon.
                return;
            }
            let result = {
                let _busy = Raised::new(&self.busy);
                let _in_flight = Raised::new(&self.stats.in_flight);
                self.carry_out(tag).await
            };
            let Some(result) = result else {
                self.changed.notify();
                return;
            };
            fetch = self.issue(&ring, Io::CommitAndFetch, tag, result);
            self.fetching.set(self.fetching.get() + 1);
            if self.leaving.get() {
                ring.disregard(1);
                self.changed.notify();
            }
        }
    }

    /// Carries the tag's request out; what the kernel is told. `None`: it was turned away, and comes again.
    async fn carry_out(&self, tag: u16) -> Option<i32> {
        let descriptor = self.descriptors.read(tag);
        let position = data_position(self.queue, tag);
        self.stats.count_request();
        let verdict = admit(&descriptor, self.io_bytes_max);
        let _turn = match &verdict {
            Verdict::Read(range) | Verdict::Write { range, .. } => Some(turn(range.start(), range.len()).await),
            _ => None,
        };
        let done = match verdict {
            Verdict::Nothing => Ok(0),
            Verdict::Refuse(errno) => {
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
            Ring::current().disregard(isize::try_from(self.fetching.get()).unwrap_or(isize::MAX));
        }
    }

    /// Waits until nothing that was begun is being carried out; after [`Self::begin_to_leave`].
    pub async fn left(&self) {
        while self.busy.get() > 0 {
            self.changed.notified().await;
        }
        // The last answers reach the kernel before anything else.
        Ring::current().submit_now();
    }

    /// Which queue of its device it is.
    pub fn number(&self) -> u16 {
        self.queue
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
