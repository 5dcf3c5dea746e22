//! The handshake phase: from a connected socket to an export that is ready for requests.
//!
//! Asks, in this order, for structured replies, `base:allocation` and the export (GO, or EXPORT_NAME where the
//! server has no GO). Whatever the server lacks is done without; what it must have, and does not, is an error
//! that says so. The caller bounds the time.

use crate::bail;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::proto::{
    self, BlockSizes, ClientFlags, ClientOption, ExportInfo, HandshakeFlags, Info, InfoRequest, InfoType,
    MetaContextRequest, OptionCode, OptionReply, OptionReplyHeader, OptionReplyType, TransmissionFlags,
};
use crate::net::Stream;
use crate::units::DEVICE_SIZE_MAX;
use bytes::Bytes;
use std::io;

/// Longest data of an option reply: the protocol's strings with their lengths fit well.
const OPTION_REPLY_LEN_MAX: u32 = 16 << 10;
/// Most replies to one option.
const OPTION_REPLIES_MAX: usize = 64;
/// Most of a server's message that is shown, in characters.
const MESSAGE_SHOWN_MAX: usize = 300;
/// The largest read that is asked of any server, in bytes; a power of two.
const READ_LEN_MAX: u32 = proto::PAYLOAD_DEFAULT_MAX;
/// Smallest unit that is asked of a server which doesn't say: any server does sectors.
const BLOCK_UNKNOWN: u32 = 512;

/// What was agreed on with the server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Export {
    /// In bytes, 1 to [`DEVICE_SIZE_MAX`].
    pub size: u64,
    pub flags: TransmissionFlags,
    /// Requests begin and end at multiples of this; a power of two.
    pub block_min: u32,
    /// What the server likes best; a power of two.
    pub block_preferred: u32,
    /// No read is longer; a power of two, at least `block_min`.
    pub read_len_max: u32,
    pub structured: bool,
    /// Id of the context `base:allocation`.
    pub allocation: Option<u32>,
}

impl Export {
    fn new(info: ExportInfo, sizes: Option<BlockSizes>, structured: bool, allocation: Option<u32>) -> Result<Self> {
        if info.size == 0 {
            bail!(TooSmall, "the export is empty (0 bytes)");
        }
        if info.size > DEVICE_SIZE_MAX {
            bail!(Protocol, "the export claims {} bytes, more than any device has", info.size);
        }
        let sizes = match sizes {
            Some(sizes) => sizes.check()?,
            None => {
                let minimum = if info.size.is_multiple_of(u64::from(BLOCK_UNKNOWN)) { BLOCK_UNKNOWN } else { 1 };
                BlockSizes { minimum, ..BlockSizes::DEFAULT }
            }
        };
        // At least `minimum`, because `check` holds payload_max >= minimum, both not 0.
        let read_len_max = 1 << sizes.payload_max.min(READ_LEN_MAX).ilog2();
        Ok(Self {
            size: info.size,
            flags: info.flags,
            block_min: sizes.minimum,
            block_preferred: sizes.preferred,
            read_len_max,
            structured,
            allocation,
        })
    }
}

/// Negotiates for the export `name` on a fresh connection.
pub(super) async fn negotiate(stream: &Stream, name: &str) -> Result<Export> {
    let mut handshake = Handshake { stream, step: "its greeting" };
    // The first eight bytes alone tell whether it is NBD at all; others may never send the rest.
    let head = handshake.receive(8).await?;
    if head[..] != proto::INIT_PASSWD.to_be_bytes() {
        let shown: String = String::from_utf8_lossy(&head).escape_debug().collect();
        bail!(Protocol, "not an NBD server (it greets with '{shown}')");
    }
    let rest = handshake.receive(proto::GREETING_LEN - 8).await?;
    let mut greeting = [0; proto::GREETING_LEN];
    greeting[..8].copy_from_slice(&head);
    greeting[8..].copy_from_slice(&rest);
    let offered = proto::decode_greeting(&greeting)?;

    let mut flags = ClientFlags::empty();
    flags.set(ClientFlags::FIXED_NEWSTYLE, offered.contains(HandshakeFlags::FIXED_NEWSTYLE));
    flags.set(ClientFlags::NO_ZEROES, offered.contains(HandshakeFlags::NO_ZEROES));
    handshake.send(proto::encode_client_flags(flags).to_vec()).await?;
    if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
        // Plain newstyle knows one option only.
        return handshake.export_name(name, flags, false).await;
    }

    let structured = handshake.option(&ClientOption::StructuredReply).await?.is_ok();
    let mut allocation = None;
    if structured {
        let request = MetaContextRequest { name: name.into(), queries: vec![proto::CONTEXT_ALLOCATION.into()] };
        if let Ok(replies) = handshake.option(&ClientOption::SetMetaContext(request)).await? {
            allocation = replies.into_iter().find_map(|reply| match reply {
                OptionReply::MetaContext { id, name } if name == proto::CONTEXT_ALLOCATION => Some(id),
                _ => None,
            });
        }
    }

    let request = InfoRequest { name: name.into(), wanted: vec![InfoType::BLOCK_SIZE] };
    let replies = match handshake.option(&ClientOption::Go(request)).await? {
        Ok(replies) => replies,
        Err((OptionReplyType::ERR_UNSUP, _)) => return handshake.export_name(name, flags, structured).await,
        Err((reply, message)) => {
            let (kind, what) = match reply {
                OptionReplyType::ERR_UNKNOWN => (ErrorKind::NotFound, format!("the server has no export '{name}'")),
                OptionReplyType::ERR_POLICY => {
                    (ErrorKind::PermissionDenied, format!("the server does not allow export '{name}'"))
                }
                OptionReplyType::ERR_SHUTDOWN => (ErrorKind::Io, "the server is shutting down".into()),
                other => (ErrorKind::Protocol, format!("the server refuses export '{name}' with {other}")),
            };
            let message = if message.is_empty() { message } else { format!(" (it says: {message})") };
            return Err(Error::new(kind, what + &message));
        }
    };
    let (mut export, mut sizes) = (None, None);
    for reply in replies {
        match reply {
            OptionReply::Info(Info::Export(info)) => export = Some(info),
            OptionReply::Info(Info::BlockSize(info)) => sizes = Some(info),
            _ => {}
        }
    }
    match export {
        Some(info) => Export::new(info, sizes, structured, allocation),
        None => bail!(Protocol, "GO: the server did not describe the export"),
    }
}

/// One handshake under way; `step` is for error messages.
struct Handshake<'a> {
    stream: &'a Stream,
    step: &'static str,
}

type Refusal = (OptionReplyType, String);

impl Handshake<'_> {
    fn failed(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::new(
                ErrorKind::Io,
                format!("the server closed the connection before {} (does it take more clients?)", self.step),
            ),
            _ => Error::from_io(error, format!("negotiate ({})", self.step)),
        }
    }

    async fn receive(&self, len: usize) -> Result<DmaBuf> {
        self.stream.recv_exact(DmaBuf::new(len), 0).await.map_err(|error| self.failed(error))
    }

    async fn array<const N: usize>(&self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(&self.receive(N).await?);
        Ok(array)
    }

    async fn send(&self, bytes: Vec<u8>) -> Result<()> {
        self.stream.send(vec![Bytes::from(bytes)]).await.map_err(|error| self.failed(error))
    }

    /// Sends an option and collects its replies up to the final one; a refusal is the inner error.
    async fn option(&mut self, option: &ClientOption) -> Result<Result<Vec<OptionReply>, Refusal>> {
        let code = option.code();
        self.step = code.name().unwrap_or("an option");
        self.send(option.encode()).await?;
        let mut replies = Vec::new();
        while replies.len() < OPTION_REPLIES_MAX {
            let header = OptionReplyHeader::decode(&self.array().await?)?;
            if header.option != code {
                bail!(Protocol, "{code}: the server answers option {} instead", header.option);
            }
            if header.len > OPTION_REPLY_LEN_MAX {
                bail!(Protocol, "{code}: reply of {} bytes, {OPTION_REPLY_LEN_MAX} are allowed", header.len);
            }
            let data = self.receive(header.len as usize).await?;
            match OptionReply::decode(header.reply, &data)? {
                OptionReply::Ack => return Ok(Ok(replies)),
                OptionReply::Error { reply: OptionReplyType::ERR_TLS_REQD, .. } => {
                    bail!(NotSupported, "the server requires TLS, which is not supported")
                }
                OptionReply::Error { reply, message } => return Ok(Err((reply, for_people(&message)))),
                reply => replies.push(reply),
            }
        }
        bail!(Protocol, "{code}: more than {OPTION_REPLIES_MAX} replies")
    }

    /// The old way: no errors, no block sizes; the context that was chosen before holds for GO only.
    async fn export_name(&mut self, name: &str, flags: ClientFlags, structured: bool) -> Result<Export> {
        self.step = OptionCode::EXPORT_NAME.name().unwrap_or_default();
        self.send(ClientOption::ExportName(name.into()).encode()).await?;
        let info = match self.stream.recv_exact(DmaBuf::new(proto::EXPORT_NAME_REPLY_LEN), 0).await {
            Ok(bytes) => {
                let mut reply = [0; proto::EXPORT_NAME_REPLY_LEN];
                reply.copy_from_slice(&bytes);
                ExportInfo::decode(&reply)?
            }
            // This is how a server says no here.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                bail!(NotFound, "the server closed the connection: it probably has no export '{name}'")
            }
            Err(error) => return Err(self.failed(error)),
        };
        if !flags.contains(ClientFlags::NO_ZEROES) {
            self.receive(proto::EXPORT_NAME_PADDING).await?;
        }
        Export::new(info, None, structured, None)
    }
}

/// A peer's text as part of one line.
pub(super) fn for_people(message: &str) -> String {
    let mut text = String::new();
    for c in message.trim().chars().take(MESSAGE_SHOWN_MAX) {
        if c.is_control() { text.extend(c.escape_debug()) } else { text.push(c) }
    }
    text
}
