//! `hydrant meta repair`: mends damaged metadata, by explicit choice.
//!
//! First everything is looked at and decided, then the backup is made and durable, then the bitmap is written and
//! flushed, then the superblock copies, one after the other. A crash between leaves what is damaged damaged, and a
//! second run does the rest. At the end the whole is checked again.

use super::image::Image;
use super::{output_failed, within};
use crate::bail;
use crate::cli::RepairArgs;
use crate::devices::{self, Device, Role, Target};
use crate::disk::Disk;
use crate::disk::blocking::BlockingDisk;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, Result};
use crate::meta::check::ReadBlock;
use crate::meta::codec::{BLOCK_SIZE, Block};
use crate::meta::repair::{Assumptions, Decided, survey};
use futures_lite::future::block_on;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

fn assumptions(args: &RepairArgs) -> Result<Assumptions> {
    let mut assume = Assumptions { force: args.force, ..Assumptions::default() };
    for arg in &args.assume {
        let before = match arg.sector {
            Some(sector) => assume.by_sector.insert(sector, arg.hydrated),
            None => assume.others.replace(arg.hydrated),
        };
        if before.is_some() {
            let of = arg.sector.map_or("all".into(), |sector| format!("sector {sector}"));
            bail!(Usage, "--assume is given twice for {of}");
        }
    }
    Ok(assume)
}

fn open(args: &RepairArgs) -> Result<Device> {
    if args.dry_run {
        return devices::open_input(Role::Metadata, &args.path);
    }
    match devices::open_target(Role::Metadata, &args.path)? {
        Target::Existing(device) => Ok(device),
        Target::Missing { .. } => bail!(NotFound, "metadata {} does not exist", args.path.display()),
    }
}

fn print(lines: &[String], out: &mut dyn Write) -> Result<()> {
    lines.iter().try_for_each(|line| writeln!(out, "{line}")).map_err(output_failed)
}

pub fn run(args: &RepairArgs, out: &mut dyn Write) -> Result<()> {
    let assume = assumptions(args)?;
    let in_metadata = within(&args.path);
    let disk = BlockingDisk::new(open(args)?);
    let mut image = Image::over(disk.device())?;
    let size = image.size();
    let found = survey(&mut |block| image.block(block), size, args.force).map_err(&in_metadata)?;
    if found.is_clean() {
        return writeln!(out, "clean: there is nothing to repair").map_err(output_failed);
    }
    let wrong = found.describe();
    let decided = match found.decide(&assume) {
        Ok(decided) => decided,
        Err(error) => {
            print(&wrong, out)?;
            return Err(in_metadata(error));
        }
    };
    if args.dry_run {
        print(&decided.describe(), out)?;
        return writeln!(out, "dry run: nothing was changed").map_err(output_failed);
    }
    if let Some(path) = &args.backup {
        let copied = back_up(&mut image, decided.metadata_size(), path, out);
        copied.map_err(|error| error.within(format!("backup {}", path.display())))?;
    }
    // Now that it is done: if the backup can't be made, nothing is.
    print(&decided.describe(), out)?;
    mend(&disk, &decided, &mut |block| image.block(block)).map_err(&in_metadata)?;
    let mut again = Image::over(disk.device())?;
    match again.check().map_err(&in_metadata)?.findings.first() {
        None => writeln!(out, "repaired: clean").map_err(output_failed),
        Some(finding) => Err(in_metadata(Error::new(
            crate::error::ErrorKind::Damaged,
            format!("still damaged after the repair: {finding}; the medium may be failing: copy it to another one"),
        ))),
    }
}

/// Copies the metadata as they are to a new file, durably. What can't be read is zero there, and said.
fn back_up(image: &mut Image, size: u64, path: &Path, out: &mut dyn Write) -> Result<()> {
    let failed = |error| Error::from_io(error, "can't be written; the metadata were not changed");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    for number in 0..size / BLOCK_SIZE as u64 {
        let block = match image.block(number) {
            Ok(block) => block,
            Err(error) => {
                writeln!(out, "backup: block {number} is zero: {error}").map_err(output_failed)?;
                [0; BLOCK_SIZE]
            }
        };
        file.write_all(&block).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

/// Writes what was decided: the bitmap, a flush, then one superblock copy after the other, each with a flush. `read_block` reads
/// what was there.
pub(super) fn mend(disk: &dyn Disk, decided: &Decided, read_block: &mut ReadBlock<'_>) -> Result<()> {
    let mut write = |number: u64, block: &Block| -> Result<()> {
        let mut buffer = DmaBuf::new(BLOCK_SIZE);
        buffer.copy_from_slice(block);
        block_on(disk.write(number * BLOCK_SIZE as u64, buffer.into(), false))
    };
    decided.mend(read_block, &mut write)?;
    block_on(disk.flush())?;
    for (copy, block) in decided.superblocks() {
        write(copy, &block)?;
        block_on(disk.flush())?;
    }
    Ok(())
}
