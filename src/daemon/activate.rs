//! From a prepared clone to one that runs: creates what is missing, formats the metadata, and gives every shard its
//! slice. The first change on disk is made here, after everything that can fail without one.

use super::block_node;
use super::prepare::{FoundMetadata, OpenSource, OpenSourceKind, Prepared, beside_clients, disk_parts};
use super::shard_source::SourceRecipe;
use crate::bail;
use crate::clone_state::{AUTOMATIC, CloneState, HydrationKnobs, KeepsBits};
use crate::config::CloneConfig;
use crate::coordinator::Coordinator;
use crate::devices::{self, Device, DeviceId, Role, Target};
use crate::disk::Disk;
use crate::disk::ring::{DiskParts, RingDisk};
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::CloneEvents;
use crate::events::EventKind;
use crate::human;
use crate::hydration_budget::BudgetMember;
use crate::io_frontend::request::LocalBoxFuture;
use crate::kept_bits::KeptBits;
use crate::meta::codec::{self, SourceFingerprint, Superblock, metadata_size_needed};
use crate::meta::commit::devices_to_record;
use crate::meta::region_map::RegionMap;
use crate::meta::store::Store;
use crate::ring::Ring;
use crate::shard::pool::ShardContext;
use crate::shard::slice::{CloneSlice, SliceParts};
use crate::shard::{Mesh, ShardRequest};
use crate::source::Source;
use crate::source::identity::SourceIdentity;
use crate::source::nbd::{NbdSource, SourceEvent};
use crate::units::{CloneId, Generation, Geometry, ShardIndex, ZoneIndex};
use futures_lite::future::yield_now;
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Zones that are loaded into a map before others get their turn: 480 KiB of bits.
const ZONES_AT_A_TIME: usize = 128;
/// A clone of so many zones (4 MiB of bits or more, as a rule) leaves memory behind that is worth giving back.
const ZONES_WORTH_A_TRIM: u64 = 1024;

/// So many bytes of metadata take a while to be formatted.
const METADATA_TO_TELL_OF: u64 = 256 << 20;

/// A clone that runs on all shards.
pub struct ActiveClone {
    pub state: Arc<CloneState>,
    pub coordinator: Rc<Coordinator>,
    /// The coordinator's connection to an NBD source, while it is needed.
    pub nbd_source: RefCell<Option<Weak<NbdSource>>>,
    /// How often it was lost and found; outlives it.
    pub source_counts: Rc<SourceCounts>,
    /// Destination and metadata: open, so that they stay locked.
    pub devices: RefCell<[Device; 2]>,
    /// A source that is a file or block device: its path, and what was there.
    pub source_place: RefCell<Option<(PathBuf, DeviceId)>>,
    pub source_check: RefCell<Option<Rc<SourceCheck>>>,
    /// The clone is being resized: one at a time.
    pub resizing: Cell<bool>,
    /// When it has a block device, or had one when a daemon before this one was killed.
    pub kept_bits: Option<Arc<KeptBits>>,
}

/// Whether the source is the one that the clone was made from.
pub struct SourceCheck {
    pub identity: Arc<SourceIdentity>,
    /// The metadata say what it is.
    pub recorded: Cell<bool>,
    /// So many regions were hydrated before the metadata did, by a daemon before this one.
    pub copied_before: Option<u64>,
}

/// How often an NBD source was lost, and found again.
#[derive(Default)]
pub struct SourceCounts {
    pub losses: Cell<u64>,
    pub reconnects: Cell<u64>,
}

/// Removes a file that was created, unless everything after it worked.
struct Created(Option<PathBuf>);

impl Created {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens a target for use: created or sized where that is to be done.
async fn open(role: Role, path: &Path, target: Target, size: u64) -> Result<(Device, Created)> {
    let path = path.to_owned();
    let opened = beside_clients(move || match target {
        Target::Missing { .. } => Ok((devices::create(role, &path, size)?, Created(Some(path)))),
        Target::Existing(mut device) => {
            if device.size == 0 {
                devices::set_size(&mut device, size)?;
            }
            Ok((device, Created(None)))
        }
    });
    opened.await
}

/// Says what of a known clone's devices was replaced; what was not known before is no news.
fn tell_recorded(config: &CloneConfig, before: &Superblock, source: SourceFingerprint, destination_id: [u8; 16]) {
    let is_replaced = before.destination_id != destination_id && before.destination_id != codec::DESTINATION_NONE_YET;
    let (name, metadata) = (&config.name, config.metadata.display());
    if is_replaced {
        let path = config.destination.display();
        log::warn!("clone '{name}': metadata {metadata} belong to destination {path} from now on; others are refused");
    }
    if before.source.is_known() && before.source != source {
        let source = &config.source;
        log::warn!("clone '{name}': metadata {metadata} belong to source {source} as it is now; others are refused");
    }
}

/// What a shard makes its slice from.
struct ShardParts {
    state: Arc<CloneState>,
    zones: Vec<(ZoneIndex, Arc<[u64]>)>,
    destination: DiskParts,
    /// `None` when everything is hydrated.
    source: Option<SourceRecipe>,
    /// Bits that a daemon before this one has not committed.
    kept_bits: Option<Arc<KeptBits>>,
}

/// What a clone has of its daemon.
pub struct Shared {
    pub events: Arc<CloneEvents>,
    /// Its part of the hydration bandwidth of all clones.
    pub budget: BudgetMember,
}

/// Starts the clone on all shards. Hydration is not started yet. After an error [`abandon`] clears up.
pub async fn activate(
    context: &Rc<ShardContext>,
    config: &CloneConfig,
    id: CloneId,
    prepared: Prepared,
    shared: Shared,
) -> Result<ActiveClone> {
    let Shared { events, budget } = shared;
    let Prepared { geometry, fingerprint, samples, source, destination, metadata, found } = prepared;
    let (destination, created_destination) =
        open(Role::Destination, &config.destination, destination, geometry.size()).await?;
    let metadata_size = metadata_size_needed(&geometry);
    let (metadata, created_metadata) = open(Role::Metadata, &config.metadata, metadata, metadata_size).await?;
    let mut source_was_known = true;
    let (store, zones, generation) = match found {
        FoundMetadata::Ours(opened) => {
            // What is wrong with a superblock copy was told when it was found.
            if let Some(told) = opened.store.mend().await.map_err(|error| error.within(metadata.label()))? {
                log::warn!("{}: {told}", metadata.label());
            }
            let (superblock, mut generation) = (opened.store.superblock(), opened.generation);
            source_was_known = superblock.source.is_known();
            // Before anything is served: with `--force` the clone is these devices' from now on, and the ones before are
            // refused. (What a crash leaves of it in one superblock copy counts.)
            if let Some((source, id)) = devices_to_record(&superblock, fingerprint, destination.fingerprint_id()) {
                generation = Generation(generation.0 + 1);
                let recorded = opened.store.record_devices(source, id, generation).await;
                recorded.map_err(|error| error.within(metadata.label()))?;
                tell_recorded(config, &superblock, source, id);
            }
            (opened.store, opened.zones, generation)
        }
        FoundMetadata::None => {
            let superblock = Superblock {
                uuid: *uuid::Uuid::new_v4().as_bytes(),
                geometry,
                source: fingerprint,
                destination_id: destination.fingerprint_id(),
                state: codec::CloneState::Active,
                generation: Generation(0),
                created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            };
            if metadata_size >= METADATA_TO_TELL_OF {
                log::info!("{}: formatting it, {} are written", metadata.label(), human::size(metadata_size));
            }
            let disk: Rc<dyn Disk> = Rc::new(RingDisk::new(disk_parts(&metadata)?));
            let store = Store::format(disk, superblock).await.map_err(|error| error.within(metadata.label()))?;
            (store, Vec::new(), Generation(0))
        }
    };

    let kept_bits = block_node::kept_bits(config, &store.superblock(), generation).await?;
    let shards = context.mesh.shards();
    let state = CloneState::new(
        id,
        events,
        geometry,
        shards,
        config.discard_passdown,
        HydrationKnobs {
            enabled: config.hydration,
            threshold: config.hydration_threshold.map_or(AUTOMATIC, u64::from),
            batch_size: config.hydration_batch_size.map_or(AUTOMATIC, u64::from),
        },
    );
    let state = state.with_budget(budget).with_hydration_failures_max(config.hydration_failures_max);
    let state = Arc::new(state.with_kept_bits(kept_bits.clone().map(|kept| kept as Arc<dyn KeepsBits>)));
    let complete = store.superblock().state == codec::CloneState::Complete;
    let source_counts = Rc::<SourceCounts>::default();
    // A user vouches for what can't be read now.
    let must_be = if config.force && samples.as_ref().is_some_and(|seen| !seen.is_complete()) {
        SourceFingerprint::UNKNOWN
    } else {
        fingerprint
    };
    let identity = samples.map(|samples| Arc::new(SourceIdentity::new(must_be, samples)));
    let watched = source.as_ref().zip(identity.as_ref());
    let nbd_source = watched.and_then(|(source, identity)| watch(context, source, identity, &state, &source_counts));
    let source_place = source.as_ref().and_then(OpenSource::place);
    let source = (!complete).then(|| (source, fingerprint.size.min(geometry.size())));
    let from_before = kept_bits.clone().filter(|_| !complete);
    attach_slices(context, &state, &geometry, zones, &destination, source, from_before).await?;
    // Nothing is in them yet, and nothing of the kind can fail any more.
    created_destination.keep();
    created_metadata.keep();
    let source_check = identity.map(|identity| {
        let copied_before = Some(state.hydrated()).filter(|hydrated| !source_was_known && *hydrated > 0);
        Rc::new(SourceCheck { identity, recorded: Cell::new(must_be.is_known()), copied_before })
    });
    if geometry.nr_zones() >= ZONES_WORTH_A_TRIM {
        // What was loaded is in the maps now; it is not to stay in the memory of the process as well.
        let _ = Ring::current().blocking(environment::give_back_memory).await;
    }
    let (hydrated, regions) = (state.hydrated(), geometry.nr_regions());
    state.events().raise(EventKind::Created, format!("created, {hydrated} of {regions} regions are hydrated"));
    if complete {
        if !state.is_all_hydrated() {
            let text =
                format!("{}: complete, but regions are missing; look with `hydrant meta check`", metadata.label());
            return Err(Error::new(ErrorKind::Damaged, text));
        }
        state.set_complete();
        for shard in 0..shards {
            context.mesh.call(ShardIndex(shard), ShardRequest::Release { clone: state.id }).await?;
        }
    }
    let disk: Rc<dyn Disk> = Rc::new(RingDisk::new(disk_parts(&destination)?));
    let coordinator =
        Coordinator::new(state.clone(), store, generation, disk, context.mesh.clone(), context.env.clone());
    context.shard.attach_coordinator(state.id, coordinator.clone());
    context.env.spawn(Box::pin(coordinator.clone().run()));
    if !complete && (state.is_all_hydrated() || kept_bits.is_some()) {
        // The daemon ended between the last commit and its last word; or there are bits that only a daemon before this one
        // knew of, which are to be durable before they count. When their data are not, this is where it is found out.
        coordinator.commit().await?;
    }
    if kept_bits.is_some() {
        coordinator.renew_generation().await?;
    }
    Ok(ActiveClone {
        state,
        coordinator,
        nbd_source: RefCell::new(nbd_source),
        source_counts,
        devices: RefCell::new([destination, metadata]),
        source_place: RefCell::new(source_place),
        source_check: RefCell::new(source_check),
        resizing: Cell::new(false),
        kept_bits,
    })
}

/// Lets go of everything that a clone has on any shard. What is in flight ends by itself.
pub async fn abandon(context: &Rc<ShardContext>, id: CloneId) {
    if let Ok(coordinator) = context.shard.coordinator(id) {
        coordinator.end();
    }
    for shard in 0..context.mesh.shards() {
        let detached = context
            .mesh
            .run_on(context, ShardIndex(shard), move |context| Box::pin(async move { context.shard.detach(id) }));
        detached.await;
    }
}

/// Turns what happens to an NBD source into events of the clone, and tells it what it must stay.
pub(super) fn watch(
    context: &Rc<ShardContext>,
    source: &OpenSource,
    identity: &Arc<SourceIdentity>,
    state: &Arc<CloneState>,
    counts: &Rc<SourceCounts>,
) -> Option<Weak<NbdSource>> {
    let OpenSourceKind::Nbd { source, .. } = &source.kind else { return None };
    source.expect(identity.clone());
    let (state, mesh, env, counts) = (state.clone(), context.mesh.clone(), context.env.clone(), counts.clone());
    source.on_event(move |event| match event {
        SourceEvent::Lost(error) => {
            counts.losses.set(counts.losses.get() + 1);
            state.source_lost(error, env.now());
        }
        SourceEvent::Changed(error) => {
            state.refuse_source(error.clone());
            state.source_changed(error, env.now());
        }
        SourceEvent::Found => {
            counts.reconnects.set(counts.reconnects.get() + 1);
            state.source_found(env.now());
            for shard in 0..mesh.shards() {
                let wake = mesh.call(ShardIndex(shard), ShardRequest::Wake { clone: state.id });
                env.spawn(Box::pin(async move {
                    // Fails only when the clone is on its way out.
                    let _ = wake.await;
                }));
            }
        }
    });
    Some(Rc::downgrade(source))
}

/// `source`: what there is, and how many bytes of it are seen; `None` for a complete clone. `kept_bits`: what is hydrated
/// beside the zones' bits.
async fn attach_slices(
    context: &Rc<ShardContext>,
    state: &Arc<CloneState>,
    geometry: &Geometry,
    zones: Vec<(ZoneIndex, Arc<[u64]>)>,
    destination: &Device,
    source: Option<(Option<OpenSource>, u64)>,
    kept_bits: Option<Arc<KeptBits>>,
) -> Result<()> {
    let shards = context.mesh.shards();
    let mut zones_of: Vec<Vec<_>> = (0..shards).map(|_| Vec::new()).collect();
    for (zone, bits) in zones {
        zones_of[usize::from(geometry.owner_of(zone, shards).0)].push((zone, bits));
    }
    let destination = disk_parts(destination)?;
    let mut attached: Vec<LocalBoxFuture<'static, Option<Result<()>>>> = Vec::new();
    for (shard, zones) in (0..shards).map(ShardIndex).zip(zones_of) {
        let recipe = match &source {
            None => None,
            Some((source, shown)) => Some(SourceRecipe::new(source.as_ref(), *shown, geometry.size())?),
        };
        let (state, destination) = (state.clone(), destination.duplicate()?);
        let parts = ShardParts { state, zones, destination, source: recipe, kept_bits: kept_bits.clone() };
        if shard == context.mesh.me() {
            let local = source.as_ref().and_then(|(source, _)| source.as_ref()).map(|source| source.source.clone());
            attach(context, parts, local).await?;
        } else {
            attached.push(
                context
                    .mesh
                    .run_on(context, shard, |context| Box::pin(async move { attach(&context, parts, None).await })),
            );
        }
    }
    for result in attached {
        match result.await {
            Some(result) => result?,
            None => bail!(Environment, "a shard has ended"),
        }
    }
    Ok(())
}

/// On its own shard: makes the slice and starts its hydration task. `source`: it is open here already.
async fn attach(context: &Rc<ShardContext>, parts: ShardParts, source: Option<Rc<dyn Source>>) -> Result<()> {
    let ShardParts { state, zones, destination, source: recipe, kept_bits } = parts;
    let mesh: Rc<dyn Mesh> = context.mesh.clone();
    let source = match recipe {
        Some(recipe) => Some(recipe.open(context, state.id, source).await?),
        None => None,
    };
    let geometry = state.geometry();
    let mut map = RegionMap::new(geometry, state.hydrated_bits(geometry), mesh.shards(), mesh.me());
    for (nr, (zone, bits)) in zones.into_iter().enumerate() {
        map.load_zone(zone, &bits);
        if nr % ZONES_AT_A_TIME == ZONES_AT_A_TIME - 1 {
            // The other clones of this shard get their turn.
            yield_now().await;
        }
    }
    if let Some(kept) = kept_bits {
        let added = add_kept(&mut map, &kept, mesh.shards(), mesh.me()).await;
        if added > 0 {
            log::info!("clone '{}': {added} regions were hydrated and not committed when it was killed", state.name);
            state.set_dirty(mesh.me());
        }
    }
    state.add_hydrated(map.hydrated_count());
    let destination = Rc::new(RingDisk::new(destination));
    let copies = context.shard.copy_pool().join(state.clone());
    let env = context.env.clone();
    let slice = CloneSlice::new(SliceParts { state, map, destination, source, env, mesh, copies });
    context.shard.attach(slice);
    Ok(())
}

/// Adds the bits that a daemon before this one kept; how many the metadata do not have. They are to be committed.
async fn add_kept(map: &mut RegionMap, kept: &KeptBits, shards: u16, me: ShardIndex) -> u64 {
    let (geometry, mut added) = (*map.geometry(), 0);
    for (nr, zone) in (u64::from(me.0)..geometry.nr_zones()).step_by(shards.into()).enumerate() {
        for run in kept.runs(geometry.zone_regions(ZoneIndex(zone))) {
            added += map.set(run);
        }
        if nr % ZONES_AT_A_TIME == ZONES_AT_A_TIME - 1 {
            yield_now().await;
        }
    }
    added
}
