//! Wakes an executor from outside, from time to time.
//!
//! glommio 0.9.0 can go to sleep with tasks to run: when its preemption timer fires between its poll for I/O and its
//! first task, `run_task_queues` runs nothing and reports that there was nothing to run. If no timer or I/O is
//! pending then, the executor sleeps for ever. On a busy machine with a timer of a millisecond that happens within
//! minutes. A wake from another thread is the one event that does not depend on a task having run, so it bounds
//! the stall to [`PERIOD`].

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two wakes: the longest stall, against the cost of waking an idle executor.
const PERIOD: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// Wakes the executor that it was started on until it is dropped there.
pub struct Heartbeat {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts the waking thread for the current executor.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let task = shared.clone();
        glommio::spawn_local(poll_fn(move |cx| {
            if task.stop.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            if let Ok(mut waker) = task.waker.lock() {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        }))
        .detach();
        let beat = shared.clone();
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
            while !beat.stop.load(Ordering::Acquire) {
                std::thread::park_timeout(PERIOD);
                if let Some(waker) = beat.waker.lock().ok().and_then(|waker| waker.clone()) {
                    waker.wake();
                }
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It only panics when the process is beyond help.
            let _ = thread.join();
        }
        // The task keeps nothing but this; a waker must not outlive its executor on another thread.
        if let Ok(mut waker) = self.shared.waker.lock()
            && let Some(waker) = waker.take()
        {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The timer is so short that it often fires before the first task: without the heartbeat this hangs.
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
                    let _heartbeat = Heartbeat::start().unwrap();
                    for _ in 0..300 {
                        glommio::timer::sleep(Duration::from_micros(100)).await;
                    }
                });
            done.send(()).unwrap();
        });
        finished.recv_timeout(Duration::from_secs(60)).expect("the executor sleeps for ever");
    }
}
