//! How busy an executor is: what its ring did, and how long it slept for want of work.

use super::Ring;
use crate::metrics::record::count;
use crate::metrics::schema::ExecutorMetrics;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The recent load is that of a time at least this long, ended by a sleep.
const WINDOW: Duration = Duration::from_secs(1);

/// Counters of one ring.
pub(super) struct Load {
    pub system_calls: Cell<u64>,
    pub submitted: Cell<u64>,
    pub completed: Cell<u64>,
    started: Instant,
    parks: Cell<u64>,
    parked: Cell<Duration>,
    /// When the present window began, and what [`Self::parked`] was then.
    window: Cell<(Instant, Duration)>,
    /// The load of the window before it.
    last_window: Cell<Option<f64>>,
}

impl Load {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            system_calls: Cell::new(0),
            submitted: Cell::new(0),
            completed: Cell::new(0),
            started: now,
            parks: Cell::new(0),
            parked: Cell::default(),
            window: Cell::new((now, Duration::ZERO)),
            last_window: Cell::new(None),
        }
    }

    /// The executor was asleep.
    pub fn parked(&self, began: Instant, ended: Instant) {
        count(&self.parks, 1);
        self.parked.set(self.parked.get() + ended.saturating_duration_since(began));
        if ended.saturating_duration_since(self.window.get().0) >= WINDOW {
            self.last_window.set(Some(self.load_of_window(ended)));
            self.window.set((ended, self.parked.get()));
        }
    }

    fn load_of_window(&self, now: Instant) -> f64 {
        let (began, parked) = self.window.get();
        load(now.saturating_duration_since(began), self.parked.get().saturating_sub(parked))
    }

    /// Of the last window; of the present one, if that is long enough or the first.
    fn recent(&self, now: Instant) -> f64 {
        let fresh = now.saturating_duration_since(self.window.get().0) >= WINDOW;
        self.last_window.get().filter(|_| !fresh).unwrap_or_else(|| self.load_of_window(now))
    }
}

/// The part of `time` that was not slept.
fn load(time: Duration, parked: Duration) -> f64 {
    match time.as_secs_f64() {
        0.0 => 0.0,
        all => (1.0 - parked.as_secs_f64() / all).clamp(0.0, 1.0),
    }
}

impl Ring {
    /// This executor's part of the metrics document, but for the processor time of its thread.
    pub fn metrics(&self) -> ExecutorMetrics {
        let (load_counts, now) = (&self.load, Instant::now());
        let alive = now.saturating_duration_since(load_counts.started);
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        ExecutorMetrics {
            alive_us: us(alive),
            parked_us: us(load_counts.parked.get()),
            parks: load_counts.parks.get(),
            cpu_us: 0,
            load: load(alive, load_counts.parked.get()),
            load_recent: load_counts.recent(now),
            system_calls: load_counts.system_calls.get(),
            submitted: load_counts.submitted.get(),
            completed: load_counts.completed.get(),
            in_flight: self.inner.borrow().in_flight as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_what_was_not_slept() {
        let load = Load::new();
        let at = |ms: u64| load.started + Duration::from_millis(ms);
        load.parked(at(100), at(400));
        assert!((load.recent(at(600)) - 0.5).abs() < 1e-9, "the first window so far");
        load.parked(at(600), at(1000));
        assert!((load.recent(at(1100)) - 0.3).abs() < 1e-9, "the window that ended at 1000");
        load.parked(at(1500), at(1600));
        assert!((load.recent(at(1700)) - 0.3).abs() < 1e-9);
        assert!((load.recent(at(2200)) - 1.1 / 1.2).abs() < 1e-9, "busy since 1600: the present window tells");
        assert_eq!((load.parks.get(), load.parked.get()), (3, Duration::from_millis(800)));
    }
}
