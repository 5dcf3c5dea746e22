//! A file whose reads, writes and flushes fail at will: an NBD server in Python behind nbdfuse.
//!
//! It has a volatile cache, as disks have: what was written is durable after a flush that succeeded, and lost for good
//! after one that failed, although later ones succeed again.

use super::Bench;
use super::tools::{PATH, run, run_for_status, wait_for};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The time for a server to be there.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// A directory has the faults: a file `write` with `EIO` lets all writes fail, with `ENOSPC 65536 131072` those that touch
/// these bytes; with `STALL` they wait until it is gone.
const PLUGIN: &str = r#"
import builtins, errno, nbdkit, os, threading, time
API_VERSION = 2
backing = os.open(os.environ["BACKING"], os.O_RDWR)
size = os.fstat(backing).st_size
memory = bytearray(os.pread(backing, size, 0))
assert len(memory) == size
dirty = []
turn = threading.Lock()
def fault(what, start=0, end=0):
    while True:
        try:
            with builtins.open(os.environ["FAULTS"] + "/" + what) as file:
                code, *place = file.read().split()
        except FileNotFoundError:
            return
        if place and not (start < int(place[1]) and int(place[0]) < end):
            return
        if code != "STALL":
            nbdkit.set_error(getattr(errno, code))
            raise RuntimeError(what)
        time.sleep(0.01)
def open(readonly): return 1
def get_size(h): return size
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def pread(h, buf, offset, flags):
    fault("read", offset, offset + len(buf))
    buf[:] = memory[offset:offset + len(buf)]
def store(offset, data):
    fault("write", offset, offset + len(data))
    with turn:
        memory[offset:offset + len(data)] = data
        dirty.append((offset, len(data)))
def pwrite(h, buf, offset, flags): store(offset, bytes(buf))
def can_zero(h): return True
def zero(h, count, offset, flags): store(offset, bytes(count))
def can_trim(h): return True
def trim(h, count, offset, flags): store(offset, bytes(count))
def can_flush(h): return True
def flush(h, flags):
    try:
        fault("flush")
    except RuntimeError:
        with turn:
            for offset, length in dirty:
                memory[offset:offset + length] = os.pread(backing, length, offset)
            dirty.clear()
        raise
    with turn:
        for offset, length in dirty:
            os.pwrite(backing, memory[offset:offset + length], offset)
        dirty.clear()
"#;

/// See the head of this file.
pub struct FaultyFile {
    pub path: PathBuf,
    /// What is durable.
    pub backing: PathBuf,
    faults: PathBuf,
    socket: PathBuf,
    server: Child,
    fuse: Child,
}

impl FaultyFile {
    /// What [`super::need`] is to be asked for.
    pub fn new(bench: &Bench, name: &str, size: u64) -> Self {
        let backing = bench.hole(&format!("{name}.backing"), size);
        let faults = bench.path(&format!("{name}.faults"));
        fs::create_dir(&faults).unwrap();
        let plugin = bench.path(&format!("{name}.py"));
        fs::write(&plugin, PLUGIN).unwrap();
        let (socket, pid_file) = (bench.socket(&format!("{name}.nbd")), bench.socket(&format!("{name}.pid")));
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["-f", "--exit-with-parent", "-P"]).arg(&pid_file).arg("-U").arg(&socket).arg("python");
        nbdkit.arg(&plugin).env("PATH", PATH).env("BACKING", &backing).env("FAULTS", &faults);
        // It tells of every fault.
        let server = nbdkit.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("nbdkit", START_TIME_MAX, || pid_file.exists());

        let path = bench.hole(name, 0);
        let fuse = mount(&path, &socket);
        Self { path, backing, faults, socket, server, fuse }
    }

    /// From now on `what` (`read`, `write`, `flush`) fails with the errno of this name, everywhere or where `code` says.
    pub fn fail(&self, what: &str, code: &str) {
        // In one step: the server looks at any time.
        let new = self.faults.join("new");
        fs::write(&new, code).unwrap();
        fs::rename(&new, self.faults.join(what)).unwrap();
    }

    /// Everything works again.
    pub fn heal(&self) {
        for what in ["read", "write", "flush"] {
            let _ = fs::remove_file(self.faults.join(what));
        }
    }

    /// The disk is gone, as one that was pulled out: what has it open gets ENOTCONN for everything.
    pub fn pull(&mut self) {
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }

    /// It is there again, after [`Self::pull`].
    pub fn plug(&mut self) {
        run("umount", &[Path::new("-l"), &self.path]);
        self.fuse = mount(&self.path, &self.socket);
    }
}

fn mount(path: &Path, socket: &Path) -> Child {
    // It must not outlive a test that is killed.
    let mut nbdfuse = Command::new("setpriv");
    nbdfuse.args(["--pdeathsig", "KILL", "nbdfuse"]).arg(path).env("PATH", PATH);
    nbdfuse.arg(format!("nbd+unix:///?socket={}", socket.display()));
    let fuse = nbdfuse.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Empty is the file that it is mounted on.
    wait_for("nbdfuse", START_TIME_MAX, || fs::metadata(path).is_ok_and(|stat| stat.len() > 0));
    fuse
}

impl Drop for FaultyFile {
    fn drop(&mut self) {
        self.heal();
        run_for_status("umount", &[Path::new("-l"), &self.path]);
        self.pull();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
