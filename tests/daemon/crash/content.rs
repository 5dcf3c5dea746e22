//! What the bytes of a clone under a crash test are: every one is made from its place and from who put it there.
//!
//! The unit is the atom, 256 bytes: half a sector, so that no atom is torn by anything but a bug, and requests that are
//! not aligned to sectors occur. Each atom carries who wrote it and where it belongs: what is misplaced or stale is told
//! by name.

use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

pub const ATOM: u64 = 256;
/// The source is data, hole or zeros in pieces of this many bytes.
const PIECE: u64 = 64 << 10;
/// Random bytes that all content is cut from.
const TABLE: usize = 1 << 20;

/// Who put an atom there: the source, whoever zeroed it, or the write of that number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Value(pub u32);

impl Value {
    pub const SOURCE: Self = Self(0);
    pub const ZERO: Self = Self(1);
    /// Numbers of writes begin here.
    pub const FIRST_WRITE: u32 = 2;
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SOURCE => f.write_str("the source's"),
            Self::ZERO => f.write_str("zeros"),
            Self(number) => write!(f, "of write {number}"),
        }
    }
}

/// splitmix64: the same numbers for the same seed.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    /// From 0 to before `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    pub fn between(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    /// Another sequence, which depends on this one.
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn table() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut random = Random::new(1);
        (0..TABLE / 8).flat_map(|_| random.next().to_le_bytes()).collect()
    })
}

/// What a source is like.
#[derive(Clone, Debug)]
pub struct Content {
    /// Tells the atoms of this clone from those of others.
    pub id: u32,
    /// Where there are data, and where the load works; all the rest is a hole. In bytes, whole atoms but for the end.
    pub windows: Vec<Range<u64>>,
    /// Of a hundred pieces so many are holes, and as many zeros.
    pub holes_percent: u64,
}

#[derive(PartialEq, Eq)]
enum Piece {
    Hole,
    Zeros,
    Data,
}

impl Content {
    fn piece(&self, offset: u64) -> Piece {
        if !self.windows.iter().any(|window| window.contains(&offset)) {
            return Piece::Hole;
        }
        match mix((offset / PIECE) ^ (u64::from(self.id) << 32)) % 100 {
            hole if hole < self.holes_percent => Piece::Hole,
            zeros if zeros < 2 * self.holes_percent => Piece::Zeros,
            _ => Piece::Data,
        }
    }

    /// Makes one atom, or the first bytes of it.
    pub fn fill(&self, atom: u64, value: Value, out: &mut [u8]) {
        let is_zero = match value {
            Value::ZERO => true,
            Value::SOURCE => self.piece(atom * ATOM) != Piece::Data,
            _ => false,
        };
        if is_zero {
            return out.fill(0);
        }
        let at = mix(atom ^ (u64::from(value.0) << 40)) as usize % (TABLE - ATOM as usize);
        out.copy_from_slice(&table()[at..at + out.len()]);
        let mut head = [0; 16];
        head[..4].copy_from_slice(&self.id.to_le_bytes());
        head[4..8].copy_from_slice(&value.0.to_le_bytes());
        head[8..].copy_from_slice(&atom.to_le_bytes());
        let n = out.len().min(16);
        out[..n].copy_from_slice(&head[..n]);
    }

    /// What some bytes seem to be, for people.
    pub fn describe(&self, bytes: &[u8]) -> String {
        if bytes.iter().all(|byte| *byte == 0) {
            return "zeros".into();
        }
        if bytes.len() < 16 {
            return format!("{bytes:02x?}");
        }
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (id, value, atom) = (word(0), Value(word(4)), u64::from(word(8)) | (u64::from(word(12)) << 32));
        let mut expected = vec![0; bytes.len()];
        self.fill(atom, value, &mut expected);
        match (id == self.id, expected == bytes) {
            (true, true) => format!("{value} for offset {}", atom * ATOM),
            (true, false) => {
                let first = (0..bytes.len()).find(|i| bytes[*i] != expected[*i]).unwrap_or(0);
                format!("{value} for offset {}, torn from byte {first} on", atom * ATOM)
            }
            _ => format!("unknown: {:02x?}", &bytes[..16]),
        }
    }

    /// Writes the source into a file: from `from`, which is what it has so far, to `size`. Holes are left.
    pub fn write_source(&self, path: &Path, from: u64, size: u64) {
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(size).unwrap();
        for window in &self.windows {
            let mut at = window.start.max(from / ATOM * ATOM);
            let end = window.end.min(size);
            while at < end {
                let stop = end.min(at / PIECE * PIECE + PIECE);
                if self.piece(at) != Piece::Hole {
                    let mut bytes = vec![0; (stop - at) as usize];
                    self.fill_range(at, Value::SOURCE, &mut bytes);
                    file.write_all_at(&bytes, at).unwrap();
                }
                at = stop;
            }
        }
    }

    /// Makes a range that begins with an atom.
    pub fn fill_range(&self, offset: u64, value: Value, out: &mut [u8]) {
        for (atom, out) in (offset / ATOM..).zip(out.chunks_mut(ATOM as usize)) {
            self.fill(atom, value, out);
        }
    }

    /// Everything outside of the windows must be zeros in a copy of `size` bytes.
    pub fn check_outside(&self, file: &File, size: u64) {
        const CHUNK: u64 = 1 << 20;
        let (zeros, mut bytes) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
        let mut gaps = Vec::new();
        let mut at = 0;
        for window in &self.windows {
            gaps.push(at..window.start);
            at = window.end;
        }
        gaps.push(at..size);
        for gap in gaps {
            let mut at = gap.start;
            while at < gap.end {
                let n = CHUNK.min(gap.end - at) as usize;
                file.read_exact_at(&mut bytes[..n], at).unwrap();
                assert!(bytes[..n] == zeros[..n], "the copy has data in the source's hole at {at}+{n}");
                at += n as u64;
            }
        }
    }
}
