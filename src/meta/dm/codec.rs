//! dm-clone's blocks: bytes <-> superblock, headers and checksums.
//!
//! Blocks of 4096 bytes, numbered from the start of the device; all integers little-endian. The first u32 of a block
//! is its checksum: crc32c with the initial value ~0 over bytes 4 to 4095, not inverted at the end, xor the salt of the
//! block's kind, so that no block passes for one of another kind; the block knows its own number too.
//!
//! ```text
//! superblock (block 0)        0 checksum u32   4 flags u32, 0        8 block u64, 0   16 uuid 16 bytes, unused
//!                            32 magic u64     40 version u32, 1     44 space map root 128 bytes
//!                           172 region size u64, sectors           180 target size u64, sectors
//!                           188 root of the bitset u64             196 zero to the end
//! space map root              0 blocks u64     8 allocated u64      16 index block u64
//!                            24 root of the reference count tree u64, zero to the end
//! space map index             0 checksum u32   4 zero u32            8 block u64
//!                            16 255 x { bitmap block u64, free entries u32, none is free before u32 }
//! space map bitmap            0 checksum u32   4 zero u32            8 block u64
//!                            16 16320 entries of 2 bits: entry i has its high bit at bit 2i, its low bit at 2i+1;
//!                               0 to 2 references, 3: see the reference count tree
//! tree node                   0 checksum u32   4 flags u32, 1 internal or 2 leaf   8 block u64
//!                            16 entries u32   20 most entries u32   24 size of a value u32   28 zero u32
//!                            32 keys u64, then from 32 + 8 x most entries on the values
//! array block                 0 checksum u32   4 most entries u32, 509   8 entries u32   12 size of a value u32, 8
//!                            16 block u64     24 words u64
//! ```
//!
//! A tree node holds at most `3 * floor(4064 / (8 + value size) / 3)` entries. The bitset is a tree {array index ->
//! array block}; region r is bit r % 64 of word r / 64, and 509 words share an array block. Bits without a region are 0.
//!
//! From drivers/md/dm-clone-metadata.c and drivers/md/persistent-data/, checked against images that Linux 6.18 made.

use super::{Refused, Target};
use crate::error::ErrorKind;
use crate::meta::codec::{BLOCK_SIZE, Block, SUPERBLOCK_MAGIC as HYDRANT_MAGIC};
use crate::signatures::identify;
use crate::units::RegionSize;

/// `SUPERBLOCK_MAGIC` of dm-clone.
pub const MAGIC: u64 = 0x8af2_7f64;
/// The only version there is.
pub const VERSION: u32 = 1;

/// Entries of the space map in one bitmap block.
pub const ENTRIES_PER_BITMAP: u64 = 16_320;
/// Bitmap blocks of a space map at most.
pub const BITMAPS_MAX: u64 = 255;
/// Blocks of a metadata device at most, 15.9 GiB: `DM_SM_METADATA_MAX_BLOCKS`.
pub const BLOCKS_MAX: u64 = BITMAPS_MAX * ENTRIES_PER_BITMAP;
/// Words of 64 regions in one array block.
pub const WORDS_PER_ARRAY: u64 = 509;
/// Bytes of a value in the tree of the bitset, and in every internal node: a block number.
pub const BLOCK_VALUE: usize = 8;
/// Bytes of a value in the tree of reference counts.
pub const COUNT_VALUE: usize = 4;

const REGION_SECTORS_AT: usize = 172;
const TARGET_SECTORS_AT: usize = 180;
const BITSET_ROOT_AT: usize = 188;
const SPACE_MAP_AT: usize = 44;
const NODE_HEADER: usize = 32;
const ARRAY_HEADER: usize = 24;
/// Where the entries of index and bitmap blocks begin.
pub(crate) const ENTRIES_AT: usize = 16;

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// What a block is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Superblock,
    Index,
    Bitmap,
    Node,
    Array,
}

impl Kind {
    /// What its checksum is xored with.
    pub const fn salt(self) -> u32 {
        match self {
            Kind::Superblock => 257_649_492,
            Kind::Index => 160_478,
            Kind::Bitmap => 240_779,
            Kind::Node => 121_107,
            Kind::Array => 595_846_735,
        }
    }
    const fn number_at(self) -> usize {
        match self {
            Kind::Array => 16,
            _ => 8,
        }
    }
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Superblock => "superblock",
            Kind::Index => "space map index",
            Kind::Bitmap => "space map bitmap",
            Kind::Node => "tree node",
            Kind::Array => "array block",
        }
    }
}

fn checksum(block: &Block, kind: Kind) -> u32 {
    // The crate inverts the result, the kernel does not.
    !crc32c::crc32c(&block[4..]) ^ kind.salt()
}

/// Gives a block its number and its checksum, when all else is in it.
pub fn seal(block: &mut Block, kind: Kind, number: u64) {
    put_u64(block, kind.number_at(), number);
    let sum = checksum(block, kind);
    put_u32(block, 0, sum);
}

/// Whether the bytes are a block of this kind with this number.
pub fn verify(block: &Block, kind: Kind, number: u64) -> Result<(), Refused> {
    let (stored, computed) = (u32_at(block, 0), checksum(block, kind));
    let name = kind.name();
    if stored != computed {
        let article = if matches!(kind, Kind::Array) { "an" } else { "a" };
        let what = match crate::dma_buf::is_zero(block) {
            true => format!("all zero, it should be {article} {name}"),
            false => format!("checksum is {stored:#010x}, its bytes give {computed:#010x} for {article} {name}"),
        };
        return Err(Refused::damaged(number, what));
    }
    let says = u64_at(block, kind.number_at());
    if says != number {
        return Err(Refused::damaged(number, format!("this {name} says that it is block {says}")));
    }
    Ok(())
}

/// The root of the space map, as it is in the superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpaceMapRoot {
    pub nr_blocks: u64,
    pub nr_allocated: u64,
    pub index: u64,
    pub counts_root: u64,
}

/// A superblock whose bytes were verified, or that was made here. Its block numbers are not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// dm-clone writes zeros and never looks.
    pub uuid: [u8; 16],
    pub target: Target,
    pub space_map: SpaceMapRoot,
    pub bitset_root: u64,
}

impl Superblock {
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_SIZE];
        block[16..32].copy_from_slice(&self.uuid);
        put_u64(&mut block, 32, MAGIC);
        put_u32(&mut block, 40, VERSION);
        let root =
            [self.space_map.nr_blocks, self.space_map.nr_allocated, self.space_map.index, self.space_map.counts_root];
        for (i, value) in root.into_iter().enumerate() {
            put_u64(&mut block, SPACE_MAP_AT + 8 * i, value);
        }
        put_u64(&mut block, REGION_SECTORS_AT, self.target.region_size().sectors());
        put_u64(&mut block, TARGET_SECTORS_AT, self.target.sectors());
        put_u64(&mut block, BITSET_ROOT_AT, self.bitset_root);
        seal(&mut block, Kind::Superblock, 0);
        block
    }

    /// Judges block 0: magic, checksum, number, version, flags, then every field.
    pub fn decode(block: &Block) -> Result<Self, Refused> {
        let foreign = |what: String| Err(Refused::other(ErrorKind::ForeignData, 0, what));
        if crate::dma_buf::is_zero(block) {
            return foreign("all zero where dm-clone metadata begin: never formatted".into());
        }
        if block[..8] == HYDRANT_MAGIC {
            return foreign("holds hydrant metadata, no dm-clone metadata: use --format hydrant".into());
        }
        let magic = u64_at(block, 32);
        if magic != MAGIC {
            let what = identify(block).unwrap_or("unknown data");
            return foreign(format!("holds {what}, no dm-clone metadata (magic is {magic:#x}, not {MAGIC:#x})"));
        }
        verify(block, Kind::Superblock, 0)?;
        let unsupported = |what: String| Err(Refused::other(ErrorKind::Unsupported, 0, what));
        let (version, flags) = (u32_at(block, 40), u32_at(block, 4));
        if version != VERSION {
            return unsupported(format!("dm-clone metadata of version {version}, this hydrant knows {VERSION}"));
        }
        if flags != 0 {
            return unsupported(format!("flags {flags:#x} are set, which this hydrant does not know"));
        }
        let damaged = |what: String| Refused::damaged(0, what);
        let sectors = u64_at(block, REGION_SECTORS_AT);
        let region_size = sectors.checked_mul(crate::units::SECTOR_SIZE).map(RegionSize::new);
        let region_size = region_size
            .unwrap_or_else(|| Err("too large".into()))
            .map_err(|what| damaged(format!("a region size of {sectors} sectors: {what}")))?;
        let target = Target::new(u64_at(block, TARGET_SECTORS_AT), region_size).map_err(damaged)?;
        let root = |i: usize| u64_at(block, SPACE_MAP_AT + 8 * i);
        Ok(Self {
            uuid: block[16..32].try_into().expect("16 bytes"),
            target,
            space_map: SpaceMapRoot { nr_blocks: root(0), nr_allocated: root(1), index: root(2), counts_root: root(3) },
            bitset_root: u64_at(block, BITSET_ROOT_AT),
        })
    }
}

/// The most entries of a node with values of this size: a multiple of 3, as the kernel splits nodes in thirds.
pub const fn entries_max(value_size: usize) -> usize {
    3 * ((BLOCK_SIZE - NODE_HEADER) / (8 + value_size) / 3)
}

/// The header of a verified tree node.
#[derive(Clone, Copy, Debug)]
pub struct NodeHeader {
    pub is_leaf: bool,
    pub entries: usize,
    value_size: usize,
}

impl NodeHeader {
    /// `leaf_value` is the size of a value in the leaves of the tree, in bytes.
    pub fn decode(block: &Block, number: u64, leaf_value: usize) -> Result<Self, Refused> {
        let damaged = |what: String| Err(Refused::damaged(number, what));
        verify(block, Kind::Node, number)?;
        let is_leaf = match u32_at(block, 4) {
            1 => false,
            2 => true,
            flags => return damaged(format!("node flags {flags:#x} are neither 1 (internal) nor 2 (leaf)")),
        };
        let value_size = if is_leaf { leaf_value } else { BLOCK_VALUE };
        let (entries, max, size) = (u32_at(block, 16), u32_at(block, 20), u32_at(block, 24));
        if size as usize != value_size {
            return damaged(format!("a node with values of {size} bytes, they should have {value_size}"));
        }
        if max as usize != entries_max(value_size) {
            return damaged(format!("a node of up to {max} entries, it should be {}", entries_max(value_size)));
        }
        if entries > max {
            return damaged(format!("{entries} entries in a node of up to {max}"));
        }
        Ok(Self { is_leaf, entries: entries as usize, value_size })
    }

    pub fn key(&self, block: &Block, index: usize) -> u64 {
        u64_at(block, NODE_HEADER + 8 * index)
    }
    /// The bytes of a value.
    pub fn value<'a>(&self, block: &'a Block, index: usize) -> &'a [u8] {
        let at = NODE_HEADER + 8 * entries_max(self.value_size) + self.value_size * index;
        &block[at..at + self.value_size]
    }
}

/// A node with these keys and block numbers, or an empty leaf of another tree.
pub fn encode_node(number: u64, is_leaf: bool, value_size: usize, entries: &[(u64, u64)]) -> Block {
    let max = entries_max(value_size);
    assert!(entries.len() <= max && (value_size == BLOCK_VALUE || entries.is_empty()), "a node's entries");
    let mut block = [0; BLOCK_SIZE];
    put_u32(&mut block, 4, if is_leaf { 2 } else { 1 });
    put_u32(&mut block, 16, entries.len() as u32);
    put_u32(&mut block, 20, max as u32);
    put_u32(&mut block, 24, value_size as u32);
    for (i, (key, value)) in entries.iter().enumerate() {
        put_u64(&mut block, NODE_HEADER + 8 * i, *key);
        put_u64(&mut block, NODE_HEADER + 8 * max + 8 * i, *value);
    }
    seal(&mut block, Kind::Node, number);
    block
}

/// An array block with these words, at most [`WORDS_PER_ARRAY`].
pub fn encode_array(number: u64, words: impl ExactSizeIterator<Item = u64>) -> Block {
    assert!(words.len() as u64 <= WORDS_PER_ARRAY, "the words of an array block");
    let mut block = [0; BLOCK_SIZE];
    put_u32(&mut block, 4, WORDS_PER_ARRAY as u32);
    put_u32(&mut block, 8, words.len() as u32);
    put_u32(&mut block, 12, 8);
    for (i, word) in words.enumerate() {
        put_u64(&mut block, ARRAY_HEADER + 8 * i, word);
    }
    seal(&mut block, Kind::Array, number);
    block
}

/// The `expected` words of an array block.
pub fn decode_array(block: &Block, number: u64, expected: u64) -> Result<impl Iterator<Item = u64> + '_, Refused> {
    verify(block, Kind::Array, number)?;
    let damaged = |what: String| Err(Refused::damaged(number, what));
    let (max, entries, size) = (u32_at(block, 4), u32_at(block, 8), u32_at(block, 12));
    if u64::from(max) != WORDS_PER_ARRAY || size != 8 {
        return damaged(format!(
            "an array block of up to {max} values of {size} bytes, it should be {WORDS_PER_ARRAY} of 8"
        ));
    }
    if u64::from(entries) != expected {
        return damaged(format!("an array block of {entries} words, it should have {expected}"));
    }
    Ok((0..expected as usize).map(move |i| u64_at(block, ARRAY_HEADER + 8 * i)))
}
