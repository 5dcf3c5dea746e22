//! What clones tell of themselves as it happens: the log of events, and `wait`.

use super::harness::*;
use hydrant::control::api::SourceState;
use hydrant::events::{Event, EventKind};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

/// Of what must be ended by what it waits for; a single question waits up to 25 s.
const LONG: Duration = Duration::from_secs(20);

/// Of signal(7).
const SIGPIPE: i32 = 13;

/// A source that answers after 20 ms, so that hydration can be watched.
fn slow(bench: &Bench) -> Nbdkit {
    Nbdkit::start(bench, "--filter=delay pattern 4M rdelay=20ms")
}

fn events(daemon: &Daemon) -> Vec<Event> {
    let text = daemon.done(&["events", "vm", "--json"]);
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn kinds(daemon: &Daemon) -> Vec<&'static str> {
    events(daemon).iter().map(|event| event.kind.name()).collect()
}

/// A `hydrant` that runs beside the test; killed when dropped.
struct Beside {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Beside {
    fn start(daemon: &Daemon, args: &[&str]) -> Self {
        let mut child = daemon.hydrant(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The next event of `events --follow --json`; the daemon's test ends when none comes.
    fn event(&mut self) -> Event {
        let mut line = String::new();
        assert!(self.out.read_line(&mut line).unwrap() > 0, "the follower ended");
        serde_json::from_str(&line).unwrap()
    }

    /// Goes on to the next event of this kind; only those of `between` may come before it.
    fn event_of(&mut self, kind: EventKind, between: &[EventKind]) -> Event {
        loop {
            let event = self.event();
            if event.kind == kind {
                return event;
            }
            assert!(between.contains(&event.kind), "{event:?} before {kind}");
        }
    }

    /// Its exit status, what it printed (and had not been read), and its words on standard error. Within [`LONG`].
    fn end(mut self) -> (Option<i32>, String, String) {
        let start = Instant::now();
        while self.runs() {
            assert!(start.elapsed() < LONG, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (mut out, mut said) = (String::new(), String::new());
        self.out.read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), out, said)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The kernel document's flow, with the event numbers that dm-clone has in it.
#[test]
fn event_numbers_are_those_of_dm_clone() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = slow(&bench);
    let command = bench.clone_of(server.uri()).args("--no-hydration --region-size 4KiB");
    let daemon = command.start();
    assert_eq!((daemon.status().event_nr, kinds(&daemon)), (0, vec!["created"]));
    nbdsh(&daemon.uri(), "h = connect(); h.pwrite(bytes(4096), 0); h.flush()");
    nbdsh(
        &daemon.uri(),
        "h = connect(); h.trim(3 << 20, 1 << 20); h.flush(); h.pwrite(b'x' * 300000, 8192); h.flush()",
    );
    let status = daemon.status();
    assert_eq!((status.event_nr, status.events), (0, 1));
    let mut wait = Beside::start(&daemon, &["wait", "vm"]);
    daemon.message("hydration_threshold 16");
    daemon.message("hydration_batch_size 16");
    assert!(wait.runs());
    daemon.message("enable_hydration");
    let status = daemon.status();
    assert!(status.event_nr == 0 || status.is_complete(), "{status:#?}");
    assert_eq!(wait.end(), (Some(0), String::new(), String::new()));
    let status = daemon.status();
    assert!(status.is_complete());
    assert_eq!((status.event_nr, kinds(&daemon)), (1, vec!["created", "hydration_started", "hydration_completed"]));
    let text = daemon.done(&["status", "vm"]);
    assert!(text.contains("events       3 (dm's event number 1), the last: hydration completed"), "{text}");
    daemon.stop();
    // Opened again it is complete, sends none, and nobody waits for it.
    let again = command.start();
    assert_eq!((again.status().event_nr, kinds(&again)), (0, vec!["created"]));
    for number in ["0", "1", "18446744073709551615"] {
        assert_eq!(Beside::start(&again, &["wait", "vm", "--event", number]).end(), (Some(0), "".into(), "".into()));
    }
    let json: serde_json::Value = serde_json::from_str(&again.done(&["wait", "vm", "--json"])).unwrap();
    assert_eq!((json["name"].as_str(), json["event_nr"].as_u64()), (Some("vm"), Some(0)));
    again.message("disable_hydration");
    again.message("enable_hydration");
    assert_eq!(kinds(&again), ["created"], "there is no hydration to tell of");
    again.stop();
}

/// One event, also when nothing was copied at all.
#[test]
fn a_clone_that_is_all_discarded_has_completed() {
    need!("nbdsh");
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", MIB)).args("--no-hydration").start();
    let wait = Beside::start(&daemon, &["wait", "vm", "--event", "0"]);
    nbdsh(&daemon.uri(), "h = connect(); h.trim(1 << 20, 0); h.flush()");
    assert_eq!(wait.end().0, Some(0));
    assert_eq!((kinds(&daemon), daemon.status().event_nr), (vec!["created", "hydration_completed"], 1));
    daemon.stop();
}

#[test]
fn pauses_are_told_once() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = slow(&bench);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 1 --hydration-batch-size 1").start();
    let mut follow = Beside::start(&daemon, &["events", "vm", "--follow", "--json"]);
    assert_eq!((follow.event().kind, follow.event().kind), (EventKind::Created, EventKind::HydrationStarted));
    daemon.message("disable_hydration");
    daemon.message("disable_hydration");
    let paused = follow.event();
    assert_eq!(
        (paused.kind, paused.text.as_str()),
        (EventKind::HydrationPaused, "hydration paused: disable_hydration")
    );
    daemon.message("hydration_threshold 0");
    daemon.message("enable_hydration");
    daemon.message("hydration_threshold 2");
    let started = follow.event();
    assert_eq!((started.kind, started.nr), (EventKind::HydrationStarted, 4));
    daemon.message("hydration_threshold 0");
    assert_eq!(follow.event().text, "hydration paused: hydration_threshold 0");
    daemon.message("hydration_threshold 256");
    assert_eq!(follow.event().kind, EventKind::HydrationStarted);
    let last = follow.event();
    assert_eq!((last.kind, last.nr, last.seq), (EventKind::HydrationCompleted, 7, 7));
    daemon.stop();
    assert_eq!(follow.event().text, "stopped, 64 of 64 regions hydrated");
    let (status, out, said) = follow.end();
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert!(said.starts_with("hydrant: the daemon at ") && said.contains(" ended: "), "{said}");
    assert_eq!(said.lines().count(), 1);
}

#[test]
fn a_source_that_is_lost_and_found() {
    need!("nbdkit");
    let bench = Bench::new();
    let args = "--filter=delay pattern 16M rdelay=10ms";
    let mut server = Nbdkit::start(&bench, args);
    let daemon = bench.clone_of(server.uri()).args("--hydration-threshold 4 --shards 2 --source-timeout 1").start();
    let mut follow = Beside::start(&daemon, &["events", "--follow", "--json"]);
    daemon.wait_status("a start", |status| status.hydrated_regions > 10);
    server.kill();
    let lost = follow.event_of(EventKind::SourceLost, &[EventKind::Created, EventKind::HydrationStarted]);
    assert!(lost.text.starts_with("source lost: "), "{lost:?}");
    assert_eq!(daemon.status().source.state, SourceState::Lost);
    // Copies fail once they have waited long enough.
    follow.event_of(EventKind::HydrationFailed, &[]);
    server.again(args);
    // With connections of its own, another shard may be back first.
    follow.event_of(EventKind::SourceFound, &[EventKind::HydrationStarted]);
    follow.event_of(EventKind::HydrationCompleted, &[EventKind::HydrationStarted]);
    let all = kinds(&daemon);
    let count = |kind: &str| all.iter().filter(|other| **other == kind).count();
    let counts = ["source_lost", "source_found", "hydration_failed", "hydration_completed"].map(count);
    assert_eq!(counts, [1, 1, 1, 1], "{all:?}");
    assert!(count("hydration_started") <= 2, "{all:?}");
    // A source that ends when it is not needed any more is no news.
    server.kill();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(kinds(&daemon), all);
    daemon.stop();
}

/// One region that can't be read is told when nothing else is left to do, and that it is well again.
#[test]
fn a_copy_that_fails_is_told_once() {
    need!("nbdkit");
    let bench = Bench::new();
    let broken = bench.path("broken");
    let server = Nbdkit::start(
        &bench,
        &format!(
            "--filter=error pattern 64K error-pread=EIO error-pread-rate=100% error-pread-file={}",
            broken.display()
        ),
    );
    let daemon = bench.clone_of(server.uri()).args("--shards 2 --no-hydration").start();
    std::fs::write(&broken, "").unwrap();
    daemon.message("enable_hydration");
    let mut follow = Beside::start(&daemon, &["events", "vm", "--follow", "--json"]);
    let failed = follow.event_of(EventKind::HydrationFailed, &[EventKind::Created, EventKind::HydrationStarted]);
    assert!(failed.text.contains("1 region could not be copied"), "{failed:?}");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(kinds(&daemon), ["created", "hydration_started", "hydration_failed"], "tried again since, but told");
    std::fs::remove_file(&broken).unwrap();
    daemon.message("enable_hydration");
    follow.event_of(EventKind::BadRegionsHealed, &[EventKind::HydrationStarted]);
    follow.event_of(EventKind::HydrationCompleted, &[]);
    daemon.stop();
}

#[test]
fn wait_says_why_it_gives_up() {
    let bench = Bench::new();
    let command = bench.clone_of(bench.random("source", MIB)).args("--no-hydration");
    let daemon = command.start();
    let (status, out, said) = Beside::start(&daemon, &["wait", "vm", "--timeout", "1"]).end();
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert_eq!(said, "hydrant: clone 'vm': no event after number 0 within 1 s\n");
    let unknown = daemon.refused(&["wait", "other", "--control", daemon.control.to_str().unwrap()]);
    assert!(unknown.contains("no clone 'other' here"), "{unknown}");
    assert!(daemon.refused(&["wait", "nobody"]).contains("is it running?"));
    let unknown = daemon.refused(&["events", "other", "--control", daemon.control.to_str().unwrap(), "--follow"]);
    assert!(unknown.contains("no clone 'other' here"), "{unknown}");
    daemon.stop();

    // An orderly end, and one without a word.
    for kill in [false, true] {
        let daemon = command.start();
        let mut waits = [Beside::start(&daemon, &["wait", "vm"]), Beside::start(&daemon, &["events", "--follow"])];
        // Created: it follows.
        let mut line = String::new();
        waits[1].out.read_line(&mut line).unwrap();
        assert!(line.contains(" vm created             created, 0 of 16 regions"), "{line}");
        std::thread::sleep(Duration::from_millis(200));
        assert!(waits.iter_mut().all(Beside::runs));
        if kill {
            daemon.kill9()
        } else {
            daemon.stop()
        };
        let [wait, follow] = waits;
        let (status, out, said) = wait.end();
        assert_eq!((status, out.as_str(), said.lines().count()), (Some(1), "", 1), "{said}");
        assert!(said.starts_with("hydrant: clone 'vm' ended while it was waited for: "), "{said}");
        let (status, out, said) = follow.end();
        assert_eq!((status, out.contains("stopped, 0 of 16"), said.lines().count()), (Some(1), !kill, 1), "{said}");
        assert!(said.contains(" ended: "), "{said}");
    }
}

#[test]
fn many_wait_at_once_and_others_are_served() {
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", MIB)).args("--no-hydration").start();
    let start = Instant::now();
    let ask = |wait: bool| {
        let client = daemon.client();
        std::thread::spawn(move || match wait {
            true => client.wait(&"vm".parse().unwrap(), 0, Duration::from_secs(25)).map(|status| status.event_nr),
            false => client.events(1, None, "", Duration::from_secs(25)).map(|page| page.page.events.len() as u64),
        })
    };
    let waiting: Vec<_> = (0..100).map(|index| ask(index % 2 == 0)).collect();
    std::thread::sleep(Duration::from_millis(300));
    // Some die meanwhile.
    let followers: Vec<_> = (0..5).map(|_| Beside::start(&daemon, &["events", "--follow"])).collect();
    assert_eq!(daemon.status().event_nr, 0);
    drop(followers);
    daemon.message("enable_hydration");
    for waiter in waiting {
        assert!(waiter.join().unwrap().unwrap() >= 1);
    }
    assert!(start.elapsed() < LONG, "woken, not timed out");
    daemon.stop();
}

/// As every program: by SIGPIPE, without a word.
#[test]
fn a_closed_pipe_ends_quietly() {
    let bench = Bench::new();
    let daemon = bench.clone_of(bench.random("source", MIB)).args("--no-hydration").start();
    for args in [&["status"][..], &["status", "--json"], &["events"], &["list"]] {
        let mut child = daemon.hydrant(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.signal() == Some(SIGPIPE) && said.is_empty(), "{args:?}: {:?} {said}", output.status);
    }
    // A check of a clone, which is the daemon's own work.
    let other = ["--destination", "other.img", "--metadata", "other.meta", "--dry-run"];
    let mut child = daemon.hydrant(&["clone", "--name", "other", "--source"]);
    let child = child.arg(bench.path("source")).args(other).current_dir(bench.dir());
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.signal(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(SIGPIPE), ""));
    // Without anybody to hear an error it is one all the same.
    let mut child = daemon.hydrant(&["status", "nobody"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    // A follower notices when there is something to say.
    let mut follow =
        daemon.hydrant(&["events", "--follow"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(follow.stdout.take().unwrap());
    out.read_line(&mut String::new()).unwrap();
    drop(out);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    let output = follow.wait_with_output().unwrap();
    assert_eq!((output.status.signal(), output.stderr.len()), (Some(SIGPIPE), 0));
    // A disk that is full is an error.
    if let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") {
        let output = daemon.hydrant(&["status"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), said.as_ref()),
            (Some(1), "hydrant: standard output: No space left on device\n")
        );
    }
    daemon.stop();
}

/// The connection to a source is given up at the end: no news.
#[test]
fn the_end_tells_nothing_of_a_source_that_does_not_answer() {
    need!("nbdkit");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 64M");
    let config = format!(
        "[[clone]]\nname = \"vm\"\nsource = \"{}\"\ndestination = \"copy\"\nmetadata = \"meta\"\nhydration_rate = \"4MiB\"\n",
        server.uri()
    );
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("vm", "hydration", |status| status.hydrated_regions > 0);
    server.freeze(true);
    daemon.wait_status_of("vm", "copies in flight", |status| status.hydrating_regions > 0);
    std::thread::sleep(Duration::from_millis(300));
    daemon.done(&["remove", "vm", "--force"]);
    std::thread::sleep(Duration::from_millis(500));
    let events = daemon.done(&["events", "vm", "--json"]);
    let events: Vec<Event> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = events.iter().map(|event| event.kind.name()).collect();
    assert_eq!(names, ["created", "hydration_started", "stopped", "removed"], "{events:?}");
    server.freeze(false);
    daemon.stop();
    // The same with the end of the daemon.
    let daemon = bench.clone_of(server.uri()).destination(bench.path("b")).metadata(bench.path("b.meta")).start();
    server.freeze(true);
    daemon.wait_status("copies in flight", |status| status.hydrating_regions > 0);
    std::thread::sleep(Duration::from_millis(300));
    let log = daemon.stop();
    let (_, end) = log.split_once("stopped, ").expect(&log);
    assert!(!end.contains("lost"), "{log}");
}

/// One log for all clones of a daemon; it outlives them.
#[test]
fn many_clones_have_one_log() {
    need!("nbdkit");
    let bench = Bench::new();
    let table = |name: &str, source: &str, more: &str| {
        format!(
            "[[clone]]\nname = \"{name}\"\nsource = \"{source}\"\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n{more}\n"
        )
    };
    let good = bench.random("good.source", MIB);
    let missing = bench.path("missing");
    let frozen = Nbdkit::start(&bench, "pattern 1M");
    frozen.freeze(true);
    let config = table("good", good.to_str().unwrap(), "")
        + &table("bad", missing.to_str().unwrap(), "")
        + &table("slow", &frozen.uri(), "");
    let daemon = Daemon::serve(&bench, &config);
    daemon.wait_status_of("good", "hydrated", |status| status.is_complete());
    // One that starts is waited for; one that could not be started is not.
    let slow = Beside::start(&daemon, &["wait", "slow"]);
    let mut follow = Beside::start(&daemon, &["events", "slow", "--follow", "--json"]);
    let refused = daemon.refused(&["wait", "bad"]);
    assert!(refused.contains("could not be started") && refused.contains("missing"), "{refused}");
    frozen.freeze(false);
    assert_eq!(slow.end(), (Some(0), String::new(), String::new()));
    assert_eq!(
        follow.event_of(EventKind::HydrationCompleted, &[EventKind::Created, EventKind::HydrationStarted]).nr,
        3
    );

    let all = |name: &str| -> Vec<Event> {
        daemon.done(&["events", name, "--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let names = |events: &[Event]| events.iter().map(|event| event.kind.name()).collect::<Vec<_>>().join(" ");
    assert_eq!(names(&all("good")), "created hydration_started hydration_completed");
    let bad = all("bad");
    assert_eq!(names(&bad), "start_failed");
    assert!(bad[0].text.starts_with("could not be started: ") && bad[0].text.contains("missing"), "{bad:?}");
    let status = daemon.status_of("bad");
    assert_eq!((status.events, status.event_nr, status.last_event.as_ref()), (1, 0, Some(&bad[0].text)));

    // Removed while somebody waits; then another one of that name.
    let file = bench.path("again.toml");
    std::fs::write(&file, table("again", good.to_str().unwrap(), "no_hydration = true")).unwrap();
    let create = ["create", file.to_str().unwrap()];
    daemon.done(&create);
    let mut wait = Beside::start(&daemon, &["wait", "again"]);
    std::thread::sleep(Duration::from_millis(200));
    assert!(wait.runs());
    daemon.done(&["remove", "again"]);
    let (status, out, said) = wait.end();
    assert_eq!((status, out.as_str(), said.lines().count()), (Some(1), "", 1), "{said}");
    assert!(said.starts_with("hydrant: clone 'again' ended while it was waited for: "), "{said}");
    assert_eq!(names(&all("again")), "created stopped removed");
    assert!(daemon.refused(&["wait", "again"]).contains("no clone 'again'"));
    daemon.done(&create);
    let again = all("again");
    assert_eq!(again.iter().map(|event| event.nr).collect::<Vec<_>>(), [1, 2, 3, 1]);
    assert!(again.is_sorted_by_key(|event| event.seq));
    assert_eq!(daemon.status_of("again").events, 1);
    let text = daemon.done(&["events"]);
    assert_eq!(text.lines().count(), 3 + 3 + 1 + 4, "{text}");
    assert!(follow.runs(), "of the others it says nothing");
    daemon.done(&["remove", "bad"]);
    assert_eq!(names(&all("bad")), "start_failed removed");
    daemon.stop();
    assert_eq!(follow.event().kind, EventKind::Stopped);
    assert_eq!(follow.end().0, Some(1));
}
