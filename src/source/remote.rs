//! A source that another shard has: for peers that allow only one connection.

use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::shard::{Mesh, ShardReply, ShardRequest};
use crate::source::Source;
use crate::units::{ByteRange, CloneId, ShardIndex};
use std::rc::Rc;

/// Forwards reads to the shard that has the connection.
pub struct RemoteSource {
    clone: CloneId,
    owner: ShardIndex,
    size: u64,
    mesh: Rc<dyn Mesh>,
}

impl RemoteSource {
    /// `owner` is another shard, whose slice of `clone` has the real source, of `size` bytes.
    pub fn new(clone: CloneId, owner: ShardIndex, size: u64, mesh: Rc<dyn Mesh>) -> Self {
        assert!(owner != mesh.me(), "a source is not remote to itself");
        Self { clone, owner, size, mesh }
    }
}

fn unexpected() -> Error {
    Error::new(ErrorKind::Protocol, "another shard gave an answer to another question")
}

impl Source for RemoteSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        let answer = self.mesh.call(self.owner, ShardRequest::SourceRead { clone: self.clone, range });
        Box::pin(async move {
            match answer.await? {
                ShardReply::Data(data) => Ok(data),
                _ => Err(unexpected()),
            }
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        let answer = self.mesh.call(self.owner, ShardRequest::SourceAllocation { clone: self.clone, range });
        Box::pin(async move {
            match answer.await? {
                ShardReply::Allocation(extents) => Ok(extents),
                _ => Err(unexpected()),
            }
        })
    }
}
