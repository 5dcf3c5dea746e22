//! A clone that was stopped or killed goes on where it stopped.

use super::harness::*;
use super::load::{mixed_source, seed, use_it};
use std::fs;

#[test]
fn stopped_in_the_middle_it_goes_on_with_other_shards() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = mixed_source(&bench, 24 * MIB + 4097);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=10ms", source.display()));
    let command = bench.clone_of(server.uri()).args("--hydration-threshold 2");
    let (mut hydrated, mut expected) = (0, source.clone());
    for (round, shards) in [2, 3, 1, 5].into_iter().enumerate() {
        let daemon = command.clone().args(&format!("--shards {shards}")).start();
        let status = daemon.status();
        assert!(status.hydrated_regions >= hydrated, "{} after {hydrated}", status.hydrated_regions);
        let bytes = use_it(&bench, &daemon.uri(), &expected, seed(), 2, 25);
        expected = bench.path(&format!("expected-{round}"));
        fs::write(&expected, bytes).unwrap();
        hydrated = daemon.status().hydrated_regions;
        daemon.stop();
    }
    let daemon = bench.clone_of(server.uri()).start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&expected).unwrap());
}

#[test]
fn killed_in_the_middle_it_has_what_was_flushed() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let source = mixed_source(&bench, 24 * MIB + 4097);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=10ms", source.display()));
    let command = bench.clone_of(server.uri()).args("--hydration-threshold 2");
    let mut expected = source.clone();
    for (round, shards) in [3, 1, 2, 4].into_iter().enumerate() {
        let daemon = command.clone().args(&format!("--shards {shards}")).start();
        // Each client ends with a flush.
        let bytes = use_it(&bench, &daemon.uri(), &expected, seed(), 2, 25);
        daemon.kill9();
        expected = bench.path(&format!("expected-{round}"));
        fs::write(&expected, bytes).unwrap();
    }
    let daemon = bench.clone_of(server.uri()).start();
    let found = nbdsh(
        &daemon.uri(),
        &format!(
            "h = connect(); expected = open({expected:?}, 'rb').read()\nfor at in range(0, len(expected), 1 << 20):\n  want = expected[at:at + (1 << 20)]; assert h.pread(len(want), at) == want, at\nprint('same')"
        ),
    );
    assert_eq!(found.trim(), "same");
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &fs::read(&expected).unwrap());
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
        std::thread::sleep(std::time::Duration::from_millis(300 + 200 * round));
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
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=50ms");
    let command = bench.clone_of(server.uri()).args("--no-hydration --shards 3 --region-size 4KiB");
    let daemon = command.start();
    // The writes of many connections on all shards, the flush on one of them; and FUA of one write alone.
    nbdsh(
        &daemon.uri(),
        "hs = [connect() for _ in range(7)]
assert all(h.can_multi_conn() for h in hs)
for i, h in enumerate(hs):
    h.pwrite(bytes([i + 1]) * 300_000, i * 1_000_001)
hs[3].flush()
hs[5].pwrite(b'fua', 15_000_000, flags=nbd.CMD_FLAG_FUA)
os._exit(0)",
    );
    daemon.kill9();
    let mut expected = pattern(16 * MIB);
    for i in 0..7 {
        expected[i * 1_000_001..][..300_000].fill(i as u8 + 1);
    }
    expected[15_000_000..][..3].copy_from_slice(b"fua");
    let daemon = bench.clone_of(server.uri()).args("--shards 2").start();
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected);
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
