//! From an image of dm-clone's metadata to its bits, or to the first thing that is wrong with it.
//!
//! Memory: one bit per region (at most 256 MiB), 1 MiB of space map and some bytes per block in use; all of it grows
//! as blocks check out, so that a size in a superblock decides nothing.

use super::btree::{Walk, read};
use super::codec::{BLOCK_VALUE, Superblock, WORDS_PER_ARRAY, decode_array, u64_at};
use super::space_map::{SpaceMap, Used};
use super::{Refused, Target};
use crate::meta::check::ReadBlock;
use crate::meta::codec::BLOCK_SIZE;
use crate::meta::hydrated_bits::first_bit;
use crate::meta::runs::set_bits;

/// An image that checked out.
pub struct Image {
    pub superblock: Superblock,
    pub bits: RegionBits,
    /// Blocks that are allocated and not in use: a loss of space, no damage.
    pub nr_leaked: u64,
}

/// Which regions of a target are hydrated: one bit each, those without a region 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionBits {
    nr_regions: u64,
    words: Vec<u64>,
}

impl RegionBits {
    /// Nothing hydrated. Takes the memory at once: for a geometry that can be trusted.
    pub fn new(target: &Target) -> Self {
        Self { nr_regions: target.nr_regions(), words: vec![0; target.nr_words() as usize] }
    }

    pub fn nr_regions(&self) -> u64 {
        self.nr_regions
    }
    pub fn words(&self) -> &[u64] {
        &self.words
    }
    pub fn hydrated_count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
    pub fn is_hydrated(&self, region: u64) -> bool {
        self.words[(region / 64) as usize] >> (region % 64) & 1 == 1
    }

    /// Marks a run of regions, first and last inclusive; it must be inside.
    pub fn set(&mut self, first: u64, last: u64) {
        assert!(first <= last && last < self.nr_regions, "regions {first} to {last} of {}", self.nr_regions);
        set_bits(&mut self.words, first, last);
    }

    /// The hydrated runs, as (first, last) region, both inclusive.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = self.nr_regions as usize;
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = first_bit(&self.words[..], at, end, true);
            at = first_bit(&self.words[..], first, end, false);
            (first < at).then(|| (first as u64, at as u64 - 1))
        })
    }
}

/// Reads and judges a whole image of `device_size` bytes.
pub fn read_image(read_block: &mut ReadBlock<'_>, device_size: u64) -> Result<Image, Refused> {
    let device_blocks = device_size / BLOCK_SIZE as u64;
    if device_blocks == 0 {
        let what = format!("the image has {device_size} bytes, not one block");
        return Err(Refused::other(crate::error::ErrorKind::ForeignData, 0, what));
    }
    let superblock = Superblock::decode(&read(read_block, 0)?)?;
    let mut used = Used::new(superblock.space_map.nr_blocks.min(device_blocks).max(1));
    let space_map = SpaceMap::read(&superblock.space_map, device_blocks, read_block, &mut used)?;
    let bits = read_bits(&superblock, read_block, &mut used)?;
    space_map.check(&used)?;
    Ok(Image { superblock, bits, nr_leaked: space_map.nr_allocated() - used.count() })
}

fn read_bits(superblock: &Superblock, read_block: &mut ReadBlock<'_>, used: &mut Used) -> Result<RegionBits, Refused> {
    let (nr_regions, nr_words) = (superblock.target.nr_regions(), superblock.target.nr_words());
    let nr_arrays = nr_words.div_ceil(WORDS_PER_ARRAY);
    let (mut words, mut next) = (Vec::new(), 0);
    let mut walk = Walk { read_block, used, leaf_value: BLOCK_VALUE };
    walk.run(superblock.bitset_root, 0, &mut |read_block, used, leaf, key, value| {
        if key != next || key >= nr_arrays {
            let what = format!("array block {key} where {next} of {nr_arrays} should be");
            return Err(Refused::damaged(leaf, what));
        }
        next += 1;
        let number = u64_at(value, 0);
        used.add(number, leaf)?;
        let expected = WORDS_PER_ARRAY.min(nr_words - key * WORDS_PER_ARRAY);
        words.extend(decode_array(&read(read_block, number)?, number, expected)?);
        let end = nr_regions % 64;
        if key == nr_arrays - 1 && end != 0 && words.last().is_some_and(|word| word >> end != 0) {
            let what = format!("bits are set past the last region, {}", nr_regions - 1);
            return Err(Refused::damaged(number, what));
        }
        Ok(())
    })?;
    if next != nr_arrays {
        let what = format!("the bitset has {next} array blocks, {nr_regions} regions need {nr_arrays}");
        return Err(Refused::damaged(superblock.bitset_root, what));
    }
    Ok(RegionBits { nr_regions, words })
}
