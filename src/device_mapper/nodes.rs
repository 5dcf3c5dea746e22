//! `/dev/mapper/NAME`: the kernel itself makes `/dev/dm-N` only.
//!
//! As libdevmapper has it: where udev runs, its rules make the name, a symbolic link, and are waited for; where it does not,
//! or does not do it, the name is a device node that is made here, mode 0600. Who removes the device removes the name too.

use super::proto::{NAME_LEN_MAX, Number};
use crate::error::{Error, Result};
use std::ffi::CString;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

const DIRECTORY: &str = "/dev/mapper";
/// udev listens there when it runs.
const UDEV: &str = "/run/udev/control";
/// How long udev may take.
const UDEV_WAIT_MAX: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// The name of a device: 1 to 127 of `A-Z a-z 0-9 # + - . : = @ _`, which libdevmapper shows as they are.
#[derive(Clone, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct DmName(String);

impl DmName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `/dev/mapper/NAME`.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.0)
    }
}

impl FromStr for DmName {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if !(1..=NAME_LEN_MAX).contains(&text.len()) {
            return Err(format!("a device-mapper name has 1 to {NAME_LEN_MAX} characters"));
        }
        if let Some(bad) = text.chars().find(|c| !(c.is_ascii_alphanumeric() || "#+-.:=@_".contains(*c))) {
            return Err(format!("'{}' can't be in a device-mapper name", bad.escape_debug()));
        }
        if matches!(text, "." | ".." | "control") || text.starts_with('-') {
            return Err(format!("'{text}' can't be a device-mapper name"));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for DmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether the name leads to the device.
fn leads_to(path: &Path, number: Number) -> bool {
    fs::metadata(path).is_ok_and(|stat| {
        let found = Number { major: libc::major(stat.rdev()), minor: libc::minor(stat.rdev()) };
        stat.file_type().is_block_device() && found == number
    })
}

/// Returns when `/dev/mapper/NAME` leads to the device.
pub fn ensure(name: &DmName, number: Number) -> Result<()> {
    let (path, began) = (name.path(), Instant::now());
    let has_udev = Path::new(UDEV).exists();
    while !leads_to(&path, number) {
        if !has_udev || began.elapsed() > UDEV_WAIT_MAX {
            return make(&path, number)
                .map_err(|error| Error::from_io(error, format!("{}: the node can't be made", path.display())));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn make(path: &Path, number: Number) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(DIRECTORY) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Of a device that is gone, as no other one has the name.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a C string that outlives the call.
    let made = unsafe { libc::mknod(name.as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(number.major, number.minor)) };
    if made == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The device is gone: so is its name, where udev does not see to that.
pub fn forget(name: &DmName) {
    if Path::new(UDEV).exists() {
        return;
    }
    let path = name.path();
    match fs::symlink_metadata(&path) {
        Ok(stat) if stat.file_type().is_block_device() => {
            if let Err(error) = fs::remove_file(&path) {
                log::warn!("{}: it can't be removed: {error}", path.display());
            }
        }
        _ => {}
    }
}

/// The number of a block device, by its path.
pub fn number_of(path: &Path) -> Option<Number> {
    let stat = fs::metadata(path).ok().filter(|stat| stat.file_type().is_block_device())?;
    Some(Number { major: libc::major(stat.rdev()), minor: libc::minor(stat.rdev()) })
}

/// Whether it is a block device of ublk, as far as sysfs shows it.
pub fn is_ublk(number: Number) -> bool {
    let found = fs::read_link(format!("/sys/dev/block/{number}"));
    found.is_ok_and(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"ublkb")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["vm1", "a", "VG-lv_0", "x.y", "a:b=c@d#e+f", &"x".repeat(127)] {
            let name: DmName = good.parse().unwrap();
            assert_eq!((name.as_str(), name.path()), (good, Path::new("/dev/mapper").join(good)));
        }
        for bad in ["", ".", "..", "control", "a/b", "a b", "-a", "ä", "a\0", "a\\x20", &"x".repeat(128)] {
            assert!(bad.parse::<DmName>().is_err(), "{bad:?}");
        }
    }
}
