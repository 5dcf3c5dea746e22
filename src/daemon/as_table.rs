//! A clone that was given as a line of dm-clone's table: what the line says holds exactly, and what is wrong with its
//! devices is said in dm-clone's words, with the detail behind them.

use super::prepare::Prepared;
use crate::config::CloneConfig;
use crate::dm_table::words;
use crate::error::{Error, ErrorKind, Result};
use crate::units::ByteSize;

/// What was found of a clone, or why it can't be, seen as dm-clone does. Of a clone that was not given as a table line,
/// what it was.
pub fn judged(config: &CloneConfig, prepared: Result<Prepared>) -> Result<Prepared> {
    let Some(table) = &config.table else { return prepared };
    let prepared = prepared.map_err(in_words)?;
    let (is, wanted) = (prepared.geometry.size(), table.size());
    if is != wanted {
        let (metadata, is, wanted) = (config.metadata.display(), ByteSize(is), ByteSize(wanted));
        let text = format!("{}: metadata {metadata}: {is}, the table has {wanted}", words::OTHER_GEOMETRY);
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
