//! Devices that fail, shards that do not answer.

use super::super::clone::{Setup, SimClone};
use super::super::disk::{Op, SimDisk};
use super::{content, result, scenario, scenario_of, start};
use crate::clone_state::Mode;
use crate::error::ErrorKind;
use crate::io_frontend::request::RequestFlags;
use crate::shard::ShardRequest;
use crate::units::{ByteRange, ShardIndex};
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;

fn setup() -> Setup {
    Setup { size: 64 * REGION, shards: 2, regions_per_zone: 8, ..Setup::default() }
}

/// Region 0 is hydrated and flushed, region 1 hydrated; then the next commit fails.
async fn after_a_failed_commit(clone: Rc<SimClone>, break_it: impl Fn(&SimClone)) {
    clone.write_flags(0, &[1; 4096], RequestFlags::FUA).await.unwrap();
    clone.write(REGION, &[2; 4096]).await.unwrap();
    break_it(&clone);
    assert!(clone.flush().await.is_err());
    assert_eq!(clone.state.mode(), Mode::ReadOnly);
    // Whatever it was is over, but what was lost is lost.
    clone.devices.destination.clear_fault();
    clone.devices.metadata.clear_fault();
    for _ in 0..3 {
        let error = clone.flush().await.unwrap_err();
        assert_eq!((error.kind(), error.kind().nbd()), (ErrorKind::ReadOnly, 5));
        assert!(clone.write_flags(0, &[1; 10], RequestFlags::FUA).await.is_err());
        assert!(clone.write_flags(REGION, &[1; 10], RequestFlags::FUA).await.is_err());
    }
    clone.write(100, &[3; 100]).await.unwrap();
    assert_eq!(clone.read(100, 100).await.unwrap(), [3; 100]);
    clone.write(REGION, &[4; 4096]).await.unwrap();
    clone.trim(0, REGION).await.unwrap();
    for at in [5 * REGION, 20 * REGION] {
        assert_eq!(clone.write(at, &[5; 4096]).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(clone.write(at, &[5; 10]).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(clone.trim(at, REGION).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        let zeroes = clone.write_zeroes(at, REGION, RequestFlags::empty()).await;
        assert_eq!(zeroes.unwrap_err().kind(), ErrorKind::ReadOnly);
        let source = clone.devices.source.content();
        assert_eq!(clone.read(at, REGION).await.unwrap(), source[at as usize..(at + REGION) as usize]);
    }
    let hydrated = clone.state.hydrated();
    clone.enable_hydration(true);
    clone.sim.sleep(Duration::from_secs(5)).await;
    assert_eq!(clone.state.hydrated(), hydrated, "no hydration without metadata");
    assert!(!clone.state.is_complete());
}

fn fail(disk: &SimDisk, what: fn(&Op) -> bool) {
    disk.set_fault(move |op| what(op).then_some(libc::EIO));
}

#[test]
fn a_failed_metadata_write_makes_read_only() {
    scenario(&setup(), |clone| after_a_failed_commit(clone, |c| fail(&c.devices.metadata, Op::is_change)));
}
#[test]
fn a_failed_metadata_flush_makes_read_only() {
    scenario(&setup(), |clone| after_a_failed_commit(clone, |c| fail(&c.devices.metadata, |op| *op == Op::Flush)));
}
#[test]
fn a_failed_destination_flush_makes_read_only() {
    scenario(&setup(), |clone| after_a_failed_commit(clone, |c| fail(&c.devices.destination, |op| *op == Op::Flush)));
}
/// A flush that fails once has lost what it failed on, and would succeed without it if it were tried again.
#[test]
fn a_flush_that_fails_once_is_not_tried_again() {
    for of_metadata in [false, true] {
        scenario(&setup(), |clone| {
            after_a_failed_commit(clone, move |c| {
                let disk = if of_metadata { &c.devices.metadata } else { &c.devices.destination };
                let mut errno = Some(libc::EIO);
                disk.set_fault(move |op| if *op == Op::Flush { errno.take() } else { None });
            })
        });
    }
}
/// A shard's bits are lost to the coordinator: no later flush may say that they are durable.
#[test]
fn a_shard_that_does_not_answer_makes_read_only() {
    scenario(&setup(), |clone| {
        after_a_failed_commit(clone, |c| {
            c.net.break_calls(|to, request| to == ShardIndex(0) && matches!(request, ShardRequest::Snapshot { .. }));
        })
    });
    scenario(&setup(), |clone| {
        after_a_failed_commit(clone, |c| {
            c.net.break_calls(|_, request| matches!(request, ShardRequest::Committed { .. }));
        })
    });
}

#[test]
fn a_destination_that_is_gone_fails_the_clone() {
    scenario(&setup(), |clone| async move {
        clone.write(0, &[1; 4096]).await.unwrap();
        clone.devices.destination.set_fault(|op| (*op == Op::Flush).then_some(libc::ENODEV));
        assert!(clone.flush().await.is_err());
        assert_eq!(clone.state.mode(), Mode::Failed);
        assert_eq!(clone.read(0, 1).await.unwrap_err().kind(), ErrorKind::Failed);
        assert_eq!(clone.flush().await.unwrap_err().kind(), ErrorKind::Failed);
    });
}

#[test]
fn one_bad_place_of_the_source_keeps_only_its_region_back() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        let bad = ByteRange::new(13 * REGION + 700, 1).unwrap();
        clone.devices.source.set_bad(vec![bad]);
        clone.sim.sleep(Duration::from_secs(1)).await;
        assert_eq!((clone.state.hydrated(), clone.stats().failed_regions), (63, 1));
        let error = clone.read(13 * REGION + 700, 1).await.unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert_eq!(clone.read(12 * REGION, 3 * REGION).await.unwrap_err().errno(), libc::EIO);
        assert_eq!(
            clone.read(13 * REGION + 701, 100).await.unwrap()[0],
            clone.devices.source.content()[13 * 4096 + 701]
        );
        assert_eq!(clone.write(13 * REGION, &[1; 10]).await.unwrap_err().errno(), libc::EIO);
        // It does not try all the time.
        let failures = clone.stats().copy_failures;
        clone.sim.sleep(Duration::from_secs(100)).await;
        assert!((2..10).contains(&(clone.stats().copy_failures - failures)), "{}", clone.stats().copy_failures);
        // Overwriting heals.
        clone.write(13 * REGION, &[7; 4096]).await.unwrap();
        clone.completed().await;
        clone.sim.sleep(Duration::from_millis(10)).await;
        assert_eq!(clone.stats().failed_regions, 0);
        assert_eq!(clone.read(13 * REGION, REGION).await.unwrap(), [7; 4096]);
    });
}

#[test]
fn a_source_that_works_again_heals_by_itself() {
    let setup = Setup { hydration: true, size: 640 * REGION, ..setup() };
    scenario(&setup, |clone| async move {
        let bad = (0..640).step_by(7).map(|region| ByteRange::new(region * REGION, 10).unwrap()).collect();
        clone.devices.source.set_bad(bad);
        clone.sim.sleep(Duration::from_secs(300)).await;
        assert_eq!((clone.state.hydrated(), clone.stats().failed_regions), (640 - 92, 92));
        clone.devices.source.set_bad(vec![]);
        clone.sim.sleep(Duration::from_secs(130)).await;
        assert!(clone.state.is_complete(), "{} are hydrated", clone.state.hydrated());
    });
}

#[test]
fn a_lost_source_pauses_hydration_and_its_return_resumes_it() {
    for wakes in [true, false] {
        let setup = Setup { hydration: true, size: 640 * REGION, threshold: 8, ..setup() };
        scenario_of(&setup, content(setup.size), 0..4, |clone| async move {
            clone.sim.sleep(Duration::from_millis(2)).await;
            clone.devices.source.lost.set(true);
            clone.sim.sleep(Duration::from_secs(60)).await;
            assert!(clone.stats().hydration_paused > 0 && clone.stats().failed_regions == 0);
            assert_eq!(clone.event_kinds(), ["hydration_started", "hydration_failed"], "once, however many shards");
            let hydrated = clone.state.hydrated();
            assert!(hydrated < 640);
            // What is in the destination can be used meanwhile, and overwriting needs no source.
            let waits = start(&clone, {
                let clone = clone.clone();
                async move { clone.read(639 * REGION, 10).await }
            });
            clone.write(600 * REGION, &[1; 4096]).await.unwrap();
            clone.flush().await.unwrap();
            assert_eq!(result(&clone, &waits).await.unwrap_err().kind(), ErrorKind::SourceLost);
            clone.devices.source.lost.set(false);
            if wakes {
                clone.wake();
            }
            clone.sim.sleep(Duration::from_secs(if wakes { 5 } else { 70 })).await;
            assert!(clone.state.is_complete(), "{} are hydrated", clone.state.hydrated());
            assert_eq!(clone.event_kinds()[2..], ["hydration_started", "hydration_completed"]);
        });
    }
}

/// Asking a lost source what is allocated must not wait for each of many runs.
#[test]
fn status_waits_for_a_lost_source_once() {
    scenario(&setup(), |clone| async move {
        for region in (0..64).step_by(2) {
            clone.write(region * REGION, &[1; 4096]).await.unwrap();
        }
        clone.devices.source.lost.set(true);
        let before = clone.sim.now();
        let extents = clone.status(0, 8 * REGION).await.unwrap();
        assert_eq!(extents.hydrated.len(), 8);
        assert!(clone.sim.now() - before < 2 * clone.devices.source.patience.get());
        assert_eq!(extents.allocation.iter().map(|e| e.len).sum::<u64>(), 8 * REGION);
    });
}

/// A region that is overwritten while its read waits for a lost source can be answered.
#[test]
fn a_read_of_what_was_overwritten_meanwhile_does_not_fail_with_the_source() {
    let setup = Setup { size: 4 << 20, region_size: 1 << 20, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.devices.source.lost.set(true);
        let other = clone.clone();
        let read = start(&clone, async move { other.read(1 << 20, 100).await });
        clone.sim.sleep(Duration::from_secs(1)).await;
        clone.write(1 << 20, &vec![3; 1 << 20]).await.unwrap();
        assert_eq!(result(&clone, &read).await.unwrap(), [3; 100]);
    });
}

#[test]
fn a_full_destination_is_told_and_outlived() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::ENOSPC));
        let error = clone.write(20 * REGION, &[1; 4096]).await.unwrap_err();
        assert_eq!((error.kind(), error.kind().nbd()), (ErrorKind::NoSpace, 28));
        clone.sim.sleep(Duration::from_secs(30)).await;
        assert_eq!((clone.state.hydrated(), clone.state.mode()), (0, Mode::ReadWrite));
        assert!(clone.stats().hydration_paused > 0);
        assert!(clone.stats().copy_failures < 100, "{}", clone.stats().copy_failures);
        let source = clone.devices.source.content();
        assert_eq!(clone.read(0, setup_size(&clone)).await.unwrap(), source[..]);
        clone.flush().await.unwrap();
        clone.devices.destination.clear_fault();
        clone.sim.sleep(Duration::from_secs(60)).await;
        assert!(clone.state.is_complete());
    });
}

fn setup_size(clone: &SimClone) -> u64 {
    clone.geometry().size()
}

/// The server does not answer questions about allocation: everything is data then.
#[test]
fn a_source_that_refuses_allocation_is_copied() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.refuses_allocation.set(true);
        clone.sim.sleep(Duration::from_secs(1)).await;
        assert!(clone.state.is_complete(), "{} are hydrated", clone.state.hydrated());
    });
}

/// A frontend that breaks its promise and drops a request must not make the clone look busy for ever.
#[test]
fn a_request_that_is_dropped_is_not_counted_for_ever() {
    scenario(&setup(), |clone| async move {
        clone.devices.source.held.set(true);
        for _ in 0..10 {
            let read = clone.read(0, 100);
            futures_lite::future::or(async { _ = read.await }, clone.sim.sleep(Duration::from_micros(500))).await;
        }
        clone.devices.source.held.set(false);
        clone.sim.sleep(Duration::from_secs(1)).await;
        assert!(!clone.state.is_foreground_active(clone.sim.now(), Duration::from_millis(20)));
        assert_eq!((clone.state.hydrating(), clone.stats().in_flight), (0, 0));
    });
}

/// A direct FUA write whose data is written but not flushed has lost a flush like any other: writes acknowledged
/// before it may be gone with it. One that can't be written at all is its client's affair alone.
#[test]
fn a_fua_write_that_fails_in_its_flush_makes_read_only() {
    scenario(&setup(), |clone| async move {
        clone.write_flags(0, &[1; 4096], RequestFlags::FUA).await.unwrap();
        fail(&clone.devices.destination, Op::is_change);
        assert!(clone.write_flags(0, &[2; 512], RequestFlags::FUA).await.is_err());
        assert_eq!(clone.state.mode(), Mode::ReadWrite);
        fail(&clone.devices.destination, |op| matches!(op, Op::Write { fua: true, .. }));
        assert!(clone.write_flags(0, &[3; 512], RequestFlags::FUA).await.is_err());
        assert_eq!(clone.state.mode(), Mode::ReadOnly);
        clone.devices.destination.clear_fault();
        assert!(clone.flush().await.is_err());
    });
}

/// What can't be read at the edges of a direct FUA write, the block that it changes a part of, is its client's affair, also
/// when it can be read a moment later: no flush has failed.
#[test]
fn a_failed_read_at_a_fua_writes_edge_is_no_failed_flush() {
    // Within a block, the first block in part, the last one in part.
    for (offset, len) in [(100, 100), (700, 1348), (512, 700)] {
        scenario(&setup(), move |clone| async move {
            clone.write_flags(0, &[1; 4096], RequestFlags::FUA).await.unwrap();
            clone.devices.destination.clear_log();
            let mut reads = 0;
            clone.devices.destination.set_fault(move |op| {
                reads += u32::from(matches!(op, Op::Read(_)));
                (matches!(op, Op::Read(_)) && reads == 1).then_some(libc::EIO)
            });
            let error = clone.write_flags(offset, &vec![2; len], RequestFlags::FUA).await.unwrap_err();
            assert_eq!((error.kind(), clone.state.mode()), (ErrorKind::Io, Mode::ReadWrite));
            let log = clone.devices.destination.log();
            assert!(matches!(log[..], [(_, Op::Read(_))]), "nothing was written: {log:?}");
            clone.write_flags(offset, &vec![3; len], RequestFlags::FUA).await.unwrap();
            clone.flush().await.unwrap();
            let mut expected = [1; 4096];
            expected[offset as usize..][..len].fill(3);
            assert_eq!(clone.read(0, 4096).await.unwrap(), expected);
        });
    }
}

#[test]
fn copies_that_fail_are_not_counted_as_hydrated() {
    let setup = Setup { hydration: true, ..setup() };
    // Half of it zeros, which are not written as data.
    let data = [content(32 * REGION), vec![0; 32 * REGION as usize]].concat();
    scenario_of(&setup, data, 0..10, |clone| async move {
        clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::ENOSPC));
        clone.sim.sleep(Duration::from_secs(600)).await;
        assert!(clone.read(REGION, 100).await.is_ok());
        assert_eq!(clone.write(2 * REGION, &[1; 100]).await.unwrap_err().kind(), ErrorKind::NoSpace);
        clone.sim.sleep(Duration::from_secs(1)).await;
        let stats = clone.stats();
        assert_eq!(clone.state.hydrated(), 0);
        assert_eq!((stats.hydrated_bytes, stats.copied_bytes, stats.zero_bytes), (0, 0, 0));
        assert!(stats.source_read_bytes >= 2 * REGION, "{stats:?}");
        clone.devices.destination.clear_fault();
        clone.completed().await;
        let stats = clone.stats();
        assert_eq!((stats.hydrated_bytes, stats.zero_bytes), (64 * REGION, 32 * REGION));
        assert!(stats.copied_bytes <= 64 * REGION && stats.source_read_bytes > stats.copied_bytes, "{stats:?}");
    });
}

/// It may have been dropped together with a write that came over it: whatever its own end, it is not durable for sure.
#[test]
fn a_fua_write_during_a_flush_that_fails_is_not_acknowledged() {
    let setup = setup();
    scenario(&setup, |clone| async move {
        let destination = &clone.devices.destination;
        clone.write(0, &[1; 4096]).await.unwrap();
        clone.flush().await.unwrap();
        destination.set_gate(|op| matches!(op, Op::Write { fua: true, .. }));
        let writer = clone.clone();
        let write = start(&clone, async move { writer.write_flags(0, &[2; 4096], RequestFlags::FUA).await });
        clone.sim.sleep(Duration::from_millis(5)).await;
        fail(destination, |op| *op == Op::Flush);
        clone.flush().await.unwrap_err();
        destination.clear_fault();
        destination.clear_gate();
        assert_eq!(result(&clone, &write).await.unwrap_err().kind(), ErrorKind::ReadOnly);
    });
}
