//! The environment of the generic code: time, sleeping and spawning, on whatever executor drives it.

pub mod glommio;

use crate::io_frontend::request::LocalBoxFuture;
use std::time::Duration;

/// The executor of one shard. glommio in production, a seeded executor with virtual time in simulation.
pub trait Env {
    /// Monotonic time since some fixed moment.
    fn now(&self) -> Duration;
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()>;
    /// Starts a task that runs to its end, whether or not anybody waits for it.
    fn spawn(&self, task: LocalBoxFuture<'static, ()>);
    /// The same, for background work: yields to what [`Env::spawn`] started.
    fn spawn_background(&self, task: LocalBoxFuture<'static, ()>);
}
