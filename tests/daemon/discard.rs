//! TRIM and WRITE_ZEROES: what they leave, what they cost, and their order with copies in flight.

use super::harness::*;
use super::load::seed;
use std::fs;
use std::os::unix::fs::FileExt;

const REGION: u64 = 64 * KIB;

/// dm-clone loses an acknowledged, flushed write when a copy of its region was in flight before a discard of it.
/// Here many copies are in flight each time, and regions are discarded and written behind them.
#[test]
fn a_write_after_a_discard_survives_the_copy_in_flight() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let size = 16 * MIB;
    // All ways to bring a region in: by the background, a read, and CACHE.
    for (round, (background, bring)) in [
        (true, "pass"),
        (false, "waiting.append((h, h.aio_cache(REGION, r * REGION)))"),
        (false, "waiting.append((h, h.aio_pread(nbd.Buffer(512), r * REGION)))"),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = seed();
        let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=150ms");
        let (copy, meta) = (bench.path(&format!("copy-{round}")), bench.path(&format!("meta-{round}")));
        let command = bench.clone_of(server.uri()).destination(&copy).metadata(&meta);
        let daemon = command.args("--no-hydration --shards 2").start();
        eprintln!("round {round}, seed {seed}");
        let log = nbdsh(
            &daemon.uri(),
            &format!(
                r#"
REGION = 65536
rng = random.Random({seed})
h, w = connect(), connect()
regions = rng.sample(range(256), 96)
waiting = []
for r in regions:
    {bring}
if {background}:
    import subprocess
    subprocess.run([{hydrant:?}, "message", "vm", "enable_hydration", "--control", {control:?}], check=True)
time.sleep(rng.choice([0, 0.02, 0.1]))
def wait(h, cookies):
    while cookies:
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
        if cookies: h.poll(-1)
# All discards at once; then, when they are acknowledged, all writes; then a flush.
wait(w, [w.aio_trim(REGION, r * REGION) for r in regions])
writes, buffers = [], []
for r in regions:
    kind = rng.choice(["whole", "part", "byte"])
    start, length = (0, REGION) if kind == "whole" else (1000, 5000) if kind == "part" else (65535, 1)
    buffers.append(nbd.Buffer.from_bytearray(bytearray(b"\xee" * length)))
    writes.append(w.aio_pwrite(buffers[-1], r * REGION + start))
    print(r, start, length)
wait(w, writes)
w.flush()
wait(h, [c for _, c in waiting])
"#,
                background = if background { "True" } else { "False" },
                hydrant = env!("CARGO_BIN_EXE_hydrant"),
                control = daemon.control,
            ),
        );
        if background {
            daemon.wait_hydrated();
        } else {
            // Whatever is in flight has landed.
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        daemon.kill9();
        let mut written = vec![None; 256];
        for line in log.lines() {
            let numbers: Vec<usize> = line.split(' ').map(|word| word.parse().unwrap()).collect();
            written[numbers[0]] = Some(numbers[1]..numbers[1] + numbers[2]);
        }
        assert_eq!(written.iter().flatten().count(), 96);
        // What a client finds after the crash, and what the copy ends as.
        let daemon = bench.clone_of(server.uri()).destination(&copy).metadata(&meta).start();
        daemon.wait_hydrated();
        daemon.stop();
        let (found, source) = (fs::read(&copy).unwrap(), pattern(size));
        for (region, written) in written.into_iter().enumerate() {
            let bytes = &found[region * REGION as usize..][..REGION as usize];
            let source = &source[region * REGION as usize..][..REGION as usize];
            let Some(written) = written else {
                assert!(bytes == source, "region {region} was left alone");
                continue;
            };
            assert!(bytes[written.clone()].iter().all(|byte| *byte == 0xee), "the write to region {region} is lost");
            let rest = |i: &usize| !written.contains(i);
            assert!((0..bytes.len()).filter(rest).all(|i| bytes[i] == 0), "region {region} was discarded");
        }
    }
}

#[test]
fn trimmed_regions_are_not_copied_and_read_as_zeros_never_as_old_data() {
    need!("nbdkit", "nbdsh");
    for passdown in ["", "--no-discard-passdown"] {
        let bench = Bench::new();
        // The last region is short.
        let size = 4 * MIB + 1000;
        let server = Nbdkit::start(&bench, &format!("pattern {size}"));
        bench.filled("copy", size, 0xaa);
        let command = bench.clone_of(server.uri()).args("--no-hydration --force --shards 2").args(passdown);
        let daemon = command.start();
        let script = format!(
            r#"
h = connect()
size = h.get_size()
# Whole regions only: the parts at the edges stay as they are.
h.trim(10 * 65536, 100)
assert h.pread(65536, 0) != bytes(65536)
assert h.pread(9 * 65536, 65536) == bytes(9 * 65536)
# The tail is a whole region too.
h.trim(1000, {tail})
assert h.pread(1000, {tail}) == bytes(1000)
h.flush()
"#,
            tail = 4 * MIB
        );
        let before = daemon.status();
        nbdsh(&daemon.uri(), &script);
        let after = daemon.status();
        // Nine whole ones, the tail, and the first one, which was read.
        assert_eq!((before.hydrated_regions, after.hydrated_regions), (0, 11));
        assert_eq!(after.features.no_discard_passdown, !passdown.is_empty());
        assert!(after.io.source_read_bytes <= 2 * REGION, "trimmed regions are not read from the source");
        daemon.kill9();
        let daemon = bench.clone_of(server.uri()).args(passdown).start();
        daemon.wait_hydrated();
        daemon.stop();
        let mut expected = pattern(size);
        expected[65536..10 * 65536].fill(0);
        expected[4 << 20..].fill(0);
        assert_same(&bench.copy(), &expected);
    }
}

#[test]
fn trims_of_hydrated_regions_free_space_unless_they_are_not_passed_down() {
    need!("nbdsh");
    for (passdown, freed) in [("", true), ("--no-discard-passdown", false)] {
        let bench = Bench::new();
        let source = bench.random("source", 8 * MIB);
        let daemon = bench.clone_of(&source).args(passdown).start();
        daemon.wait_hydrated();
        let full = allocated(&bench.copy());
        nbdsh(&daemon.uri(), "h = connect(); h.trim(4 << 20, 1 << 20); h.flush()");
        let now = allocated(&bench.copy());
        assert_eq!(now < full, freed, "{now} of {full}");
        daemon.stop();
        let mut expected = fs::read(&source).unwrap();
        if freed {
            expected[1 << 20..5 << 20].fill(0);
        }
        assert_same(&bench.copy(), &expected);
    }
}

#[test]
fn write_zeroes_moves_no_data_and_allocates_only_when_asked_to() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
assert h.can_zero() and h.can_fast_zero()
h.zero(4 << 20, 1 << 20)                                   # a hole
h.zero(4 << 20, 8 << 20, flags=nbd.CMD_FLAG_NO_HOLE)       # allocated
h.zero(4 << 20, 16 << 20, flags=nbd.CMD_FLAG_FAST_ZERO)    # whole regions: fast
h.zero(5, (24 << 20) + 3)                                  # five bytes of a region
h.zero(70000, (26 << 20) + 100, flags=nbd.CMD_FLAG_FUA)
for start, length in [(1 << 20, 4 << 20), (8 << 20, 4 << 20), (16 << 20, 4 << 20), ((24 << 20) + 3, 5), ((26 << 20) + 100, 70000)]:
    assert h.pread(length, start) == bytes(length)
h.flush()
"#,
    );
    let copy = bench.copy();
    // Three regions were copied in part, one range is allocated.
    let used = allocated(&copy);
    assert!((4 * MIB..4 * MIB + 6 * REGION).contains(&used), "{used} bytes are allocated");
    assert!(daemon.status().io.source_read_bytes <= 3 * REGION);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    // And when all is hydrated.
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
h.zero(1 << 20, 2 << 20)
h.zero(1 << 20, 28 << 20, flags=nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(1001, (30 << 20) + 7)
h.flush()
"#,
    );
    daemon.stop();
    let mut expected = fs::read(&source).unwrap();
    for (start, len) in [
        (1 << 20, 4 << 20),
        (8 << 20, 4 << 20),
        (16 << 20, 4 << 20),
        ((24 << 20) + 3, 5),
        ((26 << 20) + 100, 70000),
        (28 << 20, 1 << 20),
        ((30 << 20) + 7, 1001),
    ] {
        expected[start..start + len].fill(0);
    }
    assert_same(&copy, &expected);
    let used = allocated(&copy);
    assert!((24 * MIB..24 * MIB + 6 * REGION).contains(&used), "{used} bytes are allocated");
}

#[test]
fn a_fast_zero_that_would_be_slow_is_refused() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
fails(errno.ENOTSUP, lambda: h.zero(4096, 4096, flags=nbd.CMD_FLAG_FAST_ZERO))
assert h.pread(4096, 4096) != bytes(4096)
"#,
    );
    daemon.stop();
}

/// A region that is trimmed and then written in part shows zeros around it, wherever the old data would be.
#[test]
fn a_partial_write_into_a_trimmed_region_is_surrounded_by_zeros() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    bench.filled("copy", MIB, 0xaa);
    let daemon = bench.clone_of(&source).args("--no-hydration --force").start();
    nbdsh(&daemon.uri(), "h = connect(); h.trim(65536, 65536); h.pwrite(b'new', 65536 + 1000); h.flush()");
    daemon.kill9();
    let file = fs::File::open(bench.copy()).unwrap();
    let mut region = vec![1; 65536];
    file.read_exact_at(&mut region, 65536).unwrap();
    let mut expected = vec![0; 65536];
    expected[1000..1003].copy_from_slice(b"new");
    assert!(region == expected);
}
