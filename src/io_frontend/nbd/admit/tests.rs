//! Admission against the protocol's sentences, one by one, for any header.

use super::*;
use proptest::prelude::*;

fn limits() -> Limits {
    Limits { payload_bytes_max: 1000, discard_bytes_max: 2000, ..Limits::default() }
}

fn near(value: u64) -> impl Strategy<Value = u64> {
    (0u64..6).prop_map(move |delta| value.saturating_add(delta).saturating_sub(3))
}

fn offsets() -> impl Strategy<Value = u64> {
    prop_oneof![near(0), near(5000), near(u64::MAX), near(1 << 63), 0u64..6000, any::<u64>()]
}

fn lens() -> impl Strategy<Value = u32> {
    prop_oneof![
        near(0).prop_map(|len| len as u32),
        near(1000).prop_map(|len| len as u32),
        near(2000).prop_map(|len| len as u32),
        near(5000).prop_map(|len| len as u32),
        near(u64::from(u32::MAX)).prop_map(|len| u32::try_from(len).unwrap_or(u32::MAX)),
        0u32..6000,
    ]
}

fn headers() -> impl Strategy<Value = RequestHeader> {
    let flags = prop_oneof![Just(0u16), Just(1), 0u16..64, any::<u16>()];
    (flags, 0u16..10, any::<u64>(), offsets(), lens()).prop_map(|(flags, command, cookie, offset, len)| RequestHeader {
        flags,
        command: Command(command),
        cookie,
        offset,
        len,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn verdicts(header in headers(), structured: bool, contexts in (0u8..4).prop_map(Contexts::from_bits_truncate)) {
        let contexts = if structured { contexts } else { Contexts::empty() };
        let terms = Terms { size: 5000, structured, contexts };
        let verdict = admit(&header, &terms, &limits());
        let RequestHeader { flags, command, offset, len, .. } = header;

        // The place of the next request is known, or the connection ends.
        let payload = if command == Command::WRITE { len } else { 0 };
        prop_assert_eq!(verdict.is_err(), payload > 2000);
        let Ok(verdict) = verdict else { return Ok(()) };
        let followed = match &verdict {
            Verdict::Write { len, .. } => *len,
            Verdict::Refuse { payload, .. } => *payload,
            Verdict::Submit(_) | Verdict::Nothing | Verdict::Disconnect => 0,
        };
        prop_assert_eq!(followed, payload);

        // Only one error where the protocol names one.
        let flags_valid = flags & !1 == 0
            || command == Command::READ && structured && flags & !0b101 == 0
            || command == Command::WRITE_ZEROES && flags & !0b10011 == 0
            || command == Command::BLOCK_STATUS && flags & !0b1001 == 0;
        let inside = u128::from(offset) + u128::from(len) <= 5000;
        let writes = [Command::WRITE, Command::WRITE_ZEROES].contains(&command);
        let with_payload = [Command::READ, Command::WRITE].contains(&command);
        let expected = if command == Command::DISC {
            prop_assert!(matches!(verdict, Verdict::Disconnect));
            return Ok(());
        } else if command.0 > 7 || !flags_valid {
            Some(ErrorCode::EINVAL)
        } else if command == Command::FLUSH {
            (offset != 0 || len != 0).then_some(ErrorCode::EINVAL)
        } else if !inside {
            Some(if writes { ErrorCode::ENOSPC } else { ErrorCode::EINVAL })
        } else if with_payload && len > 1000 {
            Some(if command == Command::READ && structured { ErrorCode::EOVERFLOW } else { ErrorCode::EINVAL })
        } else if command == Command::BLOCK_STATUS && (contexts.is_empty() || len == 0) {
            Some(ErrorCode::EINVAL)
        } else {
            None
        };
        if let Verdict::Refuse { error, why, .. } = &verdict {
            prop_assert_eq!(Some(*error), expected, "{}", why);
            return Ok(());
        }
        prop_assert_eq!(expected, None);

        // What reaches the volume is exactly what was asked, and inside.
        let mut wanted = RequestFlags::empty();
        wanted.set(RequestFlags::FUA, flags & 0b1 != 0);
        wanted.set(RequestFlags::NO_HOLE, flags & 0b10 != 0);
        wanted.set(RequestFlags::FAST_ZERO, flags & 0b10000 != 0);
        let (kind, range, given) = match verdict {
            Verdict::Nothing => {
                prop_assert!(len == 0 && command != Command::FLUSH);
                return Ok(());
            }
            Verdict::Submit(Request::Flush) => {
                prop_assert_eq!(command, Command::FLUSH);
                return Ok(());
            }
            Verdict::Submit(Request::Read(range)) => (Command::READ, range, None),
            Verdict::Submit(Request::Cache(range)) => (Command::CACHE, range, None),
            Verdict::Submit(Request::Status(range)) => (Command::BLOCK_STATUS, range, None),
            Verdict::Submit(Request::Trim { range, flags }) => (Command::TRIM, range, Some(flags)),
            Verdict::Submit(Request::WriteZeroes { range, flags }) => (Command::WRITE_ZEROES, range, Some(flags)),
            Verdict::Write { offset, len, flags } => {
                (Command::WRITE, ByteRange::new(offset, u64::from(len)).unwrap(), Some(flags))
            }
            other => panic!("{other:?}"),
        };
        prop_assert_eq!(kind, command);
        prop_assert_eq!((range.start(), range.len()), (offset, u64::from(len)));
        if let Some(given) = given {
            prop_assert_eq!(given, wanted);
        }
    }
}

/// "Clients MUST NOT set a command flag bit that is not documented for the particular command": every bit by itself.
#[test]
fn each_flag_is_valid_for_the_commands_that_document_it() {
    let (fua, no_hole, df, req_one, fast_zero) = (0, 1, 2, 3, 4);
    for structured in [false, true] {
        let terms = Terms { size: 5000, structured, contexts: Contexts::all() };
        let read: &[u32] = if structured { &[fua, df] } else { &[fua] };
        for (command, len, valid) in [
            (Command::READ, 10, read),
            (Command::WRITE, 10, &[fua]),
            (Command::FLUSH, 0, &[fua]),
            (Command::TRIM, 10, &[fua]),
            (Command::CACHE, 10, &[fua]),
            (Command::WRITE_ZEROES, 10, &[fua, no_hole, fast_zero]),
            (Command::BLOCK_STATUS, 10, &[fua, req_one]),
        ] {
            for bit in 0..16 {
                let header = RequestHeader { flags: 1 << bit, command, cookie: 0, offset: 0, len };
                let verdict = admit(&header, &terms, &limits()).unwrap();
                let taken = match &verdict {
                    Verdict::Submit(_) | Verdict::Write { .. } => true,
                    Verdict::Refuse { error: ErrorCode::EINVAL, .. } => false,
                    other => panic!("{command}, bit {bit}: {other:?}"),
                };
                assert_eq!(taken, valid.contains(&bit), "{command}, bit {bit}, structured {structured}: {verdict:?}");
            }
        }
    }
}

#[test]
fn a_refused_block_status_says_what_was_wrong() {
    for (contexts, len, names) in [
        (Contexts::all(), 0, "length 0"),
        (Contexts::empty(), 0, "length 0"),
        (Contexts::empty(), 10, "no metadata context"),
    ] {
        let header = RequestHeader { flags: 0, command: Command::BLOCK_STATUS, cookie: 0, offset: 0, len };
        let terms = Terms { size: 5000, structured: true, contexts };
        match admit(&header, &terms, &limits()) {
            Ok(Verdict::Refuse { why, .. }) => assert!(why.contains(names), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}
