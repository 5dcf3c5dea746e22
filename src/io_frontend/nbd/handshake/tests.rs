//! The machine without a socket: however the bytes come, it answers the same; hostile bytes only end it.

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
