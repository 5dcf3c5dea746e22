//! Directed scenarios of a daemon that is killed while the power stays: what it left in caches is not durable.

use super::super::clone::{Devices, SimClone, SimKept};
use super::super::disk::Op;
use super::super::executor::Sim;
use super::{Seed, Setup, content, seeds};
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io_frontend::request::RequestFlags;
use std::sync::Arc;
use std::time::Duration;

const REGION: u64 = 4096;

/// The first region is overwritten with FUA, the power fails, and another daemon starts.
fn what_is_written_with_fua_survives(sim: &Sim, setup: &Setup, devices: &Devices, clone: &SimClone) {
    sim.block_on(clone.write_flags(0, &[2; REGION as usize], RequestFlags::FUA)).unwrap();
    let devices = devices.crash(sim);
    let clone = sim.block_on(SimClone::start(sim, setup, &devices)).unwrap();
    let read = sim.block_on(clone.read(0, REGION)).unwrap();
    assert!(read == [2; REGION as usize], "an acknowledged FUA write is lost: {:?}", &read[..2]);
    sim.kill_all();
}

/// Killed between the metadata writes of a commit and their flush. The next one finds the bit, and a client overwrites the
/// region with FUA, which a durable bit makes a single write. Then the power fails: the bit must still be there.
#[test]
fn bits_that_a_killed_daemon_left_in_a_cache_are_durable_once_they_count() {
    for seed in seeds(0..30) {
        let _seed = Seed(seed);
        let (sim, setup) = (Sim::new(seed), Setup::default());
        let devices = Devices::new(&sim, &setup, content(setup.size));
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            clone.write(0, &[1; REGION as usize]).await.unwrap();
            devices.metadata.set_gate(|op| *op == Op::Flush);
            let waiting = clone.clone();
            // It is killed before it returns.
            sim.spawn(async move { _ = waiting.flush().await });
            sim.sleep(Duration::from_millis(100)).await;
        });
        let devices = devices.kill(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert_eq!(clone.state.hydrated(), 1, "the bit is what this is about");
        what_is_written_with_fua_survives(&sim, &setup, &devices, &clone);
    }
}

/// A metadata flush failed, and where there is no direct I/O its pages stay, clean, with bits that are not on the medium.
/// The daemon is killed, and the next one must not take what it reads there for durable.
#[test]
fn bits_that_a_failed_flush_left_in_the_page_cache_do_not_count() {
    let (mut lost, all) = (0, seeds(0..30));
    let tried = all.len();
    for seed in all {
        let _seed = Seed(seed);
        let (sim, setup) = (Sim::new(seed), Setup::default());
        let devices = Devices::new(&sim, &setup, content(setup.size));
        devices.metadata.buffered.set(true);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        sim.block_on(async {
            clone.write(0, &[1; REGION as usize]).await.unwrap();
            devices.metadata.set_fault(|op| (*op == Op::Flush).then_some(libc::EIO));
            assert_eq!(clone.flush().await.unwrap_err().kind(), ErrorKind::Io);
        });
        let devices = devices.kill(&sim);
        assert!(devices.metadata.info().size > 0);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        lost += u64::from(clone.state.hydrated() == 0);
        what_is_written_with_fua_survives(&sim, &setup, &devices, &clone);
    }
    assert!(lost > 0 || tried < 30, "a flush that fails drops what it failed on now and then");
}

/// Who uses a block device knows nothing of a killed daemon: what was acknowledged is there, flushed or not. Afterwards the
/// power fails: what the next daemon took over is durable by then.
#[test]
fn what_was_acknowledged_is_there_after_a_kill_when_bits_are_kept() {
    for seed in seeds(0..30) {
        let _seed = Seed(seed);
        let setup = Setup { shards: 1 + (seed % 3) as u16, regions_per_zone: 4, ..Setup::default() };
        let sim = Sim::new(seed);
        let mut devices = Devices::new(&sim, &setup, content(setup.size));
        devices.kept = Some(Arc::<SimKept>::default());
        let mut expected = content(setup.size);
        for round in 0..3 {
            let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
            for region in [round, 5 + round, 15] {
                // A part of a region, which hydrates all of it; and the first ones once more.
                let (start, data) = (region * REGION + 512, [round as u8 + 1; 1024]);
                sim.block_on(clone.write(start, &data)).unwrap();
                expected[start as usize..start as usize + data.len()].copy_from_slice(&data);
            }
            devices = devices.kill(&sim);
        }
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        assert!(sim.block_on(clone.read(0, setup.size)).unwrap() == expected, "an acknowledged write is lost");
        let devices = devices.crash(&sim);
        let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
        let read = sim.block_on(clone.read(0, setup.size)).unwrap();
        assert!(read == expected, "what was taken over was not durable when it was served");
        sim.kill_all();
    }
}

/// What a failed commit may have lost must not be taken for copied by the next daemon.
#[test]
fn kept_bits_are_spoiled_by_a_commit_that_fails() {
    let (sim, setup) = (Sim::new(1), Setup::default());
    let mut devices = Devices::new(&sim, &setup, content(setup.size));
    let kept = Arc::<SimKept>::default();
    devices.kept = Some(kept.clone());
    let clone = sim.block_on(SimClone::start(&sim, &setup, &devices)).unwrap();
    sim.block_on(clone.write(0, &[1; REGION as usize])).unwrap();
    assert_eq!((kept.count(), kept.is_spoiled()), (1, false));
    devices.destination.set_fault(|op| (*op == Op::Flush).then_some(libc::EIO));
    sim.block_on(clone.flush()).unwrap_err();
    assert!(kept.is_spoiled());
    sim.kill_all();
}
