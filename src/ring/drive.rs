//! Driving a ring: who submits, who waits, and when the thread may sleep.
//!
//! glommio sleeps in its own rings, at some ten system calls for every time it does; and when its preemption timer
//! has fired before the first task of a turn, it sleeps in spite of runnable tasks. So it is not let to: a task of
//! the lowest priority, the driver, sleeps in *our* ring instead, as soon as nothing else can run.
//!
//! That nothing can run is found by asking: a probe in each task queue wakes the driver when it has run. Queues are
//! first in, first out, so all that was runnable before has run too; and if in a whole round nothing ran but the
//! probes and the driver, and the driver itself found nothing to wake, then nothing is runnable. What could change
//! that from outside wakes the ring: completions, timers (those of [`Ring::sleep`]), other threads by the [`Bell`].
//!
//! Invariants:
//! * Nothing on such an executor waits for glommio's own I/O, timers, channels or blocking pool without a bound: they
//!   are looked at only between two sleeps, each at most [`SLEEP_MAX`].
//! * Whoever rings the bell either finds the driver awake and about to look, or wakes it.

use super::Ring;
use super::watch::Watched;
use crate::dma_buf::DmaBuf;
use crate::local::{Notify, Semaphore};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The longest sleep: whatever this file has overlooked costs this much and no more.
const SLEEP_MAX: Duration = Duration::from_millis(500);
/// So often in a row the thread sleeps without a look at glommio, when only sinks had anything to do.
const SLEEPS_IN_A_ROW: usize = 64;
/// Tasks that a round without any work runs: the driver and two probes.
const TASKS_OF_QUIET_ROUND: u64 = 3;
/// Threads of [`Ring::blocking`] at a time; more jobs wait.
const BLOCKING_THREADS_MAX: u64 = 4;
/// Wakes a ring's executor from any thread.
pub struct Bell {
    rung: AtomicBool,
    /// `asleep`: the driver sleeps, or is about to look at `rung` for the last time before it does.
    watched: Arc<Watched>,
    event: OwnedFd,
}

impl Bell {
    pub fn new() -> io::Result<Arc<Bell>> {
        Ok(Arc::new(Bell { rung: AtomicBool::new(false), watched: Arc::default(), event: eventfd()? }))
    }

    /// [`Ring::rung`] returns on the ring's executor, soon.
    pub fn ring(&self) {
        // Sequentially consistent, as in `sleep`: one of the two sees what the other has stored.
        self.rung.store(true, SeqCst);
        if self.watched.asleep.swap(false, SeqCst) {
            signal(&self.event);
        }
    }
}

pub(super) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) } {
        fd if fd < 0 => Err(io::Error::last_os_error()),
        // SAFETY: just made, and owned by nobody else.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

pub(super) fn signal(event: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes eight bytes of a live array to our own eventfd. It can't fail: nobody adds up to 2^64.
    unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// What the driver keeps.
pub(super) struct Drive {
    bell: Arc<Bell>,
    rung: Notify,
    probes: [Notify; 2],
    probes_left: Cell<usize>,
    round_ended: Notify,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next_timer: Cell<u64>,
    blocking: Rc<Semaphore>,
    /// How long to look for something to do before the thread sleeps.
    spin: Cell<Duration>,
}

impl Drive {
    pub fn new(bell: Arc<Bell>) -> Self {
        Self {
            bell,
            rung: Notify::default(),
            probes: Default::default(),
            probes_left: Cell::new(0),
            round_ended: Notify::default(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            blocking: Semaphore::new(BLOCKING_THREADS_MAX),
            spin: Cell::default(),
        }
    }

    /// Wakes whom timers and the bell are for; returns whether there was anybody.
    fn deliver(&self) -> bool {
        let mut found = false;
        if self.bell.rung.swap(false, SeqCst) {
            self.rung.notify();
            found = true;
        }
        while self.timers.borrow().first_key_value().is_some_and(|((at, _), _)| *at <= Instant::now()) {
            let due = self.timers.borrow_mut().pop_first();
            due.into_iter().for_each(|(_, waker)| waker.wake());
            found = true;
        }
        found
    }

    fn sleep_max(&self) -> Duration {
        let first = self.timers.borrow().first_key_value().map(|((at, _), _)| *at);
        first.map_or(SLEEP_MAX, |at| at.saturating_duration_since(Instant::now()).min(SLEEP_MAX))
    }

    pub fn stop(&self) {
        self.bell.watched.end();
        self.probes.iter().for_each(Notify::notify);
        self.round_ended.notify();
    }
}

impl Ring {
    /// Starts the tasks that drive this ring.
    pub(super) fn start_driving(self: &Rc<Self>) {
        let ring = self.clone();
        glommio::spawn_local(async move { ring.submit_task().await }).detach();
        let ring = self.clone();
        glommio::spawn_local(async move { ring.bell_task().await }).detach();
        let watched = self.drive.bell.watched.clone();
        watched.begin();
        let ring = self.clone();
        glommio::spawn_local(std::future::poll_fn(move |cx| match ring.stopping.get() {
            true => Poll::Ready(()),
            false => {
                watched.set_waker(cx.waker().clone());
                Poll::Pending
            }
        }))
        .detach();
        let lowest =
            glommio::executor().create_task_queue(glommio::Shares::Static(1), glommio::Latency::NotImportant, "ring");
        let ring = self.clone();
        glommio::spawn_local(async move { ring.probe_task(0).await }).detach();
        let (prober, driver) = (self.clone(), self.clone());
        let started =
            glommio::spawn_local_into(async move { prober.probe_task(1).await }, self.background).and_then(|probe| {
                Ok((probe, glommio::spawn_local_into(async move { driver.drive_task().await }, lowest)?))
            });
        let (probe, drive) = started.expect("the queues were just made");
        probe.detach();
        drive.detach();
    }

    async fn submit_task(self: Rc<Self>) {
        while !self.stopping.get() {
            self.submit.notified().await;
            self.submit_pending.set(false);
            self.enter();
            self.reap();
        }
    }

    async fn probe_task(self: Rc<Self>, which: usize) {
        loop {
            self.drive.probes[which].notified().await;
            if self.stopping.get() {
                return;
            }
            self.drive.probes_left.set(self.drive.probes_left.get() - 1);
            if self.drive.probes_left.get() == 0 {
                self.drive.round_ended.notify();
            }
        }
    }

    async fn drive_task(self: Rc<Self>) {
        let mut found = true;
        while !self.stopping.get() {
            self.drive.bell.watched.alive();
            // The count starts at zero again with every call.
            let executed = glommio::executor().executor_stats().tasks_executed();
            let woke = self.drain().woke;
            let woke = self.drive.deliver() || woke;
            let can_run = found || woke || executed > TASKS_OF_QUIET_ROUND;
            found = match can_run {
                // Which submits, too, what sinks have started.
                false => self.sleep_in_ring(),
                true => self.submit_queued() || woke,
            };
            self.drive.probes_left.set(self.drive.probes.len());
            self.drive.probes.iter().for_each(Notify::notify);
            self.drive.round_ended.notified().await;
        }
    }

    /// Hands to the kernel what is queued, and takes what has completed; returns whether that woke anybody.
    fn submit_queued(&self) -> bool {
        let has_queued = !self.inner.borrow_mut().uring.submission().is_empty();
        if has_queued {
            self.enter();
        }
        self.reap().woke
    }

    /// An idle executor looks for something to do this long before it sleeps: less latency for CPU time. Zero at first.
    pub fn set_spin(&self, spin: Duration) {
        self.drive.spin.set(spin);
    }

    /// Looks for something to do without sleeping; returns whether it woke anybody.
    fn spin(&self) -> bool {
        let spin = self.drive.spin.get();
        if spin.is_zero() {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < spin {
            let woke = self.submit_queued();
            if self.drive.deliver() || woke {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Sleeps until something completes, a timer is due or the bell rings; returns whether it woke anybody.
    fn sleep_in_ring(&self) -> bool {
        if self.spin() {
            return true;
        }
        let bell = &self.drive.bell;
        for _ in 0..SLEEPS_IN_A_ROW {
            bell.watched.asleep.store(true, SeqCst);
            if !bell.rung.load(SeqCst) {
                let began = Instant::now();
                self.wait(self.drive.sleep_max());
                self.load.parked(began, Instant::now());
            }
            bell.watched.asleep.store(false, SeqCst);
            let reaped = self.drain();
            let delivered = self.drive.deliver();
            if delivered || reaped.woke || !reaped.any {
                return delivered || reaped.woke;
            }
            // Only sinks were told: there is still nothing that can run, and what they have started goes with the next wait.
            bell.watched.alive();
        }
        false
    }

    /// Turns the bell into a completion.
    async fn bell_task(self: Rc<Self>) {
        let event = match self.drive.bell.event.try_clone() {
            Ok(event) => Rc::new(event),
            Err(error) => {
                log::error!("the bell of a shard can't be heard: {error}");
                std::process::abort();
            }
        };
        while !self.closing.get() {
            if let (Err(error), _) = self.read(&event, DmaBuf::new(8), u64::MAX).await
                && error.raw_os_error() != Some(libc::EINTR)
            {
                if error.raw_os_error() != Some(libc::ECANCELED) {
                    log::error!("the bell of a shard can't be heard: {error}");
                    std::process::abort();
                }
                return;
            }
        }
    }

    /// Returns when the bell was rung since the last return. For one task.
    pub async fn rung(&self) {
        self.drive.rung.notified().await;
    }

    /// Waits. Dropped: the timer is gone.
    pub fn sleep(self: &Rc<Self>, duration: Duration) -> Sleep {
        let number = self.drive.next_timer.replace(self.drive.next_timer.get() + 1);
        Sleep { ring: self.clone(), key: (Instant::now() + duration, number) }
    }

    /// Runs `job` on a thread of its own, for system calls that may take long and that the ring has not.
    pub async fn blocking<T: Send + 'static>(
        self: &Rc<Self>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let _turn = self.drive.blocking.acquire(1).await;
        self.on_thread("blocking", job).await
    }

    /// As [`Self::blocking`], but at once: for the few calls that may wait for what others of that kind do.
    pub async fn on_thread<T: Send + 'static>(
        self: &Rc<Self>,
        name: &str,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let event = eventfd()?;
        let (done, kept) = (Arc::new(event.try_clone()?), Rc::new(event));
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            /// Signals however the job ends.
            struct Signal(Arc<OwnedFd>);
            impl Drop for Signal {
                fn drop(&mut self) {
                    signal(&self.0);
                }
            }
            let _signal = Signal(done);
            job()
        })?;
        loop {
            match self.read(&kept, DmaBuf::new(8), u64::MAX).await.0 {
                Ok(_) => break,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        thread.join().map_err(|_| io::Error::other("internal error"))
    }
}

/// A timer of [`Ring::sleep`].
pub struct Sleep {
    ring: Rc<Ring>,
    key: (Instant, u64),
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut timers = self.ring.drive.timers.borrow_mut();
        if self.key.0 <= Instant::now() {
            timers.remove(&self.key);
            return Poll::Ready(());
        }
        timers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.ring.drive.timers.borrow_mut().remove(&self.key);
    }
}
