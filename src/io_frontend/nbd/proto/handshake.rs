//! The messages of the handshake.

use super::*;

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
