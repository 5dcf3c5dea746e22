//! The command line's verbs, one file each: thin over the parts that do the work.

pub mod meta;
