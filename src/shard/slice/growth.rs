//! A slice of a clone that grows: the slice of the new size takes the place of the old one.
//!
//! A slice's geometry never changes while it is used. The grown one is made beside the old one, while nothing is in
//! flight; it gets the map, and all that goes on, when the new size is durable.

use super::CloneSlice;
use crate::disk::Disk;
use crate::error::Result;
use crate::local::Notify;
use crate::meta::hydrated_bits::HydratedBits;
use crate::meta::region_map::RegionMap;
use crate::source::Source;
use crate::units::{ByteRange, Geometry, RegionIndex, ShardIndex};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A map for nobody: of a slice that has none yet, or none any more.
fn no_map(geometry: &Geometry) -> RegionMap {
    let geometry = geometry.with_size(1).expect("1 byte is a size");
    RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0))
}

impl CloneSlice {
    /// The slice that is to take this one's place. It can't be used before [`Self::replace`]. The destination and the
    /// source have at least the size of `geometry`.
    pub fn grown(&self, geometry: Geometry, destination: Rc<dyn Disk>, source: Rc<dyn Source>) -> Rc<Self> {
        Rc::new(Self {
            state: self.state.clone(),
            geometry,
            me: self.me,
            map: RefCell::new(no_map(&geometry)),
            locks: self.locks.clone(),
            destination,
            source: RefCell::new(Some(source)),
            env: self.env.clone(),
            mesh: self.mesh.clone(),
            copies: self.copies.clone(),
            sched: RefCell::default(),
            wake: Notify::default(),
            launching: Cell::new(false),
            commits_in_flight: Cell::new(0),
            direct_writes: Cell::new(0),
            replaced: Cell::new(false),
            counters: self.counters.clone(),
            failures: RefCell::default(),
        })
    }

    /// On the grown slice, before its size counts: when the old last region is short and hydrated (on this shard), the bytes
    /// it gains are not in the destination. Writes them there. Not durable before the destination is flushed.
    pub async fn fill_tail(&self, old: &CloneSlice) -> Result<()> {
        let (old_size, last) = (old.geometry.size(), RegionIndex(old.geometry.nr_regions() - 1));
        let region_end = (last.0 + 1) << self.geometry.region_size().shift();
        let Some(tail) = ByteRange::between(old_size, region_end.min(self.geometry.size())) else { return Ok(()) };
        let is_mine = self.geometry.owner_of(self.geometry.zone_of(last), self.mesh.shards()) == self.me;
        if is_mine && old.map.borrow().is_hydrated(last) {
            self.copy_chunks(tail).await?;
        }
        Ok(())
    }

    /// Takes over from the old slice, which is not used any more: its hydration ends.
    pub fn replace(&self, old: &CloneSlice) {
        let mut map = old.map.replace(no_map(&old.geometry));
        map.grow(self.geometry, self.state.hydrated_bits(self.geometry));
        self.map.replace(map);
        self.sched.replace(old.sched.take());
        self.failures.replace(old.failures.take());
        old.source.borrow_mut().take();
        old.replaced.set(true);
        old.wake.notify();
        if self.state.is_complete() {
            self.source.borrow_mut().take();
        }
    }
}
