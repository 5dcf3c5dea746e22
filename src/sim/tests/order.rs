//! What overlaps: copies in flight, discards, overwrites, reads that are kept, parts of blocks.

use super::super::clone::{Devices, OLD_DESTINATION, Setup, SimClone};
use super::super::executor::Sim;
use super::super::seeds;
use super::{Seed, content, result, scenario, start};
use crate::io_frontend::request::RequestFlags;
use crate::shard::ShardRequest;
use crate::units::ByteRange;
use std::time::Duration;

const REGION: u64 = 4096;

/// Whose copy of the region is in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum By {
    Background,
    /// A read that is kept.
    Read,
    Cache,
}

/// dm-clone loses this: a copy is in flight, the region is discarded, written and flushed, and then the copy lands.
/// Afterwards the power fails. `lands`: the copy is held up in its write, not in its read.
fn discard_and_write_during_a_copy_of(by: By, lands: bool, fua: bool, offset: u64, len: u64) {
    let setup = Setup { size: 16 * REGION, hydration: by == By::Background, block: 512, ..Setup::default() };
    for seed in seeds(0..8) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let source = content(setup.size);
        let devices = Devices::new(&sim, &setup, source.clone());
        let destination = devices.destination.clone();
        match lands {
            true => destination.set_gate(|op| op.is_change()),
            false => devices.source.held.set(true),
        }
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        let region = 3 * REGION..4 * REGION;
        let data = vec![0xf7; len as usize];
        sim.block_on(async {
            let copy = {
                let clone = clone.clone();
                start(&clone.clone(), async move {
                    match by {
                        By::Background => {}
                        By::Read => _ = clone.read(3 * REGION, REGION).await.unwrap(),
                        By::Cache => clone.cache(3 * REGION, REGION).await.unwrap(),
                    }
                })
            };
            while if lands { destination.changes() == 0 } else { devices.source.in_flight_bytes() == 0 } {
                sim.sleep(Duration::from_micros(100)).await;
            }
            let client = {
                let (clone, data) = (clone.clone(), data.clone());
                start(&clone.clone(), async move {
                    clone.trim(3 * REGION, REGION).await.unwrap();
                    let flags = if fua { RequestFlags::FUA } else { RequestFlags::empty() };
                    clone.write_flags(3 * REGION + offset, &data, flags).await.unwrap();
                    if !fua {
                        clone.flush().await.unwrap();
                    }
                })
            };
            sim.sleep(Duration::from_millis(20)).await;
            devices.source.held.set(false);
            destination.clear_gate();
            result(&clone, &client).await;
            result(&clone, &copy).await;
        });
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            let check = |found: Vec<u8>| {
                let (start, end) = (offset as usize, (offset + len) as usize);
                assert_eq!(found[start..end], data[..], "what was flushed: {by:?}, lands {lands}, FUA {fua}");
                let old = &source[region.start as usize..region.end as usize];
                // FUA is about the write alone: each sector of a trim that was not flushed may be lost for itself.
                let unit = if fua { 512 } else { found.len() };
                for first in (0..found.len()).step_by(unit) {
                    let rest: Vec<usize> = (first..first + unit).filter(|i| !(start..end).contains(i)).collect();
                    let zero = rest.iter().all(|i| found[*i] == 0);
                    assert!(zero || rest.iter().all(|i| found[*i] == old[*i]), "the rest is zeros or the source's");
                }
            };
            check(clone.read(region.start, REGION).await.unwrap());
            clone.enable_hydration(true);
            clone.completed().await;
            check(clone.read(region.start, REGION).await.unwrap());
        });
        sim.kill_all();
    }
}

fn discard_and_write_during_a_copy(offset: u64, len: u64) {
    for by in [By::Background, By::Read, By::Cache] {
        for (lands, fua) in [(false, false), (false, true), (true, false), (true, true)] {
            discard_and_write_during_a_copy_of(by, lands, fua, offset, len);
        }
    }
}

#[test]
fn a_write_after_a_discard_survives_the_copy_in_flight() {
    discard_and_write_during_a_copy(0, REGION);
}

#[test]
fn a_partial_write_after_a_discard_survives_the_copy_in_flight() {
    discard_and_write_during_a_copy(100, 1000);
    discard_and_write_during_a_copy(512, 512);
}

#[test]
fn a_whole_region_write_survives_the_copy_in_flight() {
    let setup = Setup { size: 16 * REGION, hydration: true, ..Setup::default() };
    for seed in seeds(0..40) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let devices = Devices::new(&sim, &setup, content(setup.size));
        devices.source.held.set(true);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            while devices.source.in_flight_bytes() == 0 {
                sim.sleep(Duration::from_micros(100)).await;
            }
            let other = clone.clone();
            let write = start(&clone, async move {
                other.write_flags(5 * REGION, &[9; 4096], RequestFlags::FUA).await.unwrap();
            });
            sim.sleep(Duration::from_millis(3)).await;
            devices.source.held.set(false);
            result(&clone, &write).await;
        });
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert_eq!(sim.block_on(clone.read(5 * REGION, REGION)).unwrap(), [9; 4096]);
        sim.kill_all();
    }
}

/// A copy, or a read that is kept, holds its region until its write has completed, not only while it reads.
#[test]
fn a_write_waits_for_the_write_of_the_copy() {
    for by_read in [false, true] {
        let setup = Setup { size: 16 * REGION, hydration: !by_read, ..Setup::default() };
        for seed in seeds(0..20) {
            let _seed = Seed(seed);
            let sim = Sim::new(seed);
            let devices = Devices::new(&sim, &setup, content(setup.size));
            devices.destination.set_gate(|op| op.is_change());
            let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
            sim.block_on(async {
                if by_read {
                    clone.read(2 * REGION, 2 * REGION).await.unwrap();
                }
                while devices.destination.changes() == 0 {
                    sim.sleep(Duration::from_micros(100)).await;
                }
                let (other, at) = (clone.clone(), 3 * REGION + 512);
                let write = start(&clone, async move {
                    other.write(at, &[7; 1024]).await.unwrap();
                    other.flush().await.unwrap();
                });
                sim.sleep(Duration::from_millis(50)).await;
                assert_eq!(devices.destination.changes(), 1, "nothing overtakes the copy");
                devices.destination.clear_gate();
                result(&clone, &write).await;
            });
            let devices = devices.crash(&sim);
            let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
            let mut expected = content(setup.size)[3 * 4096..4 * 4096].to_vec();
            expected[512..1536].fill(7);
            assert_eq!(sim.block_on(clone.read(3 * REGION, REGION)).unwrap(), expected);
            sim.kill_all();
        }
    }
}

#[test]
fn a_read_that_is_kept_does_not_undo_an_overwrite() {
    let setup = Setup { size: 16 * REGION, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.devices.source.held.set(true);
        let (reader, writer) = (clone.clone(), clone.clone());
        let read = start(&clone, async move { reader.read(2 * REGION, 3 * REGION).await.unwrap() });
        clone.sim.sleep(Duration::from_millis(3)).await;
        assert!(clone.devices.source.in_flight_bytes() > 0);
        let write = start(&clone, async move { writer.write(3 * REGION, &[7; 4096]).await.unwrap() });
        clone.sim.sleep(Duration::from_millis(3)).await;
        clone.devices.source.held.set(false);
        let (before, ()) = (result(&clone, &read).await, result(&clone, &write).await);
        let source = &clone.devices.source.content()[2 * 4096..5 * 4096];
        assert!(before == source || before[4096..8192] == [7; 4096]);
        let after = clone.read(2 * REGION, 3 * REGION).await.unwrap();
        assert_eq!(after[4096..8192], [7; 4096]);
        assert_eq!((&after[..4096], &after[8192..]), (&source[..4096], &source[8192..]));
    });
}

#[test]
fn writes_to_parts_of_one_block_do_not_lose_each_other() {
    let setup = Setup { size: 4 * REGION, block: 4096, shards: 2, regions_per_zone: 1, ..Setup::default() };
    for hydrated in [true, false] {
        scenario(&setup, |clone| async move {
            if hydrated {
                clone.cache(0, 4 * REGION).await.unwrap();
            }
            let writes: Vec<_> = (0..16u64)
                .map(|i| {
                    let other = clone.clone();
                    start(&clone, async move {
                        other.write(5000 + i * 100, &[100 + i as u8; 100]).await.unwrap();
                    })
                })
                .collect();
            for write in writes {
                result(&clone, &write).await;
            }
            let found = clone.read(0, 4 * REGION).await.unwrap();
            let mut expected = clone.devices.source.content().to_vec();
            (0..1600).for_each(|i| expected[5000 + i] = 100 + (i / 100) as u8);
            assert_eq!(found, expected);
        });
    }
}

/// A write of whole blocks goes past the owner of its region, who is at a read-modify-write of one of them.
#[test]
fn a_write_past_the_owner_is_not_undone_by_a_read_modify_write() {
    let setup = Setup { size: 8 * REGION, block: 4096, shards: 3, regions_per_zone: 1, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.cache(0, 8 * REGION).await.unwrap();
        for round in 0..20u8 {
            // Region 1 is that of shard 1. A part of its block by anybody; all of it, and of region 2, by shard 0.
            let (part, whole) = (clone.clone(), clone.clone());
            let part = start(&clone, async move { part.write_via(2, REGION + 100, &[200; 50]).await.unwrap() });
            clone.sim.sleep(Duration::from_micros(u64::from(round) * 7)).await;
            let data = vec![round; 2 * REGION as usize];
            let whole = start(&clone, async move { whole.write_via(0, REGION, &data).await.unwrap() });
            result(&clone, &part).await;
            result(&clone, &whole).await;
            let found = clone.read(REGION, 2 * REGION).await.unwrap();
            let (inside, outside): (Vec<_>, Vec<_>) =
                found.iter().enumerate().partition(|(at, _)| (100..150).contains(at));
            assert!(outside.iter().all(|(_, byte)| **byte == round), "round {round}");
            assert!(inside.iter().all(|(_, byte)| **byte == round || **byte == 200), "round {round}");
        }
    });
}

/// Hydrated bytes are served by whoever is asked, across zones, and in one piece.
#[test]
fn hydrated_bytes_need_no_other_shard() {
    let setup = Setup { size: 8 * REGION, block: 4096, shards: 3, regions_per_zone: 1, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.cache(0, 6 * REGION).await.unwrap();
        clone.net.break_calls(|_, request| matches!(request, ShardRequest::Io { .. }));
        let before = clone.devices.destination.log().len();
        clone.write_via(2, 0, &[7; 6 * REGION as usize]).await.unwrap();
        assert_eq!(clone.devices.destination.log().len(), before + 1);
        let range = ByteRange::new(100, 5 * REGION).unwrap();
        assert_eq!(clone.read_via(1, range).await.unwrap(), [7; 5 * REGION as usize]);
        // What is not hydrated is its owner's, and so are parts of blocks.
        assert!(clone.write_via(2, 5 * REGION, &[7; 2 * REGION as usize]).await.is_err());
        assert!(clone.write_via(2, 0, &[7; 100]).await.is_err());
    });
}

#[test]
fn the_short_tail_is_trimmed_and_overwritten_without_a_copy() {
    for (block, excess) in [(512, 412), (4096, 4096 - 100), (4096, 8192 - 100), (1, 0)] {
        let size = 2 * REGION + 100;
        let setup = Setup { size, block, excess, ..Setup::default() };
        scenario(&setup, |clone| async move {
            clone.trim(2 * REGION, 100).await.unwrap();
            assert_eq!(clone.read(2 * REGION, 100).await.unwrap(), [0; 100]);
            assert_eq!((clone.state.hydrated(), clone.devices.source.reads().len()), (1, 0));
            assert_eq!(clone.stats().discarded_regions, 1);
            let behind = clone.devices.destination.image().split_off(size as usize);
            assert!(behind.iter().all(|b| *b == OLD_DESTINATION));
        });
        scenario(&setup, |clone| async move {
            clone.write(2 * REGION, &[5; 100]).await.unwrap();
            assert_eq!(clone.read(2 * REGION, 100).await.unwrap(), [5; 100]);
            assert_eq!((clone.state.hydrated(), clone.devices.source.reads().len()), (1, 0));
            let behind = clone.devices.destination.image().split_off(size as usize);
            assert!(behind.iter().all(|b| *b == OLD_DESTINATION));
        });
    }
}

#[test]
fn what_was_trimmed_never_shows_the_old_destination() {
    for (can_zero, discard_passdown) in [(true, true), (true, false), (false, true), (false, false)] {
        let setup = Setup { size: 10 * REGION - 7, excess: 7, discard_passdown, ..Setup::default() };
        scenario(&setup, |clone| async move {
            clone.devices.destination.can_zero.set(can_zero);
            clone.trim(100, 10 * REGION - 107).await.unwrap();
            let found = clone.read(0, 10 * REGION - 7).await.unwrap();
            assert_eq!(found[..4096], clone.devices.source.content()[..4096], "a part of a region is left alone");
            assert!(found[4096..].iter().all(|b| *b == 0));
            assert_eq!(clone.devices.source.read_bytes(), REGION, "only what was read");
            // The read's region is kept after its answer.
            clone.sim.sleep(Duration::from_millis(50)).await;
            assert_eq!(clone.state.hydrated(), 10);
        });
    }
}

/// The allocation that Status tells of what was trimmed is asked of the destination.
#[test]
fn write_zeroes_moves_no_data() {
    let setup = Setup { size: 16 * REGION, ..Setup::default() };
    scenario(&setup, |clone| async move {
        clone.write_zeroes(REGION, 8 * REGION, RequestFlags::empty()).await.unwrap();
        assert!(clone.devices.source.reads().is_empty());
        let writes = clone.devices.destination.log();
        assert!(writes.iter().all(|(_, op)| !matches!(op, super::super::disk::Op::Write { .. })), "{writes:?}");
        assert_eq!(clone.read(REGION, 8 * REGION).await.unwrap(), [0; 8 * 4096]);
        // Parts of unhydrated regions can't be fast; whole ones and hydrated ones can.
        let fast = RequestFlags::FAST_ZERO;
        let error = clone.write_zeroes(10 * REGION + 1, REGION, fast).await.unwrap_err();
        assert_eq!(error.kind(), crate::error::ErrorKind::NotSupported);
        clone.write_zeroes(10 * REGION, REGION, fast).await.unwrap();
        clone.write_zeroes(10 * REGION + 512, 512, fast).await.unwrap();
    });
}
