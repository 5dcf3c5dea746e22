//! What all shards of a clone share: its identity, its knobs, its mode and its totals.
//!
//! Only small atomics, and the events: data and bits belong to the shards. Nothing here is on the path of a hydrated
//! read or write but one load of the mode.

mod health;
mod source_wait;

use crate::error::{Error, ErrorKind, Result};
use crate::event_log::CloneEvents;
use crate::events::EventKind;
use crate::hydration_budget::BudgetMember;
use crate::hydration_failures::FAILURES_MAX_DEFAULT;
use crate::meta::hydrated_bits::{HydratedBits, SharedBits};
use crate::shard::direct_writes::DirectWrites;
use crate::units::{CloneId, Generation, Geometry, RegionRange, ShardIndex};
use health::Health;
pub use health::{CopyFailure, FailureReport, LastFailure};
use source_wait::SourceWait;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// dm-clone's metadata mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mode {
    /// `rw`.
    ReadWrite = 0,
    /// `ro`: a commit has failed. Hydrated regions can still be read and written; what would need new metadata,
    /// and every flush, fails.
    ReadOnly = 1,
    /// `Fail`: no I/O is permitted.
    Failed = 2,
}

impl Mode {
    /// The word of dm-clone's status line.
    pub const fn word(self) -> &'static str {
        match self {
            Mode::ReadWrite => "rw",
            Mode::ReadOnly => "ro",
            Mode::Failed => "Fail",
        }
    }
}

/// A setting that the clone is to find by itself.
pub const AUTOMATIC: u64 = u64::MAX;

/// The settings of hydration, as the user gave them.
#[derive(Clone, Copy, Debug)]
pub struct HydrationKnobs {
    pub enabled: bool,
    /// Regions being copied at a time, all shards together; 0 stops hydration (as in dm-clone), or [`AUTOMATIC`].
    pub threshold: u64,
    /// Adjacent regions copied as one; 0 means 1 (as in dm-clone), or [`AUTOMATIC`].
    pub batch_size: u64,
}

/// Keeps hydrated bits beyond the end of the process; see [`crate::kept_bits`].
pub trait KeepsBits: Send + Sync {
    /// The data of these regions is in the destination.
    fn keep(&self, regions: RegionRange);
    /// The metadata have this generation, durably.
    fn committed(&self, generation: Generation);
    /// A commit has failed: what was kept is worth nothing.
    fn spoil(&self);
}

/// The state that the shards of one clone share.
pub struct CloneState {
    pub id: CloneId,
    pub name: String,
    geometry: Geometry,
    /// In bytes; the rest of the geometry never changes.
    size: AtomicU64,
    pub discard_passdown: bool,
    mode: AtomicU8,
    hydrated: AtomicU64,
    hydrating: AtomicU64,
    enabled: AtomicBool,
    threshold: AtomicU64,
    batch_size: AtomicU64,
    /// So many failures in a row stop hydration; 0 is none.
    failures_max: AtomicU32,
    /// They did: no background copy begins.
    hydration_stopped: AtomicBool,
    /// Background copies have failed since the last one succeeded: spares the lock.
    is_failing: AtomicBool,
    complete: AtomicBool,
    stopping: AtomicBool,
    held: AtomicBool,
    suspended: AtomicBool,
    /// Per shard: bits were set since its last snapshot.
    dirty: Box<[AtomicBool]>,
    foreground_in_flight: AtomicU64,
    flush_errors: AtomicU64,
    /// Environment time of the last client request's end, in microseconds.
    foreground_last_us: AtomicU64,
    events: Arc<CloneEvents>,
    health: Mutex<Health>,
    /// The background copy is under way as far as the events go: spares the lock.
    hydration_told: AtomicBool,
    budget: BudgetMember,
    /// The source turned out to be another one.
    source_refusal: OnceLock<Error>,
    /// Of a clone whose block device may outlive this process.
    kept_bits: Option<Arc<dyn KeepsBits>>,
    source_wait: SourceWait,
    bits: SharedBits,
    direct_writes: Arc<DirectWrites>,
}

impl CloneState {
    /// Its name is that of its `events`.
    pub fn new(
        id: CloneId,
        events: Arc<CloneEvents>,
        geometry: Geometry,
        shards: u16,
        discard_passdown: bool,
        knobs: HydrationKnobs,
    ) -> Self {
        Self {
            id,
            name: events.name().to_owned(),
            geometry,
            size: AtomicU64::new(geometry.size()),
            discard_passdown,
            mode: AtomicU8::new(Mode::ReadWrite as u8),
            hydrated: AtomicU64::new(0),
            hydrating: AtomicU64::new(0),
            enabled: AtomicBool::new(knobs.enabled),
            threshold: AtomicU64::new(knobs.threshold),
            batch_size: AtomicU64::new(knobs.batch_size),
            failures_max: AtomicU32::new(FAILURES_MAX_DEFAULT),
            hydration_stopped: AtomicBool::new(false),
            is_failing: AtomicBool::new(false),
            complete: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            held: AtomicBool::new(false),
            suspended: AtomicBool::new(false),
            dirty: (0..shards).map(|_| AtomicBool::new(false)).collect(),
            foreground_in_flight: AtomicU64::new(0),
            flush_errors: AtomicU64::new(0),
            foreground_last_us: AtomicU64::new(0),
            events,
            health: Mutex::default(),
            hydration_told: AtomicBool::new(false),
            budget: BudgetMember::alone(),
            source_refusal: OnceLock::new(),
            kept_bits: None,
            source_wait: SourceWait::default(),
            bits: SharedBits::default(),
            direct_writes: Arc::default(),
        }
    }

    /// As it is now: only the size changes, only to a larger one, and only while the clone is held.
    pub fn geometry(&self) -> Geometry {
        self.geometry.with_size(self.size.load(Acquire)).expect("only the size of a geometry is ever set")
    }

    /// The clone has grown. `new_regions`: it has regions that it did not have, none of them hydrated. Only while it is
    /// held: nobody looks at the size and the count of regions together then.
    pub fn set_grown(&self, geometry: Geometry, new_regions: bool) {
        assert!(geometry.size() >= self.geometry().size() && self.is_held(), "a clone grows while it is held");
        self.size.store(geometry.size(), Release);
        if new_regions {
            if self.complete.swap(false, AcqRel) {
                self.hydration_begins_anew();
            }
            self.events.set_incomplete();
        }
    }

    /// Shares its hydration bandwidth with the other clones of the budget, from the start to the end of this state.
    pub fn with_budget(self, budget: BudgetMember) -> Self {
        Self { budget, ..self }
    }

    /// Stops hydration after so many failures in a row; 0 never does. [`FAILURES_MAX_DEFAULT`] when nothing is said.
    pub fn with_hydration_failures_max(self, failures: u32) -> Self {
        Self { failures_max: AtomicU32::new(failures), ..self }
    }

    /// Keeps every hydrated bit from now on.
    pub fn with_kept_bits(self, kept_bits: Option<Arc<dyn KeepsBits>>) -> Self {
        Self { kept_bits, ..self }
    }

    /// To be told of regions before anybody can rely on them.
    pub fn kept_bits(&self) -> Option<&dyn KeepsBits> {
        self.kept_bits.as_deref()
    }

    /// Its part of the hydration bandwidth: priority and rates.
    pub fn budget(&self) -> &BudgetMember {
        &self.budget
    }

    pub fn mode(&self) -> Mode {
        match self.mode.load(Acquire) {
            0 => Mode::ReadWrite,
            1 => Mode::ReadOnly,
            _ => Mode::Failed,
        }
    }

    /// Leaves `rw`, for good: only a restart comes back. Says so by an event. Modes only get worse.
    pub fn degrade(&self, to: Mode, why: &Error) {
        if let Some(kept) = &self.kept_bits {
            kept.spoil();
        }
        if self.mode.fetch_max(to as u8, AcqRel) < to as u8 {
            log::error!("clone '{}': metadata mode is now {}: {why}", self.name, to.word());
            let kind = if to == Mode::Failed { EventKind::Failed } else { EventKind::ReadOnly };
            // Under the lock: what is told of the hydration is told before this, or not at all.
            let mut health = self.health();
            health.mode_reason = Some(why.to_string());
            self.events.record(kind, format!("metadata mode {}: {why}", to.word()));
        }
    }

    /// Why the mode is not `rw`, in words.
    pub fn mode_reason(&self) -> Option<String> {
        self.health().mode_reason.clone()
    }

    /// Refuses what may not be done in the present mode. `needs_metadata`: it would set new bits, or promises
    /// that earlier ones are durable.
    pub fn check_mode(&self, needs_metadata: bool) -> Result<()> {
        match self.mode() {
            Mode::Failed => Err(Error::new(ErrorKind::Failed, format!("clone '{}' has failed", self.name))),
            Mode::ReadOnly if needs_metadata => {
                Err(Error::new(ErrorKind::ReadOnly, format!("clone '{}': its metadata is read-only", self.name)))
            }
            _ => Ok(()),
        }
    }

    pub fn hydrated(&self) -> u64 {
        self.hydrated.load(Acquire)
    }
    /// Counts newly hydrated regions; true when they were the last ones.
    pub fn add_hydrated(&self, regions: u64) -> bool {
        regions > 0 && self.hydrated.fetch_add(regions, AcqRel) + regions == self.geometry().nr_regions()
    }
    pub fn is_all_hydrated(&self) -> bool {
        self.hydrated() == self.geometry().nr_regions()
    }

    pub fn hydrating(&self) -> u64 {
        self.hydrating.load(Relaxed)
    }
    pub fn add_hydrating(&self, regions: u64) {
        self.hydrating.fetch_add(regions, Relaxed);
    }
    pub fn sub_hydrating(&self, regions: u64) {
        self.hydrating.fetch_sub(regions, Relaxed);
    }
    /// Counts `regions` as being copied, unless that would exceed `threshold`.
    pub fn try_add_hydrating(&self, regions: u64, threshold: u64) -> bool {
        self.hydrating
            .fetch_update(AcqRel, Acquire, |now| (now + regions <= threshold).then_some(now + regions))
            .is_ok()
    }

    pub fn knobs(&self) -> HydrationKnobs {
        HydrationKnobs {
            enabled: self.enabled.load(Acquire),
            threshold: self.threshold.load(Acquire),
            batch_size: self.batch_size.load(Acquire),
        }
    }
    /// `now` is the environment's time.
    pub fn set_hydration_enabled(&self, enabled: bool, now: Duration) {
        self.enabled.store(enabled, Release);
        if enabled {
            self.hydration_goes_on(now);
        } else {
            self.hydration_paused("disable_hydration", now);
        }
    }
    /// `now` is the environment's time.
    pub fn set_hydration_threshold(&self, regions: u64, now: Duration) {
        self.threshold.store(regions, Release);
        if regions == 0 {
            self.hydration_paused("hydration_threshold 0", now);
        }
    }
    /// In force for the next failure. One that has stopped already is not started by it.
    pub fn set_hydration_failures_max(&self, failures: u32) {
        self.failures_max.store(failures, Release);
    }
    pub fn hydration_failures_max(&self) -> u32 {
        self.failures_max.load(Acquire)
    }
    /// Stopped after failures, until [`Self::set_hydration_enabled`].
    pub fn is_hydration_stopped(&self) -> bool {
        self.hydration_stopped.load(Acquire)
    }
    /// Whether copies may be started in the background at all.
    pub fn may_hydrate(&self) -> bool {
        let knobs = self.knobs();
        let goes_on = !self.is_stopping() && !self.is_held() && !self.is_hydration_stopped();
        knobs.enabled && knobs.threshold > 0 && self.mode() == Mode::ReadWrite && goes_on
    }
    pub fn set_hydration_batch_size(&self, regions: u64) {
        self.batch_size.store(regions, Release);
    }

    /// Everything is hydrated and that is durable: source and maps were let go. Over when the clone grows.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Acquire)
    }
    pub fn set_complete(&self) {
        self.complete.store(true, Release);
        // Clients may have overwritten what could not be copied.
        self.hydration_stopped.store(false, Release);
        self.events.set_complete();
    }
    /// Nothing more is read from the source, on no shard, until the clone is started again; and why.
    pub fn refuse_source(&self, why: Error) {
        let _ = self.source_refusal.set(why);
    }
    pub fn source_refusal(&self) -> Option<&Error> {
        self.source_refusal.get()
    }
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Acquire)
    }
    pub fn set_stopping(&self) {
        self.stopping.store(true, Release);
        self.events.set_ending();
    }

    /// Client requests are held and no hydration begins: the clone is suspended, or on its way there, or grows. What was in
    /// flight may not have ended yet.
    pub fn is_held(&self) -> bool {
        self.held.load(Acquire)
    }
    pub fn set_held(&self, held: bool) {
        self.held.store(held, Release);
    }

    /// Suspended until it is resumed: held, nothing in flight, what was acknowledged is committed.
    pub fn is_suspended(&self) -> bool {
        self.suspended.load(Acquire)
    }
    pub fn set_suspended(&self, suspended: bool) {
        self.suspended.store(suspended, Release);
    }

    pub fn set_dirty(&self, shard: ShardIndex) {
        self.dirty[usize::from(shard.0)].store(true, Release);
    }
    pub fn take_dirty(&self, shard: ShardIndex) -> bool {
        self.dirty[usize::from(shard.0)].swap(false, AcqRel)
    }
    pub fn is_dirty(&self) -> bool {
        self.dirty.iter().any(|dirty| dirty.load(Acquire))
    }
    pub fn shards(&self) -> u16 {
        self.dirty.len() as u16
    }

    pub fn foreground_begins(&self) {
        self.foreground_in_flight.fetch_add(1, Relaxed);
    }
    pub fn foreground_ends(&self, now: Duration) {
        self.foreground_last_us.store(now.as_micros() as u64, Relaxed);
        self.foreground_in_flight.fetch_sub(1, Relaxed);
    }
    /// Flushes of clients that failed, and commits of FUA writes that concern several slices. What fails in a slice is
    /// counted there.
    pub fn flush_errors(&self) -> u64 {
        self.flush_errors.load(Relaxed)
    }
    pub fn flush_failed(&self) {
        self.flush_errors.fetch_add(1, Relaxed);
    }
    /// Parts of client requests that slices are carrying out now, of all shards.
    pub fn foreground_in_flight(&self) -> u64 {
        self.foreground_in_flight.load(Acquire)
    }
    /// Whether clients are at work, or were within the last `window`.
    pub fn is_foreground_active(&self, now: Duration, window: Duration) -> bool {
        let last = self.foreground_last_us.load(Relaxed);
        self.foreground_in_flight.load(Relaxed) > 0
            || (last > 0 && now.saturating_sub(Duration::from_micros(last)) < window)
    }

    /// What waits for the source.
    pub fn source_wait(&self) -> &SourceWait {
        &self.source_wait
    }

    /// The bits that the maps of all shards share, with room for the regions of `geometry`.
    pub fn hydrated_bits(&self, geometry: Geometry) -> Arc<HydratedBits> {
        self.bits.get(geometry)
    }

    /// Who writes hydrated bytes past their owner.
    pub fn direct_writes(&self) -> &Arc<DirectWrites> {
        &self.direct_writes
    }

    /// The clone's events, to raise one and to ask how many there were.
    pub fn events(&self) -> &Arc<CloneEvents> {
        &self.events
    }
}
