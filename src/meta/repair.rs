//! What can be mended in damaged metadata, and what has to be assumed for it.
//!
//! A superblock copy is made from the other one. A damaged bitmap sector says nothing any more: its regions may be
//! hydrated or not, and both guesses can lose data. Taken for unhydrated, what was written to them is read from the
//! source again, as it was before; taken for hydrated, what was never copied is read from the destination. So this
//! decides nothing by itself, with one exception: in a clone that is marked complete every region is hydrated, because
//! that mark is only written when all bits are durable.
//!
//! Pure: [`survey`] looks, [`Survey::decide`] judges, [`Decided::mend`] makes the blocks to be written. Bits of good
//! sectors never change.

use super::check::{ReadBlock, check_superblocks};
use super::codec::{
    BLOCK_SIZE, Block, Classified, CloneState, SECTORS_PER_BLOCK, SUPERBLOCK_COPIES, Superblock, UnverifiedSuperblock,
    ZoneCodec, metadata_size_needed, zone_block,
};
use super::commit::{COPY_NAMES, Recovery};
use super::runs::set_bits;
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteSize, Generation, RegionRange, ZoneIndex};
use std::collections::BTreeMap;
use std::fmt;

/// Damaged sectors that are mended at most: with more, a dump is the better start.
pub const SECTORS_MAX: usize = 1 << 16;

/// What to take the regions of damaged sectors for.
#[derive(Clone, Default, Debug)]
pub struct Assumptions {
    /// By the number of the sector; true is hydrated.
    pub by_sector: BTreeMap<u64, bool>,
    /// All others.
    pub others: Option<bool>,
}

/// A sector that can't be trusted.
#[derive(Clone, Debug)]
pub struct Damaged {
    pub zone: ZoneIndex,
    /// In 512-byte sectors from the start of the device.
    pub sector: u64,
    pub what: String,
    /// `None`: it holds no bits, and nothing is lost with it.
    pub regions: Option<RegionRange>,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: {}; ", self.sector, self.what)?;
        match self.regions {
            Some(regions) => write!(f, "regions {} to {}", regions.first(), regions.end().0 - 1),
            None => f.write_str("no regions"),
        }
    }
}

/// What is wrong with metadata whose superblock can be told.
pub struct Survey {
    superblock: Superblock,
    /// The copies that are to be written again, and why.
    copies: Vec<(usize, String)>,
    damaged: Vec<Damaged>,
    /// The newest on the medium.
    generation: Generation,
    hydrated_count: u64,
}

/// Looks at everything. What can't be mended from itself is an error.
pub fn survey(read_block: &mut ReadBlock<'_>, device_size: u64) -> Result<Survey> {
    let recovered = match check_superblocks(read_block, device_size) {
        Recovery::Use(recovered) => recovered,
        Recovery::NeverFormatted => bail!(ForeignData, "all zero where metadata begin: never formatted"),
        Recovery::Damaged(what) => bail!(
            Damaged,
            "can't be repaired: {what}; make it again from a dump with `hydrant meta restore`, if there is one"
        ),
        other => {
            return Err(other.into_result().err().unwrap_or_else(|| Error::new(ErrorKind::Damaged, "no superblock")));
        }
    };
    let superblock = recovered.superblock;
    let geometry = superblock.geometry;
    let needed = metadata_size_needed(&geometry);
    if device_size < needed {
        bail!(
            TooSmall,
            "can't be repaired where it is: the device has {}, {} ({needed} bytes) are needed; copy it to a larger one",
            ByteSize(device_size),
            ByteSize(needed)
        );
    }
    let mut copies = Vec::new();
    for copy in 0..SUPERBLOCK_COPIES {
        let found = read_block(copy).map(|block| UnverifiedSuperblock::new(&block).classify());
        let what = match found {
            Ok(Classified::Valid(found)) if found == superblock => continue,
            Ok(Classified::Valid(_)) => "is older".to_string(),
            Ok(Classified::Empty) => "is all zero".into(),
            Ok(Classified::Damaged(what) | Classified::Unsupported(what)) => format!("is damaged: {what}"),
            Ok(Classified::Foreign(what)) => format!("is {what}"),
            Err(error) => format!("is unreadable: {error}"),
        };
        copies.push((copy as usize, what));
    }
    let mut survey =
        Survey { generation: superblock.generation, superblock, copies, damaged: Vec::new(), hydrated_count: 0 };
    let codec = ZoneCodec::new(&survey.superblock);
    for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
        let first_sector = zone_block(zone) * SECTORS_PER_BLOCK as u64;
        match read_block(zone_block(zone)) {
            Ok(block) => {
                let decoded = codec.decode(zone, &block);
                survey.generation = survey.generation.max(decoded.generation);
                survey.hydrated_count += decoded.bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                survey.damaged.extend(decoded.bad.iter().map(|bad| Damaged {
                    zone,
                    sector: bad.sector,
                    what: bad.fault.to_string(),
                    regions: bad.regions,
                }));
            }
            Err(error) => survey.damaged.extend((0..SECTORS_PER_BLOCK).map(|index| Damaged {
                zone,
                sector: first_sector + index as u64,
                what: format!("unreadable: {error}"),
                regions: codec.sector_regions(zone, index),
            })),
        }
        if survey.damaged.len() > SECTORS_MAX {
            bail!(
                Damaged,
                "can't be repaired: more than {SECTORS_MAX} sectors are damaged; make it again from a dump with \
                 `hydrant meta restore`, if there is one"
            );
        }
    }
    Ok(survey)
}

/// What is going to be done.
pub struct Decided {
    survey: Survey,
    /// For each damaged sector; false where it holds no bits.
    hydrated: Vec<bool>,
    /// To be written to both copies.
    state: CloneState,
    /// Every bit is to be set, in all zones: of a clone that is marked complete.
    set_all: bool,
}

impl Survey {
    pub fn is_clean(&self) -> bool {
        self.copies.is_empty() && self.damaged.is_empty() && !self.contradicts_itself()
    }

    /// Marked complete, with good sectors that say otherwise.
    fn contradicts_itself(&self) -> bool {
        let lost: u64 = self.damaged.iter().filter_map(|damaged| damaged.regions).map(RegionRange::count).sum();
        let (all, complete) = (self.superblock.geometry.nr_regions(), self.superblock.state == CloneState::Complete);
        complete && self.hydrated_count + lost < all
    }

    /// What is wrong, one line each.
    pub fn describe(&self) -> Vec<String> {
        let copies = self.copies.iter().map(|(copy, what)| format!("superblock copy {} {what}", COPY_NAMES[*copy]));
        let mut lines: Vec<String> = copies.chain(self.damaged.iter().map(Damaged::to_string)).collect();
        if self.contradicts_itself() {
            let (hydrated, all) = (self.hydrated_count, self.superblock.geometry.nr_regions());
            lines.push(format!("marked complete, but {hydrated} of {all} regions are hydrated"));
        }
        lines
    }

    /// Judges whether everything that has to be assumed is. Else says what nobody knows.
    pub fn decide(self, assume: &Assumptions) -> Result<Decided> {
        if let Some(sector) = assume.by_sector.keys().find(|sector| !self.damaged.iter().any(|d| d.sector == **sector))
        {
            bail!(Usage, "--assume: sector {sector} is not damaged");
        }
        let contradiction = self.contradicts_itself();
        let complete = self.superblock.state == CloneState::Complete && !contradiction;
        if complete && (assume.others == Some(false) || assume.by_sector.values().any(|hydrated| !hydrated)) {
            bail!(Usage, "--assume unhydrated: the clone is marked complete, every region of it is hydrated");
        }
        let (mut unknown, mut regions) = (0, 0);
        let mut hydrated = Vec::with_capacity(self.damaged.len());
        for damaged in &self.damaged {
            let Some(range) = damaged.regions else {
                hydrated.push(false);
                continue;
            };
            let assumed = assume.by_sector.get(&damaged.sector).copied().or(assume.others).or(complete.then_some(true));
            if assumed.is_none() {
                (unknown, regions) = (unknown + 1, regions + range.count());
            }
            hydrated.push(assumed.unwrap_or(false));
        }
        if unknown > 0 {
            bail!(
                Damaged,
                "nobody knows which of the {regions} regions of {unknown} damaged sectors were hydrated; nothing was \
                 changed: choose with --assume (see --help)"
            );
        }
        if contradiction && assume.others.is_none() {
            bail!(
                Damaged,
                "nobody knows whether the mark (all is hydrated) or the bits are right; nothing was changed: choose \
                 with --assume hydrated, to set all bits, or --assume unhydrated, to remove the mark"
            );
        }
        let set_all = contradiction && assume.others == Some(true);
        let any_unhydrated =
            hydrated.iter().zip(&self.damaged).any(|(hydrated, damaged)| !hydrated && damaged.regions.is_some());
        let state = match contradiction && (!set_all || any_unhydrated) {
            true => CloneState::Active,
            false => self.superblock.state,
        };
        Ok(Decided { hydrated, state, set_all: set_all && !any_unhydrated, survey: self })
    }
}

impl Decided {
    /// What is going to be done, one line each.
    pub fn describe(&self) -> Vec<String> {
        let survey = &self.survey;
        let mut lines = Vec::new();
        for (damaged, hydrated) in survey.damaged.iter().zip(&self.hydrated) {
            lines.push(match (damaged.regions, hydrated) {
                (None, _) => format!("{damaged}: written again, nothing is lost"),
                (Some(_), true) => {
                    format!("{damaged}: taken for hydrated, they are read from the destination as it is")
                }
                (Some(_), false) => {
                    format!("{damaged}: taken for unhydrated, they are read from the source and copied again")
                }
            });
        }
        if self.set_all {
            lines.push("marked complete: all bits are set".into());
        }
        if self.state != survey.superblock.state {
            lines.push("the mark that all is hydrated is removed".into());
        }
        for (copy, what) in &survey.copies {
            let (name, other) = (COPY_NAMES[*copy], COPY_NAMES[1 - *copy]);
            lines.push(format!("superblock copy {name} {what}: written again from copy {other}"));
        }
        lines
    }

    /// How long the metadata are, in bytes.
    pub fn metadata_size(&self) -> u64 {
        metadata_size_needed(&self.survey.superblock.geometry)
    }

    /// Makes the blocks of the bitmap and hands them to `write`, by their number; they are to be flushed before the
    /// superblocks are written.
    pub fn mend(&self, read_block: &mut ReadBlock<'_>, write: &mut dyn FnMut(u64, &Block) -> Result<()>) -> Result<()> {
        let superblock = &self.survey.superblock;
        let geometry = superblock.geometry;
        let codec = ZoneCodec::new(superblock);
        let Some(generation) = self.survey.generation.0.checked_add(1).map(Generation) else {
            bail!(Damaged, "the generation can't grow any more");
        };
        let mut by_zone: BTreeMap<u64, Vec<(&Damaged, bool)>> = BTreeMap::new();
        for (damaged, hydrated) in self.survey.damaged.iter().zip(&self.hydrated) {
            by_zone.entry(damaged.zone.0).or_default().push((damaged, *hydrated));
        }
        let zones: Box<dyn Iterator<Item = u64>> = match self.set_all {
            true => Box::new(0..geometry.nr_zones()),
            false => Box::new(by_zone.keys().copied()),
        };
        for zone in zones.map(ZoneIndex) {
            let damaged = by_zone.get(&zone.0).map_or(&[][..], |damaged| &damaged[..]);
            // A block that can't be read at all has eight damaged sectors.
            let old = read_block(zone_block(zone)).unwrap_or([0; BLOCK_SIZE]);
            let mut bits = codec.decode(zone, &old).bits;
            let regions = geometry.zone_regions(zone);
            let mut set = |range: RegionRange| {
                let first = regions.first().0;
                set_bits(&mut bits, range.first().0 - first, range.end().0 - 1 - first);
            };
            damaged.iter().filter(|(_, hydrated)| *hydrated).filter_map(|(d, _)| d.regions).for_each(&mut set);
            if self.set_all {
                set(regions);
            }
            let mut block = [0; BLOCK_SIZE];
            codec.encode(zone, generation, &bits, &mut block);
            write(zone_block(zone), &block)?;
        }
        Ok(())
    }

    /// The superblock copies to be written, in this order, with a flush after each.
    pub fn superblocks(&self) -> Vec<(u64, Block)> {
        let mut superblock = self.survey.superblock.clone();
        let mut copies: Vec<u64> = self.survey.copies.iter().map(|(copy, _)| *copy as u64).collect();
        if self.state != superblock.state {
            // The damaged one first: the other is good until then.
            copies.extend(
                (0..SUPERBLOCK_COPIES).filter(|copy| !self.survey.copies.iter().any(|(c, _)| *c as u64 == *copy)),
            );
            superblock.state = self.state;
            superblock.generation = Generation(self.survey.generation.0.saturating_add(1));
        }
        copies.into_iter().map(|copy| (copy, superblock.encode())).collect()
    }
}

#[cfg(test)]
mod tests;
