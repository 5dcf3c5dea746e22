//! A clone that was given as a line of dm-clone's table: what the line says holds exactly, and what is wrong with its
//! devices is said in dm-clone's words, with the detail behind them.

use super::prepare::Prepared;
use crate::bail;
use crate::config::CloneConfig;
use crate::devices::Role;
use crate::dm_table::{self, words};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteSize, SECTOR_SIZE};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// The configuration with the names of devices that the line has by their numbers, which must exist: none is created.
pub fn with_devices(config: &CloneConfig) -> Result<Cow<'_, CloneConfig>> {
    let mut config = Cow::Borrowed(config);
    if let Some(path) = name_of(Role::Source, Path::new(&config.source))? {
        config.to_mut().source = path.display().to_string();
    }
    if let Some(path) = name_of(Role::Destination, &config.destination)? {
        config.to_mut().destination = path;
    }
    if let Some(path) = name_of(Role::Metadata, &config.metadata)? {
        config.to_mut().metadata = path;
    }
    Ok(config)
}

/// Where a device is that is given by its number; `None` when it is not, or when that is a name of it.
fn name_of(role: Role, path: &Path) -> Result<Option<PathBuf>> {
    let Some(number) = dm_table::device_number(path) else { return Ok(None) };
    if path.exists() {
        return Ok(None);
    }
    // Without udev; format: Documentation/ABI/testing/sysfs-uevent of Linux.
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{number}/uevent")).unwrap_or_default();
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    match name.map(|name| Path::new("/dev").join(name)).filter(|path| path.exists()) {
        Some(path) => Ok(Some(path)),
        None => bail!(NotFound, "{role} {number}: there is no block device of this number"),
    }
}

/// The size that is asked for, of a clone that has `size` bytes: a table line says that in whole sectors.
pub fn size_wanted(config: &CloneConfig, size: u64) -> Option<u64> {
    match &config.table {
        Some(table) if table.is_len_of(size) => Some(size),
        _ => config.size,
    }
}

/// What was found of a clone, or why it can't be, seen as dm-clone does. Of a clone that was not given as a table line,
/// what it was.
pub fn judged(config: &CloneConfig, prepared: Result<Prepared>) -> Result<Prepared> {
    let Some(table) = &config.table else { return prepared };
    let prepared = prepared.map_err(in_words)?;
    let is = prepared.geometry.size();
    if !table.is_len_of(is) {
        // A shorter line may be the one that the clone was made with: see `hydrant resize`.
        let has = if is > table.size() { "has, after a resize or from its start," } else { "has" };
        let fits = is.div_ceil(SECTOR_SIZE);
        let (metadata, is, wanted) = (config.metadata.display(), ByteSize(is), ByteSize(table.size()));
        let text = format!(
            "{}: metadata {metadata}: the table has {wanted}, the clone {has} {is}: LEN {fits} fits",
            words::OTHER_GEOMETRY
        );
        return Err(Error::new(ErrorKind::Mismatch, text));
    }
    Ok(prepared)
}

/// The error with what dm-clone says before it.
fn in_words(error: Error) -> Error {
    match words_for(error.kind(), &error.to_string()) {
        Some(words) => error.within(words),
        None => error,
    }
}

/// `text` begins with the device it is about, as every error of [`crate::devices`] and [`super::prepare`] does.
fn words_for(kind: ErrorKind, text: &str) -> Option<&'static str> {
    use ErrorKind::*;
    let role = text.split([' ', ':']).next().unwrap_or_default();
    Some(match (role, kind) {
        ("destination", TooSmall) => words::LARGER_THAN_DESTINATION,
        ("source", TooSmall) => words::LARGER_THAN_SOURCE,
        ("metadata", Mismatch | SourceChanged) => words::OTHER_GEOMETRY,
        // dm-clone opens metadata that are too small, and fails later.
        ("metadata", Damaged | Unsupported | ForeignData | TooSmall) => words::LOADING,
        (_, NotSupported) if text.contains("logical blocks") => words::NOT_BLOCK_MULTIPLE,
        ("metadata", _) => words::OPENING_METADATA,
        ("destination", _) => words::OPENING_DESTINATION,
        ("source", _) => words::OPENING_SOURCE,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_by_device_and_kind() {
        let cases = [
            (ErrorKind::NotFound, "source /x: No such file or directory", words::OPENING_SOURCE),
            (ErrorKind::InUse, "destination /x is in use, locked by 7", words::OPENING_DESTINATION),
            (ErrorKind::WrongType, "metadata /x is a directory", words::OPENING_METADATA),
            (ErrorKind::TooSmall, "destination /x is too small", words::LARGER_THAN_DESTINATION),
            (ErrorKind::TooSmall, "source /x is too small", words::LARGER_THAN_SOURCE),
            (ErrorKind::Mismatch, "metadata /x don't fit: regions", words::OTHER_GEOMETRY),
            (ErrorKind::Damaged, "metadata /x: sector 19", words::LOADING),
            (ErrorKind::NotSupported, "destination /x has logical blocks of 16384 bytes", words::NOT_BLOCK_MULTIPLE),
        ];
        for (kind, text, said) in cases {
            let error = in_words(Error::new(kind, text));
            assert_eq!((error.kind(), error.to_string()), (kind, format!("{said}: {text}")));
        }
        let other = Error::new(ErrorKind::Environment, "a shard has ended");
        assert_eq!(in_words(other).to_string(), "a shard has ended");
    }
}
