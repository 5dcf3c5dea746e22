//! Numbers for people. Pure.

/// `5.0 MiB`; with three digits before the point there are none after it.
pub fn size(bytes: u64) -> String {
    scaled(bytes as f64)
}

/// `220 MiB/s`.
pub fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", scaled(bytes_per_second))
}

fn scaled(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024.0 {
        return format!("{bytes:.0} B");
    }
    let mut value = bytes / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 99.95 { 1 } else { 0 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A plain number; here so that all numbers go one way.
pub fn count(number: u64) -> String {
    number.to_string()
}

/// `45.2%`, rounded down, so that `100%` means all.
pub fn percent(fraction: f64) -> String {
    match fraction {
        all if all >= 1.0 => "100%".into(),
        part => format!("{:.1}%", (part.max(0.0) * 1000.0).floor() / 10.0),
    }
}

/// The two largest units: `41s`, `1h 2m`, `3d 0h`.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// A moment, in milliseconds since 1970-01-01 UTC, as RFC 3339 has it: `2026-11-22T18:30:07.042Z`.
pub fn utc(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Civil from days, in eras of 400 years that begin on March 1st: the leap day is the last of its year.
    let since_era0 = days + 719_468;
    let (era, day_of_era) = (since_era0 / 146_097, since_era0 % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// A latency: `870 us`, `12.3 ms`, `1.25 s`.
pub fn latency(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (100 << 10, "100 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1 << 20, "1.0 MiB"),
            (220 << 20, "220 MiB"),
            (u64::MAX, "16384 PiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn the_rest() {
        assert_eq!(percent(0.99999), "99.9%");
        assert_eq!(percent(1.0), "100%");
        assert_eq!(percent(0.4526), "45.2%");
        assert_eq!([0, 59, 60, 3723, 90000].map(duration), ["0s", "59s", "1m 0s", "1h 2m", "1d 1h"]);
        // Checked against date(1).
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_827_696_789), "2000-02-29T12:34:56.789Z");
        assert_eq!(utc(4_107_542_399_999), "2100-02-28T23:59:59.999Z");
        assert_eq!(utc(1_795_372_207_042), "2026-11-22T18:30:07.042Z");
        assert!(utc(u64::MAX).ends_with('Z'));
        assert_eq!([870, 12_345, 1_250_000].map(latency), ["870 us", "12.3 ms", "1.25 s"]);
    }
}
