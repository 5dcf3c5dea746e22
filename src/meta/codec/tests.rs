use super::*;
use crate::signatures::identify;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Any geometry that the format allows, small enough to count.
pub fn geometries() -> impl Strategy<Value = Geometry> {
    (12u32..=30, 1u64..=200_000, 1u64..=REGIONS_PER_ZONE_MAX, any::<u64>()).prop_map(
        |(shift, regions, per_zone, cut)| {
            let region_size = RegionSize::new(1 << shift).unwrap();
            Geometry::new((regions << shift) - cut % (1 << shift), region_size, per_zone).unwrap()
        },
    )
}

pub fn superblocks() -> impl Strategy<Value = Superblock> {
    let source = (any::<u64>(), any::<u32>(), any::<[u8; 16]>())
        .prop_map(|(size, samples, digest)| SourceFingerprint { size, samples, digest });
    (any::<[u8; 16]>(), geometries(), source, any::<[u8; 16]>(), any::<bool>(), any::<u64>(), any::<u64>()).prop_map(
        |(uuid, geometry, source, destination_id, complete, generation, created_unix_s)| Superblock {
            uuid,
            geometry,
            source,
            destination_id,
            state: if complete { CloneState::Complete } else { CloneState::Active },
            generation: Generation(generation),
            created_unix_s,
        },
    )
}

/// A superblock, one of its zones, and bits for it.
fn zones() -> impl Strategy<Value = (Superblock, ZoneIndex, Box<[u64]>)> {
    (superblocks(), any::<u64>(), any::<u64>()).prop_map(|(superblock, pick, seed)| {
        let zone = ZoneIndex(pick % superblock.geometry.nr_zones());
        let bits = random_bits(&superblock.geometry, zone, seed);
        (superblock, zone, bits)
    })
}

/// Random bits for exactly the regions of a zone (xorshift).
pub fn random_bits(geometry: &Geometry, zone: ZoneIndex, seed: u64) -> Box<[u64]> {
    let mut bits = vec![0u64; words_per_zone(geometry)].into_boxed_slice();
    let mut state = seed | 1;
    for i in 0..geometry.zone_regions(zone).count() as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bits[i / 64] |= (state & 1) << (i % 64);
    }
    bits
}

fn encode(superblock: &Superblock, zone: ZoneIndex, generation: u64, bits: &[u64]) -> Block {
    let mut block = [0xaa; BLOCK_SIZE];
    ZoneCodec::new(superblock).encode(zone, Generation(generation), bits, &mut block);
    block
}

fn classify(block: &Block) -> Classified {
    UnverifiedSuperblock::new(block).classify()
}

fn sample() -> Superblock {
    Superblock {
        uuid: *b"0123456789abcdef",
        geometry: Geometry::new(10 * GIB + 512, RegionSize::new(64 << 10).unwrap(), 4096).unwrap(),
        source: SourceFingerprint { size: 10 * GIB + 512, samples: 64, digest: [0x5a; 16] },
        destination_id: [0xd1; 16],
        state: CloneState::Active,
        generation: Generation(7),
        created_unix_s: 1_700_000_000,
    }
}

#[test]
fn regions_per_zone_of_known_sizes() {
    let of = |size: u64, region_size: u64| regions_per_zone_for(size, RegionSize::new(region_size).unwrap());
    assert_eq!(of(GIB, 4 << 10), 30720);
    assert_eq!(of(GIB, 64 << 10), 4096);
    assert_eq!(of(100 * TIB, 64 << 10), 30720);
    assert_eq!(of(GIB, 1 << 20), 256);
    assert_eq!(of(4 * TIB, 1 << 20), 1024);
    assert_eq!(of(GIB, 128 << 20), 2);
    assert_eq!(of(1, 1 << 30), 1);
    assert_eq!(of(100 * TIB, 1 << 30), 24, "25 rounded down to a multiple of 8");
}

#[test]
fn sizes_and_limits() {
    let geometry = geometry_for(100 * TIB, RegionSize::default()).unwrap();
    assert_eq!(geometry.nr_zones(), 1_677_721_600_u64.div_ceil(30720));
    assert_eq!(metadata_size_needed(&geometry), (2 + geometry.nr_zones()) * 4096);
    assert_eq!(metadata_size_needed(&geometry_for(1, RegionSize::default()).unwrap()), 3 * 4096);
    let error = geometry_for(2 << 50, RegionSize::new(4096).unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "549755813888 regions, at most 274877906944 are supported: use larger regions than 4KiB"
    );
    assert_eq!(geometry_for(0, RegionSize::default()).unwrap_err().kind(), crate::error::ErrorKind::Usage);
    // The largest device, and every region size: as many zones as allowed, or refused.
    for shift in 12..=30 {
        for size in [1, GIB, TIB, 1 << 50, 1 << 60, (1 << 62) + 1] {
            if let Ok(geometry) = geometry_for(size, RegionSize::new(1 << shift).unwrap()) {
                assert!(geometry.nr_zones() <= ZONES_MAX && geometry.nr_regions() <= REGIONS_MAX);
            }
        }
    }
}

/// The most that is allowed is allowed.
#[test]
fn limits_are_inclusive() {
    let small = RegionSize::new(4096).unwrap();
    assert_eq!(geometry_for(REGIONS_MAX * 4096, small).unwrap().nr_regions(), REGIONS_MAX);
    assert!(geometry_for(REGIONS_MAX * 4096 + 1, small).is_err());
    let with_zones = |zones: u64| Geometry::new(zones * 4096, small, 1).unwrap();
    assert_eq!(check_limits(&with_zones(ZONES_MAX)), Ok(()));
    let refused = check_limits(&with_zones(ZONES_MAX + 1)).unwrap_err();
    assert_eq!(refused, "16777217 zones, at most 16777216 are supported");
    assert!(check_limits(&with_zones(3 * ZONES_MAX)).is_err());
}

/// What is not known of a clone's devices yet, and what that means for its length.
#[test]
fn devices_that_are_not_known_yet() {
    let with = |source, destination_id| Superblock { source, destination_id, ..sample() };
    let known = sample();
    assert!(known.source.is_known() && !known.source.is_none());
    assert!(!SourceFingerprint::UNKNOWN.is_known() && !SourceFingerprint::UNKNOWN.is_none());
    assert!(SourceFingerprint::NONE.is_known() && SourceFingerprint::NONE.is_none());
    assert_eq!(with(SourceFingerprint::UNKNOWN, [1; 16]).source_len(), known.geometry.size());
    assert_eq!(with(SourceFingerprint::NONE, [1; 16]).source_len(), 0);
    let short = SourceFingerprint { size: 77, ..known.source };
    assert_eq!(with(short, [1; 16]).source_len(), 77);
    for (source, destination, lacks) in [
        (known.source, [1; 16], false),
        (known.source, DESTINATION_UNKNOWN, false),
        (SourceFingerprint::NONE, [1; 16], false),
        (SourceFingerprint::UNKNOWN, [1; 16], true),
        (known.source, DESTINATION_NONE_YET, true),
        (SourceFingerprint::UNKNOWN, DESTINATION_NONE_YET, true),
    ] {
        assert_eq!(with(source, destination).lacks_devices(), lacks, "{source:?} {destination:?}");
    }
    assert_eq!([CloneState::Active, CloneState::Complete].map(CloneState::name), ["active", "complete"]);
}

/// The format as committed: these bytes may change only together with `FORMAT_VERSION`. They were
/// made by another implementation (of the description at the head of the codec, with a bitwise crc32c).
#[test]
fn golden_bytes() {
    let superblock = sample();
    let block = superblock.encode();
    #[rustfmt::skip]
    let expected = concat!(
        "68796472616e740a", "30b524f7", "01000000", "0000000000000000", "0000000000000000",
        "30313233343536373839616263646566", "0700000000000000", "01000000", "00000000",
        "0002008002000000", "0000010000000000", "0010000000000000", "00f1536500000000",
        "0002008002000000", "40000000", "00000000", "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
        "d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1",
    );
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(hex(&block[..144]), expected);
    assert!(block[144..].iter().all(|b| *b == 0));
    assert_eq!(crc32c::crc32c(&block), 0x4abb6c2f);

    let geometry = superblock.geometry;
    let mut bits = vec![0u64; words_per_zone(&geometry)];
    (bits[0], bits[8], bits[63]) = (0b1101, u64::MAX, 1 << 63);
    let block = encode(&superblock, ZoneIndex(3), 9, &bits);
    let header = |crc: &str, first: &str| format!("{crc}6879424d09000000000000000300000000000000{first}");
    assert_eq!(hex(&block[..40]), header("9d590371", "0030000000000000") + "0d00000000000000");
    assert_eq!(hex(&block[512..552]), header("afdaa244", "0032000000000000") + "ffffffffffffffff");
    assert_eq!(crc32c::crc32c(&block), 0xd45aee65);
}

#[test]
fn a_sector_is_bound_to_its_place_and_clone() {
    let superblock = sample();
    let bits = random_bits(&superblock.geometry, ZoneIndex(3), 99);
    let block = encode(&superblock, ZoneIndex(3), 1, &bits);
    let codec = ZoneCodec::new(&superblock);
    assert_eq!(codec.decode(ZoneIndex(4), &block).bad.len(), 8, "another zone's block");
    let mut swapped = block;
    swapped[..512].copy_from_slice(&block[512..1024]);
    swapped[512..1024].copy_from_slice(&block[..512]);
    assert_eq!(codec.decode(ZoneIndex(3), &swapped).bad.len(), 2, "swapped sectors");
    let other = Superblock { uuid: [1; 16], ..superblock };
    assert_eq!(ZoneCodec::new(&other).decode(ZoneIndex(3), &block).bad.len(), 8, "another clone's block");
}

#[test]
fn fields_are_checked_under_a_right_checksum() {
    let superblock = sample();
    let broken = |at: usize, value: &[u8]| {
        let mut block = superblock.encode();
        put(&mut block, at, value);
        seal_superblock(&mut block);
        classify(&block)
    };
    let damaged = [
        (REGION_SIZE_AT, 0u64),
        (REGION_SIZE_AT, 4097),
        (REGION_SIZE_AT, u64::MAX),
        (REGIONS_PER_ZONE_AT, 0),
        (REGIONS_PER_ZONE_AT, 30721),
        (REGIONS_PER_ZONE_AT, u64::MAX),
        (SIZE_AT, 0),
        (SIZE_AT, u64::MAX),
        (SIZE_AT, i64::MAX as u64 - (2 << 30)),
        (STATE_AT, 0),
        (STATE_AT, 3),
    ];
    for (at, value) in damaged {
        assert!(matches!(broken(at, &value.to_le_bytes()), Classified::Damaged(_)), "{value} at {at}");
    }
    assert_eq!(
        broken(VERSION_AT, &2u32.to_le_bytes()),
        Classified::Unsupported("format version 2, this hydrant knows 1".into())
    );
    assert_eq!(
        broken(INCOMPATIBLE_AT, &4u64.to_le_bytes()),
        Classified::Unsupported("incompatible features 0x4, unknown to this hydrant".into())
    );
    assert_eq!(broken(16, &u64::MAX.to_le_bytes()), Classified::Valid(superblock.clone()), "compatible features");
    assert_eq!(broken(0, b"XFSB"), Classified::Foreign("an xfs file system"));
    assert_eq!(broken(0, b"?"), Classified::Foreign("unknown data"));
    assert_eq!(classify(&[0; BLOCK_SIZE]), Classified::Empty);
}

#[test]
fn sector_fields_are_checked_under_a_right_checksum() {
    let superblock = sample();
    // The last zone has one region: 10 GiB + 512 bytes.
    let zone = ZoneIndex(superblock.geometry.nr_zones() - 1);
    assert_eq!(superblock.geometry.zone_regions(zone).count(), 1);
    let codec = ZoneCodec::new(&superblock);
    let mut bits = vec![0; words_per_zone(&superblock.geometry)];
    bits[0] = 1;
    let block = encode(&superblock, zone, 1, &bits);
    let fault = |at: usize, value: u8| {
        let mut block = block;
        block[at] ^= value;
        let sector = at / 512;
        let number = zone_block(zone) * 8 + sector as u64;
        let crc = codec.sector_crc(number, &block[sector * 512..(sector + 1) * 512]);
        put(&mut block, sector * 512, &crc.to_le_bytes());
        codec.decode(zone, &block).bad.first().map(|b| (b.sector - zone_block(zone) * 8, b.fault))
    };
    let bits_fault = SectorFault::Field("bits (some without a region are set)");
    assert_eq!(fault(BITS_AT, 1), None, "its only bit may change");
    assert_eq!(fault(BITS_AT, 2), Some((0, bits_fault)));
    assert_eq!(fault(511, 0x80), Some((0, bits_fault)));
    assert_eq!(fault(512 + BITS_AT, 1), Some((1, bits_fault)));
    assert_eq!(fault(4, 1), Some((0, SectorFault::Field("magic"))));
    assert_eq!(fault(16, 1), Some((0, SectorFault::Field("zone"))));
    assert_eq!(fault(1024 + 24, 1), Some((2, SectorFault::Field("first region"))));
    let mut lost = block;
    lost[..512].fill(0);
    let bad = codec.decode(zone, &lost).bad;
    assert_eq!(
        bad[0].to_string(),
        "sector 336 (byte offset 172032): all zero, what was written is lost; it covers regions 163840 to 163840"
    );
}

/// The words of a sector that have no regions belong to no other sector's.
#[test]
fn bits_behind_the_words_of_a_sector_are_damage() {
    let superblock = sample();
    let codec = ZoneCodec::new(&superblock);
    // 4096 regions per zone: 8 words in each sector of a whole zone.
    let mut block = encode(&superblock, ZoneIndex(1), 1, &[u64::MAX; 64]);
    assert!(codec.decode(ZoneIndex(1), &block).bad.is_empty());
    block[BITS_AT + 8 * 8] = 1;
    let crc = codec.sector_crc(zone_block(ZoneIndex(1)) * 8, &block[..512]);
    put(&mut block, 0, &crc.to_le_bytes());
    let bad = codec.decode(ZoneIndex(1), &block).bad;
    assert_eq!(bad.len(), 1);
    assert_eq!(bad[0].fault, SectorFault::Field("bits (some without a region are set)"));
}

/// Every byte whose value is known otherwise is put right, in every sector of whole and short zones; one that is only known
/// by itself (checksum, generation, bits of regions) is left as it is, damaged.
#[test]
fn what_is_known_of_a_sector_is_restored() {
    let superblock = sample();
    let codec = ZoneCodec::new(&superblock);
    let last = ZoneIndex(superblock.geometry.nr_zones() - 1);
    for (zone, words_of) in [(ZoneIndex(2), [8; 8]), (last, [1, 0, 0, 0, 0, 0, 0, 0])] {
        let bits = random_bits(&superblock.geometry, zone, 3);
        let good = encode(&superblock, zone, 5, &bits);
        for at in 0..BLOCK_SIZE {
            let (sector, offset) = (at / SECTOR_BYTES, at % SECTOR_BYTES);
            let of_regions = BITS_AT..BITS_AT + words_of[sector] * 8;
            // The one region of the last zone is the lowest bit of its first byte.
            let flip = if zone == last { 0xfe } else { 0xff };
            let is_known = match offset {
                4..8 | 16..32 => true,
                BITS_AT.. if zone == last => true,
                BITS_AT.. => !of_regions.contains(&offset),
                _ => false,
            };
            let mut damaged = good;
            damaged[at] ^= flip;
            let mut restored = damaged;
            codec.restore(zone, &mut restored);
            assert!(restored == if is_known { good } else { damaged }, "zone {zone}, byte {at}");
        }
        // All of that in all sectors at once.
        let mut damaged = good;
        for (sector, words) in damaged.chunks_exact_mut(SECTOR_BYTES).zip(words_of) {
            sector[4..8].fill(1);
            sector[16..32].fill(2);
            sector[BITS_AT + words * 8..].fill(3);
        }
        codec.restore(zone, &mut damaged);
        assert!(damaged == good, "zone {zone}");
        let mut lost = good;
        lost[..SECTOR_BYTES].fill(0);
        let before = lost;
        codec.restore(zone, &mut lost);
        assert!(lost == before, "nothing is known of its bits");
    }
}

#[test]
fn every_bit_flip_is_detected() {
    let superblock = sample();
    let codec = ZoneCodec::new(&superblock);
    let bits = random_bits(&superblock.geometry, ZoneIndex(1), 5);
    let good = encode(&superblock, ZoneIndex(1), 3, &bits);
    let good_superblock = superblock.encode();
    for bit in 0..BLOCK_SIZE * 8 {
        let flip = |mut block: Block| {
            block[bit / 8] ^= 1 << (bit % 8);
            block
        };
        let bad = codec.decode(ZoneIndex(1), &flip(good)).bad;
        assert_eq!(bad.iter().map(|b| b.sector as usize % 8).collect::<Vec<_>>(), [bit / 4096], "bit {bit}");
        let found = classify(&flip(good_superblock));
        assert!(matches!(found, Classified::Damaged(_) | Classified::Foreign(_)), "bit {bit}: {found:?}");
    }
}

proptest! {
    #[test]
    fn superblock_round_trip(superblock in superblocks()) {
        let block = superblock.encode();
        prop_assert!(block[SECTOR_BYTES..].iter().all(|b| *b == 0), "it fits the sector that is written whole");
        prop_assert_eq!(classify(&block), Classified::Valid(superblock));
    }

    #[test]
    fn zone_round_trip((superblock, zone, bits) in zones(), generation: u64) {
        let block = encode(&superblock, zone, generation, &bits);
        let codec = ZoneCodec::new(&superblock);
        let decoded = codec.decode(zone, &block);
        prop_assert_eq!(&decoded, &DecodedZone { bits, generation: Generation(generation), bad: vec![] });
        // The sectors cover every region of the zone once, in order.
        let mut next = superblock.geometry.zone_regions(zone).first();
        for regions in (0..8).filter_map(|i| codec.sector_regions(zone, i)) {
            prop_assert_eq!(regions.first(), next);
            next = regions.end();
        }
        prop_assert_eq!(next, superblock.geometry.zone_regions(zone).end());
    }

    /// A torn write: every sector is the old or the new one, whichever subset arrived.
    #[test]
    fn torn_writes_leave_old_or_new((superblock, zone, old) in zones(), seed: u64, arrived: u8) {
        let codec = ZoneCodec::new(&superblock);
        let more = random_bits(&superblock.geometry, zone, seed);
        let new: Vec<u64> = old.iter().zip(&more).map(|(a, b)| a | b).collect();
        let (mut block, written) = (encode(&superblock, zone, 1, &old), encode(&superblock, zone, 2, &new));
        for sector in (0..8).filter(|s| arrived >> s & 1 == 1) {
            block[sector * 512..][..512].copy_from_slice(&written[sector * 512..][..512]);
        }
        let decoded = codec.decode(zone, &block);
        prop_assert!(decoded.bad.is_empty());
        let first = superblock.geometry.zone_regions(zone).first().0;
        for index in 0..8 {
            let expected = if arrived >> index & 1 == 1 { &new[..] } else { &old[..] };
            for region in codec.sector_regions(zone, index).iter().flat_map(|r| r.indices()) {
                let bit = (region - first) as usize;
                prop_assert_eq!(decoded.bits[bit / 64] >> (bit % 64) & 1, expected[bit / 64] >> (bit % 64) & 1);
            }
        }
    }

    #[test]
    fn hostile_bytes_get_a_verdict(
        (superblock, zone, bits) in zones(), noise in prop::collection::vec((0..BLOCK_SIZE, any::<u8>()), 0..64), reseal: bool,
    ) {
        let mut block = superblock.encode();
        noise.iter().for_each(|(at, value)| block[*at] = *value);
        if reseal {
            block[..8].copy_from_slice(&SUPERBLOCK_MAGIC);
            seal_superblock(&mut block);
        }
        if let Classified::Valid(found) = classify(&block) {
            // What passes can be used without a check: sizes neither overflow nor exceed the limits.
            prop_assert!(metadata_size_needed(&found.geometry) <= (ZONES_MAX + 2) * 4096);
            ZoneCodec::new(&found).decode(ZoneIndex(found.geometry.nr_zones() - 1), &block);
        }
        let mut block = encode(&superblock, zone, 1, &bits);
        noise.iter().for_each(|(at, value)| block[*at] = *value);
        let codec = ZoneCodec::new(&superblock);
        if reseal {
            for (i, sector) in block.chunks_exact_mut(512).enumerate() {
                let crc = codec.sector_crc(zone_block(zone) * 8 + i as u64, sector);
                put(sector, 0, &crc.to_le_bytes());
            }
        }
        let decoded = codec.decode(zone, &block);
        // Whatever passes, encodes again: no bit without a region got through.
        encode(&superblock, zone, 1, &decoded.bits);
        identify(&block);
    }
}

proptest! {
    /// Only what says nothing: a bit, a commit or anything that is not the format's own makes it something.
    #[test]
    fn an_unfinished_format_is_told_from_all_else((superblock, zone, bits) in zones(), at in 0..BLOCK_SIZE, zeroed in 0u8..=255) {
        let index = zone_block(zone);
        let empty = vec![0; bits.len()];
        let mut fresh = encode(&superblock, zone, 0, &empty);
        prop_assert!(is_of_unfinished_format(index, &fresh));
        prop_assert!(!is_of_unfinished_format(index + 1, &fresh));
        prop_assert!(!is_of_unfinished_format(0, &fresh));
        prop_assert!(!is_of_unfinished_format(index, &encode(&superblock, zone, 1, &empty)));
        let has_bits = bits.iter().any(|word| *word != 0);
        prop_assert_eq!(is_of_unfinished_format(index, &encode(&superblock, zone, 0, &bits)), !has_bits);
        let other = superblock.encode();
        prop_assert!(!is_of_unfinished_format(0, &other));
        // Any of its sectors may not have been written yet.
        for (sector, bytes) in fresh.chunks_mut(SECTOR_BYTES).enumerate() {
            if zeroed >> sector & 1 == 1 {
                bytes.fill(0);
            }
        }
        prop_assert!(is_of_unfinished_format(index, &fresh));
        prop_assert!(is_of_unfinished_format(0, &[0; BLOCK_SIZE]));
        // But for the checksum and the first region, which depend on what is not known, every byte counts.
        if zeroed >> (at / SECTOR_BYTES) & 1 == 0 && !matches!(at % SECTOR_BYTES, 0..4 | 24..32) {
            fresh[at] ^= 1;
            prop_assert!(!is_of_unfinished_format(index, &fresh));
        }
    }
}
