use super::super::codec::{DESTINATION_NONE_YET, SourceFingerprint, geometry_for};
use super::super::hydrated_bits::HydratedBits;
use super::super::region_map::RegionMap;
use super::super::runs::ZoneFiller;
use super::sim::{Logged, Plan, Rng, SimDisk};
use super::*;
use crate::units::{Geometry, RegionIndex, RegionRange, RegionSize, ShardIndex};
use futures_lite::future::block_on;

/// 300 zones of 5 regions, the last zone short: bitmap I/O in two parts.
fn small_geometry() -> Geometry {
    Geometry::new(1497 * 4096 - 100, RegionSize::new(4096).unwrap(), 5).unwrap()
}

fn superblock(uuid: u8, geometry: Geometry) -> Superblock {
    Superblock {
        uuid: [uuid; 16],
        geometry,
        source: SourceFingerprint { size: geometry.size(), samples: 1, digest: [3; 16] },
        destination_id: [4; 16],
        state: CloneState::Active,
        generation: Generation(1),
        created_unix_s: 5,
    }
}

fn blank(geometry: &Geometry) -> Vec<u8> {
    vec![0; metadata_size_needed(geometry) as usize]
}

fn disk(image: Vec<u8>) -> Rc<SimDisk> {
    Rc::new(SimDisk::new(image, Plan::default(), 1))
}

fn open(image: Vec<u8>) -> Result<Option<Opened>> {
    block_on(Store::open(disk(image)))
}

fn open_error(image: Vec<u8>) -> (ErrorKind, String) {
    let error = open(image).map(|o| o.map(|o| o.generation)).unwrap_err();
    (error.kind(), error.to_string())
}

fn slow_disk(image: Vec<u8>) -> Rc<SimDisk> {
    Rc::new(SimDisk::new(image, Plan { turns: Some(3), ..Plan::default() }, 1))
}

/// A durable image of a clone with `commits` commits, and its bits.
fn clone_image(uuid: u8, commits: u64) -> (Vec<u8>, Vec<u64>) {
    clone_image_of(small_geometry(), uuid, commits)
}

fn clone_image_of(geometry: Geometry, uuid: u8, commits: u64) -> (Vec<u8>, Vec<u64>) {
    let medium = disk(blank(&geometry));
    let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0));
    block_on(async {
        let store = Store::format(medium.clone(), superblock(uuid, geometry)).await.unwrap();
        for generation in 2..2 + commits {
            set_some(&mut map, &mut Rng::new(generation), 50);
            store.write_zones(&map.take_dirty(), Generation(generation)).await.unwrap();
            store.flush().await.unwrap();
        }
    });
    let regions = (0..geometry.nr_regions()).filter(|r| map.is_hydrated(RegionIndex(*r))).collect();
    (medium.crash(), regions)
}

fn set_some(map: &mut RegionMap, rng: &mut Rng, count: u64) {
    for _ in 0..count {
        map.set(RegionRange::single(RegionIndex(rng.below(map.geometry().nr_regions()))));
    }
}

/// The hydrated regions that were loaded.
fn hydrated(opened: &Opened) -> Vec<u64> {
    let geometry = opened.store.superblock().geometry;
    let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0));
    opened.zones.iter().for_each(|(zone, bits)| map.load_zone(*zone, bits));
    (0..geometry.nr_regions()).filter(|r| map.is_hydrated(RegionIndex(*r))).collect()
}

fn is_subset(small: &[u64], large: &[u64]) -> bool {
    small.iter().all(|r| large.binary_search(r).is_ok())
}

/// Formats over `image` and stops at every operation, several times with other survivors; after each crash the disk
/// must be never formatted, the old clone untouched, or the new clone empty. Returns the first violation.
fn explore_format(image: &[u8], old: Option<(u8, &[u64])>, lying_flushes: u64) -> Option<String> {
    explore_create(image, old, (9, &[]), lying_flushes)
}

/// As [`explore_format`], for metadata that are made with bits, as the uuid and the regions of `new` say.
fn explore_create(image: &[u8], old: Option<(u8, &[u64])>, new: (u8, &[u64]), lying_flushes: u64) -> Option<String> {
    for stop_at in 0.. {
        let mut finished = false;
        for seed in 0..24 {
            let plan = Plan { stop_at: Some(stop_at), lying_flushes, ..Plan::default() };
            let medium = Rc::new(SimDisk::new(image.to_vec(), plan, seed));
            let mut filler = ZoneFiller::new(small_geometry(), new.1.iter().map(|region| (*region, *region)));
            let created = Store::create(medium.clone(), superblock(new.0, small_geometry()), |zone, words| {
                filler.fill(zone, words);
                Ok(())
            });
            finished = block_on(created).is_ok();
            let at = format!("stopped at {stop_at}, seed {seed}");
            let found = match open(medium.crash()) {
                Err(error) => return Some(format!("{at}: {error}")),
                Ok(None) if finished => return Some(format!("{at}: lost after it was done")),
                Ok(None) => continue,
                Ok(Some(opened)) => (opened.store.superblock().uuid[0], hydrated(&opened)),
            };
            let is_new = found == (new.0, new.1.to_vec());
            let is_old = !finished && old.is_some_and(|(uuid, bits)| found == (uuid, bits.to_vec()));
            if !is_new && !is_old {
                return Some(format!("{at}: clone {} with {} bits", found.0, found.1.len()));
            }
        }
        if finished {
            assert!(stop_at > 6, "the exploration saw {stop_at} operations only");
            return None;
        }
    }
    unreachable!()
}

#[test]
fn a_crash_while_formatting_never_leaves_half_a_clone() {
    assert_eq!(explore_format(&blank(&small_geometry()), None, 0), None);
    let (image, bits) = clone_image(1, 3);
    assert!(!bits.is_empty());
    assert_eq!(explore_format(&image, Some((1, &bits)), 0), None);
}

/// As import and restore make them; a restored clone may have the uuid that was there before.
#[test]
fn a_crash_while_metadata_are_made_with_bits_never_leaves_half_of_them() {
    let (image, bits) = clone_image(1, 3);
    let new: Vec<u64> = (0..1497).filter(|region| region % 7 < 3).collect();
    assert_eq!(explore_create(&image, Some((1, &bits)), (9, &new), 0), None);
    assert_eq!(explore_create(&image, Some((1, &bits)), (1, &new), 0), None);
    assert!(explore_create(&image, Some((1, &bits)), (1, &new), 0b0001).is_some(), "the first flush is needed");
}

#[test]
fn metadata_whose_bits_can_not_be_had_are_not_made() {
    let (image, _) = clone_image(1, 3);
    let medium = disk(image);
    let created = Store::create(medium.clone(), superblock(9, small_geometry()), |zone, _| match zone.0 {
        299 => Err(Error::new(ErrorKind::Damaged, "zone 299")),
        _ => Ok(()),
    });
    assert_eq!(block_on(created).err().unwrap().to_string(), "zone 299");
    assert!(open(medium.crash()).unwrap().is_none());
}

/// What was not known when they were made is recorded at the first use; a crash leaves it unknown, or known.
#[test]
fn a_crash_while_devices_are_recorded_leaves_the_clone() {
    let geometry = small_geometry();
    let open_ended = Superblock {
        source: SourceFingerprint::UNKNOWN,
        destination_id: DESTINATION_NONE_YET,
        ..superblock(9, geometry)
    };
    let medium = disk(blank(&geometry));
    drop(block_on(Store::format(medium.clone(), open_ended.clone())).unwrap());
    let image = medium.crash();
    let recorded = Superblock { generation: Generation(2), ..superblock(9, geometry) };
    let mut seen = [0, 0];
    for stop_at in 0.. {
        let mut finished = false;
        for seed in 0..12 {
            let medium = Rc::new(SimDisk::new(image.clone(), Plan { stop_at: Some(stop_at), ..Plan::default() }, seed));
            let run = async {
                let opened = Store::open(medium.clone()).await?.expect("formatted");
                opened.store.record_devices(recorded.source, recorded.destination_id, Generation(2)).await
            };
            finished = block_on(run).is_ok();
            let found = open(medium.crash()).unwrap().expect("it is there").store.superblock();
            assert!(found == recorded || (!finished && found == open_ended), "{stop_at} {seed}: {found:?}");
            seen[usize::from(found == recorded)] += 1;
        }
        if finished {
            break;
        }
    }
    assert!(seen[0] > 10 && seen[1] > 10, "{seen:?}");
}

/// The exploration bites: without the flush after the invalidation, after the bitmap, or both of the copies' flushes
/// it finds a violation. (One of the two copies' flushes alone is for media that break a sector in flight.)
#[test]
fn every_flush_of_a_format_is_needed() {
    let (image, bits) = clone_image(1, 3);
    for lying in [0b0001, 0b0010, 0b1100] {
        let violation = explore_format(&image, Some((1, &bits)), lying);
        assert!(violation.is_some(), "flushes {lying:#b} were missing and nobody noticed");
        println!("{lying:#06b}: {}", violation.unwrap());
    }
}

/// Commits and completes on a disk that stops at every operation. What was acknowledged must be there after a crash,
/// and nothing that was not handed over.
fn explore_commits(lying_flushes: u64) -> Option<String> {
    let geometry = Geometry::new(250 * 4096, RegionSize::new(4096).unwrap(), 5).unwrap();
    let (image, start) = clone_image_of(geometry, 1, 1);
    for stop_at in 0.. {
        let mut finished = false;
        for seed in 0..12 {
            let plan = Plan { stop_at: Some(stop_at), lying_flushes, ..Plan::default() };
            let medium = Rc::new(SimDisk::new(image.clone(), plan, seed));
            let (mut acknowledged, mut allowed) = (start.clone(), start.clone());
            let run = async {
                let opened = Store::open(medium.clone()).await?.expect("formatted");
                let store = opened.store;
                let mut map = RegionMap::new(geometry, HydratedBits::new(geometry), 1, ShardIndex(0));
                opened.zones.iter().for_each(|(zone, bits)| map.load_zone(*zone, bits));
                let mut rng = Rng::new(77);
                for generation in opened.generation.0 + 1..opened.generation.0 + 5 {
                    set_some(&mut map, &mut rng, generation * 5);
                    if generation == opened.generation.0 + 4 {
                        while let Some(run) = map.next_unhydrated(RegionIndex(0), u64::MAX) {
                            map.set(run);
                        }
                    }
                    let snapshots = map.take_dirty();
                    allowed = (0..geometry.nr_regions()).filter(|r| map.is_hydrated(RegionIndex(*r))).collect();
                    // The live map goes on; the commit must not carry these.
                    map.set(RegionRange::single(
                        map.next_unhydrated(RegionIndex(0), 1).map_or(RegionIndex(0), |r| r.first()),
                    ));
                    store.write_zones(&snapshots, Generation(generation)).await?;
                    store.flush().await?;
                    acknowledged = allowed.clone();
                }
                store.write_superblock(CloneState::Complete, opened.generation).await
            };
            finished = block_on(run).is_ok();
            let at = format!("stopped at {stop_at}, seed {seed}");
            let opened = match open(medium.crash()) {
                Ok(Some(opened)) => opened,
                Ok(None) => return Some(format!("{at}: gone")),
                Err(error) => return Some(format!("{at}: {error}")),
            };
            let found = hydrated(&opened);
            if !is_subset(&acknowledged, &found) {
                return Some(format!("{at}: acknowledged bits are lost"));
            }
            if !is_subset(&found, &allowed) {
                return Some(format!("{at}: bits that nobody handed over"));
            }
            if finished && opened.store.superblock().state != CloneState::Complete {
                return Some(format!("{at}: not complete"));
            }
        }
        if finished {
            assert!(stop_at > 30, "the exploration saw {stop_at} operations only");
            return None;
        }
    }
    unreachable!()
}

#[test]
fn a_crash_while_committing_loses_nothing_acknowledged() {
    assert_eq!(explore_commits(0), None);
}

/// The process is killed between the writes of a commit and its flush, another one opens what is in the cache, and then
/// power fails: a flush that the second one answered for regions it found hydrated must hold.
#[test]
fn bits_that_a_killed_process_left_in_a_cache_are_durable_once_opened() {
    for seed in 0..50 {
        let medium = Rc::new(SimDisk::new(clone_image(1, 2).0, Plan::default(), seed));
        let mut map = RegionMap::new(small_geometry(), HydratedBits::new(small_geometry()), 1, ShardIndex(0));
        let loaded = block_on(async {
            let killed = Store::open(medium.clone()).await.unwrap().unwrap();
            killed.zones.iter().for_each(|(zone, bits)| map.load_zone(*zone, bits));
            set_some(&mut map, &mut Rng::new(seed), 50);
            killed.store.write_zones(&map.take_dirty(), Generation(9)).await.unwrap();
            drop(killed);
            hydrated(&Store::open(medium.clone()).await.unwrap().unwrap())
        });
        let after = hydrated(&open(medium.crash()).unwrap().unwrap());
        assert_eq!(after, loaded, "seed {seed}");
    }
    // Where that can't be had, nothing is opened.
    let failing = SimDisk::new(clone_image(1, 2).0, Plan { fail_at: Some(0), ..Plan::default() }, 1);
    assert_eq!(block_on(Store::open(Rc::new(failing))).err().unwrap().kind(), ErrorKind::Io);
}

#[test]
fn every_flush_of_a_commit_is_needed() {
    // Flush 0 is that of opening; nobody was killed before.
    for flush in 1..5 {
        let violation = explore_commits(1 << flush);
        assert!(violation.is_some(), "flush {flush} was missing and nobody noticed");
    }
}

/// A superblock can say complete only when the bits were flushed: the store does it when the caller did not.
#[test]
fn completion_flushes_the_bits_first() {
    let geometry = small_geometry();
    let medium = disk(blank(&geometry));
    block_on(async {
        let store = Store::format(medium.clone(), superblock(1, geometry)).await.unwrap();
        let zone = ZoneSnapshot { zone: ZoneIndex(0), bits: [1].into() };
        let before = medium.log().len();
        store.write_zones(&[zone], Generation(2)).await.unwrap();
        store.write_superblock(CloneState::Complete, Generation(2)).await.unwrap();
        let copy = |n: u64| Logged::Write { offset: n * 4096, len: 4096 };
        let bits = Logged::Write { offset: 2 * 4096, len: 4096 };
        assert_eq!(medium.log()[before..], [bits, Logged::Flush, copy(0), Logged::Flush, copy(1), Logged::Flush]);
    });
    // It was not complete, and that is found out.
    assert_eq!(
        open_error(medium.crash()),
        (
            ErrorKind::Damaged,
            "damaged: marked complete, but 1 of 1497 regions are hydrated; look with `hydrant meta check`".into()
        )
    );
}

#[test]
fn writes_are_sorted_merged_and_bounded() {
    let geometry = Geometry::new(20_000 * 4096, RegionSize::new(4096).unwrap(), 2).unwrap();
    let medium = slow_disk(blank(&geometry));
    block_on(async {
        let store = Store::format(medium.clone(), superblock(1, geometry)).await.unwrap();
        assert_eq!(medium.in_flight_max(), IO_IN_FLIGHT_MAX);
        let before = medium.log().len();
        let zones = (1000..1300).rev().chain([7, 5, 6, 9999]);
        let snapshots: Vec<_> = zones.map(|z| ZoneSnapshot { zone: ZoneIndex(z), bits: [1].into() }).collect();
        store.write_zones(&snapshots, Generation(2)).await.unwrap();
        let write = |zone: u64, count: u64| Logged::Write { offset: (2 + zone) * 4096, len: count * 4096 };
        assert_eq!(medium.log()[before..], [write(5, 3), write(1000, 256), write(1256, 44), write(9999, 1)]);
    });
}

#[test]
fn a_failure_is_latched_and_nothing_is_retried() {
    let (image, _) = clone_image(1, 0);
    let zone = |n| ZoneSnapshot { zone: ZoneIndex(n), bits: [1].into() };
    // After the flush of opening: a write, then a flush, then a superblock copy fails.
    for fail_at in 1..4 {
        let medium = Rc::new(SimDisk::new(image.clone(), Plan { fail_at: Some(fail_at), ..Plan::default() }, 1));
        block_on(async {
            let store = Store::open(medium.clone()).await.unwrap().unwrap().store;
            let mut errors = Vec::new();
            errors.extend(store.write_zones(&[zone(1)], Generation(2)).await.err());
            errors.extend(store.flush().await.err());
            errors.extend(store.write_superblock(CloneState::Active, Generation(3)).await.err());
            assert_eq!(errors.len(), 4 - fail_at);
            assert_eq!(medium.log().len(), fail_at + 1, "nothing reached the disk after the failure");
            errors.extend(store.flush().await.err());
            errors.extend(store.failure());
            for error in errors {
                assert_eq!(error.to_string(), format!("operation {fail_at}: Input/output error"));
            }
        });
    }
}

#[test]
fn an_abandoned_write_counts_as_failed() {
    let (image, _) = clone_image(1, 0);
    let medium = slow_disk(image);
    block_on(async {
        let store = Store::open(medium.clone()).await.unwrap().unwrap().store;
        let zones: Vec<_> =
            (0..200).map(|n| ZoneSnapshot { zone: ZoneIndex(n), bits: [1].into() }).step_by(2).collect();
        {
            let mut write = Box::pin(store.write_zones(&zones, Generation(2)));
            assert!(futures_lite::future::poll_once(&mut write).await.is_none());
        }
        let error = store.flush().await.unwrap_err();
        assert_eq!(error.to_string(), "a metadata write was abandoned before its end");
        let writes = medium.log().iter().filter(|entry| matches!(entry, Logged::Write { .. })).count();
        assert_eq!(writes, IO_IN_FLIGHT_MAX);
    });
}

#[test]
fn damage_is_named() {
    let (image, _) = clone_image(1, 2);
    let mut broken = image.clone();
    broken[(2 + 7) * 4096 + 100] ^= 1;
    broken[(2 + 280) * 4096 + 600] ^= 1;
    let (kind, text) = open_error(broken);
    assert_eq!(kind, ErrorKind::Damaged);
    assert!(text.starts_with("damaged: sector 72 (byte offset 36864): checksum is 0x"), "{text}");
    assert!(text.ends_with("; it covers regions 35 to 39; see all with `hydrant meta check`"), "{text}");
    let mut lost = image;
    lost[9 * 4096..10 * 4096].fill(0);
    assert!(open_error(lost).1.contains("sector 72 (byte offset 36864): all zero, what was written is lost"));
}

#[test]
fn one_lost_superblock_copy_is_survived() {
    let (image, bits) = clone_image(1, 2);
    for copy in 0..2u64 {
        let plan = Plan { bad_block: Some(copy), ..Plan::default() };
        let opened = block_on(Store::open(Rc::new(SimDisk::new(image.clone(), plan, 1)))).unwrap().unwrap();
        assert_eq!(hydrated(&opened), bits);
        assert_eq!(opened.generation, Generation(3));
        assert!(opened.notes[0].contains("unreadable"), "{:?}", opened.notes);
        let mut broken = image.clone();
        broken[copy as usize * 4096 + 4000] = 1;
        let opened = open(broken).unwrap().unwrap();
        assert_eq!((hydrated(&opened), opened.notes.len()), (bits.clone(), 1));
    }
    let plan = Plan { bad_block: Some(100), ..Plan::default() };
    let error = block_on(Store::open(Rc::new(SimDisk::new(image, plan, 1)))).err().unwrap();
    assert_eq!(error.to_string(), "zones 0 to 255: 1048576 bytes at offset 8192: Input/output error");
}

#[test]
fn other_content_and_sizes() {
    assert!(open(vec![]).unwrap().is_none());
    assert!(open(vec![0; 100]).unwrap().is_none());
    assert!(open(vec![0; 1 << 20]).unwrap().is_none());
    assert_eq!(open_error(vec![b'x'; 100]).0, ErrorKind::ForeignData);
    let mut ext4 = vec![0; 1 << 20];
    ext4[1080..1082].copy_from_slice(b"\x53\xef");
    assert_eq!(open_error(ext4).1, "holds an ext2 file system, no metadata of hydrant");
    let mut btrfs = vec![0; 1 << 20];
    btrfs[65600..65608].copy_from_slice(b"_BHRfS_M");
    assert_eq!(open_error(btrfs).1, "holds a btrfs file system, no metadata of hydrant");
    let (mut image, _) = clone_image(1, 0);
    image.truncate(image.len() - 4096);
    assert_eq!(
        open_error(image),
        (ErrorKind::TooSmall, "1204KiB is too small, 1208KiB (1236992 bytes) are needed".into())
    );
    let geometry = geometry_for(1 << 40, RegionSize::default()).unwrap();
    let medium = disk(vec![0; 8192]);
    let error = block_on(Store::format(medium.clone(), superblock(1, geometry))).err().unwrap();
    assert_eq!((error.kind(), medium.log().len()), (ErrorKind::TooSmall, 0));
}

/// A small sparse disk can't be made to allocate what a crafted superblock says.
#[test]
fn a_hostile_size_is_refused_before_anything_is_allocated() {
    let huge = Geometry::new(1 << 50, RegionSize::new(4096).unwrap(), 30720).unwrap();
    let mut image = vec![0; 1 << 20];
    image[..4096].copy_from_slice(&superblock(1, huge).encode());
    assert_eq!(open_error(image).0, ErrorKind::TooSmall);
}

/// Grows on a disk that stops at every operation: it must open with the old or the new size, all bits kept, none new.
fn explore_growth(lying_flushes: u64) -> Option<String> {
    let geometry = small_geometry();
    let (image, bits) = clone_image(1, 2);
    let grown_geometry = geometry.with_size(geometry.size() + 700 * 4096).unwrap();
    for stop_at in 0.. {
        let mut finished = false;
        for seed in 0..24 {
            // What lies behind the old blocks is anything: an older clone's, say.
            let mut image = image.clone();
            image.resize(metadata_size_needed(&grown_geometry) as usize, 0x5a);
            let plan = Plan { stop_at: Some(stop_at), lying_flushes, ..Plan::default() };
            let medium = Rc::new(SimDisk::new(image, plan, seed));
            let run = async {
                let opened = Store::open(medium.clone()).await?.expect("formatted");
                let generation = Generation(opened.generation.0 + 1);
                let superblock = Superblock { geometry: grown_geometry, generation, ..opened.store.superblock() };
                let grown = opened.store.grow(medium.clone(), superblock).await?;
                assert!(opened.store.flush().await.is_err(), "the old store is done");
                grown.flush().await
            };
            finished = block_on(run).is_ok();
            let at = format!("stopped at {stop_at}, seed {seed}");
            let opened = match open(medium.crash()) {
                Ok(Some(opened)) => opened,
                Ok(None) => return Some(format!("{at}: gone")),
                Err(error) => return Some(format!("{at}: {error}")),
            };
            let size = opened.store.superblock().geometry.size();
            if size != grown_geometry.size() && (finished || size != geometry.size()) {
                return Some(format!("{at}: {size} bytes"));
            }
            if hydrated(&opened) != bits {
                return Some(format!("{at}: other bits"));
            }
        }
        if finished {
            assert!(stop_at > 4, "the exploration saw {stop_at} operations only");
            return None;
        }
    }
    unreachable!()
}

#[test]
fn a_crash_while_growing_leaves_the_old_or_the_new_clone() {
    assert_eq!(explore_growth(0), None);
    // Without the flush between the new zones and the superblock; the first one is that of opening.
    println!("{}", explore_growth(0b10).expect("a missing flush is noticed"));
}

/// A crash came between the copies, and then copy A is damaged: the clone must not have its old size again.
#[test]
fn a_stale_copy_is_mended() {
    let geometry = small_geometry();
    let (mut image, _) = clone_image(1, 1);
    let old_copy = image[4096..8192].to_vec();
    let grown = geometry.with_size(geometry.size() + 1).unwrap();
    image.resize(metadata_size_needed(&grown) as usize, 0);
    let medium = disk(image);
    block_on(async {
        let opened = Store::open(medium.clone()).await.unwrap().unwrap();
        assert!(!opened.copy_stale);
        let superblock = Superblock { geometry: grown, generation: Generation(50), ..opened.store.superblock() };
        opened.store.grow(medium.clone(), superblock).await.unwrap();
    });
    let mut image = medium.crash();
    image[4096..8192].copy_from_slice(&old_copy);
    let medium = disk(image);
    block_on(async {
        let opened = Store::open(medium.clone()).await.unwrap().unwrap();
        assert!(opened.copy_stale);
        opened.store.mend().await.unwrap();
    });
    let mut image = medium.crash();
    image[100] ^= 1;
    assert_eq!(open(image).unwrap().unwrap().store.superblock().geometry, grown);
}
