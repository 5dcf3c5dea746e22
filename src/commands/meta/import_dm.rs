//! `hydrant meta import-dm`: takes over a clone from the kernel's dm-clone.
//!
//! The image is only read. Everything is checked before the first change, which is to the new metadata alone, and those
//! are valid only when every bit is durable: a crash leaves none.

use super::image::Image;
use super::output::{self, LookedAt, check_distinct, look_at, open_destination, parse_source, source_path};
use super::{new_superblock, output_failed, size_text, within};
use crate::bail;
use crate::cli::ImportDmArgs;
use crate::devices::{self, Role};
use crate::error::{Error, Result};
use crate::meta::codec::{CloneState, SourceFingerprint, geometry_for, metadata_size_needed};
use crate::meta::dm::reader::read_image;
use crate::meta::runs::ZoneFiller;
use crate::meta::store::Store;
use futures_lite::future::block_on;
use std::io::Write;

pub fn run(args: &ImportDmArgs, out: &mut dyn Write) -> Result<()> {
    let source = args.source.as_deref().map(parse_source).transpose()?;
    check_distinct(&[
        (Role::Source, source_path(source.as_ref())),
        (Role::Image, Some(&args.image)),
        (Role::Destination, Some(&args.destination)),
        (Role::Metadata, Some(&args.metadata)),
    ])?;
    let device = devices::open_input(Role::Image, &args.image)?;
    let mut opened = vec![device.place()];
    let mut image = Image::of(device)?;
    let image_size = image.size();
    let read = read_image(&mut |block| image.block(block), image_size)
        .map_err(|refused| Error::from(refused).within(format!("image {}", args.image.display())))?;
    let target = &read.superblock.target;

    let geometry = geometry_for(target.size(), target.region_size())?;
    let destination = open_destination(&args.destination, geometry.size())?;
    let planned = output::plan(Role::Metadata, &args.metadata, args.force)?;
    let needed = metadata_size_needed(&geometry);
    planned.check_size(needed, &format!("for {} regions", geometry.nr_regions()))?;
    let looked = source.as_ref().map(look_at).transpose()?;
    opened.extend([destination.place(), planned.place()]);
    opened.extend(looked.as_ref().and_then(LookedAt::place));
    devices::check_distinct(&opened)?;
    let fingerprint = looked.as_ref().map_or(SourceFingerprint::UNKNOWN, |looked| looked.fingerprint);
    if looked.is_some() && fingerprint.size < geometry.size() {
        bail!(
            SourceChanged,
            "source {} has {} bytes, fewer than the {} of the clone in image {}: it is not its source",
            args.source.as_deref().unwrap_or_default(),
            fingerprint.size,
            geometry.size(),
            args.image.display()
        );
    }
    // dm-clone has flushed it before it set a bit; costs nothing, and nothing has to be believed.
    destination.any_alignment().sync_data().map_err(|error| Error::from_io(error, destination.label()))?;

    let hydrated = read.bits.hydrated_count();
    let mut superblock = new_superblock(geometry, fingerprint, destination.fingerprint_id());
    if hydrated == geometry.nr_regions() {
        superblock.state = CloneState::Complete;
    }
    let state = superblock.state;
    let output = planned.open(needed, needed)?;
    let mut filler = ZoneFiller::new(geometry, read.bits.runs());
    let created = Store::create(output.disk.clone(), superblock, |zone, words| {
        filler.fill(zone, words);
        Ok(())
    });
    block_on(created).map_err(within(&args.metadata))?;
    output.keep();
    writeln!(
        out,
        "imported {}, {} of {} regions of {} are hydrated, it is {}: go on with 'hydrant clone --destination {} \
         --metadata {} --source ...'",
        size_text(geometry.size()),
        hydrated,
        geometry.nr_regions(),
        geometry.region_size(),
        state.name(),
        args.destination.display(),
        args.metadata.display()
    )
    .map_err(output_failed)
}
