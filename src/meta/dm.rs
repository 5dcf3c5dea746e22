//! The metadata of the kernel's dm-clone: read to take a clone over, written to give one back.
//!
//! * [`codec`]: the blocks, drawn there. * [`space_map`]: which blocks are in use. * [`btree`]: walks and builds trees.
//! * [`reader`]: from an image to bits; believes nothing. * [`writer`]: from bits to a whole image.
//!
//! Pure: blocks come from a function and go to one. Only dm-clone's own use of the kernel's persistent-data library is
//! known here: one bitset, one space map. What does not check out is refused with the number of the block and the
//! reason, as everywhere: a wrong bit is lost data.

pub mod btree;
pub mod codec;
pub mod reader;
pub mod space_map;
pub mod writer;

#[cfg(test)]
mod tests;

use crate::error::{Error, ErrorKind};
use crate::units::{DEVICE_SIZE_MAX, REGION_SIZE_MAX, RegionSize, SECTOR_SIZE};

/// Regions of a dm-clone target at most ("Too many regions").
pub const REGIONS_MAX: u64 = 1 << 31;

/// Why an image is refused. Its text names the block.
#[derive(Clone, Debug)]
pub struct Refused {
    pub kind: ErrorKind,
    /// The 4096-byte block from the start of the image.
    pub block: u64,
    pub what: String,
}

impl Refused {
    pub(crate) fn damaged(block: u64, what: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Damaged, block, what: what.into() }
    }
    pub(crate) fn other(kind: ErrorKind, block: u64, what: impl Into<String>) -> Self {
        Self { kind, block, what: what.into() }
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        let Refused { kind, block, what } = refused;
        match kind {
            ErrorKind::Damaged => Error::new(kind, format!("damaged: block {block}: {what}")),
            _ => Error::new(kind, format!("block {block}: {what}")),
        }
    }
}

/// What a dm-clone target is divided into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// In sectors of 512 bytes, at least 1.
    sectors: u64,
    region_size: RegionSize,
}

impl Target {
    /// A target of `sectors` sectors; the error says what dm-clone would not accept.
    pub fn new(sectors: u64, region_size: RegionSize) -> Result<Self, String> {
        let target = Self { sectors, region_size };
        if sectors == 0 || sectors > (DEVICE_SIZE_MAX - REGION_SIZE_MAX) / SECTOR_SIZE {
            return Err(format!("a target size of {sectors} sectors is impossible"));
        }
        if target.nr_regions() > REGIONS_MAX {
            return Err(format!(
                "{} regions of {region_size}, dm-clone takes at most {REGIONS_MAX}",
                target.nr_regions()
            ));
        }
        Ok(target)
    }

    /// The target for a device of `size` bytes.
    pub fn of_bytes(size: u64, region_size: RegionSize) -> Result<Self, String> {
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(format!("a size of {size} bytes is not a multiple of {SECTOR_SIZE}, as dm-clone needs"));
        }
        Self::new(size / SECTOR_SIZE, region_size)
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.sectors * SECTOR_SIZE
    }
    pub fn region_size(&self) -> RegionSize {
        self.region_size
    }
    /// The last, perhaps shorter one included.
    pub fn nr_regions(&self) -> u64 {
        self.sectors.div_ceil(self.region_size.sectors())
    }
    /// Words of 64 regions.
    pub(crate) fn nr_words(&self) -> u64 {
        self.nr_regions().div_ceil(64)
    }
}
