//! Listening unix sockets: private (mode 0600), never in somebody else's place, gone when they are dropped.
//!
//! The mode is set before the socket is bound, so there is no moment in which others can connect. A socket that
//! nobody listens on any more (its daemon crashed) is replaced; one in use, and anything else at the path, is left
//! alone.

use crate::bail;
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest path of a socket in bytes: `sun_path` of unix(7) has 108, one of them ends it.
pub const SOCKET_PATH_MAX: usize = 107;
/// How often a stale socket is replaced before giving up (somebody else keeps putting one there).
const REPLACE_TRIES: u32 = 4;
/// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: libc::c_int = 1024;

/// A listening socket. Dropping it removes its path.
#[derive(Debug)]
pub struct BoundSocket {
    fd: OwnedFd,
    guard: PathGuard,
}

/// Removes the path of a socket when dropped, unless something else is there by now.
#[derive(Debug)]
pub struct PathGuard {
    path: PathBuf,
    identity: (u64, u64),
}

impl BoundSocket {
    /// Listens at `path`. `InUse` when somebody does already; `WrongType` when something else is there.
    pub fn bind(path: &Path) -> Result<Self> {
        let what = |error| Error::from_io(error, format!("socket {}", path.display()));
        let address = Address::new(path)?;
        // Blocking: a ring's accept on a socket that does not block fails instead of waiting.
        let file = File::from(new_socket(0).map_err(what)?);
        // The mode of the unbound socket becomes the mode of its path.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(what)?;
        let fd = OwnedFd::from(file);
        let mut tries = 0;
        while let Err(error) = address.bind(&fd) {
            match error.kind() {
                io::ErrorKind::AddrInUse if tries < REPLACE_TRIES => remove_stale(path, &address)?,
                io::ErrorKind::AddrInUse => {
                    bail!(InUse, "socket {}: somebody else keeps creating it", path.display())
                }
                io::ErrorKind::NotFound => {
                    bail!(NotFound, "socket {}: its directory does not exist: create it", path.display())
                }
                _ => return Err(what(error)),
            }
            tries += 1;
        }
        let meta = fs::symlink_metadata(path).map_err(what)?;
        let guard = PathGuard { path: path.to_owned(), identity: (meta.dev(), meta.ino()) };
        // SAFETY: a plain system call on a descriptor that we own.
        if unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) } != 0 {
            return Err(what(io::Error::last_os_error()));
        }
        Ok(Self { fd, guard })
    }

    pub fn path(&self) -> &Path {
        &self.guard.path
    }

    /// The listening descriptor, and what removes the path.
    pub fn into_parts(self) -> (OwnedFd, PathGuard) {
        (self.fd, self.guard)
    }
}

impl Drop for PathGuard {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("can't remove socket {}: {error}", self.path.display());
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path, address: &Address) -> Result<()> {
    let what = |error| Error::from_io(error, format!("socket {}", path.display()));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(what(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            bail!(WrongType, "socket {}: something that is not a socket is in its place", path.display())
        }
        Ok(_) => {}
    }
    // Does not block: a listener that accepts nobody must not hold us up.
    let probe = new_socket(libc::SOCK_NONBLOCK).map_err(what)?;
    match address.connect(&probe) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(what(error)),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(what(error)),
        // One that was killed is no more: the kernel only has not put away yet what it had in flight.
        Ok(()) if listener_of(&probe).is_some_and(environment::is_gone) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(what(error)),
            _ => Ok(()),
        },
        // Connected, or its backlog is full (EAGAIN): somebody listens.
        _ => Err(Error::new(
            ErrorKind::InUse,
            format!("socket {} is in use by a running process: stop it, or use another path", path.display()),
        )),
    }
}

/// Connects to the socket at `path`. `TimedOut` when its listener does not accept anybody for `time_max` (and its queue is
/// full).
pub fn connect(path: &Path, time_max: Duration) -> io::Result<UnixStream> {
    let address = Address::new(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    let socket = new_socket(0)?;
    let stream = UnixStream::from(socket);
    // SO_SNDTIMEO, which holds for connect(2) too.
    stream.set_write_timeout(Some(time_max))?;
    let socket = OwnedFd::from(stream);
    match address.connect(&socket) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        result => result.map(|()| UnixStream::from(socket)),
    }
}

/// The process that listens at the other end of a connected socket.
fn listener_of(connected: &OwnedFd) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which the struct has; it is plain integers.
    let result = unsafe {
        libc::getsockopt(
            connected.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(credentials.pid).and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0)
}

/// A unix stream socket. `flags` is SOCK_NONBLOCK or 0.
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

/// A path as the kernel takes it. The standard library can't bind a socket that it did not make itself.
struct Address(libc::sockaddr_un);

impl Address {
    const LEN: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;

    fn new(path: &Path) -> Result<Self> {
        let bytes = path.as_os_str().as_bytes();
        if path.file_name().is_none() || bytes.contains(&0) {
            bail!(Usage, "socket {}: the path names no file", path.display());
        }
        if bytes.len() > SOCKET_PATH_MAX {
            let len = bytes.len();
            bail!(
                Usage,
                "socket {}: the path has {len} bytes, {SOCKET_PATH_MAX} are allowed: use a shorter one",
                path.display()
            );
        }
        let sun_family = libc::AF_UNIX as libc::sa_family_t;
        let mut address = libc::sockaddr_un { sun_family, sun_path: [0; SOCKET_PATH_MAX + 1] };
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        Ok(Self(address))
    }

    fn bind(&self, socket: &OwnedFd) -> io::Result<()> {
        // SAFETY: the address is a whole sockaddr_un that ends with a NUL and lives through the call.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const self.0).cast(), Self::LEN) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn connect(&self, socket: &OwnedFd) -> io::Result<()> {
        // SAFETY: as for `bind`.
        let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const self.0).cast(), Self::LEN) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn private_while_it_lives_and_gone_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let socket = BoundSocket::bind(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();

        let error = BoundSocket::bind(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(path.exists());
        drop(socket);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves it, as a crash would");
        let (fd, guard) = BoundSocket::bind(&path).unwrap().into_parts();
        UnixStream::connect(&path).unwrap();
        // What somebody else puts in its place stays.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        drop((fd, guard));
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
    }

    #[test]
    fn refusals_name_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let cases = [
            (file.clone(), ErrorKind::WrongType),
            (dir.path().join("no/such/dir.sock"), ErrorKind::NotFound),
            (dir.path().join("x".repeat(108)), ErrorKind::Usage),
            (PathBuf::from("/"), ErrorKind::Usage),
        ];
        for (path, kind) in cases {
            let error = BoundSocket::bind(&path).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_listener_whose_backlog_is_full_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (fd, _guard) = BoundSocket::bind(&path).unwrap().into_parts();
        // SAFETY: a plain system call; listening again shortens the backlog.
        assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 0) }, 0);
        let _waiting = connect(&path, Duration::from_secs(10)).unwrap();
        let error = connect(&path, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "a second one would wait for ever");
        assert_eq!(BoundSocket::bind(&path).unwrap_err().kind(), ErrorKind::InUse);
    }

    #[test]
    fn the_longest_path_works() {
        let dir = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_MAX - dir.path().as_os_str().len() - 1;
        BoundSocket::bind(&dir.path().join("l".repeat(room))).unwrap();
        let error = BoundSocket::bind(&dir.path().join("l".repeat(room + 1))).unwrap_err().to_string();
        assert!(error.contains("108 bytes, 107 are allowed"), "{error}");
    }

    #[test]
    fn a_dangling_link_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        assert_eq!(BoundSocket::bind(&path).unwrap_err().kind(), ErrorKind::WrongType);
    }
}
