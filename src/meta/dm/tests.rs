//! Images in memory: what the writer makes the reader reads; what the kernel made too; what is damaged is refused.

use super::btree::Walk;
use super::codec::*;
use super::reader::{Image, RegionBits, read_image};
use super::space_map::Used;
use super::writer::Layout;
use super::*;
use crate::error::Result as CrateResult;
use crate::meta::codec::{BLOCK_SIZE, Block};
use proptest::prelude::*;
use std::process::Command;

mod damage;
mod kernel;

pub(super) fn target(sectors: u64, region_sectors: u64) -> Target {
    Target::new(sectors, RegionSize::new(region_sectors * 512).unwrap()).unwrap()
}

fn block_of(image: &mut [u8], number: u64) -> &mut Block {
    (&mut image[number as usize * BLOCK_SIZE..][..BLOCK_SIZE]).try_into().unwrap()
}

/// A whole image on a device of `size` bytes.
pub(super) fn image_of(target: Target, size: u64, bits: &RegionBits) -> Vec<u8> {
    let layout = Layout::new(target, size).unwrap();
    let mut image = vec![0; size as usize];
    let mut written = std::collections::BTreeSet::from([0]);
    layout
        .write(bits, &mut |number, block| {
            assert!(written.insert(number), "block {number} is written twice");
            block_of(&mut image, number).copy_from_slice(block);
            Ok::<(), ()>(())
        })
        .unwrap();
    assert!(written.iter().copied().eq(0..layout.nr_used()), "the first blocks, each of them");
    block_of(&mut image, 0).copy_from_slice(&layout.superblock().encode());
    image
}

pub(super) fn read(image: &[u8]) -> Result<Image, Refused> {
    let mut reads = 0;
    let mut read_block = |number: u64| -> CrateResult<Block> {
        reads += 1;
        assert!(reads < 1_000_000, "a hostile image costs too much");
        let at = number as usize * BLOCK_SIZE;
        Ok(image.get(at..at + BLOCK_SIZE).expect("no block outside the device is read").try_into().unwrap())
    };
    read_image(&mut read_block, image.len() as u64)
}

/// What is said of a damaged image.
pub(super) fn refusal(image: &[u8]) -> String {
    match read(image) {
        Ok(_) => panic!("it is not refused"),
        Err(refused) => Error::from(refused).to_string(),
    }
}

/// Runs of regions from pairs of (gap, length).
pub(super) fn bits_of(target: &Target, runs: &[(u64, u64)]) -> RegionBits {
    let mut bits = RegionBits::new(target);
    let mut at = 0;
    for (gap, len) in runs {
        let first = at + gap;
        if first >= bits.nr_regions() {
            break;
        }
        let last = (first + len).min(bits.nr_regions() - 1);
        bits.set(first, last);
        at = last + 2;
    }
    bits
}

fn round_trip(target: Target, size: u64, bits: &RegionBits) {
    let image = read(&image_of(target, size, bits)).unwrap_or_else(|refused| panic!("{}", Error::from(refused)));
    assert_eq!(image.superblock.target, target);
    assert!(image.bits == *bits, "the bits differ");
    assert_eq!(image.nr_leaked, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        regions in prop_oneof![1u64..200, 1u64..200_000, 32_570u64..32_580], shift in 3u32..22, short in 0u64..8,
        runs in prop::collection::vec((0u64..3000, 0u64..3000), 0..60), more in 0u64..5000,
    ) {
        let region = 1 << shift;
        let target = target(regions * region - short, region);
        let size = Layout::size_min(target) + more;
        round_trip(target, size, &bits_of(&target, &runs));
    }

    #[test]
    fn runs_and_bits_say_the_same(runs in prop::collection::vec((0u64..200, 0u64..200), 0..60), regions in 1u64..9000) {
        let target = target(regions * 8, 8);
        let bits = bits_of(&target, &runs);
        let found: Vec<_> = bits.runs().collect();
        prop_assert!(found.windows(2).all(|w| w[0].1 + 1 < w[1].0));
        let listed: u64 = found.iter().map(|(first, last)| last - first + 1).sum();
        prop_assert_eq!(listed, bits.hydrated_count());
        let is_in_a_run = |region: u64| found.iter().any(|(first, last)| (*first..=*last).contains(&region));
        prop_assert!((0..regions).all(|region| bits.is_hydrated(region) == is_in_a_run(region)));
    }

    /// Whatever bit of a block in use is flipped, the block is named.
    #[test]
    fn a_flipped_bit_is_found(regions in 1u64..300_000, place in any::<prop::sample::Index>(), bit in 0usize..8) {
        let target = target(regions * 8, 8);
        let mut image = image_of(target, Layout::size_min(target), &bits_of(&target, &[(5, 100), (1000, 70_000)]));
        let at = place.index(Layout::new(target, image.len() as u64).unwrap().nr_used() as usize * BLOCK_SIZE);
        image[at] ^= 1 << bit;
        let said = refusal(&image);
        prop_assert!(said.contains(&format!("block {}: ", at / BLOCK_SIZE)), "{} at {}", said, at);
    }

    /// Any bytes at all get a verdict.
    #[test]
    fn rubbish_is_refused(seed in prop::collection::vec(any::<u8>(), 64), blocks in 0usize..6) {
        let image: Vec<u8> = seed.iter().copied().cycle().take(blocks * BLOCK_SIZE + seed.len()).collect();
        prop_assert!(read(&image).is_err());
    }
}

#[test]
fn sizes_around_every_step() {
    // Words, array blocks, leaves of the tree (252 array blocks) and its levels.
    let array = WORDS_PER_ARRAY * 64;
    for regions in [1, 63, 64, 65, array - 1, array, array + 1, 252 * array, 252 * array + 1, 253 * array] {
        let target = target(regions * 8, 8);
        let mut bits = RegionBits::new(&target);
        bits.set(0, 0);
        bits.set(regions / 2, regions - 1);
        round_trip(target, Layout::size_min(target), &bits);
        round_trip(target, Layout::size_default(target), &bits);
    }
}

#[test]
fn several_bitmaps() {
    // More than 16320 blocks of metadata, in use too.
    let small = target(1 << 20, 8);
    round_trip(small, (2 * ENTRIES_PER_BITMAP + 5) * BLOCK_SIZE as u64, &bits_of(&small, &[(0, 40_000)]));
    let large = target((1 << 29) * 8, 8);
    let layout = Layout::new(large, Layout::size_default(large)).unwrap();
    assert!(layout.nr_used() > ENTRIES_PER_BITMAP, "{}", layout.nr_used());
    let mut bits = RegionBits::new(&large);
    bits.set(1 << 28, (1 << 29) - 1);
    round_trip(large, Layout::size_default(large), &bits);
}

/// Half as much again as the least, whole MiB, 4 MiB at least; the space map knows all of it.
#[test]
fn default_sizes() {
    for (regions, default) in [(1, 4 << 20), (1 << 26, 25 << 20)] {
        let target = target(regions * 8, 8);
        let least = Layout::size_min(target);
        assert_eq!(Layout::size_default(target), default, "{regions} regions, {least} at least");
        assert!(default == 4 << 20 || (default - (1 << 20)..=default).contains(&(least * 3 / 2)), "{least}");
        assert_eq!(Layout::new(target, default).unwrap().nr_blocks(), default / BLOCK_SIZE as u64);
    }
}

/// The index says of each bitmap how many entries are free, and before which none is: those in use are the first.
#[test]
fn the_index_has_the_counts_of_its_bitmaps() {
    let target = target(800, 8);
    let mut image = image_of(target, 1 << 20, &bits_of(&target, &[(3, 4)]));
    let used = Layout::new(target, 1 << 20).unwrap().nr_used();
    let index = *block_of(&mut image, 1);
    assert_eq!(u64::from(u32_at(&index, 16 + 8)), ENTRIES_PER_BITMAP - used);
    assert_eq!(u64::from(u32_at(&index, 16 + 12)), used);
    assert!(index[32..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_largest_target() {
    let largest = target((1 << 31) * 8, 8);
    let (least, default) = (Layout::size_min(largest), Layout::size_default(largest));
    assert!(least < default && default < 1 << 30, "{least} {default}");
    // Three levels: 65923 array blocks, 262 leaves, 2 nodes, 1 root.
    assert_eq!(Layout::new(largest, least).unwrap().nr_used(), 3 + 9 + 65_923 + 262 + 2 + 1);
    assert!(Target::new((1 << 31) * 8 + 1, RegionSize::new(4096).unwrap()).unwrap_err().contains("at most 2147483648"));
    assert!(Target::of_bytes(513, RegionSize::default()).unwrap_err().contains("multiple of 512"));
    assert!(Target::new(0, RegionSize::default()).is_err());
}

#[test]
fn what_is_too_small_is_refused() {
    let target = target(131_072, 8);
    let least = Layout::size_min(target);
    // What dm-clone was seen to work on has two blocks more.
    assert_eq!(least, 10 * BLOCK_SIZE as u64);
    let error = Layout::new(target, least - 1).err().unwrap();
    assert_eq!(error, "40959 bytes are too few, dm-clone needs 40960 for 16384 regions");
    assert_eq!(Layout::size_default(target), 4 << 20);
}
