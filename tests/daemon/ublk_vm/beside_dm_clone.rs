//! hydrant and the kernel's dm-clone do the same, in one boot.

use super::super::harness::*;
use super::boot;

/// The two ways in which dm-clone loses a write that it acknowledged, and flushed: a copy in flight that lands over what
/// was written after a discard, and a table that is loaded over a live clone and has read the bits too early.
#[test]
fn what_dm_clone_loses_hydrant_keeps() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard");
    let bench = Bench::new();
    bench.filled("source", 8 * MIB, b'S');
    let empty = [("copy", 8 * MIB), ("meta", 4 * MIB), ("dm.copy", 8 * MIB), ("dm.meta", 4 * MIB)];
    empty.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let disks = ["source", "copy", "meta", "dm.copy", "dm.meta"];
    let Some(said) = boot(&bench, &["ublk-dm-clone.guest"], &["dm-clone", "dm-delay"], &[], &disks) else { return };

    said.has("dm-clone: acknowledged");
    said.has("dm-clone: whole write reads S, partial write reads S");
    said.has("hydrant: acknowledged");
    said.has("hydrant: whole write reads W, partial write reads W");

    said.has("dm-clone: a second table opens the metadata in use");
    said.has("dm-clone reload: acknowledged");
    said.has("dm-clone reload: reads S");
    said.has_part("hydrant second daemon: ", "destination /dev/vdb is in use by process ");
    said.has("hydrant reload: acknowledged");
    said.has("hydrant reload: reads W");
    said.has("hydrant restart: reads W");

    said.has("stop status: 0");
    said.has("destination: W W");
}
