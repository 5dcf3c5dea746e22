//! Bytes: made from a seed, compared with a clear failure.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// splitmix64: the same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Bytes that no zero or hole detection takes for anything but data.
pub fn random_bytes(seed: u64, len: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// What nbdkit's pattern plugin serves: each 8 bytes hold their own offset, big-endian.
pub fn pattern(len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|i| (i * 8).to_be_bytes()).collect();
    bytes.truncate(len as usize);
    bytes
}

/// The first `len` bytes of a file or device.
pub fn read_first(path: &Path, len: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len as usize);
    File::open(path).and_then(|file| file.take(len).read_to_end(&mut bytes)).unwrap();
    assert_eq!(bytes.len() as u64, len, "{} is shorter", path.display());
    bytes
}

/// A file or device must begin with `expected`; says where it does not.
pub fn assert_same(path: &Path, expected: &[u8]) {
    let found = read_first(path, expected.len() as u64);
    if found == expected {
        return;
    }
    let differs: Vec<usize> = (0..found.len()).filter(|i| found[*i] != expected[*i]).collect();
    let (first, last) = (differs[0], differs[differs.len() - 1]);
    let some = |bytes: &[u8]| bytes[first..bytes.len().min(first + 16)].to_vec();
    panic!(
        "{}: {} bytes differ between {first} and {last}: at {first} are {:02x?}, expected {:02x?}",
        path.display(),
        differs.len(),
        some(&found),
        some(expected),
    );
}

/// Two files or devices must be the same as far as the second one goes; says where they are not.
pub fn assert_same_files(path: &Path, expected: &Path) {
    const CHUNK: u64 = 1 << 20;
    let mut len = File::open(expected).and_then(|mut file| file.seek(SeekFrom::End(0))).unwrap();
    let (mut found, mut wanted) = (File::open(path).unwrap(), File::open(expected).unwrap());
    let (mut a, mut b) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut at = 0;
    while len > 0 {
        let n = len.min(CHUNK) as usize;
        found.read_exact(&mut a[..n]).unwrap_or_else(|e| panic!("{} at {at}: {e}", path.display()));
        wanted.read_exact(&mut b[..n]).unwrap();
        if a[..n] != b[..n] {
            let first = (0..n).find(|i| a[*i] != b[*i]).unwrap();
            let some = |bytes: &[u8]| bytes[first..n.min(first + 16)].to_vec();
            let differ = (0..n).filter(|i| a[*i] != b[*i]).count();
            panic!(
                "{} and {} differ at {} ({differ} bytes in this MiB): {:02x?}, expected {:02x?}",
                path.display(),
                expected.display(),
                at + first as u64,
                some(&a),
                some(&b)
            );
        }
        at += n as u64;
        len -= n as u64;
    }
}

/// What a directory holds: path, size, time of the last change, a checksum of the content.
pub fn checksums(dir: &Path) -> BTreeMap<PathBuf, (u64, i64, i64, u32)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stat = fs::symlink_metadata(&path).unwrap();
        let mut sum = 0;
        if stat.is_dir() {
            found.extend(checksums(&path));
        } else if stat.is_file() {
            sum = crc32c::crc32c(&fs::read(&path).unwrap());
        }
        found.insert(path, (stat.len(), stat.mtime(), stat.mtime_nsec(), sum));
    }
    found
}

/// How many bytes of a file take space.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
