use super::*;
use crate::units::RegionSize;

fn geometry(regions: u64) -> Geometry {
    Geometry::new(regions * 4096, RegionSize::new(4096).unwrap(), 1000).unwrap()
}
fn run(first: u64, end: u64) -> RegionRange {
    RegionRange::between(RegionIndex(first), RegionIndex(end)).unwrap()
}
fn found(directory: &Path, identity: &Identity, regions: u64) -> Option<KeptBits> {
    match KeptBits::find(directory, identity, &geometry(regions), Generation(9)).unwrap() {
        Found::Bits(bits) => Some(bits),
        Found::Nothing => None,
        Found::Spoiled => panic!("spoiled"),
        Found::OfLater(generation) => panic!("of {generation}"),
    }
}

#[test]
fn bits_are_found_by_the_next_one() {
    let directory = tempfile::tempdir().unwrap();
    let identity = Identity::now([7; 16], &geometry(1000)).unwrap();
    assert!(found(directory.path(), &identity, 1000).is_none());
    let kept = KeptBits::create(directory.path(), &identity, &geometry(1000)).unwrap();
    for run in [run(0, 1), run(5, 7), run(63, 65), run(100, 400), run(999, 1000)] {
        kept.keep(run);
    }
    kept.keep(run(6, 9));
    drop(kept);
    let next = found(directory.path(), &identity, 1000).unwrap();
    let all = [run(0, 1), run(5, 9), run(63, 65), run(100, 400), run(999, 1000)];
    assert_eq!(next.runs(run(0, 1000)), all);
    assert_eq!(next.runs(run(6, 64)), [run(6, 9), run(63, 64)]);
    assert_eq!(next.runs(run(200, 300)), [run(200, 300)]);
    assert_eq!(next.runs(run(401, 999)), []);
    // It goes on with it, also when the clone grows.
    next.grow(&geometry(100_000)).unwrap();
    next.keep(run(99_999, 100_000));
    let third = found(directory.path(), &identity, 100_000).unwrap();
    assert_eq!(third.runs(run(900, 100_000)), [run(999, 1000), run(99_999, 100_000)]);
    third.remove();
    assert!(found(directory.path(), &identity, 1000).is_none());
}

#[test]
fn of_another_clone_boot_or_region_size_they_are_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let identity = Identity::now([7; 16], &geometry(1000)).unwrap();
    let kept = KeptBits::create(directory.path(), &identity, &geometry(1000)).unwrap();
    kept.keep(run(1, 2));
    let path = identity.path_in(directory.path());
    let good = fs::read(&path).unwrap();
    assert_eq!(good.len(), 8192);
    let others = [
        Identity { uuid: [8; 16], ..identity.clone() },
        Identity { region_size: 8192, ..identity.clone() },
        Identity { boot_id: [b'0'; BOOT_ID_BYTES], ..identity.clone() },
    ];
    for other in others {
        fs::write(other.path_in(directory.path()), &good).unwrap();
        assert!(found(directory.path(), &other, 1000).is_none(), "{other:?}");
    }
    fs::write(&path, &good).unwrap();
    assert!(found(directory.path(), &identity, 1000).is_some());
    for broken in [&good[..0], &good[..4095], &[0; 8192]] {
        fs::write(&path, broken).unwrap();
        assert!(found(directory.path(), &identity, 1000).is_none(), "{} bytes", broken.len());
    }
    // A new one replaces what is there.
    fs::write(&path, &good).unwrap();
    let anew = KeptBits::create(directory.path(), &identity, &geometry(1000)).unwrap();
    assert_eq!(anew.runs(run(0, 1000)), []);
}

#[test]
fn after_a_failed_commit_they_are_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let identity = Identity::now([7; 16], &geometry(10)).unwrap();
    let kept = KeptBits::create(directory.path(), &identity, &geometry(10)).unwrap();
    kept.spoil();
    assert!(matches!(
        KeptBits::find(directory.path(), &identity, &geometry(10), Generation(9)).unwrap(),
        Found::Spoiled
    ));
}

/// Somebody has put back an earlier state of the metadata, and of the destination: the data of these regions are not there.
#[test]
fn with_older_metadata_they_are_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let identity = Identity::now([7; 16], &geometry(10)).unwrap();
    let kept = KeptBits::create(directory.path(), &identity, &geometry(10)).unwrap();
    kept.keep(run(1, 2));
    kept.committed(Generation(9));
    kept.committed(Generation(8));
    assert!(found(directory.path(), &identity, 10).is_some());
    kept.committed(Generation(10));
    let find = |generation| KeptBits::find(directory.path(), &identity, &geometry(10), Generation(generation)).unwrap();
    assert!(matches!(find(9), Found::OfLater(Generation(10))));
    assert!(matches!(find(10), Found::Bits(_)) && matches!(find(11), Found::Bits(_)));
    kept.spoil();
    assert!(matches!(find(9), Found::OfLater(_)) && matches!(find(10), Found::Spoiled));
    KeptBits::forget(directory.path(), &identity).unwrap();
    assert!(matches!(find(9), Found::Nothing));
}
