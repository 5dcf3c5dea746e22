//! The destination fails.

use super::super::harness::*;
use super::{ends_badly, events, on_faulty_disk, status_text};
use std::fs;

/// A flush that failed is never retried into success, not even when the disk flushes again: no later flush or FUA write is
/// acknowledged until the clone was started again. What is hydrated can be used all the while; what was flushed
/// before is there.
#[test]
fn after_a_failed_flush_no_flush_succeeds_until_the_next_start() {
    need!("fuse", "nbdsh");
    let bench = Bench::new();
    let (source, disk, command) = on_faulty_disk(&bench, 8 * MIB);
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 300_000, 65536); h.flush()");
    disk.fail("flush", "EIO");
    nbdsh(
        &daemon.uri(),
        "h = connect(); h.pwrite(b'2' * 1000, 65536); h.pwrite(b'2' * 65536, 4 << 20); fails(errno.EIO, h.flush)",
    );
    disk.heal();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
for _ in range(3):
    fails(errno.EIO, h.flush)
    fails(errno.EIO, lambda: h.pwrite(b"3", 70_000, flags=nbd.CMD_FLAG_FUA))
fails(errno.EIO, lambda: h.pwrite(b"3", 6 << 20))
h.pread(300_000, 65536)
h.pwrite(b"4", 80_000)
assert h.pread(1000, 7 << 20) == open(@SOURCE@, "rb").read()[7 << 20:][:1000]
"#
        .replace("@SOURCE@", &format!("{source:?}"))
        .as_str(),
    );
    let status = daemon.status();
    assert_eq!(status.metadata.mode.to_string(), "ro");
    assert_eq!(status.io.errors, 1 + 2 * 3 + 1, "flushes that failed count as well");
    let told = events(&daemon, "read_only");
    assert!(told.len() == 1 && told[0].contains("/disk: flush: Input/output error"), "{told:?}");
    let text = status_text(&daemon);
    assert!(text.contains("ro because of destination ") && text.contains("/disk: flush: Input/output error"), "{text}");
    assert!(text.contains("start the clone again"), "{text}");
    let log = ends_badly(daemon);
    assert!(log.contains("stopped without its last commit"), "{log}");

    let daemon = command.start();
    assert_eq!(daemon.status().metadata.mode.to_string(), "rw");
    daemon.wait_hydrated();
    daemon.stop();
    // The failed flush has lost, or not, what was written after the one before.
    let (found, expected) = (read_first(&disk.backing, 8 * MIB), fs::read(&source).unwrap());
    let is_one_of = |range: std::ops::Range<usize>, bytes: &[u8]| found[range].iter().all(|byte| bytes.contains(byte));
    assert!(is_one_of(65536..66536, b"12") && is_one_of(66536..365_536, b"134"));
    // Of the others the rest of the regions is the source's.
    assert!(found[..65536] == expected[..65536] && found[365_536..4 << 20] == expected[365_536..4 << 20]);
    let lost = (4 << 20)..(4 << 20) + 65536;
    assert!(found[lost.clone()] == expected[lost.clone()] || is_one_of(lost.clone(), b"2"));
    assert!(found[lost.end..] == expected[lost.end..]);
}

/// Writes that fail cost their clients an error, and hydration the regions concerned: the rest is written, copied, flushed.
/// When the disk takes them again, all is copied.
#[test]
fn write_errors_of_a_part_cost_that_part() {
    need!("fuse", "nbdsh");
    let bench = Bench::new();
    let (source, disk, command) = on_faulty_disk(&bench, 8 * MIB);
    // Regions 64 and 65.
    disk.fail("write", &format!("EIO {} {}", 64 * 65536 + 4096, 65 * 65536 + 4096));
    let daemon = command.start();
    let status = daemon.wait_status("all but two", |status| status.hydrated_regions == 126);
    assert_eq!((status.nr_regions, status.metadata.mode.to_string().as_str()), (128, "rw"));
    daemon.wait_status("counted", |status| status.hydration.failed_regions == 2);
    nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
fails(errno.EIO, lambda: h.pwrite(b"x", 64 * 65536))
fails(errno.EIO, lambda: h.pwrite(b"x" * 65536, 65 * 65536))
fails(errno.EIO, lambda: h.zero(65536, 65 * 65536))
# What the destination can't keep the source still has.
assert h.pread(131072, 64 * 65536) == open(@SOURCE@, "rb").read()[64 * 65536:][:131072]
h.pwrite(b"y" * 65536, 66 * 65536)
h.flush()
"#
        .replace("@SOURCE@", &format!("{source:?}")),
    );
    assert!(daemon.log().contains("/disk: write 65536 bytes at offset "), "{}", daemon.log());
    let told = events(&daemon, "hydration_failed");
    assert!(!told.is_empty(), "{}", daemon.log());
    daemon.kill9();
    disk.heal();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[66 * 65536..67 * 65536].fill(b'y');
    // An overwrite that failed may have been written, in part; here the disk refuses as a whole.
    assert_same(&disk.backing, &expected);
}

/// Read errors reach who reads hydrated bytes, and nobody else; nothing is taken from the source in their place, which
/// would be old. Overwriting works.
#[test]
fn read_errors_of_hydrated_bytes_are_told_and_never_covered_by_the_source() {
    need!("fuse", "nbdsh");
    let bench = Bench::new();
    let (source, disk, command) = on_faulty_disk(&bench, 4 * MIB);
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'n' * 131072, 65536); h.flush()");
    disk.fail("read", "EIO 65536 66048");
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.EIO, lambda: h.pread(512, 65536))
fails(errno.EIO, lambda: h.pread(1 << 20, 0))
# The rest of a block must be read to be written.
fails(errno.EIO, lambda: h.pwrite(b"x", 65536))
assert h.pread(65536, 131072) == b"n" * 65536
h.pwrite(b"o" * 65536, 65536)
h.flush()
"#,
    );
    assert!(daemon.log().contains("/disk: read "), "{}", daemon.log());
    let status = daemon.status();
    assert_eq!((status.metadata.mode.to_string().as_str(), status.io.errors), ("rw", 3));
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.kill9();
    disk.heal();
    let daemon = command.start();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..131072].fill(b'o');
    expected[131072..196608].fill(b'n');
    assert_same(&disk.backing, &expected);
}
