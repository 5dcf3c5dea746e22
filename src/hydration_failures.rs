//! What the failed background copies of one clone add up to: when to back off, when to stop, which regions are bad.
//!
//! Pure: the time is an argument. A failure is counted when a copy fails because of its data (the source can't read it,
//! the destination can't write it), not when the source is lost or the destination full: that is waited for. Any copy
//! that succeeds, on any shard, sets the count back. After each [`FAILURES_PER_PAUSE`] failures in a row the whole clone
//! pauses, for a time that doubles; copies that were in flight then are not counted any more, since their failures have
//! the same cause. So many failures in a row are never a moment's: those of the default take at least
//! [`backoff`]'s first twelve delays, six minutes.

use crate::hydration_sched::backoff;
use crate::units::{Geometry, RegionIndex, RegionRange};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Failures in a row that stop hydration when nothing is said: six minutes of a source that reads nothing, an hour
/// and a half of the only region that is left, and more than what finding the bounds of a bad area takes.
pub const FAILURES_MAX_DEFAULT: u32 = 100;
/// Failures in a row that make the clone pause.
pub const FAILURES_PER_PAUSE: u64 = 8;
/// Runs of bad regions that a status lists.
pub const BAD_RUNS_LISTED_MAX: usize = 32;
/// Runs of bad regions that an event names.
pub const BAD_RUNS_TOLD_MAX: usize = 6;

/// What a failure leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    GoOn,
    /// No copy begins before [`FailuresInARow::paused_until`].
    Pause,
    /// No copy begins until [`FailuresInARow::begin_anew`].
    Stop,
}

/// Failures with no success in between.
#[derive(Default, Debug)]
pub struct FailuresInARow {
    count: u64,
    pauses: u32,
    /// So many that hydration was stopped: what ends after that counts neither way, so that the count says why.
    stopped: bool,
    /// What began until then is not counted.
    counted_since: Option<Duration>,
    paused_until: Option<Duration>,
}

impl FailuresInARow {
    /// A copy that was begun at `began` has failed. `max` is the number that stops hydration; 0 is none.
    pub fn failed(&mut self, began: Duration, now: Duration, max: u32) -> Verdict {
        if self.stopped || self.counted_since.is_some_and(|since| began <= since) {
            return Verdict::GoOn;
        }
        self.count = self.count.saturating_add(1);
        if max > 0 && self.count >= u64::from(max) {
            self.stopped = true;
            return Verdict::Stop;
        }
        if !self.count.is_multiple_of(FAILURES_PER_PAUSE) {
            return Verdict::GoOn;
        }
        self.counted_since = Some(now);
        self.paused_until = Some(now + backoff(self.pauses));
        self.pauses = self.pauses.saturating_add(1);
        Verdict::Pause
    }

    /// A copy has succeeded.
    pub fn succeeded(&mut self) {
        if !self.stopped {
            *self = Self::default();
        }
    }

    /// The source is back: as [`Self::begin_anew`], but for what was stopped.
    pub fn source_is_back(&mut self, now: Duration) {
        if !self.stopped {
            self.begin_anew(now);
        }
    }

    /// The user said so: what is in flight belongs to the past.
    pub fn begin_anew(&mut self, now: Duration) {
        *self = Self { counted_since: Some(now), ..Self::default() };
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// The end of a pause that is not over.
    pub fn paused_until(&self, now: Duration) -> Option<Duration> {
        self.paused_until.filter(|until| now < *until)
    }
}

/// The regions that could not be copied alone and are not hydrated, as runs of adjacent ones.
#[derive(Default, Debug)]
pub struct BadRegions {
    /// First region and the one after the last; neither overlapping nor adjacent.
    runs: BTreeMap<RegionIndex, RegionIndex>,
    count: u64,
}

impl BadRegions {
    pub fn insert(&mut self, region: RegionIndex) {
        let (mut first, mut end) = (region, RegionIndex(region.0 + 1));
        if let Some((before, before_end)) = self.runs.range(..=region).next_back().map(|(a, b)| (*a, *b)) {
            if before_end > region {
                return;
            }
            if before_end == region {
                first = before;
            }
        }
        if let Some(after_end) = self.runs.remove(&end) {
            end = after_end;
        }
        self.runs.insert(first, end);
        self.count += 1;
    }

    /// These are not bad any more, if they were. Returns how many were.
    pub fn remove(&mut self, regions: RegionRange) -> u64 {
        let mut removed = 0;
        while let Some((first, end)) = self.runs.range(..regions.end()).next_back().map(|(a, b)| (*a, *b))
            && end > regions.first()
        {
            self.runs.remove(&first);
            if first < regions.first() {
                self.runs.insert(first, regions.first());
            }
            if end > regions.end() {
                self.runs.insert(regions.end(), end);
            }
            removed += end.min(regions.end()).0 - first.max(regions.first()).0;
        }
        self.count -= removed;
        removed
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// The first runs, at most `max`.
    pub fn runs(&self, max: usize) -> Vec<RegionRange> {
        let runs = self.runs.iter().filter_map(|(first, end)| RegionRange::between(*first, *end));
        runs.take(max).collect()
    }

    /// `region 13 (bytes 53248+4096), regions 20-23 (bytes 81920+16384) and 7 more`; at most `max` runs.
    pub fn words(&self, geometry: &Geometry, max: usize) -> String {
        let runs = self.runs(max);
        let named: u64 = runs.iter().map(|run| run.count()).sum();
        words_of(
            runs.iter().map(|run| {
                let bytes = geometry.bytes_of(*run);
                (run.first().0, run.count(), bytes.start(), bytes.len())
            }),
            self.count - named,
        )
    }
}

/// Names runs (first region, how many, first byte, bytes) of which `more` regions are left out.
pub fn words_of(runs: impl Iterator<Item = (u64, u64, u64, u64)>, more: u64) -> String {
    let mut words = String::new();
    for (first, regions, offset, len) in runs {
        let gap = if words.is_empty() { "" } else { ", " };
        // Writing to a text can't fail.
        let _ = match regions {
            0 | 1 => write!(words, "{gap}region {first} (bytes {offset}+{len})"),
            _ => write!(words, "{gap}regions {first}-{} (bytes {offset}+{len})", first.saturating_add(regions - 1)),
        };
    }
    if more > 0 {
        let _ = write!(words, " and {more} more");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hydration_sched::BACKOFF_MIN;
    use crate::units::RegionSize;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn failures_pause_and_stop_and_a_success_begins_anew() {
        let mut failures = FailuresInARow::default();
        let mut now = MS;
        for i in 1..FAILURES_PER_PAUSE {
            assert_eq!(failures.failed(now, now, 20), Verdict::GoOn);
            assert_eq!(failures.count(), i);
        }
        failures.succeeded();
        for _ in 1..FAILURES_PER_PAUSE {
            assert_eq!(failures.failed(now, now, 20), Verdict::GoOn);
        }
        assert_eq!(failures.failed(now, now, 20), Verdict::Pause);
        assert_eq!(failures.paused_until(now), Some(now + BACKOFF_MIN));
        // What was in flight is not counted.
        (0..100).for_each(|_| assert_eq!(failures.failed(now, now + MS, 20), Verdict::GoOn));
        assert_eq!(failures.count(), FAILURES_PER_PAUSE);
        now += BACKOFF_MIN;
        assert_eq!(failures.paused_until(now), None);
        for _ in 1..FAILURES_PER_PAUSE {
            assert_eq!(failures.failed(now, now, 20), Verdict::GoOn);
        }
        assert_eq!(failures.failed(now, now, 20), Verdict::Pause);
        assert_eq!(failures.paused_until(now), Some(now + 2 * BACKOFF_MIN));
        now += 2 * BACKOFF_MIN;
        (17..20).for_each(|_| assert_eq!(failures.failed(now, now, 20), Verdict::GoOn));
        assert_eq!(failures.failed(now, now, 20), Verdict::Stop);
        // What was in flight, what clients copy and a source that comes back: the count still says why it stopped.
        failures.succeeded();
        failures.source_is_back(now);
        assert_eq!((failures.failed(now, now, 20), failures.count()), (Verdict::GoOn, 20));
        failures.begin_anew(now);
        assert_eq!((failures.count(), failures.paused_until(now)), (0, None));
        let mut lost = FailuresInARow::default();
        assert_eq!(lost.failed(now, now, 2), Verdict::GoOn);
        lost.source_is_back(now);
        assert_eq!((lost.count(), lost.failed(now, now, 1)), (0, Verdict::GoOn), "it was in flight");
        assert_eq!(failures.failed(now, now + MS, 1), Verdict::GoOn, "it was in flight");
        assert_eq!(failures.failed(now + MS, now + MS, 1), Verdict::Stop);
    }

    /// What the head of this file and the documents say of the default, and that 0 never stops.
    #[test]
    fn the_default_takes_minutes_and_zero_never_stops() {
        for (max, stops) in [(FAILURES_MAX_DEFAULT, true), (0, false)] {
            let (mut failures, mut now) = (FailuresInARow::default(), Duration::ZERO);
            let mut verdict = Verdict::GoOn;
            for _ in 0..10_000 {
                now = failures.paused_until(now).unwrap_or(now) + Duration::from_nanos(1);
                verdict = failures.failed(now, now, max);
                if verdict == Verdict::Stop {
                    break;
                }
            }
            assert_eq!(verdict == Verdict::Stop, stops);
            assert!(!stops || (360..=370).contains(&now.as_secs()), "{now:?}");
        }
        // The only region that is left: its own delays, which are longer.
        let one: Duration = (0..FAILURES_MAX_DEFAULT - 1).map(backoff).sum();
        assert!((85..=100).contains(&(one.as_secs() / 60)), "{one:?}");
    }

    #[test]
    fn the_document_has_the_numbers() {
        let text = include_str!("../docs/copy-failures.md").replace('\n', " ");
        let words = [
            format!("After each {FAILURES_PER_PAUSE} of them"),
            format!("({FAILURES_MAX_DEFAULT}, if nothing is said; 0 is never)"),
            format!("all of the first {BAD_RUNS_LISTED_MAX} runs"),
        ];
        for words in words {
            assert!(text.contains(&words), "{words}");
        }
    }

    #[test]
    fn words_are_bounded() {
        let geometry = Geometry::new(100 * 4096 - 100, RegionSize::new(4096).unwrap(), 64).unwrap();
        let mut bad = BadRegions::default();
        [13, 99, 20, 22, 21, 13].into_iter().for_each(|region| bad.insert(RegionIndex(region)));
        let all = "region 13 (bytes 53248+4096), regions 20-22 (bytes 81920+12288), region 99 (bytes 405504+3996)";
        assert_eq!(bad.words(&geometry, 3), all);
        assert_eq!(bad.words(&geometry, 1), "region 13 (bytes 53248+4096) and 4 more");
        assert_eq!(BadRegions::default().words(&geometry, 1), "");
    }

    proptest! {
        /// As a plain set of regions.
        #[test]
        fn runs_are_the_set(steps in prop::collection::vec((any::<bool>(), 0u64..60, 1u64..20), 0..200)) {
            let (mut bad, mut plain) = (BadRegions::default(), BTreeSet::new());
            for (insert, first, count) in steps {
                if insert {
                    bad.insert(RegionIndex(first));
                    plain.insert(first);
                } else {
                    let range = RegionRange::between(RegionIndex(first), RegionIndex(first + count)).unwrap();
                    let before = plain.len();
                    plain.retain(|region| !range.contains(RegionIndex(*region)));
                    prop_assert_eq!(bad.remove(range), (before - plain.len()) as u64);
                }
                prop_assert_eq!(bad.count(), plain.len() as u64);
                let runs = bad.runs(usize::MAX);
                let regions: Vec<u64> = runs.iter().flat_map(|run| run.iter().map(|region| region.0)).collect();
                prop_assert!(regions.iter().eq(plain.iter()));
                prop_assert_eq!(runs.len(), bad.runs.len(), "empty ones");
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first()), "not merged");
            }
        }
    }
}
