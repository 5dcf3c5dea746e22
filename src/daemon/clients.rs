//! NBD clients: accepts connections on shard 0 and gives each to a shard in turn.

use crate::io_frontend::nbd::listen::{Bound, NbdAddress, configure_accepted};
use crate::io_frontend::nbd::{ConnectionStats, Exports, Limits, serve};
use crate::io_frontend::request::{Volume, VolumeInfo};
use crate::local::latch::Latch;
use crate::metrics::schema::NbdMetrics;
use crate::net::{Listener, Stream};
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use crate::units::ShardIndex;
use crate::unix_socket::PathGuard;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::Duration;

/// Connections of one listener at a time; more are closed at once.
pub const CONNECTIONS_MAX: u64 = 1024;
/// Pause after accept failed for want of something (descriptors, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one shard offers to the connections that it serves.
#[derive(Default)]
struct ShardExports {
    volumes: RefCell<Vec<Rc<dyn Volume>>>,
    stats: Rc<ConnectionStats>,
    stop: Rc<Latch>,
}

impl Exports for ShardExports {
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>> {
        let volumes = self.volumes.borrow();
        match (name, &volumes[..]) {
            ("", [only]) => Some(only.clone()),
            _ => volumes.iter().find(|volume| volume.info().name == name).cloned(),
        }
    }
    fn list(&self) -> Vec<VolumeInfo> {
        self.volumes.borrow().iter().map(|volume| volume.info()).collect()
    }
}

thread_local! {
    static EXPORTS: Rc<ShardExports> = Rc::default();
}

/// Offers a volume on the current shard.
pub fn export(volume: Rc<dyn Volume>) {
    EXPORTS.with(|exports| exports.volumes.borrow_mut().push(volume));
}

/// What the connections of the current shard have done.
pub fn metrics() -> NbdMetrics {
    EXPORTS.with(|exports| {
        let stats = &exports.stats;
        NbdMetrics {
            connections: stats.connections.get(),
            accepted: stats.accepted.get(),
            dropped: stats.dropped.get(),
            requests: stats.requests.get(),
            errors: stats.errors.get(),
            in_flight: stats.in_flight.get(),
            read_bytes: stats.read_bytes.get(),
            write_bytes: stats.written_bytes.get(),
        }
    })
}

/// A listening NBD frontend.
pub struct Clients {
    listener: Listener,
    pub address: NbdAddress,
    guard: RefCell<Option<PathGuard>>,
    connections: Arc<AtomicU64>,
    stopping: Cell<bool>,
}

impl Clients {
    /// On shard 0.
    pub fn new(bound: Bound) -> Rc<Self> {
        Rc::new(Self {
            listener: Listener::new(bound.fd),
            address: bound.address,
            guard: RefCell::new(bound.guard),
            connections: Arc::default(),
            stopping: Cell::new(false),
        })
    }

    /// Connections being served now.
    pub fn connections(&self) -> u64 {
        self.connections.load(Acquire)
    }

    /// Accepts until [`Clients::stop`].
    pub async fn accept(self: Rc<Self>, context: Rc<ShardContext>) {
        let mut next = 0;
        while !self.stopping.get() {
            let accepted = self.listener.accept().await;
            if self.stopping.get() {
                break;
            }
            let fd = match accepted.map(|fd| configure_accepted(fd, &self.address)) {
                Ok(Ok(fd)) => fd,
                Ok(Err(error)) => {
                    log::debug!("NBD {}: {error}", self.address);
                    continue;
                }
                Err(error) => {
                    log::warn!("NBD {}: accept: {error}", self.address);
                    context.env.sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if self.connections() >= CONNECTIONS_MAX {
                log::warn!("NBD {}: {CONNECTIONS_MAX} connections are open, closing another one", self.address);
                continue;
            }
            let shard = ShardIndex(next % context.mesh.shards());
            next = (next + 1) % context.mesh.shards();
            self.connections.fetch_add(1, AcqRel);
            let connections = self.connections.clone();
            // The count must fall however the task ends.
            struct Counted(Arc<AtomicU64>);
            impl Drop for Counted {
                fn drop(&mut self) {
                    self.0.fetch_sub(1, AcqRel);
                }
            }
            let counted = Counted(connections);
            drop(context.mesh.run_on(&context, shard, move |context| {
                Box::pin(async move {
                    let _counted = counted;
                    let exports = EXPORTS.with(Rc::clone);
                    let (stats, stop) = (exports.stats.clone(), exports.stop.clone());
                    let served =
                        serve(Stream::new(fd), exports, context.env.clone(), Limits::default(), stats, stop).await;
                    if let Err(error) = served {
                        log::debug!("NBD connection dropped: {error}");
                    }
                })
            }));
        }
    }

    /// Stops listening, lets every connection finish what is in flight, and waits for that until `deadline` (a time of the
    /// environment).
    pub async fn stop(&self, context: &Rc<ShardContext>, deadline: Duration) {
        self.stopping.set(true);
        self.listener.close();
        self.guard.borrow_mut().take();
        for shard in 0..context.mesh.shards() {
            let opened = context.mesh.run_on(context, ShardIndex(shard), |_| {
                Box::pin(async { EXPORTS.with(|exports| exports.stop.open()) })
            });
            opened.await;
        }
        while self.connections() > 0 {
            if context.env.now() > deadline {
                log::warn!("NBD {}: {} connections did not drain", self.address, self.connections());
                break;
            }
            context.env.sleep(Duration::from_millis(5)).await;
        }
    }
}
