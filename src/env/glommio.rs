//! The environment on a glommio executor.

use super::Env;
use crate::io_frontend::request::LocalBoxFuture;
use crate::ring::Ring;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The moment that [`Env::now`] counts from: one for all executors, so that shards can compare their times.
static START: OnceLock<Instant> = OnceLock::new();

/// Time and tasks of the current glommio executor.
pub struct GlommioEnv {
    ring: Rc<Ring>,
}

impl GlommioEnv {
    /// Call on the executor that it is to serve, after [`Ring::start`].
    pub fn new() -> Self {
        START.get_or_init(Instant::now);
        Self { ring: Ring::current() }
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
        Box::pin(self.ring.sleep(duration))
    }
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        glommio::spawn_local(task).detach();
    }
    fn spawn_background(&self, task: LocalBoxFuture<'static, ()>) {
        glommio::spawn_local_into(task, self.ring.background())
            .expect("the queue lives as long as the executor")
            .detach();
    }
}
