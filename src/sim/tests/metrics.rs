//! What slices and coordinators count: every part on one route, every region once, every request in one histogram.

use super::super::clone::{Devices, Setup, SimClone};
use super::super::executor::Sim;
use super::super::seeds;
use super::random::{random_content, random_range, random_setup};
use super::{Seed, result, scenario, scenario_of, start};
use crate::clone_state::AUTOMATIC;
use crate::io_frontend::request::{Completion, Request, RequestFlags};
use crate::metrics::record::{Kind, Route};
use crate::metrics::schema::{PartCount, SliceMetrics};
use crate::units::ByteRange;
use bytes::Bytes;
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;

fn slices(clone: &SimClone) -> Vec<SliceMetrics> {
    (0..clone.net.shards()).map(|shard| clone.slice(shard).metrics()).collect()
}

fn sum(clone: &SimClone, pick: impl Fn(&SliceMetrics) -> u64) -> u64 {
    slices(clone).iter().map(pick).sum()
}

fn part(clone: &SimClone, route: Route) -> PartCount {
    PartCount {
        parts: sum(clone, |slice| slice.routes.of(route).parts),
        bytes: sum(clone, |slice| slice.routes.of(route).bytes),
    }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn write(start: u64, len: u64) -> Request {
    Request::Write { offset: start, data: Bytes::from(vec![7; len as usize]), flags: RequestFlags::empty() }
}
fn trim(start: u64, len: u64) -> Request {
    Request::Trim { range: range(start, len), flags: RequestFlags::empty() }
}
fn write_zeroes(start: u64, len: u64) -> Request {
    Request::WriteZeroes { range: range(start, len), flags: RequestFlags::empty() }
}

/// Carries out the request, and says what its parts were counted on.
async fn routes_of(clone: &SimClone, request: Request) -> Vec<(Route, u64, u64)> {
    let before: Vec<PartCount> = Route::ALL.iter().map(|route| part(clone, *route)).collect();
    clone.submit(0, request).await.unwrap();
    // What is kept of a read, too, is in the destination by then.
    clone.sim.sleep(Duration::from_millis(50)).await;
    let changes = Route::ALL.iter().zip(before).map(|(route, before)| {
        let after = part(clone, *route);
        (*route, after.parts - before.parts, after.bytes - before.bytes)
    });
    changes.filter(|(_, parts, _)| *parts > 0).collect()
}

#[test]
fn each_route_counts_what_took_it_and_nothing_else() {
    let setup = Setup { size: 32 * REGION, regions_per_zone: 8, shards: 2, ..Setup::default() };
    scenario(&setup, |clone| async move {
        use Route::*;
        let r = REGION;
        let steps = [
            (Request::Read(range(100, 200)), vec![(ReadSourceKept, 1, 200)]),
            (Request::Read(range(0, r)), vec![(ReadDestination, 1, r)]),
            (Request::Read(range(r - 10, 30)), vec![(ReadDestination, 1, 10), (ReadSourceKept, 1, 20)]),
            (write(0, 2 * r), vec![(WriteDestination, 1, 2 * r)]),
            (write(2 * r, 2 * r), vec![(WriteWholeRegion, 1, 2 * r)]),
            (write(4 * r + 1, 10), vec![(WritePartialRegion, 1, 10)]),
            // Over the border of two zones, which belong to different shards.
            (write(4 * r, 5 * r), vec![(WriteDestination, 1, r), (WriteWholeRegion, 2, 4 * r)]),
            (trim(0, r), vec![(TrimDestination, 1, r)]),
            (trim(1, 100), vec![(TrimIgnored, 1, 100)]),
            (trim(9 * r, 2 * r), vec![(TrimWholeRegion, 1, 2 * r)]),
            (trim(11 * r + 1, 2 * r), vec![(TrimWholeRegion, 1, r), (TrimIgnored, 2, r)]),
            (write_zeroes(0, r), vec![(WriteZeroesDestination, 1, r)]),
            (write_zeroes(13 * r, r), vec![(WriteZeroesWholeRegion, 1, r)]),
            (write_zeroes(14 * r, r / 2), vec![(WriteZeroesPartialRegion, 1, r / 2)]),
            (Request::Cache(range(16 * r, 2 * r)), vec![(CacheCopied, 1, 2 * r)]),
            (Request::Cache(range(17 * r, 2 * r)), vec![(CacheHydrated, 1, r), (CacheCopied, 1, r)]),
            (Request::Status(range(0, 32 * r)), vec![]),
            (Request::Flush, vec![]),
        ];
        for (request, expected) in steps {
            let what = format!("{request:?}");
            assert_eq!(routes_of(&clone, request).await, expected, "{what}");
        }
        let by = |pick: fn(&SliceMetrics) -> u64| sum(&clone, pick);
        assert_eq!(by(|slice| slice.hydration.by.read), 2);
        assert_eq!(by(|slice| slice.hydration.by.overwrite), 2 + 4);
        assert_eq!(by(|slice| slice.hydration.by.discard), 2 + 1 + 1);
        assert_eq!(by(|slice| slice.hydration.by.partial_write), 1 + 1);
        assert_eq!(by(|slice| slice.hydration.by.cache), 3);
        let io = &slices(&clone)[0].io;
        assert_eq!((io.read.requests, io.read.bytes), (3, 200 + REGION + 30), "zone 0 is shard 0's");
        assert_eq!(sum(&clone, |slice| slice.io.status.requests), 4, "one for each zone");
    });
}

#[test]
fn a_read_of_a_large_region_goes_past_it() {
    let region = 1 << 20;
    let setup = Setup { size: 4 * region, region_size: region, ..Setup::default() };
    scenario(&setup, |clone| async move {
        let found = routes_of(&clone, Request::Read(range(5, 100))).await;
        assert_eq!(found, [(Route::ReadSourcePast, 1, 100)]);
        assert_eq!((clone.stats().source_read_bytes, clone.stats().read_past_bytes), (100, 100));
        assert_eq!(clone.stats().hydrated_bytes, 0);
    });
}

#[test]
fn holes_of_the_source_are_told_from_what_is_copied() {
    let setup = Setup { size: 32 * REGION, shards: 1, ..Setup::default() };
    let content = [vec![0; 20 * 4096], vec![1; 12 * 4096]].concat();
    scenario_of(&setup, content, 0..10, |clone| async move {
        clone.enable_hydration(true);
        clone.completed().await;
        let hydration = &slices(&clone)[0].hydration;
        assert_eq!((hydration.by.zeroes, hydration.by.background), (20, 12));
        assert_eq!((hydration.zero_bytes, hydration.copied_bytes), (20 * REGION, 12 * REGION));
        assert_eq!((clone.stats().hydrated_bytes, clone.stats().source_read_bytes), (32 * REGION, 12 * REGION));
    });
}

#[test]
fn requests_that_fail_are_counted_and_not_timed() {
    let setup = Setup { size: 8 * REGION, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.devices.source.set_bad(vec![range(0, REGION)]);
        assert!(clone.read(0, 100).await.is_err());
        assert!(clone.read(REGION, 100).await.is_ok());
        let slice = &slices(&clone)[0];
        assert_eq!((slice.io.read.requests, slice.io.read.bytes, slice.io.read.errors), (2, 200, 1));
        assert_eq!(slice.latency_us.read.source.as_ref().unwrap().count, 1);
        assert_eq!((slice.routes.read_source_kept.parts, slice.routes.read_source_past.parts), (1, 0));
        // The unit, then what the client wanted of it; and the good one.
        assert_eq!((slice.hydration.source_read.requests, slice.hydration.source_read.errors), (3, 2));
        assert_eq!(slice.hydration.source_read_latency_us.as_ref().unwrap().count, 1);
    });
}

#[test]
fn who_waits_shows_while_it_does() {
    let setup = Setup { size: 8 * REGION, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.devices.source.held.set(true);
        let waiting = {
            let clone = clone.clone();
            start(&clone.clone(), async move {
                let read = clone.submit(0, Request::Read(range(0, 100)));
                let write = clone.submit(0, write(50, 100));
                let (a, b) = futures_lite::future::zip(read, write).await;
                a.and(b).unwrap();
            })
        };
        clone.sim.sleep(Duration::from_millis(20)).await;
        let queue = &slices(&clone)[0].queue;
        assert_eq!((queue.in_flight, queue.holds, queue.hold_waiting, queue.hold_waits), (2, 2, 1, 1));
        clone.devices.source.held.set(false);
        result(&clone, &waiting).await;
        clone.sim.sleep(Duration::from_millis(50)).await;
        let slice = &slices(&clone)[0];
        let queue = &slice.queue;
        assert_eq!((queue.in_flight, queue.holds, queue.hold_waiting, queue.hold_waits), (0, 0, 0, 1));
        assert_eq!((queue.in_flight_max, queue.hold_waiting_max), (2, 1));
        // The time that the source was held is in both.
        let (read, write) = (&slice.latency_us.read.source, &slice.latency_us.write.source);
        for times in [read, write] {
            assert!(times.as_ref().unwrap().min > 15_000, "{times:?}");
        }
    });
}

/// Random clients on all shards while it hydrates, with nothing that fails.
#[test]
fn accounts_of_random_requests_add_up() {
    for seed in seeds(0..60) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let (setup, content) = sim.draw(|rng| {
            let setup = Setup { hydration: true, threshold: AUTOMATIC, ..random_setup(rng) };
            let content = random_content(rng, setup.size);
            (setup, content)
        });
        let devices = Devices::new(&sim, &setup, content);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            let clients: Vec<_> = (0..4).map(|_| start(&clone, client(clone.clone(), setup.clone()))).collect();
            for client in &clients {
                result(&clone, client).await;
            }
            clone.completed().await;
            // The commit that says so ends.
            sim.sleep(Duration::from_millis(10)).await;
        });
        check_accounts(&clone);
        sim.kill_all();
    }
}

async fn client(clone: Rc<SimClone>, setup: Setup) {
    for _ in 0..12 {
        let (kind, range, via, fua) = clone
            .sim
            .draw(|rng| (rng.below(6), random_range(rng, &setup, setup.size), rng.below(4) as usize, rng.one_in(8)));
        let flags = if fua { RequestFlags::FUA } else { RequestFlags::empty() };
        let request = match kind {
            0 => Request::Read(range),
            1 => {
                let data = Bytes::from(vec![9; range.len() as usize]);
                Request::Write { offset: range.start(), data, flags }
            }
            2 => Request::Trim { range, flags },
            3 => Request::WriteZeroes { range, flags },
            4 => Request::Cache(range),
            _ => Request::Status(range),
        };
        let _: Completion = clone.submit(via, request).await.unwrap();
    }
}

fn check_accounts(clone: &SimClone) {
    for (shard, slice) in slices(clone).iter().enumerate() {
        let (hydration, routes, by) = (&slice.hydration, &slice.routes, &slice.hydration.by);
        for kind in Kind::ALL {
            let prefix = format!("{kind:?}");
            let of_kind = Route::ALL.iter().filter(|route| {
                let name = format!("{route:?}");
                // "Write" begins "WriteZeroes" too.
                name.starts_with(&prefix) && (*kind == Kind::WriteZeroes || !name.starts_with("WriteZeroes"))
            });
            let routed: u64 = of_kind.map(|route| routes.of(*route).bytes).sum();
            let io = slice.io.of(*kind);
            assert_eq!(io.errors, 0);
            if *kind != Kind::Status {
                assert_eq!(routed, io.bytes, "shard {shard}: {kind:?} in {routes:?}");
            }
            let times = slice.latency_us.of(*kind);
            let timed: u64 = [&times.destination, &times.source].into_iter().flatten().map(|times| times.count).sum();
            assert_eq!(timed, io.requests, "shard {shard}: {kind:?}");
        }
        let all = by.background + by.zeroes + by.read + by.cache + by.partial_write + by.overwrite + by.discard;
        assert_eq!((all, hydration.hydrated_regions), (hydration.regions, hydration.regions), "shard {shard}: {by:?}");
        let batches = hydration.batch_regions.as_ref().map_or(0, |regions| regions.sum);
        assert_eq!(batches, by.background + by.zeroes, "shard {shard}");
        let queue = &slice.queue;
        let left = [queue.in_flight, queue.holds, queue.hold_waiting, queue.copy_memory_waiting];
        assert_eq!((left, hydration.batches_in_flight, slice.memory.copy_bytes), ([0; 4], 0, 0));
        assert_eq!(slice.memory.map_bytes, 0, "it was let go of");
    }
    let reads = clone.devices.source.reads();
    assert_eq!(sum(clone, |slice| slice.hydration.source_read.requests), reads.len() as u64);
    let bytes: u64 = reads.iter().map(|range| range.len()).sum();
    assert_eq!(sum(clone, |slice| slice.hydration.source_read.bytes), bytes);
    let stats = clone.stats();
    assert_eq!((stats.source_read_bytes, stats.copied_bytes + stats.read_past_bytes), (bytes, bytes));

    let commits = clone.coordinator.metrics().commits;
    let times = commits.latency_us.unwrap();
    assert_eq!((times.count, commits.failures, commits.waiting), (commits.commits, 0, 0));
    assert_eq!(commits.destination_flush_us.unwrap().count, commits.commits);
    assert_eq!(commits.metadata_flush_us.unwrap().count, commits.commits - commits.flushes_only);
    assert_eq!(commits.requests_per_commit.unwrap().sum, commits.requests);
    assert_eq!(commits.request_latency_us.unwrap().count, commits.requests);
}
