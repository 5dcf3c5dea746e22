//! What `--source` names: a file or block device by its path, or an NBD export by its URI.
//!
//! Follows the NBD URI standard (NetworkBlockDevice/nbd, `doc/uri.md`) for the two schemes without TLS:
//!
//! ```text
//! nbd://HOST[:PORT]/EXPORT            TCP, port 10809 unless given; IPv6 as [::1]; no HOST means localhost
//! nbd+unix:///EXPORT?socket=PATH      a Unix domain socket
//! ```
//! Everything after the first `/` is the export name, percent-decoded; it may be empty (the server's default).
//! What the standard leaves to the client is refused rather than ignored: an authority for a Unix socket, a
//! user name (it is for TLS), a parameter that is not known, a fragment.
//!
//! Pure: text in, a specification or a message for people out. Must not touch the file system or the network.

use fluent_uri::Uri;
use fluent_uri::component::Host;
use fluent_uri::encoding::encoder::{Data, Path as PathEncoder};
use fluent_uri::encoding::{EStr, EString};
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// IANA's port for NBD.
pub const NBD_PORT: u16 = 10809;
/// The longest string of the NBD protocol, in bytes.
pub const EXPORT_NAME_LEN_MAX: usize = 4096;
/// The longest path of a Unix domain socket, in bytes: `sun_path` without its final NUL.
pub const SOCKET_PATH_LEN_MAX: usize = 107;

const KNOWN: &str = "a path, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";

/// A source as it is named on the command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceSpec {
    /// A file or a block device.
    File(PathBuf),
    Nbd(NbdUri),
}

/// An NBD export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdUri {
    pub address: NbdAddress,
    /// At most [`EXPORT_NAME_LEN_MAX`] bytes, without NUL; empty is the server's default export.
    pub export: String,
}

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// `host` is a name or an address, IPv6 without its brackets.
    Tcp { host: String, port: u16 },
    /// At most [`SOCKET_PATH_LEN_MAX`] bytes, without NUL.
    Unix(PathBuf),
}

impl SourceSpec {
    /// Understands one argument. The error is one line that names what is wrong and what is known.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        if text.is_empty() {
            return Err(format!("the source is empty: give {KNOWN}"));
        }
        let Some(scheme) = scheme_of(text.as_bytes()) else { return Ok(Self::File(PathBuf::from(text))) };
        let shown = text.to_string_lossy().escape_debug().to_string();
        match scheme.to_ascii_lowercase().as_str() {
            "nbd" | "nbd+unix" => {
                let text = text
                    .to_str()
                    .ok_or_else(|| format!("source '{shown}': a URI is plain ASCII, other bytes are written as %XX"))?;
                NbdUri::parse(text).map(Self::Nbd)
            }
            "nbds" | "nbds+unix" | "nbds+vsock" => {
                Err(format!("source '{shown}': TLS ({scheme}) is not supported; a source is {KNOWN}"))
            }
            "nbd+vsock" | "nbd+ssh" | "nbds+ssh" => {
                Err(format!("source '{shown}': transport {scheme} is not supported; a source is {KNOWN}"))
            }
            _ => Err(format!(
                "source '{shown}': scheme '{scheme}' is not known; a source is {KNOWN} \
                 (a file of this name is written ./{shown})"
            )),
        }
    }
}

impl FromStr for SourceSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(OsStr::new(text))
    }
}

/// Text that [`SourceSpec::parse`] understands as the same source (for paths that are UTF-8).
impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Nbd(uri) => uri.fmt(f),
        }
    }
}

/// The scheme, when the text begins like `scheme://` (RFC 3986, section 3.1).
fn scheme_of(text: &[u8]) -> Option<&str> {
    let end = text.windows(3).position(|w| w == b"://")?;
    let scheme = std::str::from_utf8(&text[..end]).ok()?;
    let ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    ok.then_some(scheme)
}

impl NbdUri {
    /// Understands a URI whose scheme is `nbd` or `nbd+unix`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fail = |why: String| Err(format!("source '{}': {why}", text.escape_debug()));
        let uri = match Uri::parse(text) {
            Ok(uri) => uri,
            Err(error) => return fail(format!("not a valid URI: {error} (other characters are written as %XX)")),
        };
        if uri.fragment().is_some() {
            return fail("a URI with '#' has no meaning here; in a name it is written as %23".into());
        }
        let authority = uri.authority();
        if authority.as_ref().is_some_and(|a| a.has_userinfo()) {
            return fail("a user name is for TLS only, which is not supported".into());
        }

        let mut socket = None;
        for pair in uri.query().unwrap_or(EStr::EMPTY).split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, EStr::EMPTY));
            match key.decode().into_bytes().as_ref() {
                b"socket" if socket.is_some() => return fail("parameter 'socket' is given twice".into()),
                b"socket" => socket = Some(value.decode().into_bytes().into_owned()),
                key => {
                    let key = String::from_utf8_lossy(key).escape_debug().to_string();
                    let why = if key.starts_with("tls-") { "TLS is not supported" } else { "only 'socket' is known" };
                    return fail(format!("parameter '{key}': {why}"));
                }
            }
        }

        let path = uri.path();
        let export = match path.decode().into_string() {
            Ok(path) => path.strip_prefix('/').unwrap_or(&path).to_owned(),
            Err(_) => return fail("the export name is not UTF-8".into()),
        };
        if export.contains('\0') {
            return fail("the export name has a NUL (%00)".into());
        }
        if export.len() > EXPORT_NAME_LEN_MAX {
            return Err(format!(
                "source {}...: the export name has {} bytes; NBD allows {EXPORT_NAME_LEN_MAX}",
                text.chars().take(40).collect::<String>(),
                export.len()
            ));
        }

        let address = if uri.scheme().as_str().eq_ignore_ascii_case("nbd") {
            if socket.is_some() {
                return fail("parameter 'socket' belongs to nbd+unix://".into());
            }
            let (host, port) = match &authority {
                None => (String::new(), None),
                Some(authority) => {
                    let host = match authority.host_parsed() {
                        Host::RegName(name) => match name.decode().into_string() {
                            Ok(name) => name.into_owned(),
                            Err(_) => return fail("the host name is not UTF-8".into()),
                        },
                        Host::Ipv4 { .. } => authority.host().to_owned(),
                        Host::Ipv6 { .. } => authority.host().trim_matches(['[', ']']).to_owned(),
                        _ => return fail("this form of address is not known".into()),
                    };
                    let Ok(port) = authority.port_to_u16() else {
                        return fail("the port is not a number from 1 to 65535".into());
                    };
                    (host, port)
                }
            };
            if port == Some(0) {
                return fail("the port is not a number from 1 to 65535".into());
            }
            if host.contains(|c: char| c.is_control() || c.is_whitespace()) {
                return fail("the host name has a blank or a control character".into());
            }
            let host = if host.is_empty() { "localhost".to_owned() } else { host };
            NbdAddress::Tcp { host, port: port.unwrap_or(NBD_PORT) }
        } else {
            if let Some(authority) = authority.filter(|a| !a.as_str().is_empty()) {
                return fail(format!(
                    "nbd+unix takes no host ('{}'): write three slashes, nbd+unix:///EXPORT?socket=PATH",
                    authority.as_str()
                ));
            }
            match socket {
                None => return fail("the socket is missing: nbd+unix:///EXPORT?socket=PATH".into()),
                Some(path) if path.is_empty() => return fail("parameter 'socket' is empty".into()),
                Some(path) if path.contains(&0) => {
                    return fail("sockets of the abstract namespace (NUL) are not supported".into());
                }
                Some(path) if path.len() > SOCKET_PATH_LEN_MAX => {
                    return fail(format!(
                        "the path of the socket has {} bytes; the system allows {SOCKET_PATH_LEN_MAX}",
                        path.len()
                    ));
                }
                Some(path) => NbdAddress::Unix(PathBuf::from(std::ffi::OsString::from_vec(path))),
            }
        };
        Ok(Self { address, export })
    }
}

/// The URI of the export; [`NbdUri::parse`] gives the same export back.
impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut export = EString::<PathEncoder>::new();
        export.encode::<PathEncoder>(&self.export);
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd://[{host}]")?;
                } else {
                    let mut name = EString::<Data>::new();
                    name.encode::<Data>(host);
                    write!(f, "nbd://{name}")?;
                }
                if *port != NBD_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
            NbdAddress::Unix(path) => write!(f, "nbd+unix:///{export}?socket={}", encode_socket(path)),
        }
    }
}

/// Percent-encodes all that a query does not take literally; slashes stay readable.
fn encode_socket(path: &Path) -> String {
    path.as_os_str()
        .as_bytes()
        .split(|b| *b == b'/')
        .map(|part| {
            let mut encoded = EString::<Data>::new();
            encoded.encode::<Data>(part);
            encoded.into_string()
        })
        .collect::<Vec<_>>()
        .join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, export: &str) -> SourceSpec {
        SourceSpec::Nbd(NbdUri { address: NbdAddress::Tcp { host: host.into(), port }, export: export.into() })
    }
    fn unix(path: &str, export: &str) -> SourceSpec {
        SourceSpec::Nbd(NbdUri { address: NbdAddress::Unix(path.into()), export: export.into() })
    }

    #[test]
    fn good() {
        let cases = [
            ("nbd://example.com:10810/disk", tcp("example.com", 10810, "disk")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("NBD://example.com:/x", tcp("example.com", 10809, "x")),
            ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
            ("nbd://example.com/a/b", tcp("example.com", 10809, "a/b")),
            ("nbd://example.com/hello%20world%2f%C3%A4", tcp("example.com", 10809, "hello world/ä")),
            ("nbd://127.0.0.1:1/x", tcp("127.0.0.1", 1, "x")),
            ("nbd://[::1]/x", tcp("::1", 10809, "x")),
            ("nbd://[2001:db8::1]:65535/x", tcp("2001:db8::1", 65535, "x")),
            ("nbd:///x", tcp("localhost", 10809, "x")),
            ("nbd+unix:///disk?socket=/run/nbd.sock", unix("/run/nbd.sock", "disk")),
            ("nbd+unix://?socket=rel.sock", unix("rel.sock", "")),
            ("nbd+unix:///?socket=/a%26b%3F&", unix("/a&b?", "")),
            ("nbd+unix:////disk?socket=a=b", unix("a=b", "/disk")),
            ("/dev/sda", SourceSpec::File("/dev/sda".into())),
            ("./nbd://x", SourceSpec::File("./nbd://x".into())),
            ("a b", SourceSpec::File("a b".into())),
            ("nbd:x", SourceSpec::File("nbd:x".into())),
            ("://x", SourceSpec::File("://x".into())),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<SourceSpec>().as_ref(), Ok(&expected), "{text}");
            assert_eq!(expected.to_string().parse::<SourceSpec>().as_ref(), Ok(&expected), "{text} -> {expected}");
        }
    }

    #[test]
    fn not_utf8_is_a_path_or_refused() {
        let path = OsStr::from_bytes(b"/tmp/\xff");
        assert_eq!(SourceSpec::parse(path), Ok(SourceSpec::File(path.into())));
        assert!(SourceSpec::parse(OsStr::from_bytes(b"nbd://h/\xff")).unwrap_err().contains("%XX"));
    }

    #[test]
    fn bad() {
        let long_name = format!("nbd://h/{}", "x".repeat(4097));
        let long_socket = format!("nbd+unix:///?socket=/{}", "x".repeat(107));
        let cases = [
            ("", "empty"),
            ("nbds://host/x", "TLS"),
            ("nbds+unix:///?socket=/x", "TLS"),
            ("nbd+vsock:///", "nbd+vsock is not supported; a source is a path, nbd://"),
            ("http://host/x", "'http' is not known; a source is a path, nbd://"),
            ("file:///x", "'file' is not known"),
            ("nbd://host:0/x", "port"),
            ("nbd://host:65536/x", "port"),
            ("nbd://host:x/x", "not a valid URI"),
            ("nbd://[::1/x", "not a valid URI"),
            ("nbd://[v1.x]/x", "not known"),
            ("nbd://ho st/x", "%XX"),
            ("nbd://ho%20st/x", "blank"),
            ("nbd://host/ä", "%XX"),
            ("nbd://host/%zz", "not a valid URI"),
            ("nbd://host/%00", "NUL"),
            ("nbd://host/%ff", "not UTF-8"),
            ("nbd://user@host/x", "user name"),
            ("nbd://host/x#y", "%23"),
            ("nbd://host/x?socket=/x", "belongs to nbd+unix"),
            ("nbd://host/x?tls-type=psk", "TLS is not supported"),
            ("nbd://host/x?y", "parameter 'y'"),
            ("nbd+unix://run/x?socket=/x", "three slashes"),
            ("nbd+unix:///x", "socket is missing"),
            ("nbd+unix:///x?socket=", "empty"),
            ("nbd+unix:///x?socket=/a&socket=/b", "twice"),
            ("nbd+unix:///x?socket=%00abstract", "abstract"),
            (&long_name, "4097 bytes"),
            (&long_socket, "108 bytes"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<SourceSpec>().expect_err(text);
            assert!(error.contains(expected), "{text}: '{error}' lacks '{expected}'");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn shown_is_parsed_back(
            host in "[a-z0-9._~-]{1,20}|::1|2001:db8::7|10\\.1\\.2\\.3", port in 1u16..,
            export in "[^\\x00]{0,40}", socket in "[^\\x00]{1,25}", tcp in any::<bool>(),
        ) {
            let address = if tcp { NbdAddress::Tcp { host, port } } else { NbdAddress::Unix(socket.into()) };
            let spec = SourceSpec::Nbd(NbdUri { address, export });
            prop_assert_eq!(spec.to_string().parse::<SourceSpec>(), Ok(spec));
        }

        #[test]
        fn never_panics_and_never_takes_a_uri_for_a_path(
            scheme in "nbd|nbd\\+unix|nbds|NBD|ftp", rest in ".{0,40}",
        ) {
            let spec = format!("{scheme}://{rest}").parse::<SourceSpec>();
            prop_assert!(!matches!(spec, Ok(SourceSpec::File(_))));
        }
    }
}
