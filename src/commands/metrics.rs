//! `hydrant metrics`: what the shards of running daemons have counted and timed.

use super::daemons::{client_of, daemons};
use super::output_error;
use crate::bail;
use crate::cli::MetricsArgs;
use crate::control::client;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::schema::MetricsDocument;
use crate::metrics::text::text_of;
use crate::runtime_dir::RuntimeDir;
use std::io::Write;

pub fn run(args: &MetricsArgs, out: &mut dyn Write) -> Result<()> {
    for (index, document) in find(args)?.iter().enumerate() {
        let text = if args.json {
            serde_json::to_string(document)
                .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("metrics as JSON: {error}")))?
        } else {
            let gap = if index > 0 { "\n" } else { "" };
            format!("{gap}{}", text_of(document).trim_end())
        };
        writeln!(out, "{text}").map_err(output_error)?;
    }
    Ok(())
}

/// The documents of the daemons that are meant, at least one.
fn find(args: &MetricsArgs) -> Result<Vec<MetricsDocument>> {
    if let Some(name) = &args.name {
        return Ok(vec![client_of(name, &args.control).metrics(Some(name))?]);
    }
    let mut found = Vec::new();
    for (name, client) in daemons(&args.control)? {
        match client.metrics(None) {
            Ok(document) => found.push(document),
            Err(error) if args.control.control.is_some() => return Err(error),
            // Its socket is left over; or it ends just now.
            Err(error) if client::is_gone(&client, &error) => log::info!("{name}: {error}"),
            Err(error) => log::warn!("{name}: {error}"),
        }
    }
    if found.is_empty() {
        let dir = RuntimeDir::of_user();
        bail!(NotFound, "no daemon is listening in {}; give NAME or --control", dir.path().display());
    }
    Ok(found)
}
