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
    need!("loop", "losetup", "mkfs.ext4", "nbdsh");
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

/// A loop device over a file that can't grow, as a thin volume of a full pool.
#[test]
fn a_block_device_without_space_costs_what_it_concerns_and_no_more() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let fs = small(&bench);
    let backing = fs.mount.join("backing");
    fs::File::create(&backing).unwrap().set_len(32 * MIB).unwrap();
    let destination = Loop::attach(&backing, 512);
    let daemon = bench.clone_of(&source).destination(&destination.path).args("--no-hydration").start();
    // One after the other, so that what is written first has a place.
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
h.pwrite(b"a" * (1 << 20), 0)
def fill():
    for at in range(1 << 20, 32 << 20, 1 << 20):
        h.pwrite(b"b" * (1 << 20), at)
fails(errno.ENOSPC, fill)
# What was written is there, and what failed is as it was or new.
assert h.pread(1 << 20, 0) == b"a" * (1 << 20)
source = open(@SOURCE@, "rb").read()
assert h.pread(1 << 20, 31 << 20) == source[31 << 20:]
"#
        .replace("@SOURCE@", &format!("{source:?}"))
        .as_str(),
    );
    let status = daemon.status();
    assert!(status.io.errors > 0 && !status.is_complete());
    assert!(daemon.log().contains("No space left on device"), "{}", daemon.log());
    assert!(daemon.log().lines().count() < 30, "the log is flooded: {}", daemon.log());
    fs::remove_file(fs.mount.join("filler")).unwrap();
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    let (found, expected) = (read_first(&destination.path, 32 * MIB), fs::read(&source).unwrap());
    assert!(found[..1 << 20].iter().all(|byte| *byte == b'a'));
    for (index, region) in found.chunks(65536).enumerate().skip(16) {
        let is_source = region == &expected[index * 65536..][..65536];
        assert!(is_source || region.iter().all(|byte| *byte == b'b'), "region {index}");
    }
    drop(destination);
}

/// The file system under the destination is shut down, as after an error of its disk: all I/O fails with EIO.
#[test]
fn a_destination_that_dies_fails_requests_and_flushes_and_nothing_else() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh", "python3");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let fs = FileSystem::ext4(&bench.path("fs.img"), 32 * MIB, &bench.path("mnt"));
    let destination = fs.mount.join("copy");
    let mut daemon = bench.clone_of(&source).destination(&destination).args("--no-hydration --shards 2").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'a' * 100_000, 1000); h.flush()");
    const SHUTDOWN: &str = "import fcntl, os, struct, sys; fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
    run("/usr/bin/python3", &["-c", SHUTDOWN, fs.mount.to_str().unwrap()]);
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.EIO, lambda: h.pread(100, 1000))
fails(errno.EIO, lambda: h.pwrite(b"x", 1000))
fails(errno.EIO, lambda: h.pwrite(b"x" * 65536, 4 << 20))
fails(errno.EIO, lambda: h.flush())
fails(errno.EIO, lambda: h.flush())
# The source is there all the same.
assert h.pread(100, 6 << 20) == open(@SOURCE@, "rb").read()[6 << 20:][:100]
"#
        .replace("@SOURCE@", &format!("{source:?}"))
        .as_str(),
    );
    let status = daemon.status();
    assert_eq!(status.metadata.mode.to_string(), "ro");
    assert!(status.io.errors >= 3, "{status:#?}");
    assert!(daemon.log().contains("metadata mode is now ro"), "{}", daemon.log());
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(std::time::Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
}

#[test]
fn after_a_failed_commit_the_clone_is_read_only_until_it_is_started_again() {
    need!("loop", "losetup", "prlimit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let destination = Loop::attach(&bench.hole("backing", 4 * MIB), 512);
    let command = bench.clone_of(&source).destination(&destination.path).args("--no-hydration");
    let mut daemon = command.start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 0); h.flush()");
    // From now on nothing can be written to the bitmap, which is behind the superblocks.
    run("prlimit", &["--pid", &daemon.pid().to_string(), "--fsize=8192"]);
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
h.pwrite(b"2" * 65536, 65536)
for _ in range(3):
    try:
        h.flush()
        raise AssertionError("the flush succeeded")
    except nbd.Error as error:
        assert error.errnum in (errno.EIO, errno.ENOSPC), error
# What is hydrated can be used; what would need new metadata can't, nor is anything promised.
assert h.pread(65536, 0) == b"1" * 65536
h.pwrite(b"3", 5)
assert h.pread(65536, 65536) == b"2" * 65536
fails(errno.EIO, lambda: h.pwrite(b"4" * 65536, 2 * 65536))
fails(errno.EIO, lambda: h.pwrite(b"4", 2 * 65536))
fails(errno.EIO, lambda: h.trim(65536, 2 * 65536))
fails(errno.EIO, lambda: h.pwrite(b"3", 6, flags=nbd.CMD_FLAG_FUA))
assert h.pread(65536, 2 * 65536) == open(@SOURCE@, "rb").read()[2 * 65536:3 * 65536]
"#
        .replace("@SOURCE@", &format!("{source:?}"))
        .as_str(),
    );
    daemon.wait_event("metadata mode is now ro");
    let line = daemon.hydrant(&["status", "--dm"]).output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&line).trim_end().ends_with(" ro"));
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(std::time::Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "it says that the last commit failed: {log}");
    let daemon = bench.clone_of(&source).destination(&destination.path).start();
    assert_eq!(daemon.status().metadata.mode.to_string(), "rw");
    daemon.wait_hydrated();
    daemon.stop();
    // The write that was never flushed may be lost, but only it; the overwritten byte was in a hydrated region.
    let (found, mut expected) = (read_first(&destination.path, 4 * MIB), fs::read(&source).unwrap());
    expected[..65536].fill(b'1');
    expected[5] = b'3';
    assert!(found[..65536] == expected[..65536] || found[6] == b'3');
    let second = &found[65536..2 * 65536];
    assert!(second.iter().all(|byte| *byte == b'2') || second == &expected[65536..2 * 65536]);
    assert!(found[2 * 65536..] == expected[2 * 65536..]);
}

#[test]
fn a_growth_whose_metadata_have_no_room_is_refused_and_changes_nothing() {
    need!("loop", "losetup", "mkfs.ext4");
    let bench = Bench::new();
    let source = bench.hole("source", 64 * MIB);
    let fs = FileSystem::ext4(&bench.path("fs.img"), 16 * MIB, &bench.path("mnt"));
    let clone = bench.clone_of(&source).metadata(fs.mount.join("meta"));
    let daemon = clone.args("--region-size 4KiB --no-hydration").start();
    fs::File::options().write(true).open(&source).unwrap().set_len(1 << 40).unwrap();
    let said = daemon.refused(&["resize", "vm"]);
    assert!(said.contains("needs 34.1 MiB") && said.contains("are free in its file system"), "{said}");
    let status = daemon.status();
    assert_eq!((status.size, status.metadata.mode.to_string().as_str()), (64 * MIB, "rw"));
    assert_eq!(fs::metadata(bench.copy()).unwrap().len(), 64 * MIB);
    // A little more has room.
    daemon.done(&["resize", "vm", "--size", "1GiB"]);
    daemon.stop();
}

#[test]
fn a_read_only_clone_that_is_removed_says_what_was_not_committed() {
    need!("loop", "losetup", "prlimit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let destination = Loop::attach(&bench.hole("backing", 4 * MIB), 512);
    let path = |name: &str| bench.path(name).display().to_string();
    let config = format!(
        "[[clone]]\nname = \"vm\"\nsource = \"{}\"\ndestination = \"{}\"\nmetadata = \"{}\"\nno_hydration = true\n",
        source.display(),
        destination.path.display(),
        path("meta")
    );
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("vm", "running", |status| status.nr_regions > 0);
    nbdsh(&daemon.uri_of("vm"), "h = connect(); h.pwrite(b'1' * 65536, 0); h.flush()");
    run("prlimit", &["--pid", &daemon.pid().to_string(), "--fsize=8192"]);
    nbdsh(
        &daemon.uri_of("vm"),
        "h = connect(); h.pwrite(b'2' * 65536, 65536)\ntry:\n  h.flush()\nexcept nbd.Error: pass",
    );
    assert_eq!(daemon.status_of("vm").metadata.mode.to_string(), "ro");
    let refused = daemon.refused(&["remove", "vm"]);
    assert!(refused.starts_with("clone 'vm': removed: its last commit failed: "), "{refused}");
    assert_eq!(daemon.done(&["list"]).lines().count(), 1, "a header only");
    let events = daemon.done(&["events", "--json"]);
    let stopped = events.lines().find(|line| line.contains("\"stopped\""));
    assert!(stopped.is_some_and(|line| line.contains("stopped without its last commit: ")), "{events}");
    assert!(events.lines().last().unwrap().contains("\"removed\""), "{events}");
}
