//! The control interface: a client's stream to the server that ships, over a socket.
//!
//! Time runs two hundred times as fast, so that a client that waits for an event is soon told that there is none.
//! Properties: every answer is HTTP with JSON behind it, an error one plain line; what reaches the daemon is well-formed
//! (names of clones that can be, messages that print as themselves); the server is there for the next input.

use super::executor;
use super::input::one_line;
use super::meter::Bound;
use hydrant::bail;
use hydrant::config::spec::CloneSpec;
use hydrant::control::api::{Message, SUSPEND_SECONDS_MAX, Status};
use hydrant::control::server::Server;
use hydrant::control::{Controlled, feed};
use hydrant::env::Env;
use hydrant::error::{Error, ErrorKind, Result};
use hydrant::event_log::{CloneEvents, Feed};
use hydrant::events::EventKind;
use hydrant::io_frontend::request::LocalBoxFuture;
use hydrant::meta::growth::Wanted;
use hydrant::metrics::schema::MetricsDocument;
use hydrant::net::Stream;
use hydrant::unix_socket::BoundSocket;
use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Head and body are bounded; all of it is copied a few times, and JSON is larger as values than as text.
pub const BOUND: Bound = Bound { base: 2 << 20, per_byte: 256 };

const HASTE: u32 = 200;
/// No answer is longer.
const ANSWER_MAX: usize = 1 << 20;

thread_local! {
    /// The socket of the executor's server.
    static SERVER: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

pub fn target(data: &[u8]) {
    let data = data.to_vec();
    executor::run(move |env| async move {
        let path = SERVER.with_borrow_mut(|server| server.get_or_insert_with(|| start(env)).clone());
        let answer = ask(&path, &data).await;
        is_well_formed(&answer);
        // Whatever that was, the next one is answered.
        let answer = ask(&path, b"GET /v1/clones/a/table HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&answer));
    });
}

/// A server that lives as long as the process.
fn start(env: Rc<dyn Env>) -> PathBuf {
    let path = tempfile::tempdir().expect("a directory").keep().join("control");
    let socket = BoundSocket::bind(&path).expect("a socket");
    let feed = feed::start(&env).expect("a feed");
    let events = CloneEvents::new(feed.log(), "a");
    events.raise(EventKind::Created, "created");
    let server = Server::start(socket, Rc::new(Clones { feed, events }), Rc::new(Hasty(env)));
    Box::leak(Box::new(server));
    path
}

async fn ask(path: &PathBuf, data: &[u8]) -> Vec<u8> {
    let socket = UnixStream::connect(path).expect("the server listens");
    let end = socket.try_clone().expect("a descriptor");
    let socket = Stream::new(socket.into());
    // The server may answer and close before it has read all.
    if socket.send(vec![bytes::Bytes::copy_from_slice(data)]).await.is_ok() {
        let _ = end.shutdown(std::net::Shutdown::Write);
    }
    executor::receive_all(&socket, ANSWER_MAX).await
}

fn is_well_formed(answer: &[u8]) {
    // A connection may be cut, and a request that is none may get no answer.
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return };
    let head = std::str::from_utf8(&answer[..end]).expect("a head of text");
    let status = head.strip_prefix("HTTP/1.1 ").or(head.strip_prefix("HTTP/1.0 ")).expect("an answer in HTTP");
    let status: u16 = status.get(..3).and_then(|status| status.parse().ok()).expect("a status");
    let body = &answer[end + 4..];
    if status == 100 {
        return is_well_formed(body);
    }
    if body.is_empty() {
        return;
    }
    let body: serde_json::Value = serde_json::from_slice(body).expect("a body in JSON");
    if status != 200 {
        one_line("refusal", body["error"]["message"].as_str().expect("a message"));
        assert!(body["error"]["kind"].is_string());
    }
}

/// The environment with a clock in a hurry.
struct Hasty(Rc<dyn Env>);

impl Env for Hasty {
    fn now(&self) -> Duration {
        self.0.now() * HASTE
    }
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<'static, ()> {
        self.0.sleep(duration / HASTE)
    }
    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        self.0.spawn(task);
    }
    fn spawn_background(&self, task: LocalBoxFuture<'static, ()>) {
        self.0.spawn_background(task);
    }
}

/// One clone, `a`.
struct Clones {
    feed: Rc<Feed>,
    events: Arc<CloneEvents>,
}

fn known(name: &str) -> Result<()> {
    assert!(!name.is_empty() && !name.contains('/'), "the name '{name}'");
    if name != "a" {
        bail!(NotFound, "no clone '{name}'");
    }
    Ok(())
}

fn ready<T: 'static>(result: Result<T>) -> LocalBoxFuture<'static, Result<T>> {
    Box::pin(std::future::ready(result))
}

impl Controlled for Clones {
    fn status(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<Vec<Status>>> {
        ready(name.map_or(Ok(()), known).map(|()| vec![Status { name: "a".into(), ..Status::default() }]))
    }
    fn table(&self, name: &str) -> Result<String> {
        known(name).map(|()| "0 8 clone /m /d /s 8".into())
    }
    fn metrics(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<MetricsDocument>> {
        ready(name.map_or(Ok(()), known).map(|()| MetricsDocument::default()))
    }
    fn message(&self, name: &str, message: &Message) -> LocalBoxFuture<'static, Result<()>> {
        assert_eq!(message.to_string().parse::<Message>().ok(), Some(*message));
        ready(known(name))
    }
    fn feed(&self) -> Rc<Feed> {
        self.feed.clone()
    }
    fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>> {
        known(name).map(|()| self.events.clone())
    }
    fn create(&self, spec: CloneSpec) -> LocalBoxFuture<'static, Result<()>> {
        let body = serde_json::to_vec(&spec).expect("a clone is JSON");
        assert_eq!(CloneSpec::from_json(&body).ok(), Some(spec));
        ready(Err(Error::new(ErrorKind::InUse, "there is\none already")))
    }
    fn finish(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        self.remove(name, false)
    }
    fn remove(&self, name: &str, _: bool) -> LocalBoxFuture<'static, Result<()>> {
        ready(known(name))
    }
    fn suspend(&self, name: &str, time_max: Duration) -> LocalBoxFuture<'static, Result<()>> {
        assert!((1..=u64::from(SUSPEND_SECONDS_MAX)).contains(&time_max.as_secs()), "{time_max:?}");
        ready(known(name))
    }
    fn resume(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        ready(known(name))
    }
    fn resize(&self, name: &str, _: Wanted) -> LocalBoxFuture<'static, Result<()>> {
        ready(known(name))
    }
    fn stop(&self) -> Result<()> {
        Ok(())
    }
}
