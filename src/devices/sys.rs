//! The system calls that `std` lacks, as safe functions: ioctls of block and loop devices, statx, flock, lseek for
//! data and holes. All `unsafe` of the device code is here; nothing here decides anything.
//!
//! Numbers and structures come from the kernel's `linux/fs.h` and `linux/loop.h`.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// `LOOP_GET_STATUS64` of `linux/loop.h`.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
/// `BLKROGET`: `_IO(0x12, 94)`.
const BLKROGET: libc::Ioctl = io_none(0x12, 94);
/// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = io_read(0x12, 114, size_of::<usize>());

/// `_IO(group, number)`: `BLKSSZGET` (`_IO(0x12, 104)`) shows the direction bits of this architecture.
const fn io_none(group: u32, number: u32) -> libc::Ioctl {
    (libc::BLKSSZGET & !0xffff) | ((group << 8 | number) as libc::Ioctl)
}

/// `_IOR(group, number, size)`: powerpc, mips and sparc have three direction bits, the others two.
const fn io_read(group: u32, number: u32, size: usize) -> libc::Ioctl {
    let direction = if libc::BLKSSZGET == 0x1268 { 2 << 30 } else { 2 << 29 };
    (direction | (size as u32) << 16 | group << 8 | number) as libc::Ioctl
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo64>() == 232);

/// What a loop device stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LoopStatus {
    /// Device and inode of the backing file, as in `st_dev` and `st_ino`.
    pub dev: u64,
    pub ino: u64,
    /// The block device that is the backing file (as `st_rdev`); for a regular file 0, or `dev` in older kernels.
    pub rdev: u64,
    /// Where in the backing file the loop device begins, in bytes.
    pub offset: u64,
    /// How many bytes of it it shows; 0: all.
    pub size_limit: u64,
}

impl LoopStatus {
    /// The file or block device that it shows.
    pub(super) fn backing(&self) -> super::DeviceId {
        if self.rdev == 0 || self.rdev == self.dev {
            super::DeviceId::File { dev: self.dev, ino: self.ino }
        } else {
            super::DeviceId::block(self.rdev)
        }
    }
}

/// What the kernel says about direct I/O on a file, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DirectAlignment {
    pub memory: u32,
    pub offset: u32,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Extends a regular file to `size` bytes, with space for all of it.
pub(super) fn allocate(file: &File, size: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    loop {
        // SAFETY: takes a descriptor that is open while `file` lives, and integers.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) }.into()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done.map(drop),
        }
    }
}

/// Size of a block device, in bytes.
pub(super) fn block_device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, to a u64 that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) }.into())?;
    Ok(size)
}

/// Logical block size of a block device, in bytes.
pub(super) fn logical_block_size(file: &File) -> io::Result<u64> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, to an int that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) }.into())?;
    u64::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether a block device can't be had alone, since it is mounted, mapped or the like.
pub(super) fn is_claimed(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Whether a block device is set read-only.
pub(super) fn is_block_device_read_only(file: &File) -> io::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int, to an int that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) }.into())?;
    Ok(read_only != 0)
}

/// What the loop device opened as `file` stands on; ENXIO when it is not attached.
pub(super) fn loop_status(file: &File) -> io::Result<LoopStatus> {
    let mut info = MaybeUninit::<LoopInfo64>::zeroed();
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64, whose size is asserted above, to memory that outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) }.into())?;
    // SAFETY: it was zeroed, and every field is an integer: any content is valid.
    let info = unsafe { info.assume_init() };
    Ok(LoopStatus {
        dev: info.device,
        ino: info.inode,
        rdev: info.rdevice,
        offset: info.offset,
        size_limit: info.sizelimit,
    })
}

/// statx of an open file; which fields are valid is in `stx_mask`.
fn statx(file: &File, mask: libc::c_uint) -> io::Result<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH: the descriptor itself); the kernel fills one struct statx.
    check(unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, stat.as_mut_ptr()) }.into())?;
    // SAFETY: it was zeroed, and every field is an integer: any content is valid.
    Ok(unsafe { stat.assume_init() })
}

/// What direct I/O on a regular file needs: `None` when the kernel (before 6.1) or file system does not say;
/// an offset alignment of 0 says that direct I/O is not possible.
pub(super) fn direct_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let stat = statx(file, libc::STATX_DIOALIGN)?;
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(known.then_some(DirectAlignment { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align }))
}

/// When the file was created, in nanoseconds since 1970; `None` when the file system does not keep it.
pub(super) fn birth_time(file: &File) -> io::Result<Option<u64>> {
    let stat = statx(file, libc::STATX_BTIME)?;
    let ns = u64::try_from(stat.stx_btime.tv_sec)
        .ok()
        .and_then(|s| s.checked_mul(1_000_000_000)?.checked_add(u64::from(stat.stx_btime.tv_nsec)));
    Ok(ns.filter(|ns| stat.stx_mask & libc::STATX_BTIME != 0 && *ns != 0))
}

/// Takes a shared or exclusive lock (flock(2)) without waiting: `Ok(false)` when somebody else's lock is in the way.
pub(super) fn try_flock(file: &File, exclusive: bool) -> io::Result<bool> {
    let operation = libc::LOCK_NB | if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    loop {
        // SAFETY: flock takes no pointers; the descriptor is open.
        match check(unsafe { libc::flock(file.as_raw_fd(), operation) }.into()) {
            Ok(_) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => return Ok(false),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether another open file holds a record lock (fcntl, as virtual machine monitors take) somewhere in `file`.
pub(super) fn has_record_lock(file: &File) -> io::Result<bool> {
    // SAFETY: every field of struct flock is an integer: all zeros is valid (and means the whole file).
    let mut lock: libc::flock64 = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: F_OFD_GETLK reads and writes one struct flock64 that outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) }.into())?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Takes a record lock of the open file description (fcntl(2)) without waiting: `Ok(false)` when somebody else's is in
/// the way. An exclusive one needs a file that is open for writing. Neither `at` nor `at + len` may exceed `i64::MAX + 1`.
pub(super) fn try_record_lock(file: &File, at: u64, len: u64, exclusive: bool) -> io::Result<bool> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    // SAFETY: every field of struct flock is an integer: all zeros is valid; l_pid must be 0 for this kind of lock.
    let mut lock: libc::flock64 = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (number(at)?, number(len)?);
    loop {
        // SAFETY: F_OFD_SETLK reads one struct flock64 that outlives the call.
        match check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }.into()) {
            Ok(_) => return Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => return Ok(false),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Switches `O_DIRECT` of an open file on or off: EINVAL when the file system does not support it.
pub(super) fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: F_GETFL takes no pointer; the descriptor is open.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }.into())? as libc::c_int;
    let flags = if direct { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
    // SAFETY: F_SETFL takes no pointer; the descriptor is open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }.into()).map(drop)
}

/// Drops the pages of an open file or block device from the page cache that are clean (posix_fadvise(2),
/// POSIX_FADV_DONTNEED); the others stay, and are being written from now on.
pub(super) fn drop_clean_pages(file: &File) -> io::Result<()> {
    // SAFETY: takes a descriptor that is open while `file` lives, and integers (0, 0: all of it).
    match unsafe { libc::posix_fadvise64(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        // It is returned, not in errno.
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The next byte at or after `offset` that may be data; `None` when there is none.
pub(super) fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_DATA)
}

/// The next hole at or after `offset`: the end of the file counts as one; `None` past the end.
pub(super) fn seek_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: lseek takes no pointers. It moves the file position, which positioned I/O does not use.
    match check(unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) }) {
        Ok(at) => Ok(Some(at as u64)),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The largest file this process may write (`RLIMIT_FSIZE`), in bytes. Exceeding it is a deadly signal.
pub(super) fn file_size_limit() -> u64 {
    let mut limit = libc::rlimit64 { rlim_cur: libc::RLIM64_INFINITY, rlim_max: libc::RLIM64_INFINITY };
    // SAFETY: getrlimit writes one struct rlimit64 that outlives the call; when it fails the limit stays "infinite".
    unsafe { libc::getrlimit64(libc::RLIMIT_FSIZE, &raw mut limit) };
    limit.rlim_cur
}

/// Whether the effective user may create and remove files in this directory.
pub(super) fn may_create_in(directory: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK | libc::X_OK, libc::AT_EACCESS) };
    check(result.into()).map(drop)
}

/// How many bytes the file system that holds `path` has for anybody; `None`: it does not say.
pub(super) fn free_bytes(path: &std::path::Path) -> io::Result<Option<u64>> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut found = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: the path is a C string, and `found` room for one struct statvfs; both outlive the call.
    check(unsafe { libc::statvfs64(path.as_ptr(), found.as_mut_ptr()) }.into())?;
    // SAFETY: the call has filled it, and zeros are a value of it too.
    let found = unsafe { found.assume_init() };
    // Of some network file systems everything is 0.
    Ok((found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize)))
}
