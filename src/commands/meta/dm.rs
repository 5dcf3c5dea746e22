//! `--format dm-clone`: looking at the metadata of the kernel's dm-clone.
//!
//! They must not be in use: dm-clone moves blocks with every commit, and a look from beside would see a mixture.

use super::dump::{write_json, write_runs};
use super::image::Image;
use super::{hydrated_text, output_failed, size_text, within};
use crate::devices::{self, Role};
use crate::error::{ErrorKind, Result};
use crate::meta::dm::Refused;
use crate::meta::dm::codec::VERSION;
use crate::meta::dm::reader::{self, read_image};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Reads an image; a verdict on it apart from what is wrong with the path.
fn read(path: &Path) -> Result<Result<reader::Image, Refused>> {
    let mut image = Image::of(devices::open_input(Role::Metadata, path)?)?;
    let size = image.size();
    let read = read_image(&mut |block| image.block(block), size);
    Ok(read)
}

fn fields(image: &reader::Image) -> Map<String, Value> {
    let (superblock, target) = (&image.superblock, &image.superblock.target);
    let fields = json!({
        "format": "dm-clone",
        "version": VERSION,
        "uuid": uuid::Uuid::from_bytes(superblock.uuid).hyphenated().to_string(),
        "size": target.size(),
        "region_size": target.region_size().bytes(),
        "nr_regions": target.nr_regions(),
        "hydrated_count": image.bits.hydrated_count(),
        "metadata_blocks": superblock.space_map.nr_blocks,
        "metadata_blocks_allocated": superblock.space_map.nr_allocated,
        "metadata_blocks_leaked": image.nr_leaked,
    });
    match fields {
        Value::Object(map) => map,
        _ => unreachable!("json! made an object"),
    }
}

fn write_summary(image: &reader::Image, out: &mut dyn Write) -> std::io::Result<()> {
    let target = &image.superblock.target;
    let space_map = &image.superblock.space_map;
    writeln!(out, "format          dm-clone, version {VERSION}")?;
    writeln!(out, "size            {}", size_text(target.size()))?;
    writeln!(out, "region size     {} ({} sectors)", target.region_size(), target.region_size().sectors())?;
    writeln!(out, "regions         {}", target.nr_regions())?;
    writeln!(out, "hydrated        {}", hydrated_text(image.bits.hydrated_count(), target.nr_regions()))?;
    writeln!(out, "metadata        {} of {} blocks allocated", space_map.nr_allocated, space_map.nr_blocks)?;
    match image.nr_leaked {
        0 => Ok(()),
        leaked => writeln!(out, "note: {leaked} blocks are allocated and not in use"),
    }
}

pub fn dump(path: &Path, json: bool, out: &mut dyn Write) -> Result<()> {
    let image = read(path)?.map_err(|refused| within(path)(refused.into()))?;
    let runs = image.bits.runs().map(Ok);
    if json {
        return write_json(&fields(&image), runs, out);
    }
    write_summary(&image, out).map_err(output_failed)?;
    write_runs(runs, out)
}

/// Whether it is clean; fails when it is something else.
pub fn check(path: &Path, json: bool, out: &mut dyn Write) -> Result<bool> {
    let verdict = match read(path)? {
        Err(refused) if !matches!(refused.kind, ErrorKind::Damaged | ErrorKind::Io) => {
            return Err(within(path)(refused.into()));
        }
        verdict => verdict,
    };
    let clean = verdict.is_ok();
    let written = match (&verdict, json) {
        (Ok(image), false) => write_summary(image, out).and_then(|()| writeln!(out, "clean")),
        (Err(refused), false) => {
            writeln!(out, "damage: block {}: {}", refused.block, refused.what).and_then(|()| writeln!(out, "not clean"))
        }
        (verdict, true) => {
            let mut map = verdict.as_ref().map_or_else(|_| Map::new(), fields);
            let findings: Vec<_> = verdict
                .as_ref()
                .err()
                .map(|r| json!({"block": r.block, "offset": r.block * 4096, "what": r.what}))
                .into_iter()
                .collect();
            map.insert("clean".into(), clean.into());
            map.insert("nr_findings".into(), findings.len().into());
            map.insert("findings".into(), findings.into());
            serde_json::to_writer(&mut *out, &map).map_err(Into::into).and_then(|()| writeln!(out))
        }
    };
    written.and_then(|()| out.flush()).map_err(output_failed)?;
    Ok(clean)
}
