//! How the clones of one daemon share the bandwidth of hydration, and that none stands in the way of another.

use super::harness::*;
use hydrant::control::api::{HydrationState, Status};
use std::path::Path;
use std::time::{Duration, Instant};

/// The table of a clone NAME of `source`, to files of its own.
fn clone_table(name: &str, source: &str, more: &str) -> String {
    format!(
        "[[clone]]\nname = \"{name}\"\nsource = \"{source}\"\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n{more}\n"
    )
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that hydration has copied, of each clone.
fn copied(daemon: &Daemon, names: &[&str]) -> Vec<u64> {
    names.iter().map(|name| daemon.status_of(name).io.hydrated_bytes).collect()
}

/// Bytes copied from now on, until all together have copied so much.
fn copied_until(daemon: &Daemon, names: &[&str], all: u64) -> Vec<u64> {
    let before = copied(daemon, names);
    loop {
        let parts: Vec<u64> = copied(daemon, names).iter().zip(&before).map(|(now, before)| now - before).collect();
        if parts.iter().sum::<u64>() >= all {
            return parts;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The rate is low enough for any machine; what is compared are ratios, and an upper bound of the whole.
#[test]
fn clones_share_the_rate_of_the_daemon_by_weight() {
    const RATE: u64 = 16 * MIB;
    let bench = Bench::new();
    let source = bench.random("source", 96 * MIB);
    let names = ["light", "middle", "heavy"];
    let mut config = String::from("[daemon]\nshards = 2\nhydration_rate = \"16MiB\"\n");
    for (name, priority) in names.iter().zip([100, 200, 400]) {
        config += &clone_table(name, path(&source), &format!("priority = {priority}\nno_hydration = true"));
    }
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 3 clones of 3");
    let begun = Instant::now();
    for name in names {
        daemon.done(&["message", name, "enable_hydration"]);
    }
    copied_until(&daemon, &names, 8 * MIB);
    let parts = copied_until(&daemon, &names, 48 * MIB);
    let all: u64 = copied(&daemon, &names).iter().sum();
    let bound = RATE * (begun.elapsed().as_millis() as u64 + 200) / 1000 + 4 * MIB;
    assert!(all <= bound, "{all} bytes, but at most {bound}");
    for (part, weight) in parts.iter().zip([1, 2, 4]) {
        let fair = parts.iter().sum::<u64>() * weight / 7;
        assert!((fair * 3 / 4..=fair * 5 / 4).contains(part), "{parts:?}, by weights 1, 2, 4");
    }

    // At run time: another weight, a rate of its own.
    let heavy = daemon.status_of("heavy");
    assert_eq!((heavy.hydration.priority, heavy.hydration.rate), (400, None));
    assert_eq!(heavy.hydration.total_rate, Some(RATE));
    daemon.done(&["message", "middle", "priority", "900"]);
    daemon.done(&["message", "heavy", "hydration_rate", "1MiB"]);
    let parts = copied_until(&daemon, &names, 24 * MIB);
    assert!(parts[1] > 5 * parts[0] && parts[1] > 5 * parts[2], "{parts:?}, by weights 1, 9, 4, the last one bound");
    let text = daemon.done(&["status", "heavy"]);
    assert!(text.contains("at most 1.0 MiB/s, at most 16.0 MiB/s with all clones, priority 400"), "{text}");
    let refused = daemon.refused(&["message", "heavy", "hydration_rate", "1000"]);
    assert!(refused.contains("4KiB") && refused.contains("disable_hydration"), "{refused}");
    let refused = daemon.refused(&["message", "heavy", "priority", "0"]);
    assert!(refused.contains("1 to 1000"), "{refused}");
    daemon.done(&["message", "heavy", "hydration_rate", "0"]);
    assert_eq!(daemon.status_of("heavy").hydration.rate, None);
    daemon.stop();
}

/// Little memory, a source that hangs, clients that wait for it: the other clones neither wait nor stop.
#[test]
fn a_source_that_hangs_keeps_no_other_clone_from_hydrating_or_serving() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let hanging = Nbdkit::start(&bench, "pattern size=64M");
    let well = bench.random("well", 32 * MIB);
    let mut config = String::from("[daemon]\nshards = 2\nio_memory = \"4MiB\"\n");
    config += &clone_table("hangs", &hanging.uri(), "priority = 1000\nno_hydration = true");
    config += &clone_table("well", path(&well), "priority = 1\nno_hydration = true");
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_log("serving 2 clones of 2");
    hanging.freeze(true);
    daemon.done(&["message", "hangs", "enable_hydration"]);
    // Writes to parts of regions: each holds memory until its region is copied.
    let mut clients = Vec::new();
    for client in 0..4 {
        let uri = daemon.uri_of("hangs");
        clients.push(std::thread::spawn(move || {
            nbdsh(
                &uri,
                &format!(
                    "h = connect()\nfor i in range(60): h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'x' * 100)), ({client} * 60 + i) * 65536 + 7)\n\
                     while h.aio_in_flight() > 0: h.poll(1000)"
                ),
            );
        }));
    }
    let is_stuck = |status: &Status| status.hydrating_regions > 60;
    daemon.wait_status_of("hangs", "copies on their way", is_stuck);

    // The other one: writes that need its source, and all of its hydration.
    nbdsh(
        &daemon.uri_of("well"),
        "h = connect()\nfor i in range(0, 512, 4): h.pwrite(b'y' * 100, i * 65536 + 9)\nh.flush()\n\
         assert h.pread(3, 65536 * 8 + 8)[1:] == b'yy'",
    );
    daemon.done(&["message", "well", "enable_hydration"]);
    daemon.wait_status_of("well", "hydrated", Status::is_complete);
    let hangs = daemon.status_of("hangs");
    assert!(hangs.hydrated_regions == 0 && hangs.hydration.state != HydrationState::Complete, "{hangs:?}");

    hanging.freeze(false);
    clients.into_iter().for_each(|client| client.join().unwrap());
    daemon.wait_status_of("hangs", "hydrated", Status::is_complete);
    let mut expected = pattern(64 * MIB);
    for region in 0..240 {
        expected[region * 65536 + 7..][..100].fill(b'x');
    }
    daemon.stop();
    assert_same(&bench.path("hangs.img"), &expected);
}
