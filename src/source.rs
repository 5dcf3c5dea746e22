//! A source: where the data comes from. Read-only by construction: the trait has no way to write.

pub mod file;
pub mod fingerprint;
pub mod identity;
pub mod nbd;
pub mod padded;
pub mod remote;
pub mod uri;

use crate::dma_buf::DmaBuf;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::units::ByteRange;

/// A source as one shard sees it.
pub trait Source {
    /// In bytes, not 0, constant while open.
    fn size(&self) -> u64;
    /// Reads `range`, any alignment. Implementations split what their peer limits, and wait for a lost peer up to
    /// their configured time before they return [`crate::error::ErrorKind::SourceLost`].
    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>>;
    /// What of `range` is allocated; from its start, without gaps; may end early after at least one extent, has at
    /// most [`crate::disk::EXTENTS_MAX`]. A source that can't tell says all data.
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>>;
}
