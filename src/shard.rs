//! A shard: one executor's part of every clone, and what shards ask of each other.
//!
//! Each shard owns, of each clone, the zones z with z mod N = its number: their bits, the order of what is in
//! flight on them, their hydration. Nobody else touches them; others ask by message. The messages are plain data,
//! the transport ([`Mesh`]) is below: channels between executors in production, queues in simulation.

pub mod copy;
pub mod copy_pool;
pub mod direct_writes;
pub mod dispatch;
pub mod gate;
pub mod hydrator;
pub mod inflight;
pub mod locks;
pub mod plan;
pub mod pool;
pub mod slice;

use crate::coordinator::Coordinator;
use crate::disk::Disk;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Completion, Extent, LocalBoxFuture, Request};
use crate::meta::region_map::ZoneSnapshot;
use crate::source::Source;
use crate::units::{ByteRange, CloneId, Geometry, ShardIndex, ZoneIndex};

use copy_pool::CopyPool;
use gate::Gate;
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
    /// Wait until nothing is in flight. The clone is stopping or suspended, so nothing new begins.
    Drain {
        clone: CloneId,
    },
    /// Let no client's request pass, and wait until those inside have ended.
    Hold {
        clone: CloneId,
    },
    /// Let clients' requests pass again, and hydrate.
    Open {
        clone: CloneId,
    },
    /// Write what the old last region lacks, before the clone's new size counts.
    FillTail {
        clone: CloneId,
    },
    /// The new size is durable: go on with what was staged.
    Grow {
        clone: CloneId,
    },
    /// The clone does not grow: forget what was staged.
    Unstage {
        clone: CloneId,
    },
    /// Fail the clients' requests that are held, and all later ones.
    Shut {
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
    gates: RefCell<HashMap<CloneId, Rc<Gate>>>,
    /// Slices of clones that are growing.
    staged: RefCell<HashMap<CloneId, Rc<CloneSlice>>>,
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
    /// Forgets a clone. What is in flight keeps its parts alive; requests that are held fail.
    pub fn detach(&self, clone: CloneId) {
        let gate = self.gates.borrow_mut().remove(&clone);
        if let Some(gate) = gate {
            gate.shut();
        }
        self.slices.borrow_mut().remove(&clone);
        self.coordinators.borrow_mut().remove(&clone);
        self.staged.borrow_mut().remove(&clone);
    }

    pub fn slice(&self, clone: CloneId) -> Result<Rc<CloneSlice>> {
        let slice = self.slices.borrow().get(&clone).cloned();
        slice.ok_or_else(|| Error::new(ErrorKind::Shutdown, format!("clone {clone} is gone")))
    }
    /// Prepares the slice of a clone that grows; the clone is suspended. Destination and source have the new size.
    pub fn stage(
        &self,
        clone: CloneId,
        geometry: Geometry,
        destination: Rc<dyn Disk>,
        source: Rc<dyn Source>,
    ) -> Result<()> {
        let grown = self.slice(clone)?.grown(geometry, destination, source);
        self.staged.borrow_mut().insert(clone, grown);
        Ok(())
    }
    fn staged(&self, clone: CloneId) -> Result<Rc<CloneSlice>> {
        let staged = self.staged.borrow().get(&clone).cloned();
        staged.ok_or_else(|| Error::new(ErrorKind::Shutdown, format!("clone {clone} does not grow here")))
    }
    /// The source for other shards. While the clone grows, that of the new size: it begins with all of the old one.
    fn source(&self, clone: CloneId) -> Result<Rc<dyn Source>> {
        self.staged(clone).or_else(|_| self.slice(clone))?.source()
    }

    /// What all frontends of this shard lead the clone's requests through. Made when it is first asked for.
    pub fn gate(&self, clone: CloneId) -> Rc<Gate> {
        self.gates.borrow_mut().entry(clone).or_default().clone()
    }
    pub fn coordinator(&self, clone: CloneId) -> Result<Rc<Coordinator>> {
        let coordinator = self.coordinators.borrow().get(&clone).cloned();
        coordinator.ok_or_else(|| Error::new(ErrorKind::Shutdown, format!("clone {clone} is gone")))
    }

    /// Requests that wait at the clone's gate on this shard.
    pub fn waiting_at_gate(&self, clone: CloneId) -> u64 {
        self.gates.borrow().get(&clone).map_or(0, |gate| gate.waiting())
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
            ShardRequest::SourceRead { clone, range } => Ok(ShardReply::Data(self.source(clone)?.read(range).await?)),
            ShardRequest::SourceAllocation { clone, range } => {
                Ok(ShardReply::Allocation(self.source(clone)?.allocation(range).await?))
            }
            ShardRequest::Stats { clone } => Ok(ShardReply::Stats(Box::new(self.slice(clone)?.stats()))),
            ShardRequest::Drain { clone } => {
                self.slice(clone)?.drain().await;
                Ok(ShardReply::Done)
            }
            ShardRequest::Hold { clone } => {
                self.slice(clone)?;
                let gate = self.gate(clone);
                gate.close();
                gate.emptied().await;
                Ok(ShardReply::Done)
            }
            ShardRequest::Open { clone } => {
                let slice = self.slice(clone)?;
                self.gate(clone).open();
                slice.wake();
                Ok(ShardReply::Done)
            }
            ShardRequest::FillTail { clone } => {
                self.staged(clone)?.fill_tail(&*self.slice(clone)?).await?;
                Ok(ShardReply::Done)
            }
            ShardRequest::Grow { clone } => {
                let (grown, old) = (self.staged(clone)?, self.slice(clone)?);
                grown.replace(&old);
                self.staged.borrow_mut().remove(&clone);
                self.slices.borrow_mut().insert(clone, grown.clone());
                grown.start_hydration();
                Ok(ShardReply::Done)
            }
            ShardRequest::Unstage { clone } => {
                self.staged.borrow_mut().remove(&clone);
                Ok(ShardReply::Done)
            }
            ShardRequest::Shut { clone } => {
                self.slice(clone)?;
                self.gate(clone).shut();
                Ok(ShardReply::Done)
            }
        }
    }
}
