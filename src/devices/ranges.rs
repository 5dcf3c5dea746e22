//! Which bytes of a file a clone uses, seen by all other clones: a lock on them, however they are reached.
//!
//! flock guards what was opened, not what a loop device shows: two clones on two loop devices over one file have
//! nothing in common that they could lock. So each clone marks, by a record lock (fcntl, of the open file
//! description: released with its last duplicate), the part that it uses of the file *at the bottom*: the whole of a
//! file or block device that it opened itself, and of the one under a loop device (over a loop device or a partition
//! of one, however deep) the part that is shown. Shared for what is only read. Two partitions of one loop device are
//! two parts, and no conflict.
//!
//! The locks lie [`BASE`] bytes beyond their part, where no file has data: virtual machine monitors take record locks
//! on some of a file's first bytes, and must not meet these.
//!
//! Not seen: what device-mapper (volumes, RAID) maps, as sysfs does not tell which part of what lies below it is shown,
//! so two volumes over the same part of one disk or loop device; a partition of a disk and the whole disk as the source of
//! another clone; a loop device over a file that can't be opened here (deleted, of another mount namespace), which is
//! warned of.

use super::open::WaitForTheGone;
use super::sysfs::{Shown, Sysfs};
use super::{DeviceId, Role, holders, label, show, sys};
use crate::bail;
use crate::error::Result;
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How far beyond the part its lock is. Half of the largest offset; devices are far smaller.
const BASE: u64 = 1 << 62;

/// Marks the whole of a device that was opened.
pub(super) fn lock_whole(role: Role, path: &Path, file: &File, stat: &Metadata, exclusive: bool) -> Result<()> {
    lock(role, path, file, stat, (0, u64::MAX), exclusive)
}

/// Marks what `id`, when it is a loop device or a partition of one, shows of the file at its bottom. The lock lasts as
/// long as the file that is returned, or a duplicate of it.
pub(super) fn lock_shown(role: Role, path: &Path, id: &DeviceId, exclusive: bool) -> Result<Option<File>> {
    let Some(shown) = Sysfs::system().shown_by_loops(id) else { return Ok(None) };
    match open(&shown, exclusive) {
        Ok((file, stat)) => {
            lock(role, path, &file, &stat, (shown.start, shown.end), exclusive)?;
            Ok(Some(file))
        }
        Err(why) => {
            let name = label(role, path);
            let below = show(&shown.path);
            log::warn!("{name}: {below} under it can't be locked ({why}): see to it that nothing else uses it");
            Ok(None)
        }
    }
}

/// Opens the file under a loop device; it is only locked. Writing is asked for as an exclusive lock needs that.
fn open(shown: &Shown, exclusive: bool) -> std::result::Result<(File, Metadata), String> {
    // Looked at first: what is named may be something else by now, which opening could hang on.
    let same = |stat: &Metadata| match DeviceId::of(stat) == shown.file {
        true => Ok(()),
        false => Err("another file has its name".to_owned()),
    };
    same(&std::fs::metadata(&shown.path).map_err(|e| e.to_string())?)?;
    let file = OpenOptions::new().read(true).write(exclusive).open(&shown.path).map_err(|e| e.to_string())?;
    let stat = file.metadata().map_err(|e| e.to_string())?;
    same(&stat)?;
    Ok((file, stat))
}

fn lock(
    role: Role,
    path: &Path,
    file: &File,
    stat: &Metadata,
    (start, end): (u64, u64),
    exclusive: bool,
) -> Result<()> {
    let (start, end) = (start.min(BASE - 1), end.min(BASE));
    let (at, len) = (BASE + start, end.saturating_sub(start).max(1));
    let wait = WaitForTheGone::new();
    loop {
        match sys::try_record_lock(file, at, len, exclusive) {
            Ok(true) => return Ok(()),
            Ok(false) if wait.may_try_again(stat) => {}
            Ok(false) => break,
            // A file system without such locks: as for flock, nothing protects there.
            Err(error) => {
                let name = label(role, path);
                log::warn!("the part that {name} uses can't be locked ({error}): see to it that nothing else uses it");
                return Ok(());
            }
        }
    }
    let by = holders::lock_holder(stat.dev(), stat.ino(), !exclusive).unwrap_or_else(|| "another clone".into());
    let why = match exclusive {
        true => "it would be overwritten",
        false => "it is being written",
    };
    bail!(
        InUse,
        "{} is in use: the same data are used through another device or file by {by}: {why}",
        label(role, path)
    )
}
