//! The oracle: what every byte of the clone may be, for clients now and after a crash.
//!
//! Each byte has a set of candidates: the writes whose value it may have. A write enters when it starts. When a
//! write was acknowledged, those that had ended before it started leave: from the set of the clients at once, from
//! the set of the medium when a flush that began afterwards (or the write's own FUA) was acknowledged. A trim is a
//! write of zeros that removes nobody. A failed write stays until a later one removes it.

use crate::units::ByteRange;
use std::cell::RefCell;
use std::rc::Rc;

const RUNNING: u64 = u64::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    change: u32,
    value: u8,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    range: ByteRange,
    started: u64,
    ended: u64,
    acknowledged: bool,
    /// A trim: it may have had no effect.
    optional: bool,
}

struct ReadInFlight {
    range: ByteRange,
    started: u64,
    /// One value, and perhaps more, for each byte.
    allowed: Vec<(u8, Vec<u8>)>,
    disturbed: Vec<bool>,
    done: bool,
}

struct Model {
    clock: u64,
    changes: Vec<Change>,
    live: Vec<Vec<Candidate>>,
    medium: Vec<Vec<Candidate>>,
    reads: Vec<ReadInFlight>,
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

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Candidates of `set` that an acknowledged change makes impossible leave.
    fn prune(set: &mut Vec<Candidate>, changes: &[Change], is_final: impl Fn(&Change) -> bool) {
        if set.len() == 1 {
            return;
        }
        let newest = set.iter().map(|c| &changes[c.change as usize]).filter(|c| !c.optional && is_final(c));
        let Some(newest_start) = newest.map(|c| c.started).max() else { return };
        set.retain(|c| changes[c.change as usize].ended > newest_start);
    }
}

impl Oracle {
    /// `content`: the source's.
    pub fn new(content: &[u8]) -> Self {
        let range = ByteRange::new(0, content.len() as u64).unwrap();
        let first = Change { range, started: 0, ended: 1, acknowledged: true, optional: false };
        let sets: Vec<_> = content.iter().map(|value| vec![Candidate { change: 0, value: *value }]).collect();
        Self(Rc::new(RefCell::new(Model {
            clock: 1,
            changes: vec![first],
            live: sets.clone(),
            medium: sets,
            reads: Vec::new(),
        })))
    }

    /// The clone has grown; durably: nobody has changed these bytes yet.
    pub fn grow(&self, more: &[u8]) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let Some(range) = ByteRange::new(model.live.len() as u64, more.len() as u64) else { return };
        let (change, started, ended) = (model.changes.len() as u32, model.tick(), model.tick());
        model.changes.push(Change { range, started, ended, acknowledged: true, optional: false });
        let sets: Vec<_> = more.iter().map(|value| vec![Candidate { change, value: *value }]).collect();
        model.live.extend(sets.clone());
        model.medium.extend(sets);
    }

    /// A change begins. `zeros`: it writes zeros; else what is returned.
    pub fn begin_change(&self, range: ByteRange, zeros: bool, optional: bool) -> (u32, Vec<u8>) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let (change, started) = (model.changes.len() as u32, model.tick());
        model.changes.push(Change { range, started, ended: RUNNING, acknowledged: false, optional });
        let value = |at| if zeros { 0 } else { pattern(change, at) };
        if traces(range) {
            eprintln!("{started}: change {change} of {range:?} begins, zeros {zeros}, optional {optional}");
        }
        for at in range.start()..range.end() {
            let candidate = Candidate { change, value: value(at) };
            model.live[at as usize].push(candidate);
            model.medium[at as usize].push(candidate);
        }
        for read in model.reads.iter_mut().filter(|read| !read.done) {
            let Some(both) = read.range.intersection(range) else { continue };
            for at in both.start()..both.end() {
                let i = (at - read.range.start()) as usize;
                read.allowed[i].1.push(value(at));
                read.disturbed[i] = true;
            }
        }
        (change, (range.start()..range.end()).map(value).collect())
    }

    /// A change has returned.
    pub fn end_change(&self, change: u32, acknowledged: bool, durable: bool) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let now = model.tick();
        let this = &mut model.changes[change as usize];
        (this.ended, this.acknowledged) = (now, acknowledged);
        let (range, changes) = (this.range, &model.changes);
        if traces(range) {
            eprintln!("{now}: change {change} ends, acknowledged {acknowledged}, durable {durable}");
        }
        for at in range.start() as usize..range.end() as usize {
            Model::prune(&mut model.live[at], changes, |c| c.acknowledged);
            if durable && acknowledged {
                let own = changes[change as usize].started;
                Model::prune(&mut model.medium[at], changes, |c| c.started == own);
            }
        }
    }

    pub fn begin_flush(&self) -> u64 {
        self.0.borrow_mut().tick()
    }
    /// A flush that began at `begun` was acknowledged.
    pub fn end_flush(&self, begun: u64) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        for set in &mut model.medium {
            Model::prune(set, &model.changes, |c| c.acknowledged && c.ended < begun);
        }
    }

    /// A read begins.
    pub fn begin_read(&self, range: ByteRange) -> usize {
        let mut model = self.0.borrow_mut();
        let started = model.tick();
        let bytes = range.start() as usize..range.end() as usize;
        let allowed =
            model.live[bytes].iter().map(|set| (set[0].value, set[1..].iter().map(|c| c.value).collect())).collect();
        let disturbed = vec![false; range.len() as usize];
        if traces(range) {
            eprintln!("{started}: read {} of {range:?} begins", model.reads.len());
        }
        model.reads.push(ReadInFlight { range, started, allowed, disturbed, done: false });
        model.reads.len() - 1
    }

    /// A read has failed, and that is all right.
    pub fn abandon_read(&self, read: usize) {
        self.0.borrow_mut().reads[read].done = true;
    }

    /// What the read returned must be allowed; and if nothing was being changed, it stays so.
    pub fn end_read(&self, read: usize, data: &[u8]) {
        self.check(read, data);
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let (range, started) = (model.reads[read].range, model.reads[read].started);
        if traces(range) {
            eprintln!("{}: read {read} ends", model.clock);
        }
        for (i, at) in (range.start() as usize..range.end() as usize).enumerate() {
            let set = &mut model.live[at];
            let quiet = set.iter().all(|c| model.changes[c.change as usize].ended < started);
            if quiet && !model.reads[read].disturbed[i] {
                set.retain(|c| c.value == data[i]);
            }
        }
        let read = &mut model.reads[read];
        (read.done, read.allowed, read.disturbed) = (true, Vec::new(), Vec::new());
    }

    fn check(&self, read: usize, data: &[u8]) {
        let model = self.0.borrow();
        let read = &model.reads[read];
        assert_eq!(data.len() as u64, read.range.len());
        for (i, value) in data.iter().enumerate() {
            let at = read.range.start() + i as u64;
            assert!(
                read.allowed[i].0 == *value || read.allowed[i].1.contains(value),
                "byte {at} of read {:?} is {value:#x}, allowed are {:x?}; candidates now {:?}",
                read.range,
                read.allowed[i],
                model.live[at as usize].iter().map(|c| model.changes[c.change as usize]).collect::<Vec<_>>()
            );
        }
    }

    /// Bytes that are said to read as zeros must be able to.
    pub fn check_zero(&self, read: usize, at: u64, len: u64) {
        let model = self.0.borrow();
        let read = &model.reads[read];
        for at in at..at + len {
            let allowed = &read.allowed[(at - read.range.start()) as usize];
            assert!(allowed.0 == 0 || allowed.1.contains(&0), "byte {at} is said to be zero, allowed are {allowed:x?}");
        }
    }

    /// The power fails: what was going on has ended, and what the medium may hold is what clients may see.
    pub fn crash(&self) {
        let mut model = self.0.borrow_mut();
        let model = &mut *model;
        let now = model.tick();
        if traces(ByteRange::new(0, model.live.len() as u64).unwrap()) {
            eprintln!("{now}: crash");
        }
        model.changes.iter_mut().filter(|c| c.ended == RUNNING).for_each(|c| c.ended = now);
        // Any of them may have been lost now: none says any more that another one is gone.
        let range = ByteRange::new(0, model.live.len() as u64).unwrap();
        let survivors = Change { range, started: now, ended: now, acknowledged: true, optional: true };
        let change = model.changes.len() as u32;
        model.changes.push(survivors);
        model.medium.iter_mut().flatten().for_each(|candidate| candidate.change = change);
        model.live = model.medium.clone();
        model.reads.iter_mut().for_each(|read| read.done = true);
    }

    /// After a restart everything that clients see comes from the medium: what was read of it stays.
    pub fn settle(&self) {
        let mut model = self.0.borrow_mut();
        model.medium = model.live.clone();
    }

    /// Nothing is going on: `data` must be the content of the whole clone.
    pub fn check_all(&self, data: &[u8]) {
        let range = ByteRange::new(0, data.len() as u64).unwrap();
        let read = self.begin_read(range);
        self.end_read(read, data);
    }
}
