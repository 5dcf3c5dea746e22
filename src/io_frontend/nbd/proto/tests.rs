//! Every message survives a round trip; no bytes make a decoder panic or disagree with its encoder.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>().prop_filter("NUL", |c| *c != '\0'), 0..40).prop_map(|chars| chars.into_iter().collect())
}

fn info_request() -> impl Strategy<Value = InfoRequest> {
    (text(), vec(any::<u16>().prop_map(InfoType), 0..20)).prop_map(|(name, wanted)| InfoRequest { name, wanted })
}

fn meta_request() -> impl Strategy<Value = MetaContextRequest> {
    (text(), vec(text(), 0..10)).prop_map(|(name, queries)| MetaContextRequest { name, queries })
}

fn client_option() -> impl Strategy<Value = ClientOption> {
    prop_oneof![
        text().prop_map(ClientOption::ExportName),
        Just(ClientOption::Abort),
        Just(ClientOption::List),
        info_request().prop_map(ClientOption::Info),
        info_request().prop_map(ClientOption::Go),
        Just(ClientOption::StructuredReply),
        meta_request().prop_map(ClientOption::ListMetaContext),
        meta_request().prop_map(ClientOption::SetMetaContext),
        (11u32..).prop_map(|code| ClientOption::Other(OptionCode(code))),
    ]
}

fn export_info() -> impl Strategy<Value = ExportInfo> {
    (any::<u64>(), any::<u16>())
        .prop_map(|(size, flags)| ExportInfo { size, flags: TransmissionFlags::from_bits_truncate(flags | 1) })
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    prop_oneof![
        Just(OptionReply::Ack),
        (text(), text()).prop_map(|(name, description)| OptionReply::Server { name, description }),
        export_info().prop_map(|export| OptionReply::Info(Info::Export(export))),
        text().prop_map(|name| OptionReply::Info(Info::Name(name))),
        text().prop_map(|text| OptionReply::Info(Info::Description(text))),
        any::<(u32, u32, u32)>().prop_map(|(minimum, preferred, payload_max)| {
            OptionReply::Info(Info::BlockSize(BlockSizes { minimum, preferred, payload_max }))
        }),
        (4u16..).prop_map(|kind| OptionReply::Info(Info::Other(InfoType(kind)))),
        (any::<u32>(), text()).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
        (any::<u32>(), text())
            .prop_map(|(code, message)| OptionReply::Error { reply: OptionReplyType(code | 1 << 31), message }),
    ]
}

proptest! {
    #[test]
    fn options_round_trip(option in client_option()) {
        let bytes = option.encode();
        let header = OptionHeader::decode(bytes[..OPTION_HEADER_LEN].try_into().unwrap()).unwrap();
        prop_assert_eq!(header.len as usize, bytes.len() - OPTION_HEADER_LEN);
        prop_assert_eq!(ClientOption::decode(header.option, &bytes[OPTION_HEADER_LEN..]).unwrap(), option);
    }

    #[test]
    fn option_data_that_is_cut_or_longer_is_refused(request in meta_request(), cut in any::<prop::sample::Index>()) {
        let bytes = ClientOption::SetMetaContext(request).encode();
        let data = &bytes[OPTION_HEADER_LEN..];
        let code = OptionCode::SET_META_CONTEXT;
        prop_assert!(ClientOption::decode(code, &data[..cut.index(data.len())]).is_err());
        prop_assert!(ClientOption::decode(code, &[data, &[0]].concat()).is_err());
    }

    #[test]
    fn option_replies_round_trip(reply in option_reply(), option in any::<u32>().prop_map(OptionCode)) {
        let mut bytes = Vec::new();
        reply.encode(option, &mut bytes);
        let header = OptionReplyHeader::decode(bytes[..OPTION_REPLY_HEADER_LEN].try_into().unwrap()).unwrap();
        prop_assert_eq!(header.option, option);
        prop_assert_eq!(header.len as usize, bytes.len() - OPTION_REPLY_HEADER_LEN);
        prop_assert_eq!(reply.is_final(), header.reply == OptionReplyType::ACK || header.reply.is_error());
        prop_assert_eq!(OptionReply::decode(header.reply, &bytes[OPTION_REPLY_HEADER_LEN..]).unwrap(), reply);
    }

    #[test]
    fn requests_round_trip(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        let request = RequestHeader { flags, command: Command(command), cookie, offset, len };
        prop_assert_eq!(RequestHeader::decode(&request.encode()).unwrap(), request);
    }

    #[test]
    fn simple_replies_round_trip(error: u32, cookie: u64, extra in 0usize..10) {
        let reply = SimpleReply { error: (error != 0).then_some(ErrorCode(error)), cookie };
        let mut bytes = reply.encode().to_vec();
        for len in 0..bytes.len() {
            prop_assert_eq!(ReplyHeader::decode(&bytes[..len]).unwrap(), None);
        }
        bytes.resize(bytes.len() + extra, 0xff);
        prop_assert_eq!(ReplyHeader::decode(&bytes).unwrap(), Some((ReplyHeader::Simple(reply), SIMPLE_REPLY_LEN)));
    }

    #[test]
    fn chunks_round_trip(
        cookie: u64,
        offset: u64,
        data_len in 1..u32::MAX - 8,
        message in text(),
        descriptors in vec((1u32.., any::<u32>()).prop_map(|(len, flags)| StatusDescriptor { len, flags }), 1..50),
        context: u32,
    ) {
        fn parse(bytes: &[u8]) -> (ChunkHeader, &[u8]) {
            assert_eq!(ReplyHeader::decode(&bytes[..CHUNK_HEADER_LEN - 1]).unwrap(), None);
            match ReplyHeader::decode(bytes).unwrap() {
                Some((ReplyHeader::Chunk(chunk), len)) => (chunk, &bytes[len..]),
                other => panic!("{other:?}"),
            }
        }
        let bytes = encode_offset_data_head(ChunkFlags::DONE, cookie, offset, data_len);
        let (chunk, payload) = parse(&bytes);
        prop_assert_eq!((chunk.kind, chunk.cookie, chunk.len), (ChunkType::OFFSET_DATA, cookie, data_len + 8));
        prop_assert_eq!(decode_offset_data_prefix(payload.try_into().unwrap()), offset);

        let hole = OffsetHole { offset, len: data_len };
        let bytes = encode_offset_hole_chunk(ChunkFlags::empty(), cookie, hole);
        let (chunk, payload) = parse(&bytes);
        prop_assert!(!chunk.is_done() && chunk.len as usize == payload.len());
        prop_assert_eq!(decode_offset_hole(payload).unwrap(), hole);

        let bytes = encode_error_chunk(cookie, ErrorCode::ENOSPC, &message);
        let (chunk, payload) = parse(&bytes);
        prop_assert!(chunk.is_done() && chunk.len as usize == payload.len());
        let expected = ErrorChunk { error: ErrorCode::ENOSPC, message, offset: None };
        prop_assert_eq!(decode_error_chunk(chunk.kind, payload).unwrap(), expected);

        let bytes = encode_block_status_chunk(ChunkFlags::DONE, cookie, context, &descriptors);
        let (chunk, payload) = parse(&bytes);
        prop_assert_eq!(chunk.len as usize, payload.len());
        prop_assert_eq!(decode_block_status(payload).unwrap(), (context, descriptors));

        let bytes = encode_none_chunk(cookie);
        prop_assert_eq!(parse(&bytes).0.kind, ChunkType::NONE);
    }

    /// Arbitrary bytes: an error or a value, no panic; and no memory by a claimed length (it would not end).
    #[test]
    fn hostile_bytes(bytes in vec(any::<u8>(), 0..200), code in 0u32..16, kind: u16, magic: bool) {
        let _ = ClientOption::decode(OptionCode(code), &bytes);
        let _ = OptionReply::decode(OptionReplyType(code), &bytes);
        let _ = OptionReply::decode(OptionReplyType(code | 1 << 31), &bytes);
        let _ = decode_error_chunk(ChunkType(kind), &bytes);
        let _ = decode_error_chunk(ChunkType::ERROR_OFFSET, &bytes);
        let _ = decode_block_status(&bytes);
        let _ = decode_offset_hole(&bytes);
        let mut bytes = bytes;
        if magic && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        }
        let _ = ReplyHeader::decode(&bytes);
        bytes.resize(GREETING_LEN.max(REQUEST_LEN), 0);
        let _ = decode_greeting(bytes[..GREETING_LEN].try_into().unwrap());
        let _ = RequestHeader::decode(bytes[..REQUEST_LEN].try_into().unwrap());
        let _ = OptionHeader::decode(bytes[..OPTION_HEADER_LEN].try_into().unwrap());
        let _ = OptionReplyHeader::decode(bytes[..OPTION_REPLY_HEADER_LEN].try_into().unwrap());
    }
}

/// Bytes written down by hand from the protocol document: an encoder and decoder that are wrong together don't pass.
#[test]
fn golden_bytes() {
    assert_eq!(&encode_greeting(HandshakeFlags::all()), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(decode_greeting(b"NBDMAGICIHAVEOPT\xff\x01").unwrap(), HandshakeFlags::FIXED_NEWSTYLE);
    let oldstyle = decode_greeting(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0").unwrap_err();
    assert!(oldstyle.to_string().contains("oldstyle"), "{oldstyle}");
    assert!(decode_client_flags([0, 0, 0, 4]).is_err());
    assert_eq!(decode_client_flags([0, 0, 0, 3]).unwrap(), ClientFlags::all());
    assert_eq!(encode_client_flags(ClientFlags::FIXED_NEWSTYLE), [0, 0, 0, 1]);
    assert_eq!(encode_client_flags(ClientFlags::NO_ZEROES), [0, 0, 0, 2]);

    let go = ClientOption::Go(InfoRequest { name: "a".into(), wanted: vec![InfoType::BLOCK_SIZE] });
    assert_eq!(&go.encode()[..], b"IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x01a\0\x01\0\x03");

    let mut out = Vec::new();
    OptionReply::error(OptionReplyType::ERR_UNSUP, "no").encode(OptionCode::STARTTLS, &mut out);
    assert_eq!(&out[..], b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\x80\0\0\x01\0\0\0\x02no");

    let request = RequestHeader { flags: 1, command: Command::WRITE, cookie: 0x0102, offset: 0x1000, len: 512 };
    assert_eq!(&request.encode(), b"\x25\x60\x95\x13\0\x01\0\x01\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x10\0\0\0\x02\0");
    let reply = SimpleReply { error: Some(ErrorCode::EINVAL), cookie: 7 };
    assert_eq!(&reply.encode(), b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x07");
    assert_eq!(
        &encode_error_chunk(7, ErrorCode::EIO, "x")[..],
        b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x07\0\0\0\x05\0\x01x"
    );
}

/// Characters of two and of three bytes, placed so that one ends at the limit, or lies across it.
#[test]
fn long_texts_are_cut_at_a_character() {
    for (long, len) in [
        ("é".repeat(3000), STRING_MAX),
        (format!("x{}", "é".repeat(3000)), STRING_MAX - 1),
        ("€".repeat(2000), STRING_MAX - 1),
        (format!("x{}", "€".repeat(2000)), STRING_MAX),
        (format!("xy{}", "€".repeat(2000)), STRING_MAX - 2),
    ] {
        let bytes = encode_error_chunk(1, ErrorCode::EIO, &long);
        let chunk = decode_error_chunk(ChunkType::ERROR, &bytes[CHUNK_HEADER_LEN..]).unwrap();
        assert_eq!(chunk.message.len(), len);
        assert!(long.starts_with(&chunk.message));
    }
}

/// "a maximum payload size that is at least 2^25 (33,554,432)", "not send more than 2^20 extents".
#[test]
fn sizes_that_hold_when_nothing_was_agreed_on() {
    assert_eq!(PAYLOAD_DEFAULT_MAX, 33_554_432);
    assert_eq!(BlockSizes::DEFAULT, BlockSizes { minimum: 1, preferred: 4096, payload_max: 33_554_432 });
    assert!(BlockSizes::DEFAULT.check().is_ok());
    assert_eq!(EXTENTS_PER_CHUNK_MAX, 1_048_576);
}

/// The section "Size constraints", at each of its bounds.
#[test]
fn block_sizes_keep_the_protocols_constraints() {
    for (minimum, preferred, payload_max, ok) in [
        // minimum: a power of two, 1 to 2^16.
        (1, 4096, 1 << 25, true),
        (0, 4096, 1 << 25, false),
        (3, 4096, 1 << 25, false),
        (65536, 65536, 1 << 25, true),
        (1 << 17, 1 << 17, 1 << 25, false),
        // preferred: a power of two, at least 512 and the minimum.
        (1, 512, 1 << 25, true),
        (1, 256, 1 << 25, false),
        (1, 513, 1 << 25, false),
        (1, 0, 1 << 25, false),
        (4096, 4096, 1 << 25, true),
        (4096, 2048, 1 << 25, false),
        // payload_max: at least the preferred size; any number.
        (1, 4096, 4096, true),
        (1, 4096, 4095, false),
        (1, 4096, 4097, true),
        (1, 4096, 0, false),
        (1, 1 << 31, u32::MAX, true),
    ] {
        let sizes = BlockSizes { minimum, preferred, payload_max };
        assert_eq!(sizes.check().ok(), ok.then_some(sizes), "{sizes:?}");
    }
}

/// Bit 15 makes an error, of a known type or of an unknown one.
#[test]
fn errors_among_the_chunk_types() {
    for kind in [0x8000, 0x8001, 0x8002, 0x8123, 0xffff] {
        assert!(ChunkType(kind).is_error(), "{kind:#x}");
    }
    for kind in [0, 1, 2, 5, 6, 0x7fff] {
        assert!(!ChunkType(kind).is_error(), "{kind:#x}");
    }
}

/// The header of a chunk.
fn chunk_header(done: bool, kind: u16, len: u32) -> Vec<u8> {
    let (flags, cookie) = (u16::from(done), 7u64);
    [&b"\x66\x8e\x33\xef"[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes(), &len.to_be_bytes()]
        .concat()
}

/// "Structured reply types": the lengths of each, at their bounds; and which types end the connection.
#[test]
fn a_chunk_has_a_length_that_its_type_allows() {
    let (none, data, hole, status, error, error_offset) = (0, 1, 2, 5, 0x8001, 0x8002);
    for (kind, valid, invalid) in [
        (data, &[9, 10, u32::MAX][..], &[0, 7, 8][..]),
        (hole, &[12], &[0, 11, 13, 24]),
        (status, &[12, 20, 28, 4 + 8 * (1 << 20)], &[0, 4, 8, 11, 13, 16, 19]),
        (error, &[6, 7, 14, 4096 + 6], &[0, 5]),
        (error_offset, &[14, 15, 4096 + 14], &[0, 6, 13]),
        // An error of an unknown type begins like the known ones.
        (0x8003, &[6, 7, 100], &[0, 5]),
        (0xffff, &[6], &[5]),
        // Unknown types that are no error: never.
        (3, &[], &[0, 6, 12]),
        (6, &[], &[0, 12, 20]),
        (0x7fff, &[], &[6]),
    ] {
        for done in [false, true] {
            for (len, ok) in valid.iter().map(|len| (*len, true)).chain(invalid.iter().map(|len| (*len, false))) {
                let decoded = ReplyHeader::decode(&chunk_header(done, kind, len));
                let flags = if done { ChunkFlags::DONE } else { ChunkFlags::empty() };
                let chunk = ChunkHeader { flags, kind: ChunkType(kind), cookie: 7, len };
                let expected = ok.then_some(Some((ReplyHeader::Chunk(chunk), CHUNK_HEADER_LEN)));
                assert_eq!(decoded.ok(), expected, "type {kind:#x}, {len} bytes, done: {done}");
            }
        }
    }
    // NONE is empty, and the last one.
    for (done, len, ok) in [(true, 0, true), (false, 0, false), (true, 1, false), (false, 1, false)] {
        assert_eq!(ReplyHeader::decode(&chunk_header(done, none, len)).is_ok(), ok, "{len} bytes, done: {done}");
    }
}

/// A peer that is out of step is known by its first four bytes: no more of them are waited for.
#[test]
fn a_reply_is_judged_by_its_magic_as_soon_as_that_is_there() {
    assert_eq!(ReplyHeader::decode(b"\x67\x44\x66").unwrap(), None);
    assert_eq!(ReplyHeader::decode(b"\x67\x44\x66\x98").unwrap(), None);
    assert_eq!(ReplyHeader::decode(b"\x66\x8e\x33\xef").unwrap(), None);
    assert!(ReplyHeader::decode(b"\x67\x44\x66\x99").is_err());
}

#[test]
fn strings_are_checked() {
    assert!(ClientOption::decode(OptionCode::EXPORT_NAME, &[b'x'; STRING_MAX]).is_ok());
    assert!(ClientOption::decode(OptionCode::EXPORT_NAME, &[b'x'; STRING_MAX + 1]).is_err());
    assert!(ClientOption::decode(OptionCode::EXPORT_NAME, b"\xff").is_err());
    assert!(ClientOption::decode(OptionCode::EXPORT_NAME, b"a\0b").is_err());
    // A query count of 4 Gi with no queries behind it fails at once.
    assert!(ClientOption::decode(OptionCode::LIST_META_CONTEXT, b"\0\0\0\0\xff\xff\xff\xff").is_err());
}
