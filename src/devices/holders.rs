//! Who uses a device: mounts, swap, other block devices, loop devices, locks of other processes.
//!
//! Gives words to a refusal. The refusal itself rests on the kernel's claim and on locks (`open.rs`); what is only
//! looked up here (a file under a loop device, a file used as swap) can change a moment later.

use super::sysfs::{Node, Sysfs, parse_device_number};
use super::{DeviceId, show, sys};
use crate::environment;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How often the table of locks is read to find a lock that is known to be there.
const LOCKS_READ_MAX: u32 = 5;

/// One line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(PartialEq, Eq, Debug)]
struct Mount {
    device: DeviceId,
    mount_point: PathBuf,
    /// A block device's path for most file systems; anything for others.
    source: PathBuf,
    read_only: bool,
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(2);
    let device = parse_device_number(front.next()?)?;
    let mount_point = unescape(front.nth(1)?);
    let mut back = back.split(' ').skip(1);
    let source = unescape(back.next()?);
    // Read-only for all mounts of the file system, not for this mount alone: the second list of options.
    let read_only = back.next()?.split(',').any(|option| option == "ro");
    Some(Mount { device, mount_point, source, read_only })
}

/// Undoes the octal escapes (`\040`) of the kernel's tables.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = text.bytes().collect::<Vec<_>>();
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let code = code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 8).ok());
        if let Some(code) = code {
            bytes.splice(at..at + 4, [code]);
        }
        at += 1;
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// A table of the kernel: empty when it can't be read; paths in it need not be UTF-8.
fn table(path: &str) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn mounts() -> Vec<Mount> {
    let table = table("/proc/self/mountinfo");
    table.lines().filter_map(parse_mount).collect()
}

/// The mount of a block device. btrfs and others have device numbers of their own: their source's counts too.
fn mount_of(id: &DeviceId) -> Option<Mount> {
    mounts().into_iter().find(|mount| mount.device == *id || names_device(&mount.source, id))
}

fn names_device(path: &Path, id: &DeviceId) -> bool {
    path.is_absolute() && fs::metadata(path).is_ok_and(|stat| DeviceId::of(&stat) == *id)
}

/// Whether `id`, a block device or a file, is swapped to.
fn is_swap(id: &DeviceId) -> bool {
    let table = table("/proc/swaps");
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_ascii_whitespace().next())
        .any(|path| names_device(&unescape(path), id))
}

/// How a block device itself is in use, not counting its partitions and not by `except`: "mounted at /mnt".
fn own_use(sysfs: &Sysfs, id: &DeviceId, except: Option<&DeviceId>) -> Option<String> {
    if let Some(mount) = mount_of(id) {
        return Some(format!("mounted at {}", show(&mount.mount_point)));
    }
    if is_swap(id) {
        return Some("used as swap".into());
    }
    let node = sysfs.node(id)?;
    let others = node.holders().into_iter().filter(|holder| Some(&holder.id) != except);
    let holders: Vec<String> = others.map(|holder| holder.label()).collect();
    if !holders.is_empty() {
        return Some(format!("held by {}", holders.join(", ")));
    }
    loops_use(sysfs, id)
}

fn loops_use(sysfs: &Sysfs, id: &DeviceId) -> Option<String> {
    let node = sysfs.loops_over(id).into_iter().next()?;
    let mounted = mount_of(&node.id).map(|mount| format!(", which is mounted at {}", show(&mount.mount_point)));
    let name = node.kernel_name();
    Some(format!("attached to the loop device /dev/{name}{}", mounted.unwrap_or_default()))
}

/// A process that has a block device open, or a partition of it: "open by process 12 (fio)".
pub(super) fn open_by(sysfs: &Sysfs, id: &DeviceId) -> Option<String> {
    let mut wanted = vec![id.clone()];
    wanted.extend(sysfs.node(id).iter().flat_map(Node::partitions).map(|node| node.id));
    let is_wanted = |path: PathBuf| {
        use std::os::unix::fs::FileTypeExt;
        fs::metadata(path)
            .is_ok_and(|stat| stat.file_type().is_block_device() && wanted.contains(&DeviceId::block(stat.rdev())))
    };
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Gone meanwhile, or of somebody whose files may not be seen.
        let Ok(files) = fs::read_dir(entry.path().join("fd")) else { continue };
        if files.flatten().any(|file| is_wanted(file.path())) {
            let name = table(&format!("/proc/{pid}/comm"));
            return Some(format!("open by process {pid} ({})", name.trim_end().escape_debug()));
        }
    }
    None
}

/// How a file or block device is in use by the kernel, its partitions and its disk included, other than by the device
/// `except` above it; ends "it is ...".
pub(super) fn kernel_use(sysfs: &Sysfs, id: &DeviceId, except: Option<&DeviceId>) -> Option<String> {
    if !matches!(id, DeviceId::Block { .. }) {
        return if is_swap(id) { Some("used as swap".into()) } else { loops_use(sysfs, id) };
    }
    if let Some(used) = own_use(sysfs, id, except) {
        return Some(used);
    }
    let node = sysfs.node(id)?;
    for partition in node.partitions() {
        if let Some(used) = own_use(sysfs, &partition.id, None) {
            return Some(format!("in use: its partition {} is {used}", partition.kernel_name()));
        }
    }
    let whole = node.whole()?;
    own_use(sysfs, &whole.id, None).map(|used| format!("in use: its disk {} is {used}", whole.kernel_name()))
}

/// Where a block device or a partition of it is mounted and not read-only.
pub(super) fn mounted_writable(id: &DeviceId) -> Option<PathBuf> {
    let sysfs = Sysfs::system();
    let partitions = sysfs.node(id).map(|node| node.partitions()).unwrap_or_default();
    std::iter::once(id.clone())
        .chain(partitions.into_iter().map(|node| node.id))
        .filter_map(|id| mount_of(&id))
        .find(|mount| !mount.read_only)
        .map(|mount| mount.mount_point)
}

/// Whether the file under `id`, a loop device, is locked exclusively: another clone has it open. Tried by a shared
/// lock for a moment, as the table of locks can be read incompletely.
pub(super) fn locked_backing(sysfs: &Sysfs, id: &DeviceId) -> Option<String> {
    let node =
        sysfs.stack(id).into_iter().find_map(|id| sysfs.node(&id).filter(|node| node.loop_backing().is_some()))?;
    let file = File::open(node.attribute("loop/backing_file")?).ok()?;
    let stat = file.metadata().ok()?;
    let ours = DeviceId::of(&stat) == node.loop_backing()?.file;
    if !ours || sys::try_flock(&file, false).unwrap_or(true) {
        return None;
    }
    let by = lock_holder(stat.dev(), stat.ino(), true).unwrap_or_else(|| "another process".into());
    Some(format!("a loop device over a file that is locked by {by}"))
}

/// The process that holds a lock (flock or record lock) on a file: "process 12 (hydrant)". By `/proc/locks`
/// (proc_locks(5)), which has no owner for locks of open files; `None` when it can't be known.
pub(super) fn lock_holder(dev: u64, ino: u64, exclusive_only: bool) -> Option<String> {
    // The table is no snapshot: a lock that is there may be missing from it when others go while it is read.
    let pid = (0..LOCKS_READ_MAX).find_map(|_| lock_holders(dev, ino, exclusive_only).into_iter().next())?;
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    Some(match command {
        _ if pid == std::process::id() => "this process for another clone".into(),
        Some(command) => format!("process {pid} ({})", command.trim_end().escape_debug()),
        None => format!("process {pid}"),
    })
}

/// Whether all processes that hold locks on the file have ended; `None` when nobody is seen to hold one.
pub(super) fn are_lock_holders_gone(dev: u64, ino: u64) -> Option<bool> {
    let holders = lock_holders(dev, ino, false);
    (!holders.is_empty()).then(|| holders.into_iter().all(environment::is_gone))
}

/// The processes that hold locks on a file, as far as the table of the kernel has them.
fn lock_holders(dev: u64, ino: u64, exclusive_only: bool) -> Vec<u32> {
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    table.lines().filter_map(|line| parse_lock(line, dev, ino, exclusive_only)).collect()
}

/// The process of a line of `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`.
fn parse_lock(line: &str, dev: u64, ino: u64, exclusive_only: bool) -> Option<u32> {
    let mut fields = line.split_ascii_whitespace().skip(1).peekable();
    if *fields.peek()? == "->" {
        return None; // waits for the lock
    }
    let (access, pid, place) = (fields.nth(2)?, fields.next()?, fields.next()?);
    let mut place = place.split(':');
    let major = u32::from_str_radix(place.next()?, 16).ok()?;
    let minor = u32::from_str_radix(place.next()?, 16).ok()?;
    let same = DeviceId::block(dev) == DeviceId::Block { major, minor } && place.next()?.parse() == Ok(ino);
    if !same || (exclusive_only && access != "WRITE") {
        return None;
    }
    pid.parse().ok().filter(|pid| *pid != 0)
}

/// Whether somebody else (a virtual machine monitor) has a record lock in the file.
pub(super) fn has_record_lock(file: &File) -> bool {
    sys::has_record_lock(file).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines() {
        let line = r"42 27 7:0 / /mnt/a\040b\134 rw,relatime shared:1 - ext4 /dev/loop0 ro,errors=continue";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount.device, DeviceId::Block { major: 7, minor: 0 });
        assert_eq!(mount.mount_point, Path::new(r"/mnt/a b\"));
        assert_eq!(mount.source, Path::new("/dev/loop0"));
        assert!(mount.read_only);
        let unbound = "24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=1k";
        assert!(!parse_mount(unbound).unwrap().read_only);
        for bad in ["", "42 27 7:0", "42 27 7 / /mnt rw - ext4 /dev/loop0 rw", r"\04 - \"] {
            assert_eq!(parse_mount(bad), None, "{bad}");
        }
        assert_eq!(unescape(r"\0"), Path::new(r"\0"));
    }

    #[test]
    fn lock_lines() {
        let dev = libc::makedev(0xfe, 0x10);
        let flock = "1: FLOCK  ADVISORY  WRITE 1234 fe:10:5678 0 EOF";
        assert_eq!(parse_lock(flock, dev, 5678, true), Some(1234));
        assert_eq!(parse_lock(flock, dev, 5679, true), None);
        assert_eq!(parse_lock(flock, dev + 1, 5678, true), None);
        let shared = "2: FLOCK  ADVISORY  READ 77 fe:10:5678 0 EOF";
        assert_eq!(parse_lock(shared, dev, 5678, true), None);
        assert_eq!(parse_lock(shared, dev, 5678, false), Some(77));
        assert_eq!(parse_lock("1: -> FLOCK  ADVISORY  WRITE 1 fe:10:5678 0 EOF", dev, 5678, true), None);
        assert_eq!(parse_lock("3: OFDLCK ADVISORY  WRITE -1 fe:10:5678 0 EOF", dev, 5678, true), None);
        assert_eq!(parse_lock("4:", dev, 5678, true), None);
    }
}
