//! Clients that mean harm, against the real daemon: what they cost it stays within its limits (memory, descriptors, log,
//! processor), and a good client and `status` go on meanwhile. What single connections can do wrong is in
//! tests/nbd_frontend/hostile.rs.

use super::harness::*;
use hydrant::io_frontend::nbd::proto::{
    ClientOption, Command, GREETING_LEN, REQUEST_LEN, RequestHeader, SIMPLE_REPLY_LEN,
};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No answer to a good client takes longer here, on a machine that does ten other things.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

pub(super) fn unix(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Through the handshake; an error when the server closes instead.
pub(super) fn negotiate(stream: &mut impl Socket) -> std::io::Result<()> {
    stream.read_exact(&mut [0; GREETING_LEN])?;
    stream.write_all(&[&3u32.to_be_bytes()[..], &ClientOption::ExportName(String::new()).encode()].concat())?;
    stream.read_exact(&mut [0; 10])
}

pub(super) fn request(command: Command, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    RequestHeader { flags: 0, command, cookie: 7, offset, len }.encode()
}

pub(super) fn read(stream: &mut impl Socket, offset: u64, len: u32) -> std::io::Result<Vec<u8>> {
    stream.write_all(&request(Command::READ, offset, len))?;
    let mut reply = [0; SIMPLE_REPLY_LEN];
    stream.read_exact(&mut reply)?;
    assert_eq!(reply[4..8], [0; 4], "the read failed");
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok(data)
}

/// A client that reads all the time, and whose slowest read is told at its end.
struct Good {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Good {
    fn start(daemon: &Daemon, content: Vec<u8>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut stream = unix(&daemon.socket);
        negotiate(&mut stream).unwrap();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut count, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::SeqCst) {
                let start = Instant::now();
                let offset = count * 4096 % content.len() as u64;
                let data = read(&mut stream, offset, 4096).unwrap();
                assert!(data[..] == content[offset as usize..][..4096], "wrong bytes at {offset}");
                slowest = slowest.max(start.elapsed());
                count += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            (count, slowest)
        });
        Self { stop, thread }
    }

    fn end(self) -> Duration {
        self.stop.store(true, Ordering::SeqCst);
        let (count, slowest) = self.thread.join().unwrap();
        assert!(count > 0);
        println!("{}: a good client made {count} reads, the slowest took {slowest:?}", test_name());
        slowest
    }
}

/// In bytes.
pub(super) fn resident(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * KIB
}

pub(super) fn descriptors(daemon: &Daemon) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count()
}

/// Processor time so far.
pub(super) fn cpu_time(daemon: &Daemon) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
    // utime and stime, in ticks of 10 ms.
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn count_lines(log: &str, words: &str) -> usize {
    log.lines().filter(|line| line.contains(words)).count()
}

/// Nothing of what clients held is left.
pub(super) fn is_as_before(daemon: &Daemon, before: usize) {
    wait_for("the descriptors to come back", PATIENCE, || descriptors(daemon) <= before);
    assert_eq!(daemon.status().nbd.connections, 0);
}

/// As many open files for this test as it may have.
pub(super) fn many_files() {
    hydrant::environment::check_nofile(1).unwrap();
    assert!(hydrant::environment::open_files_max().unwrap() > 4000, "the test needs open files: ulimit -Hn");
}

/// 1500 clients, of which some say nothing, some shake hands and stay, and one in three goes at once.
fn thousands_of_clients<S: Socket>(daemon: &Daemon, connect: impl Fn() -> S) {
    many_files();
    daemon.wait_hydrated();
    let (before, memory) = (descriptors(daemon), resident(daemon));
    let good = Good::start(daemon, std::fs::read(daemon_source(daemon)).unwrap());
    let mut clients = Vec::new();
    for number in 0..1500 {
        let mut stream = connect();
        match number % 3 {
            // More than there may be are closed in the middle of it.
            0 => drop(negotiate(&mut stream)),
            1 => {}
            _ => continue,
        }
        clients.push(stream);
    }
    let status = daemon.status();
    assert!((500..=1024).contains(&status.nbd.connections), "{} clients of 1000", status.nbd.connections);
    clients.extend((0..600).map(|_| connect()));
    wait_for("the limit to be said", PATIENCE, || daemon.log().contains("1024 connections are open, closing another"));
    let start = Instant::now();
    assert!(daemon.status().nbd.connections <= 1024);
    assert!(start.elapsed() < PATIENCE);
    let grown = resident(daemon).saturating_sub(memory);
    // A receive buffer of 64 KiB each.
    assert!(grown < 96 * MIB, "{} KiB for 1024 clients", grown / KIB);
    assert!(good.end() < PATIENCE);
    drop(clients);
    is_as_before(daemon, before);
    let said = count_lines(&daemon.log(), "connections are open");
    assert!(said <= 10, "{said} lines in the log");
    println!("{}: {} KiB for 1024 clients, {said} lines", test_name(), grown / KIB);
}

fn daemon_source(daemon: &Daemon) -> String {
    daemon.status().source.spec
}

#[test]
fn thousands_of_clients_on_a_unix_socket() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    thousands_of_clients(&daemon, || unix(&daemon.socket));
    daemon.stop();
}

#[test]
fn thousands_of_clients_over_tcp() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let mut daemon = bench.clone_of(&source).args("--nbd tcp:127.0.0.1:0").start();
    let address = daemon.status().nbd.address.strip_prefix("tcp:").unwrap().to_owned();
    let connect = || {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    many_files();
    daemon.wait_hydrated();
    let before = descriptors(&daemon);
    let mut clients: Vec<TcpStream> = (0..2000).map(|_| connect()).collect();
    wait_for("the limit to be said", PATIENCE, || daemon.log().contains("1024 connections are open, closing another"));
    // One goes, one comes.
    clients.drain(..500);
    wait_for("a place", PATIENCE, || negotiate(&mut connect()).is_ok());
    drop(clients);
    is_as_before(&daemon, before);
    daemon.signal("TERM");
    let (status, log) = daemon.end_within(PATIENCE);
    assert!(status.success(), "{log}");
}

#[test]
fn clients_that_ask_for_all_and_take_nothing() {
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let daemon = bench.clone_of(&source).args("--shards 1").start();
    daemon.wait_hydrated();
    let (before, memory) = (descriptors(&daemon), resident(&daemon));
    let good = Good::start(&daemon, std::fs::read(&source).unwrap());
    let greedy: Vec<UnixStream> = (0..3)
        .map(|_| {
            let mut stream = unix(&daemon.socket);
            negotiate(&mut stream).unwrap();
            stream.set_nonblocking(true).unwrap();
            // As much as it takes: requests for 4 GiB of data.
            let taken = (0..1024).take_while(|_| stream.write(&request(Command::READ, 0, 4 << 20)).is_ok()).count();
            assert!(taken > 16, "only {taken} requests fit into the socket");
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(1500));
    let grown = resident(&daemon).saturating_sub(memory);
    // 64 MiB each, and what the kernel has in its buffers is not ours.
    assert!(grown < 3 * 64 * MIB + 32 * MIB, "{} MiB for three clients", grown / MIB);
    println!("{}: {} MiB for three clients", test_name(), grown / MIB);
    assert_eq!(daemon.status().nbd.connections, 4);
    assert!(good.end() < PATIENCE);
    drop(greedy);
    is_as_before(&daemon, before);
    daemon.stop();
}

#[test]
fn clients_that_die_in_the_middle_of_a_write() {
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB);
    let content = std::fs::read(&source).unwrap();
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    daemon.wait_hydrated();
    let before = descriptors(&daemon);
    let payload = vec![0xee; MIB as usize];
    for number in 0..60usize {
        let mut stream = unix(&daemon.socket);
        negotiate(&mut stream).unwrap();
        let cut = number * 17_477 % payload.len();
        let offset = number as u64 * 50_000;
        stream.write_all(&[&request(Command::WRITE, offset, MIB as u32)[..], &payload[..cut]].concat()).unwrap();
        // Gone, or half gone.
        if number % 2 == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert!(rest.is_empty(), "an answer to half a write");
        }
    }
    is_as_before(&daemon, before);
    let mut stream = unix(&daemon.socket);
    negotiate(&mut stream).unwrap();
    assert!(read(&mut stream, 0, 4 << 20).unwrap() == content, "half of a write was written");
    drop(stream);
    assert_eq!(daemon.status().io.writes, 0);
    daemon.stop();
    assert_same(&bench.copy(), &content);
}

#[test]
fn clients_that_come_and_go_without_end() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    daemon.wait_hydrated();
    let before = descriptors(&daemon);
    let mut memory = 0;
    for round in 0..3000 {
        let mut stream = unix(&daemon.socket);
        match round % 4 {
            0 => {}
            1 => stream.write_all(&3u32.to_be_bytes()).unwrap(),
            2 => negotiate(&mut stream).unwrap(),
            _ => drop(UnixStream::connect(&daemon.control).unwrap()),
        }
        if round == 1000 {
            memory = resident(&daemon);
        }
    }
    is_as_before(&daemon, before);
    let grown = resident(&daemon).saturating_sub(memory);
    assert!(grown < 16 * MIB, "2000 clients left {} KiB behind", grown / KIB);
    println!("{}: 2000 clients left {} KiB behind", test_name(), grown / KIB);
    daemon.stop();
}

/// `status` is answered, some times in a row.
fn status_answers(daemon: &Daemon, what: &str) {
    for _ in 0..3 {
        let start = Instant::now();
        daemon.status();
        assert!(start.elapsed() < Duration::from_secs(8), "{what}: status took {:?}", start.elapsed());
    }
}

#[test]
fn the_control_socket_answers_whoever_else_is_there() {
    many_files();
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 1").start();
    daemon.wait_hydrated();
    let (before, memory) = (descriptors(&daemon), resident(&daemon));
    let post = "POST /v1/clones/vm/message HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{";
    let cases: [(&str, &str, usize); 5] = [
        ("say nothing", "", 300),
        ("send half a head", "GET /v1/status HTTP/1.1\r\nX: ", 300),
        ("send half a body", post, 120),
        ("take no answer", "GET /v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n", 300),
        ("wait for events", "GET /v1/clones/vm/wait?event=9999&timeout=25 HTTP/1.1\r\nHost: x\r\n\r\n", 1000),
    ];
    for (what, text, count) in cases {
        let start = Instant::now();
        let path = daemon.control.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        // The socket's queue may be full: they come as fast as they are let in.
        let clients = std::thread::spawn(move || {
            let mut clients = Vec::new();
            while clients.len() < count && !stopped.load(Ordering::SeqCst) {
                let mut client = unix(&path);
                // One that is turned away finds a closed socket.
                let _ = client.write_all(text.as_bytes());
                clients.push(client);
            }
            clients
        });
        std::thread::sleep(Duration::from_millis(300));
        status_answers(&daemon, what);
        stop.store(true, Ordering::SeqCst);
        let clients = clients.join().unwrap();
        status_answers(&daemon, what);
        println!("{}: {} clients that {what}, {:?}", test_name(), clients.len(), start.elapsed());
    }
    // More head than any request has.
    let mut client = unix(&daemon.control);
    let _ = client.write_all(format!("GET /v1/status HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)).as_bytes());
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    let grown = resident(&daemon).saturating_sub(memory);
    assert!(grown < 64 * MIB, "{} KiB", grown / KIB);
    wait_for("the descriptors to come back", PATIENCE, || descriptors(&daemon) <= before);
    assert!(daemon.log().lines().count() < 40, "{}", daemon.log());
    daemon.stop();
}

/// Neither by their number nor by what is in them.
#[test]
fn refused_orders_do_not_fill_the_log() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).start();
    daemon.wait_hydrated();
    let before = daemon.log().len();
    let (long, body) = ("x".repeat(8000), r#"{"message": "enable_hydration"}"#);
    for index in 0..300 {
        let name = if index % 2 == 0 { &long } else { "nobody" };
        let mut client = unix(&daemon.control);
        let head = format!("POST /v1/clones/{name}/message HTTP/1.1\r\nHost: x\r\nContent-Length: {}", body.len());
        client.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }
    let log = daemon.log();
    assert!((1..=30).contains(&count_lines(&log, "nobody")) && log.len() - before < 8000, "{log}");
    daemon.stop();
}

/// A name of a file is not a line of the log, and does nothing to a terminal.
#[test]
fn names_of_files_are_one_line_everywhere() {
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let name = "d\n[2026-01-01T00:00:00Z ERROR hydrant] x\u{1b}[31m";
    let daemon = bench.clone_of(&source).destination(bench.path(name)).start();
    daemon.wait_hydrated();
    let is_plain = |text: &str| {
        !text.contains('\u{1b}') && !text.lines().any(|line| line.contains("ERROR") && !line.contains(r"\n["))
    };
    for text in [daemon.done(&["status", "vm"]), daemon.done(&["list"]), daemon.refused(&["table", "vm"])] {
        assert!(is_plain(&text), "{text:?}");
    }
    let log = daemon.log();
    daemon.stop();
    assert!(is_plain(&log) && log.contains(r"d\n["), "{log:?}");
}

#[test]
fn clients_leave_descriptors_to_the_rest() {
    need!("prlimit", "setpriv");
    many_files();
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 1").limit("--nofile=160:160").start();
    daemon.wait_hydrated();
    let before = descriptors(&daemon);
    let clients: Vec<UnixStream> = (0..300).map(|_| unix(&daemon.socket)).collect();
    wait_for("the limit to be said", PATIENCE, || {
        daemon.log().contains("the last 20 of 160 file descriptors are in use")
    });
    status_answers(&daemon, "no descriptors");
    let in_use = descriptors(&daemon);
    assert!((100..=150).contains(&in_use), "{in_use} of 160");
    assert!(count_lines(&daemon.log(), "file descriptors") <= 10, "{}", daemon.log());
    drop(clients);
    is_as_before(&daemon, before);
    daemon.stop();
}

#[test]
fn without_any_descriptor_it_neither_spins_nor_fills_the_log_and_goes_on_afterwards() {
    need!("prlimit");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 2").start();
    daemon.wait_hydrated();
    let mut good = unix(&daemon.socket);
    negotiate(&mut good).unwrap();
    let (pid, soft) = (daemon.pid().to_string(), hydrant::environment::open_files_max().unwrap());
    let set = |limit: u64| run("prlimit", &["--pid", &pid, &format!("--nofile={limit}:")]);
    set(4);
    // The accept that waits already has the limit from before: this one gets in, and is closed.
    assert!(negotiate(&mut unix(&daemon.socket)).is_err());
    // They wait in the queues of the sockets.
    let mut waiting: Vec<UnixStream> = (0..50).map(|_| unix(&daemon.socket)).collect();
    let asking = UnixStream::connect(&daemon.control).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let (cpu, lines) = (cpu_time(&daemon), daemon.log().lines().count());
    std::thread::sleep(Duration::from_secs(3));
    let spent = cpu_time(&daemon) - cpu;
    let said = daemon.log().lines().count() - lines;
    assert!(spent < Duration::from_millis(600), "{spent:?} of processor time in 3 s of waiting");
    assert!(said <= 6, "{said} lines in 3 s: {}", daemon.log());
    assert!(daemon.log().contains("Too many open files"), "{}", daemon.log());
    assert_eq!(read(&mut good, 0, 4096).unwrap(), std::fs::read(&source).unwrap()[..4096]);
    set(soft.min(1024));
    println!("{}: {spent:?} of processor time, {said} lines", test_name());
    for client in &mut waiting {
        negotiate(client).unwrap();
    }
    assert_eq!(daemon.status().nbd.connections, 51);
    drop((waiting, good, asking));
    daemon.stop();
}
