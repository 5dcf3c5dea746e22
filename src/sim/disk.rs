//! A disk with a volatile cache.
//!
//! A write reaches the cache in two parts, at random moments between its start and its end. After a crash every
//! 512-byte sector holds what was last flushed or any later version, each sector for itself; writes that were in
//! flight may have reached any of their sectors. A flush covers what had completed when it began.
//!
//! Any operation can be made to fail. A change that fails has written nothing, all, or any of its sectors. A flush that
//! fails has made any of what it covers durable and dropped any of the rest, which counts as clean then: reads still
//! return it, and the next flush succeeds without it, as on Linux. The next process reads it too when the disk is
//! [`SimDisk::buffered`] (no direct I/O), until somebody drops the clean pages.

use super::executor::Sim;
use super::report::Group;
use crate::disk::{Disk, DiskInfo, ZeroFlags};
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
use crate::units::ByteRange;
use bytes::Bytes;
use std::cell::{Cell, Ref, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

const SECTOR: usize = 512;
/// How often a held-up operation looks again.
const GATE_POLL: Duration = Duration::from_micros(50);

/// What was asked of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read(ByteRange),
    Write { range: ByteRange, fua: bool },
    Zero { range: ByteRange, flags: ZeroFlags },
    Flush,
    Allocation(ByteRange),
}

impl Op {
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Op::Read(range) | Op::Write { range, .. } | Op::Zero { range, .. } | Op::Allocation(range) => Some(*range),
            Op::Flush => None,
        }
    }
    pub fn is_change(&self) -> bool {
        matches!(self, Op::Write { .. } | Op::Zero { .. })
    }
    pub fn name(&self) -> &'static str {
        match self {
            Op::Read(_) => "read",
            Op::Write { fua: false, .. } => "write",
            Op::Write { fua: true, .. } => "write FUA",
            Op::Zero { .. } => "zero",
            Op::Flush => "flush",
            Op::Allocation(_) => "allocation",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.range() {
            Some(range) => write!(f, "{} {}+{}", self.name(), range.start(), range.len()),
            None => f.write_str(self.name()),
        }
    }
}

/// The errno that an operation is to fail with.
type Fault = Box<dyn FnMut(&Op) -> Option<i32>>;
/// Whether an operation is held up.
type Gate = Box<dyn Fn(&Op) -> bool>;
/// Sees a change before anything of it happens: where, what is there now, what comes.
type Watch = Rc<dyn Fn(u64, &[u8], &[u8])>;

/// Content of a sector after one write.
struct Version {
    seq: u64,
    write: u64,
    completed: bool,
    data: Vec<u8>,
}

/// A write between its start and its end.
struct Flight {
    offset: u64,
    data: Bytes,
    /// How many of its sectors have reached the cache.
    applied: usize,
}

#[derive(Default)]
struct State {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Versions newer than the durable one, oldest first.
    cached: BTreeMap<usize, Vec<Version>>,
    in_flight: BTreeMap<u64, Flight>,
    next: u64,
    log: Vec<(Duration, Op)>,
    /// What failed, with its errno.
    failed: Vec<(Op, i32)>,
    fault: Option<Fault>,
    gate: Option<Gate>,
    watch: Option<Watch>,
    running: u64,
    running_max: u64,
}

pub struct SimDisk {
    sim: Sim,
    name: &'static str,
    info: DiskInfo,
    state: Rc<RefCell<State>>,
    /// Bounds of the time one operation takes, in microseconds.
    pub latency_us: Rc<Cell<(u64, u64)>>,
    /// One operation in so many (0: none) takes up to so much longer.
    pub stalls: Rc<Cell<(u64, Duration)>>,
    /// Whether it can zero by itself.
    pub can_zero: Rc<Cell<bool>>,
    /// Whether all I/O goes through the page cache, which outlives a process.
    pub buffered: Rc<Cell<bool>>,
}

impl SimDisk {
    pub fn new(sim: &Sim, name: &'static str, image: Vec<u8>, block: u32) -> Rc<Self> {
        Rc::new(Self {
            sim: sim.clone(),
            name,
            info: DiskInfo { size: image.len() as u64, block },
            state: Rc::new(RefCell::new(State { durable: image.clone(), live: image, ..State::default() })),
            latency_us: Rc::new(Cell::new((5, 200))),
            stalls: Rc::default(),
            can_zero: Rc::new(Cell::new(true)),
            buffered: Rc::default(),
        })
    }

    /// The same disk made larger (durably, as `ftruncate` and `fsync` do) and opened again; unless it is large enough.
    pub fn grown(&self, size: u64, fill: u8) -> Rc<Self> {
        let mut state = self.state.borrow_mut();
        let size = size.max(state.live.len() as u64);
        state.live.resize(size as usize, fill);
        state.durable.resize(size as usize, fill);
        Rc::new(Self {
            sim: self.sim.clone(),
            name: self.name,
            info: DiskInfo { size, ..self.info },
            state: self.state.clone(),
            latency_us: self.latency_us.clone(),
            stalls: self.stalls.clone(),
            can_zero: self.can_zero.clone(),
            buffered: self.buffered.clone(),
        })
    }

    /// What a read of everything would return now.
    pub fn image(&self) -> Vec<u8> {
        self.state.borrow().live.clone()
    }

    /// The same disk after the power failed.
    pub fn crashed(&self) -> Rc<Self> {
        let new = Self::new(&self.sim, self.name, self.crash_image(), self.info.block);
        new.can_zero.set(self.can_zero.get());
        new.buffered.set(self.buffered.get());
        new.latency_us.set(self.latency_us.get());
        new.stalls.set(self.stalls.get());
        new
    }

    /// Damages what is on the medium, under everybody's feet.
    pub fn rot(&self, range: ByteRange, rotten: &[u8]) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        // Nothing in the cache covers it.
        for part in sectors(range.start() as usize, range.len() as usize) {
            let sector = part.start / SECTOR;
            if state.cached.remove(&sector).is_some() {
                let whole = sector * SECTOR..state.live.len().min((sector + 1) * SECTOR);
                state.durable[whole.clone()].copy_from_slice(&state.live[whole]);
            }
        }
        for image in [&mut state.live, &mut state.durable] {
            image[range.start() as usize..range.end() as usize].copy_from_slice(rotten);
        }
    }

    /// All that a crash may leave of `range`, sector by sector: what is durable, and everything in the cache.
    pub fn each_version(&self, range: ByteRange, mut of: impl FnMut(u64, &[u8])) {
        let state = self.state.borrow();
        for part in sectors(range.start() as usize, range.len() as usize) {
            of(part.start as u64, &state.durable[part.clone()]);
            let (sector, inside) = (part.start / SECTOR, part.start % SECTOR..part.start % SECTOR + part.len());
            for version in state.cached.get(&sector).into_iter().flatten() {
                of(part.start as u64, &version.data[inside.clone()]);
            }
        }
    }

    /// Operations so far, with the time each was asked for.
    pub fn log(&self) -> Vec<(Duration, Op)> {
        self.state.borrow().log.clone()
    }
    pub fn clear_log(&self) {
        self.state.borrow_mut().log.clear();
    }
    /// Operations that failed so far, in the order in which they did, with their errno.
    pub fn failed(&self) -> Ref<'_, [(Op, i32)]> {
        Ref::map(self.state.borrow(), |state| &state.failed[..])
    }
    pub fn forget_failures(&self) {
        self.state.borrow_mut().failed.clear();
    }
    pub fn flushes(&self) -> usize {
        self.state.borrow().log.iter().filter(|(_, op)| *op == Op::Flush).count()
    }
    pub fn changes(&self) -> usize {
        self.state.borrow().log.iter().filter(|(_, op)| op.is_change()).count()
    }

    /// The most reads and changes that were going on at once.
    pub fn running_max(&self) -> u64 {
        self.state.borrow().running_max
    }

    /// Fails operations for which `fault` returns an errno.
    pub fn set_fault(&self, fault: impl FnMut(&Op) -> Option<i32> + 'static) {
        self.state.borrow_mut().fault = Some(Box::new(fault));
    }
    pub fn clear_fault(&self) {
        self.state.borrow_mut().fault = None;
    }
    /// Shows changes to `watch` before anything of them happens.
    pub fn set_watch(&self, watch: impl Fn(u64, &[u8], &[u8]) + 'static) {
        self.state.borrow_mut().watch = Some(Rc::new(watch));
    }
    /// Holds operations up for which `gate` returns true, before anything of them happens.
    pub fn set_gate(&self, gate: impl Fn(&Op) -> bool + 'static) {
        self.state.borrow_mut().gate = Some(Box::new(gate));
    }
    pub fn clear_gate(&self) {
        self.state.borrow_mut().gate = None;
    }

    /// What is on the medium after power failed now.
    pub fn crash_image(&self) -> Vec<u8> {
        let mut state = self.state.borrow_mut();
        // Nothing, everything, or each sector for itself; the same for what was in flight.
        let (cached_how, flight_how) = self.sim.draw(|rng| (rng.below(4), rng.below(4)));
        let in_flight = std::mem::take(&mut state.in_flight);
        for (write, Flight { offset, data, applied }) in in_flight {
            for part in sectors(offset as usize, data.len()).split_off(applied) {
                let lands = match flight_how {
                    0 => false,
                    1 => true,
                    _ => self.sim.draw(|rng| rng.one_in(2)),
                };
                if lands {
                    let at = part.start - offset as usize;
                    state.apply(write, part.start, &data[at..at + part.len()]);
                }
            }
        }
        let mut image = state.durable.clone();
        for (sector, versions) in &state.cached {
            let pick = match cached_how {
                0 => 0,
                1 => versions.len(),
                _ => self.sim.draw(|rng| rng.below(versions.len() as u64 + 1)) as usize,
            };
            if let Some(version) = pick.checked_sub(1).map(|i| &versions[i]) {
                image[sector * SECTOR..sector * SECTOR + version.data.len()].copy_from_slice(&version.data);
            }
        }
        image
    }

    /// The disk as the next process finds it after this one was killed: the cache goes on. What was in flight has
    /// ended, each of its sectors written or not.
    pub fn after_kill(&self) -> Rc<Self> {
        let mut old = self.state.borrow_mut();
        let mut state = State {
            live: std::mem::take(&mut old.live),
            durable: std::mem::take(&mut old.durable),
            cached: std::mem::take(&mut old.cached),
            next: old.next,
            ..State::default()
        };
        if !self.buffered.get() {
            // What a failed flush has dropped is not there for the next process: its reads go to the device, not to the
            // pages that this one's flush has left clean.
            state.drop_clean();
        }
        for (write, Flight { offset, data, applied }) in std::mem::take(&mut old.in_flight) {
            for part in sectors(offset as usize, data.len()).split_off(applied) {
                if self.sim.draw(|rng| rng.one_in(2)) {
                    let at = part.start - offset as usize;
                    state.apply(write, part.start, &data[at..at + part.len()]);
                }
            }
            state.in_flight.insert(write, Flight { offset, data, applied });
            state.complete(write);
        }
        Rc::new(Self {
            sim: self.sim.clone(),
            name: self.name,
            // It may have grown through another handle.
            info: DiskInfo { size: state.live.len() as u64, ..self.info },
            state: Rc::new(RefCell::new(state)),
            latency_us: self.latency_us.clone(),
            stalls: self.stalls.clone(),
            can_zero: self.can_zero.clone(),
            buffered: self.buffered.clone(),
        })
    }

    /// Drops the pages that are clean, as `devices::open_target` does.
    pub fn drop_clean_pages(&self) {
        if self.buffered.get() {
            self.state.borrow_mut().drop_clean();
        }
    }

    fn check(&self, range: ByteRange) {
        let (block, size) = (u64::from(self.info.block), self.info.size);
        assert!(range.start().is_multiple_of(block) && range.end() <= size, "{range:?} of {size}, block {block}");
        assert!(range.end().is_multiple_of(block) || range.end() == size, "{range:?} of {size}, block {block}");
    }

    async fn begin(&self, op: Op) -> Result<()> {
        if let Some(range) = op.range() {
            self.check(range);
        }
        self.state.borrow_mut().log.push((self.sim.now(), op));
        self.sim.say(|| format!("{:<11} {op}", self.name));
        while self.state.borrow().gate.as_ref().is_some_and(|gate| gate(&op)) {
            self.sim.sleep(GATE_POLL).await;
        }
        self.delay().await;
        let errno = self.state.borrow_mut().fault.as_mut().and_then(|fault| fault(&op));
        let Some(errno) = errno else { return Ok(()) };
        self.state.borrow_mut().failed.push((op, errno));
        let what = if errno == libc::ENOSPC { "full" } else { "error" };
        self.sim.count(Group::Fault, &format!("{} {}: {what}", self.name, op.name()));
        self.sim.say(|| format!("{:<11} {op} FAILS with errno {errno}", self.name));
        Err(Error::io(errno, format!("simulated {op:?}")))
    }

    async fn delay(&self) {
        let (low, high) = self.latency_us.get();
        let us = self.sim.draw(|rng| if rng.one_in(50) { 10 * high } else { rng.between(low, high) });
        let (one_in, longest) = self.stalls.get();
        let stall = stall(&self.sim, one_in, longest);
        if !stall.is_zero() {
            self.sim.count(Group::Fault, &format!("{}: stall", self.name));
            self.sim.say(|| format!("{:<11} STALLS for {stall:?}", self.name));
        }
        self.sim.sleep(Duration::from_micros(us) + stall).await;
    }

    async fn put(&self, op: Op, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        let _running = Running::new(&self.state);
        let watch = self.state.borrow().watch.clone();
        if let Some(watch) = watch {
            let before = self.state.borrow().live[offset as usize..offset as usize + data.len()].to_vec();
            watch(offset, &before, &data);
        }
        let write = {
            let mut state = self.state.borrow_mut();
            let write = state.next;
            state.next += 1;
            state.in_flight.insert(write, Flight { offset, data: data.clone(), applied: 0 });
            write
        };
        let begun = self.begin(op).await;
        let parts = sectors(offset as usize, data.len());
        let cut = self.sim.draw(|rng| rng.below(parts.len() as u64 + 1)) as usize;
        let apply = |part: &std::ops::Range<usize>| {
            let at = part.start - offset as usize;
            let mut state = self.state.borrow_mut();
            state.apply(write, part.start, &data[at..at + part.len()]);
            state.in_flight.get_mut(&write).expect("it is in flight").applied += 1;
        };
        if let Err(error) = begun {
            // Nothing of it, all of it, its beginning (a short write), or any of its sectors.
            let how = self.sim.draw(|rng| rng.below(4));
            for (i, part) in parts.iter().enumerate() {
                let lands = match how {
                    0 => false,
                    1 => true,
                    2 => i < cut,
                    _ => self.sim.draw(|rng| rng.one_in(2)),
                };
                if lands {
                    apply(part);
                }
            }
            self.state.borrow_mut().complete(write);
            return Err(error);
        }
        parts[..cut].iter().for_each(apply);
        self.delay().await;
        parts[cut..].iter().for_each(apply);
        self.delay().await;
        let mut state = self.state.borrow_mut();
        state.complete(write);
        if fua {
            for part in parts {
                let sector = part.start / SECTOR;
                let seq = state.cached.get(&sector).and_then(|v| v.iter().rfind(|v| v.write == write)).map(|v| v.seq);
                if let Some(seq) = seq {
                    state.make_durable(sector, seq);
                }
            }
        }
        drop(state);
        self.sim.say(|| format!("{:<11} {op} is done", self.name));
        Ok(())
    }
}

/// How much longer an operation takes: mostly not at all.
pub fn stall(sim: &Sim, one_in: u64, longest: Duration) -> Duration {
    if one_in == 0 || !sim.draw(|rng| rng.one_in(one_in)) {
        return Duration::ZERO;
    }
    // Of any magnitude from a millisecond on.
    let longest = longest.as_micros() as u64;
    Duration::from_micros(sim.draw(|rng| (1000 << rng.below(17)).min(longest) * rng.between(1, 8) / 8))
}

/// Counts an operation as going on.
struct Running<'a>(&'a RefCell<State>);
impl<'a> Running<'a> {
    fn new(state: &'a RefCell<State>) -> Self {
        let mut counts = state.borrow_mut();
        counts.running += 1;
        counts.running_max = counts.running_max.max(counts.running);
        Self(state)
    }
}
impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.borrow_mut().running -= 1;
    }
}

/// A range of bytes cut at sector boundaries.
fn sectors(offset: usize, len: usize) -> Vec<std::ops::Range<usize>> {
    let mut parts = Vec::new();
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let stop = end.min((at / SECTOR + 1) * SECTOR);
        parts.push(at..stop);
        at = stop;
    }
    parts
}

impl State {
    fn apply(&mut self, write: u64, at: usize, data: &[u8]) {
        self.live[at..at + data.len()].copy_from_slice(data);
        let sector = at / SECTOR;
        let end = self.live.len().min((sector + 1) * SECTOR);
        let content = self.live[sector * SECTOR..end].to_vec();
        let seq = self.next;
        self.next += 1;
        self.cached.entry(sector).or_default().push(Version { seq, write, completed: false, data: content });
    }
    fn complete(&mut self, write: u64) {
        let Some(Flight { offset, data, .. }) = self.in_flight.remove(&write) else { return };
        for part in sectors(offset as usize, data.len()) {
            let versions = self.cached.get_mut(&(part.start / SECTOR)).into_iter().flatten();
            versions.filter(|v| v.write == write).for_each(|v| v.completed = true);
        }
    }
    /// What is read from now on is on the medium or in the volatile cache.
    fn drop_clean(&mut self) {
        self.live.clone_from(&self.durable);
        for (sector, versions) in &self.cached {
            let Some(last) = versions.last() else { continue };
            self.live[sector * SECTOR..sector * SECTOR + last.data.len()].copy_from_slice(&last.data);
        }
    }
    fn forget(&mut self, sector: usize, seq: u64) {
        let Some(versions) = self.cached.get_mut(&sector) else { return };
        versions.retain(|v| v.seq > seq);
        if versions.is_empty() {
            self.cached.remove(&sector);
        }
    }
    fn make_durable(&mut self, sector: usize, seq: u64) {
        let Some(versions) = self.cached.get_mut(&sector) else { return };
        let Some(at) = versions.iter().position(|v| v.seq == seq) else { return };
        let data = &versions[at].data;
        self.durable[sector * SECTOR..sector * SECTOR + data.len()].copy_from_slice(data);
        versions.drain(..=at);
        if versions.is_empty() {
            self.cached.remove(&sector);
        }
    }
}

impl Disk for SimDisk {
    fn info(&self) -> DiskInfo {
        self.info
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            let _running = Running::new(&self.state);
            self.begin(Op::Read(range)).await?;
            let mut buf = DmaBuf::new(range.len() as usize);
            let parts = sectors(range.start() as usize, range.len() as usize);
            let cut = self.sim.draw(|rng| rng.below(parts.len() as u64 + 1)) as usize;
            for (i, part) in parts.into_iter().enumerate() {
                if i == cut {
                    self.delay().await;
                }
                let at = part.start - range.start() as usize;
                buf[at..at + part.len()].copy_from_slice(&self.state.borrow().live[part]);
            }
            self.delay().await;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> LocalBoxFuture<'_, Result<()>> {
        let range = ByteRange::new(offset, data.len() as u64).expect("a write is not empty");
        Box::pin(self.put(Op::Write { range, fua }, offset, data, fua))
    }

    fn zero(&self, range: ByteRange, flags: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if flags.contains(ZeroFlags::FAST_ONLY) && !self.can_zero.get() {
                return Err(Error::new(ErrorKind::NotSupported, format!("no fast way to zero {range}")));
            }
            let zeros = Bytes::from(vec![0; range.len() as usize]);
            self.put(Op::Zero { range, flags }, range.start(), zeros, false).await
        })
    }

    fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let covered: Vec<(usize, u64)> = {
                let state = self.state.borrow();
                let last = |versions: &Vec<Version>| versions.iter().rfind(|v| v.completed).map(|v| v.seq);
                state.cached.iter().filter_map(|(sector, versions)| Some((*sector, last(versions)?))).collect()
            };
            let begun = self.begin(Op::Flush).await;
            let mut state = self.state.borrow_mut();
            if begun.is_err() {
                // All of it lost, nothing, or each sector for itself.
                let how = self.sim.draw(|rng| rng.below(4));
                for (sector, seq) in covered {
                    match if how > 1 { self.sim.draw(|rng| rng.below(3)) } else { how } {
                        0 => state.forget(sector, seq),
                        1 => {}
                        _ => state.make_durable(sector, seq),
                    }
                }
                return begun;
            }
            covered.into_iter().for_each(|(sector, seq)| state.make_durable(sector, seq));
            drop(state);
            self.sim.say(|| format!("{:<11} flush is done", self.name));
            Ok(())
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            self.begin(Op::Allocation(range)).await?;
            let state = self.state.borrow();
            let mut extents = Vec::new();
            for part in sectors(range.start() as usize, range.len() as usize) {
                let zero = state.live[part.clone()].iter().all(|b| *b == 0);
                push_extent(&mut extents, part.len() as u64, if zero { Allocation::HOLE } else { Allocation::DATA });
            }
            extents.truncate(crate::disk::EXTENTS_MAX);
            Ok(extents)
        })
    }
}
