//! What the block devices of one shard have done. Counters only grow; the gauge says what is now.

use std::cell::Cell;

/// Shared by all queues of a shard.
#[derive(Default, Debug)]
pub struct UblkStats {
    /// Gauge: requests that are being carried out.
    pub in_flight: Cell<u64>,
    pub requests: Cell<u64>,
    /// Of these, reads and writes whose data went straight between the destination and the kernel's own memory.
    pub direct: Cell<u64>,
    /// Requests that were answered with an error.
    pub errors: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub written_bytes: Cell<u64>,
}

fn add(counter: &Cell<u64>, amount: u64) {
    counter.set(counter.get().wrapping_add(amount));
}

impl UblkStats {
    pub(super) fn count_request(&self) {
        add(&self.requests, 1);
    }
    pub(super) fn count_direct(&self) {
        add(&self.direct, 1);
    }
    pub(super) fn count_error(&self) {
        add(&self.errors, 1);
    }
    pub(super) fn count_read(&self, bytes: u64) {
        add(&self.read_bytes, bytes);
    }
    pub(super) fn count_written(&self, bytes: u64) {
        add(&self.written_bytes, bytes);
    }
}
