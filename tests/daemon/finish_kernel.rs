//! A clone that is handed over to its destination, in a virtual machine with ublk and device-mapper (`tests/vm`).

use super::harness::vm::Kernel;
use super::harness::*;
use super::ublk_kernel::boot_with;

fn under_a_file_system_and_fio(kernel: Kernel) {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio", "dmsetup");
    let Some(said) = boot_with(kernel, &["finish.guest"], &["dmsetup"], &["dm_mod"]) else { return };

    said.has("no-module: hydrant: /dev/mapper/control: there is no device-mapper here: load it with 'modprobe dm_mod'");
    said.has_part("file-destination: hydrant: destination /tmp/copy is no block device", "losetup");
    said.has_part(
        "name-taken: hydrant: dm_name: there is a /dev/mapper/other already, without a uuid",
        "choose another name",
    );
    said.has("metadata so far: 0");
    said.has("table: 0 65536 linear ublk 0");
    said.has("uuid: HYDRANT-UUID");
    said.has("status:  ublk /dev/mapper/vm1 above /dev/ublkb5; not in use");
    said.has("file through the clone: yes");
    said.has("mounted:  ublk /dev/mapper/vm1 above /dev/ublkb5; mounted at /mnt");
    said.has_part("stop-refused: hydrant: clone 'clone' is in use: /dev/mapper/vm1 is mounted at /mnt;", "--force");
    said.has_part("too-early: hydrant: clone 'clone' is not complete: ", "hydrant finish clone --wait");
    said.has_part("ublk-open: hydrant: /dev/ublkb5 is open by process ", "use /dev/mapper/vm1");
    said.has("suspended: hydrant: clone 'clone' is suspended: 'hydrant resume clone' first");
    said.has("finish:");
    said.has("daemon status: 0");
    said.has("table after: 0 65536 linear destination 0");
    said.has("ublk after:");
    said.has_part("list after: ", "no daemon is listening");
    said.has("fio goes on: yes");
    said.has("fio: 0");
    said.has("still mounted: yes");
    said.has("file after: yes");
    said.has("again: clone 'clone' is finished: /dev/mapper/vm1 is its destination");
    said.has("again status: 0");
    said.has("fsck: 0");
    said.has("fsck of the destination: 0");

    // It grows, and is handed over by itself.
    said.has("small: 0 49152 linear ublk 0");
    said.has("grown: clone: grown, 32MiB");
    // Linux learnt in 6.16 to change the size of a ublk device; before, it keeps its size until it is made anew.
    let sectors = if kernel == Kernel::Linux6_12 { 49152 } else { 65536 };
    said.has(&format!("large: 0 {sectors} linear ublk 0"));
    said.has("left after stop:");
    said.has("linear status: 0");
    said.has("linear: 0 65536 linear destination 0");
    said.has("end");
}

#[test]
fn a_clone_is_handed_over_under_a_file_system_and_fio() {
    under_a_file_system_and_fio(Kernel::Linux6_18);
}

#[test]
fn a_clone_is_handed_over_under_a_file_system_and_fio_on_6_12() {
    under_a_file_system_and_fio(Kernel::Linux6_12);
}

#[test]
fn a_daemon_that_is_killed_while_it_hands_over() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio", "dmsetup", "flock");
    let Some(said) = boot_with(Kernel::Linux6_18, &["finish-killed.guest"], &["dmsetup", "flock"], &["dm_mod"]) else {
        return;
    };

    said.has("loaded: yes");
    said.has("table after that: 0 65536 linear ublk 0");
    said.has("inactive: Live");
    said.has("late file: yes");
    said.has("clone 'clone' is finished: /dev/mapper/vm1 is its destination");
    said.has("left of ublk:");
    said.has("late file: still");
    said.has("table at the end: 0 65536 linear destination 0");
    for pause in ["0.1", "0.2", "0.35"] {
        said.has(&format!("fio after {pause} s: 0"));
        said.has(&format!("fsck after {pause} s: 0"));
        said.has(&format!("table after {pause} s: 0 65536 linear destination 0"));
        said.has(&format!("left after {pause} s:"));
    }
    // Who gets the lock that the daemon has let go of is up to the kernel; as a rule one of those who wait for it.
    match said.0.contains("table when locked: 0 65536 linear ublk 0") {
        true => {
            said.has_part("locked: hydrant: ", "is locked by somebody else");
            said.has("claimed again: 1");
            said.has("finish:");
        }
        false => skip("the daemon had the lock again before those who waited for it"),
    }
    said.has("status: 0");
    said.has("fio with the lock: 0");
    said.has("table with the lock: 0 65536 linear destination 0");
    said.has("end");
}

#[test]
fn clones_of_a_daemon_of_many_are_handed_over() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "dmsetup", "nbdcopy");
    let Some(said) = boot_with(Kernel::Linux6_18, &["finish-serve.guest"], &["dmsetup"], &["dm_mod"]) else { return };

    said.has_part("too-early: hydrant: clone 'asked' is not complete: ", "hydrant finish asked --wait");
    // A client of NBD would lose the clone: it keeps it as it is, complete or not.
    said.has("itself, with a client: 0 65536 linear ublk 0");
    said.has_part("itself-refused: hydrant: clone 'itself' is in use by NBD clients (1 connection", "would lose it");
    said.has("itself: 0 65536 linear destination 0");
    said.has("the other one: 0 65536 linear ublk 0");
    said.has_part("asked-refused: hydrant: clone 'asked' is in use by NBD clients (1 connection", "would lose it");
    said.has("asked, with a client: 0 65536 linear ublk 0");
    said.has("client: 1000000");
    said.has("asked-finish:");
    said.has("asked: 0 65536 linear destination 0");
    // What was done before is done; of others nothing is known.
    said.has("asked-again:");
    said.has("itself-again:");
    said.has_part("unknown: hydrant: ", "'nobody'");
    said.has("left:");
    said.has("said: 2");
    // It may be given other clones.
    said.has("daemon: goes on");
    said.has("left of ublk:");
    said.has("writers: went on");
    said.has("stop status: 0");
    said.has("next: clone 'asked' is finished: /dev/mapper/vm1 is its destination");
    said.has("next: clone 'itself' is finished: /dev/mapper/vm2 is its destination");
    said.has("next status: 0");
    said.has("files: yes");
    for name in ["vm1", "vm2"] {
        said.has(&format!("fsck of {name}: 0"));
    }
    said.has("end");
    assert!(!said.0.contains("kernel: "), "{}", said.0);
}
