//! Copying regions from the source to the destination: the unit of all hydration, whoever asks for it.

use super::inflight::Hold;
use super::locks::Held;
use super::plan::{ReadRoute, plan_read};
use super::slice::{CloneSlice, Trip, count};
use crate::clone_state::{CloneState, Mode};
use crate::disk::ZeroFlags;
use crate::dma_buf::is_zero;
use crate::error::{Error, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::join_all;
use crate::metrics::record::{How, Route};
use crate::units::{ByteRange, RegionRange};
use bytes::Bytes;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// The most that is read from the source as one piece, in bytes. Larger regions are copied in such chunks.
pub const COPY_UNIT_BYTES: u64 = 1 << 20;
/// Chunks of one large region, or units of one CACHE request, that are copied at a time.
const CHUNKS_AT_A_TIME: usize = 4;
/// A read brings whole regions of at most this size; of larger ones only when it wants a good part of them.
const KEPT_REGION_BYTES_MAX: u64 = 256 << 10;
/// That part: one over this.
const KEPT_SHARE: u64 = 4;
/// Zeros are looked for in pieces of this size: smaller holes in the middle of data are not worth an operation.
const ZERO_GRAIN_BYTES: usize = 64 << 10;

/// Regions being copied: their bytes are held, they are counted as hydrating.
pub(super) struct Copy {
    regions: RegionRange,
    state: Arc<CloneState>,
    began: Duration,
    _held: Held,
}

impl Copy {
    pub fn regions(&self) -> RegionRange {
        self.regions
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.state.sub_hydrating(self.regions.count());
    }
}

impl CloneSlice {
    /// Cuts a run of regions into units of at most [`COPY_UNIT_BYTES`], or single regions if those are larger.
    pub(super) fn copy_units(&self, regions: RegionRange) -> impl Iterator<Item = RegionRange> + use<> {
        let per_unit = (COPY_UNIT_BYTES >> self.geometry.region_size().shift()).max(1);
        let (mut at, end) = (regions.first(), regions.end());
        std::iter::from_fn(move || {
            let unit_end = end.min(crate::units::RegionIndex(at.0 + per_unit));
            let unit = RegionRange::between(at, unit_end)?;
            at = unit_end;
            Some(unit)
        })
    }

    /// Whether a read of `wanted` brings in and keeps the whole regions (`bytes`) around it.
    pub(super) fn is_kept(&self, bytes: ByteRange, wanted: ByteRange) -> bool {
        let small = bytes.len() <= KEPT_REGION_BYTES_MAX
            || self.geometry.region_size().bytes() <= KEPT_REGION_BYTES_MAX
            || wanted.len() >= bytes.len() / KEPT_SHARE;
        small && bytes.len() <= COPY_UNIT_BYTES && self.state.mode() == Mode::ReadWrite
    }

    /// A copy on demand: it is charged to the bandwidth of hydration, but does not wait for any.
    pub(super) fn begin_copy(&self, regions: RegionRange, held: Held) -> Copy {
        self.state.budget().charge(self.geometry.bytes_of(regions).len(), self.env.now());
        self.state.add_hydrating(regions.count());
        self.counted_copy(regions, held)
    }

    /// As [`Self::begin_copy`] for regions that are already counted as hydrating.
    pub(super) fn counted_copy(&self, regions: RegionRange, held: Held) -> Copy {
        Copy { regions, state: self.state.clone(), began: self.env.now(), _held: held }
    }

    /// The copy is in the destination: marks its regions, and counts what brought them in.
    /// `zero_bytes`: how many bytes of it were zeros and not written as data.
    pub(super) fn copied(self: &Rc<Self>, copy: &Copy, how: How, zero_bytes: u64) {
        self.state.copy_succeeded();
        self.mark_hydrated(copy.regions, how);
        // Only here: what a copy that fails has read and written is done again by the next one.
        let bytes = self.geometry.bytes_of(copy.regions).len();
        count(&self.counters.hydrated_bytes, bytes);
        count(&self.counters.copied_bytes, if matches!(how, How::Zeroes) { 0 } else { bytes });
        count(&self.counters.zero_bytes, zero_bytes);
        self.counters.copy_latency.record_time(self.env.now().saturating_sub(copy.began));
    }

    /// Writes what the source holds of the copy's regions, and marks them.
    pub(super) async fn finish_copy(self: &Rc<Self>, copy: Copy, data: Bytes, how: How) -> Result<()> {
        self.state.check_mode(true)?;
        let bytes = self.geometry.bytes_of(copy.regions());
        let zero_bytes = self.store_copied(bytes, data).await?;
        self.copied(&copy, how, zero_bytes);
        Ok(())
    }

    /// Copies regions whose bytes are held, and marks them.
    pub(super) async fn copy(self: &Rc<Self>, copy: Copy, how: How) -> Result<()> {
        self.state.check_mode(true)?;
        let bytes = self.geometry.bytes_of(copy.regions());
        let zero_bytes = self.copy_chunks(bytes).await?;
        self.copied(&copy, how, zero_bytes);
        Ok(())
    }

    /// Copies bytes in chunks, some at a time. The bytes are held; no bit is set. Returns how many were zeros.
    pub(super) async fn copy_chunks(&self, bytes: ByteRange) -> Result<u64> {
        if bytes.len() <= COPY_UNIT_BYTES {
            return self.copy_chunk(bytes).await;
        }
        let chunks = std::cell::RefCell::new(bytes.split_at_multiples(COPY_UNIT_BYTES));
        let worker = || async {
            let mut zero_bytes = 0;
            loop {
                let next = chunks.borrow_mut().next();
                let Some(chunk) = next else { return Ok(zero_bytes) };
                zero_bytes += self.copy_chunk(chunk).await?;
            }
        };
        let workers = (0..CHUNKS_AT_A_TIME).map(|_| Box::pin(worker()) as LocalBoxFuture<'_, Result<u64>>).collect();
        join_all(workers).await.into_iter().sum()
    }

    async fn copy_chunk(&self, bytes: ByteRange) -> Result<u64> {
        let _memory = self.copies.acquire(bytes.len()).await;
        let data = self.read_source(bytes).await?;
        self.store_copied(bytes, data.into()).await
    }

    /// Writes copied data; zeros become holes. Returns how many bytes were zeros.
    async fn store_copied(&self, bytes: ByteRange, data: Bytes) -> Result<u64> {
        debug_assert_eq!(bytes.len(), data.len() as u64);
        let (mut at, mut zero_bytes) = (0, 0);
        while at < data.len() {
            let grain_end = |from: usize| data.len().min((from / ZERO_GRAIN_BYTES + 1) * ZERO_GRAIN_BYTES);
            let mut end = grain_end(at);
            let zero = is_zero(&data[at..end]);
            while end < data.len() && is_zero(&data[end..grain_end(end)]) == zero {
                end = grain_end(end);
            }
            let piece = ByteRange::new(bytes.start() + at as u64, (end - at) as u64).expect("not empty");
            match zero {
                true => {
                    self.store_zeros(piece).await?;
                    zero_bytes += piece.len();
                }
                false => self.write_held(piece, data.slice(at..end)).await?,
            }
            at = end;
        }
        Ok(zero_bytes)
    }

    /// The source reads zeros here. Whatever the destination held must go.
    pub(super) async fn store_zeros(&self, bytes: ByteRange) -> Result<()> {
        self.zero_held(bytes, ZeroFlags::UNMAP).await
    }

    /// Counts and reports the end of a copy that no client waits for.
    pub(super) fn note_copy(&self, result: Result<()>) {
        if let Err(error) = result {
            count(&self.counters.copy_failures, 1);
            self.log_failure(&error.within("hydration"));
        }
    }

    /// Hydrates all regions that `range` touches, now.
    pub(super) async fn cache(self: &Rc<Self>, range: ByteRange, trip: &Trip) -> Result<()> {
        let routes = plan_read(&self.geometry, &*self.map.borrow(), range);
        let units = routes.into_iter().filter_map(|route| match route {
            ReadRoute::Destination(bytes) => {
                self.counters.part(Route::CacheHydrated, bytes.len());
                None
            }
            ReadRoute::Source { regions, .. } => Some(self.copy_units(regions)),
        });
        let units = std::cell::RefCell::new(units.flatten());
        let worker = || async {
            loop {
                let next = units.borrow_mut().next();
                let Some(unit) = next else { return Ok::<(), Error>(()) };
                self.hydrate_now(unit, range, trip).await?;
            }
        };
        let workers = (0..CHUNKS_AT_A_TIME).map(|_| Box::pin(worker()) as LocalBoxFuture<'_, Result<()>>).collect();
        join_all(workers).await.into_iter().collect()
    }

    /// Hydrates `regions`, for a request for `range`, which touches each of them.
    async fn hydrate_now(self: &Rc<Self>, regions: RegionRange, range: ByteRange, trip: &Trip) -> Result<()> {
        trip.used_source.set(true);
        let bytes = self.geometry.bytes_of(regions);
        let wanted = bytes.intersection(range).expect("every region is touched");
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        match self.uniform(regions) {
            Some(true) => {
                self.counters.part(Route::CacheHydrated, wanted.len());
                Ok(())
            }
            Some(false) => {
                self.copy(self.begin_copy(regions, held), How::Cache).await?;
                self.counters.part(Route::CacheCopied, wanted.len());
                Ok(())
            }
            None => {
                drop(held);
                let again: LocalBoxFuture<'_, _> = Box::pin(self.cache(wanted, trip));
                again.await
            }
        }
    }
}
