//! The demo's daemon: this program again, as a child that does `hydrant clone`.

use super::place::TempDir;
use crate::bail;
use crate::config::CloneName;
use crate::control::api::{CloneRunState, Status};
use crate::control::client::Client;
use crate::error::{Error, ErrorKind, Result};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long it may take to be ready.
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end.
const END_TIME_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// How much of its log is shown when it fails, in lines.
const LOG_LINES_SHOWN: usize = 10;

/// Where things are in the demo's directory.
pub struct Paths {
    pub source: PathBuf,
    pub destination: PathBuf,
    metadata: PathBuf,
    pub nbd: PathBuf,
    control: PathBuf,
    log: PathBuf,
}

impl Paths {
    pub fn new(dir: &TempDir) -> Self {
        let at = |name| dir.path().join(name);
        Self {
            source: at("source.img"),
            destination: at("destination.img"),
            metadata: at("metadata"),
            nbd: at("nbd.sock"),
            control: at("control"),
            log: at("daemon.log"),
        }
    }
}

/// A running daemon. Killed when dropped: what it works on is thrown away then.
pub struct Daemon {
    child: Child,
    client: Client,
    name: CloneName,
    log: PathBuf,
}

impl Daemon {
    /// Starts a clone with the background copy switched off, and waits until it serves.
    pub fn start(paths: &Paths, name: &str) -> Result<Self> {
        let failed = |error: io::Error| Error::from_io(error, "can't start the daemon");
        let program = std::env::current_exe().map_err(failed)?;
        let log = File::create(&paths.log).map_err(failed)?;
        let child = Command::new(program)
            .args(["clone", "--no-hydration", "--on-hydrated", "stay", "--name", name])
            .arg("--source")
            .arg(&paths.source)
            .arg("--destination")
            .arg(&paths.destination)
            .arg("--metadata")
            .arg(&paths.metadata)
            .arg("--control")
            .arg(&paths.control)
            .arg("--nbd")
            .arg(format!("unix:{}", paths.nbd.display()))
            // The demo ends it in order; a Ctrl-C at the terminal is for the demo only.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        let name = name.parse().map_err(|error: String| Error::new(ErrorKind::Usage, error))?;
        let mut daemon = Self { child, client: Client::new(&paths.control), name, log: paths.log.clone() };
        let deadline = Instant::now() + START_TIME_MAX;
        while !daemon.status().is_ok_and(|status| status.state == CloneRunState::Running) {
            if let Some(status) = daemon.child.try_wait().map_err(failed)? {
                return Err(daemon.failure(&format!("the daemon ended at its start ({status})")));
            }
            if Instant::now() > deadline {
                return Err(daemon.failure(&format!("the daemon does not serve after {} s", START_TIME_MAX.as_secs())));
            }
            sleep(POLL);
        }
        Ok(daemon)
    }

    pub fn status(&self) -> Result<Status> {
        self.client.status(&self.name)
    }

    pub fn client(&self) -> (&Client, &CloneName) {
        (&self.client, &self.name)
    }

    /// What to say when something about the daemon went wrong: `what`, and the end of its log.
    pub fn failure(&self, what: &str) -> Error {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..] {
            eprintln!("  daemon: {line}");
        }
        Error::new(ErrorKind::Failed, what)
    }

    /// Asks it to drain, commit and exit, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        self.client.stop()?;
        let deadline = Instant::now() + END_TIME_MAX;
        let status: ExitStatus = loop {
            let ended = self.child.try_wait().map_err(|error| Error::from_io(error, "waiting for the daemon"))?;
            if let Some(status) = ended {
                break status;
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("the daemon has not ended after {} s", END_TIME_MAX.as_secs())));
            }
            sleep(POLL);
        };
        if !status.success() {
            return Err(self.failure(&format!("the daemon failed at its end ({status})")));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nothing to be done about an error: it has ended already, or can't be helped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The size of the source must have arrived.
pub fn check_size(status: &Status, source: &Path) -> Result<()> {
    let size = fs::metadata(source).map_err(|error| Error::from_io(error, source.display().to_string()))?.len();
    if status.size != size {
        bail!(Failed, "the clone has {} bytes, its source {size}", status.size);
    }
    Ok(())
}
