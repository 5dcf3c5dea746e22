//! One shard's slice of one clone: plans client requests on its zones and carries them out.
//!
//! Invariants:
//! * A region's bit is set only after the write of its data has completed, and while its bytes are held.
//! * What changes a region's route (copy, overwrite, discard of unhydrated regions) holds its bytes exclusively
//!   from before it looks at the bit until after it has set it. See [`super::inflight`].
//! * A plan made before the bytes were held is made again after.

use super::copy_pool::CopyShare;
use super::inflight::Hold;
use super::locks::Locks;
use super::plan::{ChangeRoute, ReadRoute, Runs, plan_change, plan_read};
use super::{COORDINATOR, Mesh, ShardReply, ShardRequest};
use crate::clone_state::{CloneState, Mode};
use crate::disk::{Disk, EXTENTS_MAX, ZeroFlags};
use crate::dma_buf::DmaBuf;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::hydration_sched::{HydrationSched, Unhydrated};
use crate::io_frontend::request::{
    Allocation, Completion, Extent, LocalBoxFuture, Request, RequestFlags, StatusExtents, push_extent,
};
use crate::local::{Notify, join_some};
use crate::meta::region_map::{RegionMap, ZoneSnapshot};
use crate::source::Source;
use crate::units::{ByteRange, CloneId, Geometry, RegionIndex, RegionRange, ShardIndex, ZoneIndex};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Parts of one request that run at a time. One over patchy regions has thousands.
const PARTS_AT_A_TIME: usize = 64;

impl Runs for RegionMap {
    fn run_from(&self, region: RegionIndex, end: RegionIndex) -> (bool, RegionRange) {
        RegionMap::run_from(self, region, end)
    }
}
impl Unhydrated for RegionMap {
    fn next_unhydrated(&self, from: RegionIndex, max: u64) -> Option<RegionRange> {
        RegionMap::next_unhydrated(self, from, max)
    }
    fn is_hydrated(&self, region: RegionIndex) -> bool {
        RegionMap::is_hydrated(self, region)
    }
}

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a slice has done: counts and bytes since the start.
        #[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
        pub struct SliceStats { $($(#[$doc])* pub $name: u64),* }
        impl std::ops::AddAssign for SliceStats {
            fn add_assign(&mut self, other: Self) { $(self.$name += other.$name;)* }
        }
        #[derive(Default)]
        pub(super) struct Counters { $(pub $name: Cell<u64>),* }
        impl Counters {
            fn snapshot(&self) -> SliceStats { SliceStats { $($name: self.$name.get()),* } }
        }
    };
}
stats! {
    reads, read_bytes, writes, write_bytes, trims, trim_bytes, write_zeroes, write_zeroes_bytes, caches,
    /// Requests that failed, of any kind.
    errors,
    /// Reads (or parts of them) served by the destination and by the source.
    destination_reads, source_reads,
    /// Bytes read from the source for hydration, and for clients without keeping them.
    copied_bytes, source_read_bytes,
    /// Bytes of hydrated regions that were zeros or holes and were not written as data.
    zero_bytes,
    /// Regions hydrated by overwriting or discarding them: never copied.
    overwritten_regions, discarded_regions,
    /// Copies that failed, and regions that are held back because of it.
    copy_failures, failed_regions,
    /// 1 while hydration pauses because of failures.
    hydration_paused,
    /// Operations in flight or waiting on this slice now.
    in_flight,
}

pub(super) fn count(cell: &Cell<u64>, by: u64) {
    cell.set(cell.get() + by);
}

/// What a slice is made from.
pub struct SliceParts {
    pub state: std::sync::Arc<CloneState>,
    pub map: RegionMap,
    pub destination: Rc<dyn Disk>,
    /// `None` when everything is hydrated.
    pub source: Option<Rc<dyn Source>>,
    pub env: Rc<dyn Env>,
    pub mesh: Rc<dyn Mesh>,
    /// Its part of what copies may use on this shard.
    pub copies: CopyShare,
}

/// One shard's slice of one clone.
pub struct CloneSlice {
    pub(super) state: std::sync::Arc<CloneState>,
    pub(super) geometry: Geometry,
    pub(super) me: ShardIndex,
    pub(super) map: RefCell<RegionMap>,
    pub(super) locks: Rc<Locks>,
    pub(super) destination: Rc<dyn Disk>,
    source: RefCell<Option<Rc<dyn Source>>>,
    pub(super) env: Rc<dyn Env>,
    mesh: Rc<dyn Mesh>,
    pub(super) copies: CopyShare,
    pub(super) sched: RefCell<HydrationSched>,
    pub(super) wake: Notify,
    pub(super) counters: Counters,
    pub(super) failures: RefCell<crate::log_limit::LogLimit>,
}

/// What a change writes.
#[derive(Clone)]
enum Change {
    Data(Bytes),
    Zeroes(ZeroFlags),
    /// As zeroes where all of a region is meant, else only advice.
    Trim(ZeroFlags),
}

/// Counts a client's request as in flight, also when its future is dropped.
struct Foreground {
    state: std::sync::Arc<CloneState>,
    env: Rc<dyn Env>,
}

impl Foreground {
    fn new(state: &std::sync::Arc<CloneState>, env: &Rc<dyn Env>) -> Self {
        state.foreground_begins();
        Self { state: state.clone(), env: env.clone() }
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.state.foreground_ends(self.env.now());
    }
}

impl CloneSlice {
    pub fn new(parts: SliceParts) -> Rc<Self> {
        let SliceParts { state, map, destination, source, env, mesh, copies } = parts;
        Rc::new(Self {
            geometry: state.geometry,
            me: mesh.me(),
            map: RefCell::new(map),
            locks: Rc::default(),
            destination,
            source: RefCell::new(source),
            env,
            mesh,
            copies,
            sched: RefCell::default(),
            wake: Notify::default(),
            counters: Counters::default(),
            failures: RefCell::default(),
            state,
        })
    }

    pub fn id(&self) -> CloneId {
        self.state.id
    }

    pub fn state(&self) -> &std::sync::Arc<CloneState> {
        &self.state
    }

    pub fn stats(&self) -> SliceStats {
        let mut stats = self.counters.snapshot();
        stats.failed_regions = self.sched.borrow().failed_regions();
        stats.hydration_paused = u64::from(self.sched.borrow().is_paused());
        stats.in_flight = self.locks.len() as u64;
        stats
    }

    /// The source; gone once everything is hydrated.
    pub fn source(&self) -> Result<Rc<dyn Source>> {
        let source = self.source.borrow().clone();
        source.ok_or_else(|| {
            Error::new(ErrorKind::SourceLost, format!("clone '{}' has let go of its source", self.state.name))
        })
    }

    /// Carries out a client's request, all of it inside one zone of this shard.
    pub async fn execute(self: Rc<Self>, request: Request) -> Result<Completion> {
        let in_foreground = Foreground::new(&self.state, &self.env);
        let result = self.clone().perform(request).await;
        drop(in_foreground);
        if let Err(error) = &result {
            count(&self.counters.errors, 1);
            self.log_failure(error);
        }
        result
    }

    pub(super) fn log_failure(&self, error: &Error) {
        if let Some(line) = self.failures.borrow_mut().line(self.env.now(), error) {
            log::warn!("clone '{}': {line}", self.state.name);
        }
    }

    async fn perform(self: Rc<Self>, request: Request) -> Result<Completion> {
        self.state.check_mode(false)?;
        let counters = &self.counters;
        match request {
            Request::Read(range) => {
                count(&counters.reads, 1);
                count(&counters.read_bytes, range.len());
                self.read(range).await.map(Completion::Data)
            }
            Request::Write { offset, data, flags } => {
                count(&counters.writes, 1);
                count(&counters.write_bytes, data.len() as u64);
                let Some(range) = ByteRange::new(offset, data.len() as u64) else { return Ok(Completion::Done) };
                self.change(range, Change::Data(data), flags).await
            }
            Request::Trim { range, flags } => {
                count(&counters.trims, 1);
                count(&counters.trim_bytes, range.len());
                let zero = if self.state.discard_passdown { ZeroFlags::UNMAP } else { ZeroFlags::empty() };
                self.change(range, Change::Trim(zero), flags).await
            }
            Request::WriteZeroes { range, flags } => {
                count(&counters.write_zeroes, 1);
                count(&counters.write_zeroes_bytes, range.len());
                let mut zero = ZeroFlags::empty();
                zero.set(ZeroFlags::UNMAP, !flags.contains(RequestFlags::NO_HOLE) && self.state.discard_passdown);
                zero.set(ZeroFlags::FAST_ONLY, flags.contains(RequestFlags::FAST_ZERO));
                self.change(range, Change::Zeroes(zero), flags).await
            }
            Request::Cache(range) => {
                count(&counters.caches, 1);
                self.cache(range).await.map(|()| Completion::Done)
            }
            Request::Status(range) => self.status(range).await.map(Completion::Status),
            Request::Flush => {
                self.commit().await?;
                Ok(Completion::Done)
            }
        }
    }

    /// Makes everything acknowledged so far durable, by the coordinator.
    pub(super) async fn commit(&self) -> Result<()> {
        self.mesh.call(COORDINATOR, ShardRequest::Commit { clone: self.id() }).await.map(|_: ShardReply| ())
    }

    // ---- reads ----

    /// The hydrated state of all of `regions` if it is the same, else `None`.
    pub(super) fn uniform(&self, regions: RegionRange) -> Option<bool> {
        let (hydrated, run) = self.map.borrow().run_from(regions.first(), regions.end());
        (run == regions).then_some(hydrated)
    }

    async fn read(self: &Rc<Self>, range: ByteRange) -> Result<Vec<Bytes>> {
        if self.uniform(self.geometry.touched(range)) == Some(true) {
            return Ok(vec![self.read_destination(range).await?]);
        }
        let routes = plan_read(&self.geometry, &*self.map.borrow(), range);
        let units = routes.into_iter().flat_map(|route| {
            let (whole, units) = match route {
                ReadRoute::Destination(bytes) => (Some((None, bytes)), None),
                ReadRoute::Source { regions, wanted } => (None, Some((self.copy_units(regions), wanted))),
            };
            let units = units.into_iter().flat_map(|(units, wanted)| {
                units.map(move |unit| {
                    let bytes = self.geometry.bytes_of(unit).intersection(wanted);
                    (Some(unit), bytes.expect("every region is touched"))
                })
            });
            whole.into_iter().chain(units)
        });
        let pieces = units.map(|(unit, wanted)| async move {
            match unit {
                None => Ok(vec![self.read_destination(wanted).await?]),
                Some(unit) => self.read_unhydrated(unit, wanted).await,
            }
        });
        let mut data = Vec::new();
        for piece in join_some(pieces, PARTS_AT_A_TIME).await {
            data.extend(piece?);
        }
        Ok(data)
    }

    async fn read_destination(&self, range: ByteRange) -> Result<Bytes> {
        count(&self.counters.destination_reads, 1);
        let outer = self.outer(range);
        let mut buf = self.destination.read(outer).await?;
        buf.narrow((range.start() - outer.start()) as usize, range.len() as usize);
        Ok(buf.into())
    }

    /// Reads `wanted` of `regions`, a unit that was not hydrated when this was planned.
    async fn read_unhydrated(self: &Rc<Self>, regions: RegionRange, wanted: ByteRange) -> Result<Vec<Bytes>> {
        let bytes = self.geometry.bytes_of(regions);
        if !self.is_kept(bytes, wanted) && self.uniform(regions) == Some(false) {
            return self.read_past(regions, wanted).await;
        }
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) != Some(false) {
            // Hydrated, some or all, since this was planned: plan again. The recursion ends because bits only get set.
            drop(held);
            let again: LocalBoxFuture<'_, _> = Box::pin(self.read(wanted));
            return again.await;
        }
        let Some(memory) = self.copies.try_acquire(bytes.len()) else {
            drop(held);
            return self.read_past(regions, wanted).await;
        };
        let copy = self.begin_copy(regions, held);
        count(&self.counters.source_reads, 1);
        match self.source()?.read(bytes).await {
            Ok(buf) => {
                let data = Bytes::from(buf);
                let start = (wanted.start() - bytes.start()) as usize;
                let answer = data.slice(start..start + wanted.len() as usize);
                let slice = self.clone();
                // The client has its answer now; keeping the bytes is the clone's own business.
                self.env.spawn(Box::pin(async move {
                    let result = slice.finish_copy(copy, data).await;
                    drop(memory);
                    slice.note_copy(result);
                }));
                Ok(vec![answer])
            }
            Err(error) => {
                drop((copy, memory));
                if wanted == bytes {
                    return Err(error);
                }
                // A bad sector elsewhere in the unit must not fail this read.
                self.read_past(regions, wanted).await
            }
        }
    }

    /// Reads from the source without keeping the bytes: the regions are too large, or memory is short. They go to
    /// the front of the hydration queue. Must be called right after their bit was seen unset, without waiting.
    async fn read_past(&self, regions: RegionRange, wanted: ByteRange) -> Result<Vec<Bytes>> {
        debug_assert_eq!(self.uniform(regions), Some(false));
        count(&self.counters.source_reads, 1);
        count(&self.counters.source_read_bytes, wanted.len());
        self.state.budget().charge(wanted.len(), self.env.now());
        let source = self.source()?;
        self.sched.borrow_mut().prioritise(regions.first());
        self.wake.notify();
        match source.read(wanted).await {
            Ok(data) => Ok(vec![data.into()]),
            // Hydrated or overwritten meanwhile: the destination has an answer, and a newer one.
            Err(_) if self.uniform(self.geometry.touched(wanted)) == Some(true) => {
                Ok(vec![self.read_destination(wanted).await?])
            }
            Err(error) => Err(error),
        }
    }

    /// What it takes to access `range` of the destination: whole blocks, up to the end of the disk.
    pub(super) fn outer(&self, range: ByteRange) -> ByteRange {
        let info = self.destination.info();
        let outer = range.aligned_outward(u64::from(info.block));
        ByteRange::between(outer.start(), outer.end().min(info.size)).expect("the range is inside the disk")
    }

    // ---- changes ----

    async fn change(self: &Rc<Self>, range: ByteRange, change: Change, flags: RequestFlags) -> Result<Completion> {
        let fua = flags.contains(RequestFlags::FUA);
        if self.uniform(self.geometry.touched(range)) == Some(true) {
            // Only the data needs to be durable if the bits are. A zone has one state, so any region tells.
            let direct = fua && self.map.borrow().is_durable(self.geometry.region_of(range.start()));
            match (change, direct) {
                (Change::Data(data), true) => {
                    self.state.check_mode(true)?;
                    self.write_durably(range, data).await?;
                    return Ok(Completion::Done);
                }
                (change, _) => self.change_destination(range, change).await?,
            }
        } else {
            self.change_mixed(range, change).await?;
        }
        if fua {
            self.commit().await?;
        }
        Ok(Completion::Done)
    }

    /// A change, part by part.
    async fn change_mixed(self: &Rc<Self>, range: ByteRange, change: Change) -> Result<()> {
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
                    self.change_whole(regions, part_of(self.geometry.bytes_of(regions))).await
                }
                ChangeRoute::Part { region, range } => self.change_part(region, range, part_of(range)).await,
            }
        });
        join_some(pieces, PARTS_AT_A_TIME).await.into_iter().collect()
    }

    /// A change of hydrated bytes.
    async fn change_destination(&self, range: ByteRange, change: Change) -> Result<()> {
        match change {
            Change::Data(data) => self.write_destination(range, data, false).await,
            Change::Zeroes(flags) => {
                let outer = self.outer(range);
                let hold = if outer == range { Hold::Shared } else { Hold::Exclusive };
                let _held = self.locks.hold(outer, hold).await;
                self.zero_held(range, flags).await
            }
            Change::Trim(flags) => {
                let inner = self.inner(range);
                let Some(inner) = inner.filter(|_| self.state.discard_passdown) else { return Ok(()) };
                let _held = self.locks.hold(inner, Hold::Shared).await;
                match self.destination.zero(inner, flags | ZeroFlags::FAST_ONLY).await {
                    // Only advice: a destination that can't punch keeps its data.
                    Err(error) if error.kind() == ErrorKind::NotSupported => Ok(()),
                    result => result,
                }
            }
        }
    }

    /// The whole blocks in `range`; its last one counts when the disk ends there.
    fn inner(&self, range: ByteRange) -> Option<ByteRange> {
        let info = self.destination.info();
        let block = u64::from(info.block);
        let end = if range.end() == info.size { info.size } else { range.end() / block * block };
        ByteRange::between(range.start().next_multiple_of(block), end)
    }

    /// A write of hydrated bytes that is durable when it returns. A write that fails is its client's affair; but when
    /// only its flush failed, writes that were acknowledged before it may be lost too, as after any failed flush.
    async fn write_durably(&self, range: ByteRange, data: Bytes) -> Result<()> {
        let Err(error) = self.write_destination(range, data.clone(), true).await else { return Ok(()) };
        if self.write_destination(range, data, false).await.is_ok() {
            self.state.degrade(Mode::ReadOnly, &error);
        }
        Err(error)
    }

    async fn write_destination(&self, range: ByteRange, data: Bytes, fua: bool) -> Result<()> {
        let outer = self.outer(range);
        let hold = if outer == range { Hold::Shared } else { Hold::Exclusive };
        let _held = self.locks.hold(outer, hold).await;
        self.write_held(range, data, fua).await
    }

    /// Writes; the bytes around it, to whole blocks, are held exclusively unless the range is aligned.
    pub(super) async fn write_held(&self, range: ByteRange, data: Bytes, fua: bool) -> Result<()> {
        let outer = self.outer(range);
        if outer == range {
            return self.destination.write(range.start(), data, fua).await;
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
        self.destination.write(outer.start(), merged.into(), fua).await
    }

    /// Zeroes; held as for [`Self::write_held`].
    pub(super) async fn zero_held(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let Some(inner) = self.inner(range) else {
            let zeros = Bytes::from(DmaBuf::zeroed(range.len() as usize));
            return self.write_held(range, zeros, false).await;
        };
        self.destination.zero(inner, flags).await?;
        let edges = [ByteRange::between(range.start(), inner.start()), ByteRange::between(inner.end(), range.end())];
        for edge in edges.into_iter().flatten() {
            self.write_held(edge, Bytes::from(DmaBuf::zeroed(edge.len() as usize)), false).await?;
        }
        Ok(())
    }

    /// Overwrites or discards whole regions that were not hydrated when this was planned: nothing is copied.
    async fn change_whole(self: &Rc<Self>, regions: RegionRange, change: Change) -> Result<()> {
        let bytes = self.geometry.bytes_of(regions);
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) != Some(false) {
            drop(held);
            let again: LocalBoxFuture<'_, _> = Box::pin(self.change_mixed(bytes, change));
            return again.await;
        }
        self.state.check_mode(true)?;
        let counter = match change {
            Change::Data(data) => {
                self.write_held(bytes, data, false).await?;
                &self.counters.overwritten_regions
            }
            Change::Zeroes(flags) | Change::Trim(flags) => {
                self.zero_held(bytes, flags).await?;
                &self.counters.discarded_regions
            }
        };
        count(counter, regions.count());
        self.mark_hydrated(regions);
        Ok(())
    }

    /// Changes a part of one region that was not hydrated when this was planned: the rest comes from the source.
    async fn change_part(self: &Rc<Self>, region: RegionIndex, range: ByteRange, change: Change) -> Result<()> {
        if let Change::Trim(_) = change {
            return Ok(()); // Only whole unhydrated regions can be dropped.
        }
        let regions = RegionRange::single(region);
        let bytes = self.geometry.bytes_of(regions);
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) == Some(true) {
            drop(held);
            return self.change_destination(range, change).await;
        }
        self.state.check_mode(true)?;
        let copy = self.begin_copy(regions, held);
        if bytes.len() > super::copy::COPY_UNIT_BYTES {
            self.copy_chunks(bytes).await?;
            match change {
                Change::Data(data) => self.write_held(range, data, false).await?,
                Change::Zeroes(flags) | Change::Trim(flags) => self.zero_held(range, flags).await?,
            }
            self.mark_hydrated(copy.regions());
            return Ok(());
        }
        // Merged in memory, so that one write does both.
        let _memory = self.copies.acquire(bytes.len()).await;
        let mut buf = self.source()?.read(bytes).await?;
        count(&self.counters.copied_bytes, bytes.len());
        let at = (range.start() - bytes.start()) as usize;
        let changed = &mut buf[at..at + range.len() as usize];
        match change {
            Change::Data(data) => changed.copy_from_slice(&data),
            Change::Zeroes(_) | Change::Trim(_) => changed.fill(0),
        }
        self.write_held(bytes, buf.into(), false).await?;
        self.mark_hydrated(copy.regions());
        Ok(())
    }

    /// The data of these regions is in the destination: from now on they are served from there.
    pub(super) fn mark_hydrated(&self, regions: RegionRange) {
        let new = self.map.borrow_mut().set(regions);
        if new == 0 {
            return;
        }
        self.state.set_dirty(self.me);
        if self.state.add_hydrated(new) {
            // The last regions of the whole clone: a commit now completes it.
            let commit = self.mesh.call(COORDINATOR, ShardRequest::Commit { clone: self.id() });
            self.env.spawn(Box::pin(async move {
                // A failure has degraded the mode and was reported there.
                let _ = commit.await;
            }));
        }
    }

    // ---- status ----

    async fn status(self: &Rc<Self>, range: ByteRange) -> Result<StatusExtents> {
        let mut extents = StatusExtents::default();
        let routes = plan_read(&self.geometry, &*self.map.borrow(), range);
        for route in &routes {
            let (bytes, hydrated) = match route {
                ReadRoute::Destination(bytes) => (*bytes, true),
                ReadRoute::Source { wanted, .. } => (*wanted, false),
            };
            if extents.hydrated.len() < EXTENTS_MAX {
                push_extent(&mut extents.hydrated, bytes.len(), hydrated);
            }
        }
        let mut source = self.source().ok();
        'routes: for route in routes {
            let (bytes, hydrated) = match route {
                ReadRoute::Destination(bytes) => (bytes, true),
                ReadRoute::Source { wanted, .. } => (wanted, false),
            };
            let mut at = bytes.start();
            while let Some(rest) = ByteRange::between(at, bytes.end()) {
                if extents.allocation.len() >= EXTENTS_MAX {
                    break 'routes;
                }
                let found = match (hydrated, &source) {
                    (false, None) => Ok(Vec::new()),
                    (false, Some(asked)) => asked.allocation(rest).await.inspect_err(|_| source = None),
                    (true, _) => {
                        self.destination.allocation(self.outer(rest)).await.map(|e| clip(e, self.outer(rest), rest))
                    }
                };
                // Not knowing is no failure: "data" is always a right answer. A lost source is not asked again: each
                // question waits for it.
                let mut found = found.unwrap_or_default();
                if found.is_empty() {
                    found.push(Extent { len: rest.len(), state: Allocation::DATA });
                }
                for extent in found {
                    let len = extent.len.min(bytes.end() - at);
                    push_extent(&mut extents.allocation, len, extent.state);
                    at += len;
                }
            }
        }
        Ok(extents)
    }

    // ---- the coordinator's side ----

    pub fn take_snapshot(&self) -> Vec<ZoneSnapshot> {
        self.map.borrow_mut().take_dirty()
    }
    pub fn committed(&self, zones: &[ZoneIndex]) {
        self.map.borrow_mut().committed(zones);
    }
    /// Everything is hydrated and durable: lets go of the map and the source.
    pub fn release(&self) {
        self.map.borrow_mut().release();
        self.source.borrow_mut().take();
        self.sched.borrow_mut().all_hydrated();
        self.wake.notify();
    }
    /// Settings have changed, or the source is back.
    pub fn wake(&self) {
        self.sched.borrow_mut().retry_now();
        self.wake.notify();
    }
    /// Waits until hydration has ended (the clone is stopping) and nothing is in flight.
    pub async fn drain(&self) {
        self.wake.notify();
        while self.copies.copies_in_flight() > 0 || !self.locks.is_empty() {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Cuts extents of `outer` down to `inner`.
fn clip(extents: Vec<Extent<Allocation>>, outer: ByteRange, inner: ByteRange) -> Vec<Extent<Allocation>> {
    let mut clipped = Vec::with_capacity(extents.len());
    let mut at = outer.start();
    for extent in extents {
        let bytes = ByteRange::new(at, extent.len).and_then(|bytes| bytes.intersection(inner));
        push_extent(&mut clipped, bytes.map_or(0, |bytes| bytes.len()), extent.state);
        at += extent.len;
    }
    clipped
}
