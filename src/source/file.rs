//! A source that is a local file or block device: reads of any alignment over a [`Disk`] opened read-only.
//!
//! A request is widened to the blocks it touches, read, and narrowed again without a copy. Must not write: it
//! calls nothing of the disk but `info`, `read` and `allocation`.

use crate::bail;
use crate::disk::{Disk, EXTENTS_MAX};
use crate::dma_buf::DmaBuf;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
use crate::source::Source;
use crate::units::ByteRange;
use crate::version::Version;
use std::rc::Rc;

/// Of what is asked of a file or a block device.
pub const VERSION: Version = Version(1, 0, 0);

/// A [`Disk`] as a source.
pub struct FileSource {
    disk: Rc<dyn Disk>,
}

impl FileSource {
    /// `disk` is opened read-only and not empty.
    pub fn new(disk: Rc<dyn Disk>) -> Self {
        Self { disk }
    }

    /// The whole blocks around `range`; the last block of the disk may be short.
    fn blocks_around(&self, range: ByteRange) -> Result<ByteRange> {
        let info = self.disk.info();
        if range.end() > info.size {
            bail!(InvalidRequest, "source: {range} is beyond its end at {}", info.size);
        }
        let outer = range.aligned_outward(u64::from(info.block));
        Ok(ByteRange::between(outer.start(), outer.end().min(info.size)).unwrap_or(range))
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.disk.info().size
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            let outer = self.blocks_around(range)?;
            let mut buf = self.disk.read(outer).await?;
            buf.narrow((range.start() - outer.start()) as usize, range.len() as usize);
            Ok(buf)
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            let outer = self.blocks_around(range)?;
            let extents = self.disk.allocation(outer).await?;
            Ok(clip_extents(extents, outer.start(), range))
        })
    }
}

/// The part of `extents`, which begin at offset `start`, that lies in `range`; `start` is not after the range's.
/// Ends where they end, and is never longer than [`EXTENTS_MAX`].
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
        if list.len() > EXTENTS_MAX {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{DiskInfo, ZeroFlags};
    use crate::units::is_aligned;
    use bytes::Bytes;
    use futures_lite::future::block_on;
    use proptest::prelude::*;

    /// A disk in memory that holds callers to the alignment its contract asks. Its first half is a hole.
    struct MemDisk {
        bytes: Vec<u8>,
        block: u32,
    }

    impl MemDisk {
        fn check(&self, range: ByteRange) {
            let (block, size) = (u64::from(self.block), self.bytes.len() as u64);
            assert!(is_aligned(range.start(), block), "{range}");
            assert!(is_aligned(range.end(), block) || range.end() == size, "{range}");
        }
    }

    impl Disk for MemDisk {
        fn info(&self) -> DiskInfo {
            DiskInfo { size: self.bytes.len() as u64, block: self.block }
        }
        fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
            self.check(range);
            let mut buf = DmaBuf::new(range.len() as usize);
            buf.copy_from_slice(&self.bytes[range.start() as usize..range.end() as usize]);
            Box::pin(async { Ok(buf) })
        }
        fn write(&self, _: u64, _: Bytes, _: bool) -> LocalBoxFuture<'_, Result<()>> {
            panic!("a source is never written")
        }
        fn zero(&self, _: ByteRange, _: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
            panic!("a source is never written")
        }
        fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
            panic!("a source is never written")
        }
        fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
            self.check(range);
            let middle = self.bytes.len() as u64 / 2;
            let mut list = Vec::new();
            let hole = middle.clamp(range.start(), range.end()) - range.start();
            push_extent(&mut list, hole, Allocation::HOLE);
            push_extent(&mut list, range.len() - hole, Allocation::DATA);
            Box::pin(async { Ok(list) })
        }
    }

    fn source(size: usize, block: u32) -> (FileSource, Vec<u8>) {
        let bytes: Vec<u8> = (0..size).map(|i| (i / 7 + i) as u8).collect();
        (FileSource::new(Rc::new(MemDisk { bytes: bytes.clone(), block })), bytes)
    }

    proptest! {
        #[test]
        fn any_range_reads_the_truth(
            size in 1usize..40_000, block in prop::sample::select(vec![512u32, 4096]),
            start in any::<prop::sample::Index>(), len in any::<prop::sample::Index>(),
        ) {
            let (source, truth) = source(size, block);
            let start = start.index(size);
            let len = 1 + len.index(size - start);
            let range = ByteRange::new(start as u64, len as u64).unwrap();
            prop_assert_eq!(&block_on(source.read(range)).unwrap()[..], &truth[start..start + len]);

            let extents = block_on(source.allocation(range)).unwrap();
            let mut at = range.start();
            for extent in extents {
                prop_assert!(extent.len > 0);
                let expected = if at < size as u64 / 2 { Allocation::HOLE } else { Allocation::DATA };
                prop_assert_eq!(extent.state, expected);
                at += extent.len;
                if extent.state.hole { prop_assert!(at <= size as u64 / 2) }
            }
            prop_assert_eq!(at, range.end());
        }
    }

    #[test]
    fn beyond_the_end_is_refused() {
        let (source, _) = source(5000, 512);
        let range = ByteRange::new(4999, 2).unwrap();
        let error = block_on(source.read(range)).unwrap_err();
        assert_eq!(error.to_string(), "source: 2 bytes at offset 4999 is beyond its end at 5000");
        assert!(block_on(source.allocation(range)).is_err());
    }
}
