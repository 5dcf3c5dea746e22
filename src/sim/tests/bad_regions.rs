//! Copies that fail: which regions are bad, what they keep back, when hydration stops, and how it goes on.

use super::super::clone::{OLD_DESTINATION, Setup, SimClone};
use super::{content, scenario, scenario_of};
use crate::error::ErrorKind;
use crate::hydration_failures::{FAILURES_MAX_DEFAULT, FAILURES_PER_PAUSE};
use crate::meta::growth::Wanted;
use crate::units::{ByteRange, RegionIndex};
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;
/// Longer than any delay. A simulation waits an hour at most.
const LONG: Duration = Duration::from_secs(300);

fn setup() -> Setup {
    Setup { size: 64 * REGION, shards: 2, regions_per_zone: 8, ..Setup::default() }
}

fn regions(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * REGION, count * REGION).unwrap()
}

fn bad_regions(clone: &SimClone) -> Vec<u64> {
    let report = clone.state.failure_report();
    let bad: Vec<_> = report.bad_runs.iter().flat_map(|run| run.iter().map(|region| region.0)).collect();
    assert!(report.bad_runs.len() == 32 || bad.len() as u64 == report.bad_regions, "{report:?}");
    bad
}

fn last_text(clone: &SimClone, kind: &str) -> String {
    let events = clone.log.after(0, None).events;
    events.into_iter().rfind(|event| event.kind.name() == kind).map(|event| event.text).unwrap_or_default()
}

async fn until(clone: &SimClone, what: &str, is: impl Fn(&SimClone) -> bool) {
    let end = clone.sim.now() + Duration::from_secs(3500);
    while !is(clone) {
        assert!(clone.sim.now() < end, "never {what}: {:?}", clone.event_kinds());
        clone.sim.sleep(Duration::from_millis(5)).await;
    }
}

async fn until_stopped(clone: &SimClone) {
    until(clone, "stopped", |clone| clone.state.is_hydration_stopped()).await;
}

/// A stopped clone of a source that reads nothing.
async fn stopped(clone: &Rc<SimClone>, max: u32) {
    clone.devices.source.set_bad(vec![clone.geometry().whole()]);
    clone.state.set_hydration_failures_max(max);
    clone.enable_hydration(true);
    until_stopped(clone).await;
}

#[test]
fn it_stops_serves_and_goes_on_when_it_is_told_to() {
    scenario(&setup(), |clone| async move {
        stopped(&clone, 20).await;
        let mut kinds = clone.event_kinds();
        // Told again when it is known of more regions.
        kinds.dedup();
        assert_eq!(kinds, ["hydration_started", "hydration_failed", "hydration_stopped"]);
        assert_eq!(clone.state.failure_report().in_a_row, 20);
        assert_eq!(clone.state.events().count().dm, 1, "for who waits");
        let text = last_text(&clone, "hydration_stopped");
        assert!(
            text.starts_with("hydration stopped after 20 failures in a row: 64 of 64 regions are left, "),
            "{text}"
        );
        assert!(text.contains("; enable_hydration goes on; the last error: "), "{text}");
        // Two pauses were in between, however many copies were in flight.
        assert!(clone.sim.now() >= Duration::from_millis(1500), "{:?}", clone.sim.now());
        clone.sim.sleep(Duration::from_millis(100)).await;
        let reads = clone.devices.source.reads().len();
        assert_eq!(clone.state.hydrating(), 0);
        clone.sim.sleep(2 * LONG).await;
        clone.wake();
        clone.sim.sleep(LONG).await;
        assert_eq!(clone.devices.source.reads().len(), reads, "nothing is tried any more");
        // Clients are served: with errors where there is no data, and with data as soon as there is.
        assert_eq!(clone.read(0, 10).await.unwrap_err().errno(), libc::EIO);
        clone.write(3 * REGION, &[3; 4096]).await.unwrap();
        clone.flush().await.unwrap();
        clone.devices.source.set_bad(vec![]);
        assert_eq!(clone.read(REGION, 10).await.unwrap(), clone.devices.source.content()[4096..4106]);
        clone.write(5 * REGION + 1, &[5; 10]).await.unwrap();
        clone.sim.sleep(LONG).await;
        assert_eq!(clone.state.hydrated(), 3, "on demand only");
        assert!(clone.state.is_hydration_stopped());
        clone.enable_hydration(true);
        let now = clone.sim.now();
        clone.completed().await;
        assert!(clone.sim.now() < now + Duration::from_secs(1), "at once");
        let report = clone.state.failure_report();
        assert_eq!((report.in_a_row, report.bad_regions, report.last), (0, 0, None));
        let mut kinds = clone.event_kinds();
        kinds.dedup();
        assert_eq!(kinds[3], "hydration_started");
        assert_eq!(kinds.last(), Some(&"hydration_completed"));
        clone.check_events();
    });
}

#[test]
fn one_that_stays_bad_stops_again() {
    scenario(&setup(), |clone| async move {
        stopped(&clone, 3).await;
        for _ in 0..3 {
            clone.enable_hydration(true);
            clone.sim.sleep(Duration::from_secs(10)).await;
            assert!(clone.state.is_hydration_stopped());
            assert_eq!(clone.state.failure_report().in_a_row, 3);
        }
        let stops = clone.event_kinds().iter().filter(|kind| **kind == "hydration_stopped").count();
        assert!(stops >= 3, "{:?}", clone.event_kinds());
    });
}

/// Wherever bad areas are and however large: all the rest is hydrated, soon and before hydration stops; then it is known
/// exactly which regions are bad, and all of that is told.
#[test]
fn bad_areas_keep_back_nothing_else() {
    let setup = Setup { size: 2000 * REGION, hydration: true, regions_per_zone: 64, ..setup() };
    let areas: [&[(u64, u64)]; 4] =
        [&[(100, 40)], &[(0, 700)], &[(1500, 500)], &[(3, 1), (17, 2), (64, 128), (700, 33), (1999, 1)]];
    for areas in areas {
        // With seed 46 the last good regions of a zone were once kept back by hundreds of retries.
        scenario_of(&setup, content(setup.size), 43..47, |clone| async move {
            clone.devices.source.set_bad(areas.iter().map(|(first, count)| regions(*first, *count)).collect());
            let bad: Vec<u64> = areas.iter().flat_map(|(first, count)| *first..first + count).collect();
            let good = 2000 - bad.len() as u64;
            until(&clone, "all but the bad", |clone| clone.state.hydrated() == good).await;
            assert!(!clone.state.is_hydration_stopped());
            assert!(clone.sim.now() < Duration::from_secs(600), "{:?}", clone.sim.now());
            until(&clone, "all found", |clone| clone.state.failure_report().bad_regions == bad.len() as u64).await;
            assert!(!clone.state.is_hydration_stopped());
            assert_eq!(bad_regions(&clone), bad);
            until_stopped(&clone).await;
            let text = last_text(&clone, "hydration_stopped");
            let (first, count) = areas[0];
            let left = format!("{0} of 2000 regions are left, {0} of them bad: region", bad.len());
            assert!(text.contains(&left), "{text}");
            let bytes = format!(" (bytes {}+{}", first * REGION, count * REGION);
            assert!(text.contains(&bytes), "{bytes}: {text}");
            assert!(text.len() < 1000);
            assert_eq!(bad_regions(&clone), bad);
            clone.check_events();
        });
    }
}

/// The only regions left are tried again with delays that double, which counts; the delays take their time.
#[test]
fn the_last_bad_region_is_told_retried_and_healed() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.set_bad(vec![ByteRange::new(13 * REGION + 700, 1).unwrap()]);
        clone.sim.sleep(Duration::from_secs(60)).await;
        assert_eq!((clone.state.hydrated(), bad_regions(&clone)), (63, vec![13]));
        assert_eq!(clone.event_kinds(), ["hydration_started", "hydration_failed"], "told once");
        let text = last_text(&clone, "hydration_failed");
        let told = "hydration backs off: 1 region could not be copied: region 13 (bytes 53248+4096); the last error: ";
        assert!(text.starts_with(told), "{text}");
        assert_eq!(clone.state.failure_report().last.map(|last| last.errno), Some(libc::EIO));
        clone.state.set_hydration_failures_max(FAILURES_MAX_DEFAULT / 4);
        until_stopped(&clone).await;
        let minutes = clone.sim.now().as_secs() / 60;
        assert!((15..25).contains(&minutes), "{minutes}");
        assert_eq!(clone.state.failure_report().in_a_row, u64::from(FAILURES_MAX_DEFAULT / 4));
        clone.devices.source.set_bad(vec![]);
        clone.enable_hydration(true);
        clone.completed().await;
        let expected = ["hydration_stopped", "hydration_started", "bad_regions_healed", "hydration_completed"];
        assert_eq!(clone.event_kinds()[2..], expected);
        clone.check_events();
    });
}

#[test]
fn it_heals_by_itself_before_it_stops() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.source.set_bad(vec![regions(13, 1), regions(40, 3)]);
        clone.sim.sleep(Duration::from_secs(60)).await;
        assert_eq!(bad_regions(&clone), [13, 40, 41, 42]);
        // One by one, by the delays' own.
        clone.devices.source.set_bad(vec![regions(40, 1)]);
        clone.sim.sleep(Duration::from_secs(130)).await;
        assert_eq!(bad_regions(&clone), [40]);
        clone.devices.source.set_bad(vec![]);
        clone.sim.sleep(Duration::from_secs(130)).await;
        assert!(clone.state.is_complete());
        let kinds = clone.event_kinds();
        assert_eq!(kinds[kinds.len() - 2..], ["bad_regions_healed", "hydration_completed"], "{kinds:?}");
        assert_eq!(clone.state.failure_report().last, None);
        clone.check_events();
    });
}

/// Every other copy succeeds, on one shard only: the count of the clone never gets far.
#[test]
fn a_success_on_any_shard_begins_anew() {
    let setup = Setup { size: 512 * REGION, threshold: 2, batch_size: 1, ..setup() };
    scenario(&setup, |clone| async move {
        // Zones of 8, in turn: all of shard 1 is bad.
        clone.devices.source.set_bad((0..32).map(|zone| regions((2 * zone + 1) * 8, 8)).collect());
        clone.state.set_hydration_failures_max(40);
        clone.enable_hydration(true);
        until_stopped(&clone).await;
        assert_eq!(clone.state.hydrated(), 256, "all that is good came first");
    });
}

#[test]
fn what_holds_for_all_is_waited_for_and_not_counted() {
    let setup = Setup { size: 640 * REGION, hydration: true, threshold: 8, ..setup() };
    scenario_of(&setup, content(setup.size), 0..6, |clone| async move {
        clone.state.set_hydration_failures_max(1);
        clone.sim.sleep(Duration::from_millis(2)).await;
        clone.devices.source.lost.set(true);
        clone.sim.sleep(3 * LONG).await;
        assert!(!clone.state.is_hydration_stopped());
        assert_eq!(clone.state.failure_report().in_a_row, 0);
        clone.devices.source.lost.set(false);
        clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::ENOSPC));
        clone.wake();
        clone.sim.sleep(3 * LONG).await;
        assert!(!clone.state.is_hydration_stopped());
        assert!(clone.state.hydrated() < 640);
        clone.devices.destination.clear_fault();
        clone.sim.sleep(Duration::from_secs(70)).await;
        assert!(clone.state.is_complete(), "by itself, {} are hydrated", clone.state.hydrated());
    });
}

/// The destination fails for good: that is counted as well, and no source is read over and over for it.
#[test]
fn a_destination_that_can_not_be_written_stops_it() {
    let setup = Setup { hydration: true, ..setup() };
    scenario(&setup, |clone| async move {
        clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::EIO));
        clone.state.set_hydration_failures_max(10);
        until_stopped(&clone).await;
        clone.devices.destination.clear_fault();
        clone.enable_hydration(true);
        clone.completed().await;
    });
}

#[test]
fn zero_never_stops() {
    scenario_of(&setup(), content(setup().size), 0..3, |clone| async move {
        clone.devices.source.set_bad(vec![clone.geometry().whole()]);
        clone.state.set_hydration_failures_max(0);
        clone.enable_hydration(true);
        clone.sim.sleep(6 * LONG).await;
        assert!(!clone.state.is_hydration_stopped());
        let report = clone.state.failure_report();
        assert_eq!(report.bad_regions, 64);
        // At most 8 in a minute.
        assert!((150..=30 * FAILURES_PER_PAUSE + 100).contains(&report.in_a_row), "{}", report.in_a_row);
        // A number is in force for the next failure.
        clone.state.set_hydration_failures_max(5);
        clone.sim.sleep(Duration::from_secs(130)).await;
        assert!(clone.state.is_hydration_stopped());
        // Another number alone does not begin it.
        clone.state.set_hydration_failures_max(0);
        clone.devices.source.set_bad(vec![]);
        clone.wake();
        clone.sim.sleep(LONG).await;
        assert_eq!(clone.state.hydrated(), 0);
        clone.enable_hydration(true);
        clone.completed().await;
    });
}

/// Clients read a bad region again and again: its copies keep their delays all the same.
#[test]
fn clients_do_not_hurry_the_retries() {
    let setup =
        Setup { size: 8 << 20, region_size: 1 << 20, shards: 1, regions_per_zone: 8, hydration: true, ..setup() };
    scenario_of(&setup, content(setup.size), 0..5, |clone| async move {
        clone.devices.source.set_bad(vec![ByteRange::new((3 << 20) + 5000, 1).unwrap()]);
        clone.sim.sleep(Duration::from_secs(20)).await;
        assert_eq!(bad_regions(&clone), [3]);
        let before = clone.state.failure_report().in_a_row;
        for _ in 0..200 {
            // What is good of it can be read, what is bad is an error for who wants it.
            assert_eq!(
                clone.read(3 << 20, 512).await.unwrap(),
                clone.devices.source.content()[3 << 20..(3 << 20) + 512]
            );
            assert_eq!(clone.read((3 << 20) + 4096, 4096).await.unwrap_err().errno(), libc::EIO);
            clone.sim.sleep(Duration::from_millis(50)).await;
        }
        let failures = clone.state.failure_report().in_a_row - before;
        assert!(failures <= 2, "{failures} within 10 s");
    });
}

/// What a bad sector fails, and what it does not.
#[test]
fn only_what_touches_a_bad_sector_fails() {
    for (region_size, shards) in [(4096, 2), (64 << 10, 1), (1 << 20, 1), (4 << 20, 2)] {
        let setup = Setup { size: 3 * region_size, region_size, shards, regions_per_zone: 1, ..Setup::default() };
        scenario_of(&setup, content(setup.size), 0..3, |clone| async move {
            let bad = ByteRange::new(region_size + 1024, 512).unwrap();
            clone.devices.source.set_bad(vec![bad]);
            let data = clone.devices.source.content();
            let good = [
                (0, region_size),
                (region_size - 512, 1024),
                (region_size, 1024),
                (region_size + 1536, region_size - 1536),
                (region_size + 1536, region_size),
                (2 * region_size, region_size),
            ];
            for round in 0..2 {
                for (start, len) in good {
                    let read = clone.read(start, len).await;
                    assert!(read.unwrap()[..] == data[start as usize..(start + len) as usize], "{start}+{len}");
                }
                for (start, len) in
                    [(bad.start(), 512), (bad.end() - 1, 2), (0, 3 * region_size), (region_size, region_size)]
                {
                    assert_eq!(clone.read(start, len).await.unwrap_err().errno(), libc::EIO, "{start}+{len}");
                }
                assert_eq!(clone.write(region_size, &[1; 100]).await.unwrap_err().errno(), libc::EIO);
                if round == 0 {
                    // And once more beside the background copy.
                    clone.enable_hydration(true);
                    until(&clone, "the others", |clone| clone.state.hydrated() == 2).await;
                    until(&clone, "known", |clone| bad_regions(clone) == [1]).await;
                }
            }
            clone.write(region_size, &vec![9; region_size as usize]).await.unwrap();
            assert_eq!(clone.state.failure_report().bad_regions, 0);
            clone.completed().await;
            assert!(clone.read(region_size, region_size).await.unwrap().iter().all(|byte| *byte == 9));
        });
    }
}

#[test]
fn one_whose_rest_clients_overwrite_completes_while_it_is_stopped() {
    scenario(&setup(), |clone| async move {
        clone.devices.source.set_bad(vec![regions(7, 2), regions(33, 1)]);
        clone.state.set_hydration_failures_max(5);
        clone.enable_hydration(true);
        until_stopped(&clone).await;
        assert_eq!((clone.state.hydrated(), bad_regions(&clone)), (61, vec![7, 8, 33]));
        clone.write(7 * REGION, &[7; 4096]).await.unwrap();
        clone.trim(33 * REGION, REGION).await.unwrap();
        assert_eq!(bad_regions(&clone), [8]);
        assert!(clone.state.is_hydration_stopped());
        clone.write(8 * REGION, &[8; 4096]).await.unwrap();
        clone.completed().await;
        assert!(!clone.state.is_hydration_stopped());
        let kinds = clone.event_kinds();
        assert_eq!(kinds[kinds.len() - 3..], ["hydration_stopped", "bad_regions_healed", "hydration_completed"]);
        assert_eq!(clone.state.events().count().dm, 2);
        clone.check_events();
    });
}

#[test]
fn suspend_disable_and_growth_leave_it_stopped() {
    let setup = Setup { excess: 64 * REGION, ..setup() };
    scenario_of(&setup, content(setup.size), 0..10, |clone| async move {
        stopped(&clone, 10).await;
        clone.suspend().await.unwrap();
        clone.resume().await.unwrap();
        clone.sim.sleep(LONG).await;
        assert!(clone.state.is_hydration_stopped());
        clone.devices.source.set_bad(vec![]);
        clone.devices.source.append(&content(16 * REGION));
        assert!(clone.grow(Wanted { size: None, zeros: false }, OLD_DESTINATION).await.unwrap());
        clone.sim.sleep(LONG).await;
        assert!(clone.state.is_hydration_stopped());
        assert_eq!((clone.state.hydrated(), clone.geometry().nr_regions()), (0, 80), "nothing goes on by itself");
        // Switched off it is paused by the user; only enabling it begins again.
        clone.enable_hydration(false);
        clone.state.set_hydration_threshold(0, clone.sim.now());
        clone.state.set_hydration_threshold(8, clone.sim.now());
        clone.wake();
        clone.sim.sleep(LONG).await;
        assert_eq!(clone.state.hydrated(), 0);
        assert_eq!(clone.event_kinds().last(), Some(&"hydration_paused"));
        clone.enable_hydration(true);
        clone.completed().await;
        assert_eq!(clone.read(79 * REGION, 10).await.unwrap(), content(16 * REGION)[15 * 4096..][..10]);
        clone.check_events();
    });
}

/// A region that was bad before the clone grew is so after it.
#[test]
fn bad_regions_outlive_growth_and_a_complete_clone_that_grows_begins_anew() {
    let setup = Setup { excess: 64 * REGION, hydration: true, ..setup() };
    scenario_of(&setup, content(setup.size), 0..10, |clone| async move {
        clone.devices.source.set_bad(vec![regions(63, 1)]);
        until(&clone, "known", |clone| bad_regions(clone) == [63]).await;
        clone.devices.source.append(&content(16 * REGION));
        assert!(clone.grow(Wanted { size: None, zeros: false }, OLD_DESTINATION).await.unwrap());
        until(&clone, "the rest", |clone| clone.state.hydrated() == 79).await;
        assert_eq!(bad_regions(&clone), [63]);
        clone.state.set_hydration_failures_max(1);
        until_stopped(&clone).await;
        clone.write(63 * REGION, &[1; 4096]).await.unwrap();
        clone.completed().await;
        clone.devices.source.append(&content(REGION));
        assert!(clone.grow(Wanted { size: None, zeros: false }, OLD_DESTINATION).await.unwrap());
        clone.completed().await;
        assert_eq!(clone.state.hydrated(), 81);
    });
}

/// The state is not stored.
#[test]
fn a_restart_begins_anew() {
    scenario(&setup(), |clone| async move {
        stopped(&clone, 10).await;
        clone.write(3 * REGION, &[3; 4096]).await.unwrap();
        clone.flush().await.unwrap();
        let devices = clone.devices.crash(&clone.sim);
        clone.sim.kill_all();
        let setup = Setup { hydration: true, ..clone.setup.clone() };
        let again = SimClone::start(&clone.sim, &setup, &devices).await.unwrap();
        assert!(!again.state.is_hydration_stopped());
        let one = ByteRange::new(40 * REGION, 1).unwrap();
        again.devices.source.set_bad(vec![one]);
        until(&again, "all but one", |clone| clone.state.hydrated() == 63).await;
        assert_eq!(again.read(3 * REGION, 4).await.unwrap(), [3; 4]);
        assert_eq!(again.read(40 * REGION, 1).await.unwrap_err().kind(), ErrorKind::Io);
        assert!(!again.state.is_hydration_stopped());
        assert!(again.slice(1).stats().failed_regions + again.slice(0).stats().failed_regions <= 1);
        assert_eq!(again.geometry().region_of(40 * REGION), RegionIndex(40));
    });
}
