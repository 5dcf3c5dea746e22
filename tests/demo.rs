//! `hydrant demo` as a user runs it: it comes to its verdict, and leaves nothing behind, interrupted or not.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn demo(dir: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_hydrant"))
        .args(["demo", "--dir"])
        .arg(dir)
        .env_remove("HYDRANT_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// A directory on a disk: the target directory, since /tmp may be in memory.
fn place() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn comes_to_its_verdict_and_cleans_up() {
    let dir = place();
    let output = demo(dir.path()).wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("\nVerdict: RIGHT. Every byte of the destination was compared: "), "{out}");
    assert!(out.contains("complete, 100%") && out.contains("hydrating"), "{out}");
    assert_eq!(err, "");
    assert_eq!(entries(dir.path()), 0);
}

#[test]
fn an_interruption_cleans_up_too() {
    let dir = place();
    let child = demo(dir.path());
    let deadline = Instant::now() + Duration::from_secs(30);
    let daemon_serves = || {
        let found = std::fs::read_dir(dir.path()).unwrap().next();
        found.is_some_and(|entry| entry.unwrap().path().join("nbd.sock").exists())
    };
    while !daemon_serves() {
        assert!(Instant::now() < deadline, "no daemon");
        std::thread::sleep(Duration::from_millis(10));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.ends_with("hydrant: interrupted; the temporary directory is removed\n"), "{err}");
    assert_eq!(entries(dir.path()), 0);
}
