//! Before anything is changed: opens and checks the three devices, and says what would be done.

use super::as_table;
use crate::bail;
use crate::config::CloneConfig;
use crate::devices::{self, Device, DeviceId, DeviceKind, Place, Role, Target};
use crate::disk::Disk;
use crate::disk::ring::{DiskParts, RingDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::ublk::device;
use crate::meta::codec::{CloneState, DESTINATION_NONE_YET, SourceFingerprint, geometry_for, metadata_size_needed};
use crate::meta::commit::{Expected, Mismatch, Recovered, Recovery, mismatch_error, mismatches};
use crate::meta::store::{Opened, Store, probe};
use crate::ring::Ring;
use crate::shard::pool::ShardContext;
use crate::source::Source;
use crate::source::file::FileSource;
use crate::source::fingerprint::{Sampled, Samples, sample};
use crate::source::nbd::{NbdSource, NbdSourceOptions};
use crate::source::padded::PaddedSource;
use crate::source::uri::{NbdUri, SourceSpec};
use crate::units::{ByteSize, Geometry};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Connections to an NBD source that allows several, all shards together.
const SOURCE_CONNECTIONS: usize = 4;

/// The source, opened on the coordinator's shard.
pub struct OpenSource {
    pub source: Rc<dyn Source>,
    pub kind: OpenSourceKind,
}

impl OpenSource {
    /// Where it is, when it is a file or block device, and what that is.
    pub fn place(&self) -> Option<(PathBuf, DeviceId)> {
        match &self.kind {
            OpenSourceKind::File { device, .. } => Some((device.path.clone(), device.id.clone())),
            OpenSourceKind::Nbd { .. } => None,
        }
    }
}

/// What the other shards make their own source from.
pub enum OpenSourceKind {
    File { parts: DiskParts, device: Device },
    Nbd { source: Rc<NbdSource>, uri: NbdUri, options: NbdSourceOptions },
}

/// The metadata, as found.
pub enum FoundMetadata {
    /// To be formatted.
    None,
    /// Of this clone: to be gone on with.
    Ours(Box<Opened>),
}

/// Everything checked; nothing changed.
pub struct Prepared {
    pub geometry: Geometry,
    /// Of what the clone takes from its source: so many bytes from its start.
    pub fingerprint: SourceFingerprint,
    /// What could be read of the source's samples; `None` when it was not looked at.
    pub samples: Option<Samples>,
    /// `None`: the clone needs no source, it is complete or reads zeros where it is not hydrated.
    pub source: Option<OpenSource>,
    pub destination: Target,
    pub metadata: Target,
    pub found: FoundMetadata,
}

fn dup(file: &File, device: &Device) -> Result<OwnedFd> {
    file.try_clone().map(OwnedFd::from).map_err(|error| Error::from_io(error, device.label()))
}

/// A disk over an open device, which stays open (and locked) beside it.
pub fn disk_parts(device: &Device) -> Result<DiskParts> {
    Ok(DiskParts {
        name: device.label(),
        direct: dup(&device.file, device)?,
        buffered: device.buffered.as_ref().map(|file| dup(file, device)).transpose()?,
        size: device.size,
        block: if device.direct { device.block } else { 1 },
        is_block_device: device.kind == DeviceKind::Block,
        lock_below: device.lock_below(),
    })
}

/// Runs what may block for milliseconds (opening, creating, looking around) on a thread of its own: other clones have
/// clients on this one.
pub async fn beside_clients<T: Send + 'static>(job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = Ring::current().blocking(job).await;
    done.map_err(|error| Error::from_io(error, "a thread to open devices can't be started"))?
}

/// Checks everything that can be checked without a change.
pub async fn prepare(context: &Rc<ShardContext>, config: &CloneConfig, shards: u16) -> Result<Prepared> {
    let looked = async {
        let config = as_table::with_devices(config)?;
        look(context, &config, shards).await
    };
    as_table::judged(config, looked.await)
}

async fn look(context: &Rc<ShardContext>, config: &CloneConfig, shards: u16) -> Result<Prepared> {
    if config.ublk.is_some() {
        beside_clients(device::check).await?;
    }
    let spec =
        SourceSpec::parse(std::ffi::OsStr::new(&config.source)).map_err(|text| Error::new(ErrorKind::Usage, text))?;
    let source_path = match &spec {
        SourceSpec::File(path) => Some(path.as_path()),
        SourceSpec::Nbd(_) => None,
    };
    let source_path = source_path.map(Path::to_owned);
    let (destination_path, metadata_path) = (config.destination.clone(), config.metadata.clone());
    let opened = beside_clients(move || {
        // By name first, so that one path given twice is told as that. A complete clone does not need its source.
        if let Some(source) = source_path.filter(|path| path.exists()) {
            let source = Place::look(Role::Source, &source)?;
            let destination = Place::look(Role::Destination, &destination_path)?;
            let metadata = Place::look(Role::Metadata, &metadata_path)?;
            devices::check_distinct(&[source, destination, metadata])?;
        }
        devices::open_devices(None, &destination_path, &metadata_path)
    });
    let opened = opened.await?;
    let (destination, metadata) = (opened.destination, opened.metadata);

    let recovered = find_metadata(config, &metadata).await?;
    if let Some(recovered) = &recovered
        && recovered.superblock.state == CloneState::Complete
    {
        return without_source(config, recovered.clone(), destination, metadata).await;
    }

    if let Some(recovered) = recovered.clone().filter(|recovered| recovered.superblock.source.is_none()) {
        return without_source(config, recovered, destination, metadata).await;
    }

    let source = open_source(context, config, spec, [destination.place(), metadata.place()], shards).await?;
    match recovered {
        Some(recovered) => {
            let superblock = &recovered.superblock;
            let destination_id = match superblock.destination_id {
                // Formatted ahead: the destination is taken as that of a new clone.
                DESTINATION_NONE_YET => {
                    check_new_destination(config, &superblock.geometry, &destination).await?;
                    DESTINATION_NONE_YET
                }
                _ => destination_of_clone(&destination, config)?,
            };
            let (found_fingerprint, samples) =
                readable_fingerprint_of(config, &source, superblock.source_len()).await?;
            let expected = Expected {
                size: as_table::size_wanted(config, superblock.geometry.size()),
                source_size: Some(source.source.size()),
                region_size: config.region_size,
                source: found_fingerprint,
                destination_id,
            };
            check_matches(config, &recovered, &expected)?;
            tell_of_sizes(config, superblock.geometry.size(), superblock.source_len(), source.source.size());
            if let Target::Existing(device) = &destination
                && device.size > 0
            {
                // It may have been cut off since.
                devices::check_size(device, superblock.geometry.size(), "for the clone that it holds")?;
                tell_of_longer(config, device, superblock.geometry.size());
            }
            let opened = load(&metadata, recovered).await?;
            let superblock = opened.store.superblock();
            // What could not be read now is not forgotten.
            let is_better = superblock.source.is_known() && !found_fingerprint.is_known();
            Ok(Prepared {
                geometry: superblock.geometry,
                fingerprint: if is_better { superblock.source } else { found_fingerprint },
                samples: Some(samples),
                source: Some(source),
                destination,
                metadata,
                found: FoundMetadata::Ours(Box::new(opened)),
            })
        }
        None => {
            let (has, size) = (source.source.size(), config.size.unwrap_or(source.source.size()));
            if size > has {
                bail!(TooSmall, "source {} is too small: it has {has} bytes, {size} are to be cloned", config.source);
            }
            let (found_fingerprint, samples) = readable_fingerprint_of(config, &source, size).await?;
            let geometry = geometry_for(size, config.region_size.unwrap_or_default())?;
            check_new(config, &geometry, &destination, &metadata).await?;
            Ok(Prepared {
                geometry,
                fingerprint: found_fingerprint,
                samples: Some(samples),
                source: Some(source),
                destination,
                metadata,
                found: FoundMetadata::None,
            })
        }
    }
}

/// Looks at the first `len` bytes of a source, or at all when it has not so many.
async fn sampled(config: &CloneConfig, source: &OpenSource, len: u64) -> Result<Sampled> {
    let len = len.min(source.source.size());
    let seen = PaddedSource::view(source.source.clone(), len, len);
    sample(&*seen).await.map_err(|error| error.within(format!("source {}", config.source)))
}

/// The fingerprint of so much of a source; all of its samples must be readable.
pub async fn fingerprint_of(
    config: &CloneConfig,
    source: &OpenSource,
    len: u64,
) -> Result<(SourceFingerprint, Samples)> {
    let sampled = sampled(config, source, len).await?;
    sampled.complete().map_err(|error| error.within(format!("source {}", config.source)))
}

/// As [`fingerprint_of`], but bad sectors of the source must not keep a clone from starting: they are what many a clone is
/// made for, and a clone that was written to is needed whatever its source does. Then nothing is known but the size, and
/// the samples that could be read.
async fn readable_fingerprint_of(
    config: &CloneConfig,
    source: &OpenSource,
    len: u64,
) -> Result<(SourceFingerprint, Samples)> {
    let sampled = sampled(config, source, len).await?;
    if let Some(error) = sampled.error {
        let (read, all) = (sampled.samples.read_count(), sampled.samples.count());
        log::warn!(
            "clone '{}': source {}: {error}; {read} of {all} samples could be read, so it is not certain that this is the \
             source of the clone; it is looked at again",
            config.name,
            config.source
        );
    }
    let unknown = SourceFingerprint { size: sampled.samples.size(), ..SourceFingerprint::UNKNOWN };
    Ok((sampled.samples.fingerprint().unwrap_or(unknown), sampled.samples))
}

/// Logs where sizes that may differ do. A clone that is larger than what is given may have grown, or may never have had
/// that size: nobody knows.
fn tell_of_sizes(config: &CloneConfig, size: u64, shown: u64, has: u64) {
    if let Some(given) = as_table::size_wanted(config, size).filter(|given| *given < size) {
        let (given, size) = (ByteSize(given), ByteSize(size));
        log::warn!("clone '{}': it has {size} by its metadata, which hold; {given} is the size given", config.name);
    } else if has > shown && config.size.is_none() {
        let (has, shown) = (ByteSize(has), ByteSize(shown));
        log::info!(
            "clone '{}': its source has {has} now, {shown} of it are cloned; `hydrant resize` takes the rest",
            config.name
        );
    }
}

/// A destination file may be longer on purpose; or it is what a resize left that was killed.
fn tell_of_longer(config: &CloneConfig, destination: &Device, size: u64) {
    if destination.kind == DeviceKind::File && destination.size > size {
        let (path, has, name) = (config.destination.display(), destination.size, &config.name);
        log::warn!(
            "clone '{name}': destination {path} has {has} bytes, the clone {size}: what follows is not part of it (if a \
             resize was interrupted, repeat it; or cut the file to {size} bytes when the clone has ended)"
        );
    }
}

/// Looks for metadata of ours. `None`: there are none, and what is there (if anything) may be overwritten.
async fn find_metadata(config: &CloneConfig, metadata: &Target) -> Result<Option<Recovered>> {
    let Target::Existing(device) = metadata else { return Ok(None) };
    if device.size == 0 {
        return Ok(None);
    }
    let disk = RingDisk::new(disk_parts(device)?);
    let verdict = probe(&disk).await.map_err(|error| error.within(device.label()))?;
    match verdict {
        Recovery::NeverFormatted => Ok(None),
        Recovery::Foreign(what) if config.force => {
            log::warn!("{} holds {what}: overwriting it, as --force says", device.label());
            Ok(None)
        }
        Recovery::Foreign(what) => {
            bail!(ForeignData, "{} holds {what}; use another one, or --force to overwrite it", device.label())
        }
        verdict => {
            let recovered = verdict.into_result().map_err(|error| error.within(device.label()))?;
            for note in recovered.iter().flat_map(|recovered| &recovered.notes) {
                log::warn!("{}: {note}", device.label());
            }
            Ok(recovered)
        }
    }
}

async fn load(metadata: &Target, recovered: Recovered) -> Result<Opened> {
    let Target::Existing(device) = metadata else { unreachable!("metadata were read from it") };
    let disk: Rc<dyn Disk> = Rc::new(RingDisk::new(disk_parts(device)?));
    Store::load(disk, recovered).await.map_err(|error| error.within(device.label()))
}

/// The destination that metadata are about must be there.
fn destination_of_clone(destination: &Target, config: &CloneConfig) -> Result<[u8; 16]> {
    match destination {
        Target::Existing(device) if device.size > 0 => Ok(device.fingerprint_id()),
        _ => bail!(
            Mismatch,
            "destination {} is missing or empty, but metadata {} say that it holds data of the clone; \
             give the right destination, or remove the metadata to start over",
            config.destination.display(),
            config.metadata.display()
        ),
    }
}

fn check_matches(config: &CloneConfig, recovered: &Recovered, expected: &Expected) -> Result<()> {
    let mut found = mismatches(&recovered.superblock, expected);
    if config.force {
        // The user vouches for what only looks different; sizes can't be vouched for.
        found.retain(|mismatch| {
            let forced = matches!(mismatch, Mismatch::SourceContent | Mismatch::Destination);
            if forced {
                log::warn!("{mismatch}: going on, as --force says");
            }
            !forced
        });
    }
    let Some(error) = mismatch_error(&found) else { return Ok(()) };
    let hint = match found.iter().all(|m| matches!(m, Mismatch::SourceContent | Mismatch::Destination)) {
        true => " (--force if you are sure that it is the right one)",
        false => "",
    };
    let kind = error.kind();
    let text = format!("metadata {} don't fit: {error}{hint}", config.metadata.display());
    Err(Error::new(kind, text))
}

/// A new clone: the devices must be large enough, and must not hold what somebody may miss.
async fn check_new(config: &CloneConfig, geometry: &Geometry, destination: &Target, metadata: &Target) -> Result<()> {
    if let Target::Existing(device) = metadata
        && device.size > 0
    {
        let needed = metadata_size_needed(geometry);
        devices::check_size(device, needed, &format!("for {} regions", geometry.nr_regions()))?;
        refuse_contents(config, device).await?;
    }
    // All of them are written before the clone is served; the destination may be filled as it goes on.
    let (looked_at, needed) = (metadata.try_clone()?, metadata_size_needed(geometry));
    beside_clients(move || devices::check_free_space(&looked_at, needed)).await?;
    check_new_destination(config, geometry, destination).await
}

async fn check_new_destination(config: &CloneConfig, geometry: &Geometry, destination: &Target) -> Result<()> {
    if let Target::Existing(device) = destination
        && device.size > 0
    {
        devices::check_size(device, geometry.size(), &format!("for the source {}", config.source))?;
        refuse_contents(config, device).await?;
    }
    Ok(())
}

async fn refuse_contents(config: &CloneConfig, device: &Device) -> Result<()> {
    let looked_at = device.try_clone()?;
    let Some(what) = beside_clients(move || devices::contents(&looked_at)).await? else { return Ok(()) };
    if config.force {
        log::warn!("{} holds {what}: overwriting it, as --force says", device.label());
        return Ok(());
    }
    let hint = match device.role {
        Role::Destination => "use the metadata it belongs to, another destination, or --force to overwrite it",
        _ => "use another one, or --force to overwrite it",
    };
    bail!(ForeignData, "{} holds {what}, which no metadata of hydrant knows; {hint}", device.label())
}

/// A clone that is known and needs no source.
async fn without_source(
    config: &CloneConfig,
    recovered: Recovered,
    destination: Target,
    metadata: Target,
) -> Result<Prepared> {
    let superblock = &recovered.superblock;
    let destination_id = destination_of_clone(&destination, config)?;
    let expected = Expected {
        size: as_table::size_wanted(config, superblock.geometry.size()),
        source_size: None,
        region_size: config.region_size,
        source: superblock.source,
        destination_id,
    };
    check_matches(config, &recovered, &expected)?;
    tell_of_sizes(config, superblock.geometry.size(), 0, 0);
    if let Target::Existing(device) = &destination {
        devices::check_size(device, superblock.geometry.size(), "for the clone that it holds")?;
        tell_of_longer(config, device, superblock.geometry.size());
    }
    let (geometry, fingerprint) = (superblock.geometry, superblock.source);
    let opened = load(&metadata, recovered).await?;
    let found = FoundMetadata::Ours(Box::new(opened));
    Ok(Prepared { geometry, fingerprint, samples: None, source: None, destination, metadata, found })
}

/// Opens the source on the coordinator's shard. `others`: destination and metadata.
pub async fn open_source(
    context: &Rc<ShardContext>,
    config: &CloneConfig,
    spec: SourceSpec,
    others: [Place; 2],
    shards: u16,
) -> Result<OpenSource> {
    match spec {
        SourceSpec::File(path) => open_file_source(path, others).await,
        SourceSpec::Nbd(uri) => open_nbd_source(context, uri, config, shards).await,
    }
}

async fn open_file_source(path: PathBuf, [destination, metadata]: [Place; 2]) -> Result<OpenSource> {
    let opened = beside_clients(move || {
        let device = devices::open_source(&path)?;
        devices::check_distinct(&[device.place(), destination, metadata])?;
        Ok(device)
    });
    let device = opened.await?;
    if let Some(mounted) = device.mounted_writable() {
        let label = device.label();
        log::warn!(
            "{label} is mounted writable at {}: what is written there may or may not reach the copy",
            mounted.display()
        );
    }
    let parts = disk_parts(&device)?;
    let source = Rc::new(FileSource::new(Rc::new(RingDisk::new(parts.duplicate()?))));
    Ok(OpenSource { source, kind: OpenSourceKind::File { parts, device } })
}

async fn open_nbd_source(
    context: &Rc<ShardContext>,
    uri: NbdUri,
    config: &CloneConfig,
    shards: u16,
) -> Result<OpenSource> {
    let options = NbdSourceOptions {
        connections: (SOURCE_CONNECTIONS / usize::from(shards)).max(1),
        source_timeout: config.source_timeout,
        ..NbdSourceOptions::default()
    };
    let connected = NbdSource::connect(uri.clone(), options.clone(), context.env.clone()).await;
    let source = Rc::new(connected.map_err(|error| match error.kind() {
        // No server, host, socket or export of that name yet, or one that is going down: it may come.
        ErrorKind::Io | ErrorKind::NotFound => Error::new(ErrorKind::SourceLost, error.to_string()),
        _ => error,
    })?);
    Ok(OpenSource { source: source.clone(), kind: OpenSourceKind::Nbd { source, uri, options } })
}

impl Prepared {
    /// What is to be done with which device, for people.
    pub fn describe(&self, config: &CloneConfig) -> Vec<String> {
        let geometry = &self.geometry;
        let mut lines = vec![format!(
            "clone '{}': {} in {} regions of {}",
            config.name,
            ByteSize(geometry.size()),
            geometry.nr_regions(),
            geometry.region_size()
        )];
        let target = |role: Role, target: &Target, size: u64| match target {
            Target::Missing { place } => {
                format!("{role}: {}, to be created with {}", place.path.display(), ByteSize(size))
            }
            Target::Existing(device) if device.size == 0 => {
                format!("{role}: {}, empty, to be sized to {}", device.path.display(), ByteSize(size))
            }
            Target::Existing(device) => format!("{role}: {}, {}", device.path.display(), ByteSize(device.size)),
        };
        lines.push(target(Role::Destination, &self.destination, geometry.size()));
        lines.push(target(Role::Metadata, &self.metadata, metadata_size_needed(geometry)));
        lines.push(match &self.found {
            FoundMetadata::None => "new clone: the metadata are to be formatted, nothing is hydrated".into(),
            FoundMetadata::Ours(opened) => {
                let hydrated: u64 =
                    opened.zones.iter().flat_map(|(_, bits)| bits.iter()).map(|w| u64::from(w.count_ones())).sum();
                let state = opened.store.superblock().state.name();
                format!("known clone: {hydrated} of {} regions are hydrated, it is {state}", geometry.nr_regions())
            }
        });
        lines
    }
}
