//! The real daemon, driven from outside with the clients and servers that people use.
//!
//! One binary, so that it is linked once. Each test makes what it needs in its own directories, and everything it
//! started ends with it. A test whose tools are missing says so and passes, unless CI is set: then it fails.

mod finish_kernel;
mod harness;

mod appliance;
mod bad_regions;
mod clones;
mod configs;
mod control;
mod crash;
mod discard;
mod dm_clone;
mod dm_clone_kernel;
mod events;
mod faults;
mod greedy;
mod hostile;
mod large;
mod load;
mod meta_damage;
mod meta_tools;
mod metadata;
mod metrics;
mod metrics_dump;
mod privileges;
mod refusals;
mod resize;
mod restart;
mod service;
mod shares;
mod signals;
mod source_faults;
mod space;
mod start_again;
mod suspend;
mod tables;
mod ublk_kernel;
mod ublk_vm;
mod views;
