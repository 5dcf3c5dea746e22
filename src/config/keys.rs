//! Every key of a configuration file: its type, bounds, default and meaning, as `docs/config.md` prints them.
//!
//! The names are those of [`super::spec`]'s structs, the bounds those of its types, the defaults those of its
//! `into_config`; tests hold all three, and that the page is what [`page`] writes.

use super::setting::{CPU_MAX, time_text};
use super::spec::{
    CloneSize, Failures, HydrationRate, IoMemory, MetricsInterval, Priority, Regions, Shards, SourceTimeout, Spin,
    UblkNumber,
};
use super::{NAME_LEN_MAX, file};
use crate::shard::copy_pool::IO_MEMORY_DEFAULT;
use crate::units::{ByteSize, REGION_SIZE_MAX, REGION_SIZE_MIN};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::forward_to_deserialize_any;
use std::fmt::{self, Write};

/// What a value looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// In bytes, from the first to the second.
    Size(u64, u64),
    /// As `Size`, a power of two.
    PowerOfTwo(u64, u64),
    Number(u32, u32),
    /// In microseconds.
    Time(u64, u64),
    Boolean,
    Path,
    /// One of these.
    OneOf(&'static [&'static str]),
    /// In words, for people.
    Other(&'static str),
}

/// What counts when a key is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absent {
    Required,
    /// As if this were written.
    Is(&'static str),
    /// In words.
    Says(&'static str),
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub default: Absent,
    pub meaning: &'static str,
}

const fn key(name: &'static str, kind: Kind, default: Absent, meaning: &'static str) -> Key {
    Key { name, kind, default, meaning }
}

/// A table and its keys.
pub struct Section {
    pub header: &'static str,
    pub about: &'static str,
    pub keys: &'static [Key],
}

use Absent::{Is, Required, Says};
use Kind::{Boolean, Number, OneOf, Other, Path, PowerOfTwo, Size, Time};

const RATE: Kind = Size(HydrationRate::MIN, HydrationRate::MAX);
const REGIONS: Kind = Number(Regions::MIN, Regions::MAX);
const _: () = assert!(IO_MEMORY_DEFAULT == 32 << 20, "as io_memory says below");
const NO_LIMIT: Absent = Says("no limit");

const DAEMON: &[Key] = &[
    key("shards", Number(Shards::MIN, Shards::MAX), Says("one per CPU of `cpus`"), "How many threads share the work."),
    key(
        "cpus",
        Other("CPUs: a text like `\"0-3,8\"`, or an array of numbers"),
        Says("those that the process may run on"),
        "The CPUs that shards are pinned to, in turn. Different ones.",
    ),
    key("control", Path, Says("`control` in the runtime directory"), "Path of the control socket, mode 0600."),
    key(
        "io_memory",
        Size(IoMemory::MIN, IoMemory::MAX),
        Says("`\"32MiB\"`"),
        "Memory that each shard may fill with source data while copying, all clones together.",
    ),
    key(
        "spin",
        Time(Spin::MIN, Spin::MAX),
        Is("\"0s\""),
        "How long an idle shard polls before it sleeps: costs CPU time, saves latency.",
    ),
    key("hydration_rate", RATE, NO_LIMIT, "Bytes per second that the background copy of all clones together may read."),
    key(
        "log",
        Other("`off`, `error`, `warn`, `info`, `debug`, `trace`, or by module as in `\"info,hydrant::source=debug\"`"),
        Is("\"info\""),
        "What to log to standard error. HYDRANT_LOG in the environment goes before it.",
    ),
];

const METRICS_DUMP: &[Key] = &[
    key("path", Path, Required, "The file that gets the metrics of all shards; replaced atomically."),
    key(
        "interval",
        Time(MetricsInterval::MIN, MetricsInterval::MAX),
        Says("only at SIGUSR1"),
        "How often it is written; at SIGUSR1 too.",
    ),
];

const CLONE: &[Key] = &[
    key(
        "name",
        Other("1 to 64 of `A-Z a-z 0-9 . _ -`, the first not `.` or `-`"),
        Required,
        "Name of the clone; different from those of all others of the daemon.",
    ),
    key(
        "source",
        Other("a path, `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`"),
        Required,
        "What to clone: a file, a block device or an NBD export. Never written.",
    ),
    key("destination", Path, Required, "Where the copy goes: a file (created when missing) or a block device."),
    key("metadata", Path, Required, "What is copied already: a file (created when missing) or a block device."),
    key(
        "region_size",
        PowerOfTwo(REGION_SIZE_MIN, REGION_SIZE_MAX),
        Says("that of the metadata; `\"64KiB\"` for a new clone"),
        "Unit of the copy. Fixed once the metadata is made.",
    ),
    key(
        "size",
        Size(CloneSize::MIN, CloneSize::MAX),
        Says("that of the metadata; all of the source for a new clone"),
        "How much is cloned, from the start of the source.",
    ),
    key("no_hydration", Boolean, Is("false"), "Start with the background copy switched off."),
    key("no_discard_passdown", Boolean, Is("false"), "Do not pass discards down to the destination."),
    key(
        "hydration_threshold",
        REGIONS,
        Says("automatic"),
        "The most regions being copied at a time; 0 stops the copy.",
    ),
    key(
        "hydration_batch_size",
        REGIONS,
        Says("automatic"),
        "How many adjacent regions are copied together, at most; 0 means 1.",
    ),
    key("hydration_rate", RATE, NO_LIMIT, "Bytes per second that the background copy of this clone may read."),
    key(
        "hydration_failures_max",
        Number(Failures::MIN, Failures::MAX),
        Is("100"),
        "So many copies that fail in a row, with none succeeding in between, stop the background copy until \
         `enable_hydration` or a restart; 0: it never stops. A source that is gone and a destination that is full are waited \
         for and do not count.",
    ),
    key(
        "priority",
        Number(Priority::MIN, Priority::MAX),
        Is("100"),
        "Weight of this clone's background copy among those of the daemon.",
    ),
    key(
        "on_hydrated",
        OneOf(&["stay", "exit", "remove", "linear"]),
        Is("\"stay\""),
        "When all is hydrated and the last client is gone: go on serving, end the daemon (unless another clone keeps it), \
         or remove the clone from it. `\"linear\"` is `hydrant finish`: `/dev/mapper/NAME` (`dm_name` of `[clone.ublk]`) is \
         handed over to the destination under whoever uses it, and the clone removed, as soon as no NBD client is connected.",
    ),
    key(
        "source_timeout",
        Time(SourceTimeout::MIN, SourceTimeout::MAX),
        Is("60"),
        "How long reads wait for a source that is gone before they fail.",
    ),
    key(
        "force",
        Boolean,
        Is("false"),
        "For one start: use a destination that holds something unknown (it is overwritten), and vouch for a source or \
         destination that is not the one the metadata know: they are recorded as those of the clone, and the ones before \
         are refused from then on. Not to stay in the file: it would let every mix-up pass.",
    ),
    key(
        "table",
        Other("a line of dm-clone's table: `0 LEN clone METADATA DESTINATION SOURCE REGION_SIZE ...`"),
        Says("the keys above say it"),
        "Instead of `source`, `destination`, `metadata`, `region_size`, `size`, `no_hydration`, `no_discard_passdown`, \
         `hydration_threshold` and `hydration_batch_size`, which it says all. LEN holds exactly, as in dm-clone: after \
         `hydrant resize` the clone starts again only with the LEN that it has grown to, which `hydrant table` prints.",
    ),
];

const CLONE_NBD: &[Key] = &[
    key(
        "address",
        Other("`unix:PATH`, `tcp:ADDR:PORT` or `none`"),
        Says("the socket `NAME.sock` in the runtime directory"),
        "Where NBD clients connect. Clones with the same address share it; clients choose by export name. Unix sockets are \
         for their owner only (mode 0600); with tcp everybody who can reach the port can read and write. \
         `none`: the clone is a block device only (`[clone.ublk]`).",
    ),
    key("export", Other("a name, as that of the clone"), Says("the clone's name"), "Name of the export."),
];

const CLONE_UBLK: &[Key] = &[
    key(
        "number",
        Number(UblkNumber::MIN, UblkNumber::MAX),
        Says("any that is free"),
        "N of `/dev/ublkbN`. A device that a daemon before this one left is taken over whatever its number.",
    ),
    key(
        "dm_name",
        Other("1 to 127 of `A-Z a-z 0-9 # + - . : = @ _`, the first not `-`"),
        Says("no device-mapper device"),
        "The clone is `/dev/mapper/NAME` too, a device-mapper device above `/dev/ublkbN`. Use that one: when all is hydrated \
         `hydrant finish` puts the destination, a block device, in the place of the clone while it stays mounted. Needs \
         device-mapper (`modprobe dm_mod`).",
    ),
];

/// All tables.
pub const SECTIONS: &[Section] = &[
    Section {
        header: "[daemon]",
        about: "How the daemon runs, whatever its clones are. In at most one file, and it may be left out.",
        keys: DAEMON,
    },
    Section {
        header: "[daemon.metrics_dump]",
        about: "A file for the metrics. Without this table there is none.",
        keys: METRICS_DUMP,
    },
    Section { header: "[[clone]]", about: "One clone; there may be many of them.", keys: CLONE },
    Section { header: "[clone.nbd]", about: "How NBD clients find the clone above it.", keys: CLONE_NBD },
    Section {
        header: "[clone.ublk]",
        about: "With this table, which may be empty, the clone above it is a block device `/dev/ublkbN` too (Linux 6.12 or \
                later with ublk, as root). It outlives a daemon that is killed or restarted while it is in use: the next one \
                takes it over.",
        keys: CLONE_UBLK,
    },
];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size(min, max) => write!(f, "size, {} to {}", ByteSize(*min), ByteSize(*max)),
            PowerOfTwo(min, max) => write!(f, "size, a power of two, {} to {}", ByteSize(*min), ByteSize(*max)),
            Number(min, max) => write!(f, "number, {min} to {max}"),
            Time(min, max) => write!(f, "time, {} to {}", time_text(*min), time_text(*max)),
            Boolean => f.write_str("`true` or `false`"),
            Path => f.write_str("path"),
            OneOf(words) => {
                let words: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
                f.write_str(&words.join(", "))
            }
            Other(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Required => f.write_str("**required**"),
            Is(value) => write!(f, "`{value}`"),
            Says(text) => f.write_str(text),
        }
    }
}

/// `docs/config.md`.
pub fn page() -> String {
    let mut page = format!(
        "<!-- Written by src/config/keys.rs; after a change there: HYDRANT_GOLDEN=write cargo test --lib config::keys -->

# Configuration files

`hydrant serve CONFIG.toml...` runs the clones of [TOML](https://toml.io) files, `hydrant create FILE.toml` adds the clones of \
a file to a daemon that runs, and `hydrant config check FILE...` says what files mean, or everything that is wrong with \
them. Examples are in [configs/](../configs). The keys are the options of `hydrant clone` with `_` for `-`; the same names \
are in the JSON body of `POST /v1/clones` of the control interface.

Several files are read as one. A file has at most {file_size} of UTF-8. A key that is not known is refused.

* A **size** is an integer (bytes), or a text: `65536` and `\"64KiB\"` are the same. KiB, MiB, GiB and TiB are known. A rate \
is a size per second.
* A **time** is an integer (seconds), or a text with a unit: `\"50us\"`, `\"2ms\"`, `\"10s\"`, `\"5min\"`, `\"1h\"`.
* A **path** that is relative starts from the directory of the file that it is written in; that holds for sources and \
`unix:` addresses too. The JSON body takes absolute paths only.
* A **name** has 1 to {NAME_LEN_MAX} characters. CPUs are numbered from 0 to {CPU_MAX}.
* The **runtime directory** is `$XDG_RUNTIME_DIR/hydrant`, or `/run/hydrant` without that variable.

Two clones can't have the same name, the same export at the same address, or a destination or metadata in common.

A clone needs up to 11 **open files** and 4 more for each shard, besides about 10 of the daemon, 7 for each shard and one for \
each NBD client: 100 clones on 4 shards need about 2800. The daemon raises its limit as far as it may, to the hard one: \
`ulimit -Hn` shows it, `LimitNOFILE=` sets it in a systemd unit.
",
        file_size = ByteSize(file::FILE_SIZE_MAX)
    );
    for section in SECTIONS {
        // Writing to a text can't fail.
        let _ = write!(page, "\n## `{}`\n\n{}\n\n", section.header, section.about);
        page.push_str("| key | type | default | meaning |\n|---|---|---|---|\n");
        for Key { name, kind, default, meaning } in section.keys {
            let _ = writeln!(page, "| `{name}` | {kind} | {default} | {meaning} |");
        }
    }
    page
}

/// The keys of a struct of [`super::spec`], as serde knows them.
pub fn fields_of<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(FieldsOnly) {
        Err(Fields(fields)) => fields,
        Ok(_) => &[],
    }
}

/// A deserializer that fails with the names of the fields it is asked for.
struct FieldsOnly;

#[derive(Debug)]
struct Fields(&'static [&'static str]);

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
impl std::error::Error for Fields {}
impl de::Error for Fields {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self(&[])
    }
}

impl<'de> Deserializer<'de> for FieldsOnly {
    type Error = Fields;
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Fields> {
        Err(Fields(fields))
    }
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fields> {
        Err(Fields(&[]))
    }
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests;
