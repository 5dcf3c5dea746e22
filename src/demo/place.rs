//! Where the demo works: a private temporary directory that is gone afterwards, and the image in it.

use super::content::{IMAGE_SIZE, PIECE, PieceKind, SECTOR, Stamp, fill_sector, piece_kind};
use crate::error::{Error, ErrorKind, Result};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A directory that is removed, with what is in it, when this is dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// In `wanted`; else in the first of $TMPDIR (or /tmp), /var/tmp and the current directory that is on a disk: files
    /// in memory say nothing about one, and older kernels have no direct I/O on them.
    pub fn new(wanted: Option<&Path>) -> Result<Self> {
        if let Some(base) = wanted {
            return Self::create_in(base);
        }
        let candidates = [std::env::temp_dir(), "/var/tmp".into(), ".".into()];
        let mut first_error = None;
        for base in candidates {
            match Self::create_in(&base) {
                Ok(dir) if dir.has_direct_io() && !in_memory(&dir.0) => return Ok(dir),
                Ok(_) => {}
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| {
            Error::new(
                ErrorKind::Environment,
                "no temporary directory is on a disk with direct I/O: give one with --dir",
            )
        }))
    }

    fn create_in(base: &Path) -> Result<Self> {
        let what = |error| Error::from_io(error, format!("temporary directory in {}", base.display()));
        let path = base.canonicalize().map_err(what)?.join(format!("hydrant-demo-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path).map_err(what)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn has_direct_io(&self) -> bool {
        let probe = self.0.join("probe");
        let opened =
            OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&probe);
        // Best effort: the directory goes away with it.
        let _ = fs::remove_file(&probe);
        opened.is_ok()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            log::warn!("can't remove the temporary directory {}: {error}", self.0.display());
        }
    }
}

/// Whether a directory is on a file system that is in memory, as far as proc(5) tells.
fn in_memory(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    matches!(filesystem_of(&mounts, dir), Some("tmpfs" | "ramfs"))
}

/// The type of the file system that `dir` is on: the longest mount point above it, the last one that is mounted there.
fn filesystem_of<'a>(mounts: &'a str, dir: &Path) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(point), Some(kind)) = (fields.next(), fields.next()) else { continue };
        let is_longer = best.is_none_or(|(len, _)| point.len() >= len);
        if dir.starts_with(point) && is_longer {
            best = Some((point.len(), kind));
        }
    }
    best.map(|(_, kind)| kind)
}

/// Writes the source image.
pub fn make_image(path: &Path) -> Result<()> {
    let what = |error: io::Error| Error::from_io(error, format!("source image {}", path.display()));
    let file = File::create_new(path).map_err(what)?;
    file.set_len(IMAGE_SIZE).map_err(what)?;
    let mut piece = vec![0; PIECE as usize];
    let mut offset = 0;
    while offset < IMAGE_SIZE {
        let len = PIECE.min(IMAGE_SIZE - offset) as usize;
        if piece_kind(offset) != PieceKind::Hole {
            for (sector, bytes) in (offset / SECTOR as u64..).zip(piece[..len].chunks_mut(SECTOR)) {
                fill_sector(sector, Stamp::Source, bytes);
            }
            file.write_all_at(&piece[..len], offset).map_err(what)?;
        }
        offset += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_file_system() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp/disk xfs rw 0 0\n\
                      proc /proc proc rw 0 0\n/dev/vdc /x ext4 rw 0 0\ntmpfs /x tmpfs rw 0 0\n";
        let cases =
            [("/tmp", "tmpfs"), ("/tmp/a", "tmpfs"), ("/tmpfoo", "ext4"), ("/tmp/disk/a", "xfs"), ("/x", "tmpfs")];
        for (dir, kind) in cases {
            assert_eq!(filesystem_of(mounts, Path::new(dir)), Some(kind), "{dir}");
        }
        assert_eq!(filesystem_of("", Path::new("/tmp")), None);
    }

    #[test]
    fn the_directory_is_private_and_goes_away_with_what_is_in_it() {
        use std::os::unix::fs::PermissionsExt;
        let base = tempfile::tempdir().unwrap();
        let dir = TempDir::new(Some(base.path())).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(dir.path().join("file"), "x").unwrap();
        drop(dir);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
        let error = TempDir::new(Some(&base.path().join("missing"))).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
