//! That source, destination and metadata do not overlap, however they are named.
//!
//! By inode and device number: symbolic and hard links, several device nodes. By what stands on what: a partition
//! and its disk, a loop device and its file, a mapped device and what it maps. And a destination or metadata file
//! must not live on the file system of a source device: writing it would change the source.

use super::sysfs::{LoopBacking, Sysfs};
use super::{DeviceId, Role, label, show};
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Which device a path leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub role: Role,
    /// As it was given.
    pub path: PathBuf,
    pub id: DeviceId,
    /// Device number of the file system that holds it.
    pub(super) fs_dev: u64,
}

impl Place {
    /// Looks without opening. A source must exist, a destination or metadata file may be missing from a directory.
    pub fn look(role: Role, path: &Path) -> Result<Self> {
        let error = match fs::metadata(path) {
            Ok(stat) => {
                return Ok(Self { role, path: path.into(), id: DeviceId::of(&stat), fs_dev: stat.dev() });
            }
            Err(error) => error,
        };
        if role == Role::Source || error.kind() != std::io::ErrorKind::NotFound {
            return Err(Error::from_io(error, label(role, path)));
        }
        Self::missing(role, path)
    }

    /// The place of a file that does not exist: what stands in the way of creating it is an error.
    fn missing(role: Role, path: &Path) -> Result<Self> {
        if fs::symlink_metadata(path).is_ok() {
            bail!(
                NotFound,
                "{} is a symbolic link to a file that does not exist: remove it or create the file",
                label(role, path)
            );
        }
        let directory = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => bail!(NotFound, "{role}: the path is empty: name a file or a block device"),
        };
        let Some(name) = path.file_name() else {
            bail!(NotFound, "{} is not the name of a file", label(role, path));
        };
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            bail!(NotFound, "{} does not exist, and ends with a slash as only a directory can", label(role, path));
        }
        let stat = fs::metadata(directory).map_err(|error| {
            let context = format!("{} does not exist, and can't be created in {}", label(role, path), show(directory));
            Error::from_io(error, context)
        })?;
        if !stat.is_dir() {
            let kind = ErrorKind::WrongType;
            let context = format!("{}: {} is not a directory", label(role, path), show(directory));
            return Err(Error::new(kind, context));
        }
        let root = fs::metadata("/").map(|stat| stat.dev()).ok();
        let dev = fs::metadata("/dev").map(|stat| stat.dev()).ok();
        if dev != root && dev == Some(stat.dev()) {
            // A mistyped device name would become a file in memory, and the copy would fill the machine's memory.
            bail!(
                NotFound,
                "{} does not exist: there is no such device, and files are not created in /dev",
                label(role, path)
            );
        }
        let id = DeviceId::Missing { directory_dev: stat.dev(), directory_ino: stat.ino(), name: name.into() };
        Ok(Self { role, path: path.into(), id, fs_dev: stat.dev() })
    }

    fn label(&self) -> String {
        label(self.role, &self.path)
    }
}

/// Refuses places that overlap.
pub fn check_distinct(places: &[Place]) -> Result<()> {
    check_distinct_in(&Sysfs::system(), places)
}

pub(super) fn check_distinct_in(sysfs: &Sysfs, places: &[Place]) -> Result<()> {
    for (at, a) in places.iter().enumerate() {
        for b in &places[at + 1..] {
            check_pair(sysfs, a, b)?;
        }
    }
    Ok(())
}

fn check_pair(sysfs: &Sysfs, a: &Place, b: &Place) -> Result<()> {
    let advice = match a.role == Role::Image || b.role == Role::Image {
        true => "each must be a device of its own",
        false => "source, destination and metadata must be three different devices",
    };
    if a.id == b.id {
        let what = if matches!(a.id, DeviceId::Block { .. }) { "block device" } else { "file" };
        bail!(InUse, "{} and {} are the same {what}: {advice}", a.label(), b.label());
    }
    let (stack_a, stack_b) = (sysfs.stack(&a.id), sysfs.stack(&b.id));
    for (upper, lower, stack) in [(a, b, &stack_a), (b, a, &stack_b)] {
        if stack.contains(&lower.id) {
            bail!(
                InUse,
                "{} lies on {} (a partition, loop or mapped device of it): {advice}",
                upper.label(),
                lower.label()
            );
        }
    }
    let loops = |stack: &[DeviceId]| -> Vec<(DeviceId, LoopBacking)> {
        stack.iter().filter_map(|id| Some((id.clone(), sysfs.node(id)?.loop_backing()?))).collect()
    };
    for (loop_a, back_a) in loops(&stack_a) {
        for (loop_b, back_b) in loops(&stack_b) {
            let overlap = back_a.file == back_b.file && back_a.start < back_b.end && back_b.start < back_a.end;
            if loop_a != loop_b && overlap {
                bail!(
                    InUse,
                    "{} and {} are loop devices over the same part of one file: {advice}",
                    a.label(),
                    b.label()
                );
            }
        }
    }
    for (source, target) in [(a, b), (b, a)] {
        let changed =
            source.role == Role::Source && sysfs.written_through(&target.id, target.fs_dev).contains(&source.id);
        if changed {
            bail!(
                InUse,
                "{} is a file on the file system of {}: writing it would change the source, put it elsewhere",
                target.label(),
                source.label()
            );
        }
    }
    Ok(())
}
