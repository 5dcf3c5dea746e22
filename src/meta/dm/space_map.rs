//! The space map: how many references every block of the device has.
//!
//! Read whole: the index, every bitmap (at most 255 blocks, 1 MiB), and the tree with the counts of 3 and more. The
//! blocks that were found in use are compared with it at the end: a block that is used more often than it is counted
//! would be given to something else by the next commit.

use super::Refused;
use super::btree::{Walk, read};
use super::codec::{
    BLOCKS_MAX, COUNT_VALUE, ENTRIES_AT, ENTRIES_PER_BITMAP, Kind, SpaceMapRoot, put_u32, put_u64, seal, u32_at,
    u64_at, verify,
};
use crate::meta::check::ReadBlock;
use crate::meta::codec::{BLOCK_SIZE, Block};
use std::collections::BTreeMap;

/// The 2-bit entry that sends to the tree of counts.
const SEE_TREE: u32 = 3;

/// Which blocks an image uses, and how often. Grows with what was read, not with what a superblock says.
#[derive(Debug)]
pub struct Used {
    nr_blocks: u64,
    times: BTreeMap<u64, u32>,
}

impl Used {
    /// Of a device of `nr_blocks` blocks, with the superblock in use.
    pub fn new(nr_blocks: u64) -> Self {
        Self { nr_blocks, times: BTreeMap::from([(0, 1)]) }
    }

    /// Block `number`, which block `parent` names, is used once more. It must be inside the device.
    pub fn add(&mut self, number: u64, parent: u64) -> Result<u32, Refused> {
        if number == 0 || number >= self.nr_blocks {
            let what = format!("it refers to block {number}, outside 1 to {}", self.nr_blocks - 1);
            return Err(Refused::damaged(parent, what));
        }
        let times = self.times.entry(number).or_insert(0);
        *times = times.saturating_add(1);
        Ok(*times)
    }

    /// As [`Self::add`], for a block that can only have one use.
    pub fn node(&mut self, number: u64, parent: u64) -> Result<(), Refused> {
        match self.add(number, parent)? {
            1 => Ok(()),
            _ => Err(Refused::damaged(number, format!("used twice, the second time by block {parent}"))),
        }
    }

    /// How many blocks are in use.
    pub fn count(&self) -> u64 {
        self.times.len() as u64
    }
}

/// The counts of a whole space map.
pub struct SpaceMap {
    nr_allocated: u64,
    bitmaps: Vec<Block>,
    counts: BTreeMap<u64, u32>,
}

fn entry(bitmap: &Block, index: u64) -> u32 {
    let byte = bitmap[ENTRIES_AT + (index / 4) as usize] >> (index % 4 * 2);
    u32::from(byte & 1) << 1 | u32::from(byte >> 1 & 1)
}

impl SpaceMap {
    /// Reads and judges all of it; `device_blocks` is what the device has.
    pub fn read(
        root: &SpaceMapRoot,
        device_blocks: u64,
        read_block: &mut ReadBlock<'_>,
        used: &mut Used,
    ) -> Result<Self, Refused> {
        let nr_blocks = root.nr_blocks;
        if !(1..=BLOCKS_MAX).contains(&nr_blocks) {
            return Err(Refused::damaged(0, format!("a space map of {nr_blocks} blocks, outside 1 to {BLOCKS_MAX}")));
        }
        if nr_blocks > device_blocks {
            let what = format!("the metadata have {nr_blocks} blocks, the image ends after {device_blocks}");
            return Err(Refused::damaged(0, what));
        }
        used.node(root.index, 0)?;
        let index = read(read_block, root.index)?;
        verify(&index, Kind::Index, root.index)?;
        let mut map = Self { nr_allocated: 0, bitmaps: Vec::new(), counts: BTreeMap::new() };
        let mut in_tree = 0;
        for i in 0..nr_blocks.div_ceil(ENTRIES_PER_BITMAP) {
            let at = ENTRIES_AT + 16 * i as usize;
            let (number, says_free) = (u64_at(&index, at), u64::from(u32_at(&index, at + 8)));
            used.node(number, root.index)?;
            let bitmap = read(read_block, number)?;
            verify(&bitmap, Kind::Bitmap, number)?;
            let inside = (nr_blocks - i * ENTRIES_PER_BITMAP).min(ENTRIES_PER_BITMAP);
            let mut free = 0;
            for block in 0..ENTRIES_PER_BITMAP {
                match entry(&bitmap, block) {
                    0 => free += 1,
                    _ if block >= inside => {
                        let block = i * ENTRIES_PER_BITMAP + block;
                        let what = format!("it counts references of block {block}, the device has {nr_blocks}");
                        return Err(Refused::damaged(number, what));
                    }
                    count => in_tree += u64::from(count == SEE_TREE),
                }
            }
            // Entries past the end of the device count as free.
            if free != says_free {
                let what = format!("it says that {says_free} entries of bitmap block {number} are free, {free} are");
                return Err(Refused::damaged(root.index, what));
            }
            if u64::from(u32_at(&index, at + 12)) > ENTRIES_PER_BITMAP {
                return Err(Refused::damaged(root.index, format!("a hint past the end of bitmap block {number}")));
            }
            map.nr_allocated += ENTRIES_PER_BITMAP - free;
            map.bitmaps.push(bitmap);
        }
        if map.nr_allocated != root.nr_allocated {
            let (says, are) = (root.nr_allocated, map.nr_allocated);
            return Err(Refused::damaged(0, format!("it says that {says} blocks are allocated, {are} are")));
        }
        let mut walk = Walk { read_block, used, leaf_value: COUNT_VALUE };
        walk.run(root.counts_root, 0, &mut |_, _, leaf, key, value| {
            let count = u32_at(value, 0);
            if key >= nr_blocks || map.small_count(key) != SEE_TREE || count < SEE_TREE {
                let what = format!("it counts {count} references of block {key}, the bitmap says otherwise");
                return Err(Refused::damaged(leaf, what));
            }
            map.counts.insert(key, count);
            Ok(())
        })?;
        if map.counts.len() as u64 != in_tree {
            let what =
                format!("{in_tree} blocks have their count in this tree by the bitmaps, it has {}", map.counts.len());
            return Err(Refused::damaged(root.counts_root, what));
        }
        Ok(map)
    }

    fn small_count(&self, block: u64) -> u32 {
        let bitmap = &self.bitmaps[(block / ENTRIES_PER_BITMAP) as usize];
        entry(bitmap, block % ENTRIES_PER_BITMAP)
    }

    /// References of a block of the device.
    pub fn count(&self, block: u64) -> u32 {
        match self.small_count(block) {
            SEE_TREE => self.counts.get(&block).copied().unwrap_or(SEE_TREE),
            count => count,
        }
    }

    pub fn nr_allocated(&self) -> u64 {
        self.nr_allocated
    }

    /// Whether every block in use is counted as often as it is used, or more.
    pub fn check(&self, used: &Used) -> Result<(), Refused> {
        for (block, times) in &used.times {
            let count = self.count(*block);
            if count < *times {
                let what = match count {
                    0 => "in use, but free by the space map".into(),
                    _ => format!("used {times} times, but its reference count is {count}"),
                };
                return Err(Refused::damaged(*block, what));
            }
        }
        Ok(())
    }
}

/// Builds the index (block `number`) and the bitmaps (blocks from `first_bitmap` on) of a device whose first
/// `nr_used` blocks have one reference each.
pub fn build<E>(
    number: u64,
    first_bitmap: u64,
    nr_blocks: u64,
    nr_used: u64,
    emit: &mut dyn FnMut(u64, &Block) -> Result<(), E>,
) -> Result<(), E> {
    let mut index = [0; BLOCK_SIZE];
    for i in 0..nr_blocks.div_ceil(ENTRIES_PER_BITMAP) {
        let used = nr_used.saturating_sub(i * ENTRIES_PER_BITMAP).min(ENTRIES_PER_BITMAP);
        let mut bitmap = [0; BLOCK_SIZE];
        for block in 0..used {
            bitmap[ENTRIES_AT + (block / 4) as usize] |= 2 << (block % 4 * 2);
        }
        seal(&mut bitmap, Kind::Bitmap, first_bitmap + i);
        emit(first_bitmap + i, &bitmap)?;
        let at = ENTRIES_AT + 16 * i as usize;
        put_u64(&mut index, at, first_bitmap + i);
        put_u32(&mut index, at + 8, (ENTRIES_PER_BITMAP - used) as u32);
        put_u32(&mut index, at + 12, used as u32);
    }
    seal(&mut index, Kind::Index, number);
    emit(number, &index)
}
