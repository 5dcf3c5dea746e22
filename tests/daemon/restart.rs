//! A clone that was stopped or killed goes on where it stopped.

use super::harness::*;
use super::load::{ZONE, kept, mixed_source, use_it};
use std::fs;
use std::os::unix::fs::FileExt;

/// Goes through several lives with another number of shards each, used in all of them, and ends as it should.
fn lives(end: fn(Daemon)) {
    let bench = Bench::new();
    let source = mixed_source(&bench, 2 * ZONE + 5 * MIB + 4097);
    let expected = kept(&bench, &source);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=5ms", source.display()));
    let command = bench.clone_of(server.uri()).args("--region-size 4KiB --hydration-threshold 8");
    let mut hydrated = 0;
    for shards in [2, 3, 1, 5] {
        let daemon = command.clone().args(&format!("--shards {shards}")).start();
        let status = daemon.status();
        assert!(status.hydrated_regions >= hydrated, "{} after {hydrated}", status.hydrated_regions);
        // Each client reads all that it knows, then ends with a flush.
        use_it(&bench, &daemon.uri(), &expected, 2, 20);
        nbdsh(&daemon.uri(), "connect().flush()");
        hydrated = daemon.status().hydrated_regions.min(hydrated);
        end(daemon);
    }
    let daemon = bench.clone_of(server.uri()).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same_files(&bench.copy(), &expected);
}

#[test]
fn stopped_in_the_middle_it_goes_on_with_other_shards() {
    need!("nbdkit", "nbdsh");
    lives(|daemon| _ = daemon.stop());
}

#[test]
fn killed_in_the_middle_it_has_what_was_flushed() {
    need!("nbdkit", "nbdsh");
    lives(|daemon| _ = daemon.kill9());
}

/// No flush here: what survives may be old or new, block by block, but nothing else, and never a mixture of sources.
#[test]
fn killed_under_load_every_block_is_old_or_new() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 16 * MIB);
    let content = fs::read(&source).unwrap();
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=5ms", source.display()));
    for round in 0..3 {
        let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 8").start();
        let uri = daemon.uri();
        let writer = std::thread::spawn(move || {
            nbdsh(
                &uri,
                "h = connect()\ntry:\n  while True:\n    h.pwrite(b'\\xee' * 4096, 4096 * random.randrange(4096))\nexcept nbd.Error: pass",
            )
        });
        daemon.wait_status("writes", |status| status.io.writes > 100);
        std::thread::sleep(std::time::Duration::from_millis(150 * round));
        daemon.kill9();
        writer.join().unwrap();
    }
    let daemon = bench.clone_of(server.uri()).start();
    daemon.wait_hydrated();
    daemon.stop();
    let copy = read_first(&bench.copy(), 16 * MIB);
    for (index, block) in copy.chunks(4096).enumerate() {
        let old = block == &content[index * 4096..][..4096];
        assert!(old || block.iter().all(|byte| *byte == 0xee), "block {index} is neither old nor new");
    }
}

#[test]
fn what_one_connection_wrote_another_one_flushes() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = mixed_source(&bench, 3 * ZONE);
    let expected = kept(&bench, &source);
    let command = bench.clone_of(&source).args("--no-hydration --shards 3 --region-size 4KiB");
    let daemon = command.start();
    // The writes of many connections to the zones of all shards and across them, the flush on one of them; and FUA of
    // one write alone.
    let zone = ZONE as usize;
    let places: Vec<usize> =
        vec![5, zone - 100_000, zone + 1_000_001, 2 * zone - 1, 3 * zone - 300_000, 2 * zone + 700_000];
    nbdsh(
        &daemon.uri(),
        &format!(
            r#"
places = {places:?}
hs = [connect() for _ in range(7)]
assert all(h.can_multi_conn() for h in hs)
for i, at in enumerate(places):
    hs[i].pwrite(bytes([i + 1]) * 300_000, at)
hs[6].flush()
hs[5].pwrite(b"fua" * 10, 2 * {zone} - 15, flags=nbd.CMD_FLAG_FUA)
hs[4].pwrite(b"fua" * 10, 50_000_001, flags=nbd.CMD_FLAG_FUA)
os._exit(0)
"#
        ),
    );
    daemon.kill9();
    let file = fs::OpenOptions::new().write(true).open(&expected).unwrap();
    for (i, at) in places.iter().enumerate() {
        file.write_all_at(&vec![i as u8 + 1; 300_000], *at as u64).unwrap();
    }
    file.write_all_at(&b"fua".repeat(10), 2 * ZONE - 15).unwrap();
    file.write_all_at(&b"fua".repeat(10), 50_000_001).unwrap();
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same_files(&bench.copy(), &expected);
}

#[test]
fn without_a_flush_metadata_is_committed_every_second() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 64M rdelay=20ms");
    let command = bench.clone_of(server.uri()).args("--hydration-threshold 1");
    let daemon = command.start();
    daemon.wait_status("some regions", |status| status.hydrated_regions >= 20);
    let before = daemon.status().hydrated_regions;
    std::thread::sleep(std::time::Duration::from_millis(1500));
    daemon.kill9();
    let daemon = command.clone().args("--no-hydration").start();
    let after = daemon.status().hydrated_regions;
    assert!(after >= before, "{after} regions are left of {before}");
    daemon.stop();
}

/// The destination was copied by hand and `--force` vouches for the copy: from then on the clone is the copy's.
#[test]
fn a_forced_destination_is_the_clones_from_then_on() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 2 * MIB);
    let written = "h = connect(); h.pwrite(b'w' * 65536, 65536); h.flush()";
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(&daemon.uri(), written);
    daemon.stop();
    let moved = bench.path("moved");
    fs::copy(bench.copy(), &moved).unwrap();
    let stale = || bench.clone_of(&source);
    let right = || bench.clone_of(&source).destination(&moved);
    right().refused(&["belong to another destination", "--force"]);
    let daemon = right().args("--no-hydration --force").start();
    daemon.wait_log("from now on; others are refused");
    daemon.kill9();
    stale().refused(&["belong to another destination"]);
    right().args("--no-hydration").start().stop();
    // And back, to one of a complete clone, which stays complete.
    let daemon = right().start();
    daemon.wait_hydrated();
    daemon.stop();
    stale().refused(&["belong to another destination"]);
    let again = bench.path("again");
    fs::copy(&moved, &again).unwrap();
    let daemon = bench.clone_of(&source).destination(&again).args("--force").start();
    assert!(daemon.status().is_complete());
    daemon.kill9();
    right().refused(&["belong to another destination"]);
    let daemon = bench.clone_of(&source).destination(&again).start();
    assert!(daemon.status().is_complete());
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    expected[65536..131072].fill(b'w');
    assert_same(&again, &expected);
}

#[test]
fn a_forced_source_is_the_clones_from_then_on() {
    let bench = Bench::new();
    let (source, other) = (bench.random("source", 2 * MIB), bench.filled("other", 2 * MIB, 7));
    bench.clone_of(&source).args("--no-hydration").start().stop();
    bench.clone_of(&other).refused(&["the source's content is not that of the one", "--force"]);
    let daemon = bench.clone_of(&other).args("--no-hydration --force").start();
    daemon.wait_log("as it is now; others are refused");
    daemon.kill9();
    bench.clone_of(&source).refused(&["the source's content is not that of the one"]);
    let daemon = bench.clone_of(&other).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&other).unwrap());
}
