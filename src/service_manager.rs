//! Tells the service manager (systemd) how the daemon is: ready, stopping. The protocol of sd_notify(3).
//!
//! `$NOTIFY_SOCKET` names a datagram socket, by a path or, after an `@`, in the abstract namespace; without it nobody wants
//! to know. Telling never waits and is never an error: a manager that does not listen must not stop the daemon.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The daemon serves what it can. `status` is a line for people.
pub fn ready(status: &str) {
    tell("READY=1", status);
}

/// The orderly end has begun.
pub fn stopping() {
    tell("STOPPING=1", "finishing what is in flight");
}

/// A line for people, as it is now.
pub fn status(status: &str) {
    tell("", status);
}

fn tell(state: &str, status: &str) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
    // Assignments are separated by newlines.
    let message = format!("{state}\nSTATUS={}\n", status.replace('\n', " "));
    let message = message.trim_start();
    if let Err(error) = send(&socket, message.as_bytes()) {
        log::warn!("the service manager can't be told '{state}' (NOTIFY_SOCKET={}): {error}", socket.display());
    }
}

fn send(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a path nor '@' and a name")),
    };
    let own = UnixDatagram::unbound()?;
    own.set_nonblocking(true)?;
    own.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    }

    #[test]
    fn by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), b"READY=1\n").unwrap();
        assert_eq!(receive(&socket), "READY=1\n");
        let name = format!("hydrant-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(OsStr::new(&format!("@{name}")), b"STOPPING=1\n").unwrap();
        assert_eq!(receive(&socket), "STOPPING=1\n");
    }

    #[test]
    fn nobody_there_or_nobody_who_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        assert_eq!(send(path.as_os_str(), b"x").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(send(OsStr::new("relative"), b"x").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let _full = UnixDatagram::bind(&path).unwrap();
        // It never waits for one who does not read.
        let error = (0..100_000).find_map(|_| send(path.as_os_str(), b"x").err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
