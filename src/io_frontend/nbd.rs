//! The NBD frontend: fixed newstyle, structured replies, metadata contexts.
//!
//! * [`proto`]: the wire format, pure; the NBD source uses it too.
//! * [`handshake`]: the server's side of the handshake, a pure machine.
//! * [`admit`]: what a request asks, checked; pure.
//! * [`reply`]: from a completion to the bytes that answer it; pure.
//! * [`server`]: one connection, which puts these together on a socket.
//! * [`memory`]: what connections share for payloads.
//! * [`listen`]: addresses and listening sockets.

pub mod admit;
pub mod handshake;
mod inbox;
pub mod limits;
pub mod listen;
pub mod memory;
pub mod proto;
pub mod reply;
pub mod server;
pub mod stats;

use crate::version::Version;

/// Of what clients are offered.
pub const VERSION: Version = Version(1, 0, 0);

pub use handshake::{CONTEXT_HYDRATED, Exports};
pub use limits::Limits;
pub use memory::Memory;
pub use server::{Counted, Served, Stay, serve};
pub use stats::ConnectionStats;
