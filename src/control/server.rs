//! The control server: answers one request per connection, on the executor of the coordinator.
//!
//! It must never hold up the data path or take the daemon down: every size, count and time has a limit below, and a
//! broken client loses its connection and nothing else. What is asked for is the business of [`super::routes`].

use super::Controlled;
use super::http_io::StreamIo;
use super::routes::Routes;
use super::waiters::Waiters;
use crate::env::Env;
use crate::local::{Notify, oneshot};
use crate::net::{Listener, Stream};
use crate::unix_socket::{BoundSocket, PathGuard};
use futures_lite::future::or;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

/// Connections served at a time, without those that wait for an event; more have to stand in line.
const CONNECTIONS_MAX: usize = 64;
/// How long the next in line stands there before somebody has to go: the connection that has been longest without asking
/// anything, or without taking its answer, else the one in line.
const LINE_TIME_MAX: Duration = Duration::from_secs(1);
/// A client asks when it is connected, and takes its answer. One that has done neither for this long can be made to go at
/// once, for the next in line.
const SILENCE_TIME_MIN: Duration = Duration::from_millis(250);
/// Most bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;
/// Most header lines.
const HEADERS_MAX: usize = 64;
/// How long a connection may take, all in all.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(30);
/// How long [`Server::close`] waits for answers that are on their way.
const CLOSE_TIME_MAX: Duration = Duration::from_millis(500);
/// Pause after accept failed (no descriptors left, ...).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running control server.
pub struct Server {
    shared: Rc<Shared>,
    guard: PathGuard,
    accepting: oneshot::Receiver<()>,
}

struct Shared {
    routes: Rc<Routes>,
    env: Rc<dyn Env>,
    listener: Listener,
    /// Those that are served, by number, which rises.
    connections: RefCell<BTreeMap<u64, Connection>>,
    closing: Cell<bool>,
    /// A connection has ended, or waits.
    idle: Rc<Notify>,
}

/// One that is served.
struct Connection {
    stream: Stream,
    turn: Rc<Turn>,
}

/// Whose turn it is on a connection.
struct Turn {
    /// The client has asked, we look for the answer; else it is the client's turn to ask, or to take the answer.
    ours: Cell<bool>,
    since: Cell<Duration>,
}

impl Server {
    /// Starts to answer, on the current executor (whose ring runs already).
    pub fn start(socket: BoundSocket, controlled: Rc<dyn Controlled>, env: Rc<dyn Env>) -> Self {
        let (fd, guard) = socket.into_parts();
        let waiters = Waiters::default();
        let shared = Rc::new(Shared {
            idle: waiters.begun.clone(),
            routes: Rc::new(Routes {
                feed: controlled.feed(),
                controlled,
                env: env.clone(),
                refused: Rc::default(),
                waiters,
            }),
            env: env.clone(),
            listener: Listener::new(fd),
            connections: RefCell::default(),
            closing: Cell::new(false),
        });
        let (ended, accepting) = oneshot();
        let accepter = shared.clone();
        env.spawn(Box::pin(async move {
            accepter.accept_all().await;
            ended.send(());
        }));
        Self { shared, guard, accepting }
    }

    /// Stops listening, removes the socket's path, answers those who wait, and gives answers that are on their way a moment
    /// to get out.
    pub async fn close(self) {
        let shared = self.shared;
        shared.closing.set(true);
        drop(self.guard);
        shared.listener.close();
        shared.routes.feed.close();
        self.accepting.await;
        or(shared.all_ended(), shared.env.sleep(CLOSE_TIME_MAX)).await;
        shared.connections.borrow().values().for_each(|connection| connection.stream.shutdown());
        or(shared.all_ended(), shared.env.sleep(CLOSE_TIME_MAX)).await;
    }
}

impl Shared {
    async fn all_ended(&self) {
        while !self.connections.borrow().is_empty() {
            self.idle.notified().await;
        }
    }

    fn is_full(&self) -> bool {
        self.connections.borrow().len() >= CONNECTIONS_MAX + self.routes.waiters.count()
    }

    async fn has_room(&self) {
        while self.is_full() && !self.closing.get() {
            self.idle.notified().await;
        }
    }

    /// Ends the connection that has kept us waiting longest, `time_min` at least; false when there is none. So clients that
    /// connect and say nothing, or take no answers, keep nobody out for long, however many they are.
    fn make_room(&self, time_min: Duration) -> bool {
        let mut connections = self.connections.borrow_mut();
        let late = connections.iter().filter(|(_, connection)| !connection.turn.ours.get());
        let latest = late.map(|(number, connection)| (connection.turn.since.get(), *number)).min();
        let Some((_, number)) = latest.filter(|(since, _)| self.env.now().saturating_sub(*since) >= time_min) else {
            return false;
        };
        // Its task ends by that, and finds itself forgotten.
        if let Some(connection) = connections.remove(&number) {
            connection.stream.shutdown();
        }
        true
    }

    async fn accept_all(self: &Rc<Self>) {
        let mut failing = false;
        let mut number = 0;
        while !self.closing.get() {
            match self.listener.accept().await {
                Ok(fd) => {
                    failing = false;
                    if self.is_full() && !self.make_room(SILENCE_TIME_MIN) {
                        or(self.has_room(), self.env.sleep(LINE_TIME_MAX)).await;
                    }
                    if self.closing.get() || (self.is_full() && !self.make_room(Duration::ZERO)) {
                        continue;
                    }
                    number += 1;
                    let stream = Stream::new(fd);
                    let turn = Rc::new(Turn { ours: Cell::new(false), since: Cell::new(self.env.now()) });
                    let connection = Connection { stream: stream.clone(), turn: turn.clone() };
                    self.connections.borrow_mut().insert(number, connection);
                    let shared = self.clone();
                    self.env.spawn(Box::pin(async move {
                        shared.clone().serve(stream, turn).await;
                        shared.connections.borrow_mut().remove(&number);
                        shared.idle.notify();
                    }));
                }
                Err(_) if self.closing.get() => {}
                Err(error) => {
                    if !failing {
                        log::warn!("control socket: accept: {error}");
                    }
                    failing = true;
                    self.env.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(self: Rc<Self>, stream: Stream, turn: Rc<Turn>) {
        let service = {
            let (shared, client) = (self.clone(), stream.clone());
            service_fn(move |request| {
                let (shared, client, turn) = (shared.clone(), client.clone(), turn.clone());
                async move {
                    // A client that has sent half a body has not asked yet.
                    let answer = shared.routes.answer(request, &client, || turn.ours.set(true)).await;
                    turn.ours.set(false);
                    turn.since.set(shared.env.now());
                    Ok::<_, Infallible>(answer)
                }
            })
        };
        let connection = http1::Builder::new()
            .keep_alive(false)
            .half_close(true)
            .header_read_timeout(None)
            .max_headers(HEADERS_MAX)
            .max_header_size(HEAD_MAX)
            .serve_connection(StreamIo::new(stream.clone()), service);
        let served = async {
            if let Err(error) = connection.await {
                log::debug!("control connection: {error}");
            }
        };
        or(served, self.env.sleep(CONNECTION_TIME_MAX)).await;
        stream.shutdown();
    }
}
