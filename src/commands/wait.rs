//! `hydrant wait`: until something happened to a clone that dm-clone raises events for.

use super::daemons::client_of;
use super::output_error;
use crate::bail;
use crate::cli::WaitArgs;
use crate::control::api::WAIT_SECONDS_MAX;
use crate::control::client::patiently;
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
    client.status(name)?;
    let status = loop {
        let left = time_max.map_or(QUESTION_MAX, |time_max| time_max.saturating_sub(start.elapsed()));
        // Rounded up: what is left of the last second is waited for.
        let question = Duration::from_secs(left.as_millis().div_ceil(1000) as u64).min(QUESTION_MAX);
        let status = patiently(|| client.wait(name, args.event, question)).map_err(|error| match error.kind() {
            ErrorKind::Shutdown | ErrorKind::NotFound => {
                Error::new(error.kind(), format!("clone '{name}' ended while it was waited for: {error}"))
            }
            _ => error,
        })?;
        if status.is_complete() || status.event_nr > args.event {
            break status;
        }
        if let Some(time_max) = time_max
            && start.elapsed() >= time_max
        {
            let (event, seconds) = (args.event, time_max.as_secs());
            bail!(Limit, "clone '{name}': no event after number {event} within {seconds} s");
        }
    };
    if args.json {
        let text = serde_json::to_string(&status)
            .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("status as JSON: {error}")))?;
        writeln!(out, "{text}").map_err(output_error)?;
    }
    Ok(())
}
