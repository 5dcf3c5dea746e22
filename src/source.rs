//! A source: where the data comes from. Read-only by construction: the trait has no way to write.

pub mod file;
pub mod fingerprint;
pub mod nbd;
pub mod remote;
pub mod uri;

use crate::dma_buf::DmaBuf;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
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

/// The part of `extents`, which begin at offset `start`, that lies in `range`; `start` is not after the range's.
/// Ends where they end, and is never longer than [`crate::disk::EXTENTS_MAX`].
fn clip_extents(
    extents: impl IntoIterator<Item = Extent<Allocation>>,
    start: u64,
    range: ByteRange,
) -> Vec<Extent<Allocation>> {
    debug_assert!(start <= range.start());
    let mut list = Vec::new();
    let mut at = start;
    for extent in extents {
        let end = at.saturating_add(extent.len);
        let inside = end.min(range.end()).saturating_sub(at.max(range.start()));
        push_extent(&mut list, inside, extent.state);
        if list.len() > crate::disk::EXTENTS_MAX {
            list.pop();
            break;
        }
        at = end;
        if at >= range.end() {
            break;
        }
    }
    list
}
