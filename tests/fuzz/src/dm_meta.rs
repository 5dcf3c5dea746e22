//! dm-clone's metadata, as `hydrant meta import-dm` reads them.
//!
//! The input describes an image, so that the fuzzer gets past the checksums: the number of blocks, then blocks, each with
//! its kind (which seals it), its number and its bytes up to the zeros at its end.
//! Properties:
//! * an image that is taken was read in a bounded number of steps;
//! * written again by hydrant, it reads as the same target with the same bits.

use super::input::{Input, one_line};
use super::meter::Bound;
use hydrant::error::{Error, ErrorKind};
use hydrant::meta::codec::{BLOCK_SIZE, Block};
use hydrant::meta::dm::Refused;
use hydrant::meta::dm::codec::{Kind, seal};
use hydrant::meta::dm::reader::{Image, read_image};
use hydrant::meta::dm::writer::Layout;

/// One entry of a tree, 16 bytes, brings an array of 4072, and room for as many again as a list grows.
pub const BOUND: Bound = Bound { base: 4 << 20, per_byte: 1024 };

const KINDS: [Option<Kind>; 6] =
    [None, Some(Kind::Superblock), Some(Kind::Index), Some(Kind::Bitmap), Some(Kind::Node), Some(Kind::Array)];
/// Entries of a node, all of which may name one array block.
const ENTRIES_MAX: usize = 252;

pub fn target(data: &[u8]) {
    let blocks = blocks(data);
    let size = (blocks.len() * BLOCK_SIZE) as u64;
    match read(&blocks, size) {
        Ok(image) => is_written_as_the_same(&image, size),
        Err(refused) => one_line("image", &Error::from(refused).to_string()),
    }
}

fn read(blocks: &[Block], size: u64) -> Result<Image, Refused> {
    let mut steps = 0;
    read_image(
        &mut |number| {
            steps += 1;
            assert!(steps <= blocks.len() * ENTRIES_MAX, "{steps} reads of {} blocks", blocks.len());
            let block = usize::try_from(number).ok().and_then(|number| blocks.get(number));
            block.copied().ok_or_else(|| Error::new(ErrorKind::Io, format!("block {number} was read, past the end")))
        },
        size,
    )
}

fn is_written_as_the_same(image: &Image, size: u64) {
    let target = image.superblock.target;
    let hydrated = image.bits.runs().map(|(first, last)| last - first + 1).sum::<u64>();
    assert_eq!(hydrated, image.bits.hydrated_count());
    let layout = match Layout::new(target, size.max(Layout::size_min(target))) {
        Ok(layout) => layout,
        Err(why) => return one_line("layout", &why),
    };
    if layout.nr_blocks() > 1 << 12 {
        return;
    }
    let mut blocks = vec![[0; BLOCK_SIZE]; layout.nr_blocks() as usize];
    let mut emit = |number: u64, block: &Block| -> Result<(), ()> {
        blocks[number as usize] = *block;
        Ok(())
    };
    layout.write(&image.bits, &mut emit).expect("it is only copied");
    blocks[0] = layout.superblock().encode();
    let again = read(&blocks, (blocks.len() * BLOCK_SIZE) as u64).unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!((again.superblock.target, again.nr_leaked), (target, 0));
    assert!(again.bits == image.bits);
}

/// The blocks that an input describes.
fn blocks(data: &[u8]) -> Vec<Block> {
    let mut input = Input(data);
    let mut blocks = vec![[0; BLOCK_SIZE]; usize::from(input.u8() % 64)];
    while !input.is_empty() {
        let kind = KINDS[usize::from(input.u8()) % KINDS.len()];
        let number = usize::from(input.u8());
        let len = usize::from(input.u16()).min(BLOCK_SIZE);
        let bytes = input.bytes(len);
        let count = blocks.len().max(1);
        if let Some(block) = blocks.get_mut(number % count) {
            *block = [0; BLOCK_SIZE];
            block[..bytes.len()].copy_from_slice(bytes);
            if let Some(kind) = kind {
                seal(block, kind, (number % count) as u64);
            }
        }
    }
    blocks
}

/// The input that describes an image, for the corpus.
pub fn describe(image: &[u8]) -> Vec<u8> {
    let (blocks, _) = image.as_chunks::<BLOCK_SIZE>();
    let mut out = vec![blocks.len().min(63) as u8];
    for (number, block) in blocks.iter().take(63).enumerate() {
        let end = block.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if end == 0 {
            continue;
        }
        let is_of = |kind: &Option<Kind>| {
            kind.is_none_or(|kind| hydrant::meta::dm::codec::verify(block, kind, number as u64).is_ok())
        };
        let kind = KINDS.iter().rposition(is_of).unwrap_or(0);
        out.extend([kind as u8, number as u8]);
        out.extend((end as u16).to_le_bytes());
        out.extend(&block[..end]);
    }
    out
}
