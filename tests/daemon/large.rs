//! A clone of 100 TiB in regions of 64 KiB: 1677721600 of them. It starts, serves and comes back, in a bounded memory.

use super::harness::*;
use std::fs::{self, File};

const SIZE: u64 = 100 << 40;
const REGIONS: u64 = SIZE >> 16;
/// One bit per region, as the maps have them: 200 MiB.
const MAP_BYTES: u64 = REGIONS / 8;
/// What a daemon needs beside the maps: measured 30 MiB, with buffers for the metadata of 16 MiB.
const BESIDE_BYTES: u64 = 64 * MIB;

/// The most memory that the daemon had, and what it has now, in bytes.
fn memory(daemon: &Daemon) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * KIB
    };
    (field("VmHWM:"), field("VmRSS:"))
}

/// In the dump, one region of each zone is hydrated: no zone can do without its bits.
fn scattered(dump: &str) -> String {
    let mut dump: serde_json::Value = serde_json::from_str(dump).unwrap();
    let per_zone = dump["regions_per_zone"].as_u64().unwrap();
    let runs: Vec<[u64; 2]> = (0..REGIONS).step_by(per_zone as usize).map(|first| [first, first]).collect();
    dump["hydrated_count"] = runs.len().into();
    dump["hydrated"] = serde_json::to_value(runs).unwrap();
    dump.to_string()
}

#[test]
fn a_hundred_terabytes_start_in_bounded_memory() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    // Few file systems have files of this size; tmpfs does.
    let Ok(place) = tempfile::tempdir_in("/dev/shm") else { return skip("needs /dev/shm") };
    let destination = place.path().join("copy");
    if let Err(error) = File::create(&destination).and_then(|file| file.set_len(SIZE)) {
        return skip(&format!("needs files of 100 TiB in /dev/shm: {error}"));
    }
    let source = Nbdkit::start(&bench, "null size=100T");
    let clone = bench.clone_of(source.uri()).destination(&destination).args("--shards 2");

    // New: the maps are all zeros, which take no memory.
    let daemon = clone.clone().args("--no-hydration").start();
    nbdsh(
        &daemon.uri(),
        "h = connect()\nfor at in (0, 1 << 45, h.get_size() - 70000):\n  h.pwrite(b'far away' * 8000, at)\nh.flush()",
    );
    let (most, _) = memory(&daemon);
    assert!(most <= BESIDE_BYTES, "{most} bytes");
    let status = daemon.status();
    assert_eq!((status.size, status.nr_regions), (SIZE, REGIONS));
    daemon.kill9();

    let daemon = clone.clone().args("--no-hydration").start();
    nbdsh(
        &daemon.uri(),
        "h = connect()\nfor at in (0, 1 << 45, h.get_size() - 70000):\n  assert h.pread(64000, at) == b'far away' * 8000\n\
         assert h.pread(4096, 1 << 46) == bytes(4096)",
    );
    let (most, _) = memory(&daemon);
    assert!(most <= BESIDE_BYTES, "{most} bytes");
    daemon.message("enable_hydration");
    daemon.wait_status("hydrating", |status| status.hydrated_regions > 10_000_000);
    let log = daemon.stop();

    // The worst case: every zone has its own bits. Twice while they are loaded, once from then on.
    let meta = bench.meta();
    let dump = bench.path("dump.json");
    fs::write(&dump, scattered(&daemon_less(&bench, &["meta", "dump", "--json", meta.to_str().unwrap()]))).unwrap();
    daemon_less(&bench, &["meta", "restore", "--force", dump.to_str().unwrap(), meta.to_str().unwrap()]);
    let daemon = clone.args("--no-hydration").start();
    assert_eq!(daemon.status().hydrated_regions, daemon.status().metadata.used_blocks - 2, "{log}");
    let (most, now) = memory(&daemon);
    assert!(now <= MAP_BYTES + BESIDE_BYTES, "{now} bytes now");
    assert!(most <= 2 * MAP_BYTES + BESIDE_BYTES, "{most} bytes at most");
    assert!(most >= MAP_BYTES, "{most} bytes are not all the bits");
    daemon.stop();
}

/// The command line without a daemon; what it prints.
fn daemon_less(bench: &Bench, args: &[&str]) -> String {
    let program = env!("CARGO_BIN_EXE_hydrant");
    let output = std::process::Command::new(program).args(args).current_dir(bench.dir()).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
