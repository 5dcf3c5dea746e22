//! Reads of one slice: from the destination what is hydrated, from the source the rest, kept where that pays.
//!
//! Invariants:
//! * Plain reads hold nothing; a read that brings regions in holds their bytes from before it looks at the bit.
//! * What is read past (not kept) is asked of the source right after the bit was seen unset, without a wait between.

use super::super::inflight::Hold;
use super::super::plan::{ReadRoute, plan_read};
use super::{CloneSlice, PARTS_AT_A_TIME, Trip, count};
use crate::error::Result;
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::join_some;
use crate::metrics::record::{How, Route};
use crate::units::{ByteRange, RegionRange};
use bytes::Bytes;
use std::rc::Rc;

impl CloneSlice {
    pub(super) async fn read(self: &Rc<Self>, range: ByteRange, trip: &Trip) -> Result<Vec<Bytes>> {
        if self.uniform(self.geometry.touched(range)) == Some(true) {
            return Ok(vec![self.read_destination(range).await?]);
        }
        let routes = plan_read(&self.geometry, &*self.map.borrow(), range);
        let units = routes.into_iter().flat_map(|route| {
            let (whole, units) = match route {
                ReadRoute::Destination(bytes) => (Some((None, bytes)), None),
                ReadRoute::Source { regions, wanted } => (None, Some((self.copy_units(regions), wanted))),
            };
            let units = units.into_iter().flat_map(|(units, wanted)| {
                units.map(move |unit| {
                    let bytes = self.geometry.bytes_of(unit).intersection(wanted);
                    (Some(unit), bytes.expect("every region is touched"))
                })
            });
            whole.into_iter().chain(units)
        });
        let pieces = units.map(|(unit, wanted)| async move {
            match unit {
                None => Ok(vec![self.read_destination(wanted).await?]),
                Some(unit) => self.read_unhydrated(unit, wanted, trip).await,
            }
        });
        let mut data = Vec::new();
        for piece in join_some(pieces, PARTS_AT_A_TIME).await {
            data.extend(piece?);
        }
        Ok(data)
    }

    pub(super) async fn read_destination(&self, range: ByteRange) -> Result<Bytes> {
        let outer = self.outer(range);
        let mut buf = self.destination.read(outer).await?;
        buf.narrow((range.start() - outer.start()) as usize, range.len() as usize);
        self.counters.part(Route::ReadDestination, range.len());
        Ok(buf.into())
    }

    /// Reads `wanted` of `regions`, a unit that was not hydrated when this was planned.
    async fn read_unhydrated(
        self: &Rc<Self>,
        regions: RegionRange,
        wanted: ByteRange,
        trip: &Trip,
    ) -> Result<Vec<Bytes>> {
        trip.used_source.set(true);
        let bytes = self.geometry.bytes_of(regions);
        if !self.is_kept(bytes, wanted) && self.uniform(regions) == Some(false) {
            return self.read_past(regions, wanted).await;
        }
        let held = self.locks.hold(bytes, Hold::Exclusive).await;
        if self.uniform(regions) != Some(false) {
            // Hydrated, some or all, since this was planned: plan again. The recursion ends because bits only get set.
            drop(held);
            let again: LocalBoxFuture<'_, _> = Box::pin(self.read(wanted, trip));
            return again.await;
        }
        let Some(memory) = self.copies.try_acquire(bytes.len()) else {
            drop(held);
            return self.read_past(regions, wanted).await;
        };
        let copy = self.begin_copy(regions, held);
        match self.read_source(bytes).await {
            Ok(buf) => {
                self.counters.part(Route::ReadSourceKept, wanted.len());
                let data = Bytes::from(buf);
                let start = (wanted.start() - bytes.start()) as usize;
                let answer = data.slice(start..start + wanted.len() as usize);
                let slice = self.clone();
                // The client has its answer now; keeping the bytes is the clone's own business.
                self.env.spawn(Box::pin(async move {
                    let result = slice.finish_copy(copy, data, How::Read).await;
                    drop(memory);
                    slice.note_copy(result);
                }));
                Ok(vec![answer])
            }
            Err(error) => {
                drop((copy, memory));
                if wanted == bytes {
                    return Err(error);
                }
                // A bad sector elsewhere in the unit must not fail this read.
                self.read_past(regions, wanted).await
            }
        }
    }

    /// Reads from the source without keeping the bytes: the regions are too large, or memory is short. They go to
    /// the front of the hydration queue. Must be called right after their bit was seen unset, without waiting.
    async fn read_past(&self, regions: RegionRange, wanted: ByteRange) -> Result<Vec<Bytes>> {
        debug_assert_eq!(self.uniform(regions), Some(false));
        self.state.budget().charge(wanted.len(), self.env.now());
        self.sched.borrow_mut().prioritise(regions.first());
        self.wake.notify();
        match self.read_source(wanted).await {
            Ok(data) => {
                count(&self.counters.read_past_bytes, wanted.len());
                self.counters.part(Route::ReadSourcePast, wanted.len());
                Ok(vec![data.into()])
            }
            // Hydrated or overwritten meanwhile: the destination has an answer, and a newer one.
            Err(_) if self.uniform(self.geometry.touched(wanted)) == Some(true) => {
                Ok(vec![self.read_destination(wanted).await?])
            }
            Err(error) => Err(error),
        }
    }
}
