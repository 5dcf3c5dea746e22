//! A server on its own executor with a volume in memory, and ways to be its client.

use bytes::Bytes;
use hydrant::env::Env;
use hydrant::env::glommio::GlommioEnv;
use hydrant::error::{Error, ErrorKind, Result};
use hydrant::io_frontend::nbd::listen::{NbdAddress, bind, configure_accepted};
use hydrant::io_frontend::nbd::{ConnectionStats, Exports, Limits, Memory, Served, serve};
use hydrant::io_frontend::request::{
    Allocation, Completion, LocalBoxFuture, Request, RequestFlags, StatusExtents, Volume, VolumeInfo, push_extent,
};
use hydrant::local::latch::Latch;
use hydrant::net::{Listener, Stream};
use hydrant::ring::Ring;
use hydrant::units::ByteRange;
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Regions of the volume's `hydrated` answer; every third is hydrated.
pub const REGION: u64 = 64 << 10;
/// Reads of this one offset fail.
pub const BAD_OFFSET: u64 = 13 << 10;

/// What the volume was asked, in order: "write 512+10 FUA".
pub type Log = Arc<Mutex<Vec<String>>>;

#[derive(Clone)]
pub struct Setup {
    pub size: u64,
    /// Each request takes so long.
    pub delay: Duration,
    pub limits: Limits,
    /// Of all connections together, in bytes.
    pub memory: u64,
    pub tcp: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { size: (1 << 20) + 777, delay: Duration::ZERO, limits: Limits::default(), memory: 256 << 20, tcp: false }
    }
}

struct MemoryVolume {
    data: RefCell<Vec<u8>>,
    delay: Duration,
    log: Log,
    /// The blocks a hole was punched into; status reports them.
    holes: RefCell<Vec<bool>>,
    in_flight: Cell<u64>,
    in_flight_max: Arc<Mutex<u64>>,
}

impl MemoryVolume {
    fn apply(&self, request: Request) -> Result<Completion> {
        let mut data = self.data.borrow_mut();
        let mut holes = self.holes.borrow_mut();
        let size = data.len() as u64;
        let span = |range: ByteRange| {
            assert!(range.end() <= size, "the frontend let {range} through");
            range.start() as usize..range.end() as usize
        };
        Ok(match request {
            Request::Read(range) if range.start() == BAD_OFFSET => {
                return Err(Error::io(5, format!("destination mem: {range}")));
            }
            Request::Read(range) => {
                let bytes = &data[span(range)];
                // In two parts, to show that parts are put together.
                let (a, b) = bytes.split_at(bytes.len() / 3);
                Completion::Data(vec![Bytes::copy_from_slice(a), Bytes::copy_from_slice(b)])
            }
            Request::Write { offset, data: payload, .. } => {
                assert_eq!(payload.as_ptr() as u64 % 4096, offset % 4096, "the payload is not placed for its offset");
                let range = ByteRange::new(offset, payload.len() as u64).unwrap();
                data[span(range)].copy_from_slice(&payload);
                for block in range.start() / 4096..=(range.end() - 1) / 4096 {
                    holes[block as usize] = false;
                }
                Completion::Done
            }
            Request::Flush | Request::Cache(_) => Completion::Done,
            Request::WriteZeroes { flags, .. } if flags.contains(RequestFlags::FAST_ZERO | RequestFlags::NO_HOLE) => {
                return Err(Error::new(ErrorKind::NotSupported, "mem: no fast way to zero without a hole"));
            }
            Request::WriteZeroes { range, .. } | Request::Trim { range, .. } => {
                data[span(range)].fill(0);
                if let Some(inner) = range.aligned_inward(4096) {
                    holes[(inner.start() / 4096) as usize..(inner.end() / 4096) as usize].fill(true);
                }
                Completion::Done
            }
            Request::Status(range) => {
                span(range);
                let mut status = StatusExtents::default();
                for piece in range.split_at_multiples(4096) {
                    let state =
                        if holes[(piece.start() / 4096) as usize] { Allocation::HOLE } else { Allocation::DATA };
                    push_extent(&mut status.allocation, piece.len(), state);
                    push_extent(&mut status.hydrated, piece.len(), (piece.start() / REGION).is_multiple_of(3));
                }
                Completion::Status(status)
            }
        })
    }
}

fn describe(request: &Request) -> String {
    match request {
        Request::Read(range) => format!("read {range:?}"),
        Request::Write { offset, data, flags } => {
            format!("write {offset}..{} {flags:?}", offset + data.len() as u64)
        }
        Request::Flush => "flush".into(),
        Request::Trim { range, flags } => format!("trim {range:?} {flags:?}"),
        Request::WriteZeroes { range, flags } => format!("zero {range:?} {flags:?}"),
        Request::Cache(range) => format!("cache {range:?}"),
        Request::Status(range) => format!("status {range:?}"),
    }
    .replace("RequestFlags(", "")
    .replace(')', "")
}

impl Volume for MemoryVolume {
    fn info(&self) -> VolumeInfo {
        VolumeInfo { name: "disk".into(), size: self.data.borrow().len() as u64, preferred_block: 4096 }
    }
    fn submit(self: Rc<Self>, request: Request) -> LocalBoxFuture<'static, Result<Completion>> {
        Box::pin(async move {
            self.log.lock().unwrap().push(describe(&request));
            self.in_flight.set(self.in_flight.get() + 1);
            {
                let mut max = self.in_flight_max.lock().unwrap();
                *max = (*max).max(self.in_flight.get());
            }
            if !self.delay.is_zero() {
                Ring::current().sleep(self.delay).await;
            }
            self.in_flight.set(self.in_flight.get() - 1);
            self.apply(request)
        })
    }
}

struct One(Rc<MemoryVolume>);

impl Exports for One {
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>> {
        ["", "disk"].contains(&name).then(|| self.0.clone() as Rc<dyn Volume>)
    }
    fn list(&self) -> Vec<VolumeInfo> {
        vec![self.0.info()]
    }
}

impl Served for One {}

/// A running server; [`Server::stop`] is graceful and checks that nothing was left behind.
pub struct Server {
    pub address: NbdAddress,
    pub log: Log,
    /// How each connection ended, in order.
    pub ended: Arc<Mutex<Vec<Result<(), String>>>>,
    pub in_flight_max: Arc<Mutex<u64>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Totals>>,
    _dir: tempfile::TempDir,
}

/// What the server counted.
#[derive(Debug, PartialEq, Eq)]
pub struct Totals {
    pub accepted: u64,
    pub dropped: u64,
    pub errors: u64,
}

impl Server {
    pub fn start(setup: Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = if setup.tcp { "tcp:127.0.0.1:0".parse().unwrap() } else { unix(dir.path().join("nbd.sock")) };
        let bound = bind(&address).unwrap().unwrap();
        let address = bound.address.clone();
        let (log, ended, stop) = (Log::default(), Arc::default(), Arc::new(AtomicBool::new(false)));
        let in_flight_max = Arc::new(Mutex::new(0));
        let shared = (log.clone(), Arc::clone(&ended), stop.clone(), in_flight_max.clone(), address.clone());
        let thread = std::thread::spawn(move || {
            glommio::LocalExecutorBuilder::default().io_memory(1 << 20).make().unwrap().run(async move {
                let (log, ended, stop, in_flight_max, address) = shared;
                let ring = Ring::start().unwrap();
                let volume = Rc::new(MemoryVolume {
                    data: RefCell::new(vec![0; setup.size as usize]),
                    delay: setup.delay,
                    log,
                    holes: RefCell::new(vec![true; setup.size.div_ceil(4096) as usize]),
                    in_flight: Cell::new(0),
                    in_flight_max,
                });
                let stats = Rc::new(ConnectionStats::default());
                accept_all(bound.fd, address, volume.clone(), &setup, stats.clone(), stop, ended).await;
                assert_eq!((stats.connections.get(), stats.in_flight.get()), (0, 0));
                assert_eq!(volume.in_flight.get(), 0, "serve returned before its requests ended");
                assert_eq!(Rc::strong_count(&volume), 1, "a connection was not freed");
                ring.shutdown().await;
                drop(bound.guard);
                Totals { accepted: stats.accepted.get(), dropped: stats.dropped.get(), errors: stats.errors.get() }
            })
        });
        Self { address, log, ended, in_flight_max, stop, thread: Some(thread), _dir: dir }
    }

    /// Graceful stop; what was counted.
    pub fn stop(mut self) -> Totals {
        self.request_stop();
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Waits until `count` connections have ended; how they did.
    pub fn wait_ended(&self, count: usize) -> Vec<Result<(), String>> {
        wait_for(|| self.ended.lock().unwrap().len() >= count, "connections to end");
        self.ended.lock().unwrap().clone()
    }

    /// The last connection to end broke the protocol in a way that `text` names.
    pub fn assert_dropped(&self, count: usize, text: &str) {
        let ended = self.wait_ended(count);
        let error = ended.last().unwrap().clone().expect_err("the connection should have been dropped");
        assert!(error.contains(text), "'{error}' does not name '{text}'");
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub fn uri(&self, export: &str) -> String {
        match &self.address {
            NbdAddress::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            NbdAddress::None => unreachable!("a server listens"),
            NbdAddress::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    /// A bare socket, with timeouts so that no test hangs.
    pub fn connect(&self) -> UnixStream {
        let NbdAddress::Unix(path) = &self.address else { panic!("not a unix socket") };
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.request_stop();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap();
            }
        }
    }
}

async fn accept_all(
    fd: std::os::fd::OwnedFd,
    address: NbdAddress,
    volume: Rc<MemoryVolume>,
    setup: &Setup,
    stats: Rc<ConnectionStats>,
    stop: Arc<AtomicBool>,
    ended: Arc<Mutex<Vec<Result<(), String>>>>,
) {
    let env: Rc<dyn Env> = Rc::new(GlommioEnv::new());
    let latch = Rc::new(Latch::default());
    let listener = Rc::new(Listener::new(fd));
    let exports: Rc<dyn Served> = Rc::new(One(volume));
    let (watch_latch, watch_listener) = (latch.clone(), listener.clone());
    let watcher = glommio::spawn_local(async move {
        while !stop.load(Ordering::SeqCst) {
            Ring::current().sleep(Duration::from_millis(2)).await;
        }
        watch_latch.open();
        watch_listener.close();
    });
    let mut tasks = Vec::new();
    let memory = Memory::new(setup.memory);
    while let Ok(fd) = listener.accept().await {
        let stream = Stream::new(configure_accepted(fd, &address).unwrap());
        let (exports, env, stats, latch) = (exports.clone(), env.clone(), stats.clone(), latch.clone());
        let (ended, limits, memory) = (ended.clone(), setup.limits, memory.clone());
        tasks.push(glommio::spawn_local(async move {
            let result = serve(stream, exports, env, limits, memory, stats, latch).await;
            ended.lock().unwrap().push(result.map_err(|error| error.to_string()));
        }));
    }
    for task in tasks {
        task.await;
    }
    watcher.await;
}

pub fn unix(path: PathBuf) -> NbdAddress {
    NbdAddress::Unix(path)
}

pub fn wait_for(condition: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A program with the system's own Python first, which has the libnbd module.
fn system(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program);
    command.env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Whether `program` is installed; prints that the test is skipped when it is not.
pub fn have(program: &str) -> bool {
    let found = system(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("SKIPPED: {program} is not installed");
    }
    found
}

/// Runs a program; what it printed, when it succeeded.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = system(program).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{program} {arguments:?}:\n{out}{err}")) }
}

/// Runs a script in nbdsh, with `uri` and `uri_for(export)` set; it fails by raising.
pub fn nbdsh(server: &Server, script: &str) {
    let prelude = format!(
        "uri = {:?}\nimport errno\n\
         def fails(number, call, *args, **kwargs):\n    \
             try:\n        call(*args, **kwargs)\n    \
             except nbd.Error as error:\n        assert number in (None, error.errnum), (error.errnum, number, error.string)\n        return\n    \
             raise AssertionError('should have failed: %r%r' % (call, args))\n",
        server.uri("disk")
    );
    if let Err(error) = run("nbdsh", &["-c", &prelude, "-c", script]) {
        panic!("{}", error.split_once("]:\n").map_or(&*error, |(_, output)| output));
    }
}

/// Reads and checks the greeting, answers with `flags`.
pub fn greet(stream: &mut UnixStream, flags: u32) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&flags.to_be_bytes()).unwrap();
}

/// Whether the server ends the stream (with or without a reset) after whatever it still sends.
pub fn assert_closed(stream: &mut UnixStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}
