//! Servers that break the protocol: the connection ends, the request goes to the next one, nothing else happens.

use super::servers::{Random, Scripted, receive, send};
use super::*;
use crate::error::ErrorKind;
use crate::io_frontend::nbd::proto::*;
use std::io;
use std::os::unix::net::UnixStream;

const SIZE: u64 = 1 << 20;
const CONTEXT: u32 = 42;

fn truth(offset: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| (offset.wrapping_add(i) / 3) as u8).collect()
}

/// How the scripted server negotiates.
#[derive(Clone, Copy)]
struct Terms {
    structured: bool,
    info: ExportInfo,
    sizes: BlockSizes,
}

const TERMS: Terms = Terms {
    structured: true,
    info: ExportInfo { size: SIZE, flags: TransmissionFlags::HAS_FLAGS },
    sizes: BlockSizes::DEFAULT,
};
const SIMPLE: Terms = Terms { structured: false, ..TERMS };

fn handshake(stream: &mut UnixStream, terms: Terms) -> io::Result<()> {
    send(stream, encode_greeting(HandshakeFlags::all()))?;
    receive::<CLIENT_FLAGS_LEN>(stream)?;
    loop {
        let header = OptionHeader::decode(&receive(stream)?).unwrap();
        let mut data = vec![0; header.len as usize];
        io::Read::read_exact(stream, &mut data)?;
        let replies = match header.option {
            OptionCode::STRUCTURED_REPLY if terms.structured => vec![OptionReply::Ack],
            OptionCode::SET_META_CONTEXT => {
                vec![OptionReply::MetaContext { id: CONTEXT, name: CONTEXT_ALLOCATION.into() }, OptionReply::Ack]
            }
            OptionCode::GO => vec![
                OptionReply::Info(Info::Name("ignored".into())),
                OptionReply::Info(Info::Export(terms.info)),
                OptionReply::Info(Info::BlockSize(terms.sizes)),
                OptionReply::Ack,
            ],
            _ => vec![OptionReply::error(OptionReplyType::ERR_UNSUP, "")],
        };
        let mut out = Vec::new();
        replies.iter().for_each(|reply| reply.encode(header.option, &mut out));
        send(stream, out)?;
        if header.option == OptionCode::GO {
            return Ok(());
        }
    }
}

fn next_request(stream: &mut UnixStream) -> io::Result<RequestHeader> {
    Ok(RequestHeader::decode(&receive(stream)?).unwrap())
}

fn data(flags: ChunkFlags, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut out = encode_offset_data_head(flags, cookie, offset, len as u32).to_vec();
    out.extend(truth(offset, len));
    out
}

fn chunk(kind: ChunkType, cookie: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = ChunkHeader { flags: ChunkFlags::DONE, kind, cookie, len }.encode().to_vec();
    out.extend_from_slice(payload);
    out
}

fn simple(error: Option<ErrorCode>, cookie: u64, payload: &[u8]) -> Vec<u8> {
    [SimpleReply { error, cookie }.encode().as_slice(), payload].concat()
}

/// A right answer.
fn honest(request: RequestHeader, structured: bool) -> Vec<u8> {
    let (cookie, offset, len) = (request.cookie, request.offset, u64::from(request.len));
    match (request.command, structured) {
        (Command::READ, true) => data(ChunkFlags::DONE, cookie, offset, len),
        (Command::READ, false) => simple(None, cookie, &truth(offset, len)),
        _ => encode_block_status_chunk(
            ChunkFlags::DONE,
            cookie,
            CONTEXT,
            &[StatusDescriptor { len: len as u32, flags: 0 }],
        ),
    }
}

/// A server whose first connection answers by `answer` and then hangs up or waits; later ones are honest.
fn server(terms: Terms, hang_up: bool, answer: impl Fn(RequestHeader) -> Vec<u8> + Send + Sync + 'static) -> Scripted {
    Scripted::new(move |number, mut stream| {
        handshake(&mut stream, terms)?;
        if number == 0 {
            let request = next_request(&mut stream)?;
            send(&mut stream, answer(request))?;
            if hang_up {
                return Ok(());
            }
        }
        loop {
            let request = next_request(&mut stream)?;
            if request.command == Command::DISC {
                return Ok(());
            }
            send(&mut stream, honest(request, terms.structured))?;
        }
    })
}

type Answer = fn(RequestHeader) -> Vec<u8>;
const NO_FLAGS: ChunkFlags = ChunkFlags::empty();
const DONE: ChunkFlags = ChunkFlags::DONE;

/// Of each: terms, the words of the error, what is sent to a read of 1000 bytes at 5000.
const BREACHES: &[(Terms, &str, Answer)] = &[
    (TERMS, "bad magic", |_| vec![7; 64]),
    (TERMS, "never sent", |r| data(DONE, r.cookie + 1, r.offset, 1000)),
    (TERMS, "never sent", |r| simple(Some(ErrorCode::EIO), r.cookie ^ (1 << 63), &[])),
    (TERMS, "simple reply where a structured one", |r| simple(None, r.cookie, &truth(r.offset, 1000))),
    (TERMS, "outside of its request", |r| data(DONE, r.cookie, r.offset - 1, 1000)),
    (TERMS, "outside of its request", |r| data(DONE, r.cookie, r.offset, 1001)),
    (TERMS, "outside of its request", |r| data(DONE, r.cookie, u64::MAX - 10, 1000)),
    (TERMS, "outside of its request", |r| chunk(ChunkType::OFFSET_DATA, r.cookie, u32::MAX, &[0; 8])),
    (TERMS, "repeats bytes", |r| {
        [data(NO_FLAGS, r.cookie, r.offset, 600), data(DONE, r.cookie, r.offset + 599, 401)].concat()
    }),
    (TERMS, "999 of 1000 bytes", |r| data(DONE, r.cookie, r.offset, 999)),
    (TERMS, "0 of 1000 bytes", |r| encode_none_chunk(r.cookie).to_vec()),
    (TERMS, "NONE chunk with 1 bytes", |r| chunk(ChunkType::NONE, r.cookie, 1, &[0])),
    (TERMS, "OFFSET_DATA chunk with 8 bytes", |r| chunk(ChunkType::OFFSET_DATA, r.cookie, 8, &[0; 8])),
    (TERMS, "unknown type 0x7777", |r| chunk(ChunkType(0x7777), r.cookie, 4, &[0; 4])),
    (TERMS, "empty hole", |r| encode_offset_hole_chunk(DONE, r.cookie, OffsetHole { offset: r.offset, len: 0 })),
    (TERMS, "outside of its request", |r| {
        encode_offset_hole_chunk(DONE, r.cookie, OffsetHole { offset: r.offset, len: 1001 })
    }),
    (TERMS, "block status in the reply to a read", |r| {
        encode_block_status_chunk(DONE, r.cookie, CONTEXT, &[StatusDescriptor { len: 1000, flags: 0 }])
    }),
    (TERMS, "are allowed", |r| chunk(ChunkType::ERROR, r.cookie, 1 << 30, &[0, 0, 0, 5, 0, 0])),
    (TERMS, "ends after", |r| chunk(ChunkType::ERROR, r.cookie, 7, &[0, 0, 0, 5, 0, 99, b'x'])),
    (TERMS, "error at offset 6000, outside", |r| {
        chunk(ChunkType::ERROR_OFFSET, r.cookie, 14, &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0x17, 0x70])
    }),
    (TERMS, "shutting down", |r| encode_error_chunk(r.cookie, ErrorCode::ESHUTDOWN, "bye")),
    (SIMPLE, "shutting down", |r| simple(Some(ErrorCode::ESHUTDOWN), r.cookie, &[])),
    (SIMPLE, "which was not agreed on", |r| data(DONE, r.cookie, r.offset, 1000)),
    (SIMPLE, "never sent", |r| simple(None, 0, &truth(r.offset, 1000))),
];

#[test]
fn breaches_end_the_connection_and_the_read_succeeds_on_the_next() {
    on_executor(|env| async move {
        let runs = BREACHES.iter().map(|(terms, words, answer)| {
            let env = &env;
            Box::pin(async move {
                let server = server(*terms, false, answer);
                let source = connect(&server.uri(), quick(), env).await;
                assert_eq!(source.read(range(5000, 1000)).await.unwrap()[..], truth(5000, 1000), "{words}");
                let state = source.state();
                let error = state.last_error.unwrap().to_string();
                assert!(error.contains(words), "'{error}' lacks '{words}'");
                assert_eq!((state.losses, state.reconnects), (1, 1), "{words}");
                source.close().await;
            }) as LocalBoxFuture<'_, ()>
        });
        join_all(runs.collect()).await;
    });
}

#[test]
fn hanging_up_anywhere_in_a_reply() {
    on_executor(|env| async move {
        let env = &env;
        let runs = [1usize, 4, 19, 20, 27, 28, 29, 500, 1027].into_iter().map(|cut| {
            Box::pin(async move {
                let server = server(TERMS, true, move |r| honest(r, true)[..cut].to_vec());
                let source = connect(&server.uri(), quick(), env).await;
                assert_eq!(source.read(range(5000, 1000)).await.unwrap()[..], truth(5000, 1000), "cut at {cut}");
                // More than one when this machine is so busy that the next connection is late.
                assert!(source.state().losses >= 1, "cut at {cut}");
                source.close().await;
            }) as LocalBoxFuture<'_, ()>
        });
        join_all(runs.collect()).await;
    });
}

#[test]
fn a_reply_too_many_does_not_spoil_the_first() {
    on_executor(|env| async move {
        let server = server(TERMS, false, |r| [honest(r, true), honest(r, true)].concat());
        let source = connect(&server.uri(), quick(), &env).await;
        assert_eq!(source.read(range(5000, 1000)).await.unwrap()[..], truth(5000, 1000));
        assert_eq!(source.read(range(6000, 1000)).await.unwrap()[..], truth(6000, 1000));
        assert!(source.state().last_error.unwrap().to_string().contains("never sent"));
        source.close().await;
    });
}

#[test]
fn garbage_after_the_negotiation() {
    on_executor(|env| async move {
        let env = &env;
        let runs = (0..40).map(|seed| {
            Box::pin(async move {
                let server = server(TERMS, seed % 2 == 0, move |request| {
                    let mut random = Random(seed);
                    let mut bytes = honest(request, true);
                    match seed % 4 {
                        // Anything, or an answer with one byte of its headers changed.
                        0 | 1 => bytes.iter_mut().for_each(|b| *b = random.next() as u8),
                        _ => bytes[random.below(28) as usize] ^= 1 + random.below(255) as u8,
                    }
                    bytes
                });
                let source = connect(&server.uri(), quick(), env).await;
                match source.read(range(5000, 1000)).await {
                    Ok(read) => assert_eq!(read[..], truth(5000, 1000), "seed {seed}"),
                    // A changed type may make an error of it.
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "seed {seed}: {error}"),
                }
                source.close().await;
            }) as LocalBoxFuture<'_, ()>
        });
        join_all(runs.collect()).await;
    });
}

#[test]
fn chunks_in_any_order_and_interleaved() {
    on_executor(|env| async move {
        // Waits for two reads, then answers both in small pieces, mixed, the holes among them.
        let server = Scripted::new(|_, mut stream| {
            handshake(&mut stream, TERMS)?;
            let requests = [next_request(&mut stream)?, next_request(&mut stream)?];
            let mut random = Random(9);
            let mut pieces: Vec<(RequestHeader, u64)> =
                requests.iter().flat_map(|r| (0..10).map(|i| (*r, r.offset + i * 10_000))).collect();
            while !pieces.is_empty() {
                let (request, offset) = pieces.swap_remove(random.below(pieces.len() as u64) as usize);
                let piece = match offset == 60_000 || offset == 160_000 {
                    true => {
                        let hole = OffsetHole { offset, len: 10_000 };
                        encode_offset_hole_chunk(NO_FLAGS, request.cookie, hole)
                    }
                    false => data(NO_FLAGS, request.cookie, offset, 10_000),
                };
                send(&mut stream, piece)?;
                if !pieces.iter().any(|(other, _)| other.cookie == request.cookie) {
                    send(&mut stream, encode_none_chunk(request.cookie))?;
                }
            }
            next_request(&mut stream).map(|_| ())
        });
        let source = connect(&server.uri(), quick(), &env).await;
        let reads = [10_000, 110_000].map(|start| {
            let source = &source;
            Box::pin(async move {
                let mut expected = truth(start, 100_000);
                expected[50_000..60_000].fill(0);
                assert!(source.read(range(start, 100_000)).await.unwrap()[..] == expected[..]);
            }) as LocalBoxFuture<'_, ()>
        });
        join_all(reads.into()).await;
        assert_eq!(source.state().losses, 0);
        source.close().await;
    });
}

#[test]
fn errors_of_every_form_fail_the_read_alone() {
    const FORMS: [(Terms, &str, Answer); 5] = [
        (SIMPLE, "the server says EPERM", |r| simple(Some(ErrorCode::EPERM), r.cookie, &[])),
        // Not allowed with structured replies, but what it means is clear.
        (TERMS, "the server says 0x7b", |r| simple(Some(ErrorCode(123)), r.cookie, &[])),
        (TERMS, "the server says ENOSPC (a\\nb)", |r| encode_error_chunk(r.cookie, ErrorCode::ENOSPC, "a\nb")),
        (TERMS, "the server says EIO", |r| chunk(ChunkType((1 << 15) + 77), r.cookie, 8, &[0, 0, 0, 5, 0, 1, b'x', 9])),
        (TERMS, "the server says EIO (sector)", |r| {
            let error = [&[0, 0, 0, 5, 0, 6][..], b"sector", &5999u64.to_be_bytes()].concat();
            let failed = chunk(ChunkType::ERROR_OFFSET, r.cookie, error.len() as u32, &error);
            [data(NO_FLAGS, r.cookie, r.offset, 500), failed].concat()
        }),
    ];
    on_executor(|env| async move {
        for (terms, words, answer) in FORMS {
            let server = server(terms, false, answer);
            let source = connect(&server.uri(), quick(), &env).await;
            let error = source.read(range(5000, 1000)).await.unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EIO));
            assert!(error.to_string().contains(words), "'{error}' lacks '{words}'");
            assert_eq!(source.read(range(5000, 1000)).await.unwrap()[..], truth(5000, 1000));
            assert_eq!(source.state().losses, 0);
            source.close().await;
        }
    });
}

#[test]
fn an_answer_without_end_is_given_up() {
    on_executor(|env| async move {
        // Always something new, never the end of it: silence is not what ends this connection.
        let server = Scripted::new(|number, mut stream| {
            handshake(&mut stream, TERMS)?;
            loop {
                let request = next_request(&mut stream)?;
                let long = "x".repeat(4000);
                let mut endless = encode_error_chunk(request.cookie, ErrorCode::EIO, &long);
                // Its flags: not the last chunk.
                endless[4..6].fill(0);
                if number == 0 {
                    loop {
                        send(&mut stream, &endless)?;
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                send(&mut stream, honest(request, true))?;
            }
        });
        let options = NbdSourceOptions { request_timeout: Duration::from_millis(100), ..quick() };
        let source = connect(&server.uri(), options, &env).await;
        let start = env.now();
        assert_eq!(source.read(range(5000, 1000)).await.unwrap()[..], truth(5000, 1000));
        assert!(env.now() - start < Duration::from_secs(10));
        assert!(source.state().last_error.unwrap().to_string().contains("no answer from the server for 0.1 s"));
        source.close().await;
    });
}

#[test]
fn block_status_that_is_wrong_or_refused() {
    const FORMS: [(u64, Answer); 5] = [
        (1, |r| encode_block_status_chunk(DONE, r.cookie, CONTEXT + 1, &[StatusDescriptor { len: 512, flags: 0 }])),
        (1, |r| encode_none_chunk(r.cookie).to_vec()),
        (1, |r| data(DONE, r.cookie, 0, 512)),
        (1, |r| chunk(ChunkType::BLOCK_STATUS, r.cookie, 12, &[0, 0, 0, CONTEXT as u8, 0, 0, 0, 0, 0, 0, 0, 0])),
        (0, |r| simple(Some(ErrorCode::EINVAL), r.cookie, &[])),
    ];
    on_executor(|env| async move {
        for (losses, answer) in FORMS {
            let server = server(TERMS, false, answer);
            let source = connect(&server.uri(), quick(), &env).await;
            let extents = source.allocation(range(0, SIZE)).await.unwrap();
            assert_eq!(extents, [Extent { len: SIZE, state: Allocation::DATA }]);
            assert_eq!(source.state().losses, losses);
            source.close().await;
        }
        // An extent beyond the request, and beyond the device, is cut; flags that are not known are ignored.
        let server = server(TERMS, false, |r| {
            let extents = [StatusDescriptor { len: 700, flags: 3 }, StatusDescriptor { len: u32::MAX, flags: 0xfe }];
            encode_block_status_chunk(DONE, r.cookie, CONTEXT, &extents)
        });
        let source = connect(&server.uri(), quick(), &env).await;
        let zero = Allocation { hole: false, zero: true };
        let expected = [Extent { len: 700, state: Allocation::HOLE }, Extent { len: SIZE - 700, state: zero }];
        assert_eq!(source.allocation(range(0, SIZE)).await.unwrap(), expected);
        source.close().await;
    });
}

#[test]
fn a_request_that_kills_every_connection_is_given_up() {
    on_executor(|env| async move {
        // Answers every other request, so that the source never counts as lost, and hangs up at offset 7.
        let server = Scripted::new(|_, mut stream| {
            handshake(&mut stream, TERMS)?;
            loop {
                let request = next_request(&mut stream)?;
                if request.offset == 7 {
                    return Ok(());
                }
                send(&mut stream, honest(request, true))?;
            }
        });
        let source = connect(&server.uri(), quick(), &env).await;
        let (poison, done) = (std::cell::Cell::new(None), std::cell::Cell::new(false));
        let bad = async {
            poison.set(source.read(range(7, 1)).await.err());
            done.set(true);
        };
        let good = async {
            while !done.get() {
                let len = 1000;
                assert_eq!(source.read(range(5000, len)).await.unwrap()[..], truth(5000, len));
                env.sleep(Duration::from_millis(5)).await;
            }
        };
        join_all(vec![Box::pin(bad) as LocalBoxFuture<'_, ()>, Box::pin(good)]).await;
        let error = poison.take().unwrap();
        assert_eq!(error.kind(), ErrorKind::SourceLost);
        assert!(error.to_string().contains("10 connections ended while 1 bytes at offset 7"), "{error}");
        source.close().await;
    });
}

#[test]
fn negotiations_that_break_the_protocol() {
    /// Sent after the client's flags, instead of an answer to its first option.
    fn script(bytes: Vec<u8>) -> Scripted {
        Scripted::new(move |_, mut stream| {
            send(&mut stream, encode_greeting(HandshakeFlags::all()))?;
            receive::<{ CLIENT_FLAGS_LEN + OPTION_HEADER_LEN }>(&mut stream)?;
            send(&mut stream, &bytes)?;
            std::thread::sleep(Duration::from_secs(3));
            Ok(())
        })
    }
    fn reply(option: OptionCode, reply: OptionReplyType, len: u32) -> Vec<u8> {
        OptionReplyHeader { option, reply, len }.encode().to_vec()
    }
    fn terms(terms: Terms) -> Scripted {
        server(terms, false, |r| honest(r, true))
    }
    on_executor(|env| async move {
        const FIRST: OptionCode = OptionCode::STRUCTURED_REPLY;
        let mut endless = Vec::new();
        (0..200).for_each(|_| OptionReply::Info(Info::Name("x".into())).encode(FIRST, &mut endless));
        let export = |size, flags| Terms { info: ExportInfo { size, flags }, ..TERMS };
        let sizes =
            |minimum, preferred, payload_max| Terms { sizes: BlockSizes { minimum, preferred, payload_max }, ..TERMS };
        let has = TransmissionFlags::HAS_FLAGS;
        let cases = [
            (script(vec![0; 20]), "bad magic"),
            (script(reply(OptionCode::GO, OptionReplyType::ACK, 0)), "answers option GO instead"),
            (script(reply(FIRST, OptionReplyType::ACK, u32::MAX)), "reply of 4294967295 bytes"),
            (script([reply(FIRST, OptionReplyType::ACK, 1), vec![0]].concat()), "too many"),
            (script(reply(FIRST, OptionReplyType(99), 0)), "unknown type"),
            (script(endless), "more than 64 replies"),
            (terms(export(0, has)), "empty"),
            (terms(export(1 << 63, has)), "more than any device"),
            (terms(export(SIZE, TransmissionFlags::empty())), "HAS_FLAGS"),
            (terms(sizes(0, 4096, 1 << 20)), "break the protocol"),
            (terms(sizes(3, 4096, 1 << 20)), "break the protocol"),
            (terms(sizes(1, 4096, 100)), "break the protocol"),
            (terms(sizes(1 << 31, 1 << 31, u32::MAX)), "break the protocol"),
        ];
        for (server, words) in cases {
            match NbdSource::connect(uri(&server.uri()), quick(), env.clone()).await {
                Ok(_) => panic!("connects, expected: {words}"),
                Err(error) => assert!(error.to_string().contains(words), "'{error}' lacks '{words}'"),
            }
        }
    });
}
