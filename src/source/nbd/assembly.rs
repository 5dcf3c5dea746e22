//! What has been received for one request: checks every chunk against the request, and the reply as a whole.
//!
//! Pure: the caller moves the bytes. Invariant: [`Assembly::finish`] gives data only when every byte of the
//! request was received exactly once, so old content of the buffer never gets out.

use crate::bail;
use crate::dma_buf::{DMA_ALIGN, DmaBuf};
use crate::error::Result;
use crate::io_frontend::nbd::proto::{ErrorCode, StatusDescriptor};
use crate::units::ByteRange;
use std::ops::Range;

/// Most separate pieces that a reply may be in at a time: a bound for what a server can make us remember.
const PIECES_MAX: usize = 4096;

/// What a request asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    Read,
    /// The extents of `base:allocation`.
    Status,
}

/// An error that the server reported for one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ServerError {
    pub code: ErrorCode,
    /// May be empty.
    pub message: String,
}

/// A whole reply.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Exactly the bytes of the request.
    Data(DmaBuf),
    /// From the start of the request; at least one, none empty; may end early or reach beyond the request.
    Status(Vec<StatusDescriptor>),
    Error(ServerError),
}

/// A reply being received.
pub(super) struct Assembly {
    ask: Ask,
    range: ByteRange,
    /// Taken while bytes are received into it.
    buf: Option<DmaBuf>,
    /// What was received, relative to the request: sorted, apart from each other.
    pieces: Vec<Range<u64>>,
    status: Option<Vec<StatusDescriptor>>,
    error: Option<ServerError>,
}

impl Assembly {
    /// `range` as it was sent to the server.
    pub fn new(ask: Ask, range: ByteRange) -> Self {
        Self { ask, range, buf: None, pieces: Vec::new(), status: None, error: None }
    }
    pub fn ask(&self) -> Ask {
        self.ask
    }
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The server is about to send `len` bytes for `offset`: notes them as received. The result is their place in
    /// [`Self::take_buf`].
    pub fn claim(&mut self, offset: u64, len: u64) -> Result<Range<usize>> {
        if self.ask != Ask::Read {
            bail!(Protocol, "data in the reply to a request for block status");
        }
        match ByteRange::new(offset, len) {
            Some(chunk) if self.range.contains(chunk) => {}
            _ => bail!(Protocol, "chunk of {len} bytes at {offset} is outside of its request of {}", self.range),
        }
        let start = offset - self.range.start();
        let end = start + len;
        let next = self.pieces.partition_point(|piece| piece.end < start);
        // `next` is the first piece that ends at or after our start: the only one before us that we may touch.
        let touches_left = self.pieces.get(next).is_some_and(|piece| piece.end == start);
        let right = next + usize::from(touches_left);
        if self.pieces.get(right).is_some_and(|piece| piece.start < end) {
            bail!(Protocol, "chunk of {len} bytes at {offset} repeats bytes of an earlier one");
        }
        let touches_right = self.pieces.get(right).is_some_and(|piece| piece.start == end);
        match (touches_left, touches_right) {
            (true, true) => {
                self.pieces[next].end = self.pieces[right].end;
                self.pieces.remove(right);
            }
            (true, false) => self.pieces[next].end = end,
            (false, true) => self.pieces[right].start = start,
            (false, false) if self.pieces.len() == PIECES_MAX => {
                bail!(Protocol, "reply in more than {PIECES_MAX} separate pieces")
            }
            (false, false) => self.pieces.insert(next, start..end),
        }
        Ok(start as usize..end as usize)
    }

    /// The buffer for the whole request, congruent with its offset; give it back with [`Self::put_buf`].
    pub fn take_buf(&mut self) -> DmaBuf {
        self.buf.take().unwrap_or_else(|| {
            DmaBuf::with_head((self.range.start() % DMA_ALIGN as u64) as usize, self.range.len() as usize)
        })
    }
    pub fn put_buf(&mut self, buf: DmaBuf) {
        self.buf = Some(buf);
    }

    /// A chunk that says "zeros here".
    pub fn hole(&mut self, offset: u64, len: u64) -> Result<()> {
        let place = self.claim(offset, len)?;
        let mut buf = self.take_buf();
        buf[place].fill(0);
        self.put_buf(buf);
        Ok(())
    }

    /// A chunk of block status, of the context that was negotiated.
    pub fn status(&mut self, descriptors: Vec<StatusDescriptor>) -> Result<()> {
        if self.ask != Ask::Status {
            bail!(Protocol, "block status in the reply to a read");
        }
        if self.status.is_some() {
            bail!(Protocol, "block status twice in one reply");
        }
        self.status = Some(descriptors);
        Ok(())
    }

    /// A chunk of error; the first one counts.
    pub fn error(&mut self, error: ServerError, offset: Option<u64>) -> Result<()> {
        if let Some(offset) = offset
            && !(self.range.start()..self.range.end()).contains(&offset)
        {
            bail!(Protocol, "error at offset {offset}, outside of its request of {}", self.range);
        }
        self.error.get_or_insert(error);
        Ok(())
    }

    /// The reply is over.
    pub fn finish(mut self) -> Result<Outcome> {
        if let Some(error) = self.error {
            return Ok(Outcome::Error(error));
        }
        match self.ask {
            Ask::Status => match self.status {
                Some(status) => Ok(Outcome::Status(status)),
                None => bail!(Protocol, "reply without block status"),
            },
            Ask::Read => match (self.pieces.as_slice(), self.buf.take()) {
                ([all], Some(buf)) if *all == (0..self.range.len()) => Ok(Outcome::Data(buf)),
                _ => {
                    let got: u64 = self.pieces.iter().map(|piece| piece.end - piece.start).sum();
                    bail!(Protocol, "reply with {got} of {} bytes", self.range.len())
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(start: u64, len: u64) -> Assembly {
        Assembly::new(Ask::Read, ByteRange::new(start, len).unwrap())
    }

    proptest! {
        /// Against a plain array of flags.
        #[test]
        fn every_byte_exactly_once(
            start in 0u64..5000, len in 1u64..40,
            chunks in proptest::collection::vec((0u64..45, 0u64..12, any::<bool>()), 0..30),
        ) {
            let mut assembly = read(start, len);
            let mut seen = vec![false; len as usize];
            let mut expected = vec![0xee; len as usize];
            for (i, (at, count, hole)) in chunks.into_iter().enumerate() {
                let ok = count > 0 && at + count <= len && !seen[at as usize..(at + count) as usize].contains(&true);
                let taken = if hole {
                    assembly.hole(start + at, count)
                } else {
                    assembly.claim(start + at, count).map(|place| {
                        let mut buf = assembly.take_buf();
                        buf[place].fill(i as u8 + 1);
                        assembly.put_buf(buf);
                    })
                };
                prop_assert_eq!(taken.is_ok(), ok);
                if !ok { continue }
                let place = at as usize..(at + count) as usize;
                seen[place.clone()].fill(true);
                expected[place].fill(if hole { 0 } else { i as u8 + 1 });
            }
            match assembly.finish() {
                Ok(Outcome::Data(buf)) => {
                    prop_assert!(!seen.contains(&false));
                    prop_assert_eq!(&buf[..], &expected[..]);
                    prop_assert_eq!(buf.as_ptr() as usize % DMA_ALIGN, start as usize % DMA_ALIGN);
                }
                Ok(_) => prop_assert!(false),
                Err(_) => prop_assert!(seen.contains(&false)),
            }
        }
    }

    /// A server may send the chunks of a read in any order.
    #[test]
    fn chunks_in_any_order_make_a_whole() {
        // Four chunks of the range 4090..4100, each with its own content.
        let chunks = [(4090, 1, b'a'), (4091, 4, b'b'), (4095, 3, b'c'), (4098, 2, b'd')];
        for order in 0..4usize.pow(4) {
            let order = [0, 1, 2, 3].map(|place| order / 4usize.pow(place) % 4);
            if (0..4).any(|chunk| !order.contains(&chunk)) {
                continue;
            }
            let mut assembly = read(4090, 10);
            for (offset, len, content) in order.map(|chunk| chunks[chunk]) {
                let place = assembly.claim(offset, len).unwrap();
                let mut buf = assembly.take_buf();
                buf[place].fill(content);
                assembly.put_buf(buf);
            }
            match assembly.finish() {
                Ok(Outcome::Data(buf)) => assert_eq!(&buf[..], b"abbbbcccdd", "order {order:?}"),
                other => panic!("order {order:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_reply_that_ends_early_says_how_much_came() {
        let mut assembly = read(100, 10);
        assembly.hole(101, 2).unwrap();
        assembly.hole(107, 3).unwrap();
        let error = assembly.finish().unwrap_err();
        assert!(error.to_string().contains("reply with 5 of 10 bytes"), "{error}");
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        assert!(read(100, 10).claim(99, 1).is_err());
        assert!(read(100, 10).claim(u64::MAX, 2).is_err());
        assert!(read(100, 10).hole(109, 2).is_err());
        assert!(read(100, 10).status(vec![]).is_err());
        let error = ServerError { code: ErrorCode::EIO, message: String::new() };
        assert!(read(100, 10).error(error.clone(), Some(110)).is_err());
        assert!(read(100, 10).finish().is_err());

        let mut status = Assembly::new(Ask::Status, ByteRange::new(0, 10).unwrap());
        assert!(status.claim(0, 1).is_err());
        status.status(vec![StatusDescriptor { len: 10, flags: 0 }]).unwrap();
        assert!(status.status(vec![StatusDescriptor { len: 10, flags: 0 }]).is_err());
        assert!(matches!(status.finish(), Ok(Outcome::Status(_))));

        // An error wins over data that is complete, and over data that is missing.
        let mut failed = read(100, 10);
        failed.hole(100, 10).unwrap();
        failed.error(error.clone(), Some(109)).unwrap();
        assert!(matches!(failed.finish(), Ok(Outcome::Error(e)) if e == error));
    }

    #[test]
    fn the_number_of_pieces_is_bounded() {
        let mut assembly = read(0, 1 << 20);
        let mut claims = (0..1 << 19).map(|i| assembly.claim(i * 2, 1));
        assert_eq!(claims.position(|claim| claim.is_err()), Some(PIECES_MAX));
    }
}
