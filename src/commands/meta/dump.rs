//! `hydrant meta dump`: what metadata say, with every hydrated run. Nothing is written.

use super::image::Image;
use super::{dm, fields, output_failed, sound, within, write_summary};
use crate::cli::{DumpArgs, MetaFormat};
use crate::error::Result;
use crate::meta::check::HydratedRuns;
use serde_json::{Map, Value};
use std::io::Write;
use std::path::Path;

pub fn run(args: &DumpArgs, out: &mut dyn Write) -> Result<()> {
    match args.format {
        MetaFormat::Hydrant => dump(&args.path, args.json, out),
        MetaFormat::DmClone => dm::dump(&args.path, args.json, out),
    }
}

/// Prints what the metadata say, with every hydrated run of regions (first and last, inclusive), as text or as one line
/// of JSON. Damaged bits are refused before anything is printed.
pub fn dump(path: &Path, json: bool, out: &mut dyn Write) -> Result<()> {
    let mut image = Image::open(path).map_err(within(path))?;
    let summary = image.check().and_then(sound).map_err(within(path))?;
    let mut read_block = |block| image.block(block);
    let runs = HydratedRuns::new(&summary.superblock, &mut read_block).map(|run| run.map_err(within(path)));
    if json {
        return write_json(&fields(&summary), runs, out);
    }
    write_summary(&summary, out).map_err(output_failed)?;
    write_runs(runs, out)
}

/// One line of JSON, the runs last: by hand, so that a long list is never held in memory.
pub fn write_json(
    fields: &Map<String, Value>,
    runs: impl Iterator<Item = Result<(u64, u64)>>,
    out: &mut dyn Write,
) -> Result<()> {
    let head = serde_json::to_string(fields).map_err(|e| output_failed(e.into()))?;
    write!(out, "{},\"hydrated\":[", head.strip_suffix('}').unwrap_or(&head)).map_err(output_failed)?;
    let mut comma = "";
    for run in runs {
        let (first, last) = run?;
        write!(out, "{comma}[{first},{last}]").map_err(output_failed)?;
        comma = ",";
    }
    writeln!(out, "]}}").and_then(|()| out.flush()).map_err(output_failed)
}

/// One line for each.
pub fn write_runs(runs: impl Iterator<Item = Result<(u64, u64)>>, out: &mut dyn Write) -> Result<()> {
    for run in runs {
        let (first, last) = run?;
        writeln!(out, "hydrated {first}..={last}").map_err(output_failed)?;
    }
    out.flush().map_err(output_failed)
}
