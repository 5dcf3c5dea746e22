//! A source with bad sectors: they keep back nothing else, hydration stops in the end, and says so everywhere.

use super::harness::*;
use hydrant::control::api::{FailedRange, HydrationState, Status};
use hydrant::events::{Event, EventKind};
use hydrant::metrics::schema::MetricsDocument;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const REGION: u64 = 65536;

/// A disk of 4 KiB blocks of which the first byte counts, with EIO wherever a read touches one of the ranges (`FIRST END`, a
/// line each) of the file `bad`.
struct BadDisk {
    server: Nbdkit,
    bad: PathBuf,
    size: u64,
}

impl BadDisk {
    fn start(bench: &Bench, size: u64, bad: &[(u64, u64)]) -> Self {
        let script = bench.path("bad.py");
        let plugin = r#"
import errno, nbdkit, os
API_VERSION = 2
def open(readonly): return 1
def get_size(h): return int(os.environ["SIZE"])
def can_multi_conn(h): return True
def thread_model(): return 3
def pread(h, buf, offset, flags):
    import builtins
    with builtins.open(os.environ["BAD"]) as file:
        for line in file:
            first, end = map(int, line.split())
            if offset < end and first < offset + len(buf):
                nbdkit.set_error(errno.EIO)
                raise RuntimeError("bad sector")
    for i in range(0, len(buf), 4096):
        buf[i:i + 4096] = bytes([(offset + i) // 4096 % 251 + 1]) * len(buf[i:i + 4096])
"#;
        fs::write(&script, plugin).unwrap();
        let file = bench.path("bad");
        let size_text = PathBuf::from(size.to_string());
        let disk = |server| Self { server, bad: file.clone(), size };
        write_bad(&file, bad);
        let env = [("BAD", file.as_path()), ("SIZE", size_text.as_path())];
        disk(Nbdkit::start_with(bench, &format!("python {}", script.display()), &env))
    }

    fn set_bad(&self, bad: &[(u64, u64)]) {
        write_bad(&self.bad, bad);
    }

    fn content(&self) -> Vec<u8> {
        (0..self.size).map(|at| (at / 4096 % 251 + 1) as u8).collect()
    }
}

/// Replaced as a whole: a read sees the old ranges or the new ones.
fn write_bad(file: &PathBuf, bad: &[(u64, u64)]) {
    let text: String = bad.iter().map(|(first, end)| format!("{first} {end}\n")).collect();
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, file).unwrap();
}

fn events(daemon: &Daemon) -> Vec<Event> {
    let text = daemon.done(&["events", "vm", "--json"]);
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn event(daemon: &Daemon, kind: EventKind) -> Event {
    events(daemon).into_iter().rfind(|event| event.kind == kind).unwrap_or_else(|| panic!("no {kind}"))
}

fn range(first_region: u64, regions: u64) -> FailedRange {
    FailedRange { first_region, regions, offset: first_region * REGION, length: regions * REGION }
}

fn is_stopped(status: &Status) -> bool {
    status.hydration.state == HydrationState::Stopped
}

/// Every read of the source fails, as long as the error filter's file is there.
#[test]
fn hydration_stops_tells_everybody_and_goes_on_when_it_is_told_to() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let broken = bench.path("broken");
    let filter = "--filter=error pattern 4M error-pread=EIO error-pread-rate=100% error-pread-file";
    let server = Nbdkit::start(&bench, &format!("{filter}={}", broken.display()));
    let command = bench.clone_of(server.uri()).args("--no-hydration --hydration-failures-max 12 --shards 2");
    let daemon = command.start();
    fs::write(&broken, "").unwrap();
    let wait = |args: &[&str]| {
        let mut hydrant = daemon.hydrant(&[&["wait", "vm"], args].concat());
        hydrant.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let (plain, hydrated) = (wait(&[]), wait(&["--hydrated"]));
    daemon.message("enable_hydration");
    let status = daemon.wait_status("stopped", is_stopped);
    // Who waits is told.
    assert!(plain.wait_with_output().unwrap().status.success(), "as dmsetup wait: something happened");
    let output = hydrated.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = "hydrant: clone 'vm': hydration has stopped after 12 failures in a row; 'hydrant message vm \
                 enable_hydration' goes on; 64 regions left; ";
    assert!(said.starts_with(words), "{said}");
    let watched = daemon.refused(&["status", "vm", "--watch"]);
    assert!(watched.contains("hydration has stopped after 12 failures in a row"), "{watched}");
    // Status and event say the same.
    assert_eq!((status.hydration.failures_in_a_row, status.hydration.failures_max, status.event_nr), (12, 12, 1));
    assert!(status.hydration.enabled && status.features.no_hydration && status.hydration.eta_seconds.is_none());
    assert_eq!(status.hydration.last_failure.as_ref().map(|last| last.errno), Some(5), "{status:#?}");
    let text = daemon.done(&["status", "vm"]);
    assert!(text.contains("hydration    stopped, 0.0% (0 of 64 regions)\n"), "{text}");
    assert!(
        text.contains("stopped after 12 failures in a row; 'hydrant message vm enable_hydration' goes on\n"),
        "{text}"
    );
    assert!(text.contains(" (errno 5)\n"), "{text}");
    assert!(daemon.done(&["status", "vm", "--dm"]).contains(" 0/64 0 1 no_hydration 4 "));
    let stopped = event(&daemon, EventKind::HydrationStopped);
    assert!(stopped.text.starts_with("hydration stopped after 12 failures in a row: 64 of 64 regions are left, "));
    let warned =
        daemon.log().lines().filter(|line| line.contains("WARN") && line.contains("hydration stopped")).count();
    assert_eq!(warned, 1, "{}", daemon.log());
    let metrics: MetricsDocument = serde_json::from_str(&daemon.done(&["metrics", "vm", "--json"])).unwrap();
    assert!(metrics.shards.iter().flat_map(|shard| &shard.clones).all(|slice| slice.hydration.stopped));
    assert!(daemon.done(&["metrics", "vm"]).contains("; hydration has stopped"));
    // Clients are served all the same: copies on demand go on.
    let failed = status.io.source_read_bytes;
    nbdsh(
        &daemon.uri(),
        "h = connect(); fails(errno.EIO, lambda: h.pread(512, 1 << 20)); h.pwrite(b'y' * 65536, 65536); h.flush()",
    );
    fs::remove_file(&broken).unwrap();
    nbdsh(&daemon.uri(), "h = connect(); h.pread(65536, 0); h.pwrite(b'x', 3 * 65536 + 100)");
    std::thread::sleep(Duration::from_secs(1));
    let status = daemon.status();
    assert!(is_stopped(&status) && status.io.source_read_bytes > failed);
    assert_eq!(status.hydrated_regions, 3, "nothing but what clients asked for");
    assert_eq!(status.hydration.failures_in_a_row, 12, "those that stopped it, whatever succeeds since");
    let started = Instant::now();
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert!(started.elapsed() < Duration::from_secs(5), "everything at once");
    let status = daemon.status();
    assert_eq!((status.hydration.failures_in_a_row, status.hydration.failed_regions), (0, 0));
    assert_eq!((status.hydration.last_failure, status.features.no_hydration), (None, false));
    daemon.done(&["wait", "vm", "--hydrated"]);
    daemon.stop();
    let mut expected = pattern(4 * MIB);
    expected[65536..2 * 65536].fill(b'y');
    expected[3 * 65536 + 100] = b'x';
    assert_same(&bench.copy(), &expected);
}

/// Areas of bad sectors, one much longer than what fails in a row before a pause.
#[test]
fn bad_areas_are_found_told_and_healed() {
    need!("nbdkit", "nbdkit-plugin-python", "nbdsh");
    let bench = Bench::new();
    // 256 regions. Region 5 by one sector; 40 to 79; and the last one.
    let areas =
        [(5 * REGION + 4096, 5 * REGION + 4608), (40 * REGION + 10, 79 * REGION + 1), (256 * REGION - 1, 256 * REGION)];
    let disk = BadDisk::start(&bench, 256 * REGION, &areas);
    let daemon = bench.clone_of(disk.server.uri()).args("--shards 2").start();
    let failed = [range(5, 1), range(40, 40), range(255, 1)];
    let status = daemon.wait_status("all that is good", |status| status.hydrated_regions == 256 - 42);
    assert!(!is_stopped(&status));
    let status = daemon.wait_status("which are bad", |status| status.hydration.failed_regions == 42);
    assert_eq!((status.hydration.failed_ranges, status.hydration.failed_regions_more), (failed.to_vec(), 0));
    daemon.wait_event("hydration backs off: 42 regions could not be copied");
    let text = event(&daemon, EventKind::HydrationFailed).text;
    let which =
        "region 5 (bytes 327680+65536), regions 40-79 (bytes 2621440+2621440), region 255 (bytes 16711680+65536)";
    assert!(text.contains(&format!("42 regions could not be copied: {which}; the last error: ")), "{text}");
    let text = daemon.done(&["status", "vm"]);
    assert!(text.contains("42 regions could not be copied") && text.contains(which), "{text}");
    let metrics: MetricsDocument = serde_json::from_str(&daemon.done(&["metrics", "vm", "--json"])).unwrap();
    let gauge: u64 = metrics.shards.iter().flat_map(|s| &s.clones).map(|slice| slice.hydration.failed_regions).sum();
    assert_eq!(gauge, 42);
    // A client gets an error for what is bad, and nothing else.
    nbdsh(
        &daemon.uri(),
        &format!(
            r#"
h = connect()
R = {REGION}
fails(errno.EIO, lambda: h.pread(1, 5 * R + 4096))
fails(errno.EIO, lambda: h.pread(R, 5 * R))
fails(errno.EIO, lambda: h.pread(1, 60 * R))
h.pread(4096, 5 * R)
h.pread(R, 4 * R)
h.pread(2 * R, 6 * R)
h.pread(8192, 6 * R - 4096)
h.pread(R - 4096, 255 * R)
fails(errno.EIO, lambda: h.pread(2, 256 * R - 2))
# Overwriting one whole heals it.
h.pwrite(b'n' * R, 50 * R)
"#
        ),
    );
    let status = daemon.status();
    assert_eq!(status.hydration.failed_ranges, [range(5, 1), range(40, 10), range(51, 29), range(255, 1)]);
    // The delays' own retries find what is good again.
    disk.set_bad(&areas[..1]);
    daemon.wait_status("all but one", |status| status.hydrated_regions == 255);
    let status = daemon.wait_status("one left", |status| status.hydration.failed_regions == 1);
    assert_eq!(status.hydration.failed_ranges, [range(5, 1)]);
    // And the others are forgotten when a number says that it is enough.
    daemon.message("hydration_failures_max 1");
    daemon.message("enable_hydration");
    daemon.wait_status("stopped", is_stopped);
    let text = event(&daemon, EventKind::HydrationStopped).text;
    let words =
        "hydration stopped after a failure: 1 of 256 regions are left, 1 of them bad: region 5 (bytes 327680+65536); ";
    assert!(text.starts_with(words), "{text}");
    disk.set_bad(&[]);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert!(!event(&daemon, EventKind::BadRegionsHealed).text.is_empty());
    let status = daemon.status();
    assert_eq!((status.hydration.failed_regions, status.hydration.last_failure), (0, None));
    daemon.stop();
    let mut expected = disk.content();
    expected[(50 * REGION) as usize..(51 * REGION) as usize].fill(b'n');
    assert_same(&bench.copy(), &expected);
}

/// The places that tell one source from another can be bad too. What clients wrote is needed whatever the source does.
#[test]
fn bad_sectors_do_not_keep_a_clone_from_starting() {
    need!("nbdkit", "nbdkit-plugin-python", "nbdsh");
    let bench = Bench::new();
    let disk = BadDisk::start(&bench, 32 * REGION, &[]);
    let command = bench.clone_of(disk.server.uri()).args("--no-hydration");
    let daemon = command.start();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'w' * 65536, 65536); h.flush()");
    daemon.stop();
    disk.set_bad(&[(0, 4096)]);
    let daemon = command.start();
    daemon.wait_log("63 of 64 samples could be read, so it is not certain that this is the source of the clone");
    nbdsh(
        &daemon.uri(),
        "h = connect(); assert h.pread(65536, 65536) == b'w' * 65536; fails(errno.EIO, lambda: h.pread(1, 0))",
    );
    daemon.stop();
    // What was known of it is not forgotten.
    bench.clone_of(bench.random("other", 32 * REGION)).refused(&["not that of the one the clone was made from"]);
    disk.set_bad(&[]);
    let daemon = command.start();
    assert!(!daemon.log().contains("it is not certain"));
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = disk.content();
    expected[REGION as usize..2 * REGION as usize].fill(b'w');
    assert_same(&bench.copy(), &expected);
}

/// The key of a configuration file; a restart begins anew; clients complete a clone that has stopped.
#[test]
fn a_restart_begins_anew_and_clients_can_complete_it() {
    need!("nbdkit", "nbdkit-plugin-python", "nbdsh");
    let bench = Bench::new();
    let disk = BadDisk::start(&bench, 32 * REGION, &[(0, 4 * REGION)]);
    let config = format!(
        "[[clone]]\nname = \"vm\"\nsource = \"{}\"\ndestination = \"copy\"\nmetadata = \"meta\"\nhydration_failures_max = 3\n",
        disk.server.uri()
    );
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving NBD at");
    let stopped = |status: &Status| is_stopped(status) && status.hydrated_regions == 28;
    let status = daemon.wait_status_of("vm", "stopped", stopped);
    assert_eq!(status.hydration.failures_max, 3);
    daemon.stop();
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving NBD at");
    daemon.wait_status_of("vm", "stopped again", stopped);
    nbdsh(&daemon.uri_of("vm"), &format!("h = connect(); h.pwrite(b'n' * {}, 0); h.flush()", 4 * REGION));
    let status = daemon.wait_status_of("vm", "complete", Status::is_complete);
    assert_eq!((status.hydration.failed_regions, status.features.no_hydration), (0, false));
    daemon.stop();
    let mut expected = disk.content();
    expected[..4 * REGION as usize].fill(b'n');
    assert_same(&bench.path("copy"), &expected);
}
