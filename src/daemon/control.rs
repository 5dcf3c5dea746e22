//! The daemon as the control interface sees it.

use super::activate::ActiveClone;
use super::clients::Clients;
use super::rate::Rate;
use crate::bail;
use crate::clone_state::{AUTOMATIC, CloneState, Mode};
use crate::config::CloneConfig;
use crate::control::Controlled;
use crate::control::api::{
    Features, HydrationState, HydrationStatus, IoCounters, Message, MetadataMode, MetadataStatus, NbdStatus,
    SourceState, SourceStatus, Status,
};
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::{CloneEvents, Feed};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::Notify;
use crate::meta::codec;
use crate::shard::hydrator::automatic_batch_regions;
use crate::shard::pool::ShardContext;
use crate::shard::slice::SliceStats;
use crate::shard::{Mesh, ShardReply, ShardRequest};
use crate::units::ShardIndex;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// What the control interface steers.
pub struct Steering {
    pub context: Rc<ShardContext>,
    pub config: CloneConfig,
    pub clone: Rc<ActiveClone>,
    pub clients: Rc<Clients>,
    pub rate: RefCell<Rate>,
    pub started: Instant,
    /// When somebody last asked how it goes.
    pub last_asked: Cell<Option<Instant>>,
    pub stop: Rc<Notify>,
    pub feed: Rc<Feed>,
}

impl Steering {
    fn state(&self) -> &CloneState {
        &self.clone.state
    }

    /// The counters of all shards together.
    async fn stats(&self) -> Result<SliceStats> {
        let mut total = SliceStats::default();
        for shard in 0..self.context.mesh.shards() {
            let request = ShardRequest::Stats { clone: self.state().id };
            match self.context.mesh.call(ShardIndex(shard), request).await? {
                ShardReply::Stats(stats) => total += *stats,
                other => unreachable!("stats answer a question for them, not {other:?}"),
            }
        }
        Ok(total)
    }

    async fn status_now(self: Rc<Self>) -> Result<Status> {
        let stats = self.stats().await?;
        let (state, config) = (self.state(), &self.config);
        let geometry = &state.geometry;
        let knobs = state.knobs();
        let source = self.source();
        let automatic_batch = automatic_batch_regions(geometry);
        let batch = if knobs.batch_size == AUTOMATIC { automatic_batch } else { knobs.batch_size.max(1) };
        let automatic_threshold = automatic_batch * u64::from(self.context.mesh.shards()) * 16;
        let threshold = if knobs.threshold == AUTOMATIC { automatic_threshold } else { knobs.threshold };
        let set = |value: u64| u32::try_from(value).ok();
        let hydration_state = if state.is_complete() {
            HydrationState::Complete
        } else if !knobs.enabled || knobs.threshold == 0 {
            HydrationState::Paused
        } else if source.state == SourceState::Lost {
            HydrationState::SourceLost
        } else if stats.hydration_paused > 0 || state.mode() != Mode::ReadWrite {
            HydrationState::Failing
        } else if state.hydrating() > 0 {
            HydrationState::Running
        } else if stats.failed_regions > 0 {
            HydrationState::Failing
        } else {
            HydrationState::Idle
        };
        let running = hydration_state == HydrationState::Running || hydration_state == HydrationState::Idle;
        let bytes_per_second = if running { self.rate.borrow().bytes_per_second() } else { 0 };
        let left = (geometry.nr_regions() - state.hydrated()) * geometry.region_size().bytes();
        let events = state.events().count();
        let commits = self.clone.coordinator.stats();
        Ok(Status {
            name: state.name.clone(),
            size: geometry.size(),
            region_size: geometry.region_size().bytes(),
            nr_regions: geometry.nr_regions(),
            hydrated_regions: state.hydrated(),
            hydrating_regions: state.hydrating(),
            hydration: HydrationStatus {
                enabled: knobs.enabled,
                threshold: set(knobs.threshold),
                batch_size: set(knobs.batch_size),
                threshold_effective: u32::try_from(threshold).unwrap_or(u32::MAX),
                batch_size_effective: u32::try_from(batch.min(threshold.max(1))).unwrap_or(u32::MAX),
                state: hydration_state,
                failed_regions: stats.failed_regions,
                bytes_per_second,
                eta_seconds: left.checked_div(bytes_per_second).filter(|_| !state.is_complete()),
            },
            features: Features { no_hydration: !knobs.enabled, no_discard_passdown: !state.discard_passdown },
            metadata: MetadataStatus {
                path: config.metadata.display().to_string(),
                mode: match state.mode() {
                    Mode::ReadWrite => MetadataMode::ReadWrite,
                    Mode::ReadOnly => MetadataMode::ReadOnly,
                    Mode::Failed => MetadataMode::Fail,
                },
                block_size: codec::BLOCK_SIZE as u32,
                used_blocks: codec::SUPERBLOCK_COPIES + geometry.nr_zones(),
                total_blocks: self.clone.metadata_blocks,
                generation: self.clone.coordinator.generation().0,
            },
            event_nr: events.dm,
            events: events.all,
            last_event: events.last.map(|event| event.text),
            source,
            destination: config.destination.display().to_string(),
            nbd: NbdStatus {
                address: self.clients.address.to_string(),
                export: state.name.clone(),
                connections: u32::try_from(self.clients.connections()).unwrap_or(u32::MAX),
            },
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
                errors: stats.errors,
                source_read_bytes: stats.copied_bytes + stats.source_read_bytes,
                hydrated_bytes: stats.copied_bytes + stats.zero_bytes,
                commits: commits.commits,
            },
            shards: u32::from(self.context.mesh.shards()),
            uptime_seconds: self.started.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
        })
    }

    fn source(&self) -> SourceStatus {
        let mut status = SourceStatus { spec: self.config.source.clone(), ..Default::default() };
        status.losses = self.clone.source_counts.losses.get();
        status.reconnects = self.clone.source_counts.reconnects.get();
        if self.state().is_complete() {
            status.state = SourceState::Released;
        }
        let source = self.clone.nbd_source.as_ref().and_then(|source| source.upgrade());
        if status.state == SourceState::Connected && source.is_some_and(|source| !source.state().is_connected()) {
            status.state = SourceState::Lost;
        }
        status
    }

    async fn apply(self: Rc<Self>, message: Message) -> Result<()> {
        let (state, now) = (self.state(), self.context.env.now());
        match message {
            Message::EnableHydration => state.set_hydration_enabled(true, now),
            Message::DisableHydration => state.set_hydration_enabled(false, now),
            Message::HydrationThreshold(regions) => state.set_hydration_threshold(u64::from(regions), now),
            Message::HydrationBatchSize(regions) => state.set_hydration_batch_size(u64::from(regions)),
        }
        for shard in 0..self.context.mesh.shards() {
            self.context.mesh.call(ShardIndex(shard), ShardRequest::Wake { clone: state.id }).await?;
        }
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<()> {
        if name != self.state().name {
            bail!(NotFound, "no clone '{}' here, only '{}'", name.escape_debug(), self.state().name);
        }
        Ok(())
    }
}

/// A handle that is shared with the control server.
pub struct Handle(pub Rc<Steering>);

impl Controlled for Handle {
    fn status(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<Vec<Status>>> {
        let checked = name.map_or(Ok(()), |name| self.0.check_name(name));
        self.0.last_asked.set(Some(Instant::now()));
        let steering = self.0.clone();
        Box::pin(async move {
            checked?;
            Ok(vec![steering.status_now().await?])
        })
    }

    fn message(&self, name: &str, message: &Message) -> LocalBoxFuture<'static, Result<()>> {
        let (checked, steering, message) = (self.0.check_name(name), self.0.clone(), *message);
        Box::pin(async move {
            checked?;
            if steering.state().is_stopping() {
                return Err(Error::new(ErrorKind::Shutdown, "the daemon is stopping"));
            }
            steering.apply(message).await
        })
    }

    fn feed(&self) -> Rc<Feed> {
        self.0.feed.clone()
    }

    fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>> {
        self.0.check_name(name)?;
        // Whoever waits for the end of a clone is watching it, too.
        self.0.last_asked.set(Some(Instant::now()));
        Ok(self.0.state().events().clone())
    }

    fn stop(&self) -> Result<()> {
        self.0.stop.notify();
        Ok(())
    }
}
