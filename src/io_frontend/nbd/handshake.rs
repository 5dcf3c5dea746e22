//! The server's side of the handshake, as a machine: bytes in, bytes and a decision out.
//!
//! One message is answered at a time, so what is to be sent stays bounded by the exports there are, whatever a
//! client pipelines. Nothing here waits, and nothing survives the connection.
//!
//! Invariants: contexts are only ever selected after structured replies, and only count for the export that they
//! were selected for; unknown options are refused and skipped, never fatal.

use super::limits::Limits;
use super::proto::{
    BlockSizes, CLIENT_FLAGS_LEN, CONTEXT_ALLOCATION, ClientFlags, ClientOption, EXPORT_NAME_PADDING, ExportInfo,
    GREETING_LEN, HandshakeFlags, Info, InfoRequest, InfoType, MetaContextRequest, OPTION_HEADER_LEN, OptionCode,
    OptionHeader, OptionReply, OptionReplyType, STRING_MAX, TransmissionFlags, decode_client_flags, encode_greeting,
};
use crate::bail;
use crate::error::Result;
use crate::io_frontend::request::{Volume, VolumeInfo};
use crate::units::ByteSize;
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// The context that tells which bytes the destination already holds: status 1 is hydrated, 0 is not.
pub const CONTEXT_HYDRATED: &str = "hydrant:hydrated";

/// The clones that can be reached, on this shard.
///
/// Names are UTF-8 without NUL, at most 4096 bytes, and not empty.
pub trait Exports {
    /// The export `name`; `""` is the default export, if there is one.
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>>;
    fn list(&self) -> Vec<VolumeInfo>;
}

bitflags::bitflags! {
    /// A set of metadata contexts.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Contexts: u8 {
        const ALLOCATION = 1;
        const HYDRATED = 1 << 1;
    }
}

impl Contexts {
    /// Identifies one context in this connection. Any unique number will do; it is opaque to the client.
    pub const fn id(self) -> u32 {
        self.bits() as u32
    }

    fn name(self) -> &'static str {
        if self == Self::ALLOCATION { CONTEXT_ALLOCATION } else { CONTEXT_HYDRATED }
    }

    /// The contexts that a query for LIST_META_CONTEXT (`wildcards`) or SET_META_CONTEXT means; unknown ones: none.
    fn matching(query: &str, wildcards: bool) -> Self {
        let context_matches = |context: &Contexts| {
            let name = context.name();
            let namespace_len = name.find(':').map_or(0, |colon| colon + 1);
            query == name || (wildcards && query == &name[..namespace_len])
        };
        Self::all().iter().filter(context_matches).collect()
    }
}

/// What a handshake came to: the export, and what was agreed on.
#[derive(Clone)]
pub struct Session {
    pub volume: Rc<dyn Volume>,
    /// Of the volume when the client chose it.
    pub info: VolumeInfo,
    pub structured: bool,
    /// Empty unless `structured`.
    pub contexts: Contexts,
}

/// What is to happen after one message.
pub enum Next {
    /// Another message.
    Continue,
    Transmission(Session),
    /// The client is done.
    Close,
}

/// The answer to what was received so far.
pub enum Step {
    /// Nothing to do before there are at least this many bytes of input.
    NeedBytes(usize),
    /// The first `consumed` bytes of input are dealt with.
    Answer { consumed: usize, send: Vec<u8>, next: Next },
}

/// One handshake.
pub struct Handshake {
    limits: Limits,
    client_flags: Option<ClientFlags>,
    options: u32,
    structured: bool,
    /// The canonical name of an export, and the contexts selected for it.
    selected: Option<(String, Contexts)>,
}

impl Handshake {
    pub fn new(limits: Limits) -> Self {
        Self { limits, client_flags: None, options: 0, structured: false, selected: None }
    }

    /// What the server sends first.
    pub fn greeting() -> [u8; GREETING_LEN] {
        encode_greeting(HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES)
    }

    /// The most input that [`Self::step`] ever asks for, in bytes.
    pub fn input_max(limits: &Limits) -> usize {
        OPTION_HEADER_LEN + limits.option_data_bytes_max as usize
    }

    /// Deals with the message at the front of `input`. An error means: drop the connection.
    pub fn step(&mut self, input: &[u8], exports: &dyn Exports) -> Result<Step> {
        let Some(client_flags) = self.client_flags else {
            let Some(bytes) = input.first_chunk::<CLIENT_FLAGS_LEN>() else {
                return Ok(Step::NeedBytes(CLIENT_FLAGS_LEN));
            };
            self.client_flags = Some(decode_client_flags(*bytes)?);
            return Ok(Step::Answer { consumed: CLIENT_FLAGS_LEN, send: Vec::new(), next: Next::Continue });
        };
        let Some(header) = input.first_chunk::<OPTION_HEADER_LEN>() else {
            return Ok(Step::NeedBytes(OPTION_HEADER_LEN));
        };
        let header = OptionHeader::decode(header)?;
        if self.options == self.limits.options_max {
            bail!(Protocol, "handshake: more than {} options", self.limits.options_max);
        }
        if header.len > self.limits.option_data_bytes_max {
            let max = self.limits.option_data_bytes_max;
            bail!(Protocol, "handshake: option {} with {} bytes of data, {max} are allowed", header.option, header.len);
        }
        let consumed = OPTION_HEADER_LEN + header.len as usize;
        let Some(data) = input.get(OPTION_HEADER_LEN..consumed) else {
            return Ok(Step::NeedBytes(consumed));
        };
        self.options += 1;
        let (send, next) = self.option(header.option, data, client_flags, exports)?;
        Ok(Step::Answer { consumed, send, next })
    }

    fn option(
        &mut self,
        code: OptionCode,
        data: &[u8],
        client_flags: ClientFlags,
        exports: &dyn Exports,
    ) -> Result<(Vec<u8>, Next)> {
        // A failed SET_META_CONTEXT, too, replaces what was selected before.
        if code == OptionCode::SET_META_CONTEXT {
            self.selected = None;
        }
        let mut replies = Vec::new();
        let mut next = Next::Continue;
        match ClientOption::decode(code, data) {
            Ok(ClientOption::ExportName(name)) => {
                let Some(session) = self.session(&name, exports) else {
                    bail!(NotFound, "handshake: no export '{}'", name.escape_debug());
                };
                // The one option without a reply header.
                let mut send = self.export_info(&session.info).encode().to_vec();
                if !client_flags.contains(ClientFlags::NO_ZEROES) {
                    send.resize(send.len() + EXPORT_NAME_PADDING, 0);
                }
                return Ok((send, Next::Transmission(session)));
            }
            Ok(ClientOption::Abort) => {
                replies.push(OptionReply::Ack);
                next = Next::Close;
            }
            Ok(ClientOption::List) => {
                for info in exports.list() {
                    replies.push(OptionReply::Server { description: description(&info), name: info.name });
                }
                replies.push(OptionReply::Ack);
            }
            Ok(ClientOption::Info(request)) => {
                self.info(&request, exports, &mut replies);
            }
            Ok(ClientOption::Go(request)) => {
                if let Some(session) = self.info(&request, exports, &mut replies) {
                    next = Next::Transmission(session);
                }
            }
            Ok(ClientOption::StructuredReply) => {
                self.structured = true;
                replies.push(OptionReply::Ack);
            }
            Ok(ClientOption::ListMetaContext(request)) => self.list_contexts(&request, exports, &mut replies),
            Ok(ClientOption::SetMetaContext(request)) => self.set_contexts(&request, exports, &mut replies),
            Ok(ClientOption::Other(code)) => {
                replies
                    .push(OptionReply::error(OptionReplyType::ERR_UNSUP, &format!("option {code} is not supported")));
            }
            // There is no way to refuse this one.
            Err(error) if code == OptionCode::EXPORT_NAME => return Err(error),
            Err(error) => replies.push(OptionReply::error(OptionReplyType::ERR_INVALID, &error.to_string())),
        }
        let mut send = Vec::new();
        for reply in &replies {
            reply.encode(code, &mut send);
        }
        Ok((send, next))
    }

    fn session(&self, name: &str, exports: &dyn Exports) -> Option<Session> {
        let volume = exports.find(name)?;
        let info = volume.info();
        let contexts = match &self.selected {
            Some((selected, contexts)) if *selected == info.name => *contexts,
            _ => Contexts::empty(),
        };
        Some(Session { volume, info, structured: self.structured, contexts })
    }

    fn export_info(&self, info: &VolumeInfo) -> ExportInfo {
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::CAN_MULTI_CONN;
        flags.set(TransmissionFlags::SEND_DF, self.structured);
        ExportInfo { size: info.size, flags }
    }

    /// The block sizes advertised: any alignment is served, `preferred_block` is fast.
    fn block_sizes(&self, info: &VolumeInfo) -> BlockSizes {
        let payload_max = self.limits.payload_bytes_max;
        let preferred = info.preferred_block.clamp(512, payload_max.max(512));
        BlockSizes { minimum: 1, preferred, payload_max }
    }

    /// Answers INFO and GO; the session when the export exists.
    fn info(&self, request: &InfoRequest, exports: &dyn Exports, replies: &mut Vec<OptionReply>) -> Option<Session> {
        let Some(session) = self.session(&request.name, exports) else {
            replies.push(unknown_export(&request.name));
            return None;
        };
        let info = &session.info;
        replies.push(OptionReply::Info(Info::Export(self.export_info(info))));
        for (wanted, answer) in [
            (InfoType::NAME, Info::Name(info.name.clone())),
            (InfoType::DESCRIPTION, Info::Description(description(info))),
            (InfoType::BLOCK_SIZE, Info::BlockSize(self.block_sizes(info))),
        ] {
            if request.wanted.contains(&wanted) {
                replies.push(OptionReply::Info(answer));
            }
        }
        replies.push(OptionReply::Ack);
        Some(session)
    }

    fn list_contexts(&self, request: &MetaContextRequest, exports: &dyn Exports, replies: &mut Vec<OptionReply>) {
        if !self.structured {
            replies.push(needs_structured());
            return;
        }
        if exports.find(&request.name).is_none() {
            replies.push(unknown_export(&request.name));
            return;
        }
        let contexts = match request.queries.as_slice() {
            [] => Contexts::all(),
            queries => queries.iter().map(|query| Contexts::matching(query, true)).collect(),
        };
        // The id is reserved in a list.
        replies.extend(contexts.iter().map(|c| OptionReply::MetaContext { id: 0, name: c.name().to_owned() }));
        replies.push(OptionReply::Ack);
    }

    fn set_contexts(&mut self, request: &MetaContextRequest, exports: &dyn Exports, replies: &mut Vec<OptionReply>) {
        if !self.structured {
            replies.push(needs_structured());
            return;
        }
        let Some(volume) = exports.find(&request.name) else {
            replies.push(unknown_export(&request.name));
            return;
        };
        let contexts: Contexts = request.queries.iter().map(|query| Contexts::matching(query, false)).collect();
        self.selected = Some((volume.info().name, contexts));
        replies.extend(contexts.iter().map(|c| OptionReply::MetaContext { id: c.id(), name: c.name().to_owned() }));
        replies.push(OptionReply::Ack);
    }
}

fn description(info: &VolumeInfo) -> String {
    format!("hydrant clone, {}", ByteSize(info.size))
}

fn unknown_export(name: &str) -> OptionReply {
    debug_assert!(name.len() <= STRING_MAX);
    OptionReply::error(OptionReplyType::ERR_UNKNOWN, &format!("no export '{name}'"))
}

fn needs_structured() -> OptionReply {
    OptionReply::error(OptionReplyType::ERR_INVALID, "metadata contexts need structured replies")
}
