//! The demo's load: clients that read and write random places, check what they read and take the time.
//!
//! Each client has its own connection and its own part of the disk, so that it alone knows what its part must hold.

use super::content::{Model, Random, SECTOR, Stamp, Wrong, fill_sector};
use super::nbd_client::NbdClient;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::proto::TransmissionFlags;
use hdrhistogram::Histogram;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// What the clone is doing while a request is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Nothing is copied in the background.
    Cold,
    Hydrating,
    Hydrated,
}

impl Phase {
    pub const ALL: [Self; 3] = [Self::Cold, Self::Hydrating, Self::Hydrated];
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    /// Writes and write zeroes.
    Write,
    Flush,
}

/// Latencies in microseconds are kept up to here; longer ones count as this.
const LATENCY_US_MAX: u64 = 60_000_000;
/// Lengths of requests, in sectors: as often as they are listed.
const LENGTHS: [u64; 10] = [1, 7, 8, 8, 8, 8, 8, 32, 128, 512];
/// The longest request, in bytes.
pub const LENGTH_MAX: u64 = 512 * SECTOR as u64;

/// What the threads share.
pub struct Controls {
    phase: AtomicU8,
    stop: AtomicBool,
}

impl Controls {
    pub fn new() -> Self {
        Self { phase: AtomicU8::new(0), stop: AtomicBool::new(false) }
    }
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
    fn phase(&self) -> usize {
        usize::from(self.phase.load(Ordering::Relaxed))
    }
}

/// The measurements of one phase.
#[derive(Clone)]
pub struct Measured {
    latencies_us: [Histogram<u64>; 3],
    pub read_bytes: u64,
    pub write_bytes: u64,
}

impl Measured {
    fn new() -> Result<Self> {
        let histogram = Histogram::new_with_max(LATENCY_US_MAX, 3)
            .map_err(|error| Error::new(ErrorKind::Environment, format!("histogram: {error}")))?;
        Ok(Self { latencies_us: [histogram.clone(), histogram.clone(), histogram], read_bytes: 0, write_bytes: 0 })
    }
    fn record(&mut self, kind: Kind, bytes: u64, taken: Duration) {
        let us = u64::try_from(taken.as_micros()).unwrap_or(u64::MAX);
        self.latencies_us[kind as usize].saturating_record(us);
        match kind {
            Kind::Read => self.read_bytes += bytes,
            Kind::Write => self.write_bytes += bytes,
            Kind::Flush => {}
        }
    }
    fn add(&mut self, other: &Self) -> Result<()> {
        for (mine, theirs) in self.latencies_us.iter_mut().zip(&other.latencies_us) {
            mine.add(theirs).map_err(|error| Error::new(ErrorKind::Environment, format!("histogram: {error}")))?;
        }
        self.read_bytes += other.read_bytes;
        self.write_bytes += other.write_bytes;
        Ok(())
    }
    pub fn requests(&self, kind: Kind) -> u64 {
        self.latencies_us[kind as usize].len()
    }
    /// In microseconds; `None` when there was no such request.
    pub fn latency_us(&self, kind: Kind, quantile: f64) -> Option<u64> {
        let histogram = &self.latencies_us[kind as usize];
        (!histogram.is_empty()).then(|| histogram.value_at_quantile(quantile))
    }
}

/// What came of one client, or of all of them.
pub struct Outcome {
    /// By [`Phase`].
    pub phases: Vec<Measured>,
    pub models: Vec<Model>,
    /// Reads that did not get what they must have.
    pub wrong_reads: Vec<Wrong>,
}

impl Outcome {
    pub fn new() -> Result<Self> {
        let phases = Phase::ALL.iter().map(|_| Measured::new()).collect::<Result<_>>()?;
        Ok(Self { phases, models: Vec::new(), wrong_reads: Vec::new() })
    }
    /// Takes the outcome of another client in.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (mine, theirs) in self.phases.iter_mut().zip(&other.phases) {
            mine.add(theirs)?;
        }
        self.models.extend(other.models);
        self.wrong_reads.extend(other.wrong_reads);
        Ok(())
    }
}

/// Starts a client on its part of the disk. It ends when it is told to, or fails.
pub fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    socket: &'scope Path,
    export: &'scope str,
    sectors: Range<u64>,
    controls: &'scope Controls,
) -> ScopedJoinHandle<'scope, Result<Outcome>> {
    scope.spawn(move || run(NbdClient::connect(socket, export)?, sectors, controls))
}

fn run(mut client: NbdClient, sectors: Range<u64>, controls: &Controls) -> Result<Outcome> {
    let mut outcome = Outcome::new()?;
    let mut model = Model::new(sectors.clone());
    let mut random = Random::new(sectors.start);
    let mut writes = (sectors.start as u32) << 8;
    let mut buffer = vec![0; LENGTH_MAX as usize];
    let can_zero = client.export().flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
    while !controls.stopped() {
        let count = LENGTHS[random.below(LENGTHS.len() as u64) as usize];
        let first = sectors.start + random.below(sectors.end - sectors.start - count + 1);
        let (offset, bytes) = (first * SECTOR as u64, &mut buffer[..count as usize * SECTOR]);
        let what = random.below(100);
        if (60..95).contains(&what) {
            writes = writes.wrapping_add(1);
            for (sector, bytes) in (first..).zip(bytes.chunks_mut(SECTOR)) {
                fill_sector(sector, Stamp::Written(writes), bytes);
            }
        }
        let phase = controls.phase();
        let start = Instant::now();
        let kind = match what {
            0..60 => client.read(offset, bytes).map(|()| Kind::Read),
            95..98 if can_zero => client.write_zeroes(offset, bytes.len()).map(|()| Kind::Write),
            60..95 => client.write(offset, bytes).map(|()| Kind::Write),
            _ => client.flush().map(|()| Kind::Flush),
        }?;
        outcome.phases[phase].record(kind, bytes.len() as u64, start.elapsed());
        match (kind, what) {
            (Kind::Read, _) => outcome.wrong_reads.extend(model.check(first, bytes)),
            (Kind::Write, 95..) => model.stamp(first, count, Stamp::Zeroed),
            (Kind::Write, _) => model.stamp(first, count, Stamp::Written(writes)),
            (Kind::Flush, _) => {}
        }
    }
    client.flush()?;
    client.disconnect()?;
    outcome.models.push(model);
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_sums() {
        let mut a = Measured::new().unwrap();
        assert_eq!(a.latency_us(Kind::Read, 0.5), None);
        for us in 1..=100 {
            a.record(Kind::Read, 10, Duration::from_micros(us));
        }
        let mut b = Measured::new().unwrap();
        b.record(Kind::Write, 7, Duration::from_secs(3600));
        b.add(&a).unwrap();
        assert_eq!(b.latency_us(Kind::Read, 0.5), Some(50));
        assert_eq!(b.latency_us(Kind::Read, 0.99), Some(99));
        assert!(b.latency_us(Kind::Write, 0.5).unwrap() >= LATENCY_US_MAX);
        assert_eq!((b.read_bytes, b.write_bytes, b.requests(Kind::Read), b.requests(Kind::Flush)), (1000, 7, 100, 0));
    }
}
