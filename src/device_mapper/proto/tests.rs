use super::*;
use proptest::prelude::*;

/// As `gcc` lays out what includes `linux/dm-ioctl.h` on x86-64 and arm64.
#[test]
fn a_table_to_load_as_in_the_header() {
    let table = [Target::linear(0x1234, Number { major: 259, minor: 7 })];
    let bytes = encode(Which::Uuid("HYDRANT-1"), Flags::SKIP_LOCKFS, 9, &table, 0).unwrap();
    assert_eq!(bytes.len(), 312 + 40 + 8);
    assert_eq!(bytes[..12], [4u32, 27, 0].map(u32::to_ne_bytes).concat());
    let word = |at: usize| u32_at(&bytes, at).unwrap();
    // data_size, data_start, target_count, open_count, flags, event_nr, padding
    assert_eq!([12, 16, 20, 24, 28, 32, 36].map(word), [360, 312, 1, 0, 1 << 10, 9, 0]);
    assert_eq!(bytes[40..176], [0; 136], "no number, no name");
    assert_eq!(&bytes[176..186], b"HYDRANT-1\0");
    assert_eq!(bytes[305..312], [0; 7]);
    assert_eq!((u64_at(&bytes, 312), u64_at(&bytes, 320)), (Some(0), Some(0x1234)));
    assert_eq!((word(328), word(332)), (0, 48));
    assert_eq!(&bytes[336..352], b"linear\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(&bytes[352..360], b"259:7 0\0");
}

#[test]
fn numbers_of_the_ioctls() {
    let commands = [
        (Command::Version, 0xc138_fd00_u32),
        (Command::Create, 0xc138_fd03),
        (Command::Remove, 0xc138_fd04),
        (Command::Suspend, 0xc138_fd06),
        (Command::Status, 0xc138_fd07),
        (Command::TableLoad, 0xc138_fd09),
        (Command::TableClear, 0xc138_fd0a),
        (Command::TableStatus, 0xc138_fd0c),
    ];
    for (command, number) in commands {
        assert_eq!(command.request(), number, "{}", command.name());
    }
}

/// As the kernel answers: `next` counts from the start of the data.
fn answer(table: &[Target]) -> Vec<u8> {
    let mut bytes = encode(Which::Both { name: "vm1", uuid: "u" }, Flags::ACTIVE_PRESENT, 0, table, 4096).unwrap();
    let mut at = 0;
    for target in table {
        let len = (SPEC_BYTES + target.parameters.len() + 1).next_multiple_of(8);
        at += len;
        put(&mut bytes, HEADER_BYTES + at - len + 20, &(at as u32).to_ne_bytes());
    }
    put(&mut bytes, DEV_OFFSET, &0x12_34_0f_f5_56_u64.to_ne_bytes()[..8]);
    put(&mut bytes, OPEN_COUNT_OFFSET, &2u32.to_ne_bytes());
    bytes
}

#[test]
fn an_answer() {
    let table = [Target::linear(8, Number { major: 254, minor: 0 }), Target::error(16)];
    let bytes = answer(&table);
    assert_eq!(decode_table(&bytes).unwrap(), table);
    let info = decode(&bytes).unwrap();
    assert_eq!((info.name.as_str(), info.uuid.as_str(), info.open_count), ("vm1", "u", 2));
    // (minor & 0xff) | major << 8 | (minor & ~0xff) << 12
    assert_eq!(Number::decode(0x0051_0307), Number { major: 0x103, minor: 0x507 });
    let mut full = bytes.clone();
    put(&mut full, FLAGS_OFFSET, &Flags::BUFFER_FULL.bits().to_ne_bytes());
    assert_eq!(decode_table(&full), None);
    for len in 0..HEADER_BYTES {
        assert_eq!(decode(&bytes[..len]), None, "{len} bytes");
    }
}

#[test]
fn what_a_linear_table_shows() {
    let number = Number { major: 259, minor: 3 };
    assert_eq!(Target::linear(1, number).whole_linear(), Some(number));
    assert_eq!(Target::error(1).whole_linear(), None);
    for parameters in ["259:3 8", "259:3", "259 0", "a:b 0", " 0", ""] {
        let target = Target { parameters: parameters.into(), ..Target::linear(1, number) };
        assert_eq!(target.whole_linear(), None, "{parameters}");
    }
    assert_eq!(Target { start: 1, ..Target::linear(1, number) }.whole_linear(), None);
}

#[test]
fn what_is_too_long_is_not_cut() {
    let name = "x".repeat(NAME_LEN_MAX);
    assert!(encode(Which::Name(&name), Flags::empty(), 0, &[], 0).is_some());
    assert!(encode(Which::Name(&(name + "x")), Flags::empty(), 0, &[], 0).is_none());
    assert!(encode(Which::Uuid(&"x".repeat(UUID_BYTES)), Flags::empty(), 0, &[], 0).is_none());
    assert!(encode(Which::Name("a\0b"), Flags::empty(), 0, &[], 0).is_none());
    let kind = Target { kind: "x".repeat(TYPE_BYTES), ..Target::error(1) };
    assert!(encode(Which::None, Flags::empty(), 0, &[kind], 0).is_none());
}

proptest! {
    #[test]
    fn no_answer_is_too_strange(mut bytes in prop::collection::vec(any::<u8>(), 0..600), count in 0u32..4, start in 0u32..700) {
        if bytes.len() >= HEADER_BYTES {
            put(&mut bytes, FLAGS_OFFSET, &[0; 4]);
            put(&mut bytes, TARGET_COUNT_OFFSET, &count.to_ne_bytes());
            put(&mut bytes, 16, &start.to_ne_bytes());
        }
        let _ = (decode(&bytes), decode_table(&bytes));
    }
    #[test]
    fn device_numbers(major in 0u32..1 << 12, minor in 0u32..1 << 20) {
        let dev = u64::from(minor & 0xff) | u64::from(major) << 8 | u64::from(minor & !0xff) << 12;
        prop_assert_eq!(Number::decode(dev), Number { major, minor });
        prop_assert_eq!(format!("{major}:{minor}").parse(), Ok(Number { major, minor }));
    }
}
