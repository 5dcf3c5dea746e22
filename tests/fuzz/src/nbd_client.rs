//! The NBD client: everything that a server can send, to the client that ships, over a socket.
//!
//! The first byte says how the server's stream comes about: as it is in the input, or a handshake and replies to the
//! requests that the client is going to send, right in most places. Then the stream ends. Properties:
//! * connecting ends, with an error in one line or a source whose size a device can have;
//! * a read gives as many bytes as were asked for, and of a stream that tells no lies about its data, only those that were sent for
//!   their place;
//! * what is told of the allocation begins where it was asked, and ends where it may.

use super::executor;
use super::input::{Input, one_line};
use super::meter::Bound;
use futures_lite::future::or;
use hydrant::env::Env;
use hydrant::io_frontend::nbd::proto::*;
use hydrant::io_frontend::request::LocalBoxFuture;
use hydrant::local::{Notify, join_all};
use hydrant::net::{Listener, Stream};
use hydrant::source::Source;
use hydrant::source::nbd::{NbdSource, NbdSourceOptions, SourceEvent};
use hydrant::source::uri::{NbdAddress, NbdUri};
use hydrant::units::{ByteRange, DEVICE_SIZE_MAX};
use std::cell::Cell;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;

/// Some reads of up to 256 KiB, the buffers to receive them, the longest block status (8 MiB, kept twice, and growing),
/// and the executor, made by the first input.
pub const BOUND: Bound = Bound { base: 48 << 20, per_byte: 1024 };

const CONTEXT: u32 = 42;
/// The most that a server is told of what the client sends.
const REQUESTS_MAX: usize = 1 << 20;
/// How far a stream that is built grows, in bytes.
const STREAM_MAX: usize = 1 << 20;
/// How much data a reply is built with, at most, in bytes.
const CONTENT_MAX: u64 = 300_000;
/// What the client asks for, in this order, as far as the export has it.
const READS: [(u64, u64); 3] = [(5000, 1000), (65536, 262_144), (0, 1)];

/// The part of these bytes that an export of `size` bytes has.
fn inside(size: u64, start: u64, len: u64) -> Option<ByteRange> {
    ByteRange::between(start, start.saturating_add(len).min(size))
}

/// The reads that the client makes of such an export; the first one has cookie 1.
fn reads_of(size: u64) -> Vec<ByteRange> {
    READS.into_iter().filter_map(|(start, len)| inside(size, start, len)).collect()
}

/// Content of the export that a built stream is about; never 0.
fn truth(offset: u64) -> u8 {
    (offset % 251) as u8 + 1
}

pub fn target(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let (stream, is_true) = if how & 1 == 0 { (input.0.to_vec(), false) } else { server(&mut input) };
    executor::run(move |env| converse(env, stream, is_true));
}

async fn converse(env: Rc<dyn Env>, stream: Vec<u8>, is_true: bool) {
    // A socket of its own for each input: nothing of the last one can arrive here.
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let listener = Rc::new(Listener::new(UnixListener::bind(&path).expect("a socket").into()));
    let serving = listener.clone();
    env.spawn(Box::pin(async move {
        let mut stream = Some(stream);
        // Only the first connection is answered.
        while let Ok(fd) = serving.accept().await {
            let Some(bytes) = stream.take() else { continue };
            let socket = std::os::unix::net::UnixStream::from(fd);
            let end = socket.try_clone().expect("a descriptor");
            let socket = Stream::new(socket.into());
            let _ = socket.send(vec![bytes.into()]).await;
            let _ = end.shutdown(std::net::Shutdown::Write);
            executor::receive_all(&socket, REQUESTS_MAX).await;
        }
    }));
    let options = NbdSourceOptions {
        connections: 1,
        connect_timeout: Duration::from_secs(4),
        request_timeout: Duration::from_secs(4),
        source_timeout: Duration::from_secs(4),
        ..NbdSourceOptions::default()
    };
    let uri = NbdUri { address: NbdAddress::Unix(path), export: "disk".into() };
    match NbdSource::connect(uri, options, env).await {
        Ok(source) => ask(source, is_true).await,
        Err(error) => one_line("connect", &error.to_string()),
    }
    listener.close();
}

async fn ask(source: NbdSource, is_true: bool) {
    let info = source.info();
    assert!((1..=DEVICE_SIZE_MAX).contains(&source.size()) && source.size() == info.size);
    assert!(info.block_min.is_power_of_two() && info.read_len_max.is_power_of_two());
    assert!(info.read_len_max >= info.block_min && info.block_preferred.is_power_of_two());
    // Requests that were lost are asked again of a server that is gone: that is the end.
    let (lost, is_lost) = (Rc::new(Notify::default()), Rc::new(Cell::new(false)));
    let (wake, set) = (lost.clone(), is_lost.clone());
    source.on_event(move |event| {
        if let SourceEvent::Lost(error) | SourceEvent::Changed(error) = event {
            one_line("lost", &error.to_string());
        }
        set.set(true);
        wake.notify();
    });
    let mut asked: Vec<LocalBoxFuture<'_, ()>> = Vec::new();
    for range in reads_of(source.size()) {
        let source = &source;
        asked.push(Box::pin(async move {
            match source.read(range).await {
                Ok(data) => {
                    assert_eq!(data.len() as u64, range.len());
                    let is_sent = |(at, byte): (u64, &u8)| *byte == truth(at) || *byte == 0;
                    assert!(!is_true || (range.start()..).zip(&data[..]).all(is_sent), "wrong bytes for {range}");
                }
                Err(error) => one_line("read", &error.to_string()),
            }
        }));
    }
    let asked_of = [(0, DEVICE_SIZE_MAX), (4096, 100_000)];
    for range in asked_of.into_iter().filter_map(|(start, len)| inside(source.size(), start, len)) {
        let source = &source;
        asked.push(Box::pin(async move {
            match source.allocation(range).await {
                Ok(extents) => {
                    assert!(!extents.is_empty() && extents.iter().all(|extent| extent.len > 0));
                    let covered = extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.len));
                    assert!(covered.is_some_and(|covered| covered <= range.len()), "{extents:?} of {range}");
                }
                Err(error) => one_line("allocation", &error.to_string()),
            }
        }));
    }
    let ended = async {
        while !is_lost.get() {
            lost.notified().await;
        }
    };
    or(
        async {
            join_all(asked).await;
        },
        ended,
    )
    .await;
}

/// A server's stream from decisions of the fuzzer, and whether all data in it are what they say they are.
fn server(input: &mut Input<'_>) -> (Vec<u8>, bool) {
    let how = input.u8();
    let mut flags = HandshakeFlags::all();
    flags.set(HandshakeFlags::NO_ZEROES, how & 1 == 0);
    flags.set(HandshakeFlags::FIXED_NEWSTYLE, how & 0x3e != 0x3e);
    let mut out = encode_greeting(flags).to_vec();
    let structured = how & 2 == 0;
    let mut is_true = true;
    let refusal = || OptionReply::error(OptionReplyType::ERR_UNSUP, "no\nnot that");
    let mut answer = |option: OptionCode, mut replies: Vec<OptionReply>, is_taken: bool, input: &mut Input<'_>| {
        if !is_taken {
            replies = vec![refusal()];
        }
        let start = out.len();
        replies.iter().for_each(|reply| reply.encode(option, &mut out));
        let lie = input.u8();
        let at = start + usize::from(input.u8()) % (out.len() - start);
        if lie & 0xf0 == 0xf0 {
            out[at] ^= lie << 3 | 1;
            is_true = false;
        }
    };
    answer(OptionCode::STRUCTURED_REPLY, vec![OptionReply::Ack], structured, input);
    if structured {
        let context = OptionReply::MetaContext { id: CONTEXT, name: CONTEXT_ALLOCATION.into() };
        answer(OptionCode::SET_META_CONTEXT, vec![context, OptionReply::Ack], how & 4 == 0, input);
    }
    let size = input.pick(&[1 << 20, (1 << 20) + 777, 4096, 1, i64::MAX as u64, 1 << 40]);
    let mut flags = TransmissionFlags::HAS_FLAGS;
    flags.set(TransmissionFlags::CAN_MULTI_CONN, how & 0x40 != 0);
    let minimum = input.pick(&[1, 1, 512, 4096, 65536, 3]);
    let payload_max = input.pick(&[PAYLOAD_DEFAULT_MAX, 1 << 20, 65536, u32::MAX]);
    let sizes = BlockSizes { minimum, preferred: input.pick(&[4096, 65536, 512, 1 << 31]), payload_max };
    let mut infos = vec![OptionReply::Info(Info::Export(ExportInfo { size, flags }))];
    if how & 0x80 == 0 {
        infos.push(OptionReply::Info(Info::BlockSize(sizes)));
    }
    infos.resize(infos.len() + usize::from(input.u8() % 70), OptionReply::Info(Info::Other(InfoType(9))));
    infos.push(OptionReply::Ack);
    answer(OptionCode::GO, infos, how & 8 == 0, input);
    if how & 8 != 0 {
        out.extend(ExportInfo { size, flags }.encode());
    }
    // Else the client asks for whole blocks, and a reply that does not say what it is would be of other bytes.
    let is_exact = structured || (how & 0x88 == 0 && minimum == 1);
    let reads = reads_of(size);
    while !input.is_empty() && out.len() < STREAM_MAX {
        is_true &= reply(input, structured, &reads, &mut out) && is_exact;
    }
    (out, is_true)
}

/// A reply, or a part of one, to one of the requests; returns whether its data are what they say they are.
fn reply(input: &mut Input<'_>, structured: bool, reads: &[ByteRange], out: &mut Vec<u8>) -> bool {
    let kind = input.u8();
    let which = input.u8();
    let request = usize::from(which & 3);
    let cookie = if which & 0xc0 == 0xc0 { input.number(4) } else { request as u64 + 1 };
    // The requests after the reads are for block status.
    let (start, len) = reads.get(request).map_or((0, 1 << 20), |range| (range.start(), range.len()));
    let asked = (start, len);
    let done = if which & 4 == 0 { ChunkFlags::DONE } else { ChunkFlags::empty() };
    // All of the request, or a part, or too much.
    let (offset, len) = match which & 0x30 {
        0x00 => (start, len),
        0x10 => (start + len / 8 * u64::from(input.u8() % 9), len / 8),
        _ => (start.wrapping_add(input.number(len)), input.number(len)),
    };
    let content = |len: u64| (0..len.min(CONTENT_MAX)).map(|i| truth(offset.wrapping_add(i)));
    let errors = [ErrorCode::EIO, ErrorCode::ESHUTDOWN, ErrorCode::EOVERFLOW, ErrorCode(0), ErrorCode(77)];
    match kind & 7 {
        0 | 1 if structured && len > 0 => {
            out.extend(encode_offset_data_head(done, cookie, offset, len.min(u64::from(u32::MAX - 8)) as u32));
            out.extend(content(len));
            return len <= CONTENT_MAX;
        }
        2 if structured => {
            out.extend(encode_offset_hole_chunk(done, cookie, OffsetHole { offset, len: len as u32 }));
        }
        3 if structured => {
            let count = usize::from(input.u8()) % 20 + 1;
            let extents: Vec<_> = (0..count)
                .map(|_| StatusDescriptor { len: input.number(65536) as u32, flags: u32::from(input.u8() % 5) })
                .collect();
            let repeat = if kind & 0x80 == 0 { 1 } else { usize::from(input.u8()) * 8 + 1 };
            let context = if kind & 0x40 == 0 { CONTEXT } else { input.number(42) as u32 };
            out.extend(encode_block_status_chunk(done, cookie, context, &extents.repeat(repeat)));
        }
        4 if structured => {
            let text = "x\n".repeat(usize::from(input.u8()));
            out.extend(encode_error_chunk(cookie, ErrorCode(input.pick(&errors).0.max(1)), &text));
        }
        5 => {
            // Any header, and a little behind it.
            let flags = ChunkFlags::from_bits_truncate(u16::from(kind >> 7));
            let kind = ChunkType(input.pick(&[0, 1, 2, 5, 6, 0x8001, 0x8002, 0x8003, 0xffff]));
            let len = input.number(12) as u32;
            out.extend(ChunkHeader { flags, kind, cookie, len }.encode());
            out.extend(input.piece());
            return false;
        }
        6 => {
            out.extend(input.piece());
            return false;
        }
        _ => {
            let error = Some(input.pick(&errors)).filter(|_| kind & 0x80 != 0 || structured && kind & 0x40 == 0);
            out.extend(SimpleReply { error, cookie }.encode());
            if error == Some(ErrorCode(0)) {
                // That is success: what follows counts as data.
                return false;
            }
            if error.is_none() {
                out.extend(content(len));
                // It does not say what it is: what was asked for.
                return (offset, len) == asked && len <= CONTENT_MAX && cookie == request as u64 + 1;
            }
        }
    }
    true
}
