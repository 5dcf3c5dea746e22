//! What comes and goes with a clone, the background copy and its source, and the events of that.
//!
//! Shards report what they see; each change of the whole is told once, and not more often than
//! [`crate::events::condition`] allows: [`CloneState::tell_overdue`], called every second or so, catches up.

use super::{CloneState, Mode};
use crate::error::Error;
use crate::events::EventKind;
use crate::events::condition::Condition;
use crate::hydration_failures::{BAD_RUNS_LISTED_MAX, BAD_RUNS_TOLD_MAX, BadRegions, FailuresInARow, Verdict};
use crate::units::{RegionRange, ShardIndex};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::*;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

/// The background copy, as far as it was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hydration {
    /// Not begun, or switched off.
    Off,
    Running,
    /// Backing off after failures, on one shard at least; with so many bad regions.
    Failing(u64),
    /// Until the user says that it is to go on.
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SourceHealth {
    Found,
    Lost,
    /// For good.
    Changed,
}

/// A background copy that failed because of its data.
pub struct CopyFailure<'a> {
    pub shard: ShardIndex,
    pub batch: RegionRange,
    /// See [`crate::hydration_sched::Failed::isolating`]: not counted.
    pub isolating: bool,
    pub began: Duration,
    pub error: &'a Error,
}

/// The newest failure of a background copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LastFailure {
    pub text: String,
    pub errno: i32,
}

impl LastFailure {
    fn of(error: &Error) -> Self {
        Self { text: error.to_string(), errno: error.errno() }
    }
}

/// What failed so far and has not been mended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FailureReport {
    pub in_a_row: u64,
    pub bad_regions: u64,
    /// The first runs of them, at most [`BAD_RUNS_LISTED_MAX`].
    pub bad_runs: Vec<RegionRange>,
    pub last: Option<LastFailure>,
}

/// See the head of this file.
pub(super) struct Health {
    hydration: Condition<Hydration>,
    /// The words of its last change.
    hydration_text: String,
    /// Shards that back off.
    failing: BTreeSet<ShardIndex>,
    in_a_row: FailuresInARow,
    bad: BadRegions,
    /// Bad regions were told of, and their end was not.
    bad_told: bool,
    /// Of a background copy.
    last_failure: Option<LastFailure>,
    /// Why shards back off from all copies (see `failing`): the newest failure of theirs.
    failing_because: Option<LastFailure>,
    source: Condition<SourceHealth>,
    source_text: String,
    /// Why the metadata mode is not `rw`.
    pub(super) mode_reason: Option<String>,
}

impl Health {
    /// No shard backs off any more.
    fn end_failing(&mut self) {
        self.failing.clear();
        self.failing_because = None;
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            hydration: Condition::new(Hydration::Off),
            hydration_text: String::new(),
            failing: BTreeSet::new(),
            in_a_row: FailuresInARow::default(),
            bad: BadRegions::default(),
            bad_told: false,
            last_failure: None,
            failing_because: None,
            source: Condition::new(SourceHealth::Found),
            source_text: String::new(),
            mode_reason: None,
        }
    }
}

/// What is told, with the changes that were not told before it.
fn with_untold(text: &str, untold: u64) -> String {
    match untold {
        0 => text.into(),
        1 => format!("{text} (after 1 more change in quick succession)"),
        _ => format!("{text} (after {untold} more changes in quick succession)"),
    }
}

impl CloneState {
    pub(super) fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A background copy is about to be made. Cheap when that is no news.
    pub fn hydration_starts(&self, now: Duration) {
        if self.hydration_told.load(Relaxed) {
            return;
        }
        let mut health = self.health();
        // Under the lock, so that an order that comes at the same moment is seen here, or sees what is done here.
        if !self.may_hydrate() {
            return;
        }
        if health.hydration.state() == Hydration::Off {
            self.hydration_told.store(true, Relaxed);
            self.hydration_is(&mut health, Hydration::Running, "hydration started", now);
        }
    }

    /// A complete clone has grown: its background copy begins once more.
    pub(super) fn hydration_begins_anew(&self) {
        let mut health = self.health();
        health.hydration = Condition::new(Hydration::Off);
        health.in_a_row = FailuresInARow::default();
        health.end_failing();
        self.hydration_told.store(false, Relaxed);
        self.hydration_stopped.store(false, Release);
    }

    /// The user wants background copies: failures so far do not count any more.
    pub(super) fn hydration_goes_on(&self, now: Duration) {
        let mut health = self.health();
        health.in_a_row.begin_anew(now);
        if self.hydration_stopped.swap(false, AcqRel) && health.hydration.state() == Hydration::Stopped {
            // Told when the next copy begins.
            health.hydration.is_quietly(Hydration::Off);
        }
    }

    /// The user does not want background copies (any more); `why` in words. To be called after the order is in force.
    pub fn hydration_paused(&self, why: &str, now: Duration) {
        let mut health = self.health();
        self.hydration_told.store(false, Relaxed);
        health.end_failing();
        if !self.is_complete() && !self.is_stopping() && self.mode() == Mode::ReadWrite {
            self.hydration_is(&mut health, Hydration::Off, &format!("hydration paused: {why}"), now);
        }
    }

    /// A shard backs off for a reason that holds for all copies.
    pub fn hydration_fails(&self, shard: ShardIndex, error: &Error, now: Duration) {
        let mut health = self.health();
        self.shard_fails(&mut health, shard, &format!("hydration pauses on shard {shard}: {error}"), now);
        if health.failing.contains(&shard) {
            health.failing_because = Some(LastFailure::of(error));
        }
    }

    fn shard_fails(&self, health: &mut Health, shard: ShardIndex, why: &str, now: Duration) {
        if self.may_hydrate() && !self.is_all_hydrated() && health.failing.insert(shard) {
            self.hydration_told.store(false, Relaxed);
            if !matches!(health.hydration.state(), Hydration::Failing(_)) {
                self.hydration_is(health, Hydration::Failing(0), why, now);
            }
        }
    }

    /// A background copy has failed because of its data. This may pause all of the clone's copies, or stop them.
    pub fn copy_failed(&self, failure: &CopyFailure<'_>, now: Duration) {
        let mut health = self.health();
        if failure.batch.count() == 1 {
            health.bad.insert(failure.batch.first());
        }
        let error = failure.error;
        health.last_failure = Some(LastFailure::of(error));
        if failure.isolating || !self.may_hydrate() || self.is_all_hydrated() {
            return;
        }
        let verdict = health.in_a_row.failed(failure.began, now, self.hydration_failures_max());
        self.is_failing.store(true, Release);
        let count = health.in_a_row.count();
        match verdict {
            Verdict::GoOn => {}
            Verdict::Pause => {
                let text = format!("hydration pauses after {count} failures in a row: {error}");
                self.shard_fails(&mut health, failure.shard, &text, now);
            }
            Verdict::Stop => {
                self.hydration_stopped.store(true, Release);
                self.hydration_told.store(false, Relaxed);
                health.end_failing();
                let in_a_row = if count == 1 { "a failure".into() } else { format!("{count} failures in a row") };
                let left = self.geometry().nr_regions() - self.hydrated();
                let text = format!(
                    "hydration stopped after {in_a_row}: {left} of {} regions are left, {}; enable_hydration goes on; \
                     the last error: {error}",
                    self.geometry().nr_regions(),
                    match health.bad.count() {
                        0 => "none of them was tried alone".into(),
                        bad => format!("{bad} of them bad: {}", self.bad_words(&health)),
                    },
                );
                health.bad_told |= health.bad.count() > 0;
                self.hydration_is(&mut health, Hydration::Stopped, &text, now);
            }
        }
    }

    fn bad_words(&self, health: &Health) -> String {
        health.bad.words(&self.geometry(), BAD_RUNS_TOLD_MAX)
    }

    /// A shard has nothing left to do but to try bad regions again.
    pub fn only_bad_regions_left(&self, shard: ShardIndex, now: Duration) {
        let mut health = self.health();
        let bad = health.bad.count();
        // As long as anything is copied, by another shard, there may be more of them soon: it tells of all.
        if bad == 0 || self.hydrating() > 0 || !self.may_hydrate() || self.is_all_hydrated() {
            return;
        }
        health.failing.insert(shard);
        self.hydration_told.store(false, Relaxed);
        health.bad_told = true;
        let regions = if bad == 1 { "1 region".into() } else { format!("{bad} regions") };
        let last = health.last_failure.as_ref().map_or("", |last| &last.text);
        let words = self.bad_words(&health);
        let text = format!("hydration backs off: {regions} could not be copied: {words}; the last error: {last}");
        self.hydration_is(&mut health, Hydration::Failing(bad), &text, now);
    }

    /// A copy has succeeded, whoever asked for it. Cheap when none has failed lately.
    pub fn copy_succeeded(&self) {
        if self.is_failing.load(Relaxed) && self.is_failing.swap(false, AcqRel) {
            let mut health = self.health();
            health.in_a_row.succeeded();
            if health.bad.count() == 0 && !self.is_hydration_stopped() {
                health.last_failure = None;
            }
        }
    }

    /// These regions, some of which were bad, are hydrated.
    pub fn bad_regions_hydrated(&self, regions: RegionRange) {
        let mut health = self.health();
        if health.bad.remove(regions) == 0 || health.bad.count() > 0 {
            return;
        }
        if !self.is_hydration_stopped() {
            health.last_failure = None;
        }
        if std::mem::take(&mut health.bad_told) && !self.is_complete() && self.mode() == Mode::ReadWrite {
            self.events()
                .raise(EventKind::BadRegionsHealed, "no region is bad any more: all were copied or overwritten");
        }
    }

    /// The end of a pause of all background copies of the clone that is not over.
    pub fn hydration_paused_until(&self, now: Duration) -> Option<Duration> {
        if !self.is_failing.load(Acquire) {
            return None;
        }
        self.health().in_a_row.paused_until(now)
    }

    /// What failed and is not mended.
    pub fn failure_report(&self) -> FailureReport {
        let health = self.health();
        FailureReport {
            // Clients may have overwritten what hydration stopped at.
            in_a_row: if self.is_complete() { 0 } else { health.in_a_row.count() },
            bad_regions: health.bad.count(),
            bad_runs: health.bad.runs(BAD_RUNS_LISTED_MAX),
            // Of a clone that is complete nothing is left to copy.
            last: health.failing_because.clone().filter(|_| !self.is_complete()).or(health.last_failure.clone()),
        }
    }

    /// A shard makes copies, and holds none back after failures.
    pub fn hydration_works(&self, shard: ShardIndex, now: Duration) {
        if self.hydration_told.load(Relaxed) {
            return;
        }
        let mut health = self.health();
        if health.failing.remove(&shard) && health.failing.is_empty() {
            health.end_failing();
        }
        let recovered = health.failing.is_empty() && matches!(health.hydration.state(), Hydration::Failing(_));
        if recovered && self.may_hydrate() && !self.is_all_hydrated() {
            self.hydration_told.store(true, Relaxed);
            let text = "hydration goes on: copies work again";
            self.hydration_is(&mut health, Hydration::Running, text, now);
        }
    }

    fn hydration_is(&self, health: &mut Health, to: Hydration, text: &str, now: Duration) {
        if health.hydration.state() == to {
            return;
        }
        health.hydration_text = text.into();
        if let Some(untold) = health.hydration.change(to, now) {
            self.tell_hydration(to, &with_untold(text, untold));
        }
    }

    fn tell_hydration(&self, state: Hydration, text: &str) {
        let kind = match state {
            Hydration::Off => EventKind::HydrationPaused,
            Hydration::Running => EventKind::HydrationStarted,
            Hydration::Failing(_) => EventKind::HydrationFailed,
            Hydration::Stopped => {
                // Nothing goes on without somebody: it is to be seen in a log that is read for warnings only.
                log::warn!("clone '{}': {text}", self.name);
                return self.events().record(EventKind::HydrationStopped, text);
            }
        };
        self.events().raise(kind, text);
    }

    pub fn source_lost(&self, why: &Error, now: Duration) {
        self.source_is(SourceHealth::Lost, format!("source lost: {why}"), now);
    }
    pub fn source_found(&self, now: Duration) {
        self.source_is(SourceHealth::Found, "source found again".into(), now);
        // What failed before it went away may work now.
        self.health().in_a_row.source_is_back(now);
    }
    /// It is another one, for good.
    pub fn source_changed(&self, why: &Error, now: Duration) {
        self.source_is(
            SourceHealth::Changed,
            format!("source changed, nothing more is read from it until the clone is started again: {why}"),
            now,
        );
    }

    fn source_is(&self, to: SourceHealth, text: String, now: Duration) {
        let mut health = self.health();
        // A clone that is complete has no source; one that ends lets go of it.
        if self.is_complete()
            || self.is_stopping()
            || health.source.state() == to
            || health.source.state() == SourceHealth::Changed
        {
            return;
        }
        let untold = health.source.change(to, now);
        if let Some(untold) = untold {
            self.tell_source(to, &with_untold(&text, untold));
        }
        health.source_text = text;
    }

    fn tell_source(&self, state: SourceHealth, text: &str) {
        let kind = match state {
            SourceHealth::Found => EventKind::SourceFound,
            SourceHealth::Lost => EventKind::SourceLost,
            SourceHealth::Changed => EventKind::SourceChanged,
        };
        self.events().raise(kind, text);
    }

    /// Tells what changed too often to be told each time, when it is time for it. To be called again and again.
    pub fn tell_overdue(&self, now: Duration) {
        let mut health = self.health();
        let hydration = health.hydration.overdue(now);
        if let Some((state, untold)) = hydration
            && !self.is_complete()
            && self.mode() == Mode::ReadWrite
        {
            self.tell_hydration(state, &with_untold(&health.hydration_text, untold));
        }
        let source = health.source.overdue(now);
        if let Some((state, untold)) = source
            && !self.is_complete()
            && !self.is_stopping()
        {
            self.tell_source(state, &with_untold(&health.source_text, untold));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;
    use crate::error::ErrorKind;
    use crate::event_log::EventLog;
    use crate::events::condition::{TOLD_MAX, WINDOW};
    use crate::units::RegionSize;

    const SECOND: Duration = Duration::from_secs(1);

    fn clone(enabled: bool) -> (CloneState, Arc<EventLog>) {
        let log = EventLog::new("i", Box::new(|| {}));
        let geometry = Geometry::new(1 << 20, RegionSize::new(4096).unwrap(), 64).unwrap();
        let knobs = HydrationKnobs { enabled, threshold: AUTOMATIC, batch_size: AUTOMATIC };
        (CloneState::new(CloneId(0), CloneEvents::new(&log, "vm"), geometry, 2, true, knobs), log)
    }

    fn kinds(log: &EventLog) -> Vec<&'static str> {
        log.after(0, None).events.iter().map(|event| event.kind.name()).collect()
    }

    #[test]
    fn hydration_is_told_once_per_transition() {
        let (state, log) = clone(false);
        let bad = Error::new(ErrorKind::NoSpace, "bad");
        state.hydration_starts(SECOND);
        state.set_hydration_enabled(false, SECOND);
        assert!(kinds(&log).is_empty(), "nothing ran");
        state.set_hydration_enabled(true, SECOND);
        assert!(kinds(&log).is_empty(), "no copy yet");
        (0..3).for_each(|_| state.hydration_starts(SECOND));
        (0..3).for_each(|_| state.hydration_works(ShardIndex(1), SECOND));
        assert_eq!(kinds(&log), ["hydration_started"]);
        // Both shards back off: one event. One of them is well again: none yet.
        (0..3).for_each(|_| state.hydration_fails(ShardIndex(0), &bad, SECOND));
        state.hydration_fails(ShardIndex(1), &bad, SECOND);
        state.hydration_starts(SECOND);
        state.hydration_works(ShardIndex(0), SECOND);
        assert_eq!(kinds(&log), ["hydration_started", "hydration_failed"]);
        state.hydration_works(ShardIndex(1), SECOND);
        assert_eq!(kinds(&log)[2..], ["hydration_started"]);
        state.set_hydration_threshold(0, SECOND);
        state.set_hydration_enabled(false, SECOND);
        state.hydration_fails(ShardIndex(1), &bad, SECOND);
        state.hydration_starts(SECOND);
        assert_eq!(kinds(&log)[3..], ["hydration_paused"]);
        state.set_hydration_threshold(1, SECOND);
        state.hydration_starts(SECOND);
        assert_eq!(kinds(&log).len(), 4, "it is still disabled");
        state.set_hydration_enabled(true, SECOND);
        state.hydration_starts(SECOND);
        assert_eq!(kinds(&log)[4..], ["hydration_started"]);
        // A clone that ends, is complete or read-only has nothing to tell of it.
        state.degrade(Mode::ReadOnly, &Error::new(ErrorKind::Io, "bad"));
        state.degrade(Mode::ReadOnly, &Error::new(ErrorKind::Io, "bad"));
        state.hydration_fails(ShardIndex(1), &bad, SECOND);
        assert_eq!(kinds(&log)[5..], ["read_only"]);
        assert_eq!(state.events().count().dm, 1);
    }

    /// As long as a shard backs off, whatever copies succeed on others.
    #[test]
    fn why_copies_are_held_back_is_known_as_long_as_they_are() {
        let (state, _) = clone(true);
        let full = Error::os(libc::ENOSPC, "destination /d: write");
        let reported = || state.failure_report().last.map(|last| (last.text, last.errno));
        let reason = Some((full.to_string(), libc::ENOSPC));
        state.hydration_starts(SECOND);
        state.hydration_fails(ShardIndex(0), &full, SECOND);
        state.hydration_fails(ShardIndex(1), &full, SECOND);
        state.copy_succeeded();
        state.hydration_works(ShardIndex(0), SECOND);
        assert_eq!(reported(), reason);
        state.hydration_works(ShardIndex(1), SECOND);
        assert_eq!(reported(), None);
        state.hydration_fails(ShardIndex(0), &full, SECOND);
        state.set_hydration_enabled(false, SECOND);
        assert_eq!(reported(), None, "nothing is copied because nobody wants it");
        state.hydration_fails(ShardIndex(0), &full, SECOND);
        assert_eq!(reported(), None, "that is late");
        state.set_hydration_enabled(true, SECOND);
        state.hydration_fails(ShardIndex(0), &full, SECOND);
        assert_eq!(reported(), reason);
        state.set_complete();
        assert_eq!(reported(), None, "clients have overwritten what was left");
    }

    #[test]
    fn nothing_is_told_of_the_source_once_the_end_has_begun() {
        let (state, log) = clone(true);
        let error = Error::new(ErrorKind::Io, "gone");
        // The last changes are kept back, to be told later.
        (0..20).for_each(|_| {
            state.source_lost(&error, SECOND);
            state.source_found(SECOND);
        });
        state.source_lost(&error, SECOND);
        let told = log.last();
        assert!(told > 0);
        state.set_stopping();
        state.tell_overdue(SECOND + 2 * WINDOW);
        state.source_found(SECOND + 3 * WINDOW);
        state.source_changed(&error, SECOND + 4 * WINDOW);
        assert_eq!(log.last(), told, "{:?}", kinds(&log));
    }

    #[test]
    fn a_flapping_source_is_told_in_bounds_and_truly_at_the_end() {
        let (state, log) = clone(true);
        let error = Error::new(ErrorKind::Io, "gone");
        // A hundred times a second, for a minute.
        for step in 0..6000 {
            let now = Duration::from_millis(10 * step);
            if step % 2 == 0 {
                state.source_lost(&error, now)
            } else {
                state.source_found(now)
            }
            if step % 100 == 0 {
                state.tell_overdue(now);
            }
        }
        let told = log.last();
        assert!((10..=7 * TOLD_MAX as u64).contains(&told), "{told}");
        state.tell_overdue(60 * SECOND + WINDOW);
        let last = log.after(0, None).events.pop().unwrap();
        assert_eq!(last.kind, EventKind::SourceFound);
        assert!(last.text.starts_with("source found again (after ") && last.text.contains(" more changes"), "{last:?}");
        let told = log.last();
        state.tell_overdue(200 * SECOND);
        assert_eq!(log.last(), told);
        // One that is another one stays that.
        state.source_lost(&error, 200 * SECOND);
        state.source_changed(&error, 200 * SECOND);
        state.source_found(200 * SECOND);
        assert_eq!(log.last(), told + 2);
        state.set_complete();
        state.tell_overdue(300 * SECOND);
        assert_eq!(log.last(), told + 2);
    }
}
