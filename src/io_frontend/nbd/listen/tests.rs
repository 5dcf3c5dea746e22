use super::*;
use std::os::unix::net::UnixStream;

fn error_of(address: &NbdAddress) -> Error {
    bind(address).expect_err("should be refused")
}

#[test]
fn addresses_are_read_as_they_are_written() {
    for text in
        ["unix:/run/hydrant/a.sock", "unix:relative", "tcp:127.0.0.1:10809", "tcp:[::1]:0", "tcp:0.0.0.0:1", "none"]
    {
        assert_eq!(text.parse::<NbdAddress>().unwrap().to_string(), text);
    }
    for (text, names) in [
        ("", "unix:PATH, tcp:ADDR:PORT or none"),
        ("/run/a.sock", "unix:PATH"),
        ("none:", "unix:PATH, tcp:ADDR:PORT or none"),
        ("unix:", "path is missing"),
        ("unix:a\0b", "NUL"),
        ("tcp:", "tcp:ADDR:PORT"),
        ("tcp:localhost:10809", "numeric"),
        ("tcp:::1:10809", "tcp:[::1]:10809"),
        ("tcp:127.0.0.1", "tcp:ADDR:PORT"),
        ("tcp:127.0.0.1:65536", "tcp:ADDR:PORT"),
        ("TCP:127.0.0.1:1", "unix:PATH, tcp:ADDR:PORT or none"),
    ] {
        let error = text.parse::<NbdAddress>().unwrap_err();
        assert!(error.contains(names) && !error.contains('\n'), "{text}: {error}");
    }
    let long = format!("unix:/{}", "x".repeat(SOCKET_PATH_MAX));
    assert!(long.parse::<NbdAddress>().unwrap_err().contains("108 bytes, 107 are allowed"));
}

#[test]
fn a_unix_socket_goes_with_its_guard_and_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = NbdAddress::Unix(path.clone());
    let bound = bind(&address).unwrap().unwrap();
    assert_eq!(bound.address, address);
    UnixStream::connect(&path).unwrap();
    let error = error_of(&address);
    assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("in use"), "{error}");
    drop(bound);
    assert!(!path.exists());
}

#[test]
fn tcp_tells_its_port_and_refuses_one_in_use() {
    let bound = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap().unwrap();
    let NbdAddress::Tcp(address) = bound.address else { panic!("{:?}", bound.address) };
    assert_ne!(address.port(), 0);
    let error = error_of(&bound.address);
    assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("socket in use"), "{error}");
    let client = TcpStream::connect(address).unwrap();
    let accepted = TcpListener::from(bound.fd).accept().unwrap().0;
    let accepted = TcpStream::from(configure_accepted(accepted.into(), &bound.address).unwrap());
    assert!(accepted.nodelay().unwrap());
    drop(client);
}

#[test]
fn nowhere_is_not_listened() {
    assert!(bind(&NbdAddress::None).unwrap().is_none());
}
