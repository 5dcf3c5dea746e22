//! What this build is made of: every engine, frontend, source and metadata format, with its version, as the
//! DM_GET_TARGET_VERSION ioctl (`dmsetup targets`) answers for the targets of the kernel.
//!
//! The versions stand beside what they are of. The functions at the end name the entry of every frontend and source that
//! a configuration can ask for; a new one does not compile, or fails the test, until it is listed here.

use crate::control::api::{TargetVersion, VersionInfo};
use crate::devices::DeviceKind;
use crate::dm_table;
use crate::io_frontend::nbd;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::meta::{codec, dm};
use crate::source::uri::SourceSpec;
use crate::source::{file, nbd as nbd_source};
use crate::version::Version;

/// One of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    pub kind: Kind,
    pub name: &'static str,
    pub version: Version,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Engine,
    Frontend,
    Source,
    Metadata,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Frontend => "frontend",
            Self::Source => "source",
            Self::Metadata => "metadata",
        }
    }
}

const fn target(kind: Kind, name: &'static str, version: Version) -> Target {
    Target { kind, name, version }
}

const CLONE: Target = target(Kind::Engine, dm_table::TARGET, dm_table::TARGET_VERSION);
const NBD_FRONTEND: Target = target(Kind::Frontend, "nbd", nbd::VERSION);
const FILE: Target = target(Kind::Source, "file", file::VERSION);
const BLOCK: Target = target(Kind::Source, "block", file::VERSION);
const NBD_SOURCE: Target = target(Kind::Source, "nbd", nbd_source::VERSION);
const HYDRANT: Target = target(Kind::Metadata, "hydrant", Version(codec::FORMAT_VERSION, 0, 0));

const DM_CLONE: Target = target(Kind::Metadata, "dm-clone", Version(dm::codec::VERSION, 0, 0));

/// All of them.
pub const TARGETS: &[Target] = &[CLONE, NBD_FRONTEND, FILE, BLOCK, NBD_SOURCE, HYDRANT, DM_CLONE];

/// Everything, for the control interface and `hydrant version`.
pub fn info() -> VersionInfo {
    let of = |target: &Target| TargetVersion {
        kind: target.kind.name().into(),
        name: target.name.into(),
        version: target.version.to_string(),
    };
    VersionInfo { version: env!("CARGO_PKG_VERSION").into(), targets: TARGETS.iter().map(of).collect() }
}

/// What serves clients there; `None` when that is nowhere.
pub const fn of_frontend(address: &NbdAddress) -> Option<Target> {
    match address {
        NbdAddress::Unix(_) | NbdAddress::Tcp(_) => Some(NBD_FRONTEND),
        NbdAddress::None => None,
    }
}

/// What reads such a source; `kind` is what its path leads to.
pub const fn of_source(spec: &SourceSpec, kind: DeviceKind) -> Target {
    match (spec, kind) {
        (SourceSpec::File(_), DeviceKind::File) => FILE,
        (SourceSpec::File(_), DeviceKind::Block) => BLOCK,
        (SourceSpec::Nbd(_), _) => NBD_SOURCE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_can_be_asked_for_is_listed() {
        for address in ["unix:/x", "tcp:127.0.0.1:1"] {
            assert!(TARGETS.contains(&of_frontend(&address.parse().unwrap()).unwrap()));
        }
        for spec in ["/x", "nbd://h/x", "nbd+unix:///x?socket=y"] {
            for kind in [DeviceKind::File, DeviceKind::Block] {
                let target = of_source(&spec.parse().unwrap(), kind);
                assert!(TARGETS.contains(&target) && target.kind == Kind::Source, "{target:?}");
            }
        }
        for (at, target) in TARGETS.iter().enumerate() {
            let same = |other: &&Target| (other.kind, other.name) == (target.kind, target.name);
            assert_eq!(TARGETS.iter().position(|other| same(&other)), Some(at), "{target:?} is there twice");
        }
    }
}
