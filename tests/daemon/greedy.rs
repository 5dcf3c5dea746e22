//! Many clients at once that ask for more memory than there is and take, or send, nothing: a modest client and `status`
//! are answered all the same, memory stays within its limits, and nothing is left when they have gone.

use super::harness::*;
use super::hostile::{cpu_time, descriptors, is_as_before, many_files, negotiate, read, request, resident, unix};
use hydrant::io_frontend::nbd::proto::{Command, SIMPLE_REPLY_LEN};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A modest client waits no longer than this for an answer.
const MODEST_TIME_MAX: Duration = Duration::from_secs(10);
/// Payload of the requests of a shard: what all connections share, and a little of each of their own. And what else
/// grows with clients and requests (receive buffers, buffers that are kept).
const SHARED: u64 = 512 * MIB;
const ELSE: u64 = 128 * MIB;

/// Sends as much as the socket takes; how much that was.
fn send_what_fits(stream: &mut UnixStream, mut bytes: &[u8]) -> usize {
    let all = bytes.len();
    stream.set_nonblocking(true).unwrap();
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("the connection was lost: {error}"),
        }
    }
    all - bytes.len()
}

fn greedy(daemon: &Daemon, count: usize, bytes: &[u8], takes_at_least: usize) -> Vec<UnixStream> {
    let one = |_| {
        let mut stream = unix(&daemon.socket);
        negotiate(&mut stream).unwrap();
        let taken = send_what_fits(&mut stream, bytes);
        assert!(taken >= takes_at_least, "only {taken} bytes fit into the socket");
        stream
    };
    (0..count).map(one).collect()
}

fn expect_done(stream: &mut UnixStream) {
    let mut reply = [0; SIMPLE_REPLY_LEN];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "the request failed");
}

/// A client that comes now writes, flushes and reads; `number` makes its content its own.
fn a_modest_client(daemon: &Daemon, number: u8) {
    let start = Instant::now();
    let mut stream = unix(&daemon.socket);
    stream.set_read_timeout(Some(MODEST_TIME_MAX)).unwrap();
    negotiate(&mut stream).unwrap();
    let (offset, content) = (u64::from(number) * 4096, vec![number; 4096]);
    stream.write_all(&[&request(Command::WRITE, offset, 4096)[..], &content].concat()).unwrap();
    expect_done(&mut stream);
    stream.write_all(&request(Command::FLUSH, 0, 0)).unwrap();
    expect_done(&mut stream);
    assert!(read(&mut stream, offset, 4096).unwrap() == content);
    println!("{}: a modest client took {:?}", test_name(), start.elapsed());
}

/// What modest clients get while the greedy ones are there, then what is left of these.
fn they_cost_the_others_nothing(daemon: &Daemon, shards: u64, greedy: impl FnOnce() -> Vec<UnixStream>) {
    many_files();
    daemon.wait_hydrated();
    let (before, memory) = (descriptors(daemon), resident(daemon));
    let greedy = greedy();
    let mut grown_max = 0;
    for number in 1..=10 {
        a_modest_client(daemon, number);
        daemon.status();
        grown_max = grown_max.max(resident(daemon).saturating_sub(memory));
        std::thread::sleep(Duration::from_millis(300));
    }
    let (cpu, start) = (cpu_time(daemon), Instant::now());
    drop(greedy);
    is_as_before(daemon, before);
    println!(
        "{}: {} MiB; {:?} and {:?} of processor time until they had gone",
        test_name(),
        grown_max / MIB,
        start.elapsed(),
        cpu_time(daemon) - cpu
    );
    assert!(grown_max < shards * SHARED + ELSE, "{} MiB", grown_max / MIB);
}

#[test]
fn readers_that_take_nothing_cost_the_others_nothing() {
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    let daemon = bench.clone_of(&source).args("--shards 1").start();
    let reads = request(Command::READ, 0, 4 << 20).repeat(290);
    they_cost_the_others_nothing(&daemon, 1, || greedy(&daemon, 20, &reads, 100 * 28));
    daemon.stop();
}

#[test]
fn readers_of_the_largest_requests_cost_the_others_nothing() {
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let daemon = bench.clone_of(&source).args("--shards 1").start();
    let reads = request(Command::READ, 0, 32 << 20).repeat(200);
    they_cost_the_others_nothing(&daemon, 1, || greedy(&daemon, 150, &reads, 100 * 28));
    daemon.stop();
}

#[test]
fn writers_that_stop_cost_the_others_nothing() {
    let bench = Bench::new();
    let source = bench.random("source", 32 * MIB);
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    let half = [&request(Command::WRITE, 0, 32 << 20)[..], &[0xee; 100_000]].concat();
    they_cost_the_others_nothing(&daemon, 2, || greedy(&daemon, 40, &half, half.len()));
    let content = std::fs::read(&source).unwrap();
    let mut stream = unix(&daemon.socket);
    negotiate(&mut stream).unwrap();
    let after = 11 * 4096;
    assert!(read(&mut stream, after, 8 << 20).unwrap() == content[after as usize..][..8 << 20], "half of a write");
    drop(stream);
    daemon.stop();
}
