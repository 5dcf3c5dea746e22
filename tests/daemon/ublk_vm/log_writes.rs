//! The log of the kernel's dm-log-writes, and what is left on its disk when the power is cut at some place of it.
//!
//! The format is that of the kernel's `dm-log-writes.c` (documented in `dm-log-writes.rst`): sectors as large as the disk's logical
//! blocks, little-endian. First a superblock, then for each entry one sector with its header (and the text of a mark), and the data.
//! A write is logged when the flush after it has been done, a FUA write and a mark at once: all that is before a flush
//! entry is durable, and of the writes between it and the cut any part may be.
//!
//! hydrant discards on a block device by punching (fallocate with FALLOC_FL_PUNCH_HOLE, in the kernel a WRITE_ZEROES that may
//! unmap), since a discard need not read zeros. dm-log-writes passes on no WRITE_ZEROES, so that is refused, and hydrant asks for
//! FALLOC_FL_ZERO_RANGE, for which the kernel writes zeros: they are in the log as writes, and it has no discards.

use super::super::harness::Random;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x6a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const SECTOR: usize = 512;

pub struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Where its data are in the log.
    data: u64,
    pub mark: Option<String>,
}

pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Log {
    pub fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let mut header = [0; SECTOR];
        file.read_exact_at(&mut header, 0).unwrap();
        assert_eq!((number(&header, 0), number(&header, 8)), (MAGIC, 1), "magic and version");
        assert_eq!(header[24..28], (SECTOR as u32).to_le_bytes(), "sectors");
        let mut entries = Vec::new();
        let mut at = SECTOR as u64;
        for _ in 0..number(&header, 16) {
            let mut header = [0; SECTOR];
            file.read_exact_at(&mut header, at).unwrap();
            let [sector, sectors, flags, length] = [0, 8, 16, 24].map(|at| number(&header, at));
            let text = || String::from_utf8(header[32..32 + length as usize].to_vec()).unwrap();
            let mark = (flags & MARK != 0).then(text);
            at += SECTOR as u64;
            entries.push(Entry { sector, sectors, flags, data: at, mark });
            if flags & DISCARD == 0 {
                at += sectors * SECTOR as u64;
            }
        }
        Self { file, entries }
    }

    fn bytes(&self, entry: &Entry) -> Vec<u8> {
        let mut bytes = vec![0; entry.sectors as usize * SECTOR];
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(&mut bytes, entry.data).unwrap();
        }
        bytes
    }

    /// Brings an image on which all before `from` is durable up to all before `to`.
    pub fn apply(&self, image: &mut [u8], from: usize, to: usize) {
        for entry in &self.entries[from..to] {
            let at = entry.sector as usize * SECTOR;
            let bytes = self.bytes(entry);
            image[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// The number of entries that are durable for certain when the power is cut before entry `cut`, but for FUA writes after them.
    pub fn durable(&self, cut: usize) -> usize {
        self.entries[..cut].iter().rposition(|entry| entry.flags & FLUSH != 0).map_or(0, |at| at + 1)
    }

    /// The same image (all before `from` is on it), with some of what was not flushed before the cut: of each write all,
    /// nothing, or any of its sectors.
    pub fn apply_unflushed(&self, image: &mut [u8], from: usize, cut: usize, random: &mut Random) {
        for entry in &self.entries[from..cut] {
            let torn = entry.flags & FUA == 0;
            let (all, none) = (!torn || random.next() & 1 == 0, random.next() & 1 == 0);
            for (i, sector) in self.bytes(entry).chunks(SECTOR).enumerate() {
                let at = (entry.sector as usize + i) * SECTOR;
                if all || (!none && random.next() & 1 == 0) {
                    image[at..at + SECTOR].copy_from_slice(sector);
                }
            }
        }
    }

    /// The next flush from here on, or the end.
    pub fn next_flush(&self, from: usize) -> usize {
        let next = self.entries[from..].iter().position(|entry| entry.flags & FLUSH != 0);
        next.map_or(self.entries.len(), |at| from + at)
    }

    pub fn count(&self, what: &str) -> usize {
        let flag = match what {
            "flush" => FLUSH,
            "discard" => DISCARD,
            "fua" => FUA,
            _ => MARK,
        };
        self.entries.iter().filter(|entry| entry.flags & flag != 0).count()
    }
}
