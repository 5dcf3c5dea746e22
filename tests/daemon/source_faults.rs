//! A source that fails, goes away, comes back, or comes back as another one.

use super::harness::*;
use hydrant::control::api::{HydrationState, SourceState};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Every read of the source fails while the file `broken` is there.
fn failing(bench: &Bench, size: &str) -> (Nbdkit, std::path::PathBuf) {
    let broken = bench.path("broken");
    let server = Nbdkit::start(
        bench,
        &format!(
            "--filter=error pattern {size} error-pread=EIO error-pread-rate=100% error-pread-file={}",
            broken.display()
        ),
    );
    (server, broken)
}

#[test]
fn read_errors_reach_the_client_and_heal() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let (server, broken) = failing(&bench, "4M");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    fs::write(&broken, "").unwrap();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.EIO, lambda: h.pread(512, 1 << 20))
fails(errno.EIO, lambda: h.pread(1 << 20, 0))
fails(errno.EIO, lambda: h.cache(65536, 0))
# A partial write needs the rest of its region.
fails(errno.EIO, lambda: h.pwrite(b'x', 100))
# A whole region does not: overwriting heals it. Zeroing and trimming too.
h.pwrite(b'y' * 65536, 65536)
h.zero(65536, 2 * 65536)
h.trim(65536, 3 * 65536)
assert h.pread(3 * 65536, 65536) == b'y' * 65536 + bytes(2 * 65536)
h.pwrite(b'z', 65536 + 5)
h.flush()
"#,
    );
    let status = daemon.status();
    assert!(status.io.errors >= 4, "{status:#?}");
    assert_eq!(status.hydrated_regions, 3);
    assert!(daemon.log().matches("WARN").count() <= 6, "the log is not flooded: {}", daemon.log());
    fs::remove_file(&broken).unwrap();
    nbdsh(&daemon.uri(), "h = connect(); h.pread(1 << 20, 0); h.pwrite(b'x', 100)");
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = pattern(4 * MIB);
    expected[100] = b'x';
    expected[65536..2 * 65536].fill(b'y');
    expected[65536 + 5] = b'z';
    expected[2 * 65536..4 * 65536].fill(0);
    assert_same(&bench.copy(), &expected);
}

#[test]
fn hydration_counts_what_fails_and_finishes_when_the_source_is_well_again() {
    need!("nbdkit");
    let bench = Bench::new();
    let (server, broken) = failing(&bench, "2M");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 1").start();
    fs::write(&broken, "").unwrap();
    daemon.message("enable_hydration");
    let status = daemon.wait_status("failures", |status| status.hydration.failed_regions > 0);
    assert!(!status.is_complete());
    daemon.wait_event("hydration backs off: 32 regions could not be copied: regions 0-31 (bytes 0+2097152); ");
    let status = daemon.wait_status("failing", |s| s.hydration.state == HydrationState::Failing);
    assert!(status.hydration.failed_regions <= 32);
    std::thread::sleep(Duration::from_secs(1));
    assert!(daemon.log().lines().count() < 40, "the log is flooded: {}", daemon.log());
    fs::remove_file(&broken).unwrap();
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert_eq!(daemon.status().hydration.failed_regions, 0);
    daemon.stop();
    assert_same(&bench.copy(), &pattern(2 * MIB));
}

/// One bad sector keeps back its own region only, however large the batch that it was in.
#[test]
fn one_bad_sector_keeps_only_its_region_back() {
    need!("nbdkit", "nbdkit-plugin-python", "nbdsh");
    let bench = Bench::new();
    let script = bench.path("bad.py");
    fs::write(
        &script,
        r#"
import os
API_VERSION = 2
def open(readonly): return 1
def get_size(h): return 8 << 20
def can_multi_conn(h): return True
def thread_model(): return 3
def pread(h, buf, offset, flags):
    bad = 5_000_000
    if offset <= bad < offset + len(buf) and not os.path.exists(os.environ["HEALED"]):
        import errno, nbdkit
        nbdkit.set_error(errno.EIO)
        raise RuntimeError("bad sector")
    for i in range(0, len(buf), 4096):
        buf[i:i + 4096] = bytes([(offset + i) // 4096 % 251 + 1]) * len(buf[i:i + 4096])
"#,
    )
    .unwrap();
    let healed = bench.path("healed");
    // The plugin takes no parameters that it does not know: the path goes by the environment.
    let server = Nbdkit::start_with(&bench, &format!("python {}", script.display()), &[("HEALED", &healed)]);
    let daemon = bench.clone_of(server.uri()).args("--shards 2").start();
    let status = daemon.wait_status("all but one", |status| status.hydrated_regions == 127);
    assert_eq!(status.nr_regions, 128);
    let status = daemon.wait_status("counted", |status| status.hydration.failed_regions == 1);
    assert!(!status.is_complete());
    let region = 5_000_000 / 65536 * 65536;
    nbdsh(
        &daemon.uri(),
        &format!(
            "h = connect(); h.pread(8 << 20 >> 1, 0); fails(errno.EIO, lambda: h.pread(1, 5_000_000)); h.pread(4096, {region})"
        ),
    );
    // Overwriting it heals it.
    nbdsh(&daemon.uri(), &format!("h = connect(); h.pwrite(b'n' * 65536, {region}); h.flush()"));
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected: Vec<u8> = (0..8 * MIB).map(|i| (i / 4096 % 251 + 1) as u8).collect();
    expected[region..region + 65536].fill(b'n');
    assert_same(&bench.copy(), &expected);
}

#[test]
fn reads_wait_for_a_source_that_went_away_and_hydration_goes_on() {
    need!("nbdkit", "nbdsh");
    // Several connections, and one for all shards.
    for filter in ["", "--filter=multi-conn "] {
        let mode = if filter.is_empty() { "" } else { " multi-conn-mode=disable" };
        let bench = Bench::new();
        let args = format!("{filter}--filter=delay pattern 16M rdelay=10ms{mode}");
        let mut server = Nbdkit::start(&bench, &args);
        let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 4 --shards 2").start();
        daemon.wait_status("a start", |status| status.hydrated_regions > 10);
        server.kill();
        daemon.wait_event("source lost");
        let status = daemon.status();
        assert_eq!(status.source.state, SourceState::Lost);
        assert!(!status.is_complete());
        let uri = daemon.uri();
        let reader = std::thread::spawn(move || {
            let start = Instant::now();
            nbdsh(&uri, "h = connect(); print(h.pread(8, 15 << 20).hex())");
            start.elapsed()
        });
        // What is hydrated is served meanwhile, and whole regions can be written.
        nbdsh(&daemon.uri(), "h = connect(); h.pread(65536, 0); h.pwrite(b'w' * 65536, 14 << 20); h.flush()");
        std::thread::sleep(Duration::from_millis(700));
        assert!(!reader.is_finished(), "a read of what is not hydrated waits");
        server.again(&args);
        assert!(reader.join().unwrap() > Duration::from_millis(600));
        daemon.wait_event("source found again");
        daemon.wait_hydrated();
        let source = daemon.status().source;
        assert!(source.losses >= 1 && source.reconnects >= 1, "{source:?}");
        daemon.stop();
        let mut expected = pattern(16 * MIB);
        expected[14 << 20..(14 << 20) + 65536].fill(b'w');
        assert_same(&bench.copy(), &expected);
    }
}

#[test]
fn reads_fail_when_the_source_stays_away_too_long() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let args = "pattern 4M";
    let mut server = Nbdkit::start(&bench, args);
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --source-timeout 1").start();
    server.kill();
    let start = Instant::now();
    nbdsh(
        &daemon.uri(),
        "h = connect(); fails(errno.EIO, lambda: h.pread(1, 0)); fails(errno.EIO, lambda: h.pwrite(b'x', 0))",
    );
    let waited = start.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(8)).contains(&waited), "{waited:?}");
    server.again(args);
    // The next try to reconnect may be further away than a read waits here.
    daemon.wait_status("the source", |status| status.source.state == SourceState::Connected);
    nbdsh(&daemon.uri(), "h = connect(); assert h.pread(8, 8) == (8).to_bytes(8, 'big')");
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &pattern(4 * MIB));
}

#[test]
fn a_source_that_comes_back_smaller_is_refused() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let mut server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=10ms");
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 1 --source-timeout 1 --shards 2").start();
    daemon.wait_status("a start", |status| status.hydrated_regions > 2);
    server.again("pattern 15M");
    daemon.wait_event("source changed, nothing more is read from it");
    nbdsh(&daemon.uri(), "h = connect(); fails(errno.EIO, lambda: h.pread(1, 14 << 20))");
    let status = daemon.status();
    assert!(!status.is_complete() && status.hydrated_regions < 256);
    assert_eq!((status.source.state, status.hydration.state), (SourceState::Changed, HydrationState::SourceChanged));
    let output = daemon.hydrant(&["status"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("changed: nothing more is read from it; when the right one is back, remove and"), "{text}");
    daemon.stop();
    bench.clone_of(server.uri()).refused(&["16MiB", "15MiB"]);
}

/// An export of a file, of which no read succeeds as long as `broken` is there.
fn breakable(source: &Path, broken: &Path) -> String {
    let (source, broken) = (source.display(), broken.display());
    format!("-r --filter=error file {source} error-pread=EIO error-pread-rate=100% error-pread-file={broken}")
}

/// A source that can't be read when the clone is made is known as soon as it can be; another one is not mixed in then, in
/// this life or the next.
#[test]
fn a_source_that_was_unreadable_at_first_is_known_later() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let (source, other) = (bench.random("one", 2 * MIB), bench.filled("other", 2 * MIB, 7));
    let broken = bench.filled("broken", 1, 0);
    let mut server = Nbdkit::start(&bench, &breakable(&source, &broken));
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 2").start();
    let status = daemon.status();
    assert!(status.warnings.concat().contains("0 of 64 samples of its content could be read"), "{:?}", status.warnings);
    fs::remove_file(&broken).unwrap();
    daemon.wait_status("known", |status| status.warnings.is_empty());
    daemon.wait_log("all of its samples can be read, it is known now");
    nbdsh(&daemon.uri(), "h = connect(); h.pread(65536, 0); h.flush()");
    server.kill();
    server.again(&format!("-r file {}", other.display()));
    daemon.wait_status("changed", |status| status.source.state == SourceState::Changed);
    nbdsh(&daemon.uri(), "h = connect(); fails(errno.EIO, lambda: h.pread(65536, 1 << 20))");
    daemon.kill9();
    bench.clone_of(&other).refused(&["the source's content is not that of the one"]);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same_files(&bench.copy(), &source);
}

/// A known clone is started while its source can't be read, and it is another one: that is told, and noticed.
#[test]
fn another_source_that_was_unreadable_at_the_start_is_found_out() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let (source, other) = (bench.random("one", 2 * MIB), bench.filled("other", 2 * MIB, 7));
    bench.clone_of(&source).args("--no-hydration").start().stop();
    let broken = bench.filled("broken", 1, 0);
    let server = Nbdkit::start(&bench, &breakable(&other, &broken));
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 2").start();
    assert!(daemon.status().warnings.concat().contains("it is not certain that it is the source of this clone"));
    fs::remove_file(&broken).unwrap();
    daemon.wait_status("changed", |status| status.source.state == SourceState::Changed);
    daemon.wait_event("now that it can be read, it is not the one the clone was made from");
    nbdsh(&daemon.uri(), "h = connect(); fails(errno.EIO, lambda: h.pread(65536, 1 << 20))");
    assert!(daemon.status().warnings.is_empty());
    daemon.stop();
    bench.clone_of(&source).args("--no-hydration").start().stop();
}
