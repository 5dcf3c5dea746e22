//! A small NBD client for the demo: one request at a time, blocking, over a unix socket.
//!
//! Fixed newstyle with GO and simple replies: the least that a client can speak, on the wire format of
//! [`crate::io_frontend::nbd::proto`].

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::proto::{
    ClientFlags, ClientOption, Command, ExportInfo, GREETING_LEN, HandshakeFlags, Info, InfoRequest,
    OPTION_REPLY_HEADER_LEN, OptionCode, OptionReply, OptionReplyHeader, ReplyHeader, RequestHeader, SIMPLE_REPLY_LEN,
    decode_greeting, encode_client_flags,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long one answer may take.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest reply to an option that is read, in bytes.
const OPTION_REPLY_MAX: u32 = 64 << 10;
/// Most replies to one option.
const OPTION_REPLIES_MAX: usize = 64;

/// A connection to one export.
pub struct NbdClient {
    socket: UnixStream,
    export: ExportInfo,
    cookie: u64,
}

fn failed(error: io::Error) -> Error {
    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
        return Error::new(ErrorKind::Io, format!("NBD connection: no answer within {} s", ANSWER_TIME_MAX.as_secs()));
    }
    Error::from_io(error, "NBD connection")
}

impl NbdClient {
    pub fn connect(path: &Path, export: &str) -> Result<Self> {
        let mut socket = UnixStream::connect(path)
            .map_err(|error| Error::from_io(error, format!("NBD socket {}", path.display())))?;
        socket.set_read_timeout(Some(ANSWER_TIME_MAX)).map_err(failed)?;
        socket.set_write_timeout(Some(ANSWER_TIME_MAX)).map_err(failed)?;
        let flags = decode_greeting(&receive::<GREETING_LEN>(&mut socket)?)?;
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            bail!(Protocol, "NBD server: fixed newstyle is needed");
        }
        socket.write_all(&encode_client_flags(ClientFlags::FIXED_NEWSTYLE)).map_err(failed)?;
        let go = ClientOption::Go(InfoRequest { name: export.to_owned(), wanted: Vec::new() });
        socket.write_all(&go.encode()).map_err(failed)?;
        let mut info = None;
        for _ in 0..OPTION_REPLIES_MAX {
            let header = OptionReplyHeader::decode(&receive::<OPTION_REPLY_HEADER_LEN>(&mut socket)?)?;
            if header.option != OptionCode::GO || header.len > OPTION_REPLY_MAX {
                bail!(Protocol, "NBD server: answers {} with {} bytes to GO", header.option, header.len);
            }
            let mut data = vec![0; header.len as usize];
            socket.read_exact(&mut data).map_err(failed)?;
            match (OptionReply::decode(header.reply, &data)?, info) {
                (OptionReply::Info(Info::Export(export)), _) => info = Some(export),
                (OptionReply::Ack, Some(export)) => return Ok(Self { socket, export, cookie: 0 }),
                (OptionReply::Error { reply, message }, _) => {
                    bail!(Protocol, "NBD server refuses export '{export}': {reply} {message}")
                }
                _ => {}
            }
        }
        bail!(Protocol, "NBD server: GO has no end")
    }

    /// Size and abilities of the export.
    pub fn export(&self) -> ExportInfo {
        self.export
    }

    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.ask(Command::READ, offset, out.len(), &[])?;
        self.socket.read_exact(out).map_err(|error| failed(error).within(format!("READ at offset {offset}")))
    }
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.ask(Command::WRITE, offset, data.len(), data)
    }
    pub fn write_zeroes(&mut self, offset: u64, len: usize) -> Result<()> {
        self.ask(Command::WRITE_ZEROES, offset, len, &[])
    }
    pub fn flush(&mut self) -> Result<()> {
        self.ask(Command::FLUSH, 0, 0, &[])
    }
    /// Ends the connection.
    pub fn disconnect(mut self) -> Result<()> {
        self.cookie += 1;
        let header = RequestHeader { flags: 0, command: Command::DISC, cookie: self.cookie, offset: 0, len: 0 };
        self.socket.write_all(&header.encode()).map_err(failed)
    }

    /// Sends a request and receives the head of its reply.
    fn ask(&mut self, command: Command, offset: u64, len: usize, data: &[u8]) -> Result<()> {
        self.cookie += 1;
        let Ok(len) = u32::try_from(len) else {
            bail!(InvalidRequest, "{command} of {len} bytes");
        };
        let mut message = RequestHeader { flags: 0, command, cookie: self.cookie, offset, len }.encode().to_vec();
        message.extend_from_slice(data);
        let named = |error: Error| error.within(format!("{command} of {len} bytes at offset {offset}"));
        self.socket.write_all(&message).map_err(|error| named(failed(error)))?;
        match ReplyHeader::decode(&receive::<SIMPLE_REPLY_LEN>(&mut self.socket).map_err(named)?)? {
            Some((ReplyHeader::Simple(reply), _)) if reply.cookie == self.cookie => match reply.error {
                None => Ok(()),
                Some(error) => bail!(Io, "{command} of {len} bytes at offset {offset}: the clone answers {error}"),
            },
            Some((reply, _)) => bail!(Protocol, "{command}: the reply {reply:?} is not for request {}", self.cookie),
            None => bail!(Protocol, "{command}: a structured reply, though none was agreed on"),
        }
    }
}

fn receive<const N: usize>(socket: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
