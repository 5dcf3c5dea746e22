//! The coordinator of a clone: turns flushes into commits.
//!
//! A commit is, in this order: (1) every shard hands over the bits whose data writes have completed; (2) the
//! destination is flushed; (3) the dirty metadata blocks are written, built from that snapshot; (4) the metadata
//! are flushed; (5) whoever waited is told. Data that a bit stands for was written before (1), so it is durable
//! after (2) and its bit is written only then: law 1. Whoever is told in (5) had its data acknowledged before (1),
//! so its bits are in the snapshot: law 2.
//!
//! Flushes that come while a commit runs share the next one. Without a flush there is a commit every second. After
//! a failed flush or metadata write nothing is retried: the clone turns read-only.

mod exchange;
mod grow;
mod suspend;

use crate::clone_state::{CloneState, Mode};
use crate::disk::Disk;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::{Notify, Permit, Semaphore, join_all, oneshot};
use crate::meta::codec;
use crate::meta::region_map::ZoneSnapshot;
use crate::meta::store::Store;
use crate::metrics::record::Recorder;
use crate::metrics::schema::{CloneMetrics, CommitMetrics};
use crate::shard::{Mesh, ShardReply, ShardRequest};
use crate::units::{Generation, ShardIndex, ZoneIndex};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub use exchange::ExchangeParts;
pub use grow::GrowParts;
use suspend::Doing;
pub use suspend::SUSPEND_TIME_MAX;

/// Without a flush, metadata is committed this often (as dm-clone does).
pub const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// What commits have cost so far.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct CommitStats {
    /// Who asked: flushes and FUA writes of clients, among others.
    pub requests: u64,
    pub commits: u64,
    pub failures: u64,
    /// Commits that found no new bits and only flushed the destination.
    pub flushes_only: u64,
    pub blocks_written: u64,
}

/// What commits and their steps took.
struct CommitTimes {
    request: Recorder,
    commit: Recorder,
    snapshot: Recorder,
    destination_flush: Recorder,
    metadata_write: Recorder,
    metadata_flush: Recorder,
    requests_per_commit: Recorder,
}

impl Default for CommitTimes {
    fn default() -> Self {
        let latency = Recorder::of_latency;
        Self {
            request: latency(),
            commit: latency(),
            snapshot: latency(),
            destination_flush: latency(),
            metadata_write: latency(),
            metadata_flush: latency(),
            requests_per_commit: Recorder::of_size(),
        }
    }
}

impl CommitTimes {
    fn memory_bytes(&self) -> u64 {
        let Self { request, commit, snapshot, destination_flush, metadata_write, metadata_flush, requests_per_commit } =
            self;
        let all = [request, commit, snapshot, destination_flush, metadata_write, metadata_flush, requests_per_commit];
        all.map(Recorder::memory_bytes).iter().sum()
    }
}

/// Commits the metadata of one clone; lives on shard 0.
pub struct Coordinator {
    state: Arc<CloneState>,
    /// Replaced when the clone grows, and so is the destination.
    store: RefCell<Rc<Store>>,
    destination: RefCell<Rc<dyn Disk>>,
    mesh: Rc<dyn Mesh>,
    env: Rc<dyn Env>,
    waiting: RefCell<Vec<oneshot::Sender<Result<()>>>>,
    wake: Notify,
    ending: Cell<bool>,
    ended: Cell<bool>,
    generation: Cell<Generation>,
    stats: Cell<CommitStats>,
    /// Suspending, resuming and growing: one at a time. Stopping takes it and keeps it.
    turn: Rc<Semaphore>,
    last_turn: RefCell<Option<Permit>>,
    doing: Cell<Option<Doing>>,
    /// The suspend that is on its way is to be given up.
    given_up: Cell<bool>,
    /// Whoever writes metadata: commits, growth.
    writing: Rc<Semaphore>,
    times: CommitTimes,
}

impl Coordinator {
    /// `generation` is that of the newest block or superblock that was found.
    pub fn new(
        state: Arc<CloneState>,
        store: Store,
        generation: Generation,
        destination: Rc<dyn Disk>,
        mesh: Rc<dyn Mesh>,
        env: Rc<dyn Env>,
    ) -> Rc<Self> {
        Rc::new(Self {
            state,
            store: RefCell::new(Rc::new(store)),
            destination: RefCell::new(destination),
            mesh,
            env,
            waiting: RefCell::default(),
            wake: Notify::default(),
            ending: Cell::new(false),
            ended: Cell::new(false),
            generation: Cell::new(generation),
            stats: Cell::default(),
            turn: Semaphore::new(1),
            last_turn: RefCell::default(),
            doing: Cell::new(None),
            given_up: Cell::new(false),
            writing: Semaphore::new(1),
            times: CommitTimes::default(),
        })
    }

    pub fn stats(&self) -> CommitStats {
        self.stats.get()
    }
    /// The clone's part of the metrics document.
    pub fn metrics(&self) -> CloneMetrics {
        let (state, stats, times) = (&self.state, self.stats.get(), &self.times);
        CloneMetrics {
            name: state.name.clone(),
            size_bytes: state.geometry().size(),
            region_size_bytes: state.geometry().region_size().bytes(),
            regions: state.geometry().nr_regions(),
            hydrated_regions: state.hydrated(),
            hydrating_regions: state.hydrating(),
            commits: CommitMetrics {
                requests: stats.requests,
                waiting: self.waiting.borrow().len() as u64,
                commits: stats.commits,
                failures: stats.failures,
                flushes_only: stats.flushes_only,
                blocks_written: stats.blocks_written,
                generation: self.generation.get().0,
                request_latency_us: times.request.snapshot(),
                latency_us: times.commit.snapshot(),
                snapshot_us: times.snapshot.snapshot(),
                destination_flush_us: times.destination_flush.snapshot(),
                metadata_write_us: times.metadata_write.snapshot(),
                metadata_flush_us: times.metadata_flush.snapshot(),
                requests_per_commit: times.requests_per_commit.snapshot(),
            },
        }
    }

    /// What its histograms take.
    pub fn histogram_bytes(&self) -> u64 {
        self.times.memory_bytes()
    }

    pub fn generation(&self) -> Generation {
        self.generation.get()
    }
    pub fn state(&self) -> &Arc<CloneState> {
        &self.state
    }

    /// Returns when everything that was acknowledged before this call is durable.
    pub async fn commit(&self) -> Result<()> {
        let gone = || Error::new(ErrorKind::Shutdown, format!("clone '{}' is stopping", self.state.name));
        if self.ended.get() {
            return Err(gone());
        }
        let mut stats = self.stats.get();
        stats.requests += 1;
        self.stats.set(stats);
        let (sender, receiver) = oneshot();
        self.waiting.borrow_mut().push(sender);
        self.wake.notify();
        let began = self.env.now();
        let result = receiver.await.unwrap_or_else(|| Err(gone()));
        if result.is_ok() {
            self.lap(&self.times.request, began);
        }
        result
    }

    /// Serves commits until [`Self::end`]. One task.
    pub async fn run(self: Rc<Self>) {
        let ticker = Rc::downgrade(&self);
        let env = self.env.clone();
        self.env.spawn_background(Box::pin(async move {
            loop {
                env.sleep(COMMIT_INTERVAL).await;
                let Some(coordinator) = ticker.upgrade() else { return };
                if coordinator.ending.get() {
                    return;
                }
                coordinator.state.tell_overdue(env.now());
                if coordinator.state.is_dirty() {
                    coordinator.wake.notify();
                }
            }
        }));
        loop {
            self.wake.notified().await;
            let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
            if waiting.is_empty() {
                if self.ending.get() {
                    self.ended.set(true);
                    return;
                }
                // The wake of somebody whom the commit before this one has served already.
                if !self.state.is_dirty() {
                    continue;
                }
            }
            let began = self.env.now();
            let result = self.commit_once(began).await;
            match &result {
                Ok(()) => {
                    self.lap(&self.times.commit, began);
                    self.times.requests_per_commit.record(waiting.len() as u64);
                }
                Err(_) => {
                    let mut stats = self.stats.get();
                    stats.failures += 1;
                    self.stats.set(stats);
                }
            }
            for sender in waiting {
                sender.send(result.clone());
            }
        }
    }

    /// Ends [`Self::run`] once nobody waits; later commits fail.
    pub fn end(&self) {
        self.ending.set(true);
        self.wake.notify();
    }

    /// Records the time since `began`; returns the time now.
    fn lap(&self, recorder: &Recorder, began: Duration) -> Duration {
        let now = self.env.now();
        recorder.record_time(now.saturating_sub(began));
        now
    }

    async fn commit_once(&self, began: Duration) -> Result<()> {
        let _writing = self.writing.acquire(1).await;
        self.state.check_mode(true)?;
        let (store, destination) = (self.store.borrow().clone(), self.destination.borrow().clone());
        let all_hydrated = self.state.is_all_hydrated();
        let dirty: Vec<ShardIndex> =
            (0..self.mesh.shards()).map(ShardIndex).filter(|shard| self.state.take_dirty(*shard)).collect();
        let mut snapshots: Vec<(ShardIndex, Vec<ZoneSnapshot>)> = Vec::new();
        let clone = self.state.id;
        let calls = dirty.iter().map(|shard| self.mesh.call(*shard, ShardRequest::Snapshot { clone })).collect();
        for (shard, reply) in dirty.iter().zip(join_all(calls).await) {
            // What this shard's dirty flag stood for is lost to later commits: none may succeed.
            match reply.map_err(|error| self.degrade(error))? {
                ShardReply::Zones(zones) => snapshots.push((*shard, zones)),
                other => unreachable!("zones answer a snapshot, not {other:?}"),
            }
        }
        let snapshotted = self.lap(&self.times.snapshot, began);
        if let Err(error) = destination.flush().await {
            return Err(self.degrade(error));
        }
        let flushed = self.lap(&self.times.destination_flush, snapshotted);
        let committed: Vec<(ShardIndex, Vec<ZoneIndex>)> =
            snapshots.iter().map(|(shard, zones)| (*shard, zones.iter().map(|s| s.zone).collect())).collect();
        let zones: Vec<ZoneSnapshot> = snapshots.into_iter().flat_map(|(_, zones)| zones).collect();
        let flush_only = zones.is_empty();
        let blocks_written = zones.len() as u64;
        if !flush_only {
            let generation = Generation(self.generation.get().0 + 1);
            let written = async {
                store.write_zones(&zones, generation).await?;
                let written = self.lap(&self.times.metadata_write, flushed);
                store.flush().await?;
                self.lap(&self.times.metadata_flush, written);
                Ok(())
            };
            if let Err(error) = written.await {
                return Err(self.degrade(error));
            }
            self.has_generation(generation);
            let calls: Vec<LocalBoxFuture<'_, _>> = committed
                .into_iter()
                .map(|(shard, zones)| self.mesh.call(shard, ShardRequest::Committed { clone, zones }))
                .collect();
            for reply in join_all(calls).await {
                reply.map_err(|error| self.degrade(error))?;
            }
        }
        let mut stats = self.stats.get();
        stats.commits += 1;
        stats.flushes_only += u64::from(flush_only);
        stats.blocks_written += blocks_written;
        self.stats.set(stats);
        if all_hydrated && !self.state.is_complete() {
            self.complete(&store).await?;
        }
        Ok(())
    }

    /// Everything is hydrated and durable: says so in the superblock and lets go of maps and source.
    async fn complete(&self, store: &Store) -> Result<()> {
        let generation = Generation(self.generation.get().0 + 1);
        if let Err(error) = store.write_superblock(codec::CloneState::Complete, generation).await {
            return Err(self.degrade(error));
        }
        self.has_generation(generation);
        // At once, and before the source is let go: its loss is no news any more.
        self.state.events().raise(EventKind::HydrationCompleted, "hydration completed");
        self.state.set_complete();
        let clone = self.state.id;
        let calls = (0..self.mesh.shards())
            .map(|shard| self.mesh.call(ShardIndex(shard), ShardRequest::Release { clone }))
            .collect();
        for reply in join_all(calls).await {
            reply?;
        }
        Ok(())
    }

    /// The metadata have this generation, durably.
    fn has_generation(&self, generation: Generation) {
        self.generation.set(generation);
        if let Some(kept) = self.state.kept_bits() {
            kept.committed(generation);
        }
    }

    /// Gives the metadata a new generation, and nothing else: what is kept beside them from now on is not of what they were
    /// before.
    pub async fn renew_generation(&self) -> Result<()> {
        let _writing = self.writing.acquire(1).await;
        self.state.check_mode(true)?;
        let store = self.store.borrow().clone();
        let generation = Generation(self.generation.get().0 + 1);
        let renewed = store.write_superblock(store.superblock().state, generation).await;
        renewed.map_err(|error| self.degrade(error))?;
        self.has_generation(generation);
        Ok(())
    }

    /// Records, durably, what the source is, unless the metadata say that already or are not written any more.
    pub async fn record_source(&self, source: codec::SourceFingerprint) -> Result<()> {
        let _writing = self.writing.acquire(1).await;
        let store = self.store.borrow().clone();
        let before = store.superblock();
        if self.state.is_stopping() || self.state.is_complete() || before.source == source {
            return Ok(());
        }
        self.state.check_mode(true)?;
        let generation = Generation(self.generation.get().0 + 1);
        let recorded = store.record_devices(source, before.destination_id, generation).await;
        recorded.map_err(|error| self.degrade(error))?;
        self.has_generation(generation);
        Ok(())
    }

    fn degrade(&self, error: Error) -> Error {
        let gone = matches!(error.os_errno(), Some(libc::ENODEV | libc::ENXIO | libc::ENOMEDIUM));
        self.state.degrade(if gone { Mode::Failed } else { Mode::ReadOnly }, &error);
        error
    }
}
