//! The machine without a socket: however the bytes come, it answers the same; hostile bytes only end it.
//!
//! What it answers is compared with bytes written down by hand from the protocol document (second half of this file).

use super::super::proto::{OPTION_REPLY_HEADER_LEN, OptionReplyHeader};
use super::*;
use crate::error::ErrorKind;
use crate::io_frontend::request::{Completion, LocalBoxFuture, Request};
use proptest::collection::vec;
use proptest::prelude::*;

struct Named(&'static str);

impl Volume for Named {
    fn info(&self) -> VolumeInfo {
        VolumeInfo { name: self.0.into(), size: 1 << 30, preferred_block: 4096 }
    }
    fn submit(self: Rc<Self>, _: Request) -> LocalBoxFuture<'static, Result<Completion>> {
        unreachable!("no handshake does I/O")
    }
}

/// Two exports; the first is the default.
struct Two;

impl Exports for Two {
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>> {
        match name {
            "" | "one" => Some(Rc::new(Named("one"))),
            "two" => Some(Rc::new(Named("two"))),
            _ => None,
        }
    }
    fn list(&self) -> Vec<VolumeInfo> {
        ["one", "two"].map(|name| Named(name).info()).to_vec()
    }
}

/// How a handshake ended.
#[derive(Debug, PartialEq)]
enum End {
    /// It wants more.
    Open,
    Closed,
    Transmission {
        name: String,
        structured: bool,
        contexts: Contexts,
        rest: Vec<u8>,
    },
    Dropped(ErrorKind),
}

/// Feeds `input` in pieces that end at `cuts`; all that was sent, and how it ended.
fn run(input: &[u8], cuts: &[usize]) -> (Vec<u8>, End) {
    let mut machine = Handshake::new(Limits::default());
    let (mut sent, mut start) = (Vec::new(), 0);
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.push(input.len());
    cuts.sort_unstable();
    for end in cuts {
        loop {
            match machine.step(&input[start..end], &Two) {
                Err(error) => return (sent, End::Dropped(error.kind())),
                Ok(Step::NeedBytes(need)) => {
                    assert!(need > end - start, "asks for bytes that it has");
                    assert!(need <= Handshake::input_max(&Limits::default()));
                    break;
                }
                Ok(Step::Answer { consumed, send, next }) => {
                    assert!(consumed > 0);
                    start += consumed;
                    sent.extend(send);
                    match next {
                        Next::Continue => {}
                        Next::Close => return (sent, End::Closed),
                        Next::Transmission(session) => {
                            let (name, rest) = (session.info.name, input[start..].to_vec());
                            let (structured, contexts) = (session.structured, session.contexts);
                            return (sent, End::Transmission { name, structured, contexts, rest });
                        }
                    }
                }
            }
        }
    }
    (sent, End::Open)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["one", "two", "", "three"].prop_map(String::from)
}

fn meta() -> impl Strategy<Value = MetaContextRequest> {
    let query = prop_oneof!["base:allocation", "base:", "hydrant:hydrated", "hydrant:", "x:y", ""];
    (name(), vec(query.prop_map(String::from), 0..4)).prop_map(|(name, queries)| MetaContextRequest { name, queries })
}

fn info() -> impl Strategy<Value = InfoRequest> {
    (name(), vec((0u16..5).prop_map(InfoType), 0..5)).prop_map(|(name, wanted)| InfoRequest { name, wanted })
}

fn option() -> impl Strategy<Value = ClientOption> {
    prop_oneof![
        1 => Just(ClientOption::Abort),
        1 => name().prop_map(ClientOption::ExportName),
        2 => info().prop_map(ClientOption::Go),
        4 => info().prop_map(ClientOption::Info),
        4 => Just(ClientOption::List),
        4 => Just(ClientOption::StructuredReply),
        4 => meta().prop_map(ClientOption::ListMetaContext),
        8 => meta().prop_map(ClientOption::SetMetaContext),
        1 => (11u32..20).prop_map(|code| ClientOption::Other(OptionCode(code))),
    ]
}

/// What a client that reads the protocol document expects at the end.
fn oracle(options: &[ClientOption]) -> Option<(String, bool, Contexts)> {
    let canonical = |name: &str| match name {
        "" | "one" => Some("one"),
        "two" => Some("two"),
        _ => None,
    };
    let (mut structured, mut selected) = (false, None);
    for option in options {
        match option {
            ClientOption::StructuredReply => structured = true,
            ClientOption::SetMetaContext(request) => {
                selected = canonical(&request.name).filter(|_| structured).map(|name| {
                    let has = |query: &str| request.queries.iter().any(|asked| asked == query);
                    let mut contexts = Contexts::empty();
                    contexts.set(Contexts::ALLOCATION, has("base:allocation"));
                    contexts.set(Contexts::HYDRATED, has("hydrant:hydrated"));
                    (name, contexts)
                });
            }
            ClientOption::Abort => return None,
            ClientOption::Go(InfoRequest { name, .. }) | ClientOption::ExportName(name) => match canonical(name) {
                Some(name) => {
                    let contexts =
                        selected.filter(|(for_name, _)| *for_name == name).map_or(Contexts::empty(), |s| s.1);
                    return Some((name.to_owned(), structured, contexts));
                }
                None if matches!(option, ClientOption::ExportName(_)) => return None,
                None => {}
            },
            _ => {}
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_options_in_any_pieces(
        options in vec(option(), 0..12),
        rest in vec(any::<u8>(), 0..40),
        cuts in vec(any::<usize>(), 0..20),
        flags in 0u8..4,
    ) {
        let mut input = vec![0, 0, 0, flags];
        input.extend(options.iter().flat_map(ClientOption::encode));
        let whole = [&input[..], &rest].concat();
        let (sent, end) = run(&whole, &[]);
        prop_assert_eq!(run(&whole, &cuts), (sent.clone(), match &end {
            End::Transmission { name, structured, contexts, rest } => End::Transmission {
                name: name.clone(), structured: *structured, contexts: *contexts, rest: rest.clone()
            },
            End::Open => End::Open,
            End::Closed => End::Closed,
            End::Dropped(kind) => End::Dropped(*kind),
        }));
        match (oracle(&options), end) {
            (Some(expected), End::Transmission { name, structured, contexts, .. }) => {
                prop_assert_eq!((name, structured, contexts), expected);
            }
            (None, End::Transmission { .. }) => prop_assert!(false, "transmission without GO"),
            (Some(_), end) => prop_assert!(false, "no transmission: {:?}", end),
            (None, _) => {}
        }
        // Up to EXPORT_NAME everything sent is whole, well-formed option replies.
        if !options.iter().any(|option| matches!(option, ClientOption::ExportName(_))) {
            let mut sent = &sent[..];
            while let Some((header, after)) = sent.split_first_chunk::<OPTION_REPLY_HEADER_LEN>() {
                let header = OptionReplyHeader::decode(header).unwrap();
                let (data, after) = after.split_at(header.len as usize);
                OptionReply::decode(header.reply, data).unwrap();
                sent = after;
            }
            prop_assert!(sent.is_empty());
        }
    }

    #[test]
    fn hostile_bytes(prefix in vec(option(), 0..3), bytes in vec(any::<u8>(), 0..100), code in 0u32..12, len in 0u32..90) {
        let mut input = vec![0, 0, 0, 3];
        input.extend(prefix.iter().flat_map(ClientOption::encode));
        input.extend(OptionHeader { option: OptionCode(code), len }.encode());
        input.extend(&bytes);
        run(&input, &[]);
        run(&bytes, &[]);
    }
}

#[test]
fn limits_end_the_handshake() {
    let flags = vec![0, 0, 0, 3];
    let flood = |count: usize| [flags.clone(), ClientOption::List.encode().repeat(count)].concat();
    assert_eq!(run(&flood(64), &[]).1, End::Open);
    assert_eq!(run(&flood(65), &[]).1, End::Dropped(ErrorKind::Protocol));
    let header = |len| [flags.clone(), OptionHeader { option: OptionCode(99), len }.encode().to_vec()].concat();
    assert_eq!(run(&header(64 << 10), &[]).1, End::Open);
    assert_eq!(run(&header((64 << 10) + 1), &[]).1, End::Dropped(ErrorKind::Protocol), "before the data is received");
    assert_eq!(run(&[0, 0, 0, 4], &[]).1, End::Dropped(ErrorKind::Protocol), "an unknown client flag");
}

#[test]
fn the_df_flag_needs_structured_replies() {
    let go = ClientOption::ExportName("one".into()).encode();
    let flags_of = |options: Vec<u8>| {
        let (sent, _) = run(&[vec![0, 0, 0, 3], options, go.clone()].concat(), &[]);
        ExportInfo::decode(sent.last_chunk().unwrap()).unwrap().flags
    };
    let plain = flags_of(vec![]);
    assert!(!plain.contains(TransmissionFlags::SEND_DF) && !plain.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(flags_of(ClientOption::StructuredReply.encode()), plain | TransmissionFlags::SEND_DF);
}

// ---- Exact bytes ----

/// An option, as a client sends it.
fn asks(option: u8, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT\0\0\0", &[option][..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// A reply to an option: its type and its data.
fn answers(option: u8, reply: u32, data: &[u8]) -> Vec<u8> {
    let head = [b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0", &[option][..]].concat();
    [&head, &reply.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;

/// What a client that sent C_FIXED_NEWSTYLE and C_NO_ZEROES, then `options`, is sent; and how it ended.
fn sent(options: &[Vec<u8>]) -> (Vec<u8>, End) {
    run(&[&[0, 0, 0, 3][..], &options.concat()].concat(), &[])
}

/// What is sent for `options` when the handshake stays open.
#[track_caller]
fn replies(options: &[Vec<u8>]) -> Vec<u8> {
    let (sent, end) = sent(options);
    assert_eq!(end, End::Open);
    sent
}

/// The last of `options` is refused with this type and a text, in one reply; the handshake goes on. The ones before
/// it are answered with ACK alone.
#[track_caller]
fn refused(options: &[Vec<u8>], reply: u32) {
    let all = replies(options);
    let acks: Vec<u8> = options[..options.len() - 1].iter().flat_map(|option| answers(option[11], ACK, b"")).collect();
    let refusal = all.strip_prefix(&acks[..]).expect("ACK for the options before");
    let text = &refusal[OPTION_REPLY_HEADER_LEN..];
    assert_eq!(refusal, answers(options.last().unwrap()[11], reply, text));
    assert!(!text.is_empty() && std::str::from_utf8(text).is_ok());
}

fn transmission(structured: bool, contexts: Contexts) -> End {
    End::Transmission { name: "one".into(), structured, contexts, rest: vec![] }
}

/// 1 GiB, and all but READ_ONLY, ROTATIONAL, SEND_DF and SEND_RESIZE of the first twelve flags.
const EXPORT: &[u8; 10] = b"\0\0\0\0\x40\0\0\0\x0d\x6d";
/// The same, and SEND_DF.
const EXPORT_STRUCTURED: &[u8; 10] = b"\0\0\0\0\x40\0\0\0\x0d\xed";

fn structured() -> Vec<u8> {
    asks(8, b"")
}

#[test]
fn the_greeting_is_fixed_newstyle_and_no_zeroes() {
    assert_eq!(&Handshake::greeting(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn export_name_is_answered_without_a_header_and_with_zeroes_unless_they_were_declined() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let (sent, end) = run(&[&[0, 0, 0, flags][..], &asks(1, b"one")].concat(), &[]);
        assert_eq!(sent, [&EXPORT[..], &vec![0; zeroes]].concat(), "client flags {flags}");
        assert_eq!(end, transmission(false, Contexts::empty()));
    }
    // SEND_DF only with structured replies.
    let (sent, end) = sent(&[structured(), asks(1, b"")]);
    assert_eq!(sent, [&answers(8, ACK, b"")[..], EXPORT_STRUCTURED].concat());
    assert_eq!(end, transmission(true, Contexts::empty()));
}

/// EXPORT_NAME has no reply that could say so.
#[test]
fn an_export_name_that_is_unknown_or_malformed_ends_the_session() {
    assert_eq!(sent(&[asks(1, b"three")]), (vec![], End::Dropped(ErrorKind::NotFound)));
    assert_eq!(sent(&[asks(1, b"\xff")]), (vec![], End::Dropped(ErrorKind::Protocol)));
}

#[test]
fn info_and_go_tell_what_was_asked_for() {
    let export = [&[0, 0], &EXPORT[..]].concat();
    let name = b"\0\x01one";
    let description = b"\0\x02hydrant clone, 1GiB";
    // 1 byte at least, 4 KiB preferred, 32 MiB of payload at most.
    let block_size = b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0";
    let cases: [(&[u8], Vec<&[u8]>); 6] = [
        (b"\0\0\0\x03one\0\0", vec![]),
        (b"\0\0\0\0\0\x01\0\x01", vec![name]),
        (b"\0\0\0\x03one\0\x01\0\x02", vec![description]),
        (b"\0\0\0\x03one\0\x01\0\x03", vec![block_size]),
        (b"\0\0\0\x03one\0\x03\0\x03\0\x02\0\x01", vec![name, description, block_size]),
        // EXPORT is told anyway, once; what is not known is ignored.
        (b"\0\0\0\x03one\0\x02\0\0\x12\x34", vec![]),
    ];
    for (data, told) in cases {
        for (option, end) in [(6, End::Open), (7, transmission(false, Contexts::empty()))] {
            let mut expected = answers(option, INFO, &export);
            expected.extend(told.iter().flat_map(|info| answers(option, INFO, info)));
            expected.extend(answers(option, ACK, b""));
            assert_eq!(sent(&[asks(option, data)]), (expected, end), "option {option}, data {data:?}");
        }
    }
    let expected =
        [answers(8, ACK, b""), answers(7, INFO, &[&[0, 0], &EXPORT_STRUCTURED[..]].concat()), answers(7, ACK, b"")];
    assert_eq!(
        sent(&[structured(), asks(7, b"\0\0\0\0\0\0")]),
        (expected.concat(), transmission(true, Contexts::empty()))
    );
}

#[test]
fn list_names_the_exports() {
    let expected = [
        answers(3, SERVER, b"\0\0\0\x03onehydrant clone, 1GiB"),
        answers(3, SERVER, b"\0\0\0\x03twohydrant clone, 1GiB"),
        answers(3, ACK, b""),
    ];
    assert_eq!(replies(&[asks(3, b"")]), expected.concat());
}

#[test]
fn list_meta_context_answers_wildcards_and_ignores_foreign_queries() {
    let (allocation, hydrated) = (&b"\0\0\0\0base:allocation"[..], &b"\0\0\0\0hydrant:hydrated"[..]);
    let cases: [(&[u8], Vec<&[u8]>); 8] = [
        (b"\0\0\0\0", vec![allocation, hydrated]),
        (b"\0\0\0\x01\0\0\0\x05base:", vec![allocation]),
        (b"\0\0\0\x01\0\0\0\x08hydrant:", vec![hydrated]),
        (b"\0\0\0\x01\0\0\0\x0fbase:allocation", vec![allocation]),
        (b"\0\0\0\x01\0\0\0\x10hydrant:hydrated", vec![hydrated]),
        (b"\0\0\0\x02\0\0\0\x05base:\0\0\0\x0fbase:allocation", vec![allocation]),
        (b"\0\0\0\x02\0\0\0\x05qemu:\0\0\0\x05base:", vec![allocation]),
        // Unknown namespaces and leaf names, no namespace, an empty query.
        (b"\0\0\0\x04\0\0\0\x05qemu:\0\0\0\x06base:x\0\0\0\x04base\0\0\0\0", vec![]),
    ];
    for (queries, contexts) in cases {
        let mut expected = answers(8, ACK, b"");
        expected.extend(contexts.iter().flat_map(|context| answers(9, META_CONTEXT, context)));
        expected.extend(answers(9, ACK, b""));
        let data = [b"\0\0\0\x03one", queries].concat();
        assert_eq!(replies(&[structured(), asks(9, &data)]), expected, "queries {queries:?}");
    }
}

/// The name alone selects; the ids are those that tell the chunks of a block status apart.
#[test]
fn set_meta_context_selects_by_name_and_ignores_the_rest() {
    let (allocation, hydrated) = (Contexts::ALLOCATION, Contexts::HYDRATED);
    assert_ne!(allocation.id(), hydrated.id());
    let cases: [(&[u8], Contexts); 6] = [
        (b"\0\0\0\0", Contexts::empty()),
        (b"\0\0\0\x01\0\0\0\x0fbase:allocation", allocation),
        (b"\0\0\0\x01\0\0\0\x10hydrant:hydrated", hydrated),
        (b"\0\0\0\x02\0\0\0\x10hydrant:hydrated\0\0\0\x0fbase:allocation", allocation | hydrated),
        (b"\0\0\0\x02\0\0\0\x05qemu:\0\0\0\x0fbase:allocation", allocation),
        // Wildcards, unknown namespaces and leaf names, no namespace, an empty query.
        (
            b"\0\0\0\x06\0\0\0\x05base:\0\0\0\x08hydrant:\0\0\0\x05qemu:\0\0\0\x06base:x\0\0\0\x04base\0\0\0\0",
            Contexts::empty(),
        ),
    ];
    for (queries, contexts) in cases {
        let mut expected = answers(8, ACK, b"");
        for (context, name) in [(allocation, &b"base:allocation"[..]), (hydrated, b"hydrant:hydrated")] {
            if contexts.contains(context) {
                expected.extend(answers(10, META_CONTEXT, &[&context.id().to_be_bytes(), name].concat()));
            }
        }
        expected.extend(answers(10, ACK, b""));
        let data = [b"\0\0\0\x03one", queries].concat();
        assert_eq!(replies(&[structured(), asks(10, &data)]), expected, "queries {queries:?}");
        // It holds for the export that it was asked for, by whatever name.
        assert_eq!(sent(&[structured(), asks(10, &data), asks(1, b"")]).1, transmission(true, contexts));
    }
}

/// "Issuing this command replaces all previously-set metadata contexts (including when this command fails)".
#[test]
fn a_set_meta_context_that_fails_selects_nothing() {
    let good = asks(10, b"\0\0\0\x03one\0\0\0\x01\0\0\0\x0fbase:allocation");
    assert_eq!(sent(&[structured(), good.clone(), asks(1, b"one")]).1, transmission(true, Contexts::ALLOCATION));
    for bad in [&b"\0\0\0\x05three\0\0\0\0"[..], b"\0\0\0\x03one\0\0\0\x01"] {
        let (_, end) = sent(&[structured(), good.clone(), asks(10, bad), asks(1, b"one")]);
        assert_eq!(end, transmission(true, Contexts::empty()), "{bad:?}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_its_kind_and_the_handshake_goes_on() {
    let (info, contexts) = (b"\0\0\0\x05three\0\0", b"\0\0\0\x05three\0\0\0\0");
    for (option, data) in [(6, &info[..]), (7, info), (9, contexts), (10, contexts)] {
        refused(&[structured(), asks(option, data)], ERR_UNKNOWN);
        refused(&[structured(), asks(option, &data[..data.len() - 1])], ERR_INVALID);
        refused(&[structured(), asks(option, &[data, &[0]].concat())], ERR_INVALID);
    }
    // These have no data.
    refused(&[asks(3, b"x")], ERR_INVALID);
    refused(&[asks(8, b"x")], ERR_INVALID);
    // Contexts need structured replies first.
    refused(&[asks(9, b"\0\0\0\x03one\0\0\0\0")], ERR_INVALID);
    refused(&[asks(10, b"\0\0\0\x03one\0\0\0\0")], ERR_INVALID);
    // PEEK_EXPORT, STARTTLS, EXTENDED_HEADERS, and what nobody knows; their data is skipped.
    for option in [4, 5, 11, 99] {
        refused(&[asks(option, b"any data")], ERR_UNSUP);
    }
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    assert_eq!(sent(&[asks(2, b"")]), (answers(2, ACK, b""), End::Closed));
    assert_eq!(sent(&[asks(2, b"bye"), asks(3, b"")]), (answers(2, ACK, b""), End::Closed));
}

/// The most that is ever asked for is an option with as much data as is allowed.
#[test]
fn the_input_that_a_connection_must_hold() {
    let limits = Limits { option_data_bytes_max: 1000, ..Limits::default() };
    assert_eq!(Handshake::input_max(&limits), 1016);
    let mut machine = Handshake::new(limits);
    assert!(matches!(machine.step(b"\0\0", &Two), Ok(Step::NeedBytes(4))));
    assert!(matches!(machine.step(&[0, 0, 0, 3], &Two), Ok(Step::Answer { consumed: 4, .. })));
    assert!(matches!(machine.step(b"IHAVEOPT", &Two), Ok(Step::NeedBytes(16))));
    assert!(matches!(machine.step(&asks(99, &[0; 1000])[..20], &Two), Ok(Step::NeedBytes(1016))));
}

/// A volume may prefer less than the protocol allows, or more than one request may carry.
#[test]
fn the_block_sizes_advertised_keep_the_protocols_constraints() {
    for (prefers, told) in
        [(1, 512), (512, 512), (4096, 4096), (1 << 25, 1 << 25), (1 << 26, 1 << 25), (1 << 31, 1 << 25)]
    {
        let info = VolumeInfo { preferred_block: prefers, ..Named("one").info() };
        let sizes = Handshake::new(Limits::default()).block_sizes(&info).check().unwrap();
        assert_eq!(sizes, BlockSizes { minimum: 1, preferred: told, payload_max: 1 << 25 });
    }
}
