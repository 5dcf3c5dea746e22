//! What a clone is made of and how it is to run, whoever says so: the command line now, a file later.
//!
//! Plain values that were checked for form; nothing here was opened or looked at. [`crate::cli`] fills it.

use crate::io_frontend::nbd::listen::NbdAddress;
use crate::units::RegionSize;
use std::fmt;
use std::path::PathBuf;
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
    /// Whether the background copy starts enabled.
    pub hydration: bool,
    /// Whether discards go down to the destination.
    pub discard_passdown: bool,
    /// The most regions in flight; `None` is automatic, 0 stops hydration.
    pub hydration_threshold: Option<u32>,
    /// Regions copied together; `None` is automatic.
    pub hydration_batch_size: Option<u32>,
    pub on_hydrated: OnHydrated,
    /// Where NBD clients connect.
    pub nbd: NbdAddress,
    /// Path of the control socket.
    pub control: PathBuf,
    /// How many; `None` is one for each CPU that the process may run on.
    pub shards: Option<u16>,
    /// How long reads wait for a lost source before they fail.
    pub source_timeout: Duration,
    /// Use a destination that holds something unknown.
    pub force: bool,
    /// Check everything, say what would be done, change nothing.
    pub dry_run: bool,
}

/// What to do when every region is hydrated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum OnHydrated {
    /// Go on serving.
    #[default]
    Stay,
    /// End when the last client is gone.
    Exit,
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
