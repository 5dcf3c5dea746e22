//! The [`HydrationShare`] of a daemon, as its clones and shards use it: shared between threads, and free of cost where no
//! rate is set.
//!
//! A clone is a [`BudgetMember`] from its start to its end; dropping it gives back what it holds. Must not do I/O nor wait:
//! the lock is held for one decision.

use crate::hydration_share::{Answer, HydrationRate, HydrationShare, MemberId, Priority};
use crate::units::ShardIndex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The bandwidth of all clones of a daemon.
#[derive(Default, Debug)]
pub struct HydrationBudget {
    /// There is a rate for all.
    is_bound: AtomicBool,
    share: Mutex<HydrationShare>,
}

impl HydrationBudget {
    pub fn new(total: Option<HydrationRate>) -> Arc<Self> {
        let budget = Self::default();
        budget.set_total_rate(total, Duration::ZERO);
        Arc::new(budget)
    }

    fn lock(&self) -> MutexGuard<'_, HydrationShare> {
        // Nothing under the lock can panic half way through a change.
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bounds all clones together, from now on; `None`: no bound. Whoever waits notices within a tenth of a second.
    pub fn set_total_rate(&self, rate: Option<HydrationRate>, now: Duration) {
        self.lock().set_total_rate(rate, now);
        self.is_bound.store(rate.is_some(), Release);
    }

    pub fn total_rate(&self) -> Option<HydrationRate> {
        self.lock().total_rate()
    }

    /// A new clone.
    pub fn join(self: &Arc<Self>, priority: Priority, rate: Option<HydrationRate>, now: Duration) -> BudgetMember {
        BudgetMember {
            id: self.lock().add(priority, rate, now),
            budget: self.clone(),
            weight: AtomicU64::new(priority.weight()),
            rate: AtomicU64::new(rate.map_or(0, HydrationRate::bytes_per_second)),
        }
    }
}

/// One clone's part in a [`HydrationBudget`]. `now` is the time of [`crate::env::Env`], the same for all shards.
#[derive(Debug)]
pub struct BudgetMember {
    id: MemberId,
    budget: Arc<HydrationBudget>,
    weight: AtomicU64,
    /// Of this clone alone; 0: none.
    rate: AtomicU64,
}

impl BudgetMember {
    /// A clone that shares with nobody and has no bound.
    pub fn alone() -> Self {
        HydrationBudget::new(None).join(Priority::default(), None, Duration::ZERO)
    }

    /// The weight against other clones.
    pub fn weight(&self) -> u64 {
        self.weight.load(Relaxed)
    }
    pub fn set_priority(&self, priority: Priority) {
        self.budget.lock().set_priority(self.id, priority);
        self.weight.store(priority.weight(), Relaxed);
    }

    /// The bound of this clone alone, in bytes per second.
    pub fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Acquire)).filter(|rate| *rate > 0)
    }
    pub fn set_rate(&self, rate: Option<HydrationRate>, now: Duration) {
        self.budget.lock().set_rate(self.id, rate, now);
        self.rate.store(rate.map_or(0, HydrationRate::bytes_per_second), Release);
    }

    /// The bound of all clones together, in bytes per second.
    pub fn total_rate(&self) -> Option<u64> {
        self.budget.total_rate().map(HydrationRate::bytes_per_second)
    }

    /// Whether there is any bound; if not, the calls below cost nothing.
    pub fn is_bound(&self) -> bool {
        self.budget.is_bound.load(Acquire) || self.rate.load(Acquire) > 0
    }

    /// The lowest of the bounds, in bytes per second.
    pub fn lowest_rate(&self) -> Option<u64> {
        let total = if self.is_bound() { self.total_rate() } else { None };
        total.into_iter().chain(self.rate()).min()
    }

    /// See [`HydrationShare::request`].
    pub fn request(&self, shard: ShardIndex, batch_bytes: u64, now: Duration) -> Answer {
        match self.is_bound() {
            true => self.budget.lock().request(self.id, shard, batch_bytes, now),
            false => Answer::Granted,
        }
    }

    /// See [`HydrationShare::spend`].
    pub fn spend(&self, shard: ShardIndex, bytes: u64) {
        if self.is_bound() {
            self.budget.lock().spend(self.id, shard, bytes);
        }
    }

    /// See [`HydrationShare::withdraw`].
    pub fn withdraw(&self, shard: ShardIndex, now: Duration) {
        if self.is_bound() {
            self.budget.lock().withdraw(self.id, shard, now);
        }
    }

    /// See [`HydrationShare::charge`].
    pub fn charge(&self, bytes: u64, now: Duration) {
        if self.is_bound() {
            self.budget.lock().charge(self.id, bytes, now);
        }
    }
}

impl Drop for BudgetMember {
    fn drop(&mut self) {
        // Whenever that is: giving back fills no bucket beyond what time has.
        self.budget.lock().remove(self.id, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_gone_when_it_is_dropped() {
        let rate = |rate| Some(HydrationRate::new(rate).unwrap());
        let budget = HydrationBudget::new(rate(1 << 20));
        let (one, other) = (budget.join(Priority::default(), None, Duration::ZERO), BudgetMember::alone());
        assert!(one.is_bound() && !other.is_bound());
        let second = |n| Duration::from_secs(n);
        assert!(matches!(one.request(ShardIndex(0), 4 << 20, Duration::ZERO), Answer::WaitUntil(_)));
        // Granted, and taken along: the bucket is deep in debt.
        assert_eq!(one.request(ShardIndex(0), 4 << 20, second(1)), Answer::Granted);
        let two = budget.join(Priority::default(), rate(1 << 30), second(1));
        assert!(matches!(two.request(ShardIndex(0), 4096, second(1)), Answer::WaitUntil(_)));
        drop(one);
        assert_eq!(two.request(ShardIndex(0), 4096, second(1) + Duration::from_millis(1)), Answer::Granted);
        assert_eq!(two.lowest_rate(), Some(1 << 20));
        budget.set_total_rate(None, second(2));
        assert_eq!(two.lowest_rate(), Some(1 << 30));
        two.set_rate(None, second(2));
        assert!(!two.is_bound());
        assert_eq!(two.request(ShardIndex(0), u64::MAX, second(2)), Answer::Granted);
    }
}
