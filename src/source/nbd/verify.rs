//! Whether a connection that was made again still leads to the same source: its fingerprint is read through that
//! connection alone, before it serves anybody.
//!
//! Another image of the same size behind the same address would else be mixed with what was copied already. As the
//! fingerprint, this catches mistakes; it is no protection from malice.

use super::assembly::Ask;
use super::link::{Answer, Job, Link};
use crate::bail;
use crate::dma_buf::DmaBuf;
use crate::error::Result;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::local::oneshot;
use crate::source::Source;
use crate::source::fingerprint::sample;
use crate::source::identity::{self, SourceIdentity};
use crate::units::ByteRange;
use std::time::Duration;

/// What a connection turned out to lead to.
pub(super) enum Verdict {
    Same,
    Another,
    /// The server did not let all samples be read: one of them may be on a bad sector. Those that it did are the same.
    Unknown(crate::error::Error),
}

/// Reads through `link`, which somebody else drives.
pub(super) async fn verify(link: &Link, expected: &SourceIdentity, now: Duration) -> Verdict {
    let seen = match sample(&Samples { link, size: expected.size(), now }).await {
        Ok(seen) => seen,
        Err(error) => return Verdict::Unknown(error),
    };
    match (expected.check(&seen.samples), seen.error) {
        (identity::Verdict::Another, _) => Verdict::Another,
        (identity::Verdict::Same | identity::Verdict::Unknown, None) => Verdict::Same,
        (_, Some(error)) => Verdict::Unknown(error),
    }
}

/// One connection as a source.
struct Samples<'a> {
    link: &'a Link,
    size: u64,
    now: Duration,
}

impl Source for Samples<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            let (reply, answer) = oneshot();
            self.link.start(Job { ask: Ask::Read, range, reply, submitted: self.now, losses: 0 }, self.now);
            match answer.await {
                Some(Ok(Answer::Data(data))) => Ok(data),
                Some(Ok(Answer::Failed(error))) => bail!(Io, "read of {range}: the server says {}", error.code),
                Some(Err(error)) => Err(error),
                _ => bail!(Io, "read of {range}: no answer"),
            }
        })
    }

    /// Nobody asks.
    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move { Ok(vec![Extent { len: range.len(), state: Allocation::DATA }]) })
    }
}
