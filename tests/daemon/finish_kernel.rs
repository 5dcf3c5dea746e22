//! A clone that is handed over to its destination, in a virtual machine with ublk and device-mapper (`tests/vm`).

use super::harness::*;
use super::ublk_kernel::boot_with;

#[test]
fn a_clone_is_handed_over_under_a_file_system_and_fio() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio", "dmsetup");
    let Some(said) = boot_with("finish.guest", &["dmsetup"], &["dm_mod"]) else { return };

    said.has("no-module: hydrant: /dev/mapper/control: there is no device-mapper here: load it with 'modprobe dm_mod'");
    said.has_part("file-destination: hydrant: destination /tmp/copy is no block device", "losetup");
    said.has_part(
        "name-taken: hydrant: dm_name: there is a /dev/mapper/other already, without a uuid",
        "choose another name",
    );
    said.has("metadata so far: 0");
    said.has("table: 0 98304 linear ublk 0");
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
    said.has("table after: 0 98304 linear destination 0");
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
    said.has("small: 0 81920 linear ublk 0");
    said.has("grown: clone: grown, 48MiB");
    said.has("large: 0 98304 linear ublk 0");
    said.has("left after stop:");
    said.has("linear status: 0");
    said.has("linear: 0 98304 linear destination 0");
    said.has("end");
}

#[test]
fn a_daemon_that_is_killed_while_it_hands_over() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio", "dmsetup", "flock");
    let Some(said) = boot_with("finish-killed.guest", &["dmsetup", "flock"], &["dm_mod"]) else { return };

    said.has("loaded: yes");
    said.has("table after that: 0 98304 linear ublk 0");
    said.has("inactive: Live");
    said.has("late file: yes");
    said.has("clone 'clone' is finished: /dev/mapper/vm1 is its destination");
    said.has("left of ublk:");
    said.has("late file: still");
    said.has("table at the end: 0 98304 linear destination 0");
    for pause in ["0.1", "0.2", "0.35"] {
        said.has(&format!("fio after {pause} s: 0"));
        said.has(&format!("fsck after {pause} s: 0"));
        said.has(&format!("table after {pause} s: 0 98304 linear destination 0"));
        said.has(&format!("left after {pause} s:"));
    }
    // Who gets the lock that the daemon has let go of is up to the kernel; as a rule one of those who wait for it.
    match said.0.contains("table when locked: 0 98304 linear ublk 0") {
        true => {
            said.has_part("locked: hydrant: ", "is locked by somebody else");
            said.has("claimed again: 1");
            said.has("finish:");
        }
        false => skip("the daemon had the lock again before those who waited for it"),
    }
    said.has("status: 0");
    said.has("fio with the lock: 0");
    said.has("table with the lock: 0 98304 linear destination 0");
    said.has("end");
}
