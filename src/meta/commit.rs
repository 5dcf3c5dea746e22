//! Recovery verdicts: what two superblock copies amount to, and whether they belong to the devices given.
//!
//! Pure: shared by the daemon at start, its dry run and the offline tools, so that all of them say the same.
//! The order of a commit, and the argument why it is safe, are in [`super`].

use super::codec::{
    Classified, DESTINATION_NONE_YET, DESTINATION_UNKNOWN, SourceFingerprint, Superblock, UNKNOWN_DATA,
};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteSize, RegionSize};
use std::cmp::Ordering;
use std::fmt;

/// The names of the copies, for people.
pub const COPY_NAMES: [char; 2] = ['A', 'B'];

/// What was found at the place of a copy, or why it could not be read.
pub type CopyFound = Result<Classified>;

/// The superblock to go by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    pub superblock: Superblock,
    /// What is not as it should be with the other copy; one line each, for the log.
    pub notes: Vec<String>,
    /// The other copy, when it is not the same.
    pub other: Option<OtherCopy>,
}

/// A superblock copy that is not as it should be, beside a valid one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OtherCopy {
    /// 0 or 1.
    pub index: usize,
    pub state: OtherState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OtherState {
    /// Valid, of an earlier time: a crash came between writing the two.
    Older,
    /// All zero: a format did not finish, or it is lost.
    Empty,
    /// Damaged or unreadable: no crash does that.
    Lost,
}

impl Recovered {
    /// Whether a copy is damaged or unreadable.
    pub fn is_copy_lost(&self) -> bool {
        self.other.is_some_and(|other| other.state == OtherState::Lost)
    }
}

/// The verdict on both copies.
#[derive(Clone, Debug)]
pub enum Recovery {
    Use(Box<Recovered>),
    /// Both copies are all zero: never formatted, or a format did not finish.
    NeverFormatted,
    /// Not to be trusted, with the reason.
    Damaged(String),
    /// Of a version or with features that this build does not know.
    Unsupported(String),
    /// Something else is there.
    Foreign(&'static str),
    /// No copy could be read that says more.
    Unreadable(Error),
}

impl Recovery {
    /// The superblock; `None` when there is none yet; else an error that says what is there and what to do.
    pub fn into_result(self) -> Result<Option<Recovered>> {
        let (kind, text) = match self {
            Recovery::Use(recovered) => return Ok(Some(*recovered)),
            Recovery::NeverFormatted => return Ok(None),
            Recovery::Unreadable(error) => return Err(error.within("neither superblock copy is usable")),
            Recovery::Damaged(what) => (ErrorKind::Damaged, format!("damaged: {what}; look with `hydrant meta check`")),
            Recovery::Unsupported(what) => (ErrorKind::Unsupported, format!("{what}; use the hydrant that made it")),
            Recovery::Foreign(what) => (ErrorKind::ForeignData, format!("holds {what}, no metadata of hydrant")),
        };
        Err(Error::new(kind, text))
    }
}

/// Whether both can be of one clone. Its size, and what it takes from its source, change when it grows: the newer one is
/// larger then. What was not known when the metadata were made, and what a forced start records anew
/// ([`devices_to_record`]), may be in one copy only: one is written after the other.
fn same_clone(a: &Superblock, b: &Superblock) -> bool {
    let division = |s: &Superblock| (s.geometry.region_size(), s.geometry.regions_per_zone());
    let immutable = |s: &Superblock| (s.uuid, division(s), s.created_unix_s);
    let same_source = a.source == b.source || !a.source.is_known() || !b.source.is_known();
    let (a_size, b_size) = (a.geometry.size(), b.geometry.size());
    let may_follow = match a.generation.cmp(&b.generation) {
        Ordering::Equal => a_size == b_size && same_source && fits(a.destination_id, b.destination_id),
        Ordering::Less => a_size <= b_size,
        Ordering::Greater => a_size >= b_size,
    };
    immutable(a) == immutable(b) && may_follow
}

/// Whether two destination ids may be of the same one.
fn fits(a: [u8; 16], b: [u8; 16]) -> bool {
    let open = |id| [DESTINATION_UNKNOWN, DESTINATION_NONE_YET].contains(&id);
    a == b || open(a) || open(b)
}

/// What the superblock is to say of source and destination after a start with these was admitted: what was not known
/// before, and what a user has vouched for that is something else (so that the one before is refused from then on).
/// `None`: it says that already. What is not known now does not replace what was.
pub fn devices_to_record(
    superblock: &Superblock,
    source: SourceFingerprint,
    destination_id: [u8; 16],
) -> Option<(SourceFingerprint, [u8; 16])> {
    let before = (superblock.source, superblock.destination_id);
    let source = if source.is_known() { source } else { before.0 };
    let destination_id = match fits(destination_id, before.1) && before.1 != DESTINATION_NONE_YET {
        true => before.1,
        false => destination_id,
    };
    Some((source, destination_id)).filter(|now| *now != before)
}

/// Judges the two copies. A valid copy counts beside a missing, damaged or unreadable one, bytes that nobody knows
/// included; a newer format or something known in either place does not: somebody else has written here.
pub fn recover(copies: [CopyFound; 2]) -> Recovery {
    use Classified::*;
    for (copy, name) in copies.iter().zip(COPY_NAMES) {
        if let Ok(Unsupported(what)) = copy {
            return Recovery::Unsupported(format!("superblock copy {name} has {what}"));
        }
    }
    let [a, b] = copies;
    match (a, b) {
        (Ok(Valid(a)), Ok(Valid(b))) => newer(a, b),
        (Ok(Valid(valid)), other) => beside(valid, other, 1),
        (other, Ok(Valid(valid))) => beside(valid, other, 0),
        (Ok(Empty), Ok(Empty)) => Recovery::NeverFormatted,
        (Ok(Unsupported(what)), _) | (_, Ok(Unsupported(what))) => Recovery::Unsupported(what),
        // It may be the good one: nothing can be said before it can be read.
        (Ok(Damaged(what)), Err(error)) => {
            Recovery::Unreadable(error.within(format!("superblock copy A: {what}; copy B can't be read")))
        }
        (Err(error), Ok(Damaged(what))) => {
            Recovery::Unreadable(error.within(format!("superblock copy B: {what}; copy A can't be read")))
        }
        (Err(error), _) | (_, Err(error)) => Recovery::Unreadable(error),
        (Ok(Damaged(what)), _) => Recovery::Damaged(format!("superblock copy A: {what}; copy B is not valid either")),
        (_, Ok(Damaged(what))) => Recovery::Damaged(format!("superblock copy B: {what}; copy A is not valid either")),
        (Ok(Foreign(what)), _) | (_, Ok(Foreign(what))) => Recovery::Foreign(what),
    }
}

fn newer(a: Superblock, b: Superblock) -> Recovery {
    if !same_clone(&a, &b) {
        return Recovery::Damaged("superblock copies A and B are of different clones".into());
    }
    let older = |index| Some(OtherCopy { index, state: OtherState::Older });
    let (superblock, notes, other) = if b.generation > a.generation {
        let note = format!("superblock copy A is older ({}) than copy B ({})", a.generation, b.generation);
        (b, vec![note], older(0))
    } else if a != b {
        let note = format!("superblock copy B is older ({}) than copy A ({})", b.generation, a.generation);
        (a, vec![note], older(1))
    } else {
        (a, Vec::new(), None)
    };
    Recovery::Use(Box::new(Recovered { superblock, notes, other }))
}

/// One valid copy; `other` was found at the place of copy `index`.
fn beside(superblock: Superblock, other: CopyFound, index: usize) -> Recovery {
    let name = COPY_NAMES[index];
    let (what, state) = match other {
        Ok(Classified::Empty) => ("all zero".to_string(), OtherState::Empty),
        Ok(Classified::Damaged(what)) => (format!("damaged: {what}"), OtherState::Lost),
        // One flipped bit in the magic is enough for that.
        Ok(Classified::Foreign(UNKNOWN_DATA)) => (UNKNOWN_DATA.to_string(), OtherState::Lost),
        Err(error) => (format!("unreadable: {error}"), OtherState::Lost),
        Ok(Classified::Foreign(what)) => {
            return Recovery::Damaged(format!(
                "in place of superblock copy {name} is {what}, while the other is valid"
            ));
        }
        Ok(Classified::Valid(_) | Classified::Unsupported(_)) => unreachable!("handled by the caller"),
    };
    let notes = vec![format!("superblock copy {name} is {what}; the other copy is used")];
    Recovery::Use(Box::new(Recovered { superblock, notes, other: Some(OtherCopy { index, state }) }))
}

/// What the devices and options given at start say.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// What the user wants to clone of the source, in bytes; `None` when nothing was said.
    pub size: Option<u64>,
    /// Size of the source in bytes: it may have grown. `None` when it was not looked at, since it is not needed.
    pub source_size: Option<u64>,
    /// `None` when the user gave none: then the metadata's counts.
    pub region_size: Option<RegionSize>,
    /// Of as many bytes as went into that of the metadata, if the source has so many; else of all. One that is not
    /// known, since the source has bad sectors, says nothing of its content.
    pub source: SourceFingerprint,
    pub destination_id: [u8; 16],
}

/// A way in which metadata and devices do not belong together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mismatch {
    RegionSize {
        metadata: RegionSize,
        given: RegionSize,
    },
    /// More than the clone has was asked for.
    Size {
        metadata: u64,
        given: u64,
    },
    /// The source is smaller than what the clone takes from it.
    SourceSize {
        metadata: u64,
        given: u64,
    },
    SourceContent,
    Destination,
}

impl Mismatch {
    /// Whether the source is at fault, for an override that lets a changed source pass.
    pub fn is_source(&self) -> bool {
        matches!(self, Mismatch::SourceSize { .. } | Mismatch::SourceContent)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::RegionSize { metadata, given } => {
                write!(f, "the metadata are for regions of {metadata}, {given} was given")
            }
            Mismatch::Size { metadata, given } => {
                write!(
                    f,
                    "the clone has {}, {} was asked for; start it as it is, and grow it with `hydrant resize`",
                    ByteSize(*metadata),
                    ByteSize(*given)
                )
            }
            Mismatch::SourceSize { metadata, given } => {
                write!(f, "the metadata are for a source of {}, this one has {}", ByteSize(*metadata), ByteSize(*given))
            }
            Mismatch::SourceContent => {
                f.write_str("the source's content is not that of the one the clone was made from")
            }
            Mismatch::Destination => f.write_str("the metadata belong to another destination"),
        }
    }
}

/// Compares the metadata with what was given; empty when they belong together.
pub fn mismatches(superblock: &Superblock, expected: &Expected) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let geometry = &superblock.geometry;
    if let Some(given) = expected.region_size.filter(|given| *given != geometry.region_size()) {
        found.push(Mismatch::RegionSize { metadata: geometry.region_size(), given });
    }
    // A smaller one is what the clone was made with, before it grew.
    if let Some(given) = expected.size.filter(|given| *given > geometry.size()) {
        found.push(Mismatch::Size { metadata: geometry.size(), given });
    }
    let source = &superblock.source;
    if let Some(given) = expected.source_size.filter(|given| *given < superblock.source_len()) {
        found.push(Mismatch::SourceSize { metadata: superblock.source_len(), given });
    } else if source.is_known() && expected.source.is_known() && expected.source != *source {
        found.push(Mismatch::SourceContent);
    }
    if !fits(expected.destination_id, superblock.destination_id) {
        found.push(Mismatch::Destination);
    }
    found
}

/// The mismatches as one error: SourceChanged when only the source is at fault, else Mismatch. `None` when there are none.
pub fn mismatch_error(found: &[Mismatch]) -> Option<Error> {
    let first = found.first()?;
    let kind = if found.iter().all(Mismatch::is_source) { ErrorKind::SourceChanged } else { ErrorKind::Mismatch };
    let text = found.iter().skip(1).fold(first.to_string(), |text, next| format!("{text}; {next}"));
    Some(Error::new(kind, text))
}

#[cfg(test)]
mod tests;
