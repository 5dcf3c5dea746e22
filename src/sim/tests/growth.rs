//! Growing: what the grown part reads, what a crash leaves at any moment, what a growth that fails leaves behind.

use super::super::clone::{Devices, OLD_DESTINATION, Setup, SimClone};
use super::super::disk::Op;
use super::super::executor::Sim;
use super::super::seeds;
use super::{Seed, content, result, scenario, start};
use crate::clone_state::Mode;
use crate::error::ErrorKind;
use crate::meta::growth::Wanted;
use crate::units::{RegionIndex, ShardIndex};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

const REGION: u64 = 4096;
const FOLLOW: Wanted = Wanted { size: None, zeros: false };

fn to(size: u64) -> Wanted {
    Wanted { size: Some(size), zeros: false }
}
fn zeros_to(size: u64) -> Wanted {
    Wanted { size: Some(size), zeros: true }
}

/// 10 regions and a short one, in zones of 4; the destination has old data behind the clone.
fn setup() -> Setup {
    Setup { size: 10 * REGION + 700, shards: 3, regions_per_zone: 4, excess: 20 * REGION, ..Setup::default() }
}

/// What is added to the source.
fn more(len: u64) -> Vec<u8> {
    (0..len).map(|at| 1 + (at % 101) as u8).collect()
}

async fn read_all(clone: &SimClone) -> Vec<u8> {
    clone.read(0, clone.geometry().size()).await.unwrap()
}

/// Grows a clone whose tail was written, under load, and returns what it must read.
async fn grown_under_load(clone: &Rc<SimClone>, wanted: Wanted) -> Vec<u8> {
    let old = clone.geometry().size();
    let mut expected = clone.devices.source.content()[..old as usize].to_vec();
    clone.write(old - 100, &[0xaa; 100]).await.unwrap();
    expected[old as usize - 100..].fill(0xaa);
    clone.devices.source.append(&more(15_000));
    let writes: Vec<_> = (0..8u64)
        .map(|i| {
            let (other, at) = (clone.clone(), i * REGION + 50);
            start(clone, async move {
                for _ in 0..20 {
                    other.write(at, &[i as u8 + 1; 1000]).await.unwrap();
                }
            })
        })
        .collect();
    assert!(clone.grow(wanted, OLD_DESTINATION).await.unwrap());
    for (i, write) in writes.iter().enumerate() {
        result(clone, write).await;
        expected[i * 4096 + 50..][..1000].fill(i as u8 + 1);
    }
    let size = wanted.size.unwrap_or(old + 15_000);
    assert_eq!(clone.geometry().size(), size);
    expected.extend(more(15_000));
    if wanted.zeros {
        expected.truncate(old as usize);
    }
    expected.resize(size as usize, 0);
    expected
}

#[test]
fn the_grown_part_is_the_source_and_then_zeros() {
    let old = setup().size;
    for (wanted, remote_source) in [
        (FOLLOW, false),
        (FOLLOW, true),
        (to(old + 10), false),
        (to(old + 10_000), true),
        (to(old + 40_000), false),
        (to(old + 40_000), true),
        (zeros_to(old + 40_000), true),
    ] {
        for hydration in [false, true] {
            scenario(&Setup { hydration, remote_source, ..setup() }, |clone| async move {
                let expected = grown_under_load(&clone, wanted).await;
                assert_eq!(read_all(&clone).await, expected);
                clone.enable_hydration(true);
                clone.completed().await;
                assert_eq!(read_all(&clone).await, expected);
                let size = clone.geometry().size() as usize;
                let image = clone.devices.destination.image();
                assert_eq!(image[..size], expected);
                assert!(image[size..].iter().all(|b| *b == OLD_DESTINATION));
            });
        }
    }
}

#[test]
fn a_growth_that_adds_nothing_does_nothing() {
    scenario(&setup(), |clone| async move {
        assert!(!clone.grow(FOLLOW, 0).await.unwrap());
        assert!(!clone.grow(to(setup().size), 0).await.unwrap());
        assert_eq!(clone.grow(to(5), 0).await.unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!((clone.state.events().count().all, clone.devices.metadata.grown(0, 0).image().len()), (0, 5 * 4096));
    });
}

/// Stops the machine after `operations` operations of the growth, or when it is done; returns whether it was.
fn grow_and_crash(seed: u64, operations: usize, setup: &Setup, tail_hydrated: bool, wanted: Wanted) -> bool {
    let _seed = Seed(seed);
    let sim = Sim::new(seed);
    let mut expected = content(setup.size);
    let devices = Devices::new(&sim, setup, expected.clone());
    let clone = sim.block_on(SimClone::start(&sim, setup, &devices)).unwrap();
    let old = setup.size;
    let done = sim.block_on(async {
        if tail_hydrated {
            clone.write(old - 100, &[0xaa; 100]).await.unwrap();
            expected[old as usize - 100..].fill(0xaa);
        }
        clone.write(2 * REGION, &[0xbb; 4096]).await.unwrap();
        expected[2 * 4096..3 * 4096].fill(0xbb);
        clone.flush().await.unwrap();
        devices.source.append(&more(15_000));
        // Not flushed, but suspending commits it.
        clone.write(4 * REGION, &[0xcc; 4096]).await.unwrap();
        let seen = || devices.destination.log().len() + devices.metadata.log().len();
        let before = seen();
        let growing = clone.clone();
        let grown = start(&clone, async move { growing.grow(wanted, OLD_DESTINATION).await.unwrap() });
        loop {
            if grown.take().is_some() {
                break true;
            }
            if seen() - before >= operations {
                sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(400)))).await;
                break grown.take().is_some();
            }
            sim.sleep(Duration::from_micros(3)).await;
        }
    });
    let devices = devices.crash(&sim);
    let clone = sim.block_on(SimClone::start(&sim, setup, &devices)).unwrap();
    let size = clone.geometry().size();
    let new = wanted.size.unwrap_or(old + 15_000);
    assert!(size == new || (size == old && !done), "{size}, done {done}");
    let mut found = sim.block_on(read_all(&clone));
    let unflushed = &mut found[4 * 4096..5 * 4096];
    assert!(unflushed == [0xcc; 4096] || (!done && unflushed == &expected[4 * 4096..5 * 4096]));
    unflushed.copy_from_slice(&expected[4 * 4096..5 * 4096]);
    expected.extend(more(15_000));
    expected.resize(new as usize, 0);
    assert_eq!(found, expected[..size as usize], "after {operations} operations");
    // It goes on from there, and grows if it has not.
    sim.block_on(async {
        if size == old {
            assert!(clone.grow(wanted, OLD_DESTINATION).await.unwrap());
        }
        clone.enable_hydration(true);
        clone.completed().await;
        let mut image = clone.devices.destination.image();
        image.truncate(new as usize);
        image[4 * 4096..5 * 4096].copy_from_slice(&expected[4 * 4096..5 * 4096]);
        assert_eq!(image, expected);
    });
    sim.kill_all();
    done
}

#[test]
fn a_crash_leaves_the_old_or_the_new_size_and_the_right_bytes() {
    let old = setup().size;
    for (tail_hydrated, block, wanted) in [
        (true, 512, FOLLOW),
        (true, 4096, FOLLOW),
        (true, 1, to(old + 100)),
        (false, 512, FOLLOW),
        (true, 512, to(old + 40_000)),
    ] {
        let setup = Setup { block, excess: 20 * REGION + 3396, remote_source: tail_hydrated, ..setup() };
        for seed in seeds(0..8) {
            let finished = (0..200).find(|operations| grow_and_crash(seed, *operations, &setup, tail_hydrated, wanted));
            assert!(finished.is_some_and(|operations| operations > 5), "{finished:?}");
            assert!(grow_and_crash(seed, usize::MAX, &setup, tail_hydrated, wanted));
        }
    }
}

/// Follows every bit through a growth, a stop and a crash: once a region is hydrated it stays so, and nothing of it is read
/// from the source again. dm-clone loses this when a second table is loaded over a live clone: the new one has read the
/// bits before the old one has ended.
struct Bits {
    hydrated: RefCell<BTreeSet<u64>>,
    reads_seen: Cell<usize>,
}

impl Bits {
    fn watch(clone: &Rc<SimClone>) -> Rc<Self> {
        let reads = clone.devices.source.reads().len();
        let bits = Rc::new(Self { hydrated: RefCell::default(), reads_seen: Cell::new(reads) });
        let (watching, weak) = (bits.clone(), Rc::downgrade(clone));
        watching.look(clone);
        clone.sim.check_each_step(move || weak.upgrade().iter().for_each(|clone| watching.look(clone)));
        bits
    }

    fn look(&self, clone: &SimClone) {
        let mut hydrated = self.hydrated.borrow_mut();
        let geometry = clone.geometry();
        let reads = clone.devices.source.reads();
        for read in &reads[self.reads_seen.replace(reads.len())..] {
            let again = geometry.touched(*read).iter().find(|region| hydrated.contains(&region.0));
            assert_eq!(again, None, "{read:?} is read from the source, and a region of it is hydrated");
        }
        for shard in (0..clone.net.shards()).map(ShardIndex) {
            let Ok(slice) = clone.net.shard(shard).slice(clone.state.id) else { continue };
            let map = slice.map();
            let mine = (0..map.geometry().nr_regions())
                .map(RegionIndex)
                .filter(|region| geometry.owner_of(geometry.zone_of(*region), clone.net.shards()) == shard);
            for region in mine {
                match map.is_hydrated(region) {
                    true => _ = hydrated.insert(region.0),
                    false => assert!(!hydrated.contains(&region.0), "the bit of region {region} was taken back"),
                }
            }
        }
    }
}

#[test]
fn what_was_hydrated_before_a_growth_or_a_restart_never_goes_back_to_the_source() {
    for seed in seeds(0..30) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        // Whole regions: a short one's growth is read from the source, rightly.
        let mut setup = Setup { size: 24 * REGION, hydration: true, threshold: 2, batch_size: 1, ..setup() };
        let devices = Devices::new(&sim, &setup, content(setup.size));
        devices.source.latency_us.set((500, 5000));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        let bits = Bits::watch(&clone);
        let load = |clone: &Rc<SimClone>, regions: u64| {
            let all: Vec<_> = (0..4u64)
                .map(|i| {
                    let other = clone.clone();
                    start(clone, async move {
                        for _ in 0..8 {
                            let at = other.sim.draw(|rng| rng.below(regions)) * REGION;
                            match i {
                                0 => other.write(at, &[7; 4096]).await.unwrap(),
                                1 => other.trim(at, REGION).await.unwrap(),
                                2 => other.cache(at, REGION).await.unwrap(),
                                _ => _ = other.read(at, REGION).await.unwrap(),
                            }
                        }
                    })
                })
                .collect();
            all
        };
        sim.block_on(async {
            let busy = load(&clone, 24);
            sim.sleep(Duration::from_micros(sim.draw(|rng| rng.below(20_000)))).await;
            devices.source.append(&more(20 * REGION));
            assert!(clone.grow(FOLLOW, OLD_DESTINATION).await.unwrap());
            for work in busy {
                result(&clone, &work).await;
            }
            for work in load(&clone, 44) {
                result(&clone, &work).await;
            }
            if seed % 2 == 0 {
                clone.stop().await.unwrap();
            }
        });
        // A stop commits all there is; what a crash keeps was flushed.
        let kept = match seed % 2 {
            0 => bits.hydrated.borrow().clone(),
            _ => {
                let flushed = bits.hydrated.borrow().clone();
                sim.block_on(clone.flush()).unwrap();
                flushed
            }
        };
        let devices = devices.crash(&sim);
        setup.shards = 1 + (seed % 4) as u16;
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        let bits = Bits::watch(&clone);
        assert!(bits.hydrated.borrow().is_superset(&kept), "{kept:?} were hydrated");
        sim.block_on(clone.completed());
        sim.kill_all();
    }
}

#[test]
fn a_complete_clone_grows_and_completes_again() {
    for (wanted, opens_source) in [(FOLLOW, true), (to(15 * REGION), true), (zeros_to(30 * REGION), false)] {
        scenario(&Setup { hydration: true, ..setup() }, |clone| async move {
            clone.completed().await;
            let old = clone.geometry().size();
            clone.devices.source.clear_reads();
            let expected = grown_under_load(&clone, wanted).await;
            assert_eq!(read_all(&clone).await, expected);
            clone.completed().await;
            assert_eq!(read_all(&clone).await, expected);
            let reads = clone.devices.source.reads();
            assert!(reads.iter().all(|read| read.start() >= old), "{reads:?}");
            assert_eq!(!reads.is_empty(), opens_source);
            clone.check_events();
            assert!((0..3).all(|shard| clone.slice(shard).source().is_err()));
        });
    }
}

#[test]
fn the_hydration_of_what_is_new_is_told_of() {
    scenario(&Setup { hydration: true, ..setup() }, |clone| async move {
        clone.completed().await;
        assert!(clone.grow(zeros_to(30 * REGION), OLD_DESTINATION).await.unwrap());
        clone.completed().await;
        clone.sim.sleep(Duration::from_millis(10)).await;
        clone.check_events();
        let kinds = clone.event_kinds();
        let order = ["hydration_started", "hydration_completed", "resized", "hydration_started", "hydration_completed"];
        assert_eq!(kinds, order);
    });
}

/// Its last region only gets longer: there is nothing to hydrate, so it stays complete.
#[test]
fn a_complete_clone_that_grows_in_its_last_region_stays_complete() {
    for seed in seeds(0..20) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let setup = Setup { hydration: true, ..setup() };
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            clone.completed().await;
            assert!(clone.grow(zeros_to(11 * REGION), OLD_DESTINATION).await.unwrap());
            assert!(clone.state.is_complete() && (0..3).all(|shard| clone.slice(shard).source().is_err()));
        });
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert!(clone.state.is_complete());
        let mut expected = content(setup.size);
        expected.resize(11 * 4096, 0);
        assert_eq!(sim.block_on(read_all(&clone)), expected);
        sim.kill_all();
    }
}

#[test]
fn a_suspended_clone_stays_suspended_and_its_requests_see_the_new_size() {
    scenario(&setup(), |clone| async move {
        clone.suspend().await.unwrap();
        clone.devices.source.append(&more(5000));
        let (reader, old) = (clone.clone(), setup().size);
        let held = start(&clone, async move { reader.read(old, 5000).await.unwrap() });
        clone.sim.sleep(Duration::from_millis(10)).await;
        assert!(clone.grow(FOLLOW, 0).await.unwrap() && clone.state.is_suspended());
        clone.sim.sleep(Duration::from_millis(100)).await;
        assert_eq!((held.take(), clone.waiting()), (None, 1));
        clone.resume().await.unwrap();
        assert_eq!(result(&clone, &held).await, more(5000));
    });
}

/// What fails before anything counts leaves the clone as it was, and able to grow later.
#[test]
fn a_growth_that_fails_early_is_undone() {
    // The tail's copy can't be read; it can't be written; there is no space for the new zones.
    for what in 0..3 {
        scenario(&setup(), |clone| async move {
            let old = setup().size;
            clone.write(old - 100, &[0xaa; 100]).await.unwrap();
            clone.flush().await.unwrap();
            clone.devices.source.append(&more(40_000));
            let bad = crate::units::ByteRange::new(old, 100).unwrap();
            match what {
                0 => clone.devices.source.set_bad(vec![bad]),
                1 => clone.devices.destination.set_fault(|op| op.is_change().then_some(libc::ENOSPC)),
                _ => clone.devices.metadata.set_fault(|op| op.is_change().then_some(libc::ENOSPC)),
            }
            let error = clone.grow(FOLLOW, 0).await.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace), "{error:?}");
            assert_eq!((clone.state.mode(), clone.geometry().size()), (Mode::ReadWrite, old));
            assert!(!clone.state.is_suspended());
            clone.devices.source.set_bad(Vec::new());
            clone.devices.destination.clear_fault();
            clone.devices.metadata.clear_fault();
            assert!(clone.read(old, 1).await.is_err());
            clone.write(0, &[1; 10]).await.unwrap();
            clone.flush().await.unwrap();
            assert!(clone.grow(FOLLOW, 0).await.unwrap());
            assert_eq!(clone.read(old - 100, 40_100).await.unwrap(), [vec![0xaa; 100], more(40_000)].concat());
        });
    }
}

/// A failed flush, or half a superblock, is what it always is: read-only. The clone keeps its size until it is
/// started again, when it has either.
#[test]
fn a_growth_whose_flush_fails_makes_read_only() {
    for on_metadata in [false, true] {
        for after in 0..4 {
            for seed in seeds(0..5) {
                let _seed = Seed(seed);
                let sim = Sim::new(seed);
                let setup = setup();
                let devices = Devices::new(&sim, &setup, content(setup.size));
                let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
                sim.block_on(async {
                    clone.write(setup.size - 100, &[0xaa; 100]).await.unwrap();
                    clone.suspend().await.unwrap();
                    clone.devices.source.append(&more(40_000));
                    let disk = if on_metadata { &clone.devices.metadata } else { &clone.devices.destination };
                    // The superblock copies are written after the first flush.
                    let mut seen = 0;
                    disk.set_fault(move |op| {
                        let counts = *op == Op::Flush || seen > 0;
                        seen += usize::from(counts);
                        (counts && seen > after).then_some(libc::EIO)
                    });
                    if !on_metadata && after > 0 {
                        return;
                    }
                    let error = clone.grow(FOLLOW, 0).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
                    assert_eq!((clone.state.mode(), clone.geometry().size()), (Mode::ReadOnly, setup.size));
                    disk.clear_fault();
                    clone.resume().await.unwrap();
                    assert_eq!(clone.read(setup.size - 100, 100).await.unwrap(), [0xaa; 100]);
                });
                let devices = devices.crash(&sim);
                let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
                let mut expected = content(setup.size);
                expected[setup.size as usize - 100..].fill(0xaa);
                if clone.geometry().size() > setup.size {
                    expected.extend(more(40_000));
                }
                assert_eq!(sim.block_on(read_all(&clone)), expected);
                sim.kill_all();
            }
        }
    }
}

/// A commit that fails while the growth waits for requests in flight: the clone is held then, but with bits that no
/// metadata will ever have. It must not grow any more.
#[test]
fn a_commit_that_fails_while_requests_are_held_ends_the_growth() {
    scenario(&setup(), |clone| async move {
        let old = setup().size;
        clone.write(0, &[1; 4096]).await.unwrap();
        clone.devices.destination.set_gate(|op| *op == Op::Flush);
        let (flushing, growing) = (clone.clone(), clone.clone());
        let flush = start(&clone, async move { flushing.flush().await });
        clone.sim.sleep(Duration::from_millis(5)).await;
        clone.devices.source.append(&more(40_000));
        let grown = start(&clone, async move { growing.grow(FOLLOW, 0).await });
        clone.sim.sleep(Duration::from_millis(50)).await;
        clone.devices.destination.set_fault(|op| (*op == Op::Flush).then_some(libc::EIO));
        clone.devices.destination.clear_gate();
        assert_eq!(result(&clone, &flush).await.unwrap_err().kind(), ErrorKind::Io);
        clone.devices.destination.clear_fault();
        assert_eq!(result(&clone, &grown).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!((clone.geometry().size(), clone.state.mode()), (old, Mode::ReadOnly));
        assert_eq!(clone.read(0, 4096).await.unwrap(), [1; 4096], "it goes on");
    });
}

#[test]
fn stopping_ends_a_growth_that_waits_for_its_source() {
    scenario(&setup(), |clone| async move {
        clone.write(setup().size - 100, &[0xaa; 100]).await.unwrap();
        clone.devices.source.append(&more(5000));
        clone.devices.source.lost.set(true);
        clone.devices.source.patience.set(Duration::from_secs(2));
        let growing = clone.clone();
        let grown = start(&clone, async move { growing.grow(FOLLOW, 0).await });
        clone.sim.sleep(Duration::from_millis(100)).await;
        clone.stop().await.unwrap();
        let error = result(&clone, &grown).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::SourceLost | ErrorKind::Shutdown), "{error:?}");
        assert_eq!(clone.geometry().size(), setup().size);
    });
}
