//! `hydrant meta check` and `hydrant meta dump`: look at metadata offline.
//!
//! Both open the file or block device read-only and never write. They say the same of the superblocks as the daemon
//! does, because they ask the same code.

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::check::{Finding, HydratedRuns, Report, Summary, check as check_image};
use crate::meta::codec::{BLOCK_SIZE, Block, FORMAT_VERSION, SUPERBLOCK_COPIES, Superblock};
use crate::signatures::identify;
use crate::units::ByteSize;
use serde_json::{Map, Value, json};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Blocks that are read at once: 1 MiB.
const BLOCKS_PER_READ: u64 = 256;

/// A metadata device, opened read-only and read in large pieces.
struct Image {
    file: File,
    /// In bytes.
    size: u64,
    /// The blocks from `first` on that were read last.
    buffer: Vec<u8>,
    first: u64,
}

impl Image {
    fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::from_io(error, "can't be opened");
        // Looked at before it is opened: to open a FIFO waits for a writer.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a FIFO",
                () if kind.is_char_device() => "a character device",
                () if kind.is_socket() => "a socket",
                () => "something else",
            };
            bail!(WrongType, "is {what}, not a file or block device");
        }
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        // The end of a block device is its size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, size, buffer: Vec::new(), first: 0 })
    }

    fn fill(&mut self, first: u64, count: u64) -> Result<()> {
        self.buffer.resize(count as usize * BLOCK_SIZE, 0);
        self.first = first;
        let offset = first * BLOCK_SIZE as u64;
        self.file.read_exact_at(&mut self.buffer, offset).map_err(|error| {
            let len = self.buffer.len();
            self.buffer.clear();
            Error::from_io(error, format!("can't read {len} bytes at offset {offset}"))
        })
    }

    fn block(&mut self, number: u64) -> Result<Block> {
        let held = self.first..self.first + (self.buffer.len() / BLOCK_SIZE) as u64;
        if !held.contains(&number) {
            let ahead = (self.size / BLOCK_SIZE as u64).saturating_sub(number).clamp(1, BLOCKS_PER_READ);
            // One bad block must not hide its neighbours.
            self.fill(number, ahead).or_else(|_| self.fill(number, 1))?;
        }
        let at = (number - self.first) as usize * BLOCK_SIZE;
        Ok(self.buffer[at..at + BLOCK_SIZE].try_into().expect("a whole block"))
    }

    /// Checks the image; content that is not ours is an error that says what it is.
    fn check(&mut self) -> Result<Report> {
        let size = self.size;
        let result = check_image(&mut |block| self.block(block), size);
        match result {
            Err(error) if error.kind() == ErrorKind::ForeignData => {
                // File systems that leave their first blocks empty are told by what comes later.
                let mut start = vec![0; (68 << 10).min(size as usize)];
                let known = self.file.read_exact_at(&mut start, 0).ok().and_then(|()| identify(&start));
                match known {
                    Some(what) => bail!(ForeignData, "holds {what}, no metadata of hydrant"),
                    None => Err(error),
                }
            }
            other => other,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn uuid(superblock: &Superblock) -> String {
    uuid::Uuid::from_bytes(superblock.uuid).hyphenated().to_string()
}

/// The fields that both commands print.
fn fields(summary: &Summary) -> Map<String, Value> {
    let superblock = &summary.superblock;
    let geometry = &superblock.geometry;
    let source = &superblock.source;
    let fields = json!({
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

fn write_summary(summary: &Summary, out: &mut dyn Write) -> std::io::Result<()> {
    let superblock = &summary.superblock;
    let (geometry, source) = (&superblock.geometry, &superblock.source);
    let (hydrated, all) = (summary.hydrated_count, geometry.nr_regions());
    // Rounded down: 100 % is said of a complete copy only.
    let tenths = u128::from(hydrated) * 1000 / u128::from(all);
    writeln!(out, "uuid            {}", uuid(superblock))?;
    writeln!(out, "state           {}", superblock.state.name())?;
    writeln!(out, "generation      {}", summary.generation)?;
    writeln!(out, "size            {}", size_text(geometry.size()))?;
    writeln!(out, "region size     {}", geometry.region_size())?;
    writeln!(out, "regions         {all}, {} in a zone, {} zones", geometry.regions_per_zone(), geometry.nr_zones())?;
    writeln!(out, "hydrated        {hydrated} regions ({}.{} %)", tenths / 10, tenths % 10)?;
    writeln!(
        out,
        "source          {}, digest {} of {} samples",
        size_text(source.size),
        hex(&source.digest),
        source.samples
    )?;
    writeln!(out, "destination id  {}", hex(&superblock.destination_id))
}

fn finding_json(finding: &Finding) -> Value {
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

fn within(path: &Path) -> impl Fn(Error) -> Error {
    move |error| error.within(format!("metadata {}", path.display()))
}

fn output_failed(error: std::io::Error) -> Error {
    Error::from_io(error, "can't write the output")
}

/// `hydrant meta check`: prints what the metadata say and everything that is wrong with them, as text or as one line
/// of JSON. Returns whether they are clean. Fails when the path can't be read or holds something else.
pub fn check(path: &Path, json: bool, out: &mut dyn Write) -> Result<bool> {
    let report = Image::open(path).and_then(|mut image| image.check()).map_err(within(path))?;
    write_report(&report, json, out).and_then(|()| out.flush()).map_err(output_failed)?;
    Ok(report.is_clean())
}

/// `hydrant meta dump`: prints what the metadata say, with every hydrated run of regions (first and last, inclusive),
/// as text or as one line of JSON. Damaged bits are refused before anything is printed.
pub fn dump(path: &Path, json: bool, out: &mut dyn Write) -> Result<()> {
    let mut image = Image::open(path).map_err(within(path))?;
    let report = image.check().map_err(within(path))?;
    // A lost superblock copy does not make the bits doubtful; all other findings do.
    let fatal = report.findings.iter().find(|f| f.block >= SUPERBLOCK_COPIES || report.summary.is_none());
    let summary = match (fatal, report.summary) {
        (None, Some(summary)) => summary,
        (Some(finding), _) => {
            let text = format!("damaged: {finding}; see all with `hydrant meta check`");
            return Err(within(path)(Error::new(ErrorKind::Damaged, text)));
        }
        (None, None) => unreachable!("without a summary there is a finding"),
    };
    let mut read_block = |block| image.block(block);
    let mut runs = HydratedRuns::new(&summary.superblock, &mut read_block);
    if json {
        // By hand, so that a long list is never held in memory.
        let head = serde_json::to_string(&fields(&summary)).map_err(|e| output_failed(e.into()))?;
        write!(out, "{},\"hydrated\":[", head.strip_suffix('}').unwrap_or(&head)).map_err(output_failed)?;
    } else {
        write_summary(&summary, out).map_err(output_failed)?;
    }
    let mut comma = "";
    for run in &mut runs {
        let (first, last) = run.map_err(within(path))?;
        if json {
            write!(out, "{comma}[{first},{last}]").map_err(output_failed)?;
            comma = ",";
        } else {
            writeln!(out, "hydrated {first}..={last}").map_err(output_failed)?;
        }
    }
    if json {
        writeln!(out, "]}}").map_err(output_failed)?;
    }
    out.flush().map_err(output_failed)
}

#[cfg(test)]
mod tests;
