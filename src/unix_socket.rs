//! Listening unix sockets: private (mode 0600), never in somebody else's place, gone when they are dropped.
//!
//! The socket is bound under a temporary name, made private, and linked to its path, which fails when the path
//! exists: so nobody can connect before it is private, and two daemons can't both believe to own the path. A socket
//! that nobody listens on any more (its daemon crashed) is replaced; anything else at the path is left alone.

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Longest path of a socket in bytes: `sun_path` of unix(7) has 108, one of them ends it.
pub const SOCKET_PATH_MAX: usize = 107;
/// How often a stale socket is replaced before giving up (somebody else keeps putting one there).
const REPLACE_TRIES: u32 = 4;

/// A listening socket. Dropping it removes its path.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
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
        let Some(file_name) = path.file_name() else {
            bail!(Usage, "socket {}: the path names no file", path.display());
        };
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let temporary_name = format!(".{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let temporary = path.with_file_name(&temporary_name);
        if path.as_os_str().len() + temporary_name.len().saturating_sub(file_name.len()) > SOCKET_PATH_MAX {
            let len = path.as_os_str().as_bytes().len();
            bail!(
                Usage,
                "socket {}: a path of {len} bytes is too long for a socket: use a shorter one",
                path.display()
            );
        }
        let listener = UnixListener::bind(&temporary).map_err(what)?;
        let linked = (|| {
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).map_err(what)?;
            let meta = fs::symlink_metadata(&temporary).map_err(what)?;
            for _ in 0..REPLACE_TRIES {
                match fs::hard_link(&temporary, path) {
                    Ok(()) => return Ok((meta.dev(), meta.ino())),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove_stale(path)?,
                    Err(error) => return Err(what(error)),
                }
            }
            bail!(InUse, "socket {}: somebody else keeps creating it", path.display())
        })();
        // Best effort: the name is ours alone, and a leftover does no harm.
        let _ = fs::remove_file(&temporary);
        Ok(Self { listener, guard: PathGuard { path: path.to_owned(), identity: linked? } })
    }

    pub fn path(&self) -> &Path {
        &self.guard.path
    }

    /// The listening descriptor, and what removes the path.
    pub fn into_parts(self) -> (OwnedFd, PathGuard) {
        (self.listener.into(), self.guard)
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
fn remove_stale(path: &Path) -> Result<()> {
    let what = |error| Error::from_io(error, format!("socket {}", path.display()));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(what(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            bail!(WrongType, "socket {}: something that is not a socket is in its place", path.display())
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(what(error)),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(what(error)),
        // Connected, or its backlog is full: somebody listens.
        _ => Err(Error::new(
            ErrorKind::InUse,
            format!("socket {} is in use by a running process: stop it, or use another path", path.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_while_it_lives_and_gone_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let socket = BoundSocket::bind(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary name is left");
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
}
