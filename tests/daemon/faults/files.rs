//! Files that are deleted, moved, replaced or cut off under the daemon.

use super::super::harness::*;
use super::{ends_badly, events, status_text};
use std::fs::{self, File};
use std::path::Path;

fn cut(path: &Path, size: u64) {
    File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

/// A source that is cut off is never taken for zeros: what is behind its end can't be read, the rest is cloned, and when it
/// is there again, that too.
#[test]
fn a_source_that_is_cut_off_is_not_read_as_zeros() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let content = fs::read(&source).unwrap();
    let command = bench.clone_of(&source);
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'w' * 65536, 6 << 20); h.flush()");
    cut(&source, 5 * MIB + 1000);
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.EIO, lambda: h.pread(512, 7 << 20))
fails(errno.EIO, lambda: h.pread(65536, 5 << 20))
fails(errno.EIO, lambda: h.pwrite(b"x", 7 << 20))
assert h.pread(65536, 6 << 20) == b"w" * 65536
h.pread(1000, 0)
"#,
    );
    daemon.message("enable_hydration");
    // 80 regions are whole, one was written.
    let status = daemon.wait_status("what is there", |status| status.hydrated_regions == 81);
    assert_eq!((status.nr_regions, status.metadata.mode.to_string().as_str()), (128, "rw"));
    daemon.wait_status("what is not", |status| status.hydration.failed_regions > 0 && status.hydrating_regions == 0);
    assert_eq!(daemon.status().hydrated_regions, 81);
    assert!(daemon.log().contains("/source: ") && daemon.log().contains("ends at "), "{}", daemon.log());
    daemon.kill9();
    // Started with that source it is refused.
    command.refused(&["source"]);
    fs::write(&source, &content).unwrap();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = content;
    expected[6 << 20..(6 << 20) + 65536].fill(b'w');
    assert_same(&bench.copy(), &expected);
}

/// A source file that is deleted or replaced under the daemon: the clone goes on with what it has open, whatever is at the
/// path now, and says that it needs it.
#[test]
fn a_source_that_is_deleted_or_replaced_is_told_and_cloned_all_the_same() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let expected = fs::read(&source).unwrap();
    let command = bench.clone_of(&source).args("--shards 2");
    let daemon = command.clone().args("--no-hydration").start();
    fs::remove_file(&source).unwrap();
    daemon.wait_event("/source was deleted or moved, nothing is at its path: ");
    fs::write(&source, random_bytes(77, 4 * MIB)).unwrap();
    daemon.wait_event("/source was deleted or moved, another file is at its path: ");
    assert!(status_text(&daemon).contains("WARNING      source "), "{}", status_text(&daemon));
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert!(daemon.status().warnings.is_empty(), "it is not needed any more");
    daemon.stop();
    assert_same(&bench.copy(), &expected);
}

/// A destination that is deleted or replaced under the daemon is told at once, by event, log and status, with what to do.
/// The clone does not end by itself; done as it was told nothing is lost.
#[test]
fn a_destination_that_is_deleted_is_told_and_can_be_saved() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let command = bench.clone_of(&source).args("--on-hydrated exit --shards 1");
    let daemon = command.clone().args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 100_000, 65536); h.flush()");
    fs::remove_file(bench.copy()).unwrap();
    let status = daemon.wait_status("a warning", |status| !status.warnings.is_empty());
    assert!(status.warnings[0].contains("/copy was deleted: what it holds is lost when"), "{status:#?}");
    fs::write(bench.copy(), "somebody else's").unwrap();
    daemon.wait_event("/copy was deleted, another file is at its path");
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'2' * 100_000, 1 << 20); h.flush()");
    // Complete, and nobody connected: it stays all the same.
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let text = status_text(&daemon);
    let advice = text.lines().find(|line| line.trim_start().starts_with("WARNING")).unwrap().to_owned();
    let told = events(&daemon, "device_lost");
    assert!(told.len() == 2 && advice.ends_with(&told[1]), "{told:?}: {advice}");
    // As it says.
    let saved = bench.path("saved");
    let cp = advice.split("; ").find(|words| words.starts_with("cp ")).unwrap();
    assert!(advice.contains("to save it: hydrant suspend vm; cp "), "{advice}");
    daemon.done(&["suspend", "vm"]);
    run("sh", &["-c", &cp.replace("NEW-FILE", saved.to_str().unwrap())]);
    let log = ends_badly(daemon);
    assert!(
        log.contains("hydrant: clone 'vm': stopped: destination ") && log.contains("what it held is lost"),
        "{log}"
    );
    assert_eq!(fs::read(bench.copy()).unwrap(), b"somebody else's");
    let mut expected = fs::read(&source).unwrap();
    expected[65536..165_536].fill(b'1');
    expected[1 << 20..(1 << 20) + 100_000].fill(b'2');
    assert_same(&saved, &expected);
    command.clone().destination(&saved).refused(&["destination"]);
    let daemon = command.clone().destination(&saved).args("--force").start();
    assert!(daemon.status().warnings.is_empty() && daemon.status().is_complete());
}

/// Metadata that are deleted are told as well; the clone goes on, and can be saved with both files.
#[test]
fn metadata_that_are_deleted_are_told_and_can_be_saved() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let command = bench.clone_of(&source).args("--no-hydration");
    let daemon = command.start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 100_000, 65536); h.flush()");
    fs::remove_file(bench.meta()).unwrap();
    daemon.wait_event("/meta was deleted: what it holds is lost when");
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'2' * 100_000, 1 << 20); h.flush()");
    let warning = daemon.status().warnings.remove(0);
    let saved = bench.path("saved");
    let cp = warning.split("; ").find(|words| words.starts_with("cp ")).unwrap();
    daemon.done(&["suspend", "vm"]);
    run("sh", &["-c", &cp.replace("NEW-FILE", saved.to_str().unwrap())]);
    ends_badly(daemon);
    let daemon = bench.clone_of(&source).metadata(&saved).start();
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..165_536].fill(b'1');
    expected[1 << 20..(1 << 20) + 100_000].fill(b'2');
    assert_same(&bench.copy(), &expected);
}

/// A destination that is moved goes on; moved back it is found, and nothing is wrong any more.
#[test]
fn a_destination_that_is_moved_goes_on() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    fs::rename(bench.copy(), bench.path("elsewhere")).unwrap();
    daemon.wait_event("/copy was moved, nothing is at its path: ");
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 100_000, 65536); h.flush()");
    fs::rename(bench.path("elsewhere"), bench.copy()).unwrap();
    daemon.wait_event("/copy is at its path again");
    assert!(daemon.status().warnings.is_empty());
    assert_eq!((events(&daemon, "device_lost").len(), events(&daemon, "device_found").len()), (1, 1));
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..165_536].fill(b'1');
    assert_same(&bench.copy(), &expected);
}

/// A destination that is cut off has lost data: the clone fails as a whole (`Fail`), before anything is extended by a write
/// and read as zeros. The next start refuses it.
#[test]
fn a_destination_that_is_cut_off_fails_the_clone() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let command = bench.clone_of(&source).args("--no-hydration");
    let daemon = command.start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 0); h.pwrite(b'1' * 65536, 2 << 20); h.flush()");
    cut(&bench.copy(), MIB);
    nbdsh(&daemon.uri(), "h = connect(); fails(errno.EIO, lambda: h.pread(512, 2 << 20)); h.pread(65536, 0)");
    daemon.wait_event("metadata mode is now Fail: ");
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.EIO, lambda: h.pread(512, 0))
fails(errno.EIO, lambda: h.pread(512, 3 << 20))
fails(errno.EIO, lambda: h.pwrite(b"x", 0))
fails(errno.EIO, lambda: h.zero(65536, 0))
fails(errno.EIO, lambda: h.trim(65536, 0))
fails(errno.EIO, h.flush)
"#,
    );
    let text = status_text(&daemon);
    assert!(text.contains("/copy was cut off at 1048576 bytes, 4194304 are in use: what was behind is lost"), "{text}");
    assert!(text.contains("Fail because of destination ") && text.contains("no I/O is permitted"), "{text}");
    assert_eq!(daemon.done(&["status", "--dm"]).trim(), "0 8192 clone Fail");
    assert_eq!(events(&daemon, "failed").len(), 1);
    ends_badly(daemon);
    assert_eq!(fs::metadata(bench.copy()).unwrap().len(), MIB);
    command.refused(&[
        "destination",
        "is too small: it has 1048576 bytes, 4194304 are needed for the clone that it holds",
    ]);
}

/// Metadata that are cut off: what they said is lost, so nothing more is promised (`ro`); the clone can still be read out,
/// all of it.
#[test]
fn metadata_that_are_cut_off_make_the_clone_read_only() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let command = bench.clone_of(&source).args("--no-hydration");
    let daemon = command.start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 65536); h.flush()");
    cut(&bench.meta(), 8192);
    daemon.wait_event("metadata mode is now ro: ");
    let mut expected = fs::read(&source).unwrap();
    expected[65536..131072].fill(b'1');
    let whole = bench.path("expected");
    fs::write(&whole, &expected).unwrap();
    nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
fails(errno.EIO, h.flush)
fails(errno.EIO, lambda: h.pwrite(b"x" * 65536, 1 << 20))
assert h.pread(4 << 20, 0) == open(@WHOLE@, "rb").read()
"#
        .replace("@WHOLE@", &format!("{whole:?}")),
    );
    let text = status_text(&daemon);
    assert!(
        text.contains("/meta was cut off at 8192 bytes") && text.contains("read the clone out (nbdcopy)"),
        "{text}"
    );
    ends_badly(daemon);
    command.refused(&["metadata", "too small"]);
}
