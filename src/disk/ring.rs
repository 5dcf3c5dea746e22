//! The real disk: a file or block device opened with O_DIRECT, on the executor's ring.
//!
//! A regular file whose size is no multiple of the block can't be written directly to its last byte. Its tail,
//! from the last 4 KiB boundary on, goes through a second descriptor without O_DIRECT, and only through that one,
//! so no page is ever both cached and written directly.
//!
//! Zeroing never leaves old data: ranges are punched or zeroed with fallocate(2), which block devices implement as
//! a write-zeroes command (not a discard), and written out where that is not supported.

use super::transfer::{REPEATS_MAX, Stop, Transfer};
use super::{Disk, DiskInfo, EXTENTS_MAX, ZeroFlags};
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
use crate::ring::Ring;
use crate::units::{ByteRange, align_down, is_aligned};
use bytes::Bytes;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

/// The longest single fallocate(2): bounds how long one occupies a kernel worker.
const FALLOCATE_BYTES_MAX: u64 = 1 << 30;
/// Zeros that are written out go in pieces of this size.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

/// What a [`RingDisk`] is made from. Descriptors can be duplicated for each shard.
#[derive(Debug)]
pub struct DiskParts {
    /// For messages: "destination /dev/nvme0n1".
    pub name: String,
    /// Opened with O_DIRECT where the file system can.
    pub direct: OwnedFd,
    /// The same regular file without O_DIRECT: needed when `size` is no multiple of `block`.
    pub buffered: Option<OwnedFd>,
    pub size: u64,
    pub block: u32,
    pub is_block_device: bool,
    /// The lock on what lies under a loop device: kept as long as the disk.
    pub lock_below: Option<Arc<File>>,
}

impl DiskParts {
    /// The same disk for another executor.
    pub fn duplicate(&self) -> Result<Self> {
        let dup = |fd: &OwnedFd| fd.try_clone().map_err(|e| Error::from_io(e, format!("{}: dup", self.name)));
        Ok(Self {
            name: self.name.clone(),
            direct: dup(&self.direct)?,
            buffered: self.buffered.as_ref().map(dup).transpose()?,
            size: self.size,
            block: self.block,
            is_block_device: self.is_block_device,
            lock_below: self.lock_below.clone(),
        })
    }
}

/// A file or block device on the current executor's ring.
pub struct RingDisk {
    ring: Rc<Ring>,
    name: String,
    direct: Rc<OwnedFd>,
    buffered: Option<Rc<OwnedFd>>,
    info: DiskInfo,
    /// Where the buffered tail begins; the size when there is none.
    tail: u64,
    is_block_device: bool,
    can_punch: Cell<bool>,
    can_zero_range: Cell<bool>,
    _lock_below: Option<Arc<File>>,
}

impl RingDisk {
    pub fn new(parts: DiskParts) -> Self {
        let DiskParts { name, direct, buffered, size, block, is_block_device, lock_below } = parts;
        assert!(block.is_power_of_two() && block as usize <= DMA_ALIGN);
        let tail = match is_aligned(size, u64::from(block)) {
            true => size,
            false => {
                assert!(buffered.is_some(), "{name}: an unaligned size needs a buffered descriptor");
                align_down(size, DMA_ALIGN as u64)
            }
        };
        Self {
            ring: Ring::current(),
            name,
            direct: Rc::new(direct),
            buffered: buffered.map(Rc::new),
            info: DiskInfo { size, block },
            tail,
            is_block_device,
            can_punch: Cell::new(true),
            can_zero_range: Cell::new(true),
            _lock_below: lock_below,
        }
    }

    /// The descriptor for the bytes at `offset`, and where that descriptor's part of the disk ends.
    fn route(&self, offset: u64) -> (&Rc<OwnedFd>, u64) {
        match &self.buffered {
            Some(buffered) if offset >= self.tail => (buffered, self.info.size),
            _ => (&self.direct, self.tail),
        }
    }

    fn check(&self, range: ByteRange) {
        let block = u64::from(self.info.block);
        debug_assert!(range.end() <= self.info.size, "{}: {range:?} of {}", self.name, self.info.size);
        debug_assert!(is_aligned(range.start(), block), "{}: {range:?}", self.name);
        debug_assert!(is_aligned(range.end(), block) || range.end() == self.info.size, "{}: {range:?}", self.name);
    }

    fn failed(&self, verb: &str, range: ByteRange, error: io::Error) -> Error {
        let context = format!("{}: {verb} {range}", self.name);
        match error.raw_os_error() {
            Some(errno) => Error::io(errno, context),
            None => Error::new(ErrorKind::Io, format!("{context}: {error}")),
        }
    }

    fn stopped(&self, verb: &str, range: ByteRange, stop: Stop) -> Error {
        let error = match stop {
            Stop::Errno(errno) => io::Error::from_raw_os_error(errno),
            Stop::End(at) => io::Error::other(format!("short read, the device ends at {}", range.start() + at)),
        };
        self.failed(verb, range, error)
    }

    /// Reads a range that one descriptor serves.
    async fn read_one(&self, range: ByteRange) -> Result<DmaBuf> {
        let (fd, _) = self.route(range.start());
        let mut transfer = Transfer::new(range.len(), self.info.block);
        let mut whole: Option<DmaBuf> = None;
        while let Some(done) = transfer.next() {
            let len = (range.len() - done) as usize;
            let (result, (buf, _)) = self.ring.read(fd, DmaBuf::new(len), range.start() + done).await;
            let result = result.map_err(errno_of);
            transfer.has_read(result).map_err(|stop| self.stopped("read", range, stop))?;
            if done == 0 && transfer.next().is_none() {
                return Ok(buf);
            }
            let count = result.unwrap_or(0) as usize;
            let whole = whole.get_or_insert_with(|| DmaBuf::new(range.len() as usize));
            whole[done as usize..done as usize + count].copy_from_slice(&buf[..count]);
        }
        Ok(whole.expect("a range is not empty"))
    }

    async fn write_one(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        let Some(range) = ByteRange::new(offset, data.len() as u64) else { return Ok(()) };
        let (fd, _) = self.route(offset);
        let mut transfer = Transfer::new(range.len(), self.info.block);
        while let Some(done) = transfer.next() {
            let (result, _) = self.ring.write(fd, data.slice(done as usize..), offset + done, fua).await;
            transfer.has_written(result.map_err(errno_of)).map_err(|stop| self.stopped("write", range, stop))?;
        }
        Ok(())
    }

    async fn fallocate(&self, mode: i32, range: ByteRange) -> io::Result<()> {
        let (mut at, mut repeats) = (range.start(), 0);
        while at < range.end() {
            let len = (range.end() - at).min(FALLOCATE_BYTES_MAX);
            match self.ring.fallocate(&self.direct, mode, at, len).await.0 {
                Ok(_) => (at, repeats) = (at + len, 0),
                Err(error) if is_transient(&error) && repeats < REPEATS_MAX => repeats += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn write_zeros(&self, range: ByteRange) -> Result<()> {
        let zeros = Bytes::from(DmaBuf::zeroed(range.len().min(ZERO_WRITE_BYTES) as usize));
        let mut at = range.start();
        while at < range.end() {
            let len = (range.end() - at).min(zeros.len() as u64);
            self.write(at, zeros.slice(..len as usize), false).await?;
            at += len;
        }
        Ok(())
    }
}

/// What the kernel returned; the ring knows no other errors.
fn errno_of(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

impl Disk for RingDisk {
    fn info(&self) -> DiskInfo {
        self.info
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        self.check(range);
        Box::pin(async move {
            let (_, end) = self.route(range.start());
            let (Some(head), Some(tail)) =
                (ByteRange::between(range.start(), end), ByteRange::between(end, range.end()))
            else {
                return self.read_one(range).await;
            };
            let mut whole = DmaBuf::new(range.len() as usize);
            let (first, second) = whole.split_at_mut(head.len() as usize);
            first.copy_from_slice(&self.read_one(head).await?);
            second.copy_from_slice(&self.read_one(tail).await?);
            Ok(whole)
        })
    }

    fn write(&self, offset: u64, mut data: Bytes, fua: bool) -> LocalBoxFuture<'_, Result<()>> {
        let range = ByteRange::new(offset, data.len() as u64).expect("a write is not empty");
        self.check(range);
        Box::pin(async move {
            if !(data.as_ptr() as usize).is_multiple_of(self.info.block as usize) {
                // Not memory that direct I/O accepts: copy.
                let mut copy = DmaBuf::new(data.len());
                copy.copy_from_slice(&data);
                data = copy.into();
            }
            let (_, end) = self.route(offset);
            if range.end() > end {
                let tail = data.split_off((end - offset) as usize);
                self.write_one(end, tail, fua).await?;
            }
            self.write_one(offset, data, fua).await
        })
    }

    fn zero(&self, range: ByteRange, flags: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
        self.check(range);
        Box::pin(async move {
            const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            let unmap = flags.contains(ZeroFlags::UNMAP);
            let fast_only = flags.contains(ZeroFlags::FAST_ONLY);
            // A block device's ZERO_RANGE may write zeros out in the kernel: correct, but not known to be fast.
            let zero_allowed = !fast_only || !self.is_block_device;
            let punch = (PUNCH, &self.can_punch, true);
            let zero = (ZERO, &self.can_zero_range, zero_allowed);
            let attempts: &[_] = if unmap { &[punch, zero] } else { &[zero] };
            for (mode, supported, allowed) in attempts {
                if !allowed || !supported.get() {
                    continue;
                }
                match self.fallocate(*mode, range).await {
                    Ok(()) => return Ok(()),
                    Err(error) if is_unsupported(&error) => supported.set(false),
                    Err(error) => return Err(self.failed("zero", range, error)),
                }
            }
            if fast_only {
                return Err(Error::new(ErrorKind::NotSupported, format!("{}: no fast way to zero {range}", self.name)));
            }
            self.write_zeros(range).await
        })
    }

    fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let mut repeats = 0;
            loop {
                match self.ring.fdatasync(&self.direct).await.0 {
                    Ok(_) => return Ok(()),
                    Err(error) if error.raw_os_error() == Some(libc::EINTR) && repeats < REPEATS_MAX => repeats += 1,
                    Err(error) => return Err(Error::io(errno_of(error), format!("{}: flush", self.name))),
                }
            }
        })
    }

    fn direct_file(&self, range: ByteRange) -> Option<Rc<OwnedFd>> {
        let block = u64::from(self.info.block);
        let fits = is_aligned(range.start(), block) && is_aligned(range.end(), block) && range.end() <= self.tail;
        fits.then(|| self.direct.clone())
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            if self.is_block_device {
                return Ok(vec![Extent { len: range.len(), state: Allocation::DATA }]);
            }
            // lseek(2) may read the file system's metadata: not on this thread.
            let answer = match self.direct.try_clone() {
                Ok(fd) => self.ring.blocking(move || file_allocation(fd.as_raw_fd(), range)).await,
                Err(error) => Err(error),
            };
            answer.and_then(|extents| extents).map_err(|error| self.failed("find the data of", range, error))
        })
    }
}

/// Walks SEEK_DATA and SEEK_HOLE. A file system without them says that all is data, which is true enough.
fn file_allocation(fd: RawFd, range: ByteRange) -> io::Result<Vec<Extent<Allocation>>> {
    let mut extents = Vec::new();
    let mut at = range.start();
    let mut data = seek(fd, at, libc::SEEK_DATA)?.unwrap_or(u64::MAX) <= at;
    while at < range.end() && extents.len() < EXTENTS_MAX {
        let whence = if data { libc::SEEK_HOLE } else { libc::SEEK_DATA };
        let next = seek(fd, at, whence)?.unwrap_or(u64::MAX).min(range.end());
        if next <= at {
            // The file changed between two calls: what is left counts as data.
            push_extent(&mut extents, range.end() - at, Allocation::DATA);
            break;
        }
        push_extent(&mut extents, next - at, if data { Allocation::DATA } else { Allocation::HOLE });
        at = next;
        data = !data;
    }
    // Behind its end there is neither data nor a hole. Looked at last: it may be cut off at any moment.
    let end = seek(fd, 0, libc::SEEK_END)?.unwrap_or(0);
    if end < range.end() {
        return Err(io::Error::other(format!("the file ends at {end}")));
    }
    Ok(extents)
}

/// lseek(2); `None`: nothing of that kind follows.
fn seek(fd: RawFd, at: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: a plain system call; the file position of this descriptor is used for nothing else.
    match unsafe { libc::lseek(fd, at as i64, whence) } {
        found if found >= 0 => Ok(Some(found as u64)),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}
