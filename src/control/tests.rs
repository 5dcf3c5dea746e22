//! Server and client against each other over a real socket, and the server against broken peers.

mod long_poll;

use super::Controlled;
use super::api::{Message, Status};
use super::client::Client;
use super::feed;
use super::server::Server;
use crate::bail;
use crate::config::spec::CloneSpec;
use crate::env::Env;
use crate::env::glommio::GlommioEnv;
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::{CloneEvents, Feed};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::Notify;
use crate::meta::growth::Wanted;
use crate::metrics::schema::{CloneMetrics, MetricsDocument, SCHEMA};
use crate::ring::Ring;
use crate::unix_socket::BoundSocket;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the messages were, seen from outside the executor.
type Seen = Arc<Mutex<Vec<String>>>;

fn not_found(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("no clone '{name}'"))
}

/// Two clones, `a` and `b`. A message to `b` takes 300 ms; `a` refuses `disable_hydration`.
struct Clones {
    env: Rc<dyn Env>,
    seen: Seen,
    stopped: Rc<Notify>,
    feed: Rc<Feed>,
    events: [Arc<CloneEvents>; 2],
}

impl Controlled for Clones {
    fn status(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<Vec<Status>>> {
        let event_nr = |name: &str| self.events_of(name).map_or(0, |events| events.count().dm);
        let status = |name: &str| Status {
            name: name.into(),
            event_nr: event_nr(name),
            size: 1 << 40,
            pid: 7,
            ..Status::default()
        };
        let found = match name {
            None => Ok(vec![status("a"), status("b")]),
            Some("a") => Ok(vec![status("a")]),
            Some("b") => Ok(vec![status("b")]),
            Some(name) => Err(not_found(name)),
        };
        Box::pin(std::future::ready(found))
    }
    fn metrics(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<MetricsDocument>> {
        let clones = match name {
            None => vec!["a", "b"],
            Some(name @ ("a" | "b")) => vec![name],
            Some(name) => return Box::pin(std::future::ready(Err(not_found(name)))),
        };
        let clones = clones.iter().map(|name| CloneMetrics { name: (*name).into(), ..Default::default() }).collect();
        let document = MetricsDocument { schema: SCHEMA.into(), clones, ..Default::default() };
        Box::pin(std::future::ready(Ok(document)))
    }
    fn message(&self, name: &str, message: &Message) -> LocalBoxFuture<'static, Result<()>> {
        let (env, seen, name, message) = (self.env.clone(), self.seen.clone(), name.to_owned(), *message);
        Box::pin(async move {
            match (name.as_str(), message) {
                ("a", Message::DisableHydration) => bail!(ReadOnly, "clone 'a' is read-only"),
                ("a", _) => {}
                ("b", _) => env.sleep(Duration::from_millis(300)).await,
                _ => bail!(NotFound, "no clone '{name}'"),
            }
            seen.lock().unwrap().push(format!("{name} {message}"));
            Ok(())
        })
    }
    fn table(&self, name: &str) -> Result<String> {
        match name {
            "a" => Ok("0 8 clone /m /d /s 8".into()),
            _ => bail!(NotFound, "no clone '{name}'"),
        }
    }
    fn feed(&self) -> Rc<Feed> {
        self.feed.clone()
    }
    fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>> {
        let found = self.events.iter().find(|events| events.name() == name);
        found.cloned().ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no clone '{name}'")))
    }
    fn create(&self, spec: CloneSpec) -> LocalBoxFuture<'static, Result<()>> {
        let seen = self.seen.clone();
        Box::pin(async move {
            match spec.name.as_ref().map_or("", |name| name.as_str()) {
                name @ ("a" | "b") => bail!(InUse, "there is a clone '{name}' already"),
                name => seen.lock().unwrap().push(format!("create {name}")),
            }
            Ok(())
        })
    }
    fn remove(&self, name: &str, force: bool) -> LocalBoxFuture<'static, Result<()>> {
        let (seen, name) = (self.seen.clone(), name.to_owned());
        Box::pin(async move {
            if name == "b" && !force {
                bail!(InUse, "clone 'b' is in use");
            }
            seen.lock().unwrap().push(format!("remove {name}"));
            Ok(())
        })
    }
    fn finish(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        self.seen.lock().unwrap().push(format!("finish {name}"));
        Box::pin(async { Ok(()) })
    }
    fn suspend(&self, name: &str, time_max: Duration) -> LocalBoxFuture<'static, Result<()>> {
        self.seen.lock().unwrap().push(format!("suspend {name} {}", time_max.as_secs()));
        Box::pin(async { Ok(()) })
    }
    fn resume(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        self.seen.lock().unwrap().push(format!("resume {name}"));
        Box::pin(async { Ok(()) })
    }
    fn resize(&self, name: &str, wanted: Wanted) -> LocalBoxFuture<'static, Result<()>> {
        self.seen.lock().unwrap().push(format!("resize {name} {:?} {}", wanted.size, wanted.zeros));
        Box::pin(async { Ok(()) })
    }
    fn stop(&self) -> Result<()> {
        self.stopped.notify();
        Ok(())
    }
}

struct Running {
    executor: JoinHandle<()>,
    path: PathBuf,
    seen: Seen,
    /// Of `a` and `b`.
    events: [Arc<CloneEvents>; 2],
    _dir: tempfile::TempDir,
}

impl Running {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.control");
        let socket = BoundSocket::bind(&path).unwrap();
        let seen = Seen::default();
        let seen_inside = seen.clone();
        let (sender, events) = std::sync::mpsc::channel();
        let executor = std::thread::spawn(move || {
            glommio::LocalExecutorBuilder::default().io_memory(1 << 20).make().unwrap().run(async move {
                let ring = Ring::start().unwrap();
                let env: Rc<dyn Env> = Rc::new(GlommioEnv::new());
                let stopped = Rc::new(Notify::default());
                let feed = feed::start(&env).unwrap();
                let events = ["a", "b"].map(|name| CloneEvents::new(feed.log(), name));
                sender.send(events.clone()).unwrap();
                let (env_inside, stopped_inside) = (env.clone(), stopped.clone());
                let clones =
                    Rc::new(Clones { env: env_inside, seen: seen_inside, stopped: stopped_inside, feed, events });
                let server = Server::start(socket, clones, env);
                stopped.notified().await;
                server.close().await;
                ring.shutdown().await;
            });
        });
        Self { executor, path, seen, events: events.recv().unwrap(), _dir: dir }
    }

    fn client(&self) -> Client {
        Client::new(&self.path)
    }

    fn stop(self) {
        self.client().stop().unwrap();
        self.executor.join().unwrap();
        let error = Client::new(&self.path).status_of_all().unwrap_err();
        assert!(error.to_string().contains("is it running?"), "{error}");
    }

    /// The whole answer to `request`, as text.
    fn raw(&self, request: &[u8]) -> String {
        let mut socket = UnixStream::connect(&self.path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The server may answer and close before it has read all.
        let _ = socket.write_all(request);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn post(&self, path: &str, body: &str) -> String {
        self.raw(format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())
    }
}

#[test]
fn status_message_and_stop() {
    let running = Running::start();
    let client = running.client();
    let name = |name: &str| name.parse().unwrap();
    let names: Vec<_> = client.status_of_all().unwrap().into_iter().map(|status| status.name).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(client.status(&name("b")).unwrap().size, 1 << 40);
    let error = client.status(&name("c")).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, "no clone 'c'"));

    client.message(&name("a"), &Message::EnableHydration).unwrap();
    client.message(&name("b"), &Message::HydrationThreshold(16)).unwrap();
    assert_eq!(*running.seen.lock().unwrap(), ["a enable_hydration", "b hydration_threshold 16"], "in force on return");
    let error = client.message(&name("a"), &Message::DisableHydration).unwrap_err();
    assert_eq!(error.to_string(), "clone 'a' is read-only");
    assert_eq!(client.message(&name("c"), &Message::EnableHydration).unwrap_err().kind(), ErrorKind::NotFound);
    running.stop();
}

#[test]
fn table_and_version() {
    let running = Running::start();
    let client = running.client();
    assert_eq!(client.table(&"a".parse().unwrap()).unwrap(), "0 8 clone /m /d /s 8");
    assert_eq!(client.table(&"c".parse().unwrap()).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(client.version().unwrap(), crate::targets::info());
    let answer = running.post("/v1/version", "{}");
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET"), "{answer}");
    running.stop();
}

#[test]
fn suspend_resume_and_resize() {
    let running = Running::start();
    let (client, a) = (running.client(), "a".parse().unwrap());
    client.suspend(&a, None).unwrap();
    client.suspend(&a, Some(3600)).unwrap();
    client.resume(&a).unwrap();
    client.finish(&a).unwrap();
    client.resize(&a, Wanted::default()).unwrap();
    client.resize(&a, Wanted { size: Some(u64::MAX), zeros: true }).unwrap();
    let expected = [
        "suspend a 30",
        "suspend a 3600",
        "resume a",
        "finish a",
        "resize a None false",
        "resize a Some(18446744073709551615) true",
    ];
    assert_eq!(*running.seen.lock().unwrap(), expected);
    for (path, body, text) in [
        ("suspend", r#"{"timeout": 0}"#, "a timeout of 0 s: it is from 1 to 3600"),
        ("suspend", r#"{"timeout": 3601}"#, "a timeout of 3601 s"),
        ("suspend", r#"{"timeout": -1}"#, "the body is not"),
        ("resize", r#"{"size": "1GiB"}"#, "the body is not"),
        ("resize", r#"{"sise": 5}"#, "unknown field"),
    ] {
        let answer = running.post(&format!("/v1/clones/a/{path}"), body);
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(text), "{path} {body}: {answer}");
    }
    assert_eq!(running.seen.lock().unwrap().len(), expected.len());
    running.stop();
}

#[test]
fn http_status_of_what_is_wrong() {
    let running = Running::start();
    let answer = running.raw(b"GET /v1/clones/a/status HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("application/json"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");

    let message = "/v1/clones/a/message";
    let large = format!(r#"{{"message": "{}"}}"#, "x".repeat(64 << 10));
    let long_name = format!("/v1/clones/{}/message", "x".repeat(8000));
    let many_headers = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(100));
    let long_header = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "b".repeat(1 << 20));
    let cases = [
        (running.raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "404", "not_found"),
        (running.raw(b"GET /v2/status HTTP/1.1\r\nHost: x\r\n\r\n"), "404", "not_found"),
        (running.raw(b"GET /v1/clones//status HTTP/1.1\r\nHost: x\r\n\r\n"), "404", "not_found"),
        (running.raw(b"GET /v1/clones/a/b/status HTTP/1.1\r\nHost: x\r\n\r\n"), "404", "not_found"),
        (running.raw(b"GET /v1/clones/c/status HTTP/1.1\r\nHost: x\r\n\r\n"), "404", "no clone 'c'"),
        (
            running.post(&long_name, r#"{"message": "enable_hydration"}"#),
            "404",
            "no clone has a name of 8000 characters",
        ),
        (running.raw(b"GET /v1/stop HTTP/1.1\r\nHost: x\r\n\r\n"), "405", "use POST here"),
        (running.post("/v1/status", ""), "405", "use GET here"),
        (running.post(message, ""), "400", "the body is not"),
        (running.post(message, "[]"), "400", "the body is not"),
        (running.post(message, r#"{"message": 7}"#), "400", "the body is not"),
        (running.post(message, r#"{"message": "stop", "x": 1}"#), "400", "unknown field"),
        (running.post(message, r#"{"message": "bogus"}"#), "400", "unknown message 'bogus'"),
        (running.post(message, r#"{"message": "disable_hydration"}"#), "409", "read_only"),
        (running.post(message, &large), "413", "larger than 65536 bytes"),
        (running.raw(many_headers.as_bytes()), "431", ""),
        (running.raw(long_header.as_bytes()), "431", ""),
        (running.raw(b"\x00\x01\x02 nonsense\r\n\r\n"), "400", ""),
    ];
    for (answer, status, text) in cases {
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(text),
            "{status} {text}: {answer}"
        );
    }
    assert!(running.seen.lock().unwrap().is_empty());
    running.stop();
}

#[test]
fn broken_and_idle_clients_hold_up_nobody() {
    let running = Running::start();
    // More than the server serves at a time; they say nothing, or half of something.
    let mut idle: Vec<_> = (0..80).map(|_| UnixStream::connect(&running.path).unwrap()).collect();
    for (index, socket) in idle.iter_mut().enumerate() {
        let _ = socket.write_all(&b"POST /v1/clones/a/message HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"[..index % 60]);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    idle.truncate(10);
    while let Err(error) = running.client().status_of_all() {
        assert!(Instant::now() < deadline, "{error}");
    }
    running.stop();
}

/// They are no requests that are carried out: another client gets the place of one of them.
#[test]
fn half_a_body_keeps_no_place() {
    let running = Running::start();
    let _half: Vec<_> = (0..70)
        .map(|_| {
            let mut socket = UnixStream::connect(&running.path).unwrap();
            let _ = socket.write_all(b"POST /v1/clones/a/message HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{");
            socket
        })
        .collect();
    let began = Instant::now();
    running.client().status_of_all().unwrap();
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    running.stop();
}

#[test]
fn a_message_runs_to_its_end_without_its_client() {
    let running = Running::start();
    let body = r#"{"message": "enable_hydration"}"#;
    let head = format!("POST /v1/clones/b/message HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut socket = UnixStream::connect(&running.path).unwrap();
    socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(running.seen.lock().unwrap().is_empty(), "it takes longer");
    drop(socket);
    let deadline = Instant::now() + Duration::from_secs(10);
    while *running.seen.lock().unwrap() != ["b enable_hydration"] {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    running.stop();
}

#[test]
fn the_client_says_what_is_at_the_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.control");
    let error_of = |client: &Client| client.status_of_all().unwrap_err();
    let client = Client::new(&path);

    let error = error_of(&client);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), format!("no daemon is listening at {}; is it running?", path.display()));

    drop(UnixListener::bind(&path).unwrap());
    assert!(error_of(&client).to_string().contains("ended without removing its socket"));

    for (answer, part) in [
        ("SSH-2.0-OpenSSH\r\n", "broke the connection"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "is not a hydrant daemon"),
        ("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "is not a hydrant daemon: 500"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhello", "can't read the answer"),
    ] {
        let server = impostor(&path, answer);
        let error = error_of(&client);
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains(part), "{answer:?}: {error}");
        server.join().unwrap();
    }
    let server = impostor(&path, "");
    let error = error_of(&client);
    assert_eq!(error.kind(), ErrorKind::Io, "no other daemon, but one that ended: {error}");
    assert!(error.to_string().contains("broke the connection"), "{error}");
    server.join().unwrap();
}

/// Answers one connection with `answer`, whatever it asks.
fn impostor(path: &Path, answer: &'static str) -> JoinHandle<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let _ = socket.read(&mut [0; 4096]);
        socket.write_all(answer.as_bytes()).unwrap();
    })
}
