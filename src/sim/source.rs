//! A source in memory: slow, with bad places, or lost for a while.

use super::disk::stall;
use super::executor::Sim;
use super::report::Group;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture, push_extent};
use crate::source::Source;
use crate::units::ByteRange;
use std::cell::{Cell, Ref, RefCell};
use std::rc::Rc;
use std::time::Duration;

const POLL: Duration = Duration::from_micros(50);
const POLL_MAX: Duration = Duration::from_millis(5);
/// Holes are known in pieces of this size, in bytes.
const GRAIN: u64 = 4096;

pub struct SimSource {
    sim: Sim,
    content: RefCell<Rc<[u8]>>,
    pub latency_us: Cell<(u64, u64)>,
    /// Reads wait, as long as this is set.
    pub held: Cell<bool>,
    /// The peer is gone: reads and questions wait for [`Self::patience`], then fail.
    pub lost: Cell<bool>,
    pub patience: Cell<Duration>,
    /// Says that all is data.
    pub knows_no_holes: Cell<bool>,
    /// Questions about allocation fail.
    pub refuses_allocation: Cell<bool>,
    /// The peer is back, but has another content: everything fails.
    pub changed: Cell<bool>,
    /// One operation in so many (0: none) fails with EIO.
    pub errors: Cell<u64>,
    /// One operation in so many (0: none) takes up to so much longer.
    pub stalls: Cell<(u64, Duration)>,
    bad: RefCell<Vec<ByteRange>>,
    reads: RefCell<Vec<ByteRange>>,
    /// What failed with an I/O error.
    failed: RefCell<Vec<ByteRange>>,
    in_flight_bytes: Cell<u64>,
    in_flight_bytes_max: Cell<u64>,
}

impl SimSource {
    pub fn new(sim: &Sim, content: Vec<u8>) -> Rc<Self> {
        Rc::new(Self {
            sim: sim.clone(),
            content: RefCell::new(content.into()),
            latency_us: Cell::new((20, 1000)),
            held: Cell::new(false),
            lost: Cell::new(false),
            patience: Cell::new(Duration::from_secs(5)),
            knows_no_holes: Cell::new(false),
            refuses_allocation: Cell::new(false),
            changed: Cell::new(false),
            errors: Cell::default(),
            stalls: Cell::default(),
            bad: RefCell::default(),
            reads: RefCell::default(),
            failed: RefCell::default(),
            in_flight_bytes: Cell::new(0),
            in_flight_bytes_max: Cell::new(0),
        })
    }

    pub fn content(&self) -> Rc<[u8]> {
        self.content.borrow().clone()
    }
    /// More content behind what there is.
    pub fn append(&self, more: &[u8]) {
        let content: Vec<u8> = self.content().iter().chain(more).copied().collect();
        self.content.replace(content.into());
    }
    /// The source as who opens it now sees it: with the size that it has now.
    pub fn open(self: &Rc<Self>) -> Rc<dyn Source> {
        Rc::new(Opened { source: self.clone(), size: self.size() })
    }
    /// Reads that touch one of these ranges fail with EIO.
    pub fn set_bad(&self, bad: Vec<ByteRange>) {
        *self.bad.borrow_mut() = bad;
    }
    /// Every read so far.
    pub fn reads(&self) -> Vec<ByteRange> {
        self.reads.borrow().clone()
    }
    /// Operations that failed with an I/O error so far, in the order in which they did.
    pub fn failed(&self) -> Ref<'_, [ByteRange]> {
        Ref::map(self.failed.borrow(), |failed| &failed[..])
    }
    pub fn clear_reads(&self) {
        self.reads.borrow_mut().clear();
    }
    pub fn read_bytes(&self) -> u64 {
        self.reads.borrow().iter().map(|range| range.len()).sum()
    }
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.get()
    }
    /// The most bytes that were being read at once.
    pub fn in_flight_bytes_max(&self) -> u64 {
        self.in_flight_bytes_max.get()
    }

    async fn answer(&self, what: &'static str, range: ByteRange) -> Result<()> {
        self.sim.say(|| format!("source      {what} {}+{}", range.start(), range.len()));
        let us = self.sim.draw(|rng| {
            let (low, high) = self.latency_us.get();
            if rng.one_in(30) { 10 * high } else { rng.between(low, high) }
        });
        let (one_in, longest) = self.stalls.get();
        let stall = stall(&self.sim, one_in, longest);
        if !stall.is_zero() {
            self.sim.count(Group::Fault, "source: stall");
            self.sim.say(|| format!("source      STALLS for {stall:?}"));
        }
        self.sim.sleep(Duration::from_micros(us) + stall).await;
        let until = self.sim.now() + self.patience.get();
        while self.lost.get() {
            if self.sim.now() >= until {
                self.sim.count(Group::Fault, "source: lost");
                self.sim.say(|| format!("source      {what} {range:?} FAILS: lost"));
                return Err(Error::new(ErrorKind::SourceLost, "the source can't be reached"));
            }
            self.sim.sleep(Duration::from_millis(10)).await;
        }
        if self.changed.get() {
            self.sim.count(Group::Fault, "source: changed");
            return Err(Error::new(ErrorKind::SourceChanged, "the source has another content than before"));
        }
        if self.errors.get() > 0 && self.sim.draw(|rng| rng.one_in(self.errors.get())) {
            self.sim.count(Group::Fault, &format!("source {what}: error"));
            self.sim.say(|| format!("source      {what} {range:?} FAILS with EIO"));
            self.failed.borrow_mut().push(range);
            return Err(Error::io(libc::EIO, format!("source: {what} {range}")));
        }
        Ok(())
    }
}

struct InFlight<'a>(&'a SimSource, u64);

impl<'a> InFlight<'a> {
    fn new(source: &'a SimSource, bytes: u64) -> Self {
        let now = source.in_flight_bytes.get() + bytes;
        source.in_flight_bytes.set(now);
        source.in_flight_bytes_max.set(source.in_flight_bytes_max.get().max(now));
        Self(source, bytes)
    }
}
impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight_bytes.set(self.0.in_flight_bytes.get() - self.1);
    }
}

/// A [`SimSource`] with the size it had when it was opened.
struct Opened {
    source: Rc<SimSource>,
    size: u64,
}

impl Source for Opened {
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        assert!(range.end() <= self.size, "{range:?} of {}", self.size);
        self.source.read(range)
    }
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        assert!(range.end() <= self.size, "{range:?} of {}", self.size);
        self.source.allocation(range)
    }
}

impl Source for SimSource {
    fn size(&self) -> u64 {
        self.content.borrow().len() as u64
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            assert!(range.end() <= self.size(), "{range:?} of {}", self.size());
            self.reads.borrow_mut().push(range);
            let _in_flight = InFlight::new(self, range.len());
            let mut poll = POLL;
            while self.held.get() {
                self.sim.sleep(poll).await;
                poll = (2 * poll).min(POLL_MAX);
            }
            self.answer("read", range).await?;
            if self.bad.borrow().iter().any(|bad| bad.overlaps(range)) {
                self.sim.count(Group::Fault, "source read: bad place");
                self.failed.borrow_mut().push(range);
                return Err(Error::io(libc::EIO, format!("source: {range}")));
            }
            let mut buf = DmaBuf::new(range.len() as usize);
            buf.copy_from_slice(&self.content()[range.start() as usize..range.end() as usize]);
            Ok(buf)
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            self.answer("allocation", range).await?;
            if self.refuses_allocation.get() {
                return Err(Error::io(libc::EIO, format!("source: allocation of {range}")));
            }
            let (content, mut extents) = (self.content(), Vec::new());
            for piece in range.split_at_multiples(GRAIN) {
                let bytes = &content[piece.start() as usize..piece.end() as usize];
                let hole = !self.knows_no_holes.get() && bytes.iter().all(|b| *b == 0);
                push_extent(&mut extents, piece.len(), if hole { Allocation::HOLE } else { Allocation::DATA });
            }
            // It may say less than was asked.
            let keep = self.sim.draw(|rng| rng.between(1, extents.len() as u64)) as usize;
            extents.truncate(keep.min(crate::disk::EXTENTS_MAX));
            Ok(extents)
        })
    }
}
