//! One connection, from the first byte to the last.
//!
//! A reader takes requests off the socket and starts a task for each; a sender takes the replies of all tasks that
//! finished meanwhile and sends them at once. Tasks own their buffers, so the connection may end at any moment.
//!
//! Invariants:
//! * A request holds its permits (of [`Limits`], and of the memory that many connections share) from before its payload
//!   is received until its reply was sent. So memory is bounded, and a client that reads no replies is soon not read from.
//! * A client that holds memory while others wait for some, and does not go on, is dropped.
//! * [`serve`] returns only when no request is in flight any more.
//! * A client that breaks the protocol loses this connection and nothing else.

use super::admit::{Terms, Verdict, admit};
use super::handshake::{Exports, Handshake, Next, Session, Step};
use super::inbox::Inbox;
use super::limits::Limits;
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
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::time::Duration;

/// The sender gathers replies up to about this many bytes for one send: enough to save system calls, not so much
/// that permits come back in gulps.
const SEND_BATCH_BYTES: usize = 1 << 20;
/// In how many steps [`Limits::stall_time_max`] passes.
const STALL_LOOKS: u32 = 4;

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
/// `memory` has a permit for each byte of payload that all connections which share it may hold together; at least
/// [`Limits::payload_bytes_max`] of them.
pub async fn serve(
    stream: Stream,
    exports: Rc<dyn Served>,
    env: Rc<dyn Env>,
    limits: Limits,
    memory: Rc<Semaphore>,
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
    memory: Rc<Semaphore>,
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
    let stalled = async { Err(connection.stalled().await) };
    let result = or(connection.read_requests(&mut inbox), or(stopped, stalled)).await;
    drop(inbox);
    if result.is_err() {
        stream.shutdown();
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
    /// Of many connections.
    memory: Rc<Semaphore>,
    replies: Queue<Reply>,
    /// Since when the client is waited for: to send a payload, to take replies.
    receiving: Cell<Option<Duration>>,
    sending: Cell<Option<Duration>>,
}

struct Permits {
    _request: Permit,
    /// Of the connection, and of the memory that it shares.
    _payload: Option<(Permit, Permit)>,
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
        memory: Rc<Semaphore>,
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
            memory,
            replies: Queue::default(),
            receiving: Cell::new(None),
            sending: Cell::new(None),
        }
    }

    async fn payload_permits(&self, bytes: u64) -> (Permit, Permit) {
        (self.payload_bytes.acquire(bytes).await, self.memory.acquire(bytes).await)
    }

    /// Returns when the client has held memory for too long that others wait for. A volume that takes long is not its fault.
    async fn stalled(&self) -> Error {
        let time_max = self.limits.stall_time_max;
        loop {
            self.env.sleep(time_max / STALL_LOOKS).await;
            let late = |since: Option<Duration>| since.is_some_and(|since| self.env.now() - since >= time_max);
            if self.memory.is_wanted() && (late(self.sending.get()) || late(self.receiving.get())) {
                let what = if late(self.sending.get()) { "took no replies" } else { "sent nothing of a payload" };
                return Error::new(ErrorKind::Limit, format!("{what} for {time_max:?}, others wait for the memory"));
            }
        }
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
                    self.receiving.set(Some(self.env.now()));
                    let data = inbox.payload(offset, len as usize).await?.into();
                    self.receiving.set(None);
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
        let mut broken = false;
        while let Some(first) = self.replies.pop().await {
            let mut batch = Batch::default();
            let mut permits = Vec::new();
            let mut next = Some(first);
            while let Some(reply) = next {
                batch.push(&reply.header, reply.outcome, &self.terms);
                permits.push(reply.permits);
                next = if batch.len() < SEND_BATCH_BYTES { self.replies.try_pop() } else { None };
            }
            if broken {
                continue;
            }
            self.sending.set(Some(self.env.now()));
            if let Err(error) = self.stream.send(batch.into_parts()).await {
                log::debug!("nbd: replies can't be sent: {error}");
                broken = true;
                // Whatever the client still sends can't be answered.
                self.stream.shutdown();
            }
            self.sending.set(None);
        }
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
            self.stream.shutdown();
            future::pending().await
        };
        let stalled = async {
            self.stalled().await;
            self.stream.shutdown();
            future::pending().await
        };
        or(all, or(cut, stalled)).await;
    }
}
