//! What the metadata tools write to, and the source they look at: checked and locked before anything is changed.

use super::undo::{Step, Undo};
use crate::bail;
use crate::devices::{self, Device, Place, Role, Target};
use crate::disk::blocking::BlockingDisk;
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::human;
use crate::meta::codec::SourceFingerprint;
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use crate::shard::pool::{self, PoolOptions};
use crate::source::file::FileSource;
use crate::source::fingerprint::fingerprint;
use crate::source::nbd::{NbdSource, NbdSourceOptions};
use crate::source::uri::{NbdUri, SourceSpec};
use futures_lite::future::block_on;
use std::ffi::OsStr;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// So many bytes take a while; the user is told.
const WRITTEN_TO_TELL_OF: u64 = 256 << 20;

/// Something to be written, checked; [`Planned::open`] makes the first change.
pub struct Planned {
    role: Role,
    path: PathBuf,
    target: Target,
}

/// Opens and locks what is to be written. It must be empty, or `force`d.
pub fn plan(role: Role, path: &Path, force: bool) -> Result<Planned> {
    let target = devices::open_target(role, path)?;
    if let Target::Existing(device) = &target
        && device.size > 0
        && !force
        && let Some(what) = devices::contents(device)?
    {
        bail!(ForeignData, "{} holds {what}; use another one, or --force to overwrite it", device.label());
    }
    Ok(Planned { role, path: path.into(), target })
}

impl Planned {
    pub fn place(&self) -> Place {
        self.target.place()
    }

    /// In bytes; `None` when it is to be created, or sized.
    pub fn size(&self) -> Option<u64> {
        match &self.target {
            Target::Existing(device) if device.size > 0 => Some(device.size),
            _ => None,
        }
    }

    /// Refuses one that has less than `need` bytes.
    pub fn check_size(&self, need: u64, why: &str) -> Result<()> {
        match &self.target {
            Target::Existing(device) if device.size > 0 => devices::check_size(device, need, why),
            _ => Ok(()),
        }
    }

    /// Creates or sizes it where that is to be done. Everything else must have been checked before. `written`: how many
    /// of its bytes will be written; there must be room for them, and when it takes a while they are told of.
    pub fn open(self, size: u64, written: u64) -> Result<Output> {
        devices::check_free_space(&self.target, written)?;
        let Planned { role, path, target } = self;
        if written >= WRITTEN_TO_TELL_OF {
            // Not the result; and nobody may be there to hear it.
            let _ = writeln!(stderr(), "writing {} to {role} {} ...", human::size(written), path.display());
        }
        let (device, undo) = Undo::around(|| match target {
            Target::Missing { .. } => Ok((devices::create(role, &path, size)?, Some(Step::Remove(path)))),
            Target::Existing(mut device) if device.size == 0 => {
                devices::set_size(&mut device, size)?;
                let same = device.file.try_clone().map_err(|error| Error::from_io(error, device.label()))?;
                Ok((device, Some(Step::Empty(same))))
            }
            Target::Existing(device) => Ok((device, None)),
        })?;
        Ok(Output { disk: Rc::new(BlockingDisk::new(device)), undo })
    }
}

/// Something being written, locked; what was made of it is taken back unless it is [kept](Output::keep).
pub struct Output {
    pub disk: Rc<BlockingDisk>,
    undo: Undo,
}

impl Output {
    /// Everything that was to be written was.
    pub fn keep(self) {
        self.undo.forget();
    }
}

/// The destination of a clone: it must be there, and of at least `size` bytes.
pub fn open_destination(path: &Path, size: u64) -> Result<Device> {
    match devices::open_target(Role::Destination, path)? {
        Target::Existing(device) => {
            devices::check_size(&device, size, "for the clone")?;
            Ok(device)
        }
        Target::Missing { .. } => bail!(NotFound, "destination {} does not exist", path.display()),
    }
}

/// That the given ones are different devices, looked at by name, before any is opened.
pub fn check_distinct(paths: &[(Role, Option<&Path>)]) -> Result<()> {
    let looked = paths.iter().filter_map(|(role, path)| path.map(|path| Place::look(*role, path)));
    devices::check_distinct(&looked.collect::<Result<Vec<_>>>()?)
}

/// A source that was looked at; a file or block device stays locked as long as this lives.
pub struct LookedAt {
    pub fingerprint: SourceFingerprint,
    disk: Option<Rc<BlockingDisk>>,
}

impl LookedAt {
    /// `None` for one that comes over a network.
    pub fn place(&self) -> Option<Place> {
        self.disk.as_ref().map(|disk| disk.device().place())
    }
}

/// A source as it was named.
pub fn parse_source(text: &str) -> Result<SourceSpec> {
    SourceSpec::parse(OsStr::new(text)).map_err(|text| Error::new(ErrorKind::Usage, text))
}

/// Its path, when it has one.
pub fn source_path(source: Option<&SourceSpec>) -> Option<&Path> {
    match source {
        Some(SourceSpec::File(path)) => Some(path),
        _ => None,
    }
}

/// Fingerprints a source as a daemon does.
pub fn look_at(source: &SourceSpec) -> Result<LookedAt> {
    match source {
        SourceSpec::File(path) => {
            let device = devices::open_source(path)?;
            let label = device.label();
            let disk = Rc::new(BlockingDisk::new(device));
            let found = block_on(fingerprint(&FileSource::new(disk.clone())));
            Ok(LookedAt { fingerprint: found.map_err(|error| error.within(label))?, disk: Some(disk) })
        }
        SourceSpec::Nbd(uri) => {
            let fingerprint = look_at_nbd(uri).map_err(|error| error.within(format!("source {uri}")))?;
            Ok(LookedAt { fingerprint, disk: None })
        }
    }
}

/// The NBD client lives on an executor.
fn look_at_nbd(uri: &NbdUri) -> Result<SourceFingerprint> {
    environment::check_io_uring()?;
    environment::check_memlock(1)?;
    let cpus = environment::available_cpus()?.into_iter().take(1).collect();
    let (options, uri) = (PoolOptions { cpus, spin: Duration::ZERO, io_memory: IO_MEMORY_DEFAULT }, uri.clone());
    pool::run(&options, move |context| async move {
        let options = NbdSourceOptions { connections: 1, ..NbdSourceOptions::default() };
        fingerprint(&NbdSource::connect(uri, options, context.env.clone()).await?).await
    })?
}
