//! What the shards of a clone read from: how each of them gets its own view of one source.
//!
//! The coordinator's shard has the source open. A file is opened anew for the others; an NBD export too, if it allows
//! several connections and they get theirs, else they ask the coordinator's shard. Whatever it is, a clone sees so many bytes from its
//! start, and zeros behind them ([`PaddedSource`]).

use super::prepare::{OpenSource, OpenSourceKind};
use crate::bail;
use crate::disk::ring::{DiskParts, RingDisk};
use crate::error::Result;
use crate::shard::pool::ShardContext;
use crate::shard::{COORDINATOR, Mesh};
use crate::source::Source;
use crate::source::file::FileSource;
use crate::source::identity::SourceIdentity;
use crate::source::nbd::{NbdSource, NbdSourceOptions};
use crate::source::padded::PaddedSource;
use crate::source::remote::RemoteSource;
use crate::source::uri::NbdUri;
use crate::units::CloneId;
use std::rc::Rc;
use std::sync::Arc;

/// What another shard makes its source from.
enum Parts {
    Zeros,
    File(DiskParts),
    Nbd {
        uri: NbdUri,
        options: NbdSourceOptions,
        size: u64,
        expected: Option<Arc<SourceIdentity>>,
    },
    Remote,
    /// What the shard's slice has already, seen with another size.
    Present,
}

/// How a shard gets its source. Can be sent there.
pub struct SourceRecipe {
    parts: Parts,
    /// So many bytes of the source are seen; zeros follow.
    shown: u64,
    /// Of the clone, in bytes.
    size: u64,
}

impl SourceRecipe {
    /// `source`: as it is open on the coordinator's shard; `None` when only zeros are seen.
    pub fn new(source: Option<&OpenSource>, shown: u64, size: u64) -> Result<Self> {
        let parts = match source.map(|source| &source.kind) {
            None => Parts::Zeros,
            Some(OpenSourceKind::File { parts, .. }) => Parts::File(parts.duplicate()?),
            Some(OpenSourceKind::Nbd { source, uri, options }) => match source.info().multi_conn {
                true => Parts::Nbd {
                    uri: uri.clone(),
                    options: options.clone(),
                    size: source.size(),
                    expected: source.expected(),
                },
                false => Parts::Remote,
            },
        };
        Ok(Self { parts, shown, size })
    }

    /// The source that a running slice has, for a clone that grows.
    pub fn present(shown: u64, size: u64) -> Self {
        Self { parts: Parts::Present, shown, size }
    }

    /// Opens the source on this shard. `local`: what is open here already.
    pub async fn open(
        self,
        context: &Rc<ShardContext>,
        clone: CloneId,
        local: Option<Rc<dyn Source>>,
    ) -> Result<Rc<dyn Source>> {
        let size_shown = self.size;
        let remote =
            || -> Rc<dyn Source> { Rc::new(RemoteSource::new(clone, COORDINATOR, size_shown, context.mesh.clone())) };
        let inner: Rc<dyn Source> = match (local, self.parts) {
            (Some(local), _) => local,
            (None, Parts::Zeros) => return Ok(PaddedSource::zeros(self.size)),
            (None, Parts::File(parts)) => Rc::new(FileSource::new(Rc::new(RingDisk::new(parts)))),
            (None, Parts::Nbd { uri, options, size, expected }) => {
                let source = match NbdSource::connect(uri, options, context.env.clone()).await {
                    Ok(source) => source,
                    // A server may take fewer connections than it says, or have gone since. The coordinator's shard has one.
                    Err(error) => {
                        log::warn!("shard {} reads through another shard's connection: {error}", context.mesh.me());
                        return Ok(remote());
                    }
                };
                if source.size() != size {
                    bail!(SourceChanged, "the source's size changed while it was opened");
                }
                if let Some(expected) = expected {
                    source.expect(expected);
                }
                Rc::new(source)
            }
            // The other shard's view is the clone's already.
            (None, Parts::Remote) => return Ok(remote()),
            (None, Parts::Present) => context.shard.slice(clone)?.source()?,
        };
        Ok(PaddedSource::view(inner, self.shown, self.size))
    }
}
