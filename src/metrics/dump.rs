//! The metrics dump: the document in a file, when SIGUSR1 asks for it and at an interval.
//!
//! Invariants:
//! * The file is replaced as a whole: whoever opens it reads one complete document, also after a crash. The new one is
//!   written beside it, as `.NAME.tmp`, made durable and renamed.
//! * One dump at a time. What asks while one runs gets one more after it; intervals that pass meanwhile are skipped.
//! * It never ends or holds up the daemon: serialising and writing have a thread of their own, and failures are logged,
//!   a burst of them by its count.
//! * Only a regular file is replaced.

use super::collect::{FrontendProbe, collect};
use super::schema::MetricsDocument;
use crate::bail;
use crate::config::MetricsDump;
use crate::error::{Error, ErrorKind, Result};
use crate::local::Notify;
use crate::local::latch::Latch;
use crate::log_limit::LogLimit;
use crate::ring::Ring;
use crate::shard::pool::ShardContext;
use futures_lite::future::or;
use std::cell::{Cell, RefCell};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// How long the end of the daemon waits for a dump that runs.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// Dumps the metrics of a daemon. On shard 0.
pub struct Dumper {
    context: Rc<ShardContext>,
    target: Option<MetricsDump>,
    frontends: FrontendProbe,
    wanted: Notify,
    stopping: Cell<bool>,
    /// Opens when [`Self::run`] has ended.
    ended: Latch,
    failures: RefCell<LogLimit>,
}

impl Dumper {
    pub fn new(context: Rc<ShardContext>, target: Option<MetricsDump>, frontends: FrontendProbe) -> Rc<Self> {
        Rc::new(Self {
            context,
            target,
            frontends,
            wanted: Notify::default(),
            stopping: Cell::new(false),
            ended: Latch::default(),
            failures: RefCell::default(),
        })
    }

    /// SIGUSR1 came.
    pub fn signalled(&self) {
        match &self.target {
            Some(_) => self.wanted.notify(),
            None => log::warn!(
                "SIGUSR1 writes the metrics to a file, but none is configured: set 'path' in [daemon.metrics_dump] \
                 ('hydrant metrics' shows them)"
            ),
        }
    }

    /// Ends [`Self::run`] after the dump that runs, if any.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.wanted.notify();
    }

    /// Waits for the dump that runs after [`Self::stop`], so that nothing of it is left; but not for ever.
    pub async fn ended(&self) {
        or(self.ended.opened(), self.context.env.sleep(END_TIME_MAX)).await;
    }

    /// Dumps whenever it is time, or asked for. One task.
    pub async fn run(self: Rc<Self>) {
        if let Some(target) = &self.target {
            self.dump_until_stopped(target).await;
        }
        self.ended.open();
    }

    async fn dump_until_stopped(&self, target: &MetricsDump) {
        let env = &self.context.env;
        let mut next = target.interval.map(|interval| env.now() + interval);
        loop {
            match next {
                Some(at) => or(self.wanted.notified(), env.sleep(at.saturating_sub(env.now()))).await,
                None => self.wanted.notified().await,
            }
            if self.stopping.get() {
                return;
            }
            if let Err(error) = self.dump(&target.path).await
                && let Some(line) = self.failures.borrow_mut().line(env.now(), &error)
            {
                log::warn!("{line}");
            }
            // From the end of this one: what is slow to write is written less often, not all the time. A signal does not
            // move the next regular one.
            if let (Some(at), Some(interval)) = (next, target.interval)
                && at <= env.now()
            {
                next = Some(env.now() + interval);
            }
        }
    }

    async fn dump(&self, path: &Path) -> Result<()> {
        let within = |error: Error| error.within(format!("metrics dump {}", path.display()));
        let document = collect(&self.context, None, self.frontends).await.map_err(within)?;
        let target = path.to_owned();
        let written = Ring::current().blocking(move || replace(&target, &document)).await;
        written.unwrap_or_else(|error| Err(Error::from_io(error, "no thread for it"))).map_err(within)
    }
}

/// Puts the document in place of what the file holds. Blocks.
fn replace(path: &Path, document: &MetricsDocument) -> Result<()> {
    let mut text = serde_json::to_vec(document)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("can't be written as JSON: {error}")))?;
    text.push(b'\n');
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => bail!(WrongType, "it is not a regular file: choose another path"),
        // What else may be wrong with it shows when it is written.
        _ => {}
    }
    let temporary = temporary_of(path)?;
    let result = write_durably(&temporary, &text).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // Nothing is left of a dump that failed, if that can be helped.
        let _ = fs::remove_file(&temporary);
    }
    result.map_err(|error| Error::from_io(error, "can't be written"))
}

fn temporary_of(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else { bail!(WrongType, "it names no file") };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".tmp");
    Ok(path.with_file_name(temporary))
}

fn write_durably(path: &Path, text: &[u8]) -> io::Result<()> {
    // What a crash has left. A new file, so that no link leads the writing elsewhere.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.write_all(text)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn document(pid: u32) -> MetricsDocument {
        let mut document = MetricsDocument::default();
        document.process.pid = pid;
        document
    }

    #[test]
    fn a_file_is_replaced_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.json");
        // Left by a crash: a link, which must not be followed.
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, dir.path().join(".metrics.json.tmp")).unwrap();
        for pid in [1, 2] {
            replace(&path, &document(pid)).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.ends_with("}\n") && text.lines().count() == 1);
            assert_eq!(serde_json::from_str::<MetricsDocument>(&text).unwrap(), document(pid));
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        for (path, words) in [
            (dir.path(), "not a regular file"),
            (link.as_path(), "not a regular file"),
            (Path::new("/"), "not a regular file"),
            (Path::new("/dev/null"), "not a regular file"),
            (Path::new("/nonexistent/metrics"), "can't be written"),
            (&file.join("metrics"), "can't be written"),
        ] {
            let error = replace(path, &document(1)).unwrap_err().to_string();
            assert!(error.contains(words), "{}: {error}", path.display());
        }
        assert!(link.is_symlink() && fs::read(&file).unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
