//! What a slice tells of a range: which of it holds data, and which is hydrated. Never fails for not knowing.

use super::super::plan::{ReadRoute, plan_read};
use super::CloneSlice;
use crate::disk::EXTENTS_MAX;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, StatusExtents, push_extent};
use crate::units::ByteRange;
use std::rc::Rc;

impl CloneSlice {
    pub(super) async fn status(self: &Rc<Self>, range: ByteRange) -> Result<StatusExtents> {
        let mut extents = StatusExtents::default();
        let routes = plan_read(&self.geometry, &*self.map.borrow(), range);
        for route in &routes {
            let (bytes, hydrated) = match route {
                ReadRoute::Destination(bytes) => (*bytes, true),
                ReadRoute::Source { wanted, .. } => (*wanted, false),
            };
            if extents.hydrated.len() < EXTENTS_MAX {
                push_extent(&mut extents.hydrated, bytes.len(), hydrated);
            }
        }
        let mut source = self.source().ok();
        'routes: for route in routes {
            let (bytes, hydrated) = match route {
                ReadRoute::Destination(bytes) => (bytes, true),
                ReadRoute::Source { wanted, .. } => (wanted, false),
            };
            let mut at = bytes.start();
            while let Some(rest) = ByteRange::between(at, bytes.end()) {
                if extents.allocation.len() >= EXTENTS_MAX {
                    break 'routes;
                }
                let found = match (hydrated, &source) {
                    (false, None) => Ok(Vec::new()),
                    (false, Some(asked)) => {
                        let answer = self.answer_of_source(asked.allocation(rest)).await;
                        answer.inspect_err(|_| source = None)
                    }
                    (true, _) => {
                        self.destination.allocation(self.outer(rest)).await.map(|e| clip(e, self.outer(rest), rest))
                    }
                };
                // Not knowing is no failure: "data" is always a right answer. A lost source is not asked again: each
                // question waits for it.
                let mut found = found.unwrap_or_default();
                if found.is_empty() {
                    found.push(Extent { len: rest.len(), state: Allocation::DATA });
                }
                for extent in found {
                    let len = extent.len.min(bytes.end() - at);
                    push_extent(&mut extents.allocation, len, extent.state);
                    at += len;
                }
            }
        }
        Ok(extents)
    }
}

/// Cuts extents of `outer` down to `inner`.
fn clip(extents: Vec<Extent<Allocation>>, outer: ByteRange, inner: ByteRange) -> Vec<Extent<Allocation>> {
    let mut clipped = Vec::with_capacity(extents.len());
    let mut at = outer.start();
    for extent in extents {
        let bytes = ByteRange::new(at, extent.len).and_then(|bytes| bytes.intersection(inner));
        push_extent(&mut clipped, bytes.map_or(0, |bytes| bytes.len()), extent.state);
        at += extent.len;
    }
    clipped
}
