//! Dispatch: from a frontend's request to the shards that own its zones.
//!
//! What needs nothing of the owner (see [`super::slice::direct`]) is served here, whole. Of the rest, a request that lies in
//! zones of this shard takes no channel. One that crosses zones is cut, its pieces run at the same time, and it completes
//! when all have; the first failure is its result.
//!
//! Every request passes the clone's gate first, and is inside until its end: see [`super::gate`]. What the clone is
//! (its size above all) is looked at only inside.

use super::gate::{Gate, Pass};
use super::slice::direct::DirectIo;
use super::{COORDINATOR, Mesh, Shard, ShardReply, ShardRequest};
use crate::clone_state::CloneState;
use crate::disk::EXTENTS_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{
    Completion, LocalBoxFuture, Request, RequestFlags, StatusExtents, Volume, VolumeInfo, push_extent,
};
use crate::local::join_all;
use crate::units::{ByteRange, ShardIndex};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// Pieces of one request that run at a time; a 4 GiB trim of small regions has dozens.
const PIECES_AT_A_TIME: usize = 16;

/// A clone as the frontends of one shard see it.
pub struct Dispatcher {
    state: Arc<CloneState>,
    export: String,
    shard: Rc<Shard>,
    gate: Rc<Gate>,
    mesh: Rc<dyn Mesh>,
    preferred_block: u32,
}

/// A frontend's own read or write, inside the clone's gate. Kept until that has ended.
pub struct DirectAccess {
    io: DirectIo,
    pass: Pass,
}

impl DirectAccess {
    /// See [`DirectIo::file`].
    pub fn file(&self) -> &OwnedFd {
        self.io.file()
    }
    /// Whether somebody may wait for its end: then that wakes a task.
    pub fn is_waited_for(&self) -> bool {
        self.pass.gate().is_closed()
    }
    /// See [`DirectIo::done`].
    pub fn done(self) {
        self.io.done();
    }
}

impl Dispatcher {
    /// `export` is the name that clients know it by.
    pub fn new(state: Arc<CloneState>, export: String, shard: Rc<Shard>, mesh: Rc<dyn Mesh>) -> Rc<Self> {
        // Preferred: what causes neither read-modify-write nor a copy larger than the request.
        let preferred_block = state.geometry().region_size().bytes().clamp(4096, 1 << 20) as u32;
        let gate = shard.gate(state.id);
        Rc::new(Self { state, export, shard, gate, mesh, preferred_block })
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        match self.state.geometry().whole().contains(range) {
            true => Ok(()),
            false => {
                let text = format!("clone '{}': {range} are outside the device", self.state.name);
                Err(Error::new(ErrorKind::InvalidRequest, text))
            }
        }
    }

    async fn at_owner(&self, owner: ShardIndex, request: Request) -> Result<Completion> {
        if owner == self.mesh.me() {
            return self.shard.slice(self.state.id)?.execute(request).await;
        }
        match self.mesh.call(owner, ShardRequest::Io { clone: self.state.id, request }).await? {
            ShardReply::Completion(completion) => Ok(completion),
            other => unreachable!("a completion answers I/O, not {other:?}"),
        }
    }

    /// Lets the frontend read or write (not FUA) `range` by itself: see [`super::slice::CloneSlice::begin_direct`]. `None`: it has to submit
    /// a request.
    pub fn begin_direct(&self, range: ByteRange, writes: bool) -> Option<DirectAccess> {
        let pass = self.gate.try_enter()?;
        self.check(range).ok()?;
        let io = self.shard.slice(self.state.id).ok()?.begin_direct(range, writes)?;
        Some(DirectAccess { io, pass })
    }

    fn pieces(&self, range: ByteRange) -> impl Iterator<Item = (ShardIndex, ByteRange)> + use<> {
        let (geometry, shards) = (self.state.geometry(), self.mesh.shards());
        geometry.split_at_zones(range).map(move |(zone, bytes)| (geometry.owner_of(zone, shards), bytes))
    }

    /// Runs `request_of` each piece of `range`, some at a time, and returns the completions in order.
    async fn each(&self, range: ByteRange, request_of: impl Fn(ByteRange) -> Request) -> Result<Vec<Completion>> {
        let mut completions = Vec::new();
        let mut pieces = self.pieces(range).peekable();
        let mut failure = None;
        while pieces.peek().is_some() && failure.is_none() {
            let wave = pieces.by_ref().take(PIECES_AT_A_TIME);
            let wave = wave.map(|(owner, bytes)| {
                Box::pin(self.at_owner(owner, request_of(bytes))) as LocalBoxFuture<'_, Result<Completion>>
            });
            for result in join_all(wave.collect()).await {
                match result {
                    Ok(completion) => completions.push(completion),
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
        }
        failure.map_or(Ok(completions), Err)
    }

    /// A change in many pieces: FUA is one commit at the end, not one per piece.
    async fn change(
        &self,
        range: ByteRange,
        flags: RequestFlags,
        request_of: impl Fn(ByteRange, RequestFlags) -> Request,
    ) -> Result<Completion> {
        let mut pieces = self.pieces(range);
        let (Some((owner, _)), None) = (pieces.next(), pieces.next()) else {
            self.each(range, |bytes| request_of(bytes, flags - RequestFlags::FUA)).await?;
            if flags.contains(RequestFlags::FUA) {
                self.commit().await?;
            }
            return Ok(Completion::Done);
        };
        self.at_owner(owner, request_of(range, flags)).await
    }

    async fn commit(&self) -> Result<()> {
        let committed = self.mesh.call(COORDINATOR, ShardRequest::Commit { clone: self.state.id }).await;
        committed.map(|_| ()).inspect_err(|_| self.state.flush_failed())
    }

    async fn dispatch(&self, request: Request) -> Result<Completion> {
        let range = request.range();
        if let Some(range) = range {
            self.check(range)?;
            let slice = self.shard.slice(self.state.id)?;
            if let Some(direct) = slice.direct(&request) {
                return slice.execute_direct(request, direct).await;
            }
        }
        match request {
            Request::Read(range) => {
                let mut data = Vec::new();
                for completion in self.each(range, Request::Read).await? {
                    let Completion::Data(mut piece) = completion else { unreachable!("data answers a read") };
                    data.append(&mut piece);
                }
                Ok(Completion::Data(data))
            }
            Request::Write { offset, data, flags } => {
                let Some(range) = range else {
                    return Err(Error::new(ErrorKind::InvalidRequest, "a write without data, or beyond all devices"));
                };
                let part = |bytes: ByteRange, flags| {
                    let start = (bytes.start() - offset) as usize;
                    Request::Write {
                        offset: bytes.start(),
                        data: data.slice(start..start + bytes.len() as usize),
                        flags,
                    }
                };
                self.change(range, flags, part).await
            }
            Request::Flush => self.commit().await.map(|()| Completion::Done),
            Request::Trim { range, flags } => {
                self.change(range, flags, |range, flags| Request::Trim { range, flags }).await
            }
            Request::WriteZeroes { range, flags } => {
                self.change(range, flags, |range, flags| Request::WriteZeroes { range, flags }).await
            }
            Request::Cache(range) => self.each(range, Request::Cache).await.map(|_| Completion::Done),
            Request::Status(range) => self.status(range).await.map(Completion::Status),
        }
    }

    /// Zone by zone, until the answer is long enough. Each list must stay without gaps, so one that a zone cut
    /// short gets nothing of the zones after it.
    async fn status(&self, range: ByteRange) -> Result<StatusExtents> {
        let mut whole = StatusExtents::default();
        let (mut allocation_open, mut hydrated_open) = (true, true);
        for (owner, bytes) in self.pieces(range) {
            if !(allocation_open || hydrated_open) {
                break;
            }
            let Completion::Status(piece) = self.at_owner(owner, Request::Status(bytes)).await? else {
                unreachable!("extents answer a status request")
            };
            allocation_open = append(&mut whole.allocation, piece.allocation, bytes.len(), allocation_open);
            hydrated_open = append(&mut whole.hydrated, piece.hydrated, bytes.len(), hydrated_open);
        }
        Ok(whole)
    }
}

/// Appends the extents of a piece of `len` bytes; returns whether more may follow.
fn append<S: PartialEq>(
    whole: &mut Vec<crate::io_frontend::request::Extent<S>>,
    piece: Vec<crate::io_frontend::request::Extent<S>>,
    len: u64,
    open: bool,
) -> bool {
    if !open {
        return false;
    }
    let covered: u64 = piece.iter().map(|extent| extent.len).sum();
    for extent in piece {
        push_extent(whole, extent.len, extent.state);
    }
    covered == len && whole.len() < EXTENTS_MAX
}

impl Volume for Dispatcher {
    fn info(&self) -> VolumeInfo {
        VolumeInfo {
            name: self.export.clone(),
            size: self.state.geometry().size(),
            preferred_block: self.preferred_block,
        }
    }

    fn submit(self: Rc<Self>, request: Request) -> LocalBoxFuture<'static, Result<Completion>> {
        Box::pin(async move {
            let inside =
                self.gate.enter().await.map_err(|error| error.within(format!("clone '{}'", self.state.name)))?;
            let result = self.dispatch(request).await;
            drop(inside);
            result
        })
    }
}
