//! The order of what overlaps: which of the operations in flight on one shard may run beside each other.
//!
//! Exclusive holders are changes of a region's route (hydration, overwrite, discard of unhydrated regions) and
//! read-modify-writes of a part of a block; shared holders are plain writes to hydrated regions. Plain reads hold
//! nothing. This one rule makes dm-clone's data loss impossible here: a discard, and the write after it, wait for
//! a copy of their region that is in flight, and the copy holds its region until its write has completed.
//!
//! Pure: no waiting here. First come, first served: an operation is held back by every earlier one that it
//! conflicts with, held back or not, so nobody starves.

use crate::units::ByteRange;

/// How an operation holds its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    Shared,
    Exclusive,
}

/// Names one operation in flight.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

#[derive(Clone, Copy, Debug)]
struct Entry {
    ticket: Ticket,
    range: ByteRange,
    hold: Hold,
    granted: bool,
}

impl Entry {
    fn conflicts(&self, range: ByteRange, hold: Hold) -> bool {
        (self.hold == Hold::Exclusive || hold == Hold::Exclusive) && self.range.overlaps(range)
    }
}

/// The operations in flight, in order of arrival.
#[derive(Default, Debug)]
pub struct Inflight {
    entries: Vec<Entry>,
    next: u64,
    exclusive: usize,
    held_back: usize,
}

impl Inflight {
    /// Whether an operation would be granted at once.
    pub fn is_free(&self, range: ByteRange, hold: Hold) -> bool {
        (hold == Hold::Shared && self.exclusive == 0) || !self.entries.iter().any(|e| e.conflicts(range, hold))
    }

    /// Enters an operation; the second value tells whether it may run now. If not, its ticket is among those that
    /// a later [`Inflight::end`] grants.
    pub fn begin(&mut self, range: ByteRange, hold: Hold) -> (Ticket, bool) {
        let granted = self.is_free(range, hold);
        let ticket = Ticket(self.next);
        self.next += 1;
        self.exclusive += usize::from(hold == Hold::Exclusive);
        self.held_back += usize::from(!granted);
        self.entries.push(Entry { ticket, range, hold, granted });
        (ticket, granted)
    }

    /// Ends an operation, running or held back, and returns those that may run now because of it.
    pub fn end(&mut self, ticket: Ticket) -> Vec<Ticket> {
        let Some(at) = self.entries.iter().position(|e| e.ticket == ticket) else { unreachable!("a ticket ends once") };
        let ended = self.entries.remove(at);
        self.exclusive -= usize::from(ended.hold == Hold::Exclusive);
        self.held_back -= usize::from(!ended.granted);
        let mut freed = Vec::new();
        if self.held_back == 0 {
            return freed;
        }
        for i in at..self.entries.len() {
            let entry = self.entries[i];
            let waits_for_ended = !entry.granted && entry.conflicts(ended.range, ended.hold);
            if waits_for_ended && !self.entries[..i].iter().any(|e| e.conflicts(entry.range, entry.hold)) {
                self.entries[i].granted = true;
                self.held_back -= 1;
                freed.push(entry.ticket);
            }
        }
        freed
    }

    /// How many operations are in flight or held back.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len).unwrap()
    }

    #[test]
    fn a_discard_waits_for_the_copy_and_the_write_for_the_discard() {
        let mut inflight = Inflight::default();
        let (copy, runs) = inflight.begin(range(0, 64), Hold::Exclusive);
        assert!(runs);
        let (discard, runs) = inflight.begin(range(0, 64), Hold::Exclusive);
        assert!(!runs);
        let (write, runs) = inflight.begin(range(8, 8), Hold::Shared);
        assert!(!runs);
        assert_eq!(inflight.end(copy), [discard]);
        assert_eq!(inflight.end(discard), [write]);
        assert!(inflight.end(write).is_empty() && inflight.is_empty());
    }

    proptest! {
        /// Against the definition: at any time exactly those run that no earlier present operation conflicts with.
        #[test]
        fn exactly_the_unblocked_run(ops in prop::collection::vec((0u64..40, 1u64..12, any::<bool>(), any::<prop::sample::Index>(), 0u8..3), 1..80)) {
            let mut inflight = Inflight::default();
            let mut model: Vec<(Ticket, ByteRange, Hold)> = Vec::new();
            let mut running: std::collections::BTreeSet<Ticket> = Default::default();
            for (start, len, exclusive, pick, what) in ops {
                if what < 2 || model.is_empty() {
                    let (range, hold) = (range(start, len), if exclusive { Hold::Exclusive } else { Hold::Shared });
                    let (ticket, runs) = inflight.begin(range, hold);
                    model.push((ticket, range, hold));
                    if runs { running.insert(ticket); }
                } else {
                    let (ticket, ..) = model.remove(pick.index(model.len()));
                    running.remove(&ticket);
                    running.extend(inflight.end(ticket));
                }
                let expected: std::collections::BTreeSet<Ticket> = model.iter().enumerate().filter(|(i, (_, range, hold))| {
                    !model[..*i].iter().any(|(_, r, h)| r.overlaps(*range) && (*h == Hold::Exclusive || *hold == Hold::Exclusive))
                }).map(|(_, (ticket, ..))| *ticket).collect();
                prop_assert_eq!(&running, &expected);
            }
        }
    }
}
