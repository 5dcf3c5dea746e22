//! hydrant: dm-clone in user space.
//!
//! A read-only, possibly remote and slow source appears at once as a fast writable block device, while it is
//! copied ("hydrated") to a local destination in the background.
//!
//! # Layers
//! A file uses only its own layer and the ones below; `tests/layers.rs` reads the `use` lines and holds it.
//! * L0, vocabulary: [`units`], [`version`], [`error`], [`dma_buf`], [`io_frontend::request`].
//! * L1, pure decisions: no I/O, no async, no clock.
//! * L2, generic async over the traits [`disk::Disk`], [`source::Source`], [`env::Env`].
//! * L3, edges: the kernel, sockets, glommio.
//! * L4, product: the command line, the control interface, the daemon that puts the parts together.

pub mod cli;
pub mod clone_state;
pub mod commands;
pub mod config;
pub mod control;
pub mod coordinator;
pub mod daemon;
pub mod demo;
pub mod device_mapper;
pub mod devices;
pub mod disk;
pub mod dm_table;
pub mod dma_buf;
pub mod env;
pub mod environment;
pub mod error;
pub mod event_log;
pub mod events;
pub mod human;
pub mod hydration_budget;
pub mod hydration_failures;
pub mod hydration_sched;
pub mod hydration_share;
pub mod io_frontend;
pub mod kept_bits;
pub mod local;
pub mod locked_memory;
pub mod log_limit;
pub mod meta;
pub mod metrics;
pub mod net;
pub mod ring;
pub mod runtime_dir;
pub mod service_manager;
pub mod shard;
pub mod signatures;
#[cfg(test)]
mod sim;
pub mod source;
pub mod targets;
pub mod units;
pub mod unix_socket;
pub mod version;
pub mod zeroed;
