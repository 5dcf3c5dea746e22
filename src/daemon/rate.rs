//! How fast hydration goes lately: an exponential average of samples.

use std::time::Duration;

/// After this long a change of speed shows by about two thirds.
const TIME_CONSTANT: Duration = Duration::from_secs(3);

/// A rate of bytes.
#[derive(Default, Debug)]
pub struct Rate {
    last: Option<(Duration, u64)>,
    bytes_per_second: Option<f64>,
}

impl Rate {
    /// `total` bytes were done at `now`.
    pub fn sample(&mut self, now: Duration, total: u64) {
        if let Some((then, before)) = self.last {
            let seconds = now.saturating_sub(then).as_secs_f64();
            if seconds <= 0.0 {
                return;
            }
            let rate = total.saturating_sub(before) as f64 / seconds;
            let weight = 1.0 - (-seconds / TIME_CONSTANT.as_secs_f64()).exp();
            self.bytes_per_second = Some(match self.bytes_per_second {
                Some(average) => average + (rate - average) * weight,
                None => rate,
            });
        }
        self.last = Some((now, total));
    }

    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second.unwrap_or(0.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_a_change_and_forgets_the_past() {
        let mut rate = Rate::default();
        assert_eq!(rate.bytes_per_second(), 0);
        for second in 0..10 {
            rate.sample(Duration::from_secs(second), second * 1000);
        }
        assert_eq!(rate.bytes_per_second(), 1000);
        for second in 10..30 {
            rate.sample(Duration::from_secs(second), 9000 + (second - 9) * 5000);
        }
        assert!((4900..=5000).contains(&rate.bytes_per_second()), "{}", rate.bytes_per_second());
    }
}
