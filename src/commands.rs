//! The verbs of the command line, one file each, thin over the parts that do the work.

pub mod clone;
pub mod message;
pub mod meta;
pub mod status;
pub mod stop;

use crate::cli::{Cli, ControlArgs, Verb};
use crate::config::{CloneConfig, CloneName};
use crate::control::client::Client;
use crate::error::{Error, Result};
use crate::runtime_dir::RuntimeDir;
use std::io::{self, Write};

/// Does what the command line says. `start` runs a clone until it is told to stop: the daemon. `out` gets what the
/// user asked for; errors are returned.
pub fn run(cli: Cli, out: &mut dyn Write, start: impl FnOnce(CloneConfig) -> Result<()>) -> Result<()> {
    match cli.verb {
        Verb::Clone(args) => clone::run(args, start),
        Verb::Status(args) => status::run(&args, out),
        Verb::Message(args) => message::run(&args),
        Verb::Stop(args) => stop::run(&args),
        Verb::Meta(args) => meta::run(args, out),
        Verb::Demo(args) => crate::demo::run(&args, out),
    }
}

/// What the output may not be written for: a closed pipe, a full disk.
pub(crate) fn output_error(error: io::Error) -> Error {
    Error::from_io(error, "standard output")
}

/// Whom to ask about the clone `name`.
fn client_of(name: &CloneName, control: &ControlArgs) -> Client {
    match &control.control {
        Some(path) => Client::new(path),
        None => Client::new(RuntimeDir::of_user().control_socket(name)),
    }
}
