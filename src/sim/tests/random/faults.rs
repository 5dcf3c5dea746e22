//! What goes wrong in a random life: devices that fail, stall or fill up, a source that goes and comes, metadata that rot.

use super::super::super::clone::{Devices, Setup, SimClone};
use super::super::super::disk::Op;
use super::super::super::executor::Sim;
use super::super::super::report::Group;
use crate::error::ErrorKind;
use crate::meta::codec::BLOCK_SIZE;
use crate::meta::commit::{OtherState, Recovery};
use crate::meta::store::{Store, probe};
use crate::units::ByteRange;
use std::time::Duration;

/// Longer than any patience of clients, in real life.
const STALL_MAX: Duration = Duration::from_secs(60);
const SECTOR: u64 = 512;

/// Makes a disk fail now and then. Returns the errors that clients may see of it.
fn plague_disk(sim: &Sim, disk: &super::super::super::disk::SimDisk, is_metadata: bool) -> Vec<ErrorKind> {
    use ErrorKind::{Failed, Io, NoSpace, ReadOnly};
    let rng = sim.clone();
    let (rare, full) = sim.draw(|rng| (rng.between(10, 300), rng.one_in(4)));
    // Which operations fail: of each kind or not; flushes end what can be tried, so not always.
    let kinds = sim.draw(|rng| rng.between(1, 31));
    let flushes = sim.draw(|rng| rng.one_in(3)) || is_metadata;
    // A fault may last for some operations. At last the device may be gone.
    let (burst_max, gone_after) =
        sim.draw(|rng| (rng.pick(&[1, 1, 4, 30]), if rng.one_in(8) { rng.below(400) } else { u64::MAX }));
    let gone_errno = sim.draw(|rng| rng.pick(&[libc::EIO, libc::ENODEV]));
    let (mut burst, mut operations) = (0, 0);
    disk.set_fault(move |op: &Op| {
        operations += 1;
        if operations > gone_after {
            return Some(gone_errno);
        }
        let kind = match op {
            Op::Read(_) => 1,
            Op::Write { .. } => 2,
            Op::Zero { .. } => 4,
            Op::Allocation(_) => 8,
            Op::Flush => 16,
        };
        let spared = if *op == Op::Flush { !flushes } else { kinds & kind == 0 };
        if burst == 0 && rng.draw(|rng| rng.one_in(rare)) {
            burst = rng.draw(|rng| rng.between(1, burst_max));
        }
        if spared || burst == 0 {
            return None;
        }
        burst -= 1;
        Some(if full && op.is_change() { libc::ENOSPC } else { libc::EIO })
    });
    vec![Io, NoSpace, ReadOnly, Failed]
}

/// Makes the devices fail now and then, until they are healed. Returns the errors that clients may see.
pub fn plague(sim: &Sim, devices: &Devices) -> Vec<ErrorKind> {
    let mut excuses = Vec::new();
    if sim.draw(|rng| rng.one_in(2)) {
        excuses.extend(plague_disk(sim, &devices.destination, false));
    }
    if sim.draw(|rng| rng.one_in(3)) {
        excuses.extend(plague_disk(sim, &devices.metadata, true));
    }
    for stalls in [&*devices.destination.stalls, &*devices.metadata.stalls, &devices.source.stalls] {
        if sim.draw(|rng| rng.one_in(4)) {
            stalls.set((sim.draw(|rng| rng.between(20, 400)), STALL_MAX));
        }
    }
    let source = devices.source.clone();
    let size = source.content().len() as u64;
    let bad: Vec<ByteRange> = sim.draw(|rng| {
        let places = rng.pick(&[0, 0, 1, 5]);
        (0..places).filter_map(|_| ByteRange::new(rng.below(size), 1)).collect()
    });
    let errors = sim.draw(|rng| if rng.one_in(4) { rng.between(3, 100) } else { 0 });
    if !bad.is_empty() || errors > 0 {
        excuses.push(ErrorKind::Io);
    }
    source.set_bad(bad);
    source.errors.set(errors);
    if sim.draw(|rng| rng.one_in(3)) {
        excuses.push(ErrorKind::SourceLost);
        let may_change = sim.draw(|rng| rng.one_in(4));
        if may_change {
            excuses.push(ErrorKind::SourceChanged);
        }
        source.patience.set(Duration::from_millis(sim.draw(|rng| rng.pick(&[20, 20, 2000]))));
        let sim = sim.clone();
        sim.clone().spawn(async move {
            loop {
                let (off, on) = sim.draw(|rng| (rng.below(50_000), rng.below(60_000)));
                sim.sleep(Duration::from_micros(on)).await;
                sim.say(|| "source      IS LOST".into());
                source.lost.set(true);
                sim.sleep(Duration::from_micros(off)).await;
                source.lost.set(false);
                source.changed.set(may_change && sim.draw(|rng| rng.one_in(3)));
                sim.say(|| format!("source      IS BACK, changed: {}", source.changed.get()));
            }
        });
    }
    excuses
}

pub fn heal(devices: &Devices) {
    devices.destination.clear_fault();
    devices.metadata.clear_fault();
    devices.source.set_bad(Vec::new());
    devices.source.errors.set(0);
    devices.source.lost.set(false);
    devices.source.changed.set(false);
    for stalls in [&*devices.destination.stalls, &*devices.metadata.stalls, &devices.source.stalls] {
        stalls.set((0, Duration::ZERO));
    }
}

/// What becomes of a place of the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rot {
    Bit,
    Garbage,
    Zeros,
    /// What belongs to another sector.
    Misplaced,
    Unreadable,
}

/// A sector of the metadata rots while the machine is off. Of the bitmap: the start refuses and names the sector, writes
/// nothing, and once the sector is put back all goes on. Of one superblock copy: the other one serves. Of both: refused.
pub fn rot_metadata(sim: &Sim, setup: &Setup, devices: &Devices) {
    let metadata = &devices.metadata;
    let Recovery::Use(recovered) = sim.block_on(probe(&**metadata)).unwrap() else { return };
    let blocks = 2 + recovered.superblock.geometry.nr_zones();
    let both_valid = recovered.other.is_none_or(|other| other.state == OtherState::Older);
    let block = if both_valid && sim.draw(|rng| rng.one_in(2)) {
        sim.draw(|rng| rng.below(2))
    } else {
        sim.draw(|rng| rng.between(2, blocks - 1))
    };
    let (in_block, how) = sim.draw(|rng| {
        (rng.below(8), rng.pick(&[Rot::Bit, Rot::Bit, Rot::Garbage, Rot::Zeros, Rot::Misplaced, Rot::Unreadable]))
    });
    let sector = block * (BLOCK_SIZE as u64 / SECTOR) + in_block;
    let range = ByteRange::new(sector * SECTOR, SECTOR).unwrap();
    let before = metadata.image();
    let bytes = |range: ByteRange| before[range.start() as usize..range.end() as usize].to_vec();
    let mut rotten = bytes(range);
    let flipped = sim.draw(|rng| rng.below(SECTOR * 8));
    match how {
        Rot::Bit => rotten[(flipped / 8) as usize] ^= 1 << (flipped % 8),
        Rot::Garbage => sim.draw(|rng| rotten.fill_with(|| rng.next() as u8)),
        Rot::Zeros => rotten.fill(0),
        Rot::Misplaced => {
            let other = sim.draw(|rng| rng.between(16, blocks * 8 - 1));
            rotten = bytes(ByteRange::new(other * SECTOR, SECTOR).unwrap());
        }
        Rot::Unreadable => metadata.set_fault(move |op| match op {
            Op::Read(read) if read.overlaps(range) => Some(libc::EIO),
            _ => None,
        }),
    }
    if rotten == bytes(range) && how != Rot::Unreadable {
        return;
    }
    sim.count(Group::Fault, if block < 2 { "metadata: rotten superblock" } else { "metadata: rotten bitmap sector" });
    sim.say(|| format!("metadata    ROTS: sector {sector}, {how:?}"));
    metadata.rot(range, &rotten);
    let refused = || {
        let damaged = metadata.image();
        let error = sim.block_on(SimClone::start(sim, setup, devices)).err();
        assert!(metadata.image() == damaged, "what is refused is not written to");
        error.unwrap_or_else(|| panic!("sector {sector} is rotten ({how:?}), and the clone starts"))
    };
    if block >= 2 {
        let error = refused();
        match how {
            Rot::Unreadable => assert_eq!(error.kind(), ErrorKind::Io, "{error}"),
            _ => {
                assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
                assert!(error.to_string().contains(&format!("sector {sector} ")), "sector {sector}: {error}");
            }
        }
        metadata.clear_fault();
        metadata.rot(range, &bytes(range));
        return;
    }
    let copy = ["copy A", "copy B"][block as usize];
    if sim.draw(|rng| rng.one_in(3)) && how != Rot::Unreadable {
        // The other copy as well.
        let other = ByteRange::new((1 - block) * BLOCK_SIZE as u64 + 40, 1).unwrap();
        metadata.rot(other, &[!bytes(other)[0]]);
        let error = refused();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        metadata.rot(other, &bytes(other));
    }
    // One good copy is enough; the life that follows goes on from it, and may write both.
    let started = sim.block_on(probe(&**metadata)).unwrap();
    assert!(matches!(started, Recovery::Use(_)), "{copy} is rotten: {started:?}");
    sim.block_on(Store::open(metadata.clone())).unwrap().expect("it is formatted");
    metadata.clear_fault();
}
