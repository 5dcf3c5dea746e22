//! The NBD wire format: constants, and messages to bytes and back, in both directions.
//!
//! The server ([`super`]) and the client (the NBD source) share this file: each message that one side encodes the
//! other decodes. Source of every number: `doc/proto.md` of the NBD project ("The NBD protocol"); names are its
//! names without `NBD_`. All integers are big endian.
//!
//! Pure: bytes in, values out. It must not do I/O, know limits of policy (how much a peer may send), or allocate
//! by a length that a peer claims: lengths are checked against bytes that are really there.
//!
//! ```text
//! handshake     S: NBDMAGIC, IHAVEOPT, flags16                       greeting, 18 bytes
//!               C: flags32                                           client flags, 4 bytes
//!               C: IHAVEOPT, option32, len32, data                   option, 16 bytes + data
//!               S: 0x3e889045565a9, option32, type32, len32, data    option reply, 20 bytes + data
//! transmission  C: 0x25609513, flags16, type16, cookie64, offset64, len32   request, 28 bytes (+ data: WRITE)
//!               S: 0x67446698, error32, cookie64                     simple reply, 16 bytes (+ data: READ)
//!               S: 0x668e33ef, flags16, type16, cookie64, len32      structured reply chunk, 20 bytes + payload
//! ```

use crate::bail;
use crate::error::Result;
use std::fmt;

mod handshake;
#[cfg(test)]
mod tests;
mod transmission;

pub use handshake::*;
pub use transmission::*;

/// `NBDMAGIC`, the first eight bytes of every server.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: a newstyle server, and every option of a client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server sends in the place of [`OPTION_MAGIC`].
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string (export name, description, query, message), in bytes.
pub const STRING_MAX: usize = 4096;
/// Payload that every server should accept when nothing else was agreed on, in bytes.
pub const PAYLOAD_DEFAULT_MAX: u32 = 32 << 20;
/// Most extents that a server should put into one block status chunk.
pub const EXTENTS_PER_CHUNK_MAX: usize = 1 << 20;
/// Zeroes after the answer to EXPORT_NAME, unless C_NO_ZEROES was negotiated.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Length of the server's greeting, in bytes.
pub const GREETING_LEN: usize = 18;
/// Length of the client's flags, in bytes.
pub const CLIENT_FLAGS_LEN: usize = 4;
/// Length of an option without its data, in bytes.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of an option reply without its data, in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// Length of the answer to EXPORT_NAME without its padding, in bytes.
pub const EXPORT_NAME_REPLY_LEN: usize = 10;
/// Length of a request without the data of a WRITE, in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply without the data of a READ, in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a structured reply chunk without its payload, in bytes.
pub const CHUNK_HEADER_LEN: usize = 20;
/// Length of the offset that begins the payload of an OFFSET_DATA chunk, in bytes.
pub const OFFSET_DATA_PREFIX_LEN: usize = 8;

/// The metadata context that the protocol itself defines.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";

bitflags::bitflags! {
    /// Handshake flags, from the server.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct HandshakeFlags: u16 {
        const FIXED_NEWSTYLE = 1;
        const NO_ZEROES = 1 << 1;
    }

    /// Client flags, the answer to [`HandshakeFlags`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ClientFlags: u32 {
        const FIXED_NEWSTYLE = 1;
        const NO_ZEROES = 1 << 1;
    }

    /// Transmission flags: what an export supports.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct TransmissionFlags: u16 {
        const HAS_FLAGS = 1;
        const READ_ONLY = 1 << 1;
        const SEND_FLUSH = 1 << 2;
        const SEND_FUA = 1 << 3;
        const ROTATIONAL = 1 << 4;
        const SEND_TRIM = 1 << 5;
        const SEND_WRITE_ZEROES = 1 << 6;
        const SEND_DF = 1 << 7;
        const CAN_MULTI_CONN = 1 << 8;
        const SEND_RESIZE = 1 << 9;
        const SEND_CACHE = 1 << 10;
        const SEND_FAST_ZERO = 1 << 11;
    }

    /// Flags of a request.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct CommandFlags: u16 {
        const FUA = 1;
        const NO_HOLE = 1 << 1;
        const DF = 1 << 2;
        const REQ_ONE = 1 << 3;
        const FAST_ZERO = 1 << 4;
    }

    /// Flags of a structured reply chunk.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ChunkFlags: u16 {
        /// The last chunk of the reply.
        const DONE = 1;
    }

    /// Status flags of `base:allocation`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct AllocationFlags: u32 {
        const HOLE = 1;
        const ZERO = 1 << 1;
    }
}

macro_rules! code_type {
    ($(#[$doc:meta])* $name:ident($repr:ty) { $($variant:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub $repr);
        #[allow(missing_docs)]
        impl $name {
            $(pub const $variant: Self = Self($value);)*
            /// The protocol's name (without its prefix); `None` for a code that this build does not know.
            pub const fn name(self) -> Option<&'static str> {
                $(if self.0 == Self::$variant.0 { return Some(stringify!($variant)); })*
                None
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(self, f) }
        }
    };
}

code_type!(
    /// An option of the handshake (`NBD_OPT_*`).
    OptionCode(u32) {
        EXPORT_NAME = 1,
        ABORT = 2,
        LIST = 3,
        PEEK_EXPORT = 4,
        STARTTLS = 5,
        INFO = 6,
        GO = 7,
        STRUCTURED_REPLY = 8,
        LIST_META_CONTEXT = 9,
        SET_META_CONTEXT = 10,
        EXTENDED_HEADERS = 11,
    }
);
code_type!(
    /// The type of a reply to an option (`NBD_REP_*`). Errors have bit 31 set.
    OptionReplyType(u32) {
        ACK = 1,
        SERVER = 2,
        INFO = 3,
        META_CONTEXT = 4,
        ERR_UNSUP = (1 << 31) + 1,
        ERR_POLICY = (1 << 31) + 2,
        ERR_INVALID = (1 << 31) + 3,
        ERR_PLATFORM = (1 << 31) + 4,
        ERR_TLS_REQD = (1 << 31) + 5,
        ERR_UNKNOWN = (1 << 31) + 6,
        ERR_SHUTDOWN = (1 << 31) + 7,
        ERR_BLOCK_SIZE_REQD = (1 << 31) + 8,
        ERR_TOO_BIG = (1 << 31) + 9,
        ERR_EXT_HEADER_REQD = (1 << 31) + 10,
    }
);
code_type!(
    /// A piece of information about an export (`NBD_INFO_*`).
    InfoType(u16) {
        EXPORT = 0,
        NAME = 1,
        DESCRIPTION = 2,
        BLOCK_SIZE = 3,
    }
);
code_type!(
    /// The type of a request (`NBD_CMD_*`).
    Command(u16) {
        READ = 0,
        WRITE = 1,
        DISC = 2,
        FLUSH = 3,
        TRIM = 4,
        CACHE = 5,
        WRITE_ZEROES = 6,
        BLOCK_STATUS = 7,
    }
);
code_type!(
    /// The type of a structured reply chunk (`NBD_REPLY_TYPE_*`). Errors have bit 15 set.
    ChunkType(u16) {
        NONE = 0,
        OFFSET_DATA = 1,
        OFFSET_HOLE = 2,
        BLOCK_STATUS = 5,
        ERROR = (1 << 15) + 1,
        ERROR_OFFSET = (1 << 15) + 2,
    }
);
code_type!(
    /// An error number of a reply; these are the only ones a server may send.
    ErrorCode(u32) {
        EPERM = 1,
        EIO = 5,
        ENOMEM = 12,
        EINVAL = 22,
        ENOSPC = 28,
        EOVERFLOW = 75,
        ENOTSUP = 95,
        ESHUTDOWN = 108,
    }
);

impl OptionReplyType {
    pub const fn is_error(self) -> bool {
        self.0 & (1 << 31) != 0
    }
}

impl ChunkType {
    pub const fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

/// Reads big-endian fields off the front of a message; each fails when the message ends early.
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    fn new(rest: &'a [u8], what: &'static str) -> Self {
        Self { rest, what }
    }
    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(len) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => bail!(Protocol, "{}: ends after {} of {len} bytes", self.what, self.rest.len()),
        }
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }
    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }
    /// A string of `len` bytes: UTF-8 without NUL, at most [`STRING_MAX`].
    fn string(&mut self, len: usize) -> Result<String> {
        if len > STRING_MAX {
            bail!(Protocol, "{}: string of {len} bytes, {STRING_MAX} are allowed", self.what);
        }
        let bytes = self.bytes(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => bail!(Protocol, "{}: string is not UTF-8 without NUL", self.what),
        }
    }
    /// A string after its 32-bit length.
    fn string_with_len(&mut self) -> Result<String> {
        let len = self.u32()?;
        self.string(usize::try_from(len).unwrap_or(usize::MAX))
    }
    fn rest_string(&mut self) -> Result<String> {
        self.string(self.rest.len())
    }
    fn end(self) -> Result<()> {
        if !self.rest.is_empty() {
            bail!(Protocol, "{}: {} bytes too many", self.what, self.rest.len());
        }
        Ok(())
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= STRING_MAX);
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// `text`, cut at a character boundary to at most [`STRING_MAX`] bytes and at the first NUL.
fn bounded(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(STRING_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
