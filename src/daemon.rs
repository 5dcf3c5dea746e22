//! The daemon: one clone in the foreground, from its configuration to its orderly end.
//!
//! Everything that can fail is tried before the first change on disk: devices, locks, metadata, the source, the
//! sockets. The end is: no new connections, what is in flight is finished, hydration drained, one last commit.

mod activate;
mod clients;
mod control;
mod prepare;
mod rate;

use crate::config::{CloneConfig, OnHydrated};
use crate::control::server::Server;
use crate::dma_buf::DmaBuf;
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::listen::bind;
use crate::local::Notify;
use crate::ring::Ring;
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use crate::shard::dispatch::Dispatcher;
use crate::shard::pool::{self, PoolOptions, ShardContext};
use crate::shard::{Mesh, ShardRequest};
use crate::units::ShardIndex;
use crate::unix_socket::BoundSocket;
use activate::ActiveClone;
use clients::Clients;
use control::{Handle, Steering};
use std::cell::{Cell, RefCell};
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How often the daemon looks whether it is done, and samples the rate of hydration.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// Who asked how it goes within this time is watching: `--on-hydrated exit` gives them the time to see the end.
const WATCHER_WINDOW: Duration = Duration::from_secs(2);
/// How long the end waits for requests and copies in flight, say from a source that does not answer.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// The part of that which copies get in any case.
const DRAIN_MIN: Duration = Duration::from_secs(1);
/// `struct signalfd_siginfo` of signalfd(2).
const SIGINFO_BYTES: usize = 128;
/// Exit status of a process that a second signal ended: 128 + SIGINT, as shells have it.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs one clone until it is told to stop (a signal, the control interface, `--on-hydrated exit`).
pub fn run(config: CloneConfig) -> Result<()> {
    environment::check_io_uring()?;
    environment::ignore_file_size_signal();
    let cpus = environment::available_cpus()?;
    let shards = config.shards.map_or(cpus.len().min(usize::from(crate::config::SHARDS_MAX)), usize::from);
    environment::check_memlock(shards as u16)?;
    environment::check_nofile(shards as u16)?;
    let signals = block_signals()?;
    abort_on_panic();
    let options = PoolOptions {
        cpus: cpus.iter().copied().cycle().take(shards).collect(),
        spin: Duration::ZERO,
        io_memory: IO_MEMORY_DEFAULT,
    };
    pool::run(&options, move |context| live(context, config, signals))?
}

/// A shard that panicked would leave its regions without an owner: better no daemon, which a restart mends.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        eprintln!("hydrant: internal error, giving up; the clone is safe: start it again");
        std::process::abort();
    }));
}

/// Blocks SIGINT and SIGTERM for all threads made later, to be read from the returned descriptor.
fn block_signals() -> Result<OwnedFd> {
    let failed = || Error::from_io(std::io::Error::last_os_error(), "signals can't be set up");
    // SAFETY: the set is initialised by sigemptyset before use; all calls get valid pointers.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(failed());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC);
        if fd < 0 {
            return Err(failed());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The first signal asks for the end, the second ends at once.
async fn watch_signals(signals: OwnedFd, stop: Rc<Notify>) {
    let (ring, fd) = (Ring::current(), Rc::new(signals));
    let mut seen = 0;
    loop {
        let (result, _) = ring.read(&fd, DmaBuf::new(SIGINFO_BYTES), u64::MAX).await;
        match result {
            Ok(_) => {}
            // The executor is ending.
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => return,
            Err(error) => return log::error!("signals can't be read any more: {error}"),
        }
        seen += 1;
        if seen > 1 {
            eprintln!("hydrant: second signal, ending at once; what was not flushed may be lost");
            std::process::exit(EXIT_INTERRUPTED);
        }
        log::info!("stopping: finishing what is in flight (a second signal ends at once)");
        stop.notify();
    }
}

/// The life of the daemon, on shard 0.
async fn live(context: Rc<ShardContext>, config: CloneConfig, signals: OwnedFd) -> Result<()> {
    let stop: Rc<Notify> = Rc::default();
    context.env.spawn(Box::pin(watch_signals(signals, stop.clone())));
    let shards = context.mesh.shards();
    // Nothing is changed on disk yet, so a stop just gives up: a source may be slow to answer.
    let stopped = async {
        stop.notified().await;
        Ok(None)
    };
    let prepared = async { prepare::prepare(&context, &config, shards).await.map(Some) };
    let Some(prepared) = futures_lite::future::or(prepared, stopped).await? else {
        log::info!("clone '{}': stopped before it was started; nothing was changed", config.name);
        return Ok(());
    };
    for line in prepared.describe(&config) {
        match config.dry_run {
            true => println!("{line}"),
            false => log::info!("{line}"),
        }
    }
    if config.dry_run {
        println!("dry run: nothing was changed");
        return Ok(());
    }
    let bound = bind(&config.nbd)?;
    let control_socket = BoundSocket::bind(&config.control)?;
    let clone = Rc::new(activate::activate(&context, &config, prepared).await?);
    start_slices(&context, &clone).await?;

    let clients = Clients::new(bound);
    context.env.spawn(Box::pin(clients.clone().accept(context.clone())));
    let steering = Rc::new(Steering {
        context: context.clone(),
        config,
        clone: clone.clone(),
        clients: clients.clone(),
        rate: RefCell::default(),
        started: Instant::now(),
        last_asked: Cell::new(None),
        stop: stop.clone(),
    });
    let server = Server::start(control_socket, Rc::new(Handle(steering.clone())), context.env.clone());
    log::info!(
        "clone '{}': serving NBD at {}, control at {}",
        clone.state.name,
        clients.address,
        steering.config.control.display()
    );
    let done = Rc::new(Cell::new(false));
    context.env.spawn_background(Box::pin(watch(steering.clone(), done.clone())));
    stop.notified().await;
    done.set(true);

    let deadline = context.env.now() + DRAIN_MAX;
    clients.stop(&context, deadline).await;
    let result = end(&context, &clone, deadline).await;
    server.close().await;
    result
}

/// Exports the clone on every shard and starts hydration there.
async fn start_slices(context: &Rc<ShardContext>, clone: &ActiveClone) -> Result<()> {
    for shard in 0..context.mesh.shards() {
        let state = clone.state.clone();
        let started = context.mesh.run_on(context, ShardIndex(shard), move |context| {
            Box::pin(async move {
                let slice = context.shard.slice(state.id)?;
                clients::export(Dispatcher::new(state, context.shard.clone(), context.mesh.clone()));
                context.env.spawn_background(Box::pin(slice.hydrate()));
                Ok::<(), Error>(())
            })
        });
        started.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Environment, "a shard has ended")))?;
    }
    Ok(())
}

/// Samples the rate, and ends the daemon when that was asked for and everything is hydrated.
async fn watch(steering: Rc<Steering>, done: Rc<Cell<bool>>) {
    let env = steering.context.env.clone();
    let state = steering.clone.state.clone();
    let region_bytes = state.geometry.region_size().bytes();
    let mut complete_since: Option<Instant> = None;
    while !done.get() {
        steering.rate.borrow_mut().sample(env.now(), state.hydrated() * region_bytes);
        let exits = steering.config.on_hydrated == OnHydrated::Exit;
        if state.is_complete() && complete_since.is_none() {
            complete_since = Some(Instant::now());
        }
        let watched = steering.last_asked.get().is_some_and(|asked| asked.elapsed() < WATCHER_WINDOW);
        let seen = complete_since.is_some_and(|since| !watched || since.elapsed() >= WATCHER_WINDOW);
        if exits && seen && steering.clients.connections() == 0 {
            log::info!("clone '{}': hydrated, and the last client is gone: ending", state.name);
            steering.stop.notify();
            return;
        }
        env.sleep(WATCH_INTERVAL).await;
    }
}

/// Drains hydration and commits.
async fn end(context: &Rc<ShardContext>, clone: &ActiveClone, deadline: Duration) -> Result<()> {
    let state = &clone.state;
    state.set_stopping();
    let drained = Rc::new(Cell::new(0));
    for shard in 0..context.mesh.shards() {
        let drain = context.mesh.call(ShardIndex(shard), ShardRequest::Drain { clone: state.id });
        let drained = drained.clone();
        context.env.spawn(Box::pin(async move {
            if let Err(error) = drain.await {
                log::debug!("drain: {error}");
            }
            drained.set(drained.get() + 1);
        }));
    }
    // However long clients took: what only needs a moment gets it.
    let deadline = deadline.max(context.env.now() + DRAIN_MIN);
    while drained.get() < context.mesh.shards() && context.env.now() < deadline {
        context.env.sleep(Duration::from_millis(2)).await;
    }
    let committed = clone.coordinator.commit().await;
    clone.coordinator.end();
    let (hydrated, regions) = (state.hydrated(), state.geometry.nr_regions());
    match &committed {
        Ok(()) => log::info!("clone '{}': stopped, {hydrated} of {regions} regions hydrated", state.name),
        Err(_) => log::error!("clone '{}': stopped without its last commit", state.name),
    }
    for shard in 0..context.mesh.shards() {
        let id = state.id;
        let detached = context
            .mesh
            .run_on(context, ShardIndex(shard), move |context| Box::pin(async move { context.shard.detach(id) }));
        detached.await;
    }
    committed.map_err(|error| error.within(format!("clone '{}': the last commit failed", state.name)))
}
