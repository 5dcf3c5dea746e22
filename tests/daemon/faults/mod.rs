//! Disks and peers that fail while clients are at work. What a test proves is said at its head.
//!
//! Each ends the same way: the fault is gone, the daemon is started again, the clone completes, everything that was
//! flushed is there and the rest is the source's.

mod destination;
mod files;
mod filesystems;
mod metadata;
mod source;

use super::harness::*;
use std::path::PathBuf;

/// A clone of random data, on two shards, to a disk that fails when it is told to.
fn on_faulty_disk(bench: &Bench, size: u64) -> (PathBuf, FaultyFile, CloneCommand) {
    let (source, disk) = (bench.random("source", size), FaultyFile::new(bench, "disk", size));
    let command = bench.clone_of(&source).destination(&disk.path).args("--shards 2");
    (source, disk, command)
}

/// What the daemon says to people and programs about one clone.
fn status_text(daemon: &Daemon) -> String {
    daemon.done(&["status"])
}

/// The texts of all its events of this kind.
fn events(daemon: &Daemon, kind: &str) -> Vec<String> {
    let lines = daemon.done(&["events", "--json"]);
    let events = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let of_kind = events.filter(|event| event["kind"] == kind);
    of_kind.map(|event| event["text"].as_str().unwrap().to_owned()).collect()
}

/// SIGTERM to a daemon that can't end well: it says so by its exit status; the log.
fn ends_badly(mut daemon: Daemon) -> String {
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(std::time::Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
    log
}
