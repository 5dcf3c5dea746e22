//! `hydrant table`: dm-clone's table line of clones that run, as `dmsetup table` prints it.

use super::{daemons, output_error};
use crate::cli::TableArgs;
use crate::config::CloneName;
use crate::control::api::CloneRunState;
use crate::error::{Error, ErrorKind, Result};
use std::io::Write;

/// Prints the line of one clone; of all, each after its name.
pub fn run(args: &TableArgs, out: &mut dyn Write) -> Result<()> {
    if let Some(name) = &args.name {
        let line = one_line(name, daemons::client_of(name, &args.control).table(name)?)?;
        return writeln!(out, "{line}").map_err(output_error);
    }
    for (client, status) in daemons::find(None, &args.control)? {
        let Ok(name) = status.name.parse() else { continue };
        match client.table(&name).and_then(|line| one_line(&name, line)) {
            Ok(line) => writeln!(out, "{name}: {line}").map_err(output_error)?,
            // One that does not run has none; one that can't be shown keeps none of the others back.
            Err(error) if status.state == CloneRunState::Running && error.kind() != ErrorKind::NotSupported => {
                return Err(error);
            }
            Err(error) => log::warn!("{error}"),
        }
    }
    Ok(())
}

/// Programs read it line by line, and read it back: what can't be shown as it is isn't shown as something else.
fn one_line(name: &CloneName, line: String) -> Result<String> {
    match line.contains(char::is_control) {
        false => Ok(line),
        true => Err(Error::new(
            ErrorKind::NotSupported,
            format!("clone '{name}': a path has control characters, which no table line can have: {line}"),
        )),
    }
}
