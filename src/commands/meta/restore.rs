//! `hydrant meta restore`: metadata again from what `hydrant meta dump --json` printed.
//!
//! A dump of the result is the same dump, byte for byte.

use super::output::{self, check_distinct};
use super::{output_failed, size_text, within};
use crate::bail;
use crate::cli::RestoreArgs;
use crate::devices::Role;
use crate::error::{Error, Result};
use crate::meta::codec::metadata_size_needed;
use crate::meta::dump::Dump;
use crate::meta::runs::ZoneFiller;
use crate::meta::store::Store;
use futures_lite::future::block_on;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

/// The largest dump that is read: some 50 million runs. In bytes.
const DUMP_BYTES_MAX: u64 = 1 << 30;

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| Error::from_io(error, "can't be read");
    if !fs::metadata(path).map_err(failed)?.is_file() {
        bail!(WrongType, "not a regular file");
    }
    let mut json = Vec::new();
    File::open(path).and_then(|file| file.take(DUMP_BYTES_MAX + 1).read_to_end(&mut json)).map_err(failed)?;
    if json.len() as u64 > DUMP_BYTES_MAX {
        bail!(Limit, "it has more than {}", size_text(DUMP_BYTES_MAX));
    }
    Ok(json)
}

pub fn run(args: &RestoreArgs, out: &mut dyn Write) -> Result<()> {
    let in_dump = |error: Error| error.within(format!("dump {}", args.dump.display()));
    let dump = read(&args.dump).and_then(|json| Dump::parse(&json)).map_err(in_dump)?;
    let geometry = dump.superblock.geometry;
    check_distinct(&[(Role::Image, Some(&args.dump)), (Role::Metadata, Some(&args.path))])?;
    let planned = output::plan(Role::Metadata, &args.path, args.force)?;
    let needed = metadata_size_needed(&geometry);
    planned.check_size(needed, &format!("for {} regions", geometry.nr_regions()))?;

    let output = planned.open(needed, needed)?;
    let hydrated: u64 = dump.runs.iter().map(|(first, last)| last - first + 1).sum();
    let mut filler = ZoneFiller::new(geometry, dump.runs.iter().copied());
    let created = Store::create(output.disk.clone(), dump.superblock, |zone, words| {
        filler.fill(zone, words);
        Ok(())
    });
    block_on(created).map_err(within(&args.path))?;
    output.keep();
    writeln!(
        out,
        "restored {}, {hydrated} of {} regions of {} are hydrated",
        size_text(geometry.size()),
        geometry.nr_regions(),
        geometry.region_size()
    )
    .map_err(output_failed)
}
