//! Metadata that rot: what was damaged is refused by name, or does not matter. Never is anything guessed.

use super::super::clone::{Devices, Setup, SimClone};
use super::super::disk::SimDisk;
use super::super::executor::Sim;
use super::super::seeds;
use super::{Seed, content};
use crate::error::ErrorKind;

const REGION: u64 = 4096;
const SECTOR: usize = 512;
const BLOCK: usize = 4096;

/// A clone with some regions overwritten and flushed, then stopped; its devices and what it reads as.
fn stopped(sim: &Sim, setup: &Setup) -> (Devices, Vec<u8>) {
    let mut expected = content(setup.size);
    let devices = Devices::new(sim, setup, expected.clone());
    let clone = sim.block_on(SimClone::start(sim, setup, &devices)).unwrap();
    for _ in 0..8 {
        let region = sim.draw(|rng| rng.below(setup.size / REGION));
        let data = vec![0xf0 + region as u8 % 8; REGION as usize];
        sim.block_on(clone.write(region * REGION, &data)).unwrap();
        expected[(region * REGION) as usize..][..data.len()].copy_from_slice(&data);
    }
    sim.block_on(async {
        clone.flush().await.unwrap();
        clone.stop().await.unwrap();
    });
    (devices.crash(sim), expected)
}

fn with_metadata(sim: &Sim, devices: &Devices, image: Vec<u8>) -> Devices {
    Devices { metadata: SimDisk::new(sim, "metadata", image, SECTOR as u32), ..devices.clone() }
}

fn setup() -> Setup {
    Setup { size: 64 * REGION, regions_per_zone: 8, shards: 2, ..Setup::default() }
}

/// One sector of the bitmap: bits flipped anywhere in it, all of it lost, or another sector of the same device in its place.
#[test]
fn a_rotten_bitmap_sector_is_refused_by_name() {
    for seed in seeds(0..20) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let (devices, _) = stopped(&sim, &setup());
        let image = devices.metadata.image();
        let sectors = (image.len() - 2 * BLOCK) / SECTOR;
        for _ in 0..40 {
            let sector = 2 * BLOCK / SECTOR + sim.draw(|rng| rng.below(sectors as u64)) as usize;
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            let mut rotten = image.clone();
            match sim.draw(|rng| rng.below(4)) {
                0 => rotten[bytes.clone()].fill(0),
                1 => {
                    let other = 2 * BLOCK / SECTOR + sim.draw(|rng| rng.below(sectors as u64)) as usize;
                    rotten.copy_within(other * SECTOR..(other + 1) * SECTOR, bytes.start);
                }
                // Its bits, for they are what matters.
                2 => rotten[bytes.start + 32] ^= 1 << sim.draw(|rng| rng.below(8)),
                _ => rotten[bytes.start + sim.draw(|rng| rng.below(SECTOR as u64)) as usize] ^= 0x10,
            }
            if rotten == image {
                continue;
            }
            let started = sim.block_on(SimClone::start(&sim, &setup(), &with_metadata(&sim, &devices, rotten)));
            let error = started.err().expect("a rotten sector is not believed");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{error:?}");
            assert!(error.to_string().contains(&format!("sector {sector} ")), "sector {sector}: {error}");
        }
    }
}

/// One copy of the superblock may rot: the other one is used, and nothing is lost. When both do, that is the end.
#[test]
fn a_rotten_superblock_is_not_believed() {
    for seed in seeds(0..20) {
        let _seed = Seed(seed);
        let sim = Sim::new(seed);
        let (devices, expected) = stopped(&sim, &setup());
        let image = devices.metadata.image();
        for _ in 0..10 {
            // Behind magic, checksum and version; all fields that are in use, and the zeros behind them.
            let (at, bit, copy) = sim.draw(|rng| (rng.between(16, 511) as usize, rng.below(8), rng.below(2) as usize));
            let mut rotten = image.clone();
            rotten[copy * BLOCK + at] ^= 1 << bit;
            let one = with_metadata(&sim, &devices, rotten.clone());
            let clone = sim.block_on(SimClone::start(&sim, &setup(), &one)).expect("the other copy is used");
            assert_eq!(sim.block_on(clone.read(0, setup().size)).unwrap(), expected);
            sim.kill_all();
            rotten[(1 - copy) * BLOCK + at] ^= 1 << bit;
            let both = with_metadata(&sim, &devices, rotten);
            let error = sim.block_on(SimClone::start(&sim, &setup(), &both)).err().expect("none can be trusted");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{error:?}");
        }
    }
}
