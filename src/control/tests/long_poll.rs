//! Questions that wait: woken by what they wait for, bounded, given up, answered at the end.

use super::*;
use crate::control::api::WAIT_SECONDS_MAX;
use crate::control::client::patiently;
use crate::control::waiters::WAITERS_MAX;
use crate::events::EventKind;

/// Of a wait that must be ended by what it waits for: nothing here takes as long.
const LONG: Duration = Duration::from_secs(WAIT_SECONDS_MAX);

fn waiting<T: Send + 'static>(running: &Running, ask: impl FnOnce(Client) -> T + Send + 'static) -> JoinHandle<T> {
    let client = running.client();
    std::thread::spawn(move || ask(client))
}

#[test]
fn a_page_of_events_at_once_or_when_there_are_some() {
    let running = Running::start();
    let client = running.client();
    let none = client.events(0, None, "", Duration::ZERO).unwrap();
    assert_eq!((none.page.events.len(), none.page.last, none.page.lost, none.instance.len()), (0, 0, 0, 36));
    let start = Instant::now();
    let seen = waiting(&running, |client| client.events(0, None, "", LONG));
    let of_b = waiting(&running, |client| client.events(0, Some(&"b".parse().unwrap()), "", LONG));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!seen.is_finished());
    running.events[0].raise(EventKind::SourceLost, "gone");
    let seen = seen.join().unwrap().unwrap();
    assert_eq!((seen.page.events[0].kind, seen.page.last, &seen.instance), (EventKind::SourceLost, 1, &none.instance));
    assert!(!of_b.is_finished(), "b had none");
    running.events[1].raise(EventKind::Created, "new");
    let of_b = of_b.join().unwrap().unwrap();
    assert_eq!((of_b.page.events.len(), of_b.page.events[0].seq, of_b.page.last), (1, 2, 2));
    // What is there is answered at once, however long one would wait.
    assert_eq!(client.events(1, None, &none.instance, LONG).unwrap().page.events.len(), 1);
    // Numbers of another daemon mean nothing here.
    let anew = client.events(77, None, "another", LONG).unwrap();
    assert_eq!(anew.page.events.len(), 2);
    assert!(start.elapsed() < LONG / 2, "woken, not timed out");
    // A timeout gives an empty page.
    let late = client.events(2, None, "", Duration::from_secs(1)).unwrap();
    assert_eq!((late.page.events.len(), late.page.last), (0, 2));
    running.stop();
}

#[test]
fn wait_returns_when_the_number_is_greater_and_never_waits_for_a_complete_clone() {
    let running = Running::start();
    let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
    let start = Instant::now();
    let name = a;
    let first = waiting(&running, move |client| client.wait(&name, 0, LONG));
    let name = "a".parse().unwrap();
    let second = waiting(&running, move |client| client.wait(&name, 1, LONG));
    std::thread::sleep(Duration::from_millis(50));
    running.events[0].raise(EventKind::SourceLost, "not dm's");
    running.events[1].raise(EventKind::Failed, "another clone's");
    std::thread::sleep(Duration::from_millis(50));
    assert!(!first.is_finished() && !second.is_finished());
    running.events[0].raise(EventKind::ReadOnly, "ro");
    assert_eq!(first.join().unwrap().unwrap().event_nr, 1);
    assert!(!second.is_finished());
    running.events[0].raise(EventKind::Failed, "Fail");
    assert_eq!(second.join().unwrap().unwrap().event_nr, 2);
    let name = b;
    let waiter = waiting(&running, move |client| client.wait(&name, 99, LONG));
    std::thread::sleep(Duration::from_millis(50));
    running.events[1].set_complete();
    assert_eq!(waiter.join().unwrap().unwrap().name, "b");
    assert!(start.elapsed() < LONG / 2);
    running.stop();
}

#[test]
fn bad_questions() {
    let running = Running::start();
    running.events[0].raise(EventKind::Created, "new");
    let get = |path: &str| running.raw(format!("GET /v1/{path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    let cases = [
        ("events?after=x", "400", "after=x is not a number from 0"),
        ("events?after=2", "400", "after=2: the last event is 1"),
        ("events?timeout=26", "400", "timeout=26 is not a number from 0 to 25"),
        ("events?since=1", "400", "unknown parameter 'since': use after, clone, timeout, instance"),
        ("events?after=1&after=1", "400", "after is given twice"),
        ("events?clone=c", "404", "no clone 'c'"),
        ("clones/a/wait?event=-1", "400", "event=-1 is not a number from 0"),
        ("clones/a/wait?after=1", "400", "unknown parameter 'after': use event, timeout"),
        ("clones/c/wait", "404", "no clone 'c'"),
        ("status?x=1", "400", "unknown parameter 'x': there are none here"),
        ("events?after=0&clone=a", "200", r#""lost":0"#),
        ("events", "200", r#""kind":"created""#),
        ("clones/a/wait?timeout=0", "200", r#""name":"a""#),
    ];
    for (path, status, text) in cases {
        let answer = get(path);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(text), "{path}: {answer}");
    }
    running.stop();
}

/// More than are served at a time, all at once; others are served meanwhile; the next one too many is told so; and those
/// whose client has gone make room.
#[test]
fn many_may_wait_and_hold_up_nobody() {
    let running = Running::start();
    let start = Instant::now();
    let request = b"GET /v1/events?timeout=25 HTTP/1.1\r\nHost: x\r\n\r\n";
    let ask = || {
        let mut socket = UnixStream::connect(&running.path).unwrap();
        socket.write_all(request).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    };
    let mut waiters: Vec<_> = (0..WAITERS_MAX).map(|_| ask()).collect();
    // Served in the order of their coming, so all of them wait by now.
    running.client().status_of_all().unwrap();
    let refused = running.raw(request);
    assert!(refused.contains("504") && refused.contains("256 clients wait already"), "{refused}");
    running.client().status_of_all().unwrap();

    waiters.truncate(WAITERS_MAX / 2);
    let more = || {
        let mut socket = ask();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        // Refused at once, or else waiting.
        match socket.read_exact(&mut [0; 1]) {
            Ok(()) => None,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                Some(socket)
            }
        }
    };
    let deadline = Instant::now() + Duration::from_secs(15);
    let late = loop {
        match more() {
            Some(socket) => break socket,
            None => assert!(Instant::now() < deadline, "those who have gone make no room"),
        }
    };
    waiters.push(late);

    running.events[0].raise(EventKind::Created, "at last");
    for mut waiter in waiters {
        waiter.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut answer = String::new();
        waiter.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("200 OK") && answer.contains("at last"), "{answer}");
    }
    assert!(start.elapsed() < LONG, "woken, not timed out");
    running.stop();
}

#[test]
fn the_end_of_the_daemon_answers_everybody() {
    let running = Running::start();
    let start = Instant::now();
    let follower = waiting(&running, |client| client.events(0, None, "", LONG));
    let waiter = waiting(&running, |client| client.wait(&"a".parse().unwrap(), 0, LONG));
    let of_ended = waiting(&running, |client| client.wait(&"b".parse().unwrap(), 0, LONG));
    std::thread::sleep(Duration::from_millis(100));
    running.events[1].set_ending();
    let error = of_ended.join().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("is going down")), (ErrorKind::Shutdown, true), "{error}");
    assert!(!follower.is_finished() && !waiter.is_finished());
    running.stop();
    for error in [follower.join().unwrap().unwrap_err(), waiter.join().unwrap().unwrap_err()] {
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Shutdown, "the daemon is going down"));
    }
    assert!(start.elapsed() < LONG / 2, "answered, not timed out");
}

/// One that accepts and says nothing, one that does not even accept.
#[test]
fn a_daemon_that_hangs_is_named_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.control");
    let _listener = UnixListener::bind(&path).unwrap();
    let start = Instant::now();
    let error = Client::new(&path).status_of_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert_eq!(
        error.to_string(),
        format!("control socket {}: no answer within 10 s; the daemon hangs", path.display())
    );
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_connection_that_breaks_is_made_again() {
    let running = Running::start();
    let asked = std::cell::Cell::new(0);
    let result = patiently(|| {
        asked.set(asked.get() + 1);
        match asked.get() {
            1 | 2 => Err(Error::new(ErrorKind::Io, "broken")),
            _ => running.client().status_of_all(),
        }
    });
    assert_eq!((result.unwrap().len(), asked.get()), (2, 3));
    let path = running.path.clone();
    running.stop();
    let error = patiently(|| Client::new(&path).status_of_all()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
