//! What every test here stands on: a bench (directories and images), a daemon, servers, devices, tools.

mod daemon;
mod devices;
mod faulty;
mod images;
mod servers;
mod tools;
pub mod vm;

pub use daemon::{CloneCommand, Daemon};
pub use devices::{FileSystem, Loop};
pub use faulty::FaultyFile;
pub use images::{Random, allocated, assert_same, assert_same_files, checksums, pattern, random_bytes, read_first};
pub use servers::{Nbdkit, QemuNbd};
pub use tools::{have, nbdsh, run, run_for_status, wait_for};

use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// The directories of one test: data on the disk of the build (never in memory: direct I/O is to be tested), sockets
/// where their paths are short.
pub struct Bench {
    data: TempDir,
    sockets: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let data = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { data, sockets: tempfile::tempdir().unwrap() }
    }

    pub fn dir(&self) -> &Path {
        self.data.path()
    }
    /// A path in the data directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }
    /// A path that is short enough for a socket.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// The daemons' runtime directory.
    pub fn runtime(&self) -> PathBuf {
        self.sockets.path().into()
    }

    /// A file of random bytes.
    pub fn random(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, random_bytes(size, size)).unwrap();
        path
    }
    /// A file with one byte over and over.
    pub fn filled(&self, name: &str, size: u64, byte: u8) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, vec![byte; size as usize]).unwrap();
        path
    }
    /// A file that is all a hole.
    pub fn hole(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// `hydrant clone` of a source to the files `copy` and `meta` of this bench.
    pub fn clone_of(&self, source: impl AsRef<std::ffi::OsStr>) -> CloneCommand {
        CloneCommand::new(self, source.as_ref())
    }

    pub fn copy(&self) -> PathBuf {
        self.path("copy")
    }
    pub fn meta(&self) -> PathBuf {
        self.path("meta")
    }
}

/// The name of the running test.
pub fn test_name() -> String {
    std::thread::current().name().unwrap_or("?").to_owned()
}

/// Says that a test did not run, and why; where everything is to be tested (CI) that is a failure.
pub fn skip(why: &str) {
    let line = format!("SKIPPED {}: {why}", test_name());
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{line}, but CI tests everything");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("HYDRANT_TEST_SKIPS") {
        use std::io::Write;
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    }
}

/// Ends the test, saying so, unless all these programs are there; `root` and `loop` may be among them.
macro_rules! need {
    ($($what:literal),+ $(,)?) => {
        $(if let Err(why) = $crate::harness::have($what) {
            $crate::harness::skip(&why);
            return;
        })+
    };
}
pub(crate) use need;
