//! A virtual machine with a kernel of its own (`tests/vm`), which runs one script.

use super::{Bench, skip};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")
}

/// Whether there is a kernel to boot; says so when there is none.
pub fn has_kernel() -> bool {
    let has = Command::new(directory().join("kernel")).arg("--have").output().unwrap().status.success();
    if !has {
        skip("needs the kernel that tests/vm/kernel fetches");
    }
    has
}

/// Runs scripts of `tests/vm` as one, with these options of its `boot` and these images of the bench as disks; what they say.
pub fn boot(bench: &Bench, scripts: &[&str], options: &[&str], disks: &[&str]) -> Said {
    let mut command = Command::new(directory().join("boot"));
    command.args(options);
    for disk in disks {
        command.arg("-d").arg(bench.path(disk));
    }
    let script: String = scripts.iter().map(|name| fs::read_to_string(directory().join(name)).unwrap()).collect();
    let path = bench.path("script");
    fs::write(&path, script).unwrap();
    let output = command.arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    Said(said)
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
