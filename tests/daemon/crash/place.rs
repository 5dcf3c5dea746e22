//! Where a clone's destination and metadata are: files on a disk, in memory (without direct I/O), or a block device.

use super::content::Random;
use crate::harness::*;
use std::path::PathBuf;
use tempfile::TempDir;

pub struct Place {
    /// For people.
    pub kind: &'static str,
    /// What the daemon is given.
    pub destination: PathBuf,
    pub metadata: PathBuf,
    /// Where the destination's bytes are.
    pub bytes: PathBuf,
    _device: Option<Loop>,
    _memory: Option<TempDir>,
}

impl Place {
    /// `size_max`: that of the clone at its end. `fixed`: it has that size from the start.
    pub fn random(bench: &Bench, size_max: u64, fixed: bool, random: &mut Random) -> Self {
        let files = Self {
            kind: "files",
            destination: bench.copy(),
            metadata: bench.meta(),
            bytes: bench.copy(),
            _device: None,
            _memory: None,
        };
        let in_memory = || tempfile::tempdir_in("/dev/shm").ok();
        match random.below(20) {
            0..2 if fixed && have("loop").is_ok() && have("losetup").is_ok() => {
                let block = random.pick(&[512, 4096]);
                let device = Loop::attach(&bench.hole("copy", size_max.next_multiple_of(4096)), block);
                Self { kind: "a loop device", destination: device.path.clone(), _device: Some(device), ..files }
            }
            2..4 => match in_memory() {
                Some(dir) => {
                    let metadata = dir.path().join("meta");
                    Self { kind: "a file, metadata in memory", metadata, _memory: Some(dir), ..files }
                }
                None => files,
            },
            4 => match in_memory() {
                Some(dir) => {
                    let copy = dir.path().join("copy");
                    Self { kind: "memory", destination: copy.clone(), bytes: copy, _memory: Some(dir), ..files }
                }
                None => files,
            },
            _ => files,
        }
    }

    /// The destination has nothing behind the clone's end.
    pub fn is_file(&self) -> bool {
        self.destination == self.bytes
    }
}
