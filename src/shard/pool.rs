//! The pool: one glommio executor per shard, pinned to its CPU, and the mailboxes between them.
//!
//! Each shard has one mailbox, which the others post to; posting wakes a shard that sleeps. A message is a request,
//! its answer, or (for assembly: sockets, files) a job to run there. Mailboxes are bounded by what clients and copies
//! have in flight. From one shard to another messages stay in order, and the last one says that there are no more.

use super::{COORDINATOR, Mesh, Shard, ShardReply, ShardRequest};
use crate::env::Env;
use crate::env::glommio::GlommioEnv;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::oneshot;
use crate::metrics::record::count;
use crate::metrics::schema::MeshMetrics;
use crate::ring::{Bell, Ring};
use crate::units::ShardIndex;
use glommio::{LocalExecutorBuilder, Placement, PoolPlacement};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Memory that glommio registers for its own files, which the data path does not use. In bytes.
const IO_MEMORY_BYTES: usize = 256 << 10;
/// How long one task queue may run while others wait: longer than any does, since what would keep it running comes
/// from the ring, which is served when all queues are empty. Long, because a thread that loses its CPU for this time
/// just when a turn begins is put to sleep by glommio beside runnable tasks; see [`crate::ring`].
const PREEMPT_TIMER: Duration = Duration::from_secs(1);

/// What a job returns, on its way back.
type Outcome = Box<dyn Any + Send>;
/// Something to run on another shard.
type Job = Box<dyn FnOnce(Rc<ShardContext>) -> LocalBoxFuture<'static, Outcome> + Send>;

enum Wire {
    Request {
        id: u64,
        request: ShardRequest,
    },
    Reply {
        id: u64,
        reply: Result<ShardReply>,
    },
    Job {
        id: u64,
        job: Job,
    },
    JobDone {
        id: u64,
        outcome: Outcome,
    },
    /// The last message of its sender.
    Closed,
}

/// What other shards have sent and this one has not yet taken.
struct Mailbox {
    messages: Mutex<VecDeque<(ShardIndex, Wire)>>,
    bell: Arc<Bell>,
}

impl Mailbox {
    fn post(&self, from: ShardIndex, wire: Wire) {
        self.lock().push_back((from, wire));
        self.bell.ring();
    }
    fn take(&self) -> VecDeque<(ShardIndex, Wire)> {
        std::mem::take(&mut self.lock())
    }
    fn lock(&self) -> MutexGuard<'_, VecDeque<(ShardIndex, Wire)>> {
        // Nothing that could panic runs under the lock.
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the pool runs.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// One CPU for each shard; shards can share CPUs.
    pub cpus: Vec<usize>,
    /// How long an idle shard polls before it sleeps.
    pub spin: Duration,
    /// Memory for copies on each shard, in bytes; see [`super::copy_pool`].
    pub io_memory: u64,
}

/// What a shard's executor has at hand.
pub struct ShardContext {
    pub shard: Rc<Shard>,
    pub mesh: Rc<ChannelMesh>,
    pub env: Rc<dyn Env>,
}

/// The way from one shard to the others.
pub struct ChannelMesh {
    me: ShardIndex,
    shards: u16,
    shard: Rc<Shard>,
    mailboxes: Arc<[Mailbox]>,
    pending: RefCell<HashMap<u64, oneshot::Sender<Result<ShardReply>>>>,
    jobs: RefCell<HashMap<u64, oneshot::Sender<Outcome>>>,
    /// Shards that may still send something.
    open_senders: RefCell<Vec<ShardIndex>>,
    next_id: Cell<u64>,
    sent: SentCounts,
}

/// Messages sent so far, by kind, and what came.
#[derive(Default)]
struct SentCounts {
    requests: Cell<u64>,
    replies: Cell<u64>,
    jobs: Cell<u64>,
    job_replies: Cell<u64>,
    closed: Cell<u64>,
    mailbox_depth_max: Cell<u64>,
}

impl ChannelMesh {
    fn send(&self, to: ShardIndex, wire: Wire) {
        let counter = match wire {
            Wire::Request { .. } => &self.sent.requests,
            Wire::Reply { .. } => &self.sent.replies,
            Wire::Job { .. } => &self.sent.jobs,
            Wire::JobDone { .. } => &self.sent.job_replies,
            Wire::Closed => &self.sent.closed,
        };
        count(counter, 1);
        self.mailboxes[usize::from(to.0)].post(self.me, wire);
    }

    /// Messages sent to other shards so far.
    pub fn hops(&self) -> u64 {
        let sent = &self.sent;
        [&sent.requests, &sent.replies, &sent.jobs, &sent.job_replies, &sent.closed].map(Cell::get).iter().sum()
    }

    /// This end's part of the metrics document.
    pub fn metrics(&self) -> MeshMetrics {
        MeshMetrics {
            hops: self.hops(),
            requests: self.sent.requests.get(),
            replies: self.sent.replies.get(),
            jobs: self.sent.jobs.get(),
            job_replies: self.sent.job_replies.get(),
            waiting: (self.pending.borrow().len() + self.jobs.borrow().len()) as u64,
            mailbox_depth_max: self.sent.mailbox_depth_max.get(),
        }
    }

    fn new_id(&self) -> u64 {
        self.next_id.replace(self.next_id.get() + 1)
    }

    /// Runs `job` on a shard, this one included, and returns what it returned; `None` when that shard has ended.
    /// The job runs whether or not the answer is awaited.
    pub fn run_on<T, F>(&self, context: &Rc<ShardContext>, to: ShardIndex, job: F) -> LocalBoxFuture<'static, Option<T>>
    where
        T: Send + 'static,
        F: FnOnce(Rc<ShardContext>) -> LocalBoxFuture<'static, T> + Send + 'static,
    {
        if to == self.me {
            let (sender, receiver) = oneshot();
            let future = job(context.clone());
            context.env.spawn(Box::pin(async move { sender.send(future.await) }));
            return Box::pin(receiver);
        }
        let id = self.new_id();
        let (sender, receiver) = oneshot();
        self.jobs.borrow_mut().insert(id, sender);
        let job: Job = Box::new(|context| {
            let future = job(context);
            Box::pin(async move { Box::new(future.await) as Outcome })
        });
        self.send(to, Wire::Job { id, job });
        Box::pin(async move {
            let outcome: Box<T> = receiver.await?.downcast().expect("a job returns what it was made to return");
            Some(*outcome)
        })
    }

    /// Says to all others that this shard sends no more.
    fn close(&self) {
        for to in (0..self.shards).map(ShardIndex).filter(|to| *to != self.me) {
            self.send(to, Wire::Closed);
        }
    }

    /// Takes messages until `done` is true of the shards that may still send some.
    async fn receive_until(
        self: &Rc<Self>,
        context: &Rc<ShardContext>,
        ring: &Ring,
        done: impl Fn(&[ShardIndex]) -> bool,
    ) {
        while !done(&self.open_senders.borrow()) {
            let messages = self.mailboxes[usize::from(self.me.0)].take();
            if messages.is_empty() {
                ring.rung().await;
            }
            let depth_max = &self.sent.mailbox_depth_max;
            depth_max.set(depth_max.get().max(messages.len() as u64));
            for (from, wire) in messages {
                self.receive(context, from, wire);
            }
        }
    }

    fn receive(self: &Rc<Self>, context: &Rc<ShardContext>, from: ShardIndex, wire: Wire) {
        match wire {
            Wire::Request { id, request } => {
                let mesh = self.clone();
                context.env.spawn(Box::pin(async move {
                    let reply = mesh.shard.handle(request).await;
                    mesh.send(from, Wire::Reply { id, reply });
                }));
            }
            Wire::Reply { id, reply } => {
                let waiting = self.pending.borrow_mut().remove(&id);
                if let Some(waiting) = waiting {
                    waiting.send(reply);
                }
            }
            Wire::Job { id, job } => {
                let (mesh, future) = (self.clone(), job(context.clone()));
                context.env.spawn(Box::pin(async move {
                    let outcome = future.await;
                    mesh.send(from, Wire::JobDone { id, outcome });
                }));
            }
            Wire::JobDone { id, outcome } => {
                let waiting = self.jobs.borrow_mut().remove(&id);
                if let Some(waiting) = waiting {
                    waiting.send(outcome);
                }
            }
            Wire::Closed => self.open_senders.borrow_mut().retain(|sender| *sender != from),
        }
    }
}

impl Mesh for ChannelMesh {
    fn me(&self) -> ShardIndex {
        self.me
    }
    fn shards(&self) -> u16 {
        self.shards
    }
    fn call(&self, to: ShardIndex, request: ShardRequest) -> LocalBoxFuture<'static, Result<ShardReply>> {
        if to == self.me {
            let shard = self.shard.clone();
            return Box::pin(async move { shard.handle(request).await });
        }
        let id = self.new_id();
        let (sender, receiver) = oneshot();
        self.pending.borrow_mut().insert(id, sender);
        self.send(to, Wire::Request { id, request });
        Box::pin(async move {
            receiver.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Shutdown, "the daemon is stopping")))
        })
    }
}

/// Runs `main` on shard 0 of a new pool and returns what it returned, after all shards have ended.
pub fn run<T, F, Fut>(options: &PoolOptions, main: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(Rc<ShardContext>) -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    let shards = options.cpus.len() as u16;
    let mailbox = || {
        let bell = Bell::new().map_err(|error| Error::from_io(error, "an eventfd can't be made"))?;
        Ok(Mailbox { messages: Mutex::default(), bell })
    };
    let mailboxes: Arc<[Mailbox]> = (0..shards).map(|_| mailbox()).collect::<Result<_>>()?;
    let mut main = Some(main);
    let mut first = None;
    let mut others = Vec::new();
    // Nothing is sent before every shard can receive: shard 0 would wait for ever for one that did not start.
    let (ready, all_ready) = mpsc::channel();
    let mut starts = Vec::new();
    for (index, cpu) in options.cpus.iter().enumerate() {
        let mailboxes = mailboxes.clone();
        let me = ShardIndex(index as u16);
        let builder = LocalExecutorBuilder::new(Placement::Fixed(*cpu))
            .name(&format!("shard-{me}"))
            .io_memory(IO_MEMORY_BYTES)
            .preempt_timer(PREEMPT_TIMER)
            .blocking_thread_pool_placement(PoolPlacement::Unbound(1));
        let failed = move |error: glommio::GlommioError<()>| {
            Error::new(ErrorKind::Environment, format!("executor of shard {me} on CPU {cpu} can't start: {error}"))
        };
        let (start, started) = mpsc::channel();
        starts.push(start);
        let gate = Gate { ready: ready.clone(), started };
        let (spin, io_memory) = (options.spin, options.io_memory);
        if let Some(main) = main.take() {
            let shard = move || run_shard(me, shards, mailboxes, gate, spin, io_memory, main);
            first = Some(builder.spawn(shard).map_err(failed)?);
        } else {
            let ended = |_: Rc<ShardContext>| std::future::pending::<()>();
            let shard = move || run_shard(me, shards, mailboxes, gate, spin, io_memory, ended);
            others.push(builder.spawn(shard).map_err(failed)?);
        }
    }
    drop(ready);
    // A shard that fails drops its sender: the iteration ends early, and so do the shards that wait for the start.
    if all_ready.iter().take(usize::from(shards)).count() == usize::from(shards) {
        for start in &starts {
            let _ = start.send(());
        }
    }
    drop(starts);
    let died = |error: glommio::GlommioError<()>| {
        let text = format!(
            "an executor can't start: {error} (too little lockable memory or too few open files for {shards} shards? \
             raise 'ulimit -l' and 'ulimit -n', or lower --shards)"
        );
        Error::new(ErrorKind::Environment, text)
    };
    let first = first.expect("there is a shard 0").join().map_err(died);
    // All are waited for before any error is returned.
    let others: Vec<_> = others.into_iter().map(|other| other.join().map_err(died)).collect();
    let result = first??;
    for other in others {
        other??;
    }
    result.ok_or_else(|| Error::new(ErrorKind::Environment, "a shard did not start"))
}

/// Holds a shard back until all of them can receive.
struct Gate {
    /// Told when this shard can; dropped when it can't.
    ready: mpsc::Sender<()>,
    /// Answers when all can; disconnected when one can't.
    started: mpsc::Receiver<()>,
}

impl Gate {
    /// Whether all shards are there. Blocks the thread, on which nothing runs yet.
    fn pass(self) -> bool {
        let Gate { ready, started } = self;
        let _ = ready.send(());
        drop(ready);
        started.recv().is_ok()
    }
}

/// One shard's life, nothing when not all shards could start. On shard 0 it ends when `main` does; elsewhere when shard 0
/// says that it sends no more.
async fn run_shard<T: 'static, F, Fut>(
    me: ShardIndex,
    shards: u16,
    mailboxes: Arc<[Mailbox]>,
    gate: Gate,
    spin: Duration,
    io_memory: u64,
    main: F,
) -> Result<Option<T>>
where
    F: FnOnce(Rc<ShardContext>) -> Fut,
    Fut: Future<Output = T> + 'static,
{
    let ring = Ring::start_with(mailboxes[usize::from(me.0)].bell.clone()).map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::ENOMEM) => " (too little lockable memory: raise 'ulimit -l', or lower --shards)",
            _ => "",
        };
        Error::from_io(error, format!("io_uring of shard {me} can't be set up{hint}"))
    })?;
    ring.set_spin(spin);
    if !gate.pass() {
        ring.shutdown().await;
        return Ok(None);
    }
    let shard = Rc::new(Shard::new(io_memory));
    let mesh = Rc::new(ChannelMesh {
        me,
        shards,
        shard: shard.clone(),
        mailboxes,
        pending: RefCell::default(),
        jobs: RefCell::default(),
        open_senders: RefCell::new((0..shards).map(ShardIndex).filter(|other| *other != me).collect()),
        next_id: Cell::new(0),
        sent: SentCounts::default(),
    });
    let context = Rc::new(ShardContext { shard, mesh: mesh.clone(), env: Rc::new(GlommioEnv::new()) });
    let result = if me == COORDINATOR {
        let (receiver_mesh, receiver_context, receiver_ring) = (mesh.clone(), context.clone(), ring.clone());
        let receiver = glommio::spawn_local(async move {
            receiver_mesh.receive_until(&receiver_context, &receiver_ring, <[ShardIndex]>::is_empty).await
        });
        let result = main(context.clone()).await;
        mesh.close();
        receiver.await;
        Some(result)
    } else {
        mesh.receive_until(&context, &ring, |open| !open.contains(&COORDINATOR)).await;
        mesh.close();
        mesh.receive_until(&context, &ring, <[ShardIndex]>::is_empty).await;
        None
    };
    ring.shutdown().await;
    Ok(result)
}
