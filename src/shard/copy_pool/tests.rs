use super::*;
use crate::clone_state::{AUTOMATIC, HydrationKnobs};
use crate::event_log::{CloneEvents, EventLog};
use crate::hydration_share::Priority;
use crate::units::{CloneId, Geometry, RegionSize};
use futures_lite::future::{block_on, poll_once};
use std::pin::Pin;

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn state(id: u32, weight: u64) -> Arc<CloneState> {
    let knobs = HydrationKnobs { enabled: true, threshold: AUTOMATIC, batch_size: AUTOMATIC };
    let geometry = Geometry::new(MIB, RegionSize::default(), 16).unwrap();
    let events = CloneEvents::new(&EventLog::new("test", Box::new(|| {})), format!("c{id}"));
    let state = CloneState::new(CloneId(id), events, geometry, 1, true, knobs);
    state.budget().set_priority(Priority::new(weight).unwrap());
    Arc::new(state)
}

fn clones<const N: usize>(pool: &Rc<CopyPool>) -> [CopyShare; N] {
    std::array::from_fn(|id| pool.join(state(id as u32, 100)))
}

/// As much as a clone gets without waiting.
fn take_all(clone: &CopyShare) -> Vec<CopyMemory> {
    std::iter::from_fn(|| clone.try_acquire(MIB)).collect()
}

#[test]
fn one_clone_may_have_all_the_memory() {
    let pool = Rc::new(CopyPool::new(32 * MIB));
    let [only] = clones(&pool);
    let all = take_all(&only);
    assert_eq!((all.len(), pool.used()), (32, 32 * MIB));
    drop(all);
    assert_eq!(pool.used(), 0);
}

#[test]
fn a_clone_that_gives_nothing_back_leaves_half_to_each_of_the_others() {
    let pool = Rc::new(CopyPool::new(32 * MIB));
    let clones: [_; 3] = clones(&pool);
    let held: Vec<_> = clones.iter().map(take_all).collect();
    assert_eq!(held.iter().map(Vec::len).collect::<Vec<_>>(), [16, 8, 4]);
}

#[test]
fn memory_is_bounded_and_nobody_is_left_with_nothing() {
    let pool = Rc::new(CopyPool::new(8 * MIB));
    let clones: [_; 100] = clones(&pool);
    let held: Vec<_> = clones.iter().map(take_all).collect();
    assert!(held.iter().all(|held| !held.is_empty()));
    assert!(pool.used() <= 8 * MIB + 100 * MIB);
    // A wish is never larger than a unit, a pool never smaller.
    assert_eq!(Rc::new(CopyPool::new(0)).io_memory(), MIB);
    drop(held);
    let one = clones[0].try_acquire(u64::MAX).unwrap();
    assert_eq!(pool.used(), MIB);
    drop(one);
    assert_eq!(pool.used(), 0);
}

#[test]
fn a_clone_that_waits_is_served_by_its_own_memory_and_blocks_nobody() {
    block_on(async {
        let pool = Rc::new(CopyPool::new(4 * MIB));
        let [stalled, other] = clones(&pool);
        let mut held = take_all(&stalled);
        let mut waits: Vec<Pin<Box<_>>> = (0..3).map(|_| Box::pin(stalled.acquire(MIB))).collect();
        for wait in &mut waits {
            assert!(poll_once(wait).await.is_none());
        }
        assert!(stalled.try_acquire(1).is_none(), "others of this clone are first");
        let others = take_all(&other);
        assert!(!others.is_empty());
        let mut waits_too = Box::pin(other.acquire(MIB));
        assert!(poll_once(&mut waits_too).await.is_none());
        drop(others);
        assert!(poll_once(&mut waits_too).await.is_some());
        // One waiter gives up; the first in the row gets what comes back.
        drop(waits.remove(0));
        held.pop();
        assert!(poll_once(&mut waits[1]).await.is_none());
        assert!(poll_once(&mut waits[0]).await.is_some());
        held.clear();
        assert!(poll_once(&mut waits[1]).await.is_some());
    });
}

#[test]
fn the_pipeline_is_shared_by_weight_among_those_that_get_on() {
    let pool: Rc<CopyPool> = Rc::default();
    let clones = [pool.join(state(0, 100)), pool.join(state(1, 200)), pool.join(state(2, 400))];
    let limit = |clone: usize, now: Duration| clones[clone].pipeline(now).limit;
    assert_eq!(limit(0, SECOND), 16 * MIB, "the others are idle");
    assert_eq!(clones[0].pipeline(SECOND).batch, MIB);
    let batches: Vec<_> = clones.iter().map(|clone| clone.begin_batch(MIB, SECOND)).collect();
    for (clone, weight) in [1u64, 2, 4].into_iter().enumerate() {
        assert_eq!(limit(clone, SECOND), 16 * MIB * weight / 7);
    }
    assert_eq!(clones[0].pipeline(SECOND).batch, 16 * MIB / 7 / 4);
    assert_eq!((clones[0].copies_in_flight(), clones[0].bytes_in_flight()), (1, MIB));
    // The heaviest stalls: it does not count for the others, but still has its share.
    let [a, b, stalled] = <[_; 3]>::try_from(batches).ok().unwrap();
    a.end(2 * SECOND);
    b.end(2 * SECOND);
    let _more = [clones[0].begin_batch(MIB, 2 * SECOND), clones[1].begin_batch(MIB, 2 * SECOND)];
    assert_eq!(limit(0, 3 * SECOND), 16 * MIB / 3);
    assert_eq!(limit(2, 3 * SECOND), 16 * MIB * 4 / 7);
    stalled.end(3 * SECOND);
    let _again = clones[2].begin_batch(MIB, 3 * SECOND);
    assert_eq!(limit(0, 3 * SECOND), 16 * MIB / 7);
}

#[test]
fn the_pipeline_is_short_while_clients_use_any_clone() {
    let pool: Rc<CopyPool> = Rc::default();
    let used = state(0, 100);
    let (_used, clone) = (pool.join(used.clone()), pool.join(state(1, 100)));
    used.foreground_begins();
    assert_eq!(clone.pipeline(SECOND), Pipeline { limit: 2 * MIB, batch: MIB });
    used.foreground_ends(SECOND);
    assert_eq!(clone.pipeline(SECOND + Duration::from_millis(19)).limit, 2 * MIB);
    assert_eq!(clone.pipeline(SECOND + Duration::from_millis(21)).limit, 16 * MIB);
}
