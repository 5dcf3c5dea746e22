//! Without privileges: as a user that owns only its files, without any capability, the daemon serves a clone over NBD.

use super::harness::*;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

/// nobody, in every Linux system.
const USER: u32 = 65534;
/// Another one.
const OTHER: u32 = 65533;
/// One who may lock little memory. What a user has locked is counted for all its processes together, and the kernel takes back
/// late what one that has ended had: nobody else is to use this one.
const LOW: u32 = 65532;

fn as_user(user: u32) -> Vec<String> {
    ["setpriv", &format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--no-new-privs"]
        .into_iter()
        .chain(["--bounding-set=-all", "--inh-caps=-all"])
        .map(String::from)
        .collect()
}

/// A bench that belongs to the user, with a source that does not.
fn bench() -> Bench {
    let bench = Bench::new();
    for dir in [bench.dir(), &bench.runtime()] {
        chown(dir, Some(USER), Some(USER)).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    bench.random("source", 8 * MIB);
    bench
}

fn clone_as(bench: &Bench, user: u32, more: &[&str]) -> CloneCommand {
    let words = as_user(user);
    let words: Vec<&str> = words.iter().map(String::as_str).chain(more.iter().copied()).collect();
    bench.clone_of(bench.path("source")).wrapped(&words)
}

fn mode(path: &Path) -> (u32, u32) {
    let stat = fs::symlink_metadata(path).unwrap();
    (stat.uid(), stat.mode() & 0o777)
}

/// Whether the other user can connect to a socket.
fn other_connects(socket: &Path) -> bool {
    let words = as_user(OTHER);
    let script = format!("import socket; socket.socket(socket.AF_UNIX).connect('{}')", socket.display());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["/usr/bin/python3", "-c", &script]);
    command.output().unwrap().status.success()
}

#[test]
fn a_clone_is_served_by_a_user_without_any_capability() {
    need!("root", "setpriv", "nbdsh", "nbdkit");
    let bench = bench();
    let source = fs::read(bench.path("source")).unwrap();
    let server = Nbdkit::start_tcp(&bench, &format!("file {}", bench.path("source").display()));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // From a file to a unix socket, and from NBD to TCP, under a umask that would open everything.
    for (name, nbd) in [("file", None), ("nbd", Some(port))] {
        let mut clone = clone_as(&bench, USER, &["sh", "-c", "umask 000; exec \"$@\"", "sh"]).name(name);
        clone = clone.destination(bench.path(name)).metadata(bench.path(&format!("{name}.meta")));
        if let Some(port) = nbd {
            clone = clone.source(server.uri()).args(&format!("--nbd tcp:127.0.0.1:{port}"));
        }
        let daemon = clone.start();
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{field}:\t0000000000000000")), "{status}");
        }
        assert!(status.contains(&format!("Uid:\t{USER}\t{USER}")), "{status}");
        let uri = nbd.map_or_else(|| daemon.uri(), |port| format!("nbd://127.0.0.1:{port}"));
        nbdsh(&uri, "h = connect(); h.pwrite(b'x' * 65536, 65536); h.flush(); assert h.pread(4, 65536) == b'xxxx'");

        // Nobody else gets at its sockets, whatever the umask.
        let dir = bench.runtime().join("hydrant");
        assert_eq!(mode(&dir), (USER, 0o700));
        assert_eq!(mode(&daemon.control), (USER, 0o600));
        // The directory alone would keep others out: the sockets do too.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(!other_connects(&daemon.control), "control");
        if nbd.is_none() {
            assert_eq!(mode(&daemon.socket), (USER, 0o600));
            assert!(!other_connects(&daemon.socket), "NBD");
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        // Copy and metadata hold what the machine holds.
        for path in [bench.path(name), bench.path(&format!("{name}.meta"))] {
            let (user, mode) = mode(&path);
            assert_eq!((user, mode & 0o077), (USER, 0), "{}: {mode:o}", path.display());
        }
        daemon.wait_hydrated();
        daemon.stop();
        let mut expected = source.clone();
        expected[65536..131072].fill(b'x');
        assert_same(&bench.path(name), &expected);
    }
}

#[test]
fn what_the_user_may_not_is_said() {
    need!("root", "setpriv", "prlimit");
    let bench = bench();
    let source = bench.path("source");
    fs::set_permissions(&source, fs::Permissions::from_mode(0o600)).unwrap();
    clone_as(&bench, USER, &[]).refused(&["source", "Permission denied"]);
    fs::set_permissions(&source, fs::Permissions::from_mode(0o644)).unwrap();
    // root's files, and root's directory.
    fs::create_dir(bench.path("closed")).unwrap();
    let theirs = bench.hole("theirs", 8 * MIB);
    for (destination, metadata, role) in [
        (theirs.clone(), bench.meta(), "destination"),
        (bench.path("closed/copy"), bench.meta(), "destination"),
        (bench.copy(), theirs, "metadata"),
        (bench.copy(), bench.path("closed/meta"), "metadata"),
    ] {
        let clone = clone_as(&bench, USER, &[]).destination(&destination).metadata(&metadata);
        clone.refused(&[role, "Permission denied"]);
        assert!(!bench.copy().exists() && !bench.meta().exists(), "{role}: nothing is left behind");
    }
    // Another user's runtime directory.
    fs::remove_dir(bench.runtime().join("hydrant")).unwrap();
    chown(bench.runtime(), Some(0), Some(0)).unwrap();
    clone_as(&bench, USER, &[]).refused(&["runtime directory", "Permission denied", "XDG_RUNTIME_DIR"]);
    fs::create_dir(bench.runtime().join("hydrant")).unwrap();
    clone_as(&bench, USER, &[]).refused(&["runtime directory", "belongs to user 0"]);
    fs::remove_dir(bench.runtime().join("hydrant")).unwrap();
    for dir in [bench.dir(), &bench.runtime()] {
        chown(dir, Some(LOW), Some(LOW)).unwrap();
    }
    // Too little locked memory: it can't raise the limit itself.
    let low = clone_as(&bench, LOW, &["prlimit", "--memlock=65536:65536"]);
    low.refused(&["may lock 64KiB of memory", "LimitMEMLOCK="]);
    // Enough for one shard only: slower, and it says so.
    let daemon = clone_as(&bench, LOW, &["prlimit", "--memlock=524288:524288"]).args("--shards 2").start();
    daemon.wait_log("2 shards would like 1MiB");
    daemon.wait_hydrated();
    daemon.stop();
}
