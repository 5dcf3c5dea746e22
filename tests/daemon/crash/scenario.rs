//! One round: some clones in one daemon, used, killed and started again several times, hydrated and compared at the end.

use super::client::Connection;
use super::clone::Clone;
use super::content::{ATOM, Random};
use super::load::{Habits, Load};
use super::options::{Doing, Hydration, LifeOptions};
use super::report::Report;
use crate::harness::*;
use hydrant::control::api::Status;
use hydrant::meta::growth::Wanted;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Of all clones of a round, on a busy machine.
const HYDRATION_TIME_MAX: Duration = Duration::from_secs(90);
/// From spawning a daemon until it serves.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// From the kill until every client has an error.
const FREED_TIME_MAX: Duration = Duration::from_secs(5);

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
                1..5 if grows => Doing::Resize,
                2..7 => Doing::Commit,
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

    /// nbdkit aborts at times when a client is gone in the middle of a delay.
    fn revive_servers(&mut self) {
        for (server, args) in self.clones.iter_mut().filter_map(|clone| clone.server.as_mut()) {
            if !server.is_running() {
                self.history.push(format!("nbdkit {args} had ended by itself"));
                server.again(args);
            }
        }
    }

    fn spawn(&mut self, options: &LifeOptions) -> Daemon {
        self.revive_servers();
        if self.serve {
            let mut config = format!("[daemon]\nshards = {}\n", options.shards);
            self.clones.iter().for_each(|clone| config += &clone.table(options));
            let path = self.bench.path("config.toml");
            fs::write(&path, config).unwrap();
            return Daemon::spawn_serve(&self.bench, &[&path], &[]);
        }
        let clone = &self.clones[0];
        let command = self.bench.clone_of(clone.source_address()).name(&clone.name);
        let command = command.destination(&clone.place.destination).metadata(&clone.place.metadata);
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
            if self.is_new && self.random.chance(60) {
                // The format itself takes a few milliseconds only.
                let (metadata, began) = (self.clones[0].place.metadata.clone(), Instant::now());
                while !metadata.exists() && began.elapsed() < START_TIME_MAX {}
                self.pause(0..12_000);
            } else {
                self.pause(0..60_000);
            }
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
                clone.grown();
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
        if self.random.chance(30) {
            // At once, while the kernel still puts away what was in flight. Nobody uses it, so that no bit changes.
            options.hydration = Hydration::Off;
            let daemon = self.spawn(&options);
            if self.random.chance(50) {
                self.clones.iter().for_each(|clone| drop(Self::connect(&daemon, &clone.name)));
            }
            self.pause(0..40_000);
            let mut daemon = daemon;
            daemon.kill_now();
            let (status, log) = daemon.end_within(Duration::from_secs(20));
            // It may have found that its source's server had ended by itself.
            let refused = log.contains("Connection refused") && self.clones.iter().any(|clone| clone.server.is_some());
            assert!(status.signal() == Some(9) || refused, "{log}");
            report.killed(Doing::Start.name(false));
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
                let (model, copy) = (clone.model.clone(), clone.place.bytes.clone());
                let asked = std::thread::spawn(move || {
                    let before = model.lock().unwrap().flushing();
                    if client.resize(&name, Wanted::default()).is_ok() {
                        // It commits first; and what is told must hold.
                        let mut model = model.lock().unwrap();
                        model.flushed(before);
                        model.grow(size);
                    }
                });
                if self.random.chance(60) {
                    // Both files are made longer first; what counts comes then.
                    let began = Instant::now();
                    let len = || fs::metadata(&copy).map_or(0, |stat| stat.len());
                    while len() < size && began.elapsed() < Duration::from_secs(2) {}
                    self.pause(0..15_000);
                } else {
                    self.pause(0..70_000);
                }
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
                clone.grown();
            }
            let connect = || Self::connect(&daemon, &clone.name);
            loads.push(Load::start(connect, &clone.model, &habits, &mut self.random, &report.counts, &never));
        }
        self.pause(10_000..200_000);
        let errors: Vec<String> = loads.into_iter().filter_map(|load| load.end().err()).collect();
        assert!(errors.is_empty(), "{}\n{}", errors.join("\n"), daemon.log());
        let (began, names) = (Instant::now(), self.clones.iter().map(|clone| clone.name.clone()));
        for name in names.collect::<Vec<_>>() {
            while !daemon.status_of(&name).is_complete() {
                let status = || format!("{:#?}\n{}", daemon.status_of(&name), daemon.log());
                assert!(began.elapsed() < HYDRATION_TIME_MAX, "it is not hydrated: {}", status());
                self.revive_servers();
                std::thread::sleep(Duration::from_millis(10));
            }
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
            let (len, model) = (fs::metadata(&clone.place.bytes).unwrap().len(), clone.model.lock().unwrap());
            assert!(len == model.size || !clone.place.is_file(), "{}: {len} bytes, not one-to-one", clone.name);
            model.content.check_outside(&File::open(&clone.place.bytes).unwrap(), model.size);
        }
    }
}
