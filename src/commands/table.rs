//! `hydrant table`: dm-clone's table line of clones that run, as `dmsetup table` prints it.

use super::{daemons, output_error};
use crate::cli::TableArgs;
use crate::control::api::CloneRunState;
use crate::error::{Result, plain};
use std::io::Write;

/// Prints the line of one clone; of all, each after its name.
pub fn run(args: &TableArgs, out: &mut dyn Write) -> Result<()> {
    if let Some(name) = &args.name {
        let line = daemons::client_of(name, &args.control).table(name)?;
        return writeln!(out, "{}", plain(line)).map_err(output_error);
    }
    for (client, status) in daemons::find(None, &args.control)? {
        let Ok(name) = status.name.parse() else { continue };
        match client.table(&name) {
            Ok(line) => writeln!(out, "{name}: {}", plain(line)).map_err(output_error)?,
            // One that does not run has none.
            Err(error) if status.state == CloneRunState::Running => return Err(error),
            Err(error) => log::warn!("{error}"),
        }
    }
    Ok(())
}
