//! Suspending the real daemon's clones: clients see a pause and nothing else.

use super::harness::*;
use std::fs;
use std::time::{Duration, Instant};

/// Content and time of the last change of both devices.
fn devices(bench: &Bench) -> Vec<(std::path::PathBuf, (u64, i64, i64, u32))> {
    let both = [bench.copy(), bench.meta()];
    checksums(bench.dir()).into_iter().filter(|(path, _)| both.contains(path)).collect()
}

#[test]
fn writes_under_load_pause_and_go_on() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=5ms", source.display()));
    let daemon = bench.clone_of(server.uri()).args("--shards 2 --hydration-threshold 4").start();
    let uri = daemon.uri();
    // Every write that was acknowledged is told, with the time that it took.
    let writer = std::thread::spawn(move || {
        let script = r#"
h = connect()
for i in range(2000):
    began = time.time()
    h.pwrite(i.to_bytes(4096, "little"), 4096 * i)
    print(f"{time.time() - began:.3f}", flush=True)
    time.sleep(0.001)
"#;
        nbdsh(&uri, script)
    });
    daemon.wait_status("writes", |status| status.io.writes > 100);
    let mut written = Vec::new();
    for _ in 0..3 {
        daemon.done(&["suspend", "vm"]);
        let status = daemon.status();
        assert!(status.suspended && status.hydrating_regions == 0, "{status:#?}");
        let before = devices(&bench);
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(devices(&bench), before, "nothing reaches the devices");
        let now = daemon.status();
        assert_eq!((now.io.writes, now.hydrated_regions), (status.io.writes, status.hydrated_regions));
        assert!(daemon.done(&["status", "vm"]).contains("suspended"), "{}", daemon.log());
        written.push(now.io.writes);
        daemon.done(&["suspend", "vm"]);
        daemon.done(&["resume", "vm"]);
        daemon.done(&["resume", "vm"]);
        daemon.wait_status("it goes on", |status| status.io.writes > now.io.writes && !status.suspended);
    }
    let times = writer.join().unwrap();
    assert_eq!(times.lines().count(), 2000, "none failed");
    let waited = times.lines().filter(|time| time.parse::<f64>().unwrap() > 1.0).count();
    assert!((1..=3).contains(&waited), "{waited} writes waited at the gate, {written:?}");
    let events = daemon.done(&["events", "vm"]);
    assert_eq!((events.matches("vm suspended").count(), events.matches("vm resumed").count()), (3, 3), "{events}");
    daemon.wait_hydrated();
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    for i in 0..2000u32 {
        expected[i as usize * 4096..][..4096].fill(0);
        expected[i as usize * 4096..][..4].copy_from_slice(&i.to_le_bytes());
    }
    assert_same(&bench.copy(), &expected);
}

/// No client flushes: suspending does.
#[test]
fn what_was_written_before_survives_kill_9() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect()\nfor i in range(16): h.pwrite(bytes([i + 1]) * 65536, 65536 * 3 * i)");
    daemon.done(&["suspend", "vm"]);
    daemon.kill9();
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    assert_eq!(daemon.status().hydrated_regions, 16);
    assert!(!daemon.status().suspended);
    nbdsh(
        &daemon.uri(),
        "h = connect()\nfor i in range(16): assert h.pread(65536, 65536 * 3 * i) == bytes([i + 1]) * 65536",
    );
    daemon.stop();
}

#[test]
fn a_suspend_that_waits_for_its_source_gives_up_in_time() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 16M");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    nbdsh(&daemon.uri(), "connect().pwrite(b'x' * 65536, 0)");
    server.freeze(true);
    let uri = daemon.uri();
    let reader = std::thread::spawn(move || nbdsh(&uri, "assert len(connect().pread(512, 8 << 20)) == 512"));
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    let said = daemon.refused(&["suspend", "vm", "--timeout", "2"]);
    assert!(said.contains("goes on") && said.contains("within 2 seconds"), "{said}");
    assert!((2.0..10.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    assert!(!daemon.status().suspended);
    // Others were held meanwhile and go on.
    nbdsh(&daemon.uri(), "assert connect().pread(65536, 0) == b'x' * 65536");
    server.freeze(false);
    reader.join().unwrap();
    daemon.done(&["suspend", "vm"]);
    daemon.done(&["resume", "vm"]);
    daemon.stop();
}

/// Who asked is gone; what the suspend waits for never comes.
#[test]
fn resume_gives_up_a_suspend_that_waits_and_nothing_queues_behind_it() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 16M");
    let daemon = bench.clone_of(server.uri()).args("--hydration-rate 4MiB").start();
    nbdsh(&daemon.uri(), "connect().pwrite(b'x' * 65536, 0)");
    server.freeze(true);
    daemon.wait_status("a copy that waits", |status| status.hydrating_regions > 0);
    std::thread::sleep(Duration::from_millis(300));
    let mut gone = daemon.hydrant(&["suspend", "vm", "--timeout", "3600"]).spawn().unwrap();
    daemon.wait_status("suspending", |status| status.suspending);
    gone.kill().unwrap();
    gone.wait().unwrap();
    // The devices are not to be copied yet.
    let status = daemon.status();
    assert!(status.suspending && !status.suspended, "{status:#?}");
    let text = daemon.done(&["status", "vm"]);
    assert!(text.contains("suspending   waits") && !text.contains("committed"), "{text}");
    let uri = daemon.uri();
    let held = std::thread::spawn(move || nbdsh(&uri, "assert connect().pread(65536, 0) == b'x' * 65536"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!held.is_finished());
    let began = Instant::now();
    for refused in [&["suspend", "vm"][..], &["resize", "vm"], &["resize", "vm", "--size", "20MiB", "--zeros"]] {
        let said = daemon.refused(refused);
        assert!(said.contains("clone 'vm' is being suspended") && said.contains("resume"), "{said}");
    }
    daemon.done(&["resume", "vm"]);
    held.join().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let status = daemon.status();
    assert!(!status.suspending && !status.suspended && status.size == 16 << 20, "{status:#?}");
    daemon.wait_log("clone 'vm' goes on, it was not suspended: given up: it was resumed meanwhile");
    assert!(!daemon.done(&["events", "vm"]).contains("suspended"));
    server.freeze(false);
    daemon.done(&["suspend", "vm"]);
    assert!(daemon.status().suspended && !daemon.status().suspending);
    daemon.done(&["resume", "vm"]);
    daemon.wait_hydrated();
    daemon.stop();
}

/// A flush is a request like others; a growth needs no resume, and leaves the clone suspended.
#[test]
fn a_suspended_clone_holds_flushes_and_can_grow() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), "connect().pwrite(b'x' * 65536, 0)");
    daemon.done(&["suspend", "vm"]);
    let uri = daemon.uri();
    let flush = std::thread::spawn(move || nbdsh(&uri, "h = connect(); h.flush(); print('flushed')"));
    daemon.wait_status("a client", |status| status.nbd.connections == 1);
    std::thread::sleep(Duration::from_millis(500));
    let before = daemon.status();
    assert!(!flush.is_finished());
    daemon.done(&["resize", "vm", "--size", "6MiB"]);
    let grown = daemon.status();
    assert!(grown.suspended && !grown.resizing && grown.size == 6 * MIB, "{grown:#?}");
    assert_eq!((grown.io.flushes, grown.io.commits), (before.io.flushes, before.io.commits));
    assert!(!flush.is_finished());
    daemon.done(&["resume", "vm"]);
    assert_eq!(flush.join().unwrap(), "flushed\n");
    let script = "h = connect(); assert h.get_size() == 6 << 20; assert h.pread(1 << 20, 5 << 20) == bytes(1 << 20)";
    nbdsh(&daemon.uri(), script);
    daemon.stop();
}

#[test]
fn the_end_of_a_suspended_clone_fails_what_is_held() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).start();
    daemon.done(&["suspend", "vm"]);
    let uri = daemon.uri();
    let client = std::thread::spawn(move || {
        nbdsh(&uri, "h = connect(); fails(errno.ESHUTDOWN, lambda: h.pwrite(b'y' * 512, 0))");
    });
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    daemon.stop();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    client.join().unwrap();
}

/// One of many: the others go on, and it can be taken out.
#[test]
fn a_suspended_clone_disturbs_no_other_and_can_be_removed() {
    need!("nbdsh");
    let bench = Bench::new();
    let mut config = String::from("[daemon]\nshards = 2\n");
    for name in ["a", "b"] {
        let source = bench.random(&format!("{name}.source"), 4 * MIB);
        config += &format!(
            "[[clone]]\nname = \"{name}\"\nsource = {source:?}\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n"
        );
    }
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 2 clones of 2");
    daemon.done(&["suspend", "a"]);
    let uri = daemon.uri_of("a");
    let held = std::thread::spawn(move || {
        nbdsh(&uri, "h = connect(); fails(errno.ESHUTDOWN, lambda: h.pread(512, 0))");
    });
    nbdsh(&daemon.uri_of("b"), "h = connect(); h.pwrite(b'b' * 4096, 0); h.flush()");
    daemon.wait_status_of("b", "hydrated", |status| status.is_complete());
    daemon.wait_status_of("a", "a client", |status| status.nbd.connections == 1);
    std::thread::sleep(Duration::from_millis(300));
    assert!(daemon.status_of("a").suspended && !daemon.status_of("b").suspended);
    assert!(daemon.refused(&["suspend", "c"]).contains("no clone 'c'"));
    assert!(daemon.refused(&["remove", "a"]).contains("in use"));
    assert!(daemon.status_of("a").suspended, "a refused removal changes nothing");
    let began = Instant::now();
    daemon.done(&["remove", "a", "--force"]);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    held.join().unwrap();
    nbdsh(&daemon.uri_of("b"), "assert connect().pread(4096, 0) == b'b' * 4096");
    daemon.stop();
}
