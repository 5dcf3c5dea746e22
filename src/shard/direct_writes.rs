//! Writes of hydrated bytes by shards that do not own them, and who must not run beside them.
//!
//! A write of whole blocks of hydrated regions needs nothing of the owner, but one thing: the owner may be at a
//! read-modify-write of a part of the same block, and put back what it has read before. So the two exclude each other
//! here, by a few numbers that all shards of a clone share: one for each stretch of [`STRETCH_BYTES`] of the device, modulo
//! [`STRETCHES`]. A direct write announces itself in those of its range, unless somebody is excluded from one: then it
//! goes to the owner and waits there with all others. The owner excludes direct writes, then waits for those under way.
//!
//! Pure: nothing waits here.

use crate::units::ByteRange;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Bytes of the device that one number stands for.
pub const STRETCH_BYTES: u64 = 1 << 20;
/// How many numbers there are: stretches so many apart share one, which costs a detour and no more.
pub const STRETCHES: usize = 64;
/// The most stretches that a direct write may touch; larger ones go to the owner.
const STRETCHES_OF_WRITE_MAX: u64 = 4;
/// In each number: direct writes under way in the lower half, exclusions in the upper.
const EXCLUSION: u64 = 1 << 32;

/// See the head of this file.
pub struct DirectWrites([AtomicU64; STRETCHES]);

impl Default for DirectWrites {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; STRETCHES])
    }
}

fn stretches(range: ByteRange) -> RangeInclusive<u64> {
    range.start() / STRETCH_BYTES..=(range.end() - 1) / STRETCH_BYTES
}

/// A direct write under way; ends when dropped.
pub struct DirectWrite {
    writes: Arc<DirectWrites>,
    range: ByteRange,
}

/// No direct write begins while this lives.
pub struct Exclusion {
    writes: Arc<DirectWrites>,
    range: ByteRange,
}

impl DirectWrites {
    fn number(&self, stretch: u64) -> &AtomicU64 {
        // Less than STRETCHES.
        &self.0[(stretch % STRETCHES as u64) as usize]
    }

    /// Announces a write of `range`. `None`: not now, or not of so much; the owner has to do it.
    pub fn begin(self: &Arc<Self>, range: ByteRange) -> Option<DirectWrite> {
        let stretches = stretches(range);
        if stretches.end() - stretches.start() >= STRETCHES_OF_WRITE_MAX {
            return None;
        }
        let mut excluded = false;
        for stretch in stretches {
            excluded |= self.number(stretch).fetch_add(1, AcqRel) >= EXCLUSION;
        }
        let write = DirectWrite { writes: self.clone(), range };
        (!excluded).then_some(write)
    }

    /// Lets no direct write of `range` begin. Those under way may still be: see [`Exclusion::is_alone`].
    pub fn exclude(self: &Arc<Self>, range: ByteRange) -> Exclusion {
        let range = Self::bounded(range);
        for stretch in stretches(range) {
            self.number(stretch).fetch_add(EXCLUSION, AcqRel);
        }
        Exclusion { writes: self.clone(), range }
    }

    /// Each number once is enough.
    fn bounded(range: ByteRange) -> ByteRange {
        let end = range.end().min(range.start().saturating_add(STRETCH_BYTES * (STRETCHES as u64 - 1) + 1));
        ByteRange::between(range.start(), end).unwrap_or(range)
    }
}

impl Exclusion {
    /// Whether no direct write of the range is under way any more.
    pub fn is_alone(&self) -> bool {
        stretches(self.range).all(|stretch| self.writes.number(stretch).load(Acquire).is_multiple_of(EXCLUSION))
    }
}

impl Drop for DirectWrite {
    fn drop(&mut self) {
        for stretch in stretches(self.range) {
            self.writes.number(stretch).fetch_sub(1, AcqRel);
        }
    }
}

impl Drop for Exclusion {
    fn drop(&mut self) {
        for stretch in stretches(self.range) {
            self.writes.number(stretch).fetch_sub(EXCLUSION, AcqRel);
        }
    }
}
