//! Replies: from the completion of a request to the bytes that answer it.
//!
//! Pure. Data is passed on as it is; everything else of a batch (headers, errors, extents) is gathered in as few
//! pieces as the data between them allows, for one vectored send.

use super::admit::Terms;
use super::handshake::Contexts;
use super::proto::{
    AllocationFlags, ChunkFlags, Command, CommandFlags, EXTENTS_PER_CHUNK_MAX, ErrorCode, RequestHeader, SimpleReply,
    StatusDescriptor, encode_block_status_chunk, encode_error_chunk, encode_none_chunk, encode_offset_data_head,
};
use crate::error::{Error, ErrorKind};
use crate::io_frontend::request::{Completion, Extent, StatusExtents};
use bytes::{BufMut, Bytes, BytesMut};

#[cfg(test)]
mod tests;

/// Status flag of `hydrant:hydrated`.
pub const STATE_HYDRATED: u32 = 1;

/// The answer to one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done,
    /// All bytes of a READ.
    Data(Vec<Bytes>),
    Status(StatusExtents),
    Error {
        error: ErrorCode,
        message: String,
    },
}

impl Outcome {
    /// What a volume's answer to `header` means for the client. A completion that does not fit the request is a
    /// broken volume: the client gets EIO, never wrong bytes.
    pub fn of(result: Result<Completion, Error>, header: &RequestHeader) -> Self {
        let completion = match result {
            Ok(completion) => completion,
            Err(error) => return Self::Error { error: error_code(&error, header), message: error.to_string() },
        };
        match (header.command, completion) {
            (Command::READ, Completion::Data(parts)) => {
                let len: u64 = parts.iter().map(|part| part.len() as u64).sum();
                if len != u64::from(header.len) {
                    return Self::broken(header, &format!("{len} bytes were read"));
                }
                Self::Data(parts)
            }
            (Command::BLOCK_STATUS, Completion::Status(status)) => {
                if !begins(&status.allocation) || !begins(&status.hydrated) {
                    return Self::broken(header, "no extents");
                }
                Self::Status(status)
            }
            (Command::READ | Command::BLOCK_STATUS, _) => Self::broken(header, "an answer without content"),
            (_, Completion::Done) => Self::Done,
            (_, Completion::Data(_) | Completion::Status(_)) => Self::broken(header, "an answer with content"),
        }
    }

    fn broken(header: &RequestHeader, what: &str) -> Self {
        let RequestHeader { command, offset, len, .. } = header;
        let message = format!("internal error: {command} of {len} bytes at offset {offset}: {what}");
        log::error!("nbd: {message}");
        Self::Error { error: ErrorCode::EIO, message }
    }
}

/// Whether there is a first extent, and it is not empty.
fn begins<S>(extents: &[Extent<S>]) -> bool {
    extents.first().is_some_and(|extent| extent.len > 0)
}

/// The protocol allows ENOTSUP only as the answer to a fast zero.
fn error_code(error: &Error, header: &RequestHeader) -> ErrorCode {
    match error.kind() {
        ErrorKind::NotSupported if header.flags & CommandFlags::FAST_ZERO.bits() == 0 => ErrorCode::EINVAL,
        kind => ErrorCode(kind.nbd()),
    }
}

/// Replies on their way to one send.
#[derive(Default)]
pub struct Batch {
    head: BytesMut,
    parts: Vec<Bytes>,
    len: usize,
}

impl Batch {
    /// In bytes.
    pub fn len(&self) -> usize {
        self.len + self.head.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces to send, in order.
    pub fn into_parts(mut self) -> Vec<Bytes> {
        self.seal();
        self.parts
    }

    fn seal(&mut self) {
        if !self.head.is_empty() {
            self.len += self.head.len();
            self.parts.push(self.head.split().freeze());
        }
    }

    fn data(&mut self, parts: Vec<Bytes>) {
        self.seal();
        self.len += parts.iter().map(Bytes::len).sum::<usize>();
        self.parts.extend(parts);
    }

    /// Appends the reply to `header`.
    pub fn push(&mut self, header: &RequestHeader, outcome: Outcome, terms: &Terms) {
        let cookie = header.cookie;
        if !terms.structured {
            let error = match &outcome {
                Outcome::Error { error, .. } => Some(*error),
                _ => None,
            };
            self.head.put_slice(&SimpleReply { error, cookie }.encode());
            if let Outcome::Data(parts) = outcome {
                self.data(parts);
            }
            return;
        }
        match outcome {
            Outcome::Done => self.head.put_slice(&encode_none_chunk(cookie)),
            // One chunk fits any READ that was admitted, so "don't fragment" is always kept.
            Outcome::Data(parts) => {
                let head = encode_offset_data_head(ChunkFlags::DONE, cookie, header.offset, header.len);
                self.head.put_slice(&head);
                self.data(parts);
            }
            Outcome::Status(status) => self.status(header, &status, terms.contexts),
            Outcome::Error { error, message } => self.head.put_slice(&encode_error_chunk(cookie, error, &message)),
        }
    }

    fn status(&mut self, header: &RequestHeader, status: &StatusExtents, contexts: Contexts) {
        let mut left = contexts.iter().count();
        for context in contexts.iter() {
            left -= 1;
            let flags = if left == 0 { ChunkFlags::DONE } else { ChunkFlags::empty() };
            let descriptors = if context == Contexts::ALLOCATION {
                descriptors(header, &status.allocation, |state| {
                    let mut flags = AllocationFlags::empty();
                    flags.set(AllocationFlags::HOLE, state.hole);
                    flags.set(AllocationFlags::ZERO, state.zero);
                    flags.bits()
                })
            } else {
                descriptors(header, &status.hydrated, |hydrated| if hydrated { STATE_HYDRATED } else { 0 })
            };
            self.head.put_slice(&encode_block_status_chunk(flags, header.cookie, context.id(), &descriptors));
        }
    }
}

/// The extents as the protocol wants them: none beyond the asked length, a single one when only one was asked for.
fn descriptors<S: Copy>(
    header: &RequestHeader,
    extents: &[Extent<S>],
    flags: impl Fn(S) -> u32,
) -> Vec<StatusDescriptor> {
    let one = header.flags & CommandFlags::REQ_ONE.bits() != 0;
    let count_max = if one { 1 } else { EXTENTS_PER_CHUNK_MAX };
    let mut left = header.len;
    let mut list = Vec::with_capacity(extents.len().min(count_max));
    for extent in extents.iter().take(count_max) {
        let len = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        if len == 0 {
            break;
        }
        left -= len;
        list.push(StatusDescriptor { len, flags: flags(extent.state) });
    }
    list
}
