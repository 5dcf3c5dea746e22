//! A virtual machine with a kernel of its own (`tests/vm`), which runs one script.

use super::{Bench, skip};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")
}

/// The kernels that are booted: what the block device of a clone does must not depend on which it is, but where it is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// The oldest whose ublk has all that is needed. It has no dm-clone.
    Linux6_12,
    /// With dm-clone, and with what ublk has learnt since.
    Linux6_18,
}

impl Kernel {
    fn series(self) -> &'static str {
        match self {
            Kernel::Linux6_12 => "6.12",
            Kernel::Linux6_18 => "6.18",
        }
    }

    /// Whether it is there to be booted; says so when it is not.
    pub fn is_there(self) -> bool {
        let mut command = Command::new(directory().join("kernel"));
        command.arg("--have").env("HYDRANT_VM_SERIES", self.series());
        let is_there = command.output().unwrap().status.success();
        if !is_there {
            skip(&format!("needs Linux {}, which tests/vm/kernel fetches", self.series()));
        }
        is_there
    }

    /// Runs scripts of `tests/vm` as one, with these options of its `boot` and these images of the bench as disks; what they
    /// say, which is printed too.
    pub fn boot(self, bench: &Bench, scripts: &[&str], options: &[&str], disks: &[&str]) -> Said {
        let mut command = Command::new(directory().join("boot"));
        command.args(options).env("HYDRANT_VM_SERIES", self.series());
        for disk in disks {
            command.arg("-d").arg(bench.path(disk));
        }
        let script: String = scripts.iter().map(|name| fs::read_to_string(directory().join(name)).unwrap()).collect();
        let path = bench.path("script");
        fs::write(&path, script).unwrap();
        let output = command.arg(path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{said}");
        assert!(output.status.success(), "{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
        Said(said)
    }
}

/// Whether the kernel that [`boot`] takes is there; says so when it is not.
pub fn has_kernel() -> bool {
    Kernel::Linux6_18.is_there()
}

/// [`Kernel::boot`] of the newest kernel.
pub fn boot(bench: &Bench, scripts: &[&str], options: &[&str], disks: &[&str]) -> Said {
    Kernel::Linux6_18.boot(bench, scripts, options, disks)
}

/// What a script said, line by line.
pub struct Said(pub String);

impl Said {
    pub fn has(&self, line: &str) {
        assert!(self.0.lines().any(|found| found.trim_end() == line.trim_end()), "no line '{line}' in:\n{}", self.0);
    }
    /// A line that begins with `start` has `part` in it.
    pub fn has_part(&self, start: &str, part: &str) {
        let mut lines = self.0.lines().filter(|line| line.starts_with(start));
        assert!(lines.any(|line| line.contains(part)), "no line '{start}...{part}...' in:\n{}", self.0);
    }
}
