//! What the demo's disk holds: the source image, what clients wrote over it, and so what must be read. Pure.
//!
//! Every 512-byte sector of the image is made from its position, every written one from its position and the
//! number of its write: so any sector can be checked by itself, one that is misplaced or stale is told from the right
//! one, and nothing but a number per sector has to be remembered.

use std::fmt;
use std::ops::Range;

/// Bytes of a sector: the unit that the demo writes and checks.
pub const SECTOR: usize = 512;
/// Size of the image in bytes: 256 MiB and a bit, so that the last region is a short one.
pub const IMAGE_SIZE: u64 = (256 << 20) + 25 * SECTOR as u64;
/// How many sectors that is.
pub const IMAGE_SECTORS: u64 = IMAGE_SIZE / SECTOR as u64;
/// The image is data, hole or zeros in pieces of this many bytes.
pub const PIECE: u64 = 1 << 20;

/// What a piece of the source is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PieceKind {
    /// Never written: a hole in the file.
    Hole,
    /// Zeros that take space.
    Zeros,
    Data,
}

/// Of eight pieces one is a hole and one is zeros.
pub fn piece_kind(offset: u64) -> PieceKind {
    match offset / PIECE % 8 {
        2 => PieceKind::Hole,
        5 => PieceKind::Zeros,
        _ => PieceKind::Data,
    }
}

/// What a sector holds, by the last thing that was done to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Stamp {
    /// What the source has there.
    #[default]
    Source,
    /// Zeros, by a write zeroes.
    Zeroed,
    /// What the write of this number put there.
    Written(u32),
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source => f.write_str("the source's content"),
            Self::Zeroed => f.write_str("zeros that a client asked for"),
            Self::Written(number) => write!(f, "what write {number} put there"),
        }
    }
}

/// Makes the sector number `sector`, as it is after `stamp`. `out` has [`SECTOR`] bytes.
pub fn fill_sector(sector: u64, stamp: Stamp, out: &mut [u8]) {
    let (label, seed) = match stamp {
        Stamp::Zeroed => return out.fill(0),
        Stamp::Source if piece_kind(sector * SECTOR as u64) != PieceKind::Data => return out.fill(0),
        Stamp::Source => (*b"hydrant demo source ", 0),
        Stamp::Written(number) => (*b"hydrant demo written", u64::from(number) << 24 | 1 << 63),
    };
    // The label is for whoever looks at the disk with a hex dump.
    out[..20].copy_from_slice(&label);
    let mut random = Random::new(seed ^ sector);
    for word in out[20..].chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
    }
}

/// The last thing that was done to each sector of a range.
pub struct Model {
    sectors: Range<u64>,
    stamps: Vec<Stamp>,
}

/// A sector that does not hold what it must.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wrong {
    pub sector: u64,
    pub expected: Stamp,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} does not hold {}", self.sector * SECTOR as u64, self.expected)
    }
}

impl Model {
    /// Nothing was done to `sectors` yet.
    pub fn new(sectors: Range<u64>) -> Self {
        let stamps = sectors.clone().map(|_| Stamp::Source).collect();
        Self { sectors, stamps }
    }
    pub fn sectors(&self) -> Range<u64> {
        self.sectors.clone()
    }
    /// Sectors that clients wrote or zeroed.
    pub fn changed(&self) -> u64 {
        self.stamps.iter().filter(|stamp| **stamp != Stamp::Source).count() as u64
    }
    fn index(&self, sector: u64) -> usize {
        (sector - self.sectors.start) as usize
    }
    /// Remembers what is done to the `count` sectors from `first`.
    pub fn stamp(&mut self, first: u64, count: u64, stamp: Stamp) {
        let (from, to) = (self.index(first), self.index(first + count));
        self.stamps[from..to].fill(stamp);
    }
    /// The first sector of `bytes`, which were read from sector `first` on, that is not as it must be.
    pub fn check(&self, first: u64, bytes: &[u8]) -> Option<Wrong> {
        let mut expected = [0; SECTOR];
        bytes.chunks(SECTOR).zip(first..).find_map(|(bytes, sector)| {
            let stamp = self.stamps[self.index(sector)];
            fill_sector(sector, stamp, &mut expected);
            (bytes != expected).then_some(Wrong { sector, expected: stamp })
        })
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014): small, fast, and no two
/// seeds give the same sequence.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// From 0 to before `end`, which is not 0. The bias of the remainder does not matter here.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(number: u64, stamp: Stamp) -> Vec<u8> {
        let mut bytes = vec![0xAA; SECTOR];
        fill_sector(number, stamp, &mut bytes);
        bytes
    }

    #[test]
    fn every_sector_is_told_from_every_other() {
        let mut all = std::collections::HashSet::new();
        for number in 0..2000 {
            assert!(all.insert(sector(number, Stamp::Source)));
            for write in [0, 1, 2, u32::MAX] {
                assert!(all.insert(sector(number, Stamp::Written(write))));
            }
        }
        let hole = 2 * PIECE / SECTOR as u64;
        assert_eq!(sector(hole, Stamp::Source), vec![0; SECTOR]);
        assert_eq!(sector(hole, Stamp::Source), sector(7, Stamp::Zeroed));
        assert_eq!(piece_kind(IMAGE_SIZE - 1), PieceKind::Data, "the short last region can be checked");
    }

    #[test]
    fn the_model_finds_one_wrong_byte_and_stale_and_misplaced_sectors() {
        let mut model = Model::new(100..200);
        model.stamp(110, 2, Stamp::Written(7));
        model.stamp(111, 1, Stamp::Zeroed);
        let mut bytes: Vec<u8> = [
            sector(109, Stamp::Source),
            sector(110, Stamp::Written(7)),
            sector(111, Stamp::Zeroed),
            sector(112, Stamp::Source),
        ]
        .concat();
        assert_eq!(model.check(109, &bytes), None);
        assert_eq!(model.changed(), 2);
        bytes[4 * SECTOR - 1] ^= 1;
        assert_eq!(model.check(109, &bytes), Some(Wrong { sector: 112, expected: Stamp::Source }));
        bytes[SECTOR..2 * SECTOR].copy_from_slice(&sector(110, Stamp::Written(6)));
        let wrong = model.check(109, &bytes).unwrap();
        assert_eq!(wrong.to_string(), "byte 56320 does not hold what write 7 put there");
        assert!(model.check(150, &sector(151, Stamp::Source)).is_some());
    }
}
