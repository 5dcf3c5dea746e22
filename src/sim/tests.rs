//! Simulations of the engine: random ones against the oracle, and the scenarios that are known to go wrong.

mod bad_regions;
mod commits;
mod explore;
mod failures;
mod growth;
mod hydration;
mod kills;
mod metrics;
mod order;
mod random;
mod rot;
mod shares;
mod suspend;

use super::clone::{Devices, Setup, SimClone};
use super::executor::Sim;
use super::seeds;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

/// Prints the seed of a simulation that fails.
struct Seed(u64);
impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with HYDRANT_SIM_SEED={}", self.0);
        }
    }
}

/// A source of bytes that are never 0.
fn content(size: u64) -> Vec<u8> {
    (0..size).map(|at| 1 + (at % 223) as u8).collect()
}

/// Runs a scenario with several seeds, each on a new machine with a clone that has just started.
fn scenario<F: Future<Output = ()>>(setup: &Setup, run: impl Fn(Rc<SimClone>) -> F) {
    scenario_of(setup, content(setup.size), 0..20, run);
}

fn scenario_of<F: Future<Output = ()>>(
    setup: &Setup,
    content: Vec<u8>,
    with: std::ops::Range<u64>,
    run: impl Fn(Rc<SimClone>) -> F,
) {
    for seed in seeds(with) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let devices = Devices::new(&sim, setup, content.clone());
        let clone = sim.block_on(SimClone::start(&sim, setup, &devices)).unwrap();
        sim.block_on(run(clone));
        sim.kill_all();
    }
}

/// Starts something beside the scenario; tells when it is done.
fn start<T: 'static>(clone: &Rc<SimClone>, work: impl Future<Output = T> + 'static) -> Rc<Cell<Option<T>>> {
    let done = Rc::new(Cell::new(None));
    let result = done.clone();
    clone.sim.spawn(async move { result.set(Some(work.await)) });
    done
}

/// Waits for what [`start`] started.
async fn result<T>(clone: &SimClone, done: &Cell<Option<T>>) -> T {
    loop {
        if let Some(value) = done.take() {
            return value;
        }
        clone.sim.sleep(std::time::Duration::from_micros(100)).await;
    }
}
