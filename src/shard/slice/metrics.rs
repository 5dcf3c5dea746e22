//! What a slice has counted and timed, as its part of the metrics document.

use super::CloneSlice;
use crate::metrics::schema::{HydrationMetrics, QueueMetrics, SliceMemory, SliceMetrics};

impl CloneSlice {
    /// Costs some ten microseconds for each histogram in use.
    pub fn metrics(&self) -> SliceMetrics {
        let counters = &self.counters;
        let (map, sched) = (self.map.borrow(), self.sched.borrow());
        SliceMetrics {
            name: self.state.name.clone(),
            io: counters.io(),
            routes: counters.routes(),
            latency_us: counters.latencies(),
            queue: QueueMetrics {
                in_flight: counters.in_flight.now(),
                in_flight_max: counters.in_flight.max(),
                holds: self.locks.len() as u64,
                hold_waiting: self.locks.waiting(),
                hold_waiting_max: self.locks.waiting_max(),
                hold_waits: self.locks.waits(),
                // Not a slice's affair: who collects knows it.
                suspended_waiting: 0,
                copy_memory_waiting: self.copies.waiting(),
                copy_memory_waiting_max: self.copies.waiting_max(),
            },
            hydration: HydrationMetrics {
                regions: map.hydrated_count() + map.unhydrated_count(),
                hydrated_regions: map.hydrated_count(),
                by: counters.hydrated_by(),
                copied_bytes: counters.copied_bytes.get(),
                zero_bytes: counters.zero_bytes.get(),
                source_read: counters.source_read.snapshot(),
                source_read_latency_us: counters.source_read_latency.snapshot(),
                copy_latency_us: counters.copy_latency.snapshot(),
                batch_regions: counters.batch_regions.snapshot(),
                batches_in_flight: self.copies.copies_in_flight(),
                batch_bytes_in_flight: self.copies.bytes_in_flight(),
                failures: counters.copy_failures.get(),
                failed_regions: sched.failed_regions(),
                paused: self.is_hydration_paused(),
                stopped: self.state.is_hydration_stopped(),
            },
            memory: self.memory(),
        }
    }

    /// The memory part of it, which costs nothing.
    pub fn memory(&self) -> SliceMemory {
        let map = self.map.borrow();
        SliceMemory {
            map_bytes: map.memory_bytes(),
            map_max_bytes: map.memory_bytes_max(),
            histogram_bytes: self.counters.memory_bytes(),
            copy_bytes: self.copies.used(),
            copy_max_bytes: self.copies.io_memory(),
        }
    }
}
