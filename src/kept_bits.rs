//! Hydrated bits that outlive the process: for the daemon that takes a block device over after a kill.
//!
//! A commit makes bits durable about once a second. Between two of them a write may be acknowledged whose region is hydrated
//! in the memory of the daemon alone. When the machine goes down, such a write may be lost: nobody flushed it. But when only
//! the daemon dies, its block device lives on, and whoever uses it knows nothing of that: no acknowledged write may be
//! missing. The data are in the destination; so all that is to be kept is the bits, in memory that is not the process's: a
//! file in /run, mapped. It is worth nothing after a reboot, and says so itself.
//!
//! ```text
//!   0 magic "hydrbit2" | 8 state u64: 1 good, 2 spoiled | 16 uuid of the metadata | 32 region size u64 | 40 id of the boot (36)
//!   80 generation u64: the last one that the metadata were seen to have, durably
//!   4096 bits: bit i of word w (u64, of the machine) is region 64 w + i
//! ```
//!
//! Invariants:
//! * A bit is set when the region's data write has completed, before anybody is told: by the shard that owns the region.
//! * The bits are those that this file was told of, a part of the hydrated ones. Together with those of the metadata they
//!   are all.
//! * After a commit that failed they are worth nothing: what a flush has lost would pass for copied. The file is spoiled then.
//! * With metadata of an earlier generation they are worth nothing either: somebody has put back an earlier state of metadata
//!   and destination, where the data of these regions are not. So each daemon with a block device begins with a generation
//!   of its own. (What stays: a state that was taken under a running daemon, put back after it was killed before its next
//!   commit, a second later at most, in the same boot.)
//! * All of the file is allocated when it is mapped: a write to it can't fail.

use crate::bail;
use crate::clone_state::KeepsBits;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Generation, Geometry, RegionIndex, RegionRange};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{PoisonError, RwLock};

/// Where the files are: one place for all daemons of root, who alone can have block devices. Not the runtime directory, which
/// the environment chooses, and which systemd removes at the end of a service.
pub const DIRECTORY: &str = "/run/hydrant-ublk";
/// Bits begin here, in bytes: a page of most machines.
const HEADER_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"hydrbit2";
const GOOD: u64 = 1;
const SPOILED: u64 = 2;
const STATE_OFFSET: usize = 8;
const GENERATION_OFFSET: usize = 80;
const BOOT_ID_BYTES: usize = 36;
const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// Whose bits they are, and of when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    pub uuid: [u8; 16],
    pub region_size: u64,
    boot_id: [u8; BOOT_ID_BYTES],
}

impl Identity {
    /// Of a clone, on this machine as long as it runs.
    pub fn now(uuid: [u8; 16], geometry: &Geometry) -> Result<Self> {
        let text = fs::read(BOOT_ID_PATH).map_err(|error| Error::from_io(error, BOOT_ID_PATH))?;
        let Some(boot_id) = text.first_chunk() else { bail!(Environment, "{BOOT_ID_PATH}: it is too short") };
        Ok(Self { uuid, region_size: geometry.region_size().bytes(), boot_id: *boot_id })
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[STATE_OFFSET..16].copy_from_slice(&GOOD.to_ne_bytes());
        bytes[16..32].copy_from_slice(&self.uuid);
        bytes[32..40].copy_from_slice(&self.region_size.to_ne_bytes());
        bytes[40..40 + BOOT_ID_BYTES].copy_from_slice(&self.boot_id);
        bytes
    }

    /// The state and the generation, when the header is one of this clone and this boot.
    fn state_in(&self, header: &[u8; HEADER_BYTES]) -> Option<(u64, Generation)> {
        let mut good = self.header();
        let [state, generation] = [STATE_OFFSET, GENERATION_OFFSET].map(|offset| {
            let mut word = [0; 8];
            word.copy_from_slice(&header[offset..offset + 8]);
            good[offset..offset + 8].copy_from_slice(&word);
            u64::from_ne_bytes(word)
        });
        (good == *header).then_some((state, Generation(generation)))
    }

    /// Where the file of this clone is, in a directory.
    pub fn path_in(&self, directory: &Path) -> PathBuf {
        directory.join(format!("{}.bits", uuid::Uuid::from_bytes(self.uuid).simple()))
    }
}

/// A file that was found.
pub enum Found {
    /// None of this clone and this boot.
    Nothing,
    Bits(KeptBits),
    /// One that was spoiled, or cut off: something is missing.
    Spoiled,
    /// They go with this generation or a later one; the metadata are older.
    OfLater(Generation),
}

/// The file of a clone that runs.
pub struct KeptBits {
    mapping: RwLock<Mapping>,
    file: File,
    path: PathBuf,
}

impl KeptBits {
    /// A new file without any bits, in place of one that may be there.
    pub fn create(directory: &Path, identity: &Identity, geometry: &Geometry) -> Result<Self> {
        let path = identity.path_in(directory);
        let failed =
            |error| Error::from_io(error, format!("{}: the bits of a block device can't be kept", path.display()));
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        Self::forget(directory, identity)?;
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        let made = (|| {
            (&file).write_all(&identity.header())?;
            Mapping::new(&file, geometry.nr_regions())
        })();
        match made {
            Ok(mapping) => Ok(Self { mapping: RwLock::new(mapping), file, path }),
            Err(error) => {
                let _ = fs::remove_file(&path);
                Err(failed(error))
            }
        }
    }

    /// Removes the file that may be there.
    pub fn forget(directory: &Path, identity: &Identity) -> Result<()> {
        let path = identity.path_in(directory);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::from_io(error, path.display().to_string()))
            }
            _ => Ok(()),
        }
    }

    /// The file that a daemon before this one left. `generation`: the newest of the metadata.
    pub fn find(directory: &Path, identity: &Identity, geometry: &Geometry, generation: Generation) -> Result<Found> {
        let path = identity.path_in(directory);
        let failed = |error| Error::from_io(error, path.display().to_string());
        let mut options = OpenOptions::new();
        let file = match options.read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => file,
            // Who may not see it has no block devices either.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES)) => {
                return Ok(Found::Nothing);
            }
            Err(error) => return Err(failed(error)),
        };
        let mut header = [0; HEADER_BYTES];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Found::Nothing),
            read => read.map_err(failed)?,
        }
        match identity.state_in(&header) {
            Some((_, seen)) if seen > generation => return Ok(Found::OfLater(seen)),
            Some((GOOD, _)) => {}
            Some(_) => return Ok(Found::Spoiled),
            None => return Ok(Found::Nothing),
        }
        // A clone that has grown, and was killed before the file had: there are no bits of what is new.
        let mapping = Mapping::new(&file, geometry.nr_regions()).map_err(failed)?;
        Ok(Found::Bits(Self { mapping: RwLock::new(mapping), file, path }))
    }

    /// The runs of regions within `range` that were told of, in order.
    pub fn runs(&self, range: RegionRange) -> Vec<RegionRange> {
        let mapping = self.mapping.read().unwrap_or_else(PoisonError::into_inner);
        let mut runs = Vec::new();
        let mut start = None;
        let mut at = range.first().0;
        while at < range.end().0 {
            let word = mapping.word(at / 64).load(Acquire);
            if word == 0 && start.is_none() {
                at = (at / 64 + 1) * 64;
                continue;
            }
            match (word >> (at % 64) & 1 == 1, start) {
                (true, None) => start = Some(at),
                (false, Some(first)) => {
                    runs.extend(RegionRange::between(RegionIndex(first), RegionIndex(at)));
                    start = None;
                }
                _ => {}
            }
            at += 1;
        }
        runs.extend(start.and_then(|first| RegionRange::between(RegionIndex(first), range.end())));
        runs
    }

    /// Makes room for the regions of a clone that is about to grow.
    pub fn grow(&self, geometry: &Geometry) -> Result<()> {
        let grown = Mapping::new(&self.file, geometry.nr_regions())
            .map_err(|error| Error::from_io(error, format!("{}: no room for more bits", self.path.display())))?;
        *self.mapping.write().unwrap_or_else(PoisonError::into_inner) = grown;
        Ok(())
    }

    /// The clone has ended, with everything committed and no device left.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: it can't be removed: {error}", self.path.display());
        }
    }
}

impl KeepsBits for KeptBits {
    fn keep(&self, regions: RegionRange) {
        let mapping = self.mapping.read().unwrap_or_else(PoisonError::into_inner);
        let (mut at, end) = (regions.first().0, regions.end().0);
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let bits = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            mapping.word(at / 64).fetch_or(bits, AcqRel);
            at = stop;
        }
    }

    fn committed(&self, generation: Generation) {
        let mapping = self.mapping.read().unwrap_or_else(PoisonError::into_inner);
        mapping.at(GENERATION_OFFSET).fetch_max(generation.0, AcqRel);
    }

    fn spoil(&self) {
        self.mapping.read().unwrap_or_else(PoisonError::into_inner).state().store(SPOILED, Release);
    }
}

/// The file in memory.
struct Mapping {
    memory: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the memory is of atomics, and unmapped by the last owner only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Of the header and so many regions, all of it allocated.
    fn new(file: &File, regions: u64) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let bytes = regions.div_ceil(64).checked_mul(8).and_then(|bits| bits.checked_add(HEADER_BYTES as u64));
        let bytes = bytes.and_then(|bytes| bytes.checked_next_multiple_of(4096)).ok_or_else(too_large)?;
        allocate(file, bytes)?;
        let bytes = usize::try_from(bytes).map_err(|_| too_large())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // All of it in memory at once: a bit that is set on behalf of a block device must not wait for swap.
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping where the kernel likes it, of a file that is open and has this length.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file.as_raw_fd(), 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, bytes })
    }

    fn at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= self.bytes, "a region of the clone");
        // SAFETY: inside the mapping, which begins at a page, and `offset` is a multiple of 8; atomics may be shared with
        // whoever else maps the file.
        unsafe { self.memory.add(offset / 8).as_ref() }
    }

    fn word(&self, word: u64) -> &AtomicU64 {
        // A region that does not fit a usize is none of the clone.
        self.at(usize::try_from(word).unwrap_or(usize::MAX / 16) * 8 + HEADER_BYTES)
    }

    fn state(&self) -> &AtomicU64 {
        self.at(STATE_OFFSET)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, unmapped once.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}

/// Makes a file at least so long, with all its blocks; what is there stays.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let len = i64::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: plain system call on an open file.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let zeros = [0; HEADER_BYTES];
            let mut at = file.metadata()?.len();
            while at < bytes {
                let part = usize::try_from(bytes - at).unwrap_or(HEADER_BYTES).min(HEADER_BYTES);
                file.write_all_at(&zeros[..part], at)?;
                at += part as u64;
            }
            Ok(())
        }
        error => Err(error),
    }
}

/// What is to be done when the metadata are older than the bits.
pub fn of_later(path: &Path, has: Generation, seen: Generation) -> Error {
    let text = format!(
        "the metadata are of generation {has}, and were of {seen} when a daemon with a block device was killed: an earlier state \
         has been put back. What that daemon left in {} is not of it; go on without with --force",
        path.display()
    );
    Error::new(ErrorKind::Damaged, text)
}

/// What is to be done when a device lives and its bits are not there.
pub fn missing(device: &Path, spoiled: bool) -> Error {
    let why = match spoiled {
        true => "a commit of the daemon before this one had failed",
        false => "the bits of the daemon before this one are not in /run/hydrant-ublk",
    };
    let text = format!(
        "{}: it is of this clone and may be in use, but {why}: acknowledged writes since its last commit would be missing; \
         end the use of it, or go on without them with --force",
        device.display()
    );
    Error::new(ErrorKind::Damaged, text)
}

#[cfg(test)]
mod tests;
