//! What people see, to the letter.

use super::*;
use crate::metrics::schema::*;

fn times(values: &[u64]) -> Option<Distribution> {
    let buckets = values.iter().map(|value| (*value, 1)).collect();
    Distribution::new(buckets, values.iter().sum(), values[0], values[values.len() - 1])
}

fn io(requests: u64, bytes: u64, errors: u64) -> IoCount {
    IoCount { requests, bytes, errors }
}

fn sample() -> MetricsDocument {
    let slice = |by: HydratedBy| SliceMetrics {
        name: "vm1".into(),
        io: IoMetrics { read: io(1500, 6 << 20, 0), write_zeroes: io(2, 8192, 1), ..Default::default() },
        routes: RouteMetrics {
            read_destination: PartCount { parts: 1000, bytes: 4 << 20 },
            read_source_kept: PartCount { parts: 500, bytes: 2 << 20 },
            write_zeroes_partial_region: PartCount { parts: 1, bytes: 512 },
            ..Default::default()
        },
        latency_us: LatencyMetrics {
            read: PathLatency { destination: times(&[80, 120, 300]), source: times(&[2500, 4_200_000]) },
            ..Default::default()
        },
        queue: QueueMetrics { in_flight: 3, hold_waiting: 1, hold_waits: 17, ..Default::default() },
        hydration: HydrationMetrics {
            by,
            source_read: io(600, 600 << 20, 2),
            source_read_latency_us: times(&[2400, 9000]),
            copy_latency_us: times(&[5000]),
            copied_bytes: 599 << 20,
            ..Default::default()
        },
        memory: SliceMemory {
            map_bytes: 16 << 10,
            histogram_bytes: 80 << 10,
            copy_bytes: 1 << 20,
            copy_max_bytes: 32 << 20,
            ..Default::default()
        },
    };
    let shard = |shard: u16, by: HydratedBy| ShardMetrics {
        shard,
        cpu: u32::from(shard) * 2,
        executor: ExecutorMetrics {
            load: 0.123,
            load_recent: 1.0,
            cpu_us: 3_723_000_000,
            system_calls: 123_456_789,
            ..Default::default()
        },
        mesh: MeshMetrics { hops: 4711, ..Default::default() },
        memory: ShardMemory { buffers_bytes: -4096, buffers_cached_bytes: 3 << 20, ..Default::default() },
        nbd: NbdMetrics { connections: 2, requests: 3000, ..Default::default() },
        ublk: UblkMetrics { requests: 500, ..Default::default() },
        clones: vec![slice(by)],
    };
    let all_ways =
        HydratedBy { background: 100_000, zeroes: 10, read: 500, cache: 4, partial_write: 1, overwrite: 7, discard: 9 };
    MetricsDocument {
        schema: SCHEMA.into(),
        version: VERSION,
        uptime_seconds: 3723.9,
        process: ProcessMetrics {
            pid: 4711,
            version: "0.1.0".into(),
            shards: 2,
            cpu_seconds: 7446.04,
            rss_bytes: 50 << 20,
            rss_max_bytes: 60 << 20,
        },
        shards: vec![shard(0, all_ways), shard(1, HydratedBy { background: 5, ..Default::default() })],
        clones: vec![CloneMetrics {
            name: "vm1".into(),
            size_bytes: 16 << 30,
            region_size_bytes: 64 << 10,
            regions: 262144,
            hydrated_regions: 118489,
            hydrating_regions: 16,
            commits: CommitMetrics {
                requests: 30,
                commits: 12,
                failures: 1,
                blocks_written: 45,
                generation: 13,
                request_latency_us: times(&[900]),
                latency_us: times(&[800]),
                metadata_flush_us: times(&[400]),
                ..Default::default()
            },
        }],
        ..Default::default()
    }
}

#[test]
fn text_for_people() {
    let expected = "\
pid 4711, version 0.1.0, up 1h 2m: 7446.0 s of CPU time, 50.0 MiB resident (at most 60.0 MiB)

shard  cpu    load  lately   CPU time  clients    requests        hops   system calls      buffers
    0    0   12.3%    100%   3723.0 s        2        3000        4711      123456789      3.0 MiB
    1    2   12.3%    100%   3723.0 s        2        3000        4711      123456789      3.0 MiB

vm1: 16GiB, 262144 regions of 64KiB, 45.1% hydrated, 16 in flight
  requests                                   bytes  errors       p50       p99     p99.9       max
  read                            3000    12.0 MiB            120 us    300 us    300 us    300 us
    awaiting the source              4                        2.5 ms    4.20 s    4.20 s    4.20 s
  write zeroes                       4    16.0 KiB       2
  routes
    read: destination             2000     8.0 MiB
    read: source, kept            1000     4.0 MiB
    zeroes: partial region           2     1.0 KiB
  source reads                    1200     1.2 GiB       4    2.4 ms    9.0 ms    9.0 ms    9.0 ms
  copies                             2     1.2 GiB            5.0 ms    5.0 ms    5.0 ms    5.0 ms
  regions hydrated         100005 by background, 10 by zeroes, 500 by read, 4 by cache,
                           1 by partial write, 7 by overwrite, 9 by discard
  queues                   6 in flight, 2 waiting for bytes (34 ever did), 0 for copy memory
  memory                   map 32.0 KiB, histograms 160 KiB, copies 2.0 MiB of 64.0 MiB
  flushes                           30                        900 us    900 us    900 us    900 us
  commits                           12                   1    800 us    800 us    800 us    800 us
    metadata flush                   1                        400 us    400 us    400 us    400 us
  metadata blocks          45 written, generation 13
";
    let text = text_of(&sample());
    assert_eq!(text, expected);
    assert!(text.lines().all(|line| line.len() <= 100 && line.trim_end() == line));
}

#[test]
fn a_daemon_without_clones_shows_its_shards() {
    let text = text_of(&MetricsDocument { shards: vec![ShardMetrics::default()], ..Default::default() });
    assert_eq!(text.lines().count(), 4, "{text}");
}
