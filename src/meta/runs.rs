//! Runs of hydrated regions and the words of bitmaps: from one to the other.

use crate::units::{Geometry, ZoneIndex};
use std::iter::Peekable;

/// Sets the bits `first` to `last`, both inclusive, which the words must have.
pub fn set_bits(words: &mut [u64], first: u64, last: u64) {
    assert!(first <= last, "bits {first} to {last}");
    for word in first / 64..=last / 64 {
        let from = first.max(word * 64) % 64;
        let to = last.min(word * 64 + 63) % 64;
        words[word as usize] |= (u64::MAX << from) & (u64::MAX >> (63 - to));
    }
}

/// Gives zones their bits, in order, from runs (first and last region, inclusive) that rise and do not overlap.
pub struct ZoneFiller<I: Iterator<Item = (u64, u64)>> {
    geometry: Geometry,
    runs: Peekable<I>,
}

impl<I: Iterator<Item = (u64, u64)>> ZoneFiller<I> {
    pub fn new(geometry: Geometry, runs: I) -> Self {
        Self { geometry, runs: runs.peekable() }
    }

    /// The words of `zone`, which are all 0 before. Each zone once, in order.
    pub fn fill(&mut self, zone: ZoneIndex, words: &mut [u64]) {
        let regions = self.geometry.zone_regions(zone);
        let (start, end) = (regions.first().0, regions.end().0);
        while let Some((first, last)) = self.runs.peek().copied() {
            if first >= end {
                return;
            }
            if last >= start {
                set_bits(words, first.max(start) - start, last.min(end - 1) - start);
            }
            if last >= end {
                return;
            }
            self.runs.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::codec::words_per_zone;
    use crate::units::RegionSize;
    use proptest::prelude::*;

    proptest! {
        /// Compared with one look at each region.
        #[test]
        fn zones_get_the_bits_of_the_runs(
            steps in prop::collection::vec((0u64..300, 0u64..300), 0..30), per_zone in 1u64..500, regions in 1u64..5000,
        ) {
            let size = RegionSize::new(4096).unwrap();
            let geometry = Geometry::new(regions * 4096 - 5, size, per_zone).unwrap();
            let mut runs = Vec::new();
            let mut at = 0;
            for (gap, len) in steps {
                let (first, last) = (at + gap, (at + gap + len).min(regions - 1));
                if first > last {
                    break;
                }
                runs.push((first, last));
                at = last + 1;
            }
            let mut filler = ZoneFiller::new(geometry, runs.iter().copied());
            for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
                let mut words = vec![0; words_per_zone(&geometry)];
                filler.fill(zone, &mut words);
                for (i, region) in geometry.zone_regions(zone).indices().enumerate() {
                    let expected = runs.iter().any(|(first, last)| (first..=last).contains(&&region));
                    prop_assert_eq!(words[i / 64] >> (i % 64) & 1 == 1, expected, "region {}", region);
                }
                let bits: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
                prop_assert!(bits <= geometry.zone_regions(zone).count());
            }
        }
    }
}
