//! What a run has done, for people and for `HYDRANT_CRASH_REPORT`.

use super::load::Counts;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub struct Report {
    began: Instant,
    pub rounds: u64,
    pub lives: u64,
    /// By what the daemon was doing.
    pub kills: BTreeMap<&'static str, u64>,
    /// Kills that found nobody: the daemon had ended by itself before.
    pub late: u64,
    pub source_kills: u64,
    pub growths: u64,
    pub bytes_verified: u64,
    /// The longest time from a kill until all its clients had their error.
    pub clients_freed_max: Duration,
    /// The longest time from a kill until the files were unlocked.
    pub unlocked_max: Duration,
    pub counts: Arc<Counts>,
}

impl Report {
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            rounds: 0,
            lives: 0,
            kills: BTreeMap::new(),
            late: 0,
            source_kills: 0,
            growths: 0,
            bytes_verified: 0,
            clients_freed_max: Duration::ZERO,
            unlocked_max: Duration::ZERO,
            counts: Arc::default(),
        }
    }

    pub fn killed(&mut self, doing: &'static str) {
        *self.kills.entry(doing).or_default() += 1;
    }

    pub fn nr_kills(&self) -> u64 {
        self.kills.values().sum()
    }

    /// Writes it as JSON where HYDRANT_CRASH_REPORT says; with `last` prints one line, too.
    pub fn tell(&self, last: bool) {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        let (reads, writes) = (get(&counts.reads), get(&counts.writes));
        let (fua, flushes) = (get(&counts.fua), get(&counts.flushes));
        let (trims, zeroes, caches) = (get(&counts.trims), get(&counts.zeroes), get(&counts.caches));
        let requests = reads + writes + trims + zeroes + caches + flushes;
        let phases: Vec<String> = self.kills.iter().map(|(phase, kills)| format!("{phase} {kills}")).collect();
        let line = format!(
            "crash: {} rounds, {} kills in {:.0} s ({}; {} too late), {} growths, {} source servers killed, {requests} \
             requests, {flushes} flushes, {fua} FUA, {} MiB verified, clients free after {} ms at most, locks after {} ms",
            self.rounds,
            self.nr_kills(),
            self.began.elapsed().as_secs_f64(),
            phases.join(", "),
            self.late,
            self.growths,
            self.source_kills,
            self.bytes_verified >> 20,
            self.clients_freed_max.as_millis(),
            self.unlocked_max.as_millis(),
        );
        if last {
            println!("{line}");
        }
        let Some(path) = std::env::var_os("HYDRANT_CRASH_REPORT") else { return };
        let report = json!({
            "seconds": self.began.elapsed().as_secs_f64(), "rounds": self.rounds, "lives": self.lives,
            "kills": self.nr_kills(), "kills_by_phase": self.kills, "kills_too_late": self.late, "growths": self.growths,
            "source_kills": self.source_kills, "requests": requests, "reads": reads, "writes": writes, "trims": trims,
            "write_zeroes": zeroes, "caches": caches, "flushes": flushes, "fua": fua, "bytes_verified": self.bytes_verified,
            "clients_freed_ms_max": self.clients_freed_max.as_millis() as u64,
            "unlocked_ms_max": self.unlocked_max.as_millis() as u64,
        });
        std::fs::write(path, format!("{report}\n")).unwrap();
    }
}
