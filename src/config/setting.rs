//! The values of settings: sizes, counts, times, paths, lists of CPUs. Each knows its bounds and says, when it is given
//! something else, what it expects.
//!
//! They are what a configuration file (TOML) and the control interface (JSON) are made of; both write them alike.

use super::CloneName;
use super::fault::{nearest, shown};
use crate::device_mapper::nodes::DmName;
use crate::dm_table::DmTable;
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::source::uri::SourceSpec;
use crate::units::{ByteSize, REGION_SIZE_MAX, REGION_SIZE_MIN, RegionSize};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Unexpected, Visitor};
use serde::ser::{Error as _, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest number of a CPU: that of the largest Linux (NR_CPUS 8192).
pub const CPU_MAX: usize = 8191;

/// A number of bytes: an integer, or a text like `64KiB`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size<const MIN: u64, const MAX: u64>(pub u64);

impl<const MIN: u64, const MAX: u64> Size<MIN, MAX> {
    pub const MIN: u64 = MIN;
    pub const MAX: u64 = MAX;
}

impl<const MIN: u64, const MAX: u64> fmt::Display for Size<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ByteSize(self.0).fmt(f)
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Size<MIN, MAX> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(self.0)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Size<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reads<const MIN: u64, const MAX: u64>;
        impl<const MIN: u64, const MAX: u64> Visitor<'_> for Reads<MIN, MAX> {
            type Value = Size<MIN, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a size from {} to {}, in bytes or like \"64KiB\"", ByteSize(MIN), ByteSize(MAX))
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Self::Value, E> {
                match (MIN..=MAX).contains(&bytes) {
                    true => Ok(Size(bytes)),
                    false => Err(E::invalid_value(Unexpected::Other(&ByteSize(bytes).to_string()), &self)),
                }
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let size: ByteSize = text.parse().map_err(|_| E::invalid_value(Unexpected::Str(text), &self))?;
                self.visit_u64(size.0)
            }
        }
        from.deserialize_any(Reads)
    }
}

/// A whole number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Count<const MIN: u32, const MAX: u32>(pub u32);

impl<const MIN: u32, const MAX: u32> Count<MIN, MAX> {
    pub const MIN: u32 = MIN;
    pub const MAX: u32 = MAX;
}

impl<const MIN: u32, const MAX: u32> Serialize for Count<MIN, MAX> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(self.0)
    }
}

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Count<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reads<const MIN: u32, const MAX: u32>;
        impl<const MIN: u32, const MAX: u32> Visitor<'_> for Reads<MIN, MAX> {
            type Value = Count<MIN, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a number from {MIN} to {MAX}")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
                match u32::try_from(number) {
                    Ok(fits) if (MIN..=MAX).contains(&fits) => Ok(Count(fits)),
                    _ => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
                }
            }
        }
        from.deserialize_any(Reads)
    }
}

const MICROSECOND: u64 = 1;
const MILLISECOND: u64 = 1000;
const SECOND: u64 = 1_000_000;
/// Units of time and what they are in microseconds, the largest first.
const TIME_UNITS: [(&str, u64); 5] =
    [("h", 3600 * SECOND), ("min", 60 * SECOND), ("s", SECOND), ("ms", MILLISECOND), ("us", MICROSECOND)];

/// A number of microseconds as people write it: `50us`, `2ms`, `10s`, `5min`, `1h`; whole numbers only.
pub fn time_text(microseconds: u64) -> String {
    if microseconds == 0 {
        return "0s".into();
    }
    let (name, unit) = TIME_UNITS.iter().find(|(_, unit)| microseconds.is_multiple_of(*unit)).unwrap_or(&("us", 1));
    format!("{}{name}", microseconds / unit)
}

/// The microseconds of a text that [`time_text`] could have written.
fn parse_time(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).filter(|digits| *digits > 0)?;
    let (_, unit) = TIME_UNITS.iter().find(|(name, _)| *name == &text[digits..])?;
    text[..digits].parse::<u64>().ok()?.checked_mul(*unit)
}

/// A time, with bounds in microseconds: a text like `50us`, `2ms`, `10s`, `5min`, `1h`, or an integer: seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Time<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Time<MIN, MAX> {
    pub const MIN: u64 = MIN;
    pub const MAX: u64 = MAX;

    pub const fn duration(self) -> Duration {
        Duration::from_micros(self.0)
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Time<MIN, MAX> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&time_text(self.0))
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Time<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reads<const MIN: u64, const MAX: u64>;
        impl<const MIN: u64, const MAX: u64> Reads<MIN, MAX> {
            fn bounded<E: de::Error>(self, microseconds: Option<u64>, found: Unexpected) -> Result<Time<MIN, MAX>, E> {
                match microseconds {
                    Some(time) if (MIN..=MAX).contains(&time) => Ok(Time(time)),
                    _ => Err(E::invalid_value(found, &self)),
                }
            }
        }
        impl<const MIN: u64, const MAX: u64> Visitor<'_> for Reads<MIN, MAX> {
            type Value = Time<MIN, MAX>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a time from {} to {}, in seconds or like \"50us\", ", time_text(MIN), time_text(MAX))?;
                f.write_str("\"2ms\", \"10s\", \"5min\" or \"1h\"")
            }
            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Self::Value, E> {
                self.bounded(seconds.checked_mul(SECOND), Unexpected::Unsigned(seconds))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                self.bounded(parse_time(text), Unexpected::Str(text))
            }
        }
        from.deserialize_any(Reads)
    }
}

/// Reads a text by a function whose errors are for people, and say all.
struct ReadsText<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for ReadsText<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.expected)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

/// Gives a type that is made of a text its way to and from serde.
macro_rules! text_setting {
    ($type:ty, $expected:expr, $parse:expr, $show:expr) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(ReadsText { expected: $expected, parse: $parse })
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let show: fn(&Self) -> Option<String> = $show;
                let text = show(self).ok_or_else(|| S::Error::custom("a path that is not UTF-8 can't be written"))?;
                to.serialize_str(&text)
            }
        }
    };
}
/// A region size, written like any size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionSizeSetting(pub RegionSize);

impl Serialize for RegionSizeSetting {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(self.0.bytes())
    }
}

impl<'de> Deserialize<'de> for RegionSizeSetting {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let size = Size::<REGION_SIZE_MIN, REGION_SIZE_MAX>::deserialize(from)?;
        RegionSize::new(size.0)
            .map(Self)
            .map_err(|_| de::Error::custom(format_args!("expected a power of two from 4KiB to 1GiB, found {size}")))
    }
}

text_setting!(CloneName, "a name", |text| text.parse(), |name| Some(name.as_str().into()));
text_setting!(DmName, "a device-mapper name", |text| text.parse(), |name| Some(name.as_str().into()));
text_setting!(DmTable, "a line of dm-clone's table", |text| text.parse(), |table| Some(table.to_string()));

/// A path of the file system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilePath(pub PathBuf);

fn path_of(text: &str) -> Result<FilePath, String> {
    match text {
        "" => Err("expected a path, found nothing".into()),
        text if text.contains('\0') => Err("expected a path, found one with a NUL".into()),
        text => Ok(FilePath(text.into())),
    }
}
text_setting!(FilePath, "a path", path_of, |path| path.0.to_str().map(String::from));

impl FilePath {
    pub fn relative_to(&mut self, base: &Path) {
        self.0 = base.join(&self.0);
    }
}

/// What `source` names: a path or an NBD URI, checked for its form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source(String);

text_setting!(
    Source,
    "a path, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    |text| Source::parse(text),
    |source| Some(source.0.clone())
);

impl Source {
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains('\0') {
            return Err("a source can't have a NUL in it".into());
        }
        text.parse::<SourceSpec>().map(|_| Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path, when it is one.
    pub fn path(&self) -> Option<PathBuf> {
        match self.0.parse() {
            Ok(SourceSpec::File(path)) => Some(path),
            _ => None,
        }
    }

    /// Fails when `base` is needed and is not UTF-8: a source is a text.
    pub fn relative_to(&mut self, base: &Path) -> Result<(), String> {
        let Some(path) = self.path() else { return Ok(()) };
        let joined = base.join(path);
        match joined.to_str() {
            Some(text) => self.0 = text.into(),
            None => return Err(format!("{} is not UTF-8: give an absolute path", joined.display())),
        }
        Ok(())
    }
}

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address(pub NbdAddress);

text_setting!(
    Address,
    "unix:PATH, tcp:ADDR:PORT or none",
    |text| text.parse().map(Address),
    |address| match &address.0 {
        NbdAddress::Unix(path) => path.to_str().map(|path| format!("unix:{path}")),
        tcp => Some(tcp.to_string()),
    }
);

impl Address {
    /// Fails when the path becomes too long for a socket.
    pub fn relative_to(&mut self, base: &Path) -> Result<(), String> {
        let NbdAddress::Unix(path) = &self.0 else { return Ok(()) };
        let joined = base.join(path);
        let text = joined.to_str().ok_or_else(|| format!("{} is not UTF-8", joined.display()))?;
        self.0 = format!("unix:{text}").parse()?;
        Ok(())
    }
}

/// What to log, in the words of HYDRANT_LOG.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogWords(pub String);

/// What is accepted: the levels, off among them, alone or after MODULE=. To the parser of HYDRANT_LOG a word alone that
/// is no level is a module; a mistyped level would silence everything, so it is refused here.
const LOG_EXPECTED: &str = "off, error, warn, info, debug or trace, or by module as in \"info,hydrant::source=debug\"";
const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

fn log_words(text: &str) -> Result<LogWords, String> {
    let wrong = |why: String| Err(format!("expected {LOG_EXPECTED}: {why}"));
    // What is behind a slash filters by text.
    let directives = text.split('/').next().unwrap_or_default();
    let mut directives = directives.split(',').map(str::trim).filter(|directive| !directive.is_empty()).peekable();
    if directives.peek().is_none() {
        return wrong("nothing is said".into());
    }
    for directive in directives {
        let (module, level) = directive.split_once('=').unwrap_or(("all", directive));
        if module.trim().is_empty() {
            return wrong(format!("{} names no module", shown(directive)));
        }
        if !LOG_LEVELS.contains(&level.trim().to_ascii_lowercase().as_str()) {
            let advice = nearest(level.trim(), &LOG_LEVELS).map(|near| format!(", did you mean '{near}'?"));
            return wrong(format!("{} is not a level{}", shown(level), advice.unwrap_or_default()));
        }
    }
    match env_filter::Builder::new().try_parse(text) {
        Ok(_) => Ok(LogWords(text.into())),
        Err(error) => wrong(format!("{}: {error}", shown(text))),
    }
}
text_setting!(LogWords, LOG_EXPECTED, log_words, |log| Some(log.0.clone()));

/// CPUs, by number: a text like `0-3,8`, or an array of numbers. Different ones, at least one, in this order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuList(pub Vec<usize>);

impl CpuList {
    fn add(&mut self, cpu: u64) -> Result<(), String> {
        let fits = usize::try_from(cpu).ok().filter(|cpu| *cpu <= CPU_MAX);
        let cpu = fits.ok_or_else(|| format!("number {cpu}"))?;
        if self.0.contains(&cpu) {
            return Err(format!("{cpu} twice"));
        }
        self.0.push(cpu);
        Ok(())
    }

    fn parse(text: &str) -> Result<Self, String> {
        let bad = || shown(text);
        let number = |digits: &str| match digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse::<u64>().map_err(|_| bad()),
            false => Err(bad()),
        };
        let mut list = Self::default();
        for part in text.split(',').map(str::trim) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if last < first || last > CPU_MAX as u64 {
                return Err(bad());
            }
            (first..=last).try_for_each(|cpu| list.add(cpu))?;
        }
        Ok(list)
    }
}

/// One of a list.
struct CpuNumber(u64);

impl<'de> Deserialize<'de> for CpuNumber {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reads;
        impl Visitor<'_> for Reads {
            type Value = CpuNumber;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "the number of a CPU, 0 to {CPU_MAX}")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<CpuNumber, E> {
                Ok(CpuNumber(number))
            }
        }
        from.deserialize_any(Reads)
    }
}

impl Serialize for CpuList {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(to)
    }
}

impl<'de> Deserialize<'de> for CpuList {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reads;
        impl<'de> Visitor<'de> for Reads {
            type Value = CpuList;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "different CPUs from 0 to {CPU_MAX}, like \"0-3,8\" or [0, 1]")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<CpuList, E> {
                CpuList::parse(text).map_err(|found| E::invalid_value(Unexpected::Other(&found), &self))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<CpuList, A::Error> {
                let mut list = CpuList::default();
                while let Some(CpuNumber(cpu)) = items.next_element()? {
                    list.add(cpu).map_err(|found| de::Error::invalid_value(Unexpected::Other(&found), &self))?;
                }
                match list.0.is_empty() {
                    true => Err(de::Error::invalid_value(Unexpected::Other("none"), &self)),
                    false => Ok(list),
                }
            }
        }
        from.deserialize_any(Reads)
    }
}
