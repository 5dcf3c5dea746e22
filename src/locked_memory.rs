//! Memory of a process that serves a block device: it stays in RAM, and the process is not chosen to be killed for want of it.
//!
//! When memory is short the kernel writes pages out, to swap and to file systems, which may be on our own block device. A
//! daemon that had to wait for one of its own pages to be read back, or was killed to free some, would be waited for by those
//! who wait for that. So, once a process has a block device:
//! * everything that is in memory stays there, and so does all that comes (`mlockall` with `MCL_ONFAULT`: what was reserved and is
//!   never touched takes nothing); the program itself, libraries included, is read into memory as a whole;
//! * what was freed is kept for the next request (`mallopt`), so that a busy daemon asks the kernel for memory ever less;
//! * the process is left out when a process is looked for that can be killed (`oom_score_adj`).
//!
//! What is still to be allocated does not wait for the device either: see [`crate::environment::set_io_flusher`].
//!
//! A limit of locked memory in force would make later allocations fail, which is worse than to be swapped out. So nothing is
//! locked unless it has no limit for this process.

use crate::environment::{self, CAP_IPC_LOCK};
use crate::error::{Error, Result};
use std::fs;
use std::io;
use std::sync::OnceLock;

/// The whole process, as far as oom(5) goes.
const NEVER_KILLED: i32 = -1000;
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";
/// Freed memory beyond this goes back to the system, in bytes.
const FREE_BYTES_KEPT: i32 = 256 << 20;
/// What a thread that serves a block device keeps for the small things, in bytes, and in pieces of so many: no larger than
/// what comes from a thread's own heap whatever else is said.
const HEAP_BYTES_KEPT: usize = 4 << 20;
const HEAP_PIECE_BYTES: usize = 64 << 10;
/// Larger allocations are the system's, and go back when they are freed, in bytes. The largest that the C library takes.
const OWN_MAPPING_BYTES_MIN: i32 = 32 << 20;

/// See to it that this process can serve a block device however short memory is, as far as it may; what it can't is said, once.
/// May take a while: not for a thread that serves anything.
pub fn prepare() {
    static PREPARED: OnceLock<()> = OnceLock::new();
    PREPARED.get_or_init(|| {
        keep_freed_memory();
        if let Err(error) = lock() {
            log::warn!("memory can't be locked, so a block device may hang when memory is short: {error}");
        }
        if let Err(error) = never_be_killed() {
            log::warn!("when memory runs out this process may be killed, and its block devices wait: {error}");
        }
    });
}

fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes numbers; the allocator locks what it changes.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE_BYTES_KEPT);
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES_MIN);
    }
}

/// Has the C library take memory for the small things of the calling thread, so that there is some when the system has none.
pub fn warm_heap() {
    let pieces: Vec<Vec<u8>> = (0..HEAP_BYTES_KEPT / HEAP_PIECE_BYTES).map(|_| vec![1; HEAP_PIECE_BYTES]).collect();
    std::hint::black_box(&pieces);
}

fn lock() -> Result<()> {
    check_unlimited()?;
    // SAFETY: takes numbers; no memory changes its content or its place.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        return Err(Error::from_io(io::Error::last_os_error(), "mlockall"));
    }
    let maps = fs::read_to_string("/proc/self/maps").map_err(|error| Error::from_io(error, "/proc/self/maps"))?;
    for (start, end) in maps.lines().filter_map(program_part) {
        // Read, that is locked. SAFETY: changes nothing of what is there; a range that has gone meanwhile is refused.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_POPULATE_READ) };
    }
    Ok(())
}

/// Of a line of proc_pid_maps(5): the part of the program or of a library, which nobody writes to.
fn program_part(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?;
    let is_of_file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
    if !is_of_file || !rights.starts_with('r') || rights.contains('w') || !rights.ends_with('p') {
        return None;
    }
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some((address(start)?, address(end)?)).filter(|(start, end)| start < end)
}

/// Fails when there is a limit of locked memory that this process can't take away and is bound by.
fn check_unlimited() -> Result<()> {
    let unlimited = libc::rlimit64 { rlim_cur: libc::RLIM64_INFINITY, rlim_max: libc::RLIM64_INFINITY };
    // SAFETY: reads one struct that outlives the call.
    if unsafe { libc::setrlimit64(libc::RLIMIT_MEMLOCK, &raw const unlimited) } == 0 {
        return Ok(());
    }
    let refused = io::Error::last_os_error();
    if environment::has_capability(CAP_IPC_LOCK) {
        return Ok(());
    }
    let text = "its limit (RLIMIT_MEMLOCK) can't be lifted: give the service LimitMEMLOCK=infinity, or CAP_SYS_RESOURCE or CAP_IPC_LOCK";
    Err(Error::from_io(refused, text))
}

/// Unless somebody has said already how much it may be killed.
fn never_be_killed() -> Result<()> {
    let failed = |error| Error::from_io(error, format!("{OOM_SCORE_ADJ} can't be {NEVER_KILLED}"));
    match fs::read_to_string(OOM_SCORE_ADJ).map_err(failed)?.trim() {
        "0" => fs::write(OOM_SCORE_ADJ, NEVER_KILLED.to_string()).map_err(failed),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::CAP_SYS_RESOURCE;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn the_program_is_what_nobody_writes_to() {
        let line = "55e0c0000000-55e0c0200000 r-xp 00001000 fe:00 1234    /usr/bin/hydrant";
        assert_eq!(program_part(line), Some((0x55e0_c000_0000, 0x55e0_c020_0000)));
        assert!(program_part(&line.replace("r-xp", "r--p")).is_some());
        for other in ["rw-p", "---p", "r--s", "rwxp"] {
            assert_eq!(program_part(&line.replace("r-xp", other)), None, "{other}");
        }
        for other in [
            "7f0000000000-7f0000001000 r-xp 00000000 00:00 0    [vdso]",
            "7f0000000000-7f0000001000 r--p 00000000 00:00 0",
            "7f0000001000-7f0000000000 r--p 00000000 fe:00 1 /a",
            "x-y r--p 00000000 fe:00 1 /a",
            "",
        ] {
            assert_eq!(program_part(other), None, "{other}");
        }
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let bytes: usize = maps.lines().filter_map(program_part).map(|(start, end)| end - start).sum();
        assert!(bytes > 1 << 20, "{bytes}");
    }

    /// What is done is done to the whole process: this runs in one of its own.
    #[test]
    #[ignore = "run by a_process_is_locked_or_warned_of"]
    fn prepare_child() {
        match lock() {
            Ok(()) => println!("locked"),
            Err(error) => println!("{error}"),
        }
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let bytes = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        println!("locked: {}", bytes.trim());
        let kept = vec![7u8; 64 << 20];
        println!("still allocates {}", kept[kept.len() / 2]);
        match never_be_killed() {
            Ok(()) => println!("score {}", fs::read_to_string(OOM_SCORE_ADJ).unwrap().trim()),
            Err(error) => println!("{error}"),
        }
    }

    /// Runs [`prepare_child`] with this limit of locked memory, and without these capabilities.
    fn child(limit: u64, dropped: &'static [u32]) -> String {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "locked_memory::tests::prepare_child", "--ignored", "--nocapture"]);
        let prepare = move || {
            let limit = libc::rlimit64 { rlim_cur: limit, rlim_max: limit };
            // SAFETY: numbers, and a struct that outlives its call. Without privileges there is nothing to drop.
            unsafe {
                libc::setrlimit64(libc::RLIMIT_MEMLOCK, &raw const limit);
                for capability in dropped {
                    libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(*capability), 0, 0, 0);
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made, nothing allocates.
        let output = unsafe { command.pre_exec(prepare) }.output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_process_is_locked_or_warned_of() {
        let limited = child(8 << 20, &[CAP_IPC_LOCK, CAP_SYS_RESOURCE]);
        assert!(limited.contains("LimitMEMLOCK=infinity") && limited.contains("locked: 0 kB"), "{limited}");
        assert!(limited.contains("still allocates 7"), "{limited}");
        assert!(limited.contains("oom_score_adj can't be -1000") || limited.contains("score "), "{limited}");
        // Whoever runs the tests: with one of the two it works.
        if child(8 << 20, &[]).contains("locked\n") {
            let capable = child(8 << 20, &[CAP_SYS_RESOURCE]);
            assert!(capable.contains("locked\n") && !capable.contains("locked: 0 kB"), "{capable}");
            assert!(capable.contains("still allocates 7"), "{capable}");
        }
        if environment::has_capability(CAP_SYS_RESOURCE) {
            let lifted = child(8 << 20, &[CAP_IPC_LOCK]);
            assert!(lifted.contains("locked\n") && lifted.contains("still allocates 7"), "{lifted}");
        }
    }
}
