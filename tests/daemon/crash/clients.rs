//! Real clients of a daemon that is killed: what fio and qemu-io have flushed is there, and whoever is connected is told.

use super::client::{Connection, Verb};
use super::content::Random;
use crate::harness::*;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// From the kill until a client has its error.
const ERROR_TIME_MAX: Duration = Duration::from_secs(5);

fn connect(daemon: &Daemon) -> Connection {
    Connection::open(&daemon.socket, &daemon.name).unwrap()
}

/// A phase of writes that ends with a flush; killed after it, in the middle of further writes; verified by fio itself
/// after the restart, and once more when all is hydrated.
#[test]
fn what_fio_flushed_it_verifies_after_the_kill() {
    need!("nbdkit", "fio");
    let bench = Bench::new();
    let source = bench.random("source", 24 * MIB + 512);
    let args = format!("-r --filter=delay file {} rdelay=3ms", source.display());
    let mut server = Nbdkit::start(&bench, &args);
    let mut random = Random::new(crate::load::seed());
    let mut job: Vec<String> = Vec::new();
    for round in 0..4 {
        let shards = random.between(1..4);
        let hydration = random.pick(&["--hydration-threshold 4", "--hydration-rate 4MiB", "--no-hydration"]);
        let command = bench.clone_of(server.uri()).args(hydration).args(&format!("--shards {shards}"));
        let daemon = command.start();
        let fio = |job: &[String], more: &[&str]| {
            let uri = format!("--uri={}", daemon.uri());
            let more: Vec<String> = more.iter().map(|word| word.to_string()).collect();
            run("fio", &[&["--name=load".to_owned(), "--ioengine=nbd".into(), uri], job, &more].concat());
        };
        if round > 0 {
            // What the life before has flushed. By another connection than the writes.
            fio(&job, &["--verify_only=1"]);
        }
        let seed = random.below(1 << 30);
        let words = format!(
            "--rw=randwrite --bsrange=512-64k --blockalign=512 --size=12M --io_size=6M --iodepth=8 --verify=crc32c \
             --verify_fatal=1 --do_verify=0 --verify_state_save=0 --fsync=64 --randseed={seed}"
        );
        job = words.split_ascii_whitespace().map(str::to_owned).collect();
        fio(&job, &[]);
        connect(&daemon).ask(Verb::FLUSH, 0, &mut []).unwrap();
        // Elsewhere, and never flushed.
        let mut other = connect(&daemon);
        let writer = std::thread::spawn(move || {
            let mut sent = 0u64;
            while other.ask(Verb::WRITE, 16 * MIB + sent % 512 * 4096, &mut [7; 5000]).is_ok() {
                sent += 1;
            }
        });
        std::thread::sleep(Duration::from_millis(random.below(150)));
        if round % 2 == 1 {
            server.kill();
        }
        daemon.kill9();
        writer.join().unwrap();
        if round % 2 == 1 {
            server.again(&args);
        }
    }
    let daemon = bench.clone_of(server.uri()).start();
    let uri = format!("--uri={}", daemon.uri());
    let verify = ["--name=load".to_owned(), "--ioengine=nbd".into(), uri, "--verify_only=1".into()];
    run("fio", &[&verify[..], &job].concat());
    daemon.wait_hydrated();
    run("fio", &[&verify[..], &job].concat());
    daemon.stop();
    let (copy, source) = (fs::read(bench.copy()).unwrap(), fs::read(&source).unwrap());
    // Neither wrote from 12 to 16 MiB, nor behind 18 MiB and a bit.
    let (gap, rest) = (12 * MIB as usize..16 * MIB as usize, 19 * MIB as usize..);
    assert!(copy[gap.clone()] == source[gap] && copy[rest.clone()] == source[rest] && copy.len() == source.len());
}

/// Patterns of odd places and lengths; the source's server dies with the daemon.
#[test]
fn what_qemu_io_flushed_it_reads_after_the_kill() {
    need!("nbdkit", "qemu-io");
    for by_nbd in [true, false] {
        let bench = Bench::new();
        let size = 6 * MIB + 1536;
        let source = bench.path("source");
        fs::write(&source, pattern(size)).unwrap();
        let args = format!("-r file {}", source.display());
        let mut server = Nbdkit::start(&bench, &args);
        let address = if by_nbd { server.uri() } else { source.display().to_string() };
        let mut random = Random::new(crate::load::seed());
        let mut expected = pattern(size);
        let qemu_io = |daemon: &Daemon, commands: &[String]| {
            let words = commands.iter().flat_map(|command| ["-c".to_owned(), command.clone()]);
            let args: Vec<String> = ["-f", "raw"].map(str::to_owned).into_iter().chain(words).collect();
            let said = run("qemu-io", &[&args[..], &[daemon.uri()]].concat());
            assert!(!said.contains("failed") && !said.contains("mismatch"), "{said}\n{}", daemon.log());
        };
        let mut reads: Vec<String> = Vec::new();
        for round in 0..5u8 {
            let region = "--region-size 128KiB --hydration-rate 1MiB";
            let shards = format!("--shards {}", 1 + round % 3);
            let daemon = bench.clone_of(&address).args(region).args(&shards).start();
            qemu_io(&daemon, &reads);
            // Each round has its stripe, so that each pattern stays whole.
            let stripe = MIB * u64::from(round);
            let (at, len) = (stripe + 512 * random.below(900), 512 * random.between(1..900));
            let (byte, zeros) = (0x30 + round, stripe + 950 * KIB);
            qemu_io(
                &daemon,
                &[
                    format!("write -P {byte} {at} {len}"),
                    format!("write -z {zeros} 8k"),
                    "flush".into(),
                    // With FUA, alone.
                    format!("write -f -P {byte} {} 1536", stripe + 1000 * KIB),
                ],
            );
            if round % 2 == 0 {
                server.kill();
            }
            daemon.kill9();
            if round % 2 == 0 {
                server.again(&args);
            }
            reads.push(format!("read -P {byte} {at} {len}"));
            reads.push(format!("read -P 0 {zeros} 8k"));
            reads.push(format!("read -P {byte} {} 1536", stripe + 1000 * KIB));
            let mut fill = |at: u64, len: u64, byte: u8| expected[at as usize..(at + len) as usize].fill(byte);
            fill(at, len, byte);
            fill(zeros, 8 * KIB, 0);
            fill(stripe + 1000 * KIB, 1536, byte);
        }
        let daemon = bench.clone_of(&address).start();
        qemu_io(&daemon, &reads);
        daemon.wait_hydrated();
        daemon.stop();
        assert_same(&bench.copy(), &expected);
    }
}

/// Clients that wait, that send, that are idle, and one in another process: all have an error at once, and all can
/// connect again as soon as there is a daemon again.
#[test]
fn clients_of_a_killed_daemon_are_told_and_come_back() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 4M");
    let command = bench.clone_of(server.uri()).args("--no-hydration");
    for _ in 0..3 {
        let daemon = command.start();
        // One that waits for a source that does not answer.
        server.freeze(true);
        let mut waiting = connect(&daemon);
        let waiting = std::thread::spawn(move || waiting.ask(Verb::READ, 3 * MIB, &mut [0; 4096]));
        let mut idle = connect(&daemon);
        let (uri, mark) = (daemon.uri(), bench.path("connected"));
        let script = format!(
            r#"
h = connect()
open({mark:?}, "w").close()
deadline = time.time() + 20
try:
    while time.time() < deadline:
        h.flush()
    sys.exit("it was never told")
except nbd.Error as error:
    print(errno.errorcode.get(error.errnum, "no errno"))
"#
        );
        let other_process = std::thread::spawn(move || nbdsh(&uri, &script));
        wait_for("the other process", Duration::from_secs(20), || mark.exists());
        fs::remove_file(&mark).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        let (name, control, socket) = (daemon.name.clone(), daemon.control.clone(), daemon.socket.clone());
        daemon.kill9();
        assert!(waiting.join().unwrap().is_err());
        assert!(idle.ask(Verb::FLUSH, 0, &mut []).is_err());
        other_process.join().unwrap();
        assert!(began.elapsed() < ERROR_TIME_MAX, "{:?}", began.elapsed());
        assert!(Connection::open(&socket, &name).is_err(), "nobody is there");

        // What it left says clearly what it is, and is in nobody's way.
        assert!(socket.exists() && control.exists(), "SIGKILL leaves the sockets");
        let status = |args: &[&str]| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hydrant"));
            let output = command.env("XDG_RUNTIME_DIR", bench.runtime()).args(args).output().unwrap();
            assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]));
            String::from_utf8(output.stderr).unwrap()
        };
        let said = status(&["status", &name]);
        let expected = format!("no daemon is listening at {} any more: it ended without", control.display());
        assert!(said.contains(&expected) && said.lines().count() == 1, "{said}");
        for all in [&["status"][..], &["list"]] {
            let said = status(all);
            assert!(said.contains("no daemon is listening in") && said.lines().count() == 1, "{said}");
        }
        server.freeze(false);
    }
    let daemon = command.start();
    let mut again = connect(&daemon);
    let mut bytes = [0; 8];
    again.ask(Verb::READ, 8, &mut bytes).unwrap();
    assert_eq!(bytes, 8u64.to_be_bytes());
    daemon.stop();
    let left: Vec<_> =
        fs::read_dir(bench.runtime().join("hydrant")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Its locks go with it, even when much is in flight: the next one starts at once, and so does a tool.
#[test]
fn a_killed_daemons_files_are_free_at_once() {
    need!("nbdkit");
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    for round in 0..8u64 {
        let daemon = bench.clone_of(&source).start();
        let mut writer = connect(&daemon);
        let writer = std::thread::spawn(move || {
            let mut data = vec![5; MIB as usize];
            while (0..32).all(|at| writer.ask(Verb::WRITE, at * MIB, &mut data).is_ok()) {}
        });
        std::thread::sleep(Duration::from_millis(20 * round));
        daemon.kill9();
        let meta = bench.meta();
        match round % 2 {
            0 => {
                let words = [Path::new("meta"), Path::new("repair"), Path::new("--dry-run"), &meta];
                let said = run(env!("CARGO_BIN_EXE_hydrant"), &words);
                assert!(said.contains("nothing to repair"), "{said}");
            }
            _ => drop(bench.clone_of(&source).start().kill9()),
        }
        writer.join().unwrap();
    }
}
