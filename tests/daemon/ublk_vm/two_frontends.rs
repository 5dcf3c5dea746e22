//! A clone that is a block device and has NBD clients at the same time: both see one content, at every moment.
//!
//! In the machine this same program runs again ([`in_the_machine`]): on each frontend one thread writes blocks of its own half of them,
//! and threads on both read all of them, while regions are copied underneath. A block's value counts up; who reads it finds no
//! sector older than what was acknowledged before the read began, nor newer than what was begun when it had ended.

use super::super::crash::client::{Connection, Verb};
use super::super::harness::*;
use super::boot;
use hydrant::dma_buf::DmaBuf;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const REGION: u64 = 64 * KIB;
const BLOCK: u64 = 4 * KIB;
const SECTOR: usize = 512;
const SIZE: u64 = 8 * MIB;
/// The blocks that are used lie this far apart: four in a region, which is copied as a whole.
const STEP: u64 = REGION / 4;
const BLOCKS: u64 = SIZE / STEP;
/// Every so many values of a block are zeros, written as such.
const ZEROS: u64 = 5;
/// This one in a block's sectors says that it has never been written.
const SOURCE: u8 = 0xa5;
/// How long it is tried.
const TIME: Duration = Duration::from_secs(6);
const O_DIRECT: i32 = 0o40000;

const DEVICE: &str = "/dev/ublkb5";
const SOCKET: &str = "/run/hydrant/clone.sock";

/// One way to the clone.
enum Side {
    Ublk(File),
    Nbd(Connection),
}

impl Side {
    fn open(is_ublk: bool) -> Self {
        if !is_ublk {
            return Side::Nbd(Connection::open(Path::new(SOCKET), "clone").unwrap());
        }
        Side::Ublk(OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(DEVICE).unwrap())
    }

    fn read(&mut self, offset: u64, buffer: &mut DmaBuf) {
        match self {
            Side::Ublk(file) => file.read_exact_at(buffer, offset).unwrap(),
            Side::Nbd(connection) => connection.ask(Verb::READ, offset, buffer).unwrap(),
        }
    }

    fn write(&mut self, offset: u64, buffer: &mut DmaBuf) {
        match self {
            Side::Ublk(file) => file.write_all_at(buffer, offset).unwrap(),
            Side::Nbd(connection) => connection.ask(Verb::WRITE, offset, buffer).unwrap(),
        }
    }

    /// Of a block device the kernel makes it a WRITE_ZEROES.
    fn zero(&mut self, offset: u64, buffer: &mut DmaBuf) {
        match self {
            Side::Ublk(_) => {
                drop(run("blkdiscard", &["-f", "-z", "-o", &offset.to_string(), "-l", &BLOCK.to_string(), DEVICE]))
            }
            Side::Nbd(_) => {
                buffer.fill(0);
                self.write(offset, buffer);
            }
        }
    }
}

/// What was asked of a block: the values are numbered from 1, 0 is the source's.
#[derive(Default)]
struct Block {
    begun: AtomicU64,
    acknowledged: AtomicU64,
}

fn fill(buffer: &mut DmaBuf, block: u64, value: u64) {
    for sector in buffer.chunks_exact_mut(SECTOR) {
        sector.fill(value as u8 | 1);
        sector[..8].copy_from_slice(&block.to_le_bytes());
        sector[8..16].copy_from_slice(&value.to_le_bytes());
    }
}

/// Whether a sector is one of these values of the block.
fn is_one_of(sector: &[u8], block: u64, from: u64, to: u64) -> bool {
    if sector.iter().all(|byte| *byte == SOURCE) {
        return from == 0;
    }
    if sector.iter().all(|byte| *byte == 0) {
        return to / ZEROS > from.saturating_sub(1) / ZEROS;
    }
    let number = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().unwrap());
    let value = number(8);
    number(0) == block
        && (from..=to).contains(&value)
        && !value.is_multiple_of(ZEROS)
        && sector[16..].iter().all(|byte| *byte == value as u8 | 1)
}

fn writes(blocks: &[Block], is_ublk: bool, end: &AtomicBool) -> u64 {
    let (mut side, mut random) = (Side::open(is_ublk), Random(u64::from(is_ublk)));
    let (mut buffer, mut count) = (DmaBuf::new(BLOCK as usize), 0);
    while !end.load(SeqCst) {
        // Of each region two blocks are of each side.
        let n = random.next() % (BLOCKS / 2) * 2 + u64::from(is_ublk);
        let block = &blocks[n as usize];
        let value = block.begun.fetch_add(1, SeqCst) + 1;
        if value.is_multiple_of(ZEROS) {
            side.zero(n * STEP, &mut buffer);
        } else {
            fill(&mut buffer, n, value);
            side.write(n * STEP, &mut buffer);
        }
        block.acknowledged.store(value, SeqCst);
        count += 1;
    }
    count
}

/// The number of reads, and of those that met a write in flight.
fn reads(blocks: &[Block], is_ublk: bool, end: &AtomicBool) -> (u64, u64) {
    let (mut side, mut random) = (Side::open(is_ublk), Random(100 + u64::from(is_ublk)));
    let (mut buffer, mut count, mut met) = (DmaBuf::new(BLOCK as usize), 0, 0);
    while !end.load(SeqCst) {
        // Rather what the other side is at.
        let busy = blocks.iter().position(|block| block.begun.load(SeqCst) != block.acknowledged.load(SeqCst));
        let n = match (busy, random.next() % 4) {
            (Some(n), 1..) => n as u64,
            _ => random.next() % BLOCKS,
        };
        let block = &blocks[n as usize];
        let from = block.acknowledged.load(SeqCst);
        side.read(n * STEP, &mut buffer);
        let to = block.begun.load(SeqCst);
        for (i, sector) in buffer.chunks_exact(SECTOR).enumerate() {
            assert!(
                is_one_of(sector, n, from, to),
                "sector {i} of block {n} over {}: values {from} to {to} are right, it has {:?}",
                if is_ublk { "ublk" } else { "NBD" },
                &sector[..24]
            );
        }
        count += 1;
        met += u64::from(to != from);
    }
    (count, met)
}

#[test]
#[ignore = "the part that runs in the virtual machine"]
fn in_the_machine() {
    let blocks: Vec<Block> = (0..BLOCKS).map(|_| Block::default()).collect();
    let end = AtomicBool::new(false);
    let (written, read) = std::thread::scope(|scope| {
        let writers = [true, false].map(|is_ublk| {
            scope.spawn({
                let (blocks, end) = (&blocks, &end);
                move || writes(blocks, is_ublk, end)
            })
        });
        let readers = [true, false].map(|is_ublk| {
            scope.spawn({
                let (blocks, end) = (&blocks, &end);
                move || reads(blocks, is_ublk, end)
            })
        });
        let began = Instant::now();
        while began.elapsed() < TIME && !readers.iter().any(|reader| reader.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        end.store(true, SeqCst);
        (writers.map(|thread| thread.join().unwrap()), readers.map(|thread| thread.join().unwrap()))
    });
    // At the end both show the last value of everything.
    let (mut ublk, mut nbd) = (Side::open(true), Side::open(false));
    let mut buffers = [DmaBuf::new(BLOCK as usize), DmaBuf::new(BLOCK as usize)];
    for (n, block) in blocks.iter().enumerate() {
        let n = n as u64;
        ublk.read(n * STEP, &mut buffers[0]);
        nbd.read(n * STEP, &mut buffers[1]);
        assert!(buffers[0][..] == buffers[1][..], "block {n} differs");
        let last = block.acknowledged.load(SeqCst);
        assert!(is_one_of(&buffers[0][..SECTOR], n, last, last), "block {n}");
    }
    println!("# {written:?} writes, {read:?} reads and reads that met a write");
    let enough = written.iter().all(|count| *count > 20) && read.iter().all(|(count, met)| *count > 20 && *met > 5);
    println!("coherent: {}", if enough { "yes" } else { "too little was tried" });
}

#[test]
fn a_block_device_and_nbd_clients_see_one_content() {
    need!("qemu-system-x86_64", "busybox", "cpio", "modprobe", "xz", "dmsetup", "blkdiscard", "timeout");
    let bench = Bench::new();
    bench.filled("source", SIZE, SOURCE);
    [("copy", SIZE), ("meta", 4 * MIB)].iter().for_each(|(name, size)| drop(bench.hole(name, *size)));
    // Under a name that the script knows.
    let program = bench.path("two-frontends");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let programs = [program.to_str().unwrap(), "timeout"];
    let Some(said) = boot(&bench, &["ublk-two-frontends.guest"], &[], &programs, &["source", "copy", "meta"]) else {
        return;
    };
    said.has("coherent: yes");
    said.has("hydrated meanwhile: yes");
    said.has("stop status: 0");
    said.has("destination as the device: yes");
    assert!(!said.0.contains("kernel: "), "{}", said.0);
}
