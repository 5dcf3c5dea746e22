//! How the bandwidth of hydration is shared: one byte budget for all clones and shards, by weight.
//!
//! Pure: time is an argument. A token bucket bounds the whole (`hydration_rate` of the daemon), another one each clone
//! that has a rate of its own. Who gets the next bytes is decided by weighted fair queuing: a clone's tag is the virtual
//! time at which its next bytes are due; a grant moves it on by bytes / weight; the lowest tag is served first, and its
//! tag is the virtual time of all. Invariants:
//! * Only *askers* (one shard of one clone, between [`HydrationShare::request`] and [`HydrationShare::withdraw`]) that use
//!   what they are given take part: an asker with more than one grant that it has not spent is passed over, so that a
//!   clone that is idle, or waits for its source, leaves its share to the others.
//! * Whoever comes (back) starts at the virtual time of now: no credit for the past.
//! * A grant needs a bucket above zero, but not one that holds all of it: what is too much is a debt, which is paid before the
//!   next. So batches may be larger than the burst, and all grants until t are at most rate x t + burst + one batch.
//! * Copies on demand are charged and never wait. They may run a bucket into debt, of one second at most; and however much of
//!   the rate clients use, background hydration gets a sixteenth of it: it never starves.
//!
//! Grants are made when they are due, whoever looks first: an asker that looks late finds what it was given. It is told
//! when to look again: never later than [`LOOK_AGAIN_MAX`], so that changes of rates, weights and competitors need no message.
//!
//! Costs O(askers) per call.

use crate::bail;
use crate::error::Result;
use crate::units::{ByteSize, ShardIndex};
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

/// The weight of a clone when none is given.
pub const PRIORITY_DEFAULT: u16 = 100;
/// The largest weight; the smallest is 1.
pub const PRIORITY_MAX: u16 = 1000;
/// The lowest rate that can be asked for, in bytes per second.
pub const RATE_MIN: u64 = 4 << 10;
/// The highest, in bytes per second: 1 TiB.
pub const RATE_MAX: u64 = 1 << 40;
/// What is not used is kept for this long.
pub const BURST: Duration = Duration::from_millis(100);
/// An asker looks again after this time at the latest.
pub const LOOK_AGAIN_MAX: Duration = Duration::from_millis(100);
/// A grant is worth at least this time at the full rate, so that askers need not look more often.
const GRANT_MIN: Duration = Duration::from_millis(10);
/// Copies on demand run a bucket into a debt of at most this time at its rate.
const DEBT_MAX: Duration = Duration::from_secs(1);
/// Background hydration gets one over this of a rate that clients use up.
const STARVE_FRACTION: u32 = 16;

const NANOS: i128 = 1_000_000_000;
/// Virtual time is in bytes per unit of weight, times this.
const TAG_SCALE: u128 = 1 << 20;

/// A bound for bytes per second, from [`RATE_MIN`] to [`RATE_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HydrationRate(NonZeroU64);

impl HydrationRate {
    /// Refuses what is no useful rate, 0 above all. `Usage`.
    pub fn new(bytes_per_second: u64) -> Result<Self> {
        match NonZeroU64::new(bytes_per_second) {
            None => {
                bail!(Usage, "a hydration rate of 0 would never end: use disable_hydration to stop the background copy")
            }
            Some(rate) if !(RATE_MIN..=RATE_MAX).contains(&bytes_per_second) => bail!(
                Usage,
                "a hydration rate of {rate} bytes per second is out of bounds: use {} to {} per second, or \
                 disable_hydration to stop the background copy",
                ByteSize(RATE_MIN),
                ByteSize(RATE_MAX)
            ),
            Some(rate) => Ok(Self(rate)),
        }
    }

    pub const fn bytes_per_second(self) -> u64 {
        self.0.get()
    }

    /// What this rate allows in `time`, in bytes.
    fn in_time(self, time: Duration) -> u64 {
        u64::try_from(u128::from(self.0.get()) * time.as_nanos() / NANOS as u128).unwrap_or(u64::MAX)
    }
}

/// A weight of a clone against the others, from 1 to [`PRIORITY_MAX`]: twice the weight, twice the bandwidth.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Priority(u16);

impl Priority {
    /// `Usage` when it is out of bounds.
    pub fn new(weight: u64) -> Result<Self> {
        match u16::try_from(weight) {
            Ok(weight) if (1..=PRIORITY_MAX).contains(&weight) => Ok(Self(weight)),
            _ => bail!(Usage, "a priority of {weight} is out of bounds: use 1 to {PRIORITY_MAX}"),
        }
    }

    pub const fn weight(self) -> u64 {
        self.0 as u64
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(PRIORITY_DEFAULT)
    }
}

/// A token bucket with debt.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: HydrationRate,
    /// In bytes / 10^9; below zero is debt.
    level: i128,
    /// When the level was right.
    at: Duration,
    /// Open from then on, whatever the level: only charges keep it closed for so long.
    starved_at: Duration,
}

impl Bucket {
    /// Empty: to make one anew all the time gives nothing.
    fn new(rate: HydrationRate, now: Duration) -> Self {
        Self { rate, level: 0, at: now, starved_at: Duration::MAX }
    }

    fn per_nano(&self) -> i128 {
        i128::from(self.rate.bytes_per_second())
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos() as i128;
        let full = self.per_nano() * BURST.as_nanos() as i128;
        self.level = self.level.saturating_add(self.per_nano().saturating_mul(passed)).min(full);
        self.at = self.at.max(now);
    }

    fn set_rate(&mut self, rate: HydrationRate, now: Duration) {
        self.refill(now);
        self.rate = rate;
        // A debt stays one: clients can't make it due earlier than it is paid at the new rate.
        self.starved_at = if self.level < 0 { self.opens_after(0) } else { Duration::MAX };
        self.refill(now);
    }

    fn is_open(&self, now: Duration) -> bool {
        self.level > 0 || now >= self.starved_at
    }

    /// When it is open after another `ahead` bytes were taken.
    fn opens_at(&self, ahead: u128) -> Duration {
        let at = self.opens_after(ahead);
        if ahead == 0 { at.min(self.starved_at) } else { at }
    }

    /// The same by the level alone.
    fn opens_after(&self, ahead: u128) -> Duration {
        let ahead = i128::try_from(ahead).unwrap_or(i128::MAX).saturating_mul(NANOS);
        let missing = ahead.saturating_sub(self.level);
        let wait = if missing < 0 { 0 } else { missing / self.per_nano() + 1 };
        self.at.saturating_add(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    fn grant(&mut self, bytes: u64, now: Duration) {
        self.level = self.level.saturating_sub(i128::from(bytes) * NANOS);
        let nanos = (i128::from(bytes) * NANOS / self.per_nano()).min(i128::from(u64::MAX)) as u64;
        self.starved_at = now.saturating_add(Duration::from_nanos(nanos).saturating_mul(STARVE_FRACTION));
    }

    fn charge(&mut self, bytes: u64, now: Duration) {
        self.refill(now);
        let floor = -self.per_nano() * DEBT_MAX.as_nanos() as i128;
        let charged = self.level.saturating_sub(i128::from(bytes) * NANOS);
        self.level = charged.max(self.level.min(floor));
        if self.starved_at == Duration::MAX {
            self.starved_at = now.saturating_add(DEBT_MAX);
        }
    }

    fn give_back(&mut self, bytes: u64, now: Duration) {
        self.level = self.level.saturating_add(i128::from(bytes) * NANOS);
        self.refill(now);
    }
}

/// One shard of one clone that wants to hydrate.
#[derive(Clone, Copy, Debug)]
struct Asker {
    /// What it needs at a time, in bytes.
    batch: u64,
    /// Granted and not spent.
    ready: u64,
    /// Orders the askers of one clone: the one served longest ago is next.
    served: u64,
}

impl Asker {
    /// Whether it has use for more: one grant beside the one it is about to spend.
    fn has_room(&self) -> bool {
        self.ready <= self.batch
    }
}

#[derive(Clone, Debug)]
struct Member {
    weight: u64,
    bucket: Option<Bucket>,
    tag: u128,
    /// Did not compete when the last grant was made: starts anew when it does.
    absent: bool,
    askers: BTreeMap<u16, Asker>,
}

impl Member {
    fn competes(&self, now: Duration) -> bool {
        self.bucket.is_none_or(|bucket| bucket.is_open(now)) && self.askers.values().any(Asker::has_room)
    }

    fn next_asker(&self) -> Option<(u16, Asker)> {
        let with_room = self.askers.iter().filter(|(_, asker)| asker.has_room());
        with_room.min_by_key(|(_, asker)| asker.served).map(|(shard, asker)| (*shard, *asker))
    }
}

/// A clone's name in the share; never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct MemberId(u64);

/// The answer to a [`HydrationShare::request`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// That many bytes can be spent now.
    Granted,
    /// Ask again then.
    WaitUntil(Duration),
}

/// See the head of this file.
#[derive(Debug, Default)]
pub struct HydrationShare {
    total: Option<Bucket>,
    members: BTreeMap<MemberId, Member>,
    virtual_time: u128,
    last_id: u64,
    grants: u64,
}

impl HydrationShare {
    pub fn add(&mut self, priority: Priority, rate: Option<HydrationRate>, now: Duration) -> MemberId {
        self.last_id += 1;
        let id = MemberId(self.last_id);
        let bucket = rate.map(|rate| Bucket::new(rate, now));
        let member = Member { weight: priority.weight(), bucket, tag: 0, absent: true, askers: BTreeMap::new() };
        self.members.insert(id, member);
        id
    }

    /// Forgets a clone; what it has not spent is given back.
    pub fn remove(&mut self, id: MemberId, now: Duration) {
        let shards: Vec<u16> = self.members.get(&id).into_iter().flat_map(|m| m.askers.keys().copied()).collect();
        shards.into_iter().for_each(|shard| self.withdraw(id, ShardIndex(shard), now));
        self.members.remove(&id);
    }

    pub fn set_priority(&mut self, id: MemberId, priority: Priority) {
        if let Some(member) = self.members.get_mut(&id) {
            member.weight = priority.weight();
        }
    }

    /// The bound of one clone.
    pub fn set_rate(&mut self, id: MemberId, rate: Option<HydrationRate>, now: Duration) {
        if let Some(member) = self.members.get_mut(&id) {
            set_bucket(&mut member.bucket, rate, now);
        }
    }

    /// The bound of all together.
    pub fn set_total_rate(&mut self, rate: Option<HydrationRate>, now: Duration) {
        set_bucket(&mut self.total, rate, now);
    }

    pub fn total_rate(&self) -> Option<HydrationRate> {
        self.total.map(|bucket| bucket.rate)
    }

    /// A shard of a clone has a batch of `batch` bytes to copy, and more after it. From now until it withdraws it gets its
    /// share.
    pub fn request(&mut self, id: MemberId, shard: ShardIndex, batch: u64, now: Duration) -> Answer {
        let grants = self.grants;
        let Some(member) = self.members.get_mut(&id) else { return Answer::Granted };
        let rates = [self.total, member.bucket].into_iter().flatten().map(|bucket| bucket.rate);
        let Some(rate) = rates.min() else { return Answer::Granted };
        let asked = batch.max(rate.in_time(GRANT_MIN));
        let asker = member.askers.entry(shard.0).or_insert(Asker { batch: asked, ready: 0, served: grants });
        asker.batch = asked;
        self.serve(now);
        let asker = self.members[&id].askers[&shard.0];
        match asker.ready >= batch {
            true => Answer::Granted,
            false => {
                let at = self.estimate(id, shard.0);
                Answer::WaitUntil(at.clamp(now + Duration::from_nanos(1), now + LOOK_AGAIN_MAX))
            }
        }
    }

    /// A granted batch starts; it may be smaller than it was going to be.
    pub fn spend(&mut self, id: MemberId, shard: ShardIndex, bytes: u64) {
        if let Some(asker) = self.members.get_mut(&id).and_then(|member| member.askers.get_mut(&shard.0)) {
            asker.ready = asker.ready.saturating_sub(bytes);
        }
    }

    /// A shard of a clone has nothing to copy for now. What it has not spent is given back.
    pub fn withdraw(&mut self, id: MemberId, shard: ShardIndex, now: Duration) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let Some(asker) = member.askers.remove(&shard.0) else { return };
        member.absent |= member.askers.is_empty();
        member.tag = member.tag.saturating_sub(tag_of(asker.ready, member.weight));
        for bucket in [&mut self.total, &mut member.bucket].into_iter().flatten() {
            bucket.give_back(asker.ready, now);
        }
    }

    /// A client's request copies or reads so much from the source: it does not wait, but others will.
    pub fn charge(&mut self, id: MemberId, bytes: u64, now: Duration) {
        let own = self.members.get_mut(&id).and_then(|member| member.bucket.as_mut());
        self.total.as_mut().into_iter().chain(own).for_each(|bucket| bucket.charge(bytes, now));
    }

    /// Makes the grants that are due.
    fn serve(&mut self, now: Duration) {
        if let Some(total) = &mut self.total {
            total.refill(now);
        }
        for member in self.members.values_mut() {
            if let Some(bucket) = &mut member.bucket {
                bucket.refill(now);
            }
            match member.competes(now) {
                false => member.absent = true,
                true if std::mem::take(&mut member.absent) => member.tag = member.tag.max(self.virtual_time),
                true => {}
            }
        }
        // Every grant closes a bucket or fills an asker: this ends.
        while self.total.is_none_or(|total| total.is_open(now)) {
            let competing = self.members.values_mut().filter(|member| member.competes(now));
            let Some(member) = competing.min_by_key(|member| member.tag) else { break };
            let Some((shard, asker)) = member.next_asker() else { break };
            self.virtual_time = self.virtual_time.max(member.tag);
            member.tag = member.tag.saturating_add(tag_of(asker.batch, member.weight));
            self.grants += 1;
            let asker = Asker { ready: asker.ready.saturating_add(asker.batch), served: self.grants, ..asker };
            member.askers.insert(shard, asker);
            for bucket in [&mut self.total, &mut member.bucket].into_iter().flatten() {
                bucket.grant(asker.batch, now);
            }
            member.absent = !member.competes(now);
        }
    }

    /// When an asker that was just passed over is served, as it looks now.
    fn estimate(&self, id: MemberId, shard: u16) -> Duration {
        let member = &self.members[&id];
        let asker = member.askers[&shard];
        let before = |other: &Asker| other.has_room() && other.served < asker.served;
        let own: u128 = member.askers.values().filter(|other| before(other)).map(|other| u128::from(other.batch)).sum();
        let tag = member.tag.max(self.virtual_time).saturating_add(own * TAG_SCALE / u128::from(member.weight));
        let others = self.members.iter().filter(|(other, m)| **other != id && m.askers.values().any(Asker::has_room));
        let ahead: u128 = others
            .map(|(_, other)| {
                tag.saturating_sub(other.tag.max(self.virtual_time)) * u128::from(other.weight) / TAG_SCALE
            })
            .sum();
        let of_total = self.total.map_or(Duration::ZERO, |bucket| bucket.opens_at(own + ahead));
        let of_own = member.bucket.map_or(Duration::ZERO, |bucket| bucket.opens_at(own));
        of_total.max(of_own)
    }
}

fn set_bucket(bucket: &mut Option<Bucket>, rate: Option<HydrationRate>, now: Duration) {
    match (bucket.as_mut(), rate) {
        (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
        (None, Some(rate)) => *bucket = Some(Bucket::new(rate, now)),
        (_, None) => *bucket = None,
    }
}

fn tag_of(bytes: u64, weight: u64) -> u128 {
    u128::from(bytes) * TAG_SCALE / u128::from(weight.max(1))
}

#[cfg(test)]
mod tests;
