//! The block device, in a virtual machine with a kernel that has ublk (`tests/vm`): the oldest that will do, and a newer one.

use super::harness::vm::{Kernel, Said};
use super::harness::*;

const KIB64: &str = "65536";
const SIZE: u64 = 32 * MIB;

/// Boots with the images and programs that the scripts want; what they say, line by line. `None`: it can't be done here.
fn boot(kernel: Kernel, scripts: &[&str]) -> Option<Said> {
    boot_with(kernel, scripts, &[], &[])
}

/// As [`boot`], with more programs and kernel modules.
pub fn boot_with(kernel: Kernel, scripts: &[&str], more_programs: &[&str], more_modules: &[&str]) -> Option<Said> {
    if !kernel.is_there() {
        return None;
    }
    let bench = Bench::new();
    let images = [("source", SIZE), ("copy", SIZE), ("meta", 4 * MIB), ("other.copy", SIZE), ("other.meta", 4 * MIB)];
    images.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let programs = [env!("CARGO_BIN_EXE_hydrant"), "mkfs.ext4", "fsck.ext4", "blkdiscard", "dd", "fio"];
    let mut options = vec!["-t", "330", "-m", "ublk_drv", "-m", "ext4"];
    programs.iter().chain(more_programs).for_each(|program| options.extend(["-p", program]));
    more_modules.iter().for_each(|module| options.extend(["-m", module]));
    if have("nbdcopy").is_ok() {
        options.extend(["-p", "nbdcopy"]);
    }
    let scripts: Vec<_> = ["ublk-lib.guest"].iter().chain(scripts).copied().collect();
    Some(kernel.boot(&bench, &scripts, &options, &images.map(|(name, _)| name)))
}

fn from_its_making_to_its_end(kernel: Kernel) {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio", "setpriv");
    let Some(said) = boot_with(kernel, &["ublk.guest"], &["setpriv"], &[]) else { return };

    // What is missing is said in one line, before anything is changed.
    said.has(
        "no-module: hydrant: /dev/ublk-control: there is no ublk here: load it with 'modprobe ublk_drv' (Linux 6.12 or later has it)",
    );
    said.has("no-module-metadata: 0");
    said.has(
        "no-permission: hydrant: /dev/ublk-control: no permission: block devices need root (CAP_SYS_ADMIN, CAP_DAC_OVERRIDE)",
    );
    said.has(
        "no-capability: hydrant: /dev/ublk-control: no permission, CAP_SYS_ADMIN is missing: block devices need root (CAP_SYS_ADMIN, CAP_DAC_OVERRIDE)",
    );
    said.has("no-rights-metadata: 0");

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
        said.has(&format!("queue {name}: {value}"));
    }
    said.has("queue rotational as destination: yes");
    said.has("queues: 2");
    said.has(&format!("sectors: {}", SIZE / 512));
    said.has("unused:  ublk /dev/ublkb5; not in use");
    said.has("reads as the source: yes");
    said.has("file through the clone: yes");
    said.has("mounted:  ublk /dev/ublkb5; mounted at /mnt");
    said.has(
        "stop-refused: hydrant: clone 'clone' is in use: /dev/ublkb5 is mounted at /mnt; end that, or use --force: /dev/ublkb5 then waits for the next daemon of the clone",
    );
    said.has_part("taken: ", "ublk device number 5 is taken by process ");
    said.has("fstrim: done");
    said.has("some trims");
    said.has("files when hydrated: yes");
    if have("nbdcopy").is_ok() {
        said.has("over NBD: the same");
    }
    said.has("zeroed: 0");
    said.has("blkdiscard: done");
    said.has("discarded: 0");
    said.has("behind it: as written");
    said.has("unaligned: refused");
    said.has("beyond the end: refused");
    // Both shards, from Linux 6.16 on.
    let direct = match kernel {
        Kernel::Linux6_12 => "direct on 6.12: 0",
        Kernel::Linux6_18 => "direct on 6.18: 2",
    };
    said.has(direct);
    said.has("stop: done");
    said.has("stop status: 0");
    said.has("left after stop: ");
    said.has("destination as the device: yes");

    said.has("end");
}

#[test]
fn a_block_device_from_its_making_to_its_end() {
    from_its_making_to_its_end(Kernel::Linux6_18);
}

#[test]
fn a_block_device_from_its_making_to_its_end_on_6_12() {
    from_its_making_to_its_end(Kernel::Linux6_12);
}

fn who_uses_it_has_only_waited(kernel: Kernel) {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio");
    let Some(said) = boot(kernel, &["ublk-killed.guest"]) else { return };
    said.has("left status: 0");
    said.has("left: /dev/ublkb5");
    said.has("fio: 0");
    said.has("bits were kept: yes");
    said.has_part("bits-gone: hydrant: ", "or go on without them with --force");
    said.has("late file: yes");
    said.has("fsck of the device: 0");
    said.has("last status: 0");
    said.has("left at the end: ");
    said.has("end");
}

#[test]
fn who_uses_the_device_of_a_killed_daemon_has_only_waited() {
    who_uses_it_has_only_waited(Kernel::Linux6_18);
}

#[test]
fn who_uses_the_device_of_a_killed_daemon_has_only_waited_on_6_12() {
    who_uses_it_has_only_waited(Kernel::Linux6_12);
}

fn of_a_daemon_of_many_clones(kernel: Kernel) {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4");
    let Some(said) = boot(kernel, &["ublk-serve.guest"]) else { return };
    said.has("chosen: /dev/ublkb3");
    said.has("free one: /dev/ublkbN");
    said.has_part("remove-mounted: ", "clone 'a' is in use (/dev/ublkb");
    said.has_part("remove-mounted: ", " is mounted at /mnt; end that, or use --force)");
    said.has_part("remove-open: ", "clone 'b' is in use (/dev/ublkb3 is open by process ");
    said.has("end while suspended: 0");
    said.has("other device: removed");
    said.has("taken over: the same");
    said.has("held: written");
    said.has("both taken over: the same");
    said.has("held: still there");
    said.has("removed: b");
    said.has("removed by force: a");
    said.has("gone: 0");
    said.has("end: 0");
    said.has("left at the end: ");
    said.has("end");
}

#[test]
fn block_devices_of_a_daemon_of_many_clones() {
    of_a_daemon_of_many_clones(Kernel::Linux6_18);
}

#[test]
fn block_devices_of_a_daemon_of_many_clones_on_6_12() {
    of_a_daemon_of_many_clones(Kernel::Linux6_12);
}
