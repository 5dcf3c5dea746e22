//! What a client decodes is what the volume answered.

use super::super::proto::{
    ChunkHeader, ChunkType, Command, ReplyHeader, decode_block_status, decode_error_chunk, decode_offset_data_prefix,
};
use super::*;
use crate::io_frontend::request::{Allocation, push_extent};
use proptest::collection::vec;
use proptest::prelude::*;

fn header(command: Command, flags: u16, offset: u64, len: u32, cookie: u64) -> RequestHeader {
    RequestHeader { flags, command, cookie, offset, len }
}

fn terms(structured: bool, contexts: Contexts) -> Terms {
    Terms { size: 1 << 40, structured, contexts }
}

fn outcomes() -> impl Strategy<Value = (RequestHeader, Outcome)> {
    let data = vec(vec(any::<u8>(), 0..50).prop_map(Bytes::from), 0..4).prop_filter_map("empty", |parts| {
        let len: usize = parts.iter().map(Bytes::len).sum();
        (len > 0).then_some((parts, len))
    });
    let error = (1u32..200, "[a-z ]{0,20}");
    prop_oneof![
        Just((header(Command::FLUSH, 0, 0, 0, 0), Outcome::Done)),
        (data, any::<u32>()).prop_map(|((parts, len), offset)| {
            (header(Command::READ, 0, u64::from(offset), len as u32, 0), Outcome::Data(parts))
        }),
        error.prop_map(|(error, message)| {
            (header(Command::WRITE, 0, 0, 1, 0), Outcome::Error { error: ErrorCode(error), message })
        }),
    ]
}

/// The chunk at the front, its payload, and the rest.
fn chunk(bytes: &[u8]) -> (ChunkHeader, &[u8], &[u8]) {
    match ReplyHeader::decode(bytes).unwrap() {
        Some((ReplyHeader::Chunk(chunk), len)) => {
            let (payload, rest) = bytes[len..].split_at(chunk.len as usize);
            (chunk, payload, rest)
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn batches_decode(replies in vec(outcomes(), 1..10), structured: bool) {
        let terms = terms(structured, Contexts::empty());
        let mut batch = Batch::default();
        for (cookie, (header, outcome)) in replies.iter().enumerate() {
            batch.push(&RequestHeader { cookie: cookie as u64, ..*header }, outcome.clone(), &terms);
        }
        let len = batch.len();
        let bytes = batch.into_parts().concat();
        prop_assert_eq!(len, bytes.len());
        let mut rest = &bytes[..];
        for (cookie, (header, outcome)) in replies.iter().enumerate() {
            let (reply, head_len) = ReplyHeader::decode(rest).unwrap().unwrap();
            prop_assert_eq!(reply.cookie(), cookie as u64);
            match (reply, outcome) {
                (ReplyHeader::Simple(simple), _) => {
                    prop_assert!(!structured);
                    rest = &rest[head_len..];
                    match outcome {
                        Outcome::Error { error, .. } => prop_assert_eq!(simple.error, Some(*error)),
                        Outcome::Data(parts) => {
                            prop_assert_eq!(simple.error, None);
                            let (data, after) = rest.split_at(header.len as usize);
                            prop_assert_eq!(data, parts.concat());
                            rest = after;
                        }
                        _ => prop_assert_eq!(simple.error, None),
                    }
                }
                (ReplyHeader::Chunk(_), _) => {
                    prop_assert!(structured);
                    let (head, payload, after) = chunk(rest);
                    prop_assert!(head.is_done(), "one chunk answers everything but block status");
                    match outcome {
                        Outcome::Done => prop_assert_eq!(head.kind, ChunkType::NONE),
                        Outcome::Data(parts) => {
                            prop_assert_eq!(head.kind, ChunkType::OFFSET_DATA);
                            prop_assert_eq!(decode_offset_data_prefix(*payload.first_chunk().unwrap()), header.offset);
                            prop_assert_eq!(&payload[8..], parts.concat());
                        }
                        Outcome::Error { error, message } => {
                            let decoded = decode_error_chunk(head.kind, payload).unwrap();
                            prop_assert_eq!((decoded.error, &decoded.message), (*error, message));
                        }
                        Outcome::Status(_) => unreachable!(),
                    }
                    rest = after;
                }
            }
        }
        prop_assert!(rest.is_empty());
    }

    /// The protocol's rules for a block status reply, whatever the volume says.
    #[test]
    fn block_status(
        allocation in vec((1u64..1 << 33, any::<bool>(), any::<bool>()), 1..20),
        hydrated in vec((1u64..5000, any::<bool>()), 1..20),
        asked in 1u32..,
        one: bool,
        contexts in 1u8..4,
    ) {
        let contexts = Contexts::from_bits_truncate(contexts);
        let mut status = StatusExtents::default();
        for (len, hole, zero) in allocation {
            push_extent(&mut status.allocation, len, Allocation { hole, zero });
        }
        for (len, state) in hydrated {
            push_extent(&mut status.hydrated, len, state);
        }
        let flags = if one { CommandFlags::REQ_ONE.bits() } else { 0 };
        let header = header(Command::BLOCK_STATUS, flags, 0, asked, 3);
        let mut batch = Batch::default();
        let outcome = Outcome::of(Ok(Completion::Status(status.clone())), &header);
        batch.push(&header, outcome, &terms(true, contexts));
        let bytes = batch.into_parts().concat();
        let mut rest = &bytes[..];
        let mut seen = Contexts::empty();
        while !rest.is_empty() {
            let (head, payload, after) = chunk(rest);
            prop_assert_eq!((head.kind, head.cookie), (ChunkType::BLOCK_STATUS, 3));
            prop_assert_eq!(head.is_done(), after.is_empty());
            let (id, descriptors) = decode_block_status(payload).unwrap();
            let context = contexts.iter().find(|context| context.id() == id).expect("a context that was selected");
            prop_assert!(!seen.contains(context), "one chunk for each context");
            seen |= context;
            let sum: u64 = descriptors.iter().map(|d| u64::from(d.len)).sum();
            prop_assert!(sum <= u64::from(asked));
            prop_assert!(!one || descriptors.len() == 1);
            // The descriptors are the beginning of the truth.
            let truth: Vec<(u64, u32)> = if context == Contexts::ALLOCATION {
                let flags = |s: Allocation| u32::from(s.hole) | u32::from(s.zero) << 1;
                status.allocation.iter().map(|e| (e.len, flags(e.state))).collect()
            } else {
                status.hydrated.iter().map(|e| (e.len, u32::from(e.state))).collect()
            };
            for (index, descriptor) in descriptors.iter().enumerate() {
                prop_assert_eq!(descriptor.flags, truth[index].1);
                prop_assert!(u64::from(descriptor.len) <= truth[index].0);
                prop_assert!(u64::from(descriptor.len) == truth[index].0 || index + 1 == descriptors.len());
            }
            rest = after;
        }
        prop_assert_eq!(seen, contexts);
    }
}

#[test]
fn a_volume_that_answers_nonsense_is_an_io_error() {
    let header = header(Command::READ, 0, 0, 10, 1);
    let short = Outcome::of(Ok(Completion::Data(vec![Bytes::from_static(b"short")])), &header);
    assert!(matches!(short, Outcome::Error { error: ErrorCode::EIO, .. }), "{short:?}");
    let empty = Outcome::of(Ok(Completion::Status(StatusExtents::default())), &header);
    assert!(matches!(empty, Outcome::Error { error: ErrorCode::EIO, .. }), "{empty:?}");
    // Both lists of a block status begin with an extent that is not empty, or the chunk of a context would be.
    let (data, hydrated) = (Extent { len: 10, state: Allocation::DATA }, Extent { len: 10, state: true });
    let status = RequestHeader { command: Command::BLOCK_STATUS, ..header };
    for (allocation, hydrated, whole) in [
        (vec![data], vec![hydrated], true),
        (vec![], vec![hydrated], false),
        (vec![data], vec![], false),
        (vec![Extent { len: 0, ..data }, data], vec![hydrated], false),
        (vec![data], vec![Extent { len: 0, ..hydrated }], false),
    ] {
        let of = Outcome::of(Ok(Completion::Status(StatusExtents { allocation, hydrated })), &status);
        assert_eq!(!matches!(of, Outcome::Error { error: ErrorCode::EIO, .. }), whole, "{of:?}");
    }
    let done = Outcome::of(Ok(Completion::Done), &header);
    assert!(matches!(done, Outcome::Error { error: ErrorCode::EIO, .. }), "a READ without data: {done:?}");
    let data = Outcome::of(
        Ok(Completion::Data(vec![Bytes::from_static(b"0123456789")])),
        &RequestHeader { command: Command::WRITE, ..header },
    );
    assert!(matches!(data, Outcome::Error { error: ErrorCode::EIO, .. }), "data for a WRITE: {data:?}");
}

/// Every kind of error becomes a number that the protocol has, ENOTSUP only for a fast zero.
#[test]
fn errors_are_the_protocols() {
    use ErrorKind::*;
    let all = [
        Usage,
        InvalidRequest,
        NotFound,
        PermissionDenied,
        WrongType,
        InUse,
        TooSmall,
        ForeignData,
        Mismatch,
        Damaged,
        Unsupported,
        SourceChanged,
        SourceLost,
        Protocol,
        Io,
        NoSpace,
        ReadOnly,
        Failed,
        NotSupported,
        Limit,
        Environment,
        Shutdown,
    ];
    for kind in all {
        for flags in [0, CommandFlags::FAST_ZERO.bits()] {
            let header = header(Command::WRITE_ZEROES, flags, 0, 10, 1);
            let Outcome::Error { error, .. } = Outcome::of(Err(Error::new(kind, "x")), &header) else {
                panic!("an error is an error")
            };
            assert!(error.name().is_some(), "{kind:?} becomes {error}");
            assert_eq!(error == ErrorCode::ENOTSUP, kind == NotSupported && flags != 0);
        }
    }
}

#[test]
fn a_batch_is_empty_until_a_reply_is_in_it() {
    let mut batch = Batch::default();
    assert!(batch.is_empty());
    batch.push(&header(Command::FLUSH, 0, 0, 0, 1), Outcome::Done, &terms(false, Contexts::empty()));
    assert!(!batch.is_empty());
}

/// "exactly one extent whose length does not exceed the client's original length" with REQ_ONE, alone or beside FUA;
/// without it, all that begin inside of the asked range.
#[test]
fn req_one_and_nothing_else_limits_the_extents_to_one() {
    let extents = [(10, true), (20, false), (30, true), (40, false)].map(|(len, state)| Extent { len, state });
    for (flags, expected) in [(0u16, &[10, 20, 5][..]), (1, &[10, 20, 5]), (1 << 3, &[10]), (1 << 3 | 1, &[10])] {
        let header = header(Command::BLOCK_STATUS, flags, 0, 35, 1);
        let lens: Vec<u32> = descriptors(&header, &extents, u32::from).iter().map(|d| d.len).collect();
        assert_eq!(lens, expected, "flags {flags:#x}");
    }
}
