//! The device-mapper device of a clone, `/dev/mapper/NAME`: what users have open, above `/dev/ublkbN` until the clone is
//! handed over and above the destination from then on. On shard 0; commands run on threads of their own.
//!
//! It outlives a daemon that is killed, as the block device below it does, and is found again by its uuid. What a daemon may
//! have left, and what the next one does:
//!
//! | left | done |
//! |---|---|
//! | no table yet | it gets one |
//! | a table over the clone's block device | kept; a table that was loaded beside it and is not in force is forgotten |
//! | a table over the destination | the clone was handed over: its block device goes, and it is not started |
//! | anything else | refused |

use super::prepare::{beside_clients, find_metadata};
use crate::bail;
use crate::config::{CloneConfig, DmName};
use crate::device_mapper::control::DeviceMapper;
use crate::device_mapper::nodes;
use crate::device_mapper::proto::{Number, Target};
use crate::device_mapper::takeover::{Standing, judge, uuid_of};
use crate::devices::{self, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::ublk::device;
use crate::io_frontend::ublk::takeover::mark_of;
use crate::kept_bits;
use crate::ring::Ring;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the destination may stay claimed by what has just let go of it.
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

/// The device of a clone that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MappedNode {
    name: DmName,
    uuid: String,
}

/// What is known of a clone before it is started.
pub enum Before {
    /// Nothing that matters.
    Start,
    /// It was handed over to its destination; all that was left of it is gone.
    HandedOver(PathBuf),
}

/// Runs what may wait for I/O.
pub(super) async fn on_thread<T: Send + 'static>(job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = Ring::current().on_thread("device-mapper", job).await;
    done.map_err(|error| Error::from_io(error, "a thread for device-mapper can't be started"))?
}

/// Looks for the device of a clone that is about to be started; its devices are not open yet. Nobody else has the clone
/// when its metadata can be opened, so what a daemon has left is cleared away. `NotSupported` and `Environment` when it could
/// not be made, or handed over.
pub async fn before_start(config: &CloneConfig) -> Result<Before> {
    let Some(name) = config.ublk.as_ref().and_then(|ublk| ublk.dm_name.clone()) else { return Ok(Before::Start) };
    on_thread(|| DeviceMapper::open().map(drop)).await?;
    let destination_path = config.destination.clone();
    if config.on_hydrated == crate::config::OnHydrated::Linear {
        check_is_block(&destination_path)?;
    }
    let metadata_path = config.metadata.clone();
    let metadata = beside_clients(move || devices::open_target(Role::Metadata, &metadata_path)).await?;
    let found = find_metadata(config, &metadata).await?;
    let Some(superblock) = found.map(|found| found.superblock) else {
        let free = on_thread(move || DeviceMapper::open()?.check_free(name.as_str(), None));
        return free.await.map(|()| Before::Start);
    };
    // `metadata` stays open, and locked: nobody starts the clone meanwhile.
    let clone = superblock.uuid;
    let kept = kept_bits::Identity::now(clone, &superblock.geometry)?;
    let looked = on_thread(move || {
        let (mapper, uuid) = (DeviceMapper::open()?, uuid_of(&clone));
        let Some(found) = mapper.find(&uuid)? else {
            mapper.check_free(name.as_str(), Some(&uuid))?;
            return Ok(Before::Start);
        };
        let live = mapper.table(&uuid)?;
        let path = Path::new("/dev/mapper").join(&found.name);
        let destination = nodes::number_of(&destination_path);
        match judge(&found, &live, destination, nodes::is_ublk) {
            Standing::Unfinished | Standing::Clone => {
                // It would keep the destination.
                mapper.clear(&uuid)?;
                Ok(Before::Start)
            }
            Standing::HandedOver => {
                device::discard(mark_of(&clone))?;
                let _ = std::fs::remove_file(kept.path_in(Path::new(kept_bits::DIRECTORY)));
                Ok(Before::HandedOver(path))
            }
            Standing::Going => bail!(
                InUse,
                "{} was removed with force, and is still open: end that use ('dmsetup info {}' counts it)",
                path.display(),
                found.name
            ),
            Standing::Changed => {
                let shown: Vec<String> = live.iter().map(Target::to_string).collect();
                bail!(
                    InUse,
                    "{} is of this clone, but its table is \"{}\", neither the clone's block device nor the destination: \
                     remove it (dmsetup remove {})",
                    path.display(),
                    shown.join("; "),
                    found.name
                )
            }
        }
    });
    let looked = looked.await;
    drop(metadata);
    looked
}

/// A file can't be handed over to: a loop device between would have to be made anew after every boot, by somebody, and
/// hydrant is gone by then. Who wants one makes it before.
pub(super) fn check_is_block(destination: &Path) -> Result<()> {
    if nodes::number_of(destination).is_none() {
        let path = destination.display();
        bail!(
            NotSupported,
            "destination {path} is no block device: it can't be handed over to. Start the clone with one, say a loop device \
             (losetup --direct-io=on --find --show {path})"
        );
    }
    Ok(())
}

impl MappedNode {
    /// Makes the device above `/dev/ublkbN`, or puts the one that is there above it; `clone` is the uuid of the metadata.
    pub async fn start(name: DmName, clone: &[u8; 16], below: PathBuf, sectors: u64) -> Result<Self> {
        let uuid = uuid_of(clone);
        on_thread(move || {
            let mapper = DeviceMapper::open()?;
            let (info, is_new) = match mapper.find(&uuid)? {
                Some(found) => (found, false),
                None => (mapper.create(name.as_str(), &uuid)?, true),
            };
            let found: DmName = info.name.parse().map_err(|text: String| Error::new(ErrorKind::InUse, text))?;
            if found != name {
                log::warn!("device-mapper: the device of this clone is {found}, as it may be in use, and not {name}");
            }
            let node = Self { name: found, uuid };
            let made = node.show(&mapper, &below, sectors).and_then(|()| nodes::ensure(&node.name, info.number));
            match made {
                Ok(()) => Ok(node),
                Err(error) => {
                    if is_new && let Err(error) = mapper.remove(&node.uuid, false) {
                        log::warn!("{error}");
                    }
                    Err(error.within(node.path().display().to_string()))
                }
            }
        })
        .await
    }

    /// Shows a device, if it does not do so already.
    fn show(&self, mapper: &DeviceMapper, below: &Path, sectors: u64) -> Result<()> {
        let number = nodes::number_of(below);
        let number = number.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{}: there is no such block device", below.display()))
        })?;
        let wanted = Target::linear(sectors, number);
        if mapper.table(&self.uuid)? == [wanted.clone()] {
            // Whoever has suspended it, it is to be used.
            return Ok(());
        }
        mapper.load(&self.uuid, &wanted)?;
        mapper.resume(&self.uuid, false).map(drop)
    }

    pub fn path(&self) -> PathBuf {
        self.name.path()
    }

    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// The device below has another size.
    pub async fn resize(&self, below: PathBuf, sectors: u64) -> Result<()> {
        let node = self.clone();
        let shown = on_thread(move || node.show(&DeviceMapper::open()?, &below, sectors)).await;
        shown.map_err(|error| error.within(self.path().display().to_string()))
    }

    /// Removes the device. In use it is `InUse`, or with `force` fails every request from now on and goes with its last user.
    pub async fn remove(&self, force: bool, sectors: u64) -> Result<()> {
        let node = self.clone();
        let removed = on_thread(move || {
            let mapper = DeviceMapper::open()?;
            match mapper.remove(&node.uuid, false) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() == ErrorKind::InUse && force => {
                    mapper.load(&node.uuid, &Target::error(sectors))?;
                    mapper.resume(&node.uuid, true)?;
                    return mapper.remove(&node.uuid, true);
                }
                removed => removed?,
            }
            nodes::forget(&node.name);
            Ok(())
        });
        removed.await.map_err(|error| error.within(self.path().display().to_string()))
    }

    /// Loads the table that shows the destination: the kernel takes it, which nobody else must have claimed. It is not in force
    /// yet. Retried for a moment: what had it open before may just be ending.
    pub(super) fn load_destination(&self, destination: Number, sectors: u64) -> Result<()> {
        let (mapper, began) = (DeviceMapper::open()?, Instant::now());
        loop {
            match mapper.load(&self.uuid, &Target::linear(sectors, destination)) {
                Err(error) if error.kind() == ErrorKind::InUse && began.elapsed() < CLAIM_WAIT_MAX => {
                    std::thread::sleep(PAUSE);
                }
                loaded => return loaded,
            }
        }
    }

    /// Puts the table that was loaded in force. Waits for what is in flight.
    pub(super) fn exchange(&self) -> Result<()> {
        DeviceMapper::open()?.resume(&self.uuid, false).map(drop)
    }

    /// Forgets the table that was loaded.
    pub(super) fn give_up(&self) -> Result<()> {
        DeviceMapper::open()?.clear(&self.uuid)
    }

    /// Whether it shows this device by now.
    pub(super) fn shows(&self, device: Number) -> Result<bool> {
        let table = DeviceMapper::open()?.table(&self.uuid)?;
        Ok(matches!(&table[..], [target] if target.whole_linear() == Some(device)))
    }

    /// Whether somebody has suspended it.
    pub(super) fn is_suspended(&self) -> Result<bool> {
        let found = DeviceMapper::open()?.find(&self.uuid)?;
        let found = found.ok_or_else(|| {
            let text = format!("{} is not there any more: somebody has removed it", self.path().display());
            Error::new(ErrorKind::NotFound, text)
        })?;
        Ok(found.flags.contains(crate::device_mapper::proto::Flags::SUSPEND))
    }
}
