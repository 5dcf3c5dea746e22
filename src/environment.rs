//! What the machine must have: io_uring, locked memory, open files, CPUs. Checked before anything is opened.
//!
//! Each check either makes it right within what this process may do (its own limits), or says what is missing and
//! who can change it. Nothing outside this process is changed.

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::units::ByteSize;
use io_uring::{IoUring, Probe, opcode};
use std::fs;
use std::io;
use std::mem::MaybeUninit;

/// Entries of the ring that is made to see whether one can be made.
const TRIAL_ENTRIES: u32 = 8;
/// What the executor's rings need of locked memory, in bytes: glommio 0.9 refuses to start below it.
pub const MEMLOCK_MIN: u64 = 512 << 10;
/// Open files of a process whatever its number of shards, with some clients, and of each shard: its rings, its files.
/// Measured 62 for 4 shards without a client, and 34 for 2.
const NOFILE_BASE: u64 = 32;
const NOFILE_SHARD: u64 = 16;
/// More CPUs than any kernel supports (`NR_CPUS` is at most 8192 on x86-64).
const CPUS_MAX: usize = 1 << 16;

/// The io_uring operations in use; the newest of them, ACCEPT to RECV, came with Linux 5.5 and 5.6.
const OPERATIONS: [(&str, u8); 10] = [
    ("READ", opcode::Read::CODE),
    ("WRITE", opcode::Write::CODE),
    ("FSYNC", opcode::Fsync::CODE),
    ("FALLOCATE", opcode::Fallocate::CODE),
    ("RECV", opcode::Recv::CODE),
    ("SEND", opcode::Send::CODE),
    ("SENDMSG", opcode::SendMsg::CODE),
    ("ACCEPT", opcode::Accept::CODE),
    ("TIMEOUT", opcode::Timeout::CODE), // glommio's own rings
    ("POLL_ADD", opcode::PollAdd::CODE),
];

/// Gives memory that was freed back to the system, as far as the C library has kept it. May take some milliseconds.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; the allocator locks what it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether io_uring works here, with the operations that are used.
pub fn check_io_uring() -> Result<()> {
    let failed = |e: io::Error| {
        let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        let disabled = disabled.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        no_io_uring(e.raw_os_error().unwrap_or(0), disabled)
    };
    let ring = IoUring::new(TRIAL_ENTRIES).map_err(failed)?;
    if !ring.params().is_feature_ext_arg() {
        bail!(Environment, "the kernel's io_uring can't wait with a time limit: Linux 5.11 or later is needed");
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(failed)?;
    check_operations(|code| probe.is_supported(code))
}

fn check_operations(supported: impl Fn(u8) -> bool) -> Result<()> {
    let missing: Vec<&str> = OPERATIONS.iter().filter(|(_, code)| !supported(*code)).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        bail!(Environment, "the kernel's io_uring lacks {}: Linux 5.11 or later is needed", missing.join(", "));
    }
    Ok(())
}

/// Why io_uring can't be used, from the errno and the sysctl `kernel.io_uring_disabled`.
fn no_io_uring(errno: i32, disabled: u32) -> Error {
    let text = match (errno, disabled) {
        (libc::EPERM, 2..) => "it is switched off: set the sysctl kernel.io_uring_disabled to 0".into(),
        (libc::EPERM, 1) => {
            "it is for root and the group kernel.io_uring_group only: join that group, or set the sysctl \
                             kernel.io_uring_disabled to 0"
                .into()
        }
        (libc::EPERM | libc::EACCES, _) => "not permitted: a container's or service's seccomp profile or a security \
                                            module forbids the io_uring system calls, allow them there"
            .into(),
        (libc::ENOSYS, _) => "the kernel does not have it, or a container's seccomp profile hides it: Linux 5.11 or \
                              later with io_uring is needed"
            .into(),
        (libc::EINVAL, _) => "the kernel's is too old: Linux 5.11 or later is needed".into(),
        (libc::ENOMEM, _) => "no memory for it: raise the limit of locked memory (ulimit -l)".into(),
        _ => io::Error::from_raw_os_error(errno).to_string(),
    };
    Error::new(ErrorKind::Environment, format!("io_uring can't be used here: {text}"))
}

/// Sees to it that each of `shards` executors can lock the memory it needs: raises the limit of this process when
/// that is possible. Below [`MEMLOCK_MIN`] no executor starts: an error. Below `shards` times that the rings work,
/// without registered buffers: a warning.
pub fn check_memlock(shards: u16) -> Result<()> {
    let wanted = MEMLOCK_MIN.saturating_mul(u64::from(shards.max(1)));
    let limit = raise(libc::RLIMIT_MEMLOCK, wanted)?;
    if limit < MEMLOCK_MIN {
        bail!(
            Environment,
            "this process may lock {} of memory, io_uring needs {}: raise it with 'ulimit -l' (in KiB; as root, or in \
             /etc/security/limits.conf), in a systemd unit with LimitMEMLOCK={}",
            ByteSize(limit),
            ByteSize(MEMLOCK_MIN),
            wanted
        );
    }
    if limit < wanted {
        log::warn!(
            "this process may lock {} of memory, {shards} shards would like {}: I/O may be slower",
            ByteSize(limit),
            ByteSize(wanted)
        );
    }
    Ok(())
}

/// Raises the limit of open files as far as this process may; an error when `shards` shards can't work with it, so
/// that none of them finds out when files were made already.
pub fn check_nofile(shards: u16) -> Result<()> {
    let needed = NOFILE_BASE + NOFILE_SHARD * u64::from(shards.max(1));
    let limit = raise(libc::RLIMIT_NOFILE, u64::MAX)?;
    if limit < needed {
        bail!(
            Environment,
            "this process may open {limit} files, {shards} shards need {needed}: raise it with 'ulimit -n', in a systemd \
             unit with LimitNOFILE={needed}, or lower --shards"
        );
    }
    Ok(())
}

/// How many files this process may have open now; `None` when the kernel does not tell.
pub fn open_files_max() -> Option<u64> {
    limits(libc::RLIMIT_NOFILE).ok().map(|(soft, _)| soft)
}

/// Makes a write beyond the limit of a file's size (`ulimit -f`) fail with EFBIG, as an error like any other,
/// instead of ending the process by a signal.
pub fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no handler that could run anything.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Tells the kernel that this process carries out block I/O of others: when it needs memory, none is to be made free by
/// writing to a block device, which may be one of this very process. Threads that are started later inherit it. False: the
/// kernel does not let us (CAP_SYS_RESOURCE).
pub fn set_io_flusher() -> bool {
    // Not in libc: PR_SET_IO_FLUSHER of linux/prctl.h, since Linux 5.6.
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: plain system call with numbers.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 }
}

/// Ends this process as programs end whose standard output is closed: by SIGPIPE, without a word.
pub fn end_by_closed_pipe() -> ! {
    // SAFETY: restores what the signal does by default, lifts a block that was inherited, and raises it.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::raise(libc::SIGPIPE);
    }
    // Not reached: the signal ends the process.
    std::process::exit(128 + libc::SIGPIPE)
}

/// Numbers of capabilities(7).
pub const CAP_IPC_LOCK: u32 = 14;
pub const CAP_SYS_ADMIN: u32 = 21;
pub const CAP_SYS_RESOURCE: u32 = 24;

/// Whether this process has a capability, in force now.
pub fn has_capability(number: u32) -> bool {
    is_capable(&fs::read_to_string("/proc/self/status").unwrap_or_default(), number)
}

/// Whether this capability of capabilities(7) is in force, by proc_pid_status(5).
fn is_capable(status: &str, number: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> number & 1 == 1)
}

/// Where the calling thread runs now: for good, when it is pinned.
pub fn current_cpu() -> Option<usize> {
    // SAFETY: takes nothing.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The CPUs this process may run on, in order; at least one.
pub fn available_cpus() -> Result<Vec<usize>> {
    // The kernel refuses (EINVAL) a mask shorter than its own: try longer ones.
    let mut words = 1024 / u64::BITS as usize;
    loop {
        let mut mask = vec![0u64; words];
        // SAFETY: the kernel writes at most the given number of bytes, to a mask that has them; 0 is this thread.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&mask[..]), mask.as_mut_ptr().cast()) };
        if result == 0 {
            return Ok(set_bits(&mask));
        }
        let error = io::Error::last_os_error();
        words *= 2;
        if error.raw_os_error() != Some(libc::EINVAL) || words * u64::BITS as usize > CPUS_MAX {
            return Err(Error::new(ErrorKind::Environment, format!("can't tell which CPUs may be used: {error}")));
        }
    }
}

/// Whether a process has ended; it may still be waited for by its parent.
pub fn is_gone(pid: u32) -> bool {
    // proc_pid_stat(5): "PID (COMMAND) STATE ...", where the command may hold anything.
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => {
            stat.rsplit(')').next().is_some_and(|rest| matches!(rest.trim_start().chars().next(), Some('Z' | 'X')))
        }
        Err(error) => error.kind() == io::ErrorKind::NotFound && std::path::Path::new("/proc/self/stat").exists(),
    }
}

fn set_bits(mask: &[u64]) -> Vec<usize> {
    let bits = u64::BITS as usize;
    (0..mask.len() * bits).filter(|cpu| mask[cpu / bits] >> (cpu % bits) & 1 == 1).collect()
}

/// Raises a limit of this process to `wanted` where it is lower: beyond the hard limit when privileged, else up to
/// it. Returns what it is then.
fn raise(resource: libc::__rlimit_resource_t, wanted: u64) -> Result<u64> {
    let failed =
        |e: io::Error| Error::new(ErrorKind::Environment, format!("can't read the limits of this process: {e}"));
    let (soft, hard) = limits(resource).map_err(failed)?;
    if soft >= wanted {
        return Ok(soft);
    }
    // The kernel caps the number of open files: going beyond the hard limit is for what has an amount.
    let beyond = (wanted > hard && wanted != u64::MAX).then_some((wanted, wanted));
    let within = (wanted.min(hard), hard);
    for (soft, hard) in beyond.into_iter().chain([within]) {
        if set_limits(resource, soft, hard).is_ok() {
            return Ok(soft);
        }
    }
    Ok(soft)
}

fn limits(resource: libc::__rlimit_resource_t) -> io::Result<(u64, u64)> {
    let mut limit = MaybeUninit::<libc::rlimit64>::zeroed();
    // SAFETY: getrlimit writes one struct rlimit64, to memory that outlives the call.
    if unsafe { libc::getrlimit64(resource, limit.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, then filled; integers are always valid.
    let limit = unsafe { limit.assume_init() };
    Ok((limit.rlim_cur, limit.rlim_max))
}

fn set_limits(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: setrlimit reads one struct rlimit64 that outlives the call.
    match unsafe { libc::setrlimit64(resource, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn io_uring_works_here() {
        check_io_uring().unwrap();
    }

    /// A real refusal: a seccomp filter on this thread alone makes io_uring_setup(2) fail.
    fn check_with_setup_failing(errno: i32) -> Error {
        let filter = |code, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let failing = move || {
            let mut program = [
                filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // the number of the system call
                filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
                filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
                filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
            ];
            let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
            // SAFETY: the program and its instructions outlive the call, which copies them.
            unsafe {
                assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
                assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
            }
            check_io_uring().unwrap_err()
        };
        std::thread::spawn(failing).join().unwrap()
    }

    #[test]
    fn io_uring_forbidden() {
        let error = check_with_setup_failing(libc::EPERM);
        assert_eq!(error.kind(), ErrorKind::Environment);
        assert!(error.to_string().contains("seccomp") || error.to_string().contains("io_uring_disabled"), "{error}");
        let error = check_with_setup_failing(libc::ENOSYS).to_string();
        assert!(error.contains("the kernel does not have it"), "{error}");
        assert!(no_io_uring(libc::EPERM, 2).to_string().contains("sysctl kernel.io_uring_disabled to 0"));
        assert!(no_io_uring(libc::EPERM, 1).to_string().contains("io_uring_group"));
        assert!(no_io_uring(libc::EPERM, 0).to_string().contains("seccomp"));
    }

    #[test]
    fn missing_operations_are_named() {
        let error = check_operations(|code| code != opcode::Fallocate::CODE && code != opcode::Recv::CODE).unwrap_err();
        assert!(error.to_string().contains("lacks FALLOCATE, RECV: Linux"), "{error}");
    }

    #[test]
    fn processes_that_are_gone() {
        assert!(!is_gone(std::process::id()));
        let mut child = Command::new("true").spawn().unwrap();
        let start = std::time::Instant::now();
        while !is_gone(child.id()) {
            assert!(start.elapsed().as_secs() < 10, "it has ended, though nobody has waited for it");
        }
        let pid = child.id();
        child.wait().unwrap();
        assert!(is_gone(pid));
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_gone(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn capabilities_in_force() {
        assert!(is_capable("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_IPC_LOCK));
        assert!(is_capable("CapEff:\t0000000000004000\n", CAP_IPC_LOCK));
        for status in ["CapEff:\t00000000ffffbfff\n", "CapPrm:\t0000000000004000\n", "CapEff:\tx", ""] {
            assert!(!is_capable(status, CAP_IPC_LOCK), "{status}");
        }
    }

    #[test]
    fn cpus() {
        let cpus = available_cpus().unwrap();
        assert!(!cpus.is_empty());
        assert!(cpus.is_sorted());
        assert_eq!(set_bits(&[1 << 63 | 1, 0, 2]), [0, 63, 129]);
    }

    /// Limits belong to the process: this part runs in one of its own.
    #[test]
    #[ignore = "run by limits_are_raised_or_explained"]
    fn limits_child() {
        match check_memlock(4) {
            Ok(()) => println!("memlock ok {}", limits(libc::RLIMIT_MEMLOCK).unwrap().0),
            Err(e) => println!("memlock error {:?} {e}", e.kind()),
        }
        check_nofile(1).unwrap();
        println!("nofile {}", limits(libc::RLIMIT_NOFILE).unwrap().0);
        ignore_file_size_signal();
        set_limits(libc::RLIMIT_FSIZE, 4096, 4096).unwrap();
        println!("beyond {:?}", tempfile::tempfile().unwrap().set_len(8192).unwrap_err().raw_os_error());
    }

    /// Runs [`limits_child`] with this limit of locked memory and without the privilege to exceed it.
    fn child(soft: u64, hard: u64) -> String {
        const CAP_SYS_RESOURCE: libc::c_ulong = 24;
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "environment::tests::limits_child", "--ignored", "--nocapture"]);
        let limit = move || {
            set_limits(libc::RLIMIT_MEMLOCK, soft, hard)?;
            set_limits(libc::RLIMIT_NOFILE, 100, 200)?;
            // SAFETY: takes no pointers. Fails without privileges: then there is nothing to drop.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0) };
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made, nothing allocates.
        let output = unsafe { command.pre_exec(limit) }.output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn limits_are_raised_or_explained() {
        let text = child(64 << 10, 64 << 10);
        for words in ["Environment this process may lock 64KiB", "needs 512KiB", "ulimit -l", "LimitMEMLOCK=2097152"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(text.contains("nofile 200"), "{text}");
        assert!(text.contains(&format!("beyond Some({})", libc::EFBIG)), "{text}");
        assert!(child(64 << 10, 8 << 20).contains("memlock ok 2097152"));
        assert!(child(64 << 10, 1 << 20).contains("memlock ok 1048576"));
    }
}
