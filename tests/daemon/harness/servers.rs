//! nbdkit as a source: stopped, killed and started again at will, on one socket.

use super::Bench;
use super::tools::{PATH, wait_for};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// One nbdkit server and its address.
pub struct Nbdkit {
    socket: PathBuf,
    port: Option<u16>,
    pid_file: PathBuf,
    env: Vec<(String, PathBuf)>,
    child: Option<Child>,
}

impl Nbdkit {
    /// On a unix socket; `args` as on its command line, separated by blanks.
    pub fn start(bench: &Bench, args: &str) -> Self {
        Self::start_with(bench, args, &[])
    }

    /// With variables in its environment, which its plugin may look at.
    pub fn start_with(bench: &Bench, args: &str, env: &[(&str, &Path)]) -> Self {
        let mut server = Self::at(bench, None);
        server.env = env.iter().map(|(name, value)| (name.to_string(), value.into())).collect();
        server.again(args);
        server
    }

    fn at(bench: &Bench, port: Option<u16>) -> Self {
        let (socket, pid_file) = (bench.socket("source"), bench.socket("source.pid"));
        Self { socket, port, pid_file, env: Vec::new(), child: None }
    }

    /// On a port of 127.0.0.1.
    pub fn start_tcp(bench: &Bench, args: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self::at(bench, Some(port));
        server.again(args);
        server
    }

    /// Starts it again at the same address, perhaps as another server.
    pub fn again(&mut self, args: &str) {
        self.kill();
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["-f", "--exit-with-parent", "-P"]).arg(&self.pid_file);
        match self.port {
            Some(port) => nbdkit.args(["-i", "127.0.0.1", "-p", &port.to_string()]),
            None => nbdkit.arg("-U").arg(&self.socket),
        };
        nbdkit.args(args.split_ascii_whitespace()).stdin(Stdio::null());
        nbdkit.env("PATH", PATH).envs(self.env.iter().map(|(name, value)| (name, value)));
        // Its chatter about clients that went away helps nobody.
        self.child = Some(nbdkit.stderr(Stdio::null()).spawn().unwrap());
        // It writes the file when it is ready to accept.
        wait_for(&format!("nbdkit {args}"), Duration::from_secs(10), || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "nbdkit {args}: {ended:?}");
            self.pid_file.exists()
        });
        if let Some(port) = self.port {
            wait_for("nbdkit's port", Duration::from_secs(10), || TcpStream::connect(("127.0.0.1", port)).is_ok());
        }
    }

    /// At once, without a goodbye.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.pid_file);
    }

    /// False when it has ended by itself, too.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// Stops it without closing its connections, or lets it go on: a source that hangs.
    pub fn freeze(&self, freeze: bool) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        super::run("kill", &[if freeze { "-STOP" } else { "-CONT" }, &pid]);
        // The signal is on its way: every thread must have had it.
        let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let is_stopped = |stat: String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
        let all_stopped =
            || threads().all(|thread| std::fs::read_to_string(thread.path().join("stat")).is_ok_and(is_stopped));
        if freeze {
            super::wait_for("the server stops", std::time::Duration::from_secs(10), all_stopped);
        }
    }

    pub fn uri(&self) -> String {
        match self.port {
            Some(port) => format!("nbd://127.0.0.1:{port}"),
            None => format!("nbd+unix:///?socket={}", self.socket.display()),
        }
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        self.kill();
    }
}

/// qemu-nbd, read-only, until it is dropped.
pub struct QemuNbd {
    socket: PathBuf,
    child: Child,
}

impl QemuNbd {
    pub fn start(bench: &Bench, args: &[&str]) -> Self {
        let socket = bench.socket("qemu");
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--read-only", "-k"]).arg(&socket).args(args);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        wait_for("qemu-nbd", Duration::from_secs(10), || socket.exists());
        // It listens a moment after its socket has a name.
        wait_for("qemu-nbd", Duration::from_secs(10), || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        Self { socket, child }
    }
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
