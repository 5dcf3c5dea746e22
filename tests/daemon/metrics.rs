//! What the shards count, asked of the real daemon: exactly what clients did.

use super::harness::*;
use super::load::ZONE;
use hydrant::metrics::record::{Kind, Route};
use hydrant::metrics::schema::{IoCount, MetricsDocument, PartCount, SliceMetrics};
use std::time::{Duration, Instant};

fn metrics(daemon: &Daemon) -> MetricsDocument {
    daemon.client().metrics(None).unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()))
}

/// The slices of the only clone.
fn slices(document: &MetricsDocument) -> impl Iterator<Item = &SliceMetrics> {
    document.shards.iter().map(|shard| match &shard.clones[..] {
        [slice] => slice,
        other => panic!("one clone, not {other:?}"),
    })
}

fn io(document: &MetricsDocument, kind: Kind) -> (u64, u64, u64) {
    slices(document)
        .map(|slice| slice.io.of(kind))
        .fold((0, 0, 0), |sum, io: &IoCount| (sum.0 + io.requests, sum.1 + io.bytes, sum.2 + io.errors))
}

fn part(document: &MetricsDocument, route: Route) -> (u64, u64) {
    let parts = slices(document).map(|slice| slice.routes.of(route));
    parts.fold((0, 0), |sum, part: &PartCount| (sum.0 + part.parts, sum.1 + part.bytes))
}

#[test]
fn known_requests_give_exactly_their_counts_by_kind_and_route() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.hole("source", 3 * ZONE);
    let daemon = bench.clone_of(&source).args("--no-hydration --shards 2 --region-size 4KiB").start();
    let script = format!(
        r#"
Z, R = {ZONE}, 4096
h, other = connect(), connect()
for i in range(10):
    h.pread(100, 2 * i * R)            # 10 reads that are kept, in zone 0
    other.pread(R, Z + i * R)          # and 10 in zone 1, another shard's
time.sleep(0.2)                        # what was read is stored
for i in range(10):
    other.pread(100, 2 * i * R)        # 10 of zone 0, by shard 1 all the same
h.pread(4 * R, Z - 2 * R)              # over the border: two pieces, zone 1's first regions are hydrated
h.pwrite(bytes(3 * R), 100 * R)        # whole regions
h.pwrite(b"x" * 50, 200 * R + 7)       # a part of one
h.pwrite(b"y" * R, 0)                  # hydrated
h.trim(8 * R, 300 * R)
h.zero(2 * R, 400 * R)
h.cache(6 * R, 500 * R)
h.flush()
h.flush()
h.pwrite(b"z" * 512, 0, nbd.CMD_FLAG_FUA)
"#
    );
    nbdsh(&daemon.uri(), &script);
    let found = metrics(&daemon);
    let (r, kept) = (4096, 10 * 100 + 10 * 4096);
    assert_eq!(io(&found, Kind::Read), (32, kept + 10 * 100 + 4 * r, 0));
    assert_eq!(io(&found, Kind::Write), (4, 3 * r + 50 + r + 512, 0));
    assert_eq!(io(&found, Kind::Trim), (1, 8 * r, 0));
    assert_eq!(io(&found, Kind::WriteZeroes), (1, 2 * r, 0));
    assert_eq!(io(&found, Kind::Cache), (1, 6 * r, 0));
    assert_eq!(io(&found, Kind::Status), (0, 0, 0));
    let expected = [
        (Route::ReadDestination, (11, 10 * 100 + 2 * r)),
        (Route::ReadSourceKept, (21, kept + 2 * r)),
        (Route::WriteDestination, (2, r + 512)),
        (Route::WriteWholeRegion, (1, 3 * r)),
        (Route::WritePartialRegion, (1, 50)),
        (Route::TrimWholeRegion, (1, 8 * r)),
        (Route::WriteZeroesWholeRegion, (1, 2 * r)),
        (Route::CacheCopied, (1, 6 * r)),
    ];
    for route in Route::ALL {
        let wanted = expected.iter().find(|(which, _)| which == route).map_or((0, 0), |(_, wanted)| *wanted);
        assert_eq!(part(&found, *route), wanted, "{route:?}");
    }

    // Shard by shard: who was asked for what is hydrated, and zone 1 for what was not.
    let on_1 = &found.shards[1].clones[0];
    assert_eq!((on_1.io.read.requests, on_1.io.read.bytes), (21, 10 * r + 2 * r + 10 * 100));
    assert_eq!(on_1.io.write.requests, 0);
    let timed = |slice: &SliceMetrics| {
        let read = &slice.latency_us.read;
        [&read.destination, &read.source].map(|times| times.as_ref().map_or(0, |times| times.count))
    };
    assert_eq!(slices(&found).map(timed).collect::<Vec<_>>(), [[0, 11], [11, 10]]);

    // The same in `status`, which sums.
    let status = daemon.status().io;
    let of = |kind| (io(&found, kind).0, io(&found, kind).1);
    assert_eq!((status.reads, status.read_bytes), of(Kind::Read));
    assert_eq!((status.writes, status.write_bytes), of(Kind::Write));
    assert_eq!((status.trims, status.trim_bytes), of(Kind::Trim));
    assert_eq!((status.write_zeroes, status.write_zeroes_bytes), of(Kind::WriteZeroes));
    assert_eq!(status.errors, 0);

    // As clients sent them: connections went to the shards in turn.
    let nbd: Vec<_> = found.shards.iter().map(|shard| (shard.nbd.accepted, shard.nbd.requests)).collect();
    assert_eq!(nbd, [(1, 20), (1, 20)]);
    let commits = &found.clones[0].commits;
    // The second flush finds nothing new; the write with FUA, to a region whose bit is durable, needs no commit.
    assert_eq!((commits.requests, commits.failures), (2, 0));
    assert!(commits.flushes_only >= 1 && commits.commits > commits.flushes_only, "{commits:?}");
    assert!(commits.latency_us.as_ref().unwrap().count == commits.commits);

    // Requests of one shard's clients for the other's zones go over the mesh, each with its answer, unless all that they
    // want is hydrated: shard 1 served that by itself.
    let [zero, one] = [0, 1].map(|shard| &found.shards[shard].mesh);
    assert_eq!((one.requests, zero.replies), (0, 0));
    assert!(zero.requests >= 1 && one.replies == zero.requests, "{zero:?} {one:?}");
    assert_eq!(one.hops, one.requests + one.replies + one.jobs + one.job_replies);
    assert!(zero.mailbox_depth_max >= 1 && one.mailbox_depth_max >= 1);
    let executor = &found.shards[0].executor;
    assert!(executor.parks > 0 && executor.parked_us > 0 && executor.parked_us <= executor.alive_us, "{executor:?}");
    assert!(executor.load > 0.0 && executor.load < 1.0 && executor.cpu_us > 0, "{executor:?}");
    assert!(executor.submitted >= executor.completed && executor.system_calls > 0, "{executor:?}");
    let memory = &found.shards[0].clones[0].memory;
    assert!(memory.map_bytes > 2 * ZONE / 4096 / 8 && memory.map_bytes <= memory.map_max_bytes, "{memory:?}");
    assert_eq!(memory.histogram_bytes % 1024, 0);
    assert!(found.process.rss_bytes > MIB && found.process.pid == daemon.pid());
    daemon.stop();
}

#[test]
fn the_command_line_shows_text_and_json() {
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    let run = |args: &[&str]| {
        let output = daemon.hydrant(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    for args in [&["metrics"][..], &["metrics", "vm"], &["metrics", "--control", daemon.control.to_str().unwrap()]] {
        let (status, text, error) = run(args);
        assert_eq!((status, error.as_str()), (Some(0), ""), "{args:?}");
        assert!(text.contains("vm: 4MiB") && text.contains("source reads") && text.contains("100% hydrated"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }
    let (_, json, _) = run(&["metrics", "--json"]);
    assert_eq!(json.lines().count(), 1);
    let document: MetricsDocument = serde_json::from_str(&json).unwrap();
    assert_eq!((document.schema.as_str(), document.version), ("hydrant.metrics", 1));
    let by: u64 = slices(&document).map(|slice| slice.hydration.by.background).sum();
    assert_eq!((by, document.clones[0].hydrated_regions), (64, 64));
    // Everything is hydrated: the maps were let go.
    assert!(slices(&document).all(|slice| slice.memory.map_bytes == 0));
    let (status, _, error) = run(&["metrics", "other", "--control", daemon.control.to_str().unwrap()]);
    assert_eq!(status, Some(1));
    assert!(error.contains("'other'") && error.lines().count() == 1, "{error}");
    daemon.stop();
}

#[test]
fn sigusr1_without_a_path_says_what_to_configure() {
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", MIB)).start();
    daemon.signal("USR1");
    daemon.wait_log("[daemon.metrics_dump]");
    daemon.wait_hydrated();
    // It does not count as a request to stop either.
    daemon.stop();
}

#[test]
fn load_is_what_a_shard_does_and_idleness_is_seen() {
    need!("nbdsh");
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", 4 * MIB)).args("--shards 1").start();
    daemon.wait_hydrated();
    let busy = std::thread::scope(|scope| {
        let uri = daemon.uri();
        scope.spawn(move || {
            nbdsh(&uri, "h = connect()\nend = time.time() + 2.5\nwhile time.time() < end: h.pread(1 << 20, 0)")
        });
        std::thread::sleep(Duration::from_millis(2200));
        metrics(&daemon).shards[0].executor.load_recent
    });
    let start = Instant::now();
    loop {
        let idle = metrics(&daemon).shards[0].executor.load_recent;
        if idle < 0.1 && idle < busy / 2.0 {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "load {busy} under load, {idle} without");
        std::thread::sleep(Duration::from_millis(200));
    }
    daemon.stop();
}

#[test]
fn who_waits_for_a_suspended_clone_is_seen() {
    need!("nbdsh");
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", 4 * MIB)).args("--shards 2").start();
    daemon.wait_hydrated();
    let waiting = |document: &MetricsDocument| -> u64 { slices(document).map(|s| s.queue.suspended_waiting).sum() };
    assert_eq!(waiting(&metrics(&daemon)), 0);
    daemon.done(&["suspend", "vm"]);
    std::thread::scope(|scope| {
        let uri = daemon.uri();
        scope.spawn(move || {
            nbdsh(&uri, "h = connect()\nbuffers = [nbd.Buffer(512) for _ in range(3)]\ncookies = [h.aio_pread(b, 0) for b in buffers]\nwhile cookies:\n  cookies = [c for c in cookies if not h.aio_command_completed(c)]\n  if cookies: h.poll(-1)")
        });
        wait_for("three reads that wait", Duration::from_secs(20), || waiting(&metrics(&daemon)) == 3);
        assert_eq!(slices(&metrics(&daemon)).map(|slice| slice.queue.in_flight).sum::<u64>(), 0);
        daemon.done(&["resume", "vm"]);
    });
    let after = metrics(&daemon);
    assert_eq!((waiting(&after), io(&after, Kind::Read).0), (0, 3));
    daemon.stop();
}
