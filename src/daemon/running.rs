//! A clone that runs: from what was prepared to its orderly end, and what it tells about itself.

use super::activate::{self, ActiveClone, Shared};
use super::block_node::BlockNode;
use super::device_watch::Watched;
use super::listeners::{Exported, Listeners};
use super::mapped_node::MappedNode;
use super::prepare::Prepared;
use super::rate::Rate;
use crate::clone_state::{AUTOMATIC, Mode};
use crate::config::CloneConfig;
use crate::control::api::{
    CloneRunState, CopyFailureStatus, FailedRange, Features, HydrationState, HydrationStatus, IoCounters, Message,
    MetadataMode, MetadataStatus, NbdStatus, SOURCE_STALLED_SECONDS, SourceState, SourceStatus, Status, UblkStatus,
};
use crate::dm_table;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::meta::codec;
use crate::shard::dispatch::Dispatcher;
use crate::shard::hydrator::automatic_batch_regions;
use crate::shard::pool::ShardContext;
use crate::shard::slice::SliceStats;
use crate::shard::{Mesh, ShardReply, ShardRequest};
use crate::source::uri::SourceSpec;
use crate::units::{CloneId, RegionRange, SECTOR_SIZE, ShardIndex};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The part of the time for the end that copies get in any case, however long clients took.
const DRAIN_MIN: Duration = Duration::from_secs(1);
/// Between two looks whether what is in flight has ended.
const DRAIN_POLL: Duration = Duration::from_millis(2);

/// A clone that is served. On shard 0.
pub struct RunningClone {
    pub config: CloneConfig,
    pub clone: ActiveClone,
    pub exported: Exported,
    pub block_node: RefCell<Option<Rc<BlockNode>>>,
    /// The device is left to the next daemon.
    pub leaves_node: Cell<bool>,
    /// What stands on the device shows the destination now.
    pub handed_over: Cell<bool>,
    /// When it may be handed over by itself; `None` while that is being tried.
    pub finish_next: Cell<Option<Duration>>,
    /// The destination is open with the kernel's claim.
    pub claims_destination: Cell<bool>,
    pub rate: RefCell<Rate>,
    pub started: Instant,
    /// When every region was hydrated, as far as was noticed.
    pub complete_since: Cell<Option<Instant>>,
    pub watched: Watched,
}

impl RunningClone {
    /// Starts a clone that was prepared: the first change on disk is in here. After an error nothing of it runs.
    pub async fn start(
        context: &Rc<ShardContext>,
        listeners: &Listeners,
        id: CloneId,
        config: CloneConfig,
        prepared: Prepared,
        shared: Shared,
    ) -> Result<Rc<Self>> {
        let export = config.nbd.export.clone();
        let listener = listeners.acquire(&config.nbd.address, &export)?;
        let clone = match activate::activate(context, &config, id, prepared, shared).await {
            Ok(clone) => clone,
            Err(error) => {
                activate::abandon(context, id).await;
                listeners.release(context, &listener, &export).await;
                return Err(error);
            }
        };
        let exported = Exported::new(listener, export, id);
        let running = Rc::new(Self {
            config,
            clone,
            exported,
            block_node: RefCell::default(),
            leaves_node: Cell::new(false),
            handed_over: Cell::new(false),
            finish_next: Cell::new(Some(Duration::ZERO)),
            claims_destination: Cell::new(true),
            rate: RefCell::default(),
            started: Instant::now(),
            complete_since: Cell::new(None),
            watched: Watched::default(),
        });
        running.watch_source(context);
        let served = async {
            running.serve(context).await?;
            running.make_block_node(context).await
        };
        if let Err(error) = served.await {
            // What it says of its end is less than why.
            let _ = running.end(context, listeners, context.env.now()).await;
            return Err(error);
        }
        Ok(running)
    }

    /// Offers the clone on every shard and starts hydration there.
    async fn serve(&self, context: &Rc<ShardContext>) -> Result<()> {
        for shard in 0..context.mesh.shards() {
            let (state, handle) = (self.clone.state.clone(), self.exported.handle());
            let name = self.exported.name.to_string();
            let started = context.mesh.run_on(context, ShardIndex(shard), move |context| {
                Box::pin(async move {
                    let slice = context.shard.slice(state.id)?;
                    handle.offer(Dispatcher::new(state, name, context.shard.clone(), context.mesh.clone()));
                    context.env.spawn_background(Box::pin(slice.hydrate()));
                    Ok::<(), Error>(())
                })
            });
            started.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Environment, "a shard has ended")))?;
        }
        self.exported.listener.start(context);
        Ok(())
    }

    /// The block device, when there is to be one.
    async fn make_block_node(&self, context: &Rc<ShardContext>) -> Result<()> {
        let Some(config) = &self.config.ublk else { return Ok(()) };
        let uuid = self.clone.coordinator.superblock().uuid;
        let destination = self.clone.devices.borrow()[0].try_clone()?;
        let node = BlockNode::start(context, &self.clone.state, &uuid, config, &destination).await?;
        let node = Rc::new(node);
        *self.block_node.borrow_mut() = Some(node.clone());
        let Some(name) = config.dm_name.clone() else { return Ok(()) };
        match MappedNode::start(name, &uuid, node.path(), node.sectors()).await {
            Ok(mapped) => {
                node.set_mapped(Some(mapped));
                Ok(())
            }
            Err(error) => {
                // It may be in use by what a daemon before this one has made.
                self.leaves_node.set(node.used_by_now().await.is_some());
                Err(error)
            }
        }
    }

    fn node_warning(&self) -> Option<String> {
        self.node()?.size_warning(self.clone.state.geometry().size())
    }

    pub fn node(&self) -> Option<Rc<BlockNode>> {
        self.block_node.borrow().clone()
    }

    /// Before the end of the daemon, and again when nothing starts any more: a block device that is in use is left to the next one.
    pub async fn begin_end(&self, context: &Rc<ShardContext>) {
        if !self.leaves_node.get()
            && let Some(node) = self.node()
            && let Some(user) = node.used_by_now().await
        {
            let (name, path) = (&self.config.name, node.user_path());
            log::warn!(
                "clone '{name}': {} is {user}: it is left, and waits for the next daemon of the clone",
                path.display()
            );
            self.leaves_node.set(true);
            node.begin_to_leave(context).await;
        }
        self.clone.coordinator.begin_stop().await;
    }

    async fn end_block_node(&self, context: &Rc<ShardContext>, deadline: Duration) {
        let Some(node) = self.block_node.take() else { return };
        if self.leaves_node.get() {
            return node.leave(context, deadline).await;
        }
        if let Err(error) = node.remove(context).await {
            log::warn!("{error}");
            self.leaves_node.set(true);
        }
    }

    /// Ends it: clients, then copies in flight, get until `deadline`; one last commit. Nothing of it runs after that,
    /// whatever is returned: the error is that of the commit, or tells of files that were deleted.
    pub async fn end(&self, context: &Rc<ShardContext>, listeners: &Listeners, deadline: Duration) -> Result<()> {
        let state = &self.clone.state;
        self.clone.coordinator.begin_stop().await;
        // Who waits for its events is told at once, however long clients take.
        state.events().set_ending();
        self.end_block_node(context, deadline).await;
        if !self.exported.end(context, deadline).await {
            log::warn!("clone '{}': {} connections did not drain", state.name, self.exported.connections());
        }
        let drained = Rc::new(Cell::new(0));
        for shard in 0..context.mesh.shards() {
            let drain = context.mesh.call(ShardIndex(shard), ShardRequest::Drain { clone: state.id });
            let drained = drained.clone();
            context.env.spawn(Box::pin(async move {
                if let Err(error) = drain.await {
                    log::debug!("drain: {error}");
                }
                drained.set(drained.get() + 1);
            }));
        }
        // However long clients took: what only needs a moment gets it.
        let deadline = deadline.max(context.env.now() + DRAIN_MIN);
        while drained.get() < context.mesh.shards() && context.env.now() < deadline {
            context.env.sleep(DRAIN_POLL).await;
        }
        let committed = self.clone.coordinator.commit().await;
        let may_forget = self.config.ublk.is_some() && !self.leaves_node.get();
        let (hydrated, regions) = (state.hydrated(), state.geometry().nr_regions());
        match &committed {
            Ok(()) => {
                // Who takes the device over looks for them, although all is committed.
                if let Some(kept) = self.clone.kept_bits.as_ref().filter(|_| may_forget) {
                    kept.remove();
                }
                let text = format!("stopped, {hydrated} of {regions} regions hydrated");
                state.events().raise(EventKind::Stopped, text);
            }
            Err(error) => {
                log::error!("clone '{}': stopped without its last commit", state.name);
                state.events().record(EventKind::Stopped, format!("stopped without its last commit: {error}"));
            }
        }
        let kept = self.look_for_the_last_time(context).await;
        activate::abandon(context, state.id).await;
        listeners.release(context, &self.exported.listener, &self.exported.name).await;
        committed.map_err(|error| error.within("its last commit failed")).and(kept)
    }

    /// The counters of all shards together.
    async fn stats(&self, context: &Rc<ShardContext>) -> Result<SliceStats> {
        let mut total = SliceStats::default();
        for shard in 0..context.mesh.shards() {
            let request = ShardRequest::Stats { clone: self.clone.state.id };
            match context.mesh.call(ShardIndex(shard), request).await? {
                ShardReply::Stats(stats) => total += *stats,
                other => unreachable!("stats answer a question for them, not {other:?}"),
            }
        }
        Ok(total)
    }

    pub async fn status(&self, context: &Rc<ShardContext>) -> Result<Status> {
        let stats = self.stats(context).await?;
        let (state, config) = (&self.clone.state, &self.config);
        let geometry = &state.geometry();
        let source = self.source(context.env.now());
        // Before what they tell of: who has seen an event's number has seen what it says, or more.
        let events = state.events().count();
        let hydration_state = self.hydration_state(&stats, source.state);
        let commits = self.clone.coordinator.stats();
        // Before anything is borrowed: it waits.
        let ublk = match self.node() {
            Some(node) => Some(UblkStatus {
                path: node.path().display().to_string(),
                number: node.number,
                size: node.sectors() * SECTOR_SIZE,
                dm_path: node.mapped().map(|mapped| mapped.path().display().to_string()),
                used_by: node.used_by(context).await,
            }),
            None => None,
        };
        Ok(Status {
            name: state.name.clone(),
            state: CloneRunState::Running,
            error: None,
            retry_in_seconds: None,
            warnings: self.warnings().into_iter().chain(self.node_warning()).collect(),
            size: geometry.size(),
            region_size: geometry.region_size().bytes(),
            nr_regions: geometry.nr_regions(),
            hydrated_regions: state.hydrated(),
            hydrating_regions: state.hydrating(),
            suspended: state.is_suspended(),
            suspending: self.clone.coordinator.is_suspending(),
            resizing: self.clone.resizing.get(),
            hydration: self.hydration(context, hydration_state),
            features: Features {
                // In force again with the same message.
                no_hydration: !state.knobs().enabled || hydration_state == HydrationState::Stopped,
                no_discard_passdown: !state.discard_passdown,
            },
            metadata: MetadataStatus {
                path: config.metadata.display().to_string(),
                mode: match state.mode() {
                    Mode::ReadWrite => MetadataMode::ReadWrite,
                    Mode::ReadOnly => MetadataMode::ReadOnly,
                    Mode::Failed => MetadataMode::Fail,
                },
                error: state.mode_reason(),
                block_size: codec::BLOCK_SIZE as u32,
                used_blocks: codec::SUPERBLOCK_COPIES + geometry.nr_zones(),
                total_blocks: self.clone.devices.borrow()[1].size / codec::BLOCK_SIZE as u64,
                generation: self.clone.coordinator.generation().0,
            },
            event_nr: events.dm,
            events: events.all,
            last_event: events.last.map(|event| event.text),
            source,
            destination: config.destination.display().to_string(),
            nbd: NbdStatus {
                address: self.exported.listener.address.to_string(),
                export: self.exported.name.to_string(),
                connections: u32::try_from(self.exported.connections()).unwrap_or(u32::MAX),
            },
            ublk,
            io: IoCounters {
                reads: stats.reads,
                writes: stats.writes,
                trims: stats.trims,
                write_zeroes: stats.write_zeroes,
                flushes: commits.requests,
                read_bytes: stats.read_bytes,
                write_bytes: stats.write_bytes,
                trim_bytes: stats.trim_bytes,
                write_zeroes_bytes: stats.write_zeroes_bytes,
                errors: stats.errors + state.flush_errors(),
                source_read_bytes: stats.source_read_bytes,
                hydrated_bytes: stats.hydrated_bytes,
                commits: commits.commits,
            },
            shards: u32::from(context.mesh.shards()),
            uptime_seconds: self.started.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
        })
    }

    /// dm-clone's table line: as it was given, or what it would be.
    pub fn table(&self) -> String {
        let config = &self.config;
        if let Some(table) = &config.table {
            return table.grown_to(self.clone.state.geometry().size()).to_string();
        }
        // Of use wherever it is read.
        let absolute = |path: &Path| match std::path::absolute(path) {
            Ok(path) => path.display().to_string(),
            Err(_) => path.display().to_string(),
        };
        let source = match config.source.parse() {
            Ok(SourceSpec::File(path)) => absolute(&path),
            _ => config.source.clone(),
        };
        let geometry = &self.clone.state.geometry();
        let line = dm_table::Line {
            size: geometry.size(),
            metadata: &absolute(&config.metadata),
            destination: &absolute(&config.destination),
            source: &source,
            region_size: geometry.region_size(),
            no_hydration: !config.hydration,
            no_discard_passdown: !config.discard_passdown,
            hydration_threshold: config.hydration_threshold,
            hydration_batch_size: config.hydration_batch_size,
        };
        line.to_string()
    }

    fn hydration_state(&self, stats: &SliceStats, source: SourceState) -> HydrationState {
        let state = &self.clone.state;
        let knobs = state.knobs();
        if state.is_complete() {
            HydrationState::Complete
        } else if !knobs.enabled || knobs.threshold == 0 || state.is_held() {
            HydrationState::Paused
        } else if state.is_hydration_stopped() {
            HydrationState::Stopped
        } else if source == SourceState::Lost {
            HydrationState::SourceLost
        } else if source == SourceState::Changed {
            HydrationState::SourceChanged
        } else if stats.hydration_paused > 0 || state.mode() != Mode::ReadWrite {
            HydrationState::Failing
        } else if state.hydrating() > 0 || self.rate.borrow().bytes_per_second() > 0 {
            // Between two batches too, when a rate spaces them.
            HydrationState::Running
        } else if stats.failed_regions > 0 {
            HydrationState::Failing
        } else {
            HydrationState::Idle
        }
    }

    fn hydration(&self, context: &ShardContext, now: HydrationState) -> HydrationStatus {
        let state = &self.clone.state;
        let (geometry, knobs) = (&state.geometry(), state.knobs());
        let automatic_batch = automatic_batch_regions(geometry);
        let batch = if knobs.batch_size == AUTOMATIC { automatic_batch } else { knobs.batch_size.max(1) };
        let automatic_threshold = automatic_batch * u64::from(context.mesh.shards()) * 16;
        let threshold = if knobs.threshold == AUTOMATIC { automatic_threshold } else { knobs.threshold };
        let set = |value: u64| u32::try_from(value).ok();
        let running = matches!(now, HydrationState::Running | HydrationState::Idle);
        let bytes_per_second = if running { self.rate.borrow().bytes_per_second() } else { 0 };
        let failures = state.failure_report();
        let failed_range = |run: &RegionRange| {
            let bytes = geometry.bytes_of(*run);
            FailedRange {
                first_region: run.first().0,
                regions: run.count(),
                offset: bytes.start(),
                length: bytes.len(),
            }
        };
        let listed: u64 = failures.bad_runs.iter().map(|run| run.count()).sum();
        let left = (geometry.nr_regions() - state.hydrated()) * geometry.region_size().bytes();
        HydrationStatus {
            enabled: knobs.enabled,
            threshold: set(knobs.threshold),
            batch_size: set(knobs.batch_size),
            threshold_effective: u32::try_from(threshold).unwrap_or(u32::MAX),
            batch_size_effective: u32::try_from(batch.min(threshold.max(1))).unwrap_or(u32::MAX),
            state: now,
            failures_max: state.hydration_failures_max(),
            failures_in_a_row: failures.in_a_row,
            failed_regions: failures.bad_regions,
            failed_ranges: failures.bad_runs.iter().map(failed_range).collect(),
            failed_regions_more: failures.bad_regions - listed,
            last_failure: failures.last.map(|last| CopyFailureStatus { error: last.text, errno: last.errno }),
            rate: state.budget().rate(),
            total_rate: state.budget().total_rate(),
            priority: u32::try_from(state.budget().weight()).unwrap_or(u32::MAX),
            bytes_per_second,
            eta_seconds: left.checked_div(bytes_per_second).filter(|_| !state.is_complete()),
        }
    }

    fn source(&self, now: Duration) -> SourceStatus {
        let mut status = SourceStatus { spec: self.config.source.clone(), ..Default::default() };
        status.losses = self.clone.source_counts.losses.get();
        status.reconnects = self.clone.source_counts.reconnects.get();
        if self.clone.state.is_complete() {
            status.state = SourceState::Released;
        }
        if status.state == SourceState::Connected && self.clone.state.source_refusal().is_some() {
            status.state = SourceState::Changed;
        }
        let source = self.clone.nbd_source.borrow().as_ref().and_then(|source| source.upgrade());
        if status.state == SourceState::Connected
            && let Some(source) = source.map(|source| source.state())
        {
            status.state = match source.is_connected() {
                _ if source.changed => SourceState::Changed,
                true => SourceState::Connected,
                false => SourceState::Lost,
            };
        }
        if !matches!(status.state, SourceState::Released | SourceState::Changed) {
            status.silent_seconds = self.clone.state.source_wait().silence(now).as_secs();
        }
        if status.state == SourceState::Connected && status.silent_seconds >= SOURCE_STALLED_SECONDS {
            status.state = SourceState::Stalled;
        }
        status
    }

    /// Carries a message out; returns when it is in force on every shard.
    pub async fn apply(&self, context: &Rc<ShardContext>, message: Message) -> Result<()> {
        let (state, now) = (&self.clone.state, context.env.now());
        match message {
            Message::EnableHydration => state.set_hydration_enabled(true, now),
            Message::DisableHydration => state.set_hydration_enabled(false, now),
            Message::HydrationThreshold(regions) => state.set_hydration_threshold(u64::from(regions), now),
            Message::HydrationBatchSize(regions) => state.set_hydration_batch_size(u64::from(regions)),
            Message::HydrationRate(rate) => state.budget().set_rate(rate, context.env.now()),
            Message::HydrationFailuresMax(failures) => state.set_hydration_failures_max(failures),
            Message::Priority(priority) => state.budget().set_priority(priority),
        }
        for shard in 0..context.mesh.shards() {
            context.mesh.call(ShardIndex(shard), ShardRequest::Wake { clone: state.id }).await?;
        }
        Ok(())
    }
}
