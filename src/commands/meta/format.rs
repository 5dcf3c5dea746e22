//! `hydrant meta format`: empty metadata, for a clone to come.

use super::output::{self, LookedAt, check_distinct, look_at, open_destination, parse_source, source_path};
use super::{new_superblock, output_failed, size_text, within};
use crate::bail;
use crate::cli::FormatArgs;
use crate::devices::{self, Device, Role};
use crate::error::Result;
use crate::meta::codec::{DESTINATION_NONE_YET, SourceFingerprint, geometry_for, metadata_size_needed};
use crate::meta::store::Store;
use futures_lite::future::block_on;
use std::io::Write;

pub fn run(args: &FormatArgs, out: &mut dyn Write) -> Result<()> {
    let source = args.source.as_deref().map(parse_source).transpose()?;
    check_distinct(&[
        (Role::Source, source_path(source.as_ref())),
        (Role::Destination, args.destination.as_deref()),
        (Role::Metadata, Some(&args.path)),
    ])?;
    let looked = source.as_ref().map(look_at).transpose()?;
    let fingerprint = looked.as_ref().map_or(SourceFingerprint::UNKNOWN, |looked| looked.fingerprint);
    let size = args.size.map_or(fingerprint.size, |size| size.0);
    let geometry = geometry_for(size, args.region_size)?;
    let destination = args.destination.as_deref().map(|path| open_destination(path, size)).transpose()?;
    if let Some(destination) = &destination
        && !args.force
        && let Some(what) = devices::contents(destination)?
    {
        let label = destination.label();
        bail!(ForeignData, "{label} holds {what}, which the clone would overwrite; use another one, or --force");
    }
    let planned = output::plan(Role::Metadata, &args.path, args.force)?;
    let mut opened = vec![planned.place()];
    opened.extend(destination.as_ref().map(Device::place));
    opened.extend(looked.as_ref().and_then(LookedAt::place));
    devices::check_distinct(&opened)?;
    let needed = metadata_size_needed(&geometry);
    planned.check_size(needed, &format!("for {} regions", geometry.nr_regions()))?;

    let destination_id = destination.as_ref().map_or(DESTINATION_NONE_YET, |device| device.fingerprint_id());
    let output = planned.open(needed, needed)?;
    let superblock = new_superblock(geometry, fingerprint, destination_id);
    block_on(Store::format(output.disk.clone(), superblock)).map_err(within(&args.path))?;
    output.keep();
    writeln!(
        out,
        "formatted for {} in {} regions of {}",
        size_text(geometry.size()),
        geometry.nr_regions(),
        geometry.region_size()
    )
    .map_err(output_failed)
}
