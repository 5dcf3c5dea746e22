//! Disks that go away for good under a block device of hydrant: the modes `ro` and `Fail`, and what its users are answered then.

use super::super::harness::*;
use super::boot;

#[test]
fn disks_that_are_pulled_from_under_a_block_device() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard");
    let bench = Bench::new();
    bench.filled("source", 8 * MIB, b'S');
    let empty = [("copy", 8 * MIB), ("meta", 4 * MIB), ("other.copy", 8 * MIB), ("other.meta", 4 * MIB)];
    empty.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let disks = ["source", "copy", "meta", "other.copy", "other.meta"];
    let Some(said) = boot(&bench, &["ublk-pulled.guest"], &[], &[], &disks) else { return };
    let eio = "Input/output error";

    // Without metadata what is hydrated, and what the source has, can be read; nothing can be promised.
    for (scene, mode, read, found) in [("metadata pulled", "ro", "done", "X"), ("destination pulled", "Fail", eio, "")]
    {
        said.has(&format!("{scene}: write before: done"));
        said.has(&format!("{scene}: mode {mode}"));
        for what in ["read of 3", "read of 9"] {
            said.has(&format!("{scene}: {what}: {read}"));
        }
        for what in ["write of 3", "write of 9", "flush", "discard"] {
            said.has(&format!("{scene}: {what}: {eio}"));
        }
        // The write of a hydrated region reached the disk; the flush that it asked for did not succeed.
        said.has(&format!("{scene}: 3 reads {found}"));
        said.has(&format!("{scene}: 1 event"));
        said.has(&format!("{scene}: stop status: 1"));
        said.has(&format!("{scene}: left"));
    }
    said.has_part("metadata pulled:  events", "was cut off at 0 bytes");
    said.has_part("destination pulled:  events", "was cut off at 0 bytes");
    assert!(!said.0.contains("kernel: "), "{}", said.0);
}
