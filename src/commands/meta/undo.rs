//! What a tool made is taken back when it does not come to its end: at an error, and at SIGINT, SIGTERM and SIGHUP.
//!
//! A file that was created is removed, one that was empty is empty again: the next try finds what this one found. What
//! was overwritten (`--force`) can't be taken back. SIGKILL leaves what there is, which is never valid metadata.

use crate::error::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// How to take back what was done to one file.
pub enum Step {
    Remove(PathBuf),
    Empty(File),
}

impl Step {
    fn take(self) {
        // There is nobody to tell: an error or a signal is what ends the tool.
        let _ = match self {
            Step::Remove(path) => std::fs::remove_file(path),
            Step::Empty(file) => file.set_len(0),
        };
    }
}

type Shared = Arc<Mutex<Option<Step>>>;

/// Takes a step back when it is dropped, or when a signal comes, unless it was [`Undo::forget`]ed.
pub struct Undo {
    step: Shared,
}

impl Undo {
    /// Runs what makes a change and says how to take it back; a signal that comes meanwhile waits for its end.
    pub fn around<T>(change: impl FnOnce() -> Result<(T, Option<Step>)>) -> Result<(T, Self)> {
        let undo = Self { step: Shared::default() };
        watch_signals(undo.step.clone())?;
        let made = {
            let mut step = lock(&undo.step);
            let (made, how) = change()?;
            *step = how;
            made
        };
        Ok((made, undo))
    }

    /// Everything that was to be done was.
    pub fn forget(self) {
        lock(&self.step).take();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(step) = lock(&self.step).take() {
            step.take();
        }
    }
}

fn lock(step: &Shared) -> MutexGuard<'_, Option<Step>> {
    step.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that takes the step back and lets the signal do what it does otherwise. It stays: a signal that is no longer
/// watched would be ignored from then on.
fn watch_signals(step: Shared) -> Result<()> {
    let failed = |error| Error::from_io(error, "can't watch for signals");
    let ignored = ignored_signals();
    let watched = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0);
    let mut signals = Signals::new(watched).map_err(failed)?;
    let watch = move || {
        for signal in signals.forever() {
            // Held until the process is gone: it must not tell of a success any more.
            let mut step = lock(&step);
            if let Some(step) = step.take() {
                step.take();
            }
            let _ = emulate_default_handler(signal);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(watch).map(drop).map_err(failed)
}

/// The signals that whoever started this wants to be ignored (nohup), a bit each from signal 1 on; proc_pid_status(5).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
