//! What simulations have met: counts by kind, as one line and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    /// Ends of lives: crashes, stops.
    End,
    /// Faults of devices, by device and kind.
    Fault,
    /// Requests of clients and operators.
    Request,
    /// Checks of the laws.
    Check,
}

/// Counts by group and name.
#[derive(Clone, Default, Debug)]
pub struct Tally(BTreeMap<(Group, String), u64>);

impl Tally {
    pub fn count(&mut self, group: Group, name: &str) {
        *self.0.entry((group, name.to_owned())).or_default() += 1;
    }
    pub fn add(&mut self, other: &Tally) {
        for (key, count) in &other.0 {
            *self.0.entry(key.clone()).or_default() += count;
        }
    }
    pub fn of(&self, group: Group) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().filter(move |((g, _), _)| *g == group).map(|((_, name), count)| (&name[..], *count))
    }
    pub fn sum(&self, group: Group) -> u64 {
        self.of(group).map(|(_, count)| count).sum()
    }
    pub fn get(&self, group: Group, name: &str) -> u64 {
        self.of(group).find(|(n, _)| *n == name).map_or(0, |(_, count)| count)
    }
}

/// Many simulations.
#[derive(Default, Debug)]
pub struct Report {
    /// The first seed.
    pub seed: u64,
    pub schedules: u64,
    pub tally: Tally,
    pub virtual_time: Duration,
    pub wall_time: Duration,
}

impl Report {
    pub fn json(&self) -> serde_json::Value {
        let of = |group| self.tally.of(group).collect::<BTreeMap<_, _>>();
        serde_json::json!({
            "seed": self.seed,
            "schedules": self.schedules,
            "crashes": self.tally.get(Group::End, "crash"),
            "ends": of(Group::End),
            "faults": of(Group::Fault),
            "requests": of(Group::Request),
            "checks": of(Group::Check),
            "virtual_seconds": self.virtual_time.as_secs(),
            "wall_seconds": self.wall_time.as_secs_f64(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = self.wall_time.as_secs_f64().max(0.001) / 60.0;
        let rate = |count: u64| format!("{count} ({:.0}/min)", count as f64 / minutes);
        let faults: Vec<String> = self.tally.of(Group::Fault).map(|(name, count)| format!("{name} {count}")).collect();
        write!(
            f,
            "simulated from seed {}: {} schedules, {} crashes, {} faults: {}; {} requests, {} checks, {:.0} s of virtual time, in {:.1} s",
            self.seed,
            rate(self.schedules),
            rate(self.tally.get(Group::End, "crash")),
            rate(self.tally.sum(Group::Fault)),
            faults.join(", "),
            rate(self.tally.sum(Group::Request)),
            self.tally.sum(Group::Check),
            self.virtual_time.as_secs_f64(),
            self.wall_time.as_secs_f64(),
        )
    }
}
