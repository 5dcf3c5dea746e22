//! The pool: one glommio executor per shard, pinned to its CPU, and the channels between them.
//!
//! Between each ordered pair of shards there is one shared channel. All ends connect in the same global order, so
//! the connecting can't deadlock. A message is a request, its answer, or (for assembly: sockets, files) a job to
//! run there. What waits to be sent stands in a local queue; it is bounded by what clients and copies have in
//! flight.

use super::{Mesh, Shard, ShardReply, ShardRequest};
use crate::env::Env;
use crate::env::glommio::GlommioEnv;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::{Queue, oneshot};
use crate::ring::Ring;
use crate::units::ShardIndex;
use glommio::channels::shared_channel::{self, SharedReceiver, SharedSender};
use glommio::{LocalExecutorBuilder, Placement, PoolPlacement};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Messages in one channel; more wait in the sender's queue.
const CHANNEL_MESSAGES: usize = 256;
/// Memory that glommio registers for its own files, which the data path does not use. In bytes.
const IO_MEMORY_BYTES: usize = 256 << 10;
/// How long a timer may wait behind runnable tasks.
const PREEMPT_TIMER: Duration = Duration::from_millis(1);

/// What a job returns, on its way back.
type Outcome = Box<dyn Any + Send>;
/// Something to run on another shard.
type Job = Box<dyn FnOnce(Rc<ShardContext>) -> LocalBoxFuture<'static, Outcome> + Send>;

enum Wire {
    Request { id: u64, request: ShardRequest },
    Reply { id: u64, reply: Result<ShardReply> },
    Job { id: u64, job: Job },
    JobDone { id: u64, outcome: Outcome },
}

/// How the pool runs.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// One CPU for each shard; shards can share CPUs.
    pub cpus: Vec<usize>,
    /// How long an idle shard polls before it sleeps.
    pub spin: Duration,
}

/// What a shard's executor has at hand.
pub struct ShardContext {
    pub shard: Rc<Shard>,
    pub mesh: Rc<ChannelMesh>,
    pub env: Rc<dyn Env>,
}

/// The channels of one shard.
pub struct ChannelMesh {
    me: ShardIndex,
    shards: u16,
    shard: Rc<Shard>,
    outgoing: BTreeMap<u16, Rc<Queue<Wire>>>,
    pending: RefCell<HashMap<u64, oneshot::Sender<Result<ShardReply>>>>,
    jobs: RefCell<HashMap<u64, oneshot::Sender<Outcome>>>,
    next_id: Cell<u64>,
    hops: Cell<u64>,
}

impl ChannelMesh {
    fn send(&self, to: ShardIndex, wire: Wire) {
        self.hops.set(self.hops.get() + 1);
        self.outgoing[&to.0].push(wire);
    }

    /// Messages sent to other shards so far.
    pub fn hops(&self) -> u64 {
        self.hops.get()
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

/// The channel ends of one shard, before its executor runs. Ordered by (from, to).
#[derive(Default)]
struct Ends(BTreeMap<(u16, u16), End>);

enum End {
    Sender(SharedSender<Wire>),
    Receiver(SharedReceiver<Wire>),
}

/// Runs `main` on shard 0 of a new pool and returns what it returned, after all shards have ended.
pub fn run<T, F, Fut>(options: &PoolOptions, main: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(Rc<ShardContext>) -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    let shards = options.cpus.len() as u16;
    let mut ends: Vec<Ends> = (0..shards).map(|_| Ends::default()).collect();
    for from in 0..shards {
        for to in (0..shards).filter(|to| *to != from) {
            let (sender, receiver) = shared_channel::new_bounded(CHANNEL_MESSAGES);
            ends[usize::from(from)].0.insert((from, to), End::Sender(sender));
            ends[usize::from(to)].0.insert((from, to), End::Receiver(receiver));
        }
    }
    let mut main = Some(main);
    let mut first = None;
    let mut others = Vec::new();
    for (index, (ends, cpu)) in ends.into_iter().zip(&options.cpus).enumerate() {
        let me = ShardIndex(index as u16);
        let builder = LocalExecutorBuilder::new(Placement::Fixed(*cpu))
            .name(&format!("shard-{me}"))
            .io_memory(IO_MEMORY_BYTES)
            .preempt_timer(PREEMPT_TIMER)
            .spin_before_park(options.spin)
            .blocking_thread_pool_placement(PoolPlacement::Unbound(1));
        let failed = move |error: glommio::GlommioError<()>| {
            Error::new(ErrorKind::Environment, format!("executor of shard {me} on CPU {cpu} can't start: {error}"))
        };
        if let Some(main) = main.take() {
            first = Some(builder.spawn(move || run_shard(me, shards, ends, main)).map_err(failed)?);
        } else {
            let ended = |_: Rc<ShardContext>| std::future::pending::<()>();
            others.push(builder.spawn(move || run_shard(me, shards, ends, ended)).map_err(failed)?);
        }
    }
    let died = |error| Error::new(ErrorKind::Environment, format!("an executor died: {error}"));
    let result = first.expect("there is a shard 0").join().map_err(died)?;
    for other in others {
        other.join().map_err(died)??;
    }
    result.map(|result| result.expect("main was run to its end on shard 0"))
}

/// One shard's life. On shard 0 it ends when `main` does; elsewhere when shard 0 closes its channel.
async fn run_shard<T: 'static, F, Fut>(me: ShardIndex, shards: u16, ends: Ends, main: F) -> Result<Option<T>>
where
    F: FnOnce(Rc<ShardContext>) -> Fut,
    Fut: Future<Output = T> + 'static,
{
    let ring =
        Ring::start().map_err(|error| Error::from_io(error, format!("io_uring of shard {me} can't be set up")))?;
    let shard = Rc::new(Shard::default());
    let outgoing: BTreeMap<u16, Rc<Queue<Wire>>> =
        (0..shards).filter(|to| *to != me.0).map(|to| (to, Rc::default())).collect();
    let mesh = Rc::new(ChannelMesh {
        me,
        shards,
        shard: shard.clone(),
        outgoing: outgoing.clone(),
        pending: RefCell::default(),
        jobs: RefCell::default(),
        next_id: Cell::new(0),
        hops: Cell::new(0),
    });
    let context = Rc::new(ShardContext { shard, mesh: mesh.clone(), env: Rc::new(GlommioEnv::new()) });

    let mut receivers = Vec::new();
    let mut senders = Vec::new();
    for ((from, to), end) in ends.0 {
        match end {
            End::Sender(sender) => {
                let (sender, queue) = (sender.connect().await, outgoing[&to].clone());
                senders.push(glommio::spawn_local(async move {
                    while let Some(wire) = queue.pop().await {
                        if sender.send(wire).await.is_err() {
                            break;
                        }
                    }
                    sender.close();
                }));
            }
            End::Receiver(receiver) => {
                let (receiver, mesh, context) = (receiver.connect().await, mesh.clone(), context.clone());
                receivers.push(glommio::spawn_local(async move {
                    while let Some(wire) = receiver.recv().await {
                        mesh.receive(&context, ShardIndex(from), wire);
                    }
                }));
            }
        }
    }
    let result = if me.0 == 0 { Some(main(context.clone()).await) } else { None };
    if me.0 == 0 {
        outgoing.values().for_each(|queue| queue.close());
    } else {
        // Shard 0's channel is the first: when it closes, the pool ends.
        let mut receivers_iter = receivers.drain(..);
        receivers_iter.next().expect("there is a channel from shard 0").await;
        outgoing.values().for_each(|queue| queue.close());
        for receiver in receivers_iter {
            receiver.await;
        }
    }
    for receiver in receivers {
        receiver.await;
    }
    for sender in senders {
        sender.await;
    }
    ring.shutdown().await;
    Ok(result)
}
