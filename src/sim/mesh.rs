//! The way between shards: messages of one pair keep their order and take a random time.

use super::executor::Sim;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::oneshot;
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use crate::shard::{Mesh, Shard, ShardReply, ShardRequest};
use crate::units::ShardIndex;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Decides whether a request from one shard to another is lost.
pub type Breakage = Box<dyn Fn(ShardIndex, &ShardRequest) -> bool>;

/// All shards of the machine.
pub struct Net {
    sim: Sim,
    shards: Vec<Rc<Shard>>,
    /// When the last message of each ordered pair arrives.
    arrivals: RefCell<BTreeMap<(u16, u16), Duration>>,
    pub latency_us_max: Cell<u64>,
    breakage: RefCell<Option<Breakage>>,
}

impl Net {
    pub fn new(sim: &Sim, shards: u16) -> Rc<Self> {
        Self::with_io_memory(sim, shards, IO_MEMORY_DEFAULT)
    }

    /// Each shard has so much memory for copies.
    pub fn with_io_memory(sim: &Sim, shards: u16, io_memory: u64) -> Rc<Self> {
        Rc::new(Self {
            sim: sim.clone(),
            shards: (0..shards).map(|_| Rc::new(Shard::new(io_memory))).collect(),
            arrivals: RefCell::default(),
            latency_us_max: Cell::new(30),
            breakage: RefCell::default(),
        })
    }
    pub fn shard(&self, index: ShardIndex) -> &Rc<Shard> {
        &self.shards[usize::from(index.0)]
    }
    pub fn shards(&self) -> u16 {
        self.shards.len() as u16
    }
    /// Requests for which this is true fail as if their shard had ended, those to the own shard too.
    pub fn break_calls(&self, breakage: impl Fn(ShardIndex, &ShardRequest) -> bool + 'static) {
        *self.breakage.borrow_mut() = Some(Box::new(breakage));
    }

    fn arrival(&self, from: ShardIndex, to: ShardIndex) -> Duration {
        let us = self.sim.draw(|rng| rng.between(1, self.latency_us_max.get()));
        let mut arrivals = self.arrivals.borrow_mut();
        let last = arrivals.entry((from.0, to.0)).or_default();
        *last = (self.sim.now() + Duration::from_micros(us)).max(*last + Duration::from_nanos(1));
        *last
    }
}

/// One shard's end of the [`Net`].
pub struct SimMesh {
    me: ShardIndex,
    net: Weak<Net>,
    shards: u16,
}

impl SimMesh {
    pub fn new(net: &Rc<Net>, me: ShardIndex) -> Rc<Self> {
        Rc::new(Self { me, net: Rc::downgrade(net), shards: net.shards() })
    }
}

impl Mesh for SimMesh {
    fn me(&self) -> ShardIndex {
        self.me
    }
    fn shards(&self) -> u16 {
        self.shards
    }

    fn call(&self, to: ShardIndex, request: ShardRequest) -> LocalBoxFuture<'static, Result<ShardReply>> {
        let gone = || Error::new(ErrorKind::Shutdown, "the machine is gone");
        let Some(net) = self.net.upgrade() else { return Box::pin(async move { Err(gone()) }) };
        if net.breakage.borrow().as_ref().is_some_and(|breaks| breaks(to, &request)) {
            return Box::pin(async move { Err(gone()) });
        }
        let (me, shard) = (self.me, net.shard(to).clone());
        if to == me {
            return Box::pin(async move { shard.handle(request).await });
        }
        let (sender, receiver) = oneshot();
        let arrival = net.arrival(me, to);
        let sim = net.sim.clone();
        drop(net);
        let net = self.net.clone();
        sim.clone().spawn(async move {
            sim.sleep(arrival.saturating_sub(sim.now())).await;
            let reply = shard.handle(request).await;
            let Some(arrival) = net.upgrade().map(|net| net.arrival(to, me)) else { return };
            sim.sleep(arrival.saturating_sub(sim.now())).await;
            sender.send(reply);
        });
        Box::pin(async move { receiver.await.unwrap_or_else(|| Err(gone())) })
    }
}
