//! `hydrant clone` as a process.

use super::Bench;
use super::tools::PATH;
use hydrant::control::api::Status;
use hydrant::control::client::Client;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A start takes milliseconds; this is for a machine that does ten other things.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// An orderly end, with nothing in its way.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// For a small image.
const HYDRATION_TIME_MAX: Duration = Duration::from_secs(60);

/// The program, with a runtime directory of its own.
fn hydrant(runtime: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hydrant"));
    command.env("XDG_RUNTIME_DIR", runtime).env_remove("HYDRANT_LOG").env_remove("COLUMNS").stdin(Stdio::null());
    command
}

/// Runs its arguments under a seccomp filter that makes io_uring_setup(2), number 425 everywhere, fail with EPERM.
const WITHOUT_IO_URING: &str = r#"
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0    # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, fprog, 0, 0) == 0    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.argv[1], sys.argv[1:])
"#;

/// A command line to be.
#[derive(Clone)]
pub struct CloneCommand {
    source: OsString,
    destination: PathBuf,
    metadata: PathBuf,
    name: String,
    runtime: PathBuf,
    args: Vec<OsString>,
    /// What runs it: a program and its arguments.
    wrapper: Vec<OsString>,
}

impl CloneCommand {
    pub fn new(bench: &Bench, source: &OsStr) -> Self {
        Self {
            source: source.into(),
            destination: bench.copy(),
            metadata: bench.meta(),
            name: "vm".into(),
            runtime: bench.runtime(),
            args: Vec::new(),
            wrapper: Vec::new(),
        }
    }

    pub fn source(mut self, source: impl AsRef<OsStr>) -> Self {
        self.source = source.as_ref().into();
        self
    }
    pub fn destination(mut self, path: impl AsRef<Path>) -> Self {
        self.destination = path.as_ref().into();
        self
    }
    pub fn metadata(mut self, path: impl AsRef<Path>) -> Self {
        self.metadata = path.as_ref().into();
        self
    }
    /// Another name means other sockets too.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }
    /// More arguments, separated by blanks.
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_ascii_whitespace().map(OsString::from));
        self
    }
    /// Under a limit, in the words of prlimit(1), without the privilege to exceed it.
    pub fn limit(mut self, limit: &str) -> Self {
        let before = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "prlimit", limit];
        self.wrapper = before.map(OsString::from).to_vec();
        self
    }
    /// Without root's privilege to open everything.
    pub fn unprivileged(mut self) -> Self {
        let drop = "set=-dac_override,-dac_read_search";
        let before = ["setpriv", &format!("--bounding-{drop}"), "--inh-caps=-dac_override,-dac_read_search"];
        self.wrapper = before.map(OsString::from).to_vec();
        self
    }
    /// Run by a program and its arguments.
    pub fn wrapped(mut self, words: &[&str]) -> Self {
        self.wrapper = words.iter().map(OsString::from).collect();
        self
    }
    /// Where io_uring is forbidden.
    pub fn without_io_uring(mut self) -> Self {
        self.wrapper = ["/usr/bin/python3", "-c", WITHOUT_IO_URING].map(OsString::from).to_vec();
        self
    }

    fn command(&self) -> Command {
        let mut command = hydrant(&self.runtime);
        if let Some((wrapper, args)) = self.wrapper.split_first() {
            let program = command.get_program().to_owned();
            command = Command::new(wrapper);
            command.args(args).arg(program).env("XDG_RUNTIME_DIR", &self.runtime).env("PATH", PATH);
        }
        command.args(["clone", "--name", &self.name, "--source"]).arg(&self.source);
        command.arg("--destination").arg(&self.destination).arg("--metadata").arg(&self.metadata);
        command.args(&self.args);
        command
    }

    /// Starts it and waits until it serves.
    pub fn start(&self) -> Daemon {
        let daemon = self.spawn();
        daemon.wait_log("serving NBD");
        daemon
    }

    /// Starts it.
    pub fn spawn(&self) -> Daemon {
        let dir = self.runtime.join("hydrant");
        let control = match self.args.iter().position(|arg| arg == "--control") {
            Some(at) => PathBuf::from(&self.args[at + 1]),
            None => dir.join(format!("{}.control", self.name)),
        };
        let socket = dir.join(format!("{}.sock", self.name));
        Daemon::spawn(self.command(), &self.name, socket, control, &self.runtime)
    }

    /// Runs it to its end, which must come by itself.
    pub fn output(&self) -> Output {
        let mut daemon = self.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        while daemon.try_wait().unwrap().is_none() {
            if start.elapsed() > START_TIME_MAX {
                daemon.kill().unwrap();
                let output = daemon.wait_with_output().unwrap();
                panic!("it did not end: {}", String::from_utf8_lossy(&output.stderr));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon.wait_with_output().unwrap()
    }

    /// Runs it, to be refused with exit status 1 and one line, which is returned. `words` must be in it.
    pub fn refused(&self, words: &[&str]) -> String {
        self.refused_with(1, words)
    }

    pub fn refused_with(&self, status: i32, words: &[&str]) -> String {
        let output = self.output();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "nothing is printed but the error");
        // Warnings of the log may come before it.
        let lines: Vec<&str> = said.lines().collect();
        let (last, before) = lines.split_last().unwrap_or_else(|| panic!("nothing was said"));
        let line = last.strip_prefix("hydrant: ").unwrap_or_else(|| panic!("not the program's line: {said}"));
        assert!(before.iter().all(|line| line.starts_with('[')), "more than one line: {said}");
        for word in words {
            assert!(line.contains(word), "'{word}' is not in: {line}");
        }
        line.into()
    }
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Option<Child>,
    pub name: String,
    pub socket: PathBuf,
    pub control: PathBuf,
    runtime: PathBuf,
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn spawn(mut command: Command, name: &str, socket: PathBuf, control: PathBuf, runtime: &Path) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        let streams: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stderr.take().unwrap()), Box::new(child.stdout.take().unwrap())];
        for stream in streams {
            let lines = lines.clone();
            readers.push(std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    lines.lock().unwrap().push(line);
                }
            }));
        }
        let child = Some(child);
        Daemon { child, name: name.into(), socket, control, runtime: runtime.into(), lines, readers }
    }

    /// `hydrant serve` of a file with this text.
    pub fn serve(bench: &Bench, config: &str) -> Self {
        let path = bench.path("config.toml");
        std::fs::write(&path, config).unwrap();
        Self::serve_files(bench, &[&path], &[])
    }

    /// `hydrant serve`, without waiting for anything.
    pub fn spawn_serve(bench: &Bench, files: &[&Path], args: &[&str]) -> Self {
        Self::spawn_serve_with(bench, files, args, &[])
    }

    /// With these in its environment.
    pub fn spawn_serve_with(bench: &Bench, files: &[&Path], args: &[&str], env: &[(&str, &str)]) -> Self {
        let runtime = bench.runtime();
        let mut command = hydrant(&runtime);
        command.arg("serve").args(files).args(args).envs(env.iter().copied());
        let dir = runtime.join("hydrant");
        Self::spawn(command, "daemon", dir.join("none"), dir.join("control"), &runtime)
    }

    /// `hydrant serve`, until it has a control socket. Its clones may still be starting.
    pub fn serve_files(bench: &Bench, files: &[&Path], args: &[&str]) -> Self {
        let daemon = Self::spawn_serve(bench, files, args);
        let start = Instant::now();
        // An answer, not only a connection: the kernel keeps the socket of a daemon that was killed for a moment.
        while daemon.client().status_of_all().is_err() && !daemon.has_ended() && start.elapsed() < START_TIME_MAX {
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    /// Of one of its clones.
    pub fn status_of(&self, name: &str) -> Status {
        self.client().status(&name.parse().unwrap()).unwrap_or_else(|e| panic!("status: {e}\n{}", self.log()))
    }

    /// Waits until one of its clones is as wanted.
    pub fn wait_status_of(&self, name: &str, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let start = Instant::now();
        loop {
            let status = self.status_of(name);
            if is_so(&status) {
                return status;
            }
            assert!(start.elapsed() < HYDRATION_TIME_MAX, "{what}: it stays at {status:#?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Of the export of one of its clones, at the default address.
    pub fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket_of(name).display())
    }

    /// The default address of the export of one of its clones.
    pub fn socket_of(&self, name: &str) -> PathBuf {
        self.runtime.join("hydrant").join(format!("{name}.sock"))
    }

    /// Runs the command line, which must succeed; what it prints.
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.hydrant(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the command line, which must be refused with one line; that.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.hydrant(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was not refused: {}", String::from_utf8_lossy(&output.stdout));
        let line = said.strip_prefix("hydrant: ").unwrap_or_else(|| panic!("not the program's line: {said}"));
        assert_eq!(line.trim_end().lines().count(), 1, "more than one line: {said}");
        line.trim_end().into()
    }

    /// Of its export, by the empty name.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    /// Waits for a line with these words.
    pub fn wait_log(&self, words: &str) {
        let start = Instant::now();
        while !self.lines.lock().unwrap().iter().any(|line| line.contains(words)) {
            if self.has_ended() || start.elapsed() > START_TIME_MAX {
                std::thread::sleep(Duration::from_millis(50));
                assert!(self.log().contains(words), "the daemon never said '{words}', but: {}", self.log());
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn has_ended(&self) -> bool {
        // A zombie counts; try_wait would need it mutable.
        std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))
            .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
    }

    pub fn client(&self) -> Client {
        Client::new(&self.control)
    }

    pub fn status(&self) -> Status {
        self.client().status(&self.name.parse().unwrap()).unwrap_or_else(|e| panic!("status: {e}\n{}", self.log()))
    }

    /// Waits until its status is as wanted.
    pub fn wait_status(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let start = Instant::now();
        loop {
            let status = self.status();
            if is_so(&status) {
                return status;
            }
            assert!(start.elapsed() < HYDRATION_TIME_MAX, "{what}: it stays at {status:#?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until every region is hydrated and committed.
    pub fn wait_hydrated(&self) {
        self.wait_status("hydrated", Status::is_complete);
    }

    /// Waits for an event with these words, and that it is in the log.
    pub fn wait_event(&self, words: &str) {
        self.wait_log(words);
    }

    /// Sends one of dm-clone's messages, by the command line.
    pub fn message(&self, words: &str) {
        let output = self.hydrant(&["message", &self.name]).args(words.split(' ')).output().unwrap();
        assert!(output.status.success(), "message {words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command line, in the daemon's runtime directory.
    pub fn hydrant(&self, args: &[&str]) -> Command {
        let mut command = hydrant(&self.runtime);
        command.args(args);
        command
    }

    pub fn signal(&self, signal: &str) {
        super::run("kill", &[&format!("-{signal}"), &self.pid().to_string()]);
    }

    /// SIGTERM, and an orderly end; returns the log.
    pub fn stop(mut self) -> String {
        self.signal("TERM");
        let (status, log) = self.end_within(STOP_TIME_MAX);
        assert!(status.success(), "{status}: {log}");
        assert!(!self.socket.exists() && !self.control.exists(), "sockets are removed");
        log
    }

    /// SIGKILL, at once and without waiting for its end.
    pub fn kill_now(&mut self) {
        self.child.as_mut().unwrap().kill().unwrap();
    }

    /// SIGKILL: nothing is drained, nothing committed; returns the log.
    pub fn kill9(mut self) -> String {
        self.kill_now();
        let (status, log) = self.end_within(STOP_TIME_MAX);
        assert_eq!(status.signal(), Some(9), "{log}");
        log
    }

    /// Waits for its end.
    pub fn end_within(&mut self, time_max: Duration) -> (ExitStatus, String) {
        let log = self.lines.clone();
        let child = self.child.as_mut().unwrap();
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            let text = || log.lock().unwrap().join("\n");
            assert!(start.elapsed() < time_max, "the daemon did not end within {time_max:?}: {}", text());
            std::thread::sleep(Duration::from_millis(2));
        };
        self.child = None;
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        (status, self.log())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- log of the daemon '{}':\n{}", self.name, self.log());
        }
    }
}
