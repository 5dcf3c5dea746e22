//! The messages of the transmission phase.

use super::*;

// ---- Transmission: requests ----

/// A request's header. The data of a WRITE (`len` bytes) follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// As sent, unknown bits included: see [`CommandFlags`].
    pub flags: u16,
    pub command: Command,
    /// Chosen by the client; its reply carries the same.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

impl RequestHeader {
    pub fn encode(self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Fails when the magic is wrong: the stream is out of step and can't be used any more.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self> {
        let mut fields = Fields::new(bytes, "request");
        let magic = fields.u32()?;
        if magic != REQUEST_MAGIC {
            bail!(Protocol, "request: bad magic {magic:#010x}");
        }
        Ok(Self {
            flags: fields.u16()?,
            command: Command(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }
}

// ---- Transmission: replies ----

/// A simple reply. The data of a successful READ follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SimpleReply {
    /// `None`: success.
    pub error: Option<ErrorCode>,
    pub cookie: u64,
}

impl SimpleReply {
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut out = [0; SIMPLE_REPLY_LEN];
        out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.map_or(0, |error| error.0).to_be_bytes());
        out[8..].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }
}

/// The header of a structured reply chunk. `len` bytes of payload follow it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkHeader {
    pub flags: ChunkFlags,
    pub kind: ChunkType,
    pub cookie: u64,
    /// Length of the payload, in bytes.
    pub len: u32,
}

impl ChunkHeader {
    pub fn encode(self) -> [u8; CHUNK_HEADER_LEN] {
        let mut out = [0; CHUNK_HEADER_LEN];
        out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    pub fn is_done(self) -> bool {
        self.flags.contains(ChunkFlags::DONE)
    }
}

/// The header of any reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyHeader {
    Simple(SimpleReply),
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// The reply header at the front of `bytes`, and its length in bytes; `None` when more bytes are needed.
    /// Fails when the magic is wrong, or a chunk has a length that its type does not allow.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        if bytes.len() < 4 {
            return Ok(None);
        }
        let mut fields = Fields::new(bytes, "reply");
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC if bytes.len() < SIMPLE_REPLY_LEN => Ok(None),
            SIMPLE_REPLY_MAGIC => {
                let error = fields.u32()?;
                let error = (error != 0).then_some(ErrorCode(error));
                Ok(Some((Self::Simple(SimpleReply { error, cookie: fields.u64()? }), SIMPLE_REPLY_LEN)))
            }
            STRUCTURED_REPLY_MAGIC if bytes.len() < CHUNK_HEADER_LEN => Ok(None),
            STRUCTURED_REPLY_MAGIC => {
                let flags = ChunkFlags::from_bits_truncate(fields.u16()?);
                let kind = ChunkType(fields.u16()?);
                let header = ChunkHeader { flags, kind, cookie: fields.u64()?, len: fields.u32()? };
                let len_ok = match kind {
                    ChunkType::NONE => header.len == 0 && header.is_done(),
                    ChunkType::OFFSET_DATA => header.len > OFFSET_DATA_PREFIX_LEN as u32,
                    ChunkType::OFFSET_HOLE => header.len == 12,
                    ChunkType::BLOCK_STATUS => header.len >= 12 && header.len % 8 == 4,
                    ChunkType::ERROR_OFFSET => header.len >= 14,
                    error if error.is_error() => header.len >= 6,
                    other => bail!(Protocol, "reply: chunk of unknown type {other}"),
                };
                if !len_ok {
                    bail!(Protocol, "reply: {kind} chunk with {} bytes of payload", header.len);
                }
                Ok(Some((Self::Chunk(header), CHUNK_HEADER_LEN)))
            }
            magic => bail!(Protocol, "reply: bad magic {magic:#010x}"),
        }
    }

    pub fn cookie(self) -> u64 {
        match self {
            Self::Simple(reply) => reply.cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }
}

// ---- Transmission: chunks with their payload ----

/// The last chunk of a successful reply without data.
pub fn encode_none_chunk(cookie: u64) -> [u8; CHUNK_HEADER_LEN] {
    ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::NONE, cookie, len: 0 }.encode()
}

/// Header and offset of an OFFSET_DATA chunk; `data_len` bytes of data are to follow.
/// `data_len` is at least 1 and at most `u32::MAX - 8`.
pub fn encode_offset_data_head(
    flags: ChunkFlags,
    cookie: u64,
    offset: u64,
    data_len: u32,
) -> [u8; CHUNK_HEADER_LEN + OFFSET_DATA_PREFIX_LEN] {
    let len = data_len + OFFSET_DATA_PREFIX_LEN as u32;
    let mut out = [0; CHUNK_HEADER_LEN + OFFSET_DATA_PREFIX_LEN];
    out[..CHUNK_HEADER_LEN].copy_from_slice(&ChunkHeader { flags, kind: ChunkType::OFFSET_DATA, cookie, len }.encode());
    out[CHUNK_HEADER_LEN..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// The offset that begins the payload of an OFFSET_DATA chunk.
pub fn decode_offset_data_prefix(bytes: [u8; OFFSET_DATA_PREFIX_LEN]) -> u64 {
    u64::from_be_bytes(bytes)
}

/// A run of zeroes in a READ's reply (OFFSET_HOLE).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OffsetHole {
    pub offset: u64,
    /// In bytes, not 0.
    pub len: u32,
}

pub fn encode_offset_hole_chunk(flags: ChunkFlags, cookie: u64, hole: OffsetHole) -> Vec<u8> {
    let mut out = ChunkHeader { flags, kind: ChunkType::OFFSET_HOLE, cookie, len: 12 }.encode().to_vec();
    out.extend_from_slice(&hole.offset.to_be_bytes());
    out.extend_from_slice(&hole.len.to_be_bytes());
    out
}

/// The payload of an OFFSET_HOLE chunk.
pub fn decode_offset_hole(payload: &[u8]) -> Result<OffsetHole> {
    let mut fields = Fields::new(payload, "OFFSET_HOLE chunk");
    let hole = OffsetHole { offset: fields.u64()?, len: fields.u32()? };
    fields.end()?;
    if hole.len == 0 {
        bail!(Protocol, "OFFSET_HOLE chunk: empty hole");
    }
    Ok(hole)
}

/// An error chunk (ERROR or ERROR_OFFSET).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ErrorChunk {
    /// Not 0.
    pub error: ErrorCode,
    /// For people; may be empty.
    pub message: String,
    /// Only ERROR_OFFSET has one.
    pub offset: Option<u64>,
}

/// An ERROR chunk, the last of its reply. The message is cut to what the protocol allows.
pub fn encode_error_chunk(cookie: u64, error: ErrorCode, message: &str) -> Vec<u8> {
    debug_assert!(error.0 != 0);
    let message = bounded(message);
    let len = 6 + message.len() as u32;
    let mut out = ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::ERROR, cookie, len }.encode().to_vec();
    out.extend_from_slice(&error.0.to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    out
}

/// The payload of an error chunk of type `kind`, a known or unknown one. The error 0, which is not allowed, is
/// taken for EINVAL; the text may be any bytes.
pub fn decode_error_chunk(kind: ChunkType, payload: &[u8]) -> Result<ErrorChunk> {
    let mut fields = Fields::new(payload, "error chunk");
    let error = match fields.u32()? {
        0 => ErrorCode::EINVAL,
        error => ErrorCode(error),
    };
    let message_len = fields.u16()?;
    let message = String::from_utf8_lossy(fields.bytes(usize::from(message_len))?);
    let message = bounded(&message).to_owned();
    let offset = if kind == ChunkType::ERROR_OFFSET { Some(fields.u64()?) } else { None };
    Ok(ErrorChunk { error, message, offset })
}

/// One descriptor of a block status chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusDescriptor {
    /// In bytes, not 0.
    pub len: u32,
    /// What they mean is the context's: [`AllocationFlags`] for [`CONTEXT_ALLOCATION`].
    pub flags: u32,
}

/// A BLOCK_STATUS chunk of one context. `descriptors` has 1 to [`EXTENTS_PER_CHUNK_MAX`] elements.
pub fn encode_block_status_chunk(
    flags: ChunkFlags,
    cookie: u64,
    context: u32,
    descriptors: &[StatusDescriptor],
) -> Vec<u8> {
    debug_assert!((1..=EXTENTS_PER_CHUNK_MAX).contains(&descriptors.len()));
    let len = 4 + 8 * descriptors.len() as u32;
    let mut out = Vec::with_capacity(CHUNK_HEADER_LEN + len as usize);
    out.extend_from_slice(&ChunkHeader { flags, kind: ChunkType::BLOCK_STATUS, cookie, len }.encode());
    out.extend_from_slice(&context.to_be_bytes());
    for descriptor in descriptors {
        out.extend_from_slice(&descriptor.len.to_be_bytes());
        out.extend_from_slice(&descriptor.flags.to_be_bytes());
    }
    out
}

/// The payload of a BLOCK_STATUS chunk: the context's id and at least one descriptor, none of them empty.
pub fn decode_block_status(payload: &[u8]) -> Result<(u32, Vec<StatusDescriptor>)> {
    let mut fields = Fields::new(payload, "BLOCK_STATUS chunk");
    let context = fields.u32()?;
    let mut descriptors = Vec::with_capacity(fields.rest.len() / 8);
    while !fields.rest.is_empty() || descriptors.is_empty() {
        let descriptor = StatusDescriptor { len: fields.u32()?, flags: fields.u32()? };
        if descriptor.len == 0 {
            bail!(Protocol, "BLOCK_STATUS chunk: empty extent");
        }
        descriptors.push(descriptor);
    }
    Ok((context, descriptors))
}
