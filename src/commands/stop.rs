//! `hydrant stop`: asks a daemon to drain, commit and exit, and waits until it has.

use super::daemons::{client_of, only_one};
use crate::bail;
use crate::cli::StopArgs;
use crate::control::client::Client;
use crate::error::Result;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long to wait for the end of the daemon. It may have to wait for a lost source, and to flush a slow disk.
const END_TIME_MAX: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(20);

/// Returns when the daemon has ended.
pub fn run(args: &StopArgs) -> Result<()> {
    let client = match (&args.name, &args.control.control) {
        (Some(name), _) => client_of(name, &args.control),
        (None, Some(path)) => Client::new(path),
        (None, None) => only_one()?,
    };
    let statuses = client.status_of_all()?;
    if let Some(name) = &args.name {
        // So that an unknown name is told as that.
        client.status(name)?;
        if statuses.len() > 1 {
            let others = match statuses.len() - 1 {
                1 => "another clone".into(),
                more => format!("{more} other clones"),
            };
            bail!(
                Usage,
                "the daemon has {others}: 'hydrant remove {name}' ends this one, 'hydrant stop' without a \
                 name ends the daemon"
            );
        }
    }
    let used = statuses.iter().find_map(|status| {
        let ublk = status.ublk.as_ref()?;
        Some((&status.name, ublk.dm_path.as_ref().unwrap_or(&ublk.path), ublk.used_by.as_ref()?))
    });
    if let Some((name, path, user)) = used.filter(|_| !args.force) {
        bail!(
            InUse,
            "clone '{name}' is in use: {path} is {user}; end that, or use --force: {path} then waits for the next daemon of \
             the clone"
        );
    }
    let daemon = statuses.first().map(|status| Process::new(status.pid));
    client.stop()?;
    let deadline = Instant::now() + END_TIME_MAX;
    while daemon.as_ref().is_some_and(Process::runs) {
        if Instant::now() > deadline {
            let seconds = END_TIME_MAX.as_secs();
            bail!(Limit, "the daemon at {} is still draining after {seconds} s", client.path().display());
        }
        sleep(POLL);
    }
    Ok(())
}

/// A process, recognised again by its start time: its number may be given to another one.
struct Process {
    pid: u32,
    start: Option<String>,
}

impl Process {
    fn new(pid: u32) -> Self {
        Self { pid, start: start_time(pid) }
    }
    fn runs(&self) -> bool {
        self.start.is_some() && start_time(self.pid) == self.start
    }
}

/// When a process was started, by proc(5): field 22 of its `stat`; `None` when it does not run (any more), or only
/// waits for its parent as a zombie.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, with any characters in it; the third is the state.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18).map(String::from))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_when_a_process_ends() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::new(child.id());
        assert!(process.runs());
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while process.runs() {
            assert!(Instant::now() < deadline, "a zombie counts as ended");
        }
        child.wait().unwrap();
        assert!(!process.runs());
        assert!(!Process { pid: std::process::id(), start: Some("1".into()) }.runs(), "another process");
    }
}
