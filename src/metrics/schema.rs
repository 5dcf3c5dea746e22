//! The metrics document: its types are its schema. Pure.
//!
//! The JSON names are stable: within one [`VERSION`] fields are added, never renamed and never given another meaning.
//! A reader ignores what it does not know and takes the default for what is missing. Units are last in a name: `_us` are
//! microseconds, `_bytes` bytes; names without a unit are counts. `docs/metrics.md` says what each of them means.
//!
//! Counters only grow, from the start of the daemon (or of the clone, when it came later); what is said to be "now" is a
//! gauge.

use serde::{Deserialize, Serialize};

/// What the document says it is.
pub const SCHEMA: &str = "hydrant.metrics";
/// Raised when a field is renamed, removed or means something else.
pub const VERSION: u32 = 1;

macro_rules! document {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* })*
    };
}

document! {
    /// All of it.
    MetricsDocument {
        /// [`SCHEMA`].
        schema: String,
        /// [`VERSION`].
        version: u32,
        /// When it was collected, in milliseconds since 1970.
        time_unix_ms: u64,
        /// Since the daemon started.
        uptime_seconds: f64,
        process: ProcessMetrics,
        /// In order of their numbers.
        shards: Vec<ShardMetrics>,
        /// What belongs to a clone as a whole. In order of their names.
        clones: Vec<CloneMetrics>,
    }

    ProcessMetrics {
        pid: u32,
        /// Of hydrant.
        version: String,
        shards: u32,
        /// Processor time of all threads, in user and kernel mode.
        cpu_seconds: f64,
        /// Memory that is resident now.
        rss_bytes: u64,
        /// The most that was.
        rss_max_bytes: u64,
    }

    /// One executor.
    ShardMetrics {
        shard: u16,
        /// The CPU that it runs on.
        cpu: u32,
        executor: ExecutorMetrics,
        mesh: MeshMetrics,
        memory: ShardMemory,
        nbd: NbdMetrics,
        ublk: UblkMetrics,
        /// Its slices of the clones. In order of their names.
        clones: Vec<SliceMetrics>,
    }

    /// The event loop.
    ExecutorMetrics {
        /// Since it started.
        alive_us: u64,
        /// Of that, asleep for want of work.
        parked_us: u64,
        parks: u64,
        /// Processor time of its thread, in user and kernel mode.
        cpu_us: u64,
        /// The part of its life that it was not asleep, 0 to 1.
        load: f64,
        /// The same of about the last second.
        load_recent: f64,
        /// io_uring_enter(2), sleeping included.
        system_calls: u64,
        /// io_uring operations.
        submitted: u64,
        completed: u64,
        /// Operations in flight now.
        in_flight: u64,
    }

    /// Messages to other shards.
    MeshMetrics {
        /// Messages of all kinds sent.
        hops: u64,
        /// Of those: requests, answers to requests, jobs, answers to jobs.
        requests: u64,
        replies: u64,
        jobs: u64,
        job_replies: u64,
        /// Requests and jobs that wait for their answer now.
        waiting: u64,
        /// The most messages that were found in the mailbox at once.
        mailbox_depth_max: u64,
    }

    ShardMemory {
        /// Region maps.
        map_bytes: u64,
        histogram_bytes: u64,
        /// Source data held for copies.
        copy_bytes: u64,
        /// Buffers taken by this thread less those given back by it: negative where they come from other shards. The sum
        /// over all shards is what is in use.
        buffers_bytes: i64,
        /// Freed buffers that are kept for the next I/O.
        buffers_cached_bytes: u64,
    }

    /// The block devices of one shard, all clones together.
    UblkMetrics {
        /// As the kernel sent them, before they are cut at the zones of shards.
        requests: u64,
        /// Of these, reads and writes whose data went straight between the destination and the kernel's own memory.
        direct: u64,
        errors: u64,
        /// Requests that are being carried out, now.
        in_flight: u64,
        read_bytes: u64,
        write_bytes: u64,
    }

    /// The NBD connections that this shard serves, of all clones.
    NbdMetrics {
        /// Now.
        connections: u64,
        accepted: u64,
        /// Ended for a broken protocol or socket.
        dropped: u64,
        /// As clients sent them, before they are cut at the zones of shards.
        requests: u64,
        errors: u64,
        /// Requests without a reply, now.
        in_flight: u64,
        read_bytes: u64,
        write_bytes: u64,
    }

    /// One shard's slice of one clone.
    SliceMetrics {
        name: String,
        io: IoMetrics,
        routes: RouteMetrics,
        latency_us: LatencyMetrics,
        queue: QueueMetrics,
        hydration: HydrationMetrics,
        memory: SliceMemory,
    }

    /// Requests by kind. One that crosses zones counts in each of them.
    IoMetrics {
        read: IoCount,
        write: IoCount,
        trim: IoCount,
        write_zeroes: IoCount,
        cache: IoCount,
        status: IoCount,
    }

    IoCount {
        requests: u64,
        bytes: u64,
        /// Requests that failed.
        errors: u64,
    }

    /// How requests were served. Each is cut into parts by which of its regions are hydrated; a part that was served
    /// counts on exactly one route.
    RouteMetrics {
        /// Hydrated: read from the destination.
        read_destination: PartCount,
        /// Not hydrated: read from the source together with the rest of its regions, and kept.
        read_source_kept: PartCount,
        /// Not hydrated: read from the source, not kept.
        read_source_past: PartCount,
        /// Hydrated: written to the destination.
        write_destination: PartCount,
        /// Whole regions that were not hydrated: written, nothing copied.
        write_whole_region: PartCount,
        /// A part of a region that was not hydrated: the region was copied with it.
        write_partial_region: PartCount,
        trim_destination: PartCount,
        trim_whole_region: PartCount,
        /// Left as it was: a part of a region that was not hydrated, less than a block, or no discard passdown.
        trim_ignored: PartCount,
        write_zeroes_destination: PartCount,
        write_zeroes_whole_region: PartCount,
        write_zeroes_partial_region: PartCount,
        /// Hydrated already: nothing to do.
        cache_hydrated: PartCount,
        cache_copied: PartCount,
    }

    PartCount {
        parts: u64,
        bytes: u64,
    }

    /// Requests that succeeded.
    LatencyMetrics {
        read: PathLatency,
        write: PathLatency,
        trim: PathLatency,
        write_zeroes: PathLatency,
        cache: PathLatency,
        status: PathLatency,
    }

    PathLatency {
        /// Requests that the destination alone served; null when there was none.
        destination: Option<Distribution>,
        /// Requests that had to wait for the source; null when there was none.
        source: Option<Distribution>,
    }

    QueueMetrics {
        /// Client requests being served now, waiting ones included.
        in_flight: u64,
        in_flight_max: u64,
        /// Operations that hold bytes, or wait for them, now: writes, copies.
        holds: u64,
        /// Of those, waiting for an earlier one.
        hold_waiting: u64,
        hold_waiting_max: u64,
        /// How many ever had to wait.
        hold_waits: u64,
        /// Requests of this shard's clients that wait because the clone is suspended, now.
        suspended_waiting: u64,
        /// Copies waiting for copy memory now.
        copy_memory_waiting: u64,
        copy_memory_waiting_max: u64,
    }

    HydrationMetrics {
        /// Regions of this slice, and how many are hydrated now.
        regions: u64,
        hydrated_regions: u64,
        /// What hydrated them, since the start.
        by: HydratedBy,
        /// Read from the source and stored.
        copied_bytes: u64,
        /// Of hydrated regions, zeros and holes: not written as data.
        zero_bytes: u64,
        /// Reads from the source, for copies and for clients.
        source_read: IoCount,
        source_read_latency_us: Option<Distribution>,
        /// One copy, from when it holds its regions until they are hydrated.
        copy_latency_us: Option<Distribution>,
        /// Regions of each batch of the background.
        batch_regions: Option<Distribution>,
        /// Batches being copied by the background, now.
        batches_in_flight: u64,
        batch_bytes_in_flight: u64,
        /// Copies that failed.
        failures: u64,
        /// Bad regions, now: they could not be copied, each tried alone, and are not hydrated.
        failed_regions: u64,
        /// It pauses for failures, now.
        paused: bool,
        /// Too many copies of the clone failed in a row: it goes on when the user says so.
        stopped: bool,
    }

    /// Regions; each counts once.
    HydratedBy {
        /// Copied in the background.
        background: u64,
        /// In the background, without a copy: the source knew that they are zeros.
        zeroes: u64,
        /// By a client's read that was kept.
        read: u64,
        cache: u64,
        /// By a write to a part of them.
        partial_write: u64,
        /// Overwritten as a whole: never copied.
        overwrite: u64,
        /// Trimmed or zeroed as a whole: never copied.
        discard: u64,
    }

    SliceMemory {
        /// The region map's; none once all is hydrated.
        map_bytes: u64,
        /// What the map may take by its documented formula.
        map_max_bytes: u64,
        histogram_bytes: u64,
        /// Source data held for copies, now.
        copy_bytes: u64,
        copy_max_bytes: u64,
    }

    CloneMetrics {
        name: String,
        size_bytes: u64,
        region_size_bytes: u64,
        regions: u64,
        hydrated_regions: u64,
        /// Being copied now.
        hydrating_regions: u64,
        commits: CommitMetrics,
    }

    /// Commits of the metadata. They are made by shard 0.
    CommitMetrics {
        /// Flushes and FUA writes of clients, among others.
        requests: u64,
        /// Requests that wait now.
        waiting: u64,
        /// Commits that succeeded.
        commits: u64,
        failures: u64,
        /// Of the commits, those that found no new bits and only flushed the destination.
        flushes_only: u64,
        blocks_written: u64,
        /// Of the newest commit in the metadata.
        generation: u64,
        /// From a request to its answer, waiting for an earlier commit included.
        request_latency_us: Option<Distribution>,
        /// One commit as a whole.
        latency_us: Option<Distribution>,
        /// Its steps.
        snapshot_us: Option<Distribution>,
        destination_flush_us: Option<Distribution>,
        metadata_write_us: Option<Distribution>,
        metadata_flush_us: Option<Distribution>,
        /// Requests that one commit answered; 0 for those that nobody asked for.
        requests_per_commit: Option<Distribution>,
    }

    /// Values of an HDR histogram: two significant digits, so a quantile is right to 1 %.
    Distribution {
        count: u64,
        /// Exact, as are `min`, `max` and `mean`.
        sum: u64,
        min: u64,
        max: u64,
        mean: f64,
        p50: u64,
        p90: u64,
        p99: u64,
        p999: u64,
        /// `[upper, count]`, ascending: so many values were at most `upper` and above the pair before. Empty ones are left
        /// out.
        buckets: Vec<(u64, u64)>,
    }
}

impl Distribution {
    /// From ascending buckets and what is known exactly; `None` of nothing.
    pub fn new(buckets: Vec<(u64, u64)>, sum: u64, min: u64, max: u64) -> Option<Self> {
        let count = buckets.iter().fold(0u64, |all, (_, count)| all.saturating_add(*count));
        if count == 0 {
            return None;
        }
        let mut new = Self { count, sum, min, max, mean: sum as f64 / count as f64, buckets, ..Default::default() };
        [new.p50, new.p90, new.p99, new.p999] = [500, 900, 990, 999].map(|permille| new.quantile(permille));
        Some(new)
    }

    /// The value that so many of a thousand do not exceed.
    pub fn quantile(&self, permille: u32) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(permille)).div_ceil(1000).max(1);
        let mut seen = 0;
        for (upper, count) in &self.buckets {
            seen += u128::from(*count);
            if seen >= wanted {
                return (*upper).clamp(self.min, self.max);
            }
        }
        self.max
    }

    /// Both together.
    pub fn merged(self, other: &Self) -> Self {
        if other.count == 0 {
            return self;
        }
        if self.count == 0 {
            return other.clone();
        }
        let mut buckets = Vec::with_capacity(self.buckets.len() + other.buckets.len());
        let (mut mine, mut theirs) = (self.buckets.into_iter().peekable(), other.buckets.iter().copied().peekable());
        loop {
            let first = match (mine.peek(), theirs.peek()) {
                (Some(a), Some(b)) if a.0 == b.0 => {
                    let (a, b) = (*a, *b);
                    mine.next();
                    theirs.next();
                    Some((a.0, a.1.saturating_add(b.1)))
                }
                (Some(a), Some(b)) if a.0 > b.0 => theirs.next(),
                (Some(_), _) => mine.next(),
                (None, _) => theirs.next(),
            };
            match first {
                Some(bucket) => buckets.push(bucket),
                None => break,
            }
        }
        let (min, max) = (self.min.min(other.min), self.max.max(other.max));
        Self::new(buckets, self.sum.saturating_add(other.sum), min, max).unwrap_or_default()
    }
}

/// All of them as one; `None` when there is none.
pub fn merge_all<'a>(parts: impl IntoIterator<Item = &'a Option<Distribution>>) -> Option<Distribution> {
    parts.into_iter().flatten().fold(None, |sum: Option<Distribution>, part| match sum {
        Some(sum) => Some(sum.merged(part)),
        None => Some(part.clone()),
    })
}

#[cfg(test)]
mod tests;
