use super::super::codec::tests::{random_bits, superblocks};
use super::super::codec::{Classified, SourceFingerprint, words_per_zone};
use super::*;
use crate::error::{Error, ErrorKind};
use crate::units::{Geometry, RegionSize};
use proptest::prelude::*;

/// 1 GiB less 100 bytes in regions of 64 KiB, 1000 in a zone: 17 zones, the last with 384 regions.
pub(crate) fn sample() -> Superblock {
    Superblock {
        uuid: *b"0123456789abcdef",
        geometry: Geometry::new((1 << 30) - 100, RegionSize::default(), 1000).unwrap(),
        source: SourceFingerprint { size: (1 << 30) - 100, samples: 64, digest: [0x5a; 16] },
        destination_id: [0xd1; 16],
        state: CloneState::Active,
        generation: Generation(7),
        created_unix_s: 1_700_000_000,
    }
}

pub(crate) fn sample_of_generation(generation: u64) -> Superblock {
    Superblock { generation: Generation(generation), ..sample() }
}

/// The whole image of a clone, with the bits that `bits` gives for each zone.
pub(crate) fn image_with(superblock: &Superblock, bits: impl Fn(ZoneIndex) -> Box<[u64]>) -> Vec<u8> {
    let mut image = [superblock.encode(), superblock.encode()].concat();
    let codec = ZoneCodec::new(superblock);
    for zone in (0..superblock.geometry.nr_zones()).map(ZoneIndex) {
        let mut block = [0; BLOCK_SIZE];
        codec.encode(zone, Generation(9), &bits(zone), &mut block);
        image.extend_from_slice(&block);
    }
    image
}

/// The image with exactly the regions set for which `hydrated` says so.
pub(crate) fn image(superblock: &Superblock, hydrated: impl Fn(u64) -> bool) -> Vec<u8> {
    image_with(superblock, |zone| {
        let mut bits = vec![0; words_per_zone(&superblock.geometry)];
        for (i, region) in superblock.geometry.zone_regions(zone).indices().enumerate() {
            bits[i / 64] |= u64::from(hydrated(region)) << (i % 64);
        }
        bits.into()
    })
}

/// Of a block whose end is missing that reads as zeros.
pub(crate) fn reader(image: &[u8]) -> impl FnMut(u64) -> Result<Block> + '_ {
    |number| {
        let there = &image[number as usize * BLOCK_SIZE..];
        let there = &there[..there.len().min(BLOCK_SIZE)];
        assert!(!there.is_empty(), "block {number} is not there");
        let mut block = [0; BLOCK_SIZE];
        block[..there.len()].copy_from_slice(there);
        Ok(block)
    }
}

fn report(image: &[u8]) -> Report {
    check(&mut reader(image), image.len() as u64).unwrap()
}

fn texts(report: &Report) -> Vec<String> {
    report.findings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_clean_image() {
    let report = report(&image(&sample(), |region| region % 4 == 0));
    assert!(report.is_clean() && report.notes.is_empty());
    let summary = report.summary.unwrap();
    assert_eq!((summary.superblock, summary.hydrated_count, summary.generation), (sample(), 4096, Generation(9)));
}

#[test]
fn findings_say_where_and_what_it_costs() {
    let mut broken = image(&sample(), |region| region < 300);
    broken[3 * 4096 + 512 + 40] ^= 0x10;
    broken[18 * 4096..18 * 4096 + 512].fill(0);
    broken[18 * 4096 + 7 * 512 + 100] ^= 1;
    let found = report(&broken);
    assert_eq!(found.nr_findings, 3);
    let texts = texts(&found);
    assert!(texts[0].starts_with("sector 25 (byte offset 12800): checksum is 0x"), "{texts:?}");
    assert!(texts[0].ends_with("; it covers regions 1128 to 1255"), "{texts:?}");
    assert_eq!(
        texts[1],
        "sector 144 (byte offset 73728): all zero, what was written is lost; it covers regions 16000 to 16127"
    );
    assert!(texts[2].starts_with("sector 151") && !texts[2].contains("covers"), "{texts:?}");
    assert_eq!(found.summary.unwrap().hydrated_count, 300);
}

#[test]
fn unreadable_and_missing_blocks_are_findings() {
    let whole = image(&sample(), |_| true);
    let mut read = |block| match block {
        1 | 5 => Err(Error::io(libc::EIO, format!("block {block}"))),
        _ => reader(&whole)(block),
    };
    let found = check(&mut read, whole.len() as u64 - 2 * 4096).unwrap();
    assert_eq!(
        texts(&found),
        [
            "block 1 (byte offset 4096): superblock copy B is unreadable: block 1: Input/output error; the other copy is \
             used",
            "block 5 (byte offset 20480): block 5: Input/output error; it covers regions 3000 to 3999",
            "block 17 (byte offset 69632): the device ends here: it has 68KiB, 76KiB (77824 bytes) are needed; it covers \
             regions 15000 to 16383",
        ]
    );
}

#[test]
fn what_the_superblocks_say() {
    let mut image = image(&sample(), |_| false);
    image[4096..8192].fill(0);
    let found = report(&image);
    assert_eq!(texts(&found), ["block 1 (byte offset 4096): superblock copy B is all zero; the other copy is used"]);
    // As a format leaves it that a crash has cut off: the bitmap is of the superblock's generation.
    let mut cut = self::image(&sample_of_generation(9), |_| false);
    cut[4096..8192].fill(0);
    let found = report(&cut);
    assert!(found.is_clean());
    assert_eq!(found.notes, ["superblock copy B is all zero; the other copy is used"]);
    // Copy A is always written first.
    let mut old = self::image(&sample_of_generation(9), |_| false);
    old[..4096].copy_from_slice(&sample().encode());
    assert_eq!(texts(&report(&old)), ["block 0 (byte offset 0): superblock copy A is older (7) than copy B (9)"]);
    old[..4096].copy_from_slice(&sample_of_generation(9).encode());
    old[4096..8192].copy_from_slice(&sample().encode());
    assert!(report(&old).is_clean() && report(&old).notes.len() == 1);

    image[2000] = 1;
    let found = report(&image);
    assert!(found.summary.is_none() && found.nr_findings == 1, "{found:?}");

    let error = |image: &[u8]| check(&mut reader(image), image.len() as u64).unwrap_err();
    image[..8192].fill(0);
    assert_eq!(error(&image).to_string(), "all zero where metadata begin: never formatted");
    assert_eq!(error(&[]).kind(), ErrorKind::ForeignData);
    image[1080..1082].copy_from_slice(b"\x53\xef");
    assert_eq!(error(&image).to_string(), "holds an ext2 file system, no metadata of hydrant");
}

#[test]
fn complete_with_a_missing_bit() {
    let complete = Superblock { state: CloneState::Complete, ..sample() };
    assert!(report(&image(&complete, |_| true)).is_clean());
    let found = report(&image(&complete, |region| region != 777));
    assert_eq!(texts(&found), ["block 0 (byte offset 0): marked complete, but 16383 of 16384 regions are hydrated"]);
}

/// Where a finding is, as blocks, sectors and bytes; what is clean, and what contradicts itself.
#[test]
fn places_and_verdicts() {
    let clean = image(&sample(), |region| region % 3 == 0);
    assert!(report(&clean).is_clean());
    let mut damaged = clean.clone();
    damaged[(2 + 5) * BLOCK_SIZE + 3 * SECTOR_BYTES] ^= 1;
    let found = report(&damaged);
    assert!(!found.is_clean());
    let finding = &found.findings[0];
    assert_eq!((finding.block, finding.sector, finding.offset()), (7, Some(59), 59 * 512));
    assert_eq!(Finding::block(7, None, String::new()).offset(), 7 * 4096);

    let summary = |superblock: &Superblock, hydrated_count| {
        let (superblock, generation) = (superblock.clone(), superblock.generation);
        Summary { superblock, hydrated_count, generation }
    };
    let (active, complete) = (sample(), Superblock { state: CloneState::Complete, ..sample() });
    let all = active.geometry.nr_regions();
    assert!(!summary(&active, all).contradicts_itself());
    assert!(!summary(&active, 0).contradicts_itself());
    assert!(!summary(&complete, all).contradicts_itself());
    assert!(summary(&complete, all - 1).contradicts_itself());
}

/// A device that ends within or before the second copy has none; one byte of a block is a block.
#[test]
fn copies_of_short_devices() {
    let image = image(&sample(), |_| false);
    let is_there = |size: usize| {
        let copies = read_copies(&mut reader(&image[..size]), size as u64);
        copies.map(|copy| matches!(copy, Ok(Classified::Valid(_))))
    };
    assert_eq!(is_there(BLOCK_SIZE), [true, false]);
    assert_eq!(is_there(BLOCK_SIZE + 1), [true, false], "cut off");
    assert_eq!(is_there(2 * BLOCK_SIZE), [true, true]);
    // Nothing is read behind the end, which would be an error there.
    let mut read_block = |block: u64| match block {
        0 => Ok(image[..BLOCK_SIZE].try_into().unwrap()),
        _ => Err(Error::new(ErrorKind::Io, "read past the end")),
    };
    assert!(matches!(&read_copies(&mut read_block, BLOCK_SIZE as u64)[1], Ok(Classified::Empty)));
    assert!(read_copies(&mut read_block, BLOCK_SIZE as u64 + 1)[1].is_err());
}

#[test]
fn findings_are_bounded() {
    let superblock = Superblock { geometry: Geometry::new(1 << 30, RegionSize::default(), 100).unwrap(), ..sample() };
    let mut image = image(&superblock, |_| false);
    image[8192..].fill(1);
    let found = report(&image);
    assert_eq!((found.findings.len(), found.nr_findings), (FINDINGS_MAX, 164 * 8));
}

#[test]
fn runs_stop_at_damage() {
    let mut image = image(&sample(), |region| !(10..1500).contains(&region));
    image[4 * 4096] ^= 1;
    let superblock = sample();
    let mut read = reader(&image);
    let runs: Vec<_> = HydratedRuns::new(&superblock, &mut read).collect();
    assert_eq!(runs.len(), 2, "the run that was open when damage came is not reported as whole");
    assert_eq!(*runs[0].as_ref().unwrap(), (0, 9));
    assert_eq!(runs[1].as_ref().unwrap_err().kind(), ErrorKind::Damaged);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn runs_and_count_like_the_bits(
        superblock in superblocks(), regions in 1u64..5000, per_zone in 1u64..300, seed: u64, density in 0u64..4,
    ) {
        let region_size = superblock.geometry.region_size();
        let geometry = Geometry::new(regions * region_size.bytes(), region_size, per_zone).unwrap();
        let superblock = Superblock { geometry, state: CloneState::Active, ..superblock };
        // From nothing over random to nearly everything, with zones that are full or empty.
        let image = image_with(&superblock, |zone| match (density, zone.0 % 3) {
            (0, _) | (_, 1) => vec![0; words_per_zone(&geometry)].into(),
            (1, 2) => random_bits(&geometry, zone, seed),
            _ => full(&geometry, zone),
        });
        let codec = ZoneCodec::new(&superblock);
        let mut bits = Vec::new();
        for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
            let decoded = codec.decode(zone, image[zone_block(zone) as usize * 4096..][..4096].try_into().unwrap());
            bits.extend((0..geometry.zone_regions(zone).count()).map(|i| decoded.bits[(i / 64) as usize] >> (i % 64) & 1 == 1));
        }
        let mut expected: Vec<(u64, u64)> = Vec::new();
        for region in (0..regions).filter(|r| bits[*r as usize]) {
            match expected.last_mut() {
                Some((_, last)) if *last + 1 == region => *last = region,
                _ => expected.push((region, region)),
            }
        }
        let mut read = reader(&image);
        let runs: Vec<_> = HydratedRuns::new(&superblock, &mut read).map(|r| r.unwrap()).collect();
        prop_assert_eq!(runs, expected);
        let count = bits.iter().filter(|b| **b).count() as u64;
        prop_assert_eq!(report(&image).summary.unwrap().hydrated_count, count);
    }

    #[test]
    fn hostile_images_never_panic(noise in prop::collection::vec((0usize..19 * 4096, any::<u8>()), 0..200), cut in 0usize..19 * 4096) {
        let mut image = image(&sample(), |region| region % 3 == 0);
        noise.iter().for_each(|(at, value)| image[*at] = *value);
        image.truncate(cut);
        let _ = check(&mut reader(&image), image.len() as u64);
    }
}

fn full(geometry: &Geometry, zone: ZoneIndex) -> Box<[u64]> {
    let count = geometry.zone_regions(zone).count();
    let mut words = vec![0; words_per_zone(geometry)];
    (0..count as usize).for_each(|i| words[i / 64] |= 1 << (i % 64));
    words.into()
}
