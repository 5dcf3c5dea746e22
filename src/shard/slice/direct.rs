//! What needs nothing of the owner of its regions: reads, and writes of whole blocks, of hydrated bytes. Any shard's slice
//! serves them, with its own handle of the destination: no channel, no other shard.
//!
//! Invariants:
//! * A bit that was seen set stays set, and all that it stands for is in the destination, so there is nothing to hold: what
//!   changes a region's route has ended. One thing is left that puts back bytes it has read before, the owner's
//!   read-modify-write of a part of a block: see [`crate::shard::direct_writes`].
//! * Who is announced as a direct write waits for nobody who may exclude direct writes: it takes no lock.
//! * A promise that bits are durable (FUA) is the owner's to give, unless the clone is complete.

use super::{CloneSlice, Trip, kind_of};
use crate::error::Result;
use crate::io_frontend::request::{Completion, Request, RequestFlags};
use crate::local::Raised;
use crate::metrics::record::Route;
use crate::shard::direct_writes::DirectWrite;
use crate::units::ByteRange;
use std::rc::Rc;

/// That a request may be served by any slice. Kept until it was.
pub struct Direct {
    range: ByteRange,
    _write: Option<DirectWrite>,
}

impl CloneSlice {
    /// Whether this slice may serve the request, whoever owns its regions. Its range is inside the device.
    pub fn direct(&self, request: &Request) -> Option<Direct> {
        let (range, writes) = match request {
            Request::Read(range) => (*range, false),
            Request::Write { offset, data, flags }
                if !flags.contains(RequestFlags::FUA) || self.state.is_complete() =>
            {
                (ByteRange::new(*offset, data.len() as u64)?, true)
            }
            _ => return None,
        };
        if !self.map.borrow().is_all_hydrated(self.geometry.touched(range)) || (writes && self.outer(range) != range) {
            return None;
        }
        let write = match writes {
            true => Some(self.state.direct_writes().begin(range)?),
            false => None,
        };
        Some(Direct { range, _write: write })
    }

    /// Carries out what [`Self::direct`] has let pass.
    pub async fn execute_direct(self: Rc<Self>, request: Request, direct: Direct) -> Result<Completion> {
        let slice = self.clone();
        self.counted(kind_of(&request), async move |_: &Trip| slice.perform_direct(request, direct).await).await
    }

    async fn perform_direct(&self, request: Request, direct: Direct) -> Result<Completion> {
        self.state.check_mode(false)?;
        match request {
            Request::Write { data, flags, .. } => {
                let _in_flight = Raised::new(&self.direct_writes);
                if flags.contains(RequestFlags::FUA) {
                    self.state.check_mode(true)?;
                    self.write_durably_held(direct.range, data).await?;
                } else {
                    self.destination.write(direct.range.start(), data, false).await?;
                }
                self.counters.part(Route::WriteDestination, direct.range.len());
                Ok(Completion::Done)
            }
            _ => Ok(Completion::Data(vec![self.read_destination(direct.range).await?])),
        }
    }
}
