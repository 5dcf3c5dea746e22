//! The client of one export: requests wait in one queue and go to whatever connection has room; connections that
//! are lost are made again, for ever, while the requests wait.
//!
//! # When the server goes away
//! * A connection ends when its socket does, when the server breaks the protocol or says ESHUTDOWN, or when
//!   requests are in flight and nothing at all arrives for `request_timeout`. Its requests go back to the front of
//!   the queue, in order, and to the next connection that has room; those that lost several connections go behind
//!   the others, because one of them may be what makes the server fail, and the others shall get through.
//! * Each connection is made again with exponential backoff from [`BACKOFF_MIN`] to [`BACKOFF_MAX`], halved at
//!   random, until the client is closed. Only a connection that answered a request starts over at the minimum.
//! * A request fails with SourceLost when no request at all was answered for `source_timeout` since it was made,
//!   or when [`LOSSES_MAX`] connections ended with it in flight. A slow source is not a lost one.
//! * A server that comes back with a smaller size has another source: everything fails with SourceChanged, for good. One
//!   that has grown is the same; what is new is not seen before the source is opened again. The same when the
//!   fingerprint is not as expected, which is read before a connection that was made again serves anybody.
//!
//! Bounds: the queue holds one entry per caller that waits; per connection `depth` requests and
//! `in_flight_bytes_max` (plus at most one request) are in flight.

use crate::bail;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::proto::TransmissionFlags;
use crate::local::{Notify, oneshot};
use crate::log_limit::LogLimit;
use crate::net::Stream;
use crate::source::identity::SourceIdentity;
use crate::source::nbd::assembly::Ask;
use crate::source::nbd::dial::dial;
use crate::source::nbd::handshake::{Export, negotiate};
use crate::source::nbd::link::{Answer, Job, Link};
use crate::source::nbd::verify::{Verdict, verify};
use crate::source::nbd::{NbdSourceOptions, SourceEvent, SourceState};
use crate::source::uri::NbdUri;
use crate::units::ByteRange;
use futures_lite::future::or;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

/// First and longest pause before a connection is made again.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// With how many connections a request may go down before it is given up: it may be what kills the server.
const LOSSES_MAX: u32 = 10;
/// From so many on it queues behind the others.
const LOSSES_SUSPECT: u32 = 2;
/// A request that is not answered for this many times `request_timeout` ends its connection, although others are.
const REQUEST_AGE_FACTOR: u32 = 10;
/// The clock for timeouts ticks ten times per timeout, within these bounds.
const TICK_MIN: Duration = Duration::from_millis(10);
const TICK_MAX: Duration = Duration::from_secs(1);
/// How long [`Client::close`] waits for the connections to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type Listener = Rc<dyn Fn(&SourceEvent)>;

/// See the head of this file.
pub(super) struct Client {
    uri: NbdUri,
    options: NbdSourceOptions,
    env: Rc<dyn Env>,
    /// As agreed on at first; the size holds for good.
    first: Export,
    queue: RefCell<VecDeque<Job>>,
    links: RefCell<Vec<Rc<Link>>>,
    /// Nothing works any more, and why.
    latched: RefCell<Option<Error>>,
    closed: Cell<bool>,
    /// What a connection that is made again must lead to.
    expected: RefCell<Option<Arc<SourceIdentity>>>,
    /// Wakes tasks that pause: the client was closed or latched.
    stop: Notify,
    /// When a request was last answered.
    progress: Cell<Duration>,
    state: RefCell<SourceState>,
    listener: RefCell<Option<Listener>>,
    log_limit: RefCell<LogLimit>,
    tasks: Cell<usize>,
    tasks_changed: Notify,
}

impl Client {
    /// Makes the first connection, one attempt; the others follow in the background.
    pub async fn connect(uri: NbdUri, options: NbdSourceOptions, env: Rc<dyn Env>) -> Result<Rc<Self>> {
        let (stream, export) =
            establish(&uri, &options, &env).await.map_err(|error| error.within(format!("source {uri}")))?;
        let multi_conn = export.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let client = Rc::new(Self {
            uri,
            progress: Cell::new(env.now()),
            env,
            first: export.clone(),
            queue: RefCell::default(),
            links: RefCell::default(),
            latched: RefCell::default(),
            closed: Cell::new(false),
            expected: RefCell::default(),
            stop: Notify::default(),
            state: RefCell::default(),
            listener: RefCell::default(),
            log_limit: RefCell::default(),
            tasks: Cell::new(0),
            tasks_changed: Notify::default(),
            options,
        });
        let count = if multi_conn { client.options.connections.max(1) } else { 1 };
        client.spawn(|client| client.keep(0, Some((stream, export))));
        for index in 1..count {
            client.spawn(|client| client.keep(index, None));
        }
        let weak = Rc::downgrade(&client);
        client.env.spawn(Box::pin(watch(weak, client.env.clone(), client.tick())));
        Ok(client)
    }

    pub fn uri(&self) -> &NbdUri {
        &self.uri
    }
    pub fn first_export(&self) -> &Export {
        &self.first
    }
    pub fn state(&self) -> SourceState {
        self.state.borrow().clone()
    }
    pub fn expect(&self, identity: Arc<SourceIdentity>) {
        *self.expected.borrow_mut() = Some(identity);
    }
    pub fn expected(&self) -> Option<Arc<SourceIdentity>> {
        self.expected.borrow().clone()
    }
    pub fn set_listener(&self, listener: Listener) {
        *self.listener.borrow_mut() = Some(listener);
    }

    /// The longest read that every present connection takes, in bytes; a power of two.
    pub fn read_len_max(&self) -> u64 {
        let links = self.links.borrow();
        let lengths = links.iter().map(|link| link.export.read_len_max);
        u64::from(lengths.min().unwrap_or(self.first.read_len_max))
    }

    /// Queues a request. The receiver always gets an answer, except that it gets none when the client is closed.
    pub fn submit(&self, ask: Ask, range: ByteRange) -> Result<oneshot::Receiver<Result<Answer>>> {
        if let Some(error) = &*self.latched.borrow() {
            return Err(error.clone());
        }
        if self.closed.get() {
            return Err(self.closed_error());
        }
        let (reply, answer) = oneshot();
        let job = Job { ask, range, reply, submitted: self.env.now(), losses: 0 };
        self.queue.borrow_mut().push_back(job);
        self.dispatch();
        Ok(answer)
    }

    pub fn closed_error(&self) -> Error {
        Error::new(ErrorKind::Shutdown, format!("source {}: it is closed", self.uri))
    }

    /// Hands waiting requests to the connections with the least in flight, as long as one has room.
    fn dispatch(&self) {
        let now = self.env.now();
        loop {
            let link = {
                let links = self.links.borrow();
                let open = links.iter().filter(|link| {
                    !link.is_ended()
                        && link.in_flight() < self.options.depth.max(1)
                        && link.in_flight_bytes() < self.options.in_flight_bytes_max.max(1)
                });
                open.min_by_key(|link| (link.in_flight_bytes(), link.in_flight())).cloned()
            };
            let Some(link) = link else { return };
            let Some(job) = self.queue.borrow_mut().pop_front() else { return };
            link.start(job, now);
        }
    }

    fn stopping(&self) -> bool {
        self.closed.get() || self.latched.borrow().is_some()
    }

    /// Keeps one connection, until the client ends.
    async fn keep(self: Rc<Self>, index: usize, mut fresh: Option<(Stream, Export)>) {
        let mut backoff = Backoff::default();
        let mut again = false;
        while !self.stopping() {
            let made = match fresh.take() {
                Some(made) => Ok(made),
                None => establish(&self.uri, &self.options, &self.env).await,
            };
            if self.stopping() {
                return;
            }
            match made.and_then(|(stream, export)| Ok((stream, self.admit(index, export)?))) {
                Ok((stream, export)) => {
                    if self.run(Rc::new(Link::new(stream, export)), again).await {
                        backoff = Backoff::default();
                    }
                }
                Err(error) => self.note_failure(error),
            }
            if self.stopping() {
                return;
            }
            again = true;
            or(self.env.sleep(backoff.next()), self.stop.notified()).await;
        }
    }

    /// Whether a new connection leads to the same source.
    fn admit(&self, index: usize, export: Export) -> Result<Export> {
        if export.size < self.first.size {
            let error = Error::new(
                ErrorKind::SourceChanged,
                format!(
                    "source {}: the server now has {} bytes there, it had {}: this is not the same source",
                    self.uri, export.size, self.first.size
                ),
            );
            self.latch(error.clone());
            return Err(error);
        }
        if index > 0 && !export.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            bail!(NotSupported, "the server no longer allows several connections");
        }
        Ok(export)
    }

    /// Uses a connection until it ends; says whether it ever answered a request. `again`: it is not the first one.
    async fn run(self: &Rc<Self>, link: Rc<Link>, again: bool) -> bool {
        self.spawn(|_| {
            let link = link.clone();
            async move { link.send().await }
        });
        let now = || self.env.now();
        let in_use = Cell::new(false);
        let completed = || {
            if in_use.get() {
                self.progress.set(self.env.now());
                self.dispatch();
            }
        };
        let mut receiving = pin!(link.receive(&now, &completed));
        if let Some(expected) = self.expected().filter(|_| again) {
            let ended = async { Err(receiving.as_mut().await) };
            let verified = or(ended, self.verify(&link, &expected)).await;
            if self.stopping() || verified.is_err() {
                let error = verified.err().unwrap_or_else(|| self.closed_error());
                link.end(error.clone());
                self.note_failure(error);
                return false;
            }
        }
        in_use.set(true);
        let answered_before = link.answered();
        self.links.borrow_mut().push(link.clone());
        self.note_connected();
        self.dispatch();
        let cause = receiving.await;

        self.links.borrow_mut().retain(|other| !Rc::ptr_eq(other, &link));
        let mut given_up = Vec::new();
        {
            let mut queue = self.queue.borrow_mut();
            let (mut again, mut suspects) = (VecDeque::new(), Vec::new());
            for mut job in link.take_all() {
                job.losses += 1;
                match job.losses {
                    LOSSES_MAX.. => given_up.push(job),
                    LOSSES_SUSPECT.. => suspects.push(job),
                    _ => again.push_back(job),
                }
            }
            // The oldest, which a server that answers in order was working on, goes behind the others.
            if !suspects.is_empty() {
                suspects.rotate_left(1);
            }
            again.append(&mut queue);
            again.extend(suspects);
            *queue = again;
        }
        for job in given_up {
            let what = format!(
                "source {}: {LOSSES_MAX} connections ended while {} was asked for; the last one",
                self.uri, job.range
            );
            job.reply.send(Err(Error::new(ErrorKind::SourceLost, format!("{what}: {cause}"))));
        }
        if !self.closed.get() {
            self.note_lost(cause);
        }
        self.fail_queue_if_stopping();
        self.dispatch();
        link.answered() > answered_before
    }

    /// Fails when the connection leads to another source, which latches that, or does not answer.
    async fn verify(&self, link: &Link, expected: &SourceIdentity) -> Result<()> {
        let silence = self.options.request_timeout;
        let late = async {
            or(self.env.sleep(silence), self.stop.notified()).await;
            bail!(Io, "no answer from the server for {} s", silence.as_secs_f32())
        };
        let verdict = async { Ok(verify(link, expected, self.env.now()).await) };
        match or(verdict, late).await? {
            Verdict::Same => Ok(()),
            Verdict::Another => {
                let text =
                    format!("source {}: the server now has other data there: this is not the same source", self.uri);
                let error = Error::new(ErrorKind::SourceChanged, text);
                self.latch(error.clone());
                Err(error)
            }
            Verdict::Unknown(error) if link.is_ended() => Err(error),
            Verdict::Unknown(error) => {
                let what =
                    format!("source {}: it can't be seen for certain whether it is the same as before", self.uri);
                self.warn(&error.within(what));
                Ok(())
            }
        }
    }

    /// Everything fails with `error` from now on.
    fn latch(&self, error: Error) {
        if self.latched.borrow().is_some() {
            return;
        }
        *self.latched.borrow_mut() = Some(error.clone());
        self.state.borrow_mut().changed = true;
        let links = self.links.borrow().clone();
        links.iter().for_each(|link| link.end(error.clone()));
        self.stop.notify();
        self.fail_queue_if_stopping();
        self.emit(SourceEvent::Changed(error));
    }

    fn fail_queue_if_stopping(&self) {
        let error = match &*self.latched.borrow() {
            Some(error) => error.clone(),
            None if self.closed.get() => self.closed_error(),
            None => return,
        };
        let jobs = std::mem::take(&mut *self.queue.borrow_mut());
        jobs.into_iter().for_each(|job| job.reply.send(Err(error.clone())));
    }

    fn tick(&self) -> Duration {
        let shortest = self.options.request_timeout.min(self.options.source_timeout);
        (shortest / 10).clamp(TICK_MIN, TICK_MAX)
    }

    /// Ends connections that are stuck and fails requests that waited too long.
    fn check_timeouts(&self) {
        let now = self.env.now();
        let silence = self.options.request_timeout;
        let links = self.links.borrow().clone();
        for link in links {
            if link.is_stuck(now, silence, silence.saturating_mul(REQUEST_AGE_FACTOR)) {
                let text = format!("no answer from the server for {} s", silence.as_secs_f32());
                link.end(Error::new(ErrorKind::Io, text));
            }
        }
        let mut expired = Vec::new();
        self.queue.borrow_mut().retain_mut_into(&mut expired, |job| {
            now.saturating_sub(job.submitted.max(self.progress.get())) > self.options.source_timeout
        });
        for job in expired {
            let last = match &self.state.borrow().last_error {
                Some(error) => format!("; last error: {error}"),
                None => String::new(),
            };
            let seconds = self.options.source_timeout.as_secs_f32();
            let text = format!("source {}: no answer for {seconds} s to a request of {}{last}", self.uri, job.range);
            job.reply.send(Err(Error::new(ErrorKind::SourceLost, text)));
        }
    }

    fn note_connected(&self) {
        let found = {
            let mut state = self.state.borrow_mut();
            state.connections += 1;
            let found = state.connections == 1 && state.losses > 0;
            state.reconnects += u64::from(found);
            found
        };
        if found {
            log::info!("source {}: connected again", self.uri);
            self.emit(SourceEvent::Found);
        }
    }

    fn note_lost(&self, cause: Error) {
        let all = {
            let mut state = self.state.borrow_mut();
            state.connections = state.connections.saturating_sub(1);
            state.last_error = Some(cause.clone());
            let all = state.connections == 0;
            state.losses += u64::from(all);
            all
        };
        // This end goes: the shard's ring ends.
        let is_ours = cause.os_errno() == Some(libc::ECANCELED);
        match all {
            _ if self.latched.borrow().is_some() => {}
            _ if is_ours => {
                log::debug!("source {}: given up: {cause}", self.uri);
                if all {
                    self.emit(SourceEvent::Lost(cause));
                }
            }
            true => {
                self.warn(&cause.clone().within(format!("source {}: lost, requests wait", self.uri)));
                self.emit(SourceEvent::Lost(cause));
            }
            false => log::info!("source {}: one connection of several lost: {cause}", self.uri),
        }
    }

    fn note_failure(&self, error: Error) {
        log::debug!("source {}: {error}", self.uri);
        self.state.borrow_mut().last_error = Some(error);
    }

    /// A line of the log, unless there were many lately.
    pub fn warn(&self, error: &Error) {
        if let Some(line) = self.log_limit.borrow_mut().line(self.env.now(), error) {
            log::warn!("{line}");
        }
    }

    fn emit(&self, event: SourceEvent) {
        let listener = self.listener.borrow().clone();
        if let Some(listener) = listener {
            listener(&event);
        }
    }

    fn spawn<F: Future<Output = ()> + 'static>(self: &Rc<Self>, task: impl FnOnce(Rc<Self>) -> F) {
        struct Running(Rc<Client>);
        impl Drop for Running {
            fn drop(&mut self) {
                self.0.tasks.set(self.0.tasks.get() - 1);
                self.0.tasks_changed.notify();
            }
        }
        self.tasks.set(self.tasks.get() + 1);
        let running = Running(self.clone());
        let task = task(self.clone());
        self.env.spawn(Box::pin(async move {
            task.await;
            drop(running);
        }));
    }

    /// No more requests; connections end at once, or politely. Requests that wait fail.
    pub fn shut(&self, politely: bool) {
        self.closed.set(true);
        let links = self.links.borrow().clone();
        for link in links {
            match politely {
                true => link.disconnect(),
                false => link.end(self.closed_error()),
            }
        }
        self.stop.notify();
        self.fail_queue_if_stopping();
    }

    /// Says goodbye to the server and waits until nothing runs any more, for a bounded time.
    pub async fn close(&self) {
        self.shut(true);
        let ended = async {
            while !self.links.borrow().is_empty() {
                self.tasks_changed.notified().await;
            }
        };
        or(ended, self.env.sleep(CLOSE_TIMEOUT)).await;
        self.shut(false);
    }
}

/// One attempt to connect and negotiate.
async fn establish(uri: &NbdUri, options: &NbdSourceOptions, env: &Rc<dyn Env>) -> Result<(Stream, Export)> {
    let stream = dial(&uri.address, options.connect_timeout).await?;
    let late = async {
        env.sleep(options.connect_timeout).await;
        let seconds = options.connect_timeout.as_secs_f32();
        bail!(Io, "the server did not finish the negotiation in {seconds} s (is it an NBD server? has it a free slot?)")
    };
    let negotiated = or(negotiate(&stream, &uri.export), late).await;
    match negotiated {
        Ok(export) => Ok((stream, export)),
        Err(error) => {
            stream.shutdown();
            Err(error)
        }
    }
}

/// The clock of the timeouts; ends with the client.
async fn watch(client: Weak<Client>, env: Rc<dyn Env>, tick: Duration) {
    loop {
        env.sleep(tick).await;
        match client.upgrade() {
            Some(client) if !client.stopping() => client.check_timeouts(),
            _ => return,
        }
    }
}

/// The pauses between attempts.
#[derive(Default)]
struct Backoff {
    step: u32,
}

impl Backoff {
    /// Between half of the present step and all of it, so that many clients do not come back at the same moment.
    fn next(&mut self) -> Duration {
        let full = BACKOFF_MIN.saturating_mul(1 << self.step.min(16)).min(BACKOFF_MAX);
        self.step = self.step.saturating_add(1);
        let random = std::hash::RandomState::new().build_hasher().finish();
        full / 2 + (full / 2).mul_f64(random as f64 / u64::MAX as f64)
    }
}

trait RetainInto<T> {
    /// Moves every element for which `take` holds to `taken`.
    fn retain_mut_into(&mut self, taken: &mut Vec<T>, take: impl Fn(&T) -> bool);
}

impl<T> RetainInto<T> for VecDeque<T> {
    fn retain_mut_into(&mut self, taken: &mut Vec<T>, take: impl Fn(&T) -> bool) {
        if !self.iter().any(&take) {
            return;
        }
        for item in std::mem::take(self) {
            if take(&item) { taken.push(item) } else { self.push_back(item) }
        }
    }
}
