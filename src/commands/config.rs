//! `hydrant config`: what configuration files mean, or what is wrong with them.

use super::output_error;
use crate::bail;
use crate::config::plan;
use crate::config::{CloneConfig, Plan};
use crate::error::{Result, plain};
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::runtime_dir::RuntimeDir;
use crate::units::ByteSize;
use std::io::Write;
use std::path::PathBuf;

/// Prints a line per clone; fails, after a line per error, when something is wrong.
pub fn check(files: &[PathBuf], out: &mut dyn Write) -> Result<()> {
    match plan::check(files, true, &RuntimeDir::of_user()) {
        Ok(plan) => summary(&plan).iter().try_for_each(|line| writeln!(out, "{}", plain(line)).map_err(output_error)),
        Err(problems) => {
            problems.lines.iter().try_for_each(|line| writeln!(out, "{}", plain(line)).map_err(output_error))?;
            if problems.more > 0 {
                writeln!(out, "and {} more", problems.more).map_err(output_error)?;
            }
            bail!(Config, "{} in the configuration", counted(problems.count(), "error"))
        }
    }
}

fn summary(plan: &Plan) -> Vec<String> {
    let daemon = &plan.daemon;
    let control = format!("control at {}", daemon.control.display());
    let first = format!("daemon: {}, {control}", counted(plan.clones.len(), "clone"));
    std::iter::once(first).chain(plan.clones.iter().map(clone_line)).collect()
}

fn clone_line(clone: &CloneConfig) -> String {
    let size = clone.size.map_or(String::new(), |size| format!(", {}", ByteSize(size)));
    let shown = match &clone.nbd.address {
        NbdAddress::None => "no NBD".into(),
        address => format!("export '{}' at {address}", clone.nbd.export),
    };
    format!(
        "clone '{}': {} to {}, metadata {}{size}, {shown}",
        clone.name,
        clone.source,
        clone.destination.display(),
        clone.metadata.display(),
    )
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
