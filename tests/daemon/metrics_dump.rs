//! The metrics file: whole whenever it is read, written when it is asked for, and never the daemon's problem.

use super::harness::*;
use hydrant::metrics::schema::MetricsDocument;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

fn config(bench: &Bench, dump: &str, clones: &[&str]) -> String {
    let mut config = format!("[daemon]\nshards = 2\n[daemon.metrics_dump]\n{dump}\n");
    for name in clones {
        let source = bench.random(&format!("{name}.source"), 4 * MIB);
        config += &format!(
            "[[clone]]\nname = \"{name}\"\nsource = \"{}\"\ndestination = \"{name}.img\"\nmetadata = \"{name}.meta\"\n",
            source.display()
        );
    }
    config
}

fn read(path: &Path) -> Option<MetricsDocument> {
    let text = fs::read_to_string(path).ok()?;
    assert!(text.ends_with("}\n"), "not whole: {} bytes that end in {:?}", text.len(), text.chars().rev().take(9));
    Some(serde_json::from_str(&text).unwrap())
}

#[test]
fn the_file_is_whole_whenever_it_is_read() {
    need!("nbdsh");
    let bench = Bench::new();
    let path = bench.path("metrics.json");
    let daemon = Daemon::serve(&bench, &config(&bench, "path = \"metrics.json\"\ninterval = \"100ms\"", &["a", "b"]));
    for name in ["a", "b"] {
        daemon.wait_status_of(name, "hydrated", |status| status.is_complete());
    }
    let uri = daemon.uri_of("a");
    let load = std::thread::spawn(move || {
        nbdsh(
            &uri,
            "h = connect()\nend = time.time() + 3\nwhile time.time() < end: h.pread(4096, random.randrange(1000) * 4096)",
        )
    });
    let (start, mut seen, mut reads, mut last) = (Instant::now(), 0, 0, MetricsDocument::default());
    while start.elapsed() < Duration::from_secs(3) {
        let Some(found) = read(&path) else { continue };
        reads += 1;
        if found.time_unix_ms != last.time_unix_ms {
            seen += 1;
            let requests = |document: &MetricsDocument| -> u64 {
                document.shards.iter().flat_map(|shard| &shard.clones).map(|slice| slice.io.read.requests).sum()
            };
            assert!(found.time_unix_ms > last.time_unix_ms && requests(&found) >= requests(&last));
            last = found;
        }
    }
    load.join().unwrap();
    assert!(seen >= 5 && reads > seen, "{seen} documents in {reads} reads");
    let names: Vec<_> = last.clones.iter().map(|clone| clone.name.as_str()).collect();
    assert_eq!((names, last.shards.len(), last.process.pid), (vec!["a", "b"], 2, daemon.pid()));
    let log = daemon.stop();
    assert!(!log.contains("metrics dump"), "{log}");
    let beside = fs::read_dir(bench.dir()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(beside.filter(|name| name.contains("metrics.json")).eq(["metrics.json"]), "nothing is left beside it");
}

#[test]
fn sigusr1_writes_the_file_now() {
    let bench = Bench::new();
    let path = bench.path("metrics.json");
    let daemon = Daemon::serve(&bench, &config(&bench, "path = \"metrics.json\"", &["a"]));
    daemon.wait_status_of("a", "hydrated", |status| status.is_complete());
    std::thread::sleep(Duration::from_millis(300));
    assert!(!path.exists(), "without an interval nobody has asked for it");
    let mut last = 0;
    for _ in 0..3 {
        daemon.signal("USR1");
        wait_for("a new document", Duration::from_secs(10), || {
            read(&path).is_some_and(|document| document.time_unix_ms > last)
        });
        last = read(&path).unwrap().time_unix_ms;
    }
    // Many at once are one or two.
    (0..20).for_each(|_| daemon.signal("USR1"));
    assert_eq!(daemon.status_of("a").nr_regions, 64);
    daemon.stop();
    assert!(read(&path).is_some());
}

#[test]
fn a_path_that_can_not_be_written_is_logged_and_the_daemon_lives() {
    let bench = Bench::new();
    let directory = bench.path("not-there");
    let dump = "path = \"not-there/metrics.json\"\ninterval = \"100ms\"";
    let daemon = Daemon::serve(&bench, &config(&bench, dump, &["a"]));
    daemon.wait_log("not-there/metrics.json");
    daemon.wait_status_of("a", "hydrated", |status| status.is_complete());
    std::thread::sleep(Duration::from_millis(1500));
    let told = daemon.log().lines().filter(|line| line.contains("metrics dump")).count();
    assert!((1..=5).contains(&told), "a burst is cut: {told} lines\n{}", daemon.log());
    // Better late than never.
    fs::create_dir(&directory).unwrap();
    wait_for("the file", Duration::from_secs(10), || read(&directory.join("metrics.json")).is_some());
    daemon.stop();
}
