//! Clones that could not be started are tried again, where that may help and can do no harm.

use super::appliance::clone_table;
use super::harness::*;
use hydrant::control::api::{CloneRunState, Status};
use std::fs::{self, File};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::time::Duration;

fn is_failed(status: &Status) -> bool {
    status.state == CloneRunState::Failed
}

/// A daemon that begins at boot, before the servers of its sources do.
#[test]
fn a_source_that_is_away_at_the_start_is_waited_for() {
    need!("nbdkit");
    let bench = Bench::new();
    let mut server = Nbdkit::start(&bench, "pattern 1M");
    server.kill();
    let late = bench.path("late.source");
    let nbd = |name: &str| clone_table(name, Path::new(&server.uri()), "");
    let config = nbd("vm") + &clone_table("late", &late, "") + &clone_table("dir", bench.path("").as_path(), "");
    let mut daemon = Daemon::serve(&bench, &config);
    for name in ["vm", "late", "dir"] {
        let status = daemon.wait_status_of(name, "failed", is_failed);
        assert_eq!(status.retry_in_seconds.is_some(), name != "dir", "{status:?}");
        assert!(!bench.path(&format!("{name}.img")).exists());
    }
    daemon.wait_log("; it is tried again");
    daemon.wait_log("serving 0 clones of 3");
    // Tried twice more at least, and told once.
    std::thread::sleep(Duration::from_secs(4));
    let status = daemon.status_of("vm");
    assert_eq!((status.state, status.events), (CloneRunState::Failed, 1), "{status:?}");
    assert!(
        status.last_event.as_ref().unwrap().contains("it is tried again, with pauses of up to a minute"),
        "{status:?}"
    );
    let text = daemon.done(&["status", "vm"]);
    assert!(text.contains("\n  next try     in ") && text.contains(" s\n"), "{text}");
    assert!(daemon.refused(&["wait", "vm"]).contains("could not be started"));
    assert_eq!(daemon.done(&["events", "vm"]).lines().count(), 1, "{}", daemon.done(&["events", "vm"]));

    server.again("pattern 1M");
    fs::write(&late, random_bytes(1, MIB)).unwrap();
    for name in ["vm", "late"] {
        let status = daemon.wait_status_of(name, "hydrated", |status| status.is_complete());
        assert_eq!((status.error, status.retry_in_seconds), (None, None));
    }
    assert_same_files(&late, &bench.path("late.img"));
    assert!(is_failed(&daemon.status_of("dir")));
    daemon.done(&["remove", "vm"]);
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "'dir' has failed: {log}");
    assert_eq!(log.matches("clone 'vm' can't be started").count(), 1, "{log}");
    assert!(!log.contains("still can't be started"), "{log}");
}

/// The only clone: the daemon stays for a server that may come, and ends, when it is told to, with why it does not run.
#[test]
fn the_only_clone_waits_for_its_server_too() {
    need!("nbdkit");
    let bench = Bench::new();
    let mut server = Nbdkit::start(&bench, "pattern 1M");
    server.kill();
    let table = clone_table("vm", Path::new(&server.uri()), "");
    let mut daemon = Daemon::serve(&bench, &table);
    daemon.wait_log("clone 'vm' can't be started: source nbd");
    daemon.done(&["remove", "vm"]);
    let file = bench.path("vm.toml");
    fs::write(&file, &table).unwrap();
    let create = ["create", file.to_str().unwrap()];
    // Who asks for it is told, and asks again.
    let refused = daemon.refused(&create);
    assert!(refused.contains("source nbd"), "{refused}");
    assert_eq!(daemon.done(&["list"]).lines().count(), 1);
    server.again("pattern 1M");
    daemon.done(&create);
    daemon.wait_status_of("vm", "hydrated", |status| status.is_complete());
    daemon.done(&["stop"]);
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert!(status.success(), "{log}");

    fs::remove_file(bench.path("vm.img")).unwrap();
    fs::remove_file(bench.path("vm.meta")).unwrap();
    server.kill();
    let mut daemon = Daemon::serve(&bench, &table);
    daemon.wait_log("clone 'vm' can't be started: source nbd");
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
}

/// A server that takes connections and says nothing.
struct Silent {
    _listener: UnixListener,
    uri: String,
}

impl Silent {
    fn new(bench: &Bench) -> Self {
        let path = bench.socket("silent");
        let uri = format!("nbd+unix:///?socket={}", path.display());
        Self { _listener: UnixListener::bind(path).unwrap(), uri }
    }
}

/// `force` was said of what was there then. A device that somebody uses meanwhile is not taken when they are done.
#[test]
fn what_was_in_use_is_not_overwritten_by_a_later_try() {
    let bench = Bench::new();
    let good = bench.random("good.source", MIB);
    let source = bench.random("b.source", MIB);
    let destination = bench.path("b.img");
    let used = File::create(&destination).unwrap();
    used.set_len(MIB).unwrap();
    used.lock().unwrap();
    let config = clone_table("good", &good, "") + &clone_table("b", &source, "force = true");
    let mut daemon = Daemon::serve(&bench, &config);
    let status = daemon.wait_status_of("b", "failed", is_failed);
    assert!(status.error.unwrap().contains("in use"));
    assert!(status.last_event.unwrap().contains("it is tried again, without force"));
    let theirs = random_bytes(77, MIB);
    fs::write(&destination, &theirs).unwrap();
    drop(used);
    let status = daemon.wait_status_of("b", "refused", |status| is_failed(status) && status.retry_in_seconds.is_none());
    assert!(status.error.unwrap().contains("holds data"));
    assert_same(&destination, &theirs);
    assert!(!bench.path("b.meta").exists());
    // Who asks for it gets it.
    fs::write(bench.path("b.toml"), clone_table("b", &source, "force = true")).unwrap();
    daemon.done(&["create", bench.path("b.toml").to_str().unwrap()]);
    daemon.wait_status_of("b", "hydrated", |status| status.is_complete());
    assert_same_files(&source, &destination);
    daemon.signal("TERM");
    assert!(daemon.end_within(Duration::from_secs(20)).0.success());
}

/// Servers that say nothing hold up nobody else, and a user goes before a try that nobody asked for.
#[test]
fn silent_servers_hold_up_nobody() {
    let bench = Bench::new();
    let silent = Silent::new(&bench);
    let mut config = String::new();
    for nr in 0..40 {
        config += &clone_table(&format!("silent{nr}"), Path::new(&silent.uri), "");
    }
    let late = bench.path("late.source");
    config += &clone_table("late", &late, "");
    let mut daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("late", "failed", is_failed);
    for nr in 0..40 {
        daemon.wait_status_of(&format!("silent{nr}"), "failed", is_failed);
    }
    // All of them are being tried: 10 s each.
    let is_tried = |status: &Status| is_failed(status) && status.retry_in_seconds == Some(0);
    daemon.wait_status_of("silent7", "tried", is_tried);
    assert!(daemon.done(&["status", "silent7"]).contains("\n  next try     now\n"));
    fs::write(&late, random_bytes(1, MIB)).unwrap();
    daemon.wait_status_of("late", "hydrated", |status| status.is_complete());
    let now = daemon.done(&["list"]);
    assert!(now.lines().filter(|line| line.starts_with("silent") && line.contains("failed")).count() == 40, "{now}");

    // One that was mended by the user: at whatever moment.
    daemon.wait_status_of("silent3", "tried", is_tried);
    fs::write(bench.path("mended.toml"), clone_table("silent3", &late, "")).unwrap();
    daemon.done(&["create", bench.path("mended.toml").to_str().unwrap()]);
    daemon.wait_status_of("silent3", "hydrated", |status| status.is_complete());
    // One that fails again stays listed, and is tried again.
    daemon.wait_status_of("silent4", "tried", is_tried);
    fs::write(bench.path("worse.toml"), clone_table("silent4", &bench.path("nowhere"), "")).unwrap();
    assert!(daemon.refused(&["create", bench.path("worse.toml").to_str().unwrap()]).contains("nowhere"));
    let status = daemon.status_of("silent4");
    assert!(is_failed(&status) && status.error.unwrap().contains("nowhere"));
    daemon.wait_status_of("silent5", "tried", is_tried);
    daemon.done(&["remove", "silent5"]);
    assert!(!daemon.done(&["list"]).contains("silent5 "));
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{log}");
}

/// A daemon that is to end when all is done does not end before those that wait have had their turn.
#[test]
fn one_that_waits_keeps_the_daemon() {
    need!("nbdkit");
    let bench = Bench::new();
    let good = bench.random("good.source", MIB);
    let mut server = Nbdkit::start(&bench, "pattern 1M");
    server.kill();
    let exit = "on_hydrated = \"exit\"";
    let config = clone_table("a", &good, exit) + &clone_table("w", Path::new(&server.uri()), exit);
    let mut daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("a", "hydrated", |status| status.is_complete());
    std::thread::sleep(Duration::from_secs(4));
    assert!(is_failed(&daemon.status_of("w")));
    server.again("pattern 1M");
    let (status, log) = daemon.end_within(Duration::from_secs(120));
    assert!(status.success(), "{log}");
    assert!(log.contains("clone 'a', 'w': hydrated, and the last client is gone: ending"), "{log}");
    assert_eq!(fs::metadata(bench.path("w.img")).unwrap().len(), MIB);
}

/// A source file that comes late, of the only clone; systemd is told what is served then.
#[test]
fn the_manager_is_told_of_a_clone_that_starts_late() {
    let bench = Bench::new();
    let path = bench.socket("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let receive = || {
        let mut buffer = [0; 4096];
        let len = socket.recv(&mut buffer).expect("it is told");
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    let late = bench.path("late.source");
    fs::write(bench.path("late.toml"), clone_table("late", &late, "")).unwrap();
    let notify = path.display().to_string();
    let daemon = Daemon::spawn_serve_with(&bench, &[&bench.path("late.toml")], &[], &[("NOTIFY_SOCKET", &notify)]);
    assert_eq!(receive(), "READY=1\nSTATUS=serving 0 clones of 1\n");
    fs::write(&late, random_bytes(1, MIB)).unwrap();
    assert_eq!(receive(), "STATUS=serving 1 clones of 1\n");
    drop(daemon);
}

/// A server that takes fewer connections than there are shards, whatever it says: they share one.
#[test]
fn a_server_with_one_connection_serves_all_shards() {
    need!("nbdkit");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let server = Nbdkit::start(&bench, &format!("--filter=limit file {} limit=1", source.display()));
    let daemon = bench.clone_of(server.uri()).args("--shards 2").start();
    daemon.wait_status("hydrated", |status| status.is_complete());
    daemon.wait_log("reads through another shard's connection");
    daemon.stop();
    assert_same_files(&source, &bench.copy());
}
