//! Clones that are in use while they hydrate: every byte is the source's or the last one written.

use super::harness::*;
use std::fs;
use std::path::Path;

/// One client among several. The device is cut into stripes of an odd size, so that clients share regions and blocks;
/// client `me` of `clients` owns every `clients`-th of them, and keeps what they must hold. Several operations are in
/// flight at a time, of any alignment and length. What a trim leaves may be the old bytes or zeros, but must stay.
const ORACLE: &str = r#"
me, clients, seed, rounds, source, out = @ARGS@
STRIPE = 99_991
rng = random.Random(seed * 1000 + me)
h = connect()
size = h.get_size()
expected = bytearray(open(source, "rb").read())
assert len(expected) == size
stripes = [s for s in range((size + STRIPE - 1) // STRIPE) if s % clients == me]
def place(stripe):
    start, end = stripe * STRIPE, min(size, (stripe + 1) * STRIPE)
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
def check(offset, got, what):
    want = expected[offset:offset + len(got)]
    if got != want:
        at = next(i for i in range(len(got)) if got[i] != want[i])
        raise AssertionError(f"{what}: {offset}+{len(got)}: at {offset + at} is {bytes(got[at:at+8]).hex()}, not {bytes(want[at:at+8]).hex()}")
for round in range(rounds):
    jobs = []
    for stripe in rng.sample(stripes, min(len(stripes), 5)):
        offset, length = place(stripe)
        fua = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        op = rng.choice("rrrrwwwwwztc")
        buf = None
        if op == "r":
            buf = nbd.Buffer(length)
            cookie = h.aio_pread(buf, offset)
        elif op == "w":
            data = bytearray(rng.randbytes(length))
            expected[offset:offset + length] = data
            buf = nbd.Buffer.from_bytearray(data)
            cookie = h.aio_pwrite(buf, offset, flags=fua)
        elif op == "z":
            expected[offset:offset + length] = bytes(length)
            flags = fua | (nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0)
            cookie = h.aio_zero(length, offset, flags=flags)
        elif op == "t":
            cookie = h.aio_trim(length, offset, flags=fua)
        else:
            cookie = h.aio_cache(length, offset)
        jobs.append((op, offset, length, buf, cookie))
    wait([job[4] for job in jobs])
    for op, offset, length, buf, _ in jobs:
        if op == "r":
            check(offset, buf.to_bytearray(), f"round {round}: read")
        elif op == "t":
            got = h.pread(length, offset)
            old = expected[offset:offset + length]
            wrong = next((i for i in range(length) if got[i] not in (0, old[i])), None)
            assert wrong is None, f"round {round}: trim {offset}+{length} shows {got[wrong]:02x} at {offset + wrong}, it was {old[wrong]:02x}"
            expected[offset:offset + length] = got
    if rng.random() < 0.1:
        h.flush()
for stripe in stripes:
    start, end = stripe * STRIPE, min(size, (stripe + 1) * STRIPE)
    check(start, h.pread(end - start, start), "at the end")
open(out, "wb").write(expected)
h.flush()
"#;

const STRIPE: usize = 99_991;

/// Runs oracle clients against a daemon; what the device must hold afterwards.
pub fn use_it(bench: &Bench, uri: &str, content: &Path, seed: u64, clients: usize, rounds: usize) -> Vec<u8> {
    eprintln!("seed {seed}");
    let out = |me| bench.path(&format!("oracle-{me}"));
    let running: Vec<_> = (0..clients)
        .map(|me| {
            let args = format!("({me}, {clients}, {seed}, {rounds}, {content:?}, {:?})", out(me));
            let (uri, script) = (uri.to_owned(), ORACLE.replace("@ARGS@", &args));
            std::thread::spawn(move || nbdsh(&uri, &script))
        })
        .collect();
    for client in running {
        client.join().unwrap_or_else(|_| panic!("an oracle client failed, seed {seed}"));
    }
    let results: Vec<Vec<u8>> = (0..clients).map(|me| fs::read(out(me)).unwrap()).collect();
    let mut expected = results[0].clone();
    for (stripe, bytes) in expected.chunks_mut(STRIPE).enumerate() {
        let start = stripe * STRIPE;
        bytes.copy_from_slice(&results[stripe % clients][start..start + bytes.len()]);
    }
    expected
}

/// A seed that differs each time, unless HYDRANT_TEST_SEED gives one.
pub fn seed() -> u64 {
    let given = std::env::var("HYDRANT_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into();
    given.unwrap_or_else(now)
}

/// A source with data, holes and zeros.
pub fn mixed_source(bench: &Bench, size: u64) -> std::path::PathBuf {
    let path = bench.random("source", size);
    let mut content = fs::read(&path).unwrap();
    let third = content.len() / 3;
    content[third..third + third / 4].fill(0);
    fs::write(&path, content).unwrap();
    run("fallocate", &["-d", path.to_str().unwrap()]);
    path
}

fn in_use(options: &str, rdelay: &str, size: u64, rounds: usize) {
    let bench = Bench::new();
    let source = mixed_source(&bench, size);
    let server = Nbdkit::start(&bench, &format!("-r --filter=delay file {} rdelay={rdelay}", source.display()));
    let daemon = bench.clone_of(server.uri()).args(options).start();
    let expected = use_it(&bench, &daemon.uri(), &source, seed(), 3, rounds);
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&bench.copy(), &expected);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte_with_a_slow_source() {
    need!("nbdkit", "nbdsh");
    in_use("--shards 2 --hydration-threshold 4", "10ms", 24 * MIB + 777, 150);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte_with_small_regions() {
    need!("nbdkit", "nbdsh");
    in_use("--shards 3 --region-size 4KiB --hydration-threshold 32", "5ms", 6 * MIB + 1, 150);
}

#[test]
fn a_clone_in_use_is_right_to_the_byte_with_large_regions() {
    need!("nbdkit", "nbdsh");
    in_use("--shards 2 --region-size 4MiB --no-discard-passdown", "20ms", 33 * MIB + 5, 150);
}

#[test]
fn a_clone_in_use_is_right_on_devices_of_4096_byte_blocks() {
    need!("nbdkit", "nbdsh", "loop", "losetup");
    let bench = Bench::new();
    let source = mixed_source(&bench, 16 * MIB);
    let device = Loop::attach(&source, 4096);
    let destination = Loop::attach(&bench.hole("backing", 16 * MIB), 4096);
    let command = bench.clone_of(&device.path).destination(&destination.path).args("--hydration-threshold 1");
    let daemon = command.start();
    let expected = use_it(&bench, &daemon.uri(), &source, seed(), 2, 150);
    daemon.wait_hydrated();
    daemon.stop();
    assert_same(&destination.path, &expected);
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
