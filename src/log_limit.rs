//! Failures in the log without flooding it: a burst is told line by line, the rest by its count.

use crate::error::Error;
use std::time::Duration;

/// Lines told in one [`WINDOW`]; more are counted.
const LINES_PER_WINDOW: u32 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// Limits the log lines of one kind of failure.
#[derive(Default, Debug)]
pub struct LogLimit {
    window_start: Option<Duration>,
    told: u32,
    suppressed: u64,
}

impl LogLimit {
    /// The line to log for this failure, if any. Tells how many were not logged before it.
    pub fn line(&mut self, now: Duration, error: &Error) -> Option<String> {
        if self.window_start.is_none_or(|start| now.saturating_sub(start) >= WINDOW) {
            self.window_start = Some(now);
            self.told = 0;
        }
        if self.told == LINES_PER_WINDOW {
            self.suppressed += 1;
            return None;
        }
        self.told += 1;
        match std::mem::take(&mut self.suppressed) {
            0 => Some(error.to_string()),
            more => Some(format!("{error} (and {more} more failures before it)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_burst_is_cut_and_counted() {
        let (mut limit, error) = (LogLimit::default(), Error::new(ErrorKind::Io, "bad"));
        let told = (0..100).filter(|i| limit.line(Duration::from_millis(*i), &error).is_some()).count();
        assert_eq!(told, LINES_PER_WINDOW as usize);
        let line = limit.line(WINDOW, &error).unwrap();
        assert!(line.contains("95 more"), "{line}");
        assert_eq!(limit.line(WINDOW, &error).unwrap(), "bad");
    }
}
