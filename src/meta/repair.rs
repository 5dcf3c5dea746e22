//! What can be mended in damaged metadata, and what has to be assumed for it.
//!
//! A superblock copy is made from the other one. A damaged bitmap sector says nothing any more: its regions may be
//! hydrated or not, and both guesses can lose data. Taken for unhydrated, what was written to them is read from the
//! source again, as it was before; taken for hydrated, what was never copied is read from the destination. So this
//! decides nothing by itself but what is proven:
//! * in a clone that is marked complete every region is hydrated: that mark is only written when all bits are durable;
//! * a sector without regions has no bits;
//! * a sector of which only such bytes are damaged as are known anyway ([`ZoneCodec::restore`]) still has its bits.
//!
//! Pure: [`survey`] looks, [`Survey::decide`] judges, [`Decided::mend`] makes the blocks to be written. Bits of good
//! sectors never change.

use super::check::{ReadBlock, read_copies};
use super::codec::{
    BLOCK_SIZE, Block, Classified, CloneState, DecodedZone, SECTORS_PER_BLOCK, SUPERBLOCK_COPIES, Superblock,
    UNKNOWN_DATA, ZoneCodec, metadata_size_needed, zone_block,
};
use super::commit::{COPY_NAMES, Recovery, recover};
use super::runs::set_bits;
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteRange, ByteSize, Generation, Geometry, RegionRange, ZoneIndex};
use std::collections::BTreeMap;
use std::fmt;

/// What is wrong with a superblock copy of a generation before the other's.
const OLDER: &str = "is older";
/// Sectors that a refusal names.
const SECTORS_NAMED_MAX: usize = 16;
/// Damaged sectors that are mended at most: with more, a dump is the better start.
pub const SECTORS_MAX: usize = 1 << 16;

/// What to take the regions of damaged sectors for.
#[derive(Clone, Default, Debug)]
pub struct Assumptions {
    /// By the number of the sector; true is hydrated.
    pub by_sector: BTreeMap<u64, bool>,
    /// All others.
    pub others: Option<bool>,
    /// What is neither said nor known is taken for unhydrated.
    pub force: bool,
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
    /// Where the regions are in the clone.
    pub bytes: Option<ByteRange>,
    /// Its bits are known all the same.
    pub is_proven: bool,
}

impl Damaged {
    fn new(geometry: &Geometry, zone: ZoneIndex, sector: u64, what: String, regions: Option<RegionRange>) -> Self {
        let bytes = regions.map(|regions| geometry.bytes_of(regions));
        Self { zone, sector, what, regions, bytes, is_proven: false }
    }

    fn has_known_bits(&self) -> bool {
        self.is_proven && self.regions.is_some()
    }
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: {}; ", self.sector, self.what)?;
        match (self.regions, self.bytes) {
            (Some(regions), Some(bytes)) => {
                write!(f, "regions {} to {}, ", regions.first(), regions.end().0 - 1)?;
                write!(f, "bytes {} to {} of the clone", bytes.start(), bytes.end() - 1)
            }
            _ => f.write_str("no regions"),
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

/// Looks at everything. What can't be mended from itself is an error. `force`: what is known as something else and stands
/// in place of one superblock copy may be overwritten.
pub fn survey(read_block: &mut ReadBlock<'_>, device_size: u64, force: bool) -> Result<Survey> {
    let mut copies = read_copies(read_block, device_size);
    if let [Ok(Classified::Valid(a)), Ok(Classified::Valid(b))] = &copies
        && a.uuid != b.uuid
    {
        // Sectors of the bitmap are of one clone only.
        let mut fits = |superblock: &Superblock| {
            let is_there = device_size >= metadata_size_needed(&superblock.geometry);
            let zone = is_there.then(|| read_block(zone_block(ZoneIndex(0))).ok()).flatten();
            zone.is_some_and(|block| {
                ZoneCodec::new(superblock).decode(ZoneIndex(0), &block).bad.len() < SECTORS_PER_BLOCK
            })
        };
        let wrong = match (fits(a), fits(b)) {
            (true, false) => Some(1),
            (false, true) => Some(0),
            _ => None,
        };
        if let Some(wrong) = wrong {
            copies[wrong] = Ok(Classified::Damaged("it is of another clone than the bitmap".into()));
        }
    }
    let is_valid = |copy: &_| matches!(copy, Ok(Classified::Valid(_)));
    if copies.iter().any(is_valid) {
        for (copy, name) in copies.iter_mut().zip(COPY_NAMES) {
            match copy {
                Ok(Classified::Foreign(what)) if force => *copy = Ok(Classified::Damaged(format!("it is {what}"))),
                Ok(Classified::Foreign(what)) if *what != UNKNOWN_DATA => bail!(
                    Damaged,
                    "{what} is in place of superblock copy {name}, while the other copy is valid: somebody else has \
                     written here; nothing was changed: --force overwrites it"
                ),
                _ => {}
            }
        }
    }
    let recovered = match recover(copies.clone()) {
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
    let mut bad_copies = Vec::new();
    for (copy, found) in copies.iter().enumerate() {
        let what = match found {
            Ok(Classified::Valid(found)) if *found == superblock => continue,
            Ok(Classified::Valid(_)) => OLDER.to_string(),
            Ok(Classified::Empty) => "is all zero".into(),
            Ok(Classified::Damaged(what) | Classified::Unsupported(what)) => format!("is damaged: {what}"),
            Ok(Classified::Foreign(what)) => format!("is {what}"),
            Err(error) => format!("is unreadable: {error}"),
        };
        bad_copies.push((copy, what));
    }
    let mut survey = Survey {
        generation: superblock.generation,
        superblock,
        copies: bad_copies,
        damaged: Vec::new(),
        hydrated_count: 0,
    };
    let codec = ZoneCodec::new(&survey.superblock);
    for zone in (0..geometry.nr_zones()).map(ZoneIndex) {
        let first_sector = zone_block(zone) * SECTORS_PER_BLOCK as u64;
        match read_block(zone_block(zone)) {
            Ok(block) => {
                let bad = codec.decode(zone, &block).bad;
                let restored = restored(&codec, zone, block);
                survey.generation = survey.generation.max(restored.generation);
                survey.hydrated_count += restored.bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                survey.damaged.extend(bad.iter().map(|bad| Damaged {
                    is_proven: !restored.bad.iter().any(|still| still.sector == bad.sector),
                    ..Damaged::new(&geometry, zone, bad.sector, bad.fault.to_string(), bad.regions)
                }));
            }
            Err(error) => survey.damaged.extend((0..SECTORS_PER_BLOCK).map(|index| {
                let (sector, what) = (first_sector + index as u64, format!("unreadable: {error}"));
                Damaged::new(&geometry, zone, sector, what, codec.sector_regions(zone, index))
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

/// What can be known of a block.
fn restored(codec: &ZoneCodec, zone: ZoneIndex, mut block: Block) -> DecodedZone {
    codec.restore(zone, &mut block);
    codec.decode(zone, &block)
}

/// `1 damaged sector (20)`, `40 damaged sectors (16, 17, 20 ... and 24 more)`.
fn sectors_words(sectors: &[u64]) -> String {
    let named: Vec<String> = sectors.iter().take(SECTORS_NAMED_MAX).map(u64::to_string).collect();
    let named = named.join(", ");
    match (sectors.len(), sectors.len().saturating_sub(SECTORS_NAMED_MAX)) {
        (1, _) => format!("1 damaged sector ({named})"),
        (all, 0) => format!("{all} damaged sectors ({named})"),
        (all, more) => format!("{all} damaged sectors ({named} and {more} more)"),
    }
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

    /// How many regions are known to be hydrated: of good sectors, and of those whose bits are proven.
    pub fn hydrated_count(&self) -> u64 {
        self.hydrated_count
    }

    /// Marked complete, with good sectors that say otherwise.
    fn contradicts_itself(&self) -> bool {
        let lost = self.damaged.iter().filter(|damaged| !damaged.is_proven);
        let lost: u64 = lost.filter_map(|damaged| damaged.regions).map(RegionRange::count).sum();
        let (all, complete) = (self.superblock.geometry.nr_regions(), self.superblock.state == CloneState::Complete);
        complete && self.hydrated_count + lost < all
    }

    /// What is wrong, one line each.
    pub fn describe(&self) -> Vec<String> {
        let copies = self.copies.iter().map(|(copy, what)| format!("superblock copy {} {what}", COPY_NAMES[*copy]));
        let damaged = self.damaged.iter().map(|damaged| match damaged.has_known_bits() {
            true => format!("{damaged}: its bits are intact"),
            false => damaged.to_string(),
        });
        let mut lines: Vec<String> = copies.chain(damaged).collect();
        if self.contradicts_itself() {
            let (hydrated, all) = (self.hydrated_count, self.superblock.geometry.nr_regions());
            lines.push(format!("marked complete, but {hydrated} of {all} regions are hydrated"));
        }
        lines
    }

    /// Judges whether everything that has to be assumed is. Else says what nobody knows.
    pub fn decide(self, assume: &Assumptions) -> Result<Decided> {
        for sector in assume.by_sector.keys() {
            match self.damaged.iter().find(|damaged| damaged.sector == *sector) {
                None => bail!(Usage, "--assume: sector {sector} is not damaged"),
                Some(damaged) if damaged.has_known_bits() => {
                    bail!(Usage, "--assume: the bits of sector {sector} are known, nothing is to be assumed")
                }
                Some(_) => {}
            }
        }
        let contradiction = self.contradicts_itself();
        let complete = self.superblock.state == CloneState::Complete && !contradiction;
        if complete && (assume.others == Some(false) || assume.by_sector.values().any(|hydrated| !hydrated)) {
            bail!(Usage, "--assume unhydrated: the clone is marked complete, every region of it is hydrated");
        }
        let (mut unknown, mut regions) = (Vec::new(), 0);
        let mut hydrated = Vec::with_capacity(self.damaged.len());
        for damaged in &self.damaged {
            let Some(range) = damaged.regions.filter(|_| !damaged.is_proven) else {
                hydrated.push(false);
                continue;
            };
            let said = assume.by_sector.get(&damaged.sector).copied().or(assume.others);
            let assumed = said.or(complete.then_some(true)).or(assume.force.then_some(false));
            if assumed.is_none() {
                unknown.push(damaged.sector);
                regions += range.count();
            }
            hydrated.push(assumed.unwrap_or(false));
        }
        if !unknown.is_empty() {
            let sectors = sectors_words(&unknown);
            bail!(
                Damaged,
                "nobody knows which of the {regions} regions of {sectors} were hydrated; nothing was \
                 changed: choose with --assume (see --help), or --force: all of them are read from the source again, what \
                 was written to them is lost"
            );
        }
        if contradiction && assume.others.is_none() && !assume.force {
            bail!(
                Damaged,
                "nobody knows whether the mark (all is hydrated) or the bits are right; nothing was changed: choose \
                 with --assume hydrated, to set all bits, or --assume unhydrated (or --force), to remove the mark"
            );
        }
        let set_all = contradiction && assume.others == Some(true);
        let is_unhydrated = |damaged: &Damaged| damaged.regions.is_some() && !damaged.is_proven;
        let any_unhydrated = hydrated.iter().zip(&self.damaged).any(|(hydrated, d)| !hydrated && is_unhydrated(d));
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
                _ if damaged.has_known_bits() => {
                    format!("{damaged}: its bits are intact; written again, nothing is lost")
                }
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
        // One that is only older says nothing that the newer does not.
        let is_lost = survey.copies.iter().any(|(_, what)| what != OLDER);
        if is_lost && self.state == CloneState::Active && self.is_all_hydrated() {
            lines.push(
                "every region is hydrated; whether the clone was marked complete can't be proven: it is not, until a start of \
                 it marks it again by itself"
                    .into(),
            );
        }
        lines
    }

    /// Whether every bit is set when this is done.
    fn is_all_hydrated(&self) -> bool {
        let taken = self.survey.damaged.iter().zip(&self.hydrated).filter(|(_, hydrated)| **hydrated);
        let taken: u64 = taken.filter_map(|(damaged, _)| damaged.regions).map(RegionRange::count).sum();
        self.set_all || self.survey.hydrated_count + taken == self.survey.superblock.geometry.nr_regions()
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
            let mut bits = restored(&codec, zone, old).bits;
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
