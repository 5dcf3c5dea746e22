//! What a daemon and its clones are made of and how they are to run, whoever says so: the command line or a file.
//!
//! Plain values that were checked for form; nothing here was opened (only the paths of files are followed, to find two
//! that are one). [`crate::cli`] fills it from the command
//! line, [`plan`] from files (TOML: [`mod@file`], [`node`]), the control interface from JSON; all but the first by way of
//! [`spec`], whose names are those of the command line. What is wrong is a [`fault::Fault`] and names its key.

pub mod fault;
pub mod file;
pub mod keys;
pub mod node;
pub mod plan;
mod same_file;
pub mod setting;
pub mod spec;

pub use crate::device_mapper::nodes::DmName;
use crate::dm_table::DmTable;
use crate::hydration_share;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::source::uri::SourceSpec;
use crate::units::{DEVICE_SIZE_MAX, REGION_SIZE_MAX, RegionSize};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Longest name of a clone, in bytes.
pub const NAME_LEN_MAX: usize = 64;
/// Most shards that can be asked for.
pub const SHARDS_MAX: u16 = 256;
/// How long reads wait for a lost source, when nothing is said, in seconds.
pub const SOURCE_TIMEOUT_SECONDS_DEFAULT: u32 = 60;
/// The longest time to wait for a lost source: a day, in seconds.
pub const SOURCE_TIMEOUT_SECONDS_MAX: u32 = 86_400;

/// Weight of a clone, when nothing is said.
pub use crate::hydration_failures::FAILURES_MAX_DEFAULT;
pub const PRIORITY_DEFAULT: u32 = hydration_share::PRIORITY_DEFAULT as u32;
/// Largest weight of a clone; the smallest is 1.
pub const PRIORITY_MAX: u32 = hydration_share::PRIORITY_MAX as u32;

/// Largest clone, in bytes: what a geometry can hold, in whole TiB.
pub const SIZE_MAX: u64 = (DEVICE_SIZE_MAX - REGION_SIZE_MAX) >> 40 << 40;
/// Bounds of a rate of hydration, in bytes per second.
pub use crate::hydration_share::{RATE_MAX as HYDRATION_RATE_MAX, RATE_MIN as HYDRATION_RATE_MIN};
/// Largest number of a block device.
pub use crate::io_frontend::ublk::NUMBER_MAX as UBLK_NUMBER_MAX;
/// Bounds of the memory that each shard copies with, in bytes.
pub use crate::shard::copy_pool::{IO_MEMORY_MAX, IO_MEMORY_MIN};
/// The longest time that an idle shard polls, in microseconds.
pub const SPIN_MAX_US: u64 = 1_000_000;
/// Bounds of the time between two metrics dumps, in milliseconds: 100 ms to a day.
pub const METRICS_INTERVAL_MIN_MS: u64 = 100;
pub const METRICS_INTERVAL_MAX_MS: u64 = 86_400_000;

/// What a daemon is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub daemon: DaemonConfig,
    /// With different names.
    pub clones: Vec<CloneConfig>,
    /// Check everything, say what would be done, change nothing.
    pub dry_run: bool,
}

/// How the daemon runs, whatever its clones are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonConfig {
    /// How many; `None` is one for each CPU that the process may run on (or of `cpus`).
    pub shards: Option<u16>,
    /// The CPUs that shards are pinned to, in turn; `None` is those that the process may run on.
    pub cpus: Option<Vec<usize>>,
    /// The daemon is for the one clone of its plan: none comes or goes ('hydrant clone').
    pub one_clone: bool,
    /// Path of the control socket.
    pub control: PathBuf,
    /// Bytes of source data that each shard may hold while copying, all clones together; `None` is the default.
    pub io_memory: Option<u64>,
    /// How long an idle shard polls before it sleeps.
    pub spin: Duration,
    /// Bytes per second that hydration may read from all sources together.
    pub hydration_rate: Option<u64>,
    pub metrics_dump: Option<MetricsDump>,
    /// What to log, in the words of HYDRANT_LOG, which has precedence.
    pub log: Option<String>,
}

impl DaemonConfig {
    pub fn new(control: PathBuf) -> Self {
        Self {
            shards: None,
            cpus: None,
            one_clone: false,
            control,
            io_memory: None,
            spin: Duration::ZERO,
            hydration_rate: None,
            metrics_dump: None,
            log: None,
        }
    }
}

/// A file that gets the metrics of all shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsDump {
    pub path: PathBuf,
    /// How often; `None` is only when SIGUSR1 asks for it.
    pub interval: Option<Duration>,
}

/// One clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneConfig {
    pub name: CloneName,
    /// A path (file or block device) or an NBD URI.
    pub source: String,
    pub destination: PathBuf,
    pub metadata: PathBuf,
    /// `None`: that of the metadata, or the default for a new clone.
    pub region_size: Option<RegionSize>,
    /// Bytes of the source that are cloned, from its start; `None` is what the metadata say, or all of a new clone's.
    pub size: Option<u64>,
    /// Whether the background copy starts enabled.
    pub hydration: bool,
    /// Whether discards go down to the destination.
    pub discard_passdown: bool,
    /// The most regions in flight; `None` is automatic, 0 stops hydration.
    pub hydration_threshold: Option<u32>,
    /// Regions copied together; `None` is automatic.
    pub hydration_batch_size: Option<u32>,
    /// Bytes per second that hydration may read from the source.
    pub hydration_rate: Option<u64>,
    /// So many failed copies in a row stop hydration; 0 is none.
    pub hydration_failures_max: u32,
    /// Weight among the clones of the daemon that hydrate, 1 to [`PRIORITY_MAX`].
    pub priority: u32,
    pub on_hydrated: OnHydrated,
    pub nbd: NbdConfig,
    /// Beside NBD, a block device of the kernel.
    pub ublk: Option<UblkConfig>,
    /// How long reads wait for a lost source before they fail.
    pub source_timeout: Duration,
    /// Use a destination that holds something unknown.
    pub force: bool,
    /// The line of dm-clone's table that it was given as, which says what most of the above says.
    pub table: Option<DmTable>,
}

impl CloneConfig {
    /// Takes over what a table line says.
    pub fn set_table(&mut self, table: DmTable) {
        self.source = table.source();
        self.destination = table.destination();
        self.metadata = table.metadata();
        self.region_size = Some(table.region_size());
        self.size = Some(table.size());
        self.hydration = !table.no_hydration();
        self.discard_passdown = !table.no_discard_passdown();
        self.hydration_threshold = table.hydration_threshold();
        self.hydration_batch_size = table.hydration_batch_size();
        self.table = Some(table);
    }

    /// Whether nobody could use it.
    pub fn shown_nowhere(&self) -> Option<&'static str> {
        (self.nbd.address == NbdAddress::None && self.ublk.is_none())
            .then_some("a clone without NBD is for a block device alone: [clone.ublk] is missing")
    }

    /// What is missing for `on_hydrated = "linear"`.
    pub fn linear_lacks_a_name(&self) -> Option<&'static str> {
        let has_name = self.ublk.as_ref().is_some_and(|ublk| ublk.dm_name.is_some());
        (self.on_hydrated == OnHydrated::Linear && !has_name)
            .then_some("'linear' hands a device-mapper device over: say which one by dm_name of [clone.ublk]")
    }

    /// What is given as two of the three files: the key of the second one, and what is wrong with it. `as_one` makes one
    /// path of all that name one file.
    pub fn given_twice(&self, as_one: impl Fn(&Path) -> PathBuf) -> Option<(&'static str, &'static str)> {
        let source = SourceSpec::parse(OsStr::new(&self.source)).ok();
        let source =
            source.and_then(|source| if let SourceSpec::File(path) = source { Some(as_one(&path)) } else { None });
        let (destination, metadata) = (as_one(&self.destination), as_one(&self.metadata));
        let is_table = self.table.is_some();
        let found = match () {
            () if source.as_ref() == Some(&destination) => 0,
            () if source.as_ref() == Some(&metadata) => 1,
            () if destination == metadata => 2,
            () => return None,
        };
        Some(match (found, is_table) {
            (0, false) => ("destination", "it is the source of the clone"),
            (1, false) => ("metadata", "it is the source of the clone"),
            (_, false) => ("metadata", "it is the destination of the clone"),
            (0, true) => ("table", "its destination is its source"),
            (1, true) => ("table", "its metadata is its source"),
            (_, true) => ("table", "its metadata is its destination"),
        })
    }
}

/// The NBD frontend of a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdConfig {
    /// Where clients connect; clones with the same address share a listener.
    pub address: NbdAddress,
    /// Name of the export; the clone's unless said otherwise.
    pub export: CloneName,
}

/// The block device of a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkConfig {
    /// N of /dev/ublkbN, at most [`UBLK_NUMBER_MAX`]; `None` is any that is free.
    pub number: Option<u32>,
    /// The clone is `/dev/mapper/NAME`, a device-mapper device above it, which outlives the clone when it is handed over.
    pub dm_name: Option<DmName>,
}

/// What to do when every region is hydrated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnHydrated {
    /// Go on serving.
    #[default]
    Stay,
    /// End the daemon when the last client is gone, and no other clone keeps it.
    Exit,
    /// Remove the clone from the daemon when its last client is gone.
    Remove,
    /// Hand `/dev/mapper/NAME` over to the destination, whoever uses it; then as `Remove`.
    Linear,
}

/// The name of a clone: 1 to [`NAME_LEN_MAX`] of `A-Z a-z 0-9 . _ -`, the first one not `.` or `-`. So it is at once a
/// file name, an NBD export name and a path segment of a URL, without any quoting.
#[derive(Clone, PartialEq, Eq, Debug, PartialOrd, Ord, Hash)]
pub struct CloneName(String);

impl CloneName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for CloneName {
    fn default() -> Self {
        Self("clone".into())
    }
}

impl FromStr for CloneName {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if !(1..=NAME_LEN_MAX).contains(&s.len()) {
            return Err(format!("a name has 1 to {NAME_LEN_MAX} characters"));
        }
        if let Some(bad) = s.chars().find(|c| !(c.is_ascii_alphanumeric() || "._-".contains(*c))) {
            return Err(format!("'{}' can't be in a name: use letters, digits, '.', '_' and '-'", bad.escape_debug()));
        }
        if s.starts_with(['.', '-']) {
            return Err("a name can't start with '.' or '-'".into());
        }
        Ok(Self(s.into()))
    }
}

impl fmt::Display for CloneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["clone", "a", "VM_1.disk-0", "0", "_", &"x".repeat(64)] {
            assert_eq!(good.parse::<CloneName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".a", "-a", "a/b", "a b", "ä", "a\0", "a\n", "%41", &"x".repeat(65)] {
            assert!(bad.parse::<CloneName>().is_err(), "{bad:?}");
        }
    }
}
