//! `hydrant status`: what running clones tell about themselves, for people and for programs.

use super::daemons::find;
use super::output_error;
use crate::bail;
use crate::cli::StatusArgs;
use crate::control::api::{
    CloneRunState, HydrationState, HydrationStatus, MetadataMode, SOURCE_STALLED_SECONDS, SourceState, Status,
};
use crate::control::client::{self, Client};
use crate::error::{Error, ErrorKind, Result, plain};
use crate::human::{count, duration, percent, rate, size};
use crate::hydration_failures::words_of;
use crate::hydration_share::PRIORITY_DEFAULT;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::units::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write, stdout};
use std::thread::sleep;
use std::time::Duration;

/// Between two looks of `--watch`: at a terminal, and else.
const WATCH_PAUSE_TERMINAL: Duration = Duration::from_millis(200);
const WATCH_PAUSE_PLAIN: Duration = Duration::from_secs(1);
/// Runs of bad regions that the text names; `--json` has more.
const RANGES_SHOWN_MAX: usize = 4;
/// What a source that is another one means, and what to do.
const SOURCE_CHANGED: &str = "changed: nothing more is read from it; when the right one is back, \
    remove and create the clone again (or restart)";
/// What the metadata modes mean, and what to do.
const READ_ONLY: &str = "only what is hydrated can be used, and no flush succeeds; put that right, then stop it and start \
    the clone again: it has all that was flushed";
const FAILED: &str = "no I/O is permitted; put that right, then stop it and start the clone again";

pub fn run(args: &StatusArgs, out: &mut dyn Write) -> Result<()> {
    let found = find(args.name.as_ref(), &args.control)?;
    if found.is_empty() {
        bail!(NotFound, "the daemon has no clones");
    }
    if args.watch {
        let [(client, status)] = found.as_slice() else {
            let names: Vec<_> = found.iter().map(|(_, status)| status.name.as_str()).collect();
            bail!(Usage, "--watch follows one clone: say which one of {}", names.join(", "));
        };
        return watch(client, &status.name, out);
    }
    let found = if args.dm { with_dm_line(found)? } else { found };
    for (index, (_, status)) in found.iter().enumerate() {
        let text = if args.json {
            serde_json::to_string(status)
                .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("status as JSON: {error}")))?
        } else if args.dm && found.len() > 1 {
            format!("{}: {}", status.name, status.dm_line())
        } else if args.dm {
            status.dm_line()
        } else {
            let gap = if index > 0 { "\n" } else { "" };
            format!("{gap}{}", text_of(status).trim_end())
        };
        writeln!(out, "{text}").map_err(output_error)?;
    }
    Ok(())
}

/// Those that dm-clone could tell of. One that does not run has no status line; asked for alone it is an error.
fn with_dm_line(mut found: Vec<(Client, Status)>) -> Result<Vec<(Client, Status)>> {
    let is_idle = |status: &Status| matches!(status.state, CloneRunState::Starting | CloneRunState::Failed);
    let why = |status: &Status| match &status.error {
        Some(error) => format!("clone '{}' could not be started: {error}", status.name),
        None => format!("clone '{}' is {}: it has no status line yet", status.name, status.state),
    };
    if let [(_, only)] = &found[..]
        && is_idle(only)
    {
        bail!(NotFound, "{}", why(only));
    }
    found.iter().filter(|(_, status)| is_idle(status)).for_each(|(_, status)| log::warn!("{}", why(status)));
    found.retain(|(_, status)| !is_idle(status));
    Ok(found)
}

/// A line of the text. Paths may have any character but NUL in them: none gets through to the terminal.
fn write_line(text: &mut String, label: &str, value: String) -> std::fmt::Result {
    writeln!(text, "  {label:<12} {}", plain(value))
}

/// Of a clone that does not run.
fn write_idle_text(text: &mut String, status: &Status) -> std::fmt::Result {
    match &status.error {
        Some(error) => writeln!(text, "{}: {}: {}", status.name, status.state, plain(error.clone()))?,
        None => writeln!(text, "{}: {}", status.name, status.state)?,
    }
    if let Some(seconds) = status.retry_in_seconds {
        let when = if seconds == 0 { "now".into() } else { format!("in {seconds} s") };
        write_line(text, "next try", when)?;
    }
    write_line(text, "source", status.source.spec.clone())?;
    write_line(text, "destination", status.destination.clone())?;
    write_line(text, "metadata", status.metadata.path.clone())
}

/// For people.
fn text_of(status: &Status) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = write_text(&mut text, status);
    text
}

fn write_text(text: &mut String, status: &Status) -> std::fmt::Result {
    if matches!(status.state, CloneRunState::Starting | CloneRunState::Failed) {
        return write_idle_text(text, status);
    }
    let (hydration, io) = (&status.hydration, &status.io);
    writeln!(
        text,
        "{}: {}, {} regions of {}",
        status.name,
        ByteSize(status.size),
        count(status.nr_regions),
        ByteSize(status.region_size)
    )?;
    let mut line = |label: &str, value: String| write_line(text, label, value);
    for warning in &status.warnings {
        line("WARNING", warning.clone())?;
    }
    if status.suspended {
        line("suspended", "I/O and hydration are held, everything is committed".into())?;
    } else if status.suspending {
        line("suspending", "waits for what is in flight; I/O and hydration are held".into())?;
    }
    if status.resizing {
        line("resizing", "is under way".into())?;
    }
    line("hydration", progress_words(status))?;
    for words in failure_words(status) {
        line("", words)?;
    }
    line(
        "limits",
        format!(
            "threshold {}, batch size {}",
            setting(hydration.threshold, hydration.threshold_effective),
            setting(hydration.batch_size, hydration.batch_size_effective)
        ),
    )?;
    if let Some(words) = share_words(hydration) {
        line("", words)?;
    }
    let features: Vec<_> = status.features.words().collect();
    if !features.is_empty() {
        line("features", features.join(", "))?;
    }
    line("source", source_words(status))?;
    line("destination", status.destination.clone())?;
    let metadata = &status.metadata;
    line(
        "metadata",
        format!(
            "{}, {}; {} of {} blocks, generation {}",
            metadata.path, metadata.mode, metadata.used_blocks, metadata.total_blocks, metadata.generation
        ),
    )?;
    let means = match metadata.mode {
        MetadataMode::ReadWrite | MetadataMode::Unopened => None,
        MetadataMode::ReadOnly => Some(READ_ONLY),
        MetadataMode::Fail => Some(FAILED),
    };
    if let Some(means) = means {
        let mode = metadata.mode;
        line("", format!("{mode} because of {}", metadata.error.as_deref().unwrap_or("a commit that failed")))?;
        line("", means.into())?;
    }
    if status.nbd.address != NbdAddress::None.to_string() {
        line("nbd", format!("{}; {}", nbd_words(status), plural(status.nbd.connections.into(), "client")))?;
    }
    if let Some(ublk) = &status.ublk {
        let path = ublk.dm_path.as_ref().map_or(ublk.path.clone(), |path| format!("{path} above {}", ublk.path));
        line("ublk", format!("{path}; {}", ublk.used_by.as_deref().unwrap_or("not in use")))?;
    }
    line(
        "I/O",
        format!(
            "{} ({}), {} ({}), {}",
            plural(io.reads, "read"),
            size(io.read_bytes),
            plural(io.writes, "write"),
            size(io.write_bytes),
            plural(io.flushes, "flush")
        ),
    )?;
    line(
        "",
        format!(
            "{} ({}), {} write zeroes ({}), {}",
            plural(io.trims, "trim"),
            size(io.trim_bytes),
            count(io.write_zeroes),
            size(io.write_zeroes_bytes),
            plural(io.errors, "error")
        ),
    )?;
    line(
        "copied",
        format!("{} hydrated by copying; {} read from the source", size(io.hydrated_bytes), size(io.source_read_bytes)),
    )?;
    if let Some(event) = &status.last_event {
        let (all, dm) = (count(status.events), count(status.event_nr));
        line("events", format!("{all} (dm's event number {dm}), the last: {event}"))?;
    }
    line(
        "daemon",
        format!(
            "pid {}, version {}, {}, up {}",
            status.pid,
            status.version,
            plural(status.shards.into(), "shard"),
            duration(status.uptime_seconds)
        ),
    )
}

/// `running, 45.1% (118489 of 262144 regions, 16 in flight), 210 MiB/s, 41s left`.
pub fn progress_words(status: &Status) -> String {
    let mut words = format!("{}, {}", status.hydration.state, percent(status.hydrated_fraction()));
    let (hydrated, all) = (count(status.hydrated_regions), count(status.nr_regions));
    let _ = match status.hydrating_regions {
        0 => write!(words, " ({hydrated} of {all} regions)"),
        flying => write!(words, " ({hydrated} of {all} regions, {} in flight)", count(flying)),
    };
    let pace = pace_words(status);
    if !pace.is_empty() {
        let _ = write!(words, ", {pace}");
    }
    words
}

/// Rate and time left, as far as they mean something.
fn pace_words(status: &Status) -> String {
    if status.is_complete() {
        return String::new();
    }
    let mut words = Vec::new();
    if status.hydration.bytes_per_second > 0 {
        words.push(rate(status.hydration.bytes_per_second as f64));
    }
    if let Some(seconds) = status.hydration.eta_seconds {
        words.push(format!("{} left", duration(seconds)));
    }
    words.join(", ")
}

/// What could not be copied, why, and what happens or is to be done about it.
fn failure_words(status: &Status) -> Vec<String> {
    let hydration = &status.hydration;
    let mut lines = Vec::new();
    if status.is_hydration_stopped() {
        lines.push(stopped_words(status));
    }
    if hydration.failed_regions > 0 {
        let (told, more) = hydration.failed_ranges.split_at(hydration.failed_ranges.len().min(RANGES_SHOWN_MAX));
        let more = hydration.failed_regions_more + more.iter().map(|range| range.regions).sum::<u64>();
        let which = words_of(told.iter().map(|r| (r.first_region, r.regions, r.offset, r.length)), more);
        let again = if hydration.state == HydrationState::Failing { "; tried again" } else { "" };
        lines.push(format!("{} could not be copied{again}: {which}", plural(hydration.failed_regions, "region")));
    }
    if let Some(last) = &hydration.last_failure {
        lines.push(format!("the last failure: {} (errno {})", last.error, last.errno));
    }
    lines
}

/// That hydration has stopped, and how it goes on.
fn stopped_words(status: &Status) -> String {
    let failures = plural(status.hydration.failures_in_a_row, "failure");
    format!("stopped after {failures} in a row; 'hydrant message {} enable_hydration' goes on", status.name)
}

/// `at most 50 MiB/s, 100 MiB/s with all clones, priority 400`; `None` when nothing of it was set.
fn share_words(hydration: &HydrationStatus) -> Option<String> {
    let own = hydration.rate.map(|bytes| format!("at most {}", rate(bytes as f64)));
    let total = hydration.total_rate.map(|bytes| format!("at most {} with all clones", rate(bytes as f64)));
    let is_usual = [0, u32::from(PRIORITY_DEFAULT)].contains(&hydration.priority);
    let priority = (!is_usual).then(|| format!("priority {}", hydration.priority));
    let words: Vec<_> = [own, total, priority].into_iter().flatten().collect();
    (!words.is_empty()).then(|| words.join(", "))
}

fn setting(set: Option<u32>, effective: u32) -> String {
    match set {
        None => format!("automatic (now {})", count(effective.into())),
        Some(set) => count(set.into()),
    }
}

fn source_words(status: &Status) -> String {
    let source = &status.source;
    if source.state == SourceState::Changed {
        return format!("{}, {SOURCE_CHANGED}", source.spec);
    }
    let mut words = format!("{}, {}", source.spec, source.state);
    if source.silent_seconds >= SOURCE_STALLED_SECONDS {
        let _ = write!(words, ", no answer for {}", duration(source.silent_seconds));
    }
    if source.losses > 0 {
        let _ = write!(words, "; lost {}, back {}", times(source.losses), times(source.reconnects));
    }
    words
}

/// Where to connect, as an NBD URI where that needs no quoting.
fn nbd_words(status: &Status) -> String {
    let nbd = &status.nbd;
    let plain = |path: &str| path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b));
    match nbd.address.split_once(':') {
        Some(("unix", path)) if plain(path) => format!("nbd+unix:///{}?socket={path}", nbd.export),
        Some(("tcp", address)) => format!("nbd://{address}/{}", nbd.export),
        _ => format!("{}, export {}", nbd.address, nbd.export),
    }
}

fn plural(number: u64, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ if thing.ends_with("sh") => format!("{} {thing}es", count(number)),
        _ => format!("{} {thing}s", count(number)),
    }
}

fn times(number: u64) -> String {
    plural(number, "time")
}

/// Of those who wait for the hydration.
pub fn stopped_error(status: &Status) -> Error {
    let last = status.hydration.last_failure.as_ref().map_or(String::new(), |last| format!("; {}", last.error));
    let left = plural(status.nr_regions - status.hydrated_regions.min(status.nr_regions), "region");
    let text = format!("clone '{}': hydration has {}; {left} left{last}", status.name, stopped_words(status));
    Error::new(ErrorKind::Io, text)
}

/// Follows one clone until it is hydrated.
fn watch(client: &Client, name: &str, out: &mut dyn Write) -> Result<()> {
    let name =
        name.parse().map_err(|error: String| Error::new(ErrorKind::Protocol, format!("clone '{name}': {error}")))?;
    let terminal = stdout().is_terminal();
    let bar = terminal.then(progress_bar);
    let mut last_line = String::new();
    let mut last_fraction = 0.0;
    let result = loop {
        let status = match client.status(&name) {
            Ok(status) => status,
            Err(error) if client::is_gone(client, &error) => {
                let at = percent(last_fraction);
                break Err(Error::new(
                    ErrorKind::NotFound,
                    format!("clone '{name}': the daemon ended; {at} was hydrated"),
                ));
            }
            Err(error) => break Err(error),
        };
        last_fraction = status.hydrated_fraction();
        match &bar {
            Some(bar) => show_on(bar, &status),
            None => {
                let line = format!("{}: {}", status.name, progress_words(&status));
                if line != last_line {
                    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(output_error)?;
                }
                last_line = line;
            }
        }
        match status.metadata.mode {
            _ if status.is_complete() => break Ok(()),
            _ if status.is_hydration_stopped() => break Err(stopped_error(&status)),
            _ if status.state == CloneRunState::Failed => {
                let why = status.error.unwrap_or_default();
                break Err(Error::new(ErrorKind::Failed, format!("clone '{name}' could not be started: {why}")));
            }
            MetadataMode::ReadWrite | MetadataMode::Unopened => {}
            MetadataMode::ReadOnly => {
                break Err(Error::new(
                    ErrorKind::ReadOnly,
                    format!("clone '{name}' is read-only (ro): it can't hydrate"),
                ));
            }
            MetadataMode::Fail => {
                break Err(Error::new(ErrorKind::Failed, format!("clone '{name}' has failed (Fail)")));
            }
        }
        sleep(if terminal { WATCH_PAUSE_TERMINAL } else { WATCH_PAUSE_PLAIN });
    };
    if let Some(bar) = bar {
        bar.abandon();
    }
    result
}

/// A bar for the regions of a clone.
pub fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stdout());
    let template = "{prefix:.bold} [{bar:32.green}] {msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("a constant template").progress_chars("=> "));
    bar
}

/// Brings the bar up to date.
pub fn show_on(bar: &ProgressBar, status: &Status) {
    bar.set_prefix(status.name.clone());
    bar.set_length(status.nr_regions.max(1));
    bar.set_position(status.hydrated_regions);
    let mut message = percent(status.hydrated_fraction());
    if status.hydration.state != HydrationState::Running {
        let _ = write!(message, " {}", status.hydration.state);
    }
    let pace = pace_words(status);
    if !pace.is_empty() {
        let _ = write!(message, " {pace}");
    }
    bar.set_message(message);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::*;

    fn sample() -> Status {
        Status {
            name: "vm1".into(),
            state: CloneRunState::Running,
            error: None,
            retry_in_seconds: None,
            warnings: Vec::new(),
            suspended: false,
            suspending: false,
            resizing: false,
            size: 16 << 30,
            region_size: 64 << 10,
            nr_regions: 262144,
            hydrated_regions: 118489,
            hydrating_regions: 16,
            hydration: HydrationStatus {
                enabled: true,
                threshold: None,
                batch_size: Some(32),
                threshold_effective: 256,
                batch_size_effective: 32,
                state: HydrationState::Running,
                failures_max: 100,
                failures_in_a_row: 12,
                failed_regions: 3,
                failed_ranges: vec![
                    FailedRange { first_region: 7, regions: 1, offset: 7 << 16, length: 1 << 16 },
                    FailedRange { first_region: 9, regions: 2, offset: 9 << 16, length: 2 << 16 },
                ],
                failed_regions_more: 0,
                last_failure: Some(CopyFailureStatus { error: "source: read failed".into(), errno: 5 }),
                rate: Some(256 << 20),
                total_rate: Some(1 << 30),
                priority: 400,
                bytes_per_second: 220 << 20,
                eta_seconds: Some(41),
            },
            features: Features { no_hydration: false, no_discard_passdown: true },
            metadata: MetadataStatus {
                path: "/var/lib/vm1.meta".into(),
                mode: MetadataMode::ReadWrite,
                error: None,
                block_size: 4096,
                used_blocks: 10,
                total_blocks: 16,
                generation: 17,
            },
            event_nr: 1,
            events: 4,
            last_event: Some("source lost".into()),
            source: SourceStatus {
                spec: "nbd://backup/vm1".into(),
                state: SourceState::Connected,
                losses: 1,
                reconnects: 1,
                silent_seconds: 0,
            },
            destination: "/dev/vg/vm1".into(),
            nbd: NbdStatus { address: "unix:/run/hydrant/vm1.sock".into(), export: "vm1".into(), connections: 2 },
            ublk: Some(UblkStatus {
                path: "/dev/ublkb0".into(),
                size: 1 << 40,
                number: 0,
                dm_path: None,
                used_by: Some("mounted at /mnt".into()),
            }),
            io: IoCounters {
                reads: 1234,
                writes: 56,
                flushes: 7,
                trims: 1,
                read_bytes: 5 << 20,
                write_bytes: 3 << 19,
                trim_bytes: 1 << 30,
                hydrated_bytes: 7 << 30,
                source_read_bytes: 8 << 30,
                ..Default::default()
            },
            shards: 2,
            uptime_seconds: 3723,
            version: "0.1.0".into(),
            pid: 4711,
        }
    }

    #[test]
    fn text_for_people() {
        let expected = "\
vm1: 16GiB, 262144 regions of 64KiB
  hydration    running, 45.1% (118489 of 262144 regions, 16 in flight), 220 MiB/s, 41s left
               3 regions could not be copied: region 7 (bytes 458752+65536), regions 9-10 (bytes 589824+131072)
               the last failure: source: read failed (errno 5)
  limits       threshold automatic (now 256), batch size 32
               at most 256 MiB/s, at most 1.0 GiB/s with all clones, priority 400
  features     no_discard_passdown
  source       nbd://backup/vm1, connected; lost 1 time, back 1 time
  destination  /dev/vg/vm1
  metadata     /var/lib/vm1.meta, rw; 10 of 16 blocks, generation 17
  nbd          nbd+unix:///vm1?socket=/run/hydrant/vm1.sock; 2 clients
  ublk         /dev/ublkb0; mounted at /mnt
  I/O          1234 reads (5.0 MiB), 56 writes (1.5 MiB), 7 flushes
               1 trim (1.0 GiB), 0 write zeroes (0 B), 0 errors
  copied       7.0 GiB hydrated by copying; 8.0 GiB read from the source
  events       4 (dm's event number 1), the last: source lost
  daemon       pid 4711, version 0.1.0, 2 shards, up 1h 2m
";
        assert_eq!(text_of(&sample()), expected);
        let mut changed = sample();
        changed.source.state = SourceState::Changed;
        let line = "  source       nbd://backup/vm1, changed: nothing more is read from it; when the right one is back, \
                    remove and create the clone again (or restart)\n";
        assert!(text_of(&changed).contains(line), "{}", text_of(&changed));
        let mut stalled = sample();
        (stalled.source.state, stalled.source.silent_seconds) = (SourceState::Stalled, 61);
        let line = "  source       nbd://backup/vm1, stalled, no answer for 1m 1s; lost 1 time, back 1 time\n";
        assert!(text_of(&stalled).contains(line), "{}", text_of(&stalled));
        let mut read_only = sample();
        read_only.warnings = vec!["destination /dev/vg/vm1 was deleted".into()];
        assert!(text_of(&read_only).contains("64KiB\n  WARNING      destination /dev/vg/vm1 was deleted\n"));
        read_only.metadata.mode = MetadataMode::ReadOnly;
        read_only.metadata.error = Some("destination /dev/vg/vm1: flush: Input/output error".into());
        let lines = "  metadata     /var/lib/vm1.meta, ro; 10 of 16 blocks, generation 17\n               \
                     ro because of destination /dev/vg/vm1: flush: Input/output error\n               \
                     only what is hydrated can be used, and no flush succeeds; put that right, then stop it and start \
                     the clone again: it has all that was flushed\n";
        assert!(text_of(&read_only).contains(lines), "{}", text_of(&read_only));
    }

    #[test]
    fn a_stopped_hydration_says_what_to_do() {
        let mut status = sample();
        status.hydration.state = HydrationState::Stopped;
        (status.hydration.failed_regions, status.hydration.failed_regions_more) = (1000, 997);
        let text = text_of(&status);
        let line =
            "               stopped after 12 failures in a row; 'hydrant message vm1 enable_hydration' goes on\n";
        assert!(text.contains(line) && text.contains("(bytes 589824+131072) and 997 more\n"), "{text}");
        let error = stopped_error(&status).to_string();
        let expected = "clone 'vm1': hydration has stopped after 12 failures in a row; 'hydrant message vm1 \
                        enable_hydration' goes on; 143655 regions left; source: read failed";
        assert_eq!(error, expected);
        status.hydration.state = HydrationState::Failing;
        assert!(text_of(&status).contains("1000 regions could not be copied; tried again: region 7"));
    }

    #[test]
    fn no_control_character_gets_through() {
        let mut status = sample();
        status.destination = "d\n[ERROR] x\u{1b}[31m".into();
        status.metadata.path = "m\n\u{9b}".into();
        status.source.spec = "s\r".into();
        for state in [CloneRunState::Running, CloneRunState::Failed] {
            status.state = state;
            status.error = Some("e\n".into());
            let text = text_of(&status);
            assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
            assert!(text.contains(r"  destination  d\n[ERROR] x\u{1b}[31m") && text.contains(r"m\n\u{9b}"), "{text}");
        }
    }

    #[test]
    fn complete_clones_have_no_pace() {
        let mut status = sample();
        status.hydrated_regions = status.nr_regions;
        status.hydrating_regions = 0;
        status.hydration.state = HydrationState::Complete;
        assert_eq!(progress_words(&status), "complete, 100% (262144 of 262144 regions)");
        status.nbd.address = "tcp:[::1]:10809".into();
        assert_eq!(nbd_words(&status), "nbd://[::1]:10809/vm1");
        status.nbd.address = "unix:/tmp/a b".into();
        assert_eq!(nbd_words(&status), "unix:/tmp/a b, export vm1");
    }
}
