//! The end of a daemon: in order, at once, and with a source that hangs.

use super::harness::*;
use std::time::{Duration, Instant};

#[test]
fn sigterm_and_sigint_end_it_in_order() {
    need!("nbdsh");
    for signal in ["TERM", "INT"] {
        let bench = Bench::new();
        let source = bench.random("source", 4 * MIB);
        let mut daemon = bench.clone_of(&source).args("--no-hydration").start();
        nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'kept', 100000); os._exit(0)");
        let start = Instant::now();
        daemon.signal(signal);
        let (status, log) = daemon.end_within(Duration::from_secs(10));
        assert!(status.success() && log.contains("stopped, 1 of 64 regions hydrated"), "{log}");
        assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
        assert!(!daemon.socket.exists() && !daemon.control.exists());
        let again = bench.clone_of(&source).start();
        again.wait_hydrated();
        again.stop();
        let mut expected = std::fs::read(&source).unwrap();
        expected[100_000..100_004].copy_from_slice(b"kept");
        assert_same(&bench.copy(), &expected);
    }
}

#[test]
fn a_client_that_stays_does_not_hold_up_the_end() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    let uri = daemon.uri();
    let client = std::thread::spawn(move || {
        nbdsh(
            &uri,
            "h = connect()\nprint('here', flush=True)\ntry:\n  while True: h.pread(4096, 0)\nexcept nbd.Error: pass",
        )
    });
    wait_for("a client", Duration::from_secs(10), || daemon.status().io.reads > 10);
    let start = Instant::now();
    daemon.stop();
    assert!(start.elapsed() < Duration::from_secs(8), "it took {:?}", start.elapsed());
    client.join().unwrap();
}

#[test]
fn a_second_signal_ends_it_at_once() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 16M");
    let mut daemon = bench.clone_of(server.uri()).args("--no-hydration --shards 2").start();
    let uri = daemon.uri();
    server.freeze(true);
    let reader = std::thread::spawn(move || {
        nbdsh(&uri, "h = connect()\ntry: h.pread(1, 8 << 20)\nexcept nbd.Error: print('gone')")
    });
    wait_for("a read", Duration::from_secs(10), || daemon.status().io.reads == 1);
    daemon.signal("TERM");
    daemon.wait_log("a second signal ends at once");
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(5));
    assert_eq!(status.code(), Some(130), "{log}");
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(reader.join().unwrap().trim(), "gone");
    server.freeze(false);
    // The sockets it left behind are no obstacle.
    let again = bench.clone_of(server.uri()).start();
    again.wait_hydrated();
    again.stop();
    assert_same(&bench.copy(), &pattern(16 * MIB));
}

#[test]
fn a_source_that_hangs_does_not_hold_up_the_end_for_long() {
    need!("nbdkit", "nbdsh", "qemu-io");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=10ms");
    let mut daemon = bench.clone_of(server.uri()).args("--shards 2 --hydration-threshold 4").start();
    daemon.wait_status("a start", |status| status.hydrated_regions > 4);
    server.freeze(true);
    std::thread::sleep(Duration::from_millis(200));
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'w' * 65536, 15 << 20)");
    // A client that waits for the source all the while.
    let mut reader = std::process::Command::new("qemu-io")
        .args(["-r", "-f", "raw", "-c", "read 12M 4k", &daemon.uri()])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(25));
    assert!(status.success(), "{log}");
    eprintln!("it took {:?}", start.elapsed());
    reader.wait().unwrap();
    server.freeze(false);
    let again = bench.clone_of(server.uri()).start();
    again.wait_hydrated();
    again.stop();
    let mut expected = pattern(16 * MIB);
    expected[15 << 20..(15 << 20) + 65536].fill(b'w');
    assert_same(&bench.copy(), &expected);
}

#[test]
fn a_stop_does_not_wait_for_a_source_that_does_not_answer_at_the_start() {
    // It takes connections and says nothing.
    let bench = Bench::new();
    let path = bench.path("mute");
    let _mute = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let mut daemon = bench.clone_of(uri).spawn();
    std::thread::sleep(Duration::from_millis(500));
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(5));
    assert!(status.success(), "{log}");
    assert!(log.contains("nothing was changed"), "{log}");
    assert!(!bench.copy().exists());
}

#[test]
fn a_clone_that_was_stopped_before_it_ever_hydrated_starts_again() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    for _ in 0..3 {
        bench.clone_of(&source).args("--no-hydration").start().stop();
    }
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    daemon.stop();
}
