//! What a configuration file (TOML) and the body of a create call (JSON) can say, in the names of the command line
//! with `_` for `-`. Everything may be left out here; [`CloneSpec::into_config`] and [`DaemonSpec::into_config`] fill
//! in defaults and say what is missing.
//!
//! [`super::keys`] says of each key what it means; a test holds the two together.

use super::fault::{Fault, Faults};
use super::node::{Table, read};
use super::same_file;
use super::setting::{Address, Count, CpuList, FilePath, LogWords, RegionSizeSetting, Size, Source, Time};
use super::{
    CloneConfig, CloneName, DaemonConfig, DmName, FAILURES_MAX_DEFAULT, HYDRATION_RATE_MAX, HYDRATION_RATE_MIN,
    IO_MEMORY_MAX, IO_MEMORY_MIN, METRICS_INTERVAL_MAX_MS, METRICS_INTERVAL_MIN_MS, MetricsDump, NbdConfig, OnHydrated,
    PRIORITY_DEFAULT, PRIORITY_MAX, SHARDS_MAX, SIZE_MAX, SOURCE_TIMEOUT_SECONDS_DEFAULT, SOURCE_TIMEOUT_SECONDS_MAX,
    SPIN_MAX_US, UBLK_NUMBER_MAX, UblkConfig,
};
use crate::bail;
use crate::dm_table::DmTable;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::runtime_dir::RuntimeDir;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

pub type Shards = Count<1, { SHARDS_MAX as u32 }>;
pub type IoMemory = Size<IO_MEMORY_MIN, IO_MEMORY_MAX>;
pub type Spin = Time<0, SPIN_MAX_US>;
pub type HydrationRate = Size<HYDRATION_RATE_MIN, HYDRATION_RATE_MAX>;
pub type MetricsInterval = Time<{ METRICS_INTERVAL_MIN_MS * 1000 }, { METRICS_INTERVAL_MAX_MS * 1000 }>;
pub type CloneSize = Size<1, SIZE_MAX>;
pub type Regions = Count<0, { u32::MAX }>;
pub type Failures = Count<0, { u32::MAX }>;
pub type UblkNumber = Count<0, UBLK_NUMBER_MAX>;
pub type Priority = Count<1, PRIORITY_MAX>;
pub type SourceTimeout = Time<0, { SOURCE_TIMEOUT_SECONDS_MAX as u64 * 1_000_000 }>;

/// `[daemon]`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct DaemonSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<Shards>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<CpuList>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<FilePath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_memory: Option<IoMemory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spin: Option<Spin>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hydration_rate: Option<HydrationRate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogWords>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_dump: Option<MetricsDumpSpec>,
}

/// `[daemon.metrics_dump]`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct MetricsDumpSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<FilePath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<MetricsInterval>,
}

/// `[[clone]]`, and the body of `POST /v1/clones`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct CloneSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<CloneName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<FilePath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<FilePath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_size: Option<RegionSizeSetting>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<CloneSize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_hydration: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_discard_passdown: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hydration_threshold: Option<Regions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hydration_batch_size: Option<Regions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hydration_rate: Option<HydrationRate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hydration_failures_max: Option<Failures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_hydrated: Option<OnHydrated>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_timeout: Option<SourceTimeout>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<DmTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd: Option<NbdSpec>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ublk: Option<UblkSpec>,
}

/// `[clone.nbd]`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct NbdSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<CloneName>,
}

/// `[clone.ublk]`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct UblkSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<UblkNumber>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dm_name: Option<DmName>,
}

impl DaemonSpec {
    /// Takes relative paths from `base`.
    pub fn relative_to(&mut self, base: &Path) {
        self.control.iter_mut().for_each(|path| path.relative_to(base));
        let dump = self.metrics_dump.iter_mut().flat_map(|dump| &mut dump.path);
        dump.for_each(|path| path.relative_to(base));
    }

    /// With defaults for what was not said.
    pub fn into_config(self, dir: &RuntimeDir) -> std::result::Result<DaemonConfig, Faults> {
        let metrics_dump = match self.metrics_dump {
            None => None,
            Some(MetricsDumpSpec { path: Some(path), interval }) => {
                Some(MetricsDump { path: path.0, interval: interval.map(Time::duration) })
            }
            Some(MetricsDumpSpec { path: None, .. }) => {
                let missing = "missing: the file that gets the metrics";
                return Err(Faults(vec![Fault::of("metrics_dump.path", missing)]));
            }
        };
        Ok(DaemonConfig {
            one_clone: false,
            // The type holds it below SHARDS_MAX, a u16.
            shards: self.shards.and_then(|count| u16::try_from(count.0).ok()),
            cpus: self.cpus.map(|list| list.0),
            control: self.control.map_or_else(|| dir.daemon_control_socket(), |path| path.0),
            io_memory: self.io_memory.map(|size| size.0),
            spin: self.spin.map_or(Duration::ZERO, Time::duration),
            hydration_rate: self.hydration_rate.map(|rate| rate.0),
            metrics_dump,
            log: self.log.map(|log| log.0),
        })
    }
}

impl CloneSpec {
    /// Reads the body of a create call. Paths must be absolute: the one who sends them has another working directory.
    pub fn from_json(body: &[u8]) -> Result<Self> {
        let object = match serde_json::from_slice(body) {
            Ok(serde_json::Value::Object(object)) => object,
            Ok(_) => bail!(Usage, "a clone is a JSON object"),
            Err(error) => bail!(Usage, "not JSON: {error}"),
        };
        let mut faults = Vec::new();
        let spec: Self = read(&Table::of_json(object), &mut faults);
        let relative = |key: &str, path: &Path| {
            let text = format!("expected an absolute path, found {}", super::fault::shown(&path.to_string_lossy()));
            path.is_relative().then(|| Fault::of(key, text))
        };
        faults.extend(spec.paths().iter().filter_map(|(key, path)| relative(key, path)));
        match faults.is_empty() {
            true => Ok(spec),
            false => {
                let error = Error::from(Faults(faults));
                Err(Error::new(ErrorKind::Usage, error.to_string()))
            }
        }
    }

    /// Every path in it, by key.
    fn paths(&self) -> Vec<(&'static str, std::path::PathBuf)> {
        let mut paths = Vec::new();
        paths.extend(self.source.as_ref().and_then(Source::path).map(|path| ("source", path)));
        paths.extend(self.destination.as_ref().map(|path| ("destination", path.0.clone())));
        paths.extend(self.metadata.as_ref().map(|path| ("metadata", path.0.clone())));
        if let Some(Address(NbdAddress::Unix(path))) = self.nbd.as_ref().and_then(|nbd| nbd.address.as_ref()) {
            paths.push(("nbd.address", path.clone()));
        }
        if let Some(table) = &self.table {
            paths.extend([("table", table.metadata()), ("table", table.destination())]);
            paths.extend(Source::parse(&table.source()).ok().and_then(|source| source.path()).map(|p| ("table", p)));
        }
        paths
    }

    /// Takes relative paths from `base`.
    pub fn relative_to(&mut self, base: &Path) -> std::result::Result<(), Faults> {
        self.destination.iter_mut().chain(&mut self.metadata).for_each(|path| path.relative_to(base));
        let mut faults = Vec::new();
        let mut note = |key: &str, result: std::result::Result<(), String>| {
            faults.extend(result.err().map(|text| Fault::of(key, text)));
        };
        note("source", self.source.as_mut().map_or(Ok(()), |source| source.relative_to(base)));
        note("table", self.table.as_mut().map_or(Ok(()), |table| table.relative_to(base)));
        let address = self.nbd.as_mut().and_then(|nbd| nbd.address.as_mut());
        note("nbd.address", address.map_or(Ok(()), |address| address.relative_to(base)));
        if faults.is_empty() { Ok(()) } else { Err(Faults(faults)) }
    }

    /// Keys that say what the table line says.
    fn given_beside_table(&self) -> Vec<&'static str> {
        let given = [
            ("source", self.source.is_some()),
            ("destination", self.destination.is_some()),
            ("metadata", self.metadata.is_some()),
            ("region_size", self.region_size.is_some()),
            ("size", self.size.is_some()),
            ("no_hydration", self.no_hydration.is_some()),
            ("no_discard_passdown", self.no_discard_passdown.is_some()),
            ("hydration_threshold", self.hydration_threshold.is_some()),
            ("hydration_batch_size", self.hydration_batch_size.is_some()),
        ];
        given.into_iter().filter_map(|(key, given)| given.then_some(key)).collect()
    }

    /// With defaults for what was not said. Fails when something is missing, or said twice.
    pub fn into_config(self, dir: &RuntimeDir) -> std::result::Result<CloneConfig, Faults> {
        let mut faults = Vec::new();
        let name = match self.name.clone() {
            Some(name) => name,
            None => {
                faults.push(Fault::of("name", "missing: the name of the clone"));
                CloneName::default()
            }
        };
        let twice = |key: &&'static str| Fault::of(key, "not beside 'table', which says it");
        match &self.table {
            Some(_) => faults.extend(self.given_beside_table().iter().map(twice)),
            None => {
                let missing = [
                    ("source", self.source.is_none(), "what to clone: a path or an NBD URI"),
                    ("destination", self.destination.is_none(), "the path that the copy goes to"),
                    ("metadata", self.metadata.is_none(), "the path that says what is copied already"),
                ];
                let missing = missing.into_iter().filter(|(_, missing, _)| *missing);
                faults.extend(missing.map(|(key, _, what)| Fault::of(key, format!("missing: {what}"))));
            }
        }
        let nbd = self.nbd.unwrap_or_default();
        let address = nbd.address.map_or_else(|| NbdAddress::Unix(dir.nbd_socket(&name)), |address| address.0);
        let mut config = CloneConfig {
            nbd: NbdConfig { address, export: nbd.export.unwrap_or_else(|| name.clone()) },
            ublk: self.ublk.map(|ublk| UblkConfig { number: ublk.number.map(|count| count.0), dm_name: ublk.dm_name }),
            name,
            source: self.source.map(|source| source.as_str().to_owned()).unwrap_or_default(),
            destination: self.destination.map(|path| path.0).unwrap_or_default(),
            metadata: self.metadata.map(|path| path.0).unwrap_or_default(),
            region_size: self.region_size.map(|size| size.0),
            size: self.size.map(|size| size.0),
            hydration: !self.no_hydration.unwrap_or_default(),
            discard_passdown: !self.no_discard_passdown.unwrap_or_default(),
            hydration_threshold: self.hydration_threshold.map(|count| count.0),
            hydration_batch_size: self.hydration_batch_size.map(|count| count.0),
            hydration_rate: self.hydration_rate.map(|rate| rate.0),
            hydration_failures_max: self.hydration_failures_max.map_or(FAILURES_MAX_DEFAULT, |count| count.0),
            priority: self.priority.map_or(PRIORITY_DEFAULT, |priority| priority.0),
            on_hydrated: self.on_hydrated.unwrap_or_default(),
            source_timeout: self
                .source_timeout
                .map_or(Duration::from_secs(SOURCE_TIMEOUT_SECONDS_DEFAULT.into()), Time::duration),
            force: self.force.unwrap_or_default(),
            table: None,
        };
        if let Some(table) = self.table {
            config.set_table(table);
        }
        faults.extend(config.shown_nowhere().map(|text| Fault::of("nbd.address", text)));
        faults.extend(config.linear_lacks_a_name().map(|text| Fault::of("on_hydrated", text)));
        if faults.is_empty() {
            faults.extend(config.given_twice(same_file::lexical).map(|(key, text)| Fault::of(key, text)));
        }
        if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
    }
}
