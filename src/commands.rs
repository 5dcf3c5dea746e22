//! The verbs of the command line, one file each, thin over the parts that do the work.

pub mod clone;
pub mod config;
pub mod create;
pub mod daemons;
pub mod events;
pub mod finish;
pub mod list;
pub mod message;
pub mod meta;
pub mod metrics;
pub mod remove;
pub mod resize;
pub mod serve;
pub mod status;
pub mod stop;
pub mod suspend;
pub mod table;
pub mod version;
pub mod wait;

use crate::cli::{Cli, ConfigVerb, Verb};
use crate::config::Plan;
use crate::error::{Error, Result};
use std::io::{self, Write};

/// Does what the command line says. `start` runs clones until it is told to stop: the daemon. `out` gets what the
/// user asked for; errors are returned.
pub fn run(cli: Cli, out: &mut dyn Write, start: impl FnOnce(Plan) -> Result<()>) -> Result<()> {
    match cli.verb {
        Verb::Clone(args) => clone::run(*args, start),
        Verb::Serve(args) => serve::run(&args, start),
        Verb::Config(args) => match args.verb {
            ConfigVerb::Check(of) => config::check(&of.files, out),
        },
        Verb::Status(args) => status::run(&args, out),
        Verb::Table(args) => table::run(&args, out),
        Verb::Metrics(args) => metrics::run(&args, out),
        Verb::List(args) => list::run(&args, out),
        Verb::Create(args) => create::run(&args),
        Verb::Remove(args) => remove::run(&args),
        Verb::Finish(args) => finish::run(&args),
        Verb::Message(args) => message::run(&args),
        Verb::Suspend(args) => suspend::suspend(&args),
        Verb::Resume(args) => suspend::resume(&args),
        Verb::Resize(args) => resize::run(&args, out),
        Verb::Events(args) => events::run(&args, out),
        Verb::Wait(args) => wait::run(&args, out),
        Verb::Stop(args) => stop::run(&args),
        Verb::Meta(args) => meta::run(args, out),
        Verb::Version(args) => version::run(&args, out),
        Verb::Demo(args) => crate::demo::run(&args, out),
    }
}

/// What the output may not be written for: a closed pipe, a full disk.
pub(crate) fn output_error(error: io::Error) -> Error {
    Error::from_io(error, STANDARD_OUTPUT)
}

const STANDARD_OUTPUT: &str = "standard output";

/// Whether an error means that nobody reads the output any more.
pub fn is_closed_output(error: &Error) -> bool {
    error.os_errno() == Some(libc::EPIPE) && error.to_string().starts_with(STANDARD_OUTPUT)
}
