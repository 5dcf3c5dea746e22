//! The plan of a request: which of its bytes go where, by what is hydrated now.
//!
//! Pure: the map is an argument, the plan is a list that the engine carries out. A plan is only a proposal: what
//! it says of unhydrated regions is looked at again once their bytes are held (see [`super::inflight`]). What it
//! says of hydrated regions stays true, because regions only ever become hydrated.

use crate::units::{ByteRange, Geometry, RegionIndex, RegionRange};

/// What a plan needs to know of a region map.
pub trait Runs {
    /// Whether `region` is hydrated, and the run of regions from it that are the same, ending at or before `end`.
    fn run_from(&self, region: RegionIndex, end: RegionIndex) -> (bool, RegionRange);
}

/// Where a piece of a read comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadRoute {
    Destination(ByteRange),
    /// Not hydrated: `wanted` lies in `regions`, and touches each of them.
    Source {
        regions: RegionRange,
        wanted: ByteRange,
    },
}

/// Where a piece of a change (write, trim, write zeroes) goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeRoute {
    /// Hydrated: straight to the destination.
    Destination(ByteRange),
    /// All of these unhydrated regions is changed: nothing needs to be copied.
    Whole(RegionRange),
    /// A part of one unhydrated region: the rest must come from the source.
    Part { region: RegionIndex, range: ByteRange },
}

/// Cuts a read of `range` into routes, in order, covering it exactly.
pub fn plan_read(geometry: &Geometry, map: &impl Runs, range: ByteRange) -> Vec<ReadRoute> {
    let mut routes = Vec::new();
    for (hydrated, regions, bytes) in runs(geometry, map, range) {
        routes.push(match hydrated {
            true => ReadRoute::Destination(bytes),
            false => ReadRoute::Source { regions, wanted: bytes },
        });
    }
    routes
}

/// Cuts a change of `range` into routes, in order, covering it exactly.
pub fn plan_change(geometry: &Geometry, map: &impl Runs, range: ByteRange) -> Vec<ChangeRoute> {
    let mut routes = Vec::new();
    for (hydrated, regions, bytes) in runs(geometry, map, range) {
        if hydrated {
            routes.push(ChangeRoute::Destination(bytes));
            continue;
        }
        let whole = geometry.covered(bytes);
        let part = |region: RegionIndex| {
            let region_bytes = geometry.bytes_of(RegionRange::single(region));
            let range = region_bytes.intersection(bytes).expect("the run touches its regions");
            ChangeRoute::Part { region, range }
        };
        // A run is at most: a part, whole regions, a part.
        let (whole_first, whole_end) = match whole {
            Some(whole) => (whole.first(), whole.end()),
            None => (regions.end(), regions.end()),
        };
        let heads = (regions.first().0..whole_first.0).map(|r| part(RegionIndex(r)));
        let tails = (whole_end.0..regions.end().0).map(|r| part(RegionIndex(r)));
        routes.extend(heads);
        routes.extend(whole.map(ChangeRoute::Whole));
        routes.extend(tails);
    }
    routes
}

/// The maximal runs of `range`: hydrated or not, their regions, their bytes within `range`.
fn runs<'a>(
    geometry: &'a Geometry,
    map: &'a impl Runs,
    range: ByteRange,
) -> impl Iterator<Item = (bool, RegionRange, ByteRange)> + 'a {
    let touched = geometry.touched(range);
    let mut at = touched.first();
    std::iter::from_fn(move || {
        if at >= touched.end() {
            return None;
        }
        let (hydrated, regions) = map.run_from(at, touched.end());
        at = regions.end();
        let bytes = geometry.bytes_of(regions).intersection(range).expect("the run is touched");
        Some((hydrated, regions, bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::RegionSize;
    use proptest::prelude::*;

    struct Bits(Vec<bool>);
    impl Runs for Bits {
        fn run_from(&self, region: RegionIndex, end: RegionIndex) -> (bool, RegionRange) {
            let state = self.0[region.0 as usize];
            let len = self.0[region.0 as usize..end.0 as usize].iter().take_while(|b| **b == state).count();
            (state, RegionRange::between(region, RegionIndex(region.0 + len as u64)).unwrap())
        }
    }

    proptest! {
        /// Against an oracle that looks at every byte: each is routed exactly once, in order, and rightly.
        #[test]
        fn every_byte_is_routed_by_its_regions_bit(
            bits in prop::collection::vec(any::<bool>(), 1..12),
            tail in 1u64..=4096, start in any::<prop::sample::Index>(), len in any::<prop::sample::Index>(),
        ) {
            let size = (bits.len() as u64 - 1) * 4096 + tail;
            let geometry = Geometry::new(size, RegionSize::new(4096).unwrap(), 100).unwrap();
            let start = start.index(size as usize) as u64;
            let range = ByteRange::new(start, 1 + len.index((size - start) as usize) as u64).unwrap();
            let map = Bits(bits);
            let hydrated = |at: u64| map.0[(at / 4096) as usize];

            let mut at = range.start();
            for route in plan_read(&geometry, &map, range) {
                let bytes = match route {
                    ReadRoute::Destination(bytes) => { prop_assert!((bytes.start()..bytes.end()).all(hydrated)); bytes }
                    ReadRoute::Source { regions, wanted } => {
                        prop_assert!(!(wanted.start()..wanted.end()).any(hydrated));
                        prop_assert_eq!(geometry.touched(wanted), regions);
                        wanted
                    }
                };
                prop_assert_eq!(bytes.start(), at);
                at = bytes.end();
            }
            prop_assert_eq!(at, range.end());

            let mut at = range.start();
            for route in plan_change(&geometry, &map, range) {
                let bytes = match route {
                    ChangeRoute::Destination(bytes) => { prop_assert!((bytes.start()..bytes.end()).all(hydrated)); bytes }
                    ChangeRoute::Whole(regions) => {
                        let bytes = geometry.bytes_of(regions);
                        prop_assert!(range.contains(bytes) && !(bytes.start()..bytes.end()).any(hydrated));
                        bytes
                    }
                    ChangeRoute::Part { region, range: bytes } => {
                        let whole = geometry.bytes_of(RegionRange::single(region));
                        prop_assert!(whole.contains(bytes) && !range.contains(whole) && !hydrated(bytes.start()));
                        bytes
                    }
                };
                prop_assert_eq!(bytes.start(), at);
                at = bytes.end();
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
