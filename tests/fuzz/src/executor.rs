//! An executor with a ring, for targets whose code does I/O: a thread of its own, made once, since that takes longer than
//! an input does.

use super::meter::{self, Usage};
use futures_lite::FutureExt;
use futures_lite::future::or;
use glommio::LocalExecutorBuilder;
use hydrant::dma_buf::DmaBuf;
use hydrant::env::Env;
use hydrant::env::glommio::GlommioEnv;
use hydrant::io_frontend::request::LocalBoxFuture;
use hydrant::net::Stream;
use hydrant::ring::{Bell, Ring};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// An input that is not done with by then hangs.
const TIME_MAX: Duration = Duration::from_secs(8);

type Job = Box<dyn FnOnce(Rc<dyn Env>) -> LocalBoxFuture<'static, ()> + Send>;
type Done = std::thread::Result<Usage>;

struct Executor {
    bell: Arc<Bell>,
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

fn start() -> Mutex<Executor> {
    let (jobs, to_do) = channel();
    let (ended, done) = channel();
    let bell = Bell::new().expect("a bell");
    let heard = bell.clone();
    std::thread::spawn(move || {
        let executor = LocalExecutorBuilder::default().io_memory(1 << 20).make().expect("an executor");
        executor.run(work_off(heard, to_do, ended));
    });
    Mutex::new(Executor { bell, jobs, done })
}

async fn work_off(bell: Arc<Bell>, to_do: Receiver<Job>, ended: Sender<Done>) {
    let ring = Ring::start_with(bell).expect("a ring");
    let env: Rc<dyn Env> = Rc::new(GlommioEnv::new());
    loop {
        while let Ok(job) = to_do.try_recv() {
            let too_long = async {
                env.sleep(TIME_MAX).await;
                panic!("no end after {TIME_MAX:?}")
            };
            meter::begin();
            let result = AssertUnwindSafe(or(job(env.clone()), too_long)).catch_unwind().await;
            let usage = meter::end();
            if ended.send(result.map(|()| usage)).is_err() {
                return;
            }
        }
        ring.rung().await;
    }
}

/// Drives `work` to its end on the executor; panics when it does, or takes too long. What it costs is counted as this
/// thread's.
pub fn run<F: Future<Output = ()> + 'static>(work: impl FnOnce(Rc<dyn Env>) -> F + Send + 'static) {
    static EXECUTOR: OnceLock<Mutex<Executor>> = OnceLock::new();
    let executor = EXECUTOR.get_or_init(start).lock().unwrap_or_else(PoisonError::into_inner);
    executor.jobs.send(Box::new(|env| Box::pin(work(env)))).expect("the executor runs");
    executor.bell.ring();
    match executor.done.recv().expect("the executor runs") {
        Ok(usage) => meter::charge(usage),
        Err(panic) => resume_unwind(panic),
    }
}

/// Everything that comes, until the peer ends the stream or the connection breaks; at most `max` bytes.
pub async fn receive_all(stream: &Stream, max: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while let Ok((count, buf)) = stream.recv(DmaBuf::new(16 << 10), 0).await {
        if count == 0 {
            break;
        }
        all.extend_from_slice(&buf[..count]);
        assert!(all.len() <= max, "more than {max} bytes came");
    }
    all
}
