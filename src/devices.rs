//! The three devices of a clone: opened, checked and kept from harm before the first byte is written.
//!
//! Synchronous: runs before the executors start. What is refused here is refused with one clear line, and with
//! nothing changed on disk:
//! * the source is opened read-only, never otherwise, under a shared lock; so is what the tools only read, and a block
//!   device of theirs is claimed too ([`open_input`]);
//! * destination and metadata are opened under an exclusive lock (flock) and, for block devices, under the
//!   kernel's exclusive claim (`O_EXCL`), which mounts, swap, RAID, device-mapper and other clones respect;
//! * and both under a lock on the bytes that they use, so that two clones do not meet under two loop devices
//!   (`ranges.rs`, which says what is not seen);
//! * the three must not overlap, however they are named: [`check_distinct`];
//! * only [`create`] and [`set_size`] change anything, and only what did not exist or was empty; and [`grow`], which makes
//!   a file that is the clone's own longer, and [`cut_back`], which undoes that.
//!
//! Locks and claims belong to the open descriptor: they last as long as the [`Device`] or a duplicate of it.
//! Duplicate it for other threads; opening the path again would meet the clone's own claim.

mod content;
mod distinct;
mod holders;
mod identity;
mod open;
pub mod presence;
mod ranges;
mod reopen;
mod sys;
mod sysfs;

#[cfg(test)]
mod tests;

use crate::bail;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use content::contents;
#[cfg(test)]
use distinct::check_distinct_in;
pub use distinct::{Place, check_distinct};
pub use open::{
    Grown, check_free_space, check_free_space_of, create, cut_back, grow, open_input, open_source, open_target,
    set_size,
};
pub use reopen::{lock_again, reopen};

/// What a device is to the clone. Displays as the word that errors use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    Source,
    Destination,
    Metadata,
    /// Metadata of the kernel's dm-clone, read or written by the tools.
    Image,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Destination => "destination",
            Role::Metadata => "metadata",
            Role::Image => "image",
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DeviceKind {
    /// A regular file.
    File,
    /// A block device.
    Block,
}

/// What a device is, whatever name it was opened by. Valid while the machine runs: device numbers change at boot
/// (see [`Device::fingerprint_id`]).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum DeviceId {
    /// A regular file: `st_dev` and `st_ino`.
    File { dev: u64, ino: u64 },
    /// A block device: its number.
    Block { major: u32, minor: u32 },
    /// A file that does not exist yet: its directory and its name there.
    Missing { directory_dev: u64, directory_ino: u64, name: OsString },
}

impl DeviceId {
    /// The block device with the number `rdev` (as in `st_rdev`).
    fn block(rdev: u64) -> Self {
        DeviceId::Block { major: libc::major(rdev), minor: libc::minor(rdev) }
    }
    fn of(stat: &Metadata) -> Self {
        if stat.file_type().is_block_device() {
            Self::block(stat.rdev())
        } else {
            DeviceId::File { dev: stat.dev(), ino: stat.ino() }
        }
    }
}

/// An open device.
#[derive(Debug)]
pub struct Device {
    pub role: Role,
    /// As it was given.
    pub path: PathBuf,
    pub kind: DeviceKind,
    /// In bytes. 0 only for an existing empty file as destination or metadata, which [`set_size`] sizes.
    pub size: u64,
    /// Alignment of offsets, lengths and memory for I/O on `file`, in bytes: 512, 1024, 2048 or 4096.
    pub block: u32,
    /// Whether `file` is open for direct I/O (`O_DIRECT`). False only for a file whose file system can't.
    pub direct: bool,
    /// Holds the lock and the claim. Read-only for a source.
    pub file: File,
    /// The same file without `O_DIRECT`, for a tail shorter than a block: when `direct` and a regular file.
    pub buffered: Option<File>,
    /// Holds the lock on what lies under a loop device.
    below: Option<Arc<File>>,
    pub id: DeviceId,
    /// Device number of the file system that holds the file or the device node.
    fs_dev: u64,
}

impl Device {
    /// "destination /dev/sda": how errors name it.
    pub fn label(&self) -> String {
        label(self.role, &self.path)
    }

    /// Identifies the device across reboots and renames: for a file its inode and birth time, for a block device
    /// its serial number, WWID, UUID or the like. All zeros: not known.
    pub fn fingerprint_id(&self) -> [u8; 16] {
        identity::fingerprint_id(self)
    }

    /// The same open device once more: lock and claim last until both are gone.
    pub fn try_clone(&self) -> Result<Self> {
        let dup = |file: &File| file.try_clone().map_err(|error| Error::from_io(error, self.label()));
        Ok(Self {
            role: self.role,
            path: self.path.clone(),
            kind: self.kind,
            size: self.size,
            block: self.block,
            direct: self.direct,
            file: dup(&self.file)?,
            buffered: self.buffered.as_ref().map(dup).transpose()?,
            below: self.below.clone(),
            id: self.id.clone(),
            fs_dev: self.fs_dev,
        })
    }

    /// The lock on what lies under a loop device: whoever does I/O with a duplicate of [`Device::file`] alone must keep
    /// this as long.
    pub fn lock_below(&self) -> Option<Arc<File>> {
        self.below.clone()
    }

    /// What [`check_distinct`] needs to know.
    pub fn place(&self) -> Place {
        Place { role: self.role, path: self.path.clone(), id: self.id.clone(), fs_dev: self.fs_dev }
    }

    /// Where this device, or a partition of it, is mounted writable: what is written there while the clone runs
    /// reaches the copy or not. For a warning about a source; a target that is mounted was refused.
    pub fn mounted_writable(&self) -> Option<PathBuf> {
        holders::mounted_writable(&self.id)
    }

    /// The physical block of the device, or of the one that holds the file, in bytes; that of the logical block where it is
    /// not known.
    pub fn physical_block(&self) -> u32 {
        self.queue_attribute("physical_block_size").and_then(|text| text.parse().ok()).unwrap_or(self.block)
    }

    /// Whether the device, or the one that holds the file, says that it rotates.
    pub fn is_rotational(&self) -> bool {
        self.queue_attribute("rotational").is_some_and(|text| text == "1")
    }

    fn queue_attribute(&self, name: &str) -> Option<String> {
        let id = match self.kind {
            DeviceKind::Block => self.id.clone(),
            DeviceKind::File => DeviceId::block(self.fs_dev),
        };
        let node = sysfs::Sysfs::system().node(&id)?;
        node.whole().unwrap_or(node).attribute(&format!("queue/{name}"))
    }

    /// The file for I/O at any alignment; of a block device, the one there is.
    pub fn any_alignment(&self) -> &File {
        self.buffered.as_ref().unwrap_or(&self.file)
    }
}

/// A destination or metadata device, as found.
#[derive(Debug)]
pub enum Target {
    /// There is no such file; [`create`] makes it. Its directory exists and may be written.
    Missing {
        place: Place,
    },
    Existing(Device),
}

impl Target {
    /// As [`Device::try_clone`].
    pub fn try_clone(&self) -> Result<Self> {
        Ok(match self {
            Target::Missing { place } => Target::Missing { place: place.clone() },
            Target::Existing(device) => Target::Existing(device.try_clone()?),
        })
    }

    pub fn place(&self) -> Place {
        match self {
            Target::Missing { place } => place.clone(),
            Target::Existing(device) => device.place(),
        }
    }
}

/// The devices of a clone; no source when it comes over a network.
#[derive(Debug)]
pub struct Devices {
    pub source: Option<Device>,
    pub destination: Target,
    pub metadata: Target,
}

/// Opens and checks all three in the right order: that they are distinct is looked at first, by names alone, so
/// that giving one file twice is reported as that and not as a lock held by ourselves; and again on what was opened.
/// Changes nothing on disk.
pub fn open_devices(source: Option<&Path>, destination: &Path, metadata: &Path) -> Result<Devices> {
    let mut looked = Vec::new();
    if let Some(source) = source {
        looked.push(Place::look(Role::Source, source)?);
    }
    looked.push(Place::look(Role::Destination, destination)?);
    looked.push(Place::look(Role::Metadata, metadata)?);
    check_distinct(&looked)?;

    let source = source.map(open_source).transpose()?;
    let destination = open_target(Role::Destination, destination)?;
    let metadata = open_target(Role::Metadata, metadata)?;
    let mut opened = vec![destination.place(), metadata.place()];
    opened.extend(source.as_ref().map(Device::place));
    check_distinct(&opened)?;
    Ok(Devices { source, destination, metadata })
}

/// Refuses a device that is smaller than `need` bytes; `why` ends the sentence: "for the source /dev/sda".
pub fn check_size(device: &Device, need: u64, why: &str) -> Result<()> {
    if device.size < need {
        bail!(TooSmall, "{} is too small: it has {} bytes, {need} are needed {why}", device.label(), device.size);
    }
    Ok(())
}

/// Who uses a block device of ours, in words; `None`: nobody was found. With `claim` it is asked whether the kernel would
/// give it to somebody alone, too, which finds mounts of other namespaces; whoever wants that at the same moment is refused.
/// May wait for reads of the device.
pub fn used_by(path: &Path, claim: bool) -> Option<String> {
    let id = DeviceId::of(&std::fs::metadata(path).ok()?);
    let sysfs = sysfs::Sysfs::system();
    holders::kernel_use(&sysfs, &id, None)
        .or_else(|| holders::open_by(&sysfs, &id))
        .or_else(|| (claim && sys::is_claimed(path)).then(|| "claimed by the kernel".into()))
}

/// As [`used_by`], of a device that the device-mapper device `above` stands on, whose own users do not count.
pub fn used_beside(path: &Path, above: &Path) -> Option<String> {
    let id = |path: &Path| Some(DeviceId::of(&std::fs::metadata(path).ok()?));
    let (id, above) = (id(path)?, id(above));
    let sysfs = sysfs::Sysfs::system();
    holders::kernel_use(&sysfs, &id, above.as_ref()).or_else(|| holders::open_by(&sysfs, &id))
}

/// "destination /dev/sda", on one line whatever the path holds.
fn label(role: Role, path: &Path) -> String {
    format!("{role} {}", show(path))
}

/// A path for people: as it is, or quoted and escaped when it has control characters.
fn show(path: &Path) -> String {
    let text = path.display().to_string();
    if text.is_empty() || text.chars().any(char::is_control) { format!("{path:?}") } else { text }
}
