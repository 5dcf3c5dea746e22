//! What a running clone can be told, and what it says of itself.

use super::harness::*;
use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

/// A source that answers after 20 ms, so that hydration can be watched.
fn slow(bench: &Bench) -> Nbdkit {
    Nbdkit::start(bench, "--filter=delay pattern 16M rdelay=20ms")
}

fn printed(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.hydrant(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn without_hydration_nothing_is_copied_until_it_is_enabled() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    std::thread::sleep(Duration::from_millis(300));
    let status = daemon.status();
    assert_eq!((status.hydrated_regions, status.features.no_hydration), (0, true));
    assert!(printed(&daemon, &["status", "vm", "--dm"]).contains(" 0/256 0 1 no_hydration 4 "));
    daemon.message("enable_hydration");
    assert!(printed(&daemon, &["status", "vm", "--dm"]).contains(" 0 4 hydration_threshold "));
    daemon.wait_hydrated();
    // dm's counts the completion only.
    let status = daemon.status();
    assert_eq!((status.event_nr, status.events), (1, 3), "created, hydration started, hydration completed");
    daemon.stop();
    assert_same(&bench.copy(), &pattern(16 * MIB));
}

#[test]
fn disabled_hydration_finishes_what_is_in_flight_and_stops() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 2").start();
    daemon.wait_status("a start", |status| status.hydrated_regions > 4);
    daemon.message("disable_hydration");
    let stopped = daemon.wait_status("nothing in flight", |status| status.hydrating_regions == 0).hydrated_regions;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(daemon.status().hydrated_regions, stopped);
    assert!(stopped < 256);
    // The words are dm-clone's: in any case.
    daemon.message("ENABLE_hydration");
    daemon.message("hydration_threshold 4096");
    daemon.wait_hydrated();
    daemon.stop();
}

#[test]
fn threshold_and_batch_size_are_kept_and_shown() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 3 --hydration-batch-size 2").start();
    let status = daemon.status();
    assert_eq!((status.hydration.threshold, status.hydration.batch_size), (Some(3), Some(2)));
    assert!(printed(&daemon, &["status", "vm", "--dm"]).contains("4 hydration_threshold 3 hydration_batch_size 2 rw"));
    for _ in 0..20 {
        let in_flight = daemon.status().hydrating_regions;
        assert!(in_flight <= 3, "{in_flight} regions in flight, more than the threshold");
        std::thread::sleep(Duration::from_millis(5));
    }
    // 0 stops it, as in dm-clone.
    daemon.message("hydration_threshold 0");
    let stopped = daemon.wait_status("nothing in flight", |status| status.hydrating_regions == 0).hydrated_regions;
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(daemon.status().hydrated_regions, stopped);
    assert!(stopped < 256);
    daemon.message("hydration_batch_size 8");
    daemon.message("hydration_threshold 16");
    assert!(printed(&daemon, &["status", "--dm"]).contains("4 hydration_threshold 16 hydration_batch_size 8 rw"));
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &pattern(16 * MIB));
}

#[test]
fn bad_messages_are_refused_and_change_nothing() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration --hydration-threshold 5").start();
    for (words, part) in [
        ("bogus", "unknown message 'bogus'"),
        ("hydration_threshold", "needs a number"),
        ("hydration_threshold x", "'x' is not a number"),
        ("hydration_threshold 4294967296", "4294967296"),
        ("enable_hydration 1", "takes no value"),
    ] {
        let output = daemon.hydrant(&["message", "vm"]).args(words.split(' ')).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(part) && said.lines().count() == 1, "{words}: {said}");
    }
    let output = daemon.hydrant(&["message", "other", "enable_hydration"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let status = daemon.status();
    assert_eq!((status.hydration.threshold, status.hydration.enabled), (Some(5), false));
    daemon.stop();
}

#[test]
fn status_is_for_people_and_for_machines() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    daemon.wait_hydrated();
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(b'x' * 1000, 5); h.pread(100, 7); h.trim(65536, 0); h.flush()");
    let text = printed(&daemon, &["status"]);
    for word in ["vm: 4MiB, 64 regions", "complete, 100%", "1000 B", "released"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&printed(&daemon, &["status", "vm", "--json"])).unwrap();
    assert_eq!(json["hydrated_regions"], 64);
    assert_eq!(json["nr_regions"], 64);
    assert_eq!(json["size"], 4 * MIB);
    assert_eq!(json["metadata"]["mode"], "rw");
    assert_eq!(json["hydration"]["state"], "complete");
    assert_eq!(json["source"]["state"], "released");
    assert_eq!(json["shards"], 2);
    assert_eq!((json["io"]["writes"].as_u64(), json["io"]["write_bytes"].as_u64()), (Some(1), Some(1000)));
    assert_eq!((json["io"]["reads"].as_u64(), json["io"]["read_bytes"].as_u64()), (Some(1), Some(100)));
    assert_eq!((json["io"]["trims"].as_u64(), json["io"]["trim_bytes"].as_u64()), (Some(1), Some(65536)));
    let dm = printed(&daemon, &["status", "--dm", "--control", daemon.control.to_str().unwrap()]);
    assert!(dm.starts_with("0 8192 clone 8 ") && dm.contains(" 128 64/64 0 0 4 "), "{dm}");
    assert!(dm.trim_end().ends_with(" rw"), "{dm}");
    daemon.stop();
}

#[test]
fn watch_ends_when_the_clone_is_hydrated() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 8").start();
    let mut watch = daemon.hydrant(&["status", "vm", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    watch.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(watch.wait().unwrap().success());
    assert!(text.contains("100"), "{text}");
    assert!(daemon.status().is_complete());
    daemon.stop();
}

#[test]
fn watch_sees_the_end_of_a_clone_that_exits_when_hydrated() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let mut daemon = bench.clone_of(server.uri()).args("--hydration-threshold 8 --on-hydrated exit").start();
    let mut watch = daemon.hydrant(&["status", "vm", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    watch.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(watch.wait().unwrap().success(), "{text}");
    let (status, log) = daemon.end_within(Duration::from_secs(10));
    assert!(status.success(), "{log}");
}

#[test]
fn stop_drains_and_waits_for_the_end() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let command = bench.clone_of(server.uri()).args("--hydration-threshold 4");
    let mut daemon = command.start();
    let hydrated = daemon.wait_status("a start", |status| status.hydrated_regions > 10).hydrated_regions;
    printed(&daemon, &["stop", "vm"]);
    let (status, log) = daemon.end_within(Duration::from_secs(2));
    assert!(status.success(), "{log}");
    let again = command.clone().args("--no-hydration").start();
    assert!(again.status().hydrated_regions >= hydrated);
    again.stop();
}

#[test]
fn a_clone_may_exit_when_it_is_hydrated_and_the_last_client_is_gone() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    // A client that connects before the clone is hydrated and stays after it.
    let mut daemon = bench.clone_of(&source).args("--on-hydrated exit --no-hydration").start();
    let uri = daemon.uri();
    let client = std::thread::spawn(move || {
        nbdsh(&uri, "h = connect()\ntime.sleep(1.5)\nh.pwrite(b'late', 100); h.flush(); print('done')")
    });
    wait_for("a client", Duration::from_secs(10), || daemon.status().nbd.connections == 1);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert_eq!(client.join().unwrap().trim(), "done");
    let (status, log) = daemon.end_within(Duration::from_secs(10));
    assert!(status.success() && log.contains("the last client is gone"), "{log}");
    let mut expected = std::fs::read(&source).unwrap();
    expected[100..104].copy_from_slice(b"late");
    assert_same(&bench.copy(), &expected);
    // And one that is complete already, at once.
    let mut again = bench.clone_of(bench.path("gone")).args("--on-hydrated exit").spawn();
    let (status, log) = again.end_within(Duration::from_secs(10));
    assert!(status.success(), "{log}");
}

#[test]
fn a_complete_clone_says_so_by_one_event() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    let status = daemon.status();
    assert_eq!((status.event_nr, status.last_event.as_deref()), (1, Some("hydration completed")));
    daemon.stop();
    let again = bench.clone_of(&source).start();
    let status = again.status();
    assert_eq!(
        (status.event_nr, status.events, status.last_event.unwrap()),
        (0, 1, "created, 16 of 16 regions are hydrated".into())
    );
    again.stop();
}

#[test]
fn sockets_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    for path in [&daemon.socket, &daemon.control] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
    daemon.stop();
}
