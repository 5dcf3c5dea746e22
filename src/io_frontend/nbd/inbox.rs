//! What was received and not yet looked at.
//!
//! Requests are small and come in bursts, so many are received at once; payloads are large and should not be
//! copied. The inbox receives into a buffer, and hands a payload over: copied when it is short, else only what the
//! buffer has of it, with the rest received where it is to stay.

use crate::bail;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::error::{Error, Result};
use crate::net::Stream;
use std::io;

/// A client that sends less than this of a long payload at a time can't be told from one that sends nothing, in bytes.
const PAYLOAD_STEP_BYTES: usize = 256 << 10;
/// What one receive takes at most, in bytes.
const RECEIVE_BYTES: usize = 64 << 10;
/// The same, while large payloads are coming: what it takes beyond the next header has to be copied.
const RECEIVE_BYTES_BETWEEN_PAYLOADS: usize = 4 << 10;
/// A payload up to this long is gathered in the receive buffer together with what follows it, then copied; a longer
/// one is received in place.
const COPY_BYTES_MAX: usize = 16 << 10;

pub(super) struct Inbox {
    stream: Stream,
    /// `None` only while (or after) the kernel has it.
    buf: Option<DmaBuf>,
    start: usize,
    end: usize,
    receive_bytes: usize,
}

impl Inbox {
    pub fn new(stream: Stream) -> Self {
        Self { stream, buf: None, start: 0, end: 0, receive_bytes: RECEIVE_BYTES }
    }

    /// Received and not consumed.
    pub fn bytes(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    pub fn consume(&mut self, len: usize) {
        assert!(len <= self.end - self.start);
        self.start += len;
    }

    /// Waits until there are at least `need` bytes; false when the peer ended the stream before the first of them.
    pub async fn fill(&mut self, need: usize) -> Result<bool> {
        while self.bytes().len() < need {
            let mut buf = self.with_room(need);
            let at = self.end;
            let (count, back) = match self.stream.recv(buf, at).await {
                Ok(received) => received,
                Err(error) => return Err(lost(error)),
            };
            buf = back;
            self.buf = Some(buf);
            self.end += count;
            if count == 0 {
                if self.bytes().is_empty() {
                    return Ok(false);
                }
                bail!(Protocol, "connection ended after {} of {need} bytes of a message", self.bytes().len());
            }
        }
        Ok(true)
    }

    /// The buffer with room for `need` bytes from `start`, and at least one byte free.
    fn with_room(&mut self, need: usize) -> DmaBuf {
        let len = self.end - self.start;
        let capacity = need.max(self.receive_bytes);
        match self.buf.take() {
            Some(buf) if len > 0 && buf.len() - self.start >= need => buf,
            Some(buf) if len == 0 && buf.len() == capacity => {
                (self.start, self.end) = (0, 0);
                buf
            }
            old => {
                let mut new = DmaBuf::new(capacity);
                if let Some(old) = old {
                    new[..len].copy_from_slice(&old[self.start..self.end]);
                }
                (self.start, self.end) = (0, len);
                new
            }
        }
    }

    /// The next `len` bytes, as a payload for device offset `offset`: aligned so that it can be written as it is.
    /// Calls `progress` whenever some of it has come.
    pub async fn payload(&mut self, offset: u64, len: usize, progress: impl Fn()) -> Result<DmaBuf> {
        if len <= COPY_BYTES_MAX {
            self.receive_bytes = RECEIVE_BYTES;
            self.fill_payload(len).await?;
        } else {
            self.receive_bytes = RECEIVE_BYTES_BETWEEN_PAYLOADS;
        }
        let mut payload = DmaBuf::with_head((offset % DMA_ALIGN as u64) as usize, len);
        let mut here = self.bytes().len().min(len);
        payload[..here].copy_from_slice(&self.bytes()[..here]);
        self.consume(here);
        while here < len {
            let end = len.min(here + PAYLOAD_STEP_BYTES);
            payload = self.stream.recv_exact_to(payload, here..end).await.map_err(lost)?;
            here = end;
            progress();
        }
        Ok(payload)
    }

    /// Throws the next `len` bytes away.
    pub async fn discard(&mut self, mut len: usize) -> Result<()> {
        while len > 0 {
            self.fill_payload(1).await?;
            let step = self.bytes().len().min(len);
            self.consume(step);
            len -= step;
        }
        Ok(())
    }

    async fn fill_payload(&mut self, need: usize) -> Result<()> {
        match self.fill(need).await? {
            true => Ok(()),
            false => bail!(Protocol, "connection ended before the payload of a WRITE"),
        }
    }
}

fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(crate::error::ErrorKind::Protocol, "connection ended in the payload of a WRITE")
        }
        _ => Error::from_io(error, "connection"),
    }
}
