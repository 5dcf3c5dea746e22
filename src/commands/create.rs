//! `hydrant create`: gives the clones of a file to a daemon that runs.

use super::daemons;
use crate::cli::CreateArgs;
use crate::config::plan::clones;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime_dir::RuntimeDir;

/// Returns when all of them are served. One that can't be started does not keep the others from it.
pub fn run(args: &CreateArgs) -> Result<()> {
    let specs = clones(&args.file, &RuntimeDir::of_user())?;
    if specs.is_empty() {
        return Err(Error::new(ErrorKind::Config, format!("{}: there is no [[clone]] in it", args.file.display())));
    }
    let daemon = daemons::daemon_of(&args.control);
    let mut failures = Vec::new();
    for spec in &specs {
        if let Err(error) = daemon.create(spec) {
            let name = spec.name.as_ref().map(ToString::to_string).unwrap_or_default();
            failures.push((name, error));
        }
    }
    let Some((name, error)) = failures.first().cloned() else { return Ok(()) };
    let more = match failures.len() {
        1 => String::new(),
        _ => {
            let names: Vec<_> = failures[1..].iter().map(|(name, _)| format!("'{name}'")).collect();
            format!(" (nor can {})", names.join(", "))
        }
    };
    let kind = error.kind();
    let done = match specs.len() - failures.len() {
        0 => "",
        1 => "; the other one is served",
        _ => "; the others are served",
    };
    Err(Error::new(kind, format!("clone '{name}' can't be created: {error}{more}{done}")))
}
