//! Collecting the document: asks every shard for its part, and puts them together on shard 0.
//!
//! Each shard copies its counters slice by slice and lets other work run in between, so that the data path never waits
//! for more than one slice. The parts are of slightly different moments: sums over shards are right to what happened
//! meanwhile.

use super::schema::{MetricsDocument, NbdMetrics, SCHEMA, ShardMemory, ShardMetrics, UblkMetrics, VERSION};
use super::usage;
use crate::dma_buf;
use crate::error::{Error, ErrorKind, Result};
use crate::local::join_all;
use crate::ring::Ring;
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use crate::units::ShardIndex;
use futures_lite::future::yield_now;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a shard's frontends have done; called on that shard.
pub type FrontendProbe = fn() -> (NbdMetrics, UblkMetrics);

/// The metrics of all clones, or of the one named (none, if there is none of that name). On shard 0.
pub async fn collect(
    context: &Rc<ShardContext>,
    name: Option<&str>,
    frontends: FrontendProbe,
) -> Result<MetricsDocument> {
    let parts = (0..context.mesh.shards()).map(|shard| {
        let name = name.map(str::to_owned);
        context.mesh.run_on(context, ShardIndex(shard), move |context| {
            Box::pin(async move { part_of(&context, name.as_deref(), frontends).await })
        })
    });
    let mut shards = Vec::with_capacity(context.mesh.shards().into());
    for part in join_all(parts.collect()).await {
        shards.push(part.ok_or_else(|| Error::new(ErrorKind::Shutdown, "a shard has ended"))?);
    }
    let mut clones = Vec::new();
    for coordinator in context.shard.coordinators() {
        if name.is_none_or(|name| name == coordinator.state().name) {
            clones.push(coordinator.metrics());
            yield_now().await;
        }
    }
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(MetricsDocument {
        schema: SCHEMA.into(),
        version: VERSION,
        time_unix_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        uptime_seconds: context.env.now().as_secs_f64(),
        process: usage::process(context.mesh.shards()),
        shards,
        clones,
    })
}

/// The part of the current shard.
async fn part_of(context: &Rc<ShardContext>, name: Option<&str>, frontends: FrontendProbe) -> ShardMetrics {
    let mut clones = Vec::new();
    let mut memory = ShardMemory::default();
    for slice in context.shard.slices() {
        let of_slice = slice.memory();
        memory.map_bytes += of_slice.map_bytes;
        memory.histogram_bytes += of_slice.histogram_bytes;
        memory.copy_bytes += of_slice.copy_bytes;
        if name.is_none_or(|name| name == slice.state().name) {
            let mut metrics = slice.metrics();
            metrics.queue.suspended_waiting = context.shard.waiting_at_gate(slice.id());
            clones.push(metrics);
            yield_now().await;
        }
    }
    let of_commits = context.shard.coordinators();
    memory.histogram_bytes += of_commits.iter().map(|coordinator| coordinator.histogram_bytes()).sum::<u64>();
    let buffers = dma_buf::usage();
    (memory.buffers_bytes, memory.buffers_cached_bytes) = (buffers.in_use, buffers.cached);
    let mut executor = Ring::current().metrics();
    executor.cpu_us = u64::try_from(usage::thread_cpu_time().as_micros()).unwrap_or(u64::MAX);
    let (nbd, ublk) = frontends();
    ShardMetrics {
        shard: context.mesh.me().0,
        cpu: usage::current_cpu(),
        executor,
        mesh: context.mesh.metrics(),
        memory,
        nbd,
        ublk,
        clones,
    }
}
