//! The hydration scheduler: which regions to copy next on one shard, and when not to.
//!
//! Pure: the map, the time and what is busy are arguments. A cursor walks the shard's unhydrated regions and hands
//! out batches of adjacent ones; regions that a client waits for go first. A batch that fails is split into single
//! regions, so that one bad sector keeps only its own region back; each of those is tried again after a delay that
//! doubles. When the destination is full or the source is gone, everything pauses, again with a doubling delay.
//!
//! What was never tried comes before what is known to be bad: a retry is handed out at most every other time, and where
//! several batches fail in a row the cursor leaps ahead, twice as far each time, and leaves the splitting for later. So
//! a bad area of any size does not keep back what lies behind it, and where all fails the tries are spread over all that
//! is left. When failures add up to a pause or a stop of the whole clone is not decided here but in
//! [`crate::hydration_failures`].

use crate::units::{RegionIndex, RegionRange};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// First delay after a failure; doubles up to [`BACKOFF_MAX`].
pub const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Longest delay between two tries.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// So many fresh batches that fail in a row are a bad area: the cursor leaps out of it before anything else is tried.
const BAD_AREA_BATCHES: u32 = 2;
/// Regions that clients asked for ahead of the background; more are left to the cursor.
pub const URGENT_MAX: usize = 1024;

/// Regions due for another try that are looked at in one go while clients hold them.
const BUSY_DUE_MAX: usize = 16;
/// A region that is being tried again is not due.
const NEVER: Duration = Duration::MAX;
/// When one that was never tried alone is due: before any retry, however long that has been due. A bad area may have
/// hundreds, and hydration can stop before all of them had their turn.
const ALONE_AT_ONCE: Duration = Duration::ZERO;
/// When one that has failed alone is due without a delay.
const AGAIN_AT_ONCE: Duration = Duration::from_nanos(1);

/// What the scheduler needs to know of a region map.
pub trait Unhydrated {
    /// The first unhydrated region at or after `from` that this shard owns, with those adjacent to it, at most `max`.
    fn next_unhydrated(&self, from: RegionIndex, max: u64) -> Option<RegionRange>;
    fn is_hydrated(&self, region: RegionIndex) -> bool;
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Copy these. Report the end with [`HydrationSched::succeeded`] or [`HydrationSched::failed`].
    Batch(RegionRange),
    /// Nothing before this time (or before a batch in flight ends).
    WaitUntil(Duration),
    /// Nothing until a batch in flight ends.
    WaitForBatch,
    /// Every region of this shard is hydrated.
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Failure {
    attempts: u32,
    not_before: Duration,
}

impl Failure {
    /// Due, without a delay.
    fn at_once(&self) -> Duration {
        if self.attempts == 0 { ALONE_AT_ONCE } else { AGAIN_AT_ONCE }
    }
}

/// What a failed batch means, see [`HydrationSched::failed`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failed {
    /// It was one region of a batch that had failed before, tried alone for the first time: which of them are bad
    /// is being found out, and that the batch has failed was counted already.
    pub isolating: bool,
}

/// The scheduler of one shard's part of one clone.
#[derive(Debug, Default)]
pub struct HydrationSched {
    cursor: RegionIndex,
    urgent: VecDeque<RegionIndex>,
    failures: BTreeMap<RegionIndex, Failure>,
    /// The same regions by time, without those that are being tried.
    due: BTreeSet<(Duration, RegionIndex)>,
    /// How many of them have failed alone.
    failed_alone: u64,
    batches_in_flight: u64,
    /// The last batch handed out was a retry: what was never tried is next.
    after_retry: bool,
    /// Batches of the cursor that have failed with none of them succeeding in between, and how far the last leap was.
    fresh_failures: u32,
    leap: u64,
    pauses_in_a_row: u32,
    paused_until: Option<Duration>,
}

/// The delay after so many attempts, or pauses, before it.
pub fn backoff(attempts: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(1 << attempts.min(16)).min(BACKOFF_MAX)
}

impl HydrationSched {
    /// Decides. `batch_max` is in regions (at least 1); `busy` tells whether some operation holds any of the regions.
    pub fn next(
        &mut self,
        map: &impl Unhydrated,
        now: Duration,
        batch_max: u64,
        busy: &dyn Fn(RegionRange) -> bool,
    ) -> Next {
        if let Some(until) = self.paused_until {
            if now < until {
                return Next::WaitUntil(until);
            }
            self.paused_until = None;
        }
        while let Some(region) = self.urgent.pop_front() {
            // One that has failed has its own time, however often clients ask for it.
            let is_held_back = self.failures.contains_key(&region) || busy(RegionRange::single(region));
            if !map.is_hydrated(region) && !is_held_back {
                return self.start(RegionRange::single(region));
            }
        }
        let fresh_first = self.after_retry || self.fresh_failures >= BAD_AREA_BATCHES;
        if !fresh_first && let Some(region) = self.next_due(map, now, busy) {
            return self.start(RegionRange::single(region));
        }
        if let Some(batch) = self.next_fresh(map, batch_max.max(1), busy) {
            self.after_retry = false;
            return self.start(batch);
        }
        if fresh_first && let Some(region) = self.next_due(map, now, busy) {
            return self.start(RegionRange::single(region));
        }
        // What is left is in flight, held by clients, or failing.
        if map.next_unhydrated(RegionIndex(0), 1).is_none() {
            self.all_hydrated();
            return Next::Done;
        }
        if self.batches_in_flight > 0 {
            return Next::WaitForBatch;
        }
        let soon = now + BACKOFF_MIN / 10;
        Next::WaitUntil(self.due.first().map_or(soon, |(earliest, _)| soon.max(*earliest)))
    }

    /// The cursor's next batch of what has not failed and is free: up to the end, and then from the start once more,
    /// where it may have leapt over some.
    fn next_fresh(
        &mut self,
        map: &impl Unhydrated,
        batch_max: u64,
        busy: &dyn Fn(RegionRange) -> bool,
    ) -> Option<RegionRange> {
        let start = self.cursor;
        let found = self.fresh_from(map, batch_max, busy);
        if found.is_some() {
            return found;
        }
        // The end of a pass.
        self.cursor = RegionIndex(0);
        if start == RegionIndex(0) {
            return None;
        }
        let found = self.fresh_from(map, batch_max, busy);
        if found.is_none() {
            self.cursor = RegionIndex(0);
        }
        found
    }

    fn fresh_from(
        &mut self,
        map: &impl Unhydrated,
        batch_max: u64,
        busy: &dyn Fn(RegionRange) -> bool,
    ) -> Option<RegionRange> {
        while let Some(run) = map.next_unhydrated(self.cursor, batch_max) {
            if self.failures.range(run.first()..run.end()).next().is_none() && !busy(run) {
                self.cursor = run.end();
                return Some(run);
            }
            let held_back =
                |region: &RegionIndex| self.failures.contains_key(region) || busy(RegionRange::single(*region));
            let Some(first) = run.iter().find(|r| !held_back(r)) else {
                self.cursor = run.end();
                continue;
            };
            let end = run.iter().skip_while(|r| *r <= first).find(held_back).unwrap_or(run.end());
            self.cursor = end;
            return RegionRange::between(first, end);
        }
        None
    }

    /// Nothing is left to do: clients have overwritten what could not be copied.
    pub fn all_hydrated(&mut self) {
        self.failures.clear();
        self.due.clear();
        self.failed_alone = 0;
        self.paused_until = None;
        self.fresh_works();
    }

    fn fresh_works(&mut self) {
        (self.fresh_failures, self.leap) = (0, 0);
    }

    /// A region whose delay is over and that nobody holds; it is being tried from now on.
    fn next_due(
        &mut self,
        map: &impl Unhydrated,
        now: Duration,
        busy: &dyn Fn(RegionRange) -> bool,
    ) -> Option<RegionIndex> {
        let (mut from, mut looks) = ((Duration::ZERO, RegionIndex(0)), 0);
        while looks < BUSY_DUE_MAX {
            let (at, region) = *self.due.range(from..=(now, RegionIndex(u64::MAX))).next()?;
            if map.is_hydrated(region) {
                self.forget(region);
            } else if busy(RegionRange::single(region)) {
                (from, looks) = ((at, RegionIndex(region.0 + 1)), looks + 1);
            } else {
                self.after_retry = self.failures.get(&region).is_some_and(|failure| failure.attempts > 0);
                self.set_due(region, NEVER);
                return Some(region);
            }
        }
        None
    }

    fn set_due_at_once(&mut self, region: RegionIndex) {
        if let Some(failure) = self.failures.get(&region) {
            self.set_due(region, failure.at_once());
        }
    }

    fn set_due(&mut self, region: RegionIndex, at: Duration) {
        let Some(failure) = self.failures.get_mut(&region) else { return };
        let before = std::mem::replace(&mut failure.not_before, at);
        self.due.remove(&(before, region));
        if at != NEVER {
            self.due.insert((at, region));
        }
    }

    fn forget(&mut self, region: RegionIndex) {
        if let Some(failure) = self.failures.remove(&region) {
            self.due.remove(&(failure.not_before, region));
            self.failed_alone -= u64::from(failure.attempts > 0);
        }
    }

    /// Those of the batch's regions that have failed before.
    fn failed_in(&self, batch: RegionRange) -> Vec<RegionIndex> {
        self.failures.range(batch.first()..batch.end()).map(|(region, _)| *region).collect()
    }

    fn start(&mut self, batch: RegionRange) -> Next {
        self.batches_in_flight += 1;
        Next::Batch(batch)
    }

    /// A batch that was handed out covers more or fewer regions now: the cursor goes on behind it.
    pub fn resized(&mut self, batch: RegionRange) {
        self.cursor = batch.end();
    }

    /// A batch was handed out too early: it is the cursor's next one again.
    pub fn back_to(&mut self, region: RegionIndex) {
        self.cursor = self.cursor.min(region);
    }

    /// A client wants this region soon.
    pub fn prioritise(&mut self, region: RegionIndex) {
        if self.urgent.len() < URGENT_MAX && !self.urgent.contains(&region) {
            self.urgent.push_back(region);
        }
    }

    /// A batch has ended without being tried (its regions turned out to be hydrated or held).
    pub fn skipped(&mut self, batch: RegionRange) {
        self.batches_in_flight -= 1;
        self.failed_in(batch).into_iter().for_each(|region| self.set_due_at_once(region));
    }

    /// A batch is hydrated.
    pub fn succeeded(&mut self, batch: RegionRange) {
        self.batches_in_flight -= 1;
        self.pauses_in_a_row = 0;
        self.fresh_works();
        self.hydrated(batch);
    }

    /// These are hydrated now, whoever did it: what was known of their failures is over.
    pub fn hydrated(&mut self, regions: RegionRange) {
        self.failed_in(regions).into_iter().for_each(|region| self.forget(region));
    }

    /// A batch could not be copied because of some of its data.
    pub fn failed(&mut self, batch: RegionRange, now: Duration) -> Failed {
        self.batches_in_flight -= 1;
        let single = batch.count() == 1;
        let known = self.failures.get(&batch.first()).map(|failure| failure.attempts);
        for region in batch.iter() {
            let failure = self.failures.entry(region).or_insert(Failure { attempts: 0, not_before: NEVER });
            let due = if single { now + backoff(failure.attempts) } else { failure.at_once() };
            self.failed_alone += u64::from(single && failure.attempts == 0);
            failure.attempts = failure.attempts.saturating_add(u32::from(single));
            self.set_due(region, due);
        }
        if known.is_none() {
            self.fresh_failures = self.fresh_failures.saturating_add(1);
            if self.fresh_failures >= BAD_AREA_BATCHES {
                self.leap = self.leap.saturating_mul(2).max(batch.count());
                self.cursor = RegionIndex(self.cursor.max(batch.end()).0.saturating_add(self.leap));
            }
        }
        Failed { isolating: single && known == Some(0) }
    }

    /// A batch could not be copied for a reason that holds for all (no space, the source is gone).
    pub fn failed_for_all(&mut self, batch: RegionRange, now: Duration) {
        self.skipped(batch);
        if self.paused_until.is_none() {
            self.pause(now);
        }
    }

    fn pause(&mut self, now: Duration) {
        self.paused_until = Some(now + backoff(self.pauses_in_a_row));
        self.pauses_in_a_row = self.pauses_in_a_row.saturating_add(1);
    }

    /// Tries at once what is held back (after the user said so, or the source came back).
    pub fn retry_now(&mut self) {
        self.paused_until = None;
        self.pauses_in_a_row = 0;
        for (_, region) in std::mem::take(&mut self.due) {
            self.set_due_at_once(region);
        }
    }

    /// Regions whose copy has failed alone at least once and that are not hydrated yet.
    pub fn failed_regions(&self) -> u64 {
        self.failed_alone
    }

    /// The end of a pause that is not over.
    pub fn paused_until(&self, now: Duration) -> Option<Duration> {
        self.paused_until.filter(|until| now < *until)
    }

    pub fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Bits(Vec<bool>);
    impl Unhydrated for Bits {
        fn next_unhydrated(&self, from: RegionIndex, max: u64) -> Option<RegionRange> {
            let first = (from.0 as usize..self.0.len()).find(|i| !self.0[*i])?;
            let count = self.0[first..].iter().take(max as usize).take_while(|b| !**b).count();
            RegionRange::between(RegionIndex(first as u64), RegionIndex((first + count) as u64))
        }
        fn is_hydrated(&self, region: RegionIndex) -> bool {
            self.0[region.0 as usize]
        }
    }

    #[test]
    fn one_bad_region_keeps_only_itself_back_and_heals() {
        let mut map = Bits(vec![false; 64]);
        let (mut sched, mut now, bad) = (HydrationSched::default(), Duration::ZERO, RegionIndex(21));
        let mut tries_of_bad = 0;
        while now < Duration::from_secs(200) {
            match sched.next(&map, now, 16, &|_| false) {
                Next::Batch(batch) if batch.contains(bad) && now < Duration::from_secs(100) => {
                    tries_of_bad += u32::from(batch.count() == 1);
                    sched.failed(batch, now);
                }
                Next::Batch(batch) => {
                    batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                    sched.succeeded(batch);
                }
                Next::WaitUntil(until) => {
                    assert!(until > now);
                    assert_eq!(map.0.iter().filter(|b| !**b).count(), 1, "all others are hydrated before waiting");
                    assert_eq!(sched.failed_regions(), 1);
                    now = until;
                }
                Next::Done => break,
                Next::WaitForBatch => unreachable!("no batch is left in flight"),
            }
        }
        assert!(map.0.iter().all(|b| *b));
        assert_eq!(sched.failed_regions(), 0);
        assert!((5..=12).contains(&tries_of_bad), "{tries_of_bad} tries in 100 s: the delay doubles");
    }

    #[test]
    fn a_clients_region_goes_first_but_not_when_it_failed() {
        let map = Bits(vec![false; 1000]);
        let mut sched = HydrationSched::default();
        let single = RegionRange::single(RegionIndex(500));
        sched.prioritise(RegionIndex(500));
        assert_eq!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::Batch(single));
        assert_eq!(sched.failed(single, Duration::ZERO), Failed { isolating: false });
        sched.prioritise(RegionIndex(500));
        let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 4, &|_| false) else { panic!("a batch") };
        assert!(!batch.contains(RegionIndex(500)), "{batch:?}");
    }

    /// A client has overwritten a bad region: what was known of it is over.
    #[test]
    fn what_is_hydrated_by_others_has_not_failed() {
        let mut map = Bits(vec![false; 4]);
        let mut sched = HydrationSched::default();
        for region in [1, 2] {
            sched.batches_in_flight += 1;
            sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
        }
        map.0[1] = true;
        sched.hydrated(between(0, 2));
        assert_eq!(sched.failed_regions(), 1);
        sched.hydrated(between(2, 4));
        assert_eq!(sched.failed_regions(), 0);
    }

    #[test]
    fn what_holds_for_all_pauses() {
        let map = Bits(vec![false; 1000]);
        let mut sched = HydrationSched::default();
        let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 4, &|_| false) else { panic!("a batch") };
        sched.failed_for_all(batch, Duration::ZERO);
        assert_eq!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::WaitUntil(BACKOFF_MIN));
        assert_eq!(sched.failed_regions(), 0);
        assert!(sched.is_paused());
        assert_eq!(sched.paused_until(Duration::ZERO), Some(BACKOFF_MIN));
        assert_eq!(sched.paused_until(BACKOFF_MIN - Duration::from_nanos(1)), Some(BACKOFF_MIN));
        assert_eq!(sched.paused_until(BACKOFF_MIN), None);
        sched.retry_now();
        assert!(!sched.is_paused());
        assert_eq!(sched.paused_until(Duration::ZERO), None);
        assert!(matches!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::Batch(_)));
    }

    /// A bad area of any size, wherever it is: all the rest is hydrated after a few failures, before any region is tried
    /// a second time; then which regions are bad is found out exactly.
    #[test]
    fn a_bad_area_keeps_back_nothing_but_itself() {
        for (first, end) in [(0, 300), (100, 101), (40, 900), (700, 1000), (17, 19), (0, 999)] {
            let mut map = Bits(vec![false; 1000]);
            let mut sched = HydrationSched::default();
            let is_bad = |region: RegionIndex| (first..end).contains(&region.0);
            let (mut in_a_row, mut in_a_row_max, mut retries) = (0, 0, 0);
            while map.0.iter().filter(|b| !**b).count() as u64 > end - first {
                let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 16, &|_| false) else { panic!("a batch") };
                if batch.iter().any(is_bad) {
                    retries += u32::from(sched.failures.get(&batch.first()).is_some_and(|f| f.attempts > 0));
                    let counts = !sched.failed(batch, Duration::ZERO).isolating;
                    in_a_row += u32::from(counts);
                    in_a_row_max = in_a_row_max.max(in_a_row);
                } else {
                    batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                    sched.succeeded(batch);
                    in_a_row = 0;
                }
            }
            assert_eq!(retries, 0);
            // Those to leap out of it, then those that were leapt over, once each; a leap leaves a short one at each end.
            assert!(u64::from(in_a_row_max) <= (end - first) / 16 + 10, "{first}..{end}: {in_a_row_max} in a row");
            while let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 16, &|_| false) {
                sched.failed(batch, Duration::ZERO);
            }
            assert_eq!(sched.failed_regions(), end - first);
        }
    }

    fn between(first: u64, end: u64) -> RegionRange {
        RegionRange::between(RegionIndex(first), RegionIndex(end)).unwrap()
    }

    #[test]
    fn waits_for_its_batch_then_looks_again_soon() {
        let map = Bits(vec![false; 8]);
        let mut sched = HydrationSched::default();
        let (now, all) = (Duration::from_secs(7), between(0, 8));
        assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(all));
        assert_eq!(sched.next(&map, now, 16, &|_| true), Next::WaitForBatch);
        // Clients hold all that is left: nobody tells when they let go.
        sched.skipped(all);
        assert_eq!(sched.next(&map, now, 16, &|_| true), Next::WaitUntil(now + Duration::from_millis(50)));
        assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(all));
    }

    #[test]
    fn the_cursor_goes_on_behind_a_batch_that_grew_and_back_to_one_that_was_too_early() {
        let map = Bits(vec![false; 200]);
        let mut sched = HydrationSched::default();
        let next = |sched: &mut HydrationSched| sched.next(&map, Duration::ZERO, 16, &|_| false);
        assert_eq!(next(&mut sched), Next::Batch(between(0, 16)));
        sched.resized(between(0, 64));
        assert_eq!(next(&mut sched), Next::Batch(between(64, 80)));
        sched.skipped(between(64, 80));
        sched.back_to(RegionIndex(64));
        assert_eq!(next(&mut sched), Next::Batch(between(64, 80)));
        sched.back_to(RegionIndex(199));
        assert_eq!(next(&mut sched), Next::Batch(between(80, 96)), "never ahead");
    }

    /// What clients want is bounded, and no region is in it twice.
    #[test]
    fn urgent_regions_in_order_once_and_not_too_many() {
        let map = Bits(vec![false; 5000]);
        let mut sched = HydrationSched::default();
        for _ in 0..2 {
            (0..2000).for_each(|region| sched.prioritise(RegionIndex(4000 - region)));
        }
        for region in 0..URGENT_MAX as u64 {
            let single = RegionRange::single(RegionIndex(4000 - region));
            assert_eq!(sched.next(&map, Duration::ZERO, 16, &|_| false), Next::Batch(single));
        }
        assert_eq!(sched.next(&map, Duration::ZERO, 16, &|_| false), Next::Batch(between(0, 16)));
    }

    /// Of those that are due and held by clients so many are looked at in one go, not one more.
    #[test]
    fn a_region_that_is_due_is_found_behind_those_that_clients_hold() {
        let map = Bits(vec![false; 40]);
        for held in [BUSY_DUE_MAX as u64 - 1, BUSY_DUE_MAX as u64] {
            let mut sched = HydrationSched::default();
            sched.batches_in_flight += 1;
            sched.failed(between(0, 40), Duration::ZERO);
            let next = sched.next(&map, Duration::ZERO, 16, &|regions| regions.first().0 < held);
            let single = Next::Batch(RegionRange::single(RegionIndex(held)));
            match held < BUSY_DUE_MAX as u64 {
                true => assert_eq!(next, single),
                false => assert_eq!(next, Next::WaitUntil(BACKOFF_MIN / 10)),
            }
        }
    }

    /// Which regions of a batch are bad is found out before the cursor goes on.
    #[test]
    fn the_regions_of_a_failed_batch_are_tried_in_a_row() {
        let map = Bits(vec![false; 100]);
        let mut sched = HydrationSched::default();
        let now = Duration::ZERO;
        assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(between(0, 16)));
        sched.failed(between(0, 16), now);
        for region in 0..16 {
            let single = RegionRange::single(RegionIndex(region));
            assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(single));
            assert_eq!(sched.failed(single, now), Failed { isolating: true });
        }
        assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(between(16, 32)));
        // Each of them is due again, but every other time.
        sched.failed(between(16, 32), now);
        let later = Duration::from_secs(1);
        assert_eq!(sched.failed_regions(), 16);
        assert!(matches!(sched.next(&map, later, 16, &|_| false), Next::Batch(batch) if batch.first().0 >= 32));
    }

    /// However long others have been due.
    #[test]
    fn each_region_is_tried_alone_before_any_is_tried_again() {
        let map = Bits(vec![false; 80]);
        let mut sched = HydrationSched::default();
        for region in 0..64 {
            sched.batches_in_flight += 1;
            sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
        }
        let now = Duration::from_secs(100);
        sched.batches_in_flight += 1;
        sched.failed(RegionRange::between(RegionIndex(64), RegionIndex(80)).unwrap(), now);
        let mut tried = Vec::new();
        for _ in 0..32 {
            let Next::Batch(batch) = sched.next(&map, now, 16, &|_| false) else { panic!("a batch") };
            tried.push(batch.first().0);
            // One was held by a client, and keeps its place.
            match tried.len() {
                3 => sched.skipped(batch),
                _ => _ = sched.failed(batch, now),
            }
            if tried.len() == 8 {
                sched.retry_now();
            }
        }
        assert_eq!(tried[..17], [64, 65, 66, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79], "{tried:?}");
        assert!(tried[17..].iter().all(|region| *region < 71));
    }

    /// However many bad regions are due, what was never tried is handed out every other time at least.
    #[test]
    fn retries_do_not_keep_back_what_was_never_tried() {
        let mut map = Bits(vec![false; 1000]);
        let mut sched = HydrationSched::default();
        for region in 0..200 {
            sched.batches_in_flight += 1;
            sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
        }
        sched.fresh_works();
        let now = Duration::from_secs(3);
        let (mut fresh, mut retries) = (0, 0);
        while fresh < 50 {
            let Next::Batch(batch) = sched.next(&map, now, 16, &|_| false) else { panic!("a batch") };
            if batch.first().0 < 200 {
                retries += 1;
                sched.failed(batch, now);
            } else {
                fresh += 1;
                batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                sched.succeeded(batch);
            }
        }
        assert!((45..=51).contains(&retries), "{retries}");
    }

    /// Thousands that failed and were overwritten by clients meanwhile: forgotten one by one, not one call deeper each.
    #[test]
    fn any_number_of_failures_heals() {
        let mut map = Bits(vec![false; 100_000]);
        let mut sched = HydrationSched::default();
        for region in 0..100_000 {
            sched.batches_in_flight += 1;
            sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
        }
        assert_eq!(sched.failed_regions(), 100_000);
        map.0[..99_999].fill(true);
        sched.retry_now();
        let last = Next::Batch(RegionRange::single(RegionIndex(99_999)));
        assert_eq!(sched.next(&map, Duration::from_secs(100), 1, &|_| false), last);
        assert_eq!(sched.failed_regions(), 1);
        map.0[99_999] = true;
        assert_eq!(sched.next(&map, Duration::from_secs(100), 1, &|_| false), Next::Done);
        assert_eq!(sched.failed_regions(), 0);
    }

    proptest! {
        /// Whatever fails, is busy or is hydrated by clients meanwhile: batches hold only unhydrated, free,
        /// adjacent regions that are not in another batch, and in the end everything is hydrated.
        #[test]
        fn hands_out_what_is_left_and_ends(
            start in prop::collection::vec(any::<bool>(), 1..200),
            batch_max in 1u64..20,
            events in prop::collection::vec((0u8..8, any::<prop::sample::Index>()), 0..300),
        ) {
            let mut map = Bits(start);
            let mut sched = HydrationSched::default();
            let mut now = Duration::ZERO;
            let mut in_flight: Vec<RegionRange> = Vec::new();
            let mut events = events.into_iter();
            for step in 0.. {
                prop_assert!(step < 20_000, "no progress");
                let event = events.next();
                let calm = event.is_none();
                if let Some((what, pick)) = event {
                    let region = pick.index(map.0.len());
                    match what {
                        0 => map.0[region] = true,
                        1 => sched.prioritise(RegionIndex(region as u64)),
                        2 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.failed(b, now); }
                        3 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.failed_for_all(b, now); }
                        4 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.skipped(b); }
                        5 => now += Duration::from_millis(pick.index(3000) as u64),
                        _ => {}
                    }
                }
                let held = in_flight.clone();
                match sched.next(&map, now, batch_max, &|r| r.iter().any(|r| held.iter().any(|b| b.contains(r)))) {
                    Next::Batch(batch) => {
                        prop_assert!(batch.count() <= batch_max);
                        prop_assert!(batch.iter().all(|r| !map.0[r.0 as usize] && !held.iter().any(|b| b.contains(r))));
                        in_flight.push(batch);
                    }
                    Next::WaitUntil(until) if calm && in_flight.is_empty() => { prop_assert!(until > now); now = until; }
                    Next::WaitUntil(_) => {}
                    Next::WaitForBatch => prop_assert!(!in_flight.is_empty()),
                    Next::Done => { prop_assert!(map.0.iter().all(|b| *b)); if calm { break; } }
                }
                if calm && !in_flight.is_empty() {
                    let batch = in_flight.remove(0);
                    batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                    sched.succeeded(batch);
                }
            }
        }
    }
}
