//! Device-mapper makes the disks under a block device of hydrant fail and stall: what docs/reliability.md promises then
//! reaches the file system and the programs on it.

use super::super::harness::*;
use super::boot;

#[test]
fn disks_that_fail_and_stall_under_a_block_device() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard", "mkfs.ext4");
    let bench = Bench::new();
    let disks = [("source", 16 * MIB), ("copy", 16 * MIB), ("meta", 4 * MIB)];
    disks.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let modules = ["dm-flakey", "dm-delay", "ext4"];
    let programs = ["mkfs.ext4", "fsck.ext4"];
    let Some(said) = boot(&bench, &["ublk-faults.guest"], &modules, &programs, &disks.map(|(name, _)| name)) else {
        return;
    };
    let eio = "Input/output error";
    let has = |scene: &str, what: &str, how: &str| said.has(&format!("{scene}: {what}: {how}"));

    // Read errors of the source stay in their regions; overwriting heals, and so does the source.
    said.has("bad source: 2 regions could not be copied; tried again: regions 100-101 (bytes 6553600+131072)");
    has("bad source", "read of 99", "done");
    has("bad source", "read of 100", eio);
    has("bad source", "read of 101", eio);
    has("bad source", "read of 102", "done");
    has("bad source", "part of 101 written", eio);
    has("bad source", "all of 101 written", "done");
    said.has("bad source: 101 reads W");
    has("bad source, mended", "read of 100", "done");
    has("bad source", "stop status", "0");
    said.has("flickering source: same as the source");
    said.has("flickering source: errors were told");
    has("flickering source", "stop status", "0");

    // Of the destination too, and the source never covers for it.
    has("bad destination", "write of 49", "done");
    has("bad destination", "write of 50", eio);
    has("bad destination", "part of 50 written", eio);
    has("bad destination", "write of 51", "done");
    has("bad destination", "read of 52", "done");
    has("bad destination", "read of 51", "done");
    said.has("bad destination, mended: 50 is the source's");
    said.has("bad destination, mended: W W");
    has("bad destination", "read of 49, hydrated", eio);
    has("bad destination", "stop status", "0");

    // After a flush that failed none succeeds until the next start.
    has("failed flush", "write before", "done");
    has("failed flush", "the flush", eio);
    has("failed flush", "the next flush", eio);
    said.has("failed flush: mode ro");
    has("failed flush", "write of a hydrated region", "done");
    has("failed flush", "write of another region", eio);
    said.has("failed flush: 1 event");
    has("failed flush", "stop status", "1");
    has("failed flush", "flush after the next start", "done");
    has("failed flush", "stop status after the next start", "0");

    // A file system sees its writes fail; what it had flushed is whole at the next start.
    for (scene, mode, late, write, events, status) in [
        ("dying metadata", "ro", "Read-only file system", eio, 1, 1),
        ("dying destination", "rw", "done", "done", 0, 0),
    ] {
        has(scene, "file kept", "done");
        has(scene, "file lost", eio);
        said.has(&format!("{scene}: mode {mode}"));
        said.has(&format!("{scene}: kept is read"));
        has(scene, "file late", late);
        has(scene, "write of the device", write);
        said.has(&format!("{scene}: mode {mode}, works again"));
        said.has(&format!("{scene}: {events} event"));
        has(scene, "stop status", &status.to_string());
        said.has(&format!("{scene}: fsck 0"));
        said.has(&format!("{scene}: files are whole"));
        has(scene, "stop status after the next start", "0");
    }

    // Slowness costs time only.
    has("slow disks", "file", "done");
    said.has("slow disks: old file is read");
    said.has("slow disks: files are whole");
    said.has("slow disks: fsck 0");
    has("slow disks", "stop status", "0");
    assert!(!said.0.contains("kernel: "), "{}", said.0);
}
