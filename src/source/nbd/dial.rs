//! Making connections: name resolution and `connect`, which block, on a thread of their own.
//!
//! A dead network can hold a connect for seconds, so it must not occupy the executor, nor a shared pool of
//! blocking threads. The thread reports through a socket pair: its end closes when the thread is gone, also when
//! it panics, so the waiting task always wakes.

use crate::bail;
use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::net::Stream;
use crate::source::uri::NbdAddress;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How many addresses of one host name are tried.
const ADDRESSES_MAX: usize = 8;
/// After this much silence the kernel asks whether the peer is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// A connected socket as a stream of the current executor. `timeout` bounds the connecting; the resolver has its
/// own limits (resolv.conf).
pub(super) async fn dial(address: &NbdAddress, timeout: Duration) -> Result<Stream> {
    let failed = |error| Error::from_io(error, "start a thread to connect");
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let result = Arc::new(Mutex::new(None));
    let (address, place) = (address.clone(), result.clone());
    std::thread::Builder::new()
        .name("nbd-connect".into())
        .spawn(move || {
            let connected = connect(&address, timeout);
            if let Ok(mut place) = place.lock() {
                *place = Some(connected);
            }
            drop(theirs);
        })
        .map_err(failed)?;
    // Nothing is ever sent: the end of the stream is the message.
    let _ = Stream::new(ours.into()).recv(DmaBuf::new(1), 0).await;
    let connected = result.lock().ok().and_then(|mut place| place.take());
    match connected {
        Some(connected) => connected.map(Stream::new),
        None => bail!(Environment, "the thread that connects ended without a result"),
    }
}

fn connect(address: &NbdAddress, timeout: Duration) -> Result<OwnedFd> {
    match address {
        NbdAddress::Unix(path) => {
            let what = || format!("connect to socket {}", path.display());
            let connected = SockAddr::unix(path).and_then(|address| {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                socket.connect_timeout(&address, timeout)?;
                Ok(socket)
            });
            connected.map(|socket| UnixStream::from(socket).into()).map_err(|error| Error::from_io(error, what()))
        }
        NbdAddress::Tcp { host, port } => {
            let addresses = match (host.as_str(), *port).to_socket_addrs() {
                Ok(addresses) => addresses,
                Err(error) => bail!(NotFound, "host '{host}' can't be resolved: {error}"),
            };
            let deadline = Instant::now() + timeout;
            let mut last = None;
            for address in addresses.take(ADDRESSES_MAX) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let connected = Socket::new(Domain::for_address(address), Type::STREAM, None).and_then(|socket| {
                    socket.connect_timeout(&address.into(), left)?;
                    socket.set_nodelay(true)?;
                    socket.set_tcp_keepalive(
                        &TcpKeepalive::new()
                            .with_time(KEEPALIVE_IDLE)
                            .with_interval(KEEPALIVE_INTERVAL)
                            .with_retries(KEEPALIVE_PROBES),
                    )?;
                    Ok(socket)
                });
                match connected {
                    Ok(socket) => return Ok(TcpStream::from(socket).into()),
                    Err(error) => last = Some(Error::from_io(error, format!("connect to {address}"))),
                }
            }
            Err(last.unwrap_or_else(|| Error::new(ErrorKind::NotFound, format!("host '{host}' has no address"))))
        }
    }
}
