//! The file system under a destination or the metadata is full, read-only, shut down; the disk under it is gone.

use super::super::harness::*;
use super::{ends_badly, events, on_faulty_disk, status_text};
use hydrant::control::api::HydrationState;
use std::fs;
use std::path::{Path, PathBuf};

/// A tmpfs of so many bytes, unmounted when this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: PathBuf, size: u64) -> Self {
        fs::create_dir(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path.to_str().unwrap()]);
        Self(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run_for_status("umount", &[Path::new("-l"), &self.0]);
    }
}

/// Whatever fills a sparse destination (writes, zeros that must take space, copies on demand, hydration), on ext4 and tmpfs:
/// its client gets ENOSPC and nobody else anything; what can be done without space is done; a flush stands for what was
/// acknowledged, and a crash then loses none of that. With space all goes on.
fn full(destination: &Path, filler: &Path) {
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let command = bench.clone_of(&source).destination(destination).args("--shards 2");
    let daemon = command.clone().args("--no-hydration").start();
    let acknowledged = nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
source = open(@SOURCE@, "rb").read()
done = []
def fill():
    for at in range(0, 32 << 20, 131072):
        h.pwrite(b"w" * 65536, at)
        done.append(at)
fails(errno.ENOSPC, fill)
# In an odd region, which nobody has written: its rest is to be copied.
free = 31 << 20
def failing(call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
        return 1
    return 0
zeros = [at + 65536 for at in range(16 << 20, 31 << 20, 131072)]
assert sum(failing(lambda: h.zero(65536, at, nbd.CMD_FLAG_NO_HOLE)) for at in zeros) > 0
parts = [at + 65536 for at in range(12 << 20, 16 << 20, 131072)]
assert sum(failing(lambda: h.pwrite(b"p", at + 10)) for at in parts) > 0
assert sum(failing(lambda: h.cache(65536, at + 65536)) for at in range(8 << 20, 12 << 20, 131072)) > 0
# Reads are answered although there is no place to keep them; holes need no space.
for at in range(0, 8 << 20, 131072):
    assert h.pread(65536, at + 65536) == source[at + 65536:][:65536]
h.trim(65536, 65536)
assert h.pread(65536, 65536) == bytes(65536)
h.pwrite(b"v" * 65536, done[0])
h.flush()
print(done[-1])
"#
        .replace("@SOURCE@", &format!("{source:?}")),
    );
    let last: usize = acknowledged.trim().parse().unwrap();
    let status = daemon.status();
    assert!(status.metadata.mode.to_string() == "rw" && status.io.errors > 3, "{status:#?}");
    assert!(
        daemon.log().contains("destination ") && daemon.log().contains("No space left on device"),
        "{}",
        daemon.log()
    );
    daemon.message("enable_hydration");
    let status = daemon.wait_status("failing", |status| status.hydration.state == HydrationState::Failing);
    let failure = status.hydration.last_failure.unwrap_or_default();
    assert!(failure.error.contains("No space left on device") && failure.errno == libc::ENOSPC, "{failure:?}");
    assert!(status_text(&daemon).contains("the last failure: destination "), "{}", status_text(&daemon));
    let told = events(&daemon, "hydration_failed");
    assert!(told.iter().any(|text| text.contains("No space left on device")), "{told:?}");
    daemon.kill9();

    let daemon = command.start();
    daemon.wait_event("hydration pauses");
    fs::remove_file(filler).unwrap();
    daemon.wait_hydrated();
    assert_eq!(daemon.status().hydration.last_failure, None);
    daemon.stop();
    let (found, expected) = (read_first(destination, 32 * MIB), fs::read(&source).unwrap());
    for (region, found) in found.chunks(65536).enumerate() {
        let (at, source) = (region * 65536, &expected[region * 65536..][..65536]);
        let all = |byte: u8| found.iter().all(|b| *b == byte);
        let is_right = match region {
            0 => all(b'v'),
            1 => all(0),
            _ if region % 2 == 0 && at <= last => all(b'w'),
            // What failed is as before, or as if it had not.
            _ if region % 2 == 0 => all(b'w') || found == source,
            _ => all(0) || found == source || (found[10] == b'p' && found[11..] == source[11..]),
        };
        assert!(is_right, "region {region}");
    }
}

#[test]
fn a_full_ext4_costs_what_needs_space() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh");
    let bench = Bench::new();
    let fs = FileSystem::ext4(&bench.path("fs.img"), 48 * MIB, &bench.path("mnt"));
    let filler = fs.mount.join("filler");
    fs::write(&filler, random_bytes(3, 34 * MIB)).unwrap();
    full(&fs.mount.join("copy"), &filler);
}

#[test]
fn a_full_tmpfs_costs_what_needs_space() {
    need!("root", "nbdsh");
    let bench = Bench::new();
    let tmpfs = Tmpfs::mount(bench.path("mnt"), 40 * MIB);
    let filler = tmpfs.0.join("filler");
    fs::write(&filler, random_bytes(3, 30 * MIB)).unwrap();
    full(&tmpfs.0.join("copy"), &filler);
}

/// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: what an ext4 does after an error of its disk.
fn shut_down(mount: &Path) {
    const SHUTDOWN: &str = "import fcntl, os, struct, sys; fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
    run("/usr/bin/python3", &["-c", SHUTDOWN, mount.to_str().unwrap()]);
}

/// The file system of the metadata dies: `ro`, as after any failed commit. The clone is served all the while; mounted again,
/// it goes on with all that was flushed.
#[test]
fn metadata_on_a_file_system_that_dies_make_the_clone_read_only() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh", "python3");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let fs = FileSystem::ext4(&bench.path("fs.img"), 16 * MIB, &bench.path("mnt"));
    let command = bench.clone_of(&source).metadata(fs.mount.join("meta"));
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 65536); h.flush()");
    // All of it is to be on the disk: the shutdown forgets the rest, as its name says.
    run("sync", &["-f", fs.mount.to_str().unwrap()]);
    shut_down(&fs.mount);
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
h.pwrite(b"2" * 65536, 1 << 20)
fails(errno.EIO, h.flush)
h.pwrite(b"3" * 10, 65536)
assert h.pread(10, 65536) == b"3" * 10 and h.pread(10, 1 << 20) == b"2" * 10
fails(errno.EIO, lambda: h.pwrite(b"2" * 65536, 2 << 20))
"#,
    );
    assert_eq!(daemon.status().metadata.mode.to_string(), "ro");
    assert!(status_text(&daemon).contains("ro because of metadata "), "{}", status_text(&daemon));
    ends_badly(daemon);
    fs.mount_again();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    let (found, mut expected) = (read_first(&bench.copy(), 4 * MIB), fs::read(&source).unwrap());
    expected[65536..131_072].fill(b'1');
    expected[65536..65546].fill(b'3');
    let unflushed = (1 << 20)..(1 << 20) + 65536;
    assert!(
        found[unflushed.clone()].iter().all(|b| *b == b'2') || found[unflushed.clone()] == expected[unflushed.clone()]
    );
    expected[unflushed.clone()].copy_from_slice(&found[unflushed]);
    assert!(found == expected);
}

/// The file system of the destination becomes read-only under it, as `errors=remount-ro` does it: writes fail with EIO and
/// no flush is acknowledged that they would need; reads go on. Mounted again it goes on.
#[test]
fn a_destination_that_becomes_read_only_fails_writes_and_serves_reads() {
    need!("loop", "losetup", "mkfs.ext4", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let fs = FileSystem::ext4(&bench.path("fs.img"), 32 * MIB, &bench.path("mnt"));
    let destination = fs.mount.join("copy");
    let command = bench.clone_of(&source).destination(&destination).args("--shards 2");
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 65536); h.flush()");
    run("sync", &["-f", fs.mount.to_str().unwrap()]);
    // An error that the file system makes itself believe in.
    run("mount", &[Path::new("-o"), Path::new("remount,errors=remount-ro"), &fs.mount]);
    let name = fs.device().file_name().unwrap().to_str().unwrap();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "1").unwrap();
    let said = nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
assert h.pread(65536, 65536) == b"1" * 65536
failed = 0
for at in range(1 << 20, 8 << 20, 65536):
    try:
        h.pwrite(b"2" * 65536, at)
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        failed += 1
flushed = True
try:
    h.flush()
except nbd.Error as error:
    flushed = False
assert h.pread(65536, 65536) == b"1" * 65536
assert h.pread(1000, 0) == open(@SOURCE@, "rb").read()[:1000]
print(failed, flushed)
"#
        .replace("@SOURCE@", &format!("{source:?}")),
    );
    assert_eq!(said.trim(), "112 False");
    daemon.kill9();
    fs.mount_again();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    let (found, expected) = (read_first(&destination, 8 * MIB), fs::read(&source).unwrap());
    for (region, found) in found.chunks(65536).enumerate() {
        let old = &expected[region * 65536..][..65536];
        let is_right = match region {
            1 => found.iter().all(|b| *b == b'1'),
            _ => found == old || found.iter().all(|b| *b == b'2'),
        };
        assert!(is_right, "region {region}");
    }
}

/// A disk that is pulled out: every request of it fails, and no flush succeeds; what is not hydrated is still read from the
/// source. Plugged in again the clone goes on with all that was flushed.
#[test]
fn a_destination_that_is_pulled_out_loses_nothing_that_was_flushed() {
    need!("fuse", "nbdsh");
    let bench = Bench::new();
    let (source, mut disk, command) = on_faulty_disk(&bench, 4 * MIB);
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 100_000, 65536); h.flush()");
    disk.pull();
    nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
fails(errno.EIO, lambda: h.pread(100, 65536))
fails(errno.EIO, lambda: h.pwrite(b"x" * 65536, 1 << 20))
fails(errno.EIO, h.flush)
assert h.pread(100, 3 << 20) == open(@SOURCE@, "rb").read()[3 << 20:][:100]
fails(errno.EIO, lambda: h.pwrite(b"x", 0))
"#
        .replace("@SOURCE@", &format!("{source:?}")),
    );
    let text = status_text(&daemon);
    assert!(text.contains("because of destination ") && text.contains("/disk: flush: "), "{text}");
    ends_badly(daemon);
    disk.plug();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..165_536].fill(b'1');
    assert_same(&disk.backing, &expected);
}

/// A destination that stalls holds up who needs it; the status answers, reads of the source go on, and all goes on when it
/// does: no error, nothing lost.
#[test]
fn a_destination_that_stalls_costs_time_only() {
    need!("fuse", "nbdsh");
    let bench = Bench::new();
    let (source, disk, command) = on_faulty_disk(&bench, 4 * MIB);
    let daemon = command.start();
    disk.fail("write", "STALL 2097152 4194304");
    disk.fail("flush", "STALL");
    let uri = daemon.uri();
    let writer = std::thread::spawn(move || {
        nbdsh(&uri, "h = connect(); h.pwrite(b'x' * 1000, 3 << 20); h.flush(); h.pwrite(b'y' * 1000, 4000); h.flush()")
    });
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_secs(2) {
        let asked = std::time::Instant::now();
        daemon.status();
        assert!(asked.elapsed() < std::time::Duration::from_millis(1500), "{:?}", asked.elapsed());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(!writer.is_finished());
    disk.heal();
    writer.join().unwrap();
    daemon.wait_hydrated();
    assert_eq!(daemon.status().io.errors, 0);
    daemon.kill9();
    let mut expected = fs::read(&source).unwrap();
    expected[3 << 20..(3 << 20) + 1000].fill(b'x');
    expected[4000..5000].fill(b'y');
    assert_same(&disk.backing, &expected);
}
