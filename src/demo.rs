//! `hydrant demo`: the main job on an embedded default, with a verdict that was really checked.
//!
//! An image is made (`place`), a real daemon clones it (`daemon`), clients read and write all the while
//! (`load`, `nbd_client`), and at the end every byte of the destination is compared with what it must be
//! ([`content`]). It trusts nothing that the daemon says: not its status, not its exit status.

pub mod content;
mod daemon;
mod load;
mod nbd_client;
mod place;

use crate::bail;
use crate::cli::DemoArgs;
use crate::commands::output_error;
use crate::commands::status::{progress_bar, progress_words, show_on};
use crate::control::api::{Message, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::human::{count, latency, rate, size};
use content::{IMAGE_SECTORS, IMAGE_SIZE, Model, PIECE, SECTOR, Wrong};
use daemon::{Daemon, Paths};
use load::{Controls, Kind, Measured, Outcome, Phase};
use place::TempDir;
use std::fs::File;
use std::io::{IsTerminal, Read, Write, stdout};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

/// Name of the clone.
const NAME: &str = "demo";
/// Clients, each with one request in flight.
const CLIENTS: u64 = 4;
/// How long the load runs before the hydration begins, and after it has ended.
const COLD_TIME: Duration = Duration::from_millis(300);
const HYDRATED_TIME: Duration = Duration::from_secs(2);
/// How long the hydration may take.
const HYDRATION_TIME_MAX: Duration = Duration::from_secs(50);
/// Between two looks at the status.
const POLL: Duration = Duration::from_millis(50);
/// Between two lines of progress where there is no terminal.
const LINE_PAUSE: Duration = Duration::from_millis(500);

/// Runs the demo; an error when anything failed or any byte is wrong.
pub fn run(args: &DemoArgs, out: &mut dyn Write) -> Result<()> {
    let interrupted = Interrupted::install()?;
    let result = perform(args, &interrupted, out);
    // What failed because of the interruption is not worth a word.
    interrupted.check().and(result)
}

fn perform(args: &DemoArgs, interrupted: &Interrupted, out: &mut dyn Write) -> Result<()> {
    let dir = TempDir::new(args.dir.as_deref())?;
    let paths = Paths::new(&dir);
    macro_rules! say {
        ($($arg:tt)*) => { writeln!(out, $($arg)*).map_err(output_error)? };
    }

    say!("hydrant {} demo, in {}", env!("CARGO_PKG_VERSION"), dir.path().display());
    place::make_image(&paths.source)?;
    say!("  source       {} of data, holes and zeros, a file", size(IMAGE_SIZE));
    interrupted.check()?;
    let daemon = Daemon::start(&paths, NAME)?;
    let status = daemon.status()?;
    daemon::check_size(&status, &paths.source)?;
    say!(
        "  clone        serves it already: nothing is copied, {} regions of {}",
        count(status.nr_regions),
        crate::units::ByteSize(status.region_size)
    );
    say!("               (pid {}, {} shards, NBD on {})", status.pid, status.shards, paths.nbd.display());
    say!(
        "  load         {CLIENTS} clients read and write random places, {} to {}",
        size(SECTOR as u64),
        size(load::LENGTH_MAX)
    );
    out.flush().map_err(output_error)?;

    let (outcome, times) = under_load(&daemon, &paths, interrupted, out)?;
    daemon.stop()?;
    say!("");
    table(&outcome, &times, out)?;

    say!("");
    let verdict = verify(&paths, &outcome, interrupted)?;
    let copied = times.copied_bytes;
    say!(
        "Hydration: {} in {:.2} s under that load, {} of it copied: {}",
        size(IMAGE_SIZE),
        times.hydrating.as_secs_f64(),
        size(copied),
        rate(copied as f64 / times.hydrating.as_secs_f64().max(1e-3))
    );
    verdict.tell(out)
}

/// How long the phases took.
struct Times {
    cold: Duration,
    hydrating: Duration,
    hydrated: Duration,
    /// Copied by the daemon while hydrating, as it says.
    copied_bytes: u64,
}

impl Times {
    fn of(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Cold => self.cold,
            Phase::Hydrating => self.hydrating,
            Phase::Hydrated => self.hydrated,
        }
    }
}

/// Runs the clients from before the hydration until after it.
fn under_load(
    daemon: &Daemon,
    paths: &Paths,
    interrupted: &Interrupted,
    out: &mut dyn Write,
) -> Result<(Outcome, Times)> {
    let controls = Controls::new();
    scope(|scope| {
        let part = |client: u64| IMAGE_SECTORS * client / CLIENTS..IMAGE_SECTORS * (client + 1) / CLIENTS;
        let clients: Vec<_> =
            (0..CLIENTS).map(|client| load::start(scope, &paths.nbd, NAME, part(client), &controls)).collect();
        let any_ended = || clients.iter().any(|client| client.is_finished());
        let times = phases(daemon, &controls, &|| interrupted.check().is_err() || any_ended(), out);
        controls.stop();
        let mut all = Outcome::new()?;
        let mut failure = None;
        for client in clients {
            match client.join() {
                Ok(Ok(outcome)) => all.add(outcome)?,
                Ok(Err(error)) => failure = failure.or(Some(error)),
                Err(_) => failure = failure.or(Some(Error::new(ErrorKind::Failed, "a client of the demo panicked"))),
            }
        }
        interrupted.check()?;
        if let Some(error) = failure {
            return Err(daemon.failure(&format!("a client failed: {error}")));
        }
        Ok((all, times?))
    })
}

/// Leads the clone through its phases, until `is_over` says that it makes no sense any more.
fn phases(daemon: &Daemon, controls: &Controls, is_over: &dyn Fn() -> bool, out: &mut dyn Write) -> Result<Times> {
    let wait = |time: Duration| {
        let start = Instant::now();
        while start.elapsed() < time && !is_over() {
            sleep(POLL.min(time.saturating_sub(start.elapsed())));
        }
        start.elapsed()
    };
    let cold = wait(COLD_TIME);
    let before = daemon.status()?;
    controls.enter(Phase::Hydrating);
    let start = Instant::now();
    let (client, name) = daemon.client();
    client.message(name, &Message::EnableHydration)?;
    let mut progress = Progress::new();
    let after = loop {
        let status = daemon.status()?;
        progress.show(&status, out)?;
        if status.is_complete() || is_over() {
            break status;
        }
        if start.elapsed() > HYDRATION_TIME_MAX {
            let (seconds, words) = (HYDRATION_TIME_MAX.as_secs(), progress_words(&status));
            return Err(daemon.failure(&format!("the hydration is not complete after {seconds} s: {words}")));
        }
        sleep(POLL);
    };
    let hydrating = start.elapsed();
    progress.end();
    controls.enter(Phase::Hydrated);
    let hydrated = wait(HYDRATED_TIME);
    let copied_bytes = after.io.hydrated_bytes.saturating_sub(before.io.hydrated_bytes);
    Ok(Times { cold, hydrating, hydrated, copied_bytes })
}

/// A bar on a terminal, else a line now and then.
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    next_line: Instant,
}

impl Progress {
    fn new() -> Self {
        Self { bar: stdout().is_terminal().then(progress_bar), next_line: Instant::now() }
    }
    fn show(&mut self, status: &Status, out: &mut dyn Write) -> Result<()> {
        match &self.bar {
            Some(bar) => show_on(bar, status),
            None if Instant::now() >= self.next_line || status.is_complete() => {
                writeln!(out, "  hydration    {}", progress_words(status)).map_err(output_error)?;
                self.next_line = Instant::now() + LINE_PAUSE;
            }
            None => {}
        }
        Ok(())
    }
    fn end(self) {
        if let Some(bar) = self.bar {
            bar.abandon();
        }
    }
}

/// What the clients measured.
fn table(outcome: &Outcome, times: &Times, out: &mut dyn Write) -> Result<()> {
    let mut lines = vec![
        "                     requests/s        read       write |  read p50       p99 | write p50       p99 | flush p50"
            .to_owned(),
    ];
    for phase in Phase::ALL {
        let label = match phase {
            Phase::Cold => "before hydration",
            Phase::Hydrating => "hydrating",
            Phase::Hydrated => "hydrated",
        };
        lines.push(row(label, &outcome.phases[phase as usize], times.of(phase)));
    }
    for line in lines {
        writeln!(out, "{line}").map_err(output_error)?;
    }
    Ok(())
}

fn row(label: &str, measured: &Measured, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-3);
    let requests: u64 = [Kind::Read, Kind::Write, Kind::Flush].into_iter().map(|kind| measured.requests(kind)).sum();
    let cell = |kind, quantile| measured.latency_us(kind, quantile).map_or("-".to_owned(), latency);
    let throughput = |bytes: u64| rate(bytes as f64 / seconds);
    format!(
        "  {label:<18} {:>10.0} {:>11} {:>11} | {:>9} {:>9} | {:>9} {:>9} | {:>9}",
        requests as f64 / seconds,
        throughput(measured.read_bytes),
        throughput(measured.write_bytes),
        cell(Kind::Read, 0.5),
        cell(Kind::Read, 0.99),
        cell(Kind::Write, 0.5),
        cell(Kind::Write, 0.99),
        cell(Kind::Flush, 0.5),
    )
}

/// What the check of every byte came to.
struct Verdict {
    reads: u64,
    written_bytes: u64,
    wrong_reads: Vec<Wrong>,
    wrong_source: Vec<Wrong>,
    wrong_destination: Vec<Wrong>,
}

impl Verdict {
    fn tell(&self, out: &mut dyn Write) -> Result<()> {
        let problems = [
            ("reads were answered wrongly", &self.wrong_reads),
            ("places of the destination are wrong", &self.wrong_destination),
            ("places of the source were changed", &self.wrong_source),
        ];
        let mut all_right = true;
        for (text, wrong) in problems {
            if let Some(first) = wrong.first() {
                all_right = false;
                writeln!(out, "Verdict: WRONG. {} {text}; the first: {first}", count(wrong.len() as u64))
                    .map_err(output_error)?;
            }
        }
        if !all_right {
            bail!(Failed, "the demo found wrong data: please report it");
        }
        writeln!(
            out,
            "Verdict: RIGHT. Every byte of the destination was compared: {} from the source, {} written by clients.\n\
             \x20        {} reads were compared too. The source is unchanged.",
            size(IMAGE_SIZE - self.written_bytes),
            size(self.written_bytes),
            count(self.reads)
        )
        .map_err(output_error)
    }
}

/// Compares everything with what it must be.
fn verify(paths: &Paths, outcome: &Outcome, interrupted: &Interrupted) -> Result<Verdict> {
    let mut wrong_destination = Vec::new();
    for model in &outcome.models {
        wrong_destination.extend(check_file(&paths.destination, model, interrupted)?);
    }
    let untouched = Model::new(0..IMAGE_SECTORS);
    let checked: u64 = outcome.models.iter().map(|model| model.sectors().end - model.sectors().start).sum();
    if checked != IMAGE_SECTORS {
        bail!(Failed, "only {checked} of {IMAGE_SECTORS} sectors were checked");
    }
    Ok(Verdict {
        reads: outcome.phases.iter().map(|phase| phase.requests(Kind::Read)).sum(),
        written_bytes: outcome.models.iter().map(Model::changed).sum::<u64>() * SECTOR as u64,
        wrong_reads: outcome.wrong_reads.clone(),
        wrong_source: check_file(&paths.source, &untouched, interrupted)?,
        wrong_destination,
    })
}

/// The places of a file that are not as `model` says: at most one in each [`PIECE`].
fn check_file(path: &Path, model: &Model, interrupted: &Interrupted) -> Result<Vec<Wrong>> {
    let what = |error| Error::from_io(error, format!("checking {}", path.display()));
    let mut file = File::open(path).map_err(what)?;
    let sectors = model.sectors();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(sectors.start * SECTOR as u64)).map_err(what)?;
    let mut buffer = vec![0; PIECE as usize];
    let mut wrong = Vec::new();
    let mut at = sectors.start;
    while at < sectors.end {
        interrupted.check()?;
        let count = (sectors.end - at).min(PIECE / SECTOR as u64);
        let bytes = &mut buffer[..count as usize * SECTOR];
        file.read_exact(bytes).map_err(what)?;
        wrong.extend(model.check(at, bytes));
        at += count;
    }
    Ok(wrong)
}

/// Whether SIGINT, SIGTERM or SIGHUP came. A second one ends the process at once.
struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    fn install() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())
                .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
                .map_err(|error| Error::from_io(error, "can't watch for signals"))?;
        }
        Ok(Self(flag))
    }
    fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!(Shutdown, "interrupted; the temporary directory is removed");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use content::{Stamp, fill_sector};
    use std::os::unix::fs::FileExt;

    /// The verdict's own teeth: a single flipped bit anywhere is found, whatever the daemon says.
    #[test]
    fn a_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        place::make_image(&path).unwrap();
        let interrupted = Interrupted(Arc::default());
        let mut model = Model::new(0..IMAGE_SECTORS);
        assert_eq!(check_file(&path, &model, &interrupted).unwrap(), []);

        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut bytes = [0; SECTOR];
        fill_sector(5, Stamp::Written(1), &mut bytes);
        file.write_all_at(&bytes, 5 * SECTOR as u64).unwrap();
        model.stamp(5, 1, Stamp::Written(1));
        assert_eq!(check_file(&path, &model, &interrupted).unwrap(), []);

        for at in [0, 2 * PIECE + 77, IMAGE_SIZE - 1] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            let wrong = check_file(&path, &model, &interrupted).unwrap();
            assert_eq!(wrong, [Wrong { sector: at / SECTOR as u64, expected: Stamp::Source }]);
            file.write_all_at(&byte, at).unwrap();
        }
        file.set_len(IMAGE_SIZE - 1).unwrap();
        assert!(check_file(&path, &model, &interrupted).is_err(), "a short file can't be right");
    }

    #[test]
    fn the_verdict_fails_for_each_kind_of_wrong() {
        let right = || Verdict {
            reads: 7,
            written_bytes: 512,
            wrong_reads: Vec::new(),
            wrong_source: Vec::new(),
            wrong_destination: Vec::new(),
        };
        let wrong = vec![Wrong { sector: 3, expected: Stamp::Zeroed }];
        let mut text = Vec::new();
        right().tell(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().starts_with("Verdict: RIGHT"));
        for verdict in [
            Verdict { wrong_reads: wrong.clone(), ..right() },
            Verdict { wrong_source: wrong.clone(), ..right() },
            Verdict { wrong_destination: wrong.clone(), ..right() },
        ] {
            let mut text = Vec::new();
            assert_eq!(verdict.tell(&mut text).unwrap_err().kind().exit_code(), 1);
            let text = String::from_utf8(text).unwrap();
            assert!(text.starts_with("Verdict: WRONG. 1 ") && text.contains("byte 1536"), "{text}");
        }
    }
}
