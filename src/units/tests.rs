//! The arithmetic of units against sets of plain numbers, and its bounds.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn bytes(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn set(range: ByteRange) -> BTreeSet<u64> {
    (range.start()..range.end()).collect()
}

#[test]
fn constants_are_those_of_the_documents() {
    assert_eq!((REGION_SIZE_MIN, REGION_SIZE_MAX, REGION_SIZE_DEFAULT), (4096, 1_073_741_824, 65536));
    assert_eq!((DEVICE_SIZE_MAX, SECTOR_SIZE), (0x7fff_ffff_ffff_ffff, 512));
    assert_eq!(RegionSize::default().bytes(), REGION_SIZE_DEFAULT);
    assert_eq!((RegionSize::default().sectors(), RegionSize::default().shift()), (128, 16));
}

#[test]
fn ranges_end_at_the_last_byte_of_the_largest_device() {
    assert_eq!(ByteRange::new(5, 0), None);
    assert_eq!(ByteRange::between(5, 5), None);
    assert_eq!(ByteRange::between(6, 5), None);
    let last = bytes(DEVICE_SIZE_MAX - 1, 1);
    assert_eq!((last.start(), last.len(), last.end()), (DEVICE_SIZE_MAX - 1, 1, DEVICE_SIZE_MAX));
    assert!(!last.is_empty());
    assert_eq!(ByteRange::new(DEVICE_SIZE_MAX - 1, 2), None);
    assert_eq!(ByteRange::new(u64::MAX, 2), None);
    assert_eq!(last.split_at_multiples(1 << 62).collect::<Vec<_>>(), [last]);
    assert_eq!(format!("{last:?} {}", bytes(7, 2)), "9223372036854775806..9223372036854775807 2 bytes at offset 7");
}

#[test]
fn regions_from_to() {
    let between = |first, end| RegionRange::between(RegionIndex(first), RegionIndex(end));
    assert_eq!((between(3, 3), between(4, 3)), (None, None));
    let range = between(3, 6).unwrap();
    assert_eq!((range.first().0, range.end().0, range.count()), (3, 6, 3));
    assert_eq!(range.indices(), 3..6);
    assert_eq!(range.iter().map(|region| region.0).collect::<Vec<_>>(), [3, 4, 5]);
    assert_eq!([2, 3, 5, 6].map(|region| range.contains(RegionIndex(region))), [false, true, true, false]);
    assert_eq!(Some(RegionRange::single(RegionIndex(9))), between(9, 10));
}

#[test]
fn region_sizes_and_sizes_in_words() {
    for bytes in [4096, 1 << 20, 1 << 30] {
        assert_eq!(RegionSize::new(bytes).unwrap().bytes(), bytes);
    }
    assert_eq!(RegionSize::new(2048).unwrap_err(), "region size 2KiB is outside 4KiB to 1GiB");
    assert_eq!(RegionSize::new(1 << 31).unwrap_err(), "region size 2GiB is outside 4KiB to 1GiB");
    assert_eq!(RegionSize::new(5000).unwrap_err(), "region size 5000 bytes is not a power of two");
    for (text, bytes) in [("0", 0), ("1", 1), ("4096", 4096), ("3KiB", 3072), ("2MiB", 2 << 20), ("7GiB", 7 << 30)] {
        assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
    }
    assert_eq!("16777215TiB".parse::<ByteSize>().unwrap().0, 16_777_215 << 40);
    for text in ["", "KiB", "1.5GiB", "-1", "+1", "1 KiB", "1kB", "16777216TiB", "99999999999999999999", "\u{7f}"] {
        let error = text.parse::<ByteSize>().unwrap_err();
        assert!(error.contains("is not a size") || error.contains("is too large"), "{text}: {error}");
    }
    for (bytes, text) in [(0, "0 bytes"), (1, "1 byte"), (1025, "1025 bytes"), (3 << 20, "3MiB"), (5 << 40, "5TiB")] {
        assert_eq!(ByteSize(bytes).to_string(), text);
    }
    assert_eq!("1MiB".parse::<RegionSize>().unwrap().to_string(), "1MiB");
}

#[test]
fn geometries_have_bounds() {
    let small = RegionSize::new(4096).unwrap();
    let largest = DEVICE_SIZE_MAX - REGION_SIZE_MAX;
    for (size, per_zone, is) in [
        (0, 1, false),
        (1, 1, true),
        (1, 0, false),
        (1, u64::from(u32::MAX), true),
        (1, 1 << 32, false),
        (largest, 1, true),
        (largest + 1, 1, false),
    ] {
        assert_eq!(Geometry::new(size, small, per_zone).is_some(), is, "{size} {per_zone}");
    }
    let geometry = Geometry::new(5000, small, 3).unwrap();
    assert_eq!(geometry.with_size(9000), Geometry::new(9000, small, 3));
    assert_eq!((geometry.size(), geometry.region_size(), geometry.regions_per_zone()), (5000, small, 3));
    assert_eq!((geometry.whole(), geometry.nr_regions(), geometry.nr_zones()), (bytes(0, 5000), 2, 1));
}

#[test]
fn a_range_that_ends_with_a_region_does_not_touch_the_next() {
    let geometry = Geometry::new(5 * 4096, RegionSize::new(4096).unwrap(), 3).unwrap();
    let touched = |start, len| geometry.touched(bytes(start, len)).indices();
    assert_eq!(touched(0, 4096), 0..1);
    assert_eq!(touched(1, 4095), 0..1);
    assert_eq!(touched(4095, 1), 0..1);
    assert_eq!(touched(4095, 2), 0..2);
    assert_eq!(touched(4096, 8192), 1..3);
    assert_eq!(touched(0, 5 * 4096), 0..5);
}

proptest! {
    #[test]
    fn byte_ranges_are_sets(a in 0u64..40, a_len in 1u64..30, b in 0u64..40, b_len in 1u64..30, shift in 0u32..5) {
        let (a, b, align) = (bytes(a, a_len), bytes(b, b_len), 1 << shift);
        let common: BTreeSet<u64> = set(a).intersection(&set(b)).copied().collect();
        prop_assert_eq!(a.intersection(b).map(set).unwrap_or_default(), common.clone());
        prop_assert_eq!(a.overlaps(b), !common.is_empty());
        prop_assert_eq!(a.contains(b), set(a).is_superset(&set(b)));
        let block = |byte: u64| byte / align;
        let outward: BTreeSet<u64> = set(a).into_iter().map(block).collect();
        let of_outward: BTreeSet<u64> = set(a.aligned_outward(align)).into_iter().map(block).collect();
        prop_assert_eq!(&outward, &of_outward);
        prop_assert!(is_aligned(a.aligned_outward(align).start(), align) && is_aligned(a.aligned_outward(align).len(), align));
        let whole = |block: &u64| (block * align..(block + 1) * align).all(|byte| set(a).contains(&byte));
        let inward: BTreeSet<u64> = outward.into_iter().filter(whole).flat_map(|b| b * align..(b + 1) * align).collect();
        prop_assert_eq!(a.aligned_inward(align).map(set).unwrap_or_default(), inward);
        let pieces: Vec<_> = a.split_at_multiples(align).collect();
        prop_assert!(pieces.iter().all(|piece| block(piece.start()) == block(piece.end() - 1)));
        prop_assert_eq!(pieces.iter().flat_map(|piece| piece.start()..piece.end()).collect::<Vec<_>>(), set(a).into_iter().collect::<Vec<_>>());
        prop_assert_eq!(pieces.len() as u64, block(a.end() - 1) - block(a.start()) + 1);
    }

    #[test]
    fn rounding(value in 0u64..5000, shift in 0u32..12) {
        let align = 1 << shift;
        prop_assert_eq!(align_down(value, align), value / align * align);
        prop_assert_eq!(align_up(value, align), value.div_ceil(align) * align);
        prop_assert_eq!(is_aligned(value, align), value.is_multiple_of(align));
    }

    /// Regions, zones and owners of a small device, against every byte of it in regions of 4096.
    #[test]
    fn geometries_divide_the_device(size in 1u64..40_000, per_zone in 1u64..5, start in 0u64..40_000, len in 1u64..40_000) {
        let geometry = Geometry::new(size, RegionSize::new(4096).unwrap(), per_zone).unwrap();
        let regions = size.div_ceil(4096);
        prop_assert_eq!((geometry.nr_regions(), geometry.nr_zones()), (regions, regions.div_ceil(per_zone)));
        for region in 0..regions {
            let of = geometry.bytes_of(RegionRange::single(RegionIndex(region)));
            prop_assert_eq!((of.start(), of.end()), (region * 4096, size.min((region + 1) * 4096)));
            prop_assert_eq!((geometry.region_of(of.start()).0, geometry.region_of(of.end() - 1).0), (region, region));
            let zone = geometry.zone_of(RegionIndex(region));
            prop_assert_eq!(zone.0, region / per_zone);
            prop_assert!(geometry.zone_regions(zone).contains(RegionIndex(region)));
            prop_assert!(geometry.zone_regions(zone).count() <= per_zone);
            prop_assert_eq!(u64::from(geometry.owner_of(zone, 3).0), zone.0 % 3);
        }
        let (start, end) = (start.min(size - 1), size.min(start.min(size - 1) + len));
        let range = ByteRange::between(start, end).unwrap();
        let touched: Vec<u64> = (0..regions).filter(|region| start < (region + 1) * 4096 && region * 4096 < end).collect();
        prop_assert_eq!(geometry.touched(range).iter().map(|region| region.0).collect::<Vec<_>>(), touched.clone());
        let is_covered = |region: &u64| start <= region * 4096 && size.min((region + 1) * 4096) <= end;
        let covered: Vec<u64> = touched.into_iter().filter(is_covered).collect();
        let found = geometry.covered(range).map(|regions| regions.iter().map(|region| region.0).collect::<Vec<_>>());
        prop_assert_eq!(found.unwrap_or_default(), covered);
        let mut at = start;
        for (zone, piece) in geometry.split_at_zones(range) {
            prop_assert_eq!(piece.start(), at);
            prop_assert_eq!(zone, geometry.zone_of(geometry.region_of(at)));
            at = piece.end();
            let next = geometry.zone_regions(zone).end().0 * 4096;
            prop_assert_eq!(at, end.min(next));
        }
        prop_assert_eq!(at, end);
    }
}
