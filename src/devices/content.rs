//! What a device holds: enough to stop somebody who names the wrong disk.
//!
//! Read-only. Well-known signatures first, at the places their formats give; then samples: head, tail and places
//! spread between, of what is allocated. `None` means "everything looked at is zero", not "everything is zero".

use super::{Device, DeviceKind, Role, sys};
use crate::dma_buf::is_zero;
use crate::error::{Error, Result};
use crate::meta::codec::{BLOCK_SIZE, is_of_unfinished_format};
use crate::signatures::{SIGNATURES_END, identify};
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

/// Says what a device holds; `None` when everything looked at is zero. Metadata that a format has begun and not finished
/// (its process was killed) are nothing, too: no bit of them was ever set.
pub fn contents(device: &Device) -> Result<Option<String>> {
    let head = read(device, 0, SIGNATURES_END.min(device.size))?;
    if let Some(found) = identify(&head) {
        return Ok(Some(found.into()));
    }
    let extents = data_extents(device)?;
    for (start, end) in samples(&extents) {
        let mut at = start;
        while at < end {
            let bytes = read(device, at, CHUNK.min(end - at))?;
            if !is_zero(&bytes) {
                if device.role == Role::Metadata && holds_unfinished_format(device, &extents)? {
                    log::info!("{} holds a format that was interrupted, and nothing else", device.label());
                    return Ok(None);
                }
                let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(0) as u64;
                return Ok(Some(format!("data at offset {}", at + first)));
            }
            at += bytes.len() as u64;
        }
    }
    Ok(None)
}

/// Whether all of it, not only samples, is what a format leaves that was interrupted.
fn holds_unfinished_format(device: &Device, extents: &[(u64, u64)]) -> Result<bool> {
    if extents.len() == EXTENTS_SCANNED_MAX {
        return Ok(false);
    }
    const BLOCK: u64 = BLOCK_SIZE as u64;
    for (start, end) in extents {
        // Holes are zeros: it does not matter how much of them is read.
        let mut at = start / BLOCK * BLOCK;
        while at < *end {
            let len = CHUNK.min(device.size - at);
            let bytes = read(device, at, len)?;
            let (blocks, rest) = bytes.as_chunks::<BLOCK_SIZE>();
            let all = (at / BLOCK..).zip(blocks).all(|(index, block)| is_of_unfinished_format(index, block));
            if !all || !is_zero(rest) {
                return Ok(false);
            }
            at += len;
        }
    }
    Ok(true)
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
}
