//! hydrant's metadata: an image through everything that reads one: check, open, repair, and what repair wrote through
//! check again.
//!
//! The input describes an image, so that the fuzzer gets past the checksums: 144 bytes of superblock, which are sealed
//! when they are to be, a bitmap that fits it, then changes of bytes anywhere, each sealed again or not.
//! Properties:
//! * a superblock that is valid encodes to one that is the same;
//! * the daemon opens exactly what check calls sound, and finds the same bits in it;
//! * the runs of a sound image are its bits;
//! * what repair made is clean, and has the bits that were good.

use super::input::{Input, one_line};
use super::meter::Bound;
use bytes::Bytes;
use futures_lite::future::block_on;
use hydrant::disk::{Disk, DiskInfo, ZeroFlags};
use hydrant::dma_buf::DmaBuf;
use hydrant::error::{Error, ErrorKind, Result};
use hydrant::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use hydrant::meta::check::{HydratedRuns, Report, check};
use hydrant::meta::codec::*;
use hydrant::meta::repair::{Assumptions, survey};
use hydrant::meta::store::Store;
use hydrant::units::{ByteRange, Generation, ZoneIndex};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// Some images of up to 66 blocks, and what is told of every sector of them; nothing by the size that a superblock claims.
pub const BOUND: Bound = Bound { base: 8 << 20, per_byte: 64 };

/// Of an image that is laid out; others get a few blocks only.
const ZONES_MAX_HERE: u64 = 64;
/// The part of a superblock that means something.
const FIELDS: usize = 144;

pub fn target(data: &[u8]) {
    let image = image(&mut Input(data));
    for copy in 0..2 {
        if let Some(block) = block_at(&image, copy) {
            superblock_round_trip(&block);
        }
    }
    let size = image.len() as u64;
    let report = check(&mut |number| read(&image, number), size);
    match &report {
        Ok(report) => {
            report.findings.iter().for_each(|finding| one_line("finding", &finding.to_string()));
            assert_eq!(report.is_clean(), report.findings.is_empty());
        }
        Err(error) => one_line("check", &error.to_string()),
    }
    opens_what_is_sound(&image, &report);
    for assumed in [None, Some(true), Some(false)] {
        repairs(&mut image.clone(), &report, assumed);
    }
}

fn block_at(image: &[u8], number: u64) -> Option<Block> {
    let start = usize::try_from(number).ok()?.checked_mul(BLOCK_SIZE)?;
    image.get(start..start.checked_add(BLOCK_SIZE)?)?.try_into().ok()
}

/// What the image lacks of its last block reads as zeros.
fn read(image: &[u8], number: u64) -> Result<Block> {
    let start = usize::try_from(number).ok().and_then(|number| number.checked_mul(BLOCK_SIZE));
    let Some(there) = start.and_then(|start| image.get(start..)).filter(|there| !there.is_empty()) else {
        return Err(Error::new(ErrorKind::Io, format!("block {number} was read, past the end")));
    };
    let mut padded = [0; BLOCK_SIZE];
    let len = there.len().min(BLOCK_SIZE);
    padded[..len].copy_from_slice(&there[..len]);
    Ok(padded)
}

fn superblock_round_trip(block: &Block) {
    match UnverifiedSuperblock::new(block).classify() {
        Classified::Valid(superblock) => {
            let again = superblock.encode();
            assert_eq!(UnverifiedSuperblock::new(&again).classify(), Classified::Valid(superblock));
        }
        Classified::Damaged(what) | Classified::Unsupported(what) => one_line("superblock", &what),
        Classified::Empty | Classified::Foreign(_) => {}
    }
}

fn opens_what_is_sound(image: &[u8], report: &Result<Report>) {
    let sound = report.as_ref().ok().filter(|report| report.findings.iter().all(|f| f.block < SUPERBLOCK_COPIES));
    let summary = sound.and_then(|report| report.summary.as_ref()).filter(|summary| !summary.contradicts_itself());
    let opened = block_on(Store::open(Rc::new(Memory(RefCell::new(image.to_vec())))));
    match (opened, summary) {
        (Ok(Some(opened)), Some(summary)) => {
            assert_eq!(opened.store.superblock(), summary.superblock);
            assert_eq!(opened.generation, summary.generation);
            let count = |words: &[u64]| words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            assert_eq!(opened.zones.iter().map(|(_, words)| count(words)).sum::<u64>(), summary.hydrated_count);
            let per_zone = summary.superblock.geometry.regions_per_zone();
            let is_set = |region: u64| {
                let bits = opened.zones.iter().find(|(zone, _)| zone.0 == region / per_zone);
                let bit = region % per_zone;
                bits.is_some_and(|(_, words)| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
            };
            let mut end = 0;
            let mut total = 0;
            for run in HydratedRuns::new(&summary.superblock, &mut |number| read(image, number)) {
                let (first, last) = run.expect("a sound image");
                assert!(first <= last && last < summary.superblock.geometry.nr_regions());
                assert!(total == 0 || first > end, "runs that touch: {end}, {first}");
                assert!(is_set(first) && is_set(last) && (total == 0 || !is_set(end)));
                (end, total) = (last + 1, total + last - first + 1);
            }
            assert_eq!(total, summary.hydrated_count);
        }
        (Ok(None), None) => {}
        (Err(error), None) => one_line("open", &error.to_string()),
        (opened, _) => {
            panic!("{:?} of {report:?}", opened.map(|opened| opened.map(|opened| opened.store.superblock())))
        }
    }
}

fn repairs(image: &mut [u8], before: &Result<Report>, assumed: Option<bool>) {
    let size = image.len() as u64;
    let found = match survey(&mut |number| read(image, number), size, assumed.is_some()) {
        Ok(found) => found,
        Err(error) => return one_line("survey", &error.to_string()),
    };
    let before = before.as_ref().expect("what can be surveyed can be checked");
    // None: the copies are of two clones, and only repair looks whose the bitmap is.
    let good = before.summary.as_ref().map_or(0, |summary| summary.hydrated_count);
    assert!(!found.is_clean() || before.is_clean(), "nothing to repair in {before:?}");
    found.describe().iter().for_each(|line| one_line("survey", line));
    let decided = match found.decide(&Assumptions { others: assumed, ..Default::default() }) {
        Ok(decided) => decided,
        Err(error) => return one_line("repair", &error.to_string()),
    };
    decided.describe().iter().for_each(|line| one_line("repair", line));
    let bitmap = image.get(SUPERBLOCK_COPIES as usize * BLOCK_SIZE..).unwrap_or_default();
    let bits_of = |sector: &[u8]| sector.iter().skip(32).map(|byte| u64::from(byte.count_ones())).sum::<u64>();
    let raw: u64 = bitmap.chunks(SECTOR_BYTES).map(bits_of).sum();
    let mut written = Vec::new();
    let mended = decided.mend(&mut |number| read(image, number), &mut |number, block| {
        written.push((number, *block));
        Ok(())
    });
    if let Err(error) = mended {
        return one_line("repair", &error.to_string());
    }
    written.extend(decided.superblocks());
    for (number, block) in written {
        image[number as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&block);
    }
    let after = check(&mut |number| read(image, number), size).expect("a repaired image");
    assert!(after.is_clean(), "after a repair: {after:?}");
    let summary = after.summary.expect("it is clean");
    assert!(summary.hydrated_count >= good, "good bits were lost: {} of {good}", summary.hydrated_count);
    if assumed == Some(false) {
        // Of a damaged sector whose bits are proven all the same they are kept: none that was not there.
        assert!(
            summary.hydrated_count <= raw,
            "regions were taken for hydrated: {}, {raw} bits",
            summary.hydrated_count
        );
    }
}

/// An image from decisions of the fuzzer.
fn image(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.u8();
    let mut first: Block = [0; BLOCK_SIZE];
    first[..FIELDS].copy_from_slice(&input.array::<FIELDS>());
    seal_superblock(&mut first);
    let mut image = [first, first].concat();
    if let Classified::Valid(superblock) = UnverifiedSuperblock::new(&first).classify() {
        let codec = ZoneCodec::new(&superblock);
        let geometry = superblock.geometry;
        for zone in (0..geometry.nr_zones().min(ZONES_MAX_HERE)).map(ZoneIndex) {
            let mut bits = vec![0; words_per_zone(&geometry)];
            for bit in 0..geometry.zone_regions(zone).count() {
                let is_set = match how & 3 {
                    0 => false,
                    1 => true,
                    2 => bit / 5 % 3 == zone.0 % 3,
                    _ => bit % 64 < 13,
                };
                bits[(bit / 64) as usize] |= u64::from(is_set) << (bit % 64);
            }
            let mut block = [0; BLOCK_SIZE];
            codec.encode(zone, Generation(superblock.generation.0 & 0xffff), &bits, &mut block);
            image.extend_from_slice(&block);
        }
    }
    while !input.is_empty() {
        change(input, &mut image);
    }
    image
}

fn change(input: &mut Input<'_>, image: &mut Vec<u8>) {
    let how = input.u8();
    let sectors = image.len().div_ceil(SECTOR_BYTES).max(1);
    let sector = usize::from(input.u16()) % sectors;
    let start = sector * SECTOR_BYTES;
    let span =
        |at: usize, len: usize, image: &[u8]| -> Range<usize> { at.min(image.len())..(at + len).min(image.len()) };
    match how & 7 {
        // Bytes at a place in the sector.
        0..=2 => {
            let at = start + usize::from(input.u8()) * 2;
            let bytes = input.piece();
            let place = span(at, bytes.len(), image);
            let len = place.len();
            image[place].copy_from_slice(&bytes[..len]);
        }
        // Another sector's content: as if it had been written to the wrong place.
        3 => {
            let from = usize::from(input.u16()) % sectors * SECTOR_BYTES;
            if from + SECTOR_BYTES <= image.len() && start + SECTOR_BYTES <= image.len() {
                image.copy_within(from..from + SECTOR_BYTES, start);
            }
        }
        4 => {
            let place = span(start, SECTOR_BYTES, image);
            image[place].fill(0);
        }
        // A number in one of the fields.
        5 => {
            let at = start + usize::from(input.u8() % 24) * 8;
            let number = input.number(4096).to_le_bytes();
            let place = span(at, 8, image);
            let len = place.len();
            image[place].copy_from_slice(&number[..len]);
        }
        6 => {
            let len = input.number(image.len() as u64).min((ZONES_MAX_HERE + 4) * BLOCK_SIZE as u64);
            image.resize(len as usize, 0);
        }
        _ => {
            let place = span(start, 4096, image);
            image[place].fill(input.u8());
        }
    }
    if how & 0x80 == 0 {
        seal(image, sector);
    }
}

/// Makes the checksum right: of the superblock copy that the sector is in, or of the sector.
fn seal(image: &mut [u8], sector: usize) {
    let block = sector / SECTORS_PER_BLOCK;
    if block < SUPERBLOCK_COPIES as usize {
        if let Some(block) = image.get_mut(block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE) {
            seal_superblock(block.try_into().expect("a block"));
        }
        return;
    }
    // The uuid of the copy that counts, mostly.
    let uuid: [u8; 16] = image.get(32..48).map_or([0; 16], |uuid| uuid.try_into().expect("16 bytes"));
    if let Some(bytes) = image.get_mut(sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES) {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&uuid), &(sector as u64).to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Magic and checksum, as the format says; all else stays.
fn seal_superblock(block: &mut Block) {
    block[..8].copy_from_slice(&SUPERBLOCK_MAGIC);
    block[8..12].fill(0);
    let crc = crc32c::crc32c(block);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// A disk in memory that does what it is told.
struct Memory(RefCell<Vec<u8>>);

impl Disk for Memory {
    fn info(&self) -> DiskInfo {
        DiskInfo { size: self.0.borrow().len() as u64, block: 1 }
    }
    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        let bytes = self.0.borrow();
        let mut buf = DmaBuf::new(range.len() as usize);
        buf.copy_from_slice(&bytes[range.start() as usize..range.end() as usize]);
        Box::pin(std::future::ready(Ok(buf)))
    }
    fn write(&self, _: u64, _: Bytes, _: bool) -> LocalBoxFuture<'_, Result<()>> {
        panic!("to open an image writes nothing")
    }
    fn zero(&self, _: ByteRange, _: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
        panic!("to open an image writes nothing")
    }
    fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(std::future::ready(Ok(vec![Extent { len: range.len(), state: Allocation::DATA }])))
    }
}
