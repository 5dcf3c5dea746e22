//! What must hold of a clone at every step, judged from outside of it: from the bytes of its devices.
//!
//! * Law 1, and that bits only go from 0 to 1: every metadata write is looked at before anything of it happens. For each
//!   bit that it sets, all that a crash may leave of the region in the destination must be allowed.
//! * Law 2: when a flush, or a change with FUA, is acknowledged, everything that a crash may leave of the bytes it is about,
//!   and of the bits that route to them, must be allowed. A crash keeps any version of any sector for itself, so all
//!   crash images are judged, not a sample.
//! * Law 4: a bit that is written is set in the shard that owns it; the shards' counts and the total agree.
//! * Counters stay in their bounds, and are back at nothing when nothing goes on.
//!
//! Bits are read from the bytes by the drawing at the head of the codec, not by the codec.

use super::clone::SimClone;
use super::oracle::Oracle;
use super::report::Group;
use crate::meta::codec::BLOCK_SIZE;
use crate::shard::copy::COPY_UNIT_BYTES;
use crate::units::{ByteRange, ShardIndex};
use std::cell::Cell;
use std::rc::{Rc, Weak};

const SECTOR: usize = 512;
/// Where the bits begin in a sector of a bitmap block.
const BITS: usize = 32;
/// Blocks in front of the bitmap.
const FIRST_BLOCK: u64 = 2;

/// See the head of this file.
pub struct Laws {
    clone: Weak<SimClone>,
    oracle: Oracle,
    hydrated: Cell<u64>,
}

/// A sector of a bitmap block.
struct BitmapSector<'a>(&'a [u8]);

impl<'a> BitmapSector<'a> {
    /// `None`: these bytes are something else.
    fn new(bytes: &'a [u8]) -> Option<Self> {
        (bytes[4..8] == *b"hyBM").then_some(Self(bytes))
    }
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }
    fn zone(&self) -> u64 {
        self.u64_at(16)
    }
    fn first_region(&self) -> u64 {
        self.u64_at(24)
    }
    fn words(&self) -> impl Iterator<Item = u64> {
        (BITS..SECTOR).step_by(8).map(|at| self.u64_at(at))
    }
    fn is_set(&self, region: u64) -> bool {
        let bit = (region - self.first_region()) as usize;
        self.0[BITS + bit / 8] >> (bit % 8) & 1 == 1
    }
}

impl Laws {
    /// Watches a clone that has just started until its devices crash.
    pub fn watch(clone: &Rc<SimClone>, oracle: &Oracle) -> Rc<Self> {
        let laws = Rc::new(Self { clone: Rc::downgrade(clone), oracle: oracle.clone(), hydrated: Cell::new(0) });
        let (watching, stepping) = (laws.clone(), laws.clone());
        clone.devices.metadata.set_watch(move |offset, before, after| watching.metadata_changes(offset, before, after));
        clone.sim.check_each_step(move || stepping.step());
        laws
    }

    fn metadata_changes(&self, offset: u64, before: &[u8], after: &[u8]) {
        let Some(clone) = self.clone.upgrade() else { return };
        let sectors = before.chunks_exact(SECTOR).zip(after.chunks_exact(SECTOR)).zip((offset..).step_by(SECTOR));
        for ((before, after), at) in sectors {
            if at < FIRST_BLOCK * BLOCK_SIZE as u64 {
                continue;
            }
            let new = BitmapSector::new(after).unwrap_or_else(|| panic!("no bitmap is written at {at}"));
            assert_eq!(new.zone() + FIRST_BLOCK, at / BLOCK_SIZE as u64, "the zone of the block at {at}");
            let old = BitmapSector::new(before).filter(|old| old.zone() == new.zone());
            let mut old_words = old.as_ref().map(|old| old.words());
            for (word, bits) in (0..).zip(new.words()) {
                let before = old_words.as_mut().and_then(Iterator::next).unwrap_or(0);
                assert_eq!(before & !bits, 0, "bits of zone {} are taken back at {at}", new.zone());
                let added = bits & !before;
                for bit in (0..64).filter(|bit| added >> bit & 1 == 1) {
                    self.bit_is_set(&clone, new.first_region() + 64 * word + bit);
                }
            }
        }
    }

    /// Laws 1 and 4, for a bit on its way to the metadata.
    fn bit_is_set(&self, clone: &SimClone, region: u64) {
        let geometry = clone.geometry();
        clone.sim.count(Group::Check, "law 1");
        assert!(region < geometry.nr_regions(), "the bit of region {region} of {}", geometry.nr_regions());
        let region = crate::units::RegionIndex(region);
        let bytes = geometry.bytes_of(crate::units::RegionRange::single(region));
        clone.devices.destination.each_version(bytes, |start, found| {
            if let Err(what) = self.oracle.check_medium(start, found) {
                panic!("law 1: the bit of region {region} is written, but of the destination {what}");
            }
        });
        let owner = geometry.owner_of(geometry.zone_of(region), clone.net.shards());
        if let Ok(slice) = clone.net.shard(owner).slice(clone.state.id) {
            assert!(slice.map().is_hydrated(region), "law 4: region {region} is not hydrated in shard {owner}");
        }
    }

    /// Law 2, of bytes whose durability was just acknowledged.
    pub fn check_durable(&self, range: ByteRange) {
        let Some(clone) = self.clone.upgrade() else { return };
        clone.sim.count(Group::Check, "law 2");
        let geometry = clone.geometry();
        let Some(range) = range.intersection(geometry.whole()) else { return };
        let words_per_sector = geometry.regions_per_zone().div_ceil(64).div_ceil((BLOCK_SIZE / SECTOR) as u64);
        for region in geometry.touched(range).iter() {
            let zone = geometry.zone_of(region);
            let word = (region.0 - geometry.zone_regions(zone).first().0) / 64;
            let at = (FIRST_BLOCK + zone.0) * BLOCK_SIZE as u64 + word / words_per_sector * SECTOR as u64;
            let (mut may_be_set, mut may_be_unset) = (false, false);
            clone.devices.metadata.each_version(ByteRange::new(at, SECTOR as u64).unwrap(), |_, bytes| {
                let set = BitmapSector::new(bytes).expect("a bitmap").is_set(region.0);
                (may_be_set, may_be_unset) = (may_be_set || set, may_be_unset || !set);
            });
            let bytes = geometry.bytes_of(crate::units::RegionRange::single(region));
            let bytes = bytes.intersection(range).expect("it is touched");
            if may_be_set {
                clone.devices.destination.each_version(bytes, |start, found| {
                    if let Err(what) = self.oracle.check_medium(start, found) {
                        panic!("law 2: {range:?} is acknowledged as durable, but of the destination {what}");
                    }
                });
            }
            if may_be_unset {
                let shown = clone.coordinator.superblock().source.size;
                let content = clone.devices.source.content();
                let byte = |at: u64| if at < shown { content[at as usize] } else { 0 };
                let found: Vec<u8> = (bytes.start()..bytes.end()).map(byte).collect();
                if let Err(what) = self.oracle.check_medium(bytes.start(), &found) {
                    panic!(
                        "law 2: {range:?} is acknowledged as durable, but region {region} may come from the source: {what}"
                    );
                }
            }
        }
    }

    /// What costs next to nothing.
    fn step(&self) {
        let Some(clone) = self.clone.upgrade() else { return };
        let (state, nr_regions) = (&clone.state, clone.geometry().nr_regions());
        let (hydrated, hydrating) = (state.hydrated(), state.hydrating());
        assert!(
            hydrated >= self.hydrated.replace(hydrated) && hydrated <= nr_regions,
            "{hydrated} regions are hydrated"
        );
        // A region counts twice while a batch that has not begun and a client's copy want it.
        assert!(hydrating <= 2 * nr_regions, "{hydrating} regions are hydrating");
        let mut of_shards = Some(0);
        for shard in (0..clone.net.shards()).map(ShardIndex) {
            let pool = clone.net.shard(shard).copy_pool();
            assert!(pool.used() <= pool.io_memory() + COPY_UNIT_BYTES, "{} bytes are used for copies", pool.used());
            let slice = clone.net.shard(shard).slice(state.id).ok();
            of_shards = of_shards.zip(slice).map(|(sum, slice)| sum + slice.map().hydrated_count());
        }
        assert!(
            of_shards.is_none_or(|sum| sum == hydrated),
            "the shards have {of_shards:?} hydrated regions, {hydrated} in all"
        );
    }

    /// Nothing goes on any more.
    pub fn check_idle(&self) {
        let Some(clone) = self.clone.upgrade() else { return };
        assert_eq!((clone.state.hydrating(), clone.state.foreground_in_flight()), (0, 0));
        for shard in (0..clone.net.shards()).map(ShardIndex) {
            assert_eq!(clone.net.shard(shard).copy_pool().used(), 0, "memory of copies on shard {shard}");
        }
    }
}
