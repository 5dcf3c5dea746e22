//! The block device, in a virtual machine with a kernel that has ublk (`tests/vm`).

use super::harness::*;

const KIB64: &str = "65536";

#[test]
fn a_block_device_from_its_making_to_its_end() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio");
    if !vm::has_kernel() {
        return;
    }
    let bench = Bench::new();
    for (name, size) in
        [("source", 96), ("copy", 96), ("meta", 8), ("other.copy", 96), ("other.meta", 8)].map(|(n, s)| (n, s * MIB))
    {
        bench.hole(name, size);
    }
    let programs = [env!("CARGO_BIN_EXE_hydrant"), "mkfs.ext4", "fsck.ext4", "fstrim", "blkdiscard", "fio"];
    let mut options = vec!["-t", "280", "-m", "ublk_drv", "-m", "ext4"];
    programs.iter().for_each(|program| options.extend(["-p", program]));
    if have("nbdcopy").is_ok() {
        options.extend(["-p", "nbdcopy"]);
    }
    let said = vm::boot(&bench, "ublk.guest", &options, &["source", "copy", "meta", "other.copy", "other.meta"]);
    let has = |line: &str| assert!(said.lines().any(|found| found.trim_end() == line), "no line '{line}' in:\n{said}");

    // What is missing is said in one line, before anything is changed.
    has(
        "no-module: hydrant: /dev/ublk-control: there is no ublk here: load it with 'modprobe ublk_drv' (Linux 6.12 or later has it)",
    );
    has("no-module-metadata: 0");

    for (name, value) in [
        ("logical_block_size", "512"),
        ("physical_block_size", "512"),
        ("minimum_io_size", KIB64),
        ("optimal_io_size", KIB64),
        ("discard_granularity", KIB64),
        ("fua", "1"),
        ("write_cache", "write back"),
        ("discard_max_bytes", "4294901760"),
        ("write_zeroes_max_bytes", "4294901760"),
        ("max_sectors_kb", "512"),
        ("nr_requests", "128"),
    ] {
        has(&format!("queue {name}: {value}"));
    }
    has("queue rotational as destination: yes");
    has("queues: 2");
    has(&format!("sectors: {}", 96 * MIB / 512));
    has("unused: ublk /dev/ublkb5; not in use");
    has("reads as the source: yes");
    has("file through the clone: yes");
    has("mounted: ublk /dev/ublkb5; mounted at /mnt");
    has(
        "stop-refused: hydrant: clone 'clone' is in use: /dev/ublkb5 is mounted at /mnt; end that, or use --force: /dev/ublkb5 then waits for the next daemon of the clone",
    );
    assert!(said.contains("ublk device number 5 is taken by process "), "{said}");
    has("fstrim: done");
    has("trims: some");
    has("files when hydrated: yes");
    if have("nbdcopy").is_ok() {
        has("over NBD: the same");
    }
    has("zeroed: 0");
    has("blkdiscard: done");
    has("discarded: 0");
    has("unaligned: refused");
    has("beyond the end: refused");
    has("stop: done");
    has("stop status: 0");
    has("left after stop: ");
    has("destination as the device: yes");

    // Killed under a file system and fio, and restarted.
    has("left status: 0");
    has("left: /dev/ublkb5");
    has("fio: 0");
    has("bits were kept: yes");
    assert!(said.contains("bits-gone: hydrant: ") && said.contains("or go on without them with --force"), "{said}");
    has("late file: yes");
    has("fsck of the device: 0");
    has("last status: 0");
    has("left at the end: ");
    has("end");
}
