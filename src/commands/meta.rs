//! `hydrant meta ...`: the tools for metadata of clones that do not run. One file per verb; here is what they share.
//!
//! They say the same of the superblocks as the daemon does, because they ask the same code. What is only looked at is
//! opened read-only and never written.

mod check;
mod dm;
mod dump;
mod export_dm;
mod format;
mod image;
mod import_dm;
mod output;
mod repair;
mod restore;
mod undo;

use crate::cli::{MetaArgs, MetaVerb};
use crate::error::{Error, ErrorKind, Result};
use crate::meta::check::{Report, Summary};
use crate::meta::codec::{
    CloneState, DESTINATION_NONE_YET, FORMAT_VERSION, SUPERBLOCK_COPIES, SourceFingerprint, Superblock,
};
use crate::units::{ByteSize, Generation, Geometry};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Does what `hydrant meta` was told.
pub fn run(args: MetaArgs, out: &mut dyn Write) -> Result<()> {
    match args.verb {
        MetaVerb::Check(args) => check::run(&args, out),
        MetaVerb::Dump(args) => dump::run(&args, out),
        MetaVerb::Format(args) => format::run(&args, out),
        MetaVerb::Restore(args) => restore::run(&args, out),
        MetaVerb::Repair(args) => repair::run(&args, out),
        MetaVerb::ImportDm(args) => import_dm::run(&args, out),
        MetaVerb::ExportDm(args) => export_dm::run(&args, out),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn uuid(superblock: &Superblock) -> String {
    uuid::Uuid::from_bytes(superblock.uuid).hyphenated().to_string()
}

/// The superblock of new metadata: nothing is hydrated yet.
fn new_superblock(geometry: Geometry, source: SourceFingerprint, destination_id: [u8; 16]) -> Superblock {
    Superblock {
        uuid: *uuid::Uuid::new_v4().as_bytes(),
        geometry,
        source,
        destination_id,
        state: CloneState::Active,
        generation: Generation(0),
        created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    }
}

/// What a report says, when its bits can be trusted.
fn sound(report: Report) -> Result<Summary> {
    // A lost superblock copy does not make the bits doubtful; all other findings do.
    let fatal = report.findings.iter().find(|f| f.block >= SUPERBLOCK_COPIES || report.summary.is_none());
    match (fatal, report.summary) {
        (None, Some(summary)) => Ok(summary),
        (Some(finding), _) => {
            let text = format!("damaged: {finding}; see all with `hydrant meta check`");
            Err(Error::new(ErrorKind::Damaged, text))
        }
        (None, None) => unreachable!("without a summary there is a finding"),
    }
}

/// The fields that check and dump print.
fn fields(summary: &Summary) -> Map<String, Value> {
    let superblock = &summary.superblock;
    let geometry = &superblock.geometry;
    let source = &superblock.source;
    let fields = json!({
        "format": "hydrant",
        "version": FORMAT_VERSION,
        "uuid": uuid(superblock),
        "state": superblock.state.name(),
        "generation": summary.generation.0,
        "created_unix_s": superblock.created_unix_s,
        "size": geometry.size(),
        "region_size": geometry.region_size().bytes(),
        "nr_regions": geometry.nr_regions(),
        "regions_per_zone": geometry.regions_per_zone(),
        "nr_zones": geometry.nr_zones(),
        "hydrated_count": summary.hydrated_count,
        "source": { "size": source.size, "samples": source.samples, "digest": hex(&source.digest) },
        "destination_id": hex(&superblock.destination_id),
    });
    match fields {
        Value::Object(map) => map,
        _ => unreachable!("json! made an object"),
    }
}

fn size_text(bytes: u64) -> String {
    match ByteSize(bytes).to_string() {
        text if text.ends_with("bytes") => text,
        text => format!("{text} ({bytes} bytes)"),
    }
}

/// Rounded down: 100 % is said of a complete copy only.
fn hydrated_text(hydrated: u64, all: u64) -> String {
    let tenths = u128::from(hydrated) * 1000 / u128::from(all);
    format!("{hydrated} regions ({}.{} %)", tenths / 10, tenths % 10)
}

fn write_summary(summary: &Summary, out: &mut dyn Write) -> std::io::Result<()> {
    let superblock = &summary.superblock;
    let (geometry, source) = (&superblock.geometry, &superblock.source);
    let all = geometry.nr_regions();
    writeln!(out, "uuid            {}", uuid(superblock))?;
    writeln!(out, "state           {}", superblock.state.name())?;
    writeln!(out, "generation      {}", summary.generation)?;
    writeln!(out, "size            {}", size_text(geometry.size()))?;
    writeln!(out, "region size     {}", geometry.region_size())?;
    writeln!(out, "regions         {all}, {} in a zone, {} zones", geometry.regions_per_zone(), geometry.nr_zones())?;
    writeln!(out, "hydrated        {}", hydrated_text(summary.hydrated_count, all))?;
    match source.is_known() {
        true if source.is_none() => writeln!(out, "source          not needed any more")?,
        true => writeln!(
            out,
            "source          {}, digest {} of {} samples",
            size_text(source.size),
            hex(&source.digest),
            source.samples
        )?,
        false => writeln!(out, "source          not known yet")?,
    }
    match superblock.destination_id {
        DESTINATION_NONE_YET => writeln!(out, "destination id  none yet"),
        id => writeln!(out, "destination id  {}", hex(&id)),
    }
}

fn within(path: &Path) -> impl Fn(Error) -> Error {
    let context = format!("metadata {}", path.display());
    move |error| error.within(context.clone())
}

fn output_failed(error: std::io::Error) -> Error {
    Error::from_io(error, "can't write the output")
}

#[cfg(test)]
mod tests;
