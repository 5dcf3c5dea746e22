pub mod inflight;
pub mod plan;
