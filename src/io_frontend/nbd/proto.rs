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

#[cfg(test)]
mod tests;

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

// ---- Handshake: greeting and flags ----

/// The server's first message.
pub fn encode_greeting(flags: HandshakeFlags) -> [u8; GREETING_LEN] {
    let mut out = [0; GREETING_LEN];
    out[..8].copy_from_slice(&INIT_PASSWD.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&flags.bits().to_be_bytes());
    out
}

/// The server's handshake flags; unknown ones are dropped. Fails for what is no newstyle NBD server.
pub fn decode_greeting(bytes: &[u8; GREETING_LEN]) -> Result<HandshakeFlags> {
    let mut fields = Fields::new(bytes, "greeting");
    let (password, magic) = (fields.u64()?, fields.u64()?);
    if password != INIT_PASSWD {
        bail!(Protocol, "greeting: not an NBD server (magic {password:#018x})");
    }
    match magic {
        OPTION_MAGIC => Ok(HandshakeFlags::from_bits_truncate(fields.u16()?)),
        OLDSTYLE_MAGIC => bail!(Protocol, "greeting: an oldstyle NBD server; fixed newstyle is needed"),
        _ => bail!(Protocol, "greeting: not a newstyle NBD server (magic {magic:#018x})"),
    }
}

pub fn encode_client_flags(flags: ClientFlags) -> [u8; CLIENT_FLAGS_LEN] {
    flags.bits().to_be_bytes()
}

/// The client's flags. A flag that the protocol does not know is an error: the server must drop the connection.
pub fn decode_client_flags(bytes: [u8; CLIENT_FLAGS_LEN]) -> Result<ClientFlags> {
    let bits = u32::from_be_bytes(bytes);
    match ClientFlags::from_bits(bits) {
        Some(flags) => Ok(flags),
        None => bail!(Protocol, "client flags {bits:#x}: unknown flag"),
    }
}

// ---- Handshake: options ----

/// What precedes the data of an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHeader {
    pub option: OptionCode,
    /// Length of the data, in bytes.
    pub len: u32,
}

impl OptionHeader {
    pub fn encode(self) -> [u8; OPTION_HEADER_LEN] {
        let mut out = [0; OPTION_HEADER_LEN];
        out[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.0.to_be_bytes());
        out[12..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self> {
        let mut fields = Fields::new(bytes, "option");
        let magic = fields.u64()?;
        if magic != OPTION_MAGIC {
            bail!(Protocol, "option: bad magic {magic:#018x}");
        }
        Ok(Self { option: OptionCode(fields.u32()?), len: fields.u32()? })
    }
}

/// The data of INFO and GO.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InfoRequest {
    /// Empty: the default export.
    pub name: String,
    /// What the client asks for; unknown types are to be ignored.
    pub wanted: Vec<InfoType>,
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetaContextRequest {
    /// Name of the export; empty: the default export.
    pub name: String,
    pub queries: Vec<String>,
}

/// An option with its data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientOption {
    ExportName(String),
    Abort,
    List,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ListMetaContext(MetaContextRequest),
    SetMetaContext(MetaContextRequest),
    /// One that this build does not know or support; its data is not looked at.
    Other(OptionCode),
}

impl ClientOption {
    pub fn code(&self) -> OptionCode {
        match self {
            Self::ExportName(_) => OptionCode::EXPORT_NAME,
            Self::Abort => OptionCode::ABORT,
            Self::List => OptionCode::LIST,
            Self::Info(_) => OptionCode::INFO,
            Self::Go(_) => OptionCode::GO,
            Self::StructuredReply => OptionCode::STRUCTURED_REPLY,
            Self::ListMetaContext(_) => OptionCode::LIST_META_CONTEXT,
            Self::SetMetaContext(_) => OptionCode::SET_META_CONTEXT,
            Self::Other(code) => *code,
        }
    }

    /// Header and data. Strings must be at most [`STRING_MAX`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(name.as_bytes()),
            Self::Info(request) | Self::Go(request) => {
                push_string(&mut data, &request.name);
                data.extend_from_slice(&(request.wanted.len() as u16).to_be_bytes());
                for info in &request.wanted {
                    data.extend_from_slice(&info.0.to_be_bytes());
                }
            }
            Self::ListMetaContext(request) | Self::SetMetaContext(request) => {
                push_string(&mut data, &request.name);
                data.extend_from_slice(&(request.queries.len() as u32).to_be_bytes());
                for query in &request.queries {
                    push_string(&mut data, query);
                }
            }
            Self::Abort | Self::List | Self::StructuredReply | Self::Other(_) => {}
        }
        let mut out = OptionHeader { option: self.code(), len: data.len() as u32 }.encode().to_vec();
        out.append(&mut data);
        out
    }

    /// The option `code` with all of its data. Fails when the data is malformed (NBD_REP_ERR_INVALID).
    pub fn decode(code: OptionCode, data: &[u8]) -> Result<Self> {
        let mut fields = Fields::new(data, code.name().unwrap_or("option"));
        let option = match code {
            OptionCode::EXPORT_NAME => Self::ExportName(fields.rest_string()?),
            // Data of an ABORT is to be ignored.
            OptionCode::ABORT => return Ok(Self::Abort),
            OptionCode::LIST => Self::List,
            OptionCode::INFO => Self::Info(Self::decode_info(&mut fields)?),
            OptionCode::GO => Self::Go(Self::decode_info(&mut fields)?),
            OptionCode::STRUCTURED_REPLY => Self::StructuredReply,
            OptionCode::LIST_META_CONTEXT => Self::ListMetaContext(Self::decode_meta(&mut fields)?),
            OptionCode::SET_META_CONTEXT => Self::SetMetaContext(Self::decode_meta(&mut fields)?),
            other => return Ok(Self::Other(other)),
        };
        fields.end()?;
        Ok(option)
    }

    fn decode_info(fields: &mut Fields<'_>) -> Result<InfoRequest> {
        let name = fields.string_with_len()?;
        let count = fields.u16()?;
        let wanted = (0..count).map(|_| Ok(InfoType(fields.u16()?))).collect::<Result<_>>()?;
        Ok(InfoRequest { name, wanted })
    }

    fn decode_meta(fields: &mut Fields<'_>) -> Result<MetaContextRequest> {
        let name = fields.string_with_len()?;
        let count = fields.u32()?;
        // No capacity by `count`: it is the peer's claim. Each query has at least its length, so this ends.
        let queries = (0..count).map(|_| fields.string_with_len()).collect::<Result<_>>()?;
        Ok(MetaContextRequest { name, queries })
    }
}

// ---- Handshake: replies to options ----

/// What precedes the data of an option reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    pub reply: OptionReplyType,
    /// Length of the data, in bytes.
    pub len: u32,
}

impl OptionReplyHeader {
    pub fn encode(self) -> [u8; OPTION_REPLY_HEADER_LEN] {
        let mut out = [0; OPTION_REPLY_HEADER_LEN];
        out[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.0.to_be_bytes());
        out[12..16].copy_from_slice(&self.reply.0.to_be_bytes());
        out[16..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self> {
        let mut fields = Fields::new(bytes, "option reply");
        let magic = fields.u64()?;
        if magic != OPTION_REPLY_MAGIC {
            bail!(Protocol, "option reply: bad magic {magic:#018x}");
        }
        Ok(Self { option: OptionCode(fields.u32()?), reply: OptionReplyType(fields.u32()?), len: fields.u32()? })
    }
}

/// Size and transmission flags of an export: the data of NBD_INFO_EXPORT, and the answer to EXPORT_NAME.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// In bytes.
    pub size: u64,
    pub flags: TransmissionFlags,
}

impl ExportInfo {
    pub fn encode(self) -> [u8; EXPORT_NAME_REPLY_LEN] {
        let mut out = [0; EXPORT_NAME_REPLY_LEN];
        out[..8].copy_from_slice(&self.size.to_be_bytes());
        out[8..].copy_from_slice(&self.flags.bits().to_be_bytes());
        out
    }

    /// Unknown transmission flags are dropped.
    pub fn decode(bytes: &[u8; EXPORT_NAME_REPLY_LEN]) -> Result<Self> {
        Self::from_fields(&mut Fields::new(bytes, "export"))
    }

    fn from_fields(fields: &mut Fields<'_>) -> Result<Self> {
        let size = fields.u64()?;
        let flags = TransmissionFlags::from_bits_truncate(fields.u16()?);
        if !flags.contains(TransmissionFlags::HAS_FLAGS) {
            bail!(Protocol, "export: transmission flags without HAS_FLAGS");
        }
        Ok(Self { size, flags })
    }
}

/// The size constraints of an export (NBD_INFO_BLOCK_SIZE), in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSizes {
    /// A power of two, 1 to 64 KiB.
    pub minimum: u32,
    /// A power of two, at least 512 and `minimum`.
    pub preferred: u32,
    /// At least `preferred`.
    pub payload_max: u32,
}

impl BlockSizes {
    /// What holds when a server does not say.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, payload_max: PAYLOAD_DEFAULT_MAX };

    /// Checks the protocol's constraints.
    pub fn check(self) -> Result<Self> {
        let ok = self.minimum.is_power_of_two()
            && self.minimum <= 65536
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.payload_max >= self.preferred;
        if !ok {
            let Self { minimum, preferred, payload_max } = self;
            bail!(Protocol, "block sizes {minimum}, {preferred}, {payload_max} break the protocol");
        }
        Ok(self)
    }
}

/// The data of an INFO reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Info {
    Export(ExportInfo),
    Name(String),
    Description(String),
    /// As sent: [`BlockSizes::check`] is the receiver's.
    BlockSize(BlockSizes),
    /// To be ignored.
    Other(InfoType),
}

/// A reply to an option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OptionReply {
    Ack,
    /// One export of a LIST.
    Server {
        name: String,
        description: String,
    },
    Info(Info),
    MetaContext {
        id: u32,
        name: String,
    },
    /// A refusal: `reply` is one of the ERR types (perhaps one that this build does not know).
    Error {
        reply: OptionReplyType,
        /// For people; may be empty.
        message: String,
    },
}

impl OptionReply {
    /// A refusal with a message, which is cut to what the protocol allows.
    pub fn error(reply: OptionReplyType, message: &str) -> Self {
        debug_assert!(reply.is_error());
        Self::Error { reply, message: bounded(message).to_owned() }
    }

    /// Whether no further reply to the same option follows.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Ack | Self::Error { .. })
    }

    /// Appends header and data. Strings must be at most [`STRING_MAX`] bytes.
    pub fn encode(&self, option: OptionCode, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let reply = match self {
            Self::Ack => OptionReplyType::ACK,
            Self::Server { name, description } => {
                push_string(&mut data, name);
                data.extend_from_slice(description.as_bytes());
                OptionReplyType::SERVER
            }
            Self::Info(info) => {
                let (kind, payload): (InfoType, Vec<u8>) = match info {
                    Info::Export(export) => (InfoType::EXPORT, export.encode().to_vec()),
                    Info::Name(name) => (InfoType::NAME, name.as_bytes().to_vec()),
                    Info::Description(text) => (InfoType::DESCRIPTION, text.as_bytes().to_vec()),
                    Info::BlockSize(sizes) => {
                        let sizes = [sizes.minimum, sizes.preferred, sizes.payload_max];
                        (InfoType::BLOCK_SIZE, sizes.iter().flat_map(|size| size.to_be_bytes()).collect())
                    }
                    Info::Other(kind) => (*kind, Vec::new()),
                };
                data.extend_from_slice(&kind.0.to_be_bytes());
                data.extend_from_slice(&payload);
                OptionReplyType::INFO
            }
            Self::MetaContext { id, name } => {
                data.extend_from_slice(&id.to_be_bytes());
                data.extend_from_slice(name.as_bytes());
                OptionReplyType::META_CONTEXT
            }
            Self::Error { reply, message } => {
                data.extend_from_slice(message.as_bytes());
                *reply
            }
        };
        out.extend_from_slice(&OptionReplyHeader { option, reply, len: data.len() as u32 }.encode());
        out.append(&mut data);
    }

    /// A reply with all of its data. Fails for a type that is neither known nor an error.
    pub fn decode(reply: OptionReplyType, data: &[u8]) -> Result<Self> {
        let mut fields = Fields::new(data, reply.name().unwrap_or("option reply"));
        let decoded = match reply {
            OptionReplyType::ACK => Self::Ack,
            OptionReplyType::SERVER => {
                Self::Server { name: fields.string_with_len()?, description: fields.rest_string()? }
            }
            OptionReplyType::INFO => Self::Info(match InfoType(fields.u16()?) {
                InfoType::EXPORT => Info::Export(ExportInfo::from_fields(&mut fields)?),
                InfoType::NAME => Info::Name(fields.rest_string()?),
                InfoType::DESCRIPTION => Info::Description(fields.rest_string()?),
                InfoType::BLOCK_SIZE => {
                    let (minimum, preferred, payload_max) = (fields.u32()?, fields.u32()?, fields.u32()?);
                    Info::BlockSize(BlockSizes { minimum, preferred, payload_max })
                }
                other => return Ok(Self::Info(Info::Other(other))),
            }),
            OptionReplyType::META_CONTEXT => Self::MetaContext { id: fields.u32()?, name: fields.rest_string()? },
            // What a server says about its refusal is for people: bad text is no reason to fail otherwise.
            error if error.is_error() => return Ok(Self::error(error, &String::from_utf8_lossy(data))),
            other => bail!(Protocol, "option reply of unknown type {other}"),
        };
        fields.end()?;
        Ok(decoded)
    }
}

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
