//! The metadata store: formats, opens and commits metadata on a disk.
//!
//! The order of its writes and flushes is the crash argument of [`super`]; change neither without the other.
//! Invariants:
//! * every I/O is aligned to [`BLOCK_SIZE`], whatever the disk's logical block;
//! * one write operation at a time (a second one panics: two commits of one block would race on the medium);
//! * the first failure is latched: later writes and flushes fail with the same error, nothing is retried. A write
//!   operation whose future is dropped before its end counts as failed, because its I/O may still land later.
//!
//! Error texts do not name the device: the caller knows its path and adds it (`Error::within`).

use super::codec::{
    BLOCK_SIZE, BadSector, Block, CloneState, SUPERBLOCK_COPIES, SourceFingerprint, Superblock, UnverifiedSuperblock,
    ZoneCodec, metadata_size_needed, words_per_zone, zone_block,
};
use super::commit::{COPY_NAMES, CopyFound, OtherCopy, OtherState, Recovered, Recovery, recover};
use super::region_map::ZoneSnapshot;
use crate::bail;
use crate::disk::Disk;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::signatures::{SIGNATURES_END, identify};
use crate::units::{ByteRange, ByteSize, Generation, Geometry, ZoneIndex};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

/// The most that one read or write carries: 1 MiB.
const BLOCKS_PER_IO_MAX: u64 = (1 << 20) / BLOCK_SIZE as u64;
/// The most I/Os in flight; with [`BLOCKS_PER_IO_MAX`] it bounds the buffers to 16 MiB.
const IO_IN_FLIGHT_MAX: usize = 16;

/// The metadata of one clone, opened for commits. Lives on the coordinator shard.
pub struct Store {
    disk: Rc<dyn Disk>,
    superblock: RefCell<Superblock>,
    codec: ZoneCodec,
    failure: RefCell<Option<Error>>,
    /// A write operation is going on.
    busy: Cell<bool>,
    /// Zones were written since the last flush.
    unflushed: Cell<bool>,
    /// The superblock copy that is not as it should be.
    other: Cell<Option<OtherCopy>>,
}

/// What [`Store::open`] found.
pub struct Opened {
    pub store: Store,
    /// The zones that have hydrated regions, in order, with [`words_per_zone`] words each. Zones that are hydrated as a
    /// whole share theirs: of a large clone, little is held twice while it starts.
    pub zones: Vec<(ZoneIndex, Arc<[u64]>)>,
    /// The newest generation on the medium: the next commit has a higher one.
    pub generation: Generation,
    /// Oddities that did not prevent opening; one line each, for the log.
    pub notes: Vec<String>,
    /// One superblock copy is not as it should be, whyever: [`Store::mend`] makes them equal.
    pub copy_stale: bool,
}

fn block_range(first: u64, count: u64) -> ByteRange {
    let bytes = BLOCK_SIZE as u64;
    ByteRange::new(first * bytes, count * bytes).expect("the limits of the geometry keep blocks in range")
}

/// Drives the futures that `work` makes, at most [`IO_IN_FLIGHT_MAX`] at a time, and hands their results to `sink` as
/// they come. After the first error it starts no more, waits for those in flight and returns that error.
async fn run_bounded<T, F: Future<Output = Result<T>>>(
    work: impl Iterator<Item = F>,
    mut sink: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let mut work = work.fuse();
    let mut in_flight: Vec<Pin<Box<F>>> = Vec::with_capacity(IO_IN_FLIGHT_MAX);
    let mut result = Ok(());
    poll_fn(|context| {
        let mut is_pending = |future: &mut Pin<Box<F>>, result: &mut Result<()>| match future.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(done) => {
                let done = done.and_then(&mut sink);
                if result.is_ok() {
                    *result = done;
                }
                false
            }
        };
        in_flight.retain_mut(|future| is_pending(future, &mut result));
        while result.is_ok() && in_flight.len() < IO_IN_FLIGHT_MAX {
            let Some(future) = work.next() else { break };
            let mut future = Box::pin(future);
            if is_pending(&mut future, &mut result) {
                in_flight.push(future);
            }
        }
        if in_flight.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

/// A write operation in progress: releases the store at its end, latches a failure when it is dropped before.
struct Operation<'a> {
    store: &'a Store,
    ended: bool,
}

impl Operation<'_> {
    fn end(mut self, result: Result<()>) -> Result<()> {
        self.ended = true;
        if let Err(error) = &result {
            self.store.latch(error.clone());
        }
        result
    }

    /// It failed, and nothing was touched that counts.
    fn give_up(mut self) {
        self.ended = true;
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.store.busy.set(false);
        if !self.ended {
            self.store.latch(Error::new(ErrorKind::Failed, "a metadata write was abandoned before its end"));
        }
    }
}

/// Reads and judges both superblock copies, and names what else is there. Writes nothing.
pub async fn probe(disk: &dyn Disk) -> Result<Recovery> {
    let verdict = recover([read_copy(disk, 0).await, read_copy(disk, 1).await]);
    if let Recovery::NeverFormatted = verdict
        && let Some(range) = ByteRange::new(0, disk.info().size.min(SIGNATURES_END))
        && let Some(what) = identify(&disk.read(range).await?)
    {
        return Ok(Recovery::Foreign(what));
    }
    Ok(verdict)
}

/// The copy in block `index`; what a short disk lacks of it counts as zeros.
async fn read_copy(disk: &dyn Disk, index: u64) -> CopyFound {
    let mut block: Block = [0; BLOCK_SIZE];
    let wanted = block_range(index, 1);
    if let Some(range) = ByteRange::between(wanted.start(), wanted.end().min(disk.info().size)) {
        let bytes = disk.read(range).await?;
        block[..bytes.len()].copy_from_slice(&bytes);
    }
    Ok(UnverifiedSuperblock::new(&block).classify())
}

fn check_size(disk: &dyn Disk, superblock: &Superblock) -> Result<()> {
    let (size, needed) = (disk.info().size, metadata_size_needed(&superblock.geometry));
    if size < needed {
        bail!(TooSmall, "{} is too small, {} ({needed} bytes) are needed", ByteSize(size), ByteSize(needed));
    }
    Ok(())
}

impl Store {
    fn new(disk: Rc<dyn Disk>, superblock: Superblock) -> Self {
        Self {
            disk,
            codec: ZoneCodec::new(&superblock),
            superblock: RefCell::new(superblock),
            failure: RefCell::new(None),
            busy: Cell::new(false),
            unflushed: Cell::new(false),
            other: Cell::new(None),
        }
    }

    /// Makes new metadata: nothing hydrated. Whatever the disk held as metadata is invalid from the first flush on; a
    /// crash leaves the old metadata whole, or none, or the new ones. The uuid must be new. The caller has made sure
    /// that the disk may be overwritten, and touches the destination only afterwards.
    pub async fn format(disk: Rc<dyn Disk>, superblock: Superblock) -> Result<Store> {
        Self::create(disk, superblock, |_, _| Ok(())).await
    }

    /// As [`Self::format`], with bits: `fill` is given each zone, in order, and its words, all 0. The data behind the
    /// bits must be durable in the destination already. When `fill` fails no metadata are left. The uuid need not be
    /// new: every block is written before the superblock.
    pub async fn create(
        disk: Rc<dyn Disk>,
        superblock: Superblock,
        mut fill: impl FnMut(ZoneIndex, &mut [u64]) -> Result<()>,
    ) -> Result<Store> {
        check_size(&*disk, &superblock)?;
        let store = Store::new(disk, superblock);
        let disk = &store.disk;
        let zeros = DmaBuf::zeroed(SUPERBLOCK_COPIES as usize * BLOCK_SIZE);
        disk.write(0, zeros.into(), false).await?;
        disk.flush().await?;

        let (geometry, generation) = (store.superblock.borrow().geometry, store.superblock.borrow().generation);
        let words = words_per_zone(&geometry);
        let writes = (0..geometry.nr_zones()).step_by(BLOCKS_PER_IO_MAX as usize).map(|first| {
            let count = (geometry.nr_zones() - first).min(BLOCKS_PER_IO_MAX);
            let mut bits = vec![0; words * count as usize];
            let filled = (first..)
                .map(ZoneIndex)
                .zip(bits.chunks_exact_mut(words))
                .try_for_each(|(zone, bits)| fill(zone, bits));
            match filled {
                Ok(()) => store.write_run(first, bits.chunks_exact(words), generation),
                Err(error) => Box::pin(std::future::ready(Err(error))),
            }
        });
        run_bounded(writes, Ok).await?;
        disk.flush().await?;

        store.write_copies().await?;
        Ok(store)
    }

    /// Opens metadata and loads all bits. `Ok(None)`: never formatted. Anything that can't be trusted is an error that
    /// names the first bad sector: its number and byte offset on the disk, and the regions it covers.
    pub async fn open(disk: Rc<dyn Disk>) -> Result<Option<Opened>> {
        match probe(&*disk).await?.into_result()? {
            Some(recovered) => Self::load(disk, recovered).await.map(Some),
            None => Ok(None),
        }
    }

    /// The second half of [`Self::open`], for a caller that compares the superblock with its devices first. Flushes: bits
    /// that count must be durable, and a process that was killed in a commit may have left some in a volatile cache.
    pub async fn load(disk: Rc<dyn Disk>, recovered: Recovered) -> Result<Opened> {
        let Recovered { superblock, notes, other } = recovered;
        check_size(&*disk, &superblock)?;
        // Before they are read: what a flush that fails drops is not seen then.
        disk.flush().await?;
        let (geometry, mut generation) = (superblock.geometry, superblock.generation);
        let complete = superblock.state == CloneState::Complete;
        let store = Store::new(disk, superblock);
        store.other.set(other);
        // Grown as valid blocks arrive: a hostile size in the superblock must not decide how much is allocated.
        let mut zones: Vec<(ZoneIndex, Arc<[u64]>)> = Vec::new();
        let mut whole: Option<Arc<[u64]>> = None;
        let reads = (0..geometry.nr_zones()).step_by(BLOCKS_PER_IO_MAX as usize).map(|first| {
            let count = (geometry.nr_zones() - first).min(BLOCKS_PER_IO_MAX);
            let disk = &store.disk;
            async move {
                let bytes = disk.read(block_range(zone_block(ZoneIndex(first)), count)).await;
                Ok((first, bytes.map_err(|e| e.within(format!("zones {first} to {}", first + count - 1)))?))
            }
        });
        let mut bad: Vec<BadSector> = Vec::new();
        let mut hydrated = 0;
        run_bounded(reads, |(first, bytes): (u64, DmaBuf)| {
            let (blocks, _) = bytes.as_chunks::<BLOCK_SIZE>();
            for (zone, block) in (first..).map(ZoneIndex).zip(blocks) {
                let decoded = store.codec.decode(zone, block);
                bad.extend(decoded.bad);
                generation = generation.max(decoded.generation);
                let count = decoded.bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
                hydrated += count;
                if count == geometry.regions_per_zone() {
                    zones.push((zone, whole.get_or_insert_with(|| decoded.bits.into()).clone()));
                } else if count > 0 {
                    zones.push((zone, decoded.bits.into()));
                }
            }
            match bad.is_empty() {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Damaged, "")),
            }
        })
        .await
        .map_err(|error| match bad.iter().min_by_key(|b| b.sector) {
            Some(first) => {
                Error::new(ErrorKind::Damaged, format!("damaged: {first}; see all with `hydrant meta check`"))
            }
            None => error,
        })?;
        zones.sort_unstable_by_key(|(zone, _)| *zone);
        if complete && hydrated != geometry.nr_regions() {
            let all = geometry.nr_regions();
            bail!(
                Damaged,
                "damaged: marked complete, but {hydrated} of {all} regions are hydrated; look with `hydrant meta check`"
            );
        }
        Ok(Opened { store, zones, generation, notes, copy_stale: other.is_some() })
    }

    /// The superblock as last written.
    pub fn superblock(&self) -> Superblock {
        self.superblock.borrow().clone()
    }

    /// The failure that made the store refuse writes, if any.
    pub fn failure(&self) -> Option<Error> {
        self.failure.borrow().clone()
    }

    fn latch(&self, error: Error) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    fn begin(&self) -> Result<Operation<'_>> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        assert!(!self.busy.replace(true), "two metadata writes at once");
        Ok(Operation { store: self, ended: false })
    }

    /// Encodes the blocks of consecutive zones from `first` and writes them with one I/O.
    fn write_run<'a>(
        &self,
        first: u64,
        bits: impl ExactSizeIterator<Item = &'a [u64]>,
        generation: Generation,
    ) -> LocalBoxFuture<'_, Result<()>> {
        let mut buf = DmaBuf::new(bits.len() * BLOCK_SIZE);
        let (blocks, _) = buf.as_chunks_mut::<BLOCK_SIZE>();
        for ((zone, bits), block) in (first..).map(ZoneIndex).zip(bits).zip(blocks) {
            self.codec.encode(zone, generation, bits, block);
        }
        self.disk.write(zone_block(ZoneIndex(first)) * BLOCK_SIZE as u64, Bytes::from(buf), false)
    }

    /// Writes the blocks of these zones (each at most once): sorted, adjacent ones merged, in parallel. Not durable
    /// before [`Self::flush`]. The data behind the bits must be durable in the destination already.
    pub async fn write_zones(&self, zones: &[ZoneSnapshot], generation: Generation) -> Result<()> {
        let operation = self.begin()?;
        let mut sorted: Vec<&ZoneSnapshot> = zones.iter().collect();
        sorted.sort_unstable_by_key(|s| s.zone);
        assert!(sorted.is_sorted_by(|a, b| a.zone < b.zone), "a zone is there twice");
        self.unflushed.set(true);
        let mut rest = &sorted[..];
        let writes = std::iter::from_fn(|| {
            let first = rest.first()?.zone.0;
            let max = rest.len().min(BLOCKS_PER_IO_MAX as usize);
            let len = (0..max).take_while(|i| rest[*i].zone.0 == first + *i as u64).count();
            let (run, others) = rest.split_at(len);
            rest = others;
            Some(self.write_run(first, run.iter().map(|s| &s.bits[..]), generation))
        });
        let result = run_bounded(writes, Ok).await;
        operation.end(result)
    }

    /// Makes everything written so far durable.
    pub async fn flush(&self) -> Result<()> {
        let operation = self.begin()?;
        let result = self.flush_disk().await;
        operation.end(result)
    }

    async fn flush_disk(&self) -> Result<()> {
        self.disk.flush().await?;
        self.unflushed.set(false);
        Ok(())
    }

    /// Writes both superblock copies with a new state, durably, after the bits that were written before.
    pub async fn write_superblock(&self, state: CloneState, generation: Generation) -> Result<()> {
        let operation = self.begin()?;
        let result = self.change_superblock(generation, |superblock| superblock.state = state).await;
        operation.end(result)
    }

    /// Records, durably, what was not known when the metadata were made ([`Superblock::lacks_devices`]). `generation` is
    /// higher than any on the medium.
    pub async fn record_devices(
        &self,
        source: SourceFingerprint,
        destination_id: [u8; 16],
        generation: Generation,
    ) -> Result<()> {
        let operation = self.begin()?;
        let record = |superblock: &mut Superblock| {
            (superblock.source, superblock.destination_id) = (source, destination_id);
        };
        let result = self.change_superblock(generation, record).await;
        operation.end(result)
    }

    async fn change_superblock(&self, generation: Generation, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        if self.unflushed.get() {
            self.flush_disk().await?;
        }
        {
            let mut superblock = self.superblock.borrow_mut();
            assert!(generation >= superblock.generation, "the generation goes back");
            change(&mut superblock);
            superblock.generation = generation;
        }
        self.write_copies().await
    }

    /// Writes the superblock that counts over the copy that is not as it should be, durably; the good one is left alone.
    /// Returns what to tell: a copy that is lost may be on a sector that can't be written any more. The clone goes on
    /// with the other one then, as it did before.
    pub async fn mend(&self) -> Result<Option<String>> {
        let Some(OtherCopy { index, state }) = self.other.get() else { return Ok(None) };
        let operation = self.begin()?;
        let name = COPY_NAMES[index];
        match (self.write_copy(index as u64).await, state) {
            (Ok(()), _) => {
                self.other.set(None);
                operation.end(Ok(()))?;
                Ok(Some(format!("superblock copy {name} is written again from the other one")))
            }
            (Err(error), OtherState::Lost) => {
                operation.give_up();
                Ok(Some(format!("superblock copy {name} can't be written again, one copy is left: {error}")))
            }
            (Err(error), _) => operation.end(Err(error)).map(|()| None),
        }
    }

    /// The store of the clone grown to `superblock`, on `disk`: the same device, opened with the size it has now. Data
    /// that old bits stand for in the grown tail must be durable already. This store refuses writes afterwards.
    ///
    /// When it fails, [`Self::failure`] tells whether this store can still be used: a write that failed before anything
    /// that counts was touched leaves it as it was. The medium holds the old clone or the grown one, both right.
    pub async fn grow(&self, disk: Rc<dyn Disk>, superblock: Superblock) -> Result<Store> {
        let (old, new) = (self.superblock(), superblock.geometry);
        let division = |g: &Geometry| (g.region_size(), g.regions_per_zone());
        assert!(superblock.uuid == old.uuid && division(&new) == division(&old.geometry), "another clone");
        assert!(new.size() > old.geometry.size() && superblock.generation > old.generation, "it does not grow");
        check_size(&*disk, &superblock)?;
        let operation = self.begin()?;
        let generation = superblock.generation;
        let grown = Store::new(disk, superblock);
        if let Err(error) = grown.write_empty(old.geometry.nr_zones(), generation).await {
            operation.give_up();
            return Err(error);
        }
        let written = async {
            grown.disk.flush().await?;
            grown.write_copies().await
        };
        let result = written.await;
        operation.end(result)?;
        self.latch(Error::new(ErrorKind::Failed, "the clone has grown: these metadata are not written any more"));
        Ok(grown)
    }

    /// Writes the blocks of all zones from `first` on, nothing hydrated.
    async fn write_empty(&self, first: u64, generation: Generation) -> Result<()> {
        let geometry = self.superblock.borrow().geometry;
        let empty = vec![0; words_per_zone(&geometry)];
        let writes = (first..geometry.nr_zones()).step_by(BLOCKS_PER_IO_MAX as usize).map(|first| {
            let count = (geometry.nr_zones() - first).min(BLOCKS_PER_IO_MAX) as usize;
            self.write_run(first, std::iter::repeat_n(&empty[..], count), generation)
        });
        run_bounded(writes, Ok).await
    }

    /// Copy A, flush, copy B, flush: one of them is intact at every moment.
    async fn write_copies(&self) -> Result<()> {
        for copy in 0..SUPERBLOCK_COPIES {
            self.write_copy(copy).await?;
        }
        Ok(())
    }

    async fn write_copy(&self, copy: u64) -> Result<()> {
        let mut buf = DmaBuf::new(BLOCK_SIZE);
        buf.copy_from_slice(&self.superblock.borrow().encode());
        self.disk.write(copy * BLOCK_SIZE as u64, buf.into(), false).await?;
        self.disk.flush().await
    }
}

#[cfg(test)]
pub(crate) mod sim;
#[cfg(test)]
mod tests;
