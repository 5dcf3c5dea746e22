//! One connection in its transmission phase: requests out, replies in.
//!
//! Requests are encoded into an outbox that the sender task writes; the receiver reads replies and completes
//! requests. The receiver alone removes requests from what is in flight, so a payload may be on its way into a
//! request's buffer across an await. Nothing here decides about retries: when the link ends, [`Link::take_all`]
//! gives back what was not answered.
//!
//! The server is not trusted: a reply that breaks the protocol ends the link, never the process.

use crate::bail;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::proto::{
    self, ChunkHeader, ChunkType, Command, ErrorCode, ReplyHeader, RequestHeader, StatusDescriptor,
};
use crate::local::{Notify, oneshot};
use crate::net::Stream;
use crate::source::nbd::assembly::{Ask, Assembly, Outcome, ServerError};
use crate::source::nbd::handshake::{Export, for_people};
use crate::units::ByteRange;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::time::Duration;

/// Receive buffer for headers and small payloads, in bytes: what of a payload arrives with its header is copied.
const INBOX_LEN: usize = 8 << 10;
/// Payloads up to this many bytes are awaited as a whole; longer ones in steps, so that progress shows.
const WAIT_WHOLE_MAX: usize = 256 << 10;
/// Longest payload of a block status chunk, in bytes.
const STATUS_PAYLOAD_MAX: u32 = 4 + 8 * proto::EXTENTS_PER_CHUNK_MAX as u32;
/// Longest payload of an error chunk, in bytes: number, length, message, offset.
const ERROR_PAYLOAD_MAX: u32 = 4 + 2 + u16::MAX as u32 + 8;

/// A request that waits for its answer, across connections.
pub(super) struct Job {
    pub ask: Ask,
    /// What is wanted; on the wire it is widened to the server's blocks.
    pub range: ByteRange,
    pub reply: oneshot::Sender<Result<Answer>>,
    pub submitted: Duration,
    /// How many connections ended with this request in flight.
    pub losses: u32,
}

/// What a request came to.
#[derive(Debug)]
pub(super) enum Answer {
    /// The bytes of [`Job::range`].
    Data(DmaBuf),
    /// The extents from the offset on; at least one.
    Status(u64, Vec<StatusDescriptor>),
    /// The server failed this request.
    Failed(ServerError),
    /// The connection that is there now takes only shorter reads: split again.
    TooLong,
    /// The connection that is there now has no block status.
    NoStatus,
}

struct InFlight {
    job: Job,
    assembly: Assembly,
    sent: Duration,
}

/// A connection.
pub(super) struct Link {
    stream: Stream,
    pub export: Export,
    in_flight: RefCell<HashMap<u64, InFlight>>,
    in_flight_bytes: Cell<u64>,
    next_cookie: Cell<u64>,
    outbox: RefCell<Vec<u8>>,
    wake: Notify,
    /// The sender says goodbye and ends.
    closing: Cell<bool>,
    /// Why it ended; the first reason counts.
    ended: RefCell<Option<Error>>,
    /// When bytes last arrived, or the first request after a quiet time was sent.
    alive: Cell<Duration>,
    answered: Cell<u64>,
}

impl Link {
    pub fn new(stream: Stream, export: Export) -> Self {
        Self {
            stream,
            export,
            in_flight: RefCell::default(),
            in_flight_bytes: Cell::new(0),
            next_cookie: Cell::new(1),
            outbox: RefCell::default(),
            wake: Notify::default(),
            closing: Cell::new(false),
            ended: RefCell::default(),
            alive: Cell::default(),
            answered: Cell::new(0),
        }
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.borrow().len()
    }
    /// Bytes asked for and not answered.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.get()
    }
    /// How many requests this link answered.
    pub fn answered(&self) -> u64 {
        self.answered.get()
    }
    /// Takes no more requests.
    pub fn is_ended(&self) -> bool {
        self.closing.get() || self.ended.borrow().is_some()
    }

    /// Ends the link; the receiver returns, what is in flight stays for [`Self::take_all`].
    pub fn end(&self, cause: Error) {
        self.ended.borrow_mut().get_or_insert(cause);
        self.stream.shutdown();
        self.wake.notify();
    }

    /// Ends the link after telling the server (DISC).
    pub fn disconnect(&self) {
        self.closing.set(true);
        self.wake.notify();
    }

    /// Requests in flight have not been answered for `silence`, or one of them for `age`.
    pub fn is_stuck(&self, now: Duration, silence: Duration, age: Duration) -> bool {
        let in_flight = self.in_flight.borrow();
        !in_flight.is_empty()
            && (now.saturating_sub(self.alive.get()) > silence
                || in_flight.values().any(|request| now.saturating_sub(request.sent) > age))
    }

    /// Takes what was not answered, in the order it was sent.
    pub fn take_all(&self) -> Vec<Job> {
        let mut all: Vec<_> = self.in_flight.borrow_mut().drain().collect();
        self.in_flight_bytes.set(0);
        all.sort_unstable_by_key(|(cookie, _)| *cookie);
        all.into_iter().map(|(_, request)| request.job).collect()
    }

    /// Sends a request, or answers it at once when this connection can't do it.
    pub fn start(&self, job: Job, now: Duration) {
        let outer = job.range.aligned_outward(u64::from(self.export.block_min));
        let range = ByteRange::between(outer.start(), outer.end().min(self.export.size)).unwrap_or(job.range);
        let command = match job.ask {
            Ask::Read if range.len() > u64::from(self.export.read_len_max) => {
                return job.reply.send(Ok(Answer::TooLong));
            }
            Ask::Status if self.export.allocation.is_none() => return job.reply.send(Ok(Answer::NoStatus)),
            Ask::Read => Command::READ,
            Ask::Status => Command::BLOCK_STATUS,
        };
        let Ok(len) = u32::try_from(range.len()) else { return job.reply.send(Ok(Answer::TooLong)) };
        let cookie = self.next_cookie.replace(self.next_cookie.get() + 1);
        let header = RequestHeader { flags: 0, command, cookie, offset: range.start(), len };
        self.outbox.borrow_mut().extend_from_slice(&header.encode());
        let mut in_flight = self.in_flight.borrow_mut();
        if in_flight.is_empty() {
            self.alive.set(now);
        }
        self.in_flight_bytes.set(self.in_flight_bytes.get() + weight(job.ask, range));
        in_flight.insert(cookie, InFlight { assembly: Assembly::new(job.ask, range), job, sent: now });
        self.wake.notify();
    }

    /// The sender task: ends with the link.
    pub async fn send(&self) {
        loop {
            let requests = std::mem::take(&mut *self.outbox.borrow_mut());
            if self.ended.borrow().is_some() {
                return;
            }
            if !requests.is_empty() {
                if let Err(error) = self.stream.send(vec![Bytes::from(requests)]).await {
                    return self.end(lost(error));
                }
            } else if self.closing.get() {
                let header = RequestHeader { flags: 0, command: Command::DISC, cookie: 0, offset: 0, len: 0 };
                let _ = self.stream.send(vec![Bytes::copy_from_slice(&header.encode())]).await;
                return self.end(Error::new(ErrorKind::Shutdown, "the source is closed"));
            } else {
                self.wake.notified().await;
            }
        }
    }

    /// The receiver: completes requests until the link ends, then says why. `now` is the clock, `completed` is
    /// called after every complete reply.
    pub async fn receive(&self, now: &dyn Fn() -> Duration, completed: &dyn Fn()) -> Error {
        let mut inbox = Inbox { link: self, now, buf: Some(DmaBuf::new(INBOX_LEN)), start: 0, end: 0 };
        loop {
            if let Err(cause) = self.receive_one(&mut inbox, completed).await {
                self.end(cause);
                // The first cause: a timeout found by somebody else shows up here as an end of stream.
                return self.ended.borrow().clone().unwrap_or_else(|| lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    async fn receive_one(&self, inbox: &mut Inbox<'_>, completed: &dyn Fn()) -> Result<()> {
        let header = inbox.header().await?;
        let cookie = header.cookie();
        let Some(ask) = self.with(cookie, |assembly| assembly.ask()) else {
            bail!(Protocol, "reply to a request that was never sent (cookie {cookie:#x})");
        };
        let done = match header {
            ReplyHeader::Simple(reply) => {
                match reply.error {
                    Some(code) => self.fail_request(cookie, code, String::new(), None)?,
                    None if ask != Ask::Read || self.export.structured => {
                        bail!(Protocol, "simple reply where a structured one was agreed on")
                    }
                    None => {
                        let range = self.assembly(cookie, |assembly| Ok(assembly.range()))?;
                        self.receive_data(inbox, cookie, range.start(), range.len()).await?;
                    }
                }
                true
            }
            ReplyHeader::Chunk(_) if !self.export.structured => {
                bail!(Protocol, "structured reply, which was not agreed on")
            }
            ReplyHeader::Chunk(chunk) => {
                self.receive_chunk(inbox, cookie, chunk).await?;
                chunk.is_done()
            }
        };
        if done {
            self.complete(cookie)?;
            completed();
        }
        Ok(())
    }

    async fn receive_chunk(&self, inbox: &mut Inbox<'_>, cookie: u64, chunk: ChunkHeader) -> Result<()> {
        match chunk.kind {
            ChunkType::NONE => {}
            ChunkType::OFFSET_DATA => {
                const PREFIX_LEN: usize = proto::OFFSET_DATA_PREFIX_LEN;
                let mut prefix = [0; PREFIX_LEN];
                prefix.copy_from_slice(inbox.peek(PREFIX_LEN).await?);
                inbox.start += PREFIX_LEN;
                let offset = proto::decode_offset_data_prefix(prefix);
                // The codec holds that the chunk is longer than its prefix.
                self.receive_data(inbox, cookie, offset, u64::from(chunk.len) - PREFIX_LEN as u64).await?;
            }
            ChunkType::OFFSET_HOLE => {
                let hole = proto::decode_offset_hole(&inbox.payload(chunk.len as usize).await?)?;
                self.assembly(cookie, |assembly| assembly.hole(hole.offset, u64::from(hole.len)))?;
            }
            ChunkType::BLOCK_STATUS => {
                if chunk.len > STATUS_PAYLOAD_MAX {
                    bail!(Protocol, "block status of {} bytes, {STATUS_PAYLOAD_MAX} are allowed", chunk.len);
                }
                let (context, extents) = proto::decode_block_status(&inbox.payload(chunk.len as usize).await?)?;
                if Some(context) != self.export.allocation {
                    bail!(Protocol, "block status of context {context}, which was not agreed on");
                }
                self.assembly(cookie, |assembly| assembly.status(extents))?;
            }
            kind if kind.is_error() => {
                if chunk.len > ERROR_PAYLOAD_MAX {
                    bail!(Protocol, "error chunk of {} bytes, {ERROR_PAYLOAD_MAX} are allowed", chunk.len);
                }
                let error = proto::decode_error_chunk(kind, &inbox.payload(chunk.len as usize).await?)?;
                self.fail_request(cookie, error.error, error.message, error.offset)?;
            }
            kind => bail!(Protocol, "reply: chunk of unknown type {kind}"),
        }
        Ok(())
    }

    /// Receives `len` bytes for `offset` into the buffer of the request.
    async fn receive_data(&self, inbox: &mut Inbox<'_>, cookie: u64, offset: u64, len: u64) -> Result<()> {
        let (place, buf) = self.assembly(cookie, |assembly| {
            let place = assembly.claim(offset, len)?;
            Ok((place, assembly.take_buf()))
        })?;
        let buf = inbox.payload_into(buf, place.start, place.end - place.start).await?;
        self.assembly(cookie, |assembly| {
            assembly.put_buf(buf);
            Ok(())
        })
    }

    /// The server reports an error for a request. When it is going away, that is the link's end, not the request's.
    fn fail_request(&self, cookie: u64, code: ErrorCode, message: String, offset: Option<u64>) -> Result<()> {
        if code == ErrorCode::ESHUTDOWN {
            bail!(Io, "the server is shutting down");
        }
        let error = ServerError { code, message: for_people(&message) };
        self.assembly(cookie, |assembly| assembly.error(error, offset))
    }

    fn complete(&self, cookie: u64) -> Result<()> {
        let Some(InFlight { job, assembly, .. }) = self.in_flight.borrow_mut().remove(&cookie) else {
            bail!(Protocol, "reply to a request that was never sent (cookie {cookie:#x})");
        };
        let range = assembly.range();
        self.in_flight_bytes.set(self.in_flight_bytes.get() - weight(job.ask, range));
        let answer = match assembly.finish() {
            Ok(Outcome::Data(mut buf)) => {
                buf.narrow((job.range.start() - range.start()) as usize, job.range.len() as usize);
                Answer::Data(buf)
            }
            Ok(Outcome::Status(extents)) => Answer::Status(range.start(), extents),
            Ok(Outcome::Error(error)) => Answer::Failed(error),
            Err(breach) => {
                // Not answered: it is to be sent again on another connection.
                self.in_flight_bytes.set(self.in_flight_bytes.get() + weight(job.ask, range));
                let assembly = Assembly::new(job.ask, range);
                self.in_flight.borrow_mut().insert(cookie, InFlight { job, assembly, sent: Duration::ZERO });
                return Err(breach);
            }
        };
        self.answered.set(self.answered.get() + 1);
        job.reply.send(Ok(answer));
        Ok(())
    }

    fn with<T>(&self, cookie: u64, f: impl FnOnce(&mut Assembly) -> T) -> Option<T> {
        self.in_flight.borrow_mut().get_mut(&cookie).map(|request| f(&mut request.assembly))
    }

    fn assembly<T>(&self, cookie: u64, f: impl FnOnce(&mut Assembly) -> Result<T>) -> Result<T> {
        self.with(cookie, f).unwrap_or_else(|| bail!(Protocol, "reply to a request that was never sent"))
    }
}

/// What a request counts towards the bytes in flight.
fn weight(ask: Ask, range: ByteRange) -> u64 {
    match ask {
        Ask::Read => range.len(),
        Ask::Status => 0,
    }
}

fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(ErrorKind::Io, "the server closed the connection"),
        _ => Error::from_io(error, "the connection broke"),
    }
}

/// The receiving end: a small buffer for headers, with a way around it for payloads.
struct Inbox<'a> {
    link: &'a Link,
    now: &'a dyn Fn() -> Duration,
    /// Absent only while the kernel receives into it, and after an error.
    buf: Option<DmaBuf>,
    start: usize,
    end: usize,
}

impl Inbox<'_> {
    fn bytes(&self) -> &[u8] {
        self.buf.as_deref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    /// Receives some more bytes behind those that are there.
    async fn more(&mut self) -> Result<()> {
        let Some(mut buf) = self.buf.take() else { return Err(lost(io::ErrorKind::UnexpectedEof.into())) };
        if self.start > 0 {
            buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        debug_assert!(self.end < buf.len(), "headers are shorter than the buffer");
        let (count, buf) = self.received(self.link.stream.recv(buf, self.end).await)?;
        self.end += count;
        self.buf = Some(buf);
        Ok(())
    }

    fn received(&self, result: io::Result<(usize, DmaBuf)>) -> Result<(usize, DmaBuf)> {
        match result {
            Ok((0, _)) => Err(lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(some) => {
                self.link.alive.set((self.now)());
                Ok(some)
            }
            Err(error) => Err(lost(error)),
        }
    }

    async fn header(&mut self) -> Result<ReplyHeader> {
        loop {
            if let Some((header, len)) = ReplyHeader::decode(self.bytes())? {
                self.start += len;
                return Ok(header);
            }
            self.more().await?;
        }
    }

    /// The next `len` bytes, a few; they stay there.
    async fn peek(&mut self, len: usize) -> Result<&[u8]> {
        while self.end - self.start < len {
            self.more().await?;
        }
        Ok(&self.bytes()[..len])
    }

    /// A payload of its own; the caller has checked that `len` is within a limit.
    async fn payload(&mut self, len: usize) -> Result<DmaBuf> {
        let buf = DmaBuf::new(len);
        self.payload_into(buf, 0, len).await
    }

    /// Fills `buf[at..at + len]`.
    async fn payload_into(&mut self, mut buf: DmaBuf, at: usize, len: usize) -> Result<DmaBuf> {
        let there = self.bytes().len().min(len);
        buf[at..at + there].copy_from_slice(&self.bytes()[..there]);
        self.start += there;
        let (at, rest) = (at + there, len - there);
        if at + rest == buf.len() {
            return self.fill(buf, at).await;
        }
        // In the middle of its buffer: received there, it could run into what follows.
        let part = self.fill(DmaBuf::new(rest), 0).await?;
        buf[at..at + rest].copy_from_slice(&part);
        Ok(buf)
    }

    /// Fills `buf[at..]` from the socket; nothing is left in the inbox.
    async fn fill(&mut self, mut buf: DmaBuf, mut at: usize) -> Result<DmaBuf> {
        while buf.len() - at > WAIT_WHOLE_MAX {
            let (count, back) = self.received(self.link.stream.recv(buf, at).await)?;
            buf = back;
            at += count;
        }
        if at < buf.len() {
            buf = self.link.stream.recv_exact(buf, at).await.map_err(lost)?;
            self.link.alive.set((self.now)());
        }
        Ok(buf)
    }
}
