//! Growing the real daemon's clones while they are used.

use super::harness::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Appends to a file in place.
fn append(path: &Path, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(bytes, len).unwrap();
}

fn metadata_len(bench: &Bench) -> u64 {
    fs::metadata(bench.meta()).unwrap().len()
}

/// The old last region is short and hydrated: its new bytes must come with the new size.
#[test]
fn a_clone_follows_its_source_and_goes_beyond() {
    need!("nbdsh");
    let bench = Bench::new();
    let size = 5 * MIB + 777;
    let source = bench.random("source", size);
    let mut expected = fs::read(&source).unwrap();
    let daemon = bench.clone_of(&source).args("--shards 3 --no-hydration").start();
    assert_eq!(daemon.done(&["resize", "vm"]), format!("vm: unchanged, {size} bytes\n"));
    let at = size - 100;
    nbdsh(&daemon.uri(), &format!("h = connect(); h.pwrite(b'T' * 100, {at}); h.pwrite(b'A' * 4096, 4096)"));
    expected[at as usize..].fill(b'T');
    expected[4096..8192].fill(b'A');
    let more = random_bytes(5, 3 * MIB);
    append(&source, &more);
    expected.extend_from_slice(&more);
    let now = size + 3 * MIB;
    assert_eq!(daemon.done(&["resize", "vm"]), format!("vm: grown, {now} bytes\n"));
    assert_eq!((daemon.status().size, fs::metadata(bench.copy()).unwrap().len()), (now, now));
    let read = |uri: &str, expected: &[u8]| {
        let out = bench.path("read");
        nbdsh(
            uri,
            &format!(
                "h = connect(); open({out:?}, 'wb').write(b''.join(h.pread(min(1 << 20, h.get_size() - a), a) for a in range(0, h.get_size(), 1 << 20)))"
            ),
        );
        assert_eq!(fs::metadata(&out).unwrap().len(), expected.len() as u64);
        assert_same(&out, expected);
    };
    read(&daemon.uri(), &expected);
    // Beyond the source are zeros, which clients may write.
    daemon.done(&["resize", "vm", "--size", "12MiB"]);
    expected.resize(12 << 20, 0);
    read(&daemon.uri(), &expected);
    nbdsh(&daemon.uri(), "connect().pwrite(b'Z' * 5000, (12 << 20) - 5000)");
    expected[(12 << 20) - 5000..].fill(b'Z');
    let said = daemon.refused(&["resize", "vm", "--size", "11MiB"]);
    assert!(said.contains("can't shrink: it has 12MiB, 11MiB is asked for"), "{said}");
    let said = daemon.refused(&["resize", "vm"]);
    assert!(said.contains("it can't follow its source, give a size"), "{said}");
    // Its metadata has the new size, whatever the source has by now.
    append(&source, &[9; 4096]);
    daemon.stop();
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    assert_eq!(daemon.status().size, 12 << 20);
    read(&daemon.uri(), &expected);
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected);
    assert_eq!(fs::metadata(bench.copy()).unwrap().len(), 12 << 20);
}

/// Who is connected keeps the size of its handshake, and is served on.
#[test]
fn clients_go_on_while_it_grows() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 16 * MIB + 5);
    let args = format!("-r --filter=delay file {} rdelay=5ms", source.display());
    let server = Nbdkit::start(&bench, &args);
    let daemon = bench.clone_of(server.uri()).args("--shards 2 --region-size 4KiB --hydration-threshold 8").start();
    let uri = daemon.uri();
    let client = std::thread::spawn(move || {
        let script = r#"
h = connect()
size = h.get_size()
for i in range(4000):
    h.pwrite(i.to_bytes(512, "little"), 4096 * i)
    assert h.pread(512, 4096 * i) == i.to_bytes(512, "little")
assert h.get_size() == size
# Not for those who know the old size: libnbd is not to check, the daemon is asked.
h.set_strict_mode(0)
fails(errno.EINVAL, lambda: h.pread(1, size + (1 << 30)))
assert h.pread(1, size - 1)
"#;
        nbdsh(&uri, script)
    });
    daemon.wait_status("writes", |status| status.io.writes > 50);
    let mut expected = fs::read(&source).unwrap();
    for round in 0..4u64 {
        let more = random_bytes(round, 2 * MIB + 1000 * round);
        append(&source, &more);
        expected.extend_from_slice(&more);
        assert!(daemon.done(&["resize", "vm"]).contains("grown"));
        assert_eq!(daemon.status().size, expected.len() as u64);
        nbdsh(&daemon.uri(), &format!("assert connect().get_size() == {}", expected.len()));
    }
    client.join().unwrap();
    for i in 0..4000usize {
        expected[4096 * i..][..512].fill(0);
        expected[4096 * i..][..4].copy_from_slice(&(i as u32).to_le_bytes());
    }
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected);
}

#[test]
fn a_complete_clone_grows_with_its_source_or_without() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 2 * MIB);
    let mut expected = fs::read(&source).unwrap();
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    let more = random_bytes(8, MIB);
    append(&source, &more);
    expected.extend_from_slice(&more);
    daemon.done(&["resize", "vm"]);
    daemon.wait_status("hydrated again", |status| status.is_complete() && status.hydrated_regions == 48);
    assert_same(&bench.copy(), &expected);
    // Another source in its place is refused, and so is none, unless it is not needed.
    fs::write(&source, random_bytes(99, 8 * MIB)).unwrap();
    let said = daemon.refused(&["resize", "vm"]);
    assert!(said.contains("its content is not what the clone was made from"), "{said}");
    fs::remove_file(&source).unwrap();
    let said = daemon.refused(&["resize", "vm", "--size", "4MiB"]);
    assert!(said.contains("resize needs the source") && said.contains("--zeros"), "{said}");
    daemon.done(&["message", "vm", "disable_hydration"]);
    daemon.done(&["resize", "vm", "--size", "4MiB", "--zeros"]);
    expected.resize(4 << 20, 0);
    nbdsh(&daemon.uri(), "h = connect(); assert h.get_size() == 4 << 20; assert h.pread(4096, 3 << 20) == bytes(4096)");
    assert!(!daemon.status().is_complete());
    // It needs no source to go on.
    daemon.kill9();
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    assert_same(&bench.copy(), &expected);
    daemon.stop();
    let daemon = bench.clone_of(&source).start();
    assert!(daemon.status().is_complete());
    daemon.stop();
}

#[test]
fn block_devices_must_be_large_enough_first() {
    need!("nbdsh", "loop", "losetup");
    let bench = Bench::new();
    let size = 4 * MIB + 1024;
    let source = bench.random("source", size);
    // What the device has behind the clone is old and must never show.
    let backing = bench.filled("backing", size, 0xee);
    let metadata = bench.hole("meta-backing", 12 << 10);
    let (device, meta) = (Loop::attach(&backing, 512), Loop::attach(&metadata, 512));
    let daemon = bench
        .clone_of(&source)
        .destination(&device.path)
        .metadata(&meta.path)
        .args("--region-size 4KiB --force")
        .start();
    nbdsh(&daemon.uri(), &format!("connect().pwrite(b'T' * 24, {})", size - 24));
    let more = random_bytes(3, 200 * MIB);
    append(&source, &more);
    let grow = |backing: &Path, device: &Path, bytes: &[u8]| {
        append(backing, bytes);
        run("losetup", &[Path::new("-c"), device]);
    };
    let said = daemon.refused(&["resize", "vm"]);
    assert!(said.contains("metadata") && said.contains("make it larger first"), "{said}");
    grow(&metadata, &meta.path, &[0x5a; 8192]);
    let said = daemon.refused(&["resize", "vm"]);
    let needed = size + 200 * MIB;
    assert!(said.contains("destination") && said.contains(&format!("can't grow to {needed} bytes")), "{said}");
    assert_eq!(daemon.status().size, size);
    grow(&backing, &device.path, &vec![0xee; 201 << 20]);
    daemon.done(&["resize", "vm"]);
    let script = format!(
        "h = connect(); assert h.get_size() == {needed}; assert h.pread(24, {}) == b'T' * 24; assert b'\\xee' * 64 not in h.pread(1 << 20, {size})",
        size - 24
    );
    nbdsh(&daemon.uri(), &script);
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[size as usize - 24..size as usize].fill(b'T');
    assert_same(&device.path, &expected);
}

/// A final copy is one-to-one, whatever failed on the way.
#[test]
fn a_growth_without_space_leaves_the_files_as_long_as_they_were() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh");
    for full_of in ["metadata", "destination"] {
        let bench = Bench::new();
        let size = 4 * MIB + 777;
        let source = bench.random("source", size);
        let fs = FileSystem::ext4(&bench.path("fs.img"), 24 * MIB, &bench.path("mnt"));
        let there = fs.mount.join("device");
        let (copy, meta) = match full_of {
            "metadata" => (bench.copy(), there),
            _ => (there, bench.meta()),
        };
        let daemon = bench.clone_of(&source).destination(&copy).metadata(&meta).args("--region-size 4KiB").start();
        daemon.wait_hydrated();
        let lens = || [&copy, &meta].map(|path| fs::metadata(path).unwrap().len());
        let before = lens();
        assert_eq!(before[0], size);
        // Many zones, and the old last region's new bytes.
        append(&source, &random_bytes(4, 400 * MIB));
        let filler = fs.mount.join("filler");
        let mut filling = fs::File::create(&filler).unwrap();
        let full = (0..).find_map(|_| filling.write_all(&[7; 1024]).err()).unwrap();
        assert_eq!(full.raw_os_error(), Some(28));
        let said = daemon.refused(&["resize", "vm"]);
        assert!(
            said.contains(full_of) && (said.contains("No space left") || said.contains("are free in its file system")),
            "{said}"
        );
        assert_eq!((lens(), daemon.status().size), (before, size), "{full_of}");
        assert_eq!(daemon.status().metadata.mode.to_string(), "rw");
        assert_same(&copy, &fs::read(&source).unwrap()[..size as usize]);
        // It goes on, and starts again without a word of it.
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(h.pread(512, 0), 0); h.flush()");
        drop(filling);
        fs::remove_file(&filler).unwrap();
        daemon.done(&["message", "vm", "disable_hydration"]);
        daemon.done(&["resize", "vm", "--size", "5MiB"]);
        assert_eq!(lens()[0], 5 * MIB);
        let log = daemon.stop();
        assert!(!log.contains("cut"), "{log}");
    }
}

/// Whose doing it was can't be known: nothing is cut off, and it is told.
#[test]
fn a_destination_that_is_longer_than_its_clone_is_told_and_left_alone() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    assert!(!daemon.stop().contains("not part of it"));
    append(&bench.copy(), &[9; 5000]);
    for source in [source.as_path(), Path::new("/nonexistent")] {
        let daemon = bench.clone_of(source).start();
        daemon.wait_log("has 1053576 bytes, the clone 1048576: what follows is not part of it");
        daemon.stop();
        assert_eq!(fs::metadata(bench.copy()).unwrap().len(), MIB + 5000);
    }
}

/// Again and again, at any moment of a growth: what starts is the old clone or the new one, with what was flushed.
#[test]
fn killed_in_the_middle_of_a_growth() {
    need!("nbdsh");
    let bench = Bench::new();
    let mut size = 3 * MIB + 100;
    let source = bench.random("source", size);
    let mut expected = fs::read(&source).unwrap();
    let mut grown = 0;
    for round in 0..12u64 {
        let daemon = bench.clone_of(&source).args("--region-size 4KiB --no-hydration --shards 2").start();
        assert_eq!(daemon.status().size, size);
        // The last region is hydrated, and flushed.
        let tail = [0x40 + round as u8; 50];
        nbdsh(&daemon.uri(), &format!("h = connect(); h.pwrite(bytes([{}]) * 50, {}); h.flush()", tail[0], size - 50));
        expected[size as usize - 50..].copy_from_slice(&tail);
        let more = random_bytes(round, MIB + 1000 * round + 1);
        append(&source, &more);
        let mut resize = daemon.hydrant(&["resize", "vm"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(3 * round));
        daemon.kill9();
        resize.wait().unwrap();
        let daemon = bench.clone_of(&source).args("--region-size 4KiB --no-hydration --shards 3").start();
        let now = daemon.status().size;
        assert!(now == size || now == size + more.len() as u64, "{now}");
        grown += u64::from(now > size);
        if now == size {
            daemon.done(&["resize", "vm"]);
        }
        expected.extend_from_slice(&more);
        size = expected.len() as u64;
        let out = bench.path("read");
        nbdsh(
            &daemon.uri(),
            &format!(
                "h = connect(); open({out:?}, 'wb').write(b''.join(h.pread(min(1 << 20, h.get_size() - a), a) for a in range(0, h.get_size(), 1 << 20)))"
            ),
        );
        assert_eq!(fs::metadata(&out).unwrap().len(), size);
        assert_same(&out, &expected);
        daemon.stop();
    }
    eprintln!("{grown} of 12 growths were done when the daemon was killed; metadata {} bytes", metadata_len(&bench));
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected);
}

/// `size` in the configuration: only so much of the source is cloned, until it is resized.
#[test]
fn a_clone_of_a_part_of_its_source_grows_into_it() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    bench.clone_of(&source).args("--size 9MiB").refused(&["source", "too small", "8388608"]);
    let command = bench.clone_of(&source).args("--size 5MiB");
    let daemon = command.start();
    assert_eq!(daemon.status().size, 5 * MIB);
    daemon.wait_hydrated();
    assert_eq!(fs::metadata(bench.copy()).unwrap().len(), 5 * MIB);
    daemon.done(&["resize", "vm", "--size", "6MiB"]);
    daemon.wait_status("hydrated", |status| status.is_complete() && status.size == 6 * MIB);
    daemon.stop();
    // The configuration is as it was.
    let daemon = command.start();
    assert_eq!(daemon.status().size, 6 * MIB);
    daemon.wait_log("it has 6MiB by its metadata, which hold; 5MiB is the size given");
    daemon.done(&["resize", "vm"]);
    daemon.wait_status("hydrated", |status| status.is_complete() && status.size == 8 * MIB);
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&source).unwrap());
    bench
        .clone_of(&source)
        .args("--size 20MiB")
        .refused(&["the clone has 8MiB, 20MiB was asked for", "hydrant resize"]);
}
