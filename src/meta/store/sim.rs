//! A disk in memory for the store's tests: a volatile cache over a durable image.
//!
//! What was written and not flushed survives a crash in any subset of its 512-byte sectors; writes in flight do too.
//! Operations finish out of order. A run can be stopped before any operation, one operation can fail, one flush can lie.

use super::super::codec::SECTOR_BYTES;
use crate::disk::{Disk, DiskInfo, ZeroFlags};
use crate::dma_buf::DmaBuf;
use crate::error::{Error, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::units::ByteRange;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// xorshift64*: the tests print the seed.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound
    }
}

/// How the disk misbehaves; operations (writes and flushes) and flushes are counted from 0.
#[derive(Clone, Copy, Default, Debug)]
pub struct Plan {
    /// Power fails when this operation starts: it and all later ones fail.
    pub stop_at: Option<usize>,
    /// This operation fails with EIO, once.
    pub fail_at: Option<usize>,
    /// These flushes say that all is well and do nothing (bit n: flush n).
    pub lying_flushes: u64,
    /// Reads of this block fail with EIO.
    pub bad_block: Option<u64>,
    /// How often every operation yields before it ends; random when `None`.
    pub turns: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logged {
    Write { offset: u64, len: u64 },
    Flush,
}

struct Pending {
    offset: usize,
    data: Bytes,
    completed: bool,
}

struct State {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Option<Pending>>,
    plan: Plan,
    log: Vec<Logged>,
    flushes: u32,
    in_flight: usize,
    in_flight_max: usize,
    rng: Rng,
}

pub struct SimDisk(RefCell<State>);

impl SimDisk {
    pub fn new(image: Vec<u8>, plan: Plan, seed: u64) -> Self {
        Self(RefCell::new(State {
            live: image.clone(),
            durable: image,
            pending: Vec::new(),
            plan,
            log: Vec::new(),
            flushes: 0,
            in_flight: 0,
            in_flight_max: 0,
            rng: Rng::new(seed),
        }))
    }

    pub fn log(&self) -> Vec<Logged> {
        self.0.borrow().log.clone()
    }
    pub fn in_flight_max(&self) -> usize {
        self.0.borrow().in_flight_max
    }

    /// What is on the medium after power failed now: each unflushed sector is the durable one or any later version.
    pub fn crash(&self) -> Vec<u8> {
        let mut state = self.0.borrow_mut();
        let mut image = state.durable.clone();
        let mut versions: BTreeMap<usize, Vec<Bytes>> = BTreeMap::new();
        for write in state.pending.iter().flatten() {
            for at in (0..write.data.len()).step_by(SECTOR_BYTES) {
                let sector = write.data.slice(at..at + SECTOR_BYTES);
                versions.entry(write.offset + at).or_default().push(sector);
            }
        }
        // None, all, or each for itself.
        let how = state.rng.below(4);
        for (at, versions) in versions {
            let pick = match how {
                0 => versions.len(),
                1 => versions.len() - 1,
                _ => state.rng.below(versions.len() as u64 + 1) as usize,
            };
            if let Some(sector) = versions.get(pick) {
                image[at..at + SECTOR_BYTES].copy_from_slice(sector);
            }
        }
        image
    }

    /// Counts an operation and says whether it fails.
    fn start(&self, operation: Logged) -> Result<()> {
        let mut state = self.0.borrow_mut();
        let number = state.log.len();
        state.log.push(operation);
        if state.plan.stop_at.is_some_and(|stop| number >= stop) {
            return Err(Error::io(libc::EIO, "power is off"));
        }
        if state.plan.fail_at == Some(number) {
            return Err(Error::io(libc::EIO, format!("operation {number}")));
        }
        Ok(())
    }

    async fn delay(&self) {
        let turns = {
            let mut state = self.0.borrow_mut();
            state.plan.turns.unwrap_or_else(|| state.rng.below(4))
        };
        for _ in 0..turns {
            futures_lite::future::yield_now().await;
        }
    }

    fn check(&self, start: u64, len: u64) {
        let info = self.info();
        assert!(start.is_multiple_of(4096) && start + len <= info.size, "{len} bytes at {start}");
        assert!(len.is_multiple_of(4096) || start + len == info.size, "{len} bytes at {start}");
    }
}

impl Disk for SimDisk {
    fn info(&self) -> DiskInfo {
        DiskInfo { size: self.0.borrow().live.len() as u64, block: 4096 }
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            self.check(range.start(), range.len());
            self.delay().await;
            let state = self.0.borrow();
            if let Some(bad) = state.plan.bad_block.map(|b| ByteRange::new(b * 4096, 4096).unwrap())
                && range.overlaps(bad)
            {
                return Err(Error::io(libc::EIO, format!("{range}")));
            }
            let mut buf = DmaBuf::new(range.len() as usize);
            buf.copy_from_slice(&state.live[range.start() as usize..range.end() as usize]);
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: Bytes, _fua: bool) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(offset, data.len() as u64);
            let started = self.start(Logged::Write { offset, len: data.len() as u64 });
            let at = offset as usize;
            let index = {
                let mut state = self.0.borrow_mut();
                state.live[at..at + data.len()].copy_from_slice(&data);
                state.pending.push(Some(Pending { offset: at, data, completed: false }));
                state.in_flight += 1;
                state.in_flight_max = state.in_flight_max.max(state.in_flight);
                state.pending.len() - 1
            };
            self.delay().await;
            let mut state = self.0.borrow_mut();
            state.in_flight -= 1;
            started?;
            if let Some(write) = &mut state.pending[index] {
                write.completed = true;
            }
            Ok(())
        })
    }

    fn flush(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.start(Logged::Flush)?;
            // Only what completed before the flush began counts.
            let completed = |w: &Option<Pending>| w.as_ref().is_some_and(|w| w.completed);
            let covered: Vec<bool> = self.0.borrow().pending.iter().map(completed).collect();
            self.delay().await;
            let mut state = self.0.borrow_mut();
            let state = &mut *state;
            let lies = state.plan.lying_flushes >> state.flushes & 1 == 1;
            state.flushes += 1;
            if !lies {
                for (slot, _) in state.pending.iter_mut().zip(covered).filter(|(_, covered)| *covered) {
                    if let Some(write) = slot.take() {
                        state.durable[write.offset..write.offset + write.data.len()].copy_from_slice(&write.data);
                    }
                }
            }
            Ok(())
        })
    }

    fn zero(&self, range: ByteRange, _flags: ZeroFlags) -> LocalBoxFuture<'_, Result<()>> {
        self.write(range.start(), vec![0; range.len() as usize].into(), false)
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move { Ok(vec![Extent { len: range.len(), state: Allocation::DATA }]) })
    }
}
