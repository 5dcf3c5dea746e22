use super::*;
use std::os::unix::net::{UnixListener, UnixStream};

fn error_of(address: &NbdAddress) -> Error {
    bind(address).expect_err("should be refused")
}

#[test]
fn addresses_are_read_as_they_are_written() {
    for text in ["unix:/run/hydrant/a.sock", "unix:relative", "tcp:127.0.0.1:10809", "tcp:[::1]:0", "tcp:0.0.0.0:1"] {
        assert_eq!(text.parse::<NbdAddress>().unwrap().to_string(), text);
    }
    for (text, names) in [
        ("", "unix:PATH or tcp:ADDR:PORT"),
        ("/run/a.sock", "unix:PATH"),
        ("unix:", "path is missing"),
        ("unix:a\0b", "NUL"),
        ("tcp:", "tcp:ADDR:PORT"),
        ("tcp:localhost:10809", "numeric"),
        ("tcp:::1:10809", "tcp:[::1]:10809"),
        ("tcp:127.0.0.1", "tcp:ADDR:PORT"),
        ("tcp:127.0.0.1:65536", "tcp:ADDR:PORT"),
        ("TCP:127.0.0.1:1", "unix:PATH or tcp:ADDR:PORT"),
    ] {
        let error = text.parse::<NbdAddress>().unwrap_err();
        assert!(error.contains(names) && !error.contains('\n'), "{text}: {error}");
    }
    let long = format!("unix:/{}", "x".repeat(UNIX_PATH_MAX));
    assert!(long.parse::<NbdAddress>().unwrap_err().contains("108 bytes, 107 are allowed"));
}

#[test]
fn a_unix_socket_is_private_and_goes_with_its_guard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = NbdAddress::Unix(path.clone());
    let bound = bind(&address).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    UnixStream::connect(&path).unwrap();
    drop(bound);
    assert!(!path.exists());
    // A name of the longest length works, and one byte more is refused with its numbers.
    let room = UNIX_PATH_MAX - dir.path().as_os_str().len() - 1;
    let longest = dir.path().join("l".repeat(room));
    bind(&NbdAddress::Unix(longest)).unwrap();
    let error = error_of(&NbdAddress::Unix(dir.path().join("l".repeat(room + 1)))).to_string();
    assert!(error.contains("108 bytes, 107 are allowed"), "{error}");
}

#[test]
fn a_live_socket_is_in_use_and_a_stale_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = NbdAddress::Unix(path.clone());
    let live = bind(&address).unwrap();
    let error = error_of(&address);
    assert!(error.kind() == ErrorKind::InUse && error.to_string().contains("socket in use"), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(live);

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "the standard library leaves its socket file");
    let bound = bind(&address).unwrap();
    UnixStream::connect(&path).unwrap();

    // What somebody else put there meanwhile is not ours to remove.
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(bound);
    UnixStream::connect(&path).unwrap();
    drop(other);
}

#[test]
fn a_listener_whose_backlog_is_full_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (fd, _guard) = bind_unix(&path).unwrap();
    // SAFETY: a plain system call; listening again shortens the backlog.
    assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 0) }, 0);
    let _waiting = UnixStream::connect(&path).unwrap();
    assert_eq!(error_of(&NbdAddress::Unix(path)).kind(), ErrorKind::InUse);
}

#[test]
fn other_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let error = error_of(&NbdAddress::Unix(path.clone()));
    assert!(error.kind() == ErrorKind::WrongType && error.to_string().contains("not a socket"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"data");
    assert_eq!(error_of(&NbdAddress::Unix(dir.path().into())).kind(), ErrorKind::WrongType);
    let dangling = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    assert_eq!(error_of(&NbdAddress::Unix(dangling)).kind(), ErrorKind::WrongType);
    let error = error_of(&NbdAddress::Unix(dir.path().join("missing/s")));
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("directory does not exist"), "{error}");
}

#[test]
fn tcp_tells_its_port_and_refuses_one_in_use() {
    let bound = bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
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
