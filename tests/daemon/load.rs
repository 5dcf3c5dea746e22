//! Clones that are in use while they hydrate: every byte is the source's or the last one written.

use super::harness::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// One client among several. The device is cut into stripes of an odd size, so that clients share regions and blocks;
/// client `me` of `clients` owns every `clients`-th of those that touch the windows, and keeps what they must hold.
/// Several operations are in flight at a time, of any alignment and length. What a trim leaves may be the old bytes or
/// zeros, but must stay.
const ORACLE: &str = r#"
me, clients, seed, rounds, content, out, windows = @ARGS@
STRIPE = 99_991
rng = random.Random(seed * 1000 + me)
h = connect()
size = h.get_size()
def bounds(stripe):
    return stripe * STRIPE, min(size, (stripe + 1) * STRIPE)
stripes = sorted({s for a, b in windows for s in range(a // STRIPE, (min(b, size) - 1) // STRIPE + 1) if s % clients == me})
expected = {}
with open(content, "rb") as file:
    for s in stripes:
        start, end = bounds(s)
        file.seek(start)
        expected[s] = bytearray(file.read(end - start))
def place(stripe):
    start, end = bounds(stripe)
    how = rng.random()
    if how < 0.15:
        return start, end - start
    if how < 0.4:  # whole blocks, if there are any
        block = rng.choice([512, 4096, 65536])
        first, last = -(-start // block), end // block
        if first < last:
            a = rng.randrange(first, last)
            b = rng.randrange(a, last) + 1
            return a * block, (b - a) * block
    a = rng.randrange(start, end)
    return a, 1 + rng.randrange(min(end - a, rng.choice([1, 10, 5000, STRIPE])))
def wait(cookies):
    while cookies:
        cookies = [c for c in cookies if not h.aio_command_completed(c)]
        if cookies:
            h.poll(-1)
def check(stripe, offset, got, what):
    at = offset - stripe * STRIPE
    want = expected[stripe][at:at + len(got)]
    if got != want:
        i = next(i for i in range(len(got)) if got[i] != want[i])
        raise AssertionError(f"{what}: {offset}+{len(got)}: at {offset + i} is {bytes(got[i:i+8]).hex()}, not {bytes(want[i:i+8]).hex()}")
for round in range(rounds):
    jobs = []
    for stripe in rng.sample(stripes, min(len(stripes), 5)):
        offset, length = place(stripe)
        at = offset - stripe * STRIPE
        fua = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        op = rng.choice("rrrrwwwwwztc")
        buf = None
        if op == "r":
            buf = nbd.Buffer(length)
            cookie = h.aio_pread(buf, offset)
        elif op == "w":
            data = bytearray(rng.randbytes(length))
            expected[stripe][at:at + length] = data
            buf = nbd.Buffer.from_bytearray(data)
            cookie = h.aio_pwrite(buf, offset, flags=fua)
        elif op == "z":
            expected[stripe][at:at + length] = bytes(length)
            flags = fua | (nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0)
            cookie = h.aio_zero(length, offset, flags=flags)
        elif op == "t":
            cookie = h.aio_trim(length, offset, flags=fua)
        else:
            cookie = h.aio_cache(length, offset)
        jobs.append((op, stripe, offset, length, buf, cookie))
    wait([job[-1] for job in jobs])
    for op, stripe, offset, length, buf, _ in jobs:
        if op == "r":
            check(stripe, offset, buf.to_bytearray(), f"round {round}: read")
        elif op == "t":
            got = h.pread(length, offset)
            at = offset - stripe * STRIPE
            old = expected[stripe][at:at + length]
            wrong = next((i for i in range(length) if got[i] not in (0, old[i])), None)
            assert wrong is None, f"round {round}: trim {offset}+{length} shows {got[wrong]:02x} at {offset + wrong}, it was {old[wrong]:02x}"
            expected[stripe][at:at + length] = got
    if rng.random() < 0.1:
        h.flush()
for stripe in stripes:
    start, end = bounds(stripe)
    check(stripe, start, h.pread(end - start, start), "at the end")
h.flush()
with open(out, "wb") as file:
    for stripe in stripes:
        file.write(stripe.to_bytes(8, "little") + expected[stripe])
"#;

const STRIPE: u64 = 99_991;

/// Uses a daemon by several oracle clients. `content` is a file that holds what the device does; afterwards again.
pub fn use_it(bench: &Bench, uri: &str, content: &Path, clients: usize, rounds: usize) {
    let seed = seed();
    eprintln!("seed {seed}");
    let size = fs::metadata(content).unwrap().len();
    let windows: Vec<_> = windows(size).into_iter().map(|window| (window.start, window.end)).collect();
    let out = |me| bench.path(&format!("oracle-{me}"));
    let running: Vec<_> = (0..clients)
        .map(|me| {
            let args = format!("({me}, {clients}, {seed}, {rounds}, {content:?}, {:?}, {windows:?})", out(me));
            let (uri, script) = (uri.to_owned(), ORACLE.replace("@ARGS@", &args));
            std::thread::spawn(move || nbdsh(&uri, &script))
        })
        .collect();
    for client in running {
        client.join().unwrap_or_else(|_| panic!("an oracle client failed, seed {seed}"));
    }
    let file = fs::OpenOptions::new().write(true).open(content).unwrap();
    for me in 0..clients {
        let stripes = fs::read(out(me)).unwrap();
        let mut rest = &stripes[..];
        while !rest.is_empty() {
            let start = u64::from_le_bytes(rest[..8].try_into().unwrap()) * STRIPE;
            let len = STRIPE.min(size - start) as usize;
            file.write_all_at(&rest[8..8 + len], start).unwrap();
            rest = &rest[8 + len..];
        }
    }
}

/// A seed that differs each time, unless HYDRANT_TEST_SEED gives one.
pub fn seed() -> u64 {
    let given = std::env::var("HYDRANT_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into();
    given.unwrap_or_else(now)
}

/// The zones of a clone with regions of 4 KiB, in bytes: a bitmap block holds 30720 bits. Each belongs to one shard.
pub const ZONE: u64 = 30720 * 4096;

/// Where the data is in a source of `mixed_source`: all over a small one; at the ends and around the borders of zones
/// of a large one.
fn windows(size: u64) -> Vec<std::ops::Range<u64>> {
    let (places, reach) = match size <= ZONE {
        true => (vec![0], size),
        false => ((0..=size / ZONE).map(|k| k * ZONE).chain([size]).collect(), MIB),
    };
    places.into_iter().map(|at| at.saturating_sub(reach)..size.min(at + reach)).collect()
}

/// A source with data, holes and zeros.
pub fn mixed_source(bench: &Bench, size: u64) -> PathBuf {
    let path = bench.hole("source", size);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for window in windows(size) {
        let len = window.end - window.start;
        let mut bytes = random_bytes(window.start, len);
        let third = bytes.len() / 3;
        bytes[third..third + third / 4].fill(0);
        file.write_all_at(&bytes, window.start).unwrap();
    }
    // Half of the zeros become holes.
    let first = windows(size).remove(0);
    let (start, len) = (first.start + (first.end - first.start) / 3, (first.end - first.start) / 24);
    run("fallocate", &["-p", "-o", &start.to_string(), "-l", &len.to_string(), path.to_str().unwrap()]);
    path
}

/// A file of the same content, to keep what a device must hold.
pub fn kept(bench: &Bench, source: &Path) -> PathBuf {
    let kept = bench.path("expected");
    run("cp", &[Path::new("--sparse=always"), source, &kept]);
    kept
}

fn in_use(server_args: &str, options: &str, size: u64, rounds: usize) {
    let bench = Bench::new();
    let source = mixed_source(&bench, size);
    let expected = kept(&bench, &source);
    let args = server_args.replace("SOURCE", source.to_str().unwrap());
    let server = Nbdkit::start(&bench, &args);
    let daemon = bench.clone_of(server.uri()).args(options).start();
    use_it(&bench, &daemon.uri(), &expected, 3, rounds);
    daemon.wait_hydrated();
    daemon.stop();
    assert_same_files(&bench.copy(), &expected);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte() {
    need!("nbdkit", "nbdsh");
    let server = "-r --filter=delay file SOURCE rdelay=10ms";
    in_use(server, "--shards 2 --hydration-threshold 4", 24 * MIB + 777, 150);
}

/// Several zones: several shards have work, and requests cross their borders.
#[test]
fn a_clone_in_use_is_right_to_the_byte_across_shards() {
    need!("nbdkit", "nbdsh");
    let server = "-r --filter=delay file SOURCE rdelay=5ms";
    in_use(server, "--shards 3 --region-size 4KiB --hydration-threshold 32", 3 * ZONE + 5 * MIB + 1, 150);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte_when_shards_share_one_connection() {
    need!("nbdkit", "nbdsh");
    let server = "-r --filter=multi-conn --filter=delay file SOURCE rdelay=2ms multi-conn-mode=disable";
    in_use(server, "--shards 4 --region-size 4KiB --hydration-threshold 64", 3 * ZONE + 12345, 100);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte_with_large_regions() {
    need!("nbdkit", "nbdsh");
    let server = "-r --filter=delay file SOURCE rdelay=20ms";
    in_use(server, "--shards 2 --region-size 4MiB --no-discard-passdown", 33 * MIB + 5, 150);
}

#[test]
fn a_clone_in_use_is_right_on_devices_of_4096_byte_blocks() {
    need!("nbdsh", "loop", "losetup");
    let bench = Bench::new();
    let source = mixed_source(&bench, 16 * MIB);
    let expected = kept(&bench, &source);
    let device = Loop::attach(&source, 4096);
    let destination = Loop::attach(&bench.hole("backing", 16 * MIB), 4096);
    let command = bench.clone_of(&device.path).destination(&destination.path).args("--hydration-threshold 1");
    let daemon = command.start();
    use_it(&bench, &daemon.uri(), &expected, 2, 150);
    daemon.wait_hydrated();
    daemon.stop();
    assert_same_files(&destination.path, &expected);
}

#[test]
fn fio_verifies_what_it_wrote_while_the_clone_hydrates() {
    need!("nbdkit", "fio");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay=10ms", source.display()));
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 8").start();
    let uri = format!("--uri={}", daemon.uri());
    let before = daemon.status().hydrated_regions;
    // Half of the device is left alone. Every block that fio wrote is read back and verified.
    let job = [
        "--name=load",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--rwmixread=30",
        "--bsrange=512-96k",
        "--blockalign=512",
        "--size=16M",
        "--io_size=12M",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=7",
        "--fsync=32",
        "--verify_state_save=0",
    ];
    run("fio", &job);
    assert!(before < 512, "it was still hydrating");
    daemon.wait_hydrated();
    // Once more, when all is hydrated: what was written is what is there.
    run("fio", &[&job[..], &["--verify_only=1"]].concat());
    daemon.stop();
    let copy = read_first(&bench.copy(), 32 * MIB);
    assert!(copy[16 << 20..] == fs::read(&source).unwrap()[16 << 20..], "what fio left alone is the source's");
}

#[test]
fn nbdcopy_and_qemu_read_the_source_at_once() {
    need!("nbdkit", "nbdcopy", "qemu-img", "qemu-io");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=1ms");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    let out = bench.path("out");
    run("nbdcopy", &[&daemon.uri(), out.to_str().unwrap()]);
    assert_same(&out, &pattern(16 * MIB));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &daemon.uri(), out.to_str().unwrap()]);
    // Reading has hydrated it.
    daemon.wait_hydrated();
    let commands = [
        "-f",
        "raw",
        "-c",
        "write -P 0x77 100k 3k",
        "-c",
        "read -P 0x77 100k 3k",
        "-c",
        "flush",
        "-c",
        "discard 8M 1M",
        "-c",
        "write -z 4M 64k",
        "-c",
        "read -P 0 4M 64k",
        "-c",
        "aio_write -P 9 12M 1M",
        "-c",
        "aio_flush",
        "-c",
        "read -P 9 12M 1M",
    ];
    let said = run("qemu-io", &[&commands[..], &[&daemon.uri()]].concat());
    assert!(!said.contains("failed"), "{said}");
    daemon.stop();
}
