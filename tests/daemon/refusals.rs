//! What is refused at the start: with one clear line, exit status 1, and nothing changed on disk.

use super::harness::*;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Refused, and everything in the bench's directory is as before; the socket directory too, but for the runtime
/// directory itself.
fn refused(bench: &Bench, command: &CloneCommand, words: &[&str]) -> String {
    let before = checksums(bench.dir());
    let line = command.refused(words);
    assert_eq!(checksums(bench.dir()), before, "something was changed on disk, though refused: {line}");
    for name in ["vm.sock", "vm.control"] {
        assert!(!bench.runtime().join("hydrant").join(name).exists(), "{name} was left behind");
    }
    // And so it is when only asked.
    let dry = command.clone().args("--dry-run").refused(words);
    assert_eq!(checksums(bench.dir()), before);
    assert_eq!(dry, line);
    line
}

/// A clone that was used: its source, copy and metadata.
fn used(bench: &Bench, args: &str) -> CloneCommand {
    let source = bench.random("source", 2 * MIB);
    let command = bench.clone_of(&source).args(args);
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'x' * 65536, 65536); h.pread(100, 5); h.flush()");
    daemon.stop();
    command
}

#[test]
fn missing_files_and_directories() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let missing = bench.path("missing");
    refused(&bench, &bench.clone_of(&missing), &["source", "/missing", "No such file or directory"]);
    let inside = missing.join("file");
    refused(&bench, &bench.clone_of(&source).destination(&inside), &["destination", "/missing/file", "No such file"]);
    refused(&bench, &bench.clone_of(&source).metadata(&inside), &["metadata", "/missing/file", "No such file"]);
}

#[test]
fn things_that_are_no_devices() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let (dir, fifo) = (bench.path("dir"), bench.path("fifo"));
    fs::create_dir(&dir).unwrap();
    run("mkfifo", &[&fifo]);
    for (path, what) in
        [(dir.as_path(), "a directory"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character device")]
    {
        refused(&bench, &bench.clone_of(path), &["source", what, "name a regular file or a block device"]);
        refused(&bench, &bench.clone_of(&source).destination(path), &["destination", what]);
        refused(&bench, &bench.clone_of(&source).metadata(path), &["metadata", what]);
    }
}

#[test]
fn an_empty_source() {
    let bench = Bench::new();
    refused(&bench, &bench.clone_of(bench.hole("source", 0)), &["source", "is empty: there is nothing to clone"]);
}

#[test]
fn files_that_may_not_be_read_or_written() {
    need!("root", "setpriv");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let secret = bench.random("secret", MIB);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let checked = |command: CloneCommand, words: &[&str]| {
        let line = command.unprivileged().refused(words);
        assert!(!bench.copy().exists() && !bench.meta().exists(), "{line}");
    };
    checked(bench.clone_of(&secret), &["source", "/secret", "Permission denied"]);
    checked(bench.clone_of(&source).destination(&secret), &["destination", "/secret", "Permission denied"]);
    checked(bench.clone_of(&source).metadata(&secret), &["metadata", "/secret", "Permission denied"]);
    let closed = bench.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    checked(bench.clone_of(&source).destination(closed.join("copy")), &["destination", "can't be created in"]);
}

#[test]
fn one_file_in_two_places() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let other = bench.path("other name");
    fs::hard_link(&source, &other).unwrap();
    std::os::unix::fs::symlink(&source, bench.path("link")).unwrap();
    let clone = || bench.clone_of(&source);
    for same in [source.clone(), other, bench.path("link")] {
        refused(&bench, &clone().destination(&same), &["source", "destination", "are the same file"]);
        refused(&bench, &clone().metadata(&same), &["source", "metadata", "are the same file"]);
    }
    refused(&bench, &clone().metadata(bench.copy()), &["destination", "metadata", "are the same file"]);
}

#[test]
fn devices_that_are_too_small() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let small = bench.hole("small", MIB - 1);
    refused(
        &bench,
        &bench.clone_of(&source).destination(&small),
        &["destination", "is too small", "1048575 bytes", "1048576 are needed for the source"],
    );
    let tiny = bench.hole("tiny", 8192);
    refused(
        &bench,
        &bench.clone_of(&source).metadata(&tiny),
        &["metadata", "is too small", "8192 bytes", "12288 are needed for 16 regions"],
    );
}

#[test]
fn a_destination_or_metadata_that_holds_something() {
    need!("mkfs.ext4");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let disk = bench.hole("disk", 4 * MIB);
    run("mkfs.ext4", &["-q", disk.to_str().unwrap()]);
    let data = bench.hole("data", 4 * MIB);
    fs::OpenOptions::new().write(true).open(&data).unwrap().write_all_at(b"precious", 3_000_000).unwrap();
    let clone = || bench.clone_of(&source);
    refused(&bench, &clone().destination(&disk), &["destination", "holds an ext4 file system", "--force"]);
    refused(&bench, &clone().metadata(&disk), &["metadata", "ext4 file system", "--force"]);
    refused(&bench, &clone().destination(&data), &["destination", "holds data at offset 3000000", "--force"]);
    refused(&bench, &clone().metadata(&data), &["metadata", "holds data at offset 3000000", "--force"]);
    // With --force it is used.
    let daemon = clone().destination(&disk).args("--force").start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&disk, &fs::read(&source).unwrap());
}

#[test]
fn metadata_of_another_clone() {
    need!("nbdsh");
    let bench = Bench::new();
    let command = used(&bench, "");
    let other = bench.filled("other", 2 * MIB, 7);
    let longer = bench.random("longer", 3 * MIB);
    let source_words = ["metadata", "the source's content is not that of the one the clone was made from", "--force"];
    refused(&bench, &command.clone().source(&other), &source_words);
    let shorter = bench.random("shorter", MIB);
    refused(&bench, &command.clone().source(&longer), &source_words);
    refused(&bench, &command.clone().source(&shorter), &["metadata", "2MiB", "1MiB"]);
    // Of the right source, but for another destination; one that is gone; and as a destination.
    let fresh = bench.hole("fresh", 2 * MIB);
    refused(&bench, &command.clone().destination(&fresh), &["metadata", "belong to another destination"]);
    refused(&bench, &command.clone().destination(bench.path("new")), &["destination", "missing or empty", "metadata"]);
    let padded = bench.path("padded");
    fs::copy(bench.meta(), &padded).unwrap();
    fs::OpenOptions::new().write(true).open(&padded).unwrap().set_len(4 * MIB).unwrap();
    let words = ["destination", "holds hydrant metadata"];
    refused(&bench, &command.clone().destination(&padded).metadata(bench.path("new")), &words);
    // The copy of a destination is another one.
    fs::copy(bench.copy(), bench.path("copied")).unwrap();
    refused(&bench, &command.clone().destination(bench.path("copied")), &["belong to another destination", "--force"]);
    // New metadata and an old destination.
    refused(&bench, &command.clone().metadata(bench.path("new")), &["destination", "holds data at offset"]);
}

#[test]
fn metadata_of_another_region_size() {
    need!("nbdsh");
    let bench = Bench::new();
    let command = used(&bench, "");
    refused(&bench, &command.clone().args("--region-size 4KiB"), &["metadata", "regions of 64KiB", "4KiB was given"]);
    // The right one, or none, goes on.
    let daemon = command.clone().args("--region-size 64KiB --no-hydration").start();
    assert_eq!(daemon.status().hydrated_regions, 2);
    daemon.stop();
}

/// Every byte of the metadata matters: whichever is changed, it is noticed. (The unit tests try all of them.)
#[test]
fn damaged_metadata_are_refused_naming_the_sector() {
    need!("nbdsh");
    let bench = Bench::new();
    let command = used(&bench, "");
    let good = fs::read(bench.meta()).unwrap();
    let check = |json: &[&str]| {
        let mut words =
            vec!["meta", "check", bench.meta().to_str().unwrap()].into_iter().map(String::from).collect::<Vec<_>>();
        words.extend(json.iter().map(|word| word.to_string()));
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_hydrant")).args(words).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(check(&[]).0, 0);
    // The bitmap's first block is block 2; its fourth sector.
    let mut bad = good.clone();
    bad[2 * 4096 + 3 * 512 + 100] ^= 4;
    fs::write(bench.meta(), &bad).unwrap();
    refused(&bench, &command, &["metadata", "sector 19 (byte offset 9728)", "checksum", "hydrant meta check"]);
    let (status, text) = check(&[]);
    assert_eq!(status, 1, "{text}");
    assert!(text.contains("sector 19 (byte offset 9728)") && text.contains("not clean"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&check(&["--json"]).1).unwrap();
    assert_eq!((&json["clean"], &json["nr_findings"]), (&false.into(), &1.into()));
    assert_eq!((&json["findings"][0]["block"], &json["findings"][0]["sector"]), (&2.into(), &19.into()));
    assert_eq!(fs::read(bench.meta()).unwrap(), bad, "check never writes");
    // One superblock is enough, two are not.
    let mut bad = good.clone();
    bad[70] ^= 1;
    fs::write(bench.meta(), &bad).unwrap();
    assert_eq!(check(&[]).0, 1);
    let daemon = command.clone().args("--no-hydration").start();
    assert!(daemon.log().contains("superblock copy A is damaged"), "{}", daemon.log());
    daemon.stop();
    bad[70] = !good[70];
    bad[4096 + 70] = !good[4096 + 70];
    fs::write(bench.meta(), &bad).unwrap();
    refused(&bench, &command, &["metadata", "superblock copy A", "checksum"]);
    // Cut short.
    fs::write(bench.meta(), &good[..8192]).unwrap();
    refused(&bench, &command, &["metadata", "12288"]);
}

#[test]
fn metadata_of_an_unknown_version() {
    need!("nbdsh");
    let bench = Bench::new();
    let command = used(&bench, "");
    let mut bytes = fs::read(bench.meta()).unwrap();
    for copy in [0, 4096] {
        let block = &mut bytes[copy..copy + 4096];
        block[12..16].copy_from_slice(&2u32.to_le_bytes());
        block[8..12].fill(0);
        let crc = crc32c::crc32c(block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(bench.meta(), &bytes).unwrap();
    refused(&bench, &command, &["metadata", "format version 2, this hydrant knows 1"]);
    // Not even by force.
    let before = checksums(bench.dir());
    command.clone().args("--force").refused(&["format version 2"]);
    assert_eq!(checksums(bench.dir()), before);
}

#[test]
fn devices_in_use_by_another_clone() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    let second = bench.clone_of(&source).name("second");
    let process = format!("locked by process {} (hydrant)", daemon.pid());
    second.refused(&["destination", "is in use", &process]);
    second.clone().destination(bench.path("b")).refused(&["metadata", "is in use", &process]);
    // A destination that is being written is no source, and a source that is being read is no destination.
    let third = bench.clone_of(bench.copy()).name("third").destination(bench.path("c")).metadata(bench.path("d"));
    third.refused(&["source", "is in use, locked by"]);
    bench
        .clone_of(bench.random("e", MIB))
        .name("third")
        .destination(&source)
        .metadata(bench.path("d"))
        .refused(&["destination", "is in use, locked by"]);
    // Two clones of one source are fine.
    let other = bench.clone_of(&source).name("other").destination(bench.path("f")).metadata(bench.path("g")).start();
    other.wait_hydrated();
    other.stop();
    daemon.stop();
    for name in ["b", "c", "d"] {
        assert!(!bench.path(name).exists(), "{name} was created");
    }
}

/// Two clones that have no path in common, only what is under their loop devices.
#[test]
fn data_in_use_by_another_clone_under_a_loop_device() {
    need!("loop", "losetup");
    let bench = Bench::new();
    let (source, backing) = (bench.random("source", MIB), bench.hole("backing", MIB));
    let (one, two) = (Loop::attach(&backing, 512), Loop::attach(&backing, 512));
    let words = ["is in use: the same data are used through another device or file"];
    let daemon = bench.clone_of(&source).destination(&one.path).args("--no-hydration").start();
    let second = |source: &Path| bench.clone_of(source).name("second").metadata(bench.path("b"));
    second(&source).destination(&two.path).args("--force").refused(&["destination", words[0]]);
    second(&backing).destination(bench.path("c")).refused(&["source", words[0]]);
    second(&two.path).destination(bench.path("c")).refused(&["source", words[0]]);
    // The source is not to be written, however it is reached.
    let over_source = Loop::attach(&source, 512);
    second(&bench.random("e", MIB)).destination(&over_source.path).args("--force").refused(&["destination", words[0]]);
    // To read it is fine.
    let third = second(&over_source.path).destination(bench.path("c")).start();
    third.wait_hydrated();
    third.stop();
    daemon.stop();
    second(&source).destination(&two.path).args("--force").start().stop();
}

#[test]
fn mounted_and_held_block_devices() {
    need!("loop", "losetup", "mkfs.ext4");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let fs = FileSystem::ext4(&bench.path("fs.img"), 16 * MIB, &bench.path("mnt"));
    let mounted = fs.device().to_owned();
    let words = ["is mounted at", bench.path("mnt").to_str().unwrap().to_owned().leak()];
    bench.clone_of(&source).destination(&mounted).refused(&["destination", words[0], words[1]]);
    bench.clone_of(&source).destination(&mounted).args("--force").refused(&["destination", words[0], words[1]]);
    bench.clone_of(&source).metadata(&mounted).refused(&["metadata", words[0], words[1]]);
    bench.clone_of(&source).destination(bench.path("fs.img")).refused(&["destination", "loop device"]);
    assert!(!bench.copy().exists() && !bench.meta().exists());
}

#[test]
fn a_changed_source() {
    need!("nbdsh");
    let bench = Bench::new();
    let command = used(&bench, "");
    let source = bench.path("source");
    let good = fs::read(&source).unwrap();
    let mut bad = good.clone();
    bad[0] ^= 1;
    fs::write(&source, &bad).unwrap();
    refused(&bench, &command, &["the source's content is not that of the one the clone was made from"]);
    fs::write(&source, &good[..good.len() - 1]).unwrap();
    refused(&bench, &command, &["the metadata are for a source of 2MiB"]);
    // It is the user's to say that it is the right one all the same; never with another size.
    command.clone().args("--force").refused(&["the metadata are for a source of 2MiB"]);
    fs::write(&source, &bad).unwrap();
    let daemon = command.clone().args("--force --no-hydration").start();
    assert_eq!(daemon.status().hydrated_regions, 2);
    daemon.stop();
}

#[test]
fn sources_that_are_no_nbd_server() {
    need!("nbdkit");
    let bench = Bench::new();
    let nobody = format!("nbd+unix:///?socket={}", bench.socket("nobody").display());
    refused(&bench, &bench.clone_of(&nobody), &["source", &nobody, "No such file or directory"]);
    refused(&bench, &bench.clone_of("nbd://127.0.0.1:1/x"), &["source nbd://127.0.0.1:1/x", "Connection refused"]);
    refused(&bench, &bench.clone_of("nbd://no.such.host.invalid/x"), &["no.such.host.invalid", "resolved"]);
    let server = Nbdkit::start(&bench, "--filter=exportname pattern 1M exportname=disk exportname-strict=true");
    refused(&bench, &bench.clone_of(server.uri().replace("///?", "///other?")), &["source", "other"]);
    for (uri, word) in [("nbds://host/x", "TLS"), ("nbd+unix:///x", "socket"), ("nbd://[::1/x", "nbd://[::1/x")] {
        bench.clone_of(uri).refused_with(2, &[word]);
    }
    assert!(!bench.copy().exists() && !bench.meta().exists());
}

#[test]
fn sockets_in_use() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let taken = bench.socket("taken");
    let listener = UnixListener::bind(&taken).unwrap();
    let before = checksums(bench.dir());
    let clone = |args: String| bench.clone_of(&source).args(&args);
    clone(format!("--nbd unix:{}", taken.display())).refused(&["socket", "taken", "is in use by a running process"]);
    clone(format!("--control {}", taken.display())).refused(&["socket", "taken", "is in use by a running process"]);
    clone(format!("--nbd unix:{}", source.display())).refused(&["something that is not a socket"]);
    clone(format!("--control {}", bench.path("no/dir").display()))
        .refused(&["/no/dir", "its directory does not exist"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    clone(format!("--nbd tcp:{}", port.local_addr().unwrap())).refused(&["socket in use: choose another port"]);
    assert_eq!(checksums(bench.dir()), before);
    // Nobody listens any more: what is left is no obstacle.
    drop(listener);
    assert!(taken.exists());
    let daemon = clone(format!("--nbd unix:{}", taken.display())).start();
    daemon.stop();
    assert!(!taken.exists());
}

#[test]
fn too_little_locked_memory() {
    need!("root", "setpriv", "prlimit");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let before = checksums(bench.dir());
    let command = bench.clone_of(&source).limit("--memlock=65536");
    command.refused(&["may lock 64KiB", "needs 512KiB", "ulimit -l", "LimitMEMLOCK="]);
    assert_eq!(checksums(bench.dir()), before);
}

/// Too few once meant, by their number: a hang, an abort, or an error after files had been made.
#[test]
fn too_few_open_files_for_the_shards() {
    need!("root", "setpriv", "prlimit");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let before = checksums(bench.dir());
    for limit in [16, 24, 32, 50, 62, 95] {
        let command = bench.clone_of(&source).args("--shards 4").limit(&format!("--nofile={limit}:{limit}"));
        command.refused(&["may open", "4 shards need 96", "ulimit -n"]);
        assert_eq!(checksums(bench.dir()), before, "{limit} descriptors");
    }
}

#[test]
fn no_io_uring() {
    need!("python3");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let before = checksums(bench.dir());
    bench.clone_of(&source).without_io_uring().refused(&["io_uring", "seccomp"]);
    assert_eq!(checksums(bench.dir()), before);
}

#[test]
fn bad_words_on_the_command_line() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let before = checksums(bench.dir());
    for (args, part) in [
        ("--region-size 2KiB", "outside 4KiB to 1GiB"),
        ("--region-size 12KiB", "not a power of two"),
        ("--shards 0", "not in 1..=256"),
        ("--nbd somewhere", "unix:PATH"),
        ("--hydration-threshold=-1", "--hydration-threshold"),
        ("--source-timeout 86401", "86400"),
        ("--bogus", "--bogus"),
    ] {
        let output = bench.clone_of(&source).args(args).output();
        assert_eq!(output.status.code(), Some(2), "{args}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(part), "{args}: {said}");
    }
    assert_eq!(checksums(bench.dir()), before);
}

#[test]
fn a_dry_run_says_what_would_be_done_and_changes_nothing() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let before = checksums(bench.dir());
    let run = |command: &CloneCommand| {
        let output = command.clone().args("--dry-run").output();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&bench.clone_of(&source));
    for part in ["1MiB in 16 regions of 64KiB", "destination:", "created", "formatted", "nothing was changed"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(checksums(bench.dir()), before);
    assert!(!bench.runtime().join("hydrant").exists());

    let command = used(&bench, "");
    let before = checksums(bench.dir());
    let text = run(&command);
    assert!(text.contains("2 of 32 regions are hydrated"), "{text}");
    assert_eq!(checksums(bench.dir()), before);
}
