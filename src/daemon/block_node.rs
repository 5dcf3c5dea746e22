//! A clone as a block device: from making it, or taking over the one that was left, to its end. On shard 0; the queues are
//! on their shards.
//!
//! The order matters, since a daemon may die at any moment: everything is set up on all shards first, then each fetches its
//! queues, only then the kernel is told to start. At the end the device is stopped before its queues go, or, when it is left
//! to the next daemon, nothing is told to the kernel at all: it sees this process end.

use super::mapped_node::MappedNode;
use crate::clone_state::CloneState;
use crate::config::{CloneConfig, UblkConfig};
use crate::devices::{self, Device, DeviceKind};
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::Counted;
use crate::io_frontend::ublk::UblkStats;
use crate::io_frontend::ublk::affinity::{CpuMask, shards_of};
use crate::io_frontend::ublk::device::{self, Attached, Wanted};
use crate::io_frontend::ublk::proto::{DeviceInfo, Features};
use crate::io_frontend::ublk::queue::{Queue, QueueParts};
use crate::io_frontend::ublk::shape::Shape;
use crate::io_frontend::ublk::takeover::mark_of;
use crate::io_frontend::ublk::turn::keep_reserve;
use crate::kept_bits::{self, Found, Identity, KeptBits};
use crate::locked_memory;
use crate::meta::codec::{self, Superblock};
use crate::metrics::schema::UblkMetrics;
use crate::ring::Ring;
use crate::shard::Mesh;
use crate::shard::dispatch::Dispatcher;
use crate::shard::pool::ShardContext;
use crate::units::{ByteSize, CloneId, Generation, Geometry, SECTOR_SIZE, ShardIndex};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Acquire};
use std::time::Duration;

/// What the kernel gets for making a device, beside the reads of its partition table, which may wait for the source.
const START_TIME_MAX: Duration = Duration::from_secs(120);
/// Between two looks whether queues have ended.
const POLL: Duration = Duration::from_millis(2);
/// That nobody was seen to use a device counts so long.
const LOOK_AGE_MAX: Duration = Duration::from_secs(1);
/// How long queues may take to end once the device is stopped: none has a request any more.
const QUEUES_END_MAX: Duration = Duration::from_secs(10);

thread_local! {
    static QUEUES: RefCell<HashMap<CloneId, Vec<Rc<Queue>>>> = RefCell::default();
    static STATS: Rc<UblkStats> = Rc::default();
}

/// What the block devices of the current shard have done.
pub fn metrics() -> UblkMetrics {
    STATS.with(|stats| UblkMetrics {
        requests: stats.requests.get(),
        direct: stats.direct.get(),
        errors: stats.errors.get(),
        in_flight: stats.in_flight.get(),
        read_bytes: stats.read_bytes.get(),
        write_bytes: stats.written_bytes.get(),
    })
}

/// A block device of a clone that runs.
pub struct BlockNode {
    pub number: u32,
    clone: CloneId,
    name: String,
    /// Queues whose device file is open, on all shards.
    open_queues: Arc<AtomicU64>,
    /// Who used it when somebody looked, and when that was.
    user: RefCell<Option<String>>,
    looked_at: Cell<Option<Duration>>,
    /// What stands on it and is to be used in its place.
    mapped: RefCell<Option<MappedNode>>,
    /// In sectors.
    sectors: Cell<u64>,
}

impl BlockNode {
    /// Makes the device of a clone whose slices are at work on all shards, or takes over the one that was left. Its first
    /// reads are served before this returns. `uuid`: that of the metadata.
    pub async fn start(
        context: &Rc<ShardContext>,
        state: &Arc<CloneState>,
        uuid: &[u8; 16],
        config: &UblkConfig,
        destination: &Device,
    ) -> Result<Self> {
        let shape = shape_of(&state.geometry(), destination);
        let wanted = Wanted::new(config.number, mark_of(uuid), context.mesh.shards(), shape);
        let (shards, copies_bytes) = (context.mesh.shards(), context.shard.copy_pool().io_memory());
        let attach = move || {
            // For a clone that came to a daemon that had no block device.
            locked_memory::prepare();
            device::attach(&wanted)
        };
        let attached = on_thread(context, START_TIME_MAX, "made", attach).await?;
        let Attached { info, file, taken_over, affinity } = attached;
        let node = Self {
            number: info.number,
            clone: state.id,
            name: state.name.clone(),
            open_queues: Arc::default(),
            user: RefCell::default(),
            looked_at: Cell::new(None),
            mapped: RefCell::default(),
            sectors: Cell::new(shape.sectors()),
        };
        let sectors = shape.sectors();
        let started = async {
            node.serve(context, state, &info, file, &affinity).await?;
            on_thread(context, START_TIME_MAX, "started", move || device::start(&info, taken_over, sectors)).await
        };
        match started.await {
            Ok(sectors) => node.sectors.set(sectors),
            Err(error) => {
                if taken_over {
                    // Who has it open waits on: the next daemon may do better.
                    node.leave(context, context.env.now()).await;
                } else {
                    node.remove(context).await.unwrap_or_else(|error| log::warn!("{error}"));
                }
                return Err(error.within(node.label()));
            }
        }
        // Beside the requests that have waited for a daemon: it takes a while.
        context.env.spawn_background(Box::pin(async move {
            let filled = Ring::current().on_thread("ublk", move || keep_reserve(shards, copies_bytes)).await;
            // Also when the daemon ends meanwhile.
            filled.unwrap_or_else(|error| log::debug!("memory for block devices was not kept to the end: {error}"));
        }));
        if shape.sectors() * SECTOR_SIZE < shape.size {
            let rest = shape.size % SECTOR_SIZE;
            log::warn!(
                "{}: the last {rest} bytes of the clone are no whole sector, and not in the device",
                node.label()
            );
        }
        Ok(node)
    }

    /// /dev/ublkbN.
    pub fn path(&self) -> PathBuf {
        device::block_path(self.number)
    }

    /// What stands on it.
    pub fn mapped(&self) -> Option<MappedNode> {
        self.mapped.borrow().clone()
    }

    pub fn set_mapped(&self, mapped: Option<MappedNode>) {
        self.mapped.replace(mapped);
        self.looked_at.set(None);
    }

    /// What users are to open: /dev/mapper/NAME, or /dev/ublkbN.
    pub fn user_path(&self) -> PathBuf {
        self.mapped().map_or_else(|| self.path(), |mapped| mapped.path())
    }

    /// In sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.get()
    }

    /// That the device does not show all of a clone of `size` bytes, and what to do about it.
    pub fn size_warning(&self, size: u64) -> Option<String> {
        let (has, behind) = (self.sectors() * SECTOR_SIZE, size / SECTOR_SIZE * SECTOR_SIZE);
        (has < behind).then(|| {
            format!(
                "{} keeps its size, {}: Linux 6.16 or later would let it grow; end the use of it, then stop the clone and \
                 start it again",
                self.user_path().display(),
                ByteSize(has)
            )
        })
    }

    fn label(&self) -> String {
        format!("clone '{}': {}", self.name, self.path().display())
    }

    /// Sets the queues up on their shards, all of them before the first begins to wait for requests.
    async fn serve(
        &self,
        context: &Rc<ShardContext>,
        state: &Arc<CloneState>,
        info: &DeviceInfo,
        file: File,
        affinity: &[CpuMask],
    ) -> Result<()> {
        let shards = context.mesh.shards();
        let mut cpus = Vec::new();
        for shard in (0..shards).map(ShardIndex) {
            cpus.push(on_shard(context, shard, |_| async { Ok(environment::current_cpu()) }).await?);
        }
        let owners = shards_of(affinity, &cpus);
        for (queue, owner) in (0..info.queues).zip(owners) {
            let on = cpus[owner].map_or_else(String::new, |cpu| format!(", on CPU {cpu}"));
            log::debug!("{}: queue {queue} is served by shard {owner}{on}", self.label());
            let owner = ShardIndex(u16::try_from(owner).unwrap_or(0));
            let device = file.try_clone().map_err(|error| Error::from_io(error, "/dev/ublkc can't be shared"))?;
            let parts = QueueParts {
                device,
                queue,
                depth: info.depth,
                io_bytes_max: info.io_bytes_max,
                registers_buffers: info.flags.contains(Features::AUTO_BUF_REG),
                counted: Counted::new(self.open_queues.clone()),
                label: self.label(),
            };
            let state = state.clone();
            on_shard(context, owner, move |context| async move {
                let (id, name) = (state.id, state.name.clone());
                let volume = Dispatcher::new(state, name, context.shard.clone(), context.mesh.clone());
                locked_memory::warm_heap();
                let queue = Queue::new(parts, volume, context.env.clone(), STATS.with(Rc::clone))?;
                QUEUES.with(|all| all.borrow_mut().entry(id).or_default().push(queue));
                Ok(())
            })
            .await?;
        }
        drop(file);
        let id = self.clone;
        for shard in (0..shards).map(ShardIndex) {
            on_shard(context, shard, move |_| async move {
                for queue in queues_of(id) {
                    queue.start().await?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Who uses the device, in words, if anybody does. That nobody does is as it was a moment ago at most; that somebody does is
    /// as it is now, since who has just unmounted it wants to stop the clone.
    pub async fn used_by(&self, context: &ShardContext) -> Option<String> {
        let now = context.env.now();
        let was_idle = self.user.borrow().is_none();
        if !was_idle || self.looked_at.get().is_none_or(|at| now.saturating_sub(at) >= LOOK_AGE_MAX) {
            let (path, above) = (self.path(), self.mapped().map(|mapped| mapped.path()));
            self.looked_at.set(Some(now));
            let found = Ring::current().on_thread("ublk", move || user_of(&path, above.as_deref(), false)).await;
            *self.user.borrow_mut() = found.ok().flatten();
        }
        self.user.borrow().clone()
    }

    /// Whether nobody used it when somebody looked last.
    pub fn is_idle(&self) -> bool {
        self.looked_at.get().is_some() && self.user.borrow().is_none()
    }

    /// As [`Self::used_by`], now, and more surely: for who is about to take the device away.
    pub async fn used_by_now(&self) -> Option<String> {
        let (path, above) = (self.path(), self.mapped().map(|mapped| mapped.path()));
        let found = Ring::current().on_thread("ublk", move || user_of(&path, above.as_deref(), true)).await;
        *self.user.borrow_mut() = found.ok().flatten();
        self.user.borrow().clone()
    }

    /// Removes the device, also under who has it open. Waits for requests in flight: the clone must still be at work.
    pub async fn remove(&self, context: &Rc<ShardContext>) -> Result<()> {
        let number = self.number;
        if let Some(mapped) = self.mapped() {
            mapped.remove(true, self.sectors()).await.unwrap_or_else(|error| log::warn!("{error}"));
        }
        let stopped = on_thread(context, START_TIME_MAX, "stopped", move || device::stop(number)).await;
        self.forget(context).await;
        stopped.map_err(|error| error.within(self.label()))?;
        let deadline = context.env.now() + QUEUES_END_MAX;
        while self.open_queues.load(Acquire) > 0 {
            if context.env.now() > deadline {
                let text = format!("{}: its queues do not end, so it is not removed", self.label());
                return Err(Error::new(ErrorKind::Limit, text));
            }
            context.env.sleep(POLL).await;
        }
        let deleted = on_thread(context, START_TIME_MAX, "removed", move || device::delete(number)).await;
        deleted.map_err(|error| error.within(self.label()))
    }

    /// Begins no request any more; [`Self::leave`] is to follow.
    pub async fn begin_to_leave(&self, context: &Rc<ShardContext>) {
        let id = self.clone;
        for shard in (0..context.mesh.shards()).map(ShardIndex) {
            let told = context.mesh.run_on(context, shard, move |_| {
                Box::pin(async move { queues_of(id).iter().for_each(|queue| queue.begin_to_leave()) })
            });
            told.await;
        }
    }

    /// Begins no request any more, and waits for those that were begun until `deadline`. The device stays, for the next
    /// daemon; who uses it waits for that.
    pub async fn leave(&self, context: &Rc<ShardContext>, deadline: Duration) {
        self.begin_to_leave(context).await;
        let id = self.clone;
        let left: Vec<_> = (0..context.mesh.shards())
            .map(|shard| {
                context.mesh.run_on(context, ShardIndex(shard), move |_| {
                    Box::pin(async move {
                        for queue in queues_of(id) {
                            queue.left().await;
                        }
                    })
                })
            })
            .collect();
        let all = async {
            for shard in left {
                shard.await;
            }
            true
        };
        let late = async {
            while context.env.now() < deadline {
                context.env.sleep(POLL.max(deadline.saturating_sub(context.env.now()))).await;
            }
            false
        };
        if !futures_lite::future::or(all, late).await {
            log::warn!("{}: requests in flight did not end, and are left to the next daemon", self.label());
        }
        self.forget(context).await;
    }

    /// The queues live as long as their tags are served.
    async fn forget(&self, context: &Rc<ShardContext>) {
        let id = self.clone;
        for shard in (0..context.mesh.shards()).map(ShardIndex) {
            let gone = context.mesh.run_on(context, shard, move |_| {
                Box::pin(async move { QUEUES.with(|all| drop(all.borrow_mut().remove(&id))) })
            });
            gone.await;
        }
    }

    /// Tells the kernel the new size of the clone.
    pub async fn resize(&self, context: &Rc<ShardContext>, size: u64) -> Result<()> {
        let (number, sectors) = (self.number, size / SECTOR_SIZE);
        let resized = on_thread(context, START_TIME_MAX, "resized", move || device::resize(number, sectors)).await;
        resized.map_err(|error| error.within(self.label()))?;
        self.sectors.set(sectors);
        match self.mapped() {
            Some(mapped) => mapped.resize(self.path(), sectors).await,
            None => Ok(()),
        }
    }
}

/// What keeps the hydrated bits of a clone that has a block device, or had one when a daemon before this one was killed.
pub async fn kept_bits(
    config: &CloneConfig,
    superblock: &Superblock,
    generation: Generation,
) -> Result<Option<Arc<KeptBits>>> {
    let (is_wanted, force, geometry) = (config.ublk.is_some(), config.force, superblock.geometry);
    let (is_complete, mark) = (superblock.state == codec::CloneState::Complete, mark_of(&superblock.uuid));
    let identity = match Identity::now(superblock.uuid, &geometry) {
        // Where that is not known, there are no block devices either.
        Err(_) if !is_wanted => return Ok(None),
        identity => identity?,
    };
    let directory = Path::new(kept_bits::DIRECTORY);
    let job = move || {
        let is_spoiled = match KeptBits::find(directory, &identity, &geometry, generation)? {
            Found::Bits(bits) if !is_complete => return Ok(Some(bits)),
            Found::Spoiled => true,
            Found::OfLater(seen) => {
                let error = kept_bits::of_later(&identity.path_in(directory), generation, seen);
                if !force {
                    return Err(error);
                }
                log::warn!("{error}: going on");
                KeptBits::forget(directory, &identity)?;
                false
            }
            Found::Bits(_) | Found::Nothing => false,
        };
        if !is_wanted {
            return Ok(None);
        }
        if !is_complete && let Some(orphan) = device::orphan(mark)? {
            let error = kept_bits::missing(&orphan, is_spoiled);
            match force {
                true => log::warn!("{error}: going on"),
                false => return Err(error),
            }
        }
        KeptBits::create(directory, &identity, &geometry).map(Some)
    };
    let kept = Ring::current().on_thread("ublk", job).await;
    let kept = kept.map_err(|error| Error::from_io(error, "a thread for ublk can't be started"))??;
    Ok(kept.map(Arc::new))
}

/// Who uses the device, or the one above it.
fn user_of(path: &Path, above: Option<&Path>, claim: bool) -> Option<String> {
    match above {
        None => devices::used_by(path, claim),
        Some(above) => devices::used_by(above, claim).or_else(|| devices::used_beside(path, above)),
    }
}

fn queues_of(clone: CloneId) -> Vec<Rc<Queue>> {
    QUEUES.with(|all| all.borrow().get(&clone).cloned().unwrap_or_default())
}

fn shape_of(geometry: &Geometry, destination: &Device) -> Shape {
    let physical = destination.physical_block().max(destination.block);
    Shape {
        size: geometry.size(),
        region_size: geometry.region_size(),
        // A file takes any alignment: what is not its file system's is merged there.
        logical_block: if destination.kind == DeviceKind::Block { destination.block } else { 512 },
        physical_block: physical,
        rotational: destination.is_rotational(),
        io_bytes_max: 0,
    }
}

/// Runs what may wait for the device itself on a thread of its own: never on one that serves it.
async fn on_thread<T: Send + 'static>(
    context: &Rc<ShardContext>,
    time_max: Duration,
    what: &str,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = async {
        let done = Ring::current().on_thread("ublk", job).await;
        done.map_err(|error| Error::from_io(error, "a thread for ublk can't be started"))?
    };
    let late = async {
        context.env.sleep(time_max).await;
        let text = format!("the kernel has not {what} the ublk device in {} s", time_max.as_secs());
        Err(Error::new(ErrorKind::Limit, text))
    };
    futures_lite::future::or(done, late).await
}

async fn on_shard<T, F, Fut>(context: &Rc<ShardContext>, shard: ShardIndex, job: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(Rc<ShardContext>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>> + 'static,
{
    let done = context.mesh.run_on(context, shard, move |context| Box::pin(job(context)));
    done.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Environment, "a shard has ended")))
}
