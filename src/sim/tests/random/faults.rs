//! What goes wrong in a random life: devices that fail, stall or fill up, a source that goes and comes, metadata that rot.

use super::super::super::clone::{Devices, Setup, SimClone};
use super::super::super::disk::{Op, SimDisk};
use super::super::super::executor::Sim;
use super::super::super::report::Group;
use crate::clone_state::Mode;
use crate::error::{Error, ErrorKind};
use crate::meta::codec::BLOCK_SIZE;
use crate::meta::commit::{OtherState, Recovery};
use crate::meta::store::{Store, probe};
use crate::units::ByteRange;
use std::time::Duration;

/// Longer than any patience of clients, in real life.
const STALL_MAX: Duration = Duration::from_secs(60);
const SECTOR: u64 = 512;

/// What may fail in one life, and why: no error without a fault that explains it.
pub struct Excuses {
    devices: Devices,
    /// What the loss of the source explains.
    of_source: Vec<ErrorKind>,
}

/// What was asked of a clone, and what had failed before.
pub struct Asked {
    /// Whole regions, for a request of data.
    regions: Option<ByteRange>,
    /// It makes data durable.
    durable: bool,
    destination: usize,
    metadata: usize,
    source: usize,
}

impl Excuses {
    pub fn new(devices: &Devices, of_source: &[ErrorKind]) -> Self {
        Self { devices: devices.clone(), of_source: of_source.to_vec() }
    }

    /// A request begins: of `range`, to make data durable, or both.
    pub fn asked(&self, setup: &Setup, range: Option<ByteRange>, durable: bool) -> Asked {
        let regions = range.and_then(|range| {
            let size = setup.region_size;
            ByteRange::between(range.start() / size * size, range.end().next_multiple_of(size))
        });
        let Devices { source, destination, metadata, .. } = &self.devices;
        let (destination, metadata) = (destination.failed().len(), metadata.failed().len());
        Asked { regions, durable, destination, metadata, source: source.failed().len() }
    }

    /// Whether something failed after which nothing may be acknowledged as durable any more: a flush, a FUA write, or
    /// anything at the metadata.
    pub fn may_be_read_only(&self) -> bool {
        let is_grave = |op: &Op| matches!(op, Op::Flush | Op::Write { fua: true, .. });
        !self.devices.metadata.failed().is_empty()
            || self.devices.destination.failed().iter().any(|(op, _)| is_grave(op))
    }

    /// Nothing else makes a clone read-only.
    pub fn check_mode(&self, mode: Mode) {
        assert!(
            mode == Mode::ReadWrite || self.may_be_read_only(),
            "{mode:?}, and neither a flush nor metadata failed"
        );
    }

    /// Whether a request may have failed with `error`, in a clone of this mode.
    pub fn request(&self, asked: &Asked, error: &Error, mode: Mode) -> bool {
        self.check_mode(mode);
        let Devices { source, destination, .. } = &self.devices;
        let touches = |range: Option<ByteRange>| match (asked.regions, range) {
            (Some(regions), Some(range)) => regions.overlaps(range),
            _ => false,
        };
        match error.kind() {
            ErrorKind::ReadOnly | ErrorKind::Failed => mode != Mode::ReadWrite,
            // A commit that fails makes the clone read-only before anybody is told.
            ErrorKind::Io | ErrorKind::NoSpace if asked.durable && mode != Mode::ReadWrite => true,
            kind @ (ErrorKind::Io | ErrorKind::NoSpace) => {
                let is_full = kind == ErrorKind::NoSpace;
                let same = |errno: i32| (errno == libc::ENOSPC) == is_full;
                destination.failed()[asked.destination..].iter().any(|(op, errno)| same(*errno) && touches(op.range()))
                    || !is_full && source.failed()[asked.source..].iter().any(|range| touches(Some(*range)))
            }
            kind => asked.regions.is_some() && self.of_source.contains(&kind),
        }
    }

    /// Whether a growth may have failed with `error`: anything that failed meanwhile explains that.
    pub fn growth(&self, asked: &Asked, error: &Error, mode: Mode) -> bool {
        self.check_mode(mode);
        let Devices { source, destination, metadata, .. } = &self.devices;
        let has_failed = destination.failed().len() > asked.destination
            || metadata.failed().len() > asked.metadata
            || source.failed().len() > asked.source;
        match error.kind() {
            ErrorKind::ReadOnly | ErrorKind::Failed => mode != Mode::ReadWrite,
            ErrorKind::Io | ErrorKind::NoSpace => has_failed || mode != Mode::ReadWrite,
            kind => self.of_source.contains(&kind),
        }
    }
}

/// Makes a disk fail now and then.
fn plague_disk(sim: &Sim, disk: &SimDisk, is_metadata: bool) {
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
}

/// Makes the devices fail now and then, until they are healed. Returns the errors that the loss of the source explains.
pub fn plague(sim: &Sim, devices: &Devices) -> Vec<ErrorKind> {
    let mut excuses = Vec::new();
    if sim.draw(|rng| rng.one_in(2)) {
        plague_disk(sim, &devices.destination, false);
    }
    if sim.draw(|rng| rng.one_in(3)) {
        plague_disk(sim, &devices.metadata, true);
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
    devices.destination.forget_failures();
    devices.metadata.forget_failures();
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
    // After a kill: the start does it, which is not to be taken for a change of what is there.
    metadata.drop_clean_pages();
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
    // Something known in the place of one copy is not taken for damage: somebody has written there. Garbage is damage, unless
    // it happens to look like something.
    let copy = ["copy A", "copy B"][block as usize];
    let is_used = matches!(sim.block_on(probe(&**metadata)).unwrap(), Recovery::Use(_));
    if in_block == 0 && how == Rot::Garbage && !is_used {
        let error = refused();
        assert!(error.kind() == ErrorKind::Damaged && error.to_string().contains(copy), "{error}");
        metadata.rot(range, &bytes(range));
        return;
    }
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
