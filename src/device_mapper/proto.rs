//! device-mapper's ioctls as bytes, by the kernel's `include/uapi/linux/dm-ioctl.h`. Pure.
//!
//! ```text
//! struct dm_ioctl (312 bytes, numbers in the byte order of the machine)
//!   0 version u32[3] | 12 data_size u32 | 16 data_start u32 | 20 target_count u32 | 24 open_count i32 | 28 flags u32
//!  32 event_nr u32 | 36 padding u32 | 40 dev u64 | 48 name[128] | 176 uuid[129] | 305 data[7]
//! from data_start on, for each target: struct dm_target_spec (40 bytes), its parameters, zeros up to the next
//!   0 sector_start u64 | 8 length u64 | 16 status i32 | 20 next u32 | 24 target_type[16]
//! ```
//!
//! `next` of a table that is loaded counts from the start of its own spec; of a table that is read from `data_start`.

use std::fmt;
use std::str::FromStr;

/// `sizeof(struct dm_ioctl)`.
pub const HEADER_BYTES: usize = 312;
/// `sizeof(struct dm_target_spec)`.
const SPEC_BYTES: usize = 40;
/// `DM_NAME_LEN`, with its zero.
const NAME_BYTES: usize = 128;
/// `DM_UUID_LEN`, with its zero.
const UUID_BYTES: usize = 129;
/// `DM_MAX_TYPE_NAME`, with its zero.
const TYPE_BYTES: usize = 16;
const TARGET_COUNT_OFFSET: usize = 20;
const OPEN_COUNT_OFFSET: usize = 24;
const FLAGS_OFFSET: usize = 28;
const EVENT_NR_OFFSET: usize = 32;
const DEV_OFFSET: usize = 40;
const NAME_OFFSET: usize = 48;
const UUID_OFFSET: usize = 176;
/// What is asked for: any 4.x kernel does all of this, but for [`Flags::DEFERRED_REMOVE`], which is of 4.27 (Linux 3.13).
const VERSION: [u32; 3] = [4, 27, 0];
/// Room for the answers to questions about a table; ours have one target.
pub const ANSWER_BYTES: usize = 16 << 10;
/// Longest name of a device: `DM_NAME_LEN` without its zero.
pub const NAME_LEN_MAX: usize = NAME_BYTES - 1;

/// Set in the event number of a command that makes uevents, this tells udev's rules that the event is a real one (of
/// libdevmapper.h: `DM_UDEV_PRIMARY_SOURCE_FLAG << DM_UDEV_FLAGS_SHIFT`). Without it they make no `/dev/mapper/NAME`.
pub const UDEV_PRIMARY_SOURCE: u32 = 0x0040 << 16;

bitflags::bitflags! {
    /// `DM_*_FLAG`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Flags: u32 {
        /// In: suspend and not resume. Out: is suspended.
        const SUSPEND = 1 << 1;
        /// The table is asked for, and not its targets' status.
        const STATUS_TABLE = 1 << 4;
        const ACTIVE_PRESENT = 1 << 5;
        const INACTIVE_PRESENT = 1 << 6;
        /// The answer did not fit.
        const BUFFER_FULL = 1 << 8;
        /// File systems on it are not frozen.
        const SKIP_LOCKFS = 1 << 10;
        const NOFLUSH = 1 << 11;
        /// What is asked is about the table that was loaded and is not in force.
        const QUERY_INACTIVE_TABLE = 1 << 12;
        /// In: remove it when its last user is gone. Out: this is going to happen.
        const DEFERRED_REMOVE = 1 << 17;
    }
}

/// The commands that are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    Version,
    Create,
    Remove,
    /// Resumes, without [`Flags::SUSPEND`]: with a table that was loaded it suspends, exchanges the table and resumes.
    Suspend,
    Status,
    TableLoad,
    TableClear,
    TableStatus,
}

impl Command {
    /// `_IOWR(0xfd, n, struct dm_ioctl)`: the same bits on every architecture, as both directions are set.
    pub const fn request(self) -> u32 {
        let number = match self {
            Command::Version => 0,
            Command::Create => 3,
            Command::Remove => 4,
            Command::Suspend => 6,
            Command::Status => 7,
            Command::TableLoad => 9,
            Command::TableClear => 10,
            Command::TableStatus => 12,
        };
        3 << 30 | (HEADER_BYTES as u32) << 16 | 0xfd << 8 | number
    }

    /// The kernel's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Command::Version => "VERSION",
            Command::Create => "DEV_CREATE",
            Command::Remove => "DEV_REMOVE",
            Command::Suspend => "DEV_SUSPEND",
            Command::Status => "DEV_STATUS",
            Command::TableLoad => "TABLE_LOAD",
            Command::TableClear => "TABLE_CLEAR",
            Command::TableStatus => "TABLE_STATUS",
        }
    }
}

/// The number of a block device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Number {
    pub major: u32,
    pub minor: u32,
}

impl Number {
    /// The kernel's `huge_decode_dev`.
    fn decode(dev: u64) -> Self {
        let (major, minor) = (dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xf_ff00);
        Self { major: major as u32, minor: minor as u32 }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for Number {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(drop)?, minor: minor.parse().map_err(drop)? })
    }
}

/// One line of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// In sectors of 512 bytes.
    pub start: u64,
    pub len: u64,
    pub kind: String,
    pub parameters: String,
}

impl Target {
    /// All of a device of so many sectors is `device`, from its start.
    pub fn linear(sectors: u64, device: Number) -> Self {
        Self { start: 0, len: sectors, kind: "linear".into(), parameters: format!("{device} 0") }
    }

    /// Every request fails.
    pub fn error(sectors: u64) -> Self {
        Self { start: 0, len: sectors, kind: "error".into(), parameters: String::new() }
    }

    /// The device that it shows, when it is as [`Self::linear`] makes it.
    pub fn whole_linear(&self) -> Option<Number> {
        let device = self.parameters.strip_suffix(" 0").filter(|_| self.kind == "linear" && self.start == 0)?;
        device.parse().ok()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.start, self.len, self.kind, self.parameters)
    }
}

/// Which device a command is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which<'a> {
    None,
    Name(&'a str),
    Uuid(&'a str),
    /// A new one.
    Both {
        name: &'a str,
        uuid: &'a str,
    },
}

/// What the kernel says of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Info {
    pub name: String,
    pub uuid: String,
    pub number: Number,
    pub open_count: i32,
    pub flags: Flags,
    target_count: u32,
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A text with a zero behind it; `None` when it does not fit, or has a zero in it.
fn put_text(bytes: &mut [u8], at: usize, room: usize, text: &str) -> Option<()> {
    if text.len() >= room || text.contains('\0') {
        return None;
    }
    put(bytes, at, text.as_bytes());
    Some(())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|part| u32::from_ne_bytes(*part))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|part| u64::from_ne_bytes(*part))
}

fn text_at(bytes: &[u8], at: usize, room: usize) -> Option<String> {
    let bytes = bytes.get(at..bytes.len().min(at.checked_add(room)?))?;
    let text = bytes.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

/// What a command takes, at least `room` bytes long. `None`: a text is too long.
pub fn encode(which: Which<'_>, flags: Flags, event_nr: u32, table: &[Target], room: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    for (at, part) in VERSION.iter().enumerate() {
        put(&mut bytes, at * 4, &part.to_ne_bytes());
    }
    put(&mut bytes, 16, &(HEADER_BYTES as u32).to_ne_bytes());
    put(&mut bytes, TARGET_COUNT_OFFSET, &u32::try_from(table.len()).ok()?.to_ne_bytes());
    put(&mut bytes, FLAGS_OFFSET, &flags.bits().to_ne_bytes());
    put(&mut bytes, EVENT_NR_OFFSET, &event_nr.to_ne_bytes());
    let (name, uuid) = match which {
        Which::None => ("", ""),
        Which::Name(name) => (name, ""),
        Which::Uuid(uuid) => ("", uuid),
        Which::Both { name, uuid } => (name, uuid),
    };
    put_text(&mut bytes, NAME_OFFSET, NAME_BYTES, name)?;
    put_text(&mut bytes, UUID_OFFSET, UUID_BYTES, uuid)?;
    for target in table {
        let len = (SPEC_BYTES + target.parameters.len() + 1).next_multiple_of(8);
        let mut spec = vec![0; len];
        put(&mut spec, 0, &target.start.to_ne_bytes());
        put(&mut spec, 8, &target.len.to_ne_bytes());
        put(&mut spec, 20, &u32::try_from(len).ok()?.to_ne_bytes());
        put_text(&mut spec, 24, TYPE_BYTES, &target.kind)?;
        put_text(&mut spec, SPEC_BYTES, len - SPEC_BYTES, &target.parameters)?;
        bytes.append(&mut spec);
    }
    bytes.resize(bytes.len().max(room), 0);
    let len = u32::try_from(bytes.len()).ok()?;
    put(&mut bytes, 12, &len.to_ne_bytes());
    Some(bytes)
}

/// What the kernel has made of it. `None`: it is no answer.
pub fn decode(bytes: &[u8]) -> Option<Info> {
    bytes.get(..HEADER_BYTES)?;
    Some(Info {
        name: text_at(bytes, NAME_OFFSET, NAME_BYTES)?,
        uuid: text_at(bytes, UUID_OFFSET, UUID_BYTES)?,
        number: Number::decode(u64_at(bytes, DEV_OFFSET)?),
        open_count: u32_at(bytes, OPEN_COUNT_OFFSET)?.cast_signed(),
        flags: Flags::from_bits_retain(u32_at(bytes, FLAGS_OFFSET)?),
        target_count: u32_at(bytes, TARGET_COUNT_OFFSET)?,
    })
}

/// The table in an answer to [`Command::TableStatus`]. `None`: it is none, or did not fit.
pub fn decode_table(bytes: &[u8]) -> Option<Vec<Target>> {
    let info = decode(bytes)?;
    if info.flags.contains(Flags::BUFFER_FULL) {
        return None;
    }
    let data = bytes.get(u32_at(bytes, 16)? as usize..)?;
    let (mut at, mut table) = (0, Vec::new());
    for _ in 0..info.target_count {
        let next = u32_at(data, at + 20)? as usize;
        table.push(Target {
            start: u64_at(data, at)?,
            len: u64_at(data, at + 8)?,
            kind: text_at(data, at + 24, TYPE_BYTES)?,
            parameters: text_at(data, at + SPEC_BYTES, next.checked_sub(at + SPEC_BYTES)?)?,
        });
        at = next;
    }
    Some(table)
}

#[cfg(test)]
mod tests;
