//! Running other programs, with failures that say what they said.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The system's own programs: nbdsh needs the system's python.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// No tool needs longer, or something hangs.
const TIME_MAX_SECONDS: &str = "100";

/// Whether a program is there (or `root`, or `loop` devices, or all that `FaultyFile` needs: `fuse`).
pub fn have(what: &str) -> Result<(), String> {
    let is_root = || std::fs::metadata("/proc/self").is_ok_and(|stat| stat.uid() == 0);
    let found = match what {
        "root" => is_root(),
        "loop" => is_root() && Path::new("/dev/loop-control").exists(),
        "nbdkit-plugin-python" => have("nbdkit").is_ok() && run_for_status("nbdkit", &["python", "--version"]).0 == 0,
        "fuse" => {
            let is_there = is_root() && Path::new("/dev/fuse").exists();
            is_there && ["nbdfuse", "setpriv", "nbdkit-plugin-python"].into_iter().all(|tool| have(tool).is_ok())
        }
        program => PATH.split(':').any(|dir| Path::new(dir).join(program).exists()),
    };
    if found { Ok(()) } else { Err(format!("needs {what}")) }
}

/// A command that runs with the system's path and is killed when it takes too long.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", TIME_MAX_SECONDS, program]).env("PATH", PATH).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a program; what it printed, both streams, if it succeeded.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let output = command(program).args(args).output().unwrap();
    let text = said(&output);
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    assert!(output.status.success(), "{program} {args:?}: {}: {text}", output.status);
    text
}

/// Runs a program; its exit status (124 when it took too long), and what it printed.
pub fn run_for_status<S: AsRef<OsStr>>(program: &str, args: &[S]) -> (i32, String) {
    let output = command(program).args(args).output().unwrap();
    (output.status.code().unwrap_or(-1), said(&output))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// What scripts for [`nbdsh`] may use: `uri`, `connect()`, `fails()`.
const PRELUDE: &str = r#"
import errno, os, random, sys, threading, time
uri = os.environ["NBD_URI"]
def connect(*contexts):
    """A new connection."""
    h = nbd.NBD()
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h
def fails(what, call):
    """The call must fail with this errno."""
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == what, f"{error.errno}, not {errno.errorcode[what]}: {error}"
        return
    raise AssertionError(f"no error, {errno.errorcode[what]} expected")
def extents(h, context, start=0, end=None):
    """What block status says of a range: a list of (length, flags)."""
    end = h.get_size() if end is None else end
    found = []
    while start < end:
        entries = []
        def collect(name, offset, values, error):
            if name == context:
                entries.extend(values)
        h.block_status(min(end - start, 1 << 30), start, collect)
        assert entries, "no extents"
        for length, flags in zip(entries[::2], entries[1::2]):
            length = min(length, end - start)
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + length, flags)
            else:
                found.append((length, flags))
            start += length
    return found
"#;

/// Runs a script in nbdsh (libnbd's shell, in Python) against an export; what it printed.
pub fn nbdsh(uri: &str, script: &str) -> String {
    let mut command = command("nbdsh");
    command.args(["-c", "-"]).env("NBD_URI", uri);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Python reads all of it before it runs any of it.
    stdin.write_all(PRELUDE.as_bytes()).and_then(|()| stdin.write_all(script.as_bytes())).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = said(&output);
    assert!(output.status.success(), "nbdsh: {}: {text}", output.status);
    text
}

/// Waits until something is so; fails by its name when that takes too long.
pub fn wait_for(what: &str, time_max: Duration, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < time_max, "{what}: not within {time_max:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
