//! dm-clone's table lines: `--table`, `table = ...`, `hydrant table`, and dm-clone's words for what is wrong.

use super::harness::*;
use std::fs;
use std::process::Output;

/// `hydrant clone --table` of this line, to its end.
fn output(bench: &Bench, line: &str) -> Output {
    std::process::Command::new("timeout")
        .args(["60", env!("CARGO_BIN_EXE_hydrant"), "clone", "--name", "vm", "--table", line])
        .env("XDG_RUNTIME_DIR", bench.runtime())
        .env_remove("HYDRANT_LOG")
        .output()
        .unwrap()
}

/// The devices of a line, with a source of 1 MiB: metadata, destination, source.
fn devices(bench: &Bench) -> [String; 3] {
    [bench.meta(), bench.copy(), bench.random("source", MIB)].map(|path| path.to_str().unwrap().to_owned())
}

/// What is wrong with the words of a line is dm-clone's to say, before any device is opened.
#[test]
fn bad_lines() {
    let bench = Bench::new();
    let [metadata, destination, source] = devices(&bench);
    let devices = format!("{metadata} {destination} {source}");
    let cases = [
        (format!("0 2048 clone {metadata} {destination} {source}"), "Invalid number of arguments"),
        (format!("0 2048 clone {devices} 4"), "Invalid region size"),
        (format!("0 2048 clone {devices} 4194304"), "Invalid region size"),
        (format!("0 2048 clone {devices} 8k"), "Invalid region size"),
        (format!("0 2048 clone {devices} 4294967304"), "Invalid region size"),
        (format!("0 2048 clone {devices} 24"), "Region size is not a power of 2"),
        (format!("0 2048 clone {devices} 8 1 hydrate"), "Invalid feature argument"),
        (format!("0 2048 clone {devices} 8 0 1 x"), "Number of core arguments must be even"),
        (format!("0 2048 clone {devices} 8 0 2 x 1"), "Invalid core argument"),
        (
            format!("0 2048 clone {devices} 8 0 2 hydration_threshold 4294967296"),
            "Invalid value for argument `hydration_threshold'",
        ),
        (
            format!("0 2048 clone {devices} 8 0 2 hydration_batch_size -1"),
            "Invalid value for argument `hydration_batch_size'",
        ),
        (format!("0 2048 linear {source} 0"), "unknown target type"),
        (format!("8 2048 clone {devices} 8"), "Gap in table"),
        (format!("0 0 clone {devices} 8"), "zero-length target"),
        ("0 2048".into(), "Invalid format on line 1 of table"),
    ];
    let more = [
        ("abc -8 +8 0x8 7 2097153", "", "Invalid region size"),
        ("9 12 100 010", "", "Region size is not a power of 2"),
        ("x -1 3 1", "8 ", "Invalid number of feature arguments"),
        ("x -1 6 2", "8 0 ", "Invalid number of core arguments"),
        ("x -1 0x10", "8 0 2 hydration_threshold ", "Invalid value for argument `hydration_threshold'"),
        ("x 4294967296 0x10", "8 0 2 hydration_batch_size ", "Invalid value for argument `hydration_batch_size'"),
    ];
    let more = more.iter().flat_map(|(words, before, said)| {
        let devices = &devices;
        words.split(' ').map(move |word| (format!("0 2048 clone {devices} {before}{word}"), *said))
    });
    let before = checksums(bench.dir());
    for (line, said) in cases.into_iter().chain(more) {
        let output = output(&bench, &line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {error}");
        assert!(error.contains(&format!(": {said}: ")), "{line}: {error}");
    }
    assert_eq!(checksums(bench.dir()), before);
}

/// What is wrong with the devices is said in dm-clone's words, and in ours behind them.
#[test]
fn bad_devices() {
    let bench = Bench::new();
    let [metadata, destination, source] = devices(&bench);
    let small = bench.hole("small", MIB - 512);
    let small = small.to_str().unwrap();
    let dir = bench.dir().to_str().unwrap();
    let cases = [
        (format!("0 2048 clone {metadata} {destination} /no/source 8"), "Error opening source device", "No such file"),
        (format!("0 2048 clone /no/meta {destination} {source} 8"), "Error opening metadata device", "/no"),
        (format!("0 2048 clone {metadata} /no/dest {source} 8"), "Error opening destination device", "/no"),
        (format!("0 2048 clone {metadata} {dir} {source} 8"), "Error opening destination device", "a directory"),
        (format!("0 2048 clone {metadata} {destination} 250:1048575 8"), "Error opening source device", "250:1048575"),
        (format!("0 2048 clone {metadata} 250:1048575 {source} 8"), "Error opening destination device", "250:1048575"),
        (format!("0 2048 clone 250:1048575 {destination} {source} 8"), "Error opening metadata device", "250:1048575"),
        (
            format!("0 2048 clone {metadata} {small} {source} 8"),
            "Device size larger than destination device",
            "1048576",
        ),
        (
            format!("0 2049 clone {metadata} {destination} {source} 8"),
            "Device size larger than source device",
            "1048576",
        ),
    ];
    let before = checksums(bench.dir());
    for (line, said, detail) in cases {
        let output = output(&bench, &line);
        let error = String::from_utf8_lossy(&output.stderr);
        let last = error.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{line}: {error}");
        assert!(last.starts_with(&format!("hydrant: {said}: ")) && last.contains(detail), "{line}: {error}");
    }
    assert_eq!(checksums(bench.dir()), before);
}

/// Metadata hold for one region size and one length.
#[test]
fn metadata_of_another_table() {
    let bench = Bench::new();
    let [metadata, destination, source] = devices(&bench);
    let line =
        |len: u64, region: u64| format!("0 {len} clone {metadata} {destination} {source} {region} 1 no_hydration");
    let config = |line: &str| format!("[[clone]]\nname = 'vm'\ntable = '{line}'\n");
    let daemon = Daemon::serve(&bench, &config(&line(2000, 16)));
    daemon.wait_log("serving NBD");
    daemon.stop();
    let before = checksums(bench.dir());
    for (len, region) in [(2000, 8), (2000, 32), (1999, 16), (2001, 16), (2048, 16)] {
        let output = output(&bench, &line(len, region));
        let error = String::from_utf8_lossy(&output.stderr);
        let said = "hydrant: Region and/or target size don't match the ones in metadata: ";
        assert!(error.lines().last().unwrap().starts_with(said), "{len} {region}: {error}");
        assert_eq!(output.status.code(), Some(1));
    }
    // Something else than metadata, and damaged ones.
    let mut bytes = fs::read(&metadata).unwrap();
    bytes[8292] ^= 1;
    fs::write(&metadata, &bytes).unwrap();
    let output = output(&bench, &line(2000, 16));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.lines().last().unwrap().starts_with("hydrant: Failed to load metadata: "), "{error}");
    bytes[8292] ^= 1;
    fs::write(&metadata, &bytes).unwrap();
    assert_eq!(checksums(bench.dir()).len(), before.len());
    // And the right one goes on.
    Daemon::serve(&bench, &config(&line(2000, 16))).wait_log("serving NBD");
}

/// A line holds for one length, as in dm-clone: after a resize the old one is refused, and what fits is said.
#[test]
fn the_line_of_a_clone_that_has_grown() {
    let bench = Bench::new();
    let [metadata, destination, source] = devices(&bench);
    let line = |len: u64| format!("0 {len} clone {metadata} {destination} {source} 16 1 no_hydration");
    let config = |line: &str| format!("[[clone]]\nname = 'vm'\ntable = '{line}'\n");
    let daemon = Daemon::serve(&bench, &config(&line(1024)));
    daemon.wait_log("serving NBD");
    daemon.done(&["resize", "vm", "--size", "1MiB"]);
    assert!(daemon.done(&["table", "vm"]).starts_with("0 2048 clone "));
    daemon.stop();
    let output = output(&bench, &line(1024));
    let error = String::from_utf8_lossy(&output.stderr);
    let last = error.lines().last().unwrap();
    assert!(last.starts_with("hydrant: Region and/or target size don't match the ones in metadata: "), "{error}");
    assert!(
        last.ends_with("the table has 512KiB, the clone has, after a resize or from its start, 1MiB: LEN 2048 fits"),
        "{error}"
    );
    Daemon::serve(&bench, &config(&line(2048))).wait_log("serving NBD");
}

/// A line as dm-clone takes it, on block devices by their numbers: what it says holds, and `table` repeats it.
#[test]
fn a_line_of_block_devices() {
    need!("loop", "losetup", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 2 * MIB);
    let loops = [bench.hole("m", MIB), bench.hole("d", 2 * MIB), source.clone()].map(|path| Loop::attach(&path, 512));
    let number = |device: &Loop| {
        use std::os::unix::fs::MetadataExt;
        let number = fs::metadata(&device.path).unwrap().rdev();
        format!("{}:{}", libc::major(number), libc::minor(number))
    };
    let [metadata, destination, from] = [&loops[0], &loops[1], &loops[2]].map(number);
    // One sector less than the devices have, so that the last region is short.
    let line = format!(
        "0 4095 clone {metadata} {destination} {from} 16 2 No_Hydration no_discard_passdown \
         4 hydration_threshold 5 hydration_batch_size +7 and more"
    );
    let daemon = Daemon::serve(&bench, &format!("[[clone]]\nname = 'vm'\ntable = '{line}'\n"));
    daemon.wait_log("serving NBD");
    assert_eq!(daemon.done(&["table", "vm"]), format!("{line}\n"));
    assert_eq!(daemon.done(&["table"]), format!("vm: {line}\n"));
    let status = daemon.status_of("vm");
    assert_eq!((status.size, status.region_size, status.nr_regions), (4095 * 512, 8192, 256));
    assert!(!status.hydration.enabled && status.features.no_discard_passdown);
    assert_eq!((status.hydration.threshold, status.hydration.batch_size), (Some(5), Some(7)));
    nbdsh(
        &daemon.uri_of("vm"),
        "h = connect(); assert h.get_size() == 4095 * 512\nh.pwrite(b'end', 4095 * 512 - 3); h.flush()",
    );
    daemon.done(&["message", "vm", "enable_hydration"]);
    daemon.done(&["message", "vm", "hydration_threshold", "100"]);
    assert_eq!(daemon.done(&["table", "vm"]), format!("{line}\n"), "messages never change it");
    daemon.wait_status_of("vm", "hydrated", |status| status.is_complete());
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected.truncate(4095 * 512);
    expected[4095 * 512 - 3..].copy_from_slice(b"end");
    assert_same(&bench.path("d"), &expected);
    // The last sector is not part of it.
    assert_eq!(fs::read(bench.path("d")).unwrap()[4095 * 512..], [0; 512]);
}

/// The line of a clone that was given by options starts the same clone.
#[test]
fn the_line_of_a_clone_by_options() {
    let bench = Bench::new();
    let source = bench.random("a source", MIB);
    let command = bench.clone_of(&source).args("--region-size 8KiB --no-hydration --hydration-batch-size 3");
    let daemon = command.start();
    let line = daemon.done(&["table", "vm"]);
    let escaped = source.to_str().unwrap().replace(' ', "\\ ");
    let expected = format!(
        "0 2048 clone {} {} {escaped} 16 1 no_hydration 2 hydration_batch_size 3\n",
        bench.meta().display(),
        bench.copy().display()
    );
    assert_eq!(line, expected);
    daemon.stop();
    let daemon = Daemon::serve(&bench, &format!("[[clone]]\nname = 'vm'\ntable = '{}'\n", line.trim_end()));
    daemon.wait_log("serving NBD");
    assert_eq!(daemon.done(&["table", "vm"]), expected);
    assert!(daemon.refused(&["table", "other"]).contains("no clone 'other'"));
    daemon.stop();
}

/// A size that is no multiple of a sector: LEN covers it, everywhere the same, and starts the same clone.
#[test]
fn a_last_sector_that_is_not_whole() {
    let bench = Bench::new();
    let source = bench.random("source", 1_100_000);
    let daemon = bench.clone_of(&source).args("--size 1000001 --no-hydration").start();
    let line = daemon.done(&["table", "vm"]);
    let status = daemon.done(&["status", "vm", "--dm"]);
    assert!(line.starts_with("0 1954 clone ") && status.starts_with("0 1954 clone "), "{line}{status}");
    assert!(!daemon.stop().contains("WARN"));
    let table = |line: &str| format!("[[clone]]\nname = 'vm'\ntable = '{}'\n", line.trim_end());
    let daemon = Daemon::serve(&bench, &table(&line));
    daemon.wait_log("serving NBD");
    assert_eq!(daemon.done(&["table", "vm"]), line);
    assert_eq!(daemon.status_of("vm").size, 1_000_001);
    daemon.done(&["message", "vm", "enable_hydration"]);
    daemon.wait_status_of("vm", "hydrated", |status| status.is_complete());
    let log = daemon.stop();
    assert!(!log.contains("WARN"), "{log}");
    // Complete, and without its source.
    fs::remove_file(&source).unwrap();
    let daemon = Daemon::serve(&bench, &table(&line));
    daemon.wait_log("serving NBD");
    daemon.stop();
    for len in [1953, 1955] {
        let output = output(&bench, &line.trim_end().replace(" 1954 ", &format!(" {len} ")));
        let error = String::from_utf8_lossy(&output.stderr);
        let last = error.lines().last().unwrap_or_default();
        assert!(last.starts_with("hydrant: Region and/or target size don't match"), "{len}: {error}");
        assert!(!error.contains("has grown"), "{error}");
    }
}

/// Through the control interface as well.
#[test]
fn create_from_a_line() {
    let bench = Bench::new();
    let [metadata, destination, source] = devices(&bench);
    let daemon = Daemon::serve(&bench, "");
    let file = bench.path("vm.toml");
    let table = |line: &str| fs::write(&file, format!("[[clone]]\nname = 'vm'\ntable = '{line}'\n")).unwrap();
    table(&format!("0 4096 clone {metadata} {destination} {source} 8"));
    let refused = daemon.refused(&["create", file.to_str().unwrap()]);
    assert!(refused.contains("Device size larger than source device: "), "{refused}");
    // Relative to the file.
    table("0 2048 clone meta copy source 8");
    daemon.done(&["create", file.to_str().unwrap()]);
    assert_eq!(daemon.done(&["table", "vm"]), format!("0 2048 clone {metadata} {destination} {source} 8\n"));
    daemon.wait_status_of("vm", "hydrated", |status| status.is_complete());
    let version = daemon.client().version().unwrap();
    assert_eq!(version.version, env!("CARGO_PKG_VERSION"));
    assert!(version.targets.iter().any(|target| target.kind == "engine" && target.name == "clone"));
    daemon.stop();
    assert_same_files(bench.copy().as_path(), bench.path("source").as_path());
}
