//! What a block device over a clone looks like: its parameters, decided from the clone and its destination. Pure.

use super::proto::{Attributes, Parameters};
use crate::bail;
use crate::error::Result;
use crate::units::{RegionSize, SECTOR_SIZE};

/// Smallest and largest logical block of a ublk device, in bytes: a sector, and the page of every machine.
const BLOCK_MIN: u32 = 512;
const BLOCK_MAX: u32 = 4096;

/// What the parameters follow from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Of the clone, in bytes.
    pub size: u64,
    pub region_size: RegionSize,
    /// Logical and physical block of the destination, in bytes.
    pub logical_block: u32,
    pub physical_block: u32,
    pub rotational: bool,
    /// The largest READ or WRITE, in bytes.
    pub io_bytes_max: u32,
}

impl Shape {
    /// Sectors that the device shows. What follows the last whole one can't be reached: a block device has none such.
    pub const fn sectors(&self) -> u64 {
        self.size / SECTOR_SIZE
    }

    /// The parameters. `TooSmall` when there is not one sector.
    ///
    /// Logical blocks are the destination's, or smaller when these do not divide the device. `io_min` and `io_opt` are the
    /// region size, as dm-clone has them; so is the granularity of discards. FUA and flushes are those of the clone, which
    /// holds back nothing but its metadata: that is a volatile cache.
    pub fn parameters(&self) -> Result<Parameters> {
        let sectors = self.sectors();
        if sectors == 0 {
            bail!(TooSmall, "a clone of {} bytes can't be a block device: that has sectors of 512", self.size);
        }
        let power_of_two = |block: u32| match block {
            0..=BLOCK_MIN => BLOCK_MIN,
            block => 1 << (u32::BITS - 1 - block.leading_zeros()),
        };
        let mut logical = power_of_two(self.logical_block).min(BLOCK_MAX);
        while logical > BLOCK_MIN && !(sectors * SECTOR_SIZE).is_multiple_of(u64::from(logical)) {
            logical /= 2;
        }
        let physical = power_of_two(self.physical_block).max(logical);
        let region_shift = self.region_size.shift();
        // At most 1 GiB, so it fits; the largest multiple of it that a bio can hold.
        let region_bytes = self.region_size.bytes() as u32;
        let bulk_sectors_max = (u32::MAX - u32::MAX % region_bytes) / SECTOR_SIZE as u32;
        let mut attributes = Attributes::VOLATILE_CACHE | Attributes::FUA;
        attributes.set(Attributes::ROTATIONAL, self.rotational);
        Ok(Parameters {
            attributes,
            logical_block_shift: logical.trailing_zeros() as u8,
            physical_block_shift: physical.trailing_zeros() as u8,
            io_opt_shift: region_shift as u8,
            io_min_shift: region_shift as u8,
            sectors_max: self.io_bytes_max / SECTOR_SIZE as u32,
            sectors,
            discard_granularity: region_bytes.max(logical),
            discard_sectors_max: bulk_sectors_max,
            write_zeroes_sectors_max: bulk_sectors_max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn shape() -> Shape {
        Shape {
            size: 1 << 30,
            region_size: RegionSize::default(),
            logical_block: 512,
            physical_block: 4096,
            rotational: false,
            io_bytes_max: 512 << 10,
        }
    }

    #[test]
    fn follows_clone_and_destination() {
        let found = shape().parameters().unwrap();
        let expected = Parameters {
            attributes: Attributes::VOLATILE_CACHE | Attributes::FUA,
            logical_block_shift: 9,
            physical_block_shift: 12,
            io_opt_shift: 16,
            io_min_shift: 16,
            sectors_max: 1024,
            sectors: 1 << 21,
            discard_granularity: 64 << 10,
            discard_sectors_max: 8_388_480,
            write_zeroes_sectors_max: 8_388_480,
        };
        assert_eq!(found, expected);
        let rotational = Shape { rotational: true, ..shape() }.parameters().unwrap();
        assert!(rotational.attributes.contains(Attributes::ROTATIONAL));
    }

    #[test]
    fn the_largest_regions_fit() {
        let large = Shape { region_size: RegionSize::new(1 << 30).unwrap(), ..shape() }.parameters().unwrap();
        assert_eq!((large.discard_granularity, large.discard_sectors_max), (1 << 30, 3 << 21));
        let small = Shape { region_size: RegionSize::new(4096).unwrap(), ..shape() }.parameters().unwrap();
        assert_eq!((small.discard_granularity, small.discard_sectors_max), (4096, (1 << 23) - 8));
    }

    #[test]
    fn blocks_divide_the_device() {
        let shifts = |logical_block, physical_block, size| {
            let found = Shape { logical_block, physical_block, size, ..shape() }.parameters().unwrap();
            (found.logical_block_shift, found.physical_block_shift, found.sectors)
        };
        assert_eq!(shifts(4096, 4096, 1 << 20), (12, 12, 2048));
        assert_eq!(shifts(4096, 4096, (1 << 20) + 2048), (11, 12, 2052));
        assert_eq!(shifts(4096, 512, (1 << 20) + 513), (9, 9, 2049));
        assert_eq!(shifts(1, 0, 512), (9, 9, 1));
        assert_eq!(shifts(u32::MAX, u32::MAX, 1 << 20), (12, 31, 2048));
        assert_eq!(shifts(3000, 5000, 1 << 20), (11, 12, 2048));
        for size in [0, 511] {
            let error = Shape { size, ..shape() }.parameters().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TooSmall);
        }
    }
}
