//! Real clients: libnbd (nbdsh, nbdinfo, nbdcopy) and QEMU.

use crate::harness::{BAD_OFFSET, Server, Setup, have, nbdsh, run};
use std::time::Duration;

#[test]
fn every_command_with_structured_replies() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup::default());
    nbdsh(
        &server,
        r#"
h.add_meta_context("base:allocation")
h.add_meta_context("hydrant:hydrated")
h.connect_uri(uri)
size = (1 << 20) + 777
assert h.get_size() == size
assert h.get_structured_replies_negotiated()
assert h.get_protocol() == "newstyle-fixed"
for can in ["flush", "fua", "trim", "zero", "df", "multi_conn", "cache", "fast_zero"]:
    assert getattr(h, "can_" + can)(), can
assert not h.is_read_only() and not h.is_rotational()
assert h.can_meta_context("base:allocation") and h.can_meta_context("hydrant:hydrated")
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20

# Any alignment and length; each length is received in its own way.
expected = bytearray(size)
import random
random.seed(5)
for offset, length in [(0, 1), (511, 2), (4095, 4098), (size - 1, 1), (7, 16384), (9, 16385), (4096, 65536), (13, 700001)]:
    data = random.randbytes(length)
    h.pwrite(data, offset)
    expected[offset:offset + length] = data
    assert h.pread(length, offset) == data
assert h.pread(size, 0) == expected
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
assert h.pread_structured(65536, 100, chunk, nbd.CMD_FLAG_DF) == expected[100:65636]
assert chunks == [(100, 65536, nbd.READ_DATA)], chunks
assert h.pread(777, 1 << 20) == expected[1 << 20:]

h.pwrite(b"x" * 10, 3, nbd.CMD_FLAG_FUA)
h.flush()
h.trim(5000, 10, nbd.CMD_FLAG_FUA)
h.zero(5001, 20)
h.zero(5002, 30, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(5003, 40, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.ENOTSUP, h.zero, 5004, 50, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.cache(1000, 60)
assert h.pread(4000, 50) == bytes(4000)
h.shutdown()
"#,
    );
    let log = server.log();
    let tail: Vec<&str> = log[log.len() - 9..].iter().map(String::as_str).collect();
    assert_eq!(
        tail,
        [
            "write 3..13 FUA",
            "flush",
            "trim 10..5010 FUA",
            "zero 20..5021 0x0",
            "zero 30..5032 FUA | NO_HOLE",
            "zero 40..5043 FAST_ZERO",
            "zero 50..5054 NO_HOLE | FAST_ZERO",
            "cache 60..1060",
            "read 50..4050",
        ]
    );
    assert_eq!(server.wait_ended(1), [Ok(())]);
    assert_eq!(server.stop().errors, 1);
}

#[test]
fn simple_replies_carry_the_same() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup::default());
    nbdsh(
        &server,
        &format!(
            r#"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated() and not h.can_df()
data = bytes(range(256)) * 900
h.pwrite(data, 77)
assert h.pread(len(data), 77) == data
fails(errno.EIO, h.pread, 10, {BAD_OFFSET})
assert h.pread(len(data), 77) == data
h.zero(100, 77)
h.trim(100, 177)
assert h.pread(201, 76) == bytes(201)
h.flush()
h.shutdown()
"#
        ),
    );
    assert_eq!(server.wait_ended(1), [Ok(())]);
}

#[test]
fn refused_requests_cost_nothing_but_an_error() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup::default());
    for structured in ["True", "False"] {
        nbdsh(
            &server,
            &format!(
                r#"
h.set_request_structured_replies({structured})
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
too_much = errno.EOVERFLOW if {structured} else errno.EINVAL
fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.EINVAL, h.pread, 2, (1 << 63) - 1)
fails(errno.EINVAL, h.trim, 2, size - 1)
fails(errno.EINVAL, h.cache, 2, size - 1)
fails(errno.ENOSPC, h.pwrite, b"ab", size - 1)
fails(errno.ENOSPC, h.pwrite, b"ab" * 70000, size - 1)
fails(errno.ENOSPC, h.zero, 2, size - 1)
fails(errno.EINVAL, h.pwrite, b"ab", 0, 0x80)
fails(errno.EINVAL, h.pread, 2, 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.trim, 2, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
fails(errno.EIO, h.pread, 10, {BAD_OFFSET})
# Nothing to do, and nothing done.
h.pwrite(b"", 0)
h.trim(0, 5)
h.zero(0, size)
h.cache(0, 5)
# FUA is valid on everything.
h.flush(nbd.CMD_FLAG_FUA)
# The connection is as good as before.
h.pwrite(b"still here", 5)
assert h.pread(10, 5) == b"still here"
h.shutdown()
"#
            ),
        );
    }
    let reached: Vec<String> = server.log().into_iter().filter(|line| !line.starts_with("read")).collect();
    assert_eq!(reached, ["flush", "write 5..15 0x0", "flush", "write 5..15 0x0"]);
    assert_eq!(server.wait_ended(2), [Ok(()), Ok(())]);
}

#[test]
fn payloads_beyond_the_maximum() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup { size: 80 << 20, ..Setup::default() });
    nbdsh(
        &server,
        r#"
h.set_strict_mode(0)
h.connect_uri(uri)
fails(errno.EOVERFLOW, h.pread, (32 << 20) + 1, 0)
fails(errno.EINVAL, h.pwrite, bytes((32 << 20) + 1), 0)
data = b"largest!" * (4 << 20)
h.pwrite(data, 3)
assert h.pread(32 << 20, 3) == data
h.zero(80 << 20, 0)
h.trim(80 << 20, 0)
h.shutdown()
"#,
    );
    assert_eq!(server.wait_ended(1), [Ok(())]);
}

#[test]
fn the_handshake_with_libnbd() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup::default());
    nbdsh(
        &server,
        r#"
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(uri)
listed = []
h.opt_list(lambda name, description: listed.append((name, description)))
assert listed == [("disk", "hydrant clone, 1049353 bytes")], listed
names = []
def list_contexts(*queries):
    names.clear()
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(lambda name: names.append(name))
    return names
assert list_contexts() == ["base:allocation", "hydrant:hydrated"], names
assert list_contexts("base:") == ["base:allocation"], names
assert list_contexts("hydrant:") == ["hydrant:hydrated"], names
assert list_contexts("hydrant:hydrated", "base:") == ["base:allocation", "hydrant:hydrated"], names
assert list_contexts("hydrant:other", "other:", "base", "") == [], names
h.clear_meta_contexts()

h.set_export_name("wrong")
fails(errno.ENOENT, h.opt_info)
fails(errno.ENOENT, h.opt_go)
fails(None, h.opt_list_meta_context, lambda name: None)
h.set_export_name("")
h.opt_info()
assert h.get_canonical_export_name() == "disk"
assert h.get_export_description() == "hydrant clone, 1049353 bytes"
h.add_meta_context("base:allocation")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("hydrant:hydrated")
assert h.pread(1, 0) == b"\0"
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
"#,
    );
    assert_eq!(server.wait_ended(2), [Ok(()), Ok(())]);
}

#[test]
fn block_status_tells_allocation_and_hydration() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup::default());
    nbdsh(
        &server,
        r#"
h.add_meta_context("hydrant:hydrated")
h.add_meta_context("base:allocation")
h.connect_uri(uri)
h.pwrite(b"x" * 4096, 8192)
def status(length, offset, flags=0):
    found = {}
    def add(context, at, entries, error):
        assert at == offset and context not in found
        found[context] = entries
    h.block_status(length, offset, add, flags)
    assert set(found) == {"base:allocation", "hydrant:hydrated"}, found
    return found
HOLE_ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO
size = h.get_size()
found = status(size, 0)
assert found["base:allocation"] == [8192, HOLE_ZERO, 4096, 0, size - 12288, HOLE_ZERO], found
lengths, states = found["hydrant:hydrated"][::2], found["hydrant:hydrated"][1::2]
assert sum(lengths) == size and lengths[:3] == [65536, 131072, 65536] and states[:3] == [1, 0, 1], found
found = status(100000, 8193, nbd.CMD_FLAG_REQ_ONE)
assert found["base:allocation"] == [4095, 0] and found["hydrant:hydrated"] == [65536 - 8193, 1], found
found = status(10, 8193, nbd.CMD_FLAG_REQ_ONE)
assert found["base:allocation"] == [10, 0] and found["hydrant:hydrated"] == [10, 1], found
h.set_strict_mode(0)
fails(errno.EINVAL, h.block_status, 0, 0, lambda *a: None)
fails(errno.EINVAL, h.block_status, 2, size - 1, lambda *a: None)
h.shutdown()

h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(uri)
fails(errno.EINVAL, h.block_status, 10, 0, lambda *a: None)
assert h.pread(2, 8191) == b"\0x"
h.shutdown()
"#,
    );
    let map = run("nbdinfo", &["--map=hydrant:hydrated", &server.uri("disk")]).unwrap();
    assert!(map.contains("196608       65536    1"), "{map}");
    let map = run("nbdinfo", &["--map", &server.uri("")]).unwrap();
    assert!(map.contains("8192        4096    0  data"), "{map}");
}

#[test]
fn many_requests_in_flight_on_many_connections() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(Setup { delay: Duration::from_millis(3), ..Setup::default() });
    nbdsh(
        &server,
        r#"
handles = [nbd.NBD() for _ in range(6)]
for h in handles:
    h.connect_uri(uri)
block = 4096
buffers = {}
def wait(cookies):
    for h, cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
def start(i, call, size=block):
    h = handles[i % len(handles)]
    return h, call(h, i)
wait([start(i, lambda h, i: h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * block), i * block)) for i in range(256)])
handles[0].flush()
reads = [(i, nbd.Buffer(block)) for i in range(256)]
wait([start(i, lambda h, i: h.aio_pread(buffer, i * block)) for i, buffer in reads])
for i, buffer in reads:
    assert buffer.to_bytearray() == bytearray([i]) * block, i
for h in handles:
    h.shutdown()
"#,
    );
    assert!(*server.in_flight_max.lock().unwrap() > 100, "requests of one connection run side by side");
    assert_eq!(server.wait_ended(6), vec![Ok(()); 6]);
}

#[test]
fn nbdinfo_and_nbdcopy() {
    if !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    for tcp in [false, true] {
        let server = Server::start(Setup { tcp, size: 5 << 20, ..Setup::default() });
        let info = run("nbdinfo", &["--json", "--list", &server.uri("")]).unwrap();
        for part in [
            "\"export-name\": \"disk\"",
            "\"hydrant:hydrated\"",
            "\"base:allocation\"",
            "\"description\": \"hydrant clone, 5MiB\"",
            "\"block_size_preferred\": 4096",
        ] {
            assert!(info.contains(part), "no {part} in {info}");
        }
        assert!(run("nbdinfo", &[&server.uri("wrong")]).unwrap_err().contains("wrong"));
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let bytes: Vec<u8> = (0..5u32 << 20).map(|i| (i / 3).to_le_bytes()[(i % 3) as usize]).collect();
        std::fs::write(&from, &bytes).unwrap();
        run("nbdcopy", &["--flush", from.to_str().unwrap(), &server.uri("disk")]).unwrap();
        run("nbdcopy", &["--connections=4", &server.uri("disk"), to.to_str().unwrap()]).unwrap();
        assert!(std::fs::read(&to).unwrap() == bytes);
        assert!(server.log().contains(&"flush".to_owned()));
    }
}

#[test]
fn qemu() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let server = Server::start(Setup { size: 4 << 20, ..Setup::default() });
    let uri = &server.uri("disk");
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", uri.as_str()];
        commands.iter().for_each(|command| arguments.extend(["-c", *command]));
        let out = run("qemu-io", &arguments).unwrap();
        assert!(!out.contains("failed"), "{out}");
    };
    io(&["write -P 7 1k 5k", "write -f -P 8 100k 300k", "read -P 7 1k 5k", "read -P 8 100k 300k", "flush"]);
    io(&["write -z -u 128k 64k", "discard 1M 64k", "read -P 0 128k 64k", "read -P 8 192k 64k"]);
    let log = server.take_log();
    // qemu-io writes through (FUA) and may unmap (no NO_HOLE) when told so.
    for expected in ["write 102400..409600 FUA", "flush", "zero 131072..196608 FUA", "trim 1048576..1114112 0x0"] {
        assert!(log.contains(&expected.to_owned()), "no '{expected}' in {log:#?}");
    }
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", uri]).unwrap();
    assert!(map.contains("\"data\": false"), "{map}");
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.raw");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, copy.to_str().unwrap()]).unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, copy.to_str().unwrap()]).unwrap();
    assert!(run("qemu-img", &["info", &server.uri("wrong")]).is_err());
}
