//! `hydrant`: parses the command line, sets up logging, runs a verb, says what went wrong in one line.

use clap::Parser;
use hydrant::cli::{Cli, Verb};
use hydrant::commands;
use hydrant::config::CloneConfig;
use hydrant::error::{Error, ErrorKind, Result};
use std::io::stdout;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default_level = if matches!(cli.verb, Verb::Clone(_)) { "info" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("HYDRANT_LOG", default_level)).init();
    match commands::run(cli, &mut stdout(), start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hydrant: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Runs one clone until it is told to stop.
fn start(config: CloneConfig) -> Result<()> {
    Err(Error::new(ErrorKind::NotSupported, format!("clone '{}': this build has no daemon", config.name)))
}
