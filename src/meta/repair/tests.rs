use super::super::check::check;
use super::super::check::tests::{image, reader, sample};
use super::*;
use crate::units::{Geometry, RegionSize};
use proptest::prelude::*;

mod damage;

fn look(image: &[u8]) -> Survey {
    survey(&mut reader(image), image.len() as u64, false).unwrap()
}

fn assume(others: Option<bool>, by_sector: &[(u64, bool)]) -> Assumptions {
    Assumptions { others, by_sector: by_sector.iter().copied().collect(), force: false }
}

/// The image as it is after a repair.
fn repaired(image: &[u8], assume: &Assumptions) -> Vec<u8> {
    let decided = look(image).decide(assume).unwrap();
    let mut new = image.to_vec();
    let mut write = |number: u64, block: &Block| {
        new[number as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(block);
        Ok(())
    };
    decided.mend(&mut reader(image), &mut write).unwrap();
    decided.superblocks().iter().for_each(|(number, block)| write(*number, block).unwrap());
    new
}

fn hydrated(image: &[u8]) -> Vec<bool> {
    let summary = check(&mut reader(image), image.len() as u64).unwrap().summary.unwrap();
    let codec = ZoneCodec::new(&summary.superblock);
    let geometry = summary.superblock.geometry;
    let mut found = Vec::new();
    for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
        let bits = codec.decode(zone, &reader(image)(zone_block(zone)).unwrap()).bits;
        found.extend((0..geometry.zone_regions(zone).count() as usize).map(|i| bits[i / 64] >> (i % 64) & 1 == 1));
    }
    found
}

fn is_clean(image: &[u8]) -> bool {
    check(&mut reader(image), image.len() as u64).unwrap().is_clean() && look(image).is_clean()
}

fn refused(image: &[u8], assume: &Assumptions, words: &str) {
    let said = look(image).decide(assume).err().expect("it is refused").to_string();
    assert!(said.contains(words), "'{words}' is not in: {said}");
}

/// Two damaged sectors of zones 0 and 16, and one that holds no bits.
fn damaged() -> Vec<u8> {
    let mut image = image(&sample(), |region| region < 300);
    image[2 * 4096 + 512 + 40] ^= 0x10;
    image[18 * 4096..18 * 4096 + 512].fill(0);
    image[18 * 4096 + 7 * 512 + 100] ^= 1;
    image
}

#[test]
fn nothing_is_assumed_by_itself() {
    let image = damaged();
    let found = look(&image);
    assert!(!found.is_clean());
    let lines = found.describe();
    assert!(
        lines[0].starts_with("sector 17: checksum")
            && lines[0].ends_with("; regions 128 to 255, bytes 8388608 to 16777215 of the clone"),
        "{lines:?}"
    );
    assert_eq!(
        lines[1],
        "sector 144: all zero, what was written is lost; regions 16000 to 16127, bytes 1048576000 to 1056964607 of the clone"
    );
    assert!(lines[2].starts_with("sector 151: ") && lines[2].ends_with("; no regions"), "{lines:?}");
    let nobody = "nobody knows which of the";
    refused(
        &image,
        &assume(None, &[]),
        "nobody knows which of the 256 regions of 2 damaged sectors (17, 144) were hydrated",
    );
    refused(&image, &assume(None, &[(17, true)]), "the 128 regions of 1 damaged sector (144)");
    refused(&image, &assume(None, &[(17, true), (18, true)]), "--assume: sector 18 is not damaged");
    assert!(look(&image).decide(&assume(None, &[(17, true), (144, false)])).is_ok(), "{nobody}");
}

#[test]
fn only_sectors_that_nobody_knows_are_asked_for() {
    let mut image = damaged();
    // Of the magic, which is known.
    image[2 * 4096 + 4] ^= 1;
    let lines = look(&image).describe();
    assert!(
        lines[0].starts_with("sector 16: ") && lines[0].ends_with(" of the clone: its bits are intact"),
        "{lines:?}"
    );
    assert_eq!(lines.iter().filter(|line| line.contains("intact")).count(), 1, "{lines:?}");
    refused(&image, &assume(None, &[]), "of the 256 regions of 2 damaged sectors (17, 144) were hydrated");
    refused(&image, &assume(None, &[(16, true)]), "the bits of sector 16 are known");
    assert_eq!(sectors_words(&[20]), "1 damaged sector (20)");
    let many: Vec<u64> = (100..140).collect();
    assert!(sectors_words(&many).ends_with("114, 115 and 24 more)"), "{}", sectors_words(&many));
}

/// The copy that is left may be from before the clone was marked.
#[test]
fn a_mark_that_may_be_lost_is_said() {
    let said = |image: &[u8]| look(image).decide(&assume(Some(true), &[])).unwrap().describe().join("\n");
    for (all, is_said) in [(true, true), (false, false)] {
        let mut image = image(&sample(), |region| all || region != 7);
        image[100] ^= 1;
        assert_eq!(said(&image).contains("whether the clone was marked complete"), is_said, "{}", said(&image));
        // Proven: the newer copy says that it is not.
        let newer = Superblock { generation: Generation(sample().generation.0 + 1), ..sample() };
        image[..4096].copy_from_slice(&newer.encode());
        assert!(!said(&image).contains("whether"), "{}", said(&image));
    }
}

#[test]
fn regions_are_taken_for_what_was_said() {
    let before: Vec<bool> = (0..16384).map(|region| region < 300).collect();
    for (assumed, at_17, at_144) in [
        (assume(Some(true), &[]), true, true),
        (assume(Some(false), &[]), false, false),
        (assume(Some(false), &[(17, true)]), true, false),
        (assume(None, &[(17, false), (144, true)]), false, true),
    ] {
        let image = repaired(&damaged(), &assumed);
        assert!(is_clean(&image));
        let mut expected = before.clone();
        expected[128..256].fill(at_17);
        expected[16000..16128].fill(at_144);
        assert!(hydrated(&image) == expected, "{assumed:?}");
    }
}

#[test]
fn superblock_copies_are_made_from_each_other() {
    for (copy, name) in [(0, 'A'), (1, 'B')] {
        for change in [|block: &mut [u8]| block[100] ^= 1, |block: &mut [u8]| block.fill(0)] {
            let whole = image(&sample(), |region| region % 3 == 0);
            let mut broken = whole.clone();
            change(&mut broken[copy * 4096..][..4096]);
            let lines = look(&broken).describe();
            assert!(lines.len() == 1 && lines[0].starts_with(&format!("superblock copy {name} is ")), "{lines:?}");
            assert!(repaired(&broken, &assume(None, &[])) == whole, "nothing has to be assumed, all is as it was");
        }
    }
    // An older copy is no damage, and is brought up to date.
    let newer = Superblock { generation: Generation(8), ..sample() };
    let mut old = image(&newer, |_| false);
    old[4096..8192].copy_from_slice(&sample().encode());
    assert!(repaired(&old, &assume(None, &[])) == image(&newer, |_| false));
}

#[test]
fn in_a_complete_clone_every_region_is_hydrated() {
    let complete = Superblock { state: CloneState::Complete, ..sample() };
    let mut image = image(&complete, |_| true);
    image[2 * 4096..2 * 4096 + 512].fill(0);
    refused(&image, &assume(Some(false), &[]), "marked complete");
    refused(&image, &assume(None, &[(16, false)]), "marked complete");
    for assumed in [assume(None, &[]), assume(Some(true), &[])] {
        let mended = repaired(&image, &assumed);
        assert!(is_clean(&mended) && hydrated(&mended).iter().all(|hydrated| *hydrated));
    }
}

#[test]
fn a_mark_that_the_bits_deny() {
    let complete = Superblock { state: CloneState::Complete, ..sample() };
    let image = image(&complete, |region| region != 5);
    assert_eq!(look(&image).describe(), ["marked complete, but 16383 of 16384 regions are hydrated"]);
    refused(&image, &assume(None, &[]), "whether the mark (all is hydrated) or the bits are right");
    let set = repaired(&image, &assume(Some(true), &[]));
    assert!(is_clean(&set) && hydrated(&set).iter().all(|hydrated| *hydrated));
    let unmarked = repaired(&image, &assume(Some(false), &[]));
    assert!(is_clean(&unmarked) && !hydrated(&unmarked)[5]);
    assert_eq!(look(&unmarked).superblock.state, CloneState::Active);
}

/// The mark stays where all bits are set with it, and goes where a region is taken for unhydrated: sectors without
/// regions, and those whose bits are proven, are no such.
#[test]
fn a_mark_that_the_bits_deny_beside_damage() {
    let complete = Superblock { state: CloneState::Complete, ..sample() };
    let contradicting = image(&complete, |region| region != 5);
    assert_eq!(look(&contradicting).hydrated_count(), 16_383);
    let mut without_regions = contradicting.clone();
    without_regions[18 * 4096 + 7 * 512 + 100] ^= 1;
    let mut proven = contradicting.clone();
    proven[3 * 4096 + 4] ^= 1;
    // Regions 1000 to 1127.
    let mut lost = contradicting.clone();
    lost[3 * 4096..3 * 4096 + 512].fill(0);
    for image in [&without_regions, &proven, &lost] {
        let set = repaired(image, &assume(Some(true), &[]));
        assert!(is_clean(&set) && hydrated(&set).iter().all(|hydrated| *hydrated));
        assert_eq!(look(&set).superblock.state, CloneState::Complete);
    }
    let partly = repaired(&lost, &assume(Some(true), &[(24, false)]));
    assert!(is_clean(&partly));
    assert_eq!(look(&partly).superblock.state, CloneState::Active);
    let unhydrated = |region: usize| region == 5 || (1000..1128).contains(&region);
    assert!(hydrated(&partly).iter().enumerate().all(|(region, hydrated)| *hydrated != unhydrated(region)));
}

#[test]
fn what_is_going_to_be_done_is_said() {
    let decided = |image: &[u8], assume: &Assumptions| look(image).decide(assume).unwrap();
    let mut proven = image(&sample(), |region| region < 300);
    proven[3 * 4096 + 4] ^= 1;
    let known = decided(&proven, &assume(None, &[]));
    // Two copies and 17 zones.
    assert_eq!(known.metadata_size(), 19 * 4096);
    let lines = known.describe();
    assert_eq!(lines.len(), 1);
    assert!(lines[0].ends_with(": its bits are intact; written again, nothing is lost"), "{lines:?}");

    let complete = Superblock { state: CloneState::Complete, ..sample() };
    let denied = image(&complete, |region| region != 5);
    assert_eq!(decided(&denied, &assume(Some(true), &[])).describe(), ["marked complete: all bits are set"]);
    let removed = ["the mark that all is hydrated is removed"];
    assert_eq!(decided(&denied, &assume(Some(false), &[])).describe(), removed);

    // The sector that is lost is taken for hydrated, or not; so is a mark that was in the copy that is lost.
    let mut lost = image(&sample(), |_| true);
    lost[3 * 4096..3 * 4096 + 512].fill(0);
    lost[..4096].fill(0);
    for (taken, words) in [(true, "taken for hydrated"), (false, "taken for unhydrated")] {
        let lines = decided(&lost, &assume(Some(taken), &[])).describe();
        assert!(lines[0].contains(words), "{lines:?}");
        assert_eq!(lines.iter().any(|line| line.starts_with("every region is hydrated; whether")), taken, "{lines:?}");
    }
}

/// As many damaged sectors as are supported, and one block more.
#[test]
fn too_many_damaged_sectors() {
    let blocks = SECTORS_MAX / 8;
    let geometry = Geometry::new((blocks as u64 + 5) << 16, RegionSize::default(), 1).unwrap();
    let mut image = image(&Superblock { geometry, ..sample() }, |_| false);
    image[2 * BLOCK_SIZE..(2 + blocks) * BLOCK_SIZE].fill(0);
    assert_eq!(look(&image).damaged.len(), SECTORS_MAX);
    image[(2 + blocks) * BLOCK_SIZE..(3 + blocks) * BLOCK_SIZE].fill(0);
    let refused = survey(&mut reader(&image), image.len() as u64, false).err().expect("it is refused").to_string();
    assert!(refused.contains("more than") && refused.contains("sectors are damaged"), "{refused}");
}

#[test]
fn what_can_not_be_mended_is_said() {
    let whole = image(&sample(), |_| true);
    let error = |image: &[u8]| survey(&mut reader(image), image.len() as u64, false).err().unwrap().to_string();
    let mut both = whole.clone();
    (both[100], both[4196]) = (1, 1);
    assert!(error(&both).starts_with("can't be repaired: superblock copy A: checksum"), "{}", error(&both));
    assert!(error(&whole[..17 * 4096]).contains("the device has 68KiB, 76KiB (77824 bytes) are needed"));
    assert!(error(&vec![0; 1 << 20]).contains("never formatted"));
    let mut foreign = whole.clone();
    foreign[4096..4100].copy_from_slice(b"XFSB");
    let said = error(&foreign);
    assert!(
        said.starts_with("an xfs file system is in place of superblock copy B") && said.contains("--force"),
        "{said}"
    );
    let decided = survey(&mut reader(&foreign), whole.len() as u64, true).unwrap().decide(&assume(None, &[])).unwrap();
    assert_eq!(decided.superblocks(), [(1, sample().encode())]);
}

#[test]
fn a_block_that_can_not_be_read_is_eight_sectors() {
    let whole = image(&sample(), |_| true);
    let mut read = |block| match block {
        18 => Err(Error::io(libc::EIO, "medium")),
        _ => reader(&whole)(block),
    };
    let found = survey(&mut read, whole.len() as u64, false).unwrap();
    assert_eq!(found.damaged.len(), 8);
    assert_eq!(found.damaged[3].to_string(), "sector 147: unreadable: medium: Input/output error; no regions");
    let decided = found.decide(&assume(Some(true), &[])).unwrap();
    let mut written = Vec::new();
    let mut write = |number: u64, block: &Block| {
        written.push((number, *block));
        Ok(())
    };
    decided.mend(&mut read, &mut write).unwrap();
    let [(18, block)] = &written[..] else { panic!("one block") };
    let mut mended = whole.clone();
    mended[18 * 4096..].copy_from_slice(block);
    assert!(is_clean(&mended) && hydrated(&mended) == hydrated(&whole));
}

proptest! {
    #[test]
    fn good_bits_stay_and_bad_ones_are_as_assumed(
        seed in any::<u64>(), sectors in prop::collection::btree_map(16u64..17 * 8 + 16, any::<bool>(), 1..20),
    ) {
        let is_set = |region: u64| (region ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1;
        let whole = image(&sample(), is_set);
        let mut broken = whole.clone();
        for sector in sectors.keys() {
            broken[*sector as usize * 512 + 32] ^= 4;
        }
        let mended = repaired(&broken, &Assumptions { by_sector: sectors.clone(), ..Assumptions::default() });
        prop_assert!(is_clean(&mended));
        let codec = ZoneCodec::new(&sample());
        let mut expected = hydrated(&whole);
        for (sector, hydrated) in &sectors {
            let zone = ZoneIndex(sector / 8 - 2);
            if let Some(regions) = codec.sector_regions(zone, (sector % 8) as usize) {
                expected[regions.first().0 as usize..regions.end().0 as usize].fill(*hydrated);
            }
        }
        prop_assert!(hydrated(&mended) == expected);
    }
}
