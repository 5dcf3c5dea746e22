//! The scripts beside the tests refuse what they would not do, before they build or run anything.

use std::process::Command;

/// Runs a script with wrong arguments, from another directory; what it says.
fn refused(script: &str, args: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(format!("{}/tests/{script}", env!("CARGO_MANIFEST_DIR")))
        .args(args.split_whitespace())
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{script} {args}: {said}");
    assert!(output.stdout.is_empty() && !said.contains(": line "), "{script} {args}: {said}");
    said
}

#[test]
fn simulate_refuses_what_runs_nothing() {
    for (args, why) in [
        ("--seconds 0", "nothing would be run"),
        ("--seconds 00", "nothing would be run"),
        ("--seeds 3..3", "A is less than B"),
        ("--seeds 5..2", "A is less than B"),
        ("--seeds 08..09..10", "not A..B"),
        ("--seeds 0..9999999", "more than a million"),
        ("--seed 1 --seconds 5", "not with --seed"),
        ("--seeds 1..2 --start 08", "not with --seed"),
        ("--seed 1 --seeds 1..2", "once"),
        ("--start 9223372036854775807 --jobs 2", "18 digits"),
        ("--jobs 00", "1 to 1024"),
        ("--jobs 08 --seed 1", "for fresh seeds"),
        ("--report /nonexistent/x", "can't be written"),
        ("--report /", "can't be written"),
        ("--seed", "needs a value"),
        ("typo", "unknown argument"),
    ] {
        let said = refused("simulate", args);
        assert!(said.contains(why), "{args}: {said}");
    }
}

#[test]
fn crash_refuses_what_runs_nothing() {
    for (args, why) in [
        ("--seconds 0", "nothing would be run"),
        ("--seed x", "not a number"),
        ("--report /nonexistent/x", "can't be written"),
        ("--report", "needs a value"),
    ] {
        let said = refused("crash", args);
        assert!(said.contains(why), "{args}: {said}");
    }
}

#[test]
fn mutants_refuses_a_name_that_is_none() {
    for (args, why) in [
        ("--list typo", "'typo'"),
        ("--list * typo", "'typo'"),
        ("--check * typo", "'typo'"),
        ("--filter", "--filter needs a value"),
    ] {
        let said = refused("mutants/run", args);
        assert!(said.contains(why), "{args}: {said}");
    }
    for (args, why) in [
        ("typo", "'typo'"),
        ("../semantic/typo", "typo"),
        ("destination-flush-after-the-bits 0", "not a number of places"),
        ("destination-flush-after-the-bits many", "not a number of places"),
    ] {
        let said = refused("mutants/power-cuts", args);
        assert!(said.contains(why), "{args}: {said}");
    }
}
