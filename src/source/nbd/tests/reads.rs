//! Data and allocation are what the server has, with every kind of server.

use super::servers::{Server, have, make_disk};
use super::*;
use crate::source::fingerprint::fingerprint;
use std::time::Instant;

/// Not a multiple of 512.
const ODD_SIZE: usize = (5 << 20) + 777;

/// Serves a disk by nbdkit with these options and compares it.
fn nbdkit_compare(size: usize, len_max: u64, args: &'static [&'static str], check: impl Fn(NbdInfo) + Send + 'static) {
    if !have("nbdkit") {
        return;
    }
    on_executor(move |env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), size, &[1 << 20..2 << 20]);
        server.nbdkit(args);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        check(source.info());
        compare(&source, &truth, 400, len_max, 1).await;
        assert_eq!(source.state().losses, 0);
        source.close().await;
    });
}

#[test]
fn nbdkit_structured_replies_several_connections() {
    nbdkit_compare(ODD_SIZE, 1 << 20, &["-r", "file", "@"], |info| {
        assert!(info.structured_replies && info.multi_conn && info.read_only && info.allocation);
        assert_eq!(info.block_min, 1);
    });
}

#[test]
fn nbdkit_simple_replies() {
    nbdkit_compare(ODD_SIZE, 1 << 20, &["--no-sr", "-r", "file", "@"], |info| {
        assert!(!info.structured_replies && !info.allocation);
    });
}

#[test]
fn nbdkit_without_fixed_newstyle_or_go() {
    // Neither FIXED_NEWSTYLE nor NO_ZEROES: EXPORT_NAME with 124 bytes of padding.
    nbdkit_compare(4 << 20, 1 << 20, &["--mask-handshake=0", "-r", "file", "@"], |info| {
        assert!(!info.structured_replies);
        assert_eq!(info.block_min, 512, "the server did not say");
    });
    nbdkit_compare(ODD_SIZE, 1 << 20, &["--mask-handshake=1", "-r", "file", "@"], |info| {
        assert!(info.structured_replies, "only the padding differs");
    });
}

#[test]
fn nbdkit_block_size_constraints_are_kept() {
    // The filter answers EINVAL to a request that breaks them.
    const ARGS: &[&str] = &[
        "-r",
        "--filter=blocksize-policy",
        "file",
        "@",
        "blocksize-minimum=4096",
        "blocksize-preferred=8192",
        "blocksize-maximum=200K",
        "blocksize-error-policy=error",
    ];
    nbdkit_compare(5 << 20, 1 << 20, ARGS, |info| {
        assert_eq!((info.block_min, info.block_preferred, info.read_len_max), (4096, 8192, 128 << 10));
    });
}

#[test]
fn nbdkit_over_tcp() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), ODD_SIZE, &[]);
        let port = server.nbdkit_tcp(&["-r", "file", "@"]);
        for host in ["127.0.0.1", "localhost"] {
            let source = connect(&format!("nbd://{host}:{port}/any"), NbdSourceOptions::default(), &env).await;
            compare(&source, &truth, 200, 2 << 20, 2).await;
            source.close().await;
        }
    });
}

#[test]
fn qemu_nbd_one_connection_and_several() {
    if !have("qemu-nbd") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        // qemu-nbd serves whole sectors.
        let truth = make_disk(&server.disk(), 6 << 20, &[0..1 << 20, 3 << 20..4 << 20]);
        for (shared, multi_conn) in [("1", false), ("4", true)] {
            server.qemu_nbd(&["--shared", shared, "--export-name", "disk ä", "@"]);
            let source = connect(&server.uri_of("disk%20%C3%A4"), NbdSourceOptions::default(), &env).await;
            let info = source.info();
            assert!(info.structured_replies && info.allocation && info.read_only);
            assert_eq!(info.multi_conn, multi_conn);
            compare(&source, &truth, 300, 3 << 20, 3).await;
            check_allocation(&source, &truth).await;
            source.close().await;
        }
    });
}

#[test]
fn a_read_longer_than_the_server_takes() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        server.nbdkit(&["pattern", "100M"]);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        let data = source.read(range(8, 70 << 20)).await.unwrap();
        assert_eq!(data.len(), 70 << 20);
        // The plugin's content: each 8 bytes hold their offset, big endian.
        assert!(data.chunks_exact(8).zip(1u64..).all(|(bytes, index)| bytes == (index * 8).to_be_bytes()));
        source.close().await;
    });
}

/// Walks the device by its allocation: nothing is missing, holes are zero, and data is found where it is.
async fn check_allocation(source: &NbdSource, truth: &[u8]) {
    for start in [0, 1, (1 << 20) - 1, 3 << 20] {
        let (mut at, mut zeros) = (start, 0);
        while at < truth.len() as u64 {
            let asked = range(at, truth.len() as u64 - at);
            let extents = source.allocation(asked).await.unwrap();
            assert!(!extents.is_empty() && extents.len() <= crate::disk::EXTENTS_MAX);
            for extent in extents {
                assert!(extent.len > 0 && at + extent.len <= truth.len() as u64);
                let content = &truth[at as usize..(at + extent.len) as usize];
                if extent.state.zero {
                    assert!(crate::dma_buf::is_zero(content), "{} bytes at {at} are not zero", extent.len);
                    zeros += extent.len;
                }
                at += extent.len;
            }
        }
        let expected = truth[start as usize..].chunks(4096).filter(|c| crate::dma_buf::is_zero(c)).count() as u64;
        assert!(zeros + 8192 >= expected * 4096, "only {zeros} of {} zeros are told from {start}", expected * 4096);
    }
}

#[test]
fn allocation_of_a_sparse_disk() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let holes: Vec<_> = (0..40).map(|i| (i * 128) << 10..(i * 128 + 64) << 10).collect();
        let truth = make_disk(&server.disk(), ODD_SIZE, &holes);
        server.nbdkit(&["-r", "file", "@"]);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        check_allocation(&source, &truth).await;
        let extents = source.allocation(range(0, ODD_SIZE as u64)).await.unwrap();
        assert!(extents.len() > 60, "{} extents", extents.len());
        source.close().await;

        // A server that can't tell, in both ways.
        for args in [["-r", "--filter=noextents", "file", "@"].as_slice(), &["-r", "--no-sr", "file", "@"]] {
            server.nbdkit(args);
            let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
            let extents = source.allocation(range(5, 5 << 20)).await.unwrap();
            assert_eq!(extents, [Extent { len: 5 << 20, state: Allocation::DATA }]);
            source.close().await;
        }
    });
}

#[test]
fn one_question_about_allocation_serves_many() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        make_disk(&server.disk(), 32 << 20, &[0..16 << 20]);
        // 300 ms per question.
        server.nbdkit(&["-r", "--filter=delay", "file", "@", "delay-extents=300ms"]);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        let start = Instant::now();
        let asks = (0..512).map(|i| {
            let source = &source;
            Box::pin(async move {
                let extents = source.allocation(range(i << 16, 1 << 16)).await.unwrap();
                assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), 1 << 16);
                assert_eq!(extents[0].state.zero, i < 256);
            }) as LocalBoxFuture<'_, ()>
        });
        join_all(asks.collect()).await;
        assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
        source.close().await;
    });
}

#[test]
fn many_requests_are_in_flight() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), 4 << 20, &[]);
        server.nbdkit(&["-r", "-t", "64", "--filter=delay", "file", "@", "rdelay=50ms"]);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        let start = Instant::now();
        compare(&source, &truth, 97, 4096, 4).await;
        // One after the other it takes five seconds.
        assert!(start.elapsed() < Duration::from_millis(1000), "{:?}", start.elapsed());
        let start = Instant::now();
        fingerprint(&source).await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(800), "{:?}", start.elapsed());
        source.close().await;
    });
}

#[test]
fn an_error_of_the_server_is_an_error_of_the_read_only() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        let truth = make_disk(&server.disk(), 4 << 20, &[]);
        let broken = server.path("broken");
        let file = format!("error-file={}", broken.display());
        for sr in ["--no-sr", "-r"] {
            let args =
                [sr, "-r", "--filter=error", "file", "@", "error-pread=EIO", "error-pread-rate=100%", file.as_str()];
            server.nbdkit(&args);
            let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
            std::fs::write(&broken, "").unwrap();
            let error = source.read(range(4096, 4096)).await.unwrap_err();
            assert_eq!((error.kind(), error.errno()), (crate::error::ErrorKind::Io, libc::EIO));
            assert!(error.to_string().contains("read of 4096 bytes at offset 4096: the server says EIO"), "{error}");
            std::fs::remove_file(&broken).unwrap();
            compare(&source, &truth, 20, 10_000, 5).await;
            assert_eq!(source.state().losses, 0);
            source.close().await;
        }
    });
}

#[test]
fn beyond_the_end_and_after_the_close() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        server.nbdkit(&["memory", "10000"]);
        let source = connect(&server.uri(), NbdSourceOptions::default(), &env).await;
        let error = source.read(range(9999, 2)).await.unwrap_err();
        assert!(error.to_string().ends_with("2 bytes at offset 9999 is beyond its end at 10000"), "{error}");
        assert!(source.read(range(9999, 1)).await.unwrap().is_zero());
        assert!(source.allocation(range(0, 10001)).await.is_err());
        source.close().await;
    });
}
