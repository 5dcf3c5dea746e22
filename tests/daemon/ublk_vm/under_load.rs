//! File systems and fio on block devices of hydrant while they hydrate; discards, and what the kernel refuses.

use super::super::harness::*;
use super::boot;

#[test]
fn file_systems_under_load_and_discards_on_a_block_device() {
    need!(
        "qemu-system-x86_64",
        "busybox",
        "cpio",
        "modprobe",
        "xz",
        "dmsetup",
        "blkdiscard",
        "mkfs.ext4",
        "mkfs.xfs",
        "fio"
    );
    let bench = Bench::new();
    let disks = [("source", 32 * MIB), ("copy", 32 * MIB), ("meta", 4 * MIB)];
    disks.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let programs = ["mkfs.ext4", "fsck.ext4", "mkfs.xfs", "xfs_repair", "fio"];
    let disks = disks.map(|(name, _)| name);
    let Some(said) = boot(&bench, &["ublk-load.guest"], &["ext4", "xfs"], &programs, &disks) else { return };

    for fs in ["ext4", "xfs"] {
        for what in ["fio 0", "checksums 0", "fsck 0", "stop status: 0", "checksums on the destination alone 0"] {
            said.has(&format!("{fs}: {what}"));
        }
    }
    said.has("device: fio 0");
    let refused =
        ["read of 100 bytes", "write of 100 bytes", "read at byte 1001", "write at byte 1001", "discard at byte 100"];
    refused.iter().for_each(|what| said.has(&format!("{what}: refused")));
    said.has("read of sector 1001: done");
    said.has("nothing was written: 0");

    // A discard reads zeros where whole regions are covered, and what was there or zeros in parts; around it nothing changes.
    said.has("discard of 20 regions: done");
    said.has("20 regions: 0 not zero");
    said.has("before and behind: 65536 65536");
    said.has("discard of a part: done");
    said.has("around the part: 4096 53248");
    said.has("discard across: done");
    said.has("across: 4096 0 61440");
    said.has("zeroed across: done");
    said.has("zeroed: 4096 0 61440");
    said.has("discard of all: done");
    said.has("state: 512/512 rw");
    said.has("all: 0 not zero");
    said.has("after it: W");
    said.has("device: stop status: 0");
    said.has("destination: W, 65536 not zero");
    assert!(!said.0.contains("kernel: "), "{}", said.0);
}
