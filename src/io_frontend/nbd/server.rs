//! One connection, from the first byte to the last.
//!
//! A reader takes requests off the socket and starts a task for each; a sender takes the replies of all tasks that
//! finished meanwhile and sends them at once. Tasks own their buffers, so the connection may end at any moment.
//!
//! Invariants:
//! * A request holds its permits (of [`Limits`], and of the memory that many connections share) from before its payload
//!   is received until its reply was sent. So memory is bounded, and a client that reads no replies is soon not read from.
//! * A client that holds memory while others wait for some, and does not go on, is dropped ([`Memory`]).
//! * When replies can't be sent any more, nothing more is begun: what the client still asks for can't be answered. That
//!   includes writes, of which nobody was told anything: a client that wants to know waits for its replies. (One that only
//!   ended what it sends still gets them.) What was begun is carried out.
//! * [`serve`] returns only when no request is in flight any more.
//! * A client that breaks the protocol loses this connection and nothing else.

use super::admit::{Terms, Verdict, admit};
use super::handshake::{Exports, Handshake, Next, Session, Step};
use super::inbox::Inbox;
use super::limits::Limits;
use super::memory::{Held, Memory, Share};
use super::proto::{Command, REQUEST_LEN, RequestHeader};
use super::reply::{Batch, Outcome};
use super::stats::{ConnectionStats, Raised, add};
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::{Request, Volume};
use crate::local::latch::Latch;
use crate::local::{Permit, Queue, Semaphore, oneshot};
use crate::net::Stream;
use bytes::Bytes;
use futures_lite::future::{self, or};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};

/// The sender gathers replies up to about this many bytes for one send: enough to save system calls, not so much
/// that permits come back in gulps.
const SEND_BATCH_BYTES: usize = 1 << 20;
/// Replies are sent so many bytes at a time: a client that takes less can't be told from one that takes nothing.
const SEND_STEP_BYTES: usize = 256 << 10;

/// Exports that can come and go while their listener stays.
pub trait Served: Exports {
    /// A connection begins to use the export that it was just shown. `None`: the export has gone.
    fn enter(&self, _export: &str) -> Option<Stay> {
        Some(Stay::default())
    }
}

/// The stay of a connection in its export: counted while it lives.
#[derive(Default)]
pub struct Stay {
    /// Opens when the export is about to go: the connection then ends as at a stop of the server.
    pub ends: Rc<Latch>,
    pub counted: Option<Counted>,
}

/// One of those that a number counts, while it lives.
pub struct Counted(Arc<AtomicU64>);

impl Counted {
    pub fn new(count: Arc<AtomicU64>) -> Self {
        count.fetch_add(1, AcqRel);
        Self(count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

/// Serves one connection until its client leaves, breaks the protocol (an error), or `stop` opens (or the end of its
/// export): then no new requests are read, those in flight are finished and answered, and the connection is closed.
/// `memory` is for payloads, and has at least [`Limits::payload_bytes_max`].
pub async fn serve(
    stream: Stream,
    exports: Rc<dyn Served>,
    env: Rc<dyn Env>,
    limits: Limits,
    memory: Rc<Memory>,
    stats: Rc<ConnectionStats>,
    stop: Rc<Latch>,
) -> Result<()> {
    add(&stats.accepted, 1);
    let _connected = Raised::new(&stats.connections);
    let result = connection(&stream, &*exports, env, limits, memory, stats.clone(), &stop).await;
    // Receives that were given up would keep the socket open.
    stream.shutdown();
    if result.is_err() {
        add(&stats.dropped, 1);
    }
    result
}

async fn connection(
    stream: &Stream,
    exports: &dyn Served,
    env: Rc<dyn Env>,
    limits: Limits,
    memory: Rc<Memory>,
    stats: Rc<ConnectionStats>,
    stop: &Latch,
) -> Result<()> {
    let mut inbox = Inbox::new(stream.clone());
    let too_slow = async {
        env.sleep(limits.handshake_time_max).await;
        Err(Error::new(ErrorKind::Protocol, format!("handshake: not done in {:?}", limits.handshake_time_max)))
    };
    let stopped = async {
        stop.opened().await;
        Ok(None)
    };
    let Some((session, stay)) = or(handshake(stream, &mut inbox, exports, &limits), or(too_slow, stopped)).await?
    else {
        return Ok(());
    };
    let connection = Rc::new(Connection::new(stream.clone(), session, env, limits, memory, stats));
    let (sender_guard, sender_ended) = oneshot::<()>();
    let sender = connection.clone();
    connection.env.spawn(Box::pin(async move {
        sender.send_replies().await;
        drop(sender_guard);
    }));
    let stopped = async {
        or(stop.opened(), stay.ends.opened()).await;
        Ok(())
    };
    let gone = async {
        connection.gone.opened().await;
        Ok(())
    };
    let evicted = async {
        let (what, time_max) = (connection.share.evicted().await, connection.limits.stall_time_max);
        Err(Error::new(ErrorKind::Limit, format!("{what} for {time_max:?}, others wait for the memory")))
    };
    // Whoever has gone is not read from any more, whatever there still is.
    let result = or(gone, or(evicted, or(stopped, connection.read_requests(&mut inbox)))).await;
    drop(inbox);
    if result.is_err() {
        connection.give_up();
    }
    connection.drain(or(stop.opened(), stay.ends.opened())).await;
    connection.replies.close();
    sender_ended.await;
    result
}

/// The session, or `None` when the client left.
async fn handshake(
    stream: &Stream,
    inbox: &mut Inbox,
    exports: &dyn Served,
    limits: &Limits,
) -> Result<Option<(Session, Stay)>> {
    let lost = |error| Error::from_io(error, "connection");
    stream.send(vec![Bytes::copy_from_slice(&Handshake::greeting())]).await.map_err(lost)?;
    let mut machine = Handshake::new(*limits);
    loop {
        match machine.step(inbox.bytes(), exports)? {
            Step::NeedBytes(need) => {
                if !inbox.fill(need).await? {
                    return Ok(None);
                }
            }
            Step::Answer { consumed, send, next } => {
                inbox.consume(consumed);
                // Right after the export was found, before anything is awaited: it can't have gone in between.
                let stay = match &next {
                    Next::Transmission(session) => exports.enter(&session.info.name),
                    _ => None,
                };
                let sent = stream.send(vec![send.into()]).await.map_err(lost);
                match next {
                    Next::Continue => sent?,
                    Next::Transmission(session) => return sent.map(|()| stay.map(|stay| (session, stay))),
                    // A client may close without waiting for the answer to its ABORT.
                    Next::Close => return Ok(None),
                }
            }
        }
    }
}

struct Connection {
    stream: Stream,
    volume: Rc<dyn Volume>,
    terms: Terms,
    env: Rc<dyn Env>,
    limits: Limits,
    stats: Rc<ConnectionStats>,
    requests: Rc<Semaphore>,
    payload_bytes: Rc<Semaphore>,
    share: Share,
    replies: Queue<Reply>,
    /// Open: no reply reaches the client any more.
    gone: Latch,
}

struct Permits {
    _request: Permit,
    /// Of the connection, and of the memory that it shares.
    _payload: Option<(Permit, Held)>,
}

struct Reply {
    header: RequestHeader,
    outcome: Outcome,
    permits: Permits,
}

impl Connection {
    fn new(
        stream: Stream,
        session: Session,
        env: Rc<dyn Env>,
        limits: Limits,
        memory: Rc<Memory>,
        stats: Rc<ConnectionStats>,
    ) -> Self {
        Self {
            stream,
            volume: session.volume,
            terms: Terms { size: session.info.size, structured: session.structured, contexts: session.contexts },
            env,
            limits,
            stats,
            requests: Semaphore::new(limits.requests_in_flight_max),
            payload_bytes: Semaphore::new(limits.payload_bytes_in_flight_max),
            share: Share::new(memory, limits.payload_bytes_own),
            replies: Queue::default(),
            gone: Latch::default(),
        }
    }

    async fn payload_permits(&self, bytes: u64) -> (Permit, Held) {
        let permit = self.payload_bytes.acquire(bytes).await;
        // It may have nothing in flight whose reply could fail.
        let look = || {
            if self.stream.is_hung_up() {
                self.give_up();
            }
        };
        (permit, self.share.acquire(bytes, &*self.env, self.limits.stall_time_max, look).await)
    }

    /// No reply reaches the client any more. What waits for its socket returns.
    fn give_up(&self) {
        self.gone.open();
        self.stream.shutdown();
    }

    /// Returns when the client leaves.
    async fn read_requests(self: &Rc<Self>, inbox: &mut Inbox) -> Result<()> {
        loop {
            if !inbox.fill(REQUEST_LEN).await? {
                return Ok(());
            }
            let Some(header) = inbox.bytes().first_chunk() else { return Ok(()) };
            let header = RequestHeader::decode(header)?;
            inbox.consume(REQUEST_LEN);
            let verdict = admit(&header, &self.terms, &self.limits)?;
            let permit = self.requests.acquire(1).await;
            match verdict {
                Verdict::Disconnect => return Ok(()),
                Verdict::Nothing => self.reply(header, Outcome::Done, Permits { _request: permit, _payload: None }),
                Verdict::Refuse { error, why, payload } => {
                    inbox.discard(payload as usize).await?;
                    let outcome = Outcome::Error { error, message: why };
                    self.reply(header, outcome, Permits { _request: permit, _payload: None });
                }
                Verdict::Write { offset, len, flags } => {
                    let payload = self.payload_permits(u64::from(len)).await;
                    let progress = || self.share.set_receiving(Some(self.env.now()));
                    progress();
                    let data = inbox.payload(offset, len as usize, progress).await?.into();
                    self.share.set_receiving(None);
                    let permits = Permits { _request: permit, _payload: Some(payload) };
                    self.start(header, Request::Write { offset, data, flags }, permits);
                }
                Verdict::Submit(request) => {
                    let payload = match &request {
                        Request::Read(range) => Some(self.payload_permits(range.len()).await),
                        _ => None,
                    };
                    self.start(header, request, Permits { _request: permit, _payload: payload });
                }
            }
        }
    }

    /// Starts a task that carries the request out and queues its reply.
    fn start(self: &Rc<Self>, header: RequestHeader, request: Request, permits: Permits) {
        let connection = self.clone();
        self.env.spawn(Box::pin(async move {
            if connection.gone.is_open() && matches!(request, Request::Read(_)) {
                return;
            }
            let result = {
                let _in_flight = Raised::new(&connection.stats.in_flight);
                connection.volume.clone().submit(request).await
            };
            connection.reply(header, Outcome::of(result, &header), permits);
        }));
    }

    fn reply(&self, header: RequestHeader, outcome: Outcome, permits: Permits) {
        let stats = &self.stats;
        add(&stats.requests, 1);
        match (&outcome, header.command) {
            (Outcome::Error { .. }, _) => add(&stats.errors, 1),
            (_, Command::READ) => add(&stats.read_bytes, u64::from(header.len)),
            (_, Command::WRITE) => add(&stats.written_bytes, u64::from(header.len)),
            _ => {}
        }
        self.replies.push(Reply { header, outcome, permits });
    }

    /// Sends replies until the queue is closed. When the socket fails, the rest are thrown away: their permits must
    /// come back all the same.
    async fn send_replies(&self) {
        while let Some(first) = self.replies.pop().await {
            let mut batch = Batch::default();
            let mut permits = Vec::new();
            let mut next = Some(first);
            while let Some(reply) = next {
                batch.push(&reply.header, reply.outcome, &self.terms);
                permits.push(reply.permits);
                next = if batch.len() < SEND_BATCH_BYTES { self.replies.try_pop() } else { None };
            }
            if self.gone.is_open() {
                continue;
            }
            if let Err(error) = self.send(batch.into_parts()).await {
                log::debug!("nbd: replies can't be sent: {error}");
                self.give_up();
            }
            self.share.set_sending(None);
        }
    }

    async fn send(&self, parts: Vec<Bytes>) -> io::Result<()> {
        let (mut step, mut bytes) = (Vec::new(), 0);
        for mut part in parts {
            while bytes + part.len() >= SEND_STEP_BYTES {
                step.push(part.split_to(SEND_STEP_BYTES - bytes));
                self.send_step(std::mem::take(&mut step)).await?;
                bytes = 0;
            }
            bytes += part.len();
            step.push(part);
        }
        self.send_step(step).await
    }

    async fn send_step(&self, parts: Vec<Bytes>) -> io::Result<()> {
        self.share.set_sending(Some(self.env.now()));
        self.stream.send(parts).await
    }

    /// Waits until no request is in flight and every reply was sent or thrown away. A client that does not take
    /// its replies can't hold up a stop, nor keep memory that others wait for.
    async fn drain(&self, stopped: impl Future<Output = ()>) {
        let all = async {
            self.requests.acquire(self.limits.requests_in_flight_max).await;
        };
        let cut = async {
            stopped.await;
            self.env.sleep(self.limits.drain_time_max).await;
            self.give_up();
            future::pending().await
        };
        let evicted = async {
            self.share.evicted().await;
            self.give_up();
            future::pending().await
        };
        or(all, or(cut, evicted)).await;
    }
}
