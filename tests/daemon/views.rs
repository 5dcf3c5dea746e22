//! What NBD clients see: block status, CACHE, FUA, sizes, several names.

use super::harness::*;

#[test]
fn block_status_draws_the_progress() {
    need!("nbdinfo", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 4 * MIB + 100);
    let daemon = bench.clone_of(&source).args("--no-hydration --shards 2").start();
    let map = |context: &str| run("nbdinfo", &[&format!("--map={context}"), &daemon.uri()]);
    let rows = |context: &str| -> Vec<(u64, u64, u64)> {
        let number = |word: Option<&str>| word.unwrap().parse().unwrap();
        let row = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            (number(words.next()), number(words.next()), number(words.next()))
        };
        map(context).lines().map(row).collect()
    };
    assert_eq!(rows("hydrant:hydrated"), [(0, 4 * MIB + 100, 0)]);
    // One region by a write of it, two by reading, one in part.
    nbdsh(
        &daemon.uri(),
        "h = connect(); h.pwrite(bytes(range(256)) * 256, 65536); h.pread(65536 * 2, 65536 * 3); h.pwrite(b'x', 65536 * 9 + 77)",
    );
    daemon.wait_status("kept", |status| status.hydrated_regions == 4);
    let expected = [(0, 1, 0), (1, 1, 1), (2, 1, 0), (3, 2, 1), (5, 4, 0), (9, 1, 1)];
    let mut expected: Vec<_> = expected.iter().map(|(at, n, flag)| (at * 65536, n * 65536, *flag)).collect();
    expected.push((10 * 65536, 4 * MIB + 100 - 10 * 65536, 0));
    assert_eq!(rows("hydrant:hydrated"), expected);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert_eq!(rows("hydrant:hydrated"), [(0, 4 * MIB + 100, 1)]);
    daemon.stop();
}

#[test]
fn block_status_shows_holes_of_source_and_destination() {
    need!("nbdinfo", "nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", 8 * MIB);
    run("fallocate", &["-p", "-o", "2MiB", "-l", "3MiB", source.to_str().unwrap()]);
    let daemon = bench.clone_of(&source).args("--no-hydration").start();
    let script = "h = connect('base:allocation'); print([(l >> 10, f) for l, f in extents(h, 'base:allocation')])";
    let holes = "[(2048, 0), (3072, 3), (3072, 0)]";
    assert_eq!(nbdsh(&daemon.uri(), script).trim(), holes);
    daemon.message("enable_hydration");
    daemon.wait_hydrated();
    assert_eq!(nbdsh(&daemon.uri(), script).trim(), holes);
    nbdsh(&daemon.uri(), "h = connect(); h.trim(1 << 20, 6 << 20); h.flush()");
    let more = "[(2048, 0), (3072, 3), (1024, 0), (1024, 3), (1024, 0)]";
    assert_eq!(nbdsh(&daemon.uri(), script).trim(), more);
    daemon.stop();
}

#[test]
fn cache_hydrates_ahead_of_the_background() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 16M rdelay=5ms");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); assert h.can_cache(); h.cache(3 << 20, (5 << 20) + 1000); h.flush()");
    let status = daemon.status();
    assert_eq!(status.hydrated_regions, 49, "48 regions and the one that was begun");
    daemon.kill9();
    drop(server);
    assert_same_part(&bench, 5 << 20, 3 << 20);
}

fn assert_same_part(bench: &Bench, start: usize, len: usize) {
    let copy = read_first(&bench.copy(), (start + len) as u64);
    assert!(copy[start..] == pattern((start + len) as u64)[start..]);
}

#[test]
fn reads_of_unhydrated_regions_are_kept() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "pattern 4M");
    let daemon = bench.clone_of(server.uri()).args("--no-hydration").start();
    nbdsh(&daemon.uri(), "h = connect(); h.pread(1, 100); h.pread(200_000, 1 << 20)");
    daemon.wait_status("kept", |status| status.hydrated_regions == 5);
    let read = daemon.status().io.source_read_bytes;
    nbdsh(&daemon.uri(), "h = connect(); h.pread(65536, 0); h.pread(200_000, 1 << 20)");
    assert_eq!(daemon.status().io.source_read_bytes, read, "the second time they come from the destination");
    daemon.stop();
}

#[test]
fn a_small_read_of_a_large_region_is_answered_first_and_its_region_comes_next() {
    need!("nbdkit", "nbdsh");
    let bench = Bench::new();
    let server = Nbdkit::start(&bench, "--filter=delay pattern 64M rdelay=20ms");
    let daemon = bench.clone_of(server.uri()).args("--region-size 8MiB --hydration-threshold 1 --shards 1").start();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect("hydrant:hydrated")
h.pread(512, 60 << 20)
deadline = time.time() + 20
while extents(h, "hydrant:hydrated", 56 << 20, 57 << 20)[0][1] == 0:
    assert time.time() < deadline
    time.sleep(0.01)
assert extents(h, "hydrant:hydrated", 48 << 20, 49 << 20)[0][1] == 0, "it was only its turn"
"#,
    );
    daemon.stop();
}

#[test]
fn the_export_has_the_clones_name_and_the_empty_one() {
    need!("nbdinfo");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).name("disk.1").start();
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", daemon.socket.display());
    assert!(run("nbdinfo", &["--list", &uri("")]).contains("export=\"disk.1\""));
    for name in ["", "disk.1"] {
        assert_eq!(run("nbdinfo", &["--size", &uri(name)]).trim(), MIB.to_string());
    }
    let (status, said) = run_for_status("nbdinfo", &["--size", &uri("other")]);
    assert_ne!(status, 0, "{said}");
    daemon.stop();
}

#[test]
fn requests_outside_of_the_device_are_refused_and_the_connection_lives() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB + 7);
    let daemon = bench.clone_of(&source).start();
    nbdsh(
        &daemon.uri(),
        r#"
h = connect()
h.set_strict_mode(0)
size = h.get_size()
fails(errno.EINVAL, lambda: h.pread(1, size))
fails(errno.EINVAL, lambda: h.pread(2, size - 1))
fails(errno.ENOSPC, lambda: h.pwrite(b"xx", size - 1))
fails(errno.ENOSPC, lambda: h.zero(2, size - 1))
fails(errno.EINVAL, lambda: h.trim(2, size - 1))
fails(errno.EINVAL, lambda: h.cache(2, size - 1))
assert len(h.pread(1, size - 1)) == 1
"#,
    );
    daemon.stop();
}

#[test]
fn tcp_serves_too() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let daemon = bench.clone_of(&source).args(&format!("--nbd tcp:127.0.0.1:{port}")).start();
    daemon.wait_hydrated();
    let uri = format!("nbd://127.0.0.1:{port}/vm");
    let checked = nbdsh(
        &uri,
        &format!("h = connect(); assert h.pread(1 << 20, 0) == open({source:?}, 'rb').read(); print('same')"),
    );
    assert_eq!(checked.trim(), "same");
    daemon.stop();
}

#[test]
fn many_connections_are_served_at_a_time() {
    need!("nbdsh");
    let bench = Bench::new();
    let source = bench.random("source", MIB);
    let daemon = bench.clone_of(&source).args("--shards 3").start();
    nbdsh(
        &daemon.uri(),
        "hs = [connect() for _ in range(200)]\nfor i, h in enumerate(hs): h.pwrite(b'%4d' % i, i * 4)\nhs[7].flush()\nassert hs[100].pread(800, 0) == b''.join(b'%4d' % i for i in range(200))",
    );
    daemon.wait_status("clients gone", |status| status.nbd.connections == 0);
    daemon.stop();
}
