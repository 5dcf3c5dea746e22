//! Block devices of hydrant on a machine whose memory is short.

use super::super::harness::*;

/// A file system and swap on two clones, and more in memory than fits: nothing hangs, nobody is killed, all is as it was.
///
/// Without the reserve of buffers (`dma_buf::reserve`) this ends by the time limit, in every run: the daemon waits in a page
/// fault for memory that only its own writes can make free.
#[test]
fn short_memory_with_files_and_swap_on_block_devices() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4");
    if !vm::has_kernel() {
        return;
    }
    let bench = Bench::new();
    let disks =
        [("source", 96 * MIB), ("copy", 96 * MIB), ("meta", 4 * MIB), ("swap.copy", 128 * MIB), ("swap.meta", 4 * MIB)];
    disks.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let mut options = vec!["-t", "300", "-r", "288", "-m", "ublk_drv", "-m", "ext4"];
    for program in [env!("CARGO_BIN_EXE_hydrant"), "mkfs.ext4", "fsck.ext4"] {
        options.extend(["-p", program]);
    }
    let said = vm::boot(&bench, &["ublk-lib.guest", "ublk-memory.guest"], &options, &disks.map(|(name, _)| name));
    said.has("locked: yes");
    said.has("score: -1000");
    // They are not shown over NBD.
    said.has("sockets: control");
    said.has("nbd in status: 0");
    said.has("warnings: 0");
    said.has("swap: on");
    said.has("swapped: yes");
    said.has("swapped of the daemon: 0 KiB");
    said.has("daemon: alive");
    said.has("wrong files: 0");
    said.has("wrong in swap: 0");
    said.has("fsck: 0");
    said.has("stopped: 0");
    said.has("killed: 0");
    said.has("end");
}
