//! Admission: what a request header asks, checked against the protocol, the export and the limits.
//!
//! Pure. The verdict says what to do with the request and with the payload that follows it on the stream; a refused
//! WRITE still has its payload, and the server must not lose its place.

use super::handshake::Contexts;
use super::limits::Limits;
use super::proto::{Command, CommandFlags, ErrorCode, RequestHeader};
use crate::bail;
use crate::error::Result;
use crate::io_frontend::request::{Request, RequestFlags};
use crate::units::ByteRange;

#[cfg(test)]
mod tests;

/// What a connection agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terms {
    /// Of the export, in bytes.
    pub size: u64,
    pub structured: bool,
    pub contexts: Contexts,
}

/// What to do with a request.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Hand it to the volume. It has no payload.
    Submit(Request),
    /// Receive `len` bytes of payload (not 0), then write them at `offset`.
    Write { offset: u64, len: u32, flags: RequestFlags },
    /// Nothing to do: answer success. There is no payload.
    Nothing,
    /// Answer this error, after `payload` bytes were received and thrown away.
    Refuse { error: ErrorCode, why: String, payload: u32 },
    /// The client is done.
    Disconnect,
}

/// Judges a request. An error means: the stream can't be followed, drop the connection.
///
/// A length of 0, which the protocol leaves open, succeeds and does nothing (BLOCK_STATUS: EINVAL, as there is no
/// extent to return).
pub fn admit(header: &RequestHeader, terms: &Terms, limits: &Limits) -> Result<Verdict> {
    let payload = if header.command == Command::WRITE { header.len } else { 0 };
    if payload > limits.payload_bytes_max.max(limits.discard_bytes_max) {
        bail!(Protocol, "WRITE of {payload} bytes: {} are allowed", limits.payload_bytes_max);
    }
    match judge(header, terms, limits) {
        Ok(verdict) => Ok(verdict),
        Err((error, why)) => Ok(Verdict::Refuse { error, why, payload }),
    }
}

fn judge(header: &RequestHeader, terms: &Terms, limits: &Limits) -> Result<Verdict, (ErrorCode, String)> {
    let RequestHeader { command, offset, len, .. } = *header;
    if command == Command::DISC {
        return Ok(Verdict::Disconnect);
    }
    let flags = command_flags(header, terms)?;
    if command == Command::FLUSH {
        if offset != 0 || len != 0 {
            return Err((ErrorCode::EINVAL, "FLUSH: offset and length must be 0".into()));
        }
        return Ok(Verdict::Submit(Request::Flush));
    }
    let outside = offset > terms.size || u64::from(len) > terms.size - offset;
    if outside {
        let error = match command {
            Command::WRITE | Command::WRITE_ZEROES => ErrorCode::ENOSPC,
            _ => ErrorCode::EINVAL,
        };
        return Err((error, format!("{command}: {len} bytes at offset {offset} exceed the {} bytes", terms.size)));
    }
    let max = limits.payload_bytes_max;
    if len > max && matches!(command, Command::READ | Command::WRITE) {
        // EOVERFLOW tells a client to try again with smaller reads, but only structured replies document it.
        let retry_smaller = command == Command::READ && terms.structured;
        let error = if retry_smaller { ErrorCode::EOVERFLOW } else { ErrorCode::EINVAL };
        return Err((error, format!("{command}: {len} bytes, {max} are allowed")));
    }
    if command == Command::BLOCK_STATUS && (len == 0 || terms.contexts.is_empty()) {
        let why = if len == 0 { "length 0" } else { "no metadata context was negotiated" };
        return Err((ErrorCode::EINVAL, format!("BLOCK_STATUS: {why}")));
    }
    let Some(range) = ByteRange::new(offset, u64::from(len)) else {
        return Ok(Verdict::Nothing);
    };
    let mut request_flags = RequestFlags::empty();
    request_flags.set(RequestFlags::FUA, flags.contains(CommandFlags::FUA));
    request_flags.set(RequestFlags::NO_HOLE, flags.contains(CommandFlags::NO_HOLE));
    request_flags.set(RequestFlags::FAST_ZERO, flags.contains(CommandFlags::FAST_ZERO));
    Ok(match command {
        Command::READ => Verdict::Submit(Request::Read(range)),
        Command::WRITE => Verdict::Write { offset, len, flags: request_flags },
        Command::TRIM => Verdict::Submit(Request::Trim { range, flags: request_flags }),
        Command::CACHE => Verdict::Submit(Request::Cache(range)),
        Command::WRITE_ZEROES => Verdict::Submit(Request::WriteZeroes { range, flags: request_flags }),
        _ => Verdict::Submit(Request::Status(range)),
    })
}

/// The request's flags when the command exists and each flag is one that it documents. FUA is valid everywhere.
fn command_flags(header: &RequestHeader, terms: &Terms) -> Result<CommandFlags, (ErrorCode, String)> {
    let command = header.command;
    let valid = match command {
        Command::READ if terms.structured => CommandFlags::DF,
        Command::WRITE_ZEROES => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        Command::BLOCK_STATUS => CommandFlags::REQ_ONE,
        Command::READ | Command::WRITE | Command::FLUSH | Command::TRIM | Command::CACHE => CommandFlags::empty(),
        unknown => return Err((ErrorCode::EINVAL, format!("command {unknown} is not known"))),
    } | CommandFlags::FUA;
    match CommandFlags::from_bits(header.flags) {
        Some(flags) if valid.contains(flags) => Ok(flags),
        _ => Err((ErrorCode::EINVAL, format!("{command}: flags {:#x} are not valid here", header.flags))),
    }
}
