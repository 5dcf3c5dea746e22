//! What the connections of one shard have done. Counters only grow; gauges say what is now.

use std::cell::Cell;

/// Shared by all connections of a shard, or one for each: they only add.
#[derive(Default, Debug)]
pub struct ConnectionStats {
    /// Gauge: connections that are being served.
    pub connections: Cell<u64>,
    /// Gauge: requests without a reply.
    pub in_flight: Cell<u64>,
    pub accepted: Cell<u64>,
    /// Connections that ended for a broken protocol or socket.
    pub dropped: Cell<u64>,
    pub requests: Cell<u64>,
    /// Requests that were answered with an error.
    pub errors: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub written_bytes: Cell<u64>,
}

pub(super) fn add(counter: &Cell<u64>, amount: u64) {
    counter.set(counter.get().wrapping_add(amount));
}

/// Raises a gauge while it lives.
pub(super) struct Raised<'a>(&'a Cell<u64>);

impl<'a> Raised<'a> {
    pub(super) fn new(gauge: &'a Cell<u64>) -> Self {
        add(gauge, 1);
        Self(gauge)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_and_a_gauge_falls_with_its_guard() {
        let stats = ConnectionStats::default();
        add(&stats.read_bytes, 3);
        add(&stats.read_bytes, 4);
        assert_eq!(stats.read_bytes.get(), 7);

        let first = Raised::new(&stats.in_flight);
        let second = Raised::new(&stats.in_flight);
        assert_eq!(stats.in_flight.get(), 2);
        drop(first);
        assert_eq!(stats.in_flight.get(), 1);
        drop(second);
        assert_eq!(stats.in_flight.get(), 0);
    }
}
