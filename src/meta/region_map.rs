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
//! Memory: 1 bit per region, rounded up to 8 bytes per zone, plus 8 bytes and 1 bit per zone, plus at most 16 bytes for
//! each zone that is dirty ([`RegionMap::memory_bytes`], [`RegionMap::memory_bytes_max`]). [`RegionMap::release`] gives
//! all of it back.

use super::codec::{REGIONS_MAX, REGIONS_PER_ZONE_MAX, ZONES_MAX, words_per_zone};
use crate::units::{Geometry, RegionIndex, RegionRange, ShardIndex, ZoneIndex};

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
    /// The bits of the owned zones, one after the other.
    words: Vec<u64>,
    zones: Vec<ZoneState>,
    /// One bit per owned zone: it has unhydrated regions.
    incomplete: Vec<u64>,
    dirty: Vec<ZoneIndex>,
    /// Sum of `committing` over all zones.
    committing: u64,
    nr_owned: u64,
    hydrated: u64,
    released: bool,
}

/// The first of the bits `from..end` that is `want`, or `end`.
pub(super) fn first_bit(words: &[u64], from: usize, end: usize, want: bool) -> usize {
    let flip = if want { 0 } else { u64::MAX };
    let mut at = from;
    while at < end {
        let ahead = (words[at / 64] ^ flip) >> (at % 64);
        if ahead != 0 {
            return (at + ahead.trailing_zeros() as usize).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

/// The bits `from..end` (within one word) as a mask.
fn mask(from: usize, end: usize) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - end))
}

impl RegionMap {
    /// The map of shard `me` of `shards`, nothing hydrated. Panics when `me` is not one of them or the geometry
    /// exceeds the format's limits (which the codec has checked).
    pub fn new(geometry: Geometry, shards: u16, me: ShardIndex) -> Self {
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
            words: vec![0; owned_zones * words_per_zone],
            zones: vec![ZoneState::default(); owned_zones],
            incomplete,
            dirty: Vec::new(),
            committing: 0,
            nr_owned,
            hydrated: 0,
            released: false,
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

    fn zone_words(&self, slot: usize) -> &[u64] {
        &self.words[slot * self.words_per_zone..(slot + 1) * self.words_per_zone]
    }

    /// Adds what the metadata say of a zone. Once per zone, before it is used; leaves the zone clean.
    pub fn load_zone(&mut self, zone: ZoneIndex, bits: &[u64]) {
        let slot = self.slot(zone);
        assert!(!self.released && self.zones[slot].hydrated == 0, "zone {zone} is loaded twice");
        let regions = self.geometry.zone_regions(zone).count();
        let start = slot * self.words_per_zone;
        self.words[start..start + self.words_per_zone].copy_from_slice(bits);
        let count = bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        let stray = first_bit(bits, regions as usize, self.words_per_zone * 64, true);
        assert_eq!(stray, self.words_per_zone * 64, "zone {zone} has bits without a region");
        self.count(slot, regions, count);
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
        let slot = self.slot(zone);
        let regions = self.geometry.zone_regions(zone);
        let end = end.min(regions.end());
        let range = |end| RegionRange::between(region, end).expect("at least one region");
        if self.released {
            return (true, range(end));
        }
        let words = self.zone_words(slot);
        let from = (region.0 - regions.first().0) as usize;
        let hydrated = words[from / 64] >> (from % 64) & 1 == 1;
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
        if self.released {
            return 0;
        }
        let mut at = (range.first().0 - regions.first().0) as usize;
        let end = at + range.count() as usize;
        let mut new = 0;
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let word = &mut self.words[slot * self.words_per_zone + at / 64];
            let bits = mask(at % 64, (stop - 1) % 64 + 1);
            new += u64::from((bits & !*word).count_ones());
            *word |= bits;
            at = stop;
        }
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
        if self.released || max == 0 || from.0 >= self.geometry.nr_regions() {
            return None;
        }
        let from_zone = self.geometry.zone_of(from);
        let first_slot = from_zone.0.saturating_sub(u64::from(self.me.0)).div_ceil(u64::from(self.shards));
        let mut slot = usize::try_from(first_slot).ok()?;
        loop {
            slot = first_bit(&self.incomplete, slot, self.zones.len(), true);
            if slot >= self.zones.len() {
                return None;
            }
            let zone = self.zone_at(slot);
            let regions = self.geometry.zone_regions(zone);
            let skip = if zone == from_zone { (from.0 - regions.first().0) as usize } else { 0 };
            let (words, len) = (self.zone_words(slot), regions.count() as usize);
            let start = first_bit(words, skip, len, false);
            if start < len {
                let limit = len.min(start.saturating_add(usize::try_from(max).unwrap_or(usize::MAX)));
                let stop = first_bit(words, start, limit, true);
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
            ZoneSnapshot { zone, bits: self.zone_words(slot).into() }
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
        self.released || (!self.zones[slot].dirty && self.zones[slot].committing == 0)
    }

    /// Whether all that the map says is durable.
    pub fn is_all_durable(&self) -> bool {
        self.dirty.is_empty() && self.committing == 0
    }

    /// Gives the memory back when all is hydrated and durable; every region is hydrated from then on. Panics when
    /// it is not so.
    pub fn release(&mut self) {
        assert!(self.unhydrated_count() == 0 && self.is_all_durable(), "the map is still needed");
        self.released = true;
        self.words = Vec::new();
        self.zones = Vec::new();
        self.incomplete = Vec::new();
    }

    /// The clone has grown: the new regions are not hydrated. Everything must be durable. Costs no second map in memory;
    /// a released one is made anew, unless there are no new regions.
    ///
    /// # Panics
    /// When something is not durable, or the clone does not grow.
    pub fn grow(&mut self, geometry: Geometry) {
        let same = |g: &Geometry| (g.region_size(), g.regions_per_zone());
        assert!(same(&geometry) == same(&self.geometry) && geometry.size() >= self.geometry.size(), "not a growth");
        assert!(self.is_all_durable(), "the map has bits that are not durable");
        if self.released && geometry.nr_regions() == self.geometry.nr_regions() {
            self.geometry = geometry;
            return;
        }
        let mut old = std::mem::replace(self, Self::new(geometry, self.shards, self.me));
        if old.released {
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
            let len = self.words.len();
            self.words = std::mem::take(&mut old.words);
            self.words.resize(len, 0);
            for (slot, zone) in old.zones.iter().enumerate() {
                let regions = self.geometry.zone_regions(self.zone_at(slot)).count();
                self.count(slot, regions, u64::from(zone.hydrated));
            }
        }
    }

    /// What the map takes now.
    pub fn memory_bytes(&self) -> u64 {
        let words = self.words.capacity() + self.incomplete.capacity();
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

    #[cfg(test)]
    fn is_released(&self) -> bool {
        self.released
    }
}

#[cfg(test)]
mod tests;
