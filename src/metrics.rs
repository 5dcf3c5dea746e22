//! Metrics: what every shard has counted and timed, as one document with a stable schema.
//!
//! The data path only adds to `Cell`s of its own shard ([`record`]): no lock, no atomic, and no allocation but one per
//! histogram, when its first value comes. Reading is the expensive part, and is done on request: [`collect`] asks each
//! shard for its part, [`schema`] is the document, [`text`] shows it to people, [`dump`] writes it to a file.
//!
//! `docs/metrics.md` describes every field; a test holds it to the types.

pub mod collect;
pub mod dump;
pub mod record;
pub mod schema;
pub mod text;
pub mod usage;
