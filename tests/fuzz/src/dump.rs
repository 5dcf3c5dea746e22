//! A dump of metadata in JSON, as `hydrant meta restore` reads it.
//!
//! Properties: what is refused is refused in one line; what is taken says nothing impossible, makes a valid superblock,
//! and, written as a dump again, is taken as the same.

use super::input::one_line;
use super::meter::Bound;
use hydrant::meta::codec::{Classified, CloneState, UnverifiedSuperblock};
use hydrant::meta::dump::Dump;
use serde_json::json;

/// A value of JSON takes some 72 bytes, and has at least two in the text.
pub const BOUND: Bound = Bound { base: 256 << 10, per_byte: 256 };

pub fn target(data: &[u8]) {
    match Dump::parse(data) {
        Ok(dump) => is_sound(&dump),
        Err(error) => one_line("dump", &error.to_string()),
    }
}

fn is_sound(dump: &Dump) {
    let superblock = &dump.superblock;
    assert_eq!(UnverifiedSuperblock::new(&superblock.encode()).classify(), Classified::Valid(superblock.clone()));
    let geometry = &superblock.geometry;
    let mut next = 0;
    for (first, last) in &dump.runs {
        assert!(*first >= next && first <= last && *last < geometry.nr_regions(), "{:?}", dump.runs);
        next = last + 1;
    }
    let hydrated: u64 = dump.runs.iter().map(|(first, last)| last - first + 1).sum();
    assert!(superblock.state == CloneState::Active || hydrated == geometry.nr_regions());
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let uuid = hex(&superblock.uuid);
    let text = json!({
        "format": "hydrant", "version": 1, "uuid": uuid, "state": superblock.state.name(),
        "generation": superblock.generation.0, "created_unix_s": superblock.created_unix_s, "size": geometry.size(),
        "region_size": geometry.region_size().bytes(), "nr_regions": geometry.nr_regions(),
        "regions_per_zone": geometry.regions_per_zone(), "nr_zones": geometry.nr_zones(), "hydrated_count": hydrated,
        "source": {
            "size": superblock.source.size, "samples": superblock.source.samples, "digest": hex(&superblock.source.digest),
        },
        "destination_id": hex(&superblock.destination_id), "hydrated": dump.runs,
    });
    assert_eq!(Dump::parse(text.to_string().as_bytes()).as_ref().ok(), Some(dump));
}
