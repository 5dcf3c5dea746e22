//! Servers as child processes: killed when their guard is dropped, and with this process.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// splitmix64: the same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Less than `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A file of random content, with a hole over each of `holes`; returns its content.
pub fn make_disk(path: &Path, size: usize, holes: &[std::ops::Range<usize>]) -> Vec<u8> {
    let mut random = Random(size as u64);
    let mut content: Vec<u8> = (0..size.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    content.truncate(size);
    let file = File::create(path).unwrap();
    file.set_len(size as u64).unwrap();
    for hole in holes {
        content[hole.clone()].fill(0);
    }
    for (index, block) in content.chunks(4096).enumerate() {
        if block.iter().any(|b| *b != 0) {
            file.write_all_at(block, index as u64 * 4096).unwrap();
        }
    }
    content
}

/// A directory with a disk file and a socket, and perhaps a server.
pub struct Server {
    dir: TempDir,
    child: Option<Child>,
}

/// Whether the program is there; says so when it is not, because the test then tests nothing.
pub fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        eprintln!("SKIPPED {test}: {program} is not installed");
    }
    found
}

impl Server {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), child: None }
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn socket(&self) -> PathBuf {
        self.path("s")
    }
    pub fn disk(&self) -> PathBuf {
        self.path("disk")
    }
    pub fn uri(&self) -> String {
        self.uri_of("")
    }
    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Starts nbdkit on the socket; `@` in an argument is the disk file.
    pub fn nbdkit(&mut self, args: &[&str]) {
        let socket = self.socket();
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent", "-U"]).arg(&socket);
        self.start(command, args);
    }

    /// Starts nbdkit on a port of 127.0.0.1, which it returns.
    pub fn nbdkit_tcp(&mut self, args: &[&str]) -> u16 {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port.to_string()]);
        self.spawn(command, args);
        wait_for(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        port
    }

    /// Starts `qemu-nbd` on the socket.
    pub fn qemu_nbd(&mut self, args: &[&str]) {
        let socket = self.socket();
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--read-only", "--format=raw", "-k"]).arg(&socket);
        self.start(command, args);
    }

    fn start(&mut self, command: Command, args: &[&str]) {
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        self.spawn(command, args);
        // A connection would count as a client: look only.
        wait_for(|| socket.exists());
        std::thread::sleep(Duration::from_millis(20));
    }

    fn spawn(&mut self, mut command: Command, args: &[&str]) {
        self.kill();
        let disk = self.disk();
        command.args(args.iter().map(|arg| arg.replace('@', disk.to_str().unwrap())));
        self.child = Some(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    }

    /// At once and without a goodbye.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it (SIGSTOP) or lets it go on (SIGCONT).
    pub fn freeze(&self, freeze: bool) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        let signal = if freeze { "-STOP" } else { "-CONT" };
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        // Its threads stop one by one.
        std::thread::sleep(Duration::from_millis(30));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn wait_for(ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(10), "the server does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A scripted server in a thread: `script` gets every connection in turn, with its number.
pub struct Scripted {
    dir: TempDir,
}

impl Scripted {
    pub fn new(script: impl Fn(usize, UnixStream) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let script = std::sync::Arc::new(script);
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (Ok(stream), script) = (stream, script.clone()) else { return };
                // An error is the client hanging up, which is what many of the scripts provoke.
                std::thread::spawn(move || script(number, stream));
            }
        });
        Self { dir }
    }
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.dir.path().join("s").display())
    }
}

/// Reads exactly `N` bytes.
pub fn receive<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub fn send(stream: &mut UnixStream, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
    stream.write_all(bytes.as_ref())
}
