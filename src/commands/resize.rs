//! `hydrant resize`: grows a clone while it is used.

use super::daemons::client_of;
use super::output_error;
use crate::cli::ResizeArgs;
use crate::error::Result;
use crate::meta::growth::Wanted;
use crate::units::ByteSize;
use std::io::Write;

/// Returns when the clone has the new size, and says which.
pub fn run(args: &ResizeArgs, out: &mut dyn Write) -> Result<()> {
    let (client, name) = (client_of(&args.name, &args.control), &args.name);
    let before = client.status(name)?.size;
    client.resize(name, Wanted { size: args.size.map(|size| size.0), zeros: args.zeros })?;
    let now = client.status(name)?.size;
    let words = if now == before { "unchanged" } else { "grown" };
    writeln!(out, "{name}: {words}, {}", ByteSize(now)).map_err(output_error)
}
