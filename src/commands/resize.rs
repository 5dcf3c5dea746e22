//! `hydrant resize`: grows a clone while it is used.

use super::daemons::client_of;
use super::output_error;
use crate::cli::ResizeArgs;
use crate::error::Result;
use crate::meta::growth::Wanted;
use crate::units::{ByteSize, SECTOR_SIZE};
use std::io::Write;

/// Returns when the clone has the new size, and says which.
pub fn run(args: &ResizeArgs, out: &mut dyn Write) -> Result<()> {
    let (client, name) = (client_of(&args.name, &args.control), &args.name);
    let before = client.status(name)?.size;
    client.resize(name, Wanted { size: args.size.map(|size| size.0), zeros: args.zeros })?;
    let status = client.status(name)?;
    let words = if status.size == before { "unchanged" } else { "grown" };
    writeln!(out, "{name}: {words}, {}", ByteSize(status.size)).map_err(output_error)?;
    match status.ublk.filter(|ublk| ublk.size < status.size / SECTOR_SIZE * SECTOR_SIZE) {
        Some(ublk) => {
            let (path, size) = (ublk.dm_path.unwrap_or(ublk.path), ByteSize(ublk.size));
            let text =
                "Linux 6.16 or later would let it grow; end the use of it, then stop the clone and start it again";
            writeln!(out, "{path} keeps its size, {size}: {text}").map_err(output_error)
        }
        None => Ok(()),
    }
}
