//! Frontends: how clients reach a clone. They speak their protocol and hand [`request::Request`]s to a volume.

pub mod nbd;
pub mod request;
pub mod ublk;
