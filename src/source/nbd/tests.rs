//! The NBD source against real servers (nbdkit, qemu-nbd) as child processes, and against scripted hostile ones.

// Lists of holes may have one.
#![allow(clippy::single_range_in_vec_init)]

mod hostile;
mod outage;
mod reads;
mod servers;
mod start;

use super::*;
use crate::env::glommio::GlommioEnv;
use crate::local::join_all;
use crate::ring::Ring;
use crate::source::uri::SourceSpec;
use futures_lite::future::or;
use glommio::LocalExecutorBuilder;
use servers::Random;

/// No test lasts longer.
const TEST_TIME_MAX: Duration = Duration::from_secs(60);

/// Runs `test` on an executor of its own with a ring.
fn on_executor<F: Future<Output = ()> + 'static>(test: impl FnOnce(Rc<dyn Env>) -> F + Send + 'static) {
    LocalExecutorBuilder::default()
        .io_memory(256 << 10)
        .spawn(|| async move {
            let ring = Ring::start().unwrap();
            let env: Rc<dyn Env> = Rc::new(GlommioEnv::new());
            let late = async {
                env.sleep(TEST_TIME_MAX).await;
                panic!("the test takes longer than {TEST_TIME_MAX:?}");
            };
            or(test(env.clone()), late).await;
            ring.shutdown().await;
        })
        .unwrap()
        .join()
        .unwrap();
}

fn uri(text: &str) -> NbdUri {
    match text.parse() {
        Ok(SourceSpec::Nbd(uri)) => uri,
        other => panic!("{text}: {other:?}"),
    }
}

async fn connect(text: &str, options: NbdSourceOptions, env: &Rc<dyn Env>) -> NbdSource {
    NbdSource::connect(uri(text), options, env.clone()).await.unwrap()
}

/// Times short enough for tests.
fn quick() -> NbdSourceOptions {
    NbdSourceOptions {
        connect_timeout: Duration::from_millis(700),
        request_timeout: Duration::from_millis(500),
        source_timeout: Duration::from_millis(3000),
        ..NbdSourceOptions::default()
    }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// Reads `count` random ranges of up to `len_max` bytes, many at a time, and compares each with the truth.
async fn compare(source: &NbdSource, truth: &[u8], count: usize, len_max: u64, seed: u64) {
    let mut random = Random(seed);
    let size = truth.len() as u64;
    assert_eq!(source.size(), size);
    let mut ranges = vec![range(0, 1), range(size - 1, 1), range(0, size.min(len_max))];
    ranges.extend((0..count).map(|_| {
        let len = 1 + random.below(len_max.min(size));
        range(random.below(size - len + 1), len)
    }));
    for batch in ranges.chunks(100) {
        join_all(
            batch.iter().map(|range| Box::pin(compare_one(source, truth, *range)) as LocalBoxFuture<'_, ()>).collect(),
        )
        .await;
    }
}

async fn compare_one(source: &NbdSource, truth: &[u8], range: ByteRange) {
    let data = source.read(range).await.unwrap();
    assert!(data[..] == truth[range.start() as usize..range.end() as usize], "wrong data for {range}");
    assert_eq!(data.as_ptr() as usize % DMA_ALIGN, range.start() as usize % DMA_ALIGN, "{range} needs a copy");
}
