//! From bits to a whole image that the kernel opens.
//!
//! ```text
//! block 0           superblock, written last
//!       1           space map index
//!       2           tree of reference counts, empty: nothing has more than one reference
//!       3 ...       bitmaps of the space map
//!       ...         array blocks
//!       ...         tree of the bitset, leaves first, the root last
//!       the rest    free
//! ```

use super::Target;
use super::btree::Shape;
use super::codec::{
    BLOCKS_MAX, COUNT_VALUE, ENTRIES_PER_BITMAP, SpaceMapRoot, Superblock, WORDS_PER_ARRAY, encode_array, encode_node,
};
use super::reader::RegionBits;
use super::space_map;
use crate::meta::codec::{BLOCK_SIZE, Block};

const INDEX: u64 = 1;
const COUNTS: u64 = 2;
const FIRST_BITMAP: u64 = 3;
/// A default size is a multiple of this, in blocks: 1 MiB.
const DEFAULT_STEP: u64 = 256;
/// The smallest default size in blocks: 4 MiB.
const DEFAULT_MIN: u64 = 4 * DEFAULT_STEP;

/// Where everything is in an image.
pub struct Layout {
    target: Target,
    nr_blocks: u64,
    nr_arrays: u64,
    shape: Shape,
}

impl Layout {
    /// For a device of `nr_blocks` blocks. Blocks past [`BLOCKS_MAX`] are not used, as by the kernel.
    fn with_blocks(target: Target, nr_blocks: u64) -> Self {
        let nr_arrays = target.nr_words().div_ceil(WORDS_PER_ARRAY);
        Self { target, nr_blocks: nr_blocks.min(BLOCKS_MAX), nr_arrays, shape: Shape::new(nr_arrays) }
    }

    /// For a device of `size` bytes; the error says how many are needed.
    pub fn new(target: Target, size: u64) -> Result<Self, String> {
        let layout = Self::with_blocks(target, size / BLOCK_SIZE as u64);
        let needed = Self::size_min(target);
        match size < needed || layout.nr_blocks < layout.nr_needed() {
            true => {
                Err(format!("{size} bytes are too few, dm-clone needs {needed} for {} regions", target.nr_regions()))
            }
            false => Ok(layout),
        }
    }

    /// The smallest device that dm-clone can work on, in bytes: a commit may copy every block but the superblock and
    /// the counts before it can free the old ones.
    pub fn size_min(target: Target) -> u64 {
        // More blocks may need more bitmaps, which are blocks: ends soon, as a bitmap counts 16320 of them.
        let mut layout = Self::with_blocks(target, 1);
        while layout.nr_blocks < layout.nr_needed() {
            layout.nr_blocks = layout.nr_needed();
        }
        layout.nr_blocks * BLOCK_SIZE as u64
    }

    /// A comfortable size in bytes: half as much again as the least, whole MiB, and 4 MiB at least.
    pub fn size_default(target: Target) -> u64 {
        let least = Self::size_min(target) / BLOCK_SIZE as u64;
        let comfortable = (least + least / 2).next_multiple_of(DEFAULT_STEP).max(DEFAULT_MIN);
        comfortable.min(BLOCKS_MAX) * BLOCK_SIZE as u64
    }

    fn nr_needed(&self) -> u64 {
        2 * self.nr_used() - 2
    }
    fn nr_bitmaps(&self) -> u64 {
        self.nr_blocks.div_ceil(ENTRIES_PER_BITMAP)
    }
    fn first_array(&self) -> u64 {
        FIRST_BITMAP + self.nr_bitmaps()
    }
    fn first_node(&self) -> u64 {
        self.first_array() + self.nr_arrays
    }
    /// Blocks in use, the superblock included; they are the first ones.
    pub fn nr_used(&self) -> u64 {
        self.first_node() + self.shape.nr_nodes()
    }
    /// Blocks that the space map knows.
    pub fn nr_blocks(&self) -> u64 {
        self.nr_blocks
    }

    /// Hands every block but the superblock to `emit`, each once; not in order.
    pub fn write<E>(&self, bits: &RegionBits, emit: &mut dyn FnMut(u64, &Block) -> Result<(), E>) -> Result<(), E> {
        assert_eq!(bits.nr_regions(), self.target.nr_regions(), "bits of another geometry");
        space_map::build(INDEX, FIRST_BITMAP, self.nr_blocks, self.nr_used(), emit)?;
        emit(COUNTS, &encode_node(COUNTS, true, COUNT_VALUE, &[]))?;
        for (number, words) in (self.first_array()..).zip(bits.words().chunks(WORDS_PER_ARRAY as usize)) {
            emit(number, &encode_array(number, words.iter().copied()))?;
        }
        self.shape.build(self.first_node(), self.first_array(), emit)
    }

    /// The superblock, to be written when all else is durable.
    pub fn superblock(&self) -> Superblock {
        Superblock {
            uuid: [0; 16],
            target: self.target,
            space_map: SpaceMapRoot {
                nr_blocks: self.nr_blocks,
                nr_allocated: self.nr_used(),
                index: INDEX,
                counts_root: COUNTS,
            },
            bitset_root: self.nr_used() - 1,
        }
    }
}
