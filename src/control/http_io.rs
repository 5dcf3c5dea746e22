//! What `hyper` reads and writes through: adapters, from a socket of this process to `hyper::rt`.
//!
//! [`StreamIo`] is for the server: a [`Stream`] on the executor's ring. [`BlockingIo`] is for the client, which has
//! no executor: it is driven by [`BlockingIo::drive`], and blocks in `read` only when nothing else is left to do.
//! Both copy: the control interface is not a data path.

use crate::dma_buf::DmaBuf;
use crate::net::Stream;
use bytes::Bytes;
use hyper::rt::{Read, ReadBufCursor, Write};
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::{Duration, Instant};

/// Bytes received or sent at a time.
const CHUNK: usize = 16 << 10;

type IoFuture<T> = Pin<Box<dyn Future<Output = io::Result<T>>>>;

/// Received bytes that were not asked for yet.
#[derive(Default)]
struct Unread<B> {
    bytes: Option<B>,
    at: usize,
    len: usize,
}

impl<B: AsRef<[u8]>> Unread<B> {
    fn new(bytes: B, len: usize) -> Self {
        Self { bytes: Some(bytes), at: 0, len }
    }
    /// Hands out what fits; false when there was nothing.
    fn hand_out(&mut self, to: &mut ReadBufCursor<'_>) -> bool {
        let Some(bytes) = self.bytes.as_ref().filter(|_| self.at < self.len) else { return false };
        let count = (self.len - self.at).min(to.remaining());
        to.put_slice(&bytes.as_ref()[self.at..self.at + count]);
        self.at += count;
        true
    }
}

/// A stream of the executor, for `hyper`'s server. A write is taken over and sent in the background of the
/// connection's task; its error shows at the next write or flush.
pub struct StreamIo {
    stream: Stream,
    receiving: Option<IoFuture<(usize, DmaBuf)>>,
    unread: Unread<DmaBuf>,
    sending: Option<IoFuture<()>>,
}

impl StreamIo {
    pub fn new(stream: Stream) -> Self {
        Self { stream, receiving: None, unread: Unread { bytes: None, at: 0, len: 0 }, sending: None }
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(sending) = &mut self.sending {
            let result = ready!(sending.as_mut().poll(cx));
            self.sending = None;
            result?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for StreamIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 || this.unread.hand_out(&mut buf) {
            return Poll::Ready(Ok(()));
        }
        let stream = &this.stream;
        let receiving = this.receiving.get_or_insert_with(|| {
            let stream = stream.clone();
            Box::pin(async move { stream.recv(DmaBuf::new(CHUNK), 0).await })
        });
        let result = ready!(receiving.as_mut().poll(cx));
        this.receiving = None;
        let (count, bytes) = result?;
        this.unread = Unread::new(bytes, count);
        this.unread.hand_out(&mut buf);
        Poll::Ready(Ok(()))
    }
}

impl Write for StreamIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_sent(cx))?;
        let part = Bytes::copy_from_slice(&data[..data.len().min(CHUNK)]);
        let (stream, count) = (self.stream.clone(), part.len());
        self.sending = Some(Box::pin(async move { stream.send(vec![part]).await }));
        match self.poll_sent(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(count)),
        }
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_sent(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sent(cx))?;
        self.stream.shutdown();
        Poll::Ready(Ok(()))
    }
}

/// A blocking socket, for `hyper`'s client. Clones share it.
#[derive(Clone)]
pub struct BlockingIo(Rc<RefCell<Blocking>>);

struct Blocking {
    socket: UnixStream,
    unread: Unread<Vec<u8>>,
    ended: bool,
    /// A read was asked for and could not be answered.
    wants_read: bool,
}

impl BlockingIo {
    pub fn new(socket: UnixStream) -> Self {
        let unread = Unread { bytes: None, at: 0, len: 0 };
        Self(Rc::new(RefCell::new(Blocking { socket, unread, ended: false, wants_read: false })))
    }

    /// Runs `future`, which does its I/O through a clone of this, to its end. `TimedOut` after `limit`.
    pub fn drive<F: Future>(&self, future: F, limit: Duration) -> io::Result<F::Output> {
        let deadline = Instant::now() + limit;
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(woken.clone());
        let mut future = pin!(future);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.0.borrow().socket.set_write_timeout(Some(left))?;
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Ok(output);
            }
            if !woken.0.swap(false, Ordering::AcqRel) {
                self.0.borrow_mut().wait_for_bytes(left)?;
            }
        }
    }
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

impl Blocking {
    /// Blocks until there are bytes to read, or the end of the stream.
    fn wait_for_bytes(&mut self, limit: Duration) -> io::Result<()> {
        if !self.wants_read {
            return Err(io::Error::other("the HTTP exchange waits for nothing"));
        }
        self.socket.set_read_timeout(Some(limit))?;
        let mut bytes = vec![0; CHUNK];
        let count = loop {
            match io::Read::read(&mut self.socket, &mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                result => break result?,
            }
        };
        self.ended = count == 0;
        self.unread = Unread::new(bytes, count);
        self.wants_read = false;
        Ok(())
    }
}

impl Read for BlockingIo {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let mut this = self.0.borrow_mut();
        if buf.remaining() == 0 || this.unread.hand_out(&mut buf) || this.ended {
            return Poll::Ready(Ok(()));
        }
        this.wants_read = true;
        Poll::Pending
    }
}

impl Write for BlockingIo {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut this = self.0.borrow_mut();
        loop {
            match io::Write::write(&mut this.socket, data) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                result => return Poll::Ready(result),
            }
        }
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.borrow().socket.shutdown(std::net::Shutdown::Write))
    }
}
