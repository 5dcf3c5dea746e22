//! The metadata fail.

use super::super::harness::*;
use super::{ends_badly, events, status_text};
use std::fs;

/// Whatever of the metadata fails, write or flush: mode `ro`. Hydrated regions go on; what needs new metadata and every
/// flush fails, also when the disk works again; one event; exit status 1. The next start has all that was flushed.
#[test]
fn errors_of_the_metadata_make_the_clone_read_only() {
    need!("fuse", "nbdsh");
    for (what, code) in [("write", "EIO"), ("flush", "EIO"), ("write", "ENOSPC")] {
        let bench = Bench::new();
        let source = bench.random("source", 4 * MIB);
        let disk = FaultyFile::new(&bench, "meta-disk", MIB);
        let command = bench.clone_of(&source).metadata(&disk.path);
        let daemon = command.clone().args("--no-hydration").start();
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'1' * 65536, 65536); h.flush()");
        disk.fail(what, code);
        nbdsh(
            &daemon.uri(),
            r#"
h = connect()
h.pwrite(b"2" * 65536, 3 * 65536)
def refused(call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum in (errno.EIO, errno.ENOSPC), error
        return
    raise AssertionError("it was acknowledged")
refused(h.flush)
"#,
        );
        disk.heal();
        nbdsh(
            &daemon.uri(),
            r#"
h = connect()
fails(errno.EIO, h.flush)
fails(errno.EIO, lambda: h.pwrite(b"3" * 65536, 5 * 65536))
fails(errno.EIO, lambda: h.trim(65536, 6 * 65536))
h.pwrite(b"4", 65536)
assert h.pread(65536, 3 * 65536) == b"2" * 65536
"#,
        );
        assert_eq!(daemon.status().metadata.mode.to_string(), "ro");
        let told = events(&daemon, "read_only");
        assert!(told.len() == 1 && told[0].contains("metadata ") && told[0].contains("meta-disk: "), "{told:?}");
        let text = status_text(&daemon);
        assert!(text.contains("meta-disk: ") && text.contains("start the clone again"), "{text}");
        let waited = daemon.hydrant(&["wait", "vm", "--event", "0"]).output().unwrap();
        assert!(waited.status.success(), "ro is one of dm's events");
        ends_badly(daemon);

        let daemon = command.start();
        assert_eq!(daemon.status().metadata.mode.to_string(), "rw");
        daemon.wait_hydrated();
        daemon.stop();
        let (found, mut expected) = (read_first(&bench.copy(), 4 * MIB), fs::read(&source).unwrap());
        expected[65536..131072].fill(b'1');
        expected[65536] = b'4';
        let unflushed = &found[3 * 65536..4 * 65536];
        assert!(unflushed.iter().all(|b| *b == b'2') || *unflushed == expected[3 * 65536..4 * 65536], "{what} {code}");
        expected[3 * 65536..4 * 65536].copy_from_slice(unflushed);
        assert!(found == expected, "{what} {code}");
    }
}

/// Metadata that can't be read stop the start with one line, and nothing is changed.
#[test]
fn metadata_that_can_not_be_read_are_told_at_the_start() {
    need!("fuse");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let disk = FaultyFile::new(&bench, "meta-disk", MIB);
    let command = bench.clone_of(&source).metadata(&disk.path);
    command.start().stop();
    // A superblock; a block of the bitmap.
    for (place, words) in [("0 4096", "meta-disk"), ("8192 12288", "meta-disk")] {
        disk.fail("read", &format!("EIO {place}"));
        let before = fs::read(&disk.backing).unwrap();
        command.refused(&["metadata ", words, "Input/output error"]);
        assert!(fs::read(&disk.backing).unwrap() == before);
    }
    disk.heal();
    let daemon = command.start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&source).unwrap());
}
