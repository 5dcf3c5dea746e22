//! Growing a clone: what its new size is, and what of it comes from the source.
//!
//! Pure. How a growth is made durable is argued in [`super`].

use super::codec::{CloneState, Superblock, check_limits};
use crate::bail;
use crate::error::Result;
use crate::units::{ByteSize, Geometry};

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// The new size in bytes; `None`: that of the source.
    pub size: Option<u64>,
    /// What is added reads as zeros, whatever the source has there.
    pub zeros: bool,
}

impl Wanted {
    /// Whether the source must be looked at to decide.
    pub fn needs_source(&self) -> bool {
        !self.zeros
    }
}

/// A clone as it is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Growth {
    pub geometry: Geometry,
    /// How many bytes of the source are shown; zeros follow. 0: the source is not needed any more.
    pub source_len: u64,
}

/// Decides. `source_size` is that of the source as it is now, `None` when it was not looked at. `Ok(None)`: the clone has
/// the wanted size already. Fails with Usage for what can't be meant (a smaller size), with Limit when the metadata's
/// format forbids it.
pub fn plan(superblock: &Superblock, wanted: Wanted, source_size: Option<u64>) -> Result<Option<Growth>> {
    let old = superblock.geometry.size();
    let shown = superblock.source_len().min(old);
    let is_padded = shown < old;
    if wanted.zeros && wanted.size.is_none() {
        bail!(Usage, "zeros up to which size? Give one");
    }
    let Some(size) = wanted.size.or(source_size) else {
        bail!(Usage, "the clone was grown without its source: it can't follow its source, give a size");
    };
    if wanted.size.is_none() && is_padded && size != old {
        bail!(
            Usage,
            "the clone has {} and zeros behind the {} of its source: it can't follow its source, give a size",
            ByteSize(old),
            ByteSize(shown)
        );
    }
    if size < old {
        let whose = if wanted.size.is_some() { "asked for" } else { "what the source has" };
        bail!(Usage, "a clone can't shrink: it has {}, {} is {whose}", ByteSize(old), ByteSize(size));
    }
    if size == old {
        return Ok(None);
    }
    let Some(geometry) = superblock.geometry.with_size(size) else {
        bail!(Usage, "a device of {} can't be cloned", ByteSize(size));
    };
    if let Err(what) = check_limits(&geometry) {
        bail!(Limit, "{what}: clone into a new destination with larger regions");
    }
    if let Some(now) = source_size.filter(|now| *now < shown) {
        bail!(SourceChanged, "the source has shrunk from {} to {}", ByteSize(shown), ByteSize(now));
    }
    // What clients have seen as zeros stays zeros.
    let taken = source_size.filter(|_| !is_padded).map_or(shown, |now| now.min(size));
    // What the source has is in the destination already.
    let is_done_with = superblock.state == CloneState::Complete && taken <= old;
    Ok(Some(Growth { geometry, source_len: if is_done_with { 0 } else { taken } }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::meta::codec::{SourceFingerprint, ZONES_MAX, geometry_for};
    use crate::units::{Generation, RegionSize};

    const MIB: u64 = 1 << 20;

    fn clone_of(size: u64, shown: u64, state: CloneState) -> Superblock {
        Superblock {
            uuid: [1; 16],
            geometry: geometry_for(size, RegionSize::default()).unwrap(),
            source: SourceFingerprint { size: shown, samples: 1, digest: [2; 16] },
            destination_id: [3; 16],
            state,
            generation: Generation(4),
            created_unix_s: 5,
        }
    }

    fn grown(superblock: &Superblock, size: Option<u64>, zeros: bool, source: Option<u64>) -> Option<(u64, u64)> {
        plan(superblock, Wanted { size, zeros }, source).unwrap().map(|g| {
            assert_eq!(g.geometry.regions_per_zone(), superblock.geometry.regions_per_zone());
            (g.geometry.size(), g.source_len)
        })
    }

    fn refused(superblock: &Superblock, size: Option<u64>, zeros: bool, source: Option<u64>) -> (ErrorKind, String) {
        let error = plan(superblock, Wanted { size, zeros }, source).unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn follows_the_source_or_the_size_and_pads_with_zeros() {
        let active = clone_of(10 * MIB, 10 * MIB, CloneState::Active);
        assert_eq!(grown(&active, None, false, Some(10 * MIB)), None);
        assert_eq!(grown(&active, None, false, Some(12 * MIB)), Some((12 * MIB, 12 * MIB)));
        assert_eq!(grown(&active, Some(11 * MIB), false, Some(12 * MIB)), Some((11 * MIB, 11 * MIB)));
        assert_eq!(grown(&active, Some(15 * MIB), false, Some(12 * MIB)), Some((15 * MIB, 12 * MIB)));
        assert_eq!(grown(&active, Some(15 * MIB), false, Some(10 * MIB)), Some((15 * MIB, 10 * MIB)));
        assert_eq!(grown(&active, Some(15 * MIB), true, None), Some((15 * MIB, 10 * MIB)));
        // Where zeros were, zeros stay.
        assert!(Wanted { size: Some(1), zeros: false }.needs_source() && Wanted::default().needs_source());
        assert!(!Wanted { size: Some(1), zeros: true }.needs_source());
        let padded = clone_of(10 * MIB, 4 * MIB, CloneState::Active);
        assert_eq!(grown(&padded, Some(11 * MIB), false, Some(12 * MIB)), Some((11 * MIB, 4 * MIB)));
        assert_eq!(grown(&padded, None, false, Some(10 * MIB)), None);
        let complete = clone_of(10 * MIB, 10 * MIB, CloneState::Complete);
        assert_eq!(grown(&complete, None, false, Some(12 * MIB)), Some((12 * MIB, 12 * MIB)));
        assert_eq!(grown(&complete, Some(12 * MIB), true, None), Some((12 * MIB, 0)));
        assert_eq!(grown(&complete, Some(12 * MIB), false, Some(10 * MIB)), Some((12 * MIB, 0)));
    }

    #[test]
    fn refuses_what_can_not_be() {
        let active = clone_of(10 * MIB, 10 * MIB, CloneState::Active);
        let (kind, text) = refused(&active, Some(9 * MIB), false, Some(12 * MIB));
        assert_eq!((kind, text.as_str()), (ErrorKind::Usage, "a clone can't shrink: it has 10MiB, 9MiB is asked for"));
        let (_, text) = refused(&active, None, false, Some(9 * MIB));
        assert_eq!(text, "a clone can't shrink: it has 10MiB, 9MiB is what the source has");
        let (kind, text) = refused(&active, Some(12 * MIB), false, Some(9 * MIB));
        assert_eq!((kind, text.as_str()), (ErrorKind::SourceChanged, "the source has shrunk from 10MiB to 9MiB"));
        assert_eq!(refused(&active, None, true, Some(12 * MIB)).0, ErrorKind::Usage);
        assert!(refused(&active, None, false, None).1.contains("it can't follow its source, give a size"));
        assert_eq!(refused(&active, Some(u64::MAX), false, Some(12 * MIB)).0, ErrorKind::Usage);
        let padded = clone_of(10 * MIB, 4 * MIB, CloneState::Active);
        let (_, text) = refused(&padded, None, false, Some(12 * MIB));
        assert_eq!(
            text,
            "the clone has 10MiB and zeros behind the 4MiB of its source: it can't follow its source, give a size"
        );
        let tiny_zones =
            Superblock { geometry: Geometry::new(MIB, RegionSize::new(4096).unwrap(), 1).unwrap(), ..active };
        let (kind, text) = refused(&tiny_zones, Some(ZONES_MAX * 4096 + 1), false, Some(MIB));
        assert_eq!(kind, ErrorKind::Limit);
        assert!(text.contains("16777217 zones, at most 16777216"), "{text}");
    }
}
