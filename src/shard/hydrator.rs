//! Background hydration of one slice: keeps a pipeline of copies full, gives way to clients, backs off when copies fail.

use super::copy_pool::{BATCH_BYTES, Pipeline};
use super::inflight::Hold;
use super::locks::Held;
use super::slice::{CloneSlice, count};
use crate::clone_state::{AUTOMATIC, CopyFailure};
use crate::error::{Error, ErrorKind, Result};
use crate::hydration_sched::Next;
use crate::hydration_share::Answer;
use crate::io_frontend::request::{Allocation, Extent};
use crate::metrics::record::How;
use crate::units::{ByteRange, Geometry, RegionIndex, RegionRange};
use std::rc::Rc;
use std::time::Duration;

/// With a rate, batches are at most the bytes of this time...
const BATCH_TIME_MAX: Duration = Duration::from_millis(125);
/// ...and this, when a batch size is set.
const SET_BATCH_TIME_MAX: Duration = Duration::from_secs(1);
/// How far ahead the source is asked what is allocated, in bytes.
const ALLOCATION_AHEAD_BYTES: u64 = 256 << 20;
/// When another shard uses up the hydration threshold, look again after this.
const THRESHOLD_RETRY: Duration = Duration::from_millis(2);

/// Regions of one batch when no batch size is set.
pub fn automatic_batch_regions(geometry: &Geometry) -> u64 {
    (BATCH_BYTES >> geometry.region_size().shift()).max(1)
}

/// Whether other regions would fail as well.
fn is_for_all(error: &Error) -> bool {
    use ErrorKind::{Failed, NoSpace, ReadOnly, Shutdown, SourceChanged, SourceLost};
    matches!(error.kind(), SourceLost | SourceChanged | NoSpace | ReadOnly | Failed | Shutdown)
}

/// What the source said of a stretch of the device.
#[derive(Default)]
struct Ahead {
    start: u64,
    extents: Vec<Extent<Allocation>>,
}

impl Ahead {
    /// The extent at `offset`, to its end.
    fn at(&self, offset: u64) -> Option<(ByteRange, Allocation)> {
        let mut start = self.start;
        for extent in &self.extents {
            let end = start + extent.len;
            if (start..end).contains(&offset) {
                return ByteRange::between(offset, end).map(|range| (range, extent.state));
            }
            start = end;
        }
        None
    }
}

impl CloneSlice {
    /// Starts [`Self::hydrate`] on this executor.
    pub fn start_hydration(self: &Rc<Self>) {
        self.env.spawn_background(Box::pin(self.clone().hydrate()));
    }

    /// Hydrates until everything of this slice is hydrated, the clone stops, or another slice is
    /// in this one's place. One task per slice.
    pub async fn hydrate(self: Rc<Self>) {
        let mut ahead = Ahead::default();
        while !self.state.is_stopping() && !self.state.is_complete() && !self.replaced.get() {
            let now = self.env.now();
            let knobs = self.state.knobs();
            let threshold = knobs.threshold;
            if !self.state.may_hydrate() {
                self.state.budget().withdraw(self.me, now);
                self.wake.notified().await;
                continue;
            }
            let pipeline = self.copies.pipeline(now);
            let batch_max = self.batch_regions(knobs.batch_size, pipeline);
            let batch_bytes = batch_max << self.geometry.region_size().shift();
            // Batches can be larger than the share: one always goes.
            if self.copies.copies_in_flight() > 0 && self.copies.bytes_in_flight() + batch_bytes > pipeline.limit {
                self.wake.notified().await;
                continue;
            }
            // Copies on demand take from the threshold too: a batch gets what they leave, and never has to wait until
            // there is room for all of it.
            let room = threshold.saturating_sub(self.state.hydrating());
            if room == 0 {
                self.notified_or_after(THRESHOLD_RETRY).await;
                continue;
            }
            let pause = self.sched.borrow().paused_until(now).max(self.state.hydration_paused_until(now));
            if let Some(until) = pause {
                self.state.budget().withdraw(self.me, now);
                self.notified_or_after(until.saturating_sub(now)).await;
                continue;
            }
            let batch_max = batch_max.min(room);
            let batch_bytes = batch_max << self.geometry.region_size().shift();
            if let Answer::WaitUntil(until) = self.state.budget().request(self.me, batch_bytes, now) {
                self.notified_or_after(until.saturating_sub(now)).await;
                continue;
            }
            let next = {
                let busy = |regions| !self.locks.is_free(self.geometry.bytes_of(regions), Hold::Exclusive);
                self.sched.borrow_mut().next(&*self.map.borrow(), now, batch_max, &busy)
            };
            match next {
                Next::Batch(batch) => {
                    if !self.state.try_add_hydrating(batch.count(), threshold) {
                        self.sched.borrow_mut().skipped(batch);
                        self.sched.borrow_mut().back_to(batch.first());
                        self.notified_or_after(THRESHOLD_RETRY).await;
                        continue;
                    }
                    self.state.hydration_starts(now);
                    self.launching.set(true);
                    self.launch(batch, &mut ahead).await;
                    self.launching.set(false);
                }
                Next::WaitUntil(until) => {
                    if self.sched.borrow().failed_regions() > 0 {
                        self.state.only_bad_regions_left(self.me, now);
                    }
                    self.state.budget().withdraw(self.me, now);
                    self.notified_or_after(until.saturating_sub(now)).await;
                }
                waiting @ (Next::WaitForBatch | Next::Done) => {
                    if waiting == Next::Done {
                        self.state.hydration_works(self.me, now);
                    }
                    self.state.budget().withdraw(self.me, now);
                    self.wake.notified().await;
                }
            }
        }
        self.state.budget().withdraw(self.me, self.env.now());
    }

    /// The most regions of one batch: as it was set, or what the share of the pipeline and the rate make of it.
    fn batch_regions(&self, set: u64, pipeline: Pipeline) -> u64 {
        let of_rate = |time: Duration| {
            let rate = u128::from(self.state.budget().lowest_rate()?);
            u64::try_from(rate * time.as_millis() / 1000).ok()
        };
        let regions = |bytes: u64| bytes >> self.geometry.region_size().shift();
        let regions = match set {
            AUTOMATIC => regions(of_rate(BATCH_TIME_MAX).map_or(pipeline.batch, |bytes| bytes.min(pipeline.batch))),
            // More than the device has is all of it.
            set => {
                of_rate(SET_BATCH_TIME_MAX).map_or(set, |bytes| regions(bytes).min(set)).min(self.geometry.nr_regions())
            }
        };
        regions.max(1)
    }

    async fn notified_or_after(&self, delay: Duration) {
        futures_lite::future::or(self.wake.notified(), self.env.sleep(delay)).await;
    }

    /// Starts the copy of a batch, which is counted as hydrating.
    async fn launch(self: &Rc<Self>, batch: RegionRange, ahead: &mut Ahead) {
        let start = self.geometry.bytes_of(batch).start();
        let extent = match self.look_ahead(start, ahead).await {
            Ok(extent) => extent,
            Err(error) => {
                self.state.sub_hydrating(batch.count());
                if self.uniform(batch) != Some(false) {
                    return self.sched.borrow_mut().skipped(batch);
                }
                let now = self.env.now();
                return self.batch_ended(batch, Err(error), now);
            }
        };
        if !self.state.may_hydrate() {
            // That was decided while the source was asked.
            self.state.sub_hydrating(batch.count());
            let mut sched = self.sched.borrow_mut();
            sched.skipped(batch);
            return sched.back_to(batch.first());
        }
        let (batch, zero) = match extent {
            Some((range, state)) if state.zero => self.zero_run(batch, range),
            _ => (batch, false),
        };
        let bytes = self.geometry.bytes_of(batch);
        let held = self.locks.try_hold(bytes, Hold::Exclusive).filter(|_| self.uniform(batch) == Some(false));
        let Some(held) = held else {
            // A client came first, while the source was asked.
            self.state.sub_hydrating(batch.count());
            self.sched.borrow_mut().skipped(batch);
            return;
        };
        self.counters.batch_regions.record(batch.count());
        let read = if zero { 0 } else { bytes.len() };
        self.state.budget().spend(self.me, read);
        let began = self.env.now();
        let in_flight = self.copies.begin_batch(read, began);
        let slice = self.clone();
        self.env.spawn_background(Box::pin(async move {
            let result = slice.copy_batch(batch, held, zero).await;
            in_flight.end(slice.env.now());
            slice.batch_ended(batch, result, began);
        }));
    }

    async fn copy_batch(self: &Rc<Self>, batch: RegionRange, held: Held, zero: bool) -> Result<()> {
        let copy = self.counted_copy(batch, held);
        if !zero {
            return self.copy(copy, How::Background).await;
        }
        self.state.check_mode(true)?;
        let bytes = self.geometry.bytes_of(batch);
        self.store_zeros(bytes).await?;
        self.copied(&copy, How::Zeroes, bytes.len());
        Ok(())
    }

    fn batch_ended(&self, batch: RegionRange, result: Result<()>, began: Duration) {
        let now = self.env.now();
        let mut sched = self.sched.borrow_mut();
        match result {
            Ok(()) => {
                sched.succeeded(batch);
                if !sched.is_paused() && sched.failed_regions() == 0 {
                    self.state.hydration_works(self.me, now);
                }
            }
            Err(error) if is_for_all(&error) => {
                sched.failed_for_all(batch, now);
                self.state.hydration_fails(self.me, &error, now);
                drop(sched);
                self.note_failed_batch(error);
            }
            Err(error) => {
                let isolating = sched.failed(batch, now).isolating;
                drop(sched);
                self.state.copy_failed(&CopyFailure { shard: self.me, batch, isolating, began, error: &error }, now);
                self.note_failed_batch(error);
            }
        }
        self.wake.notify();
    }

    fn note_failed_batch(&self, error: Error) {
        count(&self.counters.copy_failures, 1);
        self.log_failure(&error.within("hydration"));
    }

    /// What the source says of the bytes from `start`, asked for a long stretch at a time.
    async fn look_ahead(&self, start: u64, ahead: &mut Ahead) -> Result<Option<(ByteRange, Allocation)>> {
        if let Some(found) = ahead.at(start) {
            return Ok(Some(found));
        }
        let zone = self.geometry.zone_of(self.geometry.region_of(start));
        let zone_end = self.geometry.bytes_of(self.geometry.zone_regions(zone)).end();
        let Some(range) = ByteRange::between(start, zone_end.min(start + ALLOCATION_AHEAD_BYTES)) else {
            return Ok(None);
        };
        let source = self.source()?;
        let extents = match self.answer_of_source(source.allocation(range)).await {
            Ok(extents) => extents,
            Err(error) if is_for_all(&error) => return Err(error),
            // Reads may work all the same: then all is data.
            Err(_) => vec![Extent { len: range.len(), state: Allocation::DATA }],
        };
        *ahead = Ahead { start, extents };
        Ok(ahead.at(start))
    }

    /// A batch that lies in zeros of the source grows over all free unhydrated regions in them; one that only
    /// begins there ends with them.
    fn zero_run(&self, batch: RegionRange, zeros: ByteRange) -> (RegionRange, bool) {
        let zeros = zeros.intersection(self.geometry.whole()).unwrap_or(self.geometry.bytes_of(batch));
        let Some(covered) = self.geometry.covered(zeros).filter(|c| c.first() == batch.first()) else {
            return (batch, false);
        };
        let (hydrated, run) = self.map.borrow().run_from(batch.first(), covered.end());
        if hydrated {
            return (batch, false);
        }
        // A threshold bounds what is copied; the counted number must stay what was granted.
        let grown = if self.state.knobs().threshold == AUTOMATIC { run.end() } else { run.end().min(batch.end()) };
        let free = |end: RegionIndex| {
            RegionRange::between(batch.first(), end)
                .filter(|r| self.locks.is_free(self.geometry.bytes_of(*r), Hold::Exclusive))
        };
        match free(grown).or_else(|| free(batch.end().min(covered.end()))) {
            Some(run) => {
                match run.count() >= batch.count() {
                    true => self.state.add_hydrating(run.count() - batch.count()),
                    false => self.state.sub_hydrating(batch.count() - run.count()),
                }
                self.sched.borrow_mut().resized(run);
                (run, true)
            }
            None => (batch, false),
        }
    }
}
