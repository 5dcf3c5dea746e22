//! What a clone knows of its source, to notice when another one stands in its place: at a start, at a new connection,
//! and later, when a sample can be read that could not be before.
//!
//! The metadata hold one digest of all samples, which can't be had as long as one of them is on a bad sector. So what could
//! be read is remembered beside it for as long as the clone runs, and samples read at different times are put together.
//! Shared by the shards; the lock is held for no I/O. Like the fingerprint it catches mistakes, and is no protection from
//! malice.

use crate::meta::codec::SourceFingerprint;
use crate::source::fingerprint::Samples;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the head of this file.
#[derive(Debug)]
pub struct SourceIdentity {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// What the source must be, by the metadata; `None` as long as they do not know.
    recorded: Option<SourceFingerprint>,
    /// Of all that was read so far.
    known: Samples,
    /// Nothing that was known could be compared when the source was last looked at.
    unchecked: bool,
}

/// What a look at a source says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All of its samples were read, and are what they were.
    Same,
    Another,
    /// Nothing that could be read is different, but not all could be.
    Unknown,
}

impl SourceIdentity {
    /// `seen`: what could be read at the start, which agrees with `recorded` as far as it goes.
    pub fn new(recorded: SourceFingerprint, seen: Samples) -> Self {
        let recorded = Some(recorded).filter(SourceFingerprint::is_known);
        Self { inner: Mutex::new(Inner { recorded, unchecked: false, known: seen }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes of the source it is about.
    pub fn size(&self) -> u64 {
        self.inner().known.size()
    }

    /// Compares the source with what is known of it. What is new is remembered, unless it is of another one.
    pub fn check(&self, seen: &Samples) -> Verdict {
        let mut inner = self.inner();
        let Some(compared) = inner.known.agrees(seen) else { return Verdict::Another };
        let mut known = inner.known.clone();
        known.add(seen);
        if let (Some(found), Some(recorded)) = (known.fingerprint(), inner.recorded)
            && found != recorded
        {
            return Verdict::Another;
        }
        let had_any = inner.known.read_count() > 0;
        inner.unchecked = (inner.unchecked || had_any) && compared == 0;
        inner.known = known;
        if seen.is_complete() { Verdict::Same } else { Verdict::Unknown }
    }

    /// The fingerprint of the source, once all of its samples have been read.
    pub fn fingerprint(&self) -> Option<SourceFingerprint> {
        self.inner().known.fingerprint()
    }

    /// Samples that were read so far, and how many there are, while it is not certain that this is the source; else `None`.
    pub fn doubt(&self) -> Option<(usize, usize)> {
        let inner = self.inner();
        let (read, all) = (inner.known.read_count(), inner.known.count());
        (inner.unchecked || read < all).then_some((if inner.unchecked { 0 } else { read }, all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::fingerprint::tests::{of_parts, whole};

    #[test]
    fn what_could_be_read_both_times_is_compared() {
        let unknown = SourceFingerprint::UNKNOWN;
        // Samples 0..40 at the start; then all, or others.
        let start = || of_parts(7, 0..40);
        let identity = SourceIdentity::new(unknown, start());
        assert_eq!((identity.doubt(), identity.fingerprint()), (Some((40, 64)), None));
        assert_eq!(identity.check(&of_parts(8, 39..64)), Verdict::Another);
        assert_eq!(identity.check(&of_parts(7, 39..50)), Verdict::Unknown);
        assert_eq!(identity.doubt(), Some((50, 64)));
        assert_eq!(identity.check(&of_parts(8, 49..50)), Verdict::Another, "what came later counts as well");
        assert_eq!(identity.check(&of_parts(7, 50..64)), Verdict::Unknown);
        // Nothing was compared by that: it may have been another one, as far as one knows.
        assert_eq!((identity.doubt(), identity.fingerprint()), (Some((0, 64)), Some(whole(7))));
        assert_eq!(identity.check(&of_parts(7, 0..64)), Verdict::Same);
        assert_eq!(identity.doubt(), None);
        assert_eq!(identity.check(&of_parts(8, 0..64)), Verdict::Another);
    }

    #[test]
    fn what_is_recorded_counts_once_all_is_known() {
        for (recorded, verdict) in [(whole(7), Verdict::Same), (whole(8), Verdict::Another)] {
            let identity = SourceIdentity::new(recorded, of_parts(7, 0..63));
            assert_eq!(identity.check(&of_parts(7, 0..63)), Verdict::Unknown);
            assert_eq!(identity.check(&of_parts(7, 0..64)), verdict);
        }
        let identity = SourceIdentity::new(SourceFingerprint::UNKNOWN, of_parts(7, 0..0));
        assert_eq!(identity.check(&of_parts(7, 0..0)), Verdict::Unknown);
        assert_eq!(identity.check(&of_parts(7, 0..64)), Verdict::Same);
        assert_eq!((identity.doubt(), identity.fingerprint()), (None, Some(whole(7))));
    }
}
