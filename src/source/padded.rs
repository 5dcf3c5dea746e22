//! A source seen with another size: only its first bytes, and zeros behind them.
//!
//! What a clone takes from its source is fixed when it is made or grown: so many bytes from the source's start. The
//! source may have more (it has grown since, or only a part was wanted), which is never shown; the clone may be
//! larger, and then reads zeros behind them, whatever the source has there.

use crate::bail;
use crate::disk::EXTENTS_MAX;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
use crate::source::Source;
use crate::units::ByteRange;
use std::rc::Rc;

/// See the head of this file.
pub struct PaddedSource {
    /// `None` when nothing of it is shown.
    inner: Option<Rc<dyn Source>>,
    /// How many bytes of it are shown.
    inner_len: u64,
    size: u64,
}

impl PaddedSource {
    /// The first `inner_len` bytes of `inner` (it must have them), then zeros up to `size` bytes. Returns `inner` itself
    /// when that changes nothing.
    pub fn view(inner: Rc<dyn Source>, inner_len: u64, size: u64) -> Rc<dyn Source> {
        assert!(inner_len <= inner.size() && inner_len <= size, "{inner_len} of {} as {size}", inner.size());
        if inner.size() == size && inner_len == size {
            return inner;
        }
        Rc::new(Self { inner: Some(inner), inner_len, size })
    }

    /// Only zeros.
    pub fn zeros(size: u64) -> Rc<dyn Source> {
        Rc::new(Self { inner: None, inner_len: 0, size })
    }

    /// The part of `range` that comes from the source: a prefix of it.
    fn inside(&self, range: ByteRange) -> Result<Option<(&Rc<dyn Source>, ByteRange)>> {
        if range.end() > self.size {
            bail!(InvalidRequest, "source: {range} is beyond its end at {}", self.size);
        }
        let inside = ByteRange::between(range.start(), range.end().min(self.inner_len));
        Ok(self.inner.as_ref().zip(inside))
    }
}

impl Source for PaddedSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            let inside = self.inside(range)?;
            if let Some((inner, part)) = inside
                && part == range
            {
                return inner.read(range).await;
            }
            let mut buf = DmaBuf::with_head((range.start() % DMA_ALIGN as u64) as usize, range.len() as usize);
            let mut filled = 0;
            if let Some((inner, part)) = inside {
                let data = inner.read(part).await?;
                filled = data.len();
                buf[..filled].copy_from_slice(&data);
            }
            buf[filled..].fill(0);
            Ok(buf)
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            let mut extents = Vec::new();
            let mut covered = 0;
            if let Some((inner, part)) = self.inside(range)? {
                extents = inner.allocation(part).await?;
                covered = extents.iter().map(|extent| extent.len).sum();
                if covered < part.len() {
                    return Ok(extents);
                }
            }
            // What a source tells in EXTENTS_MAX extents may end early; so may this.
            if extents.len() < EXTENTS_MAX || extents.last().is_some_and(|last| last.state == Allocation::HOLE) {
                push_extent(&mut extents, range.len() - covered, Allocation::HOLE);
            }
            Ok(extents)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma_buf::is_zero;
    use futures_lite::future::block_on;
    use proptest::prelude::*;

    /// Data by a pattern without zeros, a hole in every fourth kilobyte; tells so many extents at a time.
    struct Pattern {
        size: u64,
        extents_max: usize,
    }

    fn byte(at: u64) -> u8 {
        if at / 1024 % 4 == 3 { 0 } else { 1 + (at % 251) as u8 }
    }

    impl Source for Pattern {
        fn size(&self) -> u64 {
            self.size
        }
        fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
            assert!(range.end() <= self.size);
            let mut buf = DmaBuf::new(range.len() as usize);
            buf.iter_mut().zip(range.start()..).for_each(|(b, at)| *b = byte(at));
            Box::pin(async { Ok(buf) })
        }
        fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
            assert!(range.end() <= self.size);
            let mut list = Vec::new();
            for piece in range.split_at_multiples(1024) {
                let hole = piece.start() / 1024 % 4 == 3;
                push_extent(&mut list, piece.len(), if hole { Allocation::HOLE } else { Allocation::DATA });
            }
            list.truncate(self.extents_max);
            Box::pin(async { Ok(list) })
        }
    }

    proptest! {
        /// Against the definition, byte by byte.
        #[test]
        fn is_the_source_and_then_zeros(
            inner_size in 1u64..20_000, inner_len in any::<prop::sample::Index>(), more in 0u64..20_000,
            start in any::<prop::sample::Index>(), len in any::<prop::sample::Index>(), extents_max in 1usize..6,
        ) {
            let inner_len = inner_len.index(inner_size as usize + 1) as u64;
            let size = (inner_len + more).max(1);
            let truth = |at: u64| if at < inner_len { byte(at) } else { 0 };
            let source = PaddedSource::view(Rc::new(Pattern { size: inner_size, extents_max }), inner_len, size);
            prop_assert_eq!(source.size(), size);
            let start = start.index(size as usize) as u64;
            let range = ByteRange::new(start, 1 + len.index((size - start) as usize) as u64).unwrap();
            let data = block_on(source.read(range)).unwrap();
            prop_assert_eq!(data.len() as u64, range.len());
            prop_assert!(data.iter().zip(range.start()..).all(|(b, at)| *b == truth(at)));

            let mut at = range.start();
            for extent in block_on(source.allocation(range)).unwrap() {
                prop_assert!(extent.len > 0);
                if extent.state.zero {
                    prop_assert!((at..at + extent.len).all(|at| truth(at) == 0));
                }
                at += extent.len;
            }
            prop_assert!(at > range.start() && at <= range.end());
            prop_assert!(extents_max < 5 || range.start() < inner_len || at == range.end());
        }
    }

    #[test]
    fn what_changes_nothing_is_the_source_itself() {
        let inner: Rc<dyn Source> = Rc::new(Pattern { size: 5000, extents_max: 9 });
        assert!(Rc::ptr_eq(&PaddedSource::view(inner.clone(), 5000, 5000), &inner));
        assert!(!Rc::ptr_eq(&PaddedSource::view(inner.clone(), 4999, 5000), &inner));
    }

    #[test]
    fn zeros_need_no_source_and_end() {
        let zeros = PaddedSource::zeros(5000);
        let range = ByteRange::new(4000, 1000).unwrap();
        assert!(is_zero(&block_on(zeros.read(range)).unwrap()));
        assert_eq!(block_on(zeros.allocation(range)).unwrap(), [Extent { len: 1000, state: Allocation::HOLE }]);
        let error = block_on(zeros.read(ByteRange::new(4999, 2).unwrap())).unwrap_err();
        assert_eq!(error.to_string(), "source: 2 bytes at offset 4999 is beyond its end at 5000");
    }
}
