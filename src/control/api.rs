//! What the control interface says: the status of a clone, and the messages it takes. Pure: no I/O, no clock.
//!
//! The JSON names are stable: fields are added, never renamed or given another meaning. A reader ignores what it
//! does not know and takes the default for what is missing, so that the command line and the daemon may be of
//! different versions. Sizes are in bytes, unless a name says otherwise.

use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::events::Page;
use crate::hydration_share::{HydrationRate, PRIORITY_MAX, Priority, RATE_MIN};
use crate::units::{ByteSize, SECTOR_SIZE};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Path prefix of this version of the interface.
pub const PREFIX: &str = "/v1";

/// The answer to `GET /v1/version`: what the daemon is, and is made of.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VersionInfo {
    /// Of the program.
    pub version: String,
    pub targets: Vec<TargetVersion>,
}

/// An engine, frontend, source or metadata format.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetVersion {
    /// `engine`, `frontend`, `source` or `metadata`.
    pub kind: String,
    pub name: String,
    /// MAJOR.MINOR.PATCH.
    pub version: String,
}

/// The answer to `GET /v1/clones/NAME/table`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TableBody {
    /// dm-clone's table line.
    pub table: String,
}

/// Everything about one clone at one moment.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub name: String,
    pub state: CloneRunState,
    /// Why it could not be started; null unless `state` is `failed`.
    pub error: Option<String>,
    /// When its start is tried again, rounded up; 0 while it is being tried; null when it is not, since only a user can mend what is wrong.
    pub retry_in_seconds: Option<u64>,
    /// What is wrong with its files (deleted, moved, cut off), and what to do about it: a line each.
    pub warnings: Vec<String>,
    /// Size of the clone, in bytes: that of the source.
    pub size: u64,
    /// In bytes.
    pub region_size: u64,
    pub nr_regions: u64,
    /// Regions whose copy is done; they are served from the destination.
    pub hydrated_regions: u64,
    /// Regions whose copy is in flight, background and on demand.
    pub hydrating_regions: u64,
    /// Requests and hydration are held, nothing is in flight, everything is committed: the devices can be copied.
    pub suspended: bool,
    /// On its way to be suspended: requests and hydration are held, what is in flight or the commit has not ended yet. Nothing
    /// may be concluded from that for the devices.
    pub suspending: bool,
    /// A resize is being carried out; while it is in force, requests and hydration are held.
    pub resizing: bool,
    pub hydration: HydrationStatus,
    pub features: Features,
    pub metadata: MetadataStatus,
    /// dm's event number, which `wait` looks at: how often the hydration was completed or the metadata mode got worse since
    /// the clone was started.
    pub event_nr: u64,
    /// How many events of any kind were raised since the clone was started.
    pub events: u64,
    /// The last event, in words; null when there was none.
    pub last_event: Option<String>,
    pub source: SourceStatus,
    /// Path of the destination.
    pub destination: String,
    pub nbd: NbdStatus,
    /// The block device; null when there is none.
    pub ublk: Option<UblkStatus>,
    pub io: IoCounters,
    pub shards: u32,
    /// Since the daemon started.
    pub uptime_seconds: u64,
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
}

/// Whether a clone runs. One that does not has nothing to tell of sizes and regions: they are 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CloneRunState {
    /// Its devices are being opened and checked.
    Starting,
    #[default]
    Running,
    /// It could not be started.
    Failed,
    /// It drains, to be removed.
    Removing,
}

impl fmt::Display for CloneRunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Removing => "removing",
        })
    }
}

/// The background copy.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HydrationStatus {
    /// False after `disable_hydration` and with `--no-hydration`.
    pub enabled: bool,
    /// The most regions in flight, as it was set; null is automatic, 0 stops hydration.
    pub threshold: Option<u32>,
    /// Regions copied together, as it was set; null is automatic.
    pub batch_size: Option<u32>,
    /// What is in force now: the set number, or what the automatic has found.
    pub threshold_effective: u32,
    pub batch_size_effective: u32,
    pub state: HydrationState,
    /// So many failures in a row stop it; 0: it never stops.
    pub failures_max: u32,
    /// Failures since a copy succeeded, the clone was started or the hydration was enabled.
    pub failures_in_a_row: u64,
    /// Bad regions: those that could not be copied, each tried alone, and that are not hydrated.
    pub failed_regions: u64,
    /// Which: the first runs of them, at most 32.
    pub failed_ranges: Vec<FailedRange>,
    /// Bad regions that are not in `failed_ranges`.
    pub failed_regions_more: u64,
    /// The newest failure of a copy, as long as there are bad regions, copies are held back because of it (a full destination,
    /// a lost source), or no copy succeeded since.
    pub last_failure: Option<CopyFailureStatus>,
    /// The bound of this clone alone, in bytes per second; null is none.
    pub rate: Option<u64>,
    /// The bound of all clones of the daemon together, in bytes per second; null is none.
    pub total_rate: Option<u64>,
    /// Weight among the clones of the daemon, 1 to 1000.
    pub priority: u32,
    /// Bytes hydrated per second, lately.
    pub bytes_per_second: u64,
    /// Until complete at that rate; null when unknown (paused, no rate yet).
    pub eta_seconds: Option<u64>,
}

/// Adjacent bad regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FailedRange {
    /// The first of them, counted from 0.
    pub first_region: u64,
    pub regions: u64,
    /// Where they begin, in bytes from the start of the device.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

/// Why a copy failed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyFailureStatus {
    /// In words.
    pub error: String,
    /// Linux's number for it; 5 is EIO.
    pub errno: i32,
}

/// What the hydration is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HydrationState {
    /// Copying.
    Running,
    /// Switched off.
    Paused,
    /// Enabled, with nothing to do at the moment: waiting for foreground I/O or for its next turn.
    #[default]
    Idle,
    /// Every region is hydrated, and committed.
    Complete,
    /// Waiting for the source to come back.
    SourceLost,
    /// The source came back as another one: nothing is copied until the clone is started again with the right one.
    SourceChanged,
    /// Copies fail (a bad sector, a failing destination): backing off between attempts.
    Failing,
    /// Too many failed in a row: nothing is copied in the background until `enable_hydration`. Clients are served.
    Stopped,
}

impl fmt::Display for HydrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Idle => "idle",
            Self::Complete => "complete",
            Self::SourceLost => "source lost",
            Self::SourceChanged => "source changed",
            Self::Failing => "failing",
            Self::Stopped => "stopped",
        })
    }
}

/// dm-clone's feature arguments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Features {
    /// Hydration is off at the moment: switched off, or stopped after failures. `enable_hydration` switches it on.
    pub no_hydration: bool,
    /// Discards are not passed down to the destination.
    pub no_discard_passdown: bool,
}

impl Features {
    /// The words of those that are set, in dm-clone's order.
    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        [(self.no_hydration, "no_hydration"), (self.no_discard_passdown, "no_discard_passdown")]
            .into_iter()
            .filter_map(|(set, word)| set.then_some(word))
    }
}

/// The metadata device.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MetadataStatus {
    /// Path of the metadata.
    pub path: String,
    pub mode: MetadataMode,
    /// Why the mode is not `rw`: what failed, and how; null when it is.
    pub error: Option<String>,
    /// Size of a metadata block, in bytes.
    pub block_size: u32,
    pub used_blocks: u64,
    pub total_blocks: u64,
    /// Counts commits.
    pub generation: u64,
}

/// dm-clone's metadata mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum MetadataMode {
    #[default]
    #[serde(rename = "rw")]
    ReadWrite,
    /// A commit failed: nothing that would need new metadata is accepted.
    #[serde(rename = "ro")]
    ReadOnly,
    /// No I/O is safe.
    Fail,
    /// The clone does not run.
    #[serde(rename = "unopened")]
    Unopened,
}

impl fmt::Display for MetadataMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadWrite => "rw",
            Self::ReadOnly => "ro",
            Self::Fail => "Fail",
            Self::Unopened => "not open",
        })
    }
}

/// Where the data comes from.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceStatus {
    /// The source as it was given: a path or an NBD URI.
    pub spec: String,
    pub state: SourceState,
    /// How often the connection was lost.
    pub losses: u64,
    /// How often it came back.
    pub reconnects: u64,
    /// For how long requests have been waiting for it and none was answered, in seconds; 0 when none waits.
    pub silent_seconds: u64,
}

/// A source that answers nothing for so long, in seconds, while requests wait for it, is said to be stalled. Disks that wake up and
/// servers under load take a second or two.
pub const SOURCE_STALLED_SECONDS: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    #[default]
    Connected,
    /// Connected, but requests have been waiting for [`SOURCE_STALLED_SECONDS`] or more and none was answered. When that goes on
    /// the connections are given up and made again.
    Stalled,
    /// Trying to reach it again.
    Lost,
    /// It came back as another one: nothing more is read from it, until the clone is started again.
    Changed,
    /// Let go: the hydration is complete and the source is not needed any more.
    Released,
    /// The clone does not run.
    Unopened,
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connected => "connected",
            Self::Stalled => "stalled",
            Self::Lost => "lost",
            Self::Changed => "changed",
            Self::Released => "released",
            Self::Unopened => "not open",
        })
    }
}

/// The block device of a clone.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UblkStatus {
    /// `/dev/ublkbN`.
    pub path: String,
    /// N.
    pub number: u32,
    /// In bytes: less than the clone's when that has grown and the kernel can't let the device grow too.
    pub size: u64,
    /// `/dev/mapper/NAME` above it, which is to be used; null when there is none.
    pub dm_path: Option<String>,
    /// Who uses it, in words; null when nobody was found, a second ago at most.
    pub used_by: Option<String>,
}

/// The NBD frontend.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NbdStatus {
    /// Where it listens: `unix:PATH` or `tcp:ADDR:PORT`.
    pub address: String,
    /// Name of the export; the empty name means it too.
    pub export: String,
    /// Clients connected now.
    pub connections: u32,
}

/// Counts since the daemon started. `*_bytes` are bytes, the others requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct IoCounters {
    pub reads: u64,
    pub writes: u64,
    pub trims: u64,
    pub write_zeroes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub trim_bytes: u64,
    pub write_zeroes_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Read from the source, for clients and for the hydration.
    pub source_read_bytes: u64,
    /// Of regions that were brought in from the source, its zeros included: not of copies that failed.
    pub hydrated_bytes: u64,
    /// Metadata commits.
    pub commits: u64,
}

/// The answer to `GET /v1/status`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct StatusList {
    pub clones: Vec<Status>,
}

/// Longest time that a question may wait for its answer, in seconds.
pub const WAIT_SECONDS_MAX: u64 = 25;

/// The answer to `GET /v1/events`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EventPage {
    /// Whose numbers these are: another one after a restart of the daemon.
    pub instance: String,
    #[serde(flatten)]
    pub page: Page,
}

/// The body of `POST /v1/clones/NAME/message`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MessageBody {
    pub message: String,
}

/// The body of `POST /v1/clones/NAME/suspend`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SuspendBody {
    /// Seconds that what is in flight gets to end, 1 to [`SUSPEND_SECONDS_MAX`]; null: the default.
    pub timeout: Option<u32>,
}

/// The longest time that suspending may wait, in seconds.
pub const SUSPEND_SECONDS_MAX: u32 = 3600;

/// The body of `POST /v1/clones/NAME/resize`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResizeBody {
    /// The new size in bytes; null: that of the source.
    pub size: Option<u64>,
    /// What is added reads as zeros, whatever the source has there.
    pub zeros: bool,
}

/// The body of `POST /v1/clones/NAME/remove`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemoveBody {
    /// Also when clients use it.
    pub force: bool,
}

/// The body of an answer that is an error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorText,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorText {
    /// [`crate::error::ErrorKind::name`].
    pub kind: String,
    pub message: String,
}

impl Status {
    /// dm-clone's status line (the kernel's Documentation/admin-guide/device-mapper/dm-clone.rst, "Status"), with
    /// the `START LENGTH TARGET` that `dmsetup status` puts before it. A clone whose size is not a multiple of a
    /// sector counts its last, partial sector.
    pub fn dm_line(&self) -> String {
        let sectors = self.size.div_ceil(SECTOR_SIZE);
        if self.metadata.mode == MetadataMode::Fail {
            return format!("0 {sectors} clone Fail");
        }
        let features: Vec<_> = self.features.words().collect();
        let mut features_text = features.len().to_string();
        for word in features {
            features_text.push(' ');
            features_text.push_str(word);
        }
        format!(
            "0 {sectors} clone {} {}/{} {} {}/{} {} {features_text} 4 hydration_threshold {} hydration_batch_size {} {}",
            u64::from(self.metadata.block_size) / SECTOR_SIZE,
            self.metadata.used_blocks,
            self.metadata.total_blocks,
            self.region_size / SECTOR_SIZE,
            self.hydrated_regions,
            self.nr_regions,
            self.hydrating_regions,
            self.hydration.threshold_effective,
            self.hydration.batch_size_effective,
            self.metadata.mode,
        )
    }

    /// Too many copies failed in a row: it does not go on by itself.
    pub fn is_hydration_stopped(&self) -> bool {
        self.hydration.state == HydrationState::Stopped
    }

    pub fn is_complete(&self) -> bool {
        self.hydration.state == HydrationState::Complete
    }

    /// How much is hydrated, from 0 to 1; rounded down, so that 1 means all.
    pub fn hydrated_fraction(&self) -> f64 {
        match self.nr_regions {
            0 => 0.0,
            all if self.hydrated_regions >= all => 1.0,
            all => (self.hydrated_regions as f64 / all as f64).min(0.9999),
        }
    }
}

/// What a clone can be told; dm-clone's messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    EnableHydration,
    DisableHydration,
    /// The most regions in flight; 0 stops the background copy.
    HydrationThreshold(u32),
    /// Regions copied together; 0 means 1.
    HydrationBatchSize(u32),
    /// The most bytes per second that are read to hydrate this clone; 0 means no bound. Not one of dm-clone's.
    HydrationRate(Option<HydrationRate>),
    /// So many failed copies in a row stop hydration; 0: it never stops. Not one of dm-clone's.
    HydrationFailuresMax(u32),
    /// The weight of this clone when it hydrates beside others. Not one of dm-clone's.
    Priority(Priority),
}

const MESSAGES: &str = "enable_hydration, disable_hydration, hydration_threshold N, hydration_batch_size N, \
                        hydration_rate BYTES_PER_SECOND, hydration_failures_max N or priority N";

impl Message {
    /// Reads a message by dm-clone's grammar: keywords in any case, and exactly one value for those that take one; for
    /// dm-clone's two a number in decimal, from 0 to 2^32-1. `Usage` names the bad word.
    pub fn from_words<S: AsRef<str>>(words: &[S]) -> Result<Self> {
        let Some((keyword, values)) = words.split_first() else {
            bail!(Usage, "empty message: use {MESSAGES}");
        };
        let keyword = keyword.as_ref();
        let one_value = |what: &str, bounds: &str| -> Result<&str> {
            match values {
                [] => bail!(Usage, "message {keyword} needs a {what}, {bounds}"),
                [value] => Ok(value.as_ref()),
                [_, extra, ..] => {
                    bail!(Usage, "message {keyword} takes one {what}: '{}' is too much", extra.as_ref().escape_debug())
                }
            }
        };
        let one_number = |bounds: RangeInclusive<u64>| -> Result<u32> {
            let bounds = format!("from {} to {}", bounds.start(), bounds.end());
            let value = one_value("number", &bounds)?;
            parse_number(value).ok_or_else(|| {
                let text = format!("message {keyword}: '{}' is not a number {bounds}", value.escape_debug());
                Error::new(ErrorKind::Usage, text)
            })
        };
        let any = 0..=u64::from(u32::MAX);
        let of_message = |error: Error| error.within(format!("message {keyword}"));
        let rate = || -> Result<Option<HydrationRate>> {
            let bounds = format!("from {} on, or 0 for no bound", ByteSize(RATE_MIN));
            let value = one_value("size in bytes per second", &bounds)?;
            let bytes = value.parse::<ByteSize>().map_err(|text| Error::new(ErrorKind::Usage, text));
            match bytes.map_err(of_message)?.0 {
                0 => Ok(None),
                bytes => HydrationRate::new(bytes).map(Some).map_err(of_message),
            }
        };
        let no_value = |message| match values {
            [] => Ok(message),
            [extra, ..] => {
                bail!(Usage, "message {keyword} takes no value: '{}' is too much", extra.as_ref().escape_debug())
            }
        };
        match keyword.to_ascii_lowercase().as_str() {
            "enable_hydration" => no_value(Self::EnableHydration),
            "disable_hydration" => no_value(Self::DisableHydration),
            "hydration_threshold" => one_number(any).map(Self::HydrationThreshold),
            "hydration_batch_size" => one_number(any).map(Self::HydrationBatchSize),
            "hydration_rate" => rate().map(Self::HydrationRate),
            "hydration_failures_max" => one_number(any).map(Self::HydrationFailuresMax),
            "priority" => {
                let weight = one_number(1..=u64::from(PRIORITY_MAX))?;
                Priority::new(u64::from(weight)).map(Self::Priority).map_err(of_message)
            }
            _ => bail!(Usage, "unknown message '{}': use {MESSAGES}", keyword.escape_debug()),
        }
    }
}

/// A number as dm-clone takes it: decimal digits only.
fn parse_number(word: &str) -> Option<u32> {
    (word.bytes().all(|b| b.is_ascii_digit())).then(|| word.parse().ok()).flatten()
}

impl FromStr for Message {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::from_words(&text.split_ascii_whitespace().collect::<Vec<_>>())
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnableHydration => f.write_str("enable_hydration"),
            Self::DisableHydration => f.write_str("disable_hydration"),
            Self::HydrationThreshold(n) => write!(f, "hydration_threshold {n}"),
            Self::HydrationBatchSize(n) => write!(f, "hydration_batch_size {n}"),
            Self::HydrationRate(rate) => {
                write!(f, "hydration_rate {}", rate.map_or(0, HydrationRate::bytes_per_second))
            }
            Self::HydrationFailuresMax(n) => write!(f, "hydration_failures_max {n}"),
            Self::Priority(priority) => write!(f, "priority {}", priority.weight()),
        }
    }
}

#[cfg(test)]
mod tests;
