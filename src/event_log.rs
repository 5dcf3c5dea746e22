//! The log of events of a daemon: written on any shard, waited for on one.
//!
//! [`EventLog`] is shared by all shards and outlives the clones; [`CloneEvents`] is one clone's pen. Whoever raises an
//! event rings the bell that the log was made with; what it is connected to wakes the [`Feed`], on the executor of
//! those who wait. Nobody waits under a lock, and nothing here is on the path of data.

use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{Event, EventKind, Kept, Page};
use crate::local::Notify;
use futures_lite::future::or;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Wakes those who wait, from any thread.
pub type Bell = Box<dyn Fn() + Send + Sync>;

/// All events of a daemon.
pub struct EventLog {
    instance: String,
    bell: Bell,
    kept: Mutex<Kept>,
}

impl EventLog {
    /// `instance` differs from that of every other log: numbers of one mean nothing to another.
    pub fn new(instance: impl Into<String>, bell: Bell) -> Arc<Self> {
        Arc::new(Self { instance: instance.into(), bell, kept: Mutex::default() })
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }
    pub fn last(&self) -> u64 {
        self.kept().last()
    }
    /// Whether there are events of the clone `name`.
    pub fn knows(&self, name: &str) -> bool {
        self.kept().knows(name)
    }
    /// What follows event number `after`.
    pub fn after(&self, after: u64, clone: Option<&str>) -> Page {
        self.kept().after(after, clone)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing that could panic half-way runs under the lock.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many events a clone had.
#[derive(Clone, Default, Debug)]
pub struct EventCounts {
    /// All of them.
    pub all: u64,
    /// dm's event number: [`EventKind::is_dm`].
    pub dm: u64,
    pub last: Option<Event>,
}

/// The events of one clone, from its start to its end. Another clone of the same name has its own.
pub struct CloneEvents {
    log: Arc<EventLog>,
    name: String,
    counts: Mutex<EventCounts>,
    /// Everything is hydrated and durable.
    complete: AtomicBool,
    /// The clone is on its way out.
    ending: AtomicBool,
}

impl CloneEvents {
    pub fn new(log: &Arc<EventLog>, name: impl Into<String>) -> Arc<Self> {
        Arc::new(Self {
            log: log.clone(),
            name: name.into(),
            counts: Mutex::default(),
            complete: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        })
    }

    /// Records an event, writes it to the program's log and wakes those who wait for one.
    pub fn raise(&self, kind: EventKind, text: impl Into<String>) {
        let text = text.into();
        log::info!("clone '{}': {text}", self.name);
        self.record(kind, text);
    }

    /// The same for what the program's log has, or gets, in other words.
    pub fn record(&self, kind: EventKind, text: impl Into<String>) {
        let text = text.into();
        let mut counts = self.counts();
        counts.all += 1;
        counts.dm += u64::from(kind.is_dm());
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_unix_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut event = Event { seq: 0, clone: self.name.clone(), nr: counts.all, time_unix_ms, kind, text };
        // In the same order in both.
        event.seq = self.log.kept().push(event.clone());
        counts.last = Some(event);
        drop(counts);
        (self.log.bell)();
    }

    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn count(&self) -> EventCounts {
        self.counts().clone()
    }
    pub fn is_complete(&self) -> bool {
        self.complete.load(Acquire)
    }
    /// Nobody needs to wait for this clone's completion any more.
    pub fn set_complete(&self) {
        self.complete.store(true, Release);
        (self.log.bell)();
    }
    /// The clone has grown: there is something to wait for again.
    pub fn set_incomplete(&self) {
        self.complete.store(false, Release);
    }
    /// Whoever waits for an event of this clone is told that it ends.
    pub fn set_ending(&self) {
        self.ending.store(true, Release);
        (self.log.bell)();
    }
    pub fn is_ending(&self) -> bool {
        self.ending.load(Acquire)
    }

    fn counts(&self) -> MutexGuard<'_, EventCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log as it is waited for, on one executor.
pub struct Feed {
    log: Arc<EventLog>,
    changed: Notify,
    closed: Cell<bool>,
}

impl Feed {
    pub fn new(log: Arc<EventLog>) -> Rc<Self> {
        Rc::new(Self { log, changed: Notify::default(), closed: Cell::new(false) })
    }

    pub fn log(&self) -> &Arc<EventLog> {
        &self.log
    }

    /// To be called after the log's bell was rung, on this executor.
    pub fn wake(&self) {
        self.changed.notify();
    }

    /// The daemon ends: whoever waits gets an answer now, and nobody waits any more.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.notify();
    }

    /// What follows event number `after`: at once when there is something, else when there is, at last (then empty) after
    /// `time_max`. `Shutdown` when nothing will come any more.
    pub async fn after(&self, env: &dyn Env, after: u64, clone: Option<&str>, time_max: Duration) -> Result<Page> {
        let (mut page, mut lost) = (self.log.after(after, clone), 0);
        let deadline = env.now().saturating_add(time_max);
        while page.events.is_empty() && env.now() < deadline {
            self.check_open()?;
            self.changed_before(env, deadline).await;
            // What others did meanwhile is not looked at again.
            lost += page.lost;
            page = self.log.after(page.last, clone);
        }
        page.lost += lost;
        Ok(page)
    }

    /// Waits until dm's event number of a clone is greater than `nr`, or the clone is complete, or `time_max` is over.
    /// `Shutdown` when the clone ends before.
    pub async fn dm_event(&self, env: &dyn Env, clone: &CloneEvents, nr: u64, time_max: Duration) -> Result<()> {
        let deadline = env.now().saturating_add(time_max);
        while !clone.is_complete() && clone.count().dm <= nr {
            if clone.is_ending() {
                let text = format!("clone '{}' is going down or was not started", clone.name());
                return Err(Error::new(ErrorKind::Shutdown, text));
            }
            self.check_open()?;
            if env.now() >= deadline {
                break;
            }
            self.changed_before(env, deadline).await;
        }
        Ok(())
    }

    fn check_open(&self) -> Result<()> {
        match self.closed.get() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Shutdown, "the daemon is going down")),
        }
    }

    async fn changed_before(&self, env: &dyn Env, deadline: Duration) {
        or(self.changed.notified(), env.sleep(deadline.saturating_sub(env.now()))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::executor::Sim;
    use std::cell::RefCell;

    /// Who was woken, when, with how many events.
    type Woken = Vec<(&'static str, Duration, usize)>;

    /// A log whose bell is heard by a feed after a moment, as across threads.
    fn feed(sim: &Sim) -> Rc<Feed> {
        let rung = Arc::new(AtomicBool::new(false));
        let ringing = rung.clone();
        let feed = Feed::new(EventLog::new("i", Box::new(move || ringing.store(true, SeqCst))));
        let (waking, clock) = (feed.clone(), sim.clone());
        sim.spawn(async move {
            loop {
                clock.sleep(Duration::from_micros(50)).await;
                if rung.swap(false, SeqCst) {
                    waking.wake();
                }
            }
        });
        feed
    }

    #[test]
    fn counts_all_events_and_those_of_dm() {
        let log = EventLog::new("i", Box::new(|| {}));
        let (a, b) = (CloneEvents::new(&log, "a"), CloneEvents::new(&log, "b"));
        a.raise(EventKind::Created, "created");
        b.raise(EventKind::Created, "created");
        a.raise(EventKind::HydrationStarted, "started");
        a.raise(EventKind::ReadOnly, "ro");
        a.raise(EventKind::Failed, "Fail");
        let counts = a.count();
        assert_eq!((counts.all, counts.dm, counts.last.map(|event| (event.seq, event.nr))), (4, 2, Some((5, 4))));
        assert_eq!((b.count().all, b.count().dm), (1, 0));
        let numbers: Vec<_> = log.after(0, Some("a")).events.iter().map(|event| (event.seq, event.nr)).collect();
        assert_eq!(numbers, [(1, 1), (3, 2), (4, 3), (5, 4)]);
        // The log outlives the clone; its namesake counts anew.
        drop(a);
        let again = CloneEvents::new(&log, "a");
        again.raise(EventKind::Created, "created");
        assert_eq!(log.after(5, Some("a")).events[0].nr, 1);
    }

    #[test]
    fn everybody_who_waits_is_woken_by_what_he_waits_for() {
        for seed in 0..20 {
            let sim = Sim::new(seed);
            let feed = feed(&sim);
            let (a, b) = (CloneEvents::new(feed.log(), "a"), CloneEvents::new(feed.log(), "b"));
            let woken: Rc<RefCell<Woken>> = Rc::default();
            for (who, clone) in [("all", None), ("a", Some("a")), ("b", Some("b")), ("all too", None)] {
                let (feed, clock, woken) = (feed.clone(), sim.clone(), woken.clone());
                sim.spawn(async move {
                    let page = feed.after(&clock, 0, clone, Duration::from_secs(10)).await.unwrap();
                    woken.borrow_mut().push((who, clock.now(), page.events.len()));
                });
            }
            let completion = {
                let (feed, clock, woken, b) = (feed.clone(), sim.clone(), woken.clone(), b.clone());
                async move {
                    feed.dm_event(&clock, &b, 0, Duration::from_secs(100)).await.unwrap();
                    woken.borrow_mut().push(("dm", clock.now(), 0));
                }
            };
            sim.spawn(completion);
            sim.run_for(Duration::from_secs(1));
            assert!(woken.borrow().is_empty());
            a.raise(EventKind::Created, "x");
            sim.run_for(Duration::from_secs(1));
            let mut names: Vec<_> = woken.take().into_iter().map(|(who, _, events)| (who, events)).collect();
            names.sort();
            assert_eq!(names, [("a", 1), ("all", 1), ("all too", 1)]);
            // Nothing of b: an empty answer when the time is over, at that time.
            sim.run_for(Duration::from_secs(9));
            let timed_out = woken.take();
            assert!(matches!(timed_out[..], [("b", at, 0)] if at >= Duration::from_secs(10)), "{timed_out:?}");
            b.raise(EventKind::HydrationStarted, "not dm's");
            sim.run_for(Duration::from_secs(1));
            assert!(woken.borrow().is_empty());
            b.raise(EventKind::HydrationCompleted, "done");
            sim.run_for(Duration::from_secs(1));
            assert_eq!(woken.take().len(), 1);
        }
    }

    #[test]
    fn nobody_waits_for_what_can_not_come() {
        let sim = Sim::new(1);
        let feed = feed(&sim);
        let clone = CloneEvents::new(feed.log(), "a");
        let hour = Duration::from_secs(3000);
        // Complete: whatever the number.
        clone.set_complete();
        sim.block_on(feed.dm_event(&sim, &clone, 7, hour)).unwrap();
        // The end of a clone, and of the daemon, in the middle of a wait.
        let clone = CloneEvents::new(feed.log(), "b");
        let (ending, closing, clock) = (clone.clone(), feed.clone(), sim.clone());
        sim.spawn(async move {
            clock.sleep(Duration::from_secs(1)).await;
            ending.set_ending();
            clock.sleep(Duration::from_secs(1)).await;
            closing.close();
        });
        let error = sim.block_on(feed.dm_event(&sim, &clone, 0, hour)).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Shutdown, "clone 'b' is going down or was not started")
        );
        let error = sim.block_on(feed.after(&sim, 0, None, hour)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shutdown);
        assert!(sim.now() < Duration::from_secs(3));
        // What is there is answered all the same.
        clone.raise(EventKind::Stopped, "stopped");
        assert_eq!(sim.block_on(feed.after(&sim, 0, None, hour)).unwrap().events.len(), 1);
        // And a question that does not want to wait.
        assert_eq!(sim.block_on(feed.after(&sim, 1, None, Duration::ZERO)).unwrap().events.len(), 0);
    }
}
