//! `hydrant serve`: from configuration files to a [`Plan`]; the daemon does the rest.

use crate::cli::ServeArgs;
use crate::config::Plan;
use crate::config::plan::plan;
use crate::error::Result;
use crate::runtime_dir::RuntimeDir;

/// Runs the clones of the files by `start`, until it ends.
pub fn run(args: &ServeArgs, start: impl FnOnce(Plan) -> Result<()>) -> Result<()> {
    let dir = RuntimeDir::of_user();
    let plan = plan(&args.files, args.dry_run, &dir)?;
    if !plan.dry_run {
        dir.create_for(&plan)?;
    }
    start(plan)
}
