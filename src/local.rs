//! Waiting between tasks of one thread: a oneshot, a semaphore, a notification, a queue.
//!
//! Independent of the executor (only `std::task`), so that the same code runs on glommio and in simulation.
//! Nothing here is `Send`: between shards, requests go over channels.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// One value from one task to another.
pub mod oneshot {
    use super::*;

    struct State<T> {
        value: Option<T>,
        waker: Option<Waker>,
        sender_gone: bool,
    }

    pub struct Sender<T>(Rc<RefCell<State<T>>>);
    /// Resolves to `None` when the sender was dropped without sending.
    pub struct Receiver<T>(Rc<RefCell<State<T>>>);

    pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let state = Rc::new(RefCell::new(State { value: None, waker: None, sender_gone: false }));
        (Sender(state.clone()), Receiver(state))
    }

    impl<T> Sender<T> {
        /// Delivers the value; lost when nobody waits any more.
        pub fn send(self, value: T) {
            self.0.borrow_mut().value = Some(value);
        }
    }
    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            let mut state = self.0.borrow_mut();
            state.sender_gone = true;
            let waker = state.waker.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
    impl<T> Future for Receiver<T> {
        type Output = Option<T>;
        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
            let mut state = self.0.borrow_mut();
            match state.value.take() {
                Some(value) => Poll::Ready(Some(value)),
                None if state.sender_gone => Poll::Ready(None),
                None => {
                    state.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        }
    }
}

pub mod latch;
pub use oneshot::channel as oneshot;

/// Counts something that goes on, while it lives.
pub struct Raised<'a>(&'a Cell<u64>);

impl<'a> Raised<'a> {
    pub fn new(count: &'a Cell<u64>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Permits, given out in order of asking.
pub struct Semaphore {
    total: u64,
    free: Cell<u64>,
    /// By ticket: how many, and who.
    waiting: RefCell<BTreeMap<u64, (u64, oneshot::Sender<Permit>)>>,
    next_ticket: Cell<u64>,
}

/// Permits taken from a [`Semaphore`]; given back when dropped.
pub struct Permit {
    semaphore: Rc<Semaphore>,
    count: u64,
}

impl Semaphore {
    pub fn new(permits: u64) -> Rc<Self> {
        Rc::new(Self {
            total: permits,
            free: Cell::new(permits),
            waiting: RefCell::default(),
            next_ticket: Cell::new(0),
        })
    }

    /// Waits for `count` permits (at most the total: a larger wish gets all of them, alone).
    pub async fn acquire(self: &Rc<Self>, count: u64) -> Permit {
        let count = count.min(self.total);
        if let Some(permit) = self.try_acquire(count) {
            return permit;
        }
        let (sender, receiver) = oneshot();
        let ticket = self.next_ticket.replace(self.next_ticket.get() + 1);
        self.waiting.borrow_mut().insert(ticket, (count, sender));
        let _place = Place { semaphore: self, ticket };
        receiver.await.expect("the queue of a semaphore is only dropped with it, and self is borrowed")
    }

    /// The permits, if they are free and nobody waits.
    pub fn try_acquire(self: &Rc<Self>, count: u64) -> Option<Permit> {
        let count = count.min(self.total);
        (self.waiting.borrow().is_empty() && self.free.get() >= count).then(|| self.take(count))
    }

    pub fn free(&self) -> u64 {
        self.free.get()
    }

    /// How many permits all who wait ask for together.
    pub fn wanted(&self) -> u64 {
        self.waiting.borrow().values().fold(0, |sum, (count, _)| sum.saturating_add(*count))
    }

    fn take(self: &Rc<Self>, count: u64) -> Permit {
        self.free.set(self.free.get() - count);
        Permit { semaphore: self.clone(), count }
    }

    fn give_back(self: &Rc<Self>, count: u64) {
        self.free.set(self.free.get() + count);
        self.give_out();
    }

    fn give_out(self: &Rc<Self>) {
        loop {
            let next = {
                let mut waiting = self.waiting.borrow_mut();
                match waiting.first_entry() {
                    Some(first) if first.get().0 <= self.free.get() => Some(first.remove()),
                    _ => None,
                }
            };
            let Some((count, sender)) = next else { break };
            // A waiter that is gone drops the permit, which comes back here.
            sender.send(self.take(count));
        }
    }
}

/// A place in the queue of a [`Semaphore`]; given up when dropped.
struct Place<'a> {
    semaphore: &'a Rc<Semaphore>,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let given_up = self.semaphore.waiting.borrow_mut().remove(&self.ticket);
        if given_up.is_some() {
            // Those behind it may want less.
            self.semaphore.give_out();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.semaphore.clone().give_back(self.count);
    }
}

/// "Something changed": wakes every present waiter; remembered once when there is none.
///
/// Allocates nothing, once it has had as many waiters: a driver of a ring waits for several with every turn.
#[derive(Default)]
pub struct Notify {
    pending: Cell<bool>,
    /// In the order of their ids: each is entered when its wait begins, and all are taken out together.
    waiting: RefCell<Vec<(u64, Waker)>>,
    next_id: Cell<u64>,
    epoch: Cell<u64>,
}

impl Notify {
    pub fn notify(&self) {
        self.epoch.set(self.epoch.get() + 1);
        let mut waiting = self.waiting.take();
        self.pending.set(waiting.is_empty());
        waiting.drain(..).for_each(|(_, waker)| waker.wake());
        // The memory is for those who come, unless somebody came already.
        let mut now = self.waiting.borrow_mut();
        if now.is_empty() {
            *now = waiting;
        }
    }

    /// Returns at once when a notification is pending. A wait may be given up: a notification that it would have
    /// taken is not lost.
    pub async fn notified(&self) {
        if self.pending.take() {
            return;
        }
        let id = self.next_id.replace(self.next_id.get() + 1);
        let mut wait = Waiting { notify: self, id, epoch: self.epoch.get(), taken: false };
        poll_fn(|cx| {
            if self.epoch.get() != wait.epoch {
                wait.taken = true;
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            match waiting.binary_search_by_key(&wait.id, |(id, _)| *id) {
                Ok(at) => waiting[at].1.clone_from(cx.waker()),
                Err(at) => waiting.insert(at, (wait.id, cx.waker().clone())),
            }
            Poll::Pending
        })
        .await
    }
}

/// A place in a [`Notify`]'s list.
struct Waiting<'a> {
    notify: &'a Notify,
    id: u64,
    epoch: u64,
    taken: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.taken {
            // The notification has taken it out of the list.
            return;
        }
        if self.notify.epoch.get() != self.epoch {
            self.notify.pending.set(true);
            return;
        }
        let mut waiting = self.notify.waiting.borrow_mut();
        if let Ok(at) = waiting.binary_search_by_key(&self.id, |(id, _)| *id) {
            waiting.remove(at);
        }
    }
}

/// A queue with one consumer. Bounded by its users (say by a [`Semaphore`]).
pub struct Queue<T> {
    items: RefCell<VecDeque<T>>,
    waker: RefCell<Option<Waker>>,
    closed: Cell<bool>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { items: RefCell::default(), waker: RefCell::default(), closed: Cell::new(false) }
    }
}

impl<T> Queue<T> {
    /// Appends; an item pushed after `close` is dropped.
    pub fn push(&self, item: T) {
        if !self.closed.get() {
            self.items.borrow_mut().push_back(item);
            self.wake();
        }
    }
    /// The next item; `None` when the queue is closed and empty.
    pub async fn pop(&self) -> Option<T> {
        poll_fn(|cx| match self.items.borrow_mut().pop_front() {
            Some(item) => Poll::Ready(Some(item)),
            None if self.closed.get() => Poll::Ready(None),
            None => {
                *self.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }
    pub fn try_pop(&self) -> Option<T> {
        self.items.borrow_mut().pop_front()
    }
    pub fn close(&self) {
        self.closed.set(true);
        self.wake();
    }
    pub fn len(&self) -> usize {
        self.items.borrow().len()
    }
    pub fn is_empty(&self) -> bool {
        self.items.borrow().is_empty()
    }
    fn wake(&self) {
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Drives all futures to their end and returns their results in order. For a handful of them: every wake polls
/// all that are unfinished.
pub async fn join_all<'a, T: 'a>(futures: Vec<Pin<Box<dyn Future<Output = T> + 'a>>>) -> Vec<T> {
    let mut slots: Vec<(Option<_>, Option<T>)> = futures.into_iter().map(|f| (Some(f), None)).collect();
    poll_fn(move |cx| {
        let mut pending = false;
        for (future, result) in &mut slots {
            if let Some(running) = future {
                match running.as_mut().poll(cx) {
                    Poll::Ready(value) => {
                        *result = Some(value);
                        *future = None;
                    }
                    Poll::Pending => pending = true,
                }
            }
        }
        match pending {
            true => Poll::Pending,
            false => Poll::Ready(slots.iter_mut().filter_map(|(_, result)| result.take()).collect()),
        }
    })
    .await
}

/// Drives the futures that `work` makes, at most `max` at a time, and returns their results in order. A future is
/// made when it is its turn: what it looks at may have changed since `work` was put together.
pub async fn join_some<F: Future>(work: impl Iterator<Item = F>, max: usize) -> Vec<F::Output> {
    let mut work = work.fuse();
    let mut running: Vec<(usize, Pin<Box<F>>)> = Vec::new();
    let mut results: Vec<Option<F::Output>> = Vec::new();
    poll_fn(|cx| {
        let mut poll_one = |at: usize, future: &mut Pin<Box<F>>, results: &mut Vec<Option<F::Output>>| {
            let Poll::Ready(value) = future.as_mut().poll(cx) else { return true };
            results[at] = Some(value);
            false
        };
        running.retain_mut(|(at, future)| poll_one(*at, future, &mut results));
        while running.len() < max.max(1) {
            let Some(future) = work.next() else { break };
            let (at, mut future) = (results.len(), Box::pin(future));
            results.push(None);
            if poll_one(at, &mut future, &mut results) {
                running.push((at, future));
            }
        }
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once, zip};
    use std::pin::pin;

    #[test]
    fn oneshot_delivers_or_tells_that_it_will_not() {
        block_on(async {
            let (tx, rx) = oneshot();
            tx.send(5);
            assert_eq!(rx.await, Some(5));
            let (tx, rx) = oneshot::<u8>();
            drop(tx);
            assert_eq!(rx.await, None);
        });
    }

    #[test]
    fn semaphore_is_fair_and_survives_cancelled_waiters() {
        block_on(async {
            let semaphore = Semaphore::new(4);
            let all = semaphore.acquire(100).await;
            let mut large = Box::pin(semaphore.acquire(3));
            let mut gone = Box::pin(semaphore.acquire(1));
            let mut small = Box::pin(semaphore.acquire(1));
            assert!(poll_once(&mut large).await.is_none());
            assert!(poll_once(&mut gone).await.is_none());
            assert!(poll_once(&mut small).await.is_none());
            drop(gone);
            drop(all);
            let (large, small) = zip(large, small).await;
            assert_eq!(semaphore.free(), 0);
            assert!(semaphore.try_acquire(1).is_none());
            drop((large, small));
            assert_eq!(semaphore.free(), 4);
        });
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_the_queue_of_a_semaphore() {
        block_on(async {
            let semaphore = Semaphore::new(4);
            let three = semaphore.acquire(3).await;
            let mut large = Box::pin(semaphore.acquire(2));
            let mut small = Box::pin(semaphore.acquire(1));
            assert!(poll_once(&mut large).await.is_none());
            assert!(poll_once(&mut small).await.is_none());
            assert_eq!(semaphore.wanted(), 3);
            drop(large);
            assert_eq!(semaphore.wanted(), 0, "the small one has its permit");
            drop((poll_once(&mut small).await.unwrap(), three));
            assert_eq!(semaphore.free(), 4);
        });
    }

    #[test]
    fn notify_is_remembered_once() {
        block_on(async {
            let notify = Notify::default();
            notify.notify();
            notify.notify();
            notify.notified().await;
            let mut again = Box::pin(notify.notified());
            assert!(poll_once(&mut again).await.is_none());
            notify.notify();
            assert!(poll_once(&mut again).await.is_some());
        });
    }

    #[test]
    fn a_notification_wakes_who_still_waits_and_keeps_its_memory() {
        block_on(async {
            let notify = Notify::default();
            let mut waits: Vec<_> = (0..5).map(|_| Box::pin(notify.notified())).collect();
            for wait in &mut waits {
                assert!(poll_once(&mut *wait).await.is_none());
            }
            // Polled once more, without a notification, each is still there once.
            assert!(poll_once(&mut waits[3]).await.is_none());
            assert_eq!(notify.waiting.borrow().len(), 5);
            drop(waits.remove(1));
            assert_eq!(notify.waiting.borrow().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 2, 3, 4]);
            let memory = notify.waiting.borrow().as_ptr();
            notify.notify();
            for wait in waits {
                wait.await;
            }
            assert!(!notify.pending.get());
            // The next wait takes none from the allocator.
            assert!(poll_once(pin!(notify.notified())).await.is_none());
            assert_eq!(notify.waiting.borrow().as_ptr(), memory);
        });
    }

    #[test]
    fn a_given_up_wait_leaves_its_notification_to_the_next() {
        block_on(async {
            let notify = Notify::default();
            let mut gone = Box::pin(notify.notified());
            assert!(poll_once(&mut gone).await.is_none());
            drop(gone);
            notify.notify();
            notify.notified().await;
            let mut late = Box::pin(notify.notified());
            assert!(poll_once(&mut late).await.is_none());
            notify.notify();
            drop(late);
            notify.notified().await;
            assert!(notify.waiting.borrow().is_empty());
        });
    }

    #[test]
    fn join_some_keeps_to_its_limit_and_the_order() {
        block_on(async {
            let (running, most) = (Cell::new(0u32), Cell::new(0u32));
            let work = (0..100u64).map(|i| {
                let (running, most) = (&running, &most);
                async move {
                    running.set(running.get() + 1);
                    most.set(most.get().max(running.get()));
                    for _ in 0..i % 7 {
                        futures_lite::future::yield_now().await;
                    }
                    running.set(running.get() - 1);
                    i
                }
            });
            assert_eq!(join_some(work, 8).await, (0..100).collect::<Vec<_>>());
            assert_eq!(most.get(), 8);
        });
    }

    #[test]
    fn queue_ends_after_close() {
        block_on(async {
            let queue = Queue::default();
            queue.push(1);
            queue.close();
            queue.push(2);
            assert_eq!(queue.pop().await, Some(1));
            assert_eq!(queue.pop().await, None);
        });
    }
}
