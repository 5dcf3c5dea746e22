//! A small NBD client with many requests in flight: one thread sends, one receives.
//!
//! Simple replies only; the wire format is the library's own, which its tests hold against other implementations.

use hydrant::io_frontend::nbd::proto::{
    ClientFlags, ClientOption, Command, GREETING_LEN, Info, InfoRequest, OPTION_REPLY_HEADER_LEN, OptionReply,
    OptionReplyHeader, ReplyHeader, RequestHeader, SIMPLE_REPLY_LEN, decode_greeting, encode_client_flags,
};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// No answer takes longer, not even one that waits behind a suspend.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

pub use hydrant::io_frontend::nbd::proto::Command as Verb;

/// One end of a connection.
pub struct Connection {
    socket: UnixStream,
    pub size: u64,
}

fn invalid(text: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_string())
}

fn receive<const N: usize>(mut socket: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Connection {
    pub fn open(path: &Path, export: &str) -> io::Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        socket.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        decode_greeting(&receive::<GREETING_LEN>(&socket)?).map_err(invalid)?;
        socket.write_all(&encode_client_flags(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES))?;
        let go = ClientOption::Go(InfoRequest { name: export.into(), wanted: Vec::new() });
        socket.write_all(&go.encode())?;
        let mut size = None;
        loop {
            let header = OptionReplyHeader::decode(&receive::<OPTION_REPLY_HEADER_LEN>(&socket)?).map_err(invalid)?;
            let mut data = vec![0; header.len as usize];
            socket.read_exact(&mut data)?;
            match OptionReply::decode(header.reply, &data).map_err(invalid)? {
                OptionReply::Info(Info::Export(export)) => size = Some(export.size),
                OptionReply::Ack => {
                    return Ok(Self { socket, size: size.ok_or_else(|| invalid("no size"))? });
                }
                OptionReply::Error { reply, message } => return Err(invalid(format!("{reply}: {message}"))),
                _ => {}
            }
        }
    }

    /// For another thread.
    pub fn other_end(&self) -> Self {
        Self { socket: self.socket.try_clone().unwrap(), size: self.size }
    }

    pub fn send(
        &mut self,
        verb: Command,
        flags: u16,
        cookie: u64,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let mut message = RequestHeader { flags, command: verb, cookie, offset, len }.encode().to_vec();
        message.extend_from_slice(data);
        self.socket.write_all(&message)
    }

    /// The head of the next reply: cookie and error. The data of a read follow.
    pub fn receive(&mut self) -> io::Result<(u64, Option<String>)> {
        let head = receive::<SIMPLE_REPLY_LEN>(&self.socket)?;
        match ReplyHeader::decode(&head).map_err(invalid)? {
            Some((ReplyHeader::Simple(reply), _)) => Ok((reply.cookie, reply.error.map(|error| error.to_string()))),
            other => Err(invalid(format!("no simple reply: {other:?}"))),
        }
    }

    pub fn receive_data(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.socket.read_exact(out)
    }

    /// One request, and its answer.
    pub fn ask(&mut self, verb: Command, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let sent: &[u8] = if verb == Command::WRITE { data } else { &[] };
        let len = u32::try_from(data.len()).expect("a request has less than 4 GiB");
        let mut message = RequestHeader { flags: 0, command: verb, cookie: 1, offset, len }.encode().to_vec();
        message.extend_from_slice(sent);
        self.socket.write_all(&message)?;
        match self.receive()? {
            (1, None) if verb == Command::READ => self.receive_data(data),
            (1, None) => Ok(()),
            other => Err(invalid(format!("{verb} at {offset}: {other:?}"))),
        }
    }

    /// Both ends fail from now on.
    pub fn shut(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
