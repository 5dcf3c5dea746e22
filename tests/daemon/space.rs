//! A destination that has no space left.

use super::harness::*;
use hydrant::control::api::{HydrationState, Status};
use std::fs;

/// A destination of 32 MiB on a file system with about 12 MiB of space; the file `filler` has the rest.
fn small(bench: &Bench) -> FileSystem {
    let fs = FileSystem::ext4(&bench.path("fs.img"), 48 * MIB, &bench.path("mnt"));
    fs::write(fs.mount.join("filler"), random_bytes(3, 32 * MIB)).unwrap();
    fs
}

#[test]
fn hydration_pauses_when_the_destination_is_full_and_goes_on_when_there_is_space() {
    need!("loop", "losetup", "mkfs.ext4");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let fs = small(&bench);
    let destination = fs.mount.join("copy");
    let daemon = bench.clone_of(&source).destination(&destination).start();
    daemon.wait_event("hydration pauses");
    assert!(daemon.log().contains("No space left on device"), "{}", daemon.log());
    let is_paused = |s: &Status| s.hydration.state == HydrationState::Failing && s.hydrating_regions == 0;
    let status = daemon.wait_status("paused", |status| is_paused(status) && status.hydrated_regions > 0);
    assert!(!status.is_complete());
    assert_eq!(status.metadata.mode.to_string(), "rw");
    // Reads of all of it, from source and destination; writes get the right error, and corrupt nothing.
    let checked = nbdsh(
        &daemon.uri(),
        &format!(
            r#"
h = connect("hydrant:hydrated")
source = open({source:?}, "rb").read()
for at in range(0, 32 << 20, 1 << 20):
    assert h.pread(1 << 20, at) == source[at:at + (1 << 20)], at
start = 0
for length, flag in extents(h, "hydrant:hydrated"):
    if flag:
        done = start
    else:
        free = start
    start += length
fails(errno.ENOSPC, lambda: [h.pwrite(b"x" * 65536, at) for at in range(free // 65536 * 65536, free + (1 << 20), 65536)])
h.pwrite(b"hydrated", done)
h.flush()
print(done)
"#
        ),
    );
    let done: usize = checked.trim().parse().unwrap();
    fs::remove_file(fs.mount.join("filler")).unwrap();
    daemon.wait_hydrated();
    daemon.stop();
    // Which of the failed writes got through is not known; the rest is.
    let (found, mut expected) = (read_first(&destination, 32 * MIB), fs::read(&source).unwrap());
    expected[done..done + 8].copy_from_slice(b"hydrated");
    for (region, bytes) in found.chunks(65536).enumerate() {
        let source = &expected[region * 65536..][..65536];
        assert!(bytes == source || bytes.iter().all(|byte| *byte == b'x'), "region {region}");
    }
}

#[test]
fn a_full_destination_survives_a_restart() {
    need!("loop", "losetup", "mkfs.ext4");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let fs = small(&bench);
    let destination = fs.mount.join("copy");
    let command = bench.clone_of(&source).destination(&destination);
    let daemon = command.start();
    daemon.wait_event("hydration pauses");
    daemon.stop();
    let daemon = command.start();
    daemon.wait_event("hydration pauses");
    fs::remove_file(fs.mount.join("filler")).unwrap();
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&destination, &fs::read(&source).unwrap());
}

#[test]
fn a_limit_on_the_size_of_files_is_told_at_the_start() {
    need!("root", "setpriv", "prlimit");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    bench.clone_of(&source).limit("--fsize=4194304").refused(&["destination", "may only write 4MiB", "ulimit -f"]);
    assert!(!bench.copy().exists() && !bench.meta().exists());
    let daemon = bench.clone_of(&source).limit("--fsize=8388608").start();
    daemon.wait_hydrated();
    daemon.stop();
}
