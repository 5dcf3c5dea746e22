//! `hydrant version`: of the program, and of what it is made of.

use super::output_error;
use crate::cli::VersionArgs;
use crate::control::api::VersionInfo;
use crate::error::Result;
use crate::targets;
use std::io::Write;

pub fn run(args: &VersionArgs, out: &mut dyn Write) -> Result<()> {
    let info = targets::info();
    let text = match (args.json, args.targets) {
        (true, true) => format!("{}\n", serde_json::json!(info)),
        (true, false) => format!("{}\n", serde_json::json!({ "version": info.version })),
        (false, true) => lines(&info),
        (false, false) => format!("hydrant {}\n", info.version),
    };
    out.write_all(text.as_bytes()).map_err(output_error)
}

/// Kind, name, version: the last two as `dmsetup targets` prints them.
fn lines(info: &VersionInfo) -> String {
    let line = |kind: &str, name: &str, version: &str| format!("{kind:<9} {name:<16} v{version}\n");
    info.targets.iter().map(|target| line(&target.kind, &target.name, &target.version)).collect()
}
