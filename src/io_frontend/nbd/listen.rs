//! Addresses of the NBD server, and listening sockets.
//!
//! Unix sockets are [`BoundSocket`]s: private, and careful with what is at their path.

use crate::error::{Error, ErrorKind, Result};
use crate::unix_socket::{BoundSocket, SOCKET_PATH_MAX};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use crate::unix_socket::PathGuard;

#[cfg(test)]
mod tests;

/// Where to listen: `unix:PATH`, `tcp:ADDR:PORT`, or `none`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
    /// Nowhere: the clone is a block device only.
    None,
}

impl FromStr for NbdAddress {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = |why: &str| Err(format!("'{}' is not an NBD address: {why}", s.escape_debug()));
        match s.split_once(':') {
            None if s == "none" => Ok(Self::None),
            Some(("unix", "")) => bad("the path is missing"),
            Some(("unix", path)) if path.contains('\0') => bad("the path contains a NUL"),
            Some(("unix", path)) if path.len() > SOCKET_PATH_MAX => {
                bad(&format!("the path has {} bytes, {SOCKET_PATH_MAX} are allowed", path.len()))
            }
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => match address.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => bad("write tcp:ADDR:PORT with a numeric ADDR (tcp:127.0.0.1:10809, tcp:[::1]:10809)"),
            },
            _ => bad("write unix:PATH, tcp:ADDR:PORT or none"),
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Bound {
    pub fd: OwnedFd,
    /// Where it really listens: the port is filled in when 0 was asked for.
    pub address: NbdAddress,
    /// Keep it as long as the socket is to be found.
    pub guard: Option<PathGuard>,
}

/// Listens on `address`; `None` when that is nowhere.
pub fn bind(address: &NbdAddress) -> Result<Option<Bound>> {
    match address {
        NbdAddress::None => Ok(None),
        NbdAddress::Unix(path) => {
            let (fd, guard) = BoundSocket::bind(path)?.into_parts();
            Ok(Some(Bound { fd, address: address.clone(), guard: Some(guard) }))
        }
        NbdAddress::Tcp(socket_address) => {
            // The standard library sets SO_REUSEADDR: a restart need not wait for old connections to time out.
            let listener = TcpListener::bind(socket_address).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => {
                    Error::new(ErrorKind::InUse, format!("{address}: socket in use: choose another port"))
                }
                _ => Error::from_io(error, format!("{address}: can't listen")),
            })?;
            let actual = listener.local_addr().map_err(|error| Error::from_io(error, address.to_string()))?;
            Ok(Some(Bound { fd: listener.into(), address: NbdAddress::Tcp(actual), guard: None }))
        }
    }
}

/// Sets an accepted connection up: no delays for small replies over TCP, and a peer that vanished is noticed.
pub fn configure_accepted(fd: OwnedFd, address: &NbdAddress) -> Result<OwnedFd> {
    if let NbdAddress::Unix(_) = address {
        return Ok(fd);
    }
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int that lives through the call.
    let result = unsafe {
        let len = size_of_val(&on) as libc::socklen_t;
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, (&raw const on).cast(), len)
    };
    let failed = |error| Error::from_io(error, format!("{address}: connection"));
    if result != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let stream = TcpStream::from(fd);
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream.into())
}
