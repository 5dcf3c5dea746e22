//! Opening: what is wrong with a path is said before anything is changed.
//!
//! The type is looked at before opening (opening a FIFO waits, opening a tape rewinds it) and again on what was
//! opened, which alone counts. No `O_NONBLOCK`: io_uring would fail requests instead of waiting.

use super::distinct::Place;
use super::sysfs::Sysfs;
use super::{Device, DeviceId, DeviceKind, Role, Target, holders, label, ranges, show, sys};
use crate::bail;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::error::{Error, ErrorKind, Result};
use crate::human;
use crate::units::{ByteSize, DEVICE_SIZE_MAX};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// udev takes a short shared lock on a block device while it probes it: try so often...
const BLOCK_LOCK_TRIES_MAX: u32 = 20;
/// ... with this much time between.
const BLOCK_LOCK_PAUSE: Duration = Duration::from_millis(50);
/// A process that was killed lets go of its files a moment after it is gone, when the kernel has ended what its
/// io_uring had in flight. Whoever starts it again at once waits for that, at most so long...
const GONE_WAIT_MAX: Duration = Duration::from_secs(10);
/// ... or so long for a lock that nobody is seen to have: it may have been let go of just now.
const UNSEEN_WAIT_MAX: Duration = Duration::from_millis(200);
/// Between two looks.
const GONE_PAUSE: Duration = Duration::from_millis(10);
/// Smallest logical block, in bytes.
const BLOCK_MIN: u64 = 512;

/// Opens a source: read-only, under a shared lock, so that no clone writes it.
pub fn open_source(path: &Path) -> Result<Device> {
    let role = Role::Source;
    check_type(role, path, &fs::metadata(path).map_err(|e| Error::from_io(e, label(role, path)))?)?;
    let file = open(role, path, OpenOptions::new().read(true))?;
    let stat = file.metadata().map_err(|e| Error::from_io(e, label(role, path)))?;
    lock(role, path, &file, &stat, false)?;
    let device = describe(role, path, file, &stat, false)?;
    if device.size == 0 {
        bail!(TooSmall, "{} is empty: there is nothing to clone", device.label());
    }
    Ok(device)
}

/// Opens what a tool reads and nobody may change meanwhile: read-only, under a shared lock, and a block device under
/// the kernel's exclusive claim too, which a device that dm-clone has open does not give.
pub fn open_input(role: Role, path: &Path) -> Result<Device> {
    let context = |e| Error::from_io(e, label(role, path));
    let looked = fs::metadata(path).map_err(context)?;
    check_type(role, path, &looked)?;
    let id = DeviceId::of(&looked);
    if let Some(used) = holders::kernel_use(&Sysfs::system(), &id, None) {
        bail!(InUse, "{} is {used}: it may change while it is read", label(role, path));
    }
    let claim = if matches!(id, DeviceId::Block { .. }) { libc::O_EXCL } else { 0 };
    let file = open(role, path, OpenOptions::new().read(true).custom_flags(claim))?;
    let stat = file.metadata().map_err(context)?;
    if DeviceId::of(&stat) != id {
        bail!(InUse, "{} was replaced while it was opened: try again", label(role, path));
    }
    lock(role, path, &file, &stat, false)?;
    describe(role, path, file, &stat, false)
}

/// Opens an existing destination or metadata device for reading and writing, locked and, for a block device,
/// claimed; or says that the file can be created. Changes nothing on disk.
pub fn open_target(role: Role, path: &Path) -> Result<Target> {
    let place = Place::look(role, path)?;
    if matches!(place.id, DeviceId::Missing { .. }) {
        let directory = directory_of(path);
        sys::may_create_in(directory).map_err(|e| {
            Error::from_io(
                e,
                format!("{} does not exist, and can't be created in {}", label(role, path), show(directory)),
            )
        })?;
        return Ok(Target::Missing { place });
    }
    check_type(role, path, &fs::metadata(path).map_err(|e| Error::from_io(e, label(role, path)))?)?;
    let sysfs = Sysfs::system();
    check_unused(&sysfs, role, path, &place.id)?;
    if matches!(place.id, DeviceId::Block { .. }) {
        check_writable_block(role, path)?;
    }

    // For a block device O_EXCL is the kernel's exclusive claim; without O_CREAT it means nothing for a file.
    let claim = if matches!(place.id, DeviceId::Block { .. }) { libc::O_EXCL } else { 0 };
    let file = open(role, path, OpenOptions::new().read(true).write(true).custom_flags(claim))?;
    let stat = file.metadata().map_err(|e| Error::from_io(e, label(role, path)))?;
    if DeviceId::of(&stat) != place.id {
        bail!(InUse, "{} was replaced while it was opened: try again", label(role, path));
    }
    lock(role, path, &file, &stat, true)?;
    // Again, now that nobody new can claim it: what came between the look and the claim.
    check_unused(&sysfs, role, path, &place.id)?;
    drop_what_may_be_lost(&file).map_err(|e| Error::from_io(e, format!("{}: page cache", label(role, path))))?;
    let device = describe(role, path, file, &stat, true)?;
    if device.kind == DeviceKind::Block && device.size == 0 {
        bail!(TooSmall, "{} has size 0: is a medium inserted, is the device attached?", device.label());
    }
    Ok(Target::Existing(device))
}

/// Drops from the page cache what a clone before this one may have left there and is not on the medium. What a failed
/// flush could not write Linux keeps in pages that count as clean: reads return them, and the next flush succeeds without
/// them. Whoever goes on from such bytes takes for durable what a power cut takes back. It concerns what goes through
/// the page cache: files without direct I/O, and the tail of a file that ends within a block.
///
/// What stays are pages that are dirty, being written, or in the file system's journal. A flush of this process writes
/// those or fails: an error that came up since this file was opened is reported to it, and so is one that nobody was told
/// of before. So from here on what is read is on the medium, or is a matter of the next flush. No such pages are
/// a reader's who has the file mapped into memory; nothing of ours does that.
fn drop_what_may_be_lost(file: &File) -> io::Result<()> {
    match sys::drop_clean_pages(file) {
        // There are no pages then.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(()),
        dropped => dropped,
    }
}

/// Creates a missing destination or metadata file of `size` bytes, all a hole, mode 0600, locked, durable. When
/// anything fails nothing is left behind.
pub fn create(role: Role, path: &Path, size: u64) -> Result<Device> {
    let context = || format!("{} can't be created", label(role, path));
    check_file_size(role, path, size)?;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => {
            Error::new(ErrorKind::InUse, format!("{}: it exists by now, somebody else made it", context()))
        }
        _ => Error::from_io(e, context()),
    })?;
    let stat = file.metadata().map_err(|e| Error::from_io(e, context()))?;
    let made = (|| {
        lock(role, path, &file, &stat, true)?;
        let mut device = describe(role, path, file, &stat, true)?;
        set_size(&mut device, size)?;
        sync_directory(path).map_err(|e| Error::from_io(e, context()))?;
        Ok(device)
    })();
    made.inspect_err(|_| {
        // Only what was made here: somebody may have put another file in its place.
        if fs::symlink_metadata(path).is_ok_and(|found| DeviceId::of(&found) == DeviceId::of(&stat)) {
            let _ = fs::remove_file(path);
        }
    })
}

/// Refuses a regular file, there or to be created, whose file system has no room for `need` bytes in it: they would be
/// written until it is full. What the file takes up already counts. Another writer may be faster, so a lack of space is
/// possible all the same.
pub fn check_free_space(target: &Target, need: u64) -> Result<()> {
    match target {
        Target::Existing(device) => check_free_space_of(device, need),
        Target::Missing { place } => check_room(&label(place.role, &place.path), directory_of(&place.path), need, need),
    }
}

/// As [`check_free_space`], for a device that is open.
pub fn check_free_space_of(device: &Device, need: u64) -> Result<()> {
    if device.kind == DeviceKind::Block {
        return Ok(());
    }
    let stat = device.file.metadata().map_err(|e| Error::from_io(e, device.label()))?;
    // stat(2): in units of 512 bytes, whatever the file system.
    let has = stat.blocks().saturating_mul(512);
    check_room(&device.label(), &device.path, need, need.saturating_sub(has))
}

fn check_room(label: &str, looked: &Path, need: u64, more: u64) -> Result<()> {
    let free = sys::free_bytes(looked).map_err(|e| Error::from_io(e, format!("{label}: its file system")))?;
    match free {
        Some(free) if more > free => bail!(
            NoSpace,
            "{label} needs {} ({need} bytes), but only {} ({free} bytes) are free in its file system",
            human::size(need),
            human::size(free)
        ),
        _ => Ok(()),
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives an existing empty file its size: durable, all a hole. Refuses any other device.
pub fn set_size(device: &mut Device, size: u64) -> Result<()> {
    check_file_size(device.role, &device.path, size)?;
    let context = || format!("{} can't be sized to {} bytes", device.label(), size);
    let stat = device.file.metadata().map_err(|e| Error::from_io(e, context()))?;
    if device.kind != DeviceKind::File || stat.len() != 0 {
        bail!(TooSmall, "{}: it is not empty", context());
    }
    let sized = device.file.set_len(size).and_then(|()| device.file.sync_all());
    sized.map_err(|e| {
        let _ = device.file.set_len(0);
        Error::from_io(e, context())
    })?;
    device.size = size;
    // What direct I/O needs could not be tried on an empty file.
    (device.direct, device.block) = set_up_direct(&device.file).map_err(|e| Error::from_io(e, device.label()))?;
    if !device.direct {
        device.buffered = None;
    }
    Ok(())
}

/// A regular file that was made longer, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grown {
    pub from: u64,
    pub to: u64,
}

/// Makes a destination or metadata device at least `size` bytes large: a regular file is extended, durably, a destination by
/// a hole, metadata with space for all of it where the file system can; a block device must be so large by now. Blocks.
/// `device.size` is what it has afterwards, also when this fails; then a file has the length that it had. `None`: it was
/// large enough.
pub fn grow(device: &mut Device, size: u64) -> Result<Option<Grown>> {
    let context = |device: &Device| format!("{} can't grow to {size} bytes", device.label());
    let has = |device: &Device| match device.kind {
        DeviceKind::Block => sys::block_device_size(&device.file),
        DeviceKind::File => device.file.metadata().map(|stat| stat.len()),
    };
    device.size = has(device).map_err(|e| Error::from_io(e, context(device)))?;
    if device.size >= size {
        return Ok(None);
    }
    if device.kind == DeviceKind::Block {
        bail!(TooSmall, "{}: it has {} bytes, make it larger first", context(device), device.size);
    }
    check_file_size(device.role, &device.path, size)?;
    let from = device.size;
    let grown = extend(device, size).and_then(|()| device.file.sync_all()).and_then(|()| has(device));
    match grown {
        Ok(to) => {
            device.size = to;
            Ok(Some(Grown { from, to }))
        }
        Err(error) => {
            // A part of it may have been done.
            if let Err(error) = device.file.set_len(from) {
                log::warn!("{} can't be cut back to {from} bytes: {error}", device.label());
            }
            Err(Error::from_io(error, context(device)))
        }
    }
}

fn extend(device: &Device, size: u64) -> io::Result<()> {
    match device.role {
        Role::Metadata => match sys::allocate(&device.file, size) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => device.file.set_len(size),
            done => done,
        },
        Role::Source | Role::Destination | Role::Image => device.file.set_len(size),
    }
}

/// Undoes what [`grow`] did, unless somebody else has changed the length since. Blocks.
pub fn cut_back(device: &Device, grown: Grown) -> Result<()> {
    let context = || format!("{} can't be cut back to {} bytes", device.label(), grown.from);
    let now = device.file.metadata().map_err(|e| Error::from_io(e, context()))?.len();
    if now != grown.to {
        bail!(InUse, "{}: it has {now} now, not {}", context(), grown.to);
    }
    device.file.set_len(grown.from).map_err(|e| Error::from_io(e, context()))
}

fn open(role: Role, path: &Path, options: &OpenOptions) -> Result<File> {
    let wait = WaitForTheGone::new();
    let opened = loop {
        match options.open(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => match fs::metadata(path) {
                Ok(stat) if wait.may_try_again(&stat) => {}
                _ => break Err(e),
            },
            opened => break opened,
        }
    };
    opened.map_err(|e| {
        if e.raw_os_error() == Some(libc::EBUSY) {
            let stat = fs::metadata(path).ok();
            let by = stat.and_then(|stat| holders::lock_holder(stat.dev(), stat.ino(), true));
            let by = by.unwrap_or_else(|| "the kernel or another program (mounted, a volume, another clone)".into());
            return Error::new(ErrorKind::InUse, format!("{} is in use by {by}", label(role, path)));
        }
        Error::from_io(e, label(role, path))
    })
}

/// A wait for a lock of a process that is gone.
pub(super) struct WaitForTheGone {
    since: Instant,
}

impl WaitForTheGone {
    pub(super) fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// Waits a little; false when it is of no use: the lock is somebody's who lives, or this took too long.
    pub(super) fn may_try_again(&self, stat: &Metadata) -> bool {
        let time_max = match holders::are_lock_holders_gone(stat.dev(), stat.ino()) {
            Some(true) => GONE_WAIT_MAX,
            Some(false) => return false,
            None => UNSEEN_WAIT_MAX,
        };
        let may = self.since.elapsed() < time_max;
        if may {
            std::thread::sleep(GONE_PAUSE);
        }
        may
    }
}

fn check_type(role: Role, path: &Path, stat: &Metadata) -> Result<()> {
    let kind = stat.file_type();
    let what = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_char_device() => "a character device",
        () if kind.is_socket() => "a socket",
        () => "of an unknown type",
    };
    bail!(WrongType, "{} is {what}: name a regular file or a block device", label(role, path))
}

fn check_unused(sysfs: &Sysfs, role: Role, path: &Path, id: &DeviceId) -> Result<()> {
    if let Some(used) = holders::kernel_use(sysfs, id, None).or_else(|| holders::locked_backing(sysfs, id)) {
        bail!(InUse, "{} is {used}: it would be overwritten", label(role, path));
    }
    Ok(())
}

/// Some drivers let a read-only device be opened for writing, and fail the writes.
fn check_writable_block(role: Role, path: &Path) -> Result<()> {
    let context = || label(role, path);
    let file = File::open(path).map_err(|e| Error::from_io(e, context()))?;
    if sys::is_block_device_read_only(&file).map_err(|e| Error::from_io(e, context()))? {
        bail!(PermissionDenied, "{} is a read-only block device", context());
    }
    Ok(())
}

fn lock(role: Role, path: &Path, file: &File, stat: &Metadata, exclusive: bool) -> Result<()> {
    let tries = if exclusive && stat.file_type().is_block_device() { BLOCK_LOCK_TRIES_MAX } else { 1 };
    let wait = WaitForTheGone::new();
    let mut attempt = 1;
    let locked = loop {
        match sys::try_flock(file, exclusive) {
            Ok(true) => break true,
            Ok(false) if wait.may_try_again(stat) => {}
            Ok(false) if attempt == tries => break false,
            Ok(false) => {
                attempt += 1;
                std::thread::sleep(BLOCK_LOCK_PAUSE);
            }
            // A file system without locks (some network ones): nothing protects there, and nothing can.
            Err(error) => {
                log::warn!("{} can't be locked ({error}): see to it that nothing else uses it", label(role, path));
                break true;
            }
        }
    };
    if !locked {
        let by = holders::lock_holder(stat.dev(), stat.ino(), !exclusive).unwrap_or_else(|| "another process".into());
        let why = match exclusive {
            true => "another clone may use it",
            false if role == Role::Source => "it is the destination or metadata of another clone",
            false => "a clone uses it",
        };
        bail!(InUse, "{} is in use, locked by {by}: {why}", label(role, path));
    }
    if exclusive && holders::has_record_lock(file) {
        let by = holders::lock_holder(stat.dev(), stat.ino(), false).filter(|by| !by.starts_with("this process"));
        let by = by.unwrap_or_else(|| "another process (a virtual machine, or a clone through a loop device?)".into());
        bail!(InUse, "{} is in use, locked by {by}", label(role, path));
    }
    ranges::lock_whole(role, path, file, stat, exclusive)
}

fn describe(role: Role, path: &Path, file: File, stat: &Metadata, writable: bool) -> Result<Device> {
    let context = |e| Error::from_io(e, label(role, path));
    check_type(role, path, stat)?;
    let below = ranges::lock_shown(role, path, &DeviceId::of(stat), writable)?.map(Arc::new);
    let block_device = stat.file_type().is_block_device();
    let kind = if block_device { DeviceKind::Block } else { DeviceKind::File };
    let size = if block_device { sys::block_device_size(&file).map_err(context)? } else { stat.len() };
    if size > DEVICE_SIZE_MAX {
        bail!(NotSupported, "{} has {size} bytes, more than is possible ({DEVICE_SIZE_MAX})", label(role, path));
    }
    let (direct, block) = if block_device {
        sys::set_direct(&file, true).map_err(context)?;
        let block = sys::logical_block_size(&file).map_err(context)?;
        if !block.is_power_of_two() || !(BLOCK_MIN..=DMA_ALIGN as u64).contains(&block) {
            bail!(
                NotSupported,
                "{} has logical blocks of {block} bytes: only 512 to 4096 are supported",
                label(role, path)
            );
        }
        (true, block as u32)
    } else {
        set_up_direct(&file).map_err(context)?
    };
    let mut device = Device {
        role,
        path: path.into(),
        kind,
        size,
        block,
        direct,
        file,
        buffered: None,
        below,
        id: DeviceId::of(stat),
        fs_dev: stat.dev(),
    };
    if kind == DeviceKind::File && direct {
        open_buffered(&mut device, writable)?;
    }
    Ok(device)
}

/// Switches a regular file to direct I/O where that works. Tells whether, and the alignment it needs in bytes.
fn set_up_direct(file: &File) -> io::Result<(bool, u32)> {
    let block = match sys::direct_alignment(file).unwrap_or(None) {
        Some(needs) if needs.offset == 0 => None,
        Some(needs) => Some(needs.offset.max(needs.memory).max(BLOCK_MIN as u32)),
        // The kernel does not say: 4096 suits every file system whose blocks are not larger, and is tried below.
        None => Some(DMA_ALIGN as u32),
    };
    if let Some(block) = block.filter(|block| block.is_power_of_two() && *block <= DMA_ALIGN as u32) {
        let tried = sys::set_direct(file, true).and_then(|()| file.read_at(&mut DmaBuf::new(DMA_ALIGN), 0));
        match tried {
            Ok(_) => return Ok((true, block)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => sys::set_direct(file, false)?,
            Err(e) => return Err(e),
        }
    }
    Ok((false, BLOCK_MIN as u32))
}

/// The second, buffered descriptor of a regular file in direct mode.
fn open_buffered(device: &mut Device, writable: bool) -> Result<()> {
    let context = |e| Error::from_io(e, device.label());
    let mut options = OpenOptions::new();
    let file = options.read(true).write(writable).open(&device.path).map_err(context)?;
    if DeviceId::of(&file.metadata().map_err(context)?) != device.id {
        bail!(InUse, "{} was replaced while it was opened: try again", device.label());
    }
    device.buffered = Some(file);
    Ok(())
}

/// What a file of `size` bytes would meet later, as a deadly signal or as an error in the middle of the copy.
fn check_file_size(role: Role, path: &Path, size: u64) -> Result<()> {
    let limit = sys::file_size_limit();
    if size > limit {
        bail!(
            Environment,
            "{} needs a file of {size} bytes, but this process may only write {} (ulimit -f): raise the limit",
            label(role, path),
            ByteSize(limit)
        );
    }
    if size > DEVICE_SIZE_MAX {
        bail!(NotSupported, "{} can't have {size} bytes: {DEVICE_SIZE_MAX} are possible", label(role, path));
    }
    Ok(())
}

/// Makes the name of a new file durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(directory_of(path))?.sync_all() {
        // fsync(2): EINVAL when the file system has no such thing for directories.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        synced => synced,
    }
}
