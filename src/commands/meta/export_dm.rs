//! `hydrant meta export-dm`: gives a clone to the kernel's dm-clone.
//!
//! hydrant's metadata are only read, under a lock. The superblock of the image is written last, when all else is
//! durable: a crash leaves an image that dm-clone takes for unformatted, or the whole one.

use super::image::Image;
use super::output::{self, check_distinct};
use super::{output_failed, sound, within};
use crate::bail;
use crate::cli::ExportDmArgs;
use crate::devices::{self, Role};
use crate::disk::Disk;
use crate::disk::blocking::BlockingDisk;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::check::HydratedRuns;
use crate::meta::codec::{BLOCK_SIZE, Block};
use crate::meta::dm::Target;
use crate::meta::dm::reader::RegionBits;
use crate::meta::dm::writer::Layout;
use crate::units::ByteSize;
use futures_lite::future::block_on;
use std::io::Write;

/// Blocks that are written at once: 1 MiB.
const BLOCKS_PER_WRITE: usize = 256;

pub fn run(args: &ExportDmArgs, out: &mut dyn Write) -> Result<()> {
    check_distinct(&[(Role::Metadata, Some(&args.path)), (Role::Image, Some(&args.image))])?;
    let in_metadata = within(&args.path);
    let device = devices::open_input(Role::Metadata, &args.path)?;
    let place = device.place();
    let mut image = Image::of(device)?;
    let summary = image.check().and_then(sound).map_err(&in_metadata)?;
    if summary.contradicts_itself() {
        let what = "damaged: marked complete, but not all regions are hydrated; see `hydrant meta check`";
        return Err(in_metadata(Error::new(ErrorKind::Damaged, what)));
    }
    let geometry = &summary.superblock.geometry;
    let target = Target::of_bytes(geometry.size(), geometry.region_size())
        .map_err(|what| in_metadata(Error::new(ErrorKind::NotSupported, format!("can't be exported: {what}"))))?;
    let mut bits = RegionBits::new(&target);
    let mut read_block = |block| image.block(block);
    for run in HydratedRuns::new(&summary.superblock, &mut read_block) {
        let (first, last) = run.map_err(&in_metadata)?;
        bits.set(first, last);
    }

    let planned = output::plan(Role::Image, &args.image, args.force)?;
    devices::check_distinct(&[place, planned.place()])?;
    let size = match (planned.size(), args.size) {
        (Some(size), Some(ByteSize(wanted))) if size != wanted => {
            let path = args.image.display();
            bail!(Usage, "image {path} exists and has {size} bytes: --size is for a file that is to be created")
        }
        (Some(size), _) | (None, Some(ByteSize(size))) => size,
        (None, None) => Layout::size_default(target),
    };
    let label = format!("image {}", args.image.display());
    let layout = Layout::new(target, size)
        .map_err(|what| Error::new(ErrorKind::TooSmall, format!("{label} is too small: {what}")))?;
    let output = planned.open(size, layout.nr_used() * BLOCK_SIZE as u64)?;
    write(&output.disk, &layout, &bits)?;
    output.keep();
    writeln!(
        out,
        "0 {} clone {} DESTINATION SOURCE {}",
        target.sectors(),
        args.image.display(),
        target.region_size().sectors()
    )
    .map_err(output_failed)
}

fn write(disk: &BlockingDisk, layout: &Layout, bits: &RegionBits) -> Result<()> {
    let put = |number: u64, blocks: &[u8]| -> Result<()> {
        let mut buffer = DmaBuf::new(blocks.len());
        buffer.copy_from_slice(blocks);
        block_on(disk.write(number * BLOCK_SIZE as u64, buffer.into(), false))
    };
    put(0, &[0; BLOCK_SIZE])?;
    block_on(disk.flush())?;
    // Neighbours go out together.
    let (mut first, mut together) = (0, Vec::with_capacity(BLOCKS_PER_WRITE * BLOCK_SIZE));
    layout.write(bits, &mut |number: u64, block: &Block| -> Result<()> {
        let is_next = number == first + (together.len() / BLOCK_SIZE) as u64;
        if !together.is_empty() && (!is_next || together.len() == BLOCKS_PER_WRITE * BLOCK_SIZE) {
            put(first, &together)?;
            together.clear();
        }
        if together.is_empty() {
            first = number;
        }
        together.extend_from_slice(block);
        Ok(())
    })?;
    put(first, &together)?;
    block_on(disk.flush())?;
    put(0, &layout.superblock().encode())?;
    block_on(disk.flush())
}
