//! One round: some clones in one daemon, used, killed and started again several times, hydrated and compared at the end.

use super::client::{Connection, Verb};
use super::content::{ATOM, Content, Random};
use super::load::{Habits, Load};
use super::model::Model;
use super::report::Report;
use crate::harness::*;
use crate::load::ZONE;
use hydrant::control::api::Status;
use hydrant::meta::growth::Wanted;
use serde_json::Value as Json;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// From spawning a daemon until it serves.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// From the kill until every client has an error.
const FREED_TIME_MAX: Duration = Duration::from_secs(5);
/// From the kill until nothing is locked any more.
const UNLOCKED_TIME_MAX: Duration = Duration::from_secs(10);

/// What the daemon is doing when it is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// Starting; the first time of all it formats.
    Start,
    Load,
    Commit,
    Completion,
    Resize,
    Suspend,
    Shutdown,
}

impl Doing {
    fn name(self, is_new: bool) -> &'static str {
        match self {
            Self::Start if is_new => "format",
            Self::Start => "start",
            Self::Load => "load",
            Self::Commit => "commit",
            Self::Completion => "completion",
            Self::Resize => "resize",
            Self::Suspend => "suspend",
            Self::Shutdown => "shutdown",
        }
    }
}

/// How the copy goes in one life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hydration {
    On,
    Off,
    Threshold(u64),
    Rate(u64),
}

/// Options that may change between lives.
#[derive(Clone, Copy, Debug)]
struct LifeOptions {
    shards: u64,
    hydration: Hydration,
    passdown: bool,
}

impl LifeOptions {
    fn random(random: &mut Random) -> Self {
        // Mostly slow: what is hydrated is not as interesting any more.
        let hydration = match random.below(8) {
            0..3 => Hydration::Off,
            3..5 => Hydration::Threshold(random.pick(&[1, 1, 2, 16])),
            5..7 => Hydration::Rate(random.pick(&[256, 1024, 4096]) << 10),
            _ => Hydration::On,
        };
        Self { shards: random.between(1..5), hydration, passdown: random.chance(70) }
    }

    /// As arguments of `hydrant clone`.
    fn args(&self) -> String {
        let mut args = format!("--shards {}", self.shards);
        match self.hydration {
            Hydration::On => {}
            Hydration::Off => args += " --no-hydration",
            Hydration::Threshold(regions) => args += &format!(" --hydration-threshold {regions}"),
            Hydration::Rate(bytes) => args += &format!(" --hydration-rate {bytes}"),
        }
        if !self.passdown {
            args += " --no-discard-passdown";
        }
        args
    }

    /// As keys of a `[[clone]]`.
    fn keys(&self) -> String {
        let hydration = match self.hydration {
            Hydration::On => String::new(),
            Hydration::Off => "no_hydration = true\n".into(),
            Hydration::Threshold(regions) => format!("hydration_threshold = {regions}\n"),
            Hydration::Rate(bytes) => format!("hydration_rate = {bytes}\n"),
        };
        format!("{hydration}no_discard_passdown = {}\n", !self.passdown)
    }
}

/// What a clone's metadata say.
struct Bits {
    size: u64,
    /// Runs of hydrated regions, first and last.
    runs: Vec<(u64, u64)>,
    complete: bool,
}

impl Bits {
    fn has(&self, region: u64) -> bool {
        let after = self.runs.partition_point(|(first, _)| *first <= region);
        after > 0 && region <= self.runs[after - 1].1
    }
    fn count(&self) -> u64 {
        self.runs.iter().map(|(first, last)| last - first + 1).sum()
    }
}

/// Around the borders of zones, and where the clone ends now and later.
fn around_zones(size: u64, size_max: u64) -> Vec<Range<u64>> {
    let borders = (0..=size / ZONE).map(|nr| (nr * ZONE).saturating_sub(MIB)..(nr * ZONE + MIB).min(size_max));
    let mut windows: Vec<Range<u64>> = Vec::new();
    let end = size.saturating_sub(MIB) / ATOM * ATOM..size_max;
    for window in borders.chain(std::iter::once(end)) {
        match windows.last_mut() {
            Some(last) if last.end >= window.start => last.end = window.end,
            _ => windows.push(window),
        }
    }
    windows
}

/// One clone, with its own directories.
struct Clone {
    name: String,
    bench: Bench,
    source: PathBuf,
    server: Option<(Nbdkit, String)>,
    model: Arc<Mutex<Model>>,
    region: u64,
    /// What the source has by now.
    source_size: u64,
    size_max: u64,
    /// By the metadata that were last seen.
    hydrated: u64,
    complete: bool,
    formatted: bool,
    /// A growth was begun, and may have been interrupted.
    growing: bool,
}

impl Clone {
    fn new(name: &str, random: &mut Random) -> Self {
        let bench = Bench::new();
        let many_zones = random.chance(20);
        let can_grow = random.chance(30);
        let region = match many_zones {
            true => 4096,
            false => random.pick(&[4, 4, 8, 16, 64, 64, 64, 128, 512, 1024, 2048]) << 10,
        };
        let body = match many_zones {
            true => ZONE * random.between(1..3) + random.below(3 * MIB),
            false => region.max(random.between(MIB..10 * MIB)) + random.below(region),
        };
        let size = match random.below(4) {
            _ if can_grow => body / ATOM * ATOM,
            0 => body / 4096 * 4096,
            _ => body,
        };
        let size_max = if can_grow { size + random.between(1..5) * MIB } else { size };
        let windows = if many_zones { around_zones(size, size_max) } else { std::iter::once(0..size_max).collect() };
        let content = Content { id: random.next() as u32, windows, holes_percent: random.pick(&[0, 15, 45]) };
        let source = bench.path("source");
        content.write_source(&source, 0, size);
        let server = random.chance(50).then(|| {
            let delay = random.pick(&["", "", "rdelay=1ms", "rdelay=8ms"]);
            let filter = if delay.is_empty() { "" } else { "--filter=delay" };
            let args = format!("-r {filter} file {} {delay}", source.display());
            (Nbdkit::start(&bench, &args), args)
        });
        let model = Arc::new(Mutex::new(Model::new(content, size, region)));
        Self {
            name: name.into(),
            bench,
            source,
            server,
            model,
            region,
            source_size: size,
            size_max,
            hydrated: 0,
            complete: false,
            formatted: false,
            growing: false,
        }
    }

    fn describe(&self) -> String {
        let size = self.model.lock().unwrap_or_else(PoisonError::into_inner).size;
        let from = self.server.as_ref().map_or("a file", |(_, args)| args.as_str());
        format!("{}: {size} bytes in regions of {} from {from}, up to {} bytes", self.name, self.region, self.size_max)
    }

    fn source_address(&self) -> String {
        match &self.server {
            Some((server, _)) => server.uri(),
            None => self.source.display().to_string(),
        }
    }

    fn table(&self, options: &LifeOptions) -> String {
        format!(
            "[[clone]]\nname = \"{}\"\nsource = \"{}\"\ndestination = \"{}\"\nmetadata = \"{}\"\nregion_size = {}\n{}",
            self.name,
            self.source_address(),
            self.bench.copy().display(),
            self.bench.meta().display(),
            self.region,
            options.keys()
        )
    }

    /// Reads all windows through the daemon.
    fn read_all(&self, connection: &mut Connection) -> Result<(), String> {
        let windows = self.model.lock().unwrap().content.windows.clone();
        for window in windows {
            let mut at = window.start;
            while at < window.end.min(connection.size) {
                let end = (at + MIB).min(window.end).min(connection.size);
                let reading = self.model.lock().unwrap().reading(at..end);
                let mut bytes = vec![0; (end - at) as usize];
                connection.ask(Verb::READ, at, &mut bytes).map_err(|error| format!("READ at {at}: {error}"))?;
                self.model.lock().unwrap().read(reading, &bytes)?;
                at = end;
            }
        }
        Ok(())
    }

    /// What its metadata say; `None` when they were never made.
    fn bits(&self) -> Option<Bits> {
        let meta = self.bench.meta();
        let (status, text) = run_for_status(
            env!("CARGO_BIN_EXE_hydrant"),
            &["meta".as_ref(), "dump".as_ref(), "--json".as_ref(), meta.as_os_str()],
        );
        if status != 0 {
            let never = ["No such file or directory", "never formatted"];
            assert!(
                !self.formatted && never.iter().any(|words| text.contains(words)),
                "{}: its metadata can't be read: {text}",
                self.describe()
            );
            return None;
        }
        let json: Json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let number = |value: &Json| value.as_u64().expect("a number");
        let runs = json["hydrated"].as_array().expect("an array");
        Some(Bits {
            size: number(&json["size"]),
            runs: runs.iter().map(|run| (number(&run[0]), number(&run[1]))).collect(),
            complete: json["state"] == "complete",
        })
    }

    /// Nobody uses it: compares its files with the model. Returns how long they stayed locked.
    fn settle(&mut self) -> Duration {
        let began = Instant::now();
        for path in [self.bench.copy(), self.bench.meta()] {
            if path.exists() {
                let seconds = UNLOCKED_TIME_MAX.as_secs().to_string();
                run("flock", &["-x".as_ref(), "-w".as_ref(), seconds.as_ref(), path.as_os_str(), "true".as_ref()]);
            }
        }
        let unlocked = began.elapsed();
        let Some(bits) = self.bits() else { return unlocked };
        let what = self.describe();
        let mut model = self.model.lock().unwrap();
        self.formatted = true;
        if self.growing {
            // New regions have everything still to do.
            self.complete = false;
        }
        if bits.size != model.size {
            assert!(self.growing && bits.size == self.source_size, "{what}: it has {} bytes", bits.size);
            model.grow(bits.size);
        }
        assert!(bits.count() >= self.hydrated, "{what}: {} regions after {}", bits.count(), self.hydrated);
        assert!(bits.complete || !self.complete, "{what}: it was complete");
        assert!(
            !bits.complete || bits.count() == model.size.div_ceil(self.region),
            "{what}: complete without all bits"
        );
        (self.hydrated, self.complete) = (bits.count(), bits.complete);
        let copy = File::open(self.bench.copy()).unwrap_or_else(|error| panic!("{what}: its destination: {error}"));
        let read = |at: u64, out: &mut [u8]| {
            copy.read_exact_at(out, at).unwrap_or_else(|error| panic!("its destination at {at}: {error}"));
        };
        model.settle(|region| bits.has(region), read).unwrap_or_else(|error| panic!("{what}: {error}"));
        unlocked
    }
}

/// A round.
pub struct Scenario {
    random: Random,
    /// The daemon's sockets and configuration are here.
    bench: Bench,
    clones: Vec<Clone>,
    /// `hydrant serve`; else `hydrant clone`.
    serve: bool,
    lives: u64,
    is_new: bool,
    /// What happens, for a failure.
    history: Vec<String>,
}

impl Drop for Scenario {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the round that failed:");
            self.clones.iter().for_each(|clone| eprintln!("  {}", clone.describe()));
            self.history.iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}

impl Scenario {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let serve = random.chance(35);
        let nr_clones = if serve { random.between(1..4) } else { 1 };
        let clones = (0..nr_clones).map(|nr| Clone::new(&format!("c{nr}"), &mut random)).collect();
        let lives = random.between(3..9);
        Self { random, bench: Bench::new(), clones, serve, lives, is_new: true, history: Vec::new() }
    }

    /// Runs it to its end; panics with what is wrong.
    pub fn run(mut self, report: &mut Report) {
        for _ in 0..self.lives {
            let grows = self.clones.iter().any(|clone| clone.source_size < clone.size_max);
            let doing = match self.random.below(14) {
                0 => Doing::Start,
                1..4 if self.is_new => Doing::Start,
                1..4 if grows => Doing::Resize,
                4..7 => Doing::Commit,
                7 => Doing::Completion,
                8 | 9 => Doing::Suspend,
                10 | 11 => Doing::Shutdown,
                _ => Doing::Load,
            };
            self.life(doing, report);
            if self.clones.iter().all(|clone| clone.complete) && self.random.chance(60) {
                break;
            }
        }
        self.last_life(report);
        report.bytes_verified +=
            self.clones.iter().map(|clone| clone.model.lock().unwrap().bytes_verified).sum::<u64>();
        report.rounds += 1;
    }

    fn say(&mut self, line: String) {
        self.history.push(line);
    }

    fn spawn(&mut self, options: &LifeOptions) -> Daemon {
        for (server, args) in self.clones.iter_mut().filter_map(|clone| clone.server.as_mut()) {
            // nbdkit aborts at times when a client is gone in the middle of a delay.
            if !server.is_running() {
                self.history.push(format!("nbdkit {args} had ended by itself"));
                server.again(args);
            }
        }
        if self.serve {
            let mut config = format!("[daemon]\nshards = {}\n", options.shards);
            self.clones.iter().for_each(|clone| config += &clone.table(options));
            let path = self.bench.path("config.toml");
            fs::write(&path, config).unwrap();
            return Daemon::spawn_serve(&self.bench, &[&path], &[]);
        }
        let clone = &self.clones[0];
        let command = self.bench.clone_of(clone.source_address()).name(&clone.name);
        let command = command.destination(clone.bench.copy()).metadata(clone.bench.meta());
        command.args(&format!("--region-size {}", clone.region)).args(&options.args()).spawn()
    }

    /// A connection to a clone of a daemon that may still be starting.
    fn connect(daemon: &Daemon, name: &str) -> Connection {
        let (path, began) = (daemon.socket_of(name), Instant::now());
        loop {
            match Connection::open(&path, name) {
                Ok(connection) => return connection,
                Err(error) => {
                    assert!(!daemon.has_ended(), "the daemon does not start: {error}\n{}", daemon.log());
                    assert!(began.elapsed() < START_TIME_MAX, "no connection to {name}: {error}\n{}", daemon.log());
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// From a start to a kill.
    fn life(&mut self, doing: Doing, report: &mut Report) {
        report.lives += 1;
        let mut options = LifeOptions::random(&mut self.random);
        match doing {
            // Without any change of the bits: it starts at once after the kill before, with the files still being let go.
            Doing::Start => options.hydration = Hydration::Off,
            Doing::Completion => options.hydration = Hydration::On,
            _ => {}
        }
        let name = doing.name(self.is_new);
        self.say(format!("{name}: {options:?}"));
        let mut daemon = self.spawn(&options);
        if doing == Doing::Start {
            let tries = if self.is_new { 1 } else { self.random.between(1..3) };
            for _ in 1..tries {
                self.pause(0..40_000);
                daemon.kill9();
                report.killed(name);
                daemon = self.spawn(&options);
            }
            self.pause(0..60_000);
            daemon.kill9();
            report.killed(name);
            self.after_kill(report);
            return;
        }
        self.is_new = false;
        let may_fail = Arc::new(AtomicBool::new(false));
        let mut loads = Vec::new();
        for index in 0..self.clones.len() {
            let habits = self.habits(doing);
            let full_read = self.random.chance(25);
            let clone = &mut self.clones[index];
            let mut connection = Self::connect(&daemon, &clone.name);
            clone.formatted = true;
            let (size, status) = (clone.model.lock().unwrap().size, daemon.status_of(&clone.name));
            assert_eq!((connection.size, status.size), (size, size), "{}", daemon.log());
            assert!(status.hydrated_regions >= clone.hydrated, "{status:#?}");
            if clone.growing && clone.source_size > size {
                // A growth that was interrupted is repeated.
                daemon.done(&["resize", &clone.name]);
                clone.model.lock().unwrap().grow(clone.source_size);
                report.growths += 1;
            }
            clone.growing = false;
            if full_read && doing != Doing::Completion {
                clone.read_all(&mut connection).unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()));
            }
            let connect = || Self::connect(&daemon, &clone.name);
            loads.push(Load::start(connect, &clone.model, &habits, &mut self.random, &report.counts, &may_fail));
        }
        let asked = self.until(doing, &daemon, &loads, &may_fail, report);
        daemon.kill_now();
        let killed = Instant::now();
        let kill_source = self.random.chance(30);
        for server in self.clones.iter_mut().filter_map(|clone| clone.server.as_mut()).filter(|_| kill_source) {
            server.0.kill();
            report.source_kills += 1;
        }
        let (status, log) = daemon.end_within(Duration::from_secs(20));
        if status.success() {
            // It was faster than the kill: everything was committed.
            assert_eq!(doing, Doing::Shutdown, "{log}");
            report.late += 1;
        } else {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(status.signal(), Some(9), "{log}");
            report.killed(name);
        }
        let errors: Vec<String> = loads.into_iter().filter_map(|load| load.end().err()).collect();
        assert!(errors.is_empty(), "{}\n{log}", errors.join("\n"));
        let freed = killed.elapsed();
        assert!(freed < FREED_TIME_MAX, "clients had their error after {freed:?}");
        report.clients_freed_max = report.clients_freed_max.max(freed);
        if let Some(asked) = asked {
            asked.join().expect("no panic there");
        }
        if status.success() {
            self.clones.iter().for_each(|clone| clone.model.lock().unwrap().committed());
        }
        for (server, args) in self.clones.iter_mut().filter_map(|clone| clone.server.as_mut()).filter(|_| kill_source) {
            server.again(args);
        }
        self.after_kill(report);
    }

    fn habits(&mut self, doing: Doing) -> Habits {
        let mut habits = Habits::random(&mut self.random);
        match doing {
            Doing::Commit => (habits.flushes, habits.fua) = self.random.pick(&[(10, 0), (0, 25), (2, 0), (0, 3)]),
            Doing::Completion => {
                habits.pause = Duration::from_millis(4);
                habits.depth = habits.depth.min(3);
            }
            _ => {}
        }
        habits
    }

    fn pause(&mut self, microseconds: Range<u64>) {
        let us = self.random.between(microseconds);
        std::thread::sleep(Duration::from_micros(us));
    }

    fn after_kill(&mut self, report: &mut Report) {
        for clone in &mut self.clones {
            report.unlocked_max = report.unlocked_max.max(clone.settle());
        }
    }

    /// Returns at the moment of the kill, and what was asked of the daemon that may not have been answered.
    fn until(
        &mut self,
        doing: Doing,
        daemon: &Daemon,
        loads: &[Load],
        may_fail: &AtomicBool,
        report: &mut Report,
    ) -> Option<std::thread::JoinHandle<()>> {
        match doing {
            Doing::Start => unreachable!("nobody is connected"),
            Doing::Load => {
                let longest = self.random.pick(&[60_000, 300_000, 1_200_000]);
                self.pause(1000..longest);
            }
            Doing::Commit => {
                let (wanted, began) = (self.random.between(1..8), Instant::now());
                while loads[0].promises_sent.load(Ordering::Relaxed) < wanted && began.elapsed().as_millis() < 800 {
                    std::hint::spin_loop();
                }
                self.pause(0..9000);
            }
            Doing::Completion => {
                let (began, name) = (Instant::now(), self.clones[0].name.clone());
                let short_of = self.random.pick(&[0, 0, 1, 5]);
                let near = |status: &Status| status.hydrated_regions + short_of >= status.nr_regions;
                while !near(&daemon.status_of(&name)) && began.elapsed() < Duration::from_secs(4) {}
                self.pause(0..12_000);
            }
            Doing::Suspend => {
                self.pause(5000..200_000);
                let (client, name) = (daemon.client(), self.clones[0].name.parse().unwrap());
                let model = self.clones[0].model.clone();
                let resumes = self.random.chance(40);
                let asked = std::thread::spawn(move || {
                    // What was acknowledged before the suspend was asked for is durable when it has succeeded.
                    let before = model.lock().unwrap().flushing();
                    if client.suspend(&name, Some(20)).is_ok() {
                        model.lock().unwrap().flushed(before);
                        if resumes {
                            let _ = client.resume(&name);
                        }
                    }
                });
                self.pause(0..80_000);
                return Some(asked);
            }
            Doing::Resize => {
                self.pause(1000..100_000);
                let by = self.random.between(1..9) * 150_000 / ATOM * ATOM;
                let grows = |clone: &&mut Clone| clone.source_size < clone.size_max;
                let clone = self.clones.iter_mut().find(grows).expect("one of them can grow");
                let size = (clone.source_size + by).min(clone.size_max);
                let content = clone.model.lock().unwrap().content.clone();
                content.write_source(&clone.source, clone.source_size, size);
                clone.source_size = size;
                clone.growing = true;
                report.growths += 1;
                let (client, name) = (daemon.client(), clone.name.parse().unwrap());
                let model = clone.model.clone();
                let asked = std::thread::spawn(move || {
                    let before = model.lock().unwrap().flushing();
                    if client.resize(&name, Wanted::default()).is_ok() {
                        // It commits first; and what is told must hold.
                        let mut model = model.lock().unwrap();
                        model.flushed(before);
                        model.grow(size);
                    }
                });
                self.pause(0..70_000);
                return Some(asked);
            }
            Doing::Shutdown => {
                self.pause(1000..200_000);
                may_fail.store(true, Ordering::Relaxed);
                let pid = daemon.pid().to_string();
                let sent = std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
                assert!(sent.success());
                self.pause(0..80_000);
            }
        }
        None
    }

    /// It is hydrated, under a load, and stopped; the destination alone is what it must be.
    fn last_life(&mut self, report: &mut Report) {
        let options = LifeOptions { hydration: Hydration::On, ..LifeOptions::random(&mut self.random) };
        self.say(format!("the last: {options:?}"));
        let daemon = self.spawn(&options);
        let never = Arc::new(AtomicBool::new(false));
        let mut loads = Vec::new();
        for clone in &mut self.clones {
            let habits = Habits { pause: Duration::from_millis(2), ..Habits::random(&mut self.random) };
            drop(Self::connect(&daemon, &clone.name));
            if clone.growing && clone.source_size > clone.model.lock().unwrap().size {
                daemon.done(&["resize", &clone.name]);
                clone.model.lock().unwrap().grow(clone.source_size);
            }
            let connect = || Self::connect(&daemon, &clone.name);
            loads.push(Load::start(connect, &clone.model, &habits, &mut self.random, &report.counts, &never));
        }
        self.pause(10_000..200_000);
        let errors: Vec<String> = loads.into_iter().filter_map(|load| load.end().err()).collect();
        assert!(errors.is_empty(), "{}\n{}", errors.join("\n"), daemon.log());
        for clone in &self.clones {
            daemon.wait_status_of(&clone.name, "hydrated", Status::is_complete);
        }
        let sockets: Vec<PathBuf> = self.clones.iter().map(|clone| daemon.socket_of(&clone.name)).collect();
        daemon.signal("TERM");
        let mut daemon = daemon;
        let (status, log) = daemon.end_within(Duration::from_secs(20));
        assert!(status.success(), "{status}: {log}");
        assert!(sockets.iter().all(|socket| !socket.exists()), "sockets are removed");
        for clone in &mut self.clones {
            clone.settle();
            assert!(clone.complete, "{}", clone.describe());
            let (size, model) = (fs::metadata(clone.bench.copy()).unwrap().len(), clone.model.lock().unwrap());
            assert_eq!(size, model.size, "{}: the copy is one-to-one", clone.name);
            model.content.check_outside(&File::open(clone.bench.copy()).unwrap(), size);
        }
    }
}
