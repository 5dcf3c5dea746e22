//! `hydrant meta` on the metadata of real clones.

use super::harness::*;
use std::fs;

fn meta(args: &[&str]) -> (i32, String) {
    run_for_status(env!("CARGO_BIN_EXE_hydrant"), &[&["meta"], args].concat())
}

#[test]
fn dump_and_check_say_what_a_clone_is_like() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(
        &daemon.uri(),
        "h = connect(); h.pwrite(b'x' * 131072, 65536); h.pwrite(b'x' * 65536, 127 * 65536); h.flush()",
    );
    daemon.stop();
    let path = bench.meta();
    let path = path.to_str().unwrap();
    let before = fs::read(path).unwrap();
    let (status, text) = meta(&["dump", path]);
    assert_eq!(status, 0, "{text}");
    for part in [
        "state           active",
        "hydrated 1..=2",
        "hydrated 127..=127",
        "regions         128",
        "region size     64KiB",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (_, text) = meta(&["dump", "--json", path]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["hydrated"], serde_json::json!([[1, 2], [127, 127]]));
    assert_eq!((json["hydrated_count"].as_u64(), json["size"].as_u64()), (Some(3), Some(8 * MIB)));
    let (status, text) = meta(&["check", path]);
    assert!(status == 0 && text.trim_end().ends_with("clean") && !text.contains("not clean"), "{text}");
    assert_eq!(fs::read(path).unwrap(), before);

    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    let (_, text) = meta(&["dump", path]);
    assert!(
        text.contains("state           complete") && text.contains("(100.0 %)") && text.contains("hydrated 0..=127"),
        "{text}"
    );
}

#[test]
fn what_is_no_metadata_is_told() {
    let bench = Bench::new();
    let (data, empty, missing) = (bench.random("data", 65536), bench.hole("empty", 0), bench.path("missing"));
    for (path, part) in [(&data, "unknown data"), (&empty, "empty"), (&missing, "No such file")] {
        for verb in ["check", "dump"] {
            let (status, text) = meta(&[verb, path.to_str().unwrap()]);
            assert!(status == 1 && text.contains("hydrant: metadata") && text.lines().count() == 1, "{verb}: {text}");
            assert!(text.contains(part) || part == "empty", "{verb}: {text}");
        }
    }
}

/// A daemon that runs is no obstacle to looking: nothing is locked, nothing written.
#[test]
fn metadata_in_use_can_be_looked_at() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=10ms");
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 4").start();
    let path = bench.meta();
    for _ in 0..10 {
        let (status, text) = meta(&["check", path.to_str().unwrap()]);
        assert_eq!(status, 0, "{text}");
    }
    daemon.wait_hydrated();
    daemon.stop();
}

/// As SIGKILL or a power cut leaves them before the superblock is written: the same command begins again. But where a
/// commit has ever been, the loss of both superblock copies is damage.
#[test]
fn a_format_that_was_interrupted_is_begun_again() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 3 * MIB + 100);
    let path = bench.meta();
    let path = path.to_str().unwrap();
    let make = || {
        let _ = fs::remove_file(path);
        assert_eq!(meta(&["format", "--size", &(3 * MIB + 100).to_string(), path]).0, 0);
        let mut bytes = fs::read(path).unwrap();
        bytes[..8192].fill(0);
        bytes
    };
    let whole = make();
    let unwritten = { [&whole[..8192 + 1024], &[0; 1024], &whole[8192 + 2048..]].concat() };
    for bytes in [&whole, &unwritten] {
        fs::write(path, bytes).unwrap();
        assert_eq!(meta(&["format", "--size", "3MiB", path]).0, 0, "by the tool");
        fs::write(path, bytes).unwrap();
        let _ = fs::remove_file(bench.copy());
        let daemon = bench.clone_of(&source).args("--no-hydration").start();
        daemon.wait_log("holds a format that was interrupted, and nothing else");
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'x' * 100, 70000); h.flush()");
        daemon.kill9();
    }
    // Now it has a bit, and the destination its data.
    let mut bytes = fs::read(path).unwrap();
    bytes[..8192].fill(0);
    fs::write(path, &bytes).unwrap();
    bench.clone_of(&source).refused(&["metadata", "holds data at offset 819", "--force"]);
    assert_eq!(fs::read(path).unwrap(), bytes);
    // A bit in what looks fresh; anything else in it.
    for at in [8192 + 32, 8192 + 8, 8192 + 4] {
        let mut bytes = make();
        bytes[at] ^= 1;
        fs::write(path, &bytes).unwrap();
        bench.clone_of(&source).refused(&["metadata", "holds data at offset 819", "--force"]);
    }
}
