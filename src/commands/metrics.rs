//! `hydrant metrics`: what the shards of running daemons have counted and timed.

use super::{client_of, output_error};
use crate::bail;
use crate::cli::MetricsArgs;
use crate::control::client::Client;
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
    match (&args.name, &args.control.control) {
        (Some(name), _) => Ok(vec![client_of(name, &args.control).metrics(Some(name))?]),
        (None, Some(path)) => Ok(vec![Client::new(path).metrics(None)?]),
        (None, None) => {
            let dir = RuntimeDir::of_user();
            let mut found = Vec::new();
            for (name, path) in dir.clones()? {
                match Client::new(path).metrics(None) {
                    Ok(document) => found.push(document),
                    Err(error) => log::warn!("{name}: {error}"),
                }
            }
            if found.is_empty() {
                bail!(NotFound, "no daemon is listening in {}; give NAME or --control", dir.path().display());
            }
            Ok(found)
        }
    }
}
