//! The region map: which regions are hydrated, for the zones that one shard owns.
//!
//! Zone z belongs to shard z mod N. A bit says "read this region from the destination" and only ever goes from 0
//! to 1; it is set when the region's data write has completed, not before. The map also knows which zones have
//! bits that the metadata do not have yet:
//!
//! ```text
//!   set()            take_dirty()            committed()
//!   clean ───▶ dirty ───────────▶ committing ───────────▶ clean = durable
//!                ▲ set() while committing: dirty again, and still committing
//! ```
//!
//! Asking about or setting a region of another shard's zone is a broken invariant and panics, in release too: two
//! owners of one bit lose data.
//!
//! The bits themselves are where the other shards see them, too ([`super::hydrated_bits`]): what is hydrated can be served
//! by anybody.
//!
//! Memory: 1 bit per region, rounded up to 8 bytes per zone, plus 8 bytes and 1 bit per zone, plus at most 16 bytes for
//! each zone that is dirty ([`RegionMap::memory_bytes`], [`RegionMap::memory_bytes_max`]). [`RegionMap::release`] gives
//! all of it back, once every shard has done so.

use super::codec::{REGIONS_MAX, REGIONS_PER_ZONE_MAX, ZONES_MAX, words_per_zone};
use super::hydrated_bits::{HydratedBits, Words, first_bit, mask};
use crate::units::{Geometry, RegionIndex, RegionRange, ShardIndex, ZoneIndex};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// The bits of one zone at one moment: what a commit writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneSnapshot {
    pub zone: ZoneIndex,
    /// [`words_per_zone`] words; bit i of word w is region `64 w + i` of the zone.
    pub bits: Box<[u64]>,
}

#[derive(Clone, Copy, Default)]
struct ZoneState {
    hydrated: u32,
    dirty: bool,
    /// Snapshots that were taken and not yet reported as committed.
    committing: u16,
}

/// See the head of this file.
pub struct RegionMap {
    geometry: Geometry,
    shards: u16,
    me: ShardIndex,
    words_per_zone: usize,
    /// `None` when they were released.
    bits: Option<Arc<HydratedBits>>,
    zones: Vec<ZoneState>,
    /// One bit per owned zone: it has unhydrated regions.
    incomplete: Vec<u64>,
    dirty: Vec<ZoneIndex>,
    /// Sum of `committing` over all zones.
    committing: u64,
    nr_owned: u64,
    hydrated: u64,
}

impl RegionMap {
    /// The map of shard `me` of `shards`, nothing hydrated. `bits`: those that all shards share, of this geometry. Panics
    /// when `me` is not one of them or the geometry exceeds the format's limits (which the codec has checked).
    pub fn new(geometry: Geometry, bits: Arc<HydratedBits>, shards: u16, me: ShardIndex) -> Self {
        assert!(me.0 < shards, "shard {me} of {shards}");
        assert!(geometry.regions_per_zone() <= REGIONS_PER_ZONE_MAX, "regions per zone");
        assert!(geometry.nr_regions() <= REGIONS_MAX && geometry.nr_zones() <= ZONES_MAX, "too many regions");
        let owned = (geometry.nr_zones() + u64::from(shards - 1 - me.0)) / u64::from(shards);
        let owned_zones = owned as usize;
        let words_per_zone = words_per_zone(&geometry);
        let mut incomplete = vec![u64::MAX; owned_zones.div_ceil(64)];
        if let Some(last) = incomplete.last_mut() {
            *last = mask(0, (owned_zones - 1) % 64 + 1);
        }
        let last_zone = ZoneIndex(geometry.nr_zones() - 1);
        let mut nr_owned = owned * geometry.regions_per_zone();
        if geometry.owner_of(last_zone, shards) == me {
            nr_owned -= geometry.regions_per_zone() - geometry.zone_regions(last_zone).count();
        }
        Self {
            geometry,
            shards,
            me,
            words_per_zone,
            bits: Some(bits),
            zones: vec![ZoneState::default(); owned_zones],
            incomplete,
            dirty: Vec::new(),
            committing: 0,
            nr_owned,
            hydrated: 0,
        }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The index of an owned zone among the owned ones. Panics when it is another shard's.
    fn slot(&self, zone: ZoneIndex) -> usize {
        assert!(
            zone.0 < self.geometry.nr_zones() && self.geometry.owner_of(zone, self.shards) == self.me,
            "zone {zone} is not owned by shard {} of {}",
            self.me,
            self.shards
        );
        (zone.0 / u64::from(self.shards)) as usize
    }

    fn zone_at(&self, slot: usize) -> ZoneIndex {
        ZoneIndex(slot as u64 * u64::from(self.shards) + u64::from(self.me.0))
    }

    /// Sets bits of an owned zone, and returns how many were not set. `masks`: words of the zone, and their bits.
    fn set_bits(&mut self, zone: ZoneIndex, masks: impl Iterator<Item = (usize, u64)>) -> u64 {
        let Some(bits) = &self.bits else { return 0 };
        let words = bits.zone_to_set(zone);
        // The only writer of these words.
        masks.map(|(at, mask)| u64::from((mask & !words[at].fetch_or(mask, Release)).count_ones())).sum()
    }

    /// Whether all of `regions` are hydrated, whoever owns them; what was hydrated by others a moment ago may be missing.
    pub fn is_all_hydrated(&self, regions: RegionRange) -> bool {
        self.bits.as_ref().is_none_or(|bits| bits.is_all_hydrated(regions))
    }

    /// Adds what the metadata say of a zone. Once per zone, before it is used; leaves the zone clean.
    pub fn load_zone(&mut self, zone: ZoneIndex, bits: &[u64]) {
        let slot = self.slot(zone);
        assert!(self.bits.is_some() && self.zones[slot].hydrated == 0, "zone {zone} is loaded twice");
        assert_eq!(bits.len(), self.words_per_zone, "the words of zone {zone}");
        let regions = self.geometry.zone_regions(zone).count();
        let stray = first_bit(bits, regions as usize, self.words_per_zone * 64, true);
        assert_eq!(stray, self.words_per_zone * 64, "zone {zone} has bits without a region");
        if bits.iter().any(|word| *word != 0) {
            let count = self.set_bits(zone, bits.iter().copied().enumerate());
            self.count(slot, regions, count);
        }
    }

    fn count(&mut self, slot: usize, regions: u64, new: u64) {
        self.hydrated += new;
        self.zones[slot].hydrated += new as u32;
        if u64::from(self.zones[slot].hydrated) == regions {
            self.incomplete[slot / 64] &= !(1 << (slot % 64));
        }
    }

    /// Whether the region is served from the destination.
    pub fn is_hydrated(&self, region: RegionIndex) -> bool {
        self.run_from(region, RegionIndex(region.0 + 1)).0
    }

    /// The longest run of regions from `region` with the same state, and that state (true: hydrated). It ends at
    /// `end` (which must be behind `region`, and inside the device) or at the zone's end at the latest.
    pub fn run_from(&self, region: RegionIndex, end: RegionIndex) -> (bool, RegionRange) {
        assert!(region < end && end.0 <= self.geometry.nr_regions(), "regions {region} to before {end}");
        let zone = self.geometry.zone_of(region);
        let _owned = self.slot(zone);
        let regions = self.geometry.zone_regions(zone);
        let end = end.min(regions.end());
        let range = |end| RegionRange::between(region, end).expect("at least one region");
        let Some(bits) = &self.bits else { return (true, range(end)) };
        let Some(words) = bits.zone(zone) else { return (false, range(end)) };
        let from = (region.0 - regions.first().0) as usize;
        let hydrated = words.word(from / 64) >> (from % 64) & 1 == 1;
        let stop = first_bit(words, from, (end.0 - regions.first().0) as usize, !hydrated);
        (hydrated, range(RegionIndex(regions.first().0 + stop as u64)))
    }

    /// Marks regions of one zone as hydrated and returns how many were not. Their data writes must have completed.
    /// Panics when the regions are not all in one owned zone.
    pub fn set(&mut self, range: RegionRange) -> u64 {
        let zone = self.geometry.zone_of(range.first());
        let slot = self.slot(zone);
        let regions = self.geometry.zone_regions(zone);
        assert!(range.end() <= regions.end(), "{range:?} leaves zone {zone}");
        let first = (range.first().0 - regions.first().0) as usize;
        let end = first + range.count() as usize;
        let masks = (first / 64..end.div_ceil(64)).map(|at| {
            let from = first.max(at * 64) % 64;
            let last = end.min((at + 1) * 64) - 1;
            (at, mask(from, last % 64 + 1))
        });
        let new = self.set_bits(zone, masks);
        if new > 0 {
            self.count(slot, regions.count(), new);
            if !std::mem::replace(&mut self.zones[slot].dirty, true) {
                self.dirty.push(zone);
            }
        }
        new
    }

    /// The next run of unhydrated regions from `from` on, in device order among the owned zones, without wrapping;
    /// within one zone and at most `max` long. `None` when there is none. Skips hydrated zones 64 at a time.
    pub fn next_unhydrated(&self, from: RegionIndex, max: u64) -> Option<RegionRange> {
        let bits = self.bits.as_ref()?;
        if max == 0 || from.0 >= self.geometry.nr_regions() {
            return None;
        }
        let from_zone = self.geometry.zone_of(from);
        let first_slot = from_zone.0.saturating_sub(u64::from(self.me.0)).div_ceil(u64::from(self.shards));
        let mut slot = usize::try_from(first_slot).ok()?;
        loop {
            slot = first_bit(&self.incomplete[..], slot, self.zones.len(), true);
            if slot >= self.zones.len() {
                return None;
            }
            let zone = self.zone_at(slot);
            let regions = self.geometry.zone_regions(zone);
            let skip = if zone == from_zone { (from.0 - regions.first().0) as usize } else { 0 };
            let (words, len) = (bits.zone(zone), regions.count() as usize);
            let start = words.map_or(skip, |words| first_bit(words, skip, len, false));
            if start < len {
                let limit = len.min(start.saturating_add(usize::try_from(max).unwrap_or(usize::MAX)));
                let stop = words.map_or(limit, |words| first_bit(words, start, limit, true));
                let region = |i: usize| RegionIndex(regions.first().0 + i as u64);
                return RegionRange::between(region(start), region(stop));
            }
            slot += 1;
        }
    }

    /// How many of the owned regions are hydrated.
    pub fn hydrated_count(&self) -> u64 {
        self.hydrated
    }
    /// How many of the owned regions are not.
    pub fn unhydrated_count(&self) -> u64 {
        self.nr_owned - self.hydrated
    }

    /// Whether there are bits that no commit has taken.
    pub fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Hands over the bits of every dirty zone, in order, and marks these zones as committing. Costs by the dirty
    /// zones, not by the map.
    pub fn take_dirty(&mut self) -> Vec<ZoneSnapshot> {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        let snapshots = dirty.into_iter().map(|zone| {
            let slot = self.slot(zone);
            let state = &mut self.zones[slot];
            state.dirty = false;
            state.committing = state.committing.checked_add(1).expect("commits of one zone in flight");
            self.committing += 1;
            let words = self.bits.as_ref().and_then(|bits| bits.zone(zone)).expect("a dirty zone has bits");
            ZoneSnapshot { zone, bits: words.iter().map(|word| word.load(Acquire)).collect() }
        });
        snapshots.collect()
    }

    /// The snapshots of these zones, taken before, are durable now. Not called after a failed commit: its zones then
    /// never count as durable.
    pub fn committed(&mut self, zones: &[ZoneIndex]) {
        for zone in zones {
            let slot = self.slot(*zone);
            let state = &mut self.zones[slot];
            state.committing = state.committing.checked_sub(1).expect("committed zones were taken");
            self.committing -= 1;
        }
    }

    /// Whether the metadata hold all that the map says of the region: its zone is neither dirty nor committing.
    pub fn is_durable(&self, region: RegionIndex) -> bool {
        let slot = self.slot(self.geometry.zone_of(region));
        self.bits.is_none() || (!self.zones[slot].dirty && self.zones[slot].committing == 0)
    }

    /// Whether all that the map says is durable.
    pub fn is_all_durable(&self) -> bool {
        self.dirty.is_empty() && self.committing == 0
    }

    /// Gives the memory back when all is hydrated and durable; every region is hydrated from then on. Panics when
    /// it is not so.
    pub fn release(&mut self) {
        assert!(self.unhydrated_count() == 0 && self.is_all_durable(), "the map is still needed");
        self.bits = None;
        self.zones = Vec::new();
        self.incomplete = Vec::new();
    }

    /// The clone has grown: the new regions are not hydrated. Everything must be durable. `bits`: those that all shards share
    /// from now on. Those of a released map are set anew, unless there are no new regions.
    ///
    /// # Panics
    /// When something is not durable, or the clone does not grow.
    pub fn grow(&mut self, geometry: Geometry, bits: Arc<HydratedBits>) {
        let same = |g: &Geometry| (g.region_size(), g.regions_per_zone());
        assert!(same(&geometry) == same(&self.geometry) && geometry.size() >= self.geometry.size(), "not a growth");
        assert!(self.is_all_durable(), "the map has bits that are not durable");
        if self.is_released() && geometry.nr_regions() == self.geometry.nr_regions() {
            self.geometry = geometry;
            return;
        }
        let old = std::mem::replace(self, Self::new(geometry, bits, self.shards, self.me));
        if old.is_released() {
            let last = RegionIndex(old.geometry.nr_regions());
            for slot in 0..self.zones.len() {
                let regions = self.geometry.zone_regions(self.zone_at(slot));
                if let Some(range) = RegionRange::between(regions.first(), regions.end().min(last)) {
                    self.set(range);
                }
            }
            self.dirty.clear();
            self.zones.iter_mut().for_each(|zone| zone.dirty = false);
        } else {
            for (slot, zone) in old.zones.iter().enumerate() {
                let regions = self.geometry.zone_regions(self.zone_at(slot)).count();
                self.count(slot, regions, u64::from(zone.hydrated));
            }
        }
    }

    /// What the map takes now: its part of what all shards share included.
    pub fn memory_bytes(&self) -> u64 {
        if self.is_released() {
            return 0;
        }
        let words = self.zones.len() * self.words_per_zone + self.incomplete.capacity();
        let zones = self.zones.capacity() * size_of::<ZoneState>() + self.dirty.capacity() * size_of::<ZoneIndex>();
        (words * size_of::<u64>() + zones) as u64
    }
    /// What it may take, by the formula at the head of this file.
    pub fn memory_bytes_max(&self) -> u64 {
        let owned = self.nr_owned.div_ceil(self.geometry.regions_per_zone());
        let per_zone = 8 * self.words_per_zone as u64 + 8 + 16;
        // A list has room for four from the start.
        owned * per_zone + 8 * owned.div_ceil(64) + 32
    }

    fn is_released(&self) -> bool {
        self.bits.is_none()
    }
}

#[cfg(test)]
mod tests;
