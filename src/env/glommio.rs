//! The environment on a glommio executor.

use super::Env;
use crate::io_frontend::request::LocalBoxFuture;
use glommio::{Latency, Shares, TaskQueueHandle};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The moment that [`Env::now`] counts from: one for all executors, so that shards can compare their times.
static START: OnceLock<Instant> = OnceLock::new();

/// Shares of the background queue, beside the default queue's 1000: when both have work, the background gets a
/// tenth of the processor; alone, all of it.
const BACKGROUND_SHARES: usize = 100;

/// Time and tasks of the current glommio executor.
pub struct GlommioEnv {
    background: TaskQueueHandle,
}

impl GlommioEnv {
    /// Call on the executor that it is to serve.
    pub fn new() -> Self {
        let background = glommio::executor().create_task_queue(
            Shares::Static(BACKGROUND_SHARES),
            Latency::NotImportant,
            "background",
        );
        START.get_or_init(Instant::now);
        Self { background }
    }
}

impl Default for GlommioEnv {
    fn default() -> Self {
        Self::new()
    }
}

impl Env for GlommioEnv {
    fn now(&self) -> Duration {
        START.get_or_init(Instant::now).elapsed()
    }
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        Box::pin(glommio::timer::sleep(duration))
    }
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        glommio::spawn_local(task).detach();
    }
    fn spawn_background(&self, task: LocalBoxFuture<'static, ()>) {
        glommio::spawn_local_into(task, self.background).expect("the queue lives as long as the executor").detach();
    }
}
