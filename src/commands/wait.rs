//! `hydrant wait`: until something happened to a clone that dm-clone raises events for, or until it is hydrated.

use super::daemons::client_of;
use super::output_error;
use super::status::stopped_error;
use crate::bail;
use crate::cli::WaitArgs;
use crate::config::CloneName;
use crate::control::api::{MetadataMode, Status, WAIT_SECONDS_MAX};
use crate::control::client::{Client, patiently};
use crate::error::{Error, ErrorKind, Result};
use std::io::Write;
use std::time::{Duration, Instant};

/// The longest single question.
const QUESTION_MAX: Duration = Duration::from_secs(WAIT_SECONDS_MAX);

pub fn run(args: &WaitArgs, out: &mut dyn Write) -> Result<()> {
    let client = client_of(&args.name, &args.control);
    let (name, start) = (&args.name, Instant::now());
    let time_max = args.timeout.map(|seconds| Duration::from_secs(seconds.into()));
    // One that is not there says so in its own words.
    let mut status = client.status(name)?;
    loop {
        let is_over = match args.hydrated {
            true => is_hydrated(&status)?,
            false => status.is_complete() || status.event_nr > args.event,
        };
        if is_over {
            break;
        }
        // Whatever comes next may be the end of it, or say that there will be none.
        let event = if args.hydrated { status.event_nr } else { args.event };
        if let Some(time_max) = time_max
            && start.elapsed() >= time_max
        {
            let seconds = time_max.as_secs();
            match args.hydrated {
                true => bail!(Limit, "clone '{name}': not hydrated within {seconds} s"),
                false => bail!(Limit, "clone '{name}': no event after number {event} within {seconds} s"),
            }
        }
        let left = time_max.map_or(QUESTION_MAX, |time_max| time_max.saturating_sub(start.elapsed()));
        // Rounded up: what is left of the last second is waited for.
        let question = Duration::from_secs(left.as_millis().div_ceil(1000) as u64).min(QUESTION_MAX);
        status = patiently(|| client.wait(name, event, question)).map_err(|error| match error.kind() {
            ErrorKind::Shutdown | ErrorKind::NotFound => {
                Error::new(error.kind(), format!("clone '{name}' ended while it was waited for: {error}"))
            }
            _ => error,
        })?;
    }
    if args.json {
        let text = serde_json::to_string(&status)
            .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("status as JSON: {error}")))?;
        writeln!(out, "{text}").map_err(output_error)?;
    }
    Ok(())
}

/// Returns when the clone is hydrated; fails when it will not be without somebody's help, or ends.
pub(super) fn until_hydrated(client: &Client, name: &CloneName) -> Result<()> {
    let mut status = client.status(name)?;
    while !is_hydrated(&status)? {
        let event = status.event_nr;
        status = patiently(|| client.wait(name, event, QUESTION_MAX))?;
    }
    Ok(())
}

/// Fails when it will not be without somebody's help.
fn is_hydrated(status: &Status) -> Result<bool> {
    let name = &status.name;
    match status.metadata.mode {
        _ if status.is_complete() => Ok(true),
        MetadataMode::ReadOnly => bail!(ReadOnly, "clone '{name}' is read-only (ro): it can't hydrate"),
        MetadataMode::Fail => bail!(Failed, "clone '{name}' has failed (Fail)"),
        _ if status.is_hydration_stopped() => Err(stopped_error(status)),
        MetadataMode::ReadWrite | MetadataMode::Unopened => Ok(false),
    }
}
