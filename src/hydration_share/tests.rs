//! The share as its askers see it: a small world of clones that copy as fast as they are let.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;
const SLOW: u64 = 64 << 10;

fn rate(bytes_per_second: u64) -> HydrationRate {
    HydrationRate::new(bytes_per_second).unwrap()
}
fn weight(weight: u64) -> Priority {
    Priority::new(weight).unwrap()
}

#[test]
fn what_a_rate_allows_in_a_time() {
    assert_eq!(rate(MIB).in_time(Duration::from_millis(250)), MIB / 4);
    assert_eq!(rate(3 * MIB).in_time(SECOND), 3 * MIB);
    assert_eq!(rate(RATE_MAX).in_time(Duration::from_secs(1 << 24)), u64::MAX);
}

#[test]
fn the_total_rate_is_what_was_set() {
    let mut share = HydrationShare::default();
    assert_eq!(share.total_rate(), None);
    share.set_total_rate(Some(rate(MIB)), SECOND);
    assert_eq!(share.total_rate(), Some(rate(MIB)));
    share.set_total_rate(None, SECOND);
    assert_eq!(share.total_rate(), None);
}

/// The time that a bucket names is the first at which it is open: to the nanosecond, from any level.
#[test]
fn a_bucket_opens_when_it_says() {
    let at = |nanos: u64| Duration::from_secs(100) + Duration::from_nanos(nanos);
    let nanos_per_byte = 1000;
    let new = || Bucket::new(rate(1_000_000), at(0));
    let level_after = |bytes: i128| Bucket { level: bytes * NANOS, ..new() };
    for (bucket, opens) in [
        // Empty is not open: it would be a grant for whoever makes one anew all the time.
        (new(), at(1)),
        (level_after(5), at(0)),
        (level_after(-5), at(5 * nanos_per_byte + 1)),
        (Bucket { starved_at: at(7), ..level_after(-5) }, at(7)),
        (Bucket { starved_at: at(7_000_000), ..level_after(-5) }, at(5 * nanos_per_byte + 1)),
    ] {
        assert_eq!(bucket.opens_at(0), opens, "{bucket:?}");
        let is_open = |now: Duration| {
            let mut bucket = bucket;
            bucket.refill(now);
            bucket.is_open(now)
        };
        assert!(is_open(opens) && is_open(opens + SECOND), "{bucket:?}");
        assert!(opens == at(0) || !is_open(opens - Duration::from_nanos(1)), "{bucket:?}");
    }
    // Others are before it: what is taken ahead counts, and that it would have waited long does not.
    let starved = Bucket { starved_at: at(7), ..level_after(-5) };
    assert_eq!(starved.opens_at(3), at(8 * nanos_per_byte + 1));
    assert_eq!(level_after(5).opens_at(3), at(0));
    assert_eq!(level_after(5).opens_at(5), at(1));
}

struct Copier {
    id: MemberId,
    /// A bit per shard that has something to copy.
    active: Vec<bool>,
    batch: u64,
    spent: u64,
    last_spent_at: Duration,
}

/// Every asker looks when it was told to, or up to `late` after.
struct World {
    share: HydrationShare,
    clones: Vec<Copier>,
    now: Duration,
    due: BTreeSet<(Duration, usize, u16)>,
    late: Duration,
    random: u64,
    looks: u64,
}

impl World {
    fn new(total: Option<u64>, late: Duration) -> Self {
        let mut share = HydrationShare::default();
        share.set_total_rate(total.map(rate), Duration::ZERO);
        let (clones, due, now) = (Vec::new(), BTreeSet::new(), Duration::ZERO);
        Self { share, clones, now, due, late, random: 88172645463325252, looks: 0 }
    }

    fn add(&mut self, priority: u64, own: Option<u64>, shards: u16, batch: u64) -> usize {
        let id = self.share.add(weight(priority), own.map(rate), self.now);
        let (at, nr) = (self.now, self.clones.len());
        self.clones.push(Copier { id, active: vec![true; usize::from(shards)], batch, spent: 0, last_spent_at: at });
        (0..shards).for_each(|shard| _ = self.due.insert((at, nr, shard)));
        nr
    }

    fn set_active(&mut self, clone: usize, active: bool) {
        let shards = self.clones[clone].active.len() as u16;
        self.clones[clone].active.fill(active);
        self.due.retain(|(_, nr, _)| *nr != clone);
        for shard in 0..shards {
            match active {
                true => _ = self.due.insert((self.now, clone, shard)),
                false => self.share.withdraw(self.clones[clone].id, ShardIndex(shard), self.now),
            }
        }
    }

    fn lateness(&mut self) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        match self.late.as_nanos() as u64 {
            0 => Duration::ZERO,
            late => Duration::from_nanos(self.random % late),
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some((at, nr, shard)) = self.due.first().copied().filter(|(at, ..)| *at <= end) {
            self.due.pop_first();
            self.now = self.now.max(at);
            self.looks += 1;
            assert!(self.looks < 5_000_000, "busy waiting");
            let (id, batch) = (self.clones[nr].id, self.clones[nr].batch);
            let again = match self.share.request(id, ShardIndex(shard), batch, self.now) {
                Answer::Granted => {
                    self.share.spend(id, ShardIndex(shard), batch);
                    self.clones[nr].spent += batch;
                    self.clones[nr].last_spent_at = self.now;
                    self.now
                }
                Answer::WaitUntil(until) => {
                    assert!(self.now < until && until <= self.now + LOOK_AGAIN_MAX);
                    until + self.lateness()
                }
            };
            self.due.insert((again, nr, shard));
        }
        self.now = end;
    }

    fn spent(&self) -> Vec<u64> {
        self.clones.iter().map(|clone| clone.spent).collect()
    }
    fn total(&self) -> u64 {
        self.spent().iter().sum()
    }
    /// What everybody spends in some time.
    fn spent_in(&mut self, time: Duration) -> Vec<u64> {
        let before = self.spent();
        self.run(time);
        self.spent().iter().zip(before).map(|(after, before)| after - before).collect()
    }
}

/// Whether `part` of `all` is `expected`, give or take `percent` of it.
fn is_about(part: u64, all: u64, expected: f64, percent: f64) -> bool {
    let found = part as f64 / all as f64;
    (found - expected).abs() <= expected * percent / 100.0
}

#[test]
fn bounds_of_rates_and_priorities() {
    for bad in [0, 1, RATE_MIN - 1, RATE_MAX + 1, u64::MAX] {
        let error = HydrationRate::new(bad).unwrap_err().to_string();
        assert!(error.contains("disable_hydration"), "{error}");
    }
    assert_eq!(rate(RATE_MIN).bytes_per_second(), 4096);
    rate(RATE_MAX);
    for bad in [0, 1001, u64::MAX] {
        assert!(Priority::new(bad).is_err());
    }
    assert_eq!((Priority::default().weight(), weight(1).weight(), weight(1000).weight()), (100, 1, 1000));
}

/// One after the other, from the one that has waited longest.
#[test]
fn the_shards_of_a_clone_take_turns() {
    let mut share = HydrationShare::default();
    share.set_total_rate(Some(rate(10 * SLOW)), Duration::ZERO);
    let id = share.add(Priority::default(), None, Duration::ZERO);
    let mut order = Vec::new();
    for step in 1..200 {
        let now = step * Duration::from_millis(10);
        for shard in [2, 0, 1] {
            if share.request(id, ShardIndex(shard), SLOW, now) == Answer::Granted {
                share.spend(id, ShardIndex(shard), SLOW);
                order.push(shard);
            }
        }
    }
    assert!(order.len() >= 12, "{order:?}");
    assert!(
        order.windows(3).skip(1).all(|three| three[0] != three[1] && three[1] != three[2] && three[0] != three[2]),
        "{order:?}"
    );
}

/// Who is told when to look again looks a few times for each grant, and is not late.
#[test]
fn estimates_spare_looks() {
    for (weights, shards) in [([1, 1], 1), ([1, 3], 1), ([10, 1], 2), ([5, 2], 3)] {
        let mut world = World::new(Some(20 * SLOW), Duration::ZERO);
        weights.into_iter().for_each(|weight| _ = world.add(weight, None, shards, SLOW));
        world.run(SECOND);
        world.looks = 0;
        let spent: u64 = world.spent_in(60 * SECOND).iter().sum();
        let grants = spent / SLOW;
        assert!(grants >= 1180, "{grants}");
        assert!(
            world.looks <= (3 + u64::from(shards)) * grants,
            "{weights:?} {shards}: {} looks for {grants} grants",
            world.looks
        );
    }
}

#[test]
fn without_a_rate_everything_is_granted_at_once() {
    let mut world = World::new(None, Duration::ZERO);
    let clone = world.add(100, None, 1, MIB);
    let id = world.clones[clone].id;
    for _ in 0..1000 {
        assert_eq!(world.share.request(id, ShardIndex(0), u64::MAX, Duration::ZERO), Answer::Granted);
    }
}

#[test]
fn shares_are_as_the_weights_whatever_the_shards_and_batches() {
    let mut world = World::new(Some(100 * MIB), Duration::from_millis(2));
    for (weight, shards, batch) in [(100, 1, MIB), (200, 4, 64 << 10), (400, 2, 3 * MIB)] {
        world.add(weight, None, shards, batch);
    }
    let spent = world.spent_in(20 * SECOND);
    let all: u64 = spent.iter().sum();
    for (part, expected) in spent.iter().zip([1.0 / 7.0, 2.0 / 7.0, 4.0 / 7.0]) {
        assert!(is_about(*part, all, expected, 3.0), "{spent:?}");
    }
    assert!(is_about(all, 2000 * MIB, 1.0, 2.0), "work conserving: {all}");
    assert!(world.looks < 20 * 100 * 12, "{} looks", world.looks);
}

#[test]
fn a_newcomer_has_no_credit_for_the_past() {
    let mut world = World::new(Some(10 * MIB), Duration::ZERO);
    world.add(100, None, 2, MIB);
    world.run(100 * SECOND);
    world.add(100, None, 2, MIB);
    let spent = world.spent_in(10 * SECOND);
    assert!(spent[0].abs_diff(spent[1]) <= 3 * MIB, "{spent:?}");
    // Nor has one that was away.
    world.set_active(0, false);
    let spent = world.spent_in(100 * SECOND);
    assert!(spent[0] == 0 && spent[1] > 995 * MIB, "all for the other: {spent:?}");
    world.set_active(0, true);
    let spent = world.spent_in(10 * SECOND);
    assert!(spent[0].abs_diff(spent[1]) <= 3 * MIB, "{spent:?}");
}

#[test]
fn a_clone_that_does_not_use_its_grants_leaves_them_to_the_others() {
    let mut world = World::new(Some(10 * MIB), Duration::ZERO);
    world.add(100, None, 1, MIB);
    let stalled = world.add(1000, None, 1, MIB);
    world.run(SECOND);
    // Its source does not answer: it neither asks nor withdraws.
    world.due.retain(|(_, nr, _)| *nr != stalled);
    let spent = world.spent_in(10 * SECOND);
    assert!(spent[0] >= 97 * MIB, "{spent:?}");
}

#[test]
fn a_rate_of_its_own_bounds_a_clone_and_leaves_the_rest_to_the_others() {
    let mut world = World::new(Some(100 * MIB), Duration::ZERO);
    world.add(1000, Some(10 * MIB), 2, MIB);
    world.add(1, None, 1, MIB);
    let spent = world.spent_in(10 * SECOND);
    assert!(is_about(spent[0], 100 * MIB, 1.0, 3.0) && is_about(spent[1], 900 * MIB, 1.0, 3.0), "{spent:?}");
    // The same without a bound of the whole.
    world.share.set_total_rate(None, world.now);
    world.set_active(1, false);
    let spent = world.spent_in(10 * SECOND);
    assert!(is_about(spent[0], 100 * MIB, 1.0, 3.0), "{spent:?}");
}

#[test]
fn batches_above_the_burst_go() {
    let mut world = World::new(Some(SLOW), Duration::ZERO);
    world.add(100, None, 1, 16 * MIB);
    world.add(100, None, 1, 4096);
    world.run(2000 * SECOND);
    let spent = world.spent();
    assert!(spent[0] >= 48 * MIB && spent[1] >= 48 * MIB, "{spent:?}");
    assert!(world.total() <= 2000 * SLOW + 16 * MIB + SLOW, "{spent:?}");
}

#[test]
fn rates_and_weights_change_while_it_runs() {
    let mut world = World::new(Some(SLOW), Duration::ZERO);
    world.add(100, None, 1, MIB);
    world.add(100, None, 1, MIB);
    world.run(100 * SECOND);
    // A debt of 16 s at the old rate is nothing at the new one.
    world.share.set_total_rate(Some(rate(100 * MIB)), world.now);
    let spent = world.spent_in(SECOND);
    assert!(is_about(spent.iter().sum(), 100 * MIB, 1.0, 12.0), "{spent:?}");
    world.share.set_priority(world.clones[1].id, weight(300));
    let spent = world.spent_in(10 * SECOND);
    assert!(is_about(spent[1], 750 * MIB, 1.0, 3.0) && is_about(spent[0], 250 * MIB, 1.0, 3.0), "{spent:?}");
    world.share.set_total_rate(Some(rate(MIB)), world.now);
    let spent = world.spent_in(100 * SECOND);
    assert!(is_about(spent.iter().sum(), 100 * MIB, 1.0, 5.0), "{spent:?}");
    world.share.set_rate(world.clones[1].id, Some(rate(SLOW)), world.now);
    let spent = world.spent_in(100 * SECOND);
    assert!(is_about(spent[0], 94 * MIB, 1.0, 5.0), "{spent:?}");
    // Off and on again gives nothing for free.
    let before = world.total();
    for _ in 0..1000 {
        world.share.set_total_rate(None, world.now);
        world.share.set_total_rate(Some(rate(MIB)), world.now);
        world.run(Duration::from_micros(10));
    }
    assert!(world.total() - before <= 4 * MIB, "{}", world.total() - before);
}

#[test]
fn copies_on_demand_take_from_the_whole_but_do_not_starve_the_background() {
    let mut world = World::new(Some(10 * MIB), Duration::ZERO);
    world.add(100, None, 1, MIB);
    let clients = world.add(100, None, 1, MIB);
    world.set_active(clients, false);
    world.run(SECOND);
    let id = world.clones[clients].id;
    // Clients use 4 MiB/s of 10.
    let before = world.total();
    for _ in 0..200 {
        world.share.charge(id, MIB / 5, world.now);
        world.run(SECOND / 20);
    }
    assert!(is_about(world.total() - before, 60 * MIB, 1.0, 5.0), "{}", world.total() - before);
    // Now more than all of it.
    let before = world.total();
    for _ in 0..2000 {
        world.share.charge(id, 2 * MIB, world.now);
        world.run(SECOND / 20);
    }
    let background = world.total() - before;
    assert!((50 * MIB..=70 * MIB).contains(&background), "a sixteenth: {background}");
    // And the debt is forgotten soon.
    assert!(world.spent_in(3 * SECOND)[0] >= 18 * MIB);
}

#[test]
fn what_a_removed_clone_has_not_spent_is_given_back() {
    let mut world = World::new(Some(MIB), Duration::ZERO);
    world.add(100, None, 1, MIB);
    let gone = world.add(1000, None, 2, 8 * MIB);
    world.due.retain(|(_, nr, _)| *nr != gone);
    let id = world.clones[gone].id;
    world.share.request(id, ShardIndex(0), 8 * MIB, world.now);
    world.share.request(id, ShardIndex(1), 8 * MIB, world.now);
    world.run(10 * SECOND);
    world.share.remove(id, world.now);
    assert_eq!(
        world.share.request(id, ShardIndex(0), u64::MAX, world.now),
        Answer::Granted,
        "nobody's matter any more"
    );
    let spent = world.spent_in(10 * SECOND);
    assert!(spent[0] >= 9 * MIB, "the debt is gone: {spent:?}");
}

#[derive(Clone, Debug)]
enum Change {
    Total(u64),
    Own(usize, Option<u64>),
    Weight(usize, u64),
    Active(usize, bool),
    Charge(usize, u64),
}

fn any_rate() -> impl Strategy<Value = u64> {
    prop_oneof![Just(SLOW), SLOW..=MIB, MIB..=256 * MIB]
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any_rate().prop_map(Change::Total),
        (0usize..8, proptest::option::of(any_rate())).prop_map(|(c, r)| Change::Own(c, r)),
        (0usize..8, 1u64..=1000).prop_map(|(c, w)| Change::Weight(c, w)),
        (0usize..8, any::<bool>()).prop_map(|(c, a)| Change::Active(c, a)),
        (0usize..8, 0u64..=8 * MIB).prop_map(|(c, b)| Change::Charge(c, b)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Any clones, any weights: shares as the weights, the whole used, nobody starved.
    #[test]
    fn backlogged_clones_share_by_weight(
        total in 8 * MIB..=128 * MIB,
        clones in proptest::collection::vec((1u64..=1000, 1u16..=4, 17u32..=20), 1..8),
        late_us in 0u64..=3000,
    ) {
        let mut world = World::new(Some(total), Duration::from_micros(late_us));
        for (weight, shards, batch) in &clones {
            world.add(*weight, None, *shards, 1 << batch);
        }
        world.run(SECOND);
        // Long enough for the lightest to be served often.
        let weights: u64 = clones.iter().map(|(weight, ..)| weight).sum();
        let grant = (total / 100).max(MIB);
        let lightest = clones.iter().map(|(weight, ..)| *weight).min().unwrap();
        let cycle = Duration::from_secs_f64(grant as f64 / total as f64 * weights as f64 / lightest as f64);
        let time = (cycle * 40).clamp(5 * SECOND, 60 * SECOND);
        let grants_of_lightest = time.as_secs_f64() / cycle.as_secs_f64();
        let spent = world.spent_in(time);
        let all: u64 = spent.iter().sum();
        let possible = (total as f64 * time.as_secs_f64()) as u64;
        prop_assert!(is_about(all, possible, 1.0, 3.0), "{all} of {possible}");
        for ((weight, shards, _), spent) in clones.iter().zip(&spent) {
            let fair = all as f64 * *weight as f64 / weights as f64;
            // A grant or two per shard more or less, or a few percent.
            let slack = fair * 0.04 + 3.0 * (grant * u64::from(*shards)) as f64;
            prop_assert!((*spent as f64 - fair).abs() <= slack, "{spent} for {fair}, {grants_of_lightest} grants");
        }
        for clone in &world.clones {
            prop_assert!(world.now - clone.last_spent_at <= cycle * 8 + SECOND, "starved");
        }
    }

    /// Whatever happens: never more than the rate allows.
    #[test]
    fn the_bound_holds_whatever_changes(
        clones in proptest::collection::vec((1u64..=1000, proptest::option::of(any_rate()), 1u16..=3, 16u32..=22), 1..8),
        changes in proptest::collection::vec((any_change(), 0u64..=1_000_000), 1..30),
        start in any_rate(),
    ) {
        let mut world = World::new(Some(start), Duration::from_micros(500));
        for (weight, own, shards, batch) in &clones {
            world.add(*weight, *own, *shards, 1 << batch);
        }
        let (mut total, mut allowed, mut grant_max) = (start, 0.0, 0);
        for (change, us) in changes {
            let id = |world: &World, c: usize| world.clones[c % clones.len()].id;
            match change {
                Change::Total(new) => {
                    world.share.set_total_rate(Some(rate(new)), world.now);
                    total = new;
                }
                Change::Own(c, own) => world.share.set_rate(id(&world, c), own.map(rate), world.now),
                Change::Weight(c, w) => world.share.set_priority(id(&world, c), weight(w)),
                Change::Active(c, active) => world.set_active(c % clones.len(), active),
                Change::Charge(c, bytes) => world.share.charge(id(&world, c), bytes, world.now),
            }
            world.run(Duration::from_micros(us));
            allowed += total as f64 * us as f64 / 1e6;
            grant_max = grant_max.max(total / 100).max(4 * MIB);
            // One grant of debt, and one more for those whom clients starve.
            let bound = allowed + 2.0 * grant_max as f64;
            prop_assert!(world.total() as f64 <= bound, "{} of {bound}", world.total());
        }
        // And it goes on: what is active gets something.
        world.share.set_total_rate(Some(rate(64 * MIB)), world.now);
        (0..clones.len()).for_each(|c| {
            world.share.set_rate(world.clones[c].id, None, world.now);
            world.set_active(c, true);
        });
        world.run(SECOND);
        let spent = world.spent_in(2 * SECOND);
        prop_assert!(spent.iter().sum::<u64>() >= 110 * MIB, "{spent:?}");
    }
}

/// Nor does an order in between: what was granted too much is paid for before the next grant.
#[test]
fn setting_a_rate_again_forgives_no_debt() {
    let mut world = World::new(Some(64 << 10), Duration::from_micros(500));
    world.add(1, None, 1, 4 * MIB);
    world.run(SECOND);
    assert_eq!(world.total(), 4 * MIB, "one grant, worth 64 seconds");
    for _ in 0..3 {
        world.share.set_total_rate(Some(rate(64 << 10)), world.now);
        world.share.charge(world.clones[0].id, 1, world.now);
        world.run(2 * SECOND);
    }
    assert_eq!(world.total(), 4 * MIB);
}

/// The largest numbers overflow nothing.
#[test]
fn extremes() {
    let mut share = HydrationShare::default();
    let year = Duration::from_secs(365 * 86400);
    let id = share.add(weight(1), Some(rate(RATE_MAX)), Duration::ZERO);
    share.set_total_rate(Some(rate(RATE_MAX)), Duration::ZERO);
    for (years, bytes) in [(0, 0), (0, u64::MAX), (1, u64::MAX), (1, 1), (500, u64::MAX), (500, 4096)] {
        share.charge(id, bytes, year * years);
        share.request(id, ShardIndex(u16::MAX), bytes, year * years);
        share.spend(id, ShardIndex(u16::MAX), u64::MAX);
        share.set_rate(id, Some(rate(if years == 0 { RATE_MIN } else { RATE_MAX })), year * years);
        share.set_total_rate(Some(rate(RATE_MIN)), year * years);
    }
    // Time that stands still, or goes back a little between shards.
    share.request(id, ShardIndex(0), 4096, year);
    share.withdraw(id, ShardIndex(0), Duration::ZERO);
    share.remove(id, Duration::ZERO);
}
