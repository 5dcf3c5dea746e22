//! Every sector of metadata, damaged in every way: check names it, a start refuses with the same finding or survives what
//! is promised, repair restores what is proven and nothing else.
//!
//! What is expected is worked out from the bytes that differ, not from what the code under test says.

use super::super::super::check::{Finding, Report};
use super::super::super::codec::{SECTOR_BYTES, SourceFingerprint, words_per_zone};
use super::super::super::store::Store;
use super::super::super::store::sim::{Plan, Rng, SimDisk};
use super::*;
use crate::units::{Geometry, RegionSize};
use futures_lite::future::block_on;
use std::collections::BTreeSet;
use std::rc::Rc;

/// A clone's metadata, and what else may come into its sectors.
struct Shape {
    name: &'static str,
    superblock: Superblock,
    image: Vec<u8>,
    /// The same clone, earlier; every sector differs.
    older: Vec<u8>,
    /// The same bits of another clone.
    other: Vec<u8>,
    /// Bytes behind the metadata.
    tail: usize,
}

/// Metadata with generations of their own in superblock and bitmap.
fn make(superblock: &Superblock, generation: u64, hydrated: &dyn Fn(u64) -> bool) -> Vec<u8> {
    let geometry = superblock.geometry;
    let mut image = [superblock.encode(), superblock.encode()].concat();
    let codec = ZoneCodec::new(superblock);
    for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
        let mut bits = vec![0; words_per_zone(&geometry)];
        for (i, region) in geometry.zone_regions(zone).indices().enumerate() {
            bits[i / 64] |= u64::from(hydrated(region)) << (i % 64);
        }
        let mut block = [0; BLOCK_SIZE];
        codec.encode(zone, Generation(generation), &bits, &mut block);
        image.extend_from_slice(&block);
    }
    image
}

type Hydrated = fn(u64) -> bool;

fn shapes() -> Vec<Shape> {
    let (some, none, all): (Hydrated, Hydrated, Hydrated) =
        (|region| region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 1, |_| false, |_| true);
    // Regions, regions in a zone, how many bytes are behind, the bits, complete.
    let table: [(&'static str, u64, u64, usize, Hydrated, bool); 10] = [
        ("one region", 1, 1, 0, all, false),
        ("one zone", 40, 64, 0, some, false),
        ("one full zone", 30720, 30720, 0, some, false),
        ("zones of one region", 2, 1, 4096, some, false),
        ("a short last zone", 2 * 1000 + 130, 1000, 0, some, false),
        ("zones that fill no word", 3 * 70 - 1, 70, 100, some, false),
        ("nothing hydrated", 2000, 1000, 0, none, false),
        ("all hydrated, active", 2000, 1000, 512, all, false),
        ("complete", 2130, 1000, 0, all, true),
        ("complete in a larger file", 300, 100, 1 << 16, all, true),
    ];
    let shape = |(name, regions, per_zone, tail, hydrated, complete): (_, u64, _, _, Hydrated, bool)| {
        let geometry = Geometry::new(regions * 65536 - 100, RegionSize::default(), per_zone).unwrap();
        let superblock = Superblock {
            uuid: *b"0123456789abcdef",
            geometry,
            source: SourceFingerprint { size: geometry.size(), samples: 64, digest: [0x5a; 16] },
            destination_id: [0xd1; 16],
            state: if complete { CloneState::Complete } else { CloneState::Active },
            generation: Generation(12),
            created_unix_s: 1_700_000_000,
        };
        let earlier = Superblock { state: CloneState::Active, generation: Generation(3), ..superblock.clone() };
        let another = Superblock { uuid: *b"fedcba9876543210", ..superblock.clone() };
        let mut image = make(&superblock, 11, &hydrated);
        image.extend((0..tail).map(|i| (i * 7) as u8));
        let older = make(&earlier, 4, &|region| hydrated(region) && region % 3 == 0);
        Shape { name, older, other: make(&another, 11, &hydrated), image, superblock, tail }
    };
    let mut shapes: Vec<Shape> = table.into_iter().map(shape).collect();
    // As growth leaves it: new zones have a newer generation, which is the superblock's.
    let mut grown = shape(("grown", 1300, 1000, 0, some, false));
    let codec = ZoneCodec::new(&grown.superblock);
    let mut block = [0; BLOCK_SIZE];
    codec.encode(ZoneIndex(1), Generation(12), &vec![0; words_per_zone(&grown.superblock.geometry)], &mut block);
    grown.image[3 * 4096..4 * 4096].copy_from_slice(&block);
    shapes.push(grown);
    shapes
}

impl Shape {
    fn sectors(&self) -> usize {
        (self.image.len() - self.tail) / SECTOR_BYTES
    }

    /// So large that it takes its time.
    fn is_large(&self) -> bool {
        self.superblock.geometry.nr_regions() > 10_000
    }

    fn codec(&self) -> ZoneCodec {
        ZoneCodec::new(&self.superblock)
    }

    /// Whether all that was damaged of a bitmap sector is known anyway: everything but checksum, generation and the
    /// bits that have a region.
    fn is_known_anyway(&self, image: &[u8], sector: usize) -> bool {
        let zone = ZoneIndex(sector as u64 / 8 - 2);
        let bits = self.codec().sector_regions(zone, sector % 8).map_or(0, RegionRange::count) as usize;
        let differs = |at: usize| image[sector * SECTOR_BYTES + at] ^ self.image[sector * SECTOR_BYTES + at];
        (0..SECTOR_BYTES).all(|at| match at {
            0..4 | 8..16 => differs(at) == 0,
            4..8 | 16..32 => true,
            _ => (0..8).all(|bit| differs(at) >> bit & 1 == 0 || (at - 32) * 8 + bit >= bits),
        })
    }

    /// The images with sector `sector` damaged, each with its name.
    fn damages(&self, sector: usize) -> Vec<(String, Vec<u8>)> {
        let at = sector * SECTOR_BYTES;
        let range = at..at + SECTOR_BYTES;
        let block = sector / 8 * 4096..(sector / 8 + 1) * 4096;
        let mut found: Vec<(String, Vec<u8>)> = Vec::new();
        let mut put = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut image = self.image.clone();
            change(&mut image);
            if image != self.image {
                found.push((format!("{}: sector {sector}: {name}", self.name), image));
            }
        };
        // All of them for the small shapes, a third at each sector of the others.
        let flipped = [0, 3, 4, 7, 8, 15, 16, 24, 31, 32, 33, 40, 100, 300, 504, 511].into_iter().enumerate();
        for (_, byte) in
            flipped.filter(|(i, _)| self.sectors() == 24 && !self.is_large() || (i + sector).is_multiple_of(3))
        {
            put(&format!("bit of byte {byte}"), &|image| image[at + byte] ^= 1 << (byte % 8));
        }
        put("two bits", &|image| {
            image[at + 40] ^= 1;
            image[at + 500] ^= 0x80;
        });
        put("known bytes", &|image| {
            image[at + 4..at + 8].fill(0x77);
            image[at + 16..at + 32].fill(0x77);
        });
        put("all zero", &|image| image[range.clone()].fill(0));
        put("all ones", &|image| image[range.clone()].fill(0xff));
        put("garbage", &|image| {
            let mut rng = Rng::new(sector as u64);
            image[range.clone()].iter_mut().for_each(|byte| *byte = rng.below(256) as u8);
        });
        put("header only", &|image| image[at + 32..at + 512].fill(0));
        let is_copy = sector < 16;
        if !is_copy {
            put("of another clone", &|image| image[range.clone()].copy_from_slice(&self.other[range.clone()]));
        }
        for from in [0, 7, 16, self.sectors() - 1].into_iter().filter(|from| *from < self.sectors()) {
            put(&format!("a copy of sector {from}"), &|image| {
                image.copy_within(from * SECTOR_BYTES..(from + 1) * SECTOR_BYTES, at);
            });
        }
        // Not across the two superblock copies: that is another test.
        if sector + 1 < self.sectors() && sector != 7 {
            put("swapped with the next", &|image| {
                image[at..at + 2 * SECTOR_BYTES].rotate_left(SECTOR_BYTES);
            });
        }
        put("its block all zero", &|image| image[block.clone()].fill(0));
        put("its block all ones", &|image| image[block.clone()].fill(0xff));
        if !is_copy {
            put("its block of another clone", &|image| {
                image[block.clone()].copy_from_slice(&self.other[block.clone()])
            });
        }
        found
    }

    /// Damaged superblock copies and bitmap sectors of an image that is as long as ours.
    fn differing(&self, image: &[u8]) -> (Vec<usize>, Vec<usize>) {
        let differs = |range: std::ops::Range<usize>| image[range.clone()] != self.image[range];
        let copies = (0..2).filter(|copy| differs(copy * 4096..(copy + 1) * 4096)).collect();
        let sectors = (16..self.sectors()).filter(|s| differs(s * SECTOR_BYTES..(s + 1) * SECTOR_BYTES)).collect();
        (copies, sectors)
    }
}

fn disk(image: &[u8]) -> Rc<SimDisk> {
    Rc::new(SimDisk::new(image.to_vec(), Plan { turns: Some(0), ..Plan::default() }, 1))
}

fn report(image: &[u8]) -> Report {
    check(&mut reader(image), image.len() as u64).unwrap()
}

/// Starts from an image as a daemon does; the bits in order of the regions, and the medium afterwards.
fn start(image: &[u8]) -> Result<(Vec<bool>, Vec<u8>), Error> {
    let medium = disk(image);
    let opened = block_on(Store::open(medium.clone()))?.expect("metadata are there");
    let geometry = opened.store.superblock().geometry;
    let mut bits = vec![false; geometry.nr_regions() as usize];
    for (zone, words) in &opened.zones {
        for (i, region) in geometry.zone_regions(*zone).indices().enumerate() {
            bits[region as usize] = words[i / 64] >> (i % 64) & 1 == 1;
        }
    }
    block_on(opened.store.mend()).unwrap();
    Ok((bits, medium.crash()))
}

fn forced() -> Assumptions {
    Assumptions { force: true, ..Assumptions::default() }
}

fn place(finding: &Finding) -> (u64, Option<u64>, Option<RegionRange>) {
    (finding.block, finding.sector, finding.regions)
}

/// Everything that is promised of a damaged image.
fn judge(shape: &Shape, name: &str, image: &[u8]) {
    let (copies, sectors) = shape.differing(image);
    let regions_of = |sector: usize| shape.codec().sector_regions(ZoneIndex(sector as u64 / 8 - 2), sector % 8);

    // Check names exactly what is damaged.
    let found = report(image);
    let at_copies = copies.iter().map(|copy| (*copy as u64, None, None));
    let at_sectors = sectors.iter().map(|s| (*s as u64 / 8, Some(*s as u64), regions_of(*s)));
    let expected: Vec<_> = at_copies.chain(at_sectors).collect();
    assert_eq!(found.findings.iter().map(place).collect::<Vec<_>>(), expected, "{name}: {:?}", found.findings);
    assert!(found.notes.is_empty() && !found.is_clean(), "{name}");

    // A start says the same, or survives what is promised to be survived.
    let original = hydrated(&shape.image);
    match (start(image), sectors.first()) {
        (Ok((bits, medium)), None) => {
            assert!(bits == original, "{name}");
            assert!(medium == shape.image, "{name}: the copy is not written again");
        }
        (Err(error), Some(first)) => {
            assert_eq!(error.kind(), ErrorKind::Damaged, "{name}");
            let said = found.findings.iter().find(|finding| finding.sector == Some(*first as u64)).unwrap().to_string();
            let said = said.split("; it covers").next().unwrap();
            assert!(error.to_string().contains(said), "{name}: {said} is not in: {error}");
        }
        (Ok(_), Some(_)) => panic!("{name}: it starts all the same"),
        (Err(error), None) => panic!("{name}: {error}"),
    }

    // Repair restores what is proven, and nothing else by itself.
    let is_proven = |sector: usize| {
        let is_complete = shape.superblock.state == CloneState::Complete;
        is_complete || regions_of(sector).is_none() || shape.is_known_anyway(image, sector)
    };
    let unknown: BTreeSet<u64> =
        sectors.iter().filter(|s| !is_proven(**s)).flat_map(|s| regions_of(*s).unwrap().indices()).collect();
    let outcome = |assume: &Assumptions| {
        let mended = repaired(image, assume);
        assert!(is_clean(&mended), "{name}: {:?}", report(&mended).findings);
        let (bits, medium) = start(&mended).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(medium == mended, "{name}: the start finds something to mend");
        // Blocks that were good are not touched; neither is what is behind the metadata.
        for (number, block) in mended.chunks(4096).enumerate() {
            let was_good = image[number * 4096..][..block.len()] == shape.image[number * 4096..][..block.len()];
            assert!(!was_good || *block == shape.image[number * 4096..][..block.len()], "{name}: block {number}");
        }
        bits
    };
    let with_unknown = |hydrated: bool| -> Vec<bool> {
        let or_unknown =
            |(region, bit): (usize, &bool)| if unknown.contains(&(region as u64)) { hydrated } else { *bit };
        original.iter().enumerate().map(or_unknown).collect()
    };
    match look(image).decide(&Assumptions::default()) {
        Ok(_) => {
            assert!(unknown.is_empty(), "{name}: it guesses");
            assert!(outcome(&Assumptions::default()) == original, "{name}");
        }
        Err(error) => {
            let said = error.to_string();
            assert!(!unknown.is_empty(), "{name}: {said}");
            assert!(said.contains(&format!("which of the {} regions", unknown.len())), "{name}: {said}");
            assert!(said.contains("--assume") && said.contains("--force"), "{name}: {said}");
            let lines = look(image).describe();
            for sector in sectors.iter().filter(|sector| !is_proven(**sector)) {
                let bytes = shape.superblock.geometry.bytes_of(regions_of(*sector).unwrap());
                let line = format!("bytes {} to {} of the clone", bytes.start(), bytes.end() - 1);
                let start = format!("sector {sector}: ");
                assert!(lines.iter().any(|l| l.starts_with(&start) && l.ends_with(&line)), "{name}: {lines:?}");
            }
            assert!(outcome(&assume(Some(true), &[])) == with_unknown(true), "{name}");
        }
    }
    assert!(outcome(&forced()) == with_unknown(false), "{name}: forced");
}

#[test]
fn every_sector_in_every_way() {
    let mut judged = 0;
    for shape in &shapes() {
        assert!(report(&shape.image).is_clean() && start(&shape.image).is_ok(), "{}", shape.name);
        for sector in (0..shape.sectors()).step_by(if shape.is_large() { 5 } else { 1 }) {
            for (name, image) in shape.damages(sector) {
                judge(shape, &name, &image);
                judged += 1;
            }
        }
    }
    assert!(judged > 5000, "{judged} images only");
    eprintln!("{judged} damaged images judged");
}

/// One flipped bit in each byte of an image with one zone.
#[test]
fn a_flipped_bit_anywhere_is_found_at_its_sector() {
    let shape = &shapes()[1];
    for at in 0..shape.image.len() {
        let mut image = shape.image.clone();
        image[at] ^= 1 << (at * 5 % 8);
        let (block, sector) = (at as u64 / 4096, at as u64 / 512);
        let found = report(&image);
        let places: Vec<_> = found.findings.iter().map(|finding| (finding.block, finding.sector)).collect();
        assert_eq!(places, [(block, (block >= 2).then_some(sector))], "byte {at}");
        assert_eq!(start(&image).is_ok(), block < 2, "byte {at}");
    }
}

/// A write that the medium lost leaves an older sector, which has nothing wrong in itself. Of the bitmap that can't be
/// told, but in a complete clone; of the superblock the newer copy counts.
#[test]
fn an_older_sector_is_told_where_it_can_be() {
    for shape in &shapes() {
        let complete = shape.superblock.state == CloneState::Complete;
        for sector in (0..16).step_by(8).chain(16..shape.sectors()) {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            let mut image = shape.image.clone();
            image[range.clone()].copy_from_slice(&shape.older[range.clone()]);
            let name = format!("{}: sector {sector}", shape.name);
            let (found, started) = (report(&image), start(&image));
            let lost = hydrated(&shape.image).iter().zip(hydrated(&image)).filter(|(was, is)| **was && !is).count();
            match sector {
                // Copy A is written first: the medium lost it. An older copy B is what a crash may leave.
                0 | 8 => {
                    let places: Vec<_> = found.findings.iter().map(place).collect();
                    assert_eq!(places, if sector == 0 { vec![(0, None, None)] } else { vec![] }, "{name}");
                    assert_eq!(found.notes.len(), sector / 8, "{name}");
                    assert!(started.unwrap().1 == shape.image, "{name}: it is written again");
                }
                _ if complete && lost > 0 => {
                    assert!(found.findings[0].what.starts_with("marked complete, but "), "{name}: {found:?}");
                    assert!(started.err().unwrap().to_string().contains(&found.findings[0].what), "{name}");
                    let said = look(&image).decide(&Assumptions::default()).err().unwrap().to_string();
                    assert!(said.contains("nothing was changed"), "{name}: {said}");
                    let active = repaired(&image, &forced());
                    assert!(is_clean(&active) && hydrated(&active) == hydrated(&image), "{name}");
                    let set = repaired(&image, &assume(Some(true), &[]));
                    assert!(is_clean(&set) && hydrated(&set) == hydrated(&shape.image), "{name}");
                }
                _ => assert!(found.is_clean() && started.is_ok(), "{name}: {found:?}"),
            }
        }
    }
}

#[test]
fn both_superblock_copies() {
    for shape in &shapes() {
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut image = shape.image.clone();
            change(&mut image);
            let error = start(&image).expect_err(shape.name);
            let not_repaired = survey(&mut reader(&image), image.len() as u64, true).err().expect(shape.name);
            assert_eq!(error.kind(), not_repaired.kind(), "{}: {error}, {not_repaired}", shape.name);
            match check(&mut reader(&image), image.len() as u64) {
                Ok(report) => assert!(!report.is_clean() && report.summary.is_none(), "{}", shape.name),
                Err(told) => assert_eq!((told.kind(), told.to_string()), (error.kind(), error.to_string())),
            }
            error.to_string()
        };
        let flip = |image: &mut Vec<u8>, at: usize| image[at] ^= 1;
        for (a, b) in [(0, 4096), (100, 4196), (10, 8000), (600, 4096)] {
            refused(&|image| {
                flip(image, a);
                flip(image, b);
            });
        }
        refused(&|image| image[..8192].fill(0xff));
        refused(&|image| {
            image[..4096].fill(0);
            flip(image, 5000);
        });
    }
}

/// Two valid copies of different clones: no start chooses; repair does, by the bitmap, which fits one of them only.
#[test]
fn a_superblock_copy_of_another_clone() {
    for shape in &shapes() {
        for copy in 0..2 {
            let mut image = shape.image.clone();
            image[copy * 4096..][..4096].copy_from_slice(&shape.other[..4096]);
            let told = "superblock copies A and B are of different clones";
            assert_eq!(report(&image).findings[0].what, told, "{}", shape.name);
            assert!(start(&image).unwrap_err().to_string().contains(told), "{}", shape.name);
            let said = look(&image).describe();
            assert!(said.len() == 1 && said[0].contains("of another clone than the bitmap"), "{said:?}");
            assert!(repaired(&image, &Assumptions::default()) == shape.image, "{}", shape.name);
            // Without a bitmap to tell by nobody knows.
            image[8192..].fill(0xff);
            assert!(survey(&mut reader(&image), image.len() as u64, true).is_err(), "{}", shape.name);
        }
    }
}

/// What is cut off is told by the block where it ends; a start refuses it too.
#[test]
fn cut_off_at_every_sector() {
    for shape in shapes().iter().filter(|shape| shape.tail == 0) {
        let whole = shape.image.len();
        for len in (0..whole / 512).flat_map(|sector| [sector * 512, sector * 512 + 100]) {
            let image = &shape.image[..len];
            let name = format!("{}: {len} of {whole} bytes", shape.name);
            let found = check(&mut reader(image), len as u64);
            match len {
                // As a file that was created and not written.
                0 => {
                    assert_eq!(found.unwrap_err().kind(), ErrorKind::ForeignData, "{name}");
                    assert!(block_on(Store::open(disk(image))).unwrap().is_none(), "{name}");
                    continue;
                }
                // A part of the first sector.
                1..512 => {
                    assert!(found.unwrap().summary.is_none(), "{name}");
                    assert_eq!(start(image).unwrap_err().kind(), ErrorKind::Damaged, "{name}");
                }
                _ => {
                    let found = found.unwrap();
                    let end = found.findings.last().unwrap();
                    assert_eq!(end.block, (len as u64 / 4096).max(2), "{name}: {found:?}");
                    assert!(end.what.starts_with("the device ends here"), "{name}: {found:?}");
                    // Without copy B and bitmap, as a format is before its last step.
                    let named = found.findings.iter().any(|finding| finding.block == 1) || !found.notes.is_empty();
                    assert_eq!(named, len < 4096 + 512, "{name}: {found:?}");
                    assert_eq!(start(image).unwrap_err().kind(), ErrorKind::TooSmall, "{name}");
                }
            }
            let error = survey(&mut reader(image), len as u64, true).err().expect(&name).to_string();
            assert!(error.contains("can't be repaired"), "{name}: {error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Several sectors at once, of all shapes.
    #[test]
    fn any_sectors_at_once(picks in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..6), shape in any::<prop::sample::Index>()) {
        let shapes = shapes();
        let shape = shape.get(&shapes);
        let mut image = shape.image.clone();
        for (sector, way) in &picks {
            let sector = sector.index(shape.sectors());
            let damages = shape.damages(sector);
            let (_, damaged) = way.get(&damages);
            let block = sector / 8 * 4096..(sector / 8 + 1) * 4096;
            // Never both copies: that is another test.
            if sector < 16 && shape.differing(&image).0.iter().any(|copy| *copy != sector / 8) {
                continue;
            }
            image[block.clone()].copy_from_slice(&damaged[block]);
        }
        if image != shape.image {
            judge(shape, &format!("{}: {picks:?}", shape.name), &image);
        }
    }
}
