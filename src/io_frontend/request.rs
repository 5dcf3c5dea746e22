//! The block request and its completion: what every frontend asks of a clone and what it gets back.
//!
//! A frontend checks its own protocol's limits, turns what it received into a [`Request`] and hands it to a
//! [`Volume`]. It knows nothing of regions or shards.

use crate::error::Result;
use crate::units::ByteRange;
use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// A future of one thread.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

bitflags::bitflags! {
    /// What a request asks beside its operation.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RequestFlags: u8 {
        /// Forced unit access: completes only when the data, and the metadata that routes to it, are durable.
        const FUA = 1;
        /// Write zeroes: keep the space allocated (NBD_CMD_FLAG_NO_HOLE).
        const NO_HOLE = 1 << 1;
        /// Write zeroes: fail with NotSupported instead of being as slow as a write (NBD_CMD_FLAG_FAST_ZERO).
        const FAST_ZERO = 1 << 2;
    }
}

/// One request of a client. Ranges are inside the volume: [`Volume::submit`] refuses others.
#[derive(Clone, Debug)]
pub enum Request {
    Read(ByteRange),
    /// `data.len()` bytes to be written at `offset`; not empty. A payload whose address is congruent with
    /// `offset` modulo [`crate::dma_buf::DMA_ALIGN`] is written without a copy; any other is correct but copied.
    Write {
        offset: u64,
        data: Bytes,
        flags: RequestFlags,
    },
    /// Everything acknowledged before this was submitted becomes durable.
    Flush,
    /// The client no longer needs this content. Advisory: only whole blocks or regions are dropped.
    Trim {
        range: ByteRange,
        flags: RequestFlags,
    },
    /// The range reads zeros afterwards.
    WriteZeroes {
        range: ByteRange,
        flags: RequestFlags,
    },
    /// Hydrate the range ahead of the background.
    Cache(ByteRange),
    /// What is allocated, and what is hydrated, in this range.
    Status(ByteRange),
}

impl Request {
    /// The bytes that it is about. `None`: none, or more than any device has.
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Request::Write { offset, data, .. } => ByteRange::new(*offset, data.len() as u64),
            Request::Read(range) | Request::Trim { range, .. } | Request::WriteZeroes { range, .. } => Some(*range),
            Request::Cache(range) | Request::Status(range) => Some(*range),
            Request::Flush => None,
        }
    }
}

/// A run of bytes with one status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent<S> {
    /// In bytes; not zero.
    pub len: u64,
    pub state: S,
}

/// The allocation state of `base:allocation`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// Not allocated (NBD_STATE_HOLE).
    pub hole: bool,
    /// Reads as zeros (NBD_STATE_ZERO).
    pub zero: bool,
}

impl Allocation {
    pub const DATA: Self = Self { hole: false, zero: false };
    pub const HOLE: Self = Self { hole: true, zero: true };
}

/// The answer to [`Request::Status`]: both lists cover the asked range from its start, without gaps; adjacent
/// extents differ. Lists may end early (after at least one extent) when the answer would be too long.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StatusExtents {
    pub allocation: Vec<Extent<Allocation>>,
    pub hydrated: Vec<Extent<bool>>,
}

/// Appends an extent, merging it with the one before when they have the same state.
pub fn push_extent<S: PartialEq>(list: &mut Vec<Extent<S>>, len: u64, state: S) {
    match list.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.state == state => last.len += len,
        _ => list.push(Extent { len, state }),
    }
}

/// What a request came to.
#[derive(Clone, Debug)]
pub enum Completion {
    Done,
    /// The bytes read, in order; together exactly the asked length.
    Data(Vec<Bytes>),
    Status(StatusExtents),
}

/// What a frontend advertises of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Name of the clone: the export name.
    pub name: String,
    /// In bytes, not 0.
    pub size: u64,
    /// Preferred I/O size in bytes, a power of two (NBD's preferred block size).
    pub preferred_block: u32,
}

/// A clone as its frontends see it, on one shard. Cheap to share; every request is independent.
pub trait Volume {
    fn info(&self) -> VolumeInfo;
    /// Carries out one request. The future must be driven to its end: dropping it abandons the answer, not the I/O.
    fn submit(self: Rc<Self>, request: Request) -> LocalBoxFuture<'static, Result<Completion>>;
}
