//! The life of a block device of hydrant: what it is refused for, who serves its queues, growth, and restarts under load.

use super::super::harness::*;

fn boot(script: &str, destination: u64, programs: &[&str], modules: &[&str]) -> Option<vm::Said> {
    if !vm::has_kernel() {
        return None;
    }
    let bench = Bench::new();
    let disks = [("source", 48 * MIB), ("copy", destination), ("meta", 4 * MIB)];
    disks.iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    let mut options = vec!["-t", "280", "-m", "ublk_drv", "-p", env!("CARGO_BIN_EXE_hydrant")];
    modules.iter().for_each(|module| options.extend(["-m", module]));
    programs.iter().for_each(|program| options.extend(["-p", program]));
    Some(vm::boot(&bench, &["ublk-lib.guest", script], &options, &disks.map(|(name, _)| name)))
}

#[test]
fn limits_of_a_block_device_and_its_growth() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "setpriv");
    let Some(said) = boot("ublk-limits.guest", 96 * MIB, &["setpriv", "dd"], &[]) else { return };
    // Said before anything is changed.
    let refused = "hydrant: /dev/ublk-control: no permission";
    said.has(&format!("user: {refused}: block devices need root (CAP_SYS_ADMIN, CAP_DAC_OVERRIDE)"));
    said.has_part("no-admin: ", "no permission, CAP_SYS_ADMIN is missing");
    said.has("user-metadata: 0");
    said.has("no-admin-metadata: 0");
    // It works with less, and says what that costs.
    said.has("with less: up");
    said.has("warned: without CAP_SYS_RESOURCE a block device may hang when memory is short");
    said.has_part("warned: memory can't be locked", "LimitMEMLOCK=infinity");
    said.has_part("warned: when memory runs out", "oom_score_adj can't be -1000");
    said.has("with less: 0");
    // Four shards on two CPUs, the first of them on CPU 1.
    said.has("queues: 2");
    said.has("queue 0 is served by shard 1, on CPU 0");
    said.has("queue 1 is served by shard 0, on CPU 1");
    said.has("read on CPU 0: the same");
    said.has("read on CPU 1: the same");

    said.has("resize: clone: grown, 64MiB");
    if said.0.contains("sectors: 98304") {
        // Before Linux 6.16.
        said.has_part("resize: /dev/ublkb5 keeps its size, 48MiB", "end the use of it, then stop the clone");
        said.has_part("status: WARNING", "/dev/ublkb5 keeps its size, 48MiB");
        said.has("taken over, sectors: 98304");
    } else {
        said.has("sectors: 131072");
        said.has("taken over, sectors: 131072");
        said.has("behind: behind");
        assert!(!said.0.contains("keeps its size"), "{}", said.0);
    }
    said.has("left: 0");
    said.has("stopped: 0");
    said.has("made anew, sectors: 131072");
    said.has("last: 0");
    said.has("end");
}

#[test]
fn a_daemon_is_restarted_under_load() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "mkfs.ext4", "fio");
    let programs = ["mkfs.ext4", "fsck.ext4", "fio"];
    let Some(said) = boot("ublk-restart.guest", 48 * MIB, &programs, &["ext4"]) else { return };
    for round in 1..=3 {
        said.has(&format!("restart {round}: 0"));
    }
    said.has("timed: 0");
    said.has("longest: below 25 s");
    said.has("fio: 0");
    said.has("fsck: 0");
    said.has("stopped: 0");
    said.has("device: removed");
    assert!(!said.0.contains("the device has gone"), "{}", said.0);
    said.has("end");
}

#[test]
fn an_earlier_state_that_was_put_back_is_noticed() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz");
    let Some(said) = boot("ublk-put-back.guest", 48 * MIB, &[], &[]) else { return };
    said.has("first: 0");
    said.has("nbd only: 0");
    said.has("written: there");
    for put_back in ["put back: hydrant: ", "put back, nbd only: hydrant: "] {
        said.has_part(put_back, "an earlier state has been put back");
        said.has_part(put_back, "go on without with --force");
    }
    said.has("metadata: as they were");
    said.has("with force: as the source");
    said.has("last: 0");
    said.has("end");
}
