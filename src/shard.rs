//! A shard: one executor's part of every clone, and what shards ask of each other.
//!
//! Each shard owns, of each clone, the zones z with z mod N = its number: their bits, the order of what is in
//! flight on them, their hydration. Nobody else touches them; others ask by message. The messages are plain data,
//! the transport ([`Mesh`]) is below: channels between executors in production, queues in simulation.

pub mod copy;
pub mod copy_pool;
pub mod dispatch;
pub mod hydrator;
pub mod inflight;
pub mod locks;
pub mod plan;
pub mod pool;
pub mod slice;

use crate::coordinator::Coordinator;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Completion, Extent, LocalBoxFuture, Request};
use crate::meta::region_map::ZoneSnapshot;
use crate::units::{ByteRange, CloneId, ShardIndex, ZoneIndex};

use copy_pool::CopyPool;
use slice::{CloneSlice, SliceStats};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// The shard that coordinates the commits of every clone.
pub const COORDINATOR: ShardIndex = ShardIndex(0);

/// What one shard asks of another.
#[derive(Debug)]
pub enum ShardRequest {
    /// A client's request, inside one zone of the receiver. Not Flush.
    Io {
        clone: CloneId,
        request: Request,
    },
    /// To the coordinator: make everything acknowledged so far durable.
    Commit {
        clone: CloneId,
    },
    /// From the coordinator: hand over the bits whose data writes have completed.
    Snapshot {
        clone: CloneId,
    },
    /// From the coordinator: the snapshot of these zones is durable.
    Committed {
        clone: CloneId,
        zones: Vec<ZoneIndex>,
    },
    /// From the coordinator: everything is hydrated and durable; let go of the map and the source.
    Release {
        clone: CloneId,
    },
    /// Settings changed, or the source came back: look again.
    Wake {
        clone: CloneId,
    },
    /// To the shard that has the source's only connection.
    SourceRead {
        clone: CloneId,
        range: ByteRange,
    },
    SourceAllocation {
        clone: CloneId,
        range: ByteRange,
    },
    /// What this shard has done so far.
    Stats {
        clone: CloneId,
    },
    /// Stop hydrating and wait until nothing is in flight.
    Drain {
        clone: CloneId,
    },
}

/// The answers.
#[derive(Debug)]
pub enum ShardReply {
    Done,
    Completion(Completion),
    Zones(Vec<ZoneSnapshot>),
    Data(DmaBuf),
    Allocation(Vec<Extent<Allocation>>),
    Stats(Box<SliceStats>),
}

/// The way to the other shards.
pub trait Mesh {
    fn me(&self) -> ShardIndex;
    fn shards(&self) -> u16;
    /// Asks a shard, itself included. The request is carried out even if the answer is not awaited.
    fn call(&self, to: ShardIndex, request: ShardRequest) -> LocalBoxFuture<'static, Result<ShardReply>>;
}

/// One shard: its slices of all clones, and on the coordinator their coordinators.
#[derive(Default)]
pub struct Shard {
    slices: RefCell<HashMap<CloneId, Rc<CloneSlice>>>,
    coordinators: RefCell<HashMap<CloneId, Rc<Coordinator>>>,
    copy_pool: Rc<CopyPool>,
}

impl Shard {
    /// `io_memory`: for copies, in bytes; see [`CopyPool`].
    pub fn new(io_memory: u64) -> Self {
        Self { copy_pool: Rc::new(CopyPool::new(io_memory)), ..Self::default() }
    }

    /// What the copies of all slices here share.
    pub fn copy_pool(&self) -> &Rc<CopyPool> {
        &self.copy_pool
    }

    pub fn attach(&self, slice: Rc<CloneSlice>) {
        let before = self.slices.borrow_mut().insert(slice.id(), slice);
        assert!(before.is_none(), "a clone is attached once");
    }
    pub fn attach_coordinator(&self, clone: CloneId, coordinator: Rc<Coordinator>) {
        let before = self.coordinators.borrow_mut().insert(clone, coordinator);
        assert!(before.is_none(), "a clone has one coordinator");
    }
    /// Forgets a clone. What is in flight keeps its parts alive.
    pub fn detach(&self, clone: CloneId) {
        self.slices.borrow_mut().remove(&clone);
        self.coordinators.borrow_mut().remove(&clone);
    }

    pub fn slice(&self, clone: CloneId) -> Result<Rc<CloneSlice>> {
        let slice = self.slices.borrow().get(&clone).cloned();
        slice.ok_or_else(|| Error::new(ErrorKind::Shutdown, format!("clone {clone} is gone")))
    }
    pub fn coordinator(&self, clone: CloneId) -> Result<Rc<Coordinator>> {
        let coordinator = self.coordinators.borrow().get(&clone).cloned();
        coordinator.ok_or_else(|| Error::new(ErrorKind::Shutdown, format!("clone {clone} is gone")))
    }

    /// All slices, by name.
    pub fn slices(&self) -> Vec<Rc<CloneSlice>> {
        let mut slices: Vec<_> = self.slices.borrow().values().cloned().collect();
        slices.sort_by(|a, b| a.state().name.cmp(&b.state().name));
        slices
    }
    /// All coordinators, by name.
    pub fn coordinators(&self) -> Vec<Rc<Coordinator>> {
        let mut coordinators: Vec<_> = self.coordinators.borrow().values().cloned().collect();
        coordinators.sort_by(|a, b| a.state().name.cmp(&b.state().name));
        coordinators
    }

    /// Carries out what another shard (or this one) asks.
    pub async fn handle(&self, request: ShardRequest) -> Result<ShardReply> {
        match request {
            ShardRequest::Io { clone, request } => {
                Ok(ShardReply::Completion(self.slice(clone)?.execute(request).await?))
            }
            ShardRequest::Commit { clone } => {
                self.coordinator(clone)?.commit().await?;
                Ok(ShardReply::Done)
            }
            ShardRequest::Snapshot { clone } => Ok(ShardReply::Zones(self.slice(clone)?.take_snapshot())),
            ShardRequest::Committed { clone, zones } => {
                self.slice(clone)?.committed(&zones);
                Ok(ShardReply::Done)
            }
            ShardRequest::Release { clone } => {
                self.slice(clone)?.release();
                Ok(ShardReply::Done)
            }
            ShardRequest::Wake { clone } => {
                self.slice(clone)?.wake();
                Ok(ShardReply::Done)
            }
            ShardRequest::SourceRead { clone, range } => {
                Ok(ShardReply::Data(self.slice(clone)?.source()?.read(range).await?))
            }
            ShardRequest::SourceAllocation { clone, range } => {
                Ok(ShardReply::Allocation(self.slice(clone)?.source()?.allocation(range).await?))
            }
            ShardRequest::Stats { clone } => Ok(ShardReply::Stats(Box::new(self.slice(clone)?.stats()))),
            ShardRequest::Drain { clone } => {
                self.slice(clone)?.drain().await;
                Ok(ShardReply::Done)
            }
        }
    }
}
