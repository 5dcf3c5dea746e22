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

#[test]
fn perf_vm_refuses_what_measures_nothing() {
    for (args, why) in [
        ("--only hydrated,typo", "typo"),
        ("--jobs typo", "none of randread-qd1"),
        ("--own 16", "not THRESHOLD/BATCH"),
        ("--fg-settings 1", "not THRESHOLD/BATCH"),
        ("--disk-us 100", "is for --icount"),
        ("--icount --jobs typo", "none of randread-qd1"),
        ("--icount --only cold", "--disk-us gives it other"),
        ("--icount --cpus 2", "with --icount it has one"),
        ("--reps 0", "1 or more"),
        ("--size 3", "multiple of 4"),
        ("--limit 0", "1 or more"),
        ("typo", "unrecognized arguments"),
    ] {
        let said = refused("../perf/vm", args);
        assert!(said.contains(why), "{args}: {said}");
    }
}

/// One of fio's terse lines, with the figures that are read of it.
fn terse(target: &str, side: &str, kib_per_s: u32, iops: u32, p99_us: u32) -> String {
    let done = format!(
        "{kib_per_s};{kib_per_s};{iops};1000;0;0;0;0;1;9;5.5;0.1;50.000000%=5;99.000000%={p99_us}{};1;9;5;1;0;0;0%;0;0",
        ";0%=0".repeat(18)
    );
    let none = format!("0;0;0;0;0;0;0;0;0;0;0;0;50.000000%=0;99.000000%=0{};0;0;0;0;0;0;0%;0;0", ";0%=0".repeat(18));
    let (read, write) = if side == "read" { (done, none) } else { (none, done) };
    format!("3;fio-3.33;{target};0;0;{read};{write}\n")
}

/// What perf/vm makes of a machine's console, with these arguments: its status, its tables, what it says else.
fn perf_vm_again(console: &str) -> (Option<i32>, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("console");
    std::fs::write(&file, console).unwrap();
    let output =
        Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/perf/vm")).arg("--again").arg(&file).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn perf_vm_makes_tables_of_what_the_machine_says() {
    let mut console = String::from("noise\n@ machine kernel=6.18 cpus=2 sectors=2097152 hydrant=0.1.0\n");
    // Ratios are of the same repetition: 0.5, 0.8 and 0.9 of raw; 0.6, 1 and 0.5 of dm-clone.
    for (rep, raw, dm, ublk) in [(0, 1000, 830, 500), (1, 1000, 800, 800), (2, 100, 180, 90)] {
        console += &format!("@ fio kind=hydrated job=randread-qd1 rep={rep}\n");
        console += &terse("raw", "read", raw * 4, raw, 100);
        console += &terse("dm-clone", "read", dm * 4, dm, 200);
        console += &terse("ublk", "read", ublk * 4, ublk, 300);
        console += &format!("@ cold who=dd setting=4MiB region=8 sectors=2097152 hundredths=500 rep={rep}\n");
        for (who, setting, hundredths) in [
            ("dm-clone", "default", 20000),
            ("dm-clone", "256/256", 2500),
            ("dm-clone", "64/64", 5000),
            ("hydrant", "default", 1000),
        ] {
            console += &format!(
                "@ cold who={who} setting={setting} region=8 sectors=2097152 hundredths={hundredths} rep={rep}\n"
            );
        }
    }
    console += "@ fio kind=in_use who=hydrant setting=as-1/1 rate=10485760 hundredths=400 rep=0\r\n";
    console += &terse("hydrant", "write", 800, 200, 4000);
    let (status, tables, said) = perf_vm_again(&(console.clone() + "@ end\n"));
    assert_eq!(status, Some(0), "{said}");
    let row = |first: &str| {
        let line = tables.lines().find(|line| line.starts_with(first)).unwrap_or_else(|| panic!("{first}: {tables}"));
        line[first.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(tables.contains("no column nbd"), "{tables}");
    assert_eq!(row("randread-qd1"), "1000 800 (0.83) 500 (0.80) 0.60");
    assert_eq!(row("4K"), "205 5.1 (0.02) 41.0 (0.20) 256/256 102.4 (0.50) 20.00 2.50");
    assert_eq!(row("hydrant as-1/1"), "10.0 - - 0.01 4.00 200");

    // What is not whole is no result.
    let (status, tables, said) = perf_vm_again(&console);
    assert_eq!((status, tables.as_str()), (Some(1), ""));
    assert!(said.contains("ended early"), "{said}");
    let (status, _, said) = perf_vm_again(&(console.clone() + "@ failed dm-clone 8\n@ end\n"));
    assert!(status == Some(1) && said.contains("said: dm-clone 8"), "{said}");
    let failed = terse("raw", "read", 1, 1, 1).replacen(";0;0;", ";0;5;", 1);
    let (status, _, said) = perf_vm_again(&(console + &failed + "@ end\n"));
    assert!(status == Some(1) && said.contains("fio reports error 5"), "{said}");
}
