//! `hydrant`: parses the command line, sets up logging, runs a verb, says what went wrong in one line.

use clap::Parser;
use hydrant::cli::{Cli, Verb};
use hydrant::commands;
use hydrant::config::Plan;
use hydrant::daemon;
use hydrant::environment;
use hydrant::error::plain;
use std::io::{Write, stderr, stdout};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A daemon logs as its configuration says, so not before that is read.
    let is_daemon = matches!(cli.verb, Verb::Clone(_) | Verb::Serve(_));
    if !is_daemon {
        start_log("warn");
    }
    let daemon = |plan: Plan| {
        start_log(plan.daemon.log.as_deref().unwrap_or("info"));
        daemon::run(plan)
    };
    match commands::run(cli, &mut stdout(), daemon) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if commands::is_closed_output(&error) => environment::end_by_closed_pipe(),
        Err(error) => {
            // Nobody may be there to hear it; the exit status tells all the same.
            let _ = writeln!(stderr(), "hydrant: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Logs to standard error what HYDRANT_LOG says, or else `words`. A line each, whatever the names have that are in it: none
/// can look like a line of its own.
fn start_log(words: &str) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::new().filter_or("HYDRANT_LOG", words));
    log.format(|out, record| {
        let (time, level, style) = (out.timestamp(), record.level(), out.default_level_style(record.level()));
        let text = plain(record.args().to_string());
        writeln!(out, "[{time} {style}{level:<5}{style:#} {}] {text}", record.target())
    });
    log.init();
}
