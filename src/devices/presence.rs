//! What became of a file that a clone has open: whether it still is at its path, and as large as it was.
//!
//! Only looks, at names and sizes. May block as long as the file system takes: not for a thread that serves clients.

use super::{Device, DeviceId, DeviceKind, sys};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What is wrong with an open file or device. Displays as what follows its name in a sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Plight {
    /// It has no name any more: what it holds goes when the last one closes it. `replaced`: another file has its path.
    Deleted { replaced: bool },
    /// It exists, but its path does not lead to it. `replaced`: to another one.
    Moved { replaced: bool },
    /// It is smaller than what is used of it; sizes in bytes.
    Cut { size: u64, used: u64 },
}

impl fmt::Display for Plight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Plight::Deleted { replaced: false } => f.write_str("was deleted"),
            Plight::Deleted { replaced: true } => f.write_str("was deleted, another file is at its path"),
            Plight::Moved { replaced: false } => f.write_str("was moved, nothing is at its path"),
            Plight::Moved { replaced: true } => f.write_str("was moved, another file is at its path"),
            Plight::Cut { size, used } => write!(f, "was cut off at {size} bytes, {used} are in use"),
        }
    }
}

/// What a look has seen.
struct Seen {
    size: u64,
    /// Names that the open file has; 1 for a block device.
    names: u64,
    /// What its path leads to; `None`: nothing.
    at_path: Option<DeviceId>,
}

/// Looks at a device of which the first `used` bytes are in use. An error: nothing can be said now.
pub fn look(device: &Device, used: u64) -> io::Result<Option<Plight>> {
    let open = device.file.metadata()?;
    let (size, names) = match device.kind {
        DeviceKind::Block => (sys::block_device_size(&device.file)?, 1),
        DeviceKind::File => (open.len(), open.nlink()),
    };
    let at_path = leads_to(&device.path)?;
    Ok(judge(&device.id, used, &Seen { size, names, at_path }))
}

/// Looks whether `path` still leads to what was opened there.
pub fn look_at_path(path: &Path, id: &DeviceId) -> io::Result<Option<Plight>> {
    Ok(match leads_to(path)? {
        Some(found) if found == *id => None,
        found => Some(Plight::Moved { replaced: found.is_some() }),
    })
}

fn leads_to(path: &Path) -> io::Result<Option<DeviceId>> {
    match fs::metadata(path) {
        Ok(stat) => Ok(Some(DeviceId::of(&stat))),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The worst of it. Some file systems count no names: one that its path leads to is not deleted.
fn judge(id: &DeviceId, used: u64, seen: &Seen) -> Option<Plight> {
    let replaced = seen.at_path.is_some();
    if seen.size < used {
        return Some(Plight::Cut { size: seen.size, used });
    }
    match seen.names {
        _ if seen.at_path.as_ref() == Some(id) => None,
        0 => Some(Plight::Deleted { replaced }),
        _ => Some(Plight::Moved { replaced }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_file() {
        let id = DeviceId::File { dev: 1, ino: 2 };
        let other = || Some(DeviceId::File { dev: 1, ino: 3 });
        let judged = |size, names, at_path| judge(&id, 100, &Seen { size, names, at_path });
        assert_eq!(judged(100, 1, Some(id.clone())), None);
        assert_eq!(judged(200, 0, Some(id.clone())), None, "names are not counted there");
        assert_eq!(judged(100, 0, None), Some(Plight::Deleted { replaced: false }));
        assert_eq!(judged(100, 0, other()), Some(Plight::Deleted { replaced: true }));
        assert_eq!(judged(100, 1, None), Some(Plight::Moved { replaced: false }));
        assert_eq!(judged(100, 2, other()), Some(Plight::Moved { replaced: true }));
        let cut = judged(99, 0, None).unwrap();
        assert_eq!(cut.to_string(), "was cut off at 99 bytes, 100 are in use");
    }
}
