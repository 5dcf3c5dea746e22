//! The names are pinned, and `docs/metrics.md` describes them all.

use super::*;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A document in which every list has an element and nothing is null.
fn full() -> MetricsDocument {
    let times = || Distribution::new(vec![(7, 1)], 7, 7, 7);
    let path = || PathLatency { destination: times(), source: times() };
    let slice = SliceMetrics {
        latency_us: LatencyMetrics {
            read: path(),
            write: path(),
            trim: path(),
            write_zeroes: path(),
            cache: path(),
            status: path(),
        },
        hydration: HydrationMetrics {
            source_read_latency_us: times(),
            copy_latency_us: times(),
            batch_regions: times(),
            ..Default::default()
        },
        ..Default::default()
    };
    let commits = CommitMetrics {
        request_latency_us: times(),
        latency_us: times(),
        snapshot_us: times(),
        destination_flush_us: times(),
        metadata_write_us: times(),
        metadata_flush_us: times(),
        requests_per_commit: times(),
        ..Default::default()
    };
    MetricsDocument {
        schema: SCHEMA.into(),
        version: VERSION,
        shards: vec![ShardMetrics { clones: vec![slice], ..Default::default() }],
        clones: vec![CloneMetrics { commits, ..Default::default() }],
        ..Default::default()
    }
}

/// The names of all fields, dotted, with their types. Types that are used again and again are leaves, and their fields
/// are listed once: `distribution.count`.
fn names() -> BTreeMap<String, String> {
    let json = serde_json::to_value(full()).unwrap();
    let mut names = BTreeMap::new();
    collect("", &json, &mut names);
    names
}

const SHARED: [(&str, &[&str]); 4] = [
    ("distribution", &["count", "sum", "min", "max", "mean", "p50", "p90", "p99", "p999", "buckets"]),
    ("io", &["requests", "bytes", "errors"]),
    ("parts", &["parts", "bytes"]),
    ("latency", &["destination", "source"]),
];

fn collect(path: &str, value: &Value, names: &mut BTreeMap<String, String>) {
    let kind = match value {
        Value::Object(fields) => {
            let keys: BTreeSet<&str> = fields.keys().map(String::as_str).collect();
            let shared = SHARED.iter().find(|(_, of)| of.iter().copied().collect::<BTreeSet<_>>() == keys);
            let below = match shared {
                Some((name, _)) if path != *name => {
                    names.insert(path.into(), (*name).into());
                    *name
                }
                _ => path,
            };
            for (name, value) in fields {
                let name = if below.is_empty() { name.clone() } else { format!("{below}.{name}") };
                collect(&name, value, names);
            }
            return;
        }
        Value::Array(items) if items[0].is_object() => return collect(&format!("{path}[]"), &items[0], names),
        Value::Array(_) => "pairs",
        Value::String(_) => "text",
        Value::Bool(_) => "flag",
        Value::Number(number) if number.is_f64() => "fraction",
        Value::Number(_) => "number",
        Value::Null => panic!("{path} is null"),
    };
    names.insert(path.into(), kind.into());
}

/// As the document of version 1 was published. Lines may be added, never changed: that would need a new version.
const PINNED: &str = "
schema version time_unix_ms uptime_seconds
process.pid process.version process.shards process.cpu_seconds process.rss_bytes process.rss_max_bytes
shards[].shard shards[].cpu
shards[].executor.alive_us shards[].executor.parked_us shards[].executor.parks shards[].executor.cpu_us
shards[].executor.load shards[].executor.load_recent shards[].executor.system_calls shards[].executor.submitted
shards[].executor.completed shards[].executor.in_flight
shards[].mesh.hops shards[].mesh.requests shards[].mesh.replies shards[].mesh.jobs shards[].mesh.job_replies
shards[].mesh.waiting shards[].mesh.mailbox_depth_max
shards[].memory.map_bytes shards[].memory.histogram_bytes shards[].memory.copy_bytes shards[].memory.buffers_bytes
shards[].memory.buffers_cached_bytes
shards[].nbd.connections shards[].nbd.accepted shards[].nbd.dropped shards[].nbd.requests shards[].nbd.errors
shards[].nbd.in_flight shards[].nbd.read_bytes shards[].nbd.write_bytes
shards[].ublk.requests shards[].ublk.direct shards[].ublk.errors shards[].ublk.in_flight shards[].ublk.read_bytes
shards[].ublk.write_bytes
shards[].clones[].name
shards[].clones[].io.read shards[].clones[].io.write shards[].clones[].io.trim shards[].clones[].io.write_zeroes
shards[].clones[].io.cache shards[].clones[].io.status
shards[].clones[].routes.read_destination shards[].clones[].routes.read_source_kept
shards[].clones[].routes.read_source_past shards[].clones[].routes.write_destination
shards[].clones[].routes.write_whole_region shards[].clones[].routes.write_partial_region
shards[].clones[].routes.trim_destination shards[].clones[].routes.trim_whole_region
shards[].clones[].routes.trim_ignored shards[].clones[].routes.write_zeroes_destination
shards[].clones[].routes.write_zeroes_whole_region shards[].clones[].routes.write_zeroes_partial_region
shards[].clones[].routes.cache_hydrated shards[].clones[].routes.cache_copied
shards[].clones[].latency_us.read shards[].clones[].latency_us.write shards[].clones[].latency_us.trim
shards[].clones[].latency_us.write_zeroes shards[].clones[].latency_us.cache shards[].clones[].latency_us.status
shards[].clones[].queue.in_flight shards[].clones[].queue.in_flight_max shards[].clones[].queue.holds
shards[].clones[].queue.hold_waiting shards[].clones[].queue.hold_waiting_max shards[].clones[].queue.hold_waits
shards[].clones[].queue.suspended_waiting shards[].clones[].queue.copy_memory_waiting shards[].clones[].queue.copy_memory_waiting_max
shards[].clones[].hydration.regions shards[].clones[].hydration.hydrated_regions
shards[].clones[].hydration.by.background shards[].clones[].hydration.by.zeroes shards[].clones[].hydration.by.read
shards[].clones[].hydration.by.cache shards[].clones[].hydration.by.partial_write
shards[].clones[].hydration.by.overwrite shards[].clones[].hydration.by.discard
shards[].clones[].hydration.copied_bytes shards[].clones[].hydration.zero_bytes
shards[].clones[].hydration.source_read shards[].clones[].hydration.source_read_latency_us
shards[].clones[].hydration.copy_latency_us shards[].clones[].hydration.batch_regions
shards[].clones[].hydration.batches_in_flight shards[].clones[].hydration.batch_bytes_in_flight
shards[].clones[].hydration.failures shards[].clones[].hydration.failed_regions shards[].clones[].hydration.paused
shards[].clones[].hydration.stopped
shards[].clones[].memory.map_bytes shards[].clones[].memory.map_max_bytes
shards[].clones[].memory.histogram_bytes shards[].clones[].memory.copy_bytes shards[].clones[].memory.copy_max_bytes
clones[].name clones[].size_bytes clones[].region_size_bytes clones[].regions clones[].hydrated_regions
clones[].hydrating_regions
clones[].commits.requests clones[].commits.waiting clones[].commits.commits clones[].commits.failures
clones[].commits.flushes_only clones[].commits.blocks_written clones[].commits.generation
clones[].commits.request_latency_us clones[].commits.latency_us clones[].commits.snapshot_us
clones[].commits.destination_flush_us clones[].commits.metadata_write_us clones[].commits.metadata_flush_us
clones[].commits.requests_per_commit
distribution.count distribution.sum distribution.min distribution.max distribution.mean distribution.p50
distribution.p90 distribution.p99 distribution.p999 distribution.buckets
io.requests io.bytes io.errors
parts.parts parts.bytes
latency.destination latency.source";

#[test]
fn names_are_pinned() {
    let names = names();
    let mut found: Vec<&str> = names.keys().map(String::as_str).collect();
    let mut pinned: Vec<&str> = PINNED.split_ascii_whitespace().collect();
    found.sort_unstable();
    pinned.sort_unstable();
    assert_eq!(found, pinned);
    assert_eq!((SCHEMA, VERSION), ("hydrant.metrics", 1));
}

/// Rows of its tables are `` | `name` | type | meaning | ``.
#[test]
fn every_field_is_documented_with_its_type() {
    let text = include_str!("../../../docs/metrics.md");
    let mut documented = BTreeMap::new();
    for row in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, meaning] = cells[..] else { panic!("three columns: {row}") };
        assert!(meaning.len() >= 5, "{row}");
        let before = documented.insert(name.trim_matches('`').to_owned(), kind.to_owned());
        assert!(before.is_none(), "twice: {row}");
    }
    assert_eq!(documented, names());
    assert!(text.contains(&format!("version {VERSION}")) && text.contains(SCHEMA));
}

#[test]
fn documents_of_another_version_are_read() {
    let document: MetricsDocument =
        serde_json::from_str(r#"{"schema": "hydrant.metrics", "shards": [{"shard": 3, "new": {"x": 1}}]}"#).unwrap();
    assert_eq!((document.shards[0].shard, document.version), (3, 0));
    let whole = full();
    assert_eq!(serde_json::from_str::<MetricsDocument>(&serde_json::to_string(&whole).unwrap()).unwrap(), whole);
}

#[test]
fn quantiles_are_those_of_the_definition() {
    let of = |buckets: &[(u64, u64)]| Distribution::new(buckets.to_vec(), 0, 0, u64::MAX).unwrap();
    let hundred: Vec<_> = (1..=100).map(|value| (value, 1)).collect();
    let found = of(&hundred);
    assert_eq!((found.count, found.p50, found.p90, found.p99, found.p999), (100, 50, 90, 99, 100));
    assert_eq!(of(&[(5, 1)]).p50, 5);
    assert_eq!((of(&[(5, 999), (9, 1)]).p999, of(&[(5, 998), (9, 2)]).p999), (5, 9));
    // A bucket may reach beyond what was seen.
    assert_eq!(Distribution::new(vec![(127, 3)], 300, 90, 110).unwrap().p99, 110);
    assert_eq!(Distribution::new(Vec::new(), 0, 0, 0), None);
}

#[test]
fn merging_is_adding() {
    let a = Distribution::new(vec![(1, 2), (5, 3), (9, 1)], 26, 1, 9);
    let b = Distribution::new(vec![(5, 4), (7, 1)], 27, 5, 7);
    let both = Distribution::new(vec![(1, 2), (5, 7), (7, 1), (9, 1)], 53, 1, 9);
    assert_eq!(merge_all([&a, &None, &b]), both);
    assert_eq!(merge_all([&b, &a]), both);
    assert_eq!(merge_all([&None, &a]), a);
    assert_eq!(merge_all([&None]), None);
    let nothing = Distribution::default();
    assert_eq!(nothing.clone().merged(a.as_ref().unwrap()), a.clone().unwrap());
    assert_eq!(a.clone().unwrap().merged(&nothing), a.unwrap());
}
