//! `hydrant meta check`: everything that is wrong with metadata. Nothing is written.

use super::image::Image;
use super::{dm, fields, output_failed, within, write_summary};
use crate::bail;
use crate::cli::{CheckArgs, MetaFormat};
use crate::error::Result;
use crate::meta::check::{Finding, Report};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

pub fn run(args: &CheckArgs, out: &mut dyn Write) -> Result<()> {
    let clean = match args.format {
        MetaFormat::Hydrant => check(&args.path, args.json, out)?,
        MetaFormat::DmClone => dm::check(&args.path, args.json, out)?,
    };
    match clean {
        true => Ok(()),
        false => bail!(Damaged, "metadata {}: not clean, see the findings", args.path.display()),
    }
}

/// Prints what the metadata say and everything that is wrong with them, as text or as one line of JSON. Returns whether
/// they are clean. Fails when the path can't be read or holds something else.
pub fn check(path: &Path, json: bool, out: &mut dyn Write) -> Result<bool> {
    let report = Image::open(path).and_then(|mut image| image.check()).map_err(within(path))?;
    write_report(&report, json, out).and_then(|()| out.flush()).map_err(output_failed)?;
    Ok(report.is_clean())
}

pub fn finding_json(finding: &Finding) -> Value {
    let regions = finding.regions.map(|r| json!([r.first().0, r.end().0 - 1]));
    json!({
        "block": finding.block,
        "sector": finding.sector,
        "offset": finding.offset(),
        "regions": regions,
        "what": finding.what,
    })
}

fn write_report(report: &Report, json: bool, out: &mut dyn Write) -> std::io::Result<()> {
    if json {
        let mut fields = report.summary.as_ref().map(fields).unwrap_or_default();
        fields.insert("clean".into(), report.is_clean().into());
        fields.insert("nr_findings".into(), report.nr_findings.into());
        fields.insert("findings".into(), report.findings.iter().map(finding_json).collect());
        fields.insert("notes".into(), report.notes.clone().into());
        serde_json::to_writer(&mut *out, &fields)?;
        return writeln!(out);
    }
    if let Some(summary) = &report.summary {
        write_summary(summary, out)?;
    }
    report.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))?;
    report.findings.iter().try_for_each(|finding| writeln!(out, "damage: {finding}"))?;
    let listed = report.findings.len() as u64;
    if listed < report.nr_findings {
        writeln!(out, "damage: {} more, not listed", report.nr_findings - listed)?;
    }
    writeln!(out, "{}", if report.is_clean() { "clean" } else { "not clean" })
}
