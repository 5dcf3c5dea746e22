//! The ublk frontend: a clone as a block device of the kernel, /dev/ublkbN.
//!
//! * [`proto`]: the kernel's interface as bytes; pure.
//! * [`shape`]: the parameters of a clone's device; pure.
//! * [`takeover`]: what to do with devices that are there; pure.
//! * [`admit`]: what a request asks, checked; pure.
//! * [`affinity`]: which shard serves which queue; pure.
//! * [`control`], [`device`]: a device made or taken over, started, removed. They block.
//! * [`turn`]: how many requests with data are carried out at a time, so that there is memory for them.
//! * [`queue`]: one hardware queue, on the executor of its shard.
//!
//! A device outlives its daemon: with user recovery the kernel holds requests until the next daemon serves them. Writes of
//! a daemon that was killed can't land behind those of the next one, as destination and metadata stay locked until they
//! have ended (see [`crate::devices`]).

pub mod admit;
pub mod affinity;
pub mod control;
pub mod device;
pub mod proto;
pub mod queue;
pub mod shape;
pub mod stats;
pub mod takeover;
pub mod turn;

pub use device::NUMBER_MAX;
pub use stats::UblkStats;
