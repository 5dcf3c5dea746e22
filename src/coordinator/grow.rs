//! Growing a clone while it is used.
//!
//! 1. The edges make the devices large enough, durably, and open them anew: [`GrowParts`].
//! 2. The clone is suspended, unless it is already: nothing is in flight, everything is committed.
//! 3. Every shard gets what its grown slice is made from; the old last region's new bytes go to the destination, if it is
//!    short and hydrated. The destination is flushed.
//! 4. The metadata grow: empty blocks for new zones, flush, both superblock copies ([`crate::meta::store::Store::grow`]). The new size counts
//!    from here on, after a crash too.
//! 5. The grown slices take the place of the old ones, and the clone goes on.
//!
//! A failure up to 4 leaves the clone as it was (`ro`, if it was a flush or the superblock that failed).

use super::suspend::Doing;
use super::{Coordinator, SUSPEND_TIME_MAX};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::join_all;
use crate::meta::codec::{self, SourceFingerprint, Superblock};
use crate::shard::ShardRequest;
use crate::units::{ByteSize, Generation, Geometry, ShardIndex};
use std::rc::Rc;

/// Brings to a shard what its grown slice is made from ([`crate::shard::Shard::stage`]).
pub(super) type Stage = Box<dyn Fn(ShardIndex) -> LocalBoxFuture<'static, Result<()>>>;

/// What the edges have prepared for a growth.
pub struct GrowParts {
    /// The size for which all of this was prepared: that of the clone as it was.
    pub from_size: u64,
    pub geometry: Geometry,
    /// Of what the grown clone takes from its source.
    pub source: SourceFingerprint,
    /// The same devices, opened with the size they have now, which is enough.
    pub metadata: Rc<dyn Disk>,
    pub destination: Rc<dyn Disk>,
    pub stage: Stage,
}

impl Coordinator {
    /// The superblock as last written.
    pub fn superblock(&self) -> Superblock {
        self.store.borrow().superblock()
    }

    /// Whether no metadata on disk can say that the clone is larger than `size`: a growth beyond it was not begun, or failed
    /// before the superblock.
    pub fn is_certainly_of(&self, size: u64) -> bool {
        let store = self.store.borrow();
        store.failure().is_none() && store.superblock().geometry.size() == size
    }

    /// Grows the clone; see the head of this file. A clone that was suspended stays so. Runs to its end even if nobody
    /// waits for it. Fails with InUse at once while it is being suspended or grown.
    pub async fn grow(self: &Rc<Self>, parts: GrowParts) -> Result<()> {
        let begun = self.begin(Doing::Growing)?;
        self.in_turn(Some(begun), move |this| async move {
            this.state.check_mode(true)?;
            let was_suspended = this.state.is_suspended();
            if !was_suspended {
                this.hold(SUSPEND_TIME_MAX).await?;
            }
            let result = this.grow_held(parts).await;
            if result.is_err() {
                let unstaged = this.on_all_shards(|clone| ShardRequest::Unstage { clone }).await;
                unstaged.into_iter().for_each(drop);
            }
            if result.is_ok() {
                // Before hydration of the new regions begins.
                let size = this.state.geometry().size();
                this.state.events().raise(EventKind::Resized, format!("resized to {}", ByteSize(size)));
            }
            if !was_suspended {
                this.release().await;
            }
            result
        })
        .await
    }

    async fn grow_held(self: &Rc<Self>, parts: GrowParts) -> Result<()> {
        // Holding it has committed what was dirty, unless a failure came before that.
        self.state.check_mode(true)?;
        let old = self.state.geometry();
        if parts.from_size != old.size() {
            let text = format!("clone '{}' has {} by now: try again", self.state.name, ByteSize(old.size()));
            return Err(Error::new(ErrorKind::InUse, text));
        }
        for staged in join_all((0..self.mesh.shards()).map(|shard| (parts.stage)(ShardIndex(shard))).collect()).await {
            staged?;
        }
        for filled in self.on_all_shards(|clone| ShardRequest::FillTail { clone }).await {
            filled?;
        }
        if let Err(error) = parts.destination.flush().await {
            return Err(self.degrade(error));
        }
        if self.state.is_stopping() {
            return Err(self.stopping());
        }
        let new_regions = parts.geometry.nr_regions() > old.nr_regions();
        self.grow_metadata(&parts, new_regions).await?;
        self.destination.replace(parts.destination);
        self.state.set_grown(parts.geometry, new_regions);
        for grown in self.on_all_shards(|clone| ShardRequest::Grow { clone }).await {
            // A shard that is lost with what its slice knew of durable bits.
            grown.map_err(|error| self.degrade(error))?;
        }
        Ok(())
    }

    async fn grow_metadata(&self, parts: &GrowParts, new_regions: bool) -> Result<()> {
        let _writing = self.writing.acquire(1).await;
        let store = self.store.borrow().clone();
        let generation = Generation(self.generation.get().0 + 1);
        let before = store.superblock();
        let state = if new_regions { codec::CloneState::Active } else { before.state };
        let superblock = Superblock { geometry: parts.geometry, source: parts.source, state, generation, ..before };
        match store.grow(parts.metadata.clone(), superblock).await {
            Ok(grown) => {
                self.store.replace(Rc::new(grown));
                self.has_generation(generation);
                Ok(())
            }
            Err(error) if store.failure().is_some() => Err(self.degrade(error)),
            Err(error) => Err(error),
        }
    }
}
