//! A disk, as the engine sees it: aligned reads and writes, zeroing, flush.
//!
//! The trait is the seam between the shard engine and the machine: `disk/ring.rs` is the real one, simulated
//! disks implement it for tests. Contract, checked by assertions in debug builds of the implementations:
//! * offsets and lengths are multiples of [`DiskInfo::block`], except that a request may end at the disk's end;
//! * buffers are as long as the request; short transfers are completed or reported, never returned;
//! * a future that is dropped does not cancel the I/O: it may still reach the medium.

pub mod blocking;
pub mod ring;
pub mod transfer;

use crate::dma_buf::DmaBuf;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::units::ByteRange;
use bytes::Bytes;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// What is fixed about a disk while it is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskInfo {
    /// In bytes; for a file any number, the last block may be short.
    pub size: u64,
    /// Alignment of all I/O in bytes: the logical block size, or 1 for a file whose file system has no direct I/O. A
    /// power of two, at most [`crate::dma_buf::DMA_ALIGN`].
    pub block: u32,
}

bitflags::bitflags! {
    /// How a range is to be zeroed.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ZeroFlags: u8 {
        /// Free the space where the disk can.
        const UNMAP = 1;
        /// Fail with NotSupported rather than write zeros out.
        const FAST_ONLY = 1 << 1;
    }
}

/// A disk opened by one shard.
pub trait Disk {
    fn info(&self) -> DiskInfo;
    /// Reads `range`.
    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>>;
    /// Writes `data` at `offset`. With `fua` it is durable when this returns.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> LocalBoxFuture<'_, Result<()>>;
    /// Makes `range` read as zeros, never as old data: by punching or zeroing in the device, else by writing.
    fn zero(&self, range: ByteRange, flags: ZeroFlags) -> LocalBoxFuture<'_, Result<()>>;
    /// Makes everything that completed before this call durable.
    fn flush(&self) -> LocalBoxFuture<'_, Result<()>>;
    /// The file that holds `range` at the same offsets, for who reads and writes it with memory that is the kernel's. `None`:
    /// there is none, or it does not take such a range.
    fn direct_file(&self, _range: ByteRange) -> Option<Rc<OwnedFd>> {
        None
    }
    /// What of `range` is allocated; from its start, without gaps, at most [`EXTENTS_MAX`] extents.
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>>;
}

/// The longest list of extents a disk or source returns for one question.
pub const EXTENTS_MAX: usize = 1024;
