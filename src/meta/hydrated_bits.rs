//! The hydrated bits of one clone, where all shards can see them.
//!
//! Each zone has one writer, the [`super::region_map::RegionMap`] of the shard that owns it; every shard may look. A bit
//! only ever goes from 0 to 1, and says that the region's data are in the destination: who sees it may go there, whoever
//! owns the region. Who does not see it knows nothing, and asks the owner.
//!
//! Invariant: a bit is set with Release after all that it stands for, and looked at with Acquire.
//!
//! Memory: 1 bit per region, of parts ([`SLAB_WORDS`]) where any bit was ever set, and of these only pages that were touched.

use super::codec::words_per_zone;
use crate::units::{Geometry, RegionIndex, RegionRange, ZoneIndex};
use crate::zeroed::zeroed_words;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// Words that are allocated together, in whole zones: 4 MiB, for 32 million regions.
pub const SLAB_WORDS: usize = 1 << 19;

/// Words of bits: bit i of word w is bit `64 w + i`.
pub trait Words {
    fn word(&self, at: usize) -> u64;
}

impl Words for [u64] {
    fn word(&self, at: usize) -> u64 {
        self[at]
    }
}

impl Words for [AtomicU64] {
    fn word(&self, at: usize) -> u64 {
        self[at].load(Acquire)
    }
}

/// The first of the bits `from..end` that is `want`, or `end`.
pub fn first_bit(words: &(impl Words + ?Sized), from: usize, end: usize, want: bool) -> usize {
    let flip = if want { 0 } else { u64::MAX };
    let mut at = from;
    while at < end {
        let ahead = (words.word(at / 64) ^ flip) >> (at % 64);
        if ahead != 0 {
            return (at + ahead.trailing_zeros() as usize).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

/// The bits `from..end` (within one word) as a mask.
pub(super) fn mask(from: usize, end: usize) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - end))
}

/// See the head of this file.
pub struct HydratedBits {
    geometry: Geometry,
    words_per_zone: usize,
    zones_per_slab: usize,
    slabs: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl HydratedBits {
    /// Nothing hydrated.
    pub fn new(geometry: Geometry) -> Arc<Self> {
        let (words_per_zone, zones) = (words_per_zone(&geometry), geometry.nr_zones() as usize);
        let zones_per_slab = (SLAB_WORDS / words_per_zone).clamp(1, zones);
        let slabs = (0..zones.div_ceil(zones_per_slab)).map(|_| OnceLock::new()).collect();
        Arc::new(Self { geometry, words_per_zone, zones_per_slab, slabs })
    }

    /// Those of a clone that has grown: what `self` has, and room for the new regions. Nobody sets bits meanwhile.
    fn grown(&self, geometry: Geometry) -> Arc<Self> {
        let grown = Self::new(geometry);
        for zone in (0..self.geometry.nr_zones()).map(ZoneIndex) {
            let Some(old) = self.zone(zone).filter(|old| old.iter().any(|word| word.load(Acquire) != 0)) else {
                continue;
            };
            for (new, old) in grown.zone_to_set(zone).iter().zip(old) {
                new.store(old.load(Acquire), Release);
            }
        }
        grown
    }

    fn place(&self, zone: ZoneIndex) -> (&OnceLock<Box<[AtomicU64]>>, Range<usize>) {
        let (slab, at) = (zone.0 as usize / self.zones_per_slab, zone.0 as usize % self.zones_per_slab);
        (&self.slabs[slab], at * self.words_per_zone..(at + 1) * self.words_per_zone)
    }

    /// The words of a zone; `None`: it has no bits.
    pub(super) fn zone(&self, zone: ZoneIndex) -> Option<&[AtomicU64]> {
        let (slab, words) = self.place(zone);
        slab.get().map(|slab| &slab[words])
    }

    /// The words of a zone, to set bits in. For the owner of the zone only.
    pub(super) fn zone_to_set(&self, zone: ZoneIndex) -> &[AtomicU64] {
        let (slab, words) = self.place(zone);
        &slab.get_or_init(|| zeroed_words(self.zones_per_slab * self.words_per_zone))[words]
    }

    /// Whether every one of `regions` is hydrated, whoever owns them. Regions beyond the end are not.
    pub fn is_all_hydrated(&self, regions: RegionRange) -> bool {
        if regions.end().0 > self.geometry.nr_regions() {
            return false;
        }
        let mut at = regions.first();
        while at < regions.end() {
            let zone = self.geometry.zone_of(at);
            let of_zone = self.geometry.zone_regions(zone);
            let end = regions.end().min(of_zone.end());
            let bit = |region: RegionIndex| (region.0 - of_zone.first().0) as usize;
            let Some(words) = self.zone(zone) else { return false };
            if first_bit(words, bit(at), bit(end), false) < bit(end) {
                return false;
            }
            at = end;
        }
        true
    }
}

/// Where the shards of a clone find the bits that they share. They are gone when no shard has them any more.
#[derive(Default)]
pub struct SharedBits(Mutex<Weak<HydratedBits>>);

impl SharedBits {
    /// The bits for `geometry`: those that some shard has, with room for all regions, else new ones without any bit set.
    pub fn get(&self, geometry: Geometry) -> Arc<HydratedBits> {
        // Nothing that could panic runs under this lock.
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bits = match shared.upgrade() {
            Some(bits) if bits.geometry == geometry => return bits,
            Some(bits) => bits.grown(geometry),
            None => HydratedBits::new(geometry),
        };
        *shared = Arc::downgrade(&bits);
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::RegionSize;
    use proptest::prelude::*;

    fn geometry(regions: u64, per_zone: u64) -> Geometry {
        Geometry::new(regions * 4096 - 1, RegionSize::new(4096).unwrap(), per_zone).unwrap()
    }

    fn set(bits: &HydratedBits, region: u64) {
        let (zone, at) = (region / bits.geometry.regions_per_zone(), region % bits.geometry.regions_per_zone());
        bits.zone_to_set(ZoneIndex(zone))[at as usize / 64].fetch_or(1 << (at % 64), Release);
    }

    proptest! {
        #[test]
        fn all_hydrated_as_the_definition_says(
            per_zone in prop::sample::select(vec![1u64, 3, 64, 100]),
            hydrated in prop::collection::vec(prop::bool::weighted(0.9), 1..300),
            first in any::<prop::sample::Index>(), count in 1u64..200,
        ) {
            let regions = hydrated.len() as u64;
            let bits = HydratedBits::new(geometry(regions, per_zone));
            (0..regions).filter(|region| hydrated[*region as usize]).for_each(|region| set(&bits, region));
            let first = first.index(hydrated.len()) as u64;
            let range = RegionRange::between(RegionIndex(first), RegionIndex(first + count)).unwrap();
            let expected = (first..first + count).all(|region| hydrated.get(region as usize) == Some(&true));
            prop_assert_eq!(bits.is_all_hydrated(range), expected);
            // With the end always there: most ranges above contain a region that is not.
            let run = hydrated[first as usize..].iter().take_while(|bit| **bit).count() as u64;
            if let Some(range) = RegionRange::between(RegionIndex(first), RegionIndex(first + run)) {
                prop_assert!(bits.is_all_hydrated(range));
            }
        }
    }

    /// More than one slab, the last one short.
    #[test]
    fn large_ones_are_made_in_parts() {
        let geometry =
            Geometry::new(3 * 64 * SLAB_WORDS as u64 * 4096 + 1, RegionSize::new(4096).unwrap(), 64 * 1000).unwrap();
        let bits = HydratedBits::new(geometry);
        let last = RegionIndex(geometry.nr_regions() - 1);
        for region in [0, 64 * SLAB_WORDS as u64, last.0] {
            set(&bits, region);
            assert!(bits.is_all_hydrated(RegionRange::single(RegionIndex(region))));
        }
        assert_eq!(bits.slabs.iter().filter(|slab| slab.get().is_some()).count(), 3);
        assert!(!bits.is_all_hydrated(RegionRange::between(RegionIndex(last.0 - 1), RegionIndex(last.0 + 1)).unwrap()));
    }

    #[test]
    fn shared_while_anybody_has_them_and_across_growth() {
        let (small, large) = (geometry(15, 10), geometry(40, 10));
        let region = |region| RegionRange::single(RegionIndex(region));
        let shared = SharedBits::default();
        let (first, second) = (shared.get(small), shared.get(small));
        set(&first, 3);
        assert!(second.is_all_hydrated(region(3)) && !second.is_all_hydrated(region(4)));
        let (grown, also_grown) = (shared.get(large), shared.get(large));
        set(&grown, 35);
        assert!([3, 35].into_iter().all(|nr| also_grown.is_all_hydrated(region(nr))));
        assert!(!also_grown.is_all_hydrated(region(4)));
        assert!(second.is_all_hydrated(region(3)) && !second.is_all_hydrated(region(35)));
        drop((first, second, grown, also_grown));
        assert!(!shared.get(large).is_all_hydrated(region(3)), "nobody had them any more");
    }
}
