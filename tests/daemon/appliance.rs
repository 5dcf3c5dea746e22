//! One daemon with many clones: `hydrant serve`, `create`, `remove`, `list`.

use super::harness::*;
use hydrant::control::api::CloneRunState;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The table of a clone NAME of `source`, to NAME.img with NAME.meta in the same directory as the file.
fn clone_table(name: &str, source: &Path, more: &str) -> String {
    format!(
        "[[clone]]\nname = \"{name}\"\nsource = \"{}\"\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n{more}\n",
        source.display()
    )
}

fn is_running(status: &hydrant::control::api::Status) -> bool {
    status.state == CloneRunState::Running
}

#[test]
fn several_clones_hydrate_side_by_side_and_go_on_after_a_restart() {
    need!("nbdsh");
    let bench = Bench::new();
    let names = ["a", "b", "c", "d"];
    let mut config = String::from("[daemon]\nshards = 2\n");
    for (index, name) in names.iter().enumerate() {
        let source = bench.path(&format!("{name}.source"));
        fs::write(&source, random_bytes(index as u64, (4 + index as u64) * MIB)).unwrap();
        config += &clone_table(name, &source, "no_hydration = true");
    }
    let daemon = Daemon::serve(&bench, &config);
    for name in names {
        daemon.wait_status_of(name, "running", is_running);
        nbdsh(&daemon.uri_of(name), &format!("h = connect(); h.pwrite(b'{name}' * 1000, 70000); h.flush()"));
    }
    daemon.kill9();
    let daemon = Daemon::serve(&bench, &config.replace("no_hydration = true", ""));
    for name in names {
        daemon.wait_status_of(name, "hydrated", |status| status.is_complete());
    }
    let log = daemon.stop();
    assert!(log.contains("serving 4 clones of 4"), "{log}");
    for name in names {
        let mut expected = fs::read(bench.path(&format!("{name}.source"))).unwrap();
        expected[70_000..71_000].fill(name.as_bytes()[0]);
        assert_same(&bench.path(&format!("{name}.img")), &expected);
    }
}

#[test]
fn clones_share_a_listener_by_export_name() {
    need!("nbdsh");
    let bench = Bench::new();
    let socket = bench.socket("nbd.sock");
    let mut config = String::new();
    for (name, byte, more) in [("one", 1, ""), ("two", 2, "export = \"zwei\"")] {
        let source = bench.filled(&format!("{name}.source"), MIB, byte);
        let nbd = format!("[clone.nbd]\naddress = \"unix:{}\"\n{more}", socket.display());
        config += &clone_table(name, &source, &nbd);
    }
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 2 clones of 2");
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", socket.display());
    for (export, byte) in [("one", 1), ("zwei", 2)] {
        nbdsh(&uri(export), &format!("h = connect(); assert h.pread(1000, 5) == bytes([{byte}]) * 1000"));
    }
    // With two of them the empty name means neither; a clone's name is not its export's.
    for unknown in ["", "two"] {
        nbdsh(&uri(unknown), "try:\n  connect()\n  assert False\nexcept nbd.Error as e: print(e)");
    }
    nbdsh(
        &uri("one"),
        "h = nbd.NBD(); h.set_opt_mode(True); h.connect_uri(os.environ['NBD_URI']); names = []\nh.opt_list(lambda n, d: names.append(n))\n\
         assert sorted(names) == ['one', 'zwei'], names",
    );
    daemon.done(&["remove", "one"]);
    assert!(socket.exists(), "the other one uses it");
    nbdsh(&uri(""), "h = connect(); assert h.pread(1, 0) == bytes([2])");
    daemon.done(&["remove", "two"]);
    assert!(!socket.exists(), "nobody uses it");
    daemon.stop();
}

#[test]
fn one_that_fails_does_not_keep_the_others_from_starting() {
    need!("nbdsh");
    let bench = Bench::new();
    let good = bench.random("good.source", MIB);
    // Nothing that passes by itself.
    let missing = bench.path("missing");
    fs::create_dir(&missing).unwrap();
    let config = clone_table("bad", &missing, "") + &clone_table("good", &good, "");
    let mut daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("good", "hydrated", |status| status.is_complete());
    let status = daemon.wait_status_of("bad", "failed", |status| status.state == CloneRunState::Failed);
    assert!(status.error.as_ref().unwrap().contains("missing"), "{status:?}");
    assert_eq!(status.retry_in_seconds, None);
    let text = status.last_event.unwrap();
    assert!(text.contains("nothing tries again by itself: when that is mended, `hydrant create FILE`"), "{text}");
    assert!(!bench.path("bad.img").exists() && !bench.path("bad.meta").exists());
    let list = daemon.done(&["list"]);
    assert!(list.lines().any(|line| line.starts_with("bad") && line.contains("failed")), "{list}");
    assert!(list.lines().any(|line| line.starts_with("good") && line.contains("complete")), "{list}");
    let text = daemon.done(&["status", "bad"]);
    assert!(text.starts_with("bad: failed: ") && text.contains("missing"), "{text}");
    let refused = daemon.refused(&["message", "bad", "enable_hydration"]);
    assert!(refused.contains("could not be started"), "{refused}");

    // The name is free for another try.
    fs::remove_dir(&missing).unwrap();
    bench.random("missing", MIB);
    fs::write(bench.path("bad.toml"), clone_table("bad", &missing, "")).unwrap();
    daemon.done(&["create", bench.path("bad.toml").to_str().unwrap()]);
    daemon.wait_status_of("bad", "hydrated", |status| status.is_complete());
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert!(status.success(), "{log}");
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
    let failed = |status: &hydrant::control::api::Status| status.state == CloneRunState::Failed;
    for name in ["vm", "late", "dir"] {
        let status = daemon.wait_status_of(name, "failed", failed);
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
    assert!(failed(&daemon.status_of("dir")));
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

#[test]
fn the_exit_status_says_that_a_clone_has_failed() {
    let bench = Bench::new();
    let good = bench.random("good.source", MIB);
    let missing = bench.path("missing");
    let config = clone_table("bad", &missing, "") + &clone_table("good", &good, "on_hydrated = \"exit\"");
    let mut daemon = Daemon::serve(&bench, &config);
    let (status, log) = daemon.end_within(Duration::from_secs(60));
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().last().unwrap();
    assert!(last.starts_with("hydrant: clone 'bad' could not be started: ") && last.contains("missing"), "{log}");
    assert_same_files(&good, &bench.path("good.img"));

    // When all fail there is nothing to stay for.
    let all = clone_table("x", &bench.path("no1"), "") + &clone_table("y", &bench.path("no2"), "");
    let mut daemon = Daemon::serve(&bench, &all);
    let (status, log) = daemon.end_within(Duration::from_secs(60));
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().last().unwrap();
    assert!(["'x'", "'y'", "no1"].iter().all(|word| last.contains(word)), "{log}");
}

#[test]
fn create_and_remove_at_run_time() {
    need!("nbdsh");
    let bench = Bench::new();
    let mut daemon = Daemon::serve(&bench, "[daemon]\nshards = 2\n");
    assert_eq!(daemon.done(&["list"]).lines().count(), 1, "a header only");
    let source = bench.random("source", 4 * MIB);
    let file = bench.path("vm.toml");
    let create = ["create", file.to_str().unwrap()];
    fs::write(&file, clone_table("vm", &source, "no_hydration = true")).unwrap();
    daemon.done(&create);
    let uri = daemon.uri_of("vm");
    nbdsh(&uri, "h = connect(); h.pwrite(b'kept', 100000)");
    assert!(daemon.refused(&create).contains("there is a clone 'vm' already"));

    // Another one with the same destination is refused, and leaves no trace.
    let other = clone_table("other", &source, "").replace("other.img", "vm.img");
    fs::write(&file, other).unwrap();
    let refused = daemon.refused(&create);
    assert!(refused.contains("vm.img") && refused.contains("in use"), "{refused}");
    assert!(!bench.path("other.meta").exists());
    assert_eq!(daemon.done(&["list"]).lines().count(), 2);

    daemon.done(&["remove", "vm"]);
    assert_eq!(daemon.done(&["list"]).lines().count(), 1);
    let refused = daemon.refused(&["status", "vm"]);
    assert!(refused.contains("no clone 'vm'") && refused.contains("no clones"), "{refused}");
    assert!(daemon.refused(&["remove", "vm"]).contains("no clone 'vm'"));
    nbdsh(&uri, "try:\n  connect()\n  assert False\nexcept nbd.Error: pass");

    // Its devices are free at once, and it goes on where it was; many times.
    fs::write(&file, clone_table("vm", &source, "no_hydration = true")).unwrap();
    for _ in 0..20 {
        daemon.done(&create);
        assert_eq!(daemon.status_of("vm").hydrated_regions, 1);
        daemon.done(&["remove", "vm"]);
    }
    fs::write(&file, clone_table("vm", &source, "on_hydrated = \"remove\"")).unwrap();
    daemon.done(&create);
    let start = Instant::now();
    while daemon.done(&["list"]).lines().count() > 1 {
        assert!(start.elapsed() < Duration::from_secs(30), "it is not removed: {}", daemon.log());
    }
    let mut expected = fs::read(&source).unwrap();
    expected[100_000..100_004].copy_from_slice(b"kept");
    assert_same(&bench.path("vm.img"), &expected);
    daemon.done(&["stop"]);
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert!(status.success(), "{log}");
}

#[test]
fn remove_spares_clients_unless_forced() {
    need!("nbdsh");
    let bench = Bench::new();
    let mut config = String::new();
    for name in ["used", "other"] {
        config += &clone_table(name, &bench.random(&format!("{name}.source"), 4 * MIB), "no_hydration = true");
    }
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 2 clones of 2");
    let clients: Vec<_> = ["used", "other"]
        .map(|name| {
            let uri = daemon.uri_of(name);
            // Writes until it is told to end, or thrown out; says how many writes were acknowledged.
            let code = "h = connect(); n = 0\ntry:\n  while n < 100000 and not os.path.exists(sys.argv[-1]):\n    \
                        h.pwrite(n.to_bytes(8, 'little'), (n % 500) * 8192); n += 1\nexcept nbd.Error: pass\nprint(n)";
            let code = code.replace("sys.argv[-1]", &format!("'{}'", bench.path("end").display()));
            std::thread::spawn(move || nbdsh(&uri, &code))
        })
        .into_iter()
        .collect();
    for name in ["used", "other"] {
        daemon.wait_status_of(name, "written", |status| status.io.writes > 20);
    }
    let refused = daemon.refused(&["remove", "used"]);
    assert!(refused.contains("in use") && refused.contains("--force"), "{refused}");
    let before = daemon.status_of("used").io.writes;
    daemon.wait_status_of("used", "writes go on", |status| status.io.writes > before);
    // Refused, it is still there for others.
    nbdsh(&daemon.uri_of("used"), "h = connect(); h.pread(1, 0)");

    daemon.done(&["remove", "--force", "used"]);
    let before = daemon.status_of("other").io.writes;
    daemon.wait_status_of("other", "writes go on", |status| status.io.writes > before);
    fs::write(bench.path("end"), "").unwrap();
    let written: Vec<u64> = clients.into_iter().map(|client| client.join().unwrap().trim().parse().unwrap()).collect();
    assert!(written.iter().all(|n| *n > 20), "{written:?}");
    daemon.stop();
    // What was acknowledged to the one that was thrown out is there.
    let image = fs::read(bench.path("used.img")).unwrap();
    for n in written[0].saturating_sub(500)..written[0] {
        let at = (n % 500) as usize * 8192;
        let found = u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
        assert!(found == n || found == n + 500, "write {n}: {found}");
    }
}

#[test]
fn a_clone_command_keeps_to_its_one_clone() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    let refused = daemon.refused(&["remove", "vm"]);
    assert!(refused.contains("hydrant stop vm"), "{refused}");
    fs::write(bench.path("x.toml"), clone_table("x", &source, "")).unwrap();
    let refused = daemon.refused(&[
        "create",
        bench.path("x.toml").to_str().unwrap(),
        "--control",
        daemon.control.to_str().unwrap(),
    ]);
    assert!(refused.contains("hydrant serve"), "{refused}");
    daemon.stop();
}

#[test]
fn stop_by_name_spares_the_others() {
    let bench = Bench::new();
    let mut config = String::new();
    for name in ["a", "b"] {
        config += &clone_table(name, &bench.random(&format!("{name}.source"), MIB), "");
    }
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 2 clones of 2");
    let refused = daemon.refused(&["stop", "a"]);
    assert!(refused.contains("hydrant remove a"), "{refused}");
    assert!(is_running(&daemon.status_of("b")));
    daemon.stop();
}

#[test]
fn a_stop_while_clones_start_gives_up() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 16M");
    server.freeze(true);
    let slow = format!(
        "[[clone]]\nname = \"slow\"\nsource = \"{}\"\ndestination = \"s.img\"\nmetadata = \"s.meta\"\n",
        server.uri()
    );
    let quick = clone_table("quick", &bench.random("quick.source", MIB), "");
    let mut daemon = Daemon::serve(&bench, &(slow + &quick));
    daemon.wait_status_of("quick", "hydrated", |status| status.is_complete());
    assert_eq!(daemon.status_of("slow").state, CloneRunState::Starting);
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert!(status.success() && log.contains("'slow': stopped before it was started"), "{log}");
    assert!(!bench.path("s.img").exists() && !bench.path("s.meta").exists());
}

#[test]
fn clones_that_come_and_go_leave_the_others_alone() {
    need!("fio");
    let bench = Bench::new();
    let base = bench.random("base.source", 32 * MIB);
    let guest = bench.random("guest.source", 2 * MIB);
    let daemon = Daemon::serve(&bench, &("[daemon]\nshards = 2\n".to_owned() + &clone_table("base", &base, "")));
    daemon.wait_status_of("base", "running", is_running);
    let uri = daemon.uri_of("base");
    let load = std::thread::spawn(move || {
        run(
            "fio",
            &[
                "--name=base",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                "--rw=randwrite",
                "--bs=4k-64k",
                "--size=32m",
                "--io_size=96m",
                "--iodepth=8",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=32",
            ],
        )
    });
    // Under other names and the same again, with clients of their own or without, hydrated or not when they go.
    for round in 0..12 {
        let name = ["guest", "visitor", "lodger"][round % 3];
        for suffix in ["img", "meta"] {
            let _ = fs::remove_file(bench.path(&format!("{name}.{suffix}")));
        }
        fs::write(bench.path("guest.toml"), clone_table(name, &guest, "")).unwrap();
        daemon.done(&["create", bench.path("guest.toml").to_str().unwrap()]);
        if round % 2 == 0 {
            daemon.wait_status_of(name, "hydrated", |status| status.is_complete());
        }
        daemon.done(&["remove", "--force", name]);
        if round % 2 == 0 {
            assert_same_files(&guest, &bench.path(&format!("{name}.img")));
        }
    }
    load.join().unwrap();
    assert_eq!(daemon.status_of("base").io.errors, 0);
    daemon.wait_status_of("base", "hydrated", |status| status.is_complete());
    daemon.stop();
}

#[test]
fn a_start_that_takes_long_can_be_given_up() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 16M");
    server.freeze(true);
    let slow = |name: &str| {
        format!(
            "[[clone]]\nname = \"{name}\"\nsource = \"{}\"\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n",
            server.uri()
        )
    };
    let daemon = Daemon::serve(&bench, &slow("slow"));
    assert_eq!(daemon.status_of("slow").state, CloneRunState::Starting);
    let refused = daemon.refused(&["status", "slow", "--dm"]);
    assert!(refused.contains("is starting"), "{refused}");
    daemon.done(&["remove", "slow"]);
    assert_eq!(daemon.done(&["list"]).lines().count(), 1);
    // The name is free, and who created it is told.
    fs::write(bench.path("slow.toml"), slow("slow")).unwrap();
    let mut create = daemon.hydrant(&["create", bench.path("slow.toml").to_str().unwrap()]);
    let create = create.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while daemon.done(&["list"]).lines().count() == 1 {
        assert!(start.elapsed() < Duration::from_secs(20), "it never starts");
    }
    daemon.done(&["remove", "slow"]);
    let output = create.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("given up"), "{said}");
    assert!(!bench.path("slow.img").exists() && !bench.path("slow.meta").exists());
    server.freeze(false);
    daemon.done(&["create", bench.path("slow.toml").to_str().unwrap()]);
    daemon.stop();
}

#[test]
fn a_suspended_clone_keeps_its_daemon() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let mut daemon = Daemon::serve(&bench, &clone_table("a", &source, "on_hydrated = \"exit\"\nno_hydration = true"));
    daemon.wait_status_of("a", "running", is_running);
    // Complete, and suspended before anybody looks.
    nbdsh(&daemon.uri_of("a"), "h = connect(); h.zero(1 << 20, 0)");
    daemon.done(&["suspend", "a"]);
    daemon.wait_status_of("a", "complete", |status| status.is_complete());
    // Longer than the daemon waits for those who watch.
    std::thread::sleep(Duration::from_secs(3));
    daemon.done(&["resume", "a"]);
    let (status, log) = daemon.end_within(Duration::from_secs(20));
    assert!(status.success(), "{log}");
}
