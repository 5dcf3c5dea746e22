//! Clients that mean harm, or fail in the middle: each loses its own connection, is answered where the protocol
//! has an answer, and the next client is served. [`Server::stop`] checks that nothing was left behind.

use crate::harness::{Server, Setup, assert_closed, greet, wait_for};
use hydrant::io_frontend::nbd::Limits;
use hydrant::io_frontend::nbd::proto::{
    CHUNK_HEADER_LEN, ClientOption, Command, CommandFlags, ErrorCode, InfoRequest, MetaContextRequest,
    OPTION_REPLY_HEADER_LEN, OptionCode, OptionHeader, OptionReplyHeader, OptionReplyType, RequestHeader,
    SIMPLE_REPLY_LEN, SimpleReply,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connection in transmission, by EXPORT_NAME: simple replies.
fn transmission(server: &Server) -> UnixStream {
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&ClientOption::ExportName("disk".into()).encode()).unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).unwrap();
    stream
}

fn request(command: Command, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    RequestHeader { flags: 0, command, cookie, offset, len }.encode().to_vec()
}

fn expect_simple(stream: &mut UnixStream, error: Option<ErrorCode>, cookie: u64) {
    let mut reply = [0; SIMPLE_REPLY_LEN];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply, SimpleReply { error, cookie }.encode());
}

/// The next client reads and writes as if nothing had happened.
fn serves_the_next(server: &Server) {
    let mut stream = transmission(server);
    stream.write_all(&[request(Command::WRITE, 1, 5, 3), b"abc".to_vec()].concat()).unwrap();
    expect_simple(&mut stream, None, 1);
    stream.write_all(&request(Command::READ, 2, 5, 3)).unwrap();
    expect_simple(&mut stream, None, 2);
    let mut data = [0; 3];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"abc");
    stream.write_all(&request(Command::DISC, 3, 0, 0)).unwrap();
    assert_closed(&mut stream);
}

fn option_reply(stream: &mut UnixStream, option: OptionCode) -> (OptionReplyType, Vec<u8>) {
    let mut header = [0; OPTION_REPLY_HEADER_LEN];
    stream.read_exact(&mut header).unwrap();
    let header = OptionReplyHeader::decode(&header).unwrap();
    assert_eq!(header.option, option);
    let mut data = vec![0; header.len as usize];
    stream.read_exact(&mut data).unwrap();
    (header.reply, data)
}

#[test]
fn garbage_at_every_stage() {
    let server = Server::start(Setup::default());
    let mut ended = 0;
    let mut dropped = |stream: &mut UnixStream, text: &str| {
        assert_closed(stream);
        ended += 1;
        server.assert_dropped(ended, text);
    };
    let mut stream = server.connect();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    dropped(&mut stream, "client flags");

    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&[0x55; 16]).unwrap();
    dropped(&mut stream, "option: bad magic");

    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&OptionHeader { option: OptionCode::GO, len: u32::MAX }.encode()).unwrap();
    dropped(&mut stream, "4294967295 bytes of data");

    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&ClientOption::ExportName("nobody\n".into()).encode()).unwrap();
    dropped(&mut stream, "no export 'nobody\\n'");

    let mut stream = transmission(&server);
    stream.write_all(&[0xaa; 28]).unwrap();
    dropped(&mut stream, "request: bad magic");

    // What was asked before the garbage was carried out, or not: but it harms nobody.
    let mut stream = transmission(&server);
    stream.write_all(&[request(Command::FLUSH, 1, 0, 0), vec![0xaa; 28]].concat()).unwrap();
    dropped(&mut stream, "request: bad magic");

    let mut stream = transmission(&server);
    stream.write_all(&request(Command::WRITE, 1, 0, u32::MAX)).unwrap();
    dropped(&mut stream, "WRITE of 4294967295 bytes");

    serves_the_next(&server);
    let totals = server.stop();
    assert_eq!((totals.accepted, totals.dropped), (8, 7));
}

#[test]
fn messages_cut_anywhere() {
    let server = Server::start(Setup::default());
    let go = ClientOption::Go(InfoRequest { name: "disk".into(), wanted: vec![] }).encode();
    let write = [request(Command::WRITE, 9, 0, 100_000), vec![7; 100_000]].concat();
    let mut ended = 0;
    for cut in [1, 15, 16, 20, go.len() - 1] {
        let mut stream = server.connect();
        greet(&mut stream, 3);
        stream.write_all(&go[..cut]).unwrap();
        drop(stream);
        ended += 1;
        server.assert_dropped(ended, "ended after");
    }
    for cut in [1, 27, 28, 29, 10_000, 99_999] {
        let mut stream = transmission(&server);
        stream.write_all(&write[..cut]).unwrap();
        drop(stream);
        ended += 1;
        server.assert_dropped(ended, "connection ended");
    }
    // Between messages it is a client that leaves.
    drop(transmission(&server));
    assert_eq!(server.wait_ended(ended + 1).pop(), Some(Ok(())));
    assert_eq!(server.log(), [""; 0], "no half of a write reaches the volume");
    serves_the_next(&server);
    server.stop();
}

#[test]
fn one_byte_at_a_time() {
    let server = Server::start(Setup::default());
    let mut stream = server.connect();
    greet(&mut stream, 3);
    let bytes = [
        ClientOption::ExportName(String::new()).encode(),
        request(Command::WRITE, 1, 4095, 20),
        vec![9; 20],
        request(Command::WRITE, 2, 1, 20_000),
        vec![8; 20_000],
        request(Command::FLUSH, 3, 0, 0),
        request(Command::DISC, 4, 0, 0),
    ]
    .concat();
    for byte in bytes.chunks(1) {
        stream.write_all(byte).unwrap();
    }
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).unwrap();
    assert_eq!(replies.len(), 10 + 3 * SIMPLE_REPLY_LEN);
    assert_eq!(server.log(), ["write 4095..4115 0x0", "write 1..20001 0x0", "flush"]);
    server.stop();
}

#[test]
fn options_that_are_refused() {
    let server = Server::start(Setup::default());
    let mut stream = server.connect();
    // Without FIXED_NEWSTYLE and NO_ZEROES, as an old client.
    greet(&mut stream, 0);
    let unknown = OptionCode(77);
    stream.write_all(&[OptionHeader { option: unknown, len: 5 }.encode().to_vec(), vec![1; 5]].concat()).unwrap();
    assert_eq!(option_reply(&mut stream, unknown).0, OptionReplyType::ERR_UNSUP);
    for option in [OptionCode::STARTTLS, OptionCode::EXTENDED_HEADERS] {
        stream.write_all(&OptionHeader { option, len: 0 }.encode()).unwrap();
        assert_eq!(option_reply(&mut stream, option).0, OptionReplyType::ERR_UNSUP);
    }
    for option in [OptionCode::LIST, OptionCode::STRUCTURED_REPLY, OptionCode::GO, OptionCode::SET_META_CONTEXT] {
        stream.write_all(&[OptionHeader { option, len: 3 }.encode().to_vec(), vec![1; 3]].concat()).unwrap();
        assert_eq!(option_reply(&mut stream, option).0, OptionReplyType::ERR_INVALID);
    }
    // A name that is longer than the option.
    let lying = [OptionHeader { option: OptionCode::INFO, len: 6 }.encode().to_vec(), vec![0, 0, 255, 255, 0, 0]];
    stream.write_all(&lying.concat()).unwrap();
    assert_eq!(option_reply(&mut stream, OptionCode::INFO).0, OptionReplyType::ERR_INVALID);
    // Contexts need structured replies.
    let set = ClientOption::SetMetaContext(MetaContextRequest {
        name: "disk".into(),
        queries: vec!["base:allocation".into()],
    });
    stream.write_all(&set.encode()).unwrap();
    assert_eq!(option_reply(&mut stream, set.code()).0, OptionReplyType::ERR_INVALID);
    stream.write_all(&ClientOption::ExportName("disk".into()).encode()).unwrap();
    let mut reply = [0xff; 10 + 124];
    stream.read_exact(&mut reply).unwrap();
    assert!(reply[10..].iter().all(|byte| *byte == 0), "an old client gets its zeroes");
    stream.write_all(&request(Command::DISC, 0, 0, 0)).unwrap();
    assert_closed(&mut stream);
    assert_eq!(server.wait_ended(1), [Ok(())]);
}

#[test]
fn an_abort_is_acknowledged() {
    let server = Server::start(Setup::default());
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&ClientOption::Abort.encode()).unwrap();
    assert_eq!(option_reply(&mut stream, OptionCode::ABORT).0, OptionReplyType::ACK);
    assert_closed(&mut stream);
    assert_eq!(server.wait_ended(1), [Ok(())]);
}

#[test]
fn option_floods_and_slow_handshakes_end() {
    let limits = Limits { handshake_time_max: Duration::from_millis(200), ..Limits::default() };
    let server = Server::start(Setup { limits, ..Setup::default() });
    let mut flood = server.connect();
    greet(&mut flood, 3);
    let list = ClientOption::List.encode();
    // The server may close while we still write.
    let _ = (0..1000).try_for_each(|_| flood.write_all(&list));
    assert_closed(&mut flood);
    server.assert_dropped(1, "more than 64 options");

    // Silent from the start, silent in an option, and one byte from time to time.
    let start = Instant::now();
    let mut silent = server.connect();
    let mut half = server.connect();
    greet(&mut half, 3);
    half.write_all(&list[..9]).unwrap();
    let mut trickle = server.connect();
    greet(&mut trickle, 3);
    for byte in list.iter().cycle().take(100) {
        if trickle.write_all(&[*byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_closed(&mut silent);
    assert_closed(&mut half);
    assert_closed(&mut trickle);
    assert!(start.elapsed() < Duration::from_secs(5));
    server.assert_dropped(4, "not done in 200ms");
    serves_the_next(&server);
}

#[test]
fn a_client_that_reads_no_replies_is_not_read_from() {
    let limits = Limits {
        payload_bytes_in_flight_max: 4 << 20,
        payload_bytes_max: 1 << 20,
        drain_time_max: Duration::from_millis(100),
        ..Limits::default()
    };
    let server = Server::start(Setup { limits, size: 4 << 20, ..Setup::default() });
    let mut stream = transmission(&server);
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let read = request(Command::READ, 1, 0, 1 << 20);
    let mut sent = 0;
    while sent < 100_000 && stream.write_all(&read).is_ok() {
        sent += 1;
    }
    assert!(sent < 100_000, "the server takes requests without end");
    // Four in flight, what fits the socket, and no more.
    let reads = server.log().len();
    assert!((4..=16).contains(&reads), "{reads} reads of 1 MiB were started for a client that takes none");
    serves_the_next(&server);
    // It can't hold up a stop either.
    let start = Instant::now();
    server.stop();
    assert!(start.elapsed() < Duration::from_secs(3));
    drop(stream);
}

/// Reads and writes of 1 MiB, four at a time on all connections together, which have nothing of their own.
fn little_memory() -> Setup {
    let limits = Limits {
        payload_bytes_in_flight_max: 4 << 20,
        payload_bytes_max: 1 << 20,
        payload_bytes_own: 0,
        stall_time_max: Duration::from_millis(400),
        ..Limits::default()
    };
    Setup { limits, memory: 4 << 20, size: 4 << 20, ..Setup::default() }
}

#[test]
fn a_client_that_takes_no_replies_gives_way_when_others_want_its_memory() {
    let server = Server::start(little_memory());
    let mut greedy = transmission(&server);
    let reads: Vec<u8> = (0..30).flat_map(|cookie| request(Command::READ, cookie, 0, 1 << 20)).collect();
    greedy.write_all(&reads).unwrap();
    wait_for(|| server.log().len() >= 4, "all of the memory to be taken");
    // It may be as slow as it likes while nobody waits.
    std::thread::sleep(Duration::from_millis(1000));
    assert!(server.ended.lock().unwrap().is_empty(), "dropped without need");
    let start = Instant::now();
    serves_the_next(&server);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    let ended = server.wait_ended(2);
    let greedy_end = ended.iter().find_map(|end| end.clone().err()).expect("the greedy one is dropped");
    assert!(greedy_end.contains("took no replies for 400ms"), "{greedy_end}");
    server.stop();
}

#[test]
fn a_modest_client_has_memory_of_its_own() {
    let limits = Limits {
        payload_bytes_own: 64 << 10,
        stall_time_max: Duration::from_secs(60),
        drain_time_max: Duration::from_millis(100),
        ..little_memory().limits
    };
    let server = Server::start(Setup { limits, ..little_memory() });
    let mut greedy = transmission(&server);
    let reads: Vec<u8> = (0..30).flat_map(|cookie| request(Command::READ, cookie, 0, 1 << 20)).collect();
    greedy.write_all(&reads).unwrap();
    wait_for(|| server.log().len() >= 4, "all of the memory to be taken");
    serves_the_next(&server);
    assert_eq!(server.wait_ended(1), [Ok(())], "nobody had to give way");
    server.stop();
}

#[test]
fn a_slow_client_that_goes_on_keeps_its_place() {
    let limits = Limits { stall_time_max: Duration::from_secs(1), ..little_memory().limits };
    let server = Server::start(Setup { limits, ..little_memory() });
    let mut slow = transmission(&server);
    let mut eager = transmission(&server);
    let reads: Vec<u8> = (0..4).flat_map(|cookie| request(Command::READ, cookie, 0, 1 << 20)).collect();
    slow.write_all(&reads).unwrap();
    wait_for(|| server.log().len() >= 4, "all of the memory to be taken");
    // More than there is, again and again: it always waits.
    eager.write_all(&reads.repeat(8)).unwrap();
    let eager = std::thread::spawn(move || {
        eager.read_exact(&mut vec![0; 32 * (SIMPLE_REPLY_LEN + (1 << 20))]).unwrap();
    });
    // One reply takes longer than it may stall.
    for _ in 0..12 {
        slow.read_exact(&mut vec![0; 256 << 10]).unwrap();
        std::thread::sleep(Duration::from_millis(350));
    }
    slow.read_exact(&mut vec![0; (1 << 20) + 4 * SIMPLE_REPLY_LEN]).unwrap();
    eager.join().unwrap();
    drop(slow);
    assert_eq!(server.wait_ended(2), [Ok(()), Ok(())]);
    server.stop();
}

#[test]
fn nothing_is_begun_for_a_client_that_has_gone() {
    let server = Server::start(little_memory());
    let mut stream = transmission(&server);
    let reads: Vec<u8> = (0..200).flat_map(|cookie| request(Command::READ, cookie, 0, 1 << 20)).collect();
    stream.write_all(&reads).unwrap();
    wait_for(|| server.log().len() >= 4, "all of the memory to be taken");
    drop(stream);
    server.wait_ended(1);
    let begun = server.log().len();
    assert!(begun <= 16, "{begun} reads for a client that has gone");
    server.stop();
}

#[test]
fn a_client_that_leaves_with_its_replies_unread_gives_way_too() {
    let server = Server::start(little_memory());
    let mut greedy = transmission(&server);
    let reads: Vec<u8> = (0..8).flat_map(|cookie| request(Command::READ, cookie, 0, 1 << 20)).collect();
    greedy.write_all(&reads).unwrap();
    wait_for(|| server.log().len() >= 4, "all of the memory to be taken");
    greedy.shutdown(std::net::Shutdown::Write).unwrap();
    serves_the_next(&server);
    server.stop();
}

#[test]
fn payloads_that_do_not_come_give_way() {
    let server = Server::start(little_memory());
    let half = [request(Command::WRITE, 1, 0, 1 << 20), vec![1; 1 << 19]].concat();
    let greedy: Vec<UnixStream> = (0..4)
        .map(|_| {
            let mut stream = transmission(&server);
            stream.write_all(&half).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    serves_the_next(&server);
    let ends = server.wait_ended(2);
    assert!(ends.iter().flat_map(|end| end.clone().err()).all(|end| end.contains("sent nothing of a payload")));
    drop(greedy);
    server.wait_ended(5);
    assert_eq!(server.log(), ["write 5..8 0x0", "read 5..8"], "no half of a write reaches the volume");
    server.stop();
}

#[test]
fn requests_in_flight_are_bounded() {
    let limits = Limits { requests_in_flight_max: 5, ..Limits::default() };
    let server = Server::start(Setup { limits, delay: Duration::from_millis(5), ..Setup::default() });
    let mut stream = transmission(&server);
    let count = 200;
    let requests: Vec<u8> = (0..count).flat_map(|cookie| request(Command::CACHE, cookie, 0, 100)).collect();
    stream.write_all(&requests).unwrap();
    let mut cookies: Vec<u64> = (0..count)
        .map(|_| {
            let mut reply = [0; SIMPLE_REPLY_LEN];
            stream.read_exact(&mut reply).unwrap();
            u64::from_be_bytes(*reply.last_chunk().unwrap())
        })
        .collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..count), "every request is answered once");
    assert_eq!(*server.in_flight_max.lock().unwrap(), 5);
}

#[test]
fn a_client_that_leaves_with_requests_in_flight() {
    let server = Server::start(Setup { delay: Duration::from_millis(100), ..Setup::default() });
    let mut stream = transmission(&server);
    for cookie in 0..20 {
        stream.write_all(&[request(Command::WRITE, cookie, cookie * 8192, 8192), vec![1; 8192]].concat()).unwrap();
    }
    wait_for(|| server.log().len() == 20, "the writes to arrive");
    drop(stream);
    // `stop` checks that they had all ended when `serve` returned.
    server.wait_ended(1);
    serves_the_next(&server);
    server.stop();
}

#[test]
fn a_stop_answers_what_is_in_flight() {
    let server = Server::start(Setup { delay: Duration::from_millis(200), ..Setup::default() });
    let mut stream = transmission(&server);
    // And one that will never be complete.
    let half = [request(Command::WRITE, 8, 0, 50_000), vec![1; 20_000]].concat();
    let requests = [request(Command::WRITE, 7, 0, 4), b"data".to_vec(), half].concat();
    stream.write_all(&requests).unwrap();
    let mut idle = transmission(&server);
    let mut in_handshake = server.connect();
    greet(&mut in_handshake, 3);
    wait_for(|| server.log().len() == 1, "the write to arrive");
    server.request_stop();
    expect_simple(&mut stream, None, 7);
    assert_closed(&mut stream);
    assert_closed(&mut idle);
    assert_closed(&mut in_handshake);
    assert_eq!(server.wait_ended(3), [Ok(()), Ok(()), Ok(())]);
    assert_eq!(server.log(), ["write 0..4 0x0"]);
    server.stop();
}

#[test]
fn half_closed_clients_still_get_their_answers() {
    let server = Server::start(Setup { delay: Duration::from_millis(50), ..Setup::default() });
    let mut stream = transmission(&server);
    stream.write_all(&request(Command::READ, 1, 10, 5)).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), SIMPLE_REPLY_LEN + 5);
    assert_eq!(server.wait_ended(1), [Ok(())]);
}

#[test]
fn unknown_commands_and_flags_keep_the_stream_in_step() {
    let server = Server::start(Setup::default());
    let mut stream = transmission(&server);
    let bad_flags = RequestHeader { flags: 0x8000, command: Command::WRITE, cookie: 2, offset: 0, len: 70_000 };
    let df = CommandFlags::DF.bits();
    let bytes = [
        request(Command(99), 1, 0, 12345),
        bad_flags.encode().to_vec(),
        vec![0x25; 70_000],
        RequestHeader { flags: df, command: Command::READ, cookie: 3, offset: 0, len: 1 }.encode().to_vec(),
        request(Command::BLOCK_STATUS, 4, 0, 512),
        request(Command::FLUSH, 5, 0, 512),
        request(Command::READ, 6, u64::MAX, 2),
        request(Command::READ, 7, 0, 0),
        request(Command::WRITE, 8, 0, 0),
        request(Command::FLUSH, 9, 0, 0),
    ];
    stream.write_all(&bytes.concat()).unwrap();
    for cookie in 1..=6 {
        expect_simple(&mut stream, Some(ErrorCode::EINVAL), cookie);
    }
    for cookie in 7..=9 {
        expect_simple(&mut stream, None, cookie);
    }
    assert_eq!(server.log(), ["flush"]);
    drop(stream);
    assert_eq!(server.stop().errors, 6);
}

#[test]
fn structured_errors_say_what_is_wrong() {
    let server = Server::start(Setup::default());
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&ClientOption::StructuredReply.encode()).unwrap();
    assert_eq!(option_reply(&mut stream, OptionCode::STRUCTURED_REPLY).0, OptionReplyType::ACK);
    stream.write_all(&ClientOption::ExportName("disk".into()).encode()).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    stream.write_all(&request(Command::READ, 1, 1 << 40, 512)).unwrap();
    let expected = "READ: 512 bytes at offset 1099511627776 exceed the 1049353 bytes";
    let mut chunk = vec![0; CHUNK_HEADER_LEN + 6 + expected.len()];
    stream.read_exact(&mut chunk).unwrap();
    assert_eq!(std::str::from_utf8(&chunk[CHUNK_HEADER_LEN + 6..]).unwrap(), expected);
}
