//! The kernel's device-mapper: a block device with a name, whose table can be exchanged under who uses it.
//!
//! * [`proto`]: the kernel's interface as bytes; pure.
//! * [`takeover`]: what to do with a device that is there when a clone starts; pure.
//! * [`control`]: the commands. They block.
//! * [`nodes`], for `/dev/mapper/NAME`.
//!
//! No crate is used for it: those there are need libclang, or libdevmapper, to be built.

pub mod control;
pub mod nodes;
pub mod proto;
pub mod takeover;
