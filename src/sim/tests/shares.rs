//! Several clones of one machine: how they share the bandwidth of hydration and the memory for copies.

use super::super::clone::{Devices, Setup, SimClone};
use super::super::executor::Sim;
use super::super::mesh::Net;
use super::super::seeds;
use super::{Seed, content, result, start};
use crate::hydration_budget::HydrationBudget;
use crate::hydration_share::{HydrationRate, Priority};
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use crate::units::{CloneId, ShardIndex};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// The clones of a machine and their budget.
struct Machine {
    sim: Sim,
    budget: Arc<HydrationBudget>,
    net: Rc<Net>,
    clones: Vec<Rc<SimClone>>,
}

impl Machine {
    fn hydrated(&self) -> Vec<u64> {
        self.clones.iter().map(|clone| clone.state.hydrated() * clone.geometry().region_size().bytes()).collect()
    }
    /// What each clone hydrates in some time.
    async fn hydrated_in(&self, time: Duration) -> Vec<u64> {
        let before = self.hydrated();
        self.sim.sleep(time).await;
        self.hydrated().iter().zip(before).map(|(after, before)| after - before).collect()
    }
    fn memory_used(&self) -> u64 {
        (0..self.net.shards()).map(|shard| self.net.shard(ShardIndex(shard)).copy_pool().used()).sum()
    }
}

fn rate(bytes_per_second: u64) -> Option<HydrationRate> {
    Some(HydrationRate::new(bytes_per_second).unwrap())
}

/// Runs a scenario on machines with a clone of each of `weights`, hydration off.
fn machine<F: Future<Output = ()>>(setup: &Setup, weights: &[u64], total: Option<u64>, run: impl Fn(Rc<Machine>) -> F) {
    machine_with(IO_MEMORY_DEFAULT, setup, weights, total, run)
}

fn machine_with<F: Future<Output = ()>>(
    io_memory: u64,
    setup: &Setup,
    weights: &[u64],
    total: Option<u64>,
    run: impl Fn(Rc<Machine>) -> F,
) {
    for seed in seeds(0..2) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let net = Net::with_io_memory(&sim, setup.shards, io_memory);
        let budget = HydrationBudget::new(total.and_then(rate));
        let clones = weights.iter().enumerate().map(|(nr, weight)| {
            let devices = Devices::new(&sim, setup, content(setup.size));
            let member = budget.join(Priority::new(*weight).unwrap(), None, sim.now());
            let started = SimClone::start_on(&net, CloneId(nr as u32), &sim, setup, &devices, member);
            sim.block_on(started).unwrap()
        });
        let clones = clones.collect();
        sim.block_on(run(Rc::new(Machine { sim: sim.clone(), budget, net, clones })));
        sim.kill_all();
    }
}

fn setup() -> Setup {
    Setup { size: 12 * MIB, region_size: 16 << 10, shards: 2, regions_per_zone: 16, ..Setup::default() }
}

/// Whether the parts are as the weights, give or take `percent` of each.
fn assert_shares(parts: &[u64], weights: &[u64], percent: u64) {
    let (all, of): (u64, u64) = (parts.iter().sum(), weights.iter().sum());
    for (part, weight) in parts.iter().zip(weights) {
        let fair = all * weight / of;
        assert!(part.abs_diff(fair) <= fair * percent / 100, "{parts:?} by weights {weights:?}");
    }
}

#[test]
fn a_rate_is_kept_and_shared_by_weight() {
    // Small batches, so that a few seconds have many.
    machine(&Setup { batch_size: 4, ..setup() }, &[100, 200, 400], Some(5 * MIB / 2), |machine| async move {
        machine.clones.iter().for_each(|clone| clone.enable_hydration(true));
        machine.sim.sleep(Duration::from_millis(500)).await;
        let parts = machine.hydrated_in(Duration::from_secs(5)).await;
        assert_shares(&parts, &[1, 2, 4], 8);
        let all: u64 = parts.iter().sum();
        assert!((12 * MIB..=13 * MIB).contains(&all), "{all}");
        // Weights and rates are changed while it runs.
        machine.clones[2].state.budget().set_priority(Priority::new(100).unwrap());
        machine.budget.set_total_rate(rate(MIB), machine.sim.now());
        machine.sim.sleep(Duration::from_millis(500)).await;
        let parts = machine.hydrated_in(Duration::from_secs(4)).await;
        assert_shares(&parts, &[1, 2, 1], 10);
        let all: u64 = parts.iter().sum();
        assert!((15 * MIB / 4..=17 * MIB / 4).contains(&all), "{all}");
        // The share of one that is paused goes to the others.
        machine.clones[1].enable_hydration(false);
        machine.sim.sleep(Duration::from_millis(500)).await;
        let parts = machine.hydrated_in(Duration::from_secs(3)).await;
        assert!(parts[1] == 0 && parts[0].abs_diff(parts[2]) <= MIB / 4, "{parts:?}");
        assert!(parts.iter().sum::<u64>() >= 11 * MIB / 4, "{parts:?}");
        // Without a rate the rest is done at once.
        machine.budget.set_total_rate(None, machine.sim.now());
        machine.clones[1].enable_hydration(true);
        machine.sim.sleep(Duration::from_millis(2500)).await;
        assert!(machine.clones.iter().all(|clone| clone.state.is_complete()), "{:?}", machine.hydrated());
    });
}

#[test]
fn a_clone_has_a_rate_of_its_own() {
    machine(&setup(), &[100, 100], None, |machine| async move {
        let bound = &machine.clones[0];
        bound.state.budget().set_rate(rate(MIB), machine.sim.now());
        machine.clones.iter().for_each(|clone| clone.enable_hydration(true));
        let parts = machine.hydrated_in(Duration::from_secs(5)).await;
        assert!((19 * MIB / 4..=21 * MIB / 4).contains(&parts[0]) && parts[1] == 12 * MIB, "{parts:?}");
        bound.state.budget().set_rate(None, machine.sim.now());
        machine.sim.sleep(Duration::from_secs(1)).await;
        assert!(bound.state.is_complete());
    });
}

/// Holes cost no bandwidth, so they are not held back.
#[test]
fn holes_go_past_the_rate() {
    let setup = Setup { shards: 1, ..setup() };
    let sim = Sim::new(1);
    let mut bytes = content(setup.size);
    bytes[1 << 20..].fill(0);
    let devices = Devices::new(&sim, &setup, bytes);
    let member = HydrationBudget::new(rate(MIB / 2)).join(Priority::default(), None, sim.now());
    let net = Net::new(&sim, 1);
    let clone = sim.block_on(SimClone::start_on(&net, CloneId(0), &sim, &setup, &devices, member)).unwrap();
    clone.enable_hydration(true);
    sim.run_for(Duration::from_millis(1500));
    assert!(!clone.state.is_all_hydrated());
    sim.run_for(Duration::from_millis(1500));
    assert!(clone.state.is_complete(), "{}", clone.state.hydrated());
}

/// Clients' copies take from the budget and do not wait for it.
#[test]
fn copies_on_demand_do_not_wait_but_count() {
    machine(&setup(), &[100, 100], Some(MIB), |machine| async move {
        let [used, other] = &machine.clones[..] else { unreachable!() };
        other.enable_hydration(true);
        machine.sim.sleep(Duration::from_secs(1)).await;
        let (before, begun) = (machine.hydrated(), machine.sim.now());
        // Half a MiB/s of reads that are kept.
        for nr in 0..128u64 {
            let asked = machine.sim.now();
            used.read(nr * 16384, 4096).await.unwrap();
            // The slowest answer of the source, once in 30: 10 ms.
            assert!(machine.sim.now() - asked < Duration::from_millis(25), "{:?}", machine.sim.now() - asked);
            machine.sim.sleep((begun + Duration::from_millis(1000 / 32) * (nr as u32 + 1)) - machine.sim.now()).await;
        }
        let after = machine.hydrated();
        assert!(after[0] - before[0] == 2 * MIB, "all were kept");
        let background = after[1] - before[1];
        assert!((7 * MIB / 4..=10 * MIB / 4).contains(&background), "the rest of 4 MiB: {background}");
    });
}

/// Without a rate the depth of the pipeline is shared, and does not grow with the number of clones.
#[test]
fn without_a_rate_bytes_in_flight_are_shared_by_weight() {
    let setup = Setup { shards: 1, regions_per_zone: 4096, ..setup() };
    machine_with(2 * MIB, &setup, &[100, 200, 400], None, |machine| async move {
        for clone in &machine.clones {
            clone.devices.source.latency_us.set((80_000, 80_001));
            clone.enable_hydration(true);
        }
        // What was begun before there were competitors ends, the slowest after 800 ms.
        machine.sim.sleep(Duration::from_secs(1)).await;
        let mut sums = [0u64; 3];
        while machine.hydrated().iter().all(|hydrated| *hydrated < 10 * MIB) {
            let now: Vec<u64> = machine.clones.iter().map(|clone| clone.devices.source.in_flight_bytes()).collect();
            sums.iter_mut().zip(&now).for_each(|(sum, now)| *sum += now);
            assert!(now.iter().sum::<u64>() <= MIB + (64 << 10), "{now:?} bytes in flight");
            machine.sim.sleep(Duration::from_millis(1)).await;
        }
        assert_shares(&sums, &[1, 2, 4], 15);
    });
}

#[test]
fn memory_does_not_grow_with_the_number_of_clones() {
    let setup = Setup { size: 4 * MIB, shards: 1, regions_per_zone: 4096, ..setup() };
    machine(&setup, &[100; 24], None, |machine| async move {
        for clone in &machine.clones {
            clone.devices.source.held.set(true);
            clone.enable_hydration(true);
            // And every client wants something else.
            for region in 128..160u64 {
                let other = clone.clone();
                start(clone, async move { other.write((region << 14) + 5, &[1; 5]).await.unwrap() });
            }
        }
        for _ in 0..100 {
            machine.sim.sleep(Duration::from_millis(1)).await;
            assert!(machine.memory_used() <= IO_MEMORY_DEFAULT + 24 * MIB);
        }
        assert!(machine.memory_used() >= 8 * MIB, "{}", machine.memory_used());
        machine.clones.iter().for_each(|clone| clone.devices.source.held.set(false));
        for clone in &machine.clones {
            clone.completed().await;
        }
        assert_eq!(machine.memory_used(), 0);
    });
}

/// A source that does not answer holds what its clone holds, and keeps nobody else from anything.
#[test]
fn a_stalled_source_stops_no_other_clone() {
    for total in [None, Some(16 * MIB)] {
        // Little memory: the stalled ones could hold all of it.
        machine_with(MIB, &setup(), &[1000, 1000, 1000, 1], total, |machine| async move {
            let (stalled, [well]) = machine.clones.split_at(3) else { unreachable!() };
            for clone in stalled {
                clone.devices.source.held.set(true);
                clone.enable_hydration(true);
                for region in 100..200u64 {
                    let (read, write) = (clone.clone(), clone.clone());
                    start(clone, async move { read.read(region << 14, 4096).await });
                    start(clone, async move { write.write((region << 14) + 5, &[1; 5]).await });
                }
            }
            machine.sim.sleep(Duration::from_millis(1200)).await;
            well.enable_hydration(true);
            for region in 0..64u64 {
                let begun = machine.sim.now();
                let writes: Vec<_> = (0..8)
                    .map(|nr| {
                        let other = well.clone();
                        start(well, async move { other.write(((8 * region + nr) << 14) + 7, &[2; 9]).await.unwrap() })
                    })
                    .collect();
                for write in writes {
                    result(well, &write).await;
                }
                well.read(region << 14, 100).await.unwrap();
                assert!(machine.sim.now() - begun < Duration::from_millis(150), "{:?}", machine.sim.now() - begun);
            }
            machine.sim.sleep(Duration::from_secs(2)).await;
            assert!(well.state.is_complete(), "{} of 768", well.state.hydrated());
            assert!(stalled.iter().all(|clone| clone.state.hydrated() == 0));
            stalled.iter().for_each(|clone| clone.devices.source.held.set(false));
            for clone in stalled {
                clone.completed().await;
            }
        });
    }
}
