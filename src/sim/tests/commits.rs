//! What flushes cost, what they promise, and how the coordinator ends.

use super::super::clone::{Devices, Setup, SimClone};
use super::super::disk::Op;
use super::super::executor::Sim;
use super::{content, result, scenario, start};
use crate::coordinator::COMMIT_INTERVAL;
use crate::error::ErrorKind;
use crate::io_frontend::request::RequestFlags;
use std::time::Duration;

fn setup() -> Setup {
    Setup { size: 64 * 4096, shards: 3, regions_per_zone: 4, ..Setup::default() }
}

#[test]
fn flushes_that_come_together_share_commits() {
    scenario(&setup(), |clone| async move {
        for i in 0..16u64 {
            clone.write(i * 4 * 4096, &[1; 4096]).await.unwrap();
        }
        let (destination, metadata) = (&clone.devices.destination, &clone.devices.metadata);
        destination.clear_log();
        metadata.clear_log();
        let flushes: Vec<_> = (0..64)
            .map(|_| {
                let other = clone.clone();
                start(&clone, async move { other.flush().await.unwrap() })
            })
            .collect();
        for flush in flushes {
            result(&clone, &flush).await;
        }
        clone.sim.sleep(Duration::from_millis(500)).await;
        assert!(destination.flushes() <= 4, "{} destination flushes for 64 at once", destination.flushes());
        assert!(metadata.flushes() <= 1, "{} metadata flushes", metadata.flushes());
    });
}

#[test]
fn one_flush_is_one_flush() {
    scenario(&setup(), |clone| async move {
        let (destination, metadata) = (&clone.devices.destination, &clone.devices.metadata);
        clone.write(0, &[1; 4096]).await.unwrap();
        destination.clear_log();
        metadata.clear_log();
        clone.flush().await.unwrap();
        let log: Vec<Op> = metadata.log().iter().map(|(_, op)| *op).collect();
        assert!(matches!(log[..], [Op::Write { range, .. }, Op::Flush] if range.len() == 4096), "{log:?}");
        assert_eq!(destination.flushes(), 1);
        // Without new bits it is a flush of the destination; so it is after a write to a hydrated region.
        clone.write(100, &[2; 100]).await.unwrap();
        metadata.clear_log();
        clone.flush().await.unwrap();
        assert_eq!((destination.flushes(), metadata.log().len()), (2, 0));
        // And nothing happens afterwards.
        clone.sim.sleep(3 * COMMIT_INTERVAL).await;
        assert_eq!((destination.flushes(), metadata.log().len()), (2, 0));
        assert_eq!(clone.coordinator.stats().commits, 2);
    });
}

/// Two flushes just one after the other: the second one's wake must not cost a third flush.
#[test]
fn flushes_in_close_succession_cost_no_more_flushes_than_there_are() {
    scenario(&setup(), |clone| async move {
        clone.write(0, &[1; 4096]).await.unwrap();
        clone.devices.destination.clear_log();
        for _ in 0..5 {
            let flush = |_| {
                let other = clone.clone();
                start(&clone, async move { other.flush().await.unwrap() })
            };
            for flush in [0, 1].map(flush) {
                result(&clone, &flush).await;
            }
        }
        clone.sim.sleep(Duration::from_millis(100)).await;
        assert!(clone.devices.destination.flushes() <= 10, "{} flushes", clone.devices.destination.flushes());
        let stats = clone.coordinator.stats();
        assert!(stats.commits <= stats.requests, "{stats:?}");
    });
}

#[test]
fn fua_on_a_durable_region_takes_no_commit() {
    scenario(&setup(), |clone| async move {
        clone.write_flags(0, &[1; 4096], RequestFlags::FUA).await.unwrap();
        assert_eq!(clone.coordinator.stats().requests, 1);
        clone.devices.destination.clear_log();
        clone.write_flags(1000, &[2; 10], RequestFlags::FUA).await.unwrap();
        assert_eq!(clone.coordinator.stats().requests, 1);
        let log = clone.devices.destination.log();
        assert!(log.iter().any(|(_, op)| matches!(op, Op::Write { fua: true, .. })), "{log:?}");
        assert_eq!(clone.devices.destination.flushes(), 0);
        // A zone with bits that are not durable yet takes one.
        clone.write(4096, &[1; 4096]).await.unwrap();
        clone.write_flags(4096, &[2; 10], RequestFlags::FUA).await.unwrap();
        assert_eq!(clone.coordinator.stats().requests, 2);
    });
}

#[test]
fn without_a_flush_bits_are_committed_every_second() {
    scenario(&setup(), |clone| async move {
        clone.sim.sleep(COMMIT_INTERVAL / 10).await;
        clone.devices.metadata.clear_log();
        clone.write(4096, &[1; 4096]).await.unwrap();
        clone.sim.sleep(COMMIT_INTERVAL / 2).await;
        assert_eq!(clone.devices.metadata.flushes(), 0);
        clone.sim.sleep(COMMIT_INTERVAL).await;
        assert_eq!((clone.devices.metadata.flushes(), clone.devices.metadata.changes()), (1, 1));
        // After a discard too.
        clone.trim(8 * 4096, 8 * 4096).await.unwrap();
        clone.sim.sleep(COMMIT_INTERVAL * 3 / 2).await;
        assert_eq!(clone.devices.metadata.flushes(), 2);
    });
}

/// Flushes, and the tick of every second, at any moment around the end.
#[test]
fn the_last_commit_is_made_however_busy_the_end_is() {
    for seed in super::seeds(0..60) {
        let _seed = super::Seed(seed);
        let (sim, setup) = (Sim::new(seed), setup());
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            for i in 0..8u64 {
                let other = clone.clone();
                let after = Duration::from_micros(990_000 + sim.draw(|rng| rng.below(20_000)));
                sim.spawn(async move {
                    other.sim.sleep(after).await;
                    other.write(i * 8 * 4096, &[9; 4096]).await.unwrap();
                    if i % 2 == 0 {
                        // The clone may be gone meanwhile.
                        let _ = other.flush().await;
                    }
                });
            }
            sim.sleep(Duration::from_micros(990_000 + sim.draw(|rng| rng.below(20_000)))).await;
            clone.state.set_stopping();
            sim.sleep(Duration::from_millis(30)).await;
            clone.write(63 * 4096, &[8; 4096]).await.unwrap();
            clone.stop().await.unwrap();
            sim.sleep(Duration::from_millis(100)).await;
            let error = clone.coordinator.commit().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Shutdown);
        });
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert_eq!(sim.block_on(clone.read(63 * 4096, 4096)).unwrap(), [8; 4096]);
        sim.kill_all();
    }
}

#[test]
fn completion_is_recorded_and_told_once() {
    let setup = Setup { hydration: true, ..setup() };
    for seed in super::seeds(0..20) {
        let _seed = super::Seed(seed);
        let sim = Sim::new(seed);
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            clone.completed().await;
            sim.sleep(Duration::from_millis(50)).await;
            assert_eq!(clone.state.events().count().dm, 1, "{:?}", clone.state.events().count());
            assert_eq!(clone.state.hydrating(), 0);
            assert!((0..3).all(|shard| clone.slice(shard).source().is_err()));
            assert_eq!(clone.stats().copied_bytes, setup.size, "every byte once");
        });
        // Whoever comes back finds it complete, and tells nobody.
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert!(clone.state.is_complete() && clone.state.events().count().all == 0);
        devices.source.clear_reads();
        assert_eq!(sim.block_on(clone.read(0, setup.size)).unwrap(), content(setup.size));
        assert!(devices.source.reads().is_empty());
        sim.kill_all();
    }
}
