//! The daemon: clones in the foreground, from their configuration to their orderly end.
//!
//! `registry` has the clones by name; `prepare` tries everything that can fail before the first change on disk
//! (devices, locks, metadata, the source), `activate` makes that change, `running` is a clone at work,
//! `device_watch` looks after its files, `listeners` are where its clients come from, `block_node` is its block device, `mapped_node` the
//! one above it, which `finish` hands over, `control` is who steers it all. The end is: no new connections,
//! what is in flight is finished, hydration drained, one last commit.

mod activate;
mod as_table;
mod block_node;
mod control;
mod device_watch;
mod finish;
mod listeners;
mod mapped_node;
mod prepare;
mod rate;
mod registry;
mod resize;
mod running;
mod shard_source;
mod source_watch;
mod start_again;

use crate::bail;
use crate::commands::output_error;
use crate::config::{CloneName, DaemonConfig, Plan, SHARDS_MAX};
use crate::control::feed;
use crate::control::server::Server;
use crate::dma_buf::DmaBuf;
use crate::environment;
use crate::error::{Error, Result, plain};
use crate::local::Notify;
use crate::locked_memory;
use crate::metrics::dump::Dumper;
use crate::metrics::schema::{NbdMetrics, UblkMetrics};
use crate::ring::Ring;
use crate::service_manager;
use crate::shard::Mesh;
use crate::shard::copy_pool::checked_io_memory;
use crate::shard::pool::{self, PoolOptions, ShardContext};
use crate::unix_socket::BoundSocket;
use control::Handle;
use mapped_node::Before;
use registry::Daemon;
use std::cell::Cell;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;

/// `struct signalfd_siginfo` of signalfd(2).
const SIGINFO_BYTES: usize = 128;
/// Exit status of a process that a second signal ended: 128 + SIGINT, as shells have it.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs clones until it is told to stop (a signal, the control interface, `on_hydrated`).
pub fn run(plan: Plan) -> Result<()> {
    environment::ignore_file_size_signal();
    let cpus = cpus_of(&plan.daemon)?;
    let shards = plan.daemon.shards.map_or(cpus.len().min(usize::from(SHARDS_MAX)), usize::from);
    // Before the trial of io_uring, which fails for want of it with less to say.
    environment::check_memlock(shards as u16)?;
    environment::check_io_uring()?;
    environment::check_nofile(shards as u16)?;
    let signals = block_signals()?;
    abort_on_panic();
    // Before there are threads. One that only serves NBD is none the worse for it.
    let has_block_device = plan.clones.iter().any(|clone| clone.ublk.is_some());
    if !environment::set_io_flusher() && has_block_device {
        log::warn!("without CAP_SYS_RESOURCE a block device may hang when memory is short");
    }
    if has_block_device {
        locked_memory::prepare();
    }
    let options = PoolOptions {
        cpus: cpus.iter().copied().cycle().take(shards).collect(),
        spin: plan.daemon.spin,
        io_memory: checked_io_memory(plan.daemon.io_memory)?,
    };
    pool::run(&options, move |context| live(context, plan, signals))?
}

/// The CPUs that shards may be pinned to.
fn cpus_of(config: &DaemonConfig) -> Result<Vec<usize>> {
    let available = environment::available_cpus()?;
    let Some(wanted) = &config.cpus else { return Ok(available) };
    if let Some(missing) = wanted.iter().find(|cpu| !available.contains(cpu)) {
        let available: Vec<_> = available.iter().map(usize::to_string).collect();
        bail!(Usage, "cpus: this process may not run on CPU {missing}, only on {}", available.join(", "));
    }
    if wanted.is_empty() {
        bail!(Usage, "cpus: there is none in the list");
    }
    Ok(wanted.clone())
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

/// Blocks SIGINT, SIGTERM and SIGUSR1 for all threads made later, to be read from the returned descriptor.
fn block_signals() -> Result<OwnedFd> {
    let failed = || Error::from_io(std::io::Error::last_os_error(), "signals can't be set up");
    // SAFETY: the set is initialised by sigemptyset before use; all calls get valid pointers.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGUSR1);
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

/// SIGUSR1 asks for a metrics dump. Of the others the first asks for the end, the second ends at once.
async fn watch_signals(signals: OwnedFd, stop: Rc<Notify>, dumper: Rc<Dumper>) {
    let (ring, fd) = (Ring::current(), Rc::new(signals));
    let mut seen = 0;
    loop {
        let (result, (info, _)) = ring.read(&fd, DmaBuf::new(SIGINFO_BYTES), u64::MAX).await;
        match result {
            Ok(_) if signal_of(&info) == Some(libc::SIGUSR1) => {
                dumper.signalled();
                continue;
            }
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

/// `ssi_signo`, the first field of signalfd(2)'s structure.
fn signal_of(info: &[u8]) -> Option<i32> {
    info.first_chunk().map(|number| i32::from_ne_bytes(*number))
}

/// The life of the daemon, on shard 0.
async fn live(context: Rc<ShardContext>, plan: Plan, signals: OwnedFd) -> Result<()> {
    let stop: Rc<Notify> = Rc::default();
    let dumper = Dumper::new(context.clone(), plan.daemon.metrics_dump.clone(), frontend_metrics);
    context.env.spawn(Box::pin(watch_signals(signals, stop.clone(), dumper.clone())));
    if plan.dry_run {
        return dry_run(&context, &plan, &stop).await;
    }
    let Plan { daemon: config, clones, .. } = plan;
    let control_socket = BoundSocket::bind(&config.control)?;
    let feed = feed::start(&context.env)?;
    let daemon = Daemon::new(context.clone(), config, stop.clone(), feed)?;
    let server = Server::start(control_socket, Rc::new(Handle(daemon.clone())), context.env.clone());
    let wanted = clones.len();
    let (starter, stop_of_starter) = (daemon.clone(), stop.clone());
    context.env.spawn(Box::pin(async move {
        starter.start_all(clones).await;
        let failures = starter.failures().len();
        // With none there is nothing to stay for, but for one that may start yet.
        let is_finished = starter.config.one_clone && starter.is_empty();
        if wanted > 0 && failures == wanted && !starter.may_start_later() || is_finished {
            return stop_of_starter.notify();
        }
        if !starter.is_stopping() {
            service_manager::ready(&format!("serving {} clones of {wanted}", wanted - failures));
        }
        if wanted != 1 && !starter.is_stopping() {
            let control = starter.config.control.display();
            log::info!("serving {} clones of {wanted}, control at {control}", wanted - failures);
        }
    }));
    context.env.spawn_background(Box::pin(daemon.clone().watch()));
    context.env.spawn_background(Box::pin(daemon.clone().watch_devices()));
    context.env.spawn_background(Box::pin(daemon.clone().start_failed_again()));
    context.env.spawn_background(Box::pin(dumper.clone().run()));
    stop.notified().await;
    service_manager::stopping();
    dumper.stop();
    let ended = daemon.end().await;
    server.close().await;
    dumper.ended().await;
    ended?;
    end_of_failures(daemon.failures(), wanted)
}

/// What the exit status says of clones that could not be started.
fn end_of_failures(failures: Vec<(CloneName, Error)>, wanted: usize) -> Result<()> {
    match failures.as_slice() {
        [] => Ok(()),
        [(_, error)] if wanted == 1 => Err(error.clone()),
        [(name, error)] => Err(error.clone().within(format!("clone '{name}' could not be started"))),
        [(name, error), others @ ..] => {
            let others: Vec<_> = others.iter().map(|(name, _)| format!("'{name}'")).collect();
            let text = format!("clones {} and '{name}' could not be started; '{name}'", others.join(", "));
            Err(error.clone().within(text))
        }
    }
}

/// What the frontends of the current shard have done.
fn frontend_metrics() -> (NbdMetrics, UblkMetrics) {
    (listeners::metrics(), block_node::metrics())
}

/// Checks every clone and says what would be done.
async fn dry_run(context: &Rc<ShardContext>, plan: &Plan, stop: &Notify) -> Result<()> {
    let mut failures = Vec::new();
    for config in &plan.clones {
        let prepared = async {
            if let Before::HandedOver(path) = mapped_node::before_start(config).await? {
                say(&format!("clone '{}': finished, {} is its destination", config.name, path.display()))?;
                return Ok(None);
            }
            prepare::prepare(context, config, context.mesh.shards()).await.map(Some)
        };
        let stop_seen = Cell::new(false);
        let stopped = async {
            stop.notified().await;
            stop_seen.set(true);
            Ok(None)
        };
        match futures_lite::future::or(prepared, stopped).await {
            Ok(Some(prepared)) => {
                for (index, line) in prepared.describe(config).iter().enumerate() {
                    let indent = if index > 0 && plan.clones.len() > 1 { "  " } else { "" };
                    say(&format!("{indent}{line}"))?;
                }
            }
            Ok(None) if stop_seen.get() => return Ok(()),
            Ok(None) => {}
            Err(error) => {
                if plan.clones.len() > 1 {
                    say(&format!("clone '{}': can't be started: {error}", config.name))?;
                }
                failures.push((config.name.clone(), error));
            }
        }
    }
    end_of_failures(failures, plan.clones.len())?;
    say("dry run: nothing was changed")
}

/// A line on standard output, which may be closed.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{}", plain(line)).map_err(output_error)
}
