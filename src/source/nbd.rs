//! A source that is an NBD export.
//!
//! One [`NbdSource`] belongs to one executor. When the server allows several connections
//! ([`NbdInfo::multi_conn`]) every shard may have its own; otherwise one of them has it for all.
//!
//! * `handshake`: option negotiation. `dial`: connecting. `link`: one connection, requests and replies.
//! * `assembly`: checks what one reply consists of (pure). `status_cache`: answers about allocation (pure).
//! * `verify`: whether a new connection leads to the same source.
//! * `client`: the queue, the connections, reconnecting, timeouts; read there what happens when the server goes.
//!
//! Nothing here writes to the export: READ, BLOCK_STATUS and DISC are the only commands it can encode.

mod assembly;
mod client;
mod dial;
mod handshake;
mod link;
mod status_cache;
#[cfg(test)]
mod tests;
mod verify;

use crate::bail;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::io_frontend::nbd::proto::TransmissionFlags;
use crate::io_frontend::request::{Allocation, Extent, LocalBoxFuture};
use crate::local::Semaphore;
use crate::source::Source;
use crate::source::identity::SourceIdentity;
use crate::source::uri::NbdUri;
use crate::units::ByteRange;
use crate::version::Version;
use assembly::{Ask, ServerError};
use client::Client;
use link::Answer;
use status_cache::StatusCache;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Of what is asked of a server.
pub const VERSION: Version = Version(1, 0, 0);
/// How much one question about allocation asks ahead, in bytes: its answer serves the ones that follow.
const STATUS_AHEAD: u64 = 1 << 30;
/// How often a read is split anew because the server came back with a smaller limit.
const RESPLITS_MAX: usize = 8;

/// How to use an export. Plain data: give each shard a copy. Times are not 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdSourceOptions {
    /// How many connections to make when the server allows several.
    pub connections: usize,
    /// Requests in flight per connection.
    pub depth: usize,
    /// Bytes in flight per connection; exceeded by at most one request.
    pub in_flight_bytes_max: u64,
    /// Limit for connecting, and again for the negotiation.
    pub connect_timeout: Duration,
    /// A connection on which requests wait and nothing arrives for this long is given up and made again.
    pub request_timeout: Duration,
    /// A request fails when the source answered nothing at all for this long.
    pub source_timeout: Duration,
}

impl Default for NbdSourceOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            depth: 64,
            in_flight_bytes_max: 16 << 20,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            source_timeout: Duration::from_secs(60),
        }
    }
}

/// What the server said of the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NbdInfo {
    /// In bytes, not 0.
    pub size: u64,
    pub read_only: bool,
    /// Several connections see the same content: each shard may have an [`NbdSource`] of its own.
    pub multi_conn: bool,
    pub structured_replies: bool,
    /// It tells what is allocated.
    pub allocation: bool,
    /// Block sizes in bytes; powers of two.
    pub block_min: u32,
    pub block_preferred: u32,
    /// The longest read, in bytes; a power of two.
    pub read_len_max: u32,
}

/// How the connection to the server is doing.
#[derive(Clone, Debug, Default)]
pub struct SourceState {
    /// Connections that work now; none: the source is lost, requests wait.
    pub connections: usize,
    /// How often all connections were lost.
    pub losses: u64,
    /// How often it was found again.
    pub reconnects: u64,
    /// Why a connection was last lost or not made.
    pub last_error: Option<Error>,
    /// The server came back with another source: nothing is read from it any more.
    pub changed: bool,
}

impl SourceState {
    pub fn is_connected(&self) -> bool {
        self.connections > 0
    }
}

/// What happened to a source.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// The last connection is lost, and why; reconnecting has begun.
    Lost(Error),
    /// Connected again.
    Found,
    /// The server came back with another source: nothing is read from it any more.
    Changed(Error),
}

/// An NBD export as a source. Dropping it ends its connections.
pub struct NbdSource {
    client: Rc<Client>,
    info: NbdInfo,
    /// The last answers about allocation.
    status: RefCell<StatusCache>,
    /// One question about allocation at a time: the next one may be answered by what came.
    asking: Rc<Semaphore>,
}

impl NbdSource {
    /// Connects and negotiates: one attempt. The error is one line that says what is wrong: refused, no such
    /// socket or host, no such export, TLS needed, not an NBD server, an empty export, ...
    ///
    /// # Panics
    /// When the executor has no ring ([`crate::ring::Ring::start`]).
    pub async fn connect(uri: NbdUri, options: NbdSourceOptions, env: Rc<dyn Env>) -> Result<Self> {
        let client = Client::connect(uri, options, env).await?;
        let export = client.first_export();
        let info = NbdInfo {
            size: export.size,
            read_only: export.flags.contains(TransmissionFlags::READ_ONLY),
            multi_conn: export.flags.contains(TransmissionFlags::CAN_MULTI_CONN),
            structured_replies: export.structured,
            allocation: export.allocation.is_some(),
            block_min: export.block_min,
            block_preferred: export.block_preferred,
            read_len_max: export.read_len_max,
        };
        Ok(Self { client, info, status: RefCell::default(), asking: Semaphore::new(1) })
    }

    /// What the server said when this was connected.
    pub fn info(&self) -> NbdInfo {
        self.info
    }

    pub fn state(&self) -> SourceState {
        self.client.state()
    }

    /// From now on a connection that is made again must lead to the source that is known, else the source has changed.
    pub fn expect(&self, identity: Arc<SourceIdentity>) {
        self.client.expect(identity);
    }

    /// What is expected of it.
    pub fn expected(&self) -> Option<Arc<SourceIdentity>> {
        self.client.expected()
    }

    /// Calls `listener` at every event, on this executor, outside of any borrow. One listener; the last one counts.
    pub fn on_event(&self, listener: impl Fn(&SourceEvent) + 'static) {
        self.client.set_listener(Rc::new(listener));
    }

    /// Says goodbye to the server. Requests that wait fail with Shutdown. Takes at most about a second.
    pub async fn close(self) {
        self.client.close().await;
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        if range.end() > self.info.size {
            bail!(InvalidRequest, "source {}: {range} is beyond its end at {}", self.client.uri(), self.info.size);
        }
        Ok(())
    }

    async fn ask(&self, ask: Ask, range: ByteRange) -> Result<Answer> {
        let answer = self.client.submit(ask, range)?;
        answer.await.unwrap_or_else(|| Err(self.client.closed_error()))
    }

    fn failed(&self, what: &str, range: ByteRange, error: &ServerError) -> Error {
        let message = if error.message.is_empty() { String::new() } else { format!(" ({})", error.message) };
        let text = format!("source {}: {what} of {range}: the server says {}{message}", self.client.uri(), error.code);
        Error::io(libc::EIO, text)
    }

    /// Reads `range` in pieces of at most the present limit; `None` when the limit shrank meanwhile.
    async fn read_pieces(&self, range: ByteRange) -> Result<Option<DmaBuf>> {
        // The limit is a power of two and not less than a block: pieces cut at its multiples, widened to whole
        // blocks, stay within it.
        let pieces: Vec<_> = range.split_at_multiples(self.client.read_len_max()).collect();
        let answers = pieces.iter().map(|piece| self.client.submit(Ask::Read, *piece)).collect::<Result<Vec<_>>>()?;
        let mut whole: Option<DmaBuf> = None;
        for (piece, answer) in pieces.iter().zip(answers) {
            let part = match answer.await.unwrap_or_else(|| Err(self.client.closed_error()))? {
                Answer::Data(part) => part,
                Answer::Failed(error) => return Err(self.failed("read", *piece, &error)),
                Answer::TooLong => return Ok(None),
                Answer::Status(..) | Answer::NoStatus => {
                    bail!(Protocol, "source {}: block status for a read", self.client.uri())
                }
            };
            if *piece == range {
                return Ok(Some(part));
            }
            let whole = whole.get_or_insert_with(|| {
                DmaBuf::with_head((range.start() % DMA_ALIGN as u64) as usize, range.len() as usize)
            });
            let at = (piece.start() - range.start()) as usize;
            whole[at..at + part.len()].copy_from_slice(&part);
        }
        Ok(whole)
    }
}

impl Source for NbdSource {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
        Box::pin(async move {
            self.check(range)?;
            for _ in 0..RESPLITS_MAX {
                if let Some(data) = self.read_pieces(range).await? {
                    return Ok(data);
                }
            }
            bail!(Protocol, "source {}: the server's limits change all the time", self.client.uri())
        })
    }

    fn allocation(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
        Box::pin(async move {
            self.check(range)?;
            let all_data = || vec![Extent { len: range.len(), state: Allocation::DATA }];
            if !self.info.allocation {
                return Ok(all_data());
            }
            let known = self.status.borrow().get(range);
            if !known.is_empty() {
                return Ok(known);
            }
            let _turn = self.asking.acquire(1).await;
            let known = self.status.borrow().get(range);
            if !known.is_empty() {
                return Ok(known);
            }
            let end = self.info.size.min(range.start().saturating_add(STATUS_AHEAD));
            let ahead = ByteRange::between(range.start(), end).unwrap_or(range);
            match self.ask(Ask::Status, ahead).await? {
                Answer::Status(start, descriptors) => {
                    self.status.borrow_mut().insert(start, &descriptors);
                    let known = self.status.borrow().get(range);
                    Ok(if known.is_empty() { all_data() } else { known })
                }
                Answer::Failed(error) => {
                    self.client.warn(&self.failed("block status (taken for data)", range, &error));
                    Ok(all_data())
                }
                Answer::NoStatus | Answer::TooLong | Answer::Data(_) => Ok(all_data()),
            }
        })
    }
}

impl Drop for NbdSource {
    fn drop(&mut self) {
        self.client.shut(false);
    }
}
