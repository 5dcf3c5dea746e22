//! Metadata to be looked at: read in large pieces, never written.

use crate::bail;
use crate::devices::Device;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::check::{Report, check as check_image};
use crate::meta::codec::{BLOCK_SIZE, Block};
use crate::signatures::{SIGNATURES_END, identify};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Blocks that are read at once, when they are read in order: up to 1 MiB.
const BLOCKS_PER_READ: u64 = 256;

/// A metadata device, read block by block.
pub struct Image {
    file: File,
    /// Holds the lock, where there is one.
    _device: Option<Device>,
    /// In bytes.
    size: u64,
    /// The blocks from `first` on that were read last.
    buffer: Option<DmaBuf>,
    first: u64,
    /// How many blocks the next read takes.
    ahead: u64,
}

impl Image {
    /// Opened without a lock: a daemon that runs is no obstacle to looking.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::from_io(error, "can't be opened");
        // Looked at before it is opened: to open a FIFO waits for a writer.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a FIFO",
                () if kind.is_char_device() => "a character device",
                () if kind.is_socket() => "a socket",
                () => "something else",
            };
            bail!(WrongType, "is {what}, not a file or block device");
        }
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        // The end of a block device is its size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, _device: None, size, buffer: None, first: 0, ahead: 1 })
    }

    /// Of a device that is open, and locked as long as this lives.
    pub fn of(device: Device) -> Result<Self> {
        let image = Self::over(&device)?;
        Ok(Self { _device: Some(device), ..image })
    }

    /// Of a device that stays open, and locked, beside this.
    pub fn over(device: &Device) -> Result<Self> {
        let file = device.any_alignment().try_clone().map_err(|error| Error::from_io(error, device.label()))?;
        Ok(Self { file, _device: None, size: device.size, buffer: None, first: 0, ahead: 1 })
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, len: u64) -> Result<DmaBuf> {
        let mut buffer = DmaBuf::zeroed(len as usize);
        // Of its last block a file may have a part only. What is behind that is an error.
        let there = if offset < self.size { len.min(self.size - offset) } else { len } as usize;
        let read = self.file.read_exact_at(&mut buffer[..there], offset);
        read.map_err(|error| Error::from_io(error, format!("can't read {there} bytes at offset {offset}")))?;
        Ok(buffer)
    }

    fn fill(&mut self, first: u64, count: u64) -> Result<()> {
        self.buffer = None;
        self.buffer = Some(self.read(first * BLOCK_SIZE as u64, count * BLOCK_SIZE as u64)?);
        self.first = first;
        Ok(())
    }

    pub fn block(&mut self, number: u64) -> Result<Block> {
        let held = self.buffer.as_ref().map_or(0, |buffer| (buffer.len() / BLOCK_SIZE) as u64);
        if !(self.first..self.first + held).contains(&number) {
            self.ahead = if number == self.first + held { (self.ahead * 2).min(BLOCKS_PER_READ) } else { 1 };
            let count = self.size.div_ceil(BLOCK_SIZE as u64).saturating_sub(number).clamp(1, self.ahead);
            // One bad block must not hide its neighbours.
            self.fill(number, count).or_else(|_| self.fill(number, 1))?;
        }
        let at = (number - self.first) as usize * BLOCK_SIZE;
        let buffer = self.buffer.as_ref().expect("it was filled");
        Ok(buffer[at..at + BLOCK_SIZE].try_into().expect("a whole block"))
    }

    /// Checks it as hydrant's own; content that is not ours is an error that says what it is.
    pub fn check(&mut self) -> Result<Report> {
        let size = self.size;
        let result = check_image(&mut |block| self.block(block), size);
        match result {
            Err(error) if error.kind() == ErrorKind::ForeignData => {
                // File systems that leave their first blocks empty are told by what comes later.
                let whole = SIGNATURES_END.min(size) / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
                let len = if whole == 0 { size } else { whole };
                let known = self.read(0, len).ok().and_then(|start| identify(&start));
                match known {
                    Some(what) if what.starts_with("dm-clone") => {
                        bail!(ForeignData, "holds {what}, no metadata of hydrant: use --format dm-clone")
                    }
                    Some(what) => bail!(ForeignData, "holds {what}, no metadata of hydrant"),
                    None => Err(error),
                }
            }
            other => other,
        }
    }
}
