//! Where the sockets of a running clone are, unless the user says otherwise.
//!
//! The directory is `$XDG_RUNTIME_DIR/hydrant`, or `/run/hydrant` when that variable is not set (the services of the
//! system). It belongs to one user (mode 0700). A clone `NAME` has `NAME.sock` (NBD) and `NAME.control` there, the daemon of
//! many clones (`hydrant serve`) has `control`, and each of its clones `NAME.sock`.

use crate::bail;
use crate::config::{CloneName, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::listen::NbdAddress;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where it is without XDG_RUNTIME_DIR.
const SYSTEM_DIR: &str = "/run/hydrant";
const NBD_SUFFIX: &str = "sock";
const CONTROL_SUFFIX: &str = "control";
/// How many clones `hydrant status` looks at, at most, when it is not told which.
const LISTED_MAX: usize = 1024;

/// What to do when the directory can't be created, by who needs it.
const ADVICE_OF_CLONE: &str = "set XDG_RUNTIME_DIR, or say where the sockets go with --nbd and --control";
const ADVICE_OF_SERVE: &str = "set XDG_RUNTIME_DIR, or say where the sockets go with 'control' in [daemon] and 'address' \
                               in the [clone.nbd] of each clone";

/// The runtime directory of this process's user. It need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// By the environment.
    pub fn of_user() -> Self {
        Self::by_xdg(std::env::var_os("XDG_RUNTIME_DIR"))
    }

    /// `xdg` is the value of XDG_RUNTIME_DIR; one that is empty or relative counts as not set, as the XDG Base
    /// Directory Specification wants it.
    fn by_xdg(xdg: Option<OsString>) -> Self {
        match xdg.map(PathBuf::from) {
            Some(dir) if dir.is_absolute() => Self(dir.join("hydrant")),
            _ => Self(SYSTEM_DIR.into()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn nbd_socket(&self, name: &CloneName) -> PathBuf {
        self.0.join(format!("{name}.{NBD_SUFFIX}"))
    }

    /// Of a daemon of many clones; no clone's, since a name is not empty.
    pub fn daemon_control_socket(&self) -> PathBuf {
        self.0.join(CONTROL_SUFFIX)
    }

    pub fn control_socket(&self, name: &CloneName) -> PathBuf {
        self.0.join(format!("{name}.{CONTROL_SUFFIX}"))
    }

    /// Whether `socket` lies directly in the directory, so that `create` is needed for it.
    pub fn holds(&self, socket: &Path) -> bool {
        socket.parent() == Some(&self.0)
    }

    /// Creates the directory, when a socket of `plan` is to be in it.
    pub fn create_for(&self, plan: &Plan) -> Result<()> {
        let is_here = |address: &NbdAddress| matches!(address, NbdAddress::Unix(path) if self.holds(path));
        if self.holds(&plan.daemon.control) || plan.clones.iter().any(|clone| is_here(&clone.nbd.address)) {
            self.create(if plan.daemon.one_clone { ADVICE_OF_CLONE } else { ADVICE_OF_SERVE })?;
        }
        Ok(())
    }

    /// As [`Self::create_for`], for a clone that comes to a daemon.
    pub fn create_for_created(&self) -> Result<()> {
        self.create("say where its socket goes with nbd.address, or start the daemon with XDG_RUNTIME_DIR")
    }

    /// Creates the directory, when it is not there. One that others may write to is refused: they could put their
    /// sockets in place of ours. `advice` is what to do when it can't be created.
    fn create(&self, advice: &str) -> Result<()> {
        let dir = &self.0;
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(Error::from_io(
                    error,
                    format!("can't create the runtime directory {} ({advice})", dir.display()),
                ));
            }
        }
        let what = |error| Error::from_io(error, format!("runtime directory {}", dir.display()));
        let meta = fs::symlink_metadata(dir).map_err(what)?;
        if !meta.is_dir() {
            bail!(WrongType, "runtime directory {} is not a directory: remove it", dir.display());
        }
        let me = fs::metadata("/proc/self").map_err(what)?.uid();
        judge(dir, meta.uid(), meta.permissions().mode(), me)
    }

    /// The clones that have, or had, a control socket here, by name.
    pub fn clones(&self) -> Result<Vec<(CloneName, PathBuf)>> {
        let what = |error| Error::from_io(error, format!("runtime directory {}", self.0.display()));
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(what(error)),
        };
        let mut clones = Vec::new();
        for entry in entries {
            let path = entry.map_err(what)?.path();
            if path.extension().is_none_or(|extension| extension != CONTROL_SUFFIX) {
                continue;
            }
            let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok()) else {
                continue;
            };
            if clones.len() == LISTED_MAX {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("more than {LISTED_MAX} clones in {}: say which one", self.0.display()),
                ));
            }
            clones.push((name, path));
        }
        clones.sort();
        Ok(clones)
    }
}

/// Whether user `me` can put sockets into a directory of `owner` with this mode. The owner comes first: nobody else can
/// change the mode.
fn judge(dir: &Path, owner: u32, mode: u32, me: u32) -> Result<()> {
    if owner != me && me != 0 {
        bail!(PermissionDenied, "runtime directory {} belongs to user {owner}, not to you", dir.display());
    }
    if mode & 0o022 != 0 {
        bail!(PermissionDenied, "runtime directory {} is writable by others: chmod 0700 it", dir.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DaemonConfig;

    fn name(text: &str) -> CloneName {
        text.parse().unwrap()
    }

    #[test]
    fn follows_xdg() {
        let user = RuntimeDir::by_xdg(Some("/run/user/1000".into()));
        assert_eq!(user.nbd_socket(&name("vm")), Path::new("/run/user/1000/hydrant/vm.sock"));
        assert_eq!(user.control_socket(&name("a.b")), Path::new("/run/user/1000/hydrant/a.b.control"));
        assert!(user.holds(Path::new("/run/user/1000/hydrant/vm.sock")));
        assert!(!user.holds(Path::new("/run/user/1000/vm.sock")));
        for unset in [None, Some("".into()), Some("relative".into())] {
            assert_eq!(RuntimeDir::by_xdg(unset).path(), Path::new("/run/hydrant"));
        }
    }

    #[test]
    fn creates_privately_and_lists() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::by_xdg(Some(temp.path().into()));
        assert_eq!(dir.clones().unwrap(), []);
        dir.create(ADVICE_OF_CLONE).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        dir.create(ADVICE_OF_CLONE).unwrap();
        for file in ["b.control", "a.x.control", "b.sock", ".control", "-z.control", "control"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let names: Vec<_> = dir.clones().unwrap().into_iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["a.x", "b"]);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(dir.create(ADVICE_OF_CLONE).unwrap_err().to_string().contains("writable by others"));
    }

    #[test]
    fn says_what_its_user_can_do() {
        let said =
            |owner, mode, me| judge(Path::new("/run/hydrant"), owner, mode, me).map_err(|error| error.to_string());
        assert_eq!(said(1000, 0o40700, 1000), Ok(()));
        assert_eq!(said(1000, 0o40700, 0), Ok(()));
        for (owner, me) in [(1000, 1000), (1000, 0)] {
            assert!(said(owner, 0o40777, me).unwrap_err().contains("chmod 0700"));
        }
        for mode in [0o40777, 0o40700] {
            let said = said(1000, mode, 1001).unwrap_err();
            assert!(said.contains("belongs to user 1000") && !said.contains("chmod"), "{said}");
        }
    }

    #[test]
    fn says_what_to_do_when_it_cannot_be_created() {
        let dir = RuntimeDir::by_xdg(Some("/nonexistent/run".into()));
        let mut daemon = DaemonConfig::new(dir.daemon_control_socket());
        for (one_clone, said, unsaid) in [(true, "--control", "[daemon]"), (false, "'control' in [daemon]", "--")] {
            daemon.one_clone = one_clone;
            let plan = Plan { daemon: daemon.clone(), clones: Vec::new(), dry_run: false };
            let error = dir.create_for(&plan).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            let text = error.to_string();
            assert!(text.contains("/nonexistent/run/hydrant") && text.contains(said), "{text}");
            assert!(!text.contains(unsaid), "{text}");
        }
        let text = dir.create_for_created().unwrap_err().to_string();
        assert!(text.contains("nbd.address") && !text.contains("--"), "{text}");
    }
}
