//! What a device holds: enough to stop somebody who names the wrong disk.
//!
//! Read-only. Well-known signatures first, at the places their formats give; then samples: head, tail and places
//! spread between, of what is allocated. `None` means "everything looked at is zero", not "everything is zero".

use super::{Device, DeviceKind, sys};
use crate::dma_buf::is_zero;
use crate::error::{Error, Result};
use std::os::unix::fs::FileExt;

/// How much is read from the start, in bytes.
const HEAD: u64 = 4 << 20;
/// How much is read from the end, in bytes: backup tables and RAID superblocks are there.
const TAIL: u64 = 1 << 20;
/// How many samples are read between...
const SAMPLES: u64 = 64;
/// ... and the size of each, in bytes.
const SAMPLE: u64 = 64 << 10;
/// Up to this much data is read whole, in bytes.
const WHOLE_MAX: u64 = 32 << 20;
/// How many allocated extents of a file are looked for.
const EXTENTS_SCANNED_MAX: usize = 4096;
/// Size of one read, in bytes.
const CHUNK: u64 = 1 << 20;

/// dm-clone's `SUPERBLOCK_MAGIC` (drivers/md/dm-clone-metadata.c), a le64 at byte 32 as in all its siblings.
const DM_CLONE_MAGIC: u64 = 0x8af2_7f64;
/// dm-thin's `THIN_SUPERBLOCK_MAGIC`.
const DM_THIN_MAGIC: u64 = 27_022_010;
/// dm-cache's `CACHE_SUPERBLOCK_MAGIC`: octal in its source, as here.
const DM_CACHE_MAGIC: u64 = 0o6142003;

/// Signatures that are plain bytes at a fixed offset: what is most specific comes first.
/// From the formats' own documentation and headers; the same places as blkid(8) looks at.
const SIGNATURES: &[(u64, &[u8], &str)] = &[
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"XFSB", "an xfs file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a bcache device"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "a bcachefs file system"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs file system"),
    (0, b"hsqs", "a squashfs file system"),
    (32769, b"CD001", "an ISO 9660 file system"),
    (0, b"\xfc\x4e\x2b\xa9", "a RAID member (md)"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID member (md)"),
    (0, b"bluestore block device", "a Ceph OSD (bluestore)"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (16374, b"SWAPSPACE2", "swap space"),
    (65526, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (82, b"FAT32   ", "a FAT file system"),
    (54, b"FAT16   ", "a FAT file system"),
    (54, b"FAT12   ", "a FAT file system"),
];
/// How far from the start the signatures reach, in bytes.
const SIGNATURES_END: u64 = 0x11000;

/// Says what a device holds; `None` when everything looked at is zero. `hydrant_magic` is how our own metadata
/// begins.
pub fn contents(device: &Device, hydrant_magic: &[u8; 8]) -> Result<Option<String>> {
    let head = read(device, 0, SIGNATURES_END.min(device.size))?;
    if let Some(found) = identify(&head, hydrant_magic) {
        return Ok(Some(found.into()));
    }
    let extents = data_extents(device)?;
    for (start, end) in samples(&extents) {
        let mut at = start;
        while at < end {
            let bytes = read(device, at, CHUNK.min(end - at))?;
            if !is_zero(&bytes) {
                let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(0) as u64;
                return Ok(Some(format!("data at offset {}", at + first)));
            }
            at += bytes.len() as u64;
        }
    }
    Ok(None)
}

/// What the first bytes say, by the signatures. `head` is up to [`SIGNATURES_END`] bytes.
fn identify(head: &[u8], hydrant_magic: &[u8; 8]) -> Option<&'static str> {
    let at = |offset: u64, bytes: &[u8]| {
        usize::try_from(offset).ok().and_then(|o| head.get(o..)).is_some_and(|rest| rest.starts_with(bytes))
    };
    let le = |offset: usize, len: usize| {
        let bytes = head.get(offset..offset + len)?;
        Some(bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    if at(0, hydrant_magic) {
        return Some("hydrant metadata");
    }
    match le(32, 8) {
        Some(DM_CLONE_MAGIC) => return Some("dm-clone metadata"),
        Some(DM_THIN_MAGIC) => return Some("dm-thin metadata"),
        Some(DM_CACHE_MAGIC) => return Some("dm-cache metadata"),
        _ => {}
    }
    // The label is in one of the first four 512-byte sectors.
    if (0..4).any(|sector| at(sector * 512, b"LABELONE") && at(sector * 512 + 24, b"LVM2 001")) {
        return Some("an LVM physical volume");
    }
    // ext2, 3 and 4 differ in feature bits: has_journal (compatible 0x4); extents, 64bit, flex_bg (incompatible).
    if le(0x438, 2) == Some(0xef53) {
        let (compatible, incompatible) = (le(0x45c, 4)?, le(0x460, 4)?);
        return Some(match () {
            () if incompatible & (0x40 | 0x80 | 0x200) != 0 => "an ext4 file system",
            () if compatible & 0x4 != 0 => "an ext3 file system",
            () => "an ext2 file system",
        });
    }
    if let Some((_, _, found)) = SIGNATURES.iter().find(|(offset, bytes, _)| at(*offset, bytes)) {
        return Some(found);
    }
    // Last: file systems and partition tables carry a boot record too.
    at(510, &[0x55, 0xaa]).then_some("an MBR boot record")
}

/// The parts of a device that may hold data, in order: start and end of each, in bytes.
fn data_extents(device: &Device) -> Result<Vec<(u64, u64)>> {
    let whole = vec![(0, device.size)];
    if device.kind == DeviceKind::Block {
        return Ok(whole);
    }
    let context = || format!("{}: looking for data", device.label());
    let mut extents = Vec::new();
    let mut at = 0;
    while at < device.size && extents.len() < EXTENTS_SCANNED_MAX {
        let start = match sys::seek_data(&device.file, at) {
            Ok(Some(start)) => start,
            Ok(None) => break,
            // A file system that can't tell.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(whole),
            Err(e) => return Err(Error::from_io(e, context())),
        };
        let end = sys::seek_hole(&device.file, start).map_err(|e| Error::from_io(e, context()))?;
        let end = end.unwrap_or(device.size).min(device.size);
        if start >= end {
            break;
        }
        extents.push((start, end));
        at = end;
    }
    Ok(extents)
}

/// What of the extents is read: all of it when it is little, else head, tail and samples spread evenly over the
/// data, as if the extents stood one after the other.
fn samples(extents: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let total: u64 = extents.iter().map(|(start, end)| end - start).sum();
    if total <= WHOLE_MAX {
        return extents.to_vec();
    }
    let mut wanted = vec![(0, HEAD), (total - TAIL, total)];
    let step = (total - HEAD - TAIL) / SAMPLES;
    wanted.extend((0..SAMPLES).map(|i| HEAD + i * step + (step - SAMPLE.min(step)) / 2).map(|at| (at, at + SAMPLE)));
    let mut found = Vec::new();
    for (from, to) in wanted {
        let mut passed = 0;
        for (start, end) in extents {
            let len = end - start;
            let (first, last) = (from.max(passed), to.min(passed + len));
            if first < last {
                found.push((start + first - passed, start + last - passed));
            }
            passed += len;
        }
    }
    found
}

/// Reads `len` bytes at `offset`, which the device has.
fn read(device: &Device, offset: u64, len: u64) -> Result<crate::dma_buf::DmaBuf> {
    let block = u64::from(device.block);
    let file = device.any_alignment();
    // Only a block device is read directly here: its size is a multiple of its block, so rounding stays inside.
    let aligned = crate::units::ByteRange::new(offset, len).map(|range| range.aligned_outward(block));
    let (from, to) = match aligned {
        Some(range) if device.direct && device.buffered.is_none() => (range.start(), range.end()),
        _ => (offset, offset + len),
    };
    let mut buffer = crate::dma_buf::DmaBuf::new((to - from) as usize);
    let context = || format!("{}: reading {len} bytes at offset {offset}", device.label());
    file.read_exact_at(&mut buffer, from).map_err(|e| match e.raw_os_error() {
        Some(errno) => Error::io(errno, context()),
        None => Error::from_io(e, context()),
    })?;
    buffer.narrow((offset - from) as usize, len as usize);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_much_and_of_little() {
        assert_eq!(samples(&[]), []);
        assert_eq!(samples(&[(0, WHOLE_MAX / 2), (WHOLE_MAX, WHOLE_MAX * 3 / 2)]).len(), 2);
        let tib = 1u64 << 40;
        for extents in [
            vec![(0, WHOLE_MAX + 1)],
            vec![(0, 8 * tib)],
            vec![(0, 512), (tib, 2 * tib), (3 * tib, 3 * tib + 512)],
            (0..1000).map(|i| (i << 30, (i << 30) + (1 << 20))).collect(),
        ] {
            let found = samples(&extents);
            for (start, end) in &found {
                assert!(start < end);
                assert!(extents.iter().any(|(from, to)| from <= start && end <= to), "{start}..{end} is a hole");
            }
            let read: u64 = found.iter().map(|(start, end)| end - start).sum();
            assert_eq!(read, HEAD + TAIL + SAMPLES * SAMPLE);
            assert_eq!(found[0].0, 0);
            let last = extents.last().unwrap().1;
            assert!(found.iter().any(|(_, end)| *end == last));
            // Nowhere a gap of more than twice the distance of samples.
            let total: u64 = extents.iter().map(|(start, end)| end - start).sum();
            let mut sorted: Vec<_> = found;
            sorted.sort_unstable();
            for pair in sorted.windows(2) {
                let gap: u64 = extents.iter().map(|(s, e)| e.min(&pair[1].0).saturating_sub(*s.max(&pair[0].1))).sum();
                assert!(gap <= 2 * total / SAMPLES, "{pair:?}");
            }
        }
    }

    /// Any bytes at all are looked at without a panic, from none to all that is read.
    #[test]
    fn identify_short_heads() {
        let mut head = vec![0xef; SIGNATURES_END as usize];
        (head[0x438], head[0x439]) = (0x53, 0xef);
        for len in (0..2048).chain(SIGNATURES_END as usize - 8..=SIGNATURES_END as usize) {
            identify(&head[..len], b"hydrantM");
        }
    }
}
