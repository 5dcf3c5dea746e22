//! A whole clone in simulation, put together as the daemon does it.

use super::disk::SimDisk;
use super::executor::Sim;
use super::mesh::{Net, SimMesh};
use super::source::SimSource;
use crate::clone_state::{AUTOMATIC, CloneState, HydrationKnobs, KeepsBits, Mode};
use crate::coordinator::{Coordinator, GrowParts, SUSPEND_TIME_MAX};
use crate::disk::Disk;
use crate::env::Env;
use crate::error::Result;
use crate::event_log::{CloneEvents, EventLog};
use crate::events::EventKind::*;
use crate::hydration_budget::BudgetMember;
use crate::io_frontend::request::{Completion, LocalBoxFuture, Request, RequestFlags, StatusExtents, Volume};
use crate::meta::codec::{self, SourceFingerprint, Superblock, metadata_size_needed};
use crate::meta::growth::{self, Wanted};
use crate::meta::region_map::RegionMap;
use crate::meta::store::Store;
use crate::shard::dispatch::Dispatcher;
use crate::shard::slice::{CloneSlice, SliceParts, SliceStats};
use crate::shard::{COORDINATOR, Mesh, ShardRequest};
use crate::source::Source;
use crate::source::padded::PaddedSource;
use crate::source::remote::RemoteSource;
use crate::units::{ByteRange, CloneId, Generation, Geometry, RegionIndex, RegionRange, RegionSize, ShardIndex};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the destination holds before the clone: no read may ever show it.
pub const OLD_DESTINATION: u8 = 0xee;

/// What a clone is made with.
#[derive(Clone, Debug)]
pub struct Setup {
    pub size: u64,
    pub region_size: u64,
    pub regions_per_zone: u64,
    pub shards: u16,
    pub block: u32,
    /// By how many bytes the destination is larger than the clone.
    pub excess: u64,
    pub discard_passdown: bool,
    pub hydration: bool,
    pub threshold: u64,
    pub batch_size: u64,
    /// Only shard 0 has the source.
    pub remote_source: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 64 << 10,
            region_size: 4096,
            regions_per_zone: 64,
            shards: 1,
            block: 512,
            excess: 0,
            discard_passdown: true,
            hydration: false,
            threshold: AUTOMATIC,
            batch_size: AUTOMATIC,
            remote_source: false,
        }
    }
}

impl Setup {
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.size, RegionSize::new(self.region_size).unwrap(), self.regions_per_zone).unwrap()
    }
}

/// What keeps bits in the simulation; see [`crate::kept_bits`].
#[derive(Default)]
pub struct SimKept {
    regions: Mutex<BTreeSet<u64>>,
    spoiled: AtomicBool,
    generation: AtomicU64,
}

impl SimKept {
    pub fn is_spoiled(&self) -> bool {
        self.spoiled.load(Acquire)
    }
    pub fn count(&self) -> usize {
        self.regions.lock().unwrap().len()
    }
}

impl KeepsBits for SimKept {
    fn keep(&self, regions: RegionRange) {
        self.regions.lock().unwrap().extend(regions.indices());
    }
    fn committed(&self, generation: Generation) {
        assert!(self.generation.fetch_max(generation.0, AcqRel) <= generation.0, "generations go up");
    }
    fn spoil(&self) {
        self.spoiled.store(true, Release);
    }
}

/// What survives a clone's end.
#[derive(Clone)]
pub struct Devices {
    pub source: Rc<SimSource>,
    pub destination: Rc<SimDisk>,
    pub metadata: Rc<SimDisk>,
    /// Of a clone with a block device: survives a kill, not a power cut.
    pub kept: Option<Arc<SimKept>>,
}

impl Devices {
    pub fn new(sim: &Sim, setup: &Setup, content: Vec<u8>) -> Self {
        assert_eq!(content.len() as u64, setup.size);
        let old = vec![OLD_DESTINATION; (setup.size + setup.excess) as usize];
        let metadata = vec![0; metadata_size_needed(&setup.geometry()) as usize];
        Self {
            source: SimSource::new(sim, content),
            destination: SimDisk::new(sim, "destination", old, setup.block),
            metadata: SimDisk::new(sim, "metadata", metadata, 512),
            kept: None,
        }
    }

    /// The power fails, and is back.
    pub fn crash(&self, sim: &Sim) -> Self {
        sim.kill_all();
        sim.say(|| "CRASH".into());
        let kept = self.kept.as_ref().map(|_| Arc::default());
        let (destination, metadata) = (self.destination.crashed(), self.metadata.crashed());
        Self { source: self.source.clone(), destination, metadata, kept }
    }
}

impl Devices {
    /// The daemon is killed, and the power stays: what is in the caches is there for the next one.
    pub fn kill(&self, sim: &Sim) -> Self {
        sim.kill_all();
        sim.say(|| "KILL".into());
        let (destination, metadata) = (self.destination.after_kill(), self.metadata.after_kill());
        Self { source: self.source.clone(), destination, metadata, kept: self.kept.clone() }
    }
}

/// What shard `me` reads from: so many bytes of the source, then zeros.
fn source_of(
    id: CloneId,
    me: ShardIndex,
    setup: &Setup,
    devices: &Devices,
    mesh: &Rc<SimMesh>,
    shown: u64,
    size: u64,
) -> Rc<dyn Source> {
    match me == COORDINATOR || !setup.remote_source {
        true if shown == 0 => PaddedSource::zeros(size),
        true => PaddedSource::view(devices.source.open(), shown, size),
        false => Rc::new(RemoteSource::new(id, COORDINATOR, size, mesh.clone())),
    }
}

/// A running clone.
pub struct SimClone {
    pub sim: Sim,
    pub setup: Setup,
    pub devices: Devices,
    pub state: Arc<CloneState>,
    pub log: Arc<EventLog>,
    pub net: Rc<Net>,
    pub meshes: Vec<Rc<SimMesh>>,
    pub dispatchers: Vec<Rc<Dispatcher>>,
    pub coordinator: Rc<Coordinator>,
    size_at_start: u64,
}

impl SimClone {
    /// A machine with one clone.
    pub async fn start(sim: &Sim, setup: &Setup, devices: &Devices) -> Result<Rc<Self>> {
        Self::start_on(&Net::new(sim, setup.shards), CloneId(0), sim, setup, devices, BudgetMember::alone()).await
    }

    /// One of several clones of a machine, which has as many shards as `setup` says. Formats the metadata, or goes on
    /// from what they hold.
    pub async fn start_on(
        net: &Rc<Net>,
        id: CloneId,
        sim: &Sim,
        setup: &Setup,
        devices: &Devices,
        budget: BudgetMember,
    ) -> Result<Rc<Self>> {
        let net = net.clone();
        // Opening does that, before anything is read.
        devices.destination.drop_clean_pages();
        devices.metadata.drop_clean_pages();
        let metadata: Rc<dyn Disk> = devices.metadata.clone();
        let (store, zones, generation) = match Store::open(metadata.clone()).await? {
            Some(opened) => {
                if opened.copy_stale {
                    opened.store.mend().await?;
                }
                (opened.store, opened.zones, opened.generation)
            }
            None => {
                let geometry = setup.geometry();
                let superblock = Superblock {
                    uuid: [7; 16],
                    geometry,
                    source: SourceFingerprint { size: geometry.size(), samples: 1, digest: [0; 16] },
                    destination_id: [0; 16],
                    state: codec::CloneState::Active,
                    generation: Generation(0),
                    created_unix_s: 0,
                };
                (Store::format(metadata, superblock).await?, Vec::new(), Generation(0))
            }
        };
        let Superblock { geometry, source: fingerprint, .. } = store.superblock();
        let knobs =
            HydrationKnobs { enabled: setup.hydration, threshold: setup.threshold, batch_size: setup.batch_size };
        let log = EventLog::new("sim", Box::new(|| {}));
        let events = CloneEvents::new(&log, format!("sim{id}"));
        let state = CloneState::new(id, events, geometry, setup.shards, setup.discard_passdown, knobs);
        let kept = devices.kept.clone();
        let state = state.with_budget(budget).with_kept_bits(kept.clone().map(|kept| kept as Arc<dyn KeepsBits>));
        let state = Arc::new(state);
        let complete = store.superblock().state == codec::CloneState::Complete;
        let env: Rc<dyn Env> = Rc::new(sim.clone());
        let mut maps: Vec<RegionMap> = (0..setup.shards)
            .map(|shard| RegionMap::new(geometry, state.hydrated_bits(geometry), setup.shards, ShardIndex(shard)))
            .collect();
        for (zone, bits) in zones {
            maps[usize::from(geometry.owner_of(zone, setup.shards).0)].load_zone(zone, &bits);
        }
        for region in kept.iter().flat_map(|kept| kept.regions.lock().unwrap().clone()) {
            let owner = geometry.owner_of(geometry.zone_of(RegionIndex(region)), setup.shards);
            maps[usize::from(owner.0)].set(RegionRange::single(RegionIndex(region)));
            state.set_dirty(owner);
        }
        let mut meshes = Vec::new();
        let mut dispatchers = Vec::new();
        for (me, map) in (0..setup.shards).map(ShardIndex).zip(maps) {
            let mesh = SimMesh::new(&net, me);
            let source = source_of(id, me, setup, devices, &mesh, fingerprint.size, geometry.size());
            state.add_hydrated(map.hydrated_count());
            let slice = CloneSlice::new(SliceParts {
                state: state.clone(),
                map,
                destination: devices.destination.clone(),
                source: Some(source),
                env: env.clone(),
                mesh: mesh.clone(),
                copies: net.shard(me).copy_pool().join(state.clone()),
            });
            net.shard(me).attach(slice);
            dispatchers.push(Dispatcher::new(state.clone(), state.name.clone(), net.shard(me).clone(), mesh.clone()));
            meshes.push(mesh);
        }
        if complete {
            assert!(state.is_all_hydrated(), "complete, but regions are missing");
            state.set_complete();
            for shard in 0..setup.shards {
                meshes[0].call(ShardIndex(shard), ShardRequest::Release { clone: id }).await?;
            }
        }
        let coordinator = Coordinator::new(
            state.clone(),
            store,
            generation,
            devices.destination.clone(),
            meshes[0].clone(),
            env.clone(),
        );
        net.shard(COORDINATOR).attach_coordinator(id, coordinator.clone());
        sim.spawn(coordinator.clone().run());
        if !complete && (state.is_all_hydrated() || kept.is_some()) {
            coordinator.commit().await?;
        }
        for shard in 0..setup.shards {
            sim.spawn(net.shard(ShardIndex(shard)).slice(id)?.hydrate());
        }
        let (sim, setup, devices) = (sim.clone(), setup.clone(), devices.clone());
        Ok(Rc::new(Self {
            sim,
            setup,
            devices,
            state,
            log,
            net,
            meshes,
            dispatchers,
            coordinator,
            size_at_start: geometry.size(),
        }))
    }

    pub fn geometry(&self) -> Geometry {
        self.state.geometry()
    }

    /// As the daemon grows a clone; what a file gains is zeros, `fill` what a device gains. True when it has grown.
    pub async fn grow(self: &Rc<Self>, wanted: Wanted, fill: u8) -> Result<bool> {
        let source_size = wanted.needs_source().then(|| self.devices.source.size());
        let superblock = self.coordinator.superblock();
        let Some(growth) = growth::plan(&superblock, wanted, source_size)? else { return Ok(false) };
        let geometry = growth.geometry;
        let destination = self.devices.destination.grown(geometry.size(), fill);
        let metadata = self.devices.metadata.grown(metadata_size_needed(&geometry), fill);
        let (clone, staged) = (self.clone(), destination.clone());
        let stage = move |shard: ShardIndex| -> LocalBoxFuture<'static, Result<()>> {
            let (clone, destination) = (clone.clone(), staged.clone());
            Box::pin(async move {
                clone.sim.sleep(Duration::from_micros(clone.sim.draw(|rng| rng.below(500)))).await;
                let mesh = &clone.meshes[usize::from(shard.0)];
                let source = source_of(
                    clone.state.id,
                    shard,
                    &clone.setup,
                    &clone.devices,
                    mesh,
                    growth.source_len,
                    geometry.size(),
                );
                clone.net.shard(shard).stage(clone.state.id, geometry, destination, source)
            })
        };
        let parts = GrowParts {
            from_size: superblock.geometry.size(),
            geometry,
            source: match growth.source_len {
                0 => SourceFingerprint::NONE,
                size => SourceFingerprint { size, samples: 1, digest: [0; 16] },
            },
            metadata,
            destination,
            stage: Box::new(stage),
        };
        self.coordinator.grow(parts).await.map(|()| true)
    }

    pub fn slice(&self, shard: u16) -> Rc<CloneSlice> {
        self.net.shard(ShardIndex(shard)).slice(self.state.id).unwrap()
    }

    pub fn stats(&self) -> SliceStats {
        let mut sum = SliceStats::default();
        (0..self.net.shards()).for_each(|shard| sum += self.slice(shard).stats());
        sum
    }

    /// Hands a request to the frontend of one shard.
    pub async fn submit(&self, via: usize, request: Request) -> Result<Completion> {
        self.dispatchers[via % self.dispatchers.len()].clone().submit(request).await
    }

    pub async fn read(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        self.read_via(0, ByteRange::new(start, len).unwrap()).await
    }
    pub async fn read_via(&self, via: usize, range: ByteRange) -> Result<Vec<u8>> {
        match self.submit(via, Request::Read(range)).await? {
            Completion::Data(pieces) => Ok(pieces.concat()),
            other => panic!("{other:?} answers a read"),
        }
    }
    pub async fn write_via(&self, via: usize, offset: u64, data: &[u8]) -> Result<()> {
        let (data, flags) = (Bytes::copy_from_slice(data), RequestFlags::empty());
        self.submit(via, Request::Write { offset, data, flags }).await.map(drop)
    }
    pub async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_flags(offset, data, RequestFlags::empty()).await
    }
    pub async fn write_flags(&self, offset: u64, data: &[u8], flags: RequestFlags) -> Result<()> {
        let data = Bytes::copy_from_slice(data);
        self.submit(0, Request::Write { offset, data, flags }).await.map(|_| ())
    }
    pub async fn trim(&self, start: u64, len: u64) -> Result<()> {
        let range = ByteRange::new(start, len).unwrap();
        self.submit(0, Request::Trim { range, flags: RequestFlags::empty() }).await.map(|_| ())
    }
    pub async fn write_zeroes(&self, start: u64, len: u64, flags: RequestFlags) -> Result<()> {
        let range = ByteRange::new(start, len).unwrap();
        self.submit(0, Request::WriteZeroes { range, flags }).await.map(|_| ())
    }
    pub async fn flush(&self) -> Result<()> {
        self.submit(0, Request::Flush).await.map(|_| ())
    }
    pub async fn cache(&self, start: u64, len: u64) -> Result<()> {
        self.submit(0, Request::Cache(ByteRange::new(start, len).unwrap())).await.map(|_| ())
    }
    pub async fn status(&self, start: u64, len: u64) -> Result<StatusExtents> {
        match self.submit(0, Request::Status(ByteRange::new(start, len).unwrap())).await? {
            Completion::Status(extents) => Ok(extents),
            other => panic!("{other:?} answers a status request"),
        }
    }

    /// The events so far.
    pub fn event_kinds(&self) -> Vec<&'static str> {
        self.log.after(0, None).events.iter().map(|event| event.kind.name()).collect()
    }

    /// What must hold of the events at any time: each transition is told once, what ends is not told of any more, and dm's
    /// number counts dm's.
    pub fn check_events(&self) {
        let events = self.log.after(0, None).events;
        let of_dm = events.iter().filter(|event| event.kind.is_dm()).count() as u64;
        let counts = self.state.events().count();
        assert_eq!((counts.all, counts.dm), (events.len() as u64, of_dm));
        let mut hydration = None;
        for (at, event) in events.iter().enumerate() {
            let before = &events[..at];
            match event.kind {
                HydrationStarted | HydrationPaused | HydrationFailed | HydrationStopped => {
                    // It is told again how many regions are bad when they get more or less.
                    let last = before.iter().rfind(|other| other.kind == HydrationFailed);
                    let news = event.kind == HydrationFailed && last.is_none_or(|last| last.text != event.text);
                    let summary = news || event.text.contains("in quick succession");
                    assert!(hydration != Some(event.kind) || summary, "told twice: {events:#?}");
                    let first = hydration.is_none() && event.kind != HydrationStarted;
                    assert!(!first || summary, "nothing had begun: {events:#?}");
                    let of_this_size = before.rsplit(|event| event.kind == Resized).next().unwrap_or_default();
                    let over = of_this_size.iter().any(|event| event.kind.is_dm() && event.kind != HydrationStopped);
                    assert!(!over, "it can't hydrate any more: {events:#?}");
                    hydration = Some(event.kind);
                }
                Suspended | Resumed => {
                    let last = before.iter().rfind(|event| matches!(event.kind, Suspended | Resumed));
                    let last = last.map_or(Resumed, |event| event.kind);
                    assert_ne!(last, event.kind, "told twice: {events:#?}");
                }
                Resized | BadRegionsHealed => {}
                HydrationCompleted => {
                    hydration = None;
                    let of_this_size = before.rsplit(|event| event.kind == Resized).next().unwrap_or_default();
                    assert!(
                        of_this_size.iter().all(|event| event.kind != HydrationCompleted),
                        "told twice: {events:#?}"
                    );
                }
                kind => assert!(before.iter().all(|event| event.kind != kind), "told twice: {events:#?}"),
            }
        }
        let completed = events.iter().any(|event| event.kind == HydrationCompleted);
        match events.iter().any(|event| event.kind == Resized) {
            // A growth is there a moment before it is told.
            false if self.geometry().size() != self.size_at_start => assert!(completed || !self.state.is_complete()),
            false => assert_eq!(self.state.is_complete(), completed),
            // What it has grown by may be hydrated yet, or not.
            true => assert!(completed || !self.state.is_complete()),
        }
        assert_eq!(self.state.mode() != Mode::ReadWrite, events.iter().any(|e| matches!(e.kind, ReadOnly | Failed)));
    }

    /// As the control interface does after a change of settings.
    pub fn wake(&self) {
        for shard in 0..self.net.shards() {
            let wake = self.meshes[0].call(ShardIndex(shard), ShardRequest::Wake { clone: self.state.id });
            self.sim.spawn(async move { _ = wake.await });
        }
    }
    pub fn enable_hydration(&self, enabled: bool) {
        self.state.set_hydration_enabled(enabled, self.sim.now());
        self.wake();
    }

    /// Waits until everything is hydrated and that is durable.
    pub async fn completed(&self) {
        while !self.state.is_complete() {
            self.sim.sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    pub async fn suspend(&self) -> Result<()> {
        self.coordinator.suspend(SUSPEND_TIME_MAX).await
    }
    pub async fn resume(&self) -> Result<()> {
        self.coordinator.resume().await
    }
    /// Requests that are held, on all shards.
    pub fn waiting(&self) -> u64 {
        (0..self.net.shards()).map(|shard| self.net.shard(ShardIndex(shard)).gate(self.state.id).waiting()).sum()
    }

    /// As the daemon ends: drain, commit, detach.
    pub async fn stop(&self) -> Result<()> {
        self.coordinator.begin_stop().await;
        for shard in 0..self.net.shards() {
            self.meshes[0].call(ShardIndex(shard), ShardRequest::Drain { clone: self.state.id }).await?;
        }
        let committed = self.coordinator.commit().await;
        self.coordinator.end();
        (0..self.net.shards()).for_each(|shard| self.net.shard(ShardIndex(shard)).detach(self.state.id));
        committed
    }
}
