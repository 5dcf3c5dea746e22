//! What can be wrong when a source is connected: each has its kind and its words.

use super::servers::{Scripted, Server, have, send};
use super::*;
use crate::error::ErrorKind;
use std::time::Instant;

async fn refused(text: &str, kind: ErrorKind, words: &str, env: &Rc<dyn Env>) {
    let start = Instant::now();
    let error = match NbdSource::connect(uri(text), quick(), env.clone()).await {
        Ok(_) => panic!("{text} connects"),
        Err(error) => error,
    };
    let shown = error.to_string();
    assert_eq!(error.kind(), kind, "{shown}");
    assert!(shown.contains(words) && shown.starts_with(&format!("source {}: ", uri(text))), "{shown}");
    assert!(!shown.contains('\n'), "{shown}");
    assert!(start.elapsed() < Duration::from_secs(2), "{shown} took {:?}", start.elapsed());
}

#[test]
fn nobody_is_there() {
    on_executor(|env| async move {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        refused(&format!("nbd://127.0.0.1:{port}/x"), ErrorKind::Io, "Connection refused", &env).await;
        refused("nbd+unix:///?socket=/no/such", ErrorKind::NotFound, "socket /no/such: No such file", &env).await;
        // The name is reserved never to exist.
        refused("nbd://host.invalid/x", ErrorKind::NotFound, "host 'host.invalid' can't be resolved", &env).await;
    });
}

#[test]
fn no_nbd_server() {
    on_executor(|env| async move {
        let greets = |bytes: &'static [u8], stays: bool| {
            Scripted::new(move |_, mut stream| {
                send(&mut stream, bytes)?;
                if stays {
                    std::thread::sleep(Duration::from_secs(5));
                }
                Ok(())
            })
        };
        let (protocol, io) = (ErrorKind::Protocol, ErrorKind::Io);
        let ssh = greets(b"SSH-2.0-\nabc", true);
        refused(&ssh.uri(), protocol, "not an NBD server (it greets with 'SSH-2.0-')", &env).await;
        refused(&greets(b"", true).uri(), io, "did not finish the negotiation in 0.7 s", &env).await;
        refused(&greets(b"NBDMAGIC", true).uri(), io, "did not finish the negotiation", &env).await;
        refused(&greets(b"NBDMAGIC", false).uri(), io, "closed the connection before its greeting", &env).await;
        refused(&greets(b"NBDMAGICxxxxxxxxyy", true).uri(), protocol, "not a newstyle NBD server", &env).await;
    });
}

#[test]
fn nbdkit_exports_that_are_no_use() {
    if !have("nbdkit") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        server.nbdkit(&["--oldstyle", "memory", "1M"]);
        refused(&server.uri(), ErrorKind::Protocol, "oldstyle NBD server", &env).await;
        server.nbdkit(&["memory", "0"]);
        refused(&server.uri(), ErrorKind::TooSmall, "empty (0 bytes)", &env).await;
        let strict = ["--filter=exportname", "memory", "1M", "exportname-strict=true", "exportname=good"];
        server.nbdkit(&[["--mask-handshake=0"].as_slice(), &strict].concat());
        refused(&server.uri_of("bad"), ErrorKind::NotFound, "probably has no export 'bad'", &env).await;
        connect(&server.uri_of("good"), quick(), &env).await.close().await;
        std::fs::write(server.disk(), "alice:0123456789abcdef0123456789abcdef\n").unwrap();
        server.nbdkit(&["--tls=require", "--tls-psk=@", "memory", "1M"]);
        refused(&server.uri(), ErrorKind::NotSupported, "requires TLS", &env).await;
    });
}

#[test]
fn qemu_nbd_has_another_export() {
    if !have("qemu-nbd") {
        return;
    }
    on_executor(|env| async move {
        let mut server = Server::new();
        super::servers::make_disk(&server.disk(), 1 << 20, &[]);
        server.qemu_nbd(&["--export-name=good", "@"]);
        refused(&server.uri_of("bad"), ErrorKind::NotFound, "no export 'bad' (it says: export 'bad' not", &env).await;
        refused(&server.uri_of(""), ErrorKind::NotFound, "the server has no export ''", &env).await;
        let first = connect(&server.uri_of("good"), quick(), &env).await;
        // It takes one client: the second is in its queue and gets no greeting.
        refused(&server.uri_of("good"), ErrorKind::Io, "has it a free slot", &env).await;
        first.close().await;
        connect(&server.uri_of("good"), quick(), &env).await.close().await;
    });
}
