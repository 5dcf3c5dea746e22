//! The scheduler alone: with maps of bools, and against whatever fails, is busy or is hydrated by others.

use super::*;
use proptest::prelude::*;

struct Bits(Vec<bool>);
impl Unhydrated for Bits {
    fn next_unhydrated(&self, from: RegionIndex, max: u64) -> Option<RegionRange> {
        let first = (from.0 as usize..self.0.len()).find(|i| !self.0[*i])?;
        let count = self.0[first..].iter().take(max as usize).take_while(|b| !**b).count();
        RegionRange::between(RegionIndex(first as u64), RegionIndex((first + count) as u64))
    }
    fn is_hydrated(&self, region: RegionIndex) -> bool {
        self.0[region.0 as usize]
    }
}

#[test]
fn one_bad_region_keeps_only_itself_back_and_heals() {
    let mut map = Bits(vec![false; 64]);
    let (mut sched, mut now, bad) = (HydrationSched::default(), Duration::ZERO, RegionIndex(21));
    let mut tries_of_bad = 0;
    while now < Duration::from_secs(200) {
        match sched.next(&map, now, 16, &|_| false) {
            Next::Batch(batch) if batch.contains(bad) && now < Duration::from_secs(100) => {
                tries_of_bad += u32::from(batch.count() == 1);
                sched.failed(batch, now);
            }
            Next::Batch(batch) => {
                batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                sched.succeeded(batch);
            }
            Next::WaitUntil(until) => {
                assert!(until > now);
                assert_eq!(map.0.iter().filter(|b| !**b).count(), 1, "all others are hydrated before waiting");
                assert_eq!(sched.failed_regions(), 1);
                now = until;
            }
            Next::Done => break,
            Next::WaitForBatch => unreachable!("no batch is left in flight"),
        }
    }
    assert!(map.0.iter().all(|b| *b));
    assert_eq!(sched.failed_regions(), 0);
    assert!((5..=12).contains(&tries_of_bad), "{tries_of_bad} tries in 100 s: the delay doubles");
}

#[test]
fn a_clients_region_goes_first_but_not_when_it_failed() {
    let map = Bits(vec![false; 1000]);
    let mut sched = HydrationSched::default();
    let single = RegionRange::single(RegionIndex(500));
    sched.prioritise(RegionIndex(500));
    assert_eq!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::Batch(single));
    assert_eq!(sched.failed(single, Duration::ZERO), Failed { isolating: false });
    sched.prioritise(RegionIndex(500));
    let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 4, &|_| false) else { panic!("a batch") };
    assert!(!batch.contains(RegionIndex(500)), "{batch:?}");
}

/// A client has overwritten a bad region: what was known of it is over.
#[test]
fn what_is_hydrated_by_others_has_not_failed() {
    let mut map = Bits(vec![false; 4]);
    let mut sched = HydrationSched::default();
    for region in [1, 2] {
        sched.batches_in_flight += 1;
        sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
    }
    map.0[1] = true;
    sched.hydrated(between(0, 2));
    assert_eq!(sched.failed_regions(), 1);
    sched.hydrated(between(2, 4));
    assert_eq!(sched.failed_regions(), 0);
}

#[test]
fn what_holds_for_all_pauses() {
    let map = Bits(vec![false; 1000]);
    let mut sched = HydrationSched::default();
    let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 4, &|_| false) else { panic!("a batch") };
    sched.failed_for_all(batch, Duration::ZERO);
    assert_eq!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::WaitUntil(BACKOFF_MIN));
    assert_eq!(sched.failed_regions(), 0);
    assert!(sched.is_paused());
    assert_eq!(sched.paused_until(Duration::ZERO), Some(BACKOFF_MIN));
    assert_eq!(sched.paused_until(BACKOFF_MIN - Duration::from_nanos(1)), Some(BACKOFF_MIN));
    assert_eq!(sched.paused_until(BACKOFF_MIN), None);
    sched.retry_now();
    assert!(!sched.is_paused());
    assert_eq!(sched.paused_until(Duration::ZERO), None);
    assert!(matches!(sched.next(&map, Duration::ZERO, 4, &|_| false), Next::Batch(_)));
}

/// A bad area of any size, wherever it is: all the rest is hydrated after a few failures, before any region is tried
/// a second time; then which regions are bad is found out exactly.
#[test]
fn a_bad_area_keeps_back_nothing_but_itself() {
    for (first, end) in [(0, 300), (100, 101), (40, 900), (700, 1000), (17, 19), (0, 999)] {
        let mut map = Bits(vec![false; 1000]);
        let mut sched = HydrationSched::default();
        let is_bad = |region: RegionIndex| (first..end).contains(&region.0);
        let (mut in_a_row, mut in_a_row_max, mut retries) = (0, 0, 0);
        while map.0.iter().filter(|b| !**b).count() as u64 > end - first {
            let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 16, &|_| false) else { panic!("a batch") };
            if batch.iter().any(is_bad) {
                retries += u32::from(sched.failures.get(&batch.first()).is_some_and(|f| f.attempts > 0));
                let counts = !sched.failed(batch, Duration::ZERO).isolating;
                in_a_row += u32::from(counts);
                in_a_row_max = in_a_row_max.max(in_a_row);
            } else {
                batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                sched.succeeded(batch);
                in_a_row = 0;
            }
        }
        assert_eq!(retries, 0);
        // Those to leap out of it, then those that were leapt over, once each; a leap leaves a short one at each end.
        assert!(u64::from(in_a_row_max) <= (end - first) / 16 + 10, "{first}..{end}: {in_a_row_max} in a row");
        while let Next::Batch(batch) = sched.next(&map, Duration::ZERO, 16, &|_| false) {
            sched.failed(batch, Duration::ZERO);
        }
        assert_eq!(sched.failed_regions(), end - first);
    }
}

fn between(first: u64, end: u64) -> RegionRange {
    RegionRange::between(RegionIndex(first), RegionIndex(end)).unwrap()
}

#[test]
fn waits_for_its_batch_then_looks_again_soon() {
    let map = Bits(vec![false; 8]);
    let mut sched = HydrationSched::default();
    let (now, all) = (Duration::from_secs(7), between(0, 8));
    assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(all));
    assert_eq!(sched.next(&map, now, 16, &|_| true), Next::WaitForBatch);
    // Clients hold all that is left: nobody tells when they let go.
    sched.skipped(all);
    assert_eq!(sched.next(&map, now, 16, &|_| true), Next::WaitUntil(now + Duration::from_millis(50)));
    assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(all));
}

#[test]
fn the_cursor_goes_on_behind_a_batch_that_grew_and_back_to_one_that_was_too_early() {
    let map = Bits(vec![false; 200]);
    let mut sched = HydrationSched::default();
    let next = |sched: &mut HydrationSched| sched.next(&map, Duration::ZERO, 16, &|_| false);
    assert_eq!(next(&mut sched), Next::Batch(between(0, 16)));
    sched.resized(between(0, 64));
    assert_eq!(next(&mut sched), Next::Batch(between(64, 80)));
    sched.skipped(between(64, 80));
    sched.back_to(RegionIndex(64));
    assert_eq!(next(&mut sched), Next::Batch(between(64, 80)));
    sched.back_to(RegionIndex(199));
    assert_eq!(next(&mut sched), Next::Batch(between(80, 96)), "never ahead");
}

/// What clients want is bounded, and no region is in it twice.
#[test]
fn urgent_regions_in_order_once_and_not_too_many() {
    let map = Bits(vec![false; 5000]);
    let mut sched = HydrationSched::default();
    for _ in 0..2 {
        (0..2000).for_each(|region| sched.prioritise(RegionIndex(4000 - region)));
    }
    for region in 0..URGENT_MAX as u64 {
        let single = RegionRange::single(RegionIndex(4000 - region));
        assert_eq!(sched.next(&map, Duration::ZERO, 16, &|_| false), Next::Batch(single));
    }
    assert_eq!(sched.next(&map, Duration::ZERO, 16, &|_| false), Next::Batch(between(0, 16)));
}

/// Of those that are due and held by clients so many are looked at in one go, not one more.
#[test]
fn a_region_that_is_due_is_found_behind_those_that_clients_hold() {
    let map = Bits(vec![false; 40]);
    for held in [BUSY_DUE_MAX as u64 - 1, BUSY_DUE_MAX as u64] {
        let mut sched = HydrationSched::default();
        sched.batches_in_flight += 1;
        sched.failed(between(0, 40), Duration::ZERO);
        let next = sched.next(&map, Duration::ZERO, 16, &|regions| regions.first().0 < held);
        let single = Next::Batch(RegionRange::single(RegionIndex(held)));
        match held < BUSY_DUE_MAX as u64 {
            true => assert_eq!(next, single),
            false => assert_eq!(next, Next::WaitUntil(BACKOFF_MIN / 10)),
        }
    }
}

/// Which regions of a batch are bad is found out before the cursor goes on.
#[test]
fn the_regions_of_a_failed_batch_are_tried_in_a_row() {
    let map = Bits(vec![false; 100]);
    let mut sched = HydrationSched::default();
    let now = Duration::ZERO;
    assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(between(0, 16)));
    sched.failed(between(0, 16), now);
    for region in 0..16 {
        let single = RegionRange::single(RegionIndex(region));
        assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(single));
        assert_eq!(sched.failed(single, now), Failed { isolating: true });
    }
    assert_eq!(sched.next(&map, now, 16, &|_| false), Next::Batch(between(16, 32)));
    // Each of them is due again, but every other time.
    sched.failed(between(16, 32), now);
    let later = Duration::from_secs(1);
    assert_eq!(sched.failed_regions(), 16);
    assert!(matches!(sched.next(&map, later, 16, &|_| false), Next::Batch(batch) if batch.first().0 >= 32));
}

/// However long others have been due.
#[test]
fn each_region_is_tried_alone_before_any_is_tried_again() {
    let map = Bits(vec![false; 80]);
    let mut sched = HydrationSched::default();
    for region in 0..64 {
        sched.batches_in_flight += 1;
        sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
    }
    let now = Duration::from_secs(100);
    sched.batches_in_flight += 1;
    sched.failed(RegionRange::between(RegionIndex(64), RegionIndex(80)).unwrap(), now);
    let mut tried = Vec::new();
    for _ in 0..32 {
        let Next::Batch(batch) = sched.next(&map, now, 16, &|_| false) else { panic!("a batch") };
        tried.push(batch.first().0);
        // One was held by a client, and keeps its place.
        match tried.len() {
            3 => sched.skipped(batch),
            _ => _ = sched.failed(batch, now),
        }
        if tried.len() == 8 {
            sched.retry_now();
        }
    }
    assert_eq!(tried[..17], [64, 65, 66, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79], "{tried:?}");
    assert!(tried[17..].iter().all(|region| *region < 71));
}

/// However many bad regions are due, what was never tried is handed out every other time at least.
#[test]
fn retries_do_not_keep_back_what_was_never_tried() {
    let mut map = Bits(vec![false; 1000]);
    let mut sched = HydrationSched::default();
    for region in 0..200 {
        sched.batches_in_flight += 1;
        sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
    }
    sched.fresh_works();
    let now = Duration::from_secs(3);
    let (mut fresh, mut retries) = (0, 0);
    while fresh < 50 {
        let Next::Batch(batch) = sched.next(&map, now, 16, &|_| false) else { panic!("a batch") };
        if batch.first().0 < 200 {
            retries += 1;
            sched.failed(batch, now);
        } else {
            fresh += 1;
            batch.iter().for_each(|r| map.0[r.0 as usize] = true);
            sched.succeeded(batch);
        }
    }
    assert!((45..=51).contains(&retries), "{retries}");
}

/// Thousands that failed and were overwritten by clients meanwhile: forgotten one by one, not one call deeper each.
#[test]
fn any_number_of_failures_heals() {
    let mut map = Bits(vec![false; 100_000]);
    let mut sched = HydrationSched::default();
    for region in 0..100_000 {
        sched.batches_in_flight += 1;
        sched.failed(RegionRange::single(RegionIndex(region)), Duration::ZERO);
    }
    assert_eq!(sched.failed_regions(), 100_000);
    map.0[..99_999].fill(true);
    sched.retry_now();
    let last = Next::Batch(RegionRange::single(RegionIndex(99_999)));
    assert_eq!(sched.next(&map, Duration::from_secs(100), 1, &|_| false), last);
    assert_eq!(sched.failed_regions(), 1);
    map.0[99_999] = true;
    assert_eq!(sched.next(&map, Duration::from_secs(100), 1, &|_| false), Next::Done);
    assert_eq!(sched.failed_regions(), 0);
}

proptest! {
    /// Whatever fails, is busy or is hydrated by clients meanwhile: batches hold only unhydrated, free,
    /// adjacent regions that are not in another batch, and in the end everything is hydrated.
    #[test]
    fn hands_out_what_is_left_and_ends(
        start in prop::collection::vec(any::<bool>(), 1..200),
        batch_max in 1u64..20,
        events in prop::collection::vec((0u8..8, any::<prop::sample::Index>()), 0..300),
    ) {
        let mut map = Bits(start);
        let mut sched = HydrationSched::default();
        let mut now = Duration::ZERO;
        let mut in_flight: Vec<RegionRange> = Vec::new();
        let mut events = events.into_iter();
        for step in 0.. {
            prop_assert!(step < 20_000, "no progress");
            let event = events.next();
            let calm = event.is_none();
            if let Some((what, pick)) = event {
                let region = pick.index(map.0.len());
                match what {
                    0 => map.0[region] = true,
                    1 => sched.prioritise(RegionIndex(region as u64)),
                    2 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.failed(b, now); }
                    3 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.failed_for_all(b, now); }
                    4 if !in_flight.is_empty() => { let b = in_flight.remove(pick.index(in_flight.len())); sched.skipped(b); }
                    5 => now += Duration::from_millis(pick.index(3000) as u64),
                    _ => {}
                }
            }
            let held = in_flight.clone();
            match sched.next(&map, now, batch_max, &|r| r.iter().any(|r| held.iter().any(|b| b.contains(r)))) {
                Next::Batch(batch) => {
                    prop_assert!(batch.count() <= batch_max);
                    prop_assert!(batch.iter().all(|r| !map.0[r.0 as usize] && !held.iter().any(|b| b.contains(r))));
                    in_flight.push(batch);
                }
                Next::WaitUntil(until) if calm && in_flight.is_empty() => { prop_assert!(until > now); now = until; }
                Next::WaitUntil(_) => {}
                Next::WaitForBatch => prop_assert!(!in_flight.is_empty()),
                Next::Done => { prop_assert!(map.0.iter().all(|b| *b)); if calm { break; } }
            }
            if calm && !in_flight.is_empty() {
                let batch = in_flight.remove(0);
                batch.iter().for_each(|r| map.0[r.0 as usize] = true);
                sched.succeeded(batch);
            }
        }
    }
}
