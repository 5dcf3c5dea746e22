use super::*;
use proptest::prelude::*;

fn parse(line: &str) -> Result<DmTable, String> {
    line.parse()
}

/// A line with these arguments after the source.
fn with(arguments: &str) -> Result<DmTable, String> {
    parse(&format!("0 524288 clone /m /d /s {arguments}"))
}

/// Every line that dm-clone refuses before it has looked at a device, and what it says.
#[test]
fn bad_lines_get_the_words_of_dm_clone() {
    let lines = [
        ("", words::INVALID_FORMAT),
        ("0", words::INVALID_FORMAT),
        ("0 524288", words::INVALID_FORMAT),
        ("x 524288 clone m d s 8", words::INVALID_FORMAT),
        ("0 x clone m d s 8", words::INVALID_FORMAT),
        ("0 -8 clone m d s 8", words::INVALID_FORMAT),
        ("-0 8 clone m d s 8", words::INVALID_FORMAT),
        ("0 99999999999999999999 clone m d s 8", words::INVALID_FORMAT),
        ("0 0 clone m d s 8", words::ZERO_LENGTH),
        ("0 18446744073709551615 clone m d s 8", words::TOO_LARGE),
        ("18446744073709551615 8 clone m d s 8", words::TOO_LARGE),
        ("0 18014398509481984 clone m d s 8", words::TOO_LARGE),
        ("8 524288 clone m d s 8", words::GAP),
        ("0 524288 linear m 0", words::UNKNOWN_TARGET),
        ("0 524288 Clone m d s 8", words::UNKNOWN_TARGET),
        ("0 524288 clone", words::ARGUMENT_COUNT),
        ("0 524288 clone m", words::ARGUMENT_COUNT),
        ("0 524288 clone m d s", words::ARGUMENT_COUNT),
        ("0 524288 clone m d\\ s 8", words::ARGUMENT_COUNT),
    ];
    for (line, said) in lines {
        let error = parse(line).unwrap_err();
        assert!(error.starts_with(&format!("{said}: ")), "{line}: {error}");
    }
    let arguments = [
        ("7", words::REGION_SIZE),
        ("0", words::REGION_SIZE),
        ("4194304", words::REGION_SIZE),
        ("2097153", words::REGION_SIZE),
        ("abc", words::REGION_SIZE),
        ("8k", words::REGION_SIZE),
        ("-8", words::REGION_SIZE),
        ("+8", words::REGION_SIZE),
        ("0x8", words::REGION_SIZE),
        // Accepted as 8 by the kernel.
        ("4294967304", words::REGION_SIZE),
        ("18446744073709551624", words::REGION_SIZE),
        ("9", words::NOT_POWER_OF_2),
        ("12", words::NOT_POWER_OF_2),
        ("24", words::NOT_POWER_OF_2),
        ("100", words::NOT_POWER_OF_2),
        ("010", words::NOT_POWER_OF_2),
        ("8 x", words::FEATURE_COUNT),
        ("8 -1", words::FEATURE_COUNT),
        ("8 3 no_hydration no_hydration no_hydration", words::FEATURE_COUNT),
        ("8 1", words::FEATURE_COUNT),
        ("8 2 no_hydration", words::FEATURE_COUNT),
        ("8 4294967296", words::FEATURE_COUNT),
        ("8 no_hydration", words::FEATURE_COUNT),
        ("8 1 hydration", words::FEATURE),
        ("8 2 no_hydration hydration_threshold", words::FEATURE),
        ("8 0 5 a b c d e", words::CORE_COUNT),
        ("8 0 x", words::CORE_COUNT),
        ("8 0 2", words::CORE_COUNT),
        ("8 0 2 hydration_threshold", words::CORE_COUNT),
        ("8 0 no_hydration", words::CORE_COUNT),
        ("8 1 no_hydration 4 hydration_threshold 1", words::CORE_COUNT),
        ("8 0 1 hydration_threshold", words::CORE_ODD),
        ("8 0 3 hydration_threshold 1 hydration_batch_size", words::CORE_ODD),
        ("8 0 2 threshold 1", words::CORE),
        ("8 0 2 1 hydration_threshold", words::CORE),
    ];
    for (arguments, said) in arguments {
        let error = with(arguments).unwrap_err();
        assert!(error.starts_with(&format!("{said}: ")), "{arguments}: {error}");
    }
    for (key, said) in [("hydration_threshold", words::THRESHOLD), ("HYDRATION_BATCH_SIZE", words::BATCH_SIZE)] {
        for value in ["x", "-1", "0x10", "4294967296", "99999999999999999999", "1k", "++1", "+", "1\\ "] {
            let error = with(&format!("8 0 2 {key} {value}")).unwrap_err();
            assert!(error.starts_with(&format!("{said}: ")), "{key} {value}: {error}");
        }
    }
}

#[test]
fn good_lines() {
    let plain = parse("0 524288 clone 254:0 /dev/d nbd://h/x 8").unwrap();
    assert_eq!((plain.size(), plain.region_size().bytes()), (256 << 20, 4096));
    assert_eq!(plain.metadata(), Path::new("/dev/block/254:0"));
    assert_eq!(device_number(&plain.metadata()), Some("254:0"));
    assert_eq!(device_number(&plain.destination()), None);
    assert_eq!(plain.destination(), Path::new("/dev/d"));
    assert_eq!(plain.source(), "nbd://h/x");
    assert!(!plain.no_hydration() && !plain.no_discard_passdown());
    assert_eq!((plain.hydration_threshold(), plain.hydration_batch_size()), (None, None));

    let all =
        with("2097152 2 NO_discard_passdown No_Hydration 4 Hydration_threshold 0 hydration_batch_size 4294967295")
            .unwrap();
    assert!(all.no_hydration() && all.no_discard_passdown());
    assert_eq!((all.hydration_threshold(), all.hydration_batch_size()), (Some(0), Some(u32::MAX)));
    assert_eq!(all.region_size().bytes(), 1 << 30);

    let grown = "0 1048576 clone 254:0 /dev/d nbd://h/x 8";
    assert_eq!(plain.grown_to(512 << 20).to_string(), grown);
    assert_eq!(plain.grown_to(plain.size()), plain);
    // A last sector that is not whole counts.
    assert_eq!(plain.grown_to((512 << 20) - 511).to_string(), grown);
    assert!(plain.is_len_of(256 << 20) && plain.is_len_of((256 << 20) - 511));
    assert!(!plain.is_len_of((256 << 20) - 512) && !plain.is_len_of((256 << 20) + 1));

    // Twice, and too much: the last one counts, and the rest means nothing.
    let twice =
        with("8 2 no_hydration no_hydration 4 hydration_threshold 1 hydration_threshold +2 and more 7").unwrap();
    assert_eq!(twice.hydration_threshold(), Some(2));
    assert_eq!(with("8 0 0 9").unwrap().hydration_threshold(), None);
    // A target of one sector, smaller than its region; one of more than 2^31 regions; 0008 is decimal.
    assert_eq!(parse("0 1 clone m d s 2097152").unwrap().size(), 512);
    assert_eq!(parse("0 34359738368 clone m d s 8").unwrap().size(), 16 << 40);
    assert_eq!(with("0008 00 02 hydration_threshold 007").unwrap().hydration_threshold(), Some(7));
    assert_eq!(parse(" \t0\n8\x0bclone m d s 8\r\n").unwrap().size(), 4096);
}

#[test]
fn the_largest_length_and_words_that_are_shown() {
    let of = |start: u64, len: u64| parse(&format!("{start} {len} clone m d s 8"));
    assert!(of(0, LEN_MAX).is_ok());
    for (start, len) in [(0, LEN_MAX + 1), (1, LEN_MAX), (LEN_MAX, 1), (u64::MAX, 1), (0, u64::MAX)] {
        assert!(of(start, len).unwrap_err().starts_with(words::TOO_LARGE), "{start} {len}");
    }
    assert!(of(1, LEN_MAX - 1).unwrap_err().starts_with(words::GAP));
    assert_eq!(shown("a\nb"), "'a\\nb'");
    assert_eq!(shown(&"x".repeat(SHOWN_MAX)), format!("'{}'", "x".repeat(SHOWN_MAX)));
    assert_eq!(shown(&"x".repeat(SHOWN_MAX + 1)), format!("'{}...'", "x".repeat(SHOWN_MAX)));
}

#[test]
fn one_line_only() {
    let line = "0 8 clone m d s 8";
    for (text, number) in [
        (format!("{line}\n8 8 clone m d s 8"), 2),
        (format!("{line} 0 0\n\n8 8 linear m 0\n"), 3),
        (format!("0 8 clone m\n8 8 {line}"), 2),
        (format!("{line}\n{line}"), 2),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.starts_with(&format!("Invalid format on line {number} of table: ")), "{text}: {error}");
    }
    // A line break that is in a word, or between those of one line.
    assert!(parse("0 8 clone a\\\n8 8 x 8").is_ok());
    assert!(parse("0 8 clone m d s\n8 0\n0\n").is_ok());
}

#[test]
fn the_line_repeats_what_was_given() {
    let lines = [
        "0 524288 clone 254:0 254:16 254:32 8",
        "0 524288 clone 254:0 254:16 254:32 8 1 no_hydration",
        "0 524288 clone /m /d /s 0008 2 NO_Hydration no_hydration 2 hydration_threshold +7 and the rest",
        r"0 8 clone /with\ blank /back\\slash /tab\	end\\ 8 0 0",
    ];
    for line in lines {
        assert_eq!(parse(line).unwrap().to_string(), line);
    }
    let words = parse(lines[3]).unwrap();
    assert_eq!(words.metadata(), Path::new("/with blank"));
    assert_eq!(words.destination(), Path::new(r"/back\slash"));
    assert_eq!(words.source(), "/tab\tend\\");
    // What a backslash needs not, loses it; at the end it is itself.
    assert_eq!(parse(r"0 8 clone \m d s 8 0 0 \").unwrap().to_string(), r"0 8 clone m d s 8 0 0 \\");
}

#[test]
fn the_line_of_options() {
    let line = Line {
        size: 1 << 20,
        metadata: "/m",
        destination: "/d e",
        source: "nbd://h/x",
        region_size: RegionSize::default(),
        no_hydration: false,
        no_discard_passdown: false,
        hydration_threshold: None,
        hydration_batch_size: None,
    };
    assert_eq!(line.to_string(), r"0 2048 clone /m /d\ e nbd://h/x 128");
    let line = Line { size: (1 << 20) - 511, ..line };
    assert_eq!(line.to_string(), r"0 2048 clone /m /d\ e nbd://h/x 128");
    let line = Line { no_hydration: true, no_discard_passdown: true, ..line };
    assert_eq!(line.to_string(), r"0 2048 clone /m /d\ e nbd://h/x 128 2 no_hydration no_discard_passdown");
    let line = Line { no_hydration: false, hydration_batch_size: Some(4), ..line };
    let expected = r"0 2048 clone /m /d\ e nbd://h/x 128 1 no_discard_passdown 2 hydration_batch_size 4";
    assert_eq!(line.to_string(), expected);
    let line = Line { no_discard_passdown: false, hydration_threshold: Some(0), ..line };
    let expected = r"0 2048 clone /m /d\ e nbd://h/x 128 0 4 hydration_threshold 0 hydration_batch_size 4";
    assert_eq!(line.to_string(), expected);
    let parsed = parse(expected).unwrap();
    assert_eq!((parsed.hydration_threshold(), parsed.hydration_batch_size()), (Some(0), Some(4)));
}

#[test]
fn relative_devices() {
    let mut table = parse("0 8 clone m /d 8:0 8").unwrap();
    table.relative_to(Path::new("/etc/hydrant")).unwrap();
    assert_eq!(table.to_string(), "0 8 clone /etc/hydrant/m /d 8:0 8");
    assert_eq!(table.source(), "/dev/block/8:0");
    let mut table = parse("0 8 clone m d nbd://h/x 8").unwrap();
    table.relative_to(Path::new("/a b")).unwrap();
    assert_eq!(table.to_string(), r"0 8 clone /a\ b/m /a\ b/d nbd://h/x 8");
}

/// Words that a line is made of, good and bad ones.
fn word() -> impl Strategy<Value = String> {
    let known = ["0", "1", "2", "4", "8", "524288", "clone", NO_HYDRATION, NO_DISCARD_PASSDOWN, HYDRATION_THRESHOLD];
    prop_oneof![
        4 => proptest::sample::select(known.to_vec()).prop_map(String::from),
        1 => any::<u64>().prop_map(|number| number.to_string()),
        1 => any::<String>(),
        1 => "[ -~\\\\ \t]{0,8}",
    ]
}

proptest! {
    #[test]
    fn no_line_panics_and_what_is_understood_is_repeated(words in proptest::collection::vec(word(), 0..16)) {
        let (line, sane) = (words.join(" "), format!("0 8 clone {}", words.join(" ")));
        for line in [line, sane] {
            match parse(&line) {
                Ok(table) => {
                    let again = parse(&table.to_string());
                    prop_assert_eq!(again.as_ref(), Ok(&table));
                }
                Err(error) => prop_assert!(!error.contains('\n') && error.len() < 2000, "{}", error),
            }
        }
    }

    #[test]
    fn words_survive_their_escapes(words in proptest::collection::vec(".{1,12}", 1..6)) {
        let line: Vec<String> = words.iter().map(|word| escaped(word)).collect();
        prop_assert_eq!(split(&line.join(" ")), words);
    }
}
