//! The server goes away, comes back, comes back as another, stops to answer.

use super::servers::{Server, have, make_disk};
use super::*;
use crate::error::ErrorKind;
use std::cell::Cell;
use std::time::Instant;

const SIZE: usize = (4 << 20) + 100;
const FILE: &[&str] = &["-r", "file", "@"];

/// Notes the events of a source as letters: L lost, F found, C changed.
fn record(source: &NbdSource) -> Rc<RefCell<String>> {
    let record = Rc::new(RefCell::new(String::new()));
    let events = record.clone();
    source.on_event(move |event| {
        events.borrow_mut().push(match event {
            SourceEvent::Lost(_) => 'L',
            SourceEvent::Found => 'F',
            SourceEvent::Changed(_) => 'C',
        })
    });
    record
}

fn killed_and_restarted(args: &'static [&'static str]) {
    if !have("nbdkit") {
        return;
    }
    on_executor(move |env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), SIZE, &[1 << 20..2 << 20]);
        server.nbdkit(args);
        let source = connect(&server.uri(), NbdSourceOptions { depth: 8, ..quick() }, &env).await;
        let events = record(&source);
        let (stop, reads) = (Cell::new(false), Cell::new(0));
        let mut tasks: Vec<LocalBoxFuture<'_, ()>> = Vec::new();
        for seed in 0..64 {
            let (source, truth, stop, reads) = (&source, &truth, &stop, &reads);
            tasks.push(Box::pin(async move {
                let mut random = Random(seed);
                while !stop.get() {
                    let len = 1 + random.below(100_000);
                    compare_one(source, truth, range(random.below(SIZE as u64 - len), len)).await;
                    reads.set(reads.get() + 1);
                }
            }));
        }
        let (server, env, stop) = (&mut server, &env, &stop);
        tasks.push(Box::pin(async move {
            for _ in 0..3 {
                env.sleep(Duration::from_millis(200)).await;
                server.kill();
                env.sleep(Duration::from_millis(200)).await;
                server.nbdkit(args);
                env.sleep(Duration::from_millis(400)).await;
            }
            stop.set(true);
        }));
        join_all(tasks).await;
        assert!(reads.get() > 500, "{} reads", reads.get());
        let state = source.state();
        assert_eq!((state.losses, state.reconnects, events.borrow().as_str()), (3, 3, "LFLFLF"));
        assert!(state.is_connected());
        source.close().await;
    });
}

#[test]
fn killed_and_restarted_under_load_several_connections() {
    killed_and_restarted(FILE);
}

#[test]
fn killed_and_restarted_under_load_one_connection_simple_replies() {
    killed_and_restarted(&["--no-sr", "-r", "--filter=multi-conn", "file", "@", "multi-conn-mode=disable"]);
}

#[test]
fn gone_for_longer_than_reads_wait() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), SIZE, &[]);
        server.nbdkit(FILE);
        let options = NbdSourceOptions { source_timeout: Duration::from_millis(800), ..quick() };
        let source = connect(&server.uri(), options, &env).await;
        let events = record(&source);
        compare(&source, &truth, 50, 50_000, 1).await;
        server.kill();
        // Twice: the second read begins when the source has been lost for long, and waits as well.
        for _ in 0..2 {
            let start = Instant::now();
            let error = source.read(range(0, 512)).await.unwrap_err();
            let shown = error.to_string();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::SourceLost, libc::EIO), "{shown}");
            assert!(
                shown.contains("no answer for 0.8 s to a request of 512 bytes at offset 0; last error:"),
                "{shown}"
            );
            let waited = start.elapsed();
            assert!((700..1500).contains(&waited.as_millis()), "{waited:?}");
        }
        let error = source.allocation(range(0, 512)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SourceLost);
        assert!(!source.state().is_connected());
        server.nbdkit(FILE);
        let options = Instant::now();
        while !source.state().is_connected() {
            assert!(options.elapsed() < Duration::from_secs(10));
            env.sleep(Duration::from_millis(20)).await;
        }
        compare(&source, &truth, 50, 50_000, 2).await;
        assert_eq!(events.borrow().as_str(), "LF");
        source.close().await;
    });
}

#[test]
fn back_with_a_smaller_size() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        server.nbdkit(&["memory", "2M"]);
        let source = connect(&server.uri(), quick(), &env).await;
        let events = record(&source);
        source.read(range(0, 1)).await.unwrap();
        // All of them: one that is still being made would be found, and lost, once more.
        while source.state().connections < quick().connections {
            env.sleep(Duration::from_millis(5)).await;
        }
        server.kill();
        let waiting = source.read(range(0, 4096));
        server.nbdkit(&["memory", "1M"]);
        let error = waiting.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SourceChanged);
        assert!(error.to_string().contains("now has 1048576 bytes there, it had 2097152"), "{error}");
        // For good, although the right one comes back.
        server.nbdkit(&["memory", "2M"]);
        env.sleep(Duration::from_millis(300)).await;
        assert_eq!(source.read(range(0, 1)).await.unwrap_err().kind(), ErrorKind::SourceChanged);
        assert_eq!(source.allocation(range(0, 1)).await.unwrap_err().kind(), ErrorKind::SourceChanged);
        assert_eq!(events.borrow().as_str(), "LC");
        assert!(source.state().changed && !source.state().is_connected());
        source.close().await;
    });
}

#[test]
fn back_with_a_larger_size() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        server.nbdkit(&["memory", "1M"]);
        let source = connect(&server.uri(), quick(), &env).await;
        source.read(range(0, 1)).await.unwrap();
        server.kill();
        let waiting = source.read(range((1 << 20) - 4096, 4096));
        server.nbdkit(&["memory", "2M"]);
        assert_eq!(waiting.await.unwrap().len(), 4096);
        assert_eq!(source.size(), 1 << 20, "what is new is not seen");
        assert!(source.read(range(1 << 20, 1)).await.is_err());
        source.close().await;
    });
}

#[test]
fn back_with_smaller_limits() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), 4 << 20, &[]);
        server.nbdkit(FILE);
        let source = connect(&server.uri(), quick(), &env).await;
        compare(&source, &truth, 20, 2 << 20, 1).await;
        server.kill();
        // Cut by the old limits while nobody is there.
        let waiting: Vec<_> = (0..8).map(|i| (i, source.read(range(i * 1000 + 1, 3 << 20)))).collect();
        server.nbdkit(&[
            "-r",
            "--no-sr",
            "--filter=blocksize-policy",
            "file",
            "@",
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ]);
        for (i, read) in waiting {
            let start = i as usize * 1000 + 1;
            assert!(read.await.unwrap()[..] == truth[start..start + (3 << 20)]);
        }
        compare(&source, &truth, 50, 1 << 20, 2).await;
        // No block status any more: all data.
        let extents = source.allocation(range(7, 4096)).await.unwrap();
        assert_eq!(extents, [Extent { len: 4096, state: Allocation::DATA }]);
        source.close().await;
    });
}

#[test]
fn silent_then_awake() {
    if !have("qemu-nbd") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), 4 << 20, &[]);
        // Not nbdkit: 1.32 dies of an assertion when its clients go while it answers.
        server.qemu_nbd(&["--shared=8", "@"]);
        let source = connect(&server.uri(), quick(), &env).await;
        let events = record(&source);
        compare(&source, &truth, 20, 50_000, 1).await;
        server.freeze(true);
        // Nothing is asked: nothing is lost.
        env.sleep(Duration::from_millis(800)).await;
        assert_eq!(events.borrow().as_str(), "");
        let wake = async {
            env.sleep(Duration::from_millis(1000)).await;
            assert_eq!(events.borrow().as_str(), "L", "nothing came for longer than request_timeout");
            server.freeze(false);
        };
        let load = compare(&source, &truth, 20, 50_000, 2);
        join_all(vec![Box::pin(wake) as LocalBoxFuture<'_, ()>, Box::pin(load)]).await;
        assert_eq!(events.borrow().as_str(), "LF");
        source.close().await;
    });
}

#[test]
fn slow_is_not_lost() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), SIZE, &[]);
        server.nbdkit(&["-r", "--filter=noparallel", "--filter=delay", "file", "@", "rdelay=200ms"]);
        // Two in flight, the others wait: the last is answered long after both timeouts.
        let timeout = Duration::from_millis(600);
        let options =
            NbdSourceOptions { request_timeout: timeout, source_timeout: timeout, connections: 1, depth: 2, ..quick() };
        let source = connect(&server.uri(), options, &env).await;
        let start = Instant::now();
        compare(&source, &truth, 9, 100_000, 1).await;
        assert!(start.elapsed() > 3 * timeout, "{:?}", start.elapsed());
        assert_eq!(source.state().losses, 0);
        source.close().await;
    });
}

#[test]
fn closed_or_dropped_while_it_is_lost() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        for drop_it in [false, true] {
            let mut server = Server::new();
            server.nbdkit(&["memory", "1M"]);
            let source = connect(&server.uri(), quick(), &env).await;
            server.freeze(true);
            let client = source.client.clone();
            let waiting = client.submit(Ask::Read, range(0, 512)).unwrap();
            env.sleep(Duration::from_millis(50)).await;
            let start = Instant::now();
            match drop_it {
                true => drop(source),
                false => source.close().await,
            }
            let answer = waiting.await.unwrap_or_else(|| Err(client.closed_error()));
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::Shutdown);
            assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
            // Every task lets go of it.
            let start = Instant::now();
            while Rc::strong_count(&client) > 1 {
                assert!(start.elapsed() < Duration::from_secs(2), "a task is left behind");
                env.sleep(Duration::from_millis(10)).await;
            }
        }
    });
}
