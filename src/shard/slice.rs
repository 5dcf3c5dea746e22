//! One shard's slice of one clone: plans client requests on its zones and carries them out.
//!
//! Invariants:
//! * A region's bit is set only after the write of its data has completed, and while its bytes are held.
//! * What changes a region's route (copy, overwrite, discard of unhydrated regions) holds its bytes exclusively
//!   from before it looks at the bit until after it has set it. See [`super::inflight`].
//! * A plan made before the bytes were held is made again after.

mod changes;
pub mod direct;
mod growth;
mod metrics;
mod reads;
mod status;

use super::copy_pool::CopyShare;
use super::locks::Locks;
use super::plan::Runs;
use super::{COORDINATOR, Mesh, ShardReply, ShardRequest};
use crate::clone_state::CloneState;
use crate::disk::{Disk, ZeroFlags};
use crate::dma_buf::DmaBuf;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::hydration_sched::{HydrationSched, Unhydrated};
use crate::io_frontend::request::{Completion, Request, RequestFlags};
use crate::local::Notify;
use crate::meta::region_map::{RegionMap, ZoneSnapshot};
pub(super) use crate::metrics::record::count;
use crate::metrics::record::{How, Kind, SliceRecorder};
use crate::source::Source;
use crate::units::{ByteRange, CloneId, Geometry, RegionIndex, RegionRange, ShardIndex, ZoneIndex};
use changes::Change;
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
    };
}
stats! {
    reads, read_bytes, writes, write_bytes, trims, trim_bytes, write_zeroes, write_zeroes_bytes,
    /// Requests that failed, of any kind.
    errors,
    /// Bytes of regions that were brought in from the source, its zeros included; and of those that were copied.
    hydrated_bytes, copied_bytes,
    /// Bytes read from the source, also by copies that failed later; and of them those for clients, not kept.
    source_read_bytes, read_past_bytes,
    /// Bytes of hydrated regions that were zeros or holes and were not written as data.
    zero_bytes,
    /// Regions hydrated by discarding them: never copied.
    discarded_regions,
    /// Copies that failed, and regions that are held back because of it.
    copy_failures, failed_regions,
    /// 1 while hydration pauses because of failures.
    hydration_paused,
    /// Operations in flight or waiting on this slice now.
    in_flight,
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
    pub(super) copies: Rc<CopyShare>,
    pub(super) sched: RefCell<HydrationSched>,
    pub(super) wake: Notify,
    /// Hydration asks the source what is allocated before it begins a copy.
    pub(super) launching: Cell<bool>,
    /// Commits that this slice has asked for by itself.
    commits_in_flight: Cell<u64>,
    /// Writes that go past the owners of their regions.
    direct_writes: Cell<u64>,
    /// The clone has grown: another slice is in this one's place.
    pub(super) replaced: Cell<bool>,
    pub(super) counters: Rc<SliceRecorder>,
    pub(super) failures: RefCell<crate::log_limit::LogLimit>,
}

/// A client's request on its way. Counts as in flight, also when its future is dropped.
struct Foreground {
    slice: Rc<CloneSlice>,
    began: Duration,
    /// Set when it was served.
    served: Cell<Option<Kind>>,
    trip: Trip,
}

/// What a request meets on its way.
#[derive(Default)]
pub(super) struct Trip {
    /// It had to wait for the source.
    pub used_source: Cell<bool>,
}

impl Foreground {
    fn new(slice: Rc<CloneSlice>) -> Self {
        slice.state.foreground_begins();
        slice.counters.in_flight.up();
        Self { began: slice.env.now(), slice, served: Cell::new(None), trip: Trip::default() }
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let now = self.slice.env.now();
        self.slice.state.foreground_ends(now);
        self.slice.counters.in_flight.down();
        if let Some(kind) = self.served.get() {
            let taken = now.saturating_sub(self.began);
            self.slice.counters.served(kind, self.trip.used_source.get(), taken);
        }
    }
}

/// The kind of a request, and its bytes. A flush is the coordinator's.
fn kind_of(request: &Request) -> Option<(Kind, u64)> {
    Some(match request {
        Request::Read(range) => (Kind::Read, range.len()),
        Request::Write { data, .. } => (Kind::Write, data.len() as u64),
        Request::Trim { range, .. } => (Kind::Trim, range.len()),
        Request::WriteZeroes { range, .. } => (Kind::WriteZeroes, range.len()),
        Request::Cache(range) => (Kind::Cache, range.len()),
        Request::Status(range) => (Kind::Status, range.len()),
        Request::Flush => return None,
    })
}

impl CloneSlice {
    pub fn new(parts: SliceParts) -> Rc<Self> {
        let SliceParts { state, map, destination, source, env, mesh, copies } = parts;
        Rc::new(Self {
            geometry: state.geometry(),
            me: mesh.me(),
            map: RefCell::new(map),
            locks: Rc::default(),
            destination,
            source: RefCell::new(source),
            env,
            mesh,
            copies: Rc::new(copies),
            sched: RefCell::default(),
            wake: Notify::default(),
            launching: Cell::new(false),
            commits_in_flight: Cell::new(0),
            direct_writes: Cell::new(0),
            replaced: Cell::new(false),
            counters: Rc::default(),
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
        let (counters, sched) = (&self.counters, self.sched.borrow());
        let io = counters.io();
        SliceStats {
            reads: io.read.requests,
            read_bytes: io.read.bytes,
            writes: io.write.requests,
            write_bytes: io.write.bytes,
            trims: io.trim.requests,
            trim_bytes: io.trim.bytes,
            write_zeroes: io.write_zeroes.requests,
            write_zeroes_bytes: io.write_zeroes.bytes,
            errors: Kind::ALL.iter().map(|kind| io.of(*kind).errors).sum(),
            hydrated_bytes: counters.hydrated_bytes.get(),
            copied_bytes: counters.copied_bytes.get(),
            source_read_bytes: counters.source_read_bytes.get(),
            read_past_bytes: counters.read_past_bytes.get(),
            zero_bytes: counters.zero_bytes.get(),
            discarded_regions: counters.hydrated_by().discard,
            copy_failures: counters.copy_failures.get(),
            failed_regions: sched.failed_regions(),
            hydration_paused: u64::from(self.is_hydration_paused()),
            in_flight: self.locks.len() as u64 + self.direct_writes.get(),
        }
    }

    /// The bits, for simulations that check them.
    #[cfg(test)]
    pub fn map(&self) -> std::cell::Ref<'_, RegionMap> {
        self.map.borrow()
    }

    /// Whether it pauses because of failures, those of this slice or of the clone.
    pub(super) fn is_hydration_paused(&self) -> bool {
        self.sched.borrow().is_paused() || self.state.hydration_paused_until(self.env.now()).is_some()
    }

    /// The source; gone once everything is hydrated. An error when it turned out to be another one.
    pub fn source(&self) -> Result<Rc<dyn Source>> {
        if let Some(refusal) = self.state.source_refusal() {
            return Err(refusal.clone());
        }
        let source = self.source.borrow().clone();
        source.ok_or_else(|| {
            Error::new(ErrorKind::SourceLost, format!("clone '{}' has let go of its source", self.state.name))
        })
    }

    /// Waits for what the source says. It counts as silent meanwhile; a request that was given up is no answer.
    pub(super) async fn answer_of_source<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let asked = self.state.source_wait().asked(self.env.now());
        let result = answer.await;
        let given_up = |error: &Error| matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::Shutdown);
        if !result.as_ref().is_err_and(given_up) {
            asked.answered(self.env.now());
        }
        result
    }

    /// Reads from the source, counted and timed.
    pub(super) async fn read_source(&self, range: ByteRange) -> Result<DmaBuf> {
        let counters = &self.counters;
        counters.source_read.request(range.len());
        let began = self.env.now();
        let result = match self.source() {
            Ok(source) => self.answer_of_source(source.read(range)).await,
            Err(error) => Err(error),
        };
        match &result {
            Ok(_) => {
                count(&counters.source_read_bytes, range.len());
                counters.source_read_latency.record_time(self.env.now().saturating_sub(began));
            }
            Err(_) => counters.source_read.error(),
        }
        result
    }

    /// Carries out a client's request, all of it inside one zone of this shard.
    pub async fn execute(self: Rc<Self>, request: Request) -> Result<Completion> {
        let slice = self.clone();
        let kind = kind_of(&request);
        self.counted(kind, async move |trip: &Trip| slice.perform(request, trip).await).await
    }

    /// Carries out a request of this kind by `perform`; counts and times it.
    async fn counted(
        self: Rc<Self>,
        kind: Option<(Kind, u64)>,
        perform: impl AsyncFnOnce(&Trip) -> Result<Completion>,
    ) -> Result<Completion> {
        if let Some((kind, bytes)) = kind {
            self.counters.request(kind, bytes);
        }
        let foreground = Foreground::new(self.clone());
        let result = perform(&foreground.trip).await;
        if result.is_ok() {
            foreground.served.set(kind.map(|(kind, _)| kind));
        }
        drop(foreground);
        if let Err(error) = &result {
            if let Some((kind, _)) = kind {
                self.counters.error(kind);
            }
            self.log_failure(error);
        }
        result
    }

    pub(super) fn log_failure(&self, error: &Error) {
        if let Some(line) = self.failures.borrow_mut().line(self.env.now(), error) {
            // Some errors name the clone themselves.
            let name = format!("clone '{}': ", self.state.name);
            log::warn!("{name}{}", line.strip_prefix(&name).unwrap_or(&line));
        }
    }

    async fn perform(self: &Rc<Self>, request: Request, trip: &Trip) -> Result<Completion> {
        self.state.check_mode(false)?;
        match request {
            Request::Read(range) => self.read(range, trip).await.map(Completion::Data),
            Request::Write { offset, data, flags } => {
                let Some(range) = ByteRange::new(offset, data.len() as u64) else { return Ok(Completion::Done) };
                self.change(range, Change::Data(data), flags, trip).await
            }
            Request::Trim { range, flags } => {
                let zero = if self.state.discard_passdown { ZeroFlags::UNMAP } else { ZeroFlags::empty() };
                self.change(range, Change::Trim(zero), flags, trip).await
            }
            Request::WriteZeroes { range, flags } => {
                let mut zero = ZeroFlags::empty();
                zero.set(ZeroFlags::UNMAP, !flags.contains(RequestFlags::NO_HOLE) && self.state.discard_passdown);
                zero.set(ZeroFlags::FAST_ONLY, flags.contains(RequestFlags::FAST_ZERO));
                self.change(range, Change::Zeroes(zero), flags, trip).await
            }
            Request::Cache(range) => self.cache(range, trip).await.map(|()| Completion::Done),
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

    /// The hydrated state of all of `regions` if it is the same, else `None`.
    pub(super) fn uniform(&self, regions: RegionRange) -> Option<bool> {
        let (hydrated, run) = self.map.borrow().run_from(regions.first(), regions.end());
        (run == regions).then_some(hydrated)
    }

    /// What it takes to access `range` of the destination: whole blocks, up to the end of the disk.
    pub(super) fn outer(&self, range: ByteRange) -> ByteRange {
        let info = self.destination.info();
        let outer = range.aligned_outward(u64::from(info.block));
        ByteRange::between(outer.start(), outer.end().min(info.size)).expect("the range is inside the disk")
    }

    /// The whole blocks in `range`; its last one counts when the disk ends there.
    fn inner(&self, range: ByteRange) -> Option<ByteRange> {
        let info = self.destination.info();
        let block = u64::from(info.block);
        let end = if range.end() == info.size { info.size } else { range.end() / block * block };
        ByteRange::between(range.start().next_multiple_of(block), end)
    }

    /// The data of these regions is in the destination: from now on they are served from there.
    pub(super) fn mark_hydrated(self: &Rc<Self>, regions: RegionRange, how: How) {
        if self.uniform(regions) == Some(true) {
            return;
        }
        // Before others can see the bits and rely on them: whoever flushes from then on finds this shard dirty, and is told
        // of the bits (once this has returned: it is this thread that is asked).
        self.state.set_dirty(self.me);
        if let Some(kept) = self.state.kept_bits() {
            kept.keep(regions);
        }
        let new = self.map.borrow_mut().set(regions);
        if self.sched.borrow().failed_regions() > 0 {
            self.sched.borrow_mut().hydrated(regions);
            self.state.bad_regions_hydrated(regions);
        }
        self.counters.hydrated(how, new);
        if self.state.add_hydrated(new) {
            // The last regions of the whole clone: a commit now completes it.
            let commit = self.mesh.call(COORDINATOR, ShardRequest::Commit { clone: self.id() });
            let slice = self.clone();
            self.commits_in_flight.set(self.commits_in_flight.get() + 1);
            self.env.spawn(Box::pin(async move {
                // A failure has degraded the mode and was reported there.
                let _ = commit.await;
                slice.commits_in_flight.set(slice.commits_in_flight.get() - 1);
            }));
        }
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
    /// Waits until nothing is in flight: neither copies nor client requests nor commits. For a clone that is stopping or
    /// held, so that nothing new begins; gives up when it is neither any more.
    pub async fn drain(&self) {
        self.wake.notify();
        let is_busy = || {
            self.copies.copies_in_flight() > 0
                || !self.locks.is_empty()
                || self.commits_in_flight.get() + self.direct_writes.get() > 0
        };
        // At the end nobody waits for an answer that begins nothing any more.
        let is_asking = || self.launching.get() && !self.state.is_stopping();
        while (is_busy() || is_asking()) && (self.state.is_stopping() || self.state.is_held()) {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }
}
