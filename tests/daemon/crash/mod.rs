//! Real crashes: the real daemon over real files, killed with SIGKILL at random moments under load and started again.
//!
//! A seed decides the options, what is done to the clones and when (`HYDRANT_CRASH_SEED=n` repeats it); but time is
//! real, so a kill does not meet the daemon at the same instruction again: what was seen once may need several runs of
//! its seed. `HYDRANT_CRASH_SECONDS=n` or `HYDRANT_CRASH_ROUNDS=n` runs longer than the bounded default (`tests/crash`
//! does), `HYDRANT_CRASH_REPORT=path` writes what was done as JSON.
//!
//! SIGKILL does not lose the page cache: what a power cut loses is not tested here.

pub mod client;
mod clients;
mod clone;
mod content;
mod load;
mod meta_tools;
mod model;
mod options;
mod place;
mod report;
mod scenario;

use crate::harness::*;
use report::Report;
use scenario::Scenario;
use std::time::{Duration, Instant};

/// Of the bounded run.
const SECONDS: u64 = 20;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Says which seed failed.
struct Naming(u64);

impl Drop for Naming {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- repeat it, several times if need be, with HYDRANT_CRASH_SEED={}", self.0);
        }
    }
}

#[test]
fn killed_at_random_moments_it_has_what_was_promised() {
    need!("nbdkit", "flock");
    let (seed, seconds) = (variable("HYDRANT_CRASH_SEED"), variable("HYDRANT_CRASH_SECONDS"));
    let rounds = variable("HYDRANT_CRASH_ROUNDS").or((seed.is_some() && seconds.is_none()).then_some(1));
    let time_max = match (rounds, seconds) {
        (_, Some(seconds)) => Duration::from_secs(seconds),
        (Some(_), None) => Duration::MAX,
        (None, None) => Duration::from_secs(SECONDS),
    };
    let first = seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 % 1_000_000_000
    });
    // At once: who ends this early can repeat what was begun.
    eprintln!("crash: from seed {first}");
    let (began, mut report) = (Instant::now(), Report::new());
    for seed in (first..).take(rounds.unwrap_or(u64::MAX).try_into().unwrap()) {
        if began.elapsed() >= time_max {
            break;
        }
        let _naming = Naming(seed);
        Scenario::new(seed).run(&mut report);
        // A long run can be looked at, and one that fails leaves what it has done.
        report.tell(false);
    }
    report.tell(true);
}
