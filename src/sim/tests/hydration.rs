//! Background hydration: its limits, its order, what it does beside clients.

use super::super::clone::Setup;
use super::super::disk::Op;
use super::{content, scenario, scenario_of, start};
use crate::clone_state::AUTOMATIC;
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;

fn setup() -> Setup {
    Setup { size: 256 * REGION, shards: 3, regions_per_zone: 8, hydration: true, ..Setup::default() }
}

#[test]
fn the_threshold_bounds_the_copies_of_all_shards_together() {
    for (threshold, batch_size) in [(1, AUTOMATIC), (5, 3), (7, AUTOMATIC), (4, 100), (3, 0)] {
        scenario_of(&Setup { threshold, batch_size, ..setup() }, content(256 * REGION), 0..4, |clone| async move {
            while !clone.state.is_complete() {
                assert!(clone.state.hydrating() <= threshold);
                clone.sim.sleep(Duration::from_micros(50)).await;
            }
            let max = clone.devices.source.in_flight_bytes_max();
            assert!(max <= threshold * REGION, "{max} bytes in flight");
            let batch_max = batch_size.max(1).min(threshold) * REGION;
            assert!(clone.devices.source.reads().iter().all(|read| read.len() <= batch_max));
        });
    }
}

#[test]
fn threshold_zero_and_disabling_stop_and_can_be_undone() {
    scenario(&Setup { threshold: 2, ..setup() }, |clone| async move {
        for disable in [false, true] {
            clone.sim.sleep(Duration::from_millis(3)).await;
            match disable {
                true => clone.enable_hydration(false),
                false => {
                    clone.state.set_hydration_threshold(0, clone.sim.now());
                    clone.wake();
                }
            }
            // Those in flight end.
            clone.sim.sleep(Duration::from_millis(30)).await;
            let hydrated = clone.state.hydrated();
            assert!(hydrated < 256 && clone.state.hydrating() == 0);
            clone.sim.sleep(Duration::from_secs(3)).await;
            assert_eq!(clone.state.hydrated(), hydrated);
            clone.state.set_hydration_threshold(2, clone.sim.now());
            clone.enable_hydration(true);
        }
        clone.completed().await;
    });
}

/// Disabled while the source is asked what is allocated: the batch that was about to start must not.
#[test]
fn disabling_holds_for_a_batch_that_is_about_to_start() {
    scenario(&setup(), |clone| async move {
        clone.sim.sleep(Duration::from_micros(10)).await;
        clone.enable_hydration(false);
        let hydrating = clone.devices.source.reads().len();
        clone.sim.sleep(Duration::from_secs(1)).await;
        assert_eq!(clone.devices.source.reads().len(), hydrating);
        assert_eq!(clone.state.hydrating(), 0);
        clone.enable_hydration(true);
        clone.completed().await;
    });
}

#[test]
fn holes_of_the_source_are_hydrated_without_reading_them() {
    let mut bytes = content(256 * REGION);
    bytes[16 * 4096..200 * 4096].fill(0);
    scenario_of(&setup(), bytes, 0..20, |clone| async move {
        clone.completed().await;
        let read = clone.devices.source.read_bytes();
        assert!((72 * REGION..=80 * REGION).contains(&read), "{read} bytes read");
        let written: u64 = clone
            .devices
            .destination
            .log()
            .iter()
            .map(|(_, op)| match op {
                Op::Write { range, .. } => range.len(),
                _ => 0,
            })
            .sum();
        assert!(written <= 80 * REGION, "{written} bytes written");
        assert_eq!(clone.devices.destination.image(), clone.devices.source.content()[..]);
    });
}

#[test]
fn zeros_that_the_source_does_not_tell_of_are_not_written() {
    let mut bytes = content(512 * REGION);
    bytes[128 * 4096..384 * 4096].fill(0);
    let setup = Setup { size: 512 * REGION, regions_per_zone: 512, shards: 1, ..setup() };
    scenario_of(&setup, bytes, 0..3, |clone| async move {
        clone.devices.source.knows_no_holes.set(true);
        clone.completed().await;
        let zeroed: u64 = clone
            .devices
            .destination
            .log()
            .iter()
            .map(|(_, op)| match op {
                Op::Zero { range, .. } => range.len(),
                _ => 0,
            })
            .sum();
        assert!(zeroed >= 240 * REGION, "{zeroed} bytes zeroed");
        assert_eq!(clone.devices.destination.image(), clone.devices.source.content()[..]);
    });
}

/// Clients that never pause, at any depth, do not stop hydration; dm-clone does 2 regions in 4 s then.
#[test]
fn clients_do_not_starve_hydration() {
    for (depth, threshold) in [(1, AUTOMATIC), (8, AUTOMATIC), (1, 1), (8, 16)] {
        scenario_of(&Setup { threshold, ..setup() }, content(256 * REGION), 0..1, |clone| async move {
            clone.cache(0, REGION).await.unwrap();
            for _ in 0..depth {
                let other = clone.clone();
                start(&clone, async move {
                    loop {
                        other.read(100, 100).await.unwrap();
                    }
                });
            }
            clone.sim.sleep(Duration::from_secs(3)).await;
            assert!(clone.state.is_complete(), "{} are hydrated", clone.state.hydrated());
        });
    }
}

/// Copies on demand use up the threshold all the time; batches as large as the threshold must still get in.
#[test]
fn copies_on_demand_do_not_keep_batches_out() {
    let setup =
        Setup { size: 2048 * REGION, threshold: 16, batch_size: 16, shards: 1, regions_per_zone: 4096, ..setup() };
    scenario_of(&setup, content(setup.size), 0..3, |clone| async move {
        let next = Rc::new(Cell::new(2047u64));
        for _ in 0..3 {
            let (other, next) = (clone.clone(), next.clone());
            start(&clone, async move {
                // One region after the other from the end, so that some copy is always in flight.
                while next.get() > 1500 {
                    next.set(next.get() - 1);
                    other.read(next.get() * REGION, 10).await.unwrap();
                }
            });
        }
        while next.get() > 1500 {
            clone.sim.sleep(Duration::from_millis(1)).await;
        }
        let in_background = clone.state.hydrated() - (2047 - 1500);
        assert!(in_background > 200, "{in_background} regions in the background");
    });
}

/// While clients are at work little is in flight in front of them.
#[test]
fn hydration_gives_way_to_clients() {
    let setup = Setup { size: 48 << 20, region_size: 64 << 10, shards: 1, regions_per_zone: 4096, ..setup() };
    scenario_of(&setup, content(setup.size), 0..1, |clone| async move {
        clone.devices.source.latency_us.set((5_000, 10_000));
        clone.sim.sleep(Duration::from_millis(20)).await;
        let in_flight = clone.state.hydrating() << 16;
        assert!((12 << 20..=16 << 20).contains(&in_flight), "a deep pipeline without clients: {in_flight}");
        let other = clone.clone();
        start(&clone, async move {
            loop {
                other.read(0, 100).await.unwrap();
            }
        });
        // What is in flight already goes on, one copy in 30 for long.
        clone.sim.sleep(Duration::from_millis(40)).await;
        assert!(!clone.state.is_complete());
        for _ in 0..20 {
            assert!(clone.devices.source.in_flight_bytes() <= 3 << 20, "{}", clone.devices.source.in_flight_bytes());
            clone.sim.sleep(Duration::from_micros(300)).await;
        }
        clone.completed().await;
    });
}

#[test]
fn large_regions_are_copied_in_chunks() {
    let setup =
        Setup { size: (9 << 20) + 5, region_size: 4 << 20, excess: 507, shards: 2, regions_per_zone: 1, ..setup() };
    scenario_of(&Setup { hydration: false, ..setup.clone() }, content(setup.size), 0..3, |clone| async move {
        let reads = || clone.devices.source.reads();
        // A small read is answered without its region, which comes next.
        assert_eq!(clone.read(5 << 20, 10).await.unwrap().len(), 10);
        assert_eq!(reads().len(), 1);
        // A small write waits for all of it.
        clone.write((5 << 20) + 3, &[200; 10]).await.unwrap();
        assert_eq!(clone.state.hydrated(), 1);
        clone.flush().await.unwrap();
        clone.enable_hydration(true);
        clone.completed().await;
        assert!(reads().iter().all(|read| read.len() <= 1 << 20));
        assert!(clone.devices.source.in_flight_bytes_max() <= 9 << 20);
        let mut expected = clone.devices.source.content().to_vec();
        expected[(5 << 20) + 3..(5 << 20) + 13].fill(200);
        assert!(clone.read(0, (9 << 20) + 5).await.unwrap() == expected);
    });
}

#[test]
fn copies_are_bounded_in_memory() {
    let setup =
        Setup { size: 80 << 20, region_size: 1 << 20, hydration: false, shards: 1, regions_per_zone: 4096, ..setup() };
    scenario_of(&setup, content(setup.size), 0..1, |clone| async move {
        let writes: Vec<_> = (0..80u64)
            .map(|region| {
                let other = clone.clone();
                start(&clone, async move { other.write((region << 20) + 5, &[1; 5]).await.unwrap() })
            })
            .collect();
        for write in writes {
            super::result(&clone, &write).await;
        }
        let max = clone.devices.source.in_flight_bytes_max();
        assert!(max <= IO_MEMORY_DEFAULT && max > IO_MEMORY_DEFAULT / 2, "{max}");
    });
}

/// Every look at a paused scheduler starts a timer; they must not pile up.
#[test]
fn waiting_for_a_retry_costs_one_timer() {
    let setup = Setup { size: 8 << 20, region_size: 1 << 20, shards: 1, ..setup() };
    scenario_of(&setup, content(setup.size), 0..2, |clone| async move {
        clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::ENOSPC));
        clone.sim.sleep(Duration::from_secs(20)).await;
        assert!(clone.stats().hydration_paused > 0);
        for _ in 0..2000 {
            clone.read(0, 10).await.unwrap();
        }
        assert!(clone.sim.timers() < 20, "{} timers", clone.sim.timers());
    });
}

/// A large request over a clone that is hydrated in patches is not thousands of operations at once.
#[test]
fn a_request_of_many_pieces_runs_some_at_a_time() {
    let setup = Setup { size: 2048 * REGION, shards: 1, regions_per_zone: 4096, hydration: false, ..setup() };
    scenario_of(&setup, content(setup.size), 0..2, |clone| async move {
        for region in (0..2048).step_by(2) {
            clone.write(region * REGION, &[7; 4096]).await.unwrap();
        }
        let found = clone.read(0, setup_size(&clone)).await.unwrap();
        let mut expected = clone.devices.source.content().to_vec();
        (0..2048).step_by(2).for_each(|region| expected[region * 4096..(region + 1) * 4096].fill(7));
        assert!(found == expected);
        assert!(clone.devices.destination.running_max() <= 160, "{}", clone.devices.destination.running_max());
        assert_eq!(clone.stats().read_past_bytes, 0, "what was read was kept");
    });
}

fn setup_size(clone: &super::SimClone) -> u64 {
    clone.geometry().size()
}
