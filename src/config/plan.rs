//! From configuration files to what a daemon is to run, and what is wrong between clones that are each right.

use super::fault::Fault;
use super::file::{Contents, Located, Place, Problem, read_file};
use super::same_file::resolved;
use super::spec::{CloneSpec, DaemonSpec};
use super::{CloneConfig, DaemonConfig, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::runtime_dir::RuntimeDir;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::path::{Path, PathBuf};

/// How many problems are kept; the rest is counted.
pub const PROBLEMS_MAX: usize = 100;

/// Everything that is wrong in some files; not empty.
#[derive(Debug)]
pub struct Problems {
    /// In the order of the files and their lines, at most [`PROBLEMS_MAX`].
    pub lines: Vec<String>,
    /// How many more there are.
    pub more: usize,
    kind: ErrorKind,
}

impl Problems {
    fn of_error(error: &Error) -> Self {
        Self { lines: vec![error.to_string()], more: 0, kind: error.kind() }
    }

    fn new(problems: Vec<String>) -> Self {
        let more = problems.len().saturating_sub(PROBLEMS_MAX);
        Self { lines: problems.into_iter().take(PROBLEMS_MAX).collect(), more, kind: ErrorKind::Config }
    }

    pub fn count(&self) -> usize {
        self.lines.len() + self.more
    }
}

/// The first one, and how many there are.
impl From<Problems> for Error {
    fn from(problems: Problems) -> Self {
        let more = match problems.count() {
            0 | 1 => String::new(),
            count => format!(" (and {} more: see 'hydrant config check')", count - 1),
        };
        Self::new(problems.kind, problems.lines.into_iter().next().unwrap_or_default() + &more)
    }
}

/// What `hydrant serve` is to run by these files.
pub fn plan(files: &[PathBuf], dry_run: bool, dir: &RuntimeDir) -> Result<Plan> {
    check(files, dry_run, dir).map_err(Error::from)
}

/// The clones of a file for `hydrant create`; paths are absolute. A `[daemon]` is refused: it runs already.
pub fn clones(file: &Path, dir: &RuntimeDir) -> Result<Vec<CloneSpec>> {
    let mut problems = Vec::new();
    let contents = read_file(file, &mut problems)?;
    if let Some(daemon) = &contents.daemon {
        let text = "the daemon runs already: only [[clone]] can be created";
        problems.push(daemon.problem(&Fault::new(text)));
    }
    let mut clones = Vec::new();
    for clone in &contents.clones {
        clones.extend(config_of(clone, dir, &mut problems).map(|config| Named { config, located: clone }));
    }
    problems.extend(conflicts(&clones, None));
    finish(problems)?;
    Ok(contents.clones.into_iter().map(|clone| clone.spec).collect())
}

/// As [`plan`], with every problem.
pub fn check(files: &[PathBuf], dry_run: bool, dir: &RuntimeDir) -> std::result::Result<Plan, Problems> {
    let mut problems = Vec::new();
    let mut read = Vec::new();
    for file in files {
        read.push(read_file(file, &mut problems).map_err(|error| Problems::of_error(&error))?);
    }
    merge(&read, dry_run, dir, problems)
}

fn merge(
    files: &[Contents],
    dry_run: bool,
    dir: &RuntimeDir,
    mut problems: Vec<Problem>,
) -> std::result::Result<Plan, Problems> {
    let mut daemons = files.iter().filter_map(|file| file.daemon.as_ref());
    let first = daemons.next();
    for another in daemons {
        let place = first.map(|daemon| daemon.place("").to_string()).unwrap_or_default();
        problems.push(another.problem(&Fault::new(format!("there is a [daemon] at {place} already"))));
    }
    let daemon = match first.map(|daemon| (daemon, daemon.spec.clone().into_config(dir))) {
        Some((daemon, Err(faults))) => {
            problems.extend(daemon.problems(&faults));
            None
        }
        Some((_, Ok(config))) => Some(config),
        None => Some(DaemonConfig::new(dir.daemon_control_socket())),
    };
    let mut clones = Vec::new();
    for clone in files.iter().flat_map(|file| &file.clones) {
        clones.extend(config_of(clone, dir, &mut problems).map(|config| Named { config, located: clone }));
    }
    problems.extend(conflicts(&clones, daemon.as_ref().map(|config| (config, first))));
    finish(problems)?;
    let daemon = daemon.unwrap_or_else(|| DaemonConfig::new(dir.daemon_control_socket()));
    Ok(Plan { daemon, clones: clones.into_iter().map(|clone| clone.config).collect(), dry_run })
}

/// A clone of a file that is right by itself.
struct Named<'a> {
    config: CloneConfig,
    located: &'a Located<CloneSpec>,
}

fn config_of(clone: &Located<CloneSpec>, dir: &RuntimeDir, problems: &mut Vec<Problem>) -> Option<CloneConfig> {
    match clone.spec.clone().into_config(dir) {
        Ok(config) => Some(config),
        Err(faults) => {
            // What was wrong has been said, and is not missing.
            let new = faults.0.iter().filter(|fault| !clone.has_faulty(fault));
            problems.extend(new.map(|fault| clone.later_problem(fault)));
            None
        }
    }
}

/// Who has something first, and by which key.
struct Taken<'a, K>(HashMap<K, (&'a Located<CloneSpec>, &'static str)>);

impl<'a, K: Hash + Eq> Taken<'a, K> {
    fn new() -> Self {
        Self(HashMap::new())
    }

    /// `None` when it was free; else whose it is, and where that is said.
    fn take(&mut self, what: K, by: &'a Located<CloneSpec>, key: &'static str) -> Option<(&'a str, Place)> {
        match self.0.entry(what) {
            Entry::Occupied(taken) => {
                let (other, key) = *taken.get();
                Some((&other.label, other.place(key)))
            }
            Entry::Vacant(free) => {
                free.insert((by, key));
                None
            }
        }
    }
}

/// What clones and the daemon can't have in common.
fn conflicts(clones: &[Named], daemon: Option<(&DaemonConfig, Option<&Located<DaemonSpec>>)>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let (mut names, mut exports, mut paths) = (Taken::new(), Taken::new(), Taken::new());
    let (mut nodes, mut mapped) = (Taken::new(), Taken::new());
    for Named { config, located } in clones {
        let mut report = |key: &str, text: String| problems.push(located.problem(&Fault::of(key, text)));
        if let Some((_, place)) = names.take(&config.name, located, "name") {
            report("name", format!("there is a clone of this name at {place} already"));
            // The same name means the same export, and much more.
            continue;
        }
        let (address, export) = (&config.nbd.address, &config.nbd.export);
        if *address != NbdAddress::None
            && let Some((other, place)) = exports.take((address.to_string(), export), located, "nbd.export")
        {
            report("nbd.export", format!("'{export}' at {address} is the export of {other} ({place}) already"));
        }
        if let Some(number) = config.ublk.as_ref().and_then(|ublk| ublk.number)
            && let Some((other, place)) = nodes.take(number, located, "ublk.number")
        {
            report("ublk.number", format!("/dev/ublkb{number} is that of {other} ({place}) already"));
        }
        if let Some(name) = config.ublk.as_ref().and_then(|ublk| ublk.dm_name.as_ref())
            && let Some((other, place)) = mapped.take(name, located, "ublk.dm_name")
        {
            report("ublk.dm_name", format!("/dev/mapper/{name} is that of {other} ({place}) already"));
        }
        if let Some((key, text)) = config.given_twice(resolved) {
            report(key, text.into());
            continue;
        }
        let keys = match config.table {
            Some(_) => ["table", "table"],
            None => ["destination", "metadata"],
        };
        for (key, path) in keys.into_iter().zip([&config.destination, &config.metadata]) {
            if let Some((other, place)) = paths.take(resolved(path), located, key) {
                report(key, format!("{} is in use by {other} ({place}) already", path.display()));
            }
        }
        let control = daemon.map(|(daemon, _)| daemon.control.as_path());
        if matches!(address, NbdAddress::Unix(path) if Some(path.as_path()) == control) {
            report("nbd.address", format!("{address} is the control socket of the daemon"));
        }
    }
    problems
}

fn finish(mut problems: Vec<Problem>) -> std::result::Result<(), Problems> {
    if problems.is_empty() {
        return Ok(());
    }
    problems.dedup();
    // By file in the order given, then by line: a stable sort by place within runs of one file.
    let mut order: Vec<PathBuf> = Vec::new();
    for problem in &problems {
        if !order.contains(&problem.place.file) {
            order.push(problem.place.file.clone());
        }
    }
    problems.sort_by_key(|problem| {
        let file = order.iter().position(|file| *file == problem.place.file);
        (file, problem.order)
    });
    Err(Problems::new(problems.iter().map(Problem::to_string).collect()))
}

#[cfg(test)]
mod tests;
