//! `hydrant`: parses the command line, sets up logging, runs a verb, says what went wrong in one line.

use clap::Parser;
use hydrant::cli::{Cli, Verb};
use hydrant::commands;
use hydrant::daemon;
use hydrant::environment;
use std::io::stdout;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default_level = if matches!(cli.verb, Verb::Clone(_)) { "info" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("HYDRANT_LOG", default_level)).init();
    match commands::run(cli, &mut stdout(), daemon::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if commands::is_closed_output(&error) => environment::end_by_closed_pipe(),
        Err(error) => {
            eprintln!("hydrant: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}
