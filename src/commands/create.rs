//! `hydrant create`: starts the clones of a configuration file in a daemon that runs.

use super::daemons;
use crate::cli::CreateArgs;
use crate::config::plan::clones;
use crate::error::{Error, Result};
use crate::runtime_dir::RuntimeDir;

/// Returns when every clone is served, or could not be started; one that can't does not keep the others from it. The
/// error is the first one.
pub fn run(args: &CreateArgs) -> Result<()> {
    let specs = clones(&args.file, &RuntimeDir::of_user())?;
    let daemon = daemons::daemon_of(&args.control);
    let mut failed: Vec<Error> = Vec::new();
    for spec in &specs {
        let name = spec.name.as_ref().map(ToString::to_string).unwrap_or_default();
        match daemon.create(spec) {
            Ok(()) => log::info!("clone '{name}': created"),
            Err(error) => failed.push(error.within(format!("clone '{name}' could not be created"))),
        }
    }
    match failed.as_slice() {
        [] => Ok(()),
        [only] => Err(only.clone()),
        [first, others @ ..] => {
            others.iter().for_each(|error| log::error!("{error}"));
            Err(first.clone().within(format!("{} of {} clones", failed.len(), specs.len())))
        }
    }
}
