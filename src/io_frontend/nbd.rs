//! The NBD frontend.
//!
//! * [`proto`]: the wire format, pure; the NBD source uses it too.

pub mod proto;
