//! NBD listeners: accept clients on shard 0 and give each to a shard in turn.
//!
//! Clones with the same address share a listener, which lives as long as one of them uses it. Every shard has, for
//! each listener, the exports that its connections can choose from.

use crate::bail;
use crate::config::CloneName;
use crate::environment::open_files_max;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::listen::{NbdAddress, bind, configure_accepted};
use crate::io_frontend::nbd::{ConnectionStats, Counted, Exports, Limits, Memory, Served, Stay, serve};
use crate::io_frontend::request::{Volume, VolumeInfo};
use crate::local::latch::Latch;
use crate::log_limit::LogLimit;
use crate::metrics::schema::NbdMetrics;
use crate::net::{Listener as Socket, Stream};
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use crate::units::{CloneId, ShardIndex};
use crate::unix_socket::PathGuard;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::Duration;

/// Connections of one listener at a time; more are closed at once. Each may hold [`Limits::payload_bytes_own`] beside the
/// memory that all share: 256 MiB for all of a listener.
pub const CONNECTIONS_MAX: u64 = 1024;
/// Payload of requests in flight, of all NBD connections of a shard together, in bytes: requests wait for their turn,
/// except small ones (see [`Limits::payload_bytes_own`]). What one connection may hold is in [`Limits`].
const PAYLOAD_BYTES_PER_SHARD_MAX: u64 = 512 << 20;
/// Descriptors that clients leave to everything else (the control socket, the source that is connected again, files that
/// are opened later): an eighth of those that the process may have, within these bounds. A client that would take one of
/// them is closed at once.
const DESCRIPTORS_KEPT_MIN: u64 = 16;
const DESCRIPTORS_KEPT_MAX: u64 = 128;
/// Pause after accept failed for want of something (descriptors, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks whether connections have ended.
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// One clone, as one shard offers it to clients.
struct Export {
    clone: CloneId,
    volume: Rc<dyn Volume>,
    /// Not shown to those who come, while it is decided whether it can go.
    hidden: Cell<bool>,
    /// Opens when the clone is removed.
    ends: Rc<Latch>,
    /// Connections that use it, on all shards.
    connections: Arc<AtomicU64>,
}

/// What one shard offers to the connections of one listener.
#[derive(Default)]
struct ShardExports {
    exports: RefCell<Vec<Export>>,
    stop: Rc<Latch>,
}

impl ShardExports {
    /// The export that a client names; the empty name is the only one, if there is only one.
    fn with<T>(&self, name: &str, of: impl FnOnce(&Export) -> T) -> Option<T> {
        let exports = self.exports.borrow();
        let mut shown = exports.iter().filter(|export| !export.hidden.get());
        let found = match (name, &exports[..]) {
            ("", [_]) => shown.next(),
            _ => shown.find(|export| export.volume.info().name == name),
        };
        found.map(of)
    }
}

impl Exports for ShardExports {
    fn find(&self, name: &str) -> Option<Rc<dyn Volume>> {
        self.with(name, |export| export.volume.clone())
    }
    fn list(&self) -> Vec<VolumeInfo> {
        let exports = self.exports.borrow();
        exports.iter().filter(|export| !export.hidden.get()).map(|export| export.volume.info()).collect()
    }
}

impl Served for ShardExports {
    fn enter(&self, export: &str) -> Option<Stay> {
        self.with(export, |export| Stay {
            ends: export.ends.clone(),
            counted: Some(Counted::new(export.connections.clone())),
        })
    }
}

/// Identifies a listener; never used again.
type ListenerId = u32;

thread_local! {
    static EXPORTS: RefCell<HashMap<ListenerId, Rc<ShardExports>>> = RefCell::default();
    /// Of all listeners: counters stay when one is closed.
    static STATS: Rc<ConnectionStats> = Rc::default();
    /// Of all listeners.
    static MEMORY: Rc<Memory> = Memory::new(PAYLOAD_BYTES_PER_SHARD_MAX);
}

/// What the NBD connections of the current shard have done.
pub fn metrics() -> NbdMetrics {
    STATS.with(|stats| NbdMetrics {
        connections: stats.connections.get(),
        accepted: stats.accepted.get(),
        dropped: stats.dropped.get(),
        requests: stats.requests.get(),
        errors: stats.errors.get(),
        in_flight: stats.in_flight.get(),
        read_bytes: stats.read_bytes.get(),
        write_bytes: stats.written_bytes.get(),
    })
}

fn exports_of(listener: ListenerId) -> Rc<ShardExports> {
    EXPORTS.with(|all| all.borrow_mut().entry(listener).or_default().clone())
}

/// All listeners of a daemon; on shard 0.
#[derive(Default)]
pub struct Listeners {
    open: RefCell<Vec<Rc<Listener>>>,
    next_id: Cell<ListenerId>,
}

impl Listeners {
    /// The listener at `address`: the one that is there, or a new one. It is closed by the last [`Self::release`].
    pub fn acquire(&self, address: &NbdAddress, export: &CloneName) -> Result<Rc<Listener>> {
        let mut open = self.open.borrow_mut();
        let is_shared = |listener: &&Rc<Listener>| listener.asked == *address && *address != NbdAddress::None;
        if let Some(listener) = open.iter().find(is_shared) {
            let mut names = listener.names.borrow_mut();
            if names.contains(export) {
                bail!(InUse, "NBD {address}: there is an export '{export}' already");
            }
            names.push(export.clone());
            return Ok(listener.clone());
        }
        let (asked, mut bound) = (address.clone(), bind(address)?);
        let guard = bound.as_mut().and_then(|bound| bound.guard.take());
        let id = self.next_id.replace(self.next_id.get() + 1);
        let (address, socket) = match bound {
            Some(bound) => (bound.address, Some(Socket::new(bound.fd))),
            None => (address.clone(), None),
        };
        let listener = Rc::new(Listener {
            id,
            asked,
            address,
            guard: RefCell::new(guard),
            socket,
            names: RefCell::new(vec![export.clone()]),
            accepting: Cell::new(false),
            stopping: Cell::new(false),
            connections: Arc::default(),
            refusals: RefCell::default(),
        });
        open.push(listener.clone());
        Ok(listener)
    }

    /// An export of this listener has gone, or was never offered. Its connections have ended.
    pub async fn release(&self, context: &Rc<ShardContext>, listener: &Rc<Listener>, export: &CloneName) {
        listener.names.borrow_mut().retain(|name| name != export);
        if !listener.names.borrow().is_empty() {
            return;
        }
        self.open.borrow_mut().retain(|open| !Rc::ptr_eq(open, listener));
        listener.close();
        let id = listener.id;
        each_shard(context, move || {
            let gone = EXPORTS.with(|all| all.borrow_mut().remove(&id));
            // Those that are still shaking hands.
            gone.iter().for_each(|exports| exports.stop.open());
        })
        .await;
    }

    /// Stops to listen everywhere, lets every connection finish what is in flight, and waits for that until `deadline`
    /// (a time of the environment).
    pub async fn stop(&self, context: &Rc<ShardContext>, deadline: Duration) {
        let open = self.open.borrow().clone();
        open.iter().for_each(|listener| listener.close());
        each_shard(context, || EXPORTS.with(|all| all.borrow().values().for_each(|exports| exports.stop.open()))).await;
        for listener in open {
            while listener.connections() > 0 {
                if context.env.now() > deadline {
                    log::warn!("NBD {}: {} connections did not drain", listener.address, listener.connections());
                    break;
                }
                context.env.sleep(DRAIN_POLL).await;
            }
        }
    }
}

/// Runs `job` on every shard, and returns when it has run.
async fn each_shard(context: &Rc<ShardContext>, job: impl Fn() + Clone + Send + 'static) {
    for shard in 0..context.mesh.shards() {
        let job = job.clone();
        context.mesh.run_on(context, ShardIndex(shard), move |_| Box::pin(async move { job() })).await;
    }
}

/// A listening socket, and who may be found behind it.
pub struct Listener {
    id: ListenerId,
    /// As it was asked for.
    asked: NbdAddress,
    /// Where it really listens: the port is filled in.
    pub address: NbdAddress,
    /// `None`: nobody can come.
    socket: Option<Socket>,
    guard: RefCell<Option<PathGuard>>,
    /// The exports that use it.
    names: RefCell<Vec<CloneName>>,
    accepting: Cell<bool>,
    stopping: Cell<bool>,
    connections: Arc<AtomicU64>,
    /// Clients that come faster than they can be served must not fill the log as well.
    refusals: RefCell<LogLimit>,
}

/// Why a client that was just accepted can't stay, if so. The system gives out the lowest descriptor that is free, so its
/// number tells how many are in use.
fn refusal(fd: &OwnedFd, connections: u64, descriptors_max: Option<u64>) -> Option<String> {
    if connections >= CONNECTIONS_MAX {
        return Some(format!("{CONNECTIONS_MAX} connections are open, closing another one"));
    }
    let max = descriptors_max?;
    let kept = (max / 8).clamp(DESCRIPTORS_KEPT_MIN, DESCRIPTORS_KEPT_MAX);
    (fd.as_raw_fd() as u64 >= max.saturating_sub(kept)).then(|| {
        format!("all but the last {kept} of {max} file descriptors are in use, closing another one: raise LimitNOFILE")
    })
}

impl Listener {
    /// Connections being served now, whatever their export.
    fn connections(&self) -> u64 {
        self.connections.load(Acquire)
    }

    fn close(&self) {
        self.stopping.set(true);
        if let Some(socket) = &self.socket {
            socket.close();
        }
        self.guard.borrow_mut().take();
    }

    fn warn(&self, context: &ShardContext, error: Error) {
        if let Some(line) = self.refusals.borrow_mut().line(context.env.now(), &error) {
            log::warn!("{line}");
        }
    }

    /// Begins to accept clients, unless it does so already.
    pub fn start(self: &Rc<Self>, context: &Rc<ShardContext>) {
        if self.socket.is_some() && !self.accepting.replace(true) {
            context.env.spawn(Box::pin(self.clone().accept(context.clone())));
        }
    }

    async fn accept(self: Rc<Self>, context: Rc<ShardContext>) {
        let Some(socket) = &self.socket else { return };
        let mut next = 0;
        while !self.stopping.get() {
            let accepted = socket.accept().await;
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
                    self.warn(&context, Error::from_io(error, format!("NBD {}: accept", self.address)));
                    context.env.sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if let Some(why) = refusal(&fd, self.connections(), open_files_max()) {
                self.warn(&context, Error::new(ErrorKind::Limit, format!("NBD {}: {why}", self.address)));
                continue;
            }
            let shard = ShardIndex(next % context.mesh.shards());
            next = (next + 1) % context.mesh.shards();
            let counted = Counted::new(self.connections.clone());
            let id = self.id;
            drop(context.mesh.run_on(&context, shard, move |context| {
                Box::pin(async move {
                    let _counted = counted;
                    let exports = EXPORTS.with(|all| all.borrow().get(&id).cloned());
                    // None: the listener was closed meanwhile.
                    let Some(exports) = exports else { return };
                    let (memory, stats, stop) = (MEMORY.with(Rc::clone), STATS.with(Rc::clone), exports.stop.clone());
                    let (stream, env) = (Stream::new(fd), context.env.clone());
                    let served = serve(stream, exports, env, Limits::default(), memory, stats, stop).await;
                    if let Err(error) = served {
                        log::debug!("NBD connection dropped: {error}");
                    }
                })
            }));
        }
    }
}

/// A clone behind a listener, on all shards; on shard 0.
pub struct Exported {
    pub listener: Rc<Listener>,
    pub name: CloneName,
    clone: CloneId,
    connections: Arc<AtomicU64>,
}

impl Exported {
    pub fn new(listener: Rc<Listener>, name: CloneName, clone: CloneId) -> Self {
        Self { listener, name, clone, connections: Arc::default() }
    }

    /// Connections that use this export.
    pub fn connections(&self) -> u64 {
        self.connections.load(Acquire)
    }

    /// What the shards need to offer it, by [`ExportHandle::offer`].
    pub fn handle(&self) -> ExportHandle {
        ExportHandle { listener: self.listener.id, clone: self.clone, connections: self.connections.clone() }
    }

    /// Hides the export from clients that come, or shows it again; returns when that is so on every shard.
    pub async fn set_hidden(&self, context: &Rc<ShardContext>, hidden: bool) {
        let handle = self.handle();
        each_shard(context, move || handle.set_hidden(hidden)).await;
    }

    /// Takes the export away, ends the connections that use it, which finish what is in flight, and waits for that
    /// until `deadline`. Returns whether all have ended.
    pub async fn end(&self, context: &Rc<ShardContext>, deadline: Duration) -> bool {
        let handle = self.handle();
        each_shard(context, move || handle.end()).await;
        while self.connections() > 0 {
            if context.env.now() > deadline {
                return false;
            }
            context.env.sleep(DRAIN_POLL).await;
        }
        true
    }
}

/// An export, as it is sent to the shards.
#[derive(Clone)]
pub struct ExportHandle {
    listener: ListenerId,
    clone: CloneId,
    connections: Arc<AtomicU64>,
}

impl ExportHandle {
    /// Offers a clone on the current shard.
    pub fn offer(&self, volume: Rc<dyn Volume>) {
        let export = Export {
            clone: self.clone,
            volume,
            hidden: Cell::new(false),
            ends: Rc::default(),
            connections: self.connections.clone(),
        };
        exports_of(self.listener).exports.borrow_mut().push(export);
    }

    fn set_hidden(&self, hidden: bool) {
        let exports = exports_of(self.listener);
        exports.exports.borrow().iter().filter(|e| e.clone == self.clone).for_each(|e| e.hidden.set(hidden));
    }

    /// Takes it away on the current shard, also from those that use it.
    fn end(&self) {
        let Some(exports) = EXPORTS.with(|all| all.borrow().get(&self.listener).cloned()) else { return };
        exports.exports.borrow_mut().retain(|export| {
            let ends = export.clone == self.clone;
            if ends {
                export.ends.open();
            }
            !ends
        });
    }
}
