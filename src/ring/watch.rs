//! The watch: wakes an executor that sleeps with work to do.
//!
//! glommio 0.9.0 can go to sleep with runnable tasks: when an event of its latency ring (say its preemption timer)
//! comes between its poll for I/O and its first task, `run_task_queues` runs nothing and reports that there was
//! nothing to run. A timer of its own is no cure, since the task that would arm it again may be the one that is not
//! run. So one thread looks at all drivers from outside: one that neither sleeps in its ring nor has gone on since
//! the last look is woken the way any other thread would wake it. On a machine that is short of processors this
//! was needed several times a minute.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

/// Between two looks while some executor is at work: the longest stall.
const PERIOD_BUSY: Duration = Duration::from_millis(5);
/// The same while all sleep in their rings: the longest stall of the first work after that.
const PERIOD_IDLE: Duration = Duration::from_millis(50);

/// One watched driver.
#[derive(Default)]
pub(super) struct Watched {
    /// It sleeps in its ring, as it should.
    pub asleep: AtomicBool,
    rounds: AtomicU64,
    waker: Mutex<Option<Waker>>,
}

static ALL: Mutex<Vec<Weak<Watched>>> = Mutex::new(Vec::new());
static THREAD: Once = Once::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that could panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watched {
    /// Starts the watch over a driver; it ends with [`Watched::end`], or when the value is dropped.
    pub fn begin(self: &Arc<Self>) {
        lock(&ALL).push(Arc::downgrade(self));
        THREAD.call_once(|| {
            let spawned = std::thread::Builder::new().name("watch".into()).spawn(watch);
            if let Err(error) = spawned {
                log::warn!("no thread to watch the shards: one may stall when the machine is busy: {error}");
            }
        });
    }

    /// The driver goes on.
    pub fn alive(&self) {
        self.rounds.fetch_add(1, SeqCst);
    }

    /// How to wake the executor: any task of it that does not mind.
    pub fn set_waker(&self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
    }

    /// The executor is about to end. On its own thread: the last of a waker must be dropped there.
    pub fn end(&self) {
        let waker = lock(&self.waker).take();
        drop(waker);
    }
}

fn watch() {
    let mut seen: Vec<(Weak<Watched>, u64)> = Vec::new();
    loop {
        for new in lock(&ALL).drain(..) {
            seen.push((new, u64::MAX));
        }
        let mut busy = false;
        seen.retain_mut(|(watched, before)| {
            let Some(watched) = watched.upgrade() else { return false };
            let rounds = watched.rounds.load(SeqCst);
            let asleep = watched.asleep.load(SeqCst);
            let went_on = std::mem::replace(before, rounds) != rounds;
            busy |= went_on || !asleep;
            if !asleep
                && !went_on
                && let Some(waker) = &*lock(&watched.waker)
            {
                waker.wake_by_ref();
            }
            true
        });
        std::thread::sleep(if busy { PERIOD_BUSY } else { PERIOD_IDLE });
    }
}

#[cfg(test)]
mod tests {
    use crate::ring::Ring;
    use std::time::Duration;

    /// The timer is so short that it often fires before the first task: without the watch this hangs.
    #[test]
    fn an_executor_that_falls_asleep_with_work_is_woken() {
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            glommio::LocalExecutorBuilder::default()
                .io_memory(256 << 10)
                .preempt_timer(Duration::from_micros(30))
                .make()
                .unwrap()
                .run(async {
                    let ring = Ring::start().unwrap();
                    for _ in 0..300 {
                        ring.sleep(Duration::from_micros(100)).await;
                    }
                    ring.shutdown().await;
                });
            done.send(()).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(60)).expect("the executor sleeps for ever");
    }
}
