//! Commands to device-mapper: each waits for the kernel, some for requests in flight. For threads of their own.

use super::proto::{self, ANSWER_BYTES, Command, Flags, Info, Target, UDEV_PRIMARY_SOURCE, Which};
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

const PATH: &str = "/dev/mapper/control";

/// An open /dev/mapper/control.
pub struct DeviceMapper {
    file: File,
}

impl DeviceMapper {
    /// Opens it, and makes sure that the kernel speaks our version.
    pub fn open() -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).open(PATH);
        let file = opened.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                let text = format!("{PATH}: there is no device-mapper here: load it with 'modprobe dm_mod'");
                Error::new(ErrorKind::Environment, text)
            }
            Some(libc::EACCES | libc::EPERM) => {
                let text = format!("{PATH}: no permission: device-mapper needs root (CAP_SYS_ADMIN)");
                Error::new(ErrorKind::PermissionDenied, text)
            }
            _ => Error::from_io(error, PATH),
        })?;
        let mapper = Self { file };
        mapper.command(Command::Version, Which::None, Flags::empty(), 0, &[]).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => {
                    let text = format!("{PATH}: no permission: device-mapper needs root (CAP_SYS_ADMIN)");
                    Error::new(ErrorKind::PermissionDenied, text)
                }
                _ => Error::from_io(error, "device-mapper of this kernel is too old"),
            }
        })?;
        Ok(mapper)
    }

    /// Carries a command out; what the kernel left in the buffer.
    fn command(
        &self,
        command: Command,
        which: Which<'_>,
        flags: Flags,
        event_nr: u32,
        table: &[Target],
    ) -> io::Result<Vec<u8>> {
        let room = if command == Command::TableStatus { ANSWER_BYTES } else { 0 };
        let bytes = proto::encode(which, flags, event_nr, table, room);
        let mut bytes = bytes.ok_or_else(|| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
        loop {
            // SAFETY: the kernel reads and writes as many bytes as the buffer says that it has, which `encode` has filled
            // in; it outlives the call.
            let result =
                unsafe { libc::ioctl(self.file.as_raw_fd(), command.request() as libc::Ioctl, bytes.as_mut_ptr()) };
            match io::Error::last_os_error() {
                _ if result >= 0 => return Ok(bytes),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }

    fn done(&self, command: Command, which: Which<'_>, flags: Flags, event_nr: u32, table: &[Target]) -> Result<Info> {
        let what = match which {
            Which::None => String::new(),
            Which::Name(which) | Which::Uuid(which) | Which::Both { name: which, .. } => format!(" {which}"),
        };
        match self.command(command, which, flags, event_nr, table) {
            Ok(bytes) => proto::decode(&bytes)
                .ok_or_else(|| Error::new(ErrorKind::Environment, format!("device-mapper{what}: no answer"))),
            Err(error) => {
                let kind = match error.raw_os_error() {
                    Some(libc::ENXIO) => ErrorKind::NotFound,
                    Some(libc::EBUSY | libc::EEXIST) => ErrorKind::InUse,
                    Some(libc::EPERM | libc::EACCES) => ErrorKind::PermissionDenied,
                    _ => ErrorKind::Environment,
                };
                let why = Error::from_io(error, "the kernel says");
                Err(Error::new(kind, format!("device-mapper{what}: {} failed: {why}", command.name())))
            }
        }
    }

    fn found(&self, which: Which<'_>) -> Result<Option<Info>> {
        match self.done(Command::Status, which, Flags::empty(), 0, &[]) {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The device with this uuid.
    pub fn find(&self, uuid: &str) -> Result<Option<Info>> {
        self.found(Which::Uuid(uuid))
    }

    /// The device with this name.
    pub fn named(&self, name: &str) -> Result<Option<Info>> {
        self.found(Which::Name(name))
    }

    /// The table in force.
    pub fn table(&self, uuid: &str) -> Result<Vec<Target>> {
        let failed = |why: String| Error::new(ErrorKind::Environment, format!("device-mapper {uuid}: {why}"));
        let answer = self.command(Command::TableStatus, Which::Uuid(uuid), Flags::STATUS_TABLE, 0, &[]);
        let answer = answer.map_err(|error| failed(format!("TABLE_STATUS failed: {error}")))?;
        proto::decode_table(&answer).ok_or_else(|| failed("its table can't be read".into()))
    }

    /// Makes a device without a table. `InUse`: somebody else's has the name.
    pub fn create(&self, name: &str, uuid: &str) -> Result<Info> {
        self.check_free(name, Some(uuid))?;
        self.done(Command::Create, Which::Both { name, uuid }, Flags::empty(), 0, &[])
    }

    /// Refuses a name that another device has than the one with this uuid.
    pub fn check_free(&self, name: &str, uuid: Option<&str>) -> Result<()> {
        if let Some(other) = self.named(name)?.filter(|other| Some(other.uuid.as_str()) != uuid) {
            let whose = match other.uuid.as_str() {
                "" => "without a uuid".into(),
                uuid => format!("with the uuid {uuid}"),
            };
            bail!(
                InUse,
                "dm_name: there is a /dev/mapper/{name} already, {whose}, which is not of this clone: choose another name, or \
                 remove it (dmsetup remove {name})"
            );
        }
        Ok(())
    }

    /// Loads a table that comes in force with [`Self::resume`]; the kernel takes its devices for it alone. `InUse`: somebody
    /// has one of them.
    pub fn load(&self, uuid: &str, target: &Target) -> Result<()> {
        let table = std::slice::from_ref(target);
        self.done(Command::TableLoad, Which::Uuid(uuid), Flags::empty(), 0, table).map(drop)
    }

    /// Forgets a table that was loaded and is not in force.
    pub fn clear(&self, uuid: &str) -> Result<()> {
        self.done(Command::TableClear, Which::Uuid(uuid), Flags::empty(), 0, &[]).map(drop)
    }

    /// Puts the table that was loaded in force: requests in flight are waited for, those that come wait meanwhile. One
    /// command for all of it, so that whoever is killed here leaves nothing suspended. File systems are not frozen: the data
    /// are the same before and after, and what is dirty there would have to be written first.
    pub fn resume(&self, uuid: &str, noflush: bool) -> Result<Info> {
        let noflush = if noflush { Flags::NOFLUSH } else { Flags::empty() };
        self.done(Command::Suspend, Which::Uuid(uuid), Flags::SKIP_LOCKFS | noflush, UDEV_PRIMARY_SOURCE, &[])
    }

    /// `InUse` when somebody has it open; with `deferred` it goes when the last one has ended.
    pub fn remove(&self, uuid: &str, deferred: bool) -> Result<()> {
        let flags = if deferred { Flags::DEFERRED_REMOVE } else { Flags::empty() };
        self.done(Command::Remove, Which::Uuid(uuid), flags, UDEV_PRIMARY_SOURCE, &[]).map(drop)
    }
}
