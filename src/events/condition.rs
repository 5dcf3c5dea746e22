//! Conditions that come and go (the source is there, hydration runs), and when their changes are told. Pure.
//!
//! Every change is told once, at once, as long as there are not too many: after [`TOLD_MAX`] within [`WINDOW`] changes are
//! only counted, and at the end of the window what the condition is by then is told, with their number. So the last
//! thing that was told becomes true again soon, whatever flaps and however fast.

use std::time::Duration;

/// Changes told within one [`WINDOW`].
pub const TOLD_MAX: u32 = 6;
pub const WINDOW: Duration = Duration::from_secs(10);

/// A condition with the states `S`.
#[derive(Debug)]
pub struct Condition<S> {
    state: S,
    window_start: Option<Duration>,
    told: u32,
    /// Changes since the last one that was told.
    untold: u64,
}

impl<S: Copy + PartialEq> Condition<S> {
    pub fn new(state: S) -> Self {
        Self { state, window_start: None, told: 0, untold: 0 }
    }

    pub fn state(&self) -> S {
        self.state
    }

    /// The condition is `to` now, which is told in another way or not at all.
    pub fn is_quietly(&mut self, to: S) {
        (self.state, self.untold) = (to, 0);
    }

    /// The condition is `to` now. Returns whether that is a change to be told, with the number of those before it that
    /// were not.
    pub fn change(&mut self, to: S, now: Duration) -> Option<u64> {
        if to == self.state {
            return None;
        }
        self.state = to;
        if self.is_window_over(now) {
            (self.window_start, self.told) = (Some(now), 0);
        }
        if self.told == TOLD_MAX {
            self.untold = self.untold.saturating_add(1);
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.untold))
    }

    /// The state that is to be told late, when the window is over, with the number of changes not told before it.
    pub fn overdue(&mut self, now: Duration) -> Option<(S, u64)> {
        if self.untold == 0 || !self.is_window_over(now) {
            return None;
        }
        (self.window_start, self.told) = (Some(now), 1);
        // One of them is told now.
        Some((self.state, std::mem::take(&mut self.untold) - 1))
    }

    fn is_window_over(&self, now: Duration) -> bool {
        self.window_start.is_none_or(|start| now.saturating_sub(start) >= WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_change_once() {
        let mut condition = Condition::new(false);
        assert_eq!(condition.change(false, Duration::ZERO), None);
        assert_eq!(condition.change(true, Duration::ZERO), Some(0));
        assert_eq!(condition.change(true, Duration::from_secs(1)), None);
        assert_eq!(condition.change(false, Duration::from_secs(2)), Some(0));
        assert_eq!(condition.overdue(Duration::from_secs(100)), None, "all was told");
    }

    #[test]
    fn a_burst_is_cut_off_and_summed_up() {
        let mut condition = Condition::new(0);
        let told = (1..=100u32).filter(|to| condition.change(*to, Duration::from_secs(1)).is_some()).count();
        assert_eq!(told, TOLD_MAX as usize);
        let end = Duration::from_secs(1) + WINDOW;
        assert_eq!(condition.overdue(end - Duration::from_nanos(1)), None);
        assert_eq!(condition.overdue(end), Some((100, u64::from(100 - TOLD_MAX) - 1)));
        assert_eq!(condition.overdue(end + WINDOW), None);
    }

    /// What was told in another way is not told again, nor counted.
    #[test]
    fn quiet_changes_are_not_told() {
        let mut condition = Condition::new(0);
        for to in (0..TOLD_MAX + 3).map(|i| (i + 1) % 2) {
            condition.change(to, Duration::ZERO);
        }
        condition.is_quietly(7);
        assert_eq!(condition.state(), 7);
        assert_eq!(condition.overdue(WINDOW), None);
        assert_eq!(condition.change(7, WINDOW), None);
        assert_eq!(condition.change(1, WINDOW), Some(0));
    }

    proptest! {
        /// Whatever flaps: what is told is bounded, nothing is told twice, no change goes uncounted, and after a window of
        /// peace the last thing told is true.
        #[test]
        fn flapping_is_bounded_and_the_last_word_is_true(
            steps in prop::collection::vec((0u8..3, 0u64..3000), 1..400),
        ) {
            let mut condition = Condition::new(0u8);
            let (mut now, mut changes, mut counted) = (Duration::ZERO, 0u64, 0u64);
            let mut told: Vec<(Duration, u8)> = Vec::new();
            for (to, pause_ms) in steps {
                now += Duration::from_millis(pause_ms);
                if let Some((state, before)) = condition.overdue(now) {
                    told.push((now, state));
                    counted += 1 + before;
                }
                changes += u64::from(to != condition.state());
                if let Some(before) = condition.change(to, now) {
                    told.push((now, to));
                    counted += 1 + before;
                }
                prop_assert_eq!(condition.state(), to);
            }
            now += WINDOW;
            if let Some((state, before)) = condition.overdue(now) {
                told.push((now, state));
                counted += 1 + before;
            }
            prop_assert_eq!(counted, changes);
            prop_assert_eq!(told.last().map_or(0, |(_, state)| *state), condition.state());
            for (start, _) in &told {
                let within = told.iter().filter(|(at, _)| *at >= *start && *at < *start + WINDOW).count();
                prop_assert!(within <= 2 * TOLD_MAX as usize, "{} told within a window", within);
            }
        }
    }
}
