//! The control client of the command line: asks a daemon, blocking.
//!
//! One connection per question. What can go wrong while connecting gets its own words, since that is what users
//! meet: no daemon, a daemon that crashed, somebody else's daemon.

use super::api::{
    ErrorBody, EventPage, Message, MessageBody, PREFIX, RemoveBody, ResizeBody, Status, StatusList, SuspendBody,
    TableBody, VersionInfo, WAIT_SECONDS_MAX,
};
use super::http_io::BlockingIo;
use crate::config::CloneName;
use crate::coordinator::SUSPEND_TIME_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::growth::Wanted;
use crate::metrics::schema::MetricsDocument;
use crate::unix_socket;
use bytes::Bytes;
use futures_lite::future::or;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest answer that is read, in bytes: the metrics of a thousand clones on sixteen shards.
const ANSWER_MAX: usize = 256 << 20;
/// How long an answer may take that needs no work.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the answer to what is to be carried out may take; longer than the server gives itself.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(25);
/// The same for a growth.
const RESIZE_TIME_MAX: Duration = Duration::from_secs(155);
/// The same for a hand-over.
const FINISH_TIME_MAX: Duration = Duration::from_secs(155);
/// How often [`patiently`] asks again, and after which pause.
const BROKEN_RETRIES: u32 = 5;
const BROKEN_PAUSE: Duration = Duration::from_millis(200);

/// A daemon's control socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// Connects only when it is asked something.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether somebody listens there.
    pub fn is_there(&self) -> bool {
        self.connect().is_ok()
    }

    /// The status of every clone of the daemon.
    pub fn status_of_all(&self) -> Result<Vec<Status>> {
        self.get::<StatusList>("/status", ANSWER_TIME_MAX).map(|list| list.clones)
    }

    pub fn status(&self, name: &CloneName) -> Result<Status> {
        self.get(&format!("/clones/{name}/status"), ANSWER_TIME_MAX)
    }

    /// What followed event number `after` of the daemon `instance` (empty: of this one), of one clone or of all. Waits for
    /// something up to `time_max`, at most [`WAIT_SECONDS_MAX`]; whole seconds count.
    pub fn events(
        &self,
        after: u64,
        clone: Option<&CloneName>,
        instance: &str,
        time_max: Duration,
    ) -> Result<EventPage> {
        let timeout = time_max.as_secs().min(WAIT_SECONDS_MAX);
        let mut path = format!("/events?after={after}&timeout={timeout}");
        if let Some(name) = clone {
            path.push_str(&format!("&clone={name}"));
        }
        if !instance.is_empty() {
            path.push_str(&format!("&instance={instance}"));
        }
        self.get(&path, ANSWER_TIME_MAX + Duration::from_secs(timeout))
    }

    /// The status, as soon as dm's event number is greater than `event` or the clone is complete; whatever it is after
    /// `time_max`, as in [`Self::events`].
    pub fn wait(&self, name: &CloneName, event: u64, time_max: Duration) -> Result<Status> {
        let timeout = time_max.as_secs().min(WAIT_SECONDS_MAX);
        let path = format!("/clones/{name}/wait?event={event}&timeout={timeout}");
        self.get(&path, ANSWER_TIME_MAX + Duration::from_secs(timeout))
    }

    /// The metrics of the clone `name`, or of every clone of the daemon.
    pub fn metrics(&self, name: Option<&CloneName>) -> Result<MetricsDocument> {
        match name {
            Some(name) => self.get(&format!("/clones/{name}/metrics"), ANSWER_TIME_MAX),
            None => self.get("/metrics", ANSWER_TIME_MAX),
        }
    }

    /// dm-clone's table line.
    pub fn table(&self, name: &CloneName) -> Result<String> {
        self.get::<TableBody>(&format!("/clones/{name}/table"), ANSWER_TIME_MAX).map(|body| body.table)
    }

    /// Of the daemon.
    pub fn version(&self) -> Result<VersionInfo> {
        self.get("/version", ANSWER_TIME_MAX)
    }

    /// Returns when the message is in force.
    pub fn message(&self, name: &CloneName, message: &Message) -> Result<()> {
        let body = self.body(&MessageBody { message: message.to_string() })?;
        let path = format!("/clones/{name}/message");
        self.ask::<serde_json::Value>(Method::POST, &path, body, MESSAGE_TIME_MAX).map(drop)
    }

    /// Starts a clone; returns when it is served. `spec` is its JSON.
    pub fn create(&self, spec: &impl Serialize) -> Result<()> {
        self.ask::<serde_json::Value>(Method::POST, "/clones", self.body(spec)?, MESSAGE_TIME_MAX).map(drop)
    }

    /// Suspends a clone; returns when its requests are held and everything is committed. `seconds`: what is in flight gets so
    /// long to end; `None` is the default.
    pub fn suspend(&self, name: &CloneName, seconds: Option<u32>) -> Result<()> {
        let body = self.body(&SuspendBody { timeout: seconds })?;
        let time_max = seconds.map_or(SUSPEND_TIME_MAX, |seconds| Duration::from_secs(seconds.into()));
        let path = format!("/clones/{name}/suspend");
        self.ask::<serde_json::Value>(Method::POST, &path, body, time_max + ANSWER_TIME_MAX).map(drop)
    }

    /// Lets a suspended clone go on.
    pub fn resume(&self, name: &CloneName) -> Result<()> {
        let path = format!("/clones/{name}/resume");
        self.ask::<serde_json::Value>(Method::POST, &path, Vec::new(), MESSAGE_TIME_MAX).map(drop)
    }

    /// Grows a clone; returns when it has the new size.
    pub fn resize(&self, name: &CloneName, wanted: Wanted) -> Result<()> {
        let body = self.body(&ResizeBody { size: wanted.size, zeros: wanted.zeros })?;
        let path = format!("/clones/{name}/resize");
        self.ask::<serde_json::Value>(Method::POST, &path, body, RESIZE_TIME_MAX).map(drop)
    }

    /// Ends a clone; returns when its devices are free. One that is in use only when `force` says so.
    pub fn remove(&self, name: &CloneName, force: bool) -> Result<()> {
        let body = self.body(&RemoveBody { force })?;
        self.ask::<serde_json::Value>(Method::POST, &format!("/clones/{name}/remove"), body, MESSAGE_TIME_MAX).map(drop)
    }

    /// Hands a complete clone over to its destination; returns when the clone is gone.
    pub fn finish(&self, name: &CloneName) -> Result<()> {
        let path = format!("/clones/{name}/finish");
        self.ask::<serde_json::Value>(Method::POST, &path, Vec::new(), FINISH_TIME_MAX).map(drop)
    }

    fn body(&self, body: &impl Serialize) -> Result<Vec<u8>> {
        serde_json::to_vec(body)
            .map_err(|error| self.error(ErrorKind::InvalidRequest, format!("the request as JSON: {error}")))
    }

    /// Returns when the daemon has begun to go down.
    pub fn stop(&self) -> Result<()> {
        self.ask::<serde_json::Value>(Method::POST, "/stop", Vec::new(), ANSWER_TIME_MAX).map(drop)
    }

    fn get<T: DeserializeOwned>(&self, path: &str, time_max: Duration) -> Result<T> {
        self.ask(Method::GET, path, Vec::new(), time_max)
    }

    /// `time_max`: for the whole exchange.
    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>, time_max: Duration) -> Result<T> {
        let (status, answer) = self.exchange(method, path, body, time_max)?;
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(|error| {
                self.error(ErrorKind::Protocol, format!("what answers is not a hydrant daemon, or too old: {error}"))
            });
        }
        match serde_json::from_slice::<ErrorBody>(&answer) {
            Ok(body) => Err(Error::new(kind_of(status), body.error.message)),
            Err(_) => Err(self.error(ErrorKind::Protocol, format!("what answers is not a hydrant daemon: {status}"))),
        }
    }

    fn exchange(&self, method: Method, path: &str, body: Vec<u8>, time_max: Duration) -> Result<(StatusCode, Bytes)> {
        let bad = |text: String| self.error(ErrorKind::Protocol, text);
        let io = BlockingIo::new(self.connect()?);
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}{path}"))
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| bad(error.to_string()))?;
        let exchange = async {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io.clone()).await?;
            let answered = async {
                let response = sender.send_request(request).await?;
                let status = response.status();
                Ok((status, Limited::new(response.into_body(), ANSWER_MAX).collect().await))
            };
            let mut connection = std::pin::pin!(connection);
            let driven = async {
                connection.as_mut().await?;
                // All was received: the other future has, or will have, its answer.
                std::future::pending().await
            };
            or(answered, driven).await
        };
        let result: hyper::Result<_> = io.drive(exchange, time_max).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                self.error(ErrorKind::Limit, format!("no answer within {} s; the daemon hangs", time_max.as_secs()))
            }
            _ => Error::from_io(error, self.what()),
        })?;
        let (status, body) = result.map_err(|error| {
            let foreign = error.is_parse() && !error.is_incomplete_message();
            let kind = if foreign { ErrorKind::Protocol } else { ErrorKind::Io };
            self.error(kind, format!("the daemon broke the connection: {error}"))
        })?;
        let body = body.map_err(|error| bad(format!("can't read the answer: {error}")))?;
        Ok((status, body.to_bytes()))
    }

    fn connect(&self) -> Result<UnixStream> {
        unix_socket::connect(&self.path, ANSWER_TIME_MAX).map_err(|error| {
            let path = self.path.display();
            match error.kind() {
                io::ErrorKind::NotFound => {
                    Error::new(ErrorKind::NotFound, format!("no daemon is listening at {path}; is it running?"))
                }
                io::ErrorKind::ConnectionRefused => Error::new(
                    ErrorKind::NotFound,
                    format!("no daemon is listening at {path} any more: it ended without removing its socket"),
                ),
                io::ErrorKind::PermissionDenied => Error::from_io(
                    error,
                    format!("control socket {path} (only the user that started the daemon may use it)"),
                ),
                io::ErrorKind::TimedOut => {
                    let seconds = ANSWER_TIME_MAX.as_secs();
                    self.error(ErrorKind::Limit, format!("nobody is let in within {seconds} s; the daemon hangs"))
                }
                _ => Error::from_io(error, self.what()),
            }
        })
    }

    fn what(&self) -> String {
        format!("control socket {}", self.path.display())
    }

    fn error(&self, kind: ErrorKind, text: String) -> Error {
        Error::new(kind, format!("{}: {text}", self.what()))
    }
}

/// Whether an error means that there is no daemon (any more), rather than that it refuses.
pub fn is_gone(client: &Client, error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Protocol | ErrorKind::Io)
        && client.connect().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Asks again when the connection broke: a daemon that is killed is listening for a moment still, one that is busy may
/// have turned us away. A daemon that is gone is `NotFound` then.
pub fn patiently<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 0..BROKEN_RETRIES {
        match ask() {
            Err(error) if error.kind() == ErrorKind::Io => std::thread::sleep(BROKEN_PAUSE),
            result => return result,
        }
    }
    ask()
}

/// The kind of an error that came as an HTTP status.
fn kind_of(status: StatusCode) -> ErrorKind {
    match status {
        StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED => ErrorKind::Usage,
        StatusCode::NOT_FOUND => ErrorKind::NotFound,
        StatusCode::FORBIDDEN => ErrorKind::PermissionDenied,
        StatusCode::CONFLICT => ErrorKind::InUse,
        StatusCode::SERVICE_UNAVAILABLE => ErrorKind::Shutdown,
        StatusCode::GATEWAY_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE => ErrorKind::Limit,
        _ => ErrorKind::Io,
    }
}
