//! The executor: runs one runnable task at a time, picked at random; when none is, time jumps to the next timer.

use super::Rng;
use super::report::{Group, Tally};
use crate::env::Env;
use crate::io_frontend::request::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// A run that needs more steps than this hangs.
const STEPS_MAX: u64 = 20_000_000;
/// A `block_on` that needs more virtual time than this hangs.
const BLOCKED_MAX: Duration = Duration::from_secs(3600);
/// The task that `block_on` drives.
const MAIN: u64 = 0;

struct Signal {
    id: u64,
    queued: AtomicBool,
    ready: Arc<Mutex<Vec<u64>>>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, SeqCst) {
            self.ready.lock().unwrap().push(self.id);
        }
    }
}

struct Task {
    future: LocalBoxFuture<'static, ()>,
    signal: Arc<Signal>,
}

struct Inner {
    seed: u64,
    rng: RefCell<Rng>,
    now: Cell<Duration>,
    tasks: RefCell<BTreeMap<u64, Option<Task>>>,
    next_id: Cell<u64>,
    ready: Arc<Mutex<Vec<u64>>>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    steps: Cell<u64>,
    hash: Cell<u64>,
    tally: RefCell<Tally>,
    traces: bool,
    /// Looks at the machine after every step.
    check: RefCell<Option<Rc<dyn Fn()>>>,
}

/// The simulated machine's executor and clock. Cheap to clone.
#[derive(Clone)]
pub struct Sim(Rc<Inner>);

impl Sim {
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(Inner {
            seed,
            rng: RefCell::new(Rng::new(seed)),
            now: Cell::default(),
            tasks: RefCell::default(),
            next_id: Cell::new(MAIN + 1),
            ready: Arc::default(),
            timers: RefCell::default(),
            steps: Cell::new(0),
            hash: Cell::new(0),
            tally: RefCell::default(),
            traces: std::env::var_os("HYDRANT_SIM_TRACE").is_some(),
            check: RefCell::default(),
        }))
    }

    pub fn now(&self) -> Duration {
        self.0.now.get()
    }
    /// Draws from the run's only source of randomness.
    pub fn draw<T>(&self, of: impl FnOnce(&mut Rng) -> T) -> T {
        of(&mut self.0.rng.borrow_mut())
    }
    /// Of everything that ran so far and when: equal for equal runs.
    pub fn schedule_hash(&self) -> u64 {
        self.0.hash.get()
    }
    /// Counts something of a kind that reports tell of.
    pub fn count(&self, group: Group, name: &str) {
        self.0.tally.borrow_mut().count(group, name);
    }
    /// What was counted so far.
    pub fn tally(&self) -> Tally {
        self.0.tally.borrow().clone()
    }
    /// A line of the trace, with the virtual time; `line` is called only when there is one.
    pub fn say(&self, line: impl FnOnce() -> String) {
        if self.0.traces {
            eprintln!("{:>14.6} {}", self.now().as_secs_f64(), line());
        }
    }
    /// `check` is called after every step of a task, until the next [`Self::kill_all`].
    pub fn check_each_step(&self, check: impl Fn() + 'static) {
        *self.0.check.borrow_mut() = Some(Rc::new(check));
    }

    pub fn timers(&self) -> usize {
        self.0.timers.borrow().len()
    }

    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let id = self.0.next_id.replace(self.0.next_id.get() + 1);
        let signal = Arc::new(Signal { id, queued: AtomicBool::new(false), ready: self.0.ready.clone() });
        signal.clone().wake();
        self.0.tasks.borrow_mut().insert(id, Some(Task { future: Box::pin(future), signal }));
    }

    pub fn sleep(&self, duration: Duration) -> Sleep {
        let seq = self.0.next_id.replace(self.0.next_id.get() + 1);
        Sleep { sim: self.clone(), key: (self.now() + duration, seq) }
    }

    /// Runs everything until `future` is ready. Panics when nothing can happen any more.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let inner = &*self.0;
        let signal = Arc::new(Signal { id: MAIN, queued: AtomicBool::new(false), ready: inner.ready.clone() });
        signal.clone().wake();
        let waker = Waker::from(signal.clone());
        let mut future = pin!(future);
        let started = self.now();
        loop {
            let Some(id) = self.next_ready() else {
                self.jump(started);
                continue;
            };
            inner.steps.set(inner.steps.get() + 1);
            assert!(inner.steps.get() < STEPS_MAX, "seed {}: no end", inner.seed);
            let mixed = inner.hash.get().rotate_left(5) ^ id ^ (self.now().as_nanos() as u64);
            inner.hash.set(mixed.wrapping_mul(0x2545_f491_4f6c_dd1d));
            if id == MAIN {
                signal.queued.store(false, SeqCst);
                if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return value;
                }
                continue;
            }
            let task = inner.tasks.borrow_mut().get_mut(&id).and_then(Option::take);
            let Some(mut task) = task else { continue };
            task.signal.queued.store(false, SeqCst);
            let waker = Waker::from(task.signal.clone());
            match task.future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(()) => {
                    inner.tasks.borrow_mut().remove(&id);
                }
                Poll::Pending => {
                    inner.tasks.borrow_mut().insert(id, Some(task));
                }
            }
            let check = inner.check.borrow().clone();
            if let Some(check) = check {
                check();
            }
        }
    }

    fn next_ready(&self) -> Option<u64> {
        let mut ready = self.0.ready.lock().unwrap();
        if ready.is_empty() {
            return None;
        }
        let pick = self.draw(|rng| rng.below(ready.len() as u64)) as usize;
        Some(ready.swap_remove(pick))
    }

    fn jump(&self, blocked_since: Duration) {
        let first = self.0.timers.borrow_mut().pop_first();
        let Some(((at, _), waker)) = first else { panic!("seed {}: deadlock at {:?}", self.0.seed, self.now()) };
        self.0.now.set(self.now().max(at));
        let blocked = self.now() - blocked_since;
        assert!(blocked < BLOCKED_MAX, "seed {}: nothing came of waiting for {blocked:?}", self.0.seed);
        waker.wake();
    }

    /// Lets everything else run for a while.
    pub fn run_for(&self, duration: Duration) {
        self.block_on(self.sleep(duration));
    }

    /// The machine loses power: every task is gone where it stands.
    pub fn kill_all(&self) {
        self.0.check.borrow_mut().take();
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        drop(tasks);
        // What dropped futures have woken or spawned is gone as well.
        let late = std::mem::take(&mut *self.0.tasks.borrow_mut());
        drop(late);
        self.0.ready.lock().unwrap().clear();
    }
}

/// The future of [`Sim::sleep`]; its timer is gone when it is dropped.
pub struct Sleep {
    sim: Sim,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.sim.now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.sim.0.timers.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.sim.0.timers.borrow_mut().remove(&self.key);
    }
}

impl Env for Sim {
    fn now(&self) -> Duration {
        Sim::now(self)
    }
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        Box::pin(Sim::sleep(self, duration))
    }
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        Sim::spawn(self, task);
    }
    fn spawn_background(&self, task: LocalBoxFuture<'static, ()>) {
        Sim::spawn(self, task);
    }
}
