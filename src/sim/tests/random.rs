//! Random clients, faults of timing and of devices, crashes at random moments; the oracle judges every read and the end,
//! the laws every step.

mod faults;

use super::super::clone::{Devices, OLD_DESTINATION, Setup, SimClone};
use super::super::executor::Sim;
use super::super::laws::Laws;
use super::super::oracle::Oracle;
use super::super::report::{Group, Tally};
use super::super::{Rng, seeds};
use super::Seed;
use crate::clone_state::{AUTOMATIC, Mode};
use crate::error::{Error, ErrorKind};
use crate::hydration_share::{HydrationRate, Priority};
use crate::io_frontend::request::{Completion, Request, RequestFlags};
use crate::meta::codec;
use crate::meta::growth::Wanted;
use crate::meta::store::Store;
use crate::source::Source;
use crate::units::ByteRange;
use faults::{Asked, Excuses, heal, plague, rot_metadata};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

pub fn random_setup(rng: &mut Rng) -> Setup {
    let region_size = rng.pick(&[4096, 4096, 4096, 4096, 4096, 8192, 16384, 65536]);
    let regions_max = ((192 << 10) / region_size).min(40);
    let regions = if rng.one_in(6) { rng.between(1, 3) } else { rng.between(regions_max / 2, regions_max) };
    let tail = rng.pick(&[0, 0, 1, 511, 512, 4095, region_size - 1]).min(region_size - 1);
    let size = regions * region_size - tail;
    let block = rng.pick(&[1, 512, 512, 4096]);
    // A disk of whole blocks, or a file of any size.
    let round = size.next_multiple_of(u64::from(block).max(512)) - size;
    let excess = rng.pick(&[0, 0, round, round, round + 4096, 100, 5000]);
    Setup {
        size,
        region_size,
        regions_per_zone: rng.pick(&[1, 2, 3, 8, 64]),
        shards: rng.between(1, 4) as u16,
        block,
        excess,
        discard_passdown: !rng.one_in(4),
        hydration: rng.one_in(2),
        threshold: rng.pick(&[AUTOMATIC, AUTOMATIC, 1, 2, 5, 16]),
        batch_size: rng.pick(&[AUTOMATIC, AUTOMATIC, 1, 4, 0]),
        remote_source: rng.one_in(3),
    }
}

/// Data with holes of all kinds.
pub fn random_content(rng: &mut Rng, size: u64) -> Vec<u8> {
    let mut content = Vec::with_capacity(size as usize);
    while (content.len() as u64) < size {
        let len = rng.between(1, 20000).min(size - content.len() as u64) as usize;
        match rng.below(3) {
            0 => content.extend(std::iter::repeat_n(0, len)),
            _ => content.extend((0..len).map(|_| 1 + rng.below(0xe0) as u8)),
        }
    }
    content
}

pub fn random_range(rng: &mut Rng, setup: &Setup, size: u64) -> ByteRange {
    let grain = rng.pick(&[1, 1, 512, 4096, setup.region_size]);
    let start = rng.below(size) / grain * grain;
    let large = if rng.one_in(8) { size } else { 600 };
    let max = rng.pick(&[1, 600, 5000, 4096, 4096, 3 * setup.region_size, large]);
    let len = rng.between(1, max).next_multiple_of(grain).min(size - start);
    ByteRange::new(start, len).unwrap()
}

/// Growths that were asked for, the last one last: size before and after, and the bytes between.
type Growths = Rc<RefCell<Vec<(u64, u64, Vec<u8>)>>>;

/// What was asked for before the machine stopped may have come to pass.
fn settle_growth(clone: &SimClone, oracle: &Oracle, growths: &Growths, known: u64) -> u64 {
    let size = clone.geometry().size();
    if size != known {
        let grown = growths.borrow();
        let grown = grown.iter().rev().find(|(before, after, _)| (*before, *after) == (known, size));
        oracle.grow(&grown.expect("it has grown to what was asked for").2);
    }
    size
}

struct Load {
    clone: Rc<SimClone>,
    setup: Setup,
    oracle: Oracle,
    laws: Rc<Laws>,
    /// Requests may fail for these reasons.
    excuses: Rc<Excuses>,
    running: Cell<u32>,
    requests_left: Cell<u32>,
    /// What clients know of.
    size: Cell<u64>,
    /// Somebody suspends, resumes and grows.
    suspends: bool,
    /// Sizes that the clone is to grow to, and what it then reads there.
    growths: Growths,
}

impl Load {
    async fn client(self: Rc<Self>) {
        let sim = self.clone.sim.clone();
        while let Some(left) = self.requests_left.get().checked_sub(1) {
            self.requests_left.set(left);
            self.request().await;
            let pause = sim.draw(|rng| if rng.one_in(3) { rng.below(2000) } else { 0 });
            sim.sleep(Duration::from_micros(pause)).await;
        }
        self.running.set(self.running.get() - 1);
    }

    /// Suspends and resumes as long as there are requests; ends resumed.
    async fn operator(self: Rc<Self>) {
        let (sim, clone) = (self.clone.sim.clone(), &self.clone);
        while self.suspends && self.requests_left.get() > 0 {
            sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(20_000)))).await;
            let begun = self.oracle.begin_flush();
            let time_max =
                Duration::from_micros(sim.draw(|rng| if rng.one_in(3) { rng.below(3000) } else { 30_000_000 }));
            let asked = self.excuses.asked(&self.setup, None, true);
            match clone.coordinator.suspend(time_max).await {
                Ok(()) => self.suspended(begun).await,
                Err(error) if error.kind() == ErrorKind::Limit => {}
                Err(error) => drop(self.judge(&asked, Err::<(), _>(error))),
            }
            assert!(!clone.state.is_suspended());
            if sim.draw(|rng| rng.one_in(3)) {
                self.grow().await;
            }
        }
        self.running.set(self.running.get() - 1);
    }

    async fn grow(&self) {
        let (sim, clone, old) = (&self.clone.sim, &self.clone, self.size.get());
        if clone.state.mode() != Mode::ReadWrite || old > 400 << 10 {
            return;
        }
        let source = &clone.devices.source;
        if sim.draw(|rng| rng.one_in(2)) {
            let more = sim.draw(|rng| {
                let len = rng.between(1, 30_000);
                random_content(rng, len)
            });
            source.append(&more);
        }
        let superblock = clone.coordinator.superblock();
        let is_padded = superblock.source.size < old;
        let size = sim.draw(|rng| old + rng.pick(&[1, 100, 512, 4096, 10_000, 50_000]));
        let zeros = sim.draw(|rng| rng.one_in(4));
        let followed = source.size().max(old);
        let follows = !is_padded && sim.draw(|rng| rng.one_in(2));
        let wanted = match follows {
            true => Wanted { size: None, zeros: false },
            false => Wanted { size: Some(size), zeros },
        };
        let size = if follows { followed } else { size };
        let mut bytes = match zeros && !follows || is_padded {
            true => Vec::new(),
            false => source.content()[..size.min(followed) as usize][old as usize..].to_vec(),
        };
        bytes.resize((size - old) as usize, 0);
        self.growths.borrow_mut().push((old, size, bytes.clone()));
        let asked = self.excuses.asked(&self.setup, None, true);
        match clone.grow(wanted, OLD_DESTINATION).await {
            Ok(grown) => {
                assert_eq!(grown, size > old);
                self.oracle.grow(&bytes);
                self.size.set(size);
                clone.sim.count(Group::Request, "resize");
                if let Some(gained) = ByteRange::between(old, size) {
                    // Of these the last region's may be hydrated.
                    self.laws.check_durable(gained);
                }
            }
            Err(error) if error.kind() == ErrorKind::Limit => {}
            Err(error) => assert!(self.excuses.growth(&asked, &error, clone.state.mode()), "{error:?}"),
        }
        assert_eq!(clone.geometry().size(), self.size.get());
    }

    async fn suspended(&self, begun: u64) {
        let (sim, clone) = (&self.clone.sim, &self.clone);
        assert!(clone.state.is_suspended());
        if clone.state.mode() == Mode::ReadWrite {
            self.flushed(begun);
        }
        let devices = &clone.devices;
        let operations = || devices.destination.log().len() + devices.metadata.log().len();
        let before = operations();
        sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(3_000_000)))).await;
        assert_eq!(operations(), before, "nothing happens while the clone is suspended");
        clone.resume().await.unwrap();
    }

    /// A flush that began then was acknowledged.
    fn flushed(&self, begun: u64) {
        self.oracle.end_flush(begun).into_iter().for_each(|range| self.laws.check_durable(range));
    }

    /// A change has ended.
    fn changed(&self, change: u32, range: ByteRange, done: bool, fua: bool) {
        self.oracle.end_change(change, done, fua);
        if done && fua {
            self.laws.check_durable(range);
        }
    }

    fn judge<T>(&self, asked: &Asked, result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) if self.excuses.request(asked, &error, self.clone.state.mode()) => None,
            Err(error) => panic!("no reason to fail: {error:?}"),
        }
    }

    async fn request(&self) {
        let (clone, oracle) = (&self.clone, &self.oracle);
        let (kind, range, via, fua) = clone.sim.draw(|rng| {
            (rng.below(100), random_range(rng, &self.setup, self.size.get()), rng.below(8) as usize, rng.one_in(5))
        });
        let flags = if fua { RequestFlags::FUA } else { RequestFlags::empty() };
        let is_flush = (82..89).contains(&kind);
        let asked = &self.excuses.asked(&self.setup, Some(range).filter(|_| !is_flush), is_flush || fua);
        let name = match kind {
            0..30 => "read",
            30..65 => "write",
            65..73 => "trim",
            73..82 => "write_zeroes",
            82..89 => "flush",
            89..92 => "cache",
            92..96 => "status",
            _ => "message",
        };
        let number = self.requests_left.get();
        clone.sim.count(Group::Request, name);
        clone.sim.say(|| format!("client {number:>4}: {name} {}+{} via {via}, FUA {fua}", range.start(), range.len()));
        match kind {
            0..30 => {
                let read = oracle.begin_read(range);
                match self.judge(asked, clone.read_via(via, range).await) {
                    Some(data) => oracle.end_read(read, &data),
                    None => oracle.abandon_read(read),
                }
            }
            30..65 => {
                let (change, data) = oracle.begin_change(range, false, false);
                let write = Request::Write { offset: range.start(), data, flags };
                let done = self.judge(asked, clone.submit(via, write).await).is_some();
                self.changed(change, range, done, fua);
            }
            65..73 => {
                let (change, _) = oracle.begin_change(range, true, true);
                let done = self.judge(asked, clone.submit(via, Request::Trim { range, flags }).await).is_some();
                self.changed(change, range, done, fua);
            }
            73..82 => {
                let fast = clone.sim.draw(|rng| rng.one_in(3));
                let hole = clone.sim.draw(|rng| rng.one_in(2));
                let mut flags = flags;
                flags.set(RequestFlags::FAST_ZERO, fast);
                flags.set(RequestFlags::NO_HOLE, !hole);
                let (change, _) = oracle.begin_change(range, true, false);
                let done = match clone.submit(via, Request::WriteZeroes { range, flags }).await {
                    Err(error) if fast && error.kind() == ErrorKind::NotSupported => false,
                    result => self.judge(asked, result).is_some(),
                };
                self.changed(change, range, done, fua);
            }
            82..89 => {
                let begun = oracle.begin_flush();
                if self.judge(asked, clone.submit(via, Request::Flush).await).is_some() {
                    self.flushed(begun);
                }
            }
            89..92 => {
                self.judge(asked, clone.submit(via, Request::Cache(range)).await);
            }
            92..96 => {
                let read = oracle.begin_read(range);
                if let Some(completion) = self.judge(asked, clone.submit(via, Request::Status(range)).await) {
                    self.check_status(read, range, completion);
                }
                oracle.abandon_read(read);
            }
            _ => {
                let (what, number) = clone.sim.draw(|rng| (rng.below(6), rng.pick(&[0, 1, 3, 8, AUTOMATIC])));
                let (budget, now) = (clone.state.budget(), clone.sim.now());
                match what {
                    0 => clone.state.set_hydration_enabled(number % 2 == 0, now),
                    1 => clone.state.set_hydration_threshold(number, now),
                    2 => clone.state.set_hydration_batch_size(number),
                    3 => clone.state.set_hydration_failures_max(number.min(100) as u32),
                    4 => budget.set_rate(HydrationRate::new(number.saturating_mul(32 << 10)).ok(), now),
                    _ => budget.set_priority(Priority::new(number).unwrap_or_default()),
                }
                clone.wake();
            }
        }
        clone.sim.say(|| format!("client {number:>4}: {name} has ended"));
    }

    fn check_status(&self, read: usize, range: ByteRange, completion: Completion) {
        let Completion::Status(extents) = completion else { panic!("{completion:?} answers a status request") };
        let hydrated: u64 = extents.hydrated.iter().map(|e| e.len).sum();
        let allocation: u64 = extents.allocation.iter().map(|e| e.len).sum();
        assert!((1..=range.len()).contains(&hydrated), "{hydrated} of {range:?}");
        assert!((1..=range.len()).contains(&allocation), "{allocation} of {range:?}");
        let mut at = range.start();
        for extent in extents.allocation {
            if extent.state.zero {
                self.oracle.check_zero(read, at, extent.len);
            }
            at += extent.len;
        }
    }
}

/// Reads everything; true when that worked.
async fn read_all(clone: &SimClone, oracle: &Oracle, excuses: &Excuses) -> bool {
    let range = clone.geometry().whole();
    let asked = excuses.asked(&clone.setup, Some(range), false);
    let read = oracle.begin_read(range);
    match clone.read_via(1, range).await {
        Ok(data) => oracle.end_read(read, &data),
        Err(error) => {
            assert!(excuses.request(&asked, &error, clone.state.mode()), "no reason to fail: {error:?}");
            oracle.abandon_read(read);
            return false;
        }
    }
    true
}

/// What must hold of a completed clone.
async fn check_completed(clone: &SimClone, oracle: &Oracle, growths: &Growths) {
    assert_eq!(clone.state.hydrated(), clone.geometry().nr_regions());
    for shard in 0..clone.net.shards() {
        while clone.slice(shard).source().is_ok() {
            clone.sim.sleep(Duration::from_millis(1)).await;
        }
    }
    clone.flush().await.unwrap();
    clone.stop().await.unwrap();
    // A batch that clients came before may still be asking the source what is allocated.
    while clone.state.hydrating() > 0 {
        clone.sim.sleep(Duration::from_millis(1)).await;
    }
    let image = clone.devices.destination.image();
    let size = clone.geometry().size() as usize;
    oracle.check_all(&image[..size]);
    // A growth that failed may have filled the last region.
    let region_size = clone.geometry().region_size().bytes() as usize;
    let end = if growths.borrow().is_empty() { size } else { image.len().min(size.next_multiple_of(region_size)) };
    assert!(image[end..].iter().all(|b| *b == OLD_DESTINATION), "nothing behind the clone is touched");
}

/// What a run was like.
pub struct Outcome {
    pub schedule_hash: u64,
    pub tally: Tally,
    pub virtual_time: Duration,
}

/// Waits for something that may take microseconds or minutes, without a step for each of these.
struct Polls(Duration);

impl Polls {
    fn next(&mut self) -> Duration {
        let longer = (self.0 * 5 / 4).min(Duration::from_millis(20));
        std::mem::replace(&mut self.0, longer)
    }
}

/// Starts a clone whose devices may fail at that: then they are healed, and the power fails.
fn start(sim: &Sim, setup: &Setup, devices: &mut Devices) -> Rc<SimClone> {
    loop {
        match sim.block_on(SimClone::start(sim, setup, devices)) {
            Ok(clone) => return clone,
            Err(error) => {
                assert!(Excuses::new(devices, &[]).may_be_read_only(), "no reason not to start: {error:?}");
                sim.count(Group::End, "failed start");
                sim.say(|| format!("START FAILS: {error}"));
                heal(devices);
                *devices = devices.crash(sim);
            }
        }
    }
}

pub fn simulate(seed: u64, failures: bool) -> Outcome {
    let sim = Sim::new(seed);
    let mut setup = sim.draw(random_setup);
    let content = sim.draw(|rng| random_content(rng, setup.size));
    let oracle = Oracle::new(&content);
    let mut devices = Devices::new(&sim, &setup, content);
    devices.destination.can_zero.set(sim.draw(|rng| !rng.one_in(4)));
    for disk in [&devices.destination, &devices.metadata] {
        disk.buffered.set(sim.draw(|rng| rng.one_in(3)));
    }
    for latency in [&*devices.destination.latency_us, &*devices.metadata.latency_us] {
        latency.set(sim.draw(|rng| rng.pick(&[(5, 200), (5, 200), (1, 10), (500, 20_000)])));
    }
    devices.source.latency_us.set(sim.draw(|rng| rng.pick(&[(20, 1000), (2_000, 20_000)])));
    devices.source.knows_no_holes.set(sim.draw(|rng| rng.one_in(4)));
    sim.say(|| format!("seed {seed}, failures {failures}: {setup:?}"));
    let lives = sim.draw(|rng| rng.between(1, 4));
    let lives = lives + u64::from(failures);
    let growths = Growths::default();
    let mut size = setup.size;
    let mut was_killed = false;
    for life in 0..lives {
        let last = life + 1 == lives;
        heal(&devices);
        if failures && life > 0 && sim.draw(|rng| rng.one_in(3)) {
            rot_metadata(&sim, &setup, &devices);
            heal(&devices);
        }
        let of_source = if failures && !last { plague(&sim, &devices) } else { Vec::new() };
        sim.say(|| format!("LIFE {life} of {lives} begins with {} shards", setup.shards));
        let clone = start(&sim, &setup, &mut devices);
        let excuses = Rc::new(Excuses::new(&devices, &of_source));
        let laws = Laws::watch(&clone, &oracle);
        size = settle_growth(&clone, &oracle, &growths, size);
        let quiet = life > 0 && sim.draw(|rng| rng.one_in(2)) && sim.block_on(read_all(&clone, &oracle, &excuses));
        // What a killed daemon has left in the caches can still be lost.
        if quiet && !was_killed {
            oracle.settle();
        }
        let clients = sim.draw(|rng| rng.between(1, 6)) as u32;
        let suspends = sim.draw(|rng| rng.one_in(2));
        let load = Rc::new(Load {
            clone: clone.clone(),
            setup: setup.clone(),
            oracle: oracle.clone(),
            laws: laws.clone(),
            excuses: excuses.clone(),
            running: Cell::new(clients + 1),
            suspends,
            size: Cell::new(size),
            growths: growths.clone(),
            requests_left: Cell::new(sim.draw(|rng| rng.between(5, 120)) as u32),
        });
        (0..clients).for_each(|_| sim.spawn(load.clone().client()));
        sim.spawn(load.clone().operator());
        let requests = load.requests_left.get();
        let (ends_by_crash, crash_at, after) =
            sim.draw(|rng| (!rng.one_in(4), rng.below(u64::from(requests)) as u32, rng.below(4000)));
        let was_complete = clone.state.is_complete();
        if !last && ends_by_crash {
            // In the midst of it, mostly before everything is hydrated.
            let mut polls = Polls(Duration::from_micros(100));
            while load.requests_left.get() > crash_at {
                sim.run_for(polls.next());
            }
            sim.run_for(Duration::from_micros(after));
            was_killed = sim.draw(|rng| rng.one_in(3));
            sim.count(Group::End, if was_killed { "kill" } else { "crash" });
        } else {
            sim.block_on(async {
                let mut polls = Polls(Duration::from_millis(1));
                while load.running.get() > 0 {
                    sim.sleep(polls.next()).await;
                }
                if last {
                    clone.state.set_hydration_threshold(AUTOMATIC, clone.sim.now());
                    clone.enable_hydration(true);
                    clone.completed().await;
                    read_all(&clone, &oracle, &excuses).await;
                    check_completed(&clone, &oracle, &growths).await;
                    laws.check_idle();
                } else {
                    let begun = oracle.begin_flush();
                    let asked = excuses.asked(&setup, None, true);
                    if load.judge(&asked, clone.stop().await).is_some() {
                        load.flushed(begun);
                    }
                }
            });
            sim.count(Group::End, "stop");
            // The daemon has ended, and then the power fails as well.
            was_killed = false;
        }
        excuses.check_mode(clone.state.mode());
        if !was_complete {
            clone.check_events();
        }
        devices = if was_killed { devices.kill(&sim) } else { devices.crash(&sim) };
        oracle.crash();
        size = load.size.get();
        setup.shards = sim.draw(|rng| rng.between(1, 4)) as u16;
        (setup.hydration, setup.remote_source) = sim.draw(|rng| (rng.one_in(2), rng.one_in(3)));
    }
    sim.block_on(async {
        let opened = Store::open(devices.metadata.clone()).await.unwrap().unwrap();
        assert_eq!(opened.store.superblock().state, codec::CloneState::Complete);
    });
    oracle.check_all(&devices.destination.image()[..size as usize]);
    Outcome { schedule_hash: sim.schedule_hash(), tally: sim.tally(), virtual_time: sim.now() }
}

#[test]
fn clients_see_what_they_wrote_through_any_crash() {
    for seed in seeds(0..16) {
        let _seed = Seed(seed);
        simulate(seed, false);
    }
}

#[test]
fn clients_see_what_they_wrote_beside_failing_devices() {
    for seed in seeds(0..16) {
        let _seed = Seed(seed);
        simulate(seed, true);
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in seeds(1000..1003) {
        let hash = || simulate(seed, seed % 2 == 0).schedule_hash;
        assert_eq!(hash(), hash(), "seed {seed}");
    }
}
