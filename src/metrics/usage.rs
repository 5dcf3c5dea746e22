//! What the process and its threads use, as the kernel counts it.

use super::schema::ProcessMetrics;
use std::time::Duration;

/// Processor time of the current thread, in user and kernel mode.
pub fn thread_cpu_time() -> Duration {
    cpu_time(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// The CPU that the current thread runs on.
pub fn current_cpu() -> u32 {
    // SAFETY: takes nothing and returns a number.
    u32::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0)
}

/// Of the process, all its threads together.
pub fn process(shards: u16) -> ProcessMetrics {
    let rss_bytes = resident_bytes().unwrap_or(0);
    ProcessMetrics {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        shards: shards.into(),
        cpu_seconds: cpu_time(libc::CLOCK_PROCESS_CPUTIME_ID).as_secs_f64(),
        rss_bytes,
        // The kernel brings its maximum up to date only now and then.
        rss_max_bytes: resident_bytes_max().unwrap_or(0).max(rss_bytes),
    }
}

fn cpu_time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live timespec. It can't fail: both clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// The second number of proc_pid_statm(5), in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: takes a number and returns one.
    let page_bytes = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    pages.checked_mul(page_bytes)
}

fn resident_bytes_max() -> Option<u64> {
    // SAFETY: all zeros is a valid rusage; getrusage(2) gets a live one.
    let (result, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &mut usage), usage)
    };
    // In KiB.
    (result == 0).then(|| u64::try_from(usage.ru_maxrss).ok()?.checked_mul(1024)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_measured() {
        let (before, start) = (thread_cpu_time(), std::time::Instant::now());
        while start.elapsed() < Duration::from_millis(20) {
            std::hint::black_box(0);
        }
        let spent = thread_cpu_time().saturating_sub(before);
        assert!(spent > Duration::ZERO && spent <= start.elapsed() + Duration::from_millis(1), "{spent:?}");
        let process = process(3);
        assert!(process.cpu_seconds >= spent.as_secs_f64());
        assert!(process.rss_bytes > 100_000 && process.rss_max_bytes >= process.rss_bytes, "{process:?}");
        assert_eq!((process.pid, process.shards), (std::process::id(), 3));
    }
}
