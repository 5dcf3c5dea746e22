use super::super::codec::{CloneState, DESTINATION_NONE_YET, DESTINATION_UNKNOWN, geometry_for};
use super::*;
use crate::units::Generation;

fn sample(generation: u64) -> Superblock {
    Superblock {
        uuid: [7; 16],
        geometry: geometry_for(1 << 30, RegionSize::default()).unwrap(),
        source: SourceFingerprint { size: 1 << 30, samples: 9, digest: [1; 16] },
        destination_id: [2; 16],
        state: CloneState::Active,
        generation: Generation(generation),
        created_unix_s: 0,
    }
}

fn valid(generation: u64) -> CopyFound {
    Ok(Classified::Valid(sample(generation)))
}
fn damaged() -> CopyFound {
    Ok(Classified::Damaged("checksum".into()))
}
fn unreadable() -> CopyFound {
    Err(Error::io(libc::EIO, "4096 bytes at offset 0"))
}

/// The verdict in one word, with the generation of the superblock that is used.
fn verdict(a: CopyFound, b: CopyFound) -> String {
    match recover([a, b]) {
        Recovery::Use(r) => {
            format!("use {}{}", r.superblock.generation, if r.is_copy_lost() { ", copy lost" } else { "" })
        }
        Recovery::NeverFormatted => "never formatted".into(),
        Recovery::Damaged(_) => "damaged".into(),
        Recovery::Unsupported(_) => "unsupported".into(),
        Recovery::Foreign(_) => "foreign".into(),
        Recovery::Unreadable(_) => "unreadable".into(),
    }
}

#[test]
fn every_pair_of_copies() {
    let empty = || Ok(Classified::Empty);
    let foreign = || Ok(Classified::Foreign("swap space"));
    let unsupported = || Ok(Classified::Unsupported("format version 2".into()));
    assert_eq!(verdict(valid(3), valid(3)), "use 3");
    assert_eq!(verdict(valid(4), valid(3)), "use 4");
    assert_eq!(verdict(valid(3), valid(4)), "use 4");
    // Garbage is damage beside a valid copy; something that is known is somebody's.
    let garbage = || Ok(Classified::Foreign(UNKNOWN_DATA));
    assert_eq!(verdict(valid(3), garbage()), "use 3, copy lost");
    assert_eq!(verdict(garbage(), valid(3)), "use 3, copy lost");
    let makers: [(&str, &dyn Fn() -> CopyFound); 5] = [
        ("empty", &empty),
        ("damaged", &damaged),
        ("unreadable", &unreadable),
        ("foreign", &foreign),
        ("unsupported", &unsupported),
    ];
    let with_valid = ["use 3", "use 3, copy lost", "use 3, copy lost", "damaged", "unsupported"];
    for ((name, make), expected) in makers.iter().zip(with_valid) {
        assert_eq!(verdict(valid(3), make()), expected, "valid, {name}");
        assert_eq!(verdict(make(), valid(3)), expected, "{name}, valid");
    }
    // Without a valid copy the gravest finding counts; what can't be read may be a good copy.
    let rank = ["never formatted", "damaged", "unreadable", "foreign", "unsupported"];
    for (i, (a_name, a)) in makers.iter().enumerate() {
        for (j, (b_name, b)) in makers.iter().enumerate() {
            let expected = ["unsupported", "unreadable", "damaged", "foreign", "never formatted"]
                .into_iter()
                .find(|v| rank[i] == *v || rank[j] == *v);
            assert_eq!(Some(verdict(a(), b()).as_str()), expected, "{a_name}, {b_name}");
        }
    }
}

#[test]
fn copies_of_different_clones_are_damage() {
    let other = Superblock { uuid: [8; 16], ..sample(3) };
    assert_eq!(verdict(valid(3), Ok(Classified::Valid(other))), "damaged");
}

/// A growth writes copy A first; its size and source may differ from copy B's, but only the newer one is larger.
#[test]
fn copies_of_a_clone_that_grew() {
    let grown = |generation, size: u64| {
        let geometry = sample(0).geometry.with_size(size).unwrap();
        let source = SourceFingerprint { size, ..sample(0).source };
        Ok(Classified::Valid(Superblock { geometry, source, ..sample(generation) }))
    };
    let used = |a, b| match recover([a, b]) {
        Recovery::Use(used) => Some((used.superblock.geometry.size(), used.other.is_some())),
        _ => None,
    };
    assert_eq!(used(grown(4, 2 << 30), valid(3)), Some((2 << 30, true)));
    assert_eq!(used(valid(3), grown(4, 2 << 30)), Some((2 << 30, true)));
    assert_eq!(used(grown(4, 2 << 30), grown(4, 2 << 30)), Some((2 << 30, false)));
    assert_eq!(used(grown(3, 2 << 30), valid(3)), None, "equal generations");
    assert_eq!(used(valid(4), grown(3, 2 << 30)), None, "a clone does not shrink");
}

/// Completion writes copy A first; with the generation of the last commit both copies may have the same one.
#[test]
fn with_equal_generations_copy_a_counts() {
    let complete = Superblock { state: CloneState::Complete, ..sample(3) };
    let Recovery::Use(used) = recover([Ok(Classified::Valid(complete.clone())), valid(3)]) else { panic!() };
    assert_eq!((used.superblock, used.notes.len()), (complete, 1));
}

#[test]
fn errors_say_what_and_what_to_do() {
    let text = |a, b| recover([a, b]).into_result().unwrap_err().to_string();
    assert_eq!(
        text(damaged(), Ok(Classified::Empty)),
        "damaged: superblock copy A: checksum; copy B is not valid either; look with `hydrant meta check`"
    );
    assert_eq!(
        text(Ok(Classified::Foreign("swap space")), Ok(Classified::Empty)),
        "holds swap space, no metadata of hydrant"
    );
    assert_eq!(
        text(unreadable(), unreadable()),
        "neither superblock copy is usable: 4096 bytes at offset 0: Input/output error"
    );
    let Recovery::Use(used) = recover([unreadable(), valid(1)]) else { panic!() };
    assert_eq!(
        used.notes,
        ["superblock copy A is unreadable: 4096 bytes at offset 0: Input/output error; the other copy is used"]
    );
}

/// What was recorded at the first use may be in one copy only.
#[test]
fn copies_may_differ_in_what_was_not_known() {
    let before = Superblock { source: SourceFingerprint::UNKNOWN, destination_id: DESTINATION_NONE_YET, ..sample(3) };
    for (a, b) in [(sample(4), before.clone()), (before.clone(), sample(4))] {
        assert_eq!(verdict(Ok(Classified::Valid(a)), Ok(Classified::Valid(b))), "use 4");
    }
    // A forced start was killed between the two: the newer one counts. Two of one generation were never written.
    let other_destination = |generation| Superblock { destination_id: [3; 16], ..sample(generation) };
    let source = SourceFingerprint { samples: 8, ..sample(3).source };
    let other_source = |generation| Superblock { source, ..sample(generation) };
    for other in [&other_destination as &dyn Fn(u64) -> Superblock, &other_source] {
        let other = |generation| Ok(Classified::Valid(other(generation)));
        assert_eq!(verdict(valid(3), other(4)), "use 4");
        assert_eq!(verdict(other(4), valid(3)), "use 4");
        assert_eq!(verdict(valid(4), other(4)), "damaged");
    }
}

#[test]
fn what_a_start_records() {
    let size = 1 << 30;
    let known = sample(1).source;
    let (other, unread) = (SourceFingerprint { digest: [9; 16], ..known }, SourceFingerprint::UNKNOWN);
    let unread = SourceFingerprint { size, ..unread };
    let record = |superblock: &Superblock, source, id| devices_to_record(superblock, source, [id; 16]);
    // As it is there; and what can't be seen now.
    assert_eq!(record(&sample(1), known, 2), None);
    assert_eq!(record(&sample(1), unread, 2), None);
    assert_eq!(devices_to_record(&sample(1), known, DESTINATION_UNKNOWN), None);
    // What a user has vouched for replaces what was there, each by itself.
    assert_eq!(record(&sample(1), known, 3), Some((known, [3; 16])));
    assert_eq!(record(&sample(1), other, 2), Some((other, [2; 16])));
    assert_eq!(record(&sample(1), unread, 3), Some((known, [3; 16])));
    let complete = Superblock { state: CloneState::Complete, ..sample(1) };
    assert_eq!(record(&complete, known, 3), Some((known, [3; 16])));
    // What was not known.
    let unknown = Superblock { source: SourceFingerprint::UNKNOWN, ..sample(1) };
    assert_eq!(record(&unknown, known, 2), Some((known, [2; 16])));
    assert_eq!(record(&unknown, unread, 2), None);
    let ahead = Superblock { destination_id: DESTINATION_NONE_YET, ..sample(1) };
    assert_eq!(record(&ahead, known, 3), Some((known, [3; 16])));
    assert_eq!(devices_to_record(&ahead, known, DESTINATION_UNKNOWN), Some((known, DESTINATION_UNKNOWN)));
    let any = Superblock { destination_id: DESTINATION_UNKNOWN, ..sample(1) };
    assert_eq!(record(&any, known, 3), None);
}

#[test]
fn what_is_not_known_fits() {
    let size = 1 << 30;
    let known = sample(1).source;
    let (source_size, region_size) = (Some(size), None);
    let expected = Expected { size: None, source_size, region_size, source: known, destination_id: [2; 16] };
    let none = |superblock: &Superblock, expected: &Expected| mismatches(superblock, expected).is_empty();
    let unknown = Superblock { source: SourceFingerprint::UNKNOWN, ..sample(1) };
    assert!(none(&unknown, &expected));
    // A source that could not be read is any of that size.
    let unread = SourceFingerprint { size, ..SourceFingerprint::UNKNOWN };
    assert!(none(&sample(1), &Expected { source: unread, ..expected }));
    assert!(!none(&sample(1), &Expected { source: unread, source_size: Some(size - 1), ..expected }));
    // dm-clone's source may be larger, never smaller.
    let of = |size: u64| Expected { source_size: Some(size), ..expected };
    assert!(none(&unknown, &of(size + 1)) && !none(&unknown, &of(size - 1)));
    // Recorded by an earlier build: all of a larger source.
    let larger = Superblock { source: SourceFingerprint { size: size + 1, ..known }, ..sample(1) };
    let with_all = |size| Expected { source: larger.source, ..of(size) };
    assert!(
        none(&larger, &with_all(size + 1)) && !none(&larger, &with_all(size)) && none(&larger, &with_all(size + 2))
    );
    // A clone that was grown over the end of its source, or without it.
    let smaller = Superblock { source: SourceFingerprint { size: size - 1, ..known }, ..sample(1) };
    let with_less = |size| Expected { source: smaller.source, ..of(size) };
    assert!(none(&smaller, &with_less(size - 1)) && !none(&smaller, &with_less(size - 2)));
    let sourceless = Superblock { source: SourceFingerprint::NONE, ..sample(1) };
    assert!(none(&sourceless, &Expected { source_size: None, source: SourceFingerprint::NONE, ..expected }));

    for open in [DESTINATION_UNKNOWN, DESTINATION_NONE_YET] {
        assert!(none(&Superblock { destination_id: open, ..sample(1) }, &expected));
    }
    assert!(none(&sample(1), &Expected { destination_id: DESTINATION_UNKNOWN, ..expected }));
    assert!(!none(&sample(1), &Expected { destination_id: [3; 16], ..expected }));
}

#[test]
fn mismatches_and_their_kinds() {
    let superblock = sample(1);
    let expected = Expected {
        size: None,
        source_size: Some(1 << 30),
        region_size: Some(RegionSize::default()),
        source: superblock.source,
        destination_id: [2; 16],
    };
    let error =
        |expected: &Expected| mismatch_error(&mismatches(&superblock, expected)).map(|e| (e.kind(), e.to_string()));
    assert_eq!(error(&expected), None);
    assert_eq!(error(&Expected { region_size: None, ..expected }), None);
    // The source has grown; the clone has grown since its configuration was written.
    assert_eq!(error(&Expected { source_size: Some((1 << 30) + 512), ..expected }), None);
    assert_eq!(error(&Expected { size: Some(1 << 20), ..expected }), None);
    assert_eq!(error(&Expected { size: Some(1 << 30), ..expected }), None);
    assert_eq!(error(&Expected { source_size: None, ..expected }), None);
    let smaller = Expected {
        source_size: Some((1 << 30) - 512),
        source: SourceFingerprint { size: (1 << 30) - 512, ..superblock.source },
        ..expected
    };
    assert_eq!(
        error(&smaller),
        Some((ErrorKind::SourceChanged, "the metadata are for a source of 1GiB, this one has 1073741312 bytes".into()))
    );
    assert_eq!(
        error(&Expected { size: Some(2 << 30), ..expected }),
        Some((
            ErrorKind::Mismatch,
            "the clone has 1GiB, 2GiB was asked for; start it as it is, and grow it with `hydrant resize`".into()
        ))
    );
    let changed = Expected { source: SourceFingerprint { digest: [9; 16], ..superblock.source }, ..expected };
    assert_eq!(error(&changed).unwrap().0, ErrorKind::SourceChanged);
    let all = Expected { region_size: Some(RegionSize::new(4096).unwrap()), destination_id: [3; 16], ..changed };
    assert_eq!(
        error(&all),
        Some((
            ErrorKind::Mismatch,
            "the metadata are for regions of 64KiB, 4KiB was given; the source's content is not that of the one the \
             clone was made from; the metadata belong to another destination"
                .into()
        ))
    );
}
