//! What is asked of the control interface, and what is answered: from a path and a body to [`Controlled`] and back.
//!
//! One variant of `Route` per request; every route says its method, so that a wrong one is told which is right.
//! Nothing here knows of connections. A message that has begun runs to its end whether or not the client waits.

use super::Controlled;
use super::api::{
    ErrorBody, ErrorText, EventPage, Message, MessageBody, PREFIX, RemoveBody, ResizeBody, SUSPEND_SECONDS_MAX, Status,
    StatusList, SuspendBody, TableBody, WAIT_SECONDS_MAX,
};
use super::query::Query;
use super::waiters::Waiters;
use crate::bail;
use crate::config::NAME_LEN_MAX;
use crate::config::spec::CloneSpec;
use crate::coordinator::SUSPEND_TIME_MAX;
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::Feed;
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::oneshot;
use crate::log_limit::LogLimit;
use crate::meta::growth::Wanted;
use crate::net::Stream;
use crate::targets;
use crate::units::ByteSize;
use bytes::Bytes;
use futures_lite::future::or;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Largest body of a request, in bytes.
const BODY_MAX: usize = 64 << 10;
/// Most characters of an error that are logged.
const LOGGED_MAX: usize = 1000;
/// How long the body may take to come: it is sent with the head.
const BODY_TIME_MAX: Duration = Duration::from_secs(2);
/// How long a message may take to be in force; longer, and the client is told that it goes on without it.
pub const MESSAGE_TIME_MAX: Duration = Duration::from_secs(20);
/// The same for a growth, which may have to wait for the source.
const RESIZE_TIME_MAX: Duration = Duration::from_secs(150);
/// The same for a hand-over, which waits for requests in flight.
const FINISH_TIME_MAX: Duration = Duration::from_secs(150);
/// What suspending gets beside the time it may wait.
const SUSPEND_TIME_MORE: Duration = Duration::from_secs(5);

/// Answers requests, one at a time or many.
pub struct Routes {
    pub controlled: Rc<dyn Controlled>,
    pub feed: Rc<Feed>,
    pub env: Rc<dyn Env>,
    /// Orders that were refused: whoever may connect can repeat them for ever.
    pub refused: Rc<RefCell<LogLimit>>,
    pub(super) waiters: Waiters,
}

impl Routes {
    /// `client`: the connection that the request came on. `is_asked` is called when nothing more of the request is waited
    /// for.
    pub async fn answer(
        &self,
        request: Request<Incoming>,
        client: &Stream,
        is_asked: impl FnOnce(),
    ) -> Response<Full<Bytes>> {
        let (request, body) = request.into_parts();
        let path = request.uri.path().to_owned();
        let route = path.strip_prefix(PREFIX).and_then(Route::of);
        let Some(route) = route else {
            return refusal(StatusCode::NOT_FOUND, ErrorKind::NotFound, "no such path in the control interface");
        };
        if request.method != route.method() {
            let text = format!("use {} here", route.method());
            let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, ErrorKind::Usage, &text);
            let allowed = if route.method() == Method::GET { "GET" } else { "POST" };
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            return response;
        }
        let query = match Query::parse(request.uri.query(), route.parameters()) {
            Ok(query) => query,
            Err(error) => return refusal(StatusCode::BAD_REQUEST, error.kind(), &error.to_string()),
        };
        if let Some(name) = route.name()
            && name.len() > NAME_LEN_MAX
        {
            let text = format!("no clone has a name of {} characters: {NAME_LEN_MAX} at most", name.len());
            return refusal(StatusCode::NOT_FOUND, ErrorKind::NotFound, &text);
        }
        let body = match route.has_body() {
            true => match read_bytes(body, &*self.env).await {
                Ok(body) => body,
                Err(refused) => return refused,
            },
            false => Bytes::new(),
        };
        is_asked();
        let result = match route {
            Route::StatusOfAll => {
                self.controlled.status(None).await.map(|clones| json(StatusCode::OK, &StatusList { clones }))
            }
            Route::Table(name) => self.controlled.table(name).map(|table| json(StatusCode::OK, &TableBody { table })),
            Route::Version => Ok(json(StatusCode::OK, &targets::info())),
            Route::MetricsOfAll => self.controlled.metrics(None).await.map(|metrics| json(StatusCode::OK, &metrics)),
            Route::Metrics(name) => {
                self.controlled.metrics(Some(name)).await.map(|metrics| json(StatusCode::OK, &metrics))
            }
            Route::Status(name) => self.status(name).await.map(|status| json(StatusCode::OK, &status)),
            Route::Events => self.events(&query, client).await.map(|page| json(StatusCode::OK, &page)),
            Route::Wait(name) => self.wait(name, &query, client).await.map(|status| json(StatusCode::OK, &status)),
            Route::Stop => self.controlled.stop().map(|()| json(StatusCode::OK, &serde_json::json!({}))),
            Route::Message(name) => match read_message(&body) {
                Ok(message) => {
                    let log_as = format!("clone '{}': message {message}", name.escape_debug());
                    self.carry_out(log_as, self.controlled.message(name, &message), MESSAGE_TIME_MAX).await
                }
                Err(error) => Err(error),
            },
            Route::Create => match read_clone(&body) {
                Ok(spec) => {
                    let name = spec.name.as_ref().map(|name| name.to_string()).unwrap_or_default();
                    let advice = format!(": see 'hydrant list'; 'hydrant remove {name}' gives it up");
                    let log_as = format!("clone '{name}': create");
                    self.carry_out_or(log_as, self.controlled.create(spec), MESSAGE_TIME_MAX, &advice).await
                }
                Err(error) => Err(error),
            },
            Route::Suspend(name) => match read_body::<SuspendBody>(&body, r#"{"timeout": 30}"#) {
                Ok(body) => self.suspend(name, body).await,
                Err(error) => Err(error),
            },
            Route::Resume(name) => {
                let log_as = format!("clone '{}': resume", name.escape_debug());
                self.carry_out(log_as, self.controlled.resume(name), MESSAGE_TIME_MAX).await
            }
            Route::Resize(name) => match read_body::<ResizeBody>(&body, r#"{"size": null}"#) {
                Ok(ResizeBody { size, zeros }) => {
                    let to = size.map_or("its source".into(), |size| ByteSize(size).to_string());
                    let log_as = format!("clone '{}': resize to {to}", name.escape_debug());
                    self.carry_out(log_as, self.controlled.resize(name, Wanted { size, zeros }), RESIZE_TIME_MAX).await
                }
                Err(error) => Err(error),
            },
            Route::Finish(name) => {
                let log_as = format!("clone '{}': finish", name.escape_debug());
                self.carry_out(log_as, self.controlled.finish(name), FINISH_TIME_MAX).await
            }
            Route::Remove(name) => match read_body::<RemoveBody>(&body, r#"{"force": false}"#) {
                Ok(RemoveBody { force }) => {
                    let log_as =
                        format!("clone '{}': remove{}", name.escape_debug(), if force { " --force" } else { "" });
                    self.carry_out(log_as, self.controlled.remove(name, force), MESSAGE_TIME_MAX).await
                }
                Err(error) => Err(error),
            },
        };
        result.unwrap_or_else(|error| refusal(http_status(error.kind()), error.kind(), &error.to_string()))
    }

    async fn status(&self, name: &str) -> Result<Status> {
        let mut clones = self.controlled.status(Some(name)).await?;
        clones.pop().ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no clone '{}'", name.escape_debug())))
    }

    async fn events(&self, query: &Query<'_>, client: &Stream) -> Result<EventPage> {
        let log = self.feed.log();
        let ours = query.text("instance").is_none_or(|instance| instance == log.instance());
        let after = query.number("after", 0..=u64::MAX)?.filter(|_| ours).unwrap_or(0);
        let timeout = seconds(query)?.unwrap_or(Duration::ZERO);
        let clone = query.text("clone");
        if let Some(name) = clone
            && !log.knows(name)
        {
            // One that is gone and forgotten is not there either.
            self.controlled.events_of(name)?;
        }
        if after > log.last() {
            let (last, instance) = (log.last(), log.instance());
            bail!(Usage, "after={after}: the last event is {last} (its numbers are those of instance {instance})");
        }
        let page = match timeout {
            Duration::ZERO => log.after(after, clone),
            _ => self.waiters.wait(client, &*self.env, self.feed.after(&*self.env, after, clone, timeout)).await?,
        };
        Ok(EventPage { instance: log.instance().into(), page })
    }

    async fn wait(&self, name: &str, query: &Query<'_>, client: &Stream) -> Result<Status> {
        let nr = query.number("event", 0..=u64::MAX)?.unwrap_or(0);
        let timeout = seconds(query)?.unwrap_or(Duration::from_secs(WAIT_SECONDS_MAX));
        let clone = self.controlled.events_of(name)?;
        let event = self.feed.dm_event(&*self.env, &clone, nr, timeout);
        self.waiters.wait(client, &*self.env, event).await?;
        self.status(name).await
    }

    async fn suspend(&self, name: &str, body: SuspendBody) -> Result<Response<Full<Bytes>>> {
        let time_max = match body.timeout {
            None => SUSPEND_TIME_MAX,
            Some(seconds @ 1..=SUSPEND_SECONDS_MAX) => Duration::from_secs(seconds.into()),
            Some(seconds) => bail!(Usage, "a timeout of {seconds} s: it is from 1 to {SUSPEND_SECONDS_MAX}"),
        };
        let log_as = format!("clone '{}': suspend", name.escape_debug());
        self.carry_out(log_as, self.controlled.suspend(name, time_max), time_max + SUSPEND_TIME_MORE).await
    }

    /// Lets `work` run to its end, and answers when it has, or when that takes too long.
    async fn carry_out(
        &self,
        log_as: String,
        work: LocalBoxFuture<'static, Result<()>>,
        time_max: Duration,
    ) -> Result<Response<Full<Bytes>>> {
        self.carry_out_or(log_as, work, time_max, "").await
    }

    /// The same; who is told that it takes too long is told `advice` as well.
    async fn carry_out_or(
        &self,
        log_as: String,
        work: LocalBoxFuture<'static, Result<()>>,
        time_max: Duration,
        advice: &str,
    ) -> Result<Response<Full<Bytes>>> {
        let (done, waiting) = oneshot();
        let (env, refused) = (self.env.clone(), self.refused.clone());
        self.env.spawn(Box::pin(async move {
            let result = work.await;
            match &result {
                Ok(()) => log::info!("{log_as}"),
                Err(error) => {
                    if let Some(line) = refused.borrow_mut().line(env.now(), error) {
                        log::warn!("{log_as}: {}", clipped(&line));
                    }
                }
            }
            done.send(result);
        }));
        let answered =
            async { waiting.await.unwrap_or_else(|| Err(Error::new(ErrorKind::Shutdown, "the daemon is going down"))) };
        let timed_out = async {
            self.env.sleep(time_max).await;
            let seconds = time_max.as_secs();
            let text = format!("not in force after {seconds} s; it is still being carried out{advice}");
            Err(Error::new(ErrorKind::Limit, text))
        };
        or(answered, timed_out).await.map(|()| json(StatusCode::OK, &serde_json::json!({})))
    }
}

/// What is asked for.
enum Route<'a> {
    StatusOfAll,
    Version,
    Status(&'a str),
    Table(&'a str),
    MetricsOfAll,
    Metrics(&'a str),
    Message(&'a str),
    Events,
    Wait(&'a str),
    Create,
    Suspend(&'a str),
    Resume(&'a str),
    Resize(&'a str),
    Remove(&'a str),
    Finish(&'a str),
    Stop,
}

impl<'a> Route<'a> {
    /// `path` is what follows the version prefix.
    fn of(path: &'a str) -> Option<Self> {
        match path {
            "/status" => Some(Self::StatusOfAll),
            "/events" => Some(Self::Events),
            "/clones" => Some(Self::Create),
            "/metrics" => Some(Self::MetricsOfAll),
            "/stop" => Some(Self::Stop),
            "/version" => Some(Self::Version),
            _ => match path.strip_prefix("/clones/")?.split_once('/')? {
                ("", _) => None,
                (name, "status") => Some(Self::Status(name)),
                (name, "table") => Some(Self::Table(name)),
                (name, "metrics") => Some(Self::Metrics(name)),
                (name, "wait") => Some(Self::Wait(name)),
                (name, "message") => Some(Self::Message(name)),
                (name, "suspend") => Some(Self::Suspend(name)),
                (name, "resume") => Some(Self::Resume(name)),
                (name, "resize") => Some(Self::Resize(name)),
                (name, "remove") => Some(Self::Remove(name)),
                (name, "finish") => Some(Self::Finish(name)),
                _ => None,
            },
        }
    }
    /// The clone that is asked for.
    fn name(&self) -> Option<&'a str> {
        match *self {
            Self::Status(name) | Self::Table(name) | Self::Metrics(name) | Self::Message(name) | Self::Wait(name) => {
                Some(name)
            }
            Self::Suspend(name) | Self::Resume(name) | Self::Resize(name) | Self::Remove(name) | Self::Finish(name) => {
                Some(name)
            }
            Self::StatusOfAll | Self::Version | Self::MetricsOfAll | Self::Events | Self::Create | Self::Stop => None,
        }
    }
    fn has_body(&self) -> bool {
        matches!(self, Self::Message(_) | Self::Create | Self::Suspend(_) | Self::Resize(_) | Self::Remove(_))
    }
    fn method(&self) -> Method {
        match self {
            Self::StatusOfAll | Self::Status(_) | Self::MetricsOfAll | Self::Metrics(_) => Method::GET,
            Self::Version | Self::Table(_) | Self::Events | Self::Wait(_) => Method::GET,
            Self::Suspend(_) | Self::Resume(_) | Self::Resize(_) | Self::Finish(_) => Method::POST,
            Self::Create | Self::Message(_) | Self::Remove(_) | Self::Stop => Method::POST,
        }
    }
    /// What may follow the `?`.
    fn parameters(&self) -> &'static [&'static str] {
        match self {
            Self::Events => &["after", "clone", "timeout", "instance"],
            Self::Wait(_) => &["event", "timeout"],
            _ => &[],
        }
    }
}

/// As much of a line as the log gets: a client may have said what is in it.
fn clipped(line: &str) -> Cow<'_, str> {
    match line.char_indices().nth(LOGGED_MAX) {
        Some((end, _)) => Cow::Owned(format!("{}...", &line[..end])),
        None => Cow::Borrowed(line),
    }
}

/// How long a question may wait for its answer.
fn seconds(query: &Query<'_>) -> Result<Option<Duration>> {
    Ok(query.number("timeout", 0..=WAIT_SECONDS_MAX)?.map(Duration::from_secs))
}

fn read_message(body: &[u8]) -> Result<Message> {
    let body: MessageBody = read_body(body, r#"{"message": "..."}"#)?;
    body.message.parse().map_err(|error: Error| Error::new(ErrorKind::Usage, error.to_string()))
}

fn read_clone(body: &[u8]) -> Result<CloneSpec> {
    CloneSpec::from_json(body).map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))
}

/// Reads JSON that is to look like `example`.
fn read_body<T: DeserializeOwned>(body: &[u8], example: &str) -> Result<T> {
    serde_json::from_slice(body)
        .map_err(|error| Error::new(ErrorKind::Usage, format!("the body is not {example}: {error}")))
}

async fn read_bytes(body: Incoming, env: &dyn Env) -> Result<Bytes, Response<Full<Bytes>>> {
    let collected = async { Some(Limited::new(body, BODY_MAX).collect().await) };
    let too_late = async {
        env.sleep(BODY_TIME_MAX).await;
        None
    };
    let Some(collected) = or(collected, too_late).await else {
        let text = format!("the body did not come within {} s", BODY_TIME_MAX.as_secs());
        return Err(refusal(StatusCode::REQUEST_TIMEOUT, ErrorKind::Limit, &text));
    };
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let text = format!("the body is larger than {BODY_MAX} bytes");
            Err(refusal(StatusCode::PAYLOAD_TOO_LARGE, ErrorKind::Limit, &text))
        }
        Err(error) => Err(refusal(StatusCode::BAD_REQUEST, ErrorKind::Usage, &format!("can't read the body: {error}"))),
    }
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let (status, mut text) = match serde_json::to_vec(body) {
        Ok(text) => (status, text),
        Err(error) => {
            log::error!("control: can't write an answer as JSON: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, Vec::new())
        }
    };
    text.push(b'\n');
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refusal(status: StatusCode, kind: ErrorKind, message: &str) -> Response<Full<Bytes>> {
    json(status, &ErrorBody { error: ErrorText { kind: kind.name().into(), message: message.into() } })
}

/// The HTTP status of an error.
fn http_status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Usage | ErrorKind::Config | ErrorKind::InvalidRequest | ErrorKind::NotSupported => {
            StatusCode::BAD_REQUEST
        }
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
        ErrorKind::InUse | ErrorKind::ReadOnly | ErrorKind::Failed => StatusCode::CONFLICT,
        ErrorKind::Shutdown => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Limit => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
