//! The source stalls, dies, comes back, comes back as another one, or breaks off in the middle of its answers.

use super::super::harness::*;
use super::{events, status_text};
use hydrant::control::api::{HydrationState, SOURCE_STALLED_SECONDS, SourceState};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

/// Works on the first MiB of the device, all of it hydrated, until there is a file: reads, writes, flushes.
/// Prints the longest time that one of them took, in milliseconds.
const CLIENT: &str = r#"
h = connect()
longest, round = 0, 0
while not os.path.exists(@STOP@):
    round += 1
    data = bytes([round % 255 + 1]) * 65536
    at = round % 16 * 65536
    before = time.monotonic()
    h.pwrite(data, at)
    assert h.pread(65536, at) == data
    h.flush()
    longest = max(longest, time.monotonic() - before)
    last = time.monotonic()
    time.sleep(0.01)
h.pwrite(b"e" * (1 << 20), 0)
h.flush()
assert round > 20, round
print(int(longest * 1000))
"#;

/// A source that does not answer for `stall`, its connections open: see the tests.
fn stalled(stall: Duration, args: &str) {
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let server = Nbdkit::start(&bench, &format!("-r file {}", source.display()));
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 2").args(args).start();
    nbdsh(&daemon.uri(), "connect().cache(1 << 20, 0)");
    let (uri, stop) = (daemon.uri(), bench.path("stop"));
    let script = CLIENT.replace("@STOP@", &format!("{stop:?}"));
    let client = std::thread::spawn(move || nbdsh(&uri, &script));
    server.freeze(true);
    let began = Instant::now();
    let uri = daemon.uri();
    let reader =
        std::thread::spawn(move || nbdsh(&uri, "h = connect(); h.pread(4096, 4 << 20); h.pwrite(b'x', 5 << 20)"));
    daemon.message("enable_hydration");
    let (mut slowest, mut told) = (Duration::ZERO, String::new());
    while began.elapsed() < stall {
        let asked = Instant::now();
        let status = daemon.status();
        assert!(!status.is_complete());
        if status.source.state == SourceState::Stalled && told.is_empty() {
            assert!(status.source.silent_seconds >= SOURCE_STALLED_SECONDS, "{:?}", status.source);
            told = status_text(&daemon);
        }
        daemon.client().status_of_all().unwrap();
        slowest = slowest.max(asked.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!reader.is_finished(), "what is not hydrated waits");
    assert!(slowest < Duration::from_millis(1500), "status took {slowest:?}");
    assert!(told.contains(", stalled, no answer for "), "it was not said that the source stalls: {told}");
    server.freeze(false);
    reader.join().unwrap();
    assert_ne!(daemon.status().source.state, SourceState::Stalled);
    fs::write(&stop, "").unwrap();
    let longest: u64 = client.join().unwrap().trim().parse().unwrap();
    // The machine may be slow; what waits for the source would take as long as it stalls.
    assert!(u128::from(longest) < stall.as_millis() / 2, "a client of hydrated regions waited {longest} ms");
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[..1 << 20].fill(b'e');
    expected[5 << 20] = b'x';
    assert_same(&bench.copy(), &expected);
}

/// While the source stalls, clients of hydrated regions read, write and flush undisturbed, the status answers and says so, others
/// wait;
/// all goes on when the source does.
#[test]
fn a_source_that_stalls_holds_up_only_who_needs_it() {
    need!("nbdkit", "nbdsh");
    stalled(Duration::from_secs(6), "");
}

/// The same for more than a minute, so that connections are given up and made again; reads wait up to `--source-timeout`.
#[test]
fn a_source_that_stalls_for_a_minute_holds_up_only_who_needs_it() {
    need!("nbdkit", "nbdsh");
    if std::env::var_os("HYDRANT_SLOW_TESTS").is_none() {
        eprintln!("not run: HYDRANT_SLOW_TESTS is not set");
        return;
    }
    stalled(Duration::from_secs(70), "--source-timeout 120");
}

/// A server that dies again and again under clients, on TCP: nobody gets an error, nothing is lost.
#[test]
fn a_source_server_that_is_killed_again_and_again_is_waited_for() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 16 * MIB);
    let args = format!("-r --filter=delay file {} rdelay=10ms", source.display());
    let mut server = Nbdkit::start_tcp(&bench, &args);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 4 --shards 2").start();
    let uri = daemon.uri();
    let client = std::thread::spawn(move || {
        nbdsh(
            &uri,
            r#"
h = connect()
for i in range(64):
    at = (i * 37 % 64) * 262144
    h.pread(100_000, at)
    h.pwrite(bytes([i + 1]) * 1000, at + 5000)
    h.flush()
"#,
        )
    });
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(150));
        server.kill();
        std::thread::sleep(Duration::from_millis(150));
        server.again(&args);
    }
    client.join().unwrap();
    daemon.wait_hydrated();
    let status = daemon.status();
    assert!(status.source.losses >= 1 && status.io.errors == 0, "{status:#?}");
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    for i in 0..64usize {
        expected[(i * 37 % 64) * 262_144 + 5000..][..1000].fill(i as u8 + 1);
    }
    assert_same(&bench.copy(), &expected);
}

/// A server that comes back with another image of the same size is not mixed with the first one: not a byte of it is copied
/// or given to a client. What is hydrated goes on. With the right one the next start goes on.
#[test]
fn a_source_that_comes_back_with_other_content_is_refused() {
    need!("nbdkit", "nbdsh");
    for filter in ["", "--filter=multi-conn"] {
        let mode = if filter.is_empty() { "" } else { "multi-conn-mode=disable" };
        let bench = Bench::new();
        let source = bench.random("source", 16 * MIB);
        let other = bench.path("other");
        fs::write(&other, random_bytes(99, 16 * MIB)).unwrap();
        let args =
            |file: &std::path::Path| format!("-r {filter} --filter=delay file {} rdelay=20ms {mode}", file.display());
        let mut server = Nbdkit::start(&bench, &args(&source));
        let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 1 --shards 2").start();
        daemon.wait_status("a start", |status| status.hydrated_regions > 4);
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'w' * 65536, 15 << 20); h.flush()");
        server.again(&args(&other));
        daemon.wait_event("source changed, nothing more is read from it");
        nbdsh(
            &daemon.uri(),
            r#"
h = connect()
fails(errno.EIO, lambda: h.pread(1, 14 << 20))
h.pwrite(b"v", (15 << 20) + 1)
h.flush()
assert h.pread(3, 15 << 20) == b"wvw"
"#,
        );
        let status = daemon.status();
        assert_eq!(
            (status.source.state, status.hydration.state),
            (SourceState::Changed, HydrationState::SourceChanged)
        );
        assert!(status_text(&daemon).contains("changed: nothing more is read from it"), "{}", status_text(&daemon));
        let told = events(&daemon, "source_changed");
        assert!(told.len() == 1 && told[0].contains("other data there"), "{told:?}");
        daemon.stop();
        bench.clone_of(server.uri()).refused(&["source"]);
        server.again(&format!("-r file {}", source.display()));
        let daemon = bench.clone_of(server.uri()).start();
        daemon.wait_hydrated();
        daemon.stop();
        let mut expected = fs::read(&source).unwrap();
        expected[15 << 20..(15 << 20) + 65536].fill(b'w');
        expected[(15 << 20) + 1] = b'v';
        assert_same(&bench.copy(), &expected);
    }
}

/// Between a client on TCP and a server: ends each connection after so many bytes of the server, anywhere in an answer.
struct Cutter {
    port: u16,
    /// Connections that were cut.
    cuts: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Cutter {
    fn start(server: std::path::PathBuf, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (cuts, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (cuts.clone(), stop.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if stopped.load(SeqCst) {
                    return;
                }
                let (counted, stopped, server) = (counted.clone(), stopped.clone(), server.clone());
                std::thread::spawn(move || {
                    let Ok(server) = UnixStream::connect(server) else { return };
                    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                    });
                    let (mut left, mut from, mut to) = (bytes, server, client);
                    let mut buf = vec![0; 10_000];
                    loop {
                        if stopped.load(SeqCst) {
                            left = usize::MAX;
                        }
                        let most = left.min(buf.len());
                        match from.read(&mut buf[..most]) {
                            Ok(count) if count > 0 && to.write_all(&buf[..count]).is_ok() => left -= count,
                            _ => break,
                        }
                        if left == 0 {
                            counted.fetch_add(1, SeqCst);
                            break;
                        }
                    }
                    let _ = to.shutdown(std::net::Shutdown::Both);
                    let _ = from.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        Self { port, cuts, stop }
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Connections that break in the middle of an answer, each after about 3 MiB: nothing of a half answer counts, what was not
/// answered is asked again, clients get no error.
#[test]
fn connections_that_break_in_the_middle_of_answers_cost_time_only() {
    need!("qemu-nbd", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 16 * MIB);
    // Not nbdkit: some of its versions abort when a client is gone in the middle of an answer.
    let _server = QemuNbd::start(&bench, &["-e", "64", "-f", "raw", source.to_str().unwrap()]);
    // Not at a multiple of anything.
    let cutter = Cutter::start(bench.socket("qemu"), 3_333_333);
    let daemon = bench.clone_of(format!("nbd://127.0.0.1:{}", cutter.port)).args("--shards 2").start();
    nbdsh(
        &daemon.uri(),
        &r#"
h = connect()
source = open(@SOURCE@, "rb").read()
for at in range(15 << 20, 0, -(3 << 20)):
    assert h.pread(100_000, at) == source[at:at + 100_000]
h.pwrite(b"x" * 10, 100)
h.flush()
"#
        .replace("@SOURCE@", &format!("{source:?}")),
    );
    daemon.wait_hydrated();
    assert!(cutter.cuts.load(SeqCst) >= 3, "{} cuts", cutter.cuts.load(SeqCst));
    assert_eq!(daemon.status().io.errors, 0);
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[100..110].fill(b'x');
    assert_same(&bench.copy(), &expected);
}

/// A source of whose reads one in five fails: hydration comes to its end all the same, and nothing is wrong in it.
#[test]
fn a_source_that_fails_now_and_then_is_cloned_all_the_same() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let broken = bench.path("broken");
    let args = "--filter=error pattern 8M error-pread=EIO error-pread-rate=20% error-pread-file=";
    let server = Nbdkit::start(&bench, &format!("{args}{}", broken.display()));
    let daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 2").start();
    fs::write(&broken, "").unwrap();
    daemon.message("enable_hydration");
    // Clients try again, as file systems do not; what was acknowledged counts.
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
for i in range(64):
    while True:
        try:
            h.pwrite(b"w" * 100, i * 131072 + 70_000)
            break
        except nbd.Error as error:
            assert error.errnum == errno.EIO
h.flush()
"#,
    );
    daemon.wait_hydrated();
    assert_eq!(daemon.status().hydration.failed_regions, 0);
    daemon.stop();
    let mut expected = pattern(8 * MIB);
    for i in 0..64 {
        expected[i * 131_072 + 70_000..][..100].fill(b'w');
    }
    assert_same(&bench.copy(), &expected);
}
