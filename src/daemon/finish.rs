//! Handing a clone's device over to its destination, under whoever uses it; then nothing of hydrant is needed any more.
//!
//! The steps, and what is left when the daemon dies after each:
//! 1. The clone is complete: data and superblock are durable. Nothing else uses it: no NBD client, and nobody has
//!    `/dev/ublkbN` open beside the device-mapper device.
//! 2. While requests are held for a moment, everything is committed once more and the destination is opened anew, without the
//!    kernel's claim, so that the old file, its claim and its lock go. It is locked again at once. This is the window: from
//!    here to the end of 3, about a millisecond, another program could claim the destination (mount it). Then 3 fails, and the
//!    clone goes on as before. Other clones of hydrant are kept away by the lock.
//! 3. The table with the destination is loaded: the kernel claims it for device-mapper. Requests go on, to the clone. Killed
//!    here, the next daemon forgets that table and goes on with the clone, as would have happened before.
//! 4. One command puts the table in force: the kernel waits for what is in flight, exchanges the tables and lets go on. There
//!    is no moment at which a daemon that is killed leaves the device suspended. The clone sees no requests any more. What it
//!    had acknowledged and not flushed is in the same device's cache, which the next flush of the file system reaches.
//! 5. `/dev/ublkbN` goes, and the clone. Killed here, the next daemon finds the table of 4, removes what is left, and says
//!    that the clone was handed over. The metadata stay, and say that it is complete.

use super::mapped_node::{MappedNode, check_is_block, on_thread};
use super::prepare::{beside_clients, disk_parts};
use super::resize::stage;
use super::running::RunningClone;
use crate::bail;
use crate::coordinator::ExchangeParts;
use crate::device_mapper::nodes;
use crate::device_mapper::proto::Number;
use crate::devices::{self, Device};
use crate::disk::ring::RingDisk;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::shard::pool::ShardContext;
use crate::units::SECTOR_SIZE;
use std::rc::Rc;
use std::time::Duration;

/// How long what had the destination open may take to end.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
/// What the kernel gets for the exchange; it waits for requests in flight.
const EXCHANGE_TIME_MAX: Duration = Duration::from_secs(60);

impl RunningClone {
    /// Hands the device over: afterwards `/dev/mapper/NAME` is the destination. The clone still runs, for nobody. Done once.
    pub async fn hand_over(self: &Rc<Self>, context: &Rc<ShardContext>) -> Result<()> {
        if self.handed_over.get() {
            return Ok(());
        }
        let mapped = self.mapped_to_finish()?;
        let destination = nodes::number_of(&self.config.destination);
        let destination = destination.ok_or_else(|| Error::new(ErrorKind::NotFound, "the destination is gone"))?;
        let (node, asked) = (mapped.clone(), destination);
        let (is_suspended, is_done) = on_thread(move || Ok((node.is_suspended()?, node.shows(asked)?))).await?;
        if is_done {
            // A hand-over before this one took so long that it was not waited for.
            self.note_handed_over(&mapped);
            return Ok(());
        }
        let path = mapped.path();
        if is_suspended {
            bail!(InUse, "{} is suspended: 'dmsetup resume {}' first", path.display(), mapped.name());
        }
        self.check_unused_beside(&mapped).await?;
        self.exchange_file(context, false, Some((mapped.clone(), destination))).await?;
        let job = mapped.clone();
        let exchanged = async {
            let exchanged = on_thread(move || job.exchange()).await;
            let asked = mapped.clone();
            match on_thread(move || asked.shows(destination)).await {
                // Whatever was said.
                Ok(true) => Ok(()),
                _ => exchanged.and_then(|()| {
                    let text = format!("{} does not show the destination all the same", path.display());
                    Err(Error::new(ErrorKind::Environment, text))
                }),
            }
        };
        let late = async {
            context.env.sleep(EXCHANGE_TIME_MAX).await;
            let seconds = EXCHANGE_TIME_MAX.as_secs();
            let text = format!(
                "{}: requests in flight did not end in {seconds} s; it is handed over when they do: finish again then",
                path.display()
            );
            Err(Error::new(ErrorKind::Limit, text))
        };
        match futures_lite::future::or(exchanged, late).await {
            Ok(()) => {
                self.note_handed_over(&mapped);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Limit => Err(error),
            Err(error) => {
                self.go_on_with_clone(context, mapped).await;
                Err(error)
            }
        }
    }

    /// What can be known of it without waiting.
    fn mapped_to_finish(&self) -> Result<MappedNode> {
        let name = &self.config.name;
        let mapped = self.node().and_then(|node| node.mapped());
        let Some(mapped) = mapped else {
            bail!(
                NotSupported,
                "clone '{name}' has no device-mapper device to hand over: start it with --ublk --dm-name NAME (dm_name of \
                 [clone.ublk]) and use /dev/mapper/NAME; without that, stop it and use the destination itself"
            );
        };
        check_is_block(&self.config.destination)?;
        let state = &self.clone.state;
        state.check_mode(true)?;
        self.clone.coordinator.check_idle()?;
        if self.clone.resizing.get() {
            bail!(InUse, "clone '{name}' is being resized: wait until it is");
        }
        if state.is_suspended() {
            bail!(InUse, "clone '{name}' is suspended: 'hydrant resume {name}' first");
        }
        if !state.is_complete() {
            let (hydrated, regions) = (state.hydrated(), state.geometry().nr_regions());
            bail!(
                InUse,
                "clone '{name}' is not complete: {hydrated} of {regions} regions are hydrated; wait for it (hydrant finish \
                 {name} --wait)"
            );
        }
        let connections = self.exported.connections();
        if connections > 0 {
            bail!(InUse, "clone '{name}' is in use by NBD clients ({connections} connections), which would lose it");
        }
        Ok(mapped)
    }

    async fn check_unused_beside(&self, mapped: &MappedNode) -> Result<()> {
        let Some(node) = self.node() else { return Ok(()) };
        let (below, above) = (node.path(), mapped.path());
        if let Some(user) = on_thread(move || Ok(devices::used_beside(&below, &above))).await? {
            let (below, above) = (node.path(), mapped.path());
            bail!(
                InUse,
                "{} is {user}, and goes when {} is handed over: end that, or use {1}",
                below.display(),
                above.display()
            );
        }
        Ok(())
    }

    /// Steps 2 and 3, or back.
    async fn exchange_file(
        self: &Rc<Self>,
        context: &Rc<ShardContext>,
        claim: bool,
        load: Option<(MappedNode, Number)>,
    ) -> Result<()> {
        let opened = self.clone.devices.borrow()[0].try_clone()?;
        let new = beside_clients(move || devices::reopen(&opened, claim)).await?;
        let geometry = self.clone.state.geometry();
        let parts = ExchangeParts {
            destination: Rc::new(RingDisk::new(disk_parts(&new)?)),
            stage: stage(context, self.clone.state.id, geometry, disk_parts(&new)?, None, 0),
        };
        let this = self.clone();
        let result = self
            .clone
            .coordinator
            .exchange_destination(parts, move || async move {
                let copy: Device = new.try_clone()?;
                this.claims_destination.set(claim);
                drop(std::mem::replace(&mut this.clone.devices.borrow_mut()[0], new));
                let sectors = geometry.size() / SECTOR_SIZE;
                on_thread(move || {
                    devices::lock_again(&copy, LOCK_WAIT_MAX)?;
                    load.map_or(Ok(()), |(mapped, destination)| mapped.load_destination(destination, sectors))
                })
                .await
            })
            .await;
        if result.is_err() && !claim && !self.claims_destination.get() {
            self.claim_again(context).await;
        }
        result
    }

    /// It was not handed over.
    async fn go_on_with_clone(self: &Rc<Self>, context: &Rc<ShardContext>, mapped: MappedNode) {
        if let Err(error) = on_thread(move || mapped.give_up()).await {
            log::warn!("clone '{}': {error}", self.config.name);
        }
        self.claim_again(context).await;
    }

    /// Back to a destination that nobody else can claim.
    async fn claim_again(self: &Rc<Self>, context: &Rc<ShardContext>) {
        if let Err(error) = Box::pin(self.exchange_file(context, true, None)).await {
            log::error!(
                "clone '{}': it goes on, but its destination could not be claimed again: see to it that nothing else uses it \
                 ({error})",
                self.config.name
            );
        }
    }

    fn note_handed_over(&self, mapped: &MappedNode) {
        self.handed_over.set(true);
        if let Some(node) = self.node() {
            // It is not the clone's any more, and stays.
            node.set_mapped(None);
        }
        let text = format!("handed over: {} is the destination", mapped.path().display());
        self.clone.state.events().raise(EventKind::HandedOver, text);
    }
}
