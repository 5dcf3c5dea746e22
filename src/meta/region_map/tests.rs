use super::super::codec::{geometry_for, tests::random_bits};
use super::super::hydrated_bits::SharedBits;
use super::*;
use crate::units::RegionSize;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// The slow obvious oracle: one bool per region of the whole device, whoever owns it.
struct Oracle {
    geometry: Geometry,
    shards: u16,
    me: ShardIndex,
    hydrated: Vec<bool>,
    dirty: BTreeSet<u64>,
    committing: BTreeMap<u64, u32>,
}

impl Oracle {
    fn owns(&self, region: u64) -> bool {
        self.geometry.owner_of(self.geometry.zone_of(RegionIndex(region)), self.shards) == self.me
    }
    fn owned(&self) -> impl Iterator<Item = u64> {
        (0..self.geometry.nr_regions()).filter(|r| self.owns(*r))
    }
    fn zone_end(&self, region: u64) -> u64 {
        self.geometry.zone_regions(self.geometry.zone_of(RegionIndex(region))).end().0
    }
    fn run(&self, from: u64, end: u64) -> (bool, u64) {
        let state = self.hydrated[from as usize];
        let end = end.min(self.zone_end(from));
        (state, (from..end).find(|r| self.hydrated[*r as usize] != state).unwrap_or(end))
    }
    fn next_unhydrated(&self, from: u64, max: u64) -> Option<(u64, u64)> {
        let first = self.owned().find(|r| *r >= from && !self.hydrated[*r as usize])?;
        (max > 0).then(|| (first, self.run(first, first.saturating_add(max)).1))
    }
    fn zone_bits(&self, zone: ZoneIndex) -> Box<[u64]> {
        let mut bits = vec![0; words_per_zone(&self.geometry)];
        for (i, region) in self.geometry.zone_regions(zone).iter().enumerate() {
            bits[i / 64] |= u64::from(self.hydrated[region.0 as usize]) << (i % 64);
        }
        bits.into()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Set(u64, u64),
    Take,
    /// Reports the oldest or the newest snapshots as committed.
    Committed(bool),
    Probe(u64, u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (any::<u64>(), 1u64..400).prop_map(|(at, len)| Op::Set(at, len)),
        1 => Just(Op::Take),
        1 => any::<bool>().prop_map(Op::Committed),
        4 => (any::<u64>(), 0u64..300).prop_map(|(at, len)| Op::Probe(at, len)),
    ];
    prop::collection::vec(op, 1..120)
}

fn small_geometries() -> impl Strategy<Value = Geometry> {
    (1u64..3000, prop_oneof![1u64..10, 60u64..70, 100u64..1000], 0u64..4096).prop_map(|(regions, per_zone, cut)| {
        Geometry::new(regions * 4096 - cut, RegionSize::new(4096).unwrap(), per_zone).unwrap()
    })
}

fn range(first: u64, end: u64) -> RegionRange {
    RegionRange::between(RegionIndex(first), RegionIndex(end)).unwrap()
}

proptest! {
    #[test]
    fn like_the_oracle(geometry in small_geometries(), shards in 1u16..5, me: u16, loaded: Option<u64>, ops in ops()) {
        let me = ShardIndex(me % shards);
        let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), shards, me);
        let nr_regions = geometry.nr_regions();
        let mut oracle = Oracle {
            geometry, shards, me, hydrated: vec![false; nr_regions as usize],
            dirty: BTreeSet::new(), committing: BTreeMap::new(),
        };
        for zone in (0..geometry.nr_zones()).map(ZoneIndex).filter(|z| geometry.owner_of(*z, shards) == me) {
            if let Some(seed) = loaded {
                let bits = random_bits(&geometry, zone, seed ^ zone.0);
                map.load_zone(zone, &bits);
                for (i, region) in geometry.zone_regions(zone).iter().enumerate() {
                    oracle.hydrated[region.0 as usize] = bits[i / 64] >> (i % 64) & 1 == 1;
                }
            }
        }
        let owned: Vec<u64> = oracle.owned().collect();
        let mut taken: Vec<Vec<ZoneIndex>> = Vec::new();
        for op in ops {
            match op {
                Op::Set(at, len) if !owned.is_empty() => {
                    let first = owned[(at % owned.len() as u64) as usize];
                    let end = oracle.zone_end(first).min(first + len);
                    let new = (first..end).filter(|r| !std::mem::replace(&mut oracle.hydrated[*r as usize], true)).count();
                    prop_assert_eq!(map.set(range(first, end)), new as u64);
                    if new > 0 {
                        oracle.dirty.insert(geometry.zone_of(RegionIndex(first)).0);
                    }
                }
                Op::Take => {
                    let snapshots = map.take_dirty();
                    let zones: Vec<u64> = snapshots.iter().map(|s| s.zone.0).collect();
                    prop_assert_eq!(&zones, &oracle.dirty.iter().copied().collect::<Vec<_>>());
                    for snapshot in &snapshots {
                        prop_assert_eq!(&snapshot.bits, &oracle.zone_bits(snapshot.zone));
                        *oracle.committing.entry(snapshot.zone.0).or_default() += 1;
                    }
                    oracle.dirty.clear();
                    taken.push(snapshots.iter().map(|s| s.zone).collect());
                }
                Op::Committed(oldest) if !taken.is_empty() => {
                    let zones = if oldest { taken.remove(0) } else { taken.pop().unwrap() };
                    map.committed(&zones);
                    for zone in zones {
                        *oracle.committing.get_mut(&zone.0).unwrap() -= 1;
                    }
                    oracle.committing.retain(|_, n| *n > 0);
                }
                Op::Probe(at, len) if !owned.is_empty() => {
                    let region = owned[(at % owned.len() as u64) as usize];
                    prop_assert_eq!(map.is_hydrated(RegionIndex(region)), oracle.hydrated[region as usize]);
                    let end = (region + 1 + len).min(nr_regions);
                    let (state, stop) = oracle.run(region, end);
                    prop_assert_eq!(map.run_from(RegionIndex(region), RegionIndex(end)), (state, range(region, stop)));
                    let zone = geometry.zone_of(RegionIndex(region)).0;
                    let durable = !oracle.dirty.contains(&zone) && !oracle.committing.contains_key(&zone);
                    prop_assert_eq!(map.is_durable(RegionIndex(region)), durable);
                    // From anywhere, another shard's zones and the end of the device included.
                    for from in [at % (nr_regions + 2), region, 0] {
                        let found = map.next_unhydrated(RegionIndex(from), len).map(|r| (r.first().0, r.end().0));
                        prop_assert_eq!(found, oracle.next_unhydrated(from, len));
                    }
                }
                _ => {}
            }
            let count = oracle.hydrated.iter().filter(|h| **h).count() as u64;
            prop_assert_eq!(map.hydrated_count(), count);
            prop_assert_eq!(map.unhydrated_count(), owned.len() as u64 - count);
            prop_assert_eq!(map.has_dirty(), !oracle.dirty.is_empty());
            prop_assert_eq!(map.is_all_durable(), oracle.dirty.is_empty() && oracle.committing.is_empty());
        }
    }
}

fn panics<R>(f: impl FnOnce() -> R) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err()
}

#[test]
fn a_foreign_zone_is_refused() {
    let geometry = Geometry::new(100 * 4096, RegionSize::new(4096).unwrap(), 10).unwrap();
    let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 2, ShardIndex(1));
    assert_eq!(map.set(range(10, 20)), 10);
    assert!(panics(|| map.is_hydrated(RegionIndex(0))));
    assert!(panics(|| map.set(range(19, 21))), "leaves the zone");
    assert!(panics(|| map.set(range(0, 1))));
    assert!(panics(|| map.is_hydrated(RegionIndex(100))), "behind the end");
    assert!(panics(|| map.load_zone(ZoneIndex(3), &[1 << 10])), "a bit without a region");
    assert!(panics(|| map.release()), "not complete");
}

#[test]
fn released_when_all_is_hydrated_and_durable() {
    let geometry = Geometry::new(25 * 4096 - 1, RegionSize::new(4096).unwrap(), 10).unwrap();
    let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0));
    for (first, end) in [(0, 10), (10, 20), (20, 25)] {
        map.set(range(first, end));
    }
    assert_eq!((map.hydrated_count(), map.unhydrated_count()), (25, 0));
    assert!(panics(|| map.release()), "dirty");
    let zones: Vec<_> = map.take_dirty().iter().map(|s| s.zone).collect();
    assert!(panics(|| map.release()), "committing");
    map.committed(&zones);
    map.release();
    assert!(map.is_hydrated(RegionIndex(24)) && map.is_durable(RegionIndex(24)));
    assert_eq!(map.run_from(RegionIndex(5), RegionIndex(25)), (true, range(5, 10)));
    assert_eq!((map.set(range(0, 5)), map.next_unhydrated(RegionIndex(0), 1)), (0, None));
    assert_eq!((map.hydrated_count(), map.has_dirty()), (25, false));
}

#[test]
fn more_shards_than_zones() {
    let geometry = Geometry::new(25 * 4096, RegionSize::new(4096).unwrap(), 10).unwrap();
    let map = RegionMap::new(geometry, HydratedBits::new(geometry), 8, ShardIndex(5));
    assert_eq!((map.hydrated_count(), map.unhydrated_count()), (0, 0));
    assert_eq!(map.next_unhydrated(RegionIndex(0), 9), None);
    assert!(map.is_all_durable());
}

/// 100 TiB at 64 KiB: 200 MiB of bits are made, loaded and searched in well under a second (debug builds get slack).
#[test]
fn a_huge_map_is_fast() {
    let geometry = geometry_for(100 << 40, RegionSize::default()).unwrap();
    let start = std::time::Instant::now();
    let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0));
    let full = vec![u64::MAX; words_per_zone(&geometry)];
    let last = ZoneIndex(geometry.nr_zones() - 1);
    for zone in (0..last.0).map(ZoneIndex) {
        map.load_zone(zone, &full);
    }
    let first_of_last = geometry.zone_regions(last).first();
    for _ in 0..1000 {
        let found = map.next_unhydrated(RegionIndex(0), 16).unwrap();
        assert_eq!((found.first(), found.count()), (first_of_last, 16));
    }
    let taken = start.elapsed();
    assert!(taken.as_secs() < 10, "{taken:?}");
    println!("{} regions loaded and searched 1000 times in {taken:?}", geometry.nr_regions());
}

proptest! {
    /// Against the oracle: grown maps have the old bits, and no others; growing a released one as well.
    #[test]
    fn a_grown_map_has_the_old_bits(
        old_size in 1u64..400 * 4096, more in 0u64..400 * 4096, per_zone in prop::sample::select(vec![1u64, 3, 8, 64, 100]),
        shards in 1u16..5, sets in prop::collection::vec((any::<prop::sample::Index>(), 1u64..40), 0..12), release in any::<bool>(),
    ) {
        let geometry = Geometry::new(old_size, RegionSize::new(4096).unwrap(), per_zone).unwrap();
        let grown = geometry.with_size(old_size + more).unwrap();
        let mut expected = vec![false; grown.nr_regions() as usize];
        for (at, len) in sets {
            let at = at.index(geometry.nr_regions() as usize);
            let end = (at + len as usize).min(geometry.nr_regions() as usize);
            expected[at..end].fill(true);
        }
        if release {
            expected[..geometry.nr_regions() as usize].fill(true);
        }
        for me in (0..shards).map(ShardIndex) {
            let state = SharedBits::default();
            let mut map = RegionMap::new(geometry, state.get(geometry), shards, me);
            let owns = |region: u64| geometry.owner_of(geometry.zone_of(RegionIndex(region)), shards) == me;
            for region in (0..geometry.nr_regions()).filter(|r| owns(*r) && expected[*r as usize]) {
                map.set(RegionRange::single(RegionIndex(region)));
            }
            let zones: Vec<_> = map.take_dirty().into_iter().map(|snapshot| snapshot.zone).collect();
            map.committed(&zones);
            if release {
                map.release();
            }
            map.grow(grown, state.get(grown));
            prop_assert!(map.is_all_durable() && !map.has_dirty() && *map.geometry() == grown);
            let owned: Vec<u64> = (0..grown.nr_regions()).filter(|r| owns(*r)).collect();
            for region in &owned {
                prop_assert_eq!(map.is_hydrated(RegionIndex(*region)), expected[*region as usize], "region {}", region);
            }
            let hydrated = owned.iter().filter(|r| expected[**r as usize]).count() as u64;
            if !map.is_released() {
                prop_assert_eq!((map.hydrated_count(), map.unhydrated_count()), (hydrated, owned.len() as u64 - hydrated));
            }
            let next = map.next_unhydrated(RegionIndex(0), 1).map(|run| run.first().0);
            prop_assert_eq!(next, owned.iter().copied().find(|r| !expected[*r as usize]));
            // It goes on as any other.
            while let Some(run) = map.next_unhydrated(RegionIndex(0), u64::MAX) {
                map.set(run);
            }
            let zones: Vec<_> = map.take_dirty().into_iter().map(|snapshot| snapshot.zone).collect();
            map.committed(&zones);
            map.release();
        }
    }
}
