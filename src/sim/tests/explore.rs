//! Simulations of seeds that nobody has tried yet, for a bounded time. `tests/simulate` runs this for longer.

use super::super::report::Report;
use super::Seed;
use super::random::simulate;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long, unless `HYDRANT_SIM_SECONDS` says so.
const SECONDS_DEFAULT: f64 = 20.0;

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is '{text}', not a number")))
}

/// The seeds to run, and how long to begin new ones: those of `HYDRANT_SIM_SEED`, or fresh ones, so many that they never
/// meet the fixed ones.
fn plan() -> (Vec<u64>, u64, Option<Duration>) {
    if std::env::var_os("HYDRANT_SIM_SEED").is_some() {
        let given = super::seeds(0..0);
        let first = given.first().copied().unwrap_or_default();
        return (given, first, None);
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is after 1970").as_nanos() as u64;
    let fresh = super::super::Rng::new(clock ^ u64::from(std::process::id()) << 32).next() >> 24;
    let first = number("HYDRANT_SIM_START").unwrap_or(1_000_000 + fresh);
    let seconds: f64 = number("HYDRANT_SIM_SECONDS").unwrap_or(SECONDS_DEFAULT);
    (Vec::new(), first, Some(Duration::from_secs_f64(seconds)))
}

/// Each seed with devices that only crash, and with devices that fail.
#[test]
fn fresh_seeds() {
    let (given, first, limit) = plan();
    eprintln!("simulating from seed {first}");
    let mut report = Report { seed: first, ..Report::default() };
    let began = Instant::now();
    let seeds: Box<dyn Iterator<Item = u64>> = match limit {
        Some(limit) => Box::new((first..).take_while(move |_| began.elapsed() < limit)),
        None => Box::new(given.into_iter()),
    };
    for seed in seeds {
        for failures in [false, true] {
            let _seed = Seed(seed);
            let outcome = simulate(seed, failures);
            report.schedules += 1;
            report.tally.add(&outcome.tally);
            report.virtual_time += outcome.virtual_time;
        }
    }
    report.wall_time = began.elapsed();
    eprintln!("{report}");
    if let Some(path) = std::env::var_os("HYDRANT_SIM_REPORT") {
        let json = format!("{:#}\n", report.json());
        std::fs::write(&path, json).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    assert!(report.schedules > 0, "no seed was run");
}
