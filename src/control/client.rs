//! The control client of the command line: asks a daemon, blocking.
//!
//! One connection per question. What can go wrong while connecting gets its own words, since that is what users
//! meet: no daemon, a daemon that crashed, somebody else's daemon.

use super::api::{ErrorBody, Message, MessageBody, PREFIX, RemoveBody, Status, StatusList};
use super::http_io::BlockingIo;
use crate::config::CloneName;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::schema::MetricsDocument;
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

/// How long an answer may take; longer than the server gives itself.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(35);
/// Largest answer that is read, in bytes: the metrics of a thousand clones on sixteen shards.
const ANSWER_MAX: usize = 256 << 20;

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
        self.ask::<StatusList>(Method::GET, "/status", None).map(|list| list.clones)
    }

    pub fn status(&self, name: &CloneName) -> Result<Status> {
        self.ask(Method::GET, &format!("/clones/{name}/status"), None)
    }

    /// The metrics of the clone `name`, or of every clone of the daemon.
    pub fn metrics(&self, name: Option<&CloneName>) -> Result<MetricsDocument> {
        match name {
            Some(name) => self.ask(Method::GET, &format!("/clones/{name}/metrics"), None),
            None => self.ask(Method::GET, "/metrics", None),
        }
    }

    /// Returns when the message is in force.
    pub fn message(&self, name: &CloneName, message: &Message) -> Result<()> {
        let body = self.body(&MessageBody { message: message.to_string() })?;
        self.ask::<serde_json::Value>(Method::POST, &format!("/clones/{name}/message"), Some(body)).map(drop)
    }

    /// Starts a clone; returns when it is served. `spec` is its JSON.
    pub fn create(&self, spec: &impl Serialize) -> Result<()> {
        self.ask::<serde_json::Value>(Method::POST, "/clones", Some(self.body(spec)?)).map(drop)
    }

    /// Ends a clone; returns when its devices are free. One that is in use only when `force` says so.
    pub fn remove(&self, name: &CloneName, force: bool) -> Result<()> {
        let body = self.body(&RemoveBody { force })?;
        self.ask::<serde_json::Value>(Method::POST, &format!("/clones/{name}/remove"), Some(body)).map(drop)
    }

    fn body(&self, body: &impl Serialize) -> Result<Vec<u8>> {
        serde_json::to_vec(body)
            .map_err(|error| self.error(ErrorKind::InvalidRequest, format!("the request as JSON: {error}")))
    }

    /// Returns when the daemon has begun to go down.
    pub fn stop(&self) -> Result<()> {
        self.ask::<serde_json::Value>(Method::POST, "/stop", None).map(drop)
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<T> {
        let (status, answer) = self.exchange(method, path, body.unwrap_or_default())?;
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

    fn exchange(&self, method: Method, path: &str, body: Vec<u8>) -> Result<(StatusCode, Bytes)> {
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
        let result: hyper::Result<_> = io.drive(exchange, ANSWER_TIME_MAX).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                self.error(ErrorKind::Limit, format!("no answer within {} s", ANSWER_TIME_MAX.as_secs()))
            }
            _ => Error::from_io(error, self.what()),
        })?;
        let (status, body) = result.map_err(|error| bad(format!("the daemon broke the connection: {error}")))?;
        let body = body.map_err(|error| bad(format!("can't read the answer: {error}")))?;
        Ok((status, body.to_bytes()))
    }

    fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.path).map_err(|error| {
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
