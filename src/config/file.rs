//! A configuration file: bounded reading, TOML, and where in it everything stands.
//!
//! Relative paths in a file are taken from the directory of the file. The only I/O is reading it.

use super::fault::{Fault, Faults, nearest, shown};
use super::node::{Entry, Table, Value, read};
use super::spec::{CloneSpec, DaemonSpec};
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use toml::de::DeTable;

/// Largest configuration file, in bytes: several thousand clones.
pub const FILE_SIZE_MAX: u64 = 4 << 20;

const TOP_KEYS: [&str; 2] = ["daemon", "clone"];

/// What need not be there beside a table line.
const TABLE_SAYS: [&str; 3] = ["source", "destination", "metadata"];

/// A place in a file; lines and columns (in characters) count from 1.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    pub file: PathBuf,
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// A fault at its place: a line for people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Problem {
    pub place: Place,
    pub text: String,
    /// The line and column by which it is told among others.
    pub order: (usize, usize),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// The text of a file, to find places in.
pub struct Text {
    path: PathBuf,
    text: String,
    /// Where each line starts.
    lines: Vec<usize>,
}

impl Text {
    pub fn new(path: &Path, text: String) -> Self {
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { path: path.into(), text, lines }
    }

    /// Reads a regular file of at most [`FILE_SIZE_MAX`] bytes of UTF-8.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |error| Error::from_io(error, format!("configuration {}", path.display()));
        // Not blocking, for a pipe that nobody writes to; without effect on what is accepted.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_socket() => "a socket",
                () => "a device",
            };
            let text = format!("configuration {} is {kind}: give a regular file", path.display());
            return Err(Error::new(ErrorKind::WrongType, text));
        }
        let mut bytes = Vec::new();
        file.take(FILE_SIZE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > FILE_SIZE_MAX {
            let text = format!("configuration {}: larger than {FILE_SIZE_MAX} bytes", path.display());
            return Err(Error::new(ErrorKind::Limit, text));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Self::new(path, text)),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
                let place = Self::new(path, text).place(valid);
                Err(Error::new(ErrorKind::Config, format!("{place}: expected UTF-8, found another byte")))
            }
        }
    }

    /// The place of the byte at `offset`.
    pub fn place(&self, offset: usize) -> Place {
        let line = self.lines.partition_point(|start| *start <= offset).saturating_sub(1);
        let start = self.lines.get(line).copied().unwrap_or(0);
        let column = self.text[start..].char_indices().take_while(|(at, _)| start + at < offset).count();
        Place { file: self.path.clone(), line: line + 1, column: column + 1 }
    }

    fn problem(&self, offset: usize, text: String) -> Problem {
        let place = self.place(offset);
        Problem { order: (place.line, place.column), place, text }
    }
}

/// A table of a file that became a `T`, with the places of its keys.
pub struct Located<T> {
    pub spec: T,
    table: Table,
    /// Of the table's header.
    header: Range<usize>,
    /// What was left out of `spec`, since it is wrong.
    faulty: Vec<Fault>,
    /// What the table is called in a problem: `daemon`, `clone 'vm1'`.
    pub label: String,
    text: std::rc::Rc<Text>,
}

impl<T> Located<T> {
    /// Where the key stands, or the table's header when it does not.
    pub fn place(&self, path: &str) -> Place {
        let path: Vec<String> = path.split('.').map(String::from).collect();
        self.text.place(self.table.span_of(&path).unwrap_or(self.header.clone()).start)
    }

    fn offset(&self, fault: &Fault) -> usize {
        fault.span.clone().or_else(|| self.table.span_of(&fault.keys)).unwrap_or(self.header.clone()).start
    }

    /// Whether `fault`, of the rest, only follows from what was wrong already: what was given in vain is not missing.
    pub fn has_faulty(&self, fault: &Fault) -> bool {
        self.faulty.iter().any(|cause| match cause.meant_keys().as_slice() {
            ["table", ..] => fault.keys.first().is_some_and(|key| TABLE_SAYS.contains(&key.as_str())),
            meant => fault.keys.iter().eq(meant),
        })
    }

    /// As [`Self::problem`], of what was found when the table was read: what was wrong then is told before, since it may
    /// be the cause.
    pub fn later_problem(&self, fault: &Fault) -> Problem {
        let problem = self.problem(fault);
        let order = self.faulty.iter().map(|cause| self.problem(cause).order).fold(problem.order, Ord::max);
        Problem { order, ..problem }
    }

    /// What to say about a fault of this table.
    pub fn problem(&self, fault: &Fault) -> Problem {
        self.text.problem(self.offset(fault), format!("{}: {fault}", self.label))
    }

    pub fn problems(&self, faults: &Faults) -> impl Iterator<Item = Problem> {
        faults.0.iter().map(|fault| self.problem(fault))
    }
}

/// What a file says.
#[derive(Default)]
pub struct Contents {
    pub daemon: Option<Located<DaemonSpec>>,
    pub clones: Vec<Located<CloneSpec>>,
}

/// Reads a file. What is wrong in it is added to `problems`; an error is that it could not be read at all.
pub fn read_file(path: &Path, problems: &mut Vec<Problem>) -> Result<Contents> {
    let text = std::rc::Rc::new(Text::read(path)?);
    let base = std::path::absolute(path).map_err(|error| Error::from_io(error, path.display().to_string()))?;
    let base = base.parent().unwrap_or(Path::new("/")).to_owned();
    Ok(parse(text, &base, problems))
}

/// As [`read_file`], of a text; `base` is where relative paths start.
pub fn parse(text: std::rc::Rc<Text>, base: &Path, problems: &mut Vec<Problem>) -> Contents {
    let (table, errors) = DeTable::parse_recoverable(&text.text);
    if !errors.is_empty() {
        // What was recovered is guesswork: more errors would follow from it.
        problems.extend(errors.iter().map(|error| {
            let message = error.message().replace('\n', ", ");
            text.problem(error.span().map_or(0, |span| span.start), format!("not TOML: {message}"))
        }));
        return Contents::default();
    }
    let mut contents = Contents::default();
    for entry in Table::of_toml(table.into_inner()).0 {
        match (entry.key.as_str(), entry.node.value) {
            ("daemon", Value::Table(table)) => {
                let mut daemon: Located<DaemonSpec> = located(&text, table, entry.node.span, "daemon".into(), problems);
                daemon.spec.relative_to(base);
                contents.daemon = Some(daemon);
            }
            ("clone", Value::List(items)) => {
                for (number, item) in items.into_iter().enumerate() {
                    let Value::Table(table) = item.value else {
                        problems.push(text.problem(item.span.start, "expected [[clone]], a table".into()));
                        continue;
                    };
                    let label = clone_label(&table, number);
                    let mut clone: Located<CloneSpec> = located(&text, table, item.span, label, problems);
                    if let Err(faults) = clone.spec.relative_to(base) {
                        problems.extend(clone.problems(&faults));
                    }
                    contents.clones.push(clone);
                }
            }
            ("daemon", _) => {
                problems.push(text.problem(entry.span.start, "daemon: expected one table, [daemon]".into()));
            }
            ("clone", _) => {
                let expected = "clone: expected an array of tables, [[clone]]";
                problems.push(text.problem(entry.span.start, expected.into()));
            }
            (key, _) => problems.push(text.problem(entry.span.start, unknown_top_key(key))),
        }
    }
    contents
}

fn located<T: serde::de::DeserializeOwned + Default>(
    text: &std::rc::Rc<Text>,
    table: Table,
    header: Range<usize>,
    label: String,
    problems: &mut Vec<Problem>,
) -> Located<T> {
    let mut faults = Vec::new();
    let spec = read(&table, &mut faults);
    let mut located = Located { spec, table, header, faulty: Vec::new(), label, text: text.clone() };
    problems.extend(faults.iter().map(|fault| located.problem(fault)));
    located.faulty = faults;
    located
}

/// A clone by its name, or by its number in the file when it has none.
fn clone_label(table: &Table, number: usize) -> String {
    match table.get("name") {
        Some(Entry { node: super::node::Node { value: Value::Text(name), .. }, .. }) => {
            format!("clone {}", shown(name))
        }
        _ => format!("clone {}", number + 1),
    }
}

fn unknown_top_key(key: &str) -> String {
    let within = |fields: &[&str]| fields.contains(&key);
    let advice = if within(super::keys::fields_of::<DaemonSpec>()) {
        "it belongs under [daemon]".into()
    } else if within(super::keys::fields_of::<CloneSpec>()) {
        "it belongs under [[clone]]".into()
    } else if let Some(near) = nearest(key, &TOP_KEYS) {
        format!("did you mean '{near}'?")
    } else {
        "known are [daemon] and [[clone]]".into()
    };
    format!("unknown key {}, {advice}", shown(key))
}
