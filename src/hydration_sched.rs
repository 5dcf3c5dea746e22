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
mod tests;
