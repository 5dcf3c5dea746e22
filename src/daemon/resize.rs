//! Growing a clone that runs: what the daemon makes ready before [`crate::coordinator::Coordinator::grow`] does it.
//!
//! Everything that can fail without a change comes first: the source, opened anew, must still be the clone's; then
//! both devices are made large enough. What was made larger stays so when the rest fails: that does no harm.

use super::activate;
use super::prepare::{OpenSource, disk_parts, fingerprint_of, open_source};
use super::running::RunningClone;
use super::shard_source::SourceRecipe;
use crate::bail;
use crate::coordinator::GrowParts;
use crate::devices::{self, Device};
use crate::disk::ring::{DiskParts, RingDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::meta::codec::{CloneState, SourceFingerprint, Superblock, metadata_size_needed};
use crate::meta::growth::{self, Wanted};
use crate::ring::Ring;
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use crate::source::Source;
use crate::source::uri::SourceSpec;
use crate::units::{CloneId, Geometry, ShardIndex};
use std::cell::Cell;
use std::ffi::OsStr;
use std::rc::Rc;

/// One resize at a time.
struct Resizing<'a>(&'a Cell<bool>);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Makes a device large enough, on a thread of its own: extending a file waits for its file system.
async fn enlarge(device: &Device, size: u64) -> Result<Device> {
    let mut copy = device.try_clone()?;
    let grown = Ring::current().blocking(move || devices::grow(&mut copy, size).map(|()| copy)).await;
    grown.map_err(|error| Error::from_io(error, device.label()))?
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
        let fingerprint = match &source {
            Some(source) => fingerprint_of(&self.config, source, shown).await?,
            None if shown == 0 => SourceFingerprint::NONE,
            None => superblock.source,
        };

        let [destination, metadata] = {
            let devices = clone.devices.borrow();
            [devices[0].try_clone()?, devices[1].try_clone()?]
        };
        let metadata_size = metadata_size_needed(&geometry);
        // What is new of them is written at once, and a failure of that would make the clone read-only.
        devices::check_free_space_of(&metadata, metadata_size)?;
        let destination = enlarge(&destination, geometry.size()).await?;
        let metadata = enlarge(&metadata, metadata_size).await?;
        let watched = source.as_ref().and_then(|s| activate::watch(context, s, &clone.state, &clone.source_counts));
        let parts = GrowParts {
            from_size: superblock.geometry.size(),
            geometry,
            source: fingerprint,
            metadata: Rc::new(RingDisk::new(disk_parts(&metadata)?)),
            destination: Rc::new(RingDisk::new(disk_parts(&destination)?)),
            stage: stage(context, clone.state.id, geometry, disk_parts(&destination)?, source, shown),
        };
        clone.coordinator.grow(parts).await?;
        *clone.devices.borrow_mut() = [destination, metadata];
        if watched.is_some() || shown == 0 {
            *clone.nbd_source.borrow_mut() = watched;
        }
        Ok(true)
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
            let found = fingerprint_of(config, &source, superblock.source.size).await?;
            if found != superblock.source && !config.force {
                bail!(SourceChanged, "source {}: its content is not what the clone was made from", config.source);
            }
        }
        Ok(source)
    }
}

/// How every shard gets what its grown slice is made from.
fn stage(
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
