//! The power is cut, under destination and metadata of a clone that hydrates, with a file system on it, and with a daemon that was
//! killed a few times: dm-log-writes has recorded all that reached the disk, and here it is replayed to many places.
//!
//! At each one: the metadata are sound, the clone starts and becomes complete, its file system is recovered from its journal and clean,
//! every file and block that was fsynced is whole.

use super::super::harness::*;
use super::super::meta_tools::meta_ok;
use super::boot;
use super::log_writes::Log;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const SIZE: u64 = 32 * MIB;
const META: u64 = 4 * MIB;
const SLOT: usize = 4096;
/// Places where everything is looked at: it takes a second or two. `HYDRANT_POWER_CUTS` says another number.
const CUTS: u64 = 16;

fn number_of_cuts() -> u64 {
    let Ok(text) = std::env::var("HYDRANT_POWER_CUTS") else { return CUTS };
    let cuts = text.parse().ok().filter(|cuts| *cuts >= 8);
    cuts.unwrap_or_else(|| panic!("HYDRANT_POWER_CUTS={text}: not a number of 8 or more"))
}

fn repeated(line: &str, length: usize) -> Vec<u8> {
    format!("{line}\n").into_bytes().into_iter().cycle().take(length).collect()
}

/// Unmounted when it is dropped, by a failure too.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg(self.0).status();
        assert!(std::thread::panicking() || done.is_ok_and(|status| status.success()), "umount {}", self.0.display());
    }
}

/// Mounted while `look` runs; afterwards the journal was replayed and the file system is clean.
fn mounted<T>(bench: &Bench, fs: &str, image: &Path, look: impl FnOnce(&Path) -> T) -> T {
    let (mount, device) = (bench.path("mount"), Loop::attach(image, 512));
    fs::create_dir_all(&mount).unwrap();
    run("mount", &["-t", fs, device.path.to_str().unwrap(), mount.to_str().unwrap()]);
    let mounted = Mounted(&mount);
    let found = look(&mount);
    drop(mounted);
    match fs {
        "xfs" => run("xfs_repair", &["-n", device.path.to_str().unwrap()]),
        _ => run("fsck.ext4", &["-fn", device.path.to_str().unwrap()]),
    };
    found
}

/// The files and slots whose marks are before the cut are whole; of the old file nothing else has changed.
fn look_at_files(mount: &Path, marks: &[&str], old: &[u8], place: &str) {
    let all: BTreeSet<&str> = marks.iter().copied().collect();
    let number = |mark: &str| mark.rsplit('-').next().unwrap().parse::<usize>().unwrap();
    for mark in marks.iter().filter(|mark| mark.starts_with("file-")) {
        let n = number(mark);
        if !all.contains(format!("gone-{n}").as_str()) {
            let found = fs::read(mount.join(mark)).unwrap_or_else(|e| panic!("{place}: {mark}: {e}"));
            let expected = repeated(&format!("file {n}"), n * 79_190 % 245_760 + 1);
            assert!(found == expected, "{place}: {mark} was fsynced and is not whole: {} bytes", found.len());
        }
    }
    let done = marks.iter().filter(|mark| mark.starts_with("slot-")).count();
    let found = fs::read(mount.join("old")).unwrap();
    assert_eq!(found.len(), old.len(), "{place}");
    let mut expected = old.to_vec();
    let place_of = |n: usize| n * 37 % 2048 * SLOT;
    (1..=done).for_each(|n| expected[place_of(n)..][..SLOT].copy_from_slice(&repeated(&format!("slot {n}"), SLOT)));
    // The one that was being written when the power was cut: each sector old or new.
    let (next, new) = (place_of(done + 1), repeated(&format!("slot {}", done + 1), SLOT));
    for at in (0..SLOT).step_by(512) {
        let sector = &found[next + at..][..512];
        assert!(sector == &expected[next + at..][..512] || sector == &new[at..][..512], "{place}: slot {}", done + 1);
    }
    expected[next..][..SLOT].copy_from_slice(&found[next..][..SLOT]);
    let differs = (0..found.len()).find(|at| found[*at] != expected[*at]);
    assert_eq!(differs, None, "{place}: the old file at this byte, {done} slots");
}

fn power_cuts(fs: &str, mkfs: &str) {
    let bench = Bench::new();
    [("source", SIZE), ("disk", SIZE + META), ("log", 512 * MIB)]
        .iter()
        .for_each(|(name, size)| drop(bench.hole(name, *size)));
    let disks = ["source", "disk", "log"];
    let Some(said) = boot(&bench, &["ublk-power-cut.guest"], &["dm-log-writes", fs], &[mkfs], &disks) else { return };
    said.has("stop status: 0");

    let log = Log::open(&bench.path("log"));
    let disk = fs::read(bench.path("disk")).unwrap();
    let mut whole = vec![0; disk.len()];
    log.apply(&mut whole, 0, log.entries.len());
    assert!(whole == disk, "the log has all that is on the disk");
    drop((whole, disk));
    let started = log.entries.iter().position(|entry| entry.mark.as_deref() == Some("started")).unwrap();
    // To mount it is to write it.
    fs::copy(bench.path("source"), bench.path("source.mounted")).unwrap();
    let old = mounted(&bench, fs, &bench.path("source.mounted"), |mount| fs::read(mount.join("old")).unwrap());
    let source = fs::read(bench.path("source")).unwrap();

    // Any place, or one where as much as possible is not flushed; first some while the metadata are made.
    let mut random = Random(0x6879_6472_616e_7405);
    let mut cuts: Vec<usize> = (0..3).map(|_| (random.next() as usize) % started).collect();
    for i in 3..number_of_cuts() {
        let place = started + random.next() as usize % (log.entries.len() - started);
        cuts.push(if i % 3 == 0 { place } else { log.next_flush(place) });
    }
    cuts.sort_unstable();
    let (mut durable, mut applied) = (vec![0; (SIZE + META) as usize], 0);
    let (mut hydrated, mut files) = (BTreeSet::new(), 0);
    for cut in cuts {
        let place = format!("{fs}, cut before entry {cut} of {}", log.entries.len());
        log.apply(&mut durable, applied, log.durable(cut));
        applied = log.durable(cut);
        let mut image = durable.clone();
        log.apply_unflushed(&mut image, applied, cut, &mut random);
        fs::write(bench.copy(), &image[..SIZE as usize]).unwrap();
        fs::write(bench.meta(), &image[SIZE as usize..]).unwrap();
        drop(image);

        // The one that is looked at, for who reads of a failure.
        println!("{place}");
        if cut > started {
            meta_ok(&bench, &format!("check @{}", bench.meta().file_name().unwrap().to_str().unwrap()));
        }
        let daemon = bench.clone_of(bench.path("source")).start();
        let said = daemon.log();
        hydrated.extend(
            said.lines()
                .filter(|line| line.contains("created, "))
                .map(|line| line.split("created, ").nth(1).unwrap().to_string()),
        );
        daemon.wait_hydrated();
        daemon.stop();
        let marks: Vec<&str> = log.entries[..cut].iter().filter_map(|entry| entry.mark.as_deref()).collect();
        files += marks.len();
        mounted(&bench, fs, &bench.copy(), |mount| look_at_files(mount, &marks, &old, &place));
    }
    assert!(fs::read(bench.path("source")).unwrap() == source, "the source was written");
    // For people.
    println!("{}", said.0);
    println!(
        "{fs}: {} entries, {} flushes, {} FUA, {} discards; {files} marks checked; {hydrated:?}",
        log.entries.len(),
        log.count("flush"),
        log.count("fua"),
        log.count("discard")
    );
    assert!(hydrated.len() > 4 && files > 20, "{hydrated:?}, {files} marks");
}

#[test]
fn an_ext4_survives_power_cuts_under_a_clone() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard", "mkfs.ext4", "loop");
    power_cuts("ext4", "mkfs.ext4");
}

#[test]
fn an_xfs_survives_power_cuts_under_a_clone() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard", "mkfs.xfs", "loop");
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("xfs") && run_for_status("modprobe", &["xfs"]).0 != 0
    {
        return skip("needs a kernel with xfs");
    }
    power_cuts("xfs", "mkfs.xfs");
}
