//! Connected sockets on the executor's ring.

use crate::dma_buf::DmaBuf;
use crate::ring::Ring;
use bytes::{Buf, Bytes};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

/// Parts of one sendmsg(2): the kernel's IOV_MAX.
const PARTS_MAX: usize = 1024;

/// A connected stream socket, unix or TCP. Clones share the socket; it closes with the last one.
#[derive(Clone)]
pub struct Stream {
    ring: Rc<Ring>,
    fd: Rc<OwnedFd>,
}

impl Stream {
    /// Takes over a connected socket, on the current executor's ring.
    pub fn new(fd: OwnedFd) -> Self {
        Self { ring: Ring::current(), fd: Rc::new(fd) }
    }

    /// Receives at least one byte into `buf[at..]` (not empty). Zero bytes: the peer has ended the stream.
    pub async fn recv(&self, mut buf: DmaBuf, at: usize) -> io::Result<(usize, DmaBuf)> {
        loop {
            let end = buf.len();
            let (result, (back, _)) = self.ring.recv(&self.fd, buf, at..end, 0).await;
            match result {
                Ok(count) => return Ok((count as usize, back)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => buf = back,
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `buf[at..]` completely; [`io::ErrorKind::UnexpectedEof`] when the stream ends before.
    pub async fn recv_exact(&self, buf: DmaBuf, at: usize) -> io::Result<DmaBuf> {
        let end = buf.len();
        self.recv_exact_to(buf, at..end).await
    }

    /// The same for `buf[window]`.
    pub async fn recv_exact_to(&self, mut buf: DmaBuf, window: Range<usize>) -> io::Result<DmaBuf> {
        let mut at = window.start;
        while at < window.end {
            let (result, (back, _)) = self.ring.recv(&self.fd, buf, at..window.end, libc::MSG_WAITALL).await;
            buf = back;
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buf)
    }

    /// Sends all parts in order. Two sends at a time on one stream would mix: don't.
    pub async fn send(&self, mut parts: Vec<Bytes>) -> io::Result<()> {
        parts.retain(|part| !part.is_empty());
        while !parts.is_empty() {
            let later = if parts.len() > PARTS_MAX { parts.split_off(PARTS_MAX) } else { Vec::new() };
            let (result, (message, _)) = self.ring.send(&self.fd, parts).await;
            parts = message.into_parts();
            let mut sent = match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            let mut done = 0;
            for part in &mut parts {
                let step = sent.min(part.len());
                part.advance(step);
                sent -= step;
                if !part.is_empty() {
                    break;
                }
                done += 1;
            }
            parts.drain(..done);
            parts.extend(later);
        }
        Ok(())
    }

    /// Whether the peer has closed its socket (not only ended what it sends), or the connection broke.
    pub fn is_hung_up(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid pollfd; does not wait. POLLHUP and POLLERR are reported without being asked for.
        let count = unsafe { libc::poll(&raw mut poll, 1, 0) };
        count == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
    }

    /// Ends both directions: what is pending returns. May be called again.
    pub fn shutdown(&self) {
        // SAFETY: a plain system call on a descriptor that we own.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// A listening socket.
pub struct Listener {
    ring: Rc<Ring>,
    fd: Rc<OwnedFd>,
}

impl Listener {
    /// Takes over a bound, listening socket, on the current executor's ring.
    pub fn new(fd: OwnedFd) -> Self {
        Self { ring: Ring::current(), fd: Rc::new(fd) }
    }

    /// The next connection. After [`Listener::close`] an error.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let (result, _) = self.ring.accept(&self.fd).await;
            match result {
                // SAFETY: accept returned a new descriptor that nobody else owns.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Stops listening: a pending accept returns with an error.
    pub fn close(&self) {
        // SAFETY: a plain system call on a descriptor that we own. On a listening socket it wakes accept.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use glommio::LocalExecutorBuilder;
    use std::os::unix::net::UnixStream;

    fn on_executor<F: Future<Output = ()> + 'static>(test: impl FnOnce() -> F + Send + 'static) {
        LocalExecutorBuilder::default()
            .io_memory(1 << 20)
            .spawn(|| async move {
                let ring = Ring::start().unwrap();
                test().await;
                ring.shutdown().await;
            })
            .unwrap()
            .join()
            .unwrap();
    }

    #[test]
    fn everything_sent_arrives_in_order_whatever_the_socket_buffers_hold() {
        on_executor(|| async {
            let (a, b) = UnixStream::pair().unwrap();
            let (a, b) = (Stream::new(a.into()), Stream::new(b.into()));
            // More parts than one sendmsg takes and more bytes than the socket holds.
            let parts: Vec<Bytes> =
                (0..3000u32).map(|i| Bytes::from(vec![i as u8; 1 + (i as usize * 37) % 4096])).collect();
            let expected: Vec<u8> = parts.concat();
            let sender = glommio::spawn_local(async move { a.send(parts).await });
            let received = b.recv_exact(DmaBuf::new(expected.len()), 0).await.unwrap();
            assert!(received[..] == expected[..]);
            sender.await.unwrap();
            let (count, _) = b.recv(DmaBuf::new(10), 0).await.unwrap();
            assert_eq!(count, 0, "the sender is gone");
            assert!(b.is_hung_up());
        });
    }

    #[test]
    fn a_peer_that_only_listens_has_not_hung_up() {
        on_executor(|| async {
            let (a, b) = UnixStream::pair().unwrap();
            let stream = Stream::new(a.into());
            assert!(!stream.is_hung_up());
            b.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(!stream.is_hung_up(), "it may still read");
            drop(b);
            assert!(stream.is_hung_up());
        });
    }

    #[test]
    fn shutdown_wakes_a_pending_receive_and_a_dropped_one_does_no_harm() {
        on_executor(|| async {
            let (a, b) = UnixStream::pair().unwrap();
            let (a, b) = (Stream::new(a.into()), Stream::new(b.into()));
            let pending = b.clone();
            let waiting = glommio::spawn_local(async move { pending.recv_exact(DmaBuf::new(10), 0).await.map(|_| ()) });
            b.shutdown();
            assert_eq!(waiting.await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            drop(a.recv(DmaBuf::new(10), 0));
            let mut dropped = Box::pin(b.recv(DmaBuf::new(10), 0));
            futures_lite::future::poll_once(&mut dropped).await;
            drop(dropped);
            assert!(a.send(vec![Bytes::from_static(b"x")]).await.is_err(), "no SIGPIPE either");
        });
    }
}
