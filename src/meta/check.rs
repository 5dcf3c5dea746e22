//! Judges a metadata image offline: what is wrong, where, and which regions it costs.
//!
//! Pure over a function that reads one block; it streams, so that memory does not grow with the device. The verdict
//! on the superblocks is [`super::commit::recover`]'s, the one the daemon goes by.

use super::codec::{
    BLOCK_SIZE, BadSector, Block, CloneState, SECTOR_BYTES, SUPERBLOCK_COPIES, Superblock, UnverifiedSuperblock,
    ZoneCodec, metadata_size_needed, zone_block,
};
use super::commit::{CopyFound, OtherCopy, OtherState, Recovery, recover};
use super::hydrated_bits::first_bit;
use crate::error::Result;
use crate::units::{ByteSize, Generation, RegionRange, ZoneIndex};
use std::fmt;

/// The findings that a report lists at most; [`Report::nr_findings`] counts all.
pub const FINDINGS_MAX: usize = 1000;

/// Reads one block of the image by its number. What the device lacks of a block whose start it has reads as zeros.
pub type ReadBlock<'a> = dyn FnMut(u64) -> Result<Block> + 'a;

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The 4096-byte block, from the start of the device.
    pub block: u64,
    /// The 512-byte sector, from the start of the device; `None` when it is the whole block.
    pub sector: Option<u64>,
    /// The regions whose state is lost.
    pub regions: Option<RegionRange>,
    pub what: String,
}

impl Finding {
    fn block(block: u64, regions: Option<RegionRange>, what: String) -> Self {
        Self { block, sector: None, regions, what }
    }
    fn sector(bad: &BadSector) -> Self {
        let sectors_per_block = (BLOCK_SIZE / SECTOR_BYTES) as u64;
        let what = bad.fault.to_string();
        Self { block: bad.sector / sectors_per_block, sector: Some(bad.sector), regions: bad.regions, what }
    }
    /// Where it is, in bytes from the start of the device.
    pub fn offset(&self) -> u64 {
        self.sector.map_or(self.block * BLOCK_SIZE as u64, |sector| sector * SECTOR_BYTES as u64)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sector {
            Some(sector) => write!(f, "sector {sector}")?,
            None => write!(f, "block {}", self.block)?,
        }
        write!(f, " (byte offset {}): {}", self.offset(), self.what)?;
        match self.regions {
            Some(regions) => write!(f, "; it covers regions {} to {}", regions.first(), regions.end().0 - 1),
            None => Ok(()),
        }
    }
}

/// What the good part of the image says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Summary {
    pub superblock: Superblock,
    /// Of the sectors that are good.
    pub hydrated_count: u64,
    /// The newest on the image.
    pub generation: Generation,
}

/// The result of a check of metadata of ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// `None` when no superblock copy is usable: then nothing else can be judged.
    pub summary: Option<Summary>,
    /// The first [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    pub nr_findings: u64,
    /// What is odd and no damage: a crash may leave it. One line each.
    pub notes: Vec<String>,
}

impl Summary {
    /// Whether the superblock says that all is hydrated, and the bits say that it is not.
    pub fn contradicts_itself(&self) -> bool {
        self.superblock.state == CloneState::Complete && self.hydrated_count != self.superblock.geometry.nr_regions()
    }
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.nr_findings == 0
    }
    fn add(&mut self, finding: Finding) {
        self.nr_findings += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// Reads both superblock copies. `device_size` is in bytes; what the device lacks counts as zeros.
pub fn read_copies(read_block: &mut ReadBlock<'_>, device_size: u64) -> [CopyFound; 2] {
    let mut copy = |block: u64| {
        let is_there = device_size > block * BLOCK_SIZE as u64;
        let block = if is_there { read_block(block)? } else { [0; BLOCK_SIZE] };
        Ok(UnverifiedSuperblock::new(&block).classify())
    };
    [copy(0), copy(1)]
}

/// Checks a whole image. Never formatted, foreign or unsupported content is an error, not a report; so is
/// everything that [`Recovery::into_result`] calls an error but damage.
pub fn check(read_block: &mut ReadBlock<'_>, device_size: u64) -> Result<Report> {
    let mut report = Report { summary: None, findings: Vec::new(), nr_findings: 0, notes: Vec::new() };
    let recovered = match recover(read_copies(read_block, device_size)) {
        Recovery::Use(recovered) => recovered,
        Recovery::Damaged(what) => {
            report.add(Finding::block(0, None, what));
            return Ok(report);
        }
        Recovery::NeverFormatted => crate::bail!(ForeignData, "all zero where metadata begin: never formatted"),
        other => return Err(other.into_result().expect_err("what is left is an error")),
    };
    let superblock = recovered.superblock;
    let geometry = superblock.geometry;
    let (codec, needed) = (ZoneCodec::new(&superblock), metadata_size_needed(&geometry));
    let (mut hydrated_count, mut generation) = (0, superblock.generation);
    // Nothing was committed since the format, as far as the bitmap tells.
    let mut is_as_formatted = superblock.state == CloneState::Active;
    let mut in_bitmap = Vec::new();
    let mut nr_in_bitmap = 0;
    let mut add = |finding: Finding| {
        nr_in_bitmap += 1;
        if in_bitmap.len() < FINDINGS_MAX {
            in_bitmap.push(finding);
        }
    };
    let inside = (device_size / BLOCK_SIZE as u64).saturating_sub(SUPERBLOCK_COPIES).min(geometry.nr_zones());
    for zone in (0..inside).map(ZoneIndex) {
        let block = zone_block(zone);
        match read_block(block) {
            Ok(bytes) => {
                let decoded = codec.decode(zone, &bytes);
                decoded.bad.iter().for_each(|bad| add(Finding::sector(bad)));
                is_as_formatted &= decoded.generation == superblock.generation;
                generation = generation.max(decoded.generation);
                hydrated_count += decoded.bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
            }
            Err(error) => add(Finding::block(block, Some(geometry.zone_regions(zone)), error.to_string())),
        }
    }
    if inside < geometry.nr_zones() {
        let first = geometry.zone_regions(ZoneIndex(inside)).first();
        let last = geometry.zone_regions(ZoneIndex(geometry.nr_zones() - 1));
        let (has, needs) = (ByteSize(device_size), ByteSize(needed));
        let what = format!("the device ends here: it has {has}, {needs} ({needed} bytes) are needed");
        add(Finding::block(zone_block(ZoneIndex(inside)), RegionRange::between(first, last.end()), what));
    }
    if let Some(OtherCopy { index, state }) = recovered.other {
        // Copy A is always written first, and a format ends with copy B: no crash leaves anything else.
        let by_crash = match state {
            OtherState::Older => index == 1,
            OtherState::Empty => index == 1 && is_as_formatted,
            OtherState::Lost => false,
        };
        for note in recovered.notes {
            match by_crash {
                true => report.notes.push(note),
                false => report.add(Finding::block(index as u64, None, note)),
            }
        }
    }
    let nr_regions = geometry.nr_regions();
    let bits_are_good = nr_in_bitmap == 0;
    report.nr_findings += nr_in_bitmap;
    report.findings.extend(in_bitmap);
    report.findings.truncate(FINDINGS_MAX);
    if superblock.state == CloneState::Complete && bits_are_good && hydrated_count != nr_regions {
        let what = format!("marked complete, but {hydrated_count} of {nr_regions} regions are hydrated");
        report.add(Finding::block(0, None, what));
    }
    report.summary = Some(Summary { superblock, hydrated_count, generation });
    Ok(report)
}

/// The hydrated runs of an image, as (first, last) region, both inclusive, merged across zones: read as they are asked
/// for. For an image that [`check`] found clean; damage met all the same is an error, and the last item.
pub struct HydratedRuns<'a, 'r> {
    read_block: &'a mut ReadBlock<'r>,
    superblock: Superblock,
    codec: ZoneCodec,
    /// The zone to load next; `bits` are those of the one before.
    zone: u64,
    bits: Box<[u64]>,
    first_region: u64,
    /// The next bit of `bits` to look at; at `regions` the zone is done.
    at: usize,
    regions: usize,
    /// A run that may go on in the next zone.
    open: Option<(u64, u64)>,
    ended: bool,
}

impl<'a, 'r> HydratedRuns<'a, 'r> {
    pub fn new(superblock: &Superblock, read_block: &'a mut ReadBlock<'r>) -> Self {
        Self {
            read_block,
            codec: ZoneCodec::new(superblock),
            superblock: superblock.clone(),
            zone: 0,
            bits: Box::default(),
            first_region: 0,
            at: 0,
            regions: 0,
            open: None,
            ended: false,
        }
    }

    fn load(&mut self, zone: ZoneIndex) -> Result<()> {
        let decoded = self.codec.decode(zone, &(self.read_block)(zone_block(zone))?);
        if let Some(bad) = decoded.bad.first() {
            crate::bail!(Damaged, "damaged: {bad}; look with `hydrant meta check`");
        }
        self.bits = decoded.bits;
        let regions = self.superblock.geometry.zone_regions(zone);
        (self.at, self.regions, self.first_region) = (0, regions.count() as usize, regions.first().0);
        Ok(())
    }

    /// The next run of set bits of the zone that is loaded.
    fn next_in_zone(&mut self) -> Option<(u64, u64)> {
        let first = first_bit(&self.bits[..], self.at, self.regions, true);
        let end = first_bit(&self.bits[..], first, self.regions, false);
        self.at = end;
        let region = |bit: usize| self.first_region + bit as u64;
        (first < end).then(|| (region(first), region(end - 1)))
    }
}

impl Iterator for HydratedRuns<'_, '_> {
    type Item = Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            if let Some((first, last)) = self.next_in_zone() {
                match self.open {
                    Some((open_first, open_last)) if open_last + 1 == first => self.open = Some((open_first, last)),
                    None => self.open = Some((first, last)),
                    Some(done) => {
                        self.open = Some((first, last));
                        return Some(Ok(done));
                    }
                }
            } else if self.zone < self.superblock.geometry.nr_zones() {
                if let Err(error) = self.load(ZoneIndex(self.zone)) {
                    self.ended = true;
                    return Some(Err(error));
                }
                self.zone += 1;
            } else {
                self.ended = true;
                return self.open.take().map(Ok);
            }
        }
        None
    }
}

#[cfg(test)]
pub(crate) mod tests;
