//! What the server said about allocation, kept so that one large question serves many small ones.
//!
//! Pure. A source does not change while it is open, so an answer stays right; it is only dropped for room.

use crate::disk::EXTENTS_MAX;
use crate::io_frontend::nbd::proto::{AllocationFlags, StatusDescriptor};
use crate::io_frontend::request::{Allocation, Extent, push_extent};
use crate::units::ByteRange;
use std::collections::VecDeque;

/// How many answers are kept: for streams that read in different places.
const ANSWERS_MAX: usize = 8;
/// How many extents of one answer are kept.
const EXTENTS_KEPT_MAX: usize = 64 << 10;

/// One answer: where it begins, and the end of each of its extents, in order.
struct Known {
    start: u64,
    extents: Vec<(u64, Allocation)>,
}

/// The last answers.
#[derive(Default)]
pub(super) struct StatusCache {
    /// The newest first.
    answers: VecDeque<Known>,
}

impl StatusCache {
    /// Keeps an answer that begins at `start`.
    pub fn insert(&mut self, start: u64, descriptors: &[StatusDescriptor]) {
        let mut at = start;
        let mut extents: Vec<(u64, Allocation)> = Vec::new();
        for descriptor in descriptors {
            let flags = AllocationFlags::from_bits_truncate(descriptor.flags);
            let (hole, zero) = (flags.contains(AllocationFlags::HOLE), flags.contains(AllocationFlags::ZERO));
            let state = Allocation { hole, zero };
            at = at.saturating_add(u64::from(descriptor.len));
            let full = extents.len() == EXTENTS_KEPT_MAX;
            match extents.last_mut() {
                Some(last) if last.1 == state => last.0 = at,
                _ if full => break,
                _ => extents.push((at, state)),
            }
        }
        self.answers.truncate(ANSWERS_MAX - 1);
        self.answers.push_front(Known { start, extents });
    }

    /// What is known of `range`, from its start on; empty when nothing is known of its start.
    pub fn get(&self, range: ByteRange) -> Vec<Extent<Allocation>> {
        let covers = |known: &&Known| {
            known.start <= range.start() && known.extents.last().is_some_and(|(end, _)| *end > range.start())
        };
        let mut list = Vec::new();
        let Some(known) = self.answers.iter().find(covers) else { return list };
        let first = known.extents.partition_point(|(end, _)| *end <= range.start());
        let mut at = range.start();
        for (end, state) in known.extents[first..].iter().take(EXTENTS_MAX) {
            let end = (*end).min(range.end());
            push_extent(&mut list, end - at, *state);
            at = end;
            if at == range.end() {
                break;
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain array of states.
        #[test]
        fn tells_what_it_was_told(
            answers in proptest::collection::vec(
                (0u64..200, proptest::collection::vec((1u32..40, 0u32..8), 1..10)), 1..8),
            start in 0u64..400, len in 1u64..200,
        ) {
            // The device is what the answers say together, where they agree: here, one pattern for all.
            let state_at = |at: u64| ((at / 7) % 4) as u32;
            let mut cache = StatusCache::default();
            let mut known = vec![false; 2000];
            for (start, cuts) in answers {
                let mut at = start;
                let mut descriptors = Vec::new();
                for (len, junk) in cuts {
                    for _ in 0..len {
                        descriptors.push(StatusDescriptor { len: 1, flags: state_at(at) | junk << 2 });
                        known[at as usize] = true;
                        at += 1;
                    }
                }
                cache.insert(start, &descriptors);
            }
            let range = ByteRange::new(start, len).unwrap();
            let list = cache.get(range);
            prop_assert_eq!(list.is_empty(), !known[start as usize]);
            let mut at = start;
            for extent in &list {
                prop_assert!(extent.len > 0);
                for _ in 0..extent.len {
                    prop_assert!(known[at as usize]);
                    let flags = u32::from(extent.state.hole) | u32::from(extent.state.zero) << 1;
                    prop_assert_eq!(flags, state_at(at));
                    at += 1;
                }
            }
            prop_assert!(at <= range.end());
            prop_assert!(list.windows(2).all(|w| w[0].state != w[1].state));
        }
    }

    #[test]
    fn is_bounded() {
        let mut cache = StatusCache::default();
        let many: Vec<_> = (0..200_000).map(|i| StatusDescriptor { len: 512, flags: i % 2 }).collect();
        for i in 0..20 {
            cache.insert(i << 40, &many);
        }
        assert_eq!(cache.answers.len(), ANSWERS_MAX);
        assert!(cache.answers.iter().all(|known| known.extents.len() == EXTENTS_KEPT_MAX));
        let list = cache.get(ByteRange::new(19 << 40, 200_000 * 512).unwrap());
        assert_eq!(list.len(), EXTENTS_MAX);
        assert!(cache.get(ByteRange::new(0, 1).unwrap()).is_empty(), "the oldest is gone");
        // An extent that reaches beyond all numbers.
        cache.insert(u64::MAX - 5, &[StatusDescriptor { len: 100, flags: 0 }]);
    }
}
