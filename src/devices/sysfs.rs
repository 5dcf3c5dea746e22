//! Block devices as sysfs shows them: what stands on what, and what uses what.
//!
//! Read-only and best effort: where sysfs is missing (a container) nothing is known, and the answer is "nothing
//! found". Safety never rests on it: the kernel's exclusive claim (`O_EXCL`) does that; sysfs gives it words, and
//! finds the overlaps that the kernel can't know of.
//! Format: `Documentation/ABI/stable/sysfs-block` of the kernel; the root can be another directory for tests.

use super::{DeviceId, sys};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How deep devices may be stacked before looking further is given up (a loop can't be, but sysfs is input).
const STACK_DEPTH_MAX: usize = 16;

/// The unit of sysfs, whatever the device's blocks are, in bytes.
const SECTOR_SIZE: u64 = 512;

/// Where sysfs is.
#[derive(Clone, Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

/// A block device in sysfs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Node {
    directory: PathBuf,
    pub id: DeviceId,
}

/// What a loop device stands on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LoopBacking {
    pub file: DeviceId,
    /// The device of the file system that holds the file.
    pub fs_dev: u64,
    /// The part of the file that the device shows, in bytes; the end is `u64::MAX` when it is not limited.
    pub start: u64,
    pub end: u64,
}

/// What a loop device, or a partition of one, shows of the file at its bottom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Shown {
    /// The file's name as the kernel has it.
    pub path: PathBuf,
    pub file: DeviceId,
    /// The part that is shown, in bytes; the end is `u64::MAX` when it is not limited.
    pub start: u64,
    pub end: u64,
}

fn word(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Reads `major:minor`.
pub(super) fn parse_device_number(text: &str) -> Option<DeviceId> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceId::Block { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

impl Sysfs {
    pub(super) fn system() -> Self {
        Self::at("/sys")
    }
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The node of a block device; `None` for files, and where sysfs does not show it.
    pub(super) fn node(&self, id: &DeviceId) -> Option<Node> {
        let DeviceId::Block { major, minor } = id else { return None };
        let directory = fs::canonicalize(self.root.join(format!("dev/block/{major}:{minor}"))).ok()?;
        Some(Node { directory, id: id.clone() })
    }

    /// All loop devices that are attached.
    fn loops(&self) -> Vec<Node> {
        let Ok(entries) = fs::read_dir(self.root.join("block")) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"loop"))
            .filter_map(|entry| Node::at(&entry.path()))
            .filter(|node| node.directory.join("loop/backing_file").exists())
            .collect()
    }

    /// The loop devices that show the file `id`.
    pub(super) fn loops_over(&self, id: &DeviceId) -> Vec<Node> {
        self.loops().into_iter().filter(|node| node.loop_backing().is_some_and(|backing| backing.file == *id)).collect()
    }

    /// What lies directly below a block device: its whole disk, the devices it maps, the file it shows.
    fn directly_below(&self, id: &DeviceId) -> Vec<DeviceId> {
        let Some(node) = self.node(id) else { return Vec::new() };
        let mut below: Vec<DeviceId> = node.whole().into_iter().chain(node.slaves()).map(|n| n.id).collect();
        below.extend(node.loop_backing().map(|backing| backing.file));
        below
    }

    /// What `id` shows of the file that its loop devices stand on; `None` when it is no loop device or partition of one.
    pub(super) fn shown_by_loops(&self, id: &DeviceId) -> Option<Shown> {
        let (mut at, mut part, mut shown) = (id.clone(), (0, u64::MAX), None);
        for _ in 0..STACK_DEPTH_MAX {
            let Some(mut node) = self.node(&at) else { break };
            if let Some(whole) = node.whole() {
                part = node.partition_bytes().map_or((0, u64::MAX), |partition| within(part, partition));
                node = whole;
            }
            let Some(backing) = node.loop_backing() else { break };
            let Some(path) = node.attribute("loop/backing_file") else { break };
            part = within(part, (backing.start, backing.end));
            shown = Some(Shown { path: path.into(), file: backing.file.clone(), start: part.0, end: part.1 });
            at = backing.file;
        }
        shown
    }

    /// Everything below `id`, itself first. A file ends the search: file systems share their device.
    pub(super) fn stack(&self, id: &DeviceId) -> Vec<DeviceId> {
        self.closure(vec![id.clone()], false)
    }

    /// Everything that a write to `id` changes: as [`Self::stack`], and for a file the device of its file system.
    pub(super) fn written_through(&self, id: &DeviceId, fs_dev: u64) -> Vec<DeviceId> {
        let mut start = vec![id.clone()];
        if !matches!(id, DeviceId::Block { .. }) {
            start.push(DeviceId::block(fs_dev));
        }
        self.closure(start, true)
    }

    fn closure(&self, start: Vec<DeviceId>, through_files: bool) -> Vec<DeviceId> {
        let mut found = start.clone();
        let mut level = start;
        for _ in 0..STACK_DEPTH_MAX {
            let mut next = Vec::new();
            for id in &level {
                let backing_fs = self.node(id).and_then(|node| node.loop_backing()).map(|b| DeviceId::block(b.fs_dev));
                for below in self.directly_below(id).into_iter().chain(backing_fs.filter(|_| through_files)) {
                    if !found.contains(&below) {
                        found.push(below.clone());
                        next.push(below);
                    }
                }
            }
            level = next;
        }
        found
    }
}

/// The part of a window (start and end, in bytes), in bytes of what the window shows a part of.
fn within(part: (u64, u64), window: (u64, u64)) -> (u64, u64) {
    (window.0.saturating_add(part.0), window.0.saturating_add(part.1).min(window.1))
}

impl Node {
    fn at(directory: &Path) -> Option<Self> {
        let directory = fs::canonicalize(directory).ok()?;
        let id = parse_device_number(&word(&directory.join("dev"))?)?;
        Some(Self { directory, id })
    }

    /// The kernel's name: `sda1`, `dm-0`.
    pub(super) fn kernel_name(&self) -> String {
        self.directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The name for people: `dm-0 (vg-root)` for a mapped device.
    pub(super) fn label(&self) -> String {
        match self.attribute("dm/name") {
            Some(name) => format!("{} ({name})", self.kernel_name()),
            None => self.kernel_name(),
        }
    }

    /// An attribute, without its line end; `None` when missing or empty.
    pub(super) fn attribute(&self, name: &str) -> Option<String> {
        word(&self.directory.join(name))
    }

    pub(super) fn is_partition(&self) -> bool {
        self.directory.join("partition").exists()
    }

    /// The disk that this is a partition of.
    pub(super) fn whole(&self) -> Option<Node> {
        if !self.is_partition() {
            return None;
        }
        Node::at(self.directory.parent()?)
    }

    /// Where in its disk this partition starts and ends, in bytes.
    fn partition_bytes(&self) -> Option<(u64, u64)> {
        let sectors = |name| self.attribute(name)?.parse::<u64>().ok();
        let start = sectors("start")?.checked_mul(SECTOR_SIZE)?;
        Some((start, start.checked_add(sectors("size")?.checked_mul(SECTOR_SIZE)?)?))
    }

    /// The partitions of this disk.
    pub(super) fn partitions(&self) -> Vec<Node> {
        self.children(&self.directory).into_iter().filter(Node::is_partition).collect()
    }

    /// The devices that this one maps.
    pub(super) fn slaves(&self) -> Vec<Node> {
        self.children(&self.directory.join("slaves"))
    }

    /// The devices that map this one.
    pub(super) fn holders(&self) -> Vec<Node> {
        self.children(&self.directory.join("holders"))
    }

    fn children(&self, directory: &Path) -> Vec<Node> {
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        let mut nodes: Vec<Node> = entries.flatten().filter_map(|entry| Node::at(&entry.path())).collect();
        nodes.retain(|node| node.directory != self.directory);
        nodes.sort_by_key(Node::kernel_name);
        nodes
    }

    /// What this loop device stands on; `None` when it is no loop device or not attached. The kernel knows the file
    /// itself; its path, as sysfs has it, is the second choice: it may name another file by now.
    pub(super) fn loop_backing(&self) -> Option<LoopBacking> {
        let path = self.attribute("loop/backing_file")?;
        let number = |name| self.attribute(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let asked = File::open(Path::new("/dev").join(self.kernel_name())).and_then(|file| {
            let same = DeviceId::block(file.metadata()?.rdev()) == self.id;
            if same { sys::loop_status(&file) } else { Err(std::io::ErrorKind::NotFound.into()) }
        });
        let (file, fs_dev, start, limit) = match asked {
            Ok(status) => (status.backing(), status.dev, status.offset, status.size_limit),
            Err(_) => {
                let stat = fs::metadata(path).ok()?;
                (DeviceId::of(&stat), stat.dev(), number("loop/offset"), number("loop/sizelimit"))
            }
        };
        let end = if limit == 0 { u64::MAX } else { start.saturating_add(limit) };
        Some(LoopBacking { file, fs_dev, start, end })
    }
}
