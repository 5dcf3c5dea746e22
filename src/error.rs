//! Errors: a stable kind, what was being done to what, and the cause.
//!
//! The kind is what code decides on and what is documented; [`ErrorKind::errno`], [`ErrorKind::nbd`] and
//! [`ErrorKind::exit_code`] are the one place that maps it to the outside. The text is for people: it names
//! what, where and, where it helps, what to do.

use std::fmt;
use std::io;
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The command line, a message or a setting is wrong.
    Usage,
    /// A configuration file is wrong.
    Config,
    /// A request is malformed or outside the device.
    InvalidRequest,
    /// A file, device, export or clone does not exist.
    NotFound,
    /// The operating system refuses access.
    PermissionDenied,
    /// Not the kind of file that is wanted: a directory, a FIFO, ...
    WrongType,
    /// A device or socket is in use by somebody else.
    InUse,
    /// A device is too small.
    TooSmall,
    /// A device holds something that is not ours.
    ForeignData,
    /// Metadata and devices do not belong together.
    Mismatch,
    /// Metadata fails its checks.
    Damaged,
    /// Metadata of a version or with features that this build does not know.
    Unsupported,
    /// The source is not the one the clone was made from.
    SourceChanged,
    /// The source can't be reached, and the configured time to wait is over.
    SourceLost,
    /// The peer breaks the protocol.
    Protocol,
    /// The device failed; the errno says how.
    Io,
    /// No space left on the device.
    NoSpace,
    /// The clone accepts no new metadata (`ro`).
    ReadOnly,
    /// The clone has failed (`Fail`): no I/O is safe.
    Failed,
    /// The operation is not possible here (a fast zero that would be slow, ...).
    NotSupported,
    /// A documented limit was reached.
    Limit,
    /// The machine lacks something: io_uring, locked memory, ...
    Environment,
    /// The daemon is going down.
    Shutdown,
}

impl ErrorKind {
    /// The errno for frontends that speak errno (ublk), when the cause has none of its own.
    pub const fn errno(self) -> i32 {
        use ErrorKind::*;
        match self {
            Usage | Config | InvalidRequest | Mismatch => libc::EINVAL,
            NotFound => libc::ENOENT,
            PermissionDenied => libc::EPERM,
            WrongType => libc::ENOTBLK,
            InUse => libc::EBUSY,
            NoSpace => libc::ENOSPC,
            NotSupported => libc::EOPNOTSUPP,
            Shutdown => libc::ESHUTDOWN,
            TooSmall | ForeignData | Damaged | Unsupported | SourceChanged | SourceLost | Protocol | Io | ReadOnly
            | Failed | Limit | Environment => libc::EIO,
        }
    }

    /// The error number of the NBD protocol (its table "Error values"): EPERM 1, EIO 5, ENOMEM 12, EINVAL 22,
    /// ENOSPC 28, EOVERFLOW 75, ENOTSUP 95, ESHUTDOWN 108.
    pub const fn nbd(self) -> u32 {
        match self.errno() {
            libc::EINVAL => 22,
            libc::ENOSPC => 28,
            libc::EOPNOTSUPP => 95,
            libc::ESHUTDOWN => 108,
            _ => 5,
        }
    }

    /// The exit status of the command line: 2 for usage, else 1.
    pub const fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Usage => 2,
            _ => 1,
        }
    }

    /// A stable word for machines (control API, metrics).
    pub const fn name(self) -> &'static str {
        use ErrorKind::*;
        match self {
            Usage => "usage",
            Config => "config",
            InvalidRequest => "invalid_request",
            NotFound => "not_found",
            PermissionDenied => "permission_denied",
            WrongType => "wrong_type",
            InUse => "in_use",
            TooSmall => "too_small",
            ForeignData => "foreign_data",
            Mismatch => "mismatch",
            Damaged => "damaged",
            Unsupported => "unsupported",
            SourceChanged => "source_changed",
            SourceLost => "source_lost",
            Protocol => "protocol",
            Io => "io",
            NoSpace => "no_space",
            ReadOnly => "read_only",
            Failed => "failed",
            NotSupported => "not_supported",
            Limit => "limit",
            Environment => "environment",
            Shutdown => "shutdown",
        }
    }
}

/// An error: cheap to move and to clone (many waiters may share one failed commit).
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    context: String,
    errno: Option<i32>,
    source: Option<Error>,
}

/// The text without control characters, which are escaped: names and contents come from anywhere, and what is said is one
/// line, in the log and on the terminal.
pub fn plain(text: impl Into<String>) -> String {
    let text = text.into();
    if !text.contains(char::is_control) {
        return text;
    }
    let mut plain = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() { plain.extend(c.escape_debug()) } else { plain.push(c) }
    }
    plain
}

impl Error {
    /// `context` says what failed and where: "destination /dev/nvme0n1: 12 bytes at offset 5".
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, context: plain(context.into()), errno: None, source: None }))
    }

    /// An error of the operating system; its errno decides the kind.
    pub fn os(errno: i32, context: impl Into<String>) -> Self {
        let kind = match errno {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => ErrorKind::NotFound,
            libc::EACCES | libc::EPERM | libc::EROFS => ErrorKind::PermissionDenied,
            libc::EBUSY | libc::EADDRINUSE | libc::ETXTBSY => ErrorKind::InUse,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::EISDIR | libc::ENOTDIR | libc::ENOTBLK => ErrorKind::WrongType,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Self(Arc::new(Inner { kind, context: plain(context.into()), errno: Some(errno), source: None }))
    }

    /// An error of an I/O on data (a read, write, flush): whatever the errno, it is the device's failure, except
    /// for a lack of space and an operation that the device does not have.
    pub fn io(errno: i32, context: impl Into<String>) -> Self {
        let kind = match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Self(Arc::new(Inner { kind, context: plain(context.into()), errno: Some(errno), source: None }))
    }

    /// A `std::io::Error` met while doing what `context` says.
    pub fn from_io(error: io::Error, context: impl Into<String>) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::os(errno, context),
            None => Self::new(ErrorKind::Io, format!("{}: {error}", context.into())),
        }
    }

    /// The same kind and errno, with an outer context: `clone 'vm1': <this>`. One that its text begins with already (a
    /// disk names itself, damage that is found on it does not) is not said twice.
    pub fn within(self, context: impl Into<String>) -> Self {
        let (kind, errno, context) = (self.0.kind, self.0.errno, plain(context.into()));
        if self.to_string().strip_prefix(&context).is_some_and(|rest| rest.starts_with(": ")) {
            return self;
        }
        Self(Arc::new(Inner { kind, context, errno, source: Some(self) }))
    }

    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
    /// The operating system's error number, when it was one.
    pub fn os_errno(&self) -> Option<i32> {
        self.0.errno
    }
    /// The error number for frontends that speak errno.
    pub fn errno(&self) -> i32 {
        match self.0.kind {
            ErrorKind::Io | ErrorKind::NoSpace => self.0.errno.unwrap_or(self.0.kind.errno()),
            kind => kind.errno(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.context)?;
        match (&self.0.source, self.0.errno) {
            (Some(source), _) => write!(f, ": {source}"),
            (None, Some(errno)) => {
                let text = io::Error::from_raw_os_error(errno).to_string();
                write!(f, ": {}", text.split(" (os error").next().unwrap_or(&text))
            }
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// Shorthand: `bail!(TooSmall, "destination {path}: ...")`.
#[macro_export]
macro_rules! bail {
    ($kind:ident, $($arg:tt)*) => {
        return Err($crate::error::Error::new($crate::error::ErrorKind::$kind, format!($($arg)*)))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_plain_line() {
        let path = "/x\n[ERROR] all is lost\u{1b}[2J\u{7f}ä";
        let plain = r"/x\n[ERROR] all is lost\u{1b}[2J\u{7f}ä";
        assert_eq!(Error::new(ErrorKind::Io, path).to_string(), plain);
        assert_eq!(Error::os(libc::EIO, path).to_string(), format!("{plain}: Input/output error"));
        assert_eq!(Error::io(libc::EIO, path).within(path).to_string(), format!("{plain}: Input/output error"));
        assert_eq!(Error::new(ErrorKind::Io, "a").within(path).to_string(), format!("{plain}: a"));
    }

    #[test]
    fn a_context_is_said_once() {
        let error = Error::os(libc::ENOSPC, "metadata /m: can't write 4096 bytes at offset 0");
        let text = "metadata /m: can't write 4096 bytes at offset 0: No space left on device";
        let within = error.clone().within("metadata /m");
        assert_eq!((within.to_string().as_str(), within.kind(), within.os_errno()), (text, error.kind(), Some(28)));
        assert_eq!(within.within("clone 'vm'").to_string(), format!("clone 'vm': {text}"));
        // Only when it is the whole context, not the beginning of another.
        assert_eq!(error.within("metadata /").to_string(), format!("metadata /: {text}"));
    }
}
