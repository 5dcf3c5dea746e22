//! The NBD server: everything that a client can send, through the machines that the connections run on.
//!
//! The first byte says how the client's stream comes about: as it is in the input, or built from well-formed messages with
//! lies in some places. The stream then goes through handshake, admission and replies just as a connection drives them.
//! Properties:
//! * what the machine does with a message does not depend on what has arrived behind it;
//! * it asks for bytes within its limit, always makes progress, and sends nothing that a client can't parse;
//! * a message that was understood encodes to the same bytes;
//! * no request reaches the volume that is not inside it and within the limits, and every other one is answered, with its
//!   cookie, or ends the connection.

use super::input::{Input, one_line};
use super::meter::Bound;
use bytes::Bytes;
use hydrant::error::Result;
use hydrant::io_frontend::nbd::admit::{Terms, Verdict, admit};
use hydrant::io_frontend::nbd::handshake::{Handshake, Next, Session, Step};
use hydrant::io_frontend::nbd::proto::*;
use hydrant::io_frontend::nbd::reply::{Batch, Outcome};
use hydrant::io_frontend::nbd::{CONTEXT_HYDRATED, Exports, Limits};
use hydrant::io_frontend::request::{
    Allocation, Completion, Extent, LocalBoxFuture, Request, StatusExtents, Volume, VolumeInfo,
};
use hydrant::units::ByteRange;
use std::rc::Rc;

/// Data of a reply is shared, a reply's own bytes are of the order of the request's.
pub const BOUND: Bound = Bound { base: 1 << 20, per_byte: 64 };

pub const SIZE: u64 = (1 << 30) + 777;
/// What the model reads, over and over.
static CONTENT: [u8; 64 << 10] = [0x5a; 64 << 10];
/// Answers of a handshake to one option, in bytes: descriptions of three exports, or an error of the protocol's length.
const OPTION_ANSWER_MAX: usize = 16 << 10;

/// A volume that has no content to speak of.
pub struct Model {
    name: &'static str,
}

impl Model {
    pub fn answer(&self, request: Request) -> Result<Completion> {
        Ok(match request {
            Request::Read(range) => {
                let whole = range.len() / CONTENT.len() as u64;
                let mut parts = vec![Bytes::from_static(&CONTENT); whole as usize];
                parts.push(Bytes::from_static(&CONTENT[..(range.len() % CONTENT.len() as u64) as usize]));
                Completion::Data(parts)
            }
            Request::Status(range) => {
                let half = range.len().div_ceil(2);
                let lens = [half, range.len() - half];
                let lens = || lens.into_iter().filter(|len| *len > 0).enumerate();
                Completion::Status(StatusExtents {
                    allocation: lens()
                        .map(|(i, len)| Extent { len, state: if i == 0 { Allocation::DATA } else { Allocation::HOLE } })
                        .collect(),
                    hydrated: lens().map(|(i, len)| Extent { len, state: i == 0 }).collect(),
                })
            }
            _ => Completion::Done,
        })
    }
}

impl Volume for Model {
    fn info(&self) -> VolumeInfo {
        VolumeInfo { name: self.name.into(), size: SIZE, preferred_block: 65536 }
    }
    fn submit(self: Rc<Self>, request: Request) -> LocalBoxFuture<'static, Result<Completion>> {
        Box::pin(std::future::ready(self.answer(request)))
    }
}

pub struct Models;

impl Exports for Models {
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>> {
        let name =
            ["disk", "other", "ä"].into_iter().find(|known| *known == name || (name.is_empty() && *known == "disk"))?;
        Some(Rc::new(Model { name }))
    }
    fn list(&self) -> Vec<VolumeInfo> {
        ["disk", "other", "ä"].into_iter().map(|name| Model { name }.info()).collect()
    }
}

pub fn target(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let stream = if how & 1 == 0 { input.0.to_vec() } else { client(&mut input) };
    let (mut whole, mut bytewise) = (Handshake::new(Limits::default()), Handshake::new(Limits::default()));
    let mut rest = &stream[..];
    let session = loop {
        match next_message(&mut whole, &mut bytewise, &mut rest) {
            Some(Next::Continue) => {}
            Some(Next::Transmission(session)) => break session,
            Some(Next::Close) | None => return,
        }
    };
    transmission(&session, rest);
}

/// Lets both machines take the next message off the front: one that sees all of the stream, one that sees just what it
/// asked for. `None`: the connection has ended.
fn next_message(whole: &mut Handshake, bytewise: &mut Handshake, rest: &mut &[u8]) -> Option<Next> {
    let mut seen = 0;
    let careful = loop {
        match bytewise.step(&rest[..seen], &Models) {
            Ok(Step::NeedBytes(need)) => {
                assert!(need > seen, "{need} bytes are asked for, {seen} were there");
                assert!(need <= Handshake::input_max(&Limits::default()), "{need} bytes are asked for");
                if need > rest.len() {
                    break None;
                }
                seen = need;
            }
            other => break Some(other),
        }
    };
    match (whole.step(rest, &Models), careful) {
        (Ok(Step::NeedBytes(_)), None) => None,
        (Err(error), Some(Err(other))) => {
            assert_eq!(error.to_string(), other.to_string());
            one_line("handshake", &error.to_string());
            None
        }
        (
            Ok(Step::Answer { consumed, send, next }),
            Some(Ok(Step::Answer { consumed: other, send: as_sent, next: _ })),
        ) => {
            assert!(consumed > 0 && consumed == other && consumed == seen, "{consumed} and {other} of {seen} bytes");
            assert_eq!(send, as_sent);
            assert!(send.len() <= OPTION_ANSWER_MAX, "an answer of {} bytes", send.len());
            answer_is_well_formed(&rest[..consumed], &send, &next);
            *rest = &rest[consumed..];
            Some(next)
        }
        _ => panic!("what a message means depends on what follows it"),
    }
}

/// A client understands the answer to the message, and the message encodes to what it was.
fn answer_is_well_formed(message: &[u8], send: &[u8], next: &Next) {
    let Some(header) = message.first_chunk::<OPTION_HEADER_LEN>() else {
        // The client's flags: no answer.
        assert!(send.is_empty());
        return;
    };
    let code = OptionHeader::decode(header).expect("the machine took it").option;
    let data = &message[OPTION_HEADER_LEN..];
    if let Ok(option) = ClientOption::decode(code, data)
        && !matches!(option, ClientOption::Abort | ClientOption::Other(_))
    {
        assert_eq!(option.encode(), message, "{code}");
    }
    if code == OptionCode::EXPORT_NAME {
        let info = send.first_chunk().map(ExportInfo::decode).expect("size and flags").expect("they are valid");
        assert_eq!(info.size, SIZE);
        let padding = &send[EXPORT_NAME_REPLY_LEN..];
        assert!([0, EXPORT_NAME_PADDING].contains(&padding.len()) && padding.iter().all(|byte| *byte == 0));
        return;
    }
    let mut rest = send;
    loop {
        let header =
            OptionReplyHeader::decode(rest.first_chunk().expect("a whole reply")).expect("the magic of a reply");
        assert_eq!(header.option, code);
        let (data, more) = rest[OPTION_REPLY_HEADER_LEN..].split_at(header.len as usize);
        let reply = OptionReply::decode(header.reply, data).unwrap_or_else(|error| panic!("{code}: {error}"));
        let mut again = Vec::new();
        reply.encode(code, &mut again);
        assert_eq!(again, rest[..OPTION_REPLY_HEADER_LEN + data.len()]);
        rest = more;
        if reply.is_final() {
            let goes_on = matches!(next, Next::Transmission(_));
            assert!(!goes_on || matches!(reply, OptionReply::Ack), "transmission after a refusal");
            break;
        }
    }
    assert!(rest.is_empty(), "{} bytes behind the final reply", rest.len());
}

fn transmission(session: &Session, mut rest: &[u8]) {
    let limits = Limits::default();
    let terms = Terms { size: session.info.size, structured: session.structured, contexts: session.contexts };
    assert!(terms.structured || terms.contexts.is_empty(), "contexts without structured replies");
    let model = Model { name: "disk" };
    while let Some(bytes) = rest.first_chunk::<REQUEST_LEN>() {
        rest = &rest[REQUEST_LEN..];
        let header = match RequestHeader::decode(bytes) {
            Ok(header) => header,
            Err(error) => return one_line("request", &error.to_string()),
        };
        assert_eq!(header.encode(), *bytes);
        let verdict = match admit(&header, &terms, &limits) {
            Ok(verdict) => verdict,
            Err(error) => return one_line("request", &error.to_string()),
        };
        let outcome = match verdict {
            Verdict::Disconnect => return,
            Verdict::Nothing => {
                assert!(header.len == 0 && header.command != Command::BLOCK_STATUS);
                Outcome::Done
            }
            Verdict::Refuse { error, why, payload } => {
                assert_eq!(payload, if header.command == Command::WRITE { header.len } else { 0 });
                assert!(payload <= limits.discard_bytes_max.max(limits.payload_bytes_max));
                one_line("refusal", &why);
                let Some(after) = rest.get(payload as usize..) else { return };
                rest = after;
                Outcome::Error { error, message: why }
            }
            Verdict::Write { offset, len, .. } => {
                assert!(header.command == Command::WRITE && len == header.len && len <= limits.payload_bytes_max);
                inside(ByteRange::new(offset, u64::from(len)));
                // A payload that does not come whole is never written.
                let Some(after) = rest.get(len as usize..) else { return };
                rest = after;
                Outcome::of(Ok(Completion::Done), &header)
            }
            Verdict::Submit(request) => {
                match &request {
                    Request::Flush => {}
                    Request::Read(range) => {
                        assert!(range.len() <= u64::from(limits.payload_bytes_max));
                        inside(Some(*range));
                    }
                    Request::Cache(range) | Request::Status(range) => inside(Some(*range)),
                    Request::Trim { range, .. } | Request::WriteZeroes { range, .. } => inside(Some(*range)),
                    Request::Write { .. } => panic!("a write without its payload"),
                }
                let outcome = Outcome::of(model.answer(request), &header);
                assert!(!matches!(outcome, Outcome::Error { .. }), "{outcome:?}");
                outcome
            }
        };
        reply_is_well_formed(&header, outcome, &terms);
    }
}

fn inside(range: Option<ByteRange>) {
    let range = range.expect("an empty request reached the volume");
    assert!(range.end() <= SIZE, "{range} reached the volume");
}

/// What the reply is, a client finds again in its bytes.
fn reply_is_well_formed(header: &RequestHeader, outcome: Outcome, terms: &Terms) {
    let mut batch = Batch::default();
    let is_error = matches!(outcome, Outcome::Error { .. });
    batch.push(header, outcome, terms);
    let promised = batch.len();
    let parts = batch.into_parts();
    assert_eq!(promised, parts.iter().map(Bytes::len).sum::<usize>());
    // The first part has the headers; that of data is behind it.
    let mut rest = &parts[0][..];
    let mut contexts = 0;
    loop {
        let (reply, len) = ReplyHeader::decode(rest).expect("a header").expect("a whole header");
        assert_eq!(reply.cookie(), header.cookie);
        rest = &rest[len..];
        let chunk = match reply {
            ReplyHeader::Simple(reply) => {
                assert!(!terms.structured && reply.error.is_some() == is_error);
                break;
            }
            ReplyHeader::Chunk(chunk) => chunk,
        };
        assert!(terms.structured);
        match chunk.kind {
            ChunkType::OFFSET_DATA => {
                let offset = decode_offset_data_prefix(*rest.first_chunk().expect("an offset"));
                assert_eq!((offset, chunk.len - OFFSET_DATA_PREFIX_LEN as u32), (header.offset, header.len));
                rest = &rest[OFFSET_DATA_PREFIX_LEN..];
                assert_eq!(promised, CHUNK_HEADER_LEN + chunk.len as usize);
            }
            ChunkType::BLOCK_STATUS => {
                let (payload, more) = rest.split_at(chunk.len as usize);
                let (_, descriptors) = decode_block_status(payload).expect("block status");
                let covered: u64 = descriptors.iter().map(|descriptor| u64::from(descriptor.len)).sum();
                assert!(covered <= u64::from(header.len));
                assert!(header.flags & CommandFlags::REQ_ONE.bits() == 0 || descriptors.len() == 1);
                contexts += 1;
                rest = more;
            }
            ChunkType::NONE => assert!(!is_error),
            kind => {
                assert!(is_error && kind == ChunkType::ERROR, "{kind}");
                let (payload, more) = rest.split_at(chunk.len as usize);
                decode_error_chunk(kind, payload).expect("an error chunk");
                rest = more;
            }
        }
        if chunk.is_done() {
            break;
        }
    }
    assert!(rest.is_empty(), "{} bytes behind the last chunk", rest.len());
    let asked = header.command == Command::BLOCK_STATUS && !is_error;
    assert_eq!(contexts, if asked { terms.contexts.iter().count() } else { 0 });
}

/// A client's stream from decisions of the fuzzer: right in most places, so that it comes far.
fn client(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.u8();
    let mut stream = match how & 3 {
        3 => input.array::<4>().to_vec(),
        flags => encode_client_flags(ClientFlags::from_bits_truncate(u32::from(flags | 1))).to_vec(),
    };
    for _ in 0..usize::from(how >> 2) {
        let (message, ends) = option(input);
        stream.extend(message);
        if ends || input.is_empty() {
            break;
        }
    }
    while !input.is_empty() && stream.len() < 1 << 20 {
        request(input, &mut stream);
    }
    stream
}

fn text(input: &mut Input<'_>) -> String {
    match input.u8() % 8 {
        0 => String::new(),
        1 => "disk".into(),
        2 => "other".into(),
        3 => CONTEXT_ALLOCATION.into(),
        4 => CONTEXT_HYDRATED.into(),
        5 => input.pick(&["base:", "hydrant:", "ä", "a\nb", ":", "qemu:dirty-bitmap:x"]).into(),
        6 => "x".repeat(usize::from(input.u16()).min(STRING_MAX)),
        _ => String::from_utf8_lossy(input.piece()).into_owned(),
    }
}

/// An option, and whether it is to be the last one.
fn option(input: &mut Input<'_>) -> (Vec<u8>, bool) {
    let kind = input.u8();
    let wanted = |input: &mut Input<'_>| {
        let count = input.u8() % 6;
        (0..count).map(|_| InfoType(u16::from(input.u8() % 6))).collect()
    };
    let queries = |input: &mut Input<'_>| {
        let count = input.u8() % 6;
        (0..count).map(|_| text(input)).collect()
    };
    let option = match kind % 10 {
        0 => ClientOption::ExportName(text(input)),
        1 => ClientOption::Abort,
        2 => ClientOption::List,
        3 => ClientOption::Info(InfoRequest { name: text(input), wanted: wanted(input) }),
        4 | 5 => ClientOption::Go(InfoRequest { name: text(input), wanted: wanted(input) }),
        6 => ClientOption::StructuredReply,
        7 => ClientOption::ListMetaContext(MetaContextRequest { name: text(input), queries: queries(input) }),
        8 => ClientOption::SetMetaContext(MetaContextRequest { name: text(input), queries: queries(input) }),
        _ => ClientOption::Other(OptionCode(input.number(11) as u32)),
    };
    let ends = matches!(option, ClientOption::ExportName(_) | ClientOption::Go(_) | ClientOption::Abort);
    let mut message = option.encode();
    match kind >> 5 {
        // Lies: about the length of the data, about what is in it, about what it is.
        5 => {
            let len = input.number(message.len() as u64) as u32;
            message[12..16].copy_from_slice(&len.to_be_bytes());
        }
        6 if message.len() > OPTION_HEADER_LEN => {
            let at = OPTION_HEADER_LEN + usize::from(input.u8()) % (message.len() - OPTION_HEADER_LEN);
            message[at] = input.u8();
        }
        7 => message[8..12].copy_from_slice(&(input.number(8) as u32).to_be_bytes()),
        _ => {}
    }
    (message, ends)
}

fn request(input: &mut Input<'_>, stream: &mut Vec<u8>) {
    let kind = input.u8();
    let flags = input.u8();
    let flags = if flags < 0x40 { u16::from(flags) } else { u16::from(flags) << 8 };
    let command = if kind & 0x80 == 0 { Command(u16::from(kind & 7)) } else { Command(input.number(8) as u16) };
    let (offset, len) = match kind & 0x10 {
        0 => (input.number(SIZE), input.number(512) as u32),
        _ => (u64::from(input.u16()) * 512, u32::from(input.u8())),
    };
    let cookie = input.number(0);
    stream.extend(RequestHeader { flags, command, cookie, offset, len }.encode());
    if command == Command::WRITE {
        // All of a payload, or none of a large one: what comes then is out of step.
        let len = if kind & 0x20 == 0 { len.min(100_000) } else { u32::from(input.u8()) };
        stream.resize(stream.len() + len as usize, kind);
    }
}
