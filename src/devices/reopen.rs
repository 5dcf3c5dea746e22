//! A block device of a clone, opened once more: with the kernel's claim or without it. For who has to let go of the claim,
//! so that somebody else can take it, while I/O goes on.
//!
//! Claim and lock belong to an open file, and end with its last duplicate and the I/O in flight on it. So the new file has
//! no lock before everything of the old one is gone, and [`lock_again`], which waits for that, tells at once that the old
//! claim has ended.

use super::{Device, DeviceId, DeviceKind, ranges, sys};
use crate::bail;
use crate::error::{Error, Result};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(1);

/// Opens a block device that is open once more, without a lock. `claim`: with the kernel's claim, `InUse` when somebody has it.
pub fn reopen(device: &Device, claim: bool) -> Result<Device> {
    let context = |error| Error::from_io(error, device.label());
    if device.kind != DeviceKind::Block {
        bail!(NotSupported, "{} is a file: it can't be opened once more in its place", device.label());
    }
    let claim = if claim { libc::O_EXCL } else { 0 };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(claim).open(&device.path).map_err(context)?;
    if DeviceId::of(&file.metadata().map_err(context)?) != device.id {
        bail!(InUse, "{} was replaced since the clone was started: another device is at its path", device.label());
    }
    sys::set_direct(&file, true).map_err(context)?;
    Ok(Device { file, ..device.try_clone()? })
}

/// Locks what was [`reopen`]ed, as soon as the file in whose place it is has gone. Blocks; `InUse` when that takes too long.
pub fn lock_again(device: &Device, time_max: Duration) -> Result<()> {
    let began = Instant::now();
    let stat = device.file.metadata().map_err(|error| Error::from_io(error, device.label()))?;
    while !sys::try_flock(&device.file, true).map_err(|error| Error::from_io(error, device.label()))? {
        if began.elapsed() > time_max {
            bail!(InUse, "{} is locked by somebody else", device.label());
        }
        std::thread::sleep(PAUSE);
    }
    ranges::lock_whole(device.role, &device.path, &device.file, &stat, true)
}
