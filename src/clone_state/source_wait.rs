//! How long a clone has been waiting for its source: requests that are out, of all shards, and none of them answered.
//!
//! A source that has stopped answering is not lost before a timeout has passed; this is what can be said of it until
//! then. Two atomics for each request to the source; the times are of the environment's clock, which all shards share.
//! Two shards that begin and end at the same moment may make it a little too short, never too long.

use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::Duration;

/// See the head of this file.
#[derive(Default)]
pub struct SourceWait {
    outstanding: AtomicU64,
    /// In microseconds: when the first of those that are out was asked, or when one was last answered.
    since_us: AtomicU64,
}

/// A request to the source that is out until this is dropped.
pub struct Asked<'a>(&'a SourceWait);

impl SourceWait {
    /// A request goes to the source.
    pub fn asked(&self, now: Duration) -> Asked<'_> {
        if self.outstanding.load(Acquire) == 0 {
            // Before it counts, so that nobody sees an older time with it.
            self.is_alive(now);
        }
        self.outstanding.fetch_add(1, AcqRel);
        Asked(self)
    }

    fn is_alive(&self, now: Duration) {
        self.since_us.fetch_max(u64::try_from(now.as_micros()).unwrap_or(u64::MAX), AcqRel);
    }

    /// For how long requests have been out without an answer to any of them; 0 when none is out.
    pub fn silence(&self, now: Duration) -> Duration {
        match self.outstanding.load(Acquire) {
            0 => Duration::ZERO,
            _ => now.saturating_sub(Duration::from_micros(self.since_us.load(Acquire))),
        }
    }
}

impl Asked<'_> {
    /// The source said something: data, or that it has an error there.
    pub fn answered(self, now: Duration) {
        self.0.is_alive(now);
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_as_long_as_requests_are_out_and_none_is_answered() {
        let s = Duration::from_secs;
        let wait = SourceWait::default();
        assert_eq!(wait.silence(s(100)), s(0), "nothing was asked");
        let (first, second) = (wait.asked(s(100)), wait.asked(s(103)));
        assert_eq!(wait.silence(s(105)), s(5));
        first.answered(s(106));
        assert_eq!(wait.silence(s(108)), s(2), "the other one is out");
        // Given up: no answer.
        let third = wait.asked(s(109));
        drop(second);
        assert_eq!(wait.silence(s(110)), s(4));
        drop(third);
        assert_eq!(wait.silence(s(200)), s(0));
        let _fourth = wait.asked(s(300));
        assert_eq!(wait.silence(s(301)), s(1), "what was before does not count");
    }
}
