//! The fuzz targets on stable Rust, with every test run: all inputs that are committed, and a bounded number of mutations
//! of them. tests/fuzz/README.md says how to fuzz for real.
//!
//! * `HYDRANT_FUZZ_SEED`: of the mutations, a number; the same one makes the same inputs.
//! * `HYDRANT_FUZZ_ITERATIONS`: how many mutations each target gets.
//!
//! An input that fails is written to a file, whose name is in the message; it belongs into tests/fuzz/regressions.

#[path = "fuzz/src/lib.rs"]
mod fuzz;

use fuzz::Target;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// An input that takes longer hangs: they take less than a millisecond.
const INPUT_TIME_MAX: Duration = Duration::from_secs(20);
/// Mutations stop early on a machine that is this slow.
const MUTATIONS_TIME_MAX: Duration = Duration::from_secs(3);
/// What a mutation adds at most, in bytes.
const INSERTED_MAX: usize = 64;

fn directory(kind: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(kind).join(target)
}

/// The files of a directory by name; none when it is not there.
fn inputs(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    files.into_iter().map(|path| (name(&path), std::fs::read(&path).unwrap())).collect()
}

fn number_of(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => otherwise,
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Less than `bound`; 0 when that is 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// An input that is a few steps away from one that is known.
fn mutate(inputs: &[(String, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let mut data = inputs[random.below(inputs.len())].1.clone();
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len());
        match random.below(9) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.next() as u8,
            // A length, a count, an offset: extreme, of 1 to 8 bytes, either end first.
            2 | 3 => {
                let len = [1, 2, 4, 8][random.below(4)].min(data.len() - at);
                let extreme = [0, 1, u64::MAX, u64::MAX >> 1, 1 << 63, data.len() as u64][random.below(6)];
                let bytes = if random.below(2) == 0 { extreme.to_be_bytes() } else { extreme.to_le_bytes() };
                let from = if random.below(2) == 0 { 0 } else { 8 - len };
                data[at..at + len].copy_from_slice(&bytes[from..from + len]);
            }
            4 => data.truncate(at),
            5 => {
                let end = at + random.below(data.len() - at);
                data.drain(at..end);
            }
            6 => {
                let bytes: Vec<u8> = (0..random.below(INSERTED_MAX)).map(|_| random.next() as u8).collect();
                data.splice(at..at, bytes);
            }
            // The head of one with the tail of another.
            7 => {
                let other = &inputs[random.below(inputs.len())].1;
                data.truncate(at);
                data.extend_from_slice(&other[random.below(other.len())..]);
            }
            _ => {
                let end = (at + random.below(INSERTED_MAX)).min(data.len());
                data.extend_from_within(at..end);
            }
        }
    }
    data
}

/// What is being run, for whoever watches.
type Running = Arc<Mutex<(Instant, String, Vec<u8>)>>;

fn fails(target: &Target, name: &str, data: &[u8], why: &str) -> ! {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}-{name}", target.name));
    std::fs::write(&path, data).unwrap();
    panic!("fuzz target {}, input '{name}': {why}; it is in {}", target.name, path.display());
}

/// Runs the committed inputs and `iterations` mutations; returns how many of each.
fn run_all(target: &'static Target, seed: u64, iterations: u64, running: &Running) -> Result<(usize, u64), String> {
    let check = |name: String, data: Vec<u8>| {
        *running.lock().unwrap() = (Instant::now(), name, data.clone());
        catch_unwind(AssertUnwindSafe(|| target.check(&data))).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or(panic.downcast_ref::<&str>().map(|text| text.to_string())).unwrap_or_default()
        })
    };
    let mut known = inputs(&directory("corpus", target.name));
    assert!(!known.is_empty(), "no corpus for {}", target.name);
    known.extend(inputs(&directory("regressions", target.name)));
    for (name, data) in &known {
        check(name.clone(), data.clone())?;
    }
    let mut random = Random(seed);
    let start = Instant::now();
    for number in 0..iterations {
        if start.elapsed() > MUTATIONS_TIME_MAX {
            return Ok((known.len(), number));
        }
        check(format!("seed-{seed}-mutation-{number}"), mutate(&known, &mut random))?;
    }
    Ok((known.len(), iterations))
}

fn run(name: &str, iterations: u64) {
    let target = Target::named(name);
    let seed = number_of("HYDRANT_FUZZ_SEED", 1);
    let iterations = number_of("HYDRANT_FUZZ_ITERATIONS", iterations);
    let running: Running = Arc::new(Mutex::new((Instant::now(), String::new(), Vec::new())));
    let (done, result) = mpsc::channel();
    let watched = running.clone();
    let start = Instant::now();
    std::thread::spawn(move || done.send(run_all(target, seed, iterations, &watched)));
    loop {
        match result.recv_timeout(Duration::from_millis(200)) {
            Ok(Ok((known, mutations))) => {
                println!("{name}: {known} inputs, {mutations} mutations (seed {seed}), {:?}", start.elapsed());
                return;
            }
            Ok(Err(why)) => {
                let (_, name, data) = running.lock().unwrap().clone();
                fails(target, &name, &data, &why);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let (since, name, data) = running.lock().unwrap().clone();
                if since.elapsed() > INPUT_TIME_MAX {
                    fails(target, &name, &data, "it does not end");
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{name}: the thread ended"),
        }
    }
}

#[test]
fn config() {
    run("config", 4000);
}
#[test]
fn control() {
    run("control", 1500);
}
#[test]
fn dm_meta() {
    run("dm_meta", 3000);
}
#[test]
fn dump() {
    run("dump", 10_000);
}
#[test]
fn meta() {
    run("meta", 500);
}
#[test]
fn nbd_client() {
    run("nbd_client", 400);
}
#[test]
fn nbd_server() {
    run("nbd_server", 5000);
}
#[test]
fn table() {
    run("table", 20_000);
}
#[test]
fn words() {
    run("words", 20_000);
}

/// The harness sees what it is there to see.
#[test]
fn too_much_memory_is_noticed() {
    let bound = fuzz::meter::Bound { base: 1000, per_byte: 2 };
    let cost = |len: usize| fuzz::meter::measure(|| drop(std::hint::black_box(vec![0u8; len]))).1;
    bound.check(10, cost(1020));
    let (small, large) = (cost(1021), cost(1 << 20));
    assert!(catch_unwind(|| bound.check(10, small)).is_err() && catch_unwind(|| bound.check(10, large)).is_err());
    assert!(cost(1 << 20).peak >= 1 << 20);
}

/// Makes the part of the corpus that comes from images: of Linux's dm-clone (tests/fixtures), and of every form of
/// hydrant's own superblock.
#[test]
#[ignore = "writes tests/fuzz/corpus"]
fn seeds() {
    use hydrant::meta::codec::*;
    use hydrant::units::{Generation, RegionSize};
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dm-clone");
    for (name, _) in inputs(&fixtures).iter().filter(|(name, _)| name.ends_with(".img.xz")) {
        let image = std::process::Command::new("xz").arg("-dc").arg(fixtures.join(name)).output().unwrap();
        assert!(image.status.success());
        let described = fuzz::dm_meta::describe(&image.stdout);
        std::fs::write(directory("corpus", "dm_meta").join(name.trim_end_matches(".img.xz")), described).unwrap();
    }
    let sizes = [
        ("one-region", 100, 4096),
        ("small", 1 << 20, 4096),
        ("odd", (9 << 30) + 5, 65536),
        ("large", 1 << 40, 1 << 20),
    ];
    for (name, size, region_size) in sizes {
        for (state, how) in [(CloneState::Active, 2), (CloneState::Complete, 1), (CloneState::Complete, 3)] {
            let superblock = Superblock {
                uuid: *b"0123456789abcdef",
                geometry: geometry_for(size, RegionSize::new(region_size).unwrap()).unwrap(),
                source: SourceFingerprint { size, samples: 64, digest: [0x5a; 16] },
                destination_id: [0xd1; 16],
                state,
                generation: Generation(9),
                created_unix_s: 1_700_000_000,
            };
            let mut input = vec![how];
            input.extend(&superblock.encode()[..144]);
            // Copy B a commit behind, a sector torn, another at the wrong place.
            let behind = [5, 8, 0, 6, 0xc0 | 3, 8 << 3, 0, 0, 0, 0, 0, 0, 0];
            for (kind, changes) in [
                ("", &[][..]),
                ("-b", &behind),
                ("-torn", &[0x80, 17, 0, 100, 2, 1, 2]),
                ("-moved", &[0x83, 18, 0, 25, 0]),
            ] {
                let path = directory("corpus", "meta").join(format!("{name}-{}{how}{kind}", state.name()));
                std::fs::write(path, [&input, changes].concat()).unwrap();
            }
        }
    }
}
