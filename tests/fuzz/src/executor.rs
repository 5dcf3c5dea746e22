//! An executor with a ring, for targets whose code does I/O: made once for each thread, since that takes longer than an
//! input does.

use futures_lite::future::or;
use glommio::{LocalExecutor, LocalExecutorBuilder};
use hydrant::dma_buf::DmaBuf;
use hydrant::env::Env;
use hydrant::env::glommio::GlommioEnv;
use hydrant::net::Stream;
use hydrant::ring::Ring;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// An input that is not done with by then hangs.
const TIME_MAX: Duration = Duration::from_secs(8);

thread_local! {
    /// Never dropped: it is needed until the process ends.
    static EXECUTOR: Cell<Option<&'static LocalExecutor>> = const { Cell::new(None) };
}

fn executor() -> &'static LocalExecutor {
    EXECUTOR.get().unwrap_or_else(|| {
        let executor = LocalExecutorBuilder::default().io_memory(1 << 20).make().expect("an executor");
        let executor: &'static LocalExecutor = Box::leak(Box::new(executor));
        executor.run(async { Ring::start().map(drop).expect("a ring") });
        EXECUTOR.set(Some(executor));
        executor
    })
}

/// Drives `work` to its end; panics when that takes too long.
pub fn run<F: Future<Output = ()>>(work: impl FnOnce(Rc<dyn Env>) -> F) {
    executor().run(async {
        let env: Rc<dyn Env> = Rc::new(GlommioEnv::new());
        let too_long = async {
            env.sleep(TIME_MAX).await;
            panic!("no end after {TIME_MAX:?}")
        };
        or(work(env.clone()), too_long).await;
    });
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
