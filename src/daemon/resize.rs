//! Growing a clone that runs: what the daemon makes ready before [`crate::coordinator::Coordinator::grow`] does it.
//!
//! Everything that can fail without a change comes first: the source, opened anew, must still be the clone's; then
//! both devices are made large enough, the metadata first, with their space. When the rest fails, files are cut back to
//! the length that they had: what is behind the clone would make the destination more than a copy of its source. Only
//! when a superblock with the new size may have reached the disk, everything stays as it is.
//!
//! Who is killed in between leaves a longer destination. It is not cut back at the next start, which can't know whose
//! doing that was (a destination may be larger than its clone, as with dm-clone); it is told instead.

use super::activate::{self, SourceCheck};
use super::prepare::{OpenSource, beside_clients, disk_parts, fingerprint_of, open_source};
use super::running::RunningClone;
use super::shard_source::SourceRecipe;
use crate::bail;
use crate::coordinator::GrowParts;
use crate::devices::{self, Device, Grown};
use crate::disk::ring::{DiskParts, RingDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::meta::codec::{CloneState, SourceFingerprint, Superblock, metadata_size_needed};
use crate::meta::growth::{self, Wanted};
use crate::ring::Ring;
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use crate::source::Source;
use crate::source::fingerprint::Samples;
use crate::source::identity::SourceIdentity;
use crate::source::uri::SourceSpec;
use crate::units::{CloneId, Geometry, ShardIndex};
use std::cell::Cell;
use std::ffi::OsStr;
use std::rc::Rc;
use std::sync::Arc;

/// One resize at a time.
struct Resizing<'a>(&'a Cell<bool>);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Makes a device large enough, on a thread of its own: extending a file waits for its file system.
async fn enlarge(device: &Device, size: u64) -> Result<Enlarged> {
    let mut copy = device.try_clone()?;
    let enlarge = move || devices::grow(&mut copy, size).map(|grown| Enlarged { device: copy, grown });
    Ring::current().blocking(enlarge).await.map_err(|error| Error::from_io(error, device.label()))?
}

/// A device that is large enough, and what was done for that.
struct Enlarged {
    device: Device,
    grown: Option<Grown>,
}

impl Enlarged {
    /// Nobody knows of what was added: takes it away.
    async fn undo(self) {
        let Self { device, grown: Some(grown) } = self else { return };
        let label = device.label();
        match Ring::current().blocking(move || devices::cut_back(&device, grown)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!("{error}"),
            Err(error) => log::warn!("{label} can't be cut back: {error}"),
        }
    }
}

/// What becomes of a clone.
struct Growing {
    from_size: u64,
    geometry: Geometry,
    fingerprint: SourceFingerprint,
    /// When it is opened anew.
    samples: Option<Samples>,
    /// How much of its source.
    shown: u64,
}

impl RunningClone {
    /// Grows the clone to what is wanted; true when it has grown, false when it has that size already. Must run to its
    /// end.
    pub async fn resize(&self, context: &Rc<ShardContext>, wanted: Wanted) -> Result<bool> {
        let clone = &self.clone;
        if clone.resizing.replace(true) {
            bail!(InUse, "clone '{}' is being resized already", clone.state.name);
        }
        let _resizing = Resizing(&clone.resizing);
        clone.state.check_mode(true)?;
        clone.coordinator.check_idle()?;
        let superblock = clone.coordinator.superblock();
        // Behind its zeros a clone takes nothing more from its source.
        let is_padded = superblock.source_len() < superblock.geometry.size();
        let wants_source =
            wanted.needs_source() && !(is_padded && wanted.size.is_some()) && !superblock.source.is_none();
        let source = match wants_source {
            true => Some(self.source_again(context, &superblock).await?),
            false => None,
        };
        let source_size = source.as_ref().map(|source| source.source.size());
        let planned = growth::plan(&superblock, wanted, source_size);
        let growth = planned.map_err(|error| error.within(format!("clone '{}'", clone.state.name)))?;
        let Some(growth) = growth else { return Ok(false) };
        let (geometry, shown) = (growth.geometry, growth.source_len);
        // What is only let go of needs no new connection.
        let source = source.filter(|_| shown > 0);
        let (fingerprint, samples) = match &source {
            Some(source) => {
                let (fingerprint, samples) = fingerprint_of(&self.config, source, shown).await?;
                (fingerprint, Some(samples))
            }
            None if shown == 0 => (SourceFingerprint::NONE, None),
            None => (superblock.source, None),
        };

        let [destination, metadata] = {
            let devices = clone.devices.borrow();
            [devices[0].try_clone()?, devices[1].try_clone()?]
        };
        let (copy, metadata_size) = (metadata.try_clone()?, metadata_size_needed(&geometry));
        // What is new of them is written at once, and a failure of that would make the clone read-only.
        beside_clients(move || devices::check_free_space_of(&copy, metadata_size)).await?;
        let metadata = enlarge(&metadata, metadata_size).await?;
        let destination = match enlarge(&destination, geometry.size()).await {
            Ok(destination) => destination,
            Err(error) => {
                metadata.undo().await;
                return Err(error);
            }
        };
        let growth = Growing { from_size: superblock.geometry.size(), geometry, fingerprint, samples, shown };
        match self.grow_into(context, growth, source, [&destination.device, &metadata.device]).await {
            Ok(()) => {
                *clone.devices.borrow_mut() = [destination.device, metadata.device];
                if let Some(node) = self.node()
                    && let Err(error) = node.resize(context, geometry.size()).await
                {
                    log::warn!("{error}");
                }
                Ok(true)
            }
            Err(error) => {
                if clone.coordinator.is_certainly_of(superblock.geometry.size()) {
                    destination.undo().await;
                    metadata.undo().await;
                }
                Err(error)
            }
        }
    }

    /// Both devices are large enough.
    async fn grow_into(
        &self,
        context: &Rc<ShardContext>,
        Growing { from_size, geometry, fingerprint, samples, shown }: Growing,
        source: Option<OpenSource>,
        [destination, metadata]: [&Device; 2],
    ) -> Result<()> {
        let clone = &self.clone;
        let identity = samples.map(|samples| Arc::new(SourceIdentity::new(fingerprint, samples)));
        let watched = source.as_ref().zip(identity.as_ref());
        let watched =
            watched.and_then(|(s, known)| activate::watch(context, s, known, &clone.state, &clone.source_counts));
        let place = source.as_ref().and_then(OpenSource::place);
        let parts = GrowParts {
            from_size,
            geometry,
            source: fingerprint,
            metadata: Rc::new(RingDisk::new(disk_parts(metadata)?)),
            destination: Rc::new(RingDisk::new(disk_parts(destination)?)),
            stage: stage(context, clone.state.id, geometry, disk_parts(destination)?, source, shown),
        };
        if let Some(kept) = &clone.kept_bits {
            kept.grow(&geometry)?;
        }
        clone.coordinator.grow(parts).await?;
        if watched.is_some() || shown == 0 {
            *clone.nbd_source.borrow_mut() = watched;
        }
        if identity.is_some() || shown == 0 {
            let check = |identity| Rc::new(SourceCheck { identity, recorded: Cell::new(true), copied_before: None });
            *clone.source_check.borrow_mut() = identity.map(check);
        }
        if place.is_some() || shown == 0 {
            *clone.source_place.borrow_mut() = place;
        }
        Ok(())
    }

    /// The source as it is now. It must begin with what the clone has of it.
    async fn source_again(&self, context: &Rc<ShardContext>, superblock: &Superblock) -> Result<OpenSource> {
        let config = &self.config;
        let spec = SourceSpec::parse(OsStr::new(&config.source)).map_err(|text| Error::new(ErrorKind::Usage, text))?;
        let places = {
            let devices = self.clone.devices.borrow();
            [devices[0].place(), devices[1].place()]
        };
        let hint = || match superblock.state {
            CloneState::Complete => " (the clone has all of it; --zeros grows without it)",
            CloneState::Active => "",
        };
        let opened = open_source(context, config, spec, places, context.mesh.shards()).await;
        let source = opened.map_err(|error| error.within(format!("resize needs the source{}", hint())))?;
        if superblock.source.is_known() && source.source.size() >= superblock.source.size {
            let (found, _) = fingerprint_of(config, &source, superblock.source.size).await?;
            if found != superblock.source && !config.force {
                bail!(SourceChanged, "source {}: its content is not what the clone was made from", config.source);
            }
        }
        Ok(source)
    }
}

/// How every shard gets what its grown slice is made from.
pub(super) fn stage(
    context: &Rc<ShardContext>,
    clone: CloneId,
    geometry: Geometry,
    destination: DiskParts,
    source: Option<OpenSource>,
    shown: u64,
) -> Box<dyn Fn(ShardIndex) -> LocalBoxFuture<'static, Result<()>>> {
    let context = context.clone();
    let local: Option<Rc<dyn Source>> = source.as_ref().map(|source| source.source.clone());
    Box::new(move |shard| {
        let recipe = match &source {
            None if shown > 0 => Ok(SourceRecipe::present(shown, geometry.size())),
            source => SourceRecipe::new(source.as_ref(), shown, geometry.size()),
        };
        let made = recipe.and_then(|recipe| Ok((recipe, destination.duplicate()?)));
        let (context, local) = (context.clone(), local.clone());
        Box::pin(async move {
            let (recipe, destination) = made?;
            if shard == context.mesh.me() {
                let source = recipe.open(&context, clone, local).await?;
                return context.shard.stage(clone, geometry, Rc::new(RingDisk::new(destination)), source);
            }
            let staged = context.mesh.run_on(&context, shard, move |context| {
                Box::pin(async move {
                    let source = recipe.open(&context, clone, None).await?;
                    context.shard.stage(clone, geometry, Rc::new(RingDisk::new(destination)), source)
                })
            });
            staged.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Environment, "a shard has ended")))
        })
    })
}
