//! A disk without a ring: every call is done when it returns, in the calling thread.
//!
//! For the offline tools, which so use the daemon's own code (the metadata store, the fingerprint of a source) where
//! there is no executor. Not for a daemon: it would stop its shard. Owns the device, and with it lock and claim.

use super::{Disk, DiskInfo, ZeroFlags};
use crate::devices::Device;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::units::ByteRange;
use bytes::Bytes;
use std::future::ready;
use std::io;
use std::os::unix::fs::FileExt;

/// Zeros are written in pieces of this size, in bytes.
const ZERO_WRITE_BYTES: usize = 1 << 20;

/// See the head of this file.
pub struct BlockingDisk {
    device: Device,
}

impl BlockingDisk {
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    fn failed(&self, verb: &str, what: impl std::fmt::Display, error: io::Error) -> Error {
        let context = format!("{}: {verb}{what}", self.device.label());
        match error.raw_os_error() {
            Some(errno) => Error::io(errno, context),
            None => Error::from_io(error, context),
        }
    }

    fn read_now(&self, range: ByteRange) -> Result<DmaBuf> {
        let mut buf = DmaBuf::new(range.len() as usize);
        let file = self.device.any_alignment();
        file.read_exact_at(&mut buf, range.start()).map_err(|error| self.failed("can't read ", range, error))?;
        Ok(buf)
    }

    fn write_now(&self, offset: u64, data: &[u8]) -> Result<()> {
        let file = self.device.any_alignment();
        let written = file.write_all_at(data, offset);
        written.map_err(|error| self.failed("can't write ", format!("{} bytes at offset {offset}", data.len()), error))
    }

    fn zero_now(&self, range: ByteRange) -> Result<()> {
        let zeros = DmaBuf::zeroed(ZERO_WRITE_BYTES);
        range
            .split_at_multiples(ZERO_WRITE_BYTES as u64)
            .try_for_each(|piece| self.write_now(piece.start(), &zeros[..piece.len() as usize]))
    }

    fn flush_now(&self) -> Result<()> {
        self.device.any_alignment().sync_data().map_err(|error| self.failed("can't be flushed", "", error))
    }
}

impl Disk for BlockingDisk {
    /// Files are read and written through the page cache, at any alignment.
    fn info(&self) -> DiskInfo {
        let direct = self.device.direct && self.device.buffered.is_none();
        DiskInfo { size: self.device.size, block: if direct { self.device.block } else { 1 } }
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(ready(self.read_now(range)))
    }

    /// `data` is aligned in memory when the device wants that.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> LocalBoxFuture<'_, Result<()>> {
        let written = self.write_now(offset, &data);
        Box::pin(ready(if fua { written.and_then(|()| self.flush_now()) } else { written }))
    }

    /// Writes zeros, whatever the flags allow.
    fn zero(&self, range: ByteRange, _: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(ready(self.zero_now(range)))
    }

    fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(ready(self.flush_now()))
    }

    /// Does not look: all of it may be data.
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(ready(Ok(vec![Extent { len: range.len(), state: Allocation::DATA }])))
    }
}
