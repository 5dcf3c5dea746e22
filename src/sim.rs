//! A seeded simulation of everything around the engine: executor, time, disks, source and the way between shards.
//!
//! One thread, virtual time, one random generator: the same seed gives the same run, step by step. The engine's own
//! code runs unchanged; only what it has traits for is simulated. Compiled for tests alone.
//!
//! * [`executor`]: tasks in random order, time that jumps. * [`disk`]: a volatile cache that a crash tears apart.
//! * [`source`]: slow, failing, lost. * [`mesh`]: several shards with delays between them.
//! * [`clone`]: a whole clone, put together as the daemon does it. * [`oracle`]: which bytes a read may return, now
//!   and after a crash. * [`laws`]: what must hold at every step. * [`report`]: what a run has met.
//!
//! `HYDRANT_SIM_SEED=n` runs the tests with that one seed, `HYDRANT_SIM_SEED=n..m` with more. `HYDRANT_SIM_TRACE=1` prints
//! every operation of the devices, request, fault and crash with its virtual time; `HYDRANT_SIM_BYTE=n` what clients do
//! with one byte. `HYDRANT_SIM_SECONDS=n` is how long fresh seeds are explored (see `tests/simulate`), and
//! `HYDRANT_SIM_REPORT=path` where what they met is written.

pub mod clone;
pub mod disk;
pub mod executor;
pub mod laws;
pub mod mesh;
pub mod oracle;
pub mod report;
pub mod source;

mod tests;

/// xorshift64*, seeded through splitmix64 so that neighbouring seeds have nothing in common.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ (z >> 31)) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// The seeds of a randomised test: the given ones, or the one in the environment.
pub fn seeds(default: std::ops::Range<u64>) -> Vec<u64> {
    match std::env::var("HYDRANT_SIM_SEED") {
        Ok(given) => {
            let number = |text: &str| text.parse::<u64>().expect("HYDRANT_SIM_SEED is a number or a range");
            match given.split_once("..") {
                Some((first, end)) => (number(first)..number(end)).collect(),
                None => vec![number(&given)],
            }
        }
        Err(_) => default.collect(),
    }
}
