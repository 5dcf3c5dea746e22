//! The oracle: what every byte of the clone may be, for clients now and after a crash.
//!
//! Each byte has a set of candidates: the changes whose value it may have. A change enters when it starts. When a
//! change was acknowledged, those that had ended before it started leave: from the set of the clients at once, from
//! the set of the medium when a flush that began afterwards (or the change's own FUA) was acknowledged. A trim is a
//! write of zeros that removes nobody. A failed write stays until a later one removes it.
//!
//! Bytes with the same candidates are kept together as runs, so that an operation costs what it touches. What is read
//! is compared in pieces of a run within one 512-byte sector: the bytes of such a piece always change together, so all of
//! them come from one candidate.

use crate::units::ByteRange;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

const RUNNING: u64 = u64::MAX;
/// What the media write whole or not at all, in bytes.
const SECTOR: u64 = 512;

/// A change, and whose bytes it stands for: those differ after a crash only, when all that may have survived it counts
/// as one change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    change: u32,
    /// The change whose data this is.
    data: u32,
}

struct Change {
    range: ByteRange,
    started: u64,
    ended: u64,
    acknowledged: bool,
    /// A trim: it may have had no effect.
    optional: bool,
    /// From the start of its range.
    data: Bytes,
}

impl Change {
    fn holds(&self, start: u64, bytes: &[u8]) -> bool {
        let at = (start - self.range.start()) as usize;
        self.data[at..at + bytes.len()] == *bytes
    }
}

/// Bytes up to `end` with the same candidates.
#[derive(Clone, PartialEq, Debug)]
struct Run {
    end: u64,
    live: Vec<Candidate>,
    medium: Vec<Candidate>,
}

struct ReadInFlight {
    range: ByteRange,
    started: u64,
    /// The data that each byte may have: of when the read began, in runs up to the given end.
    allowed: Vec<(u64, Vec<u32>)>,
    /// Changes that have begun since.
    disturbed_by: Vec<u32>,
}

struct Model {
    clock: u64,
    changes: Vec<Change>,
    /// By their start; without gaps.
    runs: BTreeMap<u64, Run>,
    reads: BTreeMap<usize, ReadInFlight>,
    reads_begun: usize,
}

/// See the head of this file. Cheap to clone.
#[derive(Clone)]
pub struct Oracle(Rc<RefCell<Model>>);

/// The value that change `change` gives to byte `at`. Never [`super::clone::OLD_DESTINATION`], never 0.
pub fn pattern(change: u32, at: u64) -> u8 {
    let mixed = (u64::from(change) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    1 + ((mixed >> 40) % 0xe0) as u8
}

/// Follows one byte through a run: `HYDRANT_SIM_BYTE=n` prints what clients do with it.
fn traces(range: ByteRange) -> bool {
    static BYTE: std::sync::LazyLock<Option<u64>> =
        std::sync::LazyLock::new(|| std::env::var("HYDRANT_SIM_BYTE").ok().and_then(|at| at.parse().ok()));
    BYTE.is_some_and(|at| (range.start()..range.end()).contains(&at))
}

/// Cuts `start..end` at the bounds of sectors.
fn in_sectors(start: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = start;
    std::iter::from_fn(move || {
        let stop = end.min((at / SECTOR + 1) * SECTOR);
        (at < end).then(|| std::mem::replace(&mut at, stop)..stop)
    })
}

/// Candidates of `set` that an acknowledged change makes impossible leave.
fn prune(set: &mut Vec<Candidate>, changes: &[Change], is_final: impl Fn(&Change) -> bool) -> bool {
    if set.len() == 1 {
        return false;
    }
    let newest = set.iter().map(|c| &changes[c.change as usize]).filter(|c| !c.optional && is_final(c));
    let Some(newest_start) = newest.map(|c| c.started).max() else { return false };
    let before = set.len();
    set.retain(|c| changes[c.change as usize].ended > newest_start);
    set.len() < before
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
    fn size(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(_, run)| run.end)
    }

    fn split(&mut self, at: u64) {
        let Some((start, run)) = self.runs.range_mut(..at).next_back() else { return };
        if *start < at && at < run.end {
            let mut tail = run.clone();
            tail.end = std::mem::replace(&mut run.end, at);
            self.runs.insert(at, tail);
        }
    }

    /// The runs of `range`, which begin and end with it.
    fn cut(&mut self, range: ByteRange) -> impl Iterator<Item = (&u64, &mut Run)> {
        self.split(range.start());
        self.split(range.end());
        self.runs.range_mut(range.start()..range.end())
    }

    /// Joins runs around and in `range` that are the same.
    fn join(&mut self, range: ByteRange) {
        let first = self.runs.range(..range.start()).next_back().map_or(range.start(), |(start, _)| *start);
        let starts: Vec<u64> = self.runs.range(first..=range.end()).map(|(start, _)| *start).collect();
        let mut last = first;
        for start in starts.into_iter().skip_while(|start| *start <= first) {
            let same = {
                let (a, b) = (&self.runs[&last], &self.runs[&start]);
                (a.live == b.live && a.medium == b.medium).then_some(b.end)
            };
            match same {
                Some(end) => {
                    self.runs.remove(&start);
                    self.runs.get_mut(&last).expect("it is there").end = end;
                }
                None => last = start,
            }
        }
    }

    fn append(&mut self, content: &[u8]) {
        let Some(range) = ByteRange::new(self.size(), content.len() as u64) else { return };
        let (change, started, ended) = (self.changes.len() as u32, self.tick(), self.tick());
        let data = Bytes::copy_from_slice(content);
        self.changes.push(Change { range, started, ended, acknowledged: true, optional: false, data });
        let only = vec![Candidate { change, data: change }];
        self.runs.insert(range.start(), Run { end: range.end(), live: only.clone(), medium: only });
    }
}

impl Oracle {
    pub fn new(content: &[u8]) -> Self {
        let mut model =
            Model { clock: 0, changes: Vec::new(), runs: BTreeMap::new(), reads: BTreeMap::new(), reads_begun: 0 };
        model.append(content);
        Self(Rc::new(RefCell::new(model)))
    }

    /// The clone has grown; durably: nobody has changed these bytes yet.
    pub fn grow(&self, more: &[u8]) {
        self.0.borrow_mut().append(more);
    }

    /// A change begins. `zeros`: it writes zeros; else what is returned.
    pub fn begin_change(&self, range: ByteRange, zeros: bool, optional: bool) -> (u32, Bytes) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let (change, started) = (model.changes.len() as u32, model.tick());
        let value = |at| if zeros { 0 } else { pattern(change, at) };
        let data: Bytes = (range.start()..range.end()).map(value).collect();
        if traces(range) {
            eprintln!("{started}: change {change} of {range:?} begins, zeros {zeros}, optional {optional}");
        }
        model.changes.push(Change {
            range,
            started,
            ended: RUNNING,
            acknowledged: false,
            optional,
            data: data.clone(),
        });
        for (_, run) in model.cut(range) {
            let candidate = Candidate { change, data: change };
            run.live.push(candidate);
            run.medium.push(candidate);
        }
        let reads = model.reads.values_mut().filter(|read| read.range.overlaps(range));
        reads.for_each(|read| read.disturbed_by.push(change));
        (change, data)
    }

    /// A change has returned.
    pub fn end_change(&self, change: u32, acknowledged: bool, durable: bool) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let now = model.tick();
        let this = &mut model.changes[change as usize];
        (this.ended, this.acknowledged) = (now, acknowledged);
        let (range, own) = (this.range, this.started);
        if traces(range) {
            eprintln!("{now}: change {change} ends, acknowledged {acknowledged}, durable {durable}");
        }
        model.split(range.start());
        model.split(range.end());
        for (_, run) in model.runs.range_mut(range.start()..range.end()) {
            prune(&mut run.live, &model.changes, |c| c.acknowledged);
            if durable && acknowledged {
                prune(&mut run.medium, &model.changes, |c| c.started == own);
            }
        }
        model.join(range);
    }

    pub fn begin_flush(&self) -> u64 {
        self.0.borrow_mut().tick()
    }
    /// A flush that began at `begun` was acknowledged. Returns the bytes of which less is possible now.
    pub fn end_flush(&self, begun: u64) -> Vec<ByteRange> {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let mut pruned: Vec<ByteRange> = Vec::new();
        for (start, run) in &mut model.runs {
            if prune(&mut run.medium, &model.changes, |c| c.acknowledged && c.ended < begun) {
                pruned.extend(ByteRange::between(*start, run.end));
            }
        }
        pruned.iter().for_each(|range| model.join(*range));
        pruned
    }

    /// A read begins.
    pub fn begin_read(&self, range: ByteRange) -> usize {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let (started, number) = (model.tick(), model.reads_begun);
        let first = model.runs.range(..=range.start()).next_back().map_or(0, |(start, _)| *start);
        let runs = model.runs.range(first..range.end());
        let allowed = runs.map(|(_, run)| (run.end, run.live.iter().map(|c| c.data).collect())).collect();
        if traces(range) {
            eprintln!("{started}: read {number} of {range:?} begins");
        }
        model.reads_begun += 1;
        model.reads.insert(number, ReadInFlight { range, started, allowed, disturbed_by: Vec::new() });
        number
    }

    /// A read has failed, and that is all right.
    pub fn abandon_read(&self, read: usize) {
        self.0.borrow_mut().reads.remove(&read);
    }

    /// What the read returned must be allowed; and if nothing was being changed, it stays so.
    pub fn end_read(&self, read: usize, data: &[u8]) {
        self.check(read, data);
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        // After a crash nobody waits for its answer.
        let Some(ReadInFlight { range, started, disturbed_by, .. }) = model.reads.remove(&read) else { return };
        if traces(range) {
            eprintln!("{}: read {read} ends", model.clock);
        }
        let changes = &model.changes;
        let quiet = |c: &Candidate| changes[c.change as usize].ended < started;
        let first = model.runs.range(..=range.start()).next_back().map_or(0, |(start, _)| *start);
        let mut narrowed: Vec<(Range<u64>, Vec<Candidate>)> = Vec::new();
        for (start, run) in model.runs.range(first..range.end()) {
            if run.live.len() == 1 || !run.live.iter().all(quiet) {
                continue;
            }
            for piece in in_sectors((*start).max(range.start()), run.end.min(range.end())) {
                let bytes = &data[(piece.start - range.start()) as usize..(piece.end - range.start()) as usize];
                let overlaps = |c: &u32| {
                    let other = changes[*c as usize].range;
                    other.start() < piece.end && piece.start < other.end()
                };
                if disturbed_by.iter().any(overlaps) {
                    continue;
                }
                let holds = |c: &&Candidate| changes[c.data as usize].holds(piece.start, bytes);
                let kept: Vec<Candidate> = run.live.iter().filter(holds).copied().collect();
                assert!(!kept.is_empty(), "bytes {piece:?} of read {range:?} are torn: they come from several changes");
                if kept.len() < run.live.len() {
                    narrowed.push((piece, kept));
                }
            }
        }
        for (piece, kept) in narrowed {
            let piece = ByteRange::between(piece.start, piece.end).expect("a piece is not empty");
            model.cut(piece).for_each(|(_, run)| run.live = kept.clone());
        }
        model.join(range);
    }

    fn check(&self, read: usize, data: &[u8]) {
        let model = self.0.borrow();
        let Some(read) = model.reads.get(&read) else { return };
        assert_eq!(data.len() as u64, read.range.len());
        let mut at = read.range.start();
        for (end, allowed) in &read.allowed {
            for piece in in_sectors(at, (*end).min(read.range.end())) {
                let bytes =
                    &data[(piece.start - read.range.start()) as usize..(piece.end - read.range.start()) as usize];
                if allowed.iter().any(|c| model.changes[*c as usize].holds(piece.start, bytes)) {
                    continue;
                }
                for (at, value) in (piece.start..).zip(bytes) {
                    let value_of = |c: &u32| {
                        let change = &model.changes[*c as usize];
                        let inside = (change.range.start()..change.range.end()).contains(&at);
                        inside.then(|| change.data[(at - change.range.start()) as usize])
                    };
                    let all = || allowed.iter().chain(&read.disturbed_by);
                    assert!(
                        all().any(|c| value_of(c) == Some(*value)),
                        "byte {at} of read {:?} is {value:#x}, allowed are {:x?}, of changes {:?}",
                        read.range,
                        all().filter_map(value_of).collect::<Vec<_>>(),
                        all().collect::<Vec<_>>(),
                    );
                }
            }
            at = *end;
        }
    }

    /// Bytes that are said to read as zeros must be able to.
    pub fn check_zero(&self, read: usize, at: u64, len: u64) {
        let model = self.0.borrow();
        let Some(read) = model.reads.get(&read) else { return };
        let mut from = read.range.start();
        for (end, allowed) in &read.allowed {
            for byte in at.max(from)..(at + len).min(*end) {
                let is_zero = |c: &&u32| {
                    let change = &model.changes[**c as usize];
                    let inside = (change.range.start()..change.range.end()).contains(&byte);
                    inside && change.data[(byte - change.range.start()) as usize] == 0
                };
                let zero = allowed.iter().chain(&read.disturbed_by).find(is_zero);
                assert!(zero.is_some(), "byte {byte} is said to be zero, it is of changes {allowed:?}");
            }
            from = *end;
        }
    }

    /// Whether the medium may hold these bytes at `start`; what is beyond the size it knows is not judged. Says which
    /// bytes are wrong.
    pub fn check_medium(&self, start: u64, bytes: &[u8]) -> Result<(), String> {
        let model = self.0.borrow();
        let end = model.size().min(start + bytes.len() as u64);
        if start >= end {
            return Ok(());
        }
        let first = model.runs.range(..=start).next_back().map_or(0, |(start, _)| *start);
        for (from, run) in model.runs.range(first..end) {
            for piece in in_sectors((*from).max(start), run.end.min(end)) {
                let found = &bytes[(piece.start - start) as usize..(piece.end - start) as usize];
                if !run.medium.iter().any(|c| model.changes[c.data as usize].holds(piece.start, found)) {
                    let changes: Vec<_> = run.medium.iter().map(|c| c.data).collect();
                    let some = &found[..found.len().min(8)];
                    return Err(format!(
                        "bytes {piece:?} are {some:x?}..., which none of the changes {changes:?} wrote"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The power fails: what was going on has ended, and what the medium may hold is what clients may see.
    pub fn crash(&self) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let now = model.tick();
        let range = ByteRange::new(0, model.size()).expect("a clone is not empty");
        if traces(range) {
            eprintln!("{now}: crash");
        }
        model.changes.iter_mut().filter(|c| c.ended == RUNNING).for_each(|c| c.ended = now);
        // Any of them may have been lost now: none says any more that another one is gone.
        let change = model.changes.len() as u32;
        let data = Bytes::new();
        model.changes.push(Change { range, started: now, ended: now, acknowledged: true, optional: true, data });
        for run in model.runs.values_mut() {
            run.medium.iter_mut().for_each(|candidate| candidate.change = change);
            run.live = run.medium.clone();
        }
        model.reads.clear();
    }

    /// After a restart everything that clients see comes from the medium: what was read of it stays.
    pub fn settle(&self) {
        self.0.borrow_mut().runs.values_mut().for_each(|run| run.medium = run.live.clone());
    }

    /// Nothing is going on: `data` must be the content of the whole clone.
    pub fn check_all(&self, data: &[u8]) {
        let range = ByteRange::new(0, data.len() as u64).unwrap();
        let read = self.begin_read(range);
        self.end_read(read, data);
    }
}
