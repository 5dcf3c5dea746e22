//! Addresses of the NBD server, and listening sockets.
//!
//! A unix socket is 0600 from before it can be connected to, replaces a socket file that nobody listens on, never
//! one that is in use and never any other file, and is removed when its guard is dropped, if it is still the same.

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

#[cfg(test)]
mod tests;

/// Longest path of a unix socket, in bytes: `sun_path` without its final NUL.
const UNIX_PATH_MAX: usize = 107;
/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Where to listen, or to connect to: `unix:PATH` or `tcp:ADDR:PORT`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl FromStr for NbdAddress {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = |why: &str| Err(format!("'{s}' is not an NBD address: {why}"));
        match s.split_once(':') {
            Some(("unix", "")) => bad("the path is missing"),
            Some(("unix", path)) if path.contains('\0') => bad("the path contains a NUL"),
            Some(("unix", path)) if path.len() > UNIX_PATH_MAX => {
                bad(&format!("the path has {} bytes, {UNIX_PATH_MAX} are allowed", path.len()))
            }
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => match address.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => bad("write tcp:ADDR:PORT with a numeric ADDR (tcp:127.0.0.1:10809, tcp:[::1]:10809)"),
            },
            _ => bad("write unix:PATH or tcp:ADDR:PORT"),
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
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
    pub guard: Option<SocketFile>,
}

/// Listens on `address`.
pub fn bind(address: &NbdAddress) -> Result<Bound> {
    match address {
        NbdAddress::Unix(path) => {
            let (fd, guard) = bind_unix(path)?;
            Ok(Bound { fd, address: address.clone(), guard: Some(guard) })
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
            Ok(Bound { fd: listener.into(), address: NbdAddress::Tcp(actual), guard: None })
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

/// The file of a bound unix socket; removed when dropped, if it is still this one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |file: &fs::Metadata| (file.dev(), file.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(|file| ours(&file)) {
            // Nothing to be done about a failure; the next daemon replaces the file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a unix socket that only its owner can connect to.
pub fn bind_unix(path: &Path) -> Result<(OwnedFd, SocketFile)> {
    let name = format!("socket {}", path.display());
    // Blocking: a ring's accept on a socket that does not block fails instead of waiting.
    let socket = new_socket(0).map_err(|error| Error::from_io(error, name.clone()))?;
    make_way(path, &name)?;
    // The mode of the unbound socket becomes the mode of its file: there is no moment with another one.
    let socket = File::from(socket);
    socket.set_permissions(Permissions::from_mode(0o600)).map_err(|error| Error::from_io(error, name.clone()))?;
    let socket = OwnedFd::from(socket);
    // SAFETY: the address is valid for its length for the whole call, see `with_address`.
    let bound = with_address(path, &name, |address, len| unsafe { libc::bind(socket.as_raw_fd(), address, len) })?;
    bound.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Error::new(ErrorKind::InUse, format!("{name}: socket in use")),
        io::ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, format!("{name}: its directory does not exist: create it"))
        }
        _ => Error::from_io(error, format!("{name}: can't bind")),
    })?;
    let file = fs::symlink_metadata(path).map_err(|error| Error::from_io(error, name.clone()))?;
    let guard = SocketFile { path: path.to_owned(), device: file.dev(), inode: file.ino() };
    // SAFETY: a plain system call on a descriptor that we own.
    if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
        return Err(Error::from_io(io::Error::last_os_error(), format!("{name}: can't listen")));
    }
    Ok((socket, guard))
}

/// Removes a socket file that nobody listens on; refuses anything else that is there.
fn make_way(path: &Path, name: &str) -> Result<()> {
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::from_io(error, name)),
    };
    if !file.file_type().is_socket() {
        bail!(WrongType, "{name}: exists and is not a socket: choose another path");
    }
    // Does not block: a listener that accepts nobody must not hold us up.
    let probe = new_socket(libc::SOCK_NONBLOCK).map_err(|error| Error::from_io(error, name))?;
    // SAFETY: the address is valid for its length for the whole call, see `with_address`.
    let connected = with_address(path, name, |address, len| unsafe { libc::connect(probe.as_raw_fd(), address, len) })?;
    match connected {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!("{name}: nobody listens on it any more: replaced");
            fs::remove_file(path).map_err(|error| Error::from_io(error, format!("{name}: can't replace")))
        }
        // It went away by itself.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(Error::from_io(error, name)),
        // A full backlog (EAGAIN), another type of socket: somebody is there.
        Ok(()) | Err(_) => bail!(InUse, "{name}: socket in use"),
    }
}

/// A unix stream socket. `flags` are SOCK_NONBLOCK or 0.
fn new_socket(flags: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags;
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs a system call that takes the address of a socket, valid for the given length.
fn with_address(
    path: &Path,
    name: &str,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32,
) -> Result<io::Result<()>> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        bail!(Usage, "{name}: not a path");
    }
    if bytes.len() > UNIX_PATH_MAX {
        bail!(Usage, "{name}: the path has {} bytes, {UNIX_PATH_MAX} are allowed", bytes.len());
    }
    let mut address =
        libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; UNIX_PATH_MAX + 1] };
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    let result = call((&raw const address).cast(), len);
    Ok(if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
}
