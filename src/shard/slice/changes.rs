//! Changes of one slice: write, trim, write zeroes; of hydrated bytes straight to the destination, of others by
//! overwriting whole regions or by copying the rest of a region first.
//!
//! Invariants:
//! * What sets a bit holds the region's bytes exclusively from before it looks at the bit until after it has set it.
//! * Never a bare discard: what is trimmed or zeroed reads as zeros, or, of hydrated regions, stays as it was.

use super::super::copy::COPY_UNIT_BYTES;
use super::super::direct_writes::Exclusion;
use super::super::inflight::Hold;
use super::super::locks::Held;
use super::super::plan::{ChangeRoute, plan_change};
use super::{CloneSlice, PARTS_AT_A_TIME, Trip};
use crate::clone_state::Mode;
use crate::disk::ZeroFlags;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Completion, LocalBoxFuture, RequestFlags};
use crate::local::join_some;
use crate::metrics::record::{How, Route};
use crate::units::{ByteRange, RegionIndex, RegionRange};
use bytes::Bytes;
use std::rc::Rc;
use std::time::Duration;

/// Between two looks whether the direct writes of an excluded range have ended: as long as such a write takes.
const EXCLUSION_PAUSE_MIN: Duration = Duration::from_micros(20);
const EXCLUSION_PAUSE_MAX: Duration = Duration::from_millis(1);

/// What a change writes.
#[derive(Clone)]
pub(super) enum Change {
    Data(Bytes),
    Zeroes(ZeroFlags),
    /// As zeroes where all of a region is meant, else only advice.
    Trim(ZeroFlags),
}

impl CloneSlice {
    pub(super) async fn change(
        self: &Rc<Self>,
        range: ByteRange,
        change: Change,
        flags: RequestFlags,
        trip: &Trip,
    ) -> Result<Completion> {
        let fua = flags.contains(RequestFlags::FUA);
        if self.uniform(self.geometry.touched(range)) == Some(true) {
            // Only the data needs to be durable if the bits are. A zone has one state, so any region tells.
            let direct = fua && self.map.borrow().is_durable(self.geometry.region_of(range.start()));
            match (change, direct) {
                (Change::Data(data), true) => {
                    self.state.check_mode(true)?;
                    let _held = self.hold_blocks(range).await;
                    self.write_durably_held(range, data).await?;
                    self.counters.part(Route::WriteDestination, range.len());
                    return Ok(Completion::Done);
                }
                (change, _) => self.change_destination(range, change).await?,
            }
        } else {
            self.change_mixed(range, change, trip).await?;
        }
        if fua {
            self.commit().await?;
        }
        Ok(Completion::Done)
    }

    /// A change, part by part.
    async fn change_mixed(self: &Rc<Self>, range: ByteRange, change: Change, trip: &Trip) -> Result<()> {
        let routes = plan_change(&self.geometry, &*self.map.borrow(), range);
        if let Change::Zeroes(zero) = &change
            && zero.contains(ZeroFlags::FAST_ONLY)
            && routes.iter().any(|route| matches!(route, ChangeRoute::Part { .. }))
        {
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("no fast way to zero {range}: it is not hydrated"),
            ));
        }
        let part_of = |bytes: ByteRange| match &change {
            Change::Data(data) => {
                let start = (bytes.start() - range.start()) as usize;
                Change::Data(data.slice(start..start + bytes.len() as usize))
            }
            other => other.clone(),
        };
        let part_of = &part_of;
        let pieces = routes.into_iter().map(|route| async move {
            match route {
                ChangeRoute::Destination(bytes) => self.change_destination(bytes, part_of(bytes)).await,
                ChangeRoute::Whole(regions) => {
                    self.change_whole(regions, part_of(self.geometry.bytes_of(regions)), trip).await
                }
                ChangeRoute::Part { region, range } => self.change_part(region, range, part_of(range), trip).await,
            }
        });
        join_some(pieces, PARTS_AT_A_TIME).await.into_iter().collect()
    }

    /// A change of hydrated bytes.
    async fn change_destination(&self, range: ByteRange, change: Change) -> Result<()> {
        let route = match change {
            Change::Data(data) => {
                self.write_destination(range, data).await?;
                Route::WriteDestination
            }
            Change::Zeroes(flags) => {
                let _held = self.hold_blocks(range).await;
                self.zero_held(range, flags).await?;
                Route::WriteZeroesDestination
            }
            Change::Trim(flags) => match self.inner(range).filter(|_| self.state.discard_passdown) {
                None => Route::TrimIgnored,
                Some(inner) => {
                    let _held = self.locks.hold(inner, Hold::Shared).await;
                    match self.destination.zero(inner, flags | ZeroFlags::FAST_ONLY).await {
                        Ok(()) => Route::TrimDestination,
                        // Only advice: a destination that can't punch keeps its data.
                        Err(error) if error.kind() == ErrorKind::NotSupported => Route::TrimIgnored,
                        Err(error) => return Err(error),
                    }
                }
            },
        };
        self.counters.part(route, range.len());
        Ok(())
    }

    /// A write of hydrated bytes that is durable when it returns. A write that fails is its client's affair; but when
    /// only its flush failed, writes that were acknowledged before it may be lost too, as after any failed flush.
    pub(super) async fn write_durably_held(&self, range: ByteRange, data: Bytes) -> Result<()> {
        let outer = self.outer(range);
        // What can't be read at its edges is no failed flush.
        let whole = self.merged(range, data).await?;
        let Err(error) = self.destination.write(outer.start(), whole.clone(), true).await else {
            // A flush that failed meanwhile may have dropped what another write put over a part of this one.
            return self.state.check_mode(true);
        };
        if self.destination.write(outer.start(), whole, false).await.is_ok() {
            self.state.degrade(Mode::ReadOnly, &error);
        }
        Err(error)
    }

    async fn write_destination(&self, range: ByteRange, data: Bytes) -> Result<()> {
        let _held = self.hold_blocks(range).await;
        self.write_held(range, data).await
    }

    /// Holds the blocks of hydrated bytes that are about to be changed: whole ones with others, parts of them alone, by
    /// all shards.
    async fn hold_blocks(&self, range: ByteRange) -> (Held, Option<Exclusion>) {
        let outer = self.outer(range);
        if outer == range {
            return (self.locks.hold(outer, Hold::Shared).await, None);
        }
        let held = self.locks.hold(outer, Hold::Exclusive).await;
        let exclusion = self.state.direct_writes().exclude(outer);
        let mut pause = EXCLUSION_PAUSE_MIN;
        while !exclusion.is_alone() {
            self.env.sleep(pause).await;
            pause = (pause * 2).min(EXCLUSION_PAUSE_MAX);
        }
        (held, Some(exclusion))
    }

    /// Writes; the bytes around it, to whole blocks, are held exclusively unless the range is aligned.
    pub(in crate::shard) async fn write_held(&self, range: ByteRange, data: Bytes) -> Result<()> {
        let whole = self.merged(range, data).await?;
        self.destination.write(self.outer(range).start(), whole, false).await
    }

    /// The whole blocks that a write of `data` to `range` changes, as they are afterwards.
    async fn merged(&self, range: ByteRange, data: Bytes) -> Result<Bytes> {
        let outer = self.outer(range);
        if outer == range {
            return Ok(data);
        }
        // Read-modify-write of the blocks at the edges.
        let block = u64::from(self.destination.info().block);
        let mut merged = DmaBuf::new(outer.len() as usize);
        let head = ByteRange::between(outer.start(), outer.end().min(outer.start() + block)).expect("not empty");
        let tail_start = (outer.end() - 1) / block * block;
        let tail = ByteRange::between(tail_start, outer.end()).expect("not empty");
        if head.start() < range.start() || tail == head {
            merged[..head.len() as usize].copy_from_slice(&self.destination.read(head).await?);
        }
        if tail != head && tail.end() > range.end() {
            let at = (tail.start() - outer.start()) as usize;
            merged[at..].copy_from_slice(&self.destination.read(tail).await?);
        }
        let at = (range.start() - outer.start()) as usize;
        merged[at..at + data.len()].copy_from_slice(&data);
        Ok(merged.into())
    }

    /// Zeroes; held as for [`Self::write_held`].
    pub(in crate::shard) async fn zero_held(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let Some(inner) = self.inner(range) else {
            let zeros = Bytes::from(DmaBuf::zeroed(range.len() as usize));
            return self.write_held(range, zeros).await;
        };
        self.destination.zero(inner, flags).await?;
        let edges = [ByteRange::between(range.start(), inner.start()), ByteRange::between(inner.end(), range.end())];
        for edge in edges.into_iter().flatten() {
            self.write_held(edge, Bytes::from(DmaBuf::zeroed(edge.len() as usize))).await?;
        }
        Ok(())
    }

    /// Overwrites or discards whole regions that were not hydrated when this was planned: nothing is copied.
    async fn change_whole(self: &Rc<Self>, regions: RegionRange, change: Change, trip: &Trip) -> Result<()> {
        let bytes = self.geometry.bytes_of(regions);
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) != Some(false) {
            drop(held);
            let again: LocalBoxFuture<'_, _> = Box::pin(self.change_mixed(bytes, change, trip));
            return again.await;
        }
        self.state.check_mode(true)?;
        let (route, how) = match &change {
            Change::Data(_) => (Route::WriteWholeRegion, How::Overwrite),
            Change::Zeroes(_) => (Route::WriteZeroesWholeRegion, How::Discard),
            Change::Trim(_) => (Route::TrimWholeRegion, How::Discard),
        };
        match change {
            Change::Data(data) => self.write_held(bytes, data).await?,
            Change::Zeroes(flags) | Change::Trim(flags) => self.zero_held(bytes, flags).await?,
        }
        self.counters.part(route, bytes.len());
        self.mark_hydrated(regions, how);
        Ok(())
    }

    /// Changes a part of one region that was not hydrated when this was planned: the rest comes from the source.
    async fn change_part(
        self: &Rc<Self>,
        region: RegionIndex,
        range: ByteRange,
        change: Change,
        trip: &Trip,
    ) -> Result<()> {
        if let Change::Trim(_) = change {
            // Only whole unhydrated regions can be dropped.
            self.counters.part(Route::TrimIgnored, range.len());
            return Ok(());
        }
        trip.used_source.set(true);
        let regions = RegionRange::single(region);
        let bytes = self.geometry.bytes_of(regions);
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) == Some(true) {
            drop(held);
            return self.change_destination(range, change).await;
        }
        self.state.check_mode(true)?;
        let copy = self.begin_copy(regions, held);
        let route = match change {
            Change::Data(_) => Route::WritePartialRegion,
            Change::Zeroes(_) | Change::Trim(_) => Route::WriteZeroesPartialRegion,
        };
        if bytes.len() > COPY_UNIT_BYTES {
            let zero_bytes = self.copy_chunks(bytes).await?;
            match change {
                Change::Data(data) => self.write_held(range, data).await?,
                Change::Zeroes(flags) | Change::Trim(flags) => self.zero_held(range, flags).await?,
            }
            self.counters.part(route, range.len());
            self.copied(&copy, How::PartialWrite, zero_bytes);
            return Ok(());
        }
        // Merged in memory, so that one write does both.
        let _memory = self.copies.acquire(bytes.len()).await;
        let mut buf = self.read_source(bytes).await?;
        let at = (range.start() - bytes.start()) as usize;
        let changed = &mut buf[at..at + range.len() as usize];
        match change {
            Change::Data(data) => changed.copy_from_slice(&data),
            Change::Zeroes(_) | Change::Trim(_) => changed.fill(0),
        }
        self.write_held(bytes, buf.into()).await?;
        self.counters.part(route, range.len());
        self.copied(&copy, How::PartialWrite, 0);
        Ok(())
    }
}
