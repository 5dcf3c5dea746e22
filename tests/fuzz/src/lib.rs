//! The fuzz targets: each takes any bytes and panics when something does not hold.
//!
//! This is used twice: by cargo-fuzz (the binaries in `fuzz_targets/`, one line each), and by `tests/fuzz_corpora.rs`,
//! which runs the committed inputs and mutations of them on stable Rust with every test run. So it uses the public
//! interface of the library alone, and knows nothing of either harness.
//!
//! What holds for every target, beside its own properties: no panic; memory within [`Target::bound`] of the input's
//! length, whatever lengths the input claims; an end, soon (each harness bounds the time).

mod config;
mod control;
pub mod dm_meta;
mod dump;
mod executor;
mod input;
mod meta;
pub mod meter;
mod nbd_client;
mod nbd_server;
mod table;
mod words;

use meter::Bound;

/// One fuzz target.
pub struct Target {
    pub name: &'static str,
    run: fn(&[u8]),
    /// The memory that an input may cost.
    pub bound: Bound,
    /// A longer input is cut: what is in it more than once is no news.
    pub len_max: usize,
}

const fn target(name: &'static str, run: fn(&[u8]), bound: Bound, len_max: usize) -> Target {
    Target { name, run, bound, len_max }
}

/// All of them, by the name of their directory in `corpus/`.
pub const TARGETS: [Target; 9] = [
    target("config", config::target, config::BOUND, 16 << 10),
    target("control", control::target, control::BOUND, 128 << 10),
    target("dm_meta", dm_meta::target, dm_meta::BOUND, 128 << 10),
    target("dump", dump::target, dump::BOUND, 16 << 10),
    target("meta", meta::target, meta::BOUND, 64 << 10),
    target("nbd_client", nbd_client::target, nbd_client::BOUND, 16 << 10),
    target("nbd_server", nbd_server::target, nbd_server::BOUND, 128 << 10),
    target("table", table::target, table::BOUND, 4 << 10),
    target("words", words::target, words::BOUND, 8 << 10),
];

impl Target {
    /// The target of this name.
    pub fn named(name: &str) -> &'static Target {
        TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no fuzz target '{name}'"))
    }

    /// Runs one input; panics when it shows a fault.
    pub fn check(&self, data: &[u8]) {
        let data = &data[..data.len().min(self.len_max)];
        let ((), usage) = meter::measure(|| (self.run)(data));
        self.bound.check(data.len(), usage);
    }
}
