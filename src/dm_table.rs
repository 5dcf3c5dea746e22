//! dm-clone's table line: its grammar, its words for what is wrong, and the line of a running clone.
//!
//! ```text
//! 0 LEN clone METADATA DESTINATION SOURCE REGION_SIZE [#FEATURES FEATURE...] [#CORE KEY VALUE...]
//! ```
//! LEN and REGION_SIZE are in sectors. Follows the Linux kernel's `dm-table.c` (`dm_split_args`: words are separated by
//! white space, a backslash takes the next character as it is; `dm_read_arg`: decimal digits only) and
//! `dm-clone-target.c` (features `no_hydration`, `no_discard_passdown`; core arguments `hydration_threshold`,
//! `hydration_batch_size`; all in any case; what is given twice counts as it was given last; words after the core
//! arguments mean nothing; numbers by `kstrtouint`).
//!
//! An error begins with the kernel's words, so that who looks for them finds them, and goes on with what is wrong.
//! Where the kernel's arithmetic wraps at 32 bits (a region size of 4294967304 is 8 to it), the line is refused, and
//! there is no limit of 2^31 regions. A device is a path, `MAJOR:MINOR` as the kernel prints it, or (the source) an NBD
//! URI.
//!
//! Pure: text in, text out. What is wrong with the devices themselves is found when they are opened; [`words`] has what
//! dm-clone calls that.

use crate::units::{DEVICE_SIZE_MAX, REGION_SIZE_MAX, REGION_SIZE_MIN, RegionSize, SECTOR_SIZE};
use crate::version::Version;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The name of the target.
pub const TARGET: &str = "clone";
/// dm-clone's version whose table, status and messages are understood.
pub const TARGET_VERSION: Version = Version(1, 0, 0);

/// What the kernel says. Those of the devices are put before the detail by who opens them.
pub mod words {
    pub const GAP: &str = "Gap in table";
    pub const ZERO_LENGTH: &str = "zero-length target";
    pub const TOO_LARGE: &str = "too large device";
    pub const UNKNOWN_TARGET: &str = "unknown target type";
    /// dmsetup's, for what is not START LEN TYPE.
    pub const INVALID_FORMAT: &str = "Invalid format on line 1 of table";
    pub const ARGUMENT_COUNT: &str = "Invalid number of arguments";
    pub const REGION_SIZE: &str = "Invalid region size";
    pub const NOT_POWER_OF_2: &str = "Region size is not a power of 2";
    pub const FEATURE_COUNT: &str = "Invalid number of feature arguments";
    pub const FEATURE: &str = "Invalid feature argument";
    pub const CORE_COUNT: &str = "Invalid number of core arguments";
    pub const CORE_ODD: &str = "Number of core arguments must be even";
    pub const CORE: &str = "Invalid core argument";
    pub const THRESHOLD: &str = "Invalid value for argument `hydration_threshold'";
    pub const BATCH_SIZE: &str = "Invalid value for argument `hydration_batch_size'";

    pub const OPENING_METADATA: &str = "Error opening metadata device";
    pub const OPENING_DESTINATION: &str = "Error opening destination device";
    pub const OPENING_SOURCE: &str = "Error opening source device";
    pub const LARGER_THAN_DESTINATION: &str = "Device size larger than destination device";
    pub const LARGER_THAN_SOURCE: &str = "Device size larger than source device";
    pub const NOT_BLOCK_MULTIPLE: &str = "Region size is not a multiple of device logical block size";
    pub const OTHER_GEOMETRY: &str = "Region and/or target size don't match the ones in metadata";
    pub const LOADING: &str = "Failed to load metadata";
}

pub const NO_HYDRATION: &str = "no_hydration";
pub const NO_DISCARD_PASSDOWN: &str = "no_discard_passdown";
pub const HYDRATION_THRESHOLD: &str = "hydration_threshold";
pub const HYDRATION_BATCH_SIZE: &str = "hydration_batch_size";

/// Most feature arguments.
const FEATURES_MAX: usize = 2;
/// Most core arguments, keys and values.
const CORE_MAX: usize = 4;
/// Arguments that must be there: three devices and the region size.
const ARGUMENTS_MIN: usize = 4;
/// Largest target: what [`crate::units::Geometry`] can hold, in sectors.
const LEN_MAX: u64 = (DEVICE_SIZE_MAX - REGION_SIZE_MAX) / SECTOR_SIZE;
/// How much of a wrong word is repeated, in characters.
const SHOWN_MAX: usize = 60;

/// A table line that was understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DmTable {
    /// In sectors, 1 to 2^54 or so.
    len: u64,
    metadata: String,
    destination: String,
    source: String,
    region_size: RegionSize,
    /// The words from the region size on, as they were given.
    arguments: Vec<String>,
    features: Features,
    core: Core,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Features {
    no_hydration: bool,
    no_discard_passdown: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Core {
    threshold: Option<u32>,
    batch_size: Option<u32>,
}

impl DmTable {
    /// Of the clone, in bytes; see [`Self::is_len_of`] for one that exists.
    pub fn size(&self) -> u64 {
        self.len * SECTOR_SIZE
    }
    pub fn region_size(&self) -> RegionSize {
        self.region_size
    }
    /// Whether LEN is that of a clone of `size` bytes, whose last sector may not be whole.
    pub fn is_len_of(&self, size: u64) -> bool {
        self.len == size.div_ceil(SECTOR_SIZE)
    }
    /// The same for a clone that has grown to `size` bytes since.
    pub fn grown_to(&self, size: u64) -> Self {
        Self { len: size.div_ceil(SECTOR_SIZE), ..self.clone() }
    }
    pub fn metadata(&self) -> PathBuf {
        device_path(&self.metadata)
    }
    pub fn destination(&self) -> PathBuf {
        device_path(&self.destination)
    }
    /// A path or an NBD URI.
    pub fn source(&self) -> String {
        match is_device_number(&self.source) {
            true => device_path(&self.source).to_string_lossy().into_owned(),
            false => self.source.clone(),
        }
    }
    pub fn no_hydration(&self) -> bool {
        self.features.no_hydration
    }
    pub fn no_discard_passdown(&self) -> bool {
        self.features.no_discard_passdown
    }
    /// `None` when the line does not say.
    pub fn hydration_threshold(&self) -> Option<u32> {
        self.core.threshold
    }
    /// `None` when the line does not say.
    pub fn hydration_batch_size(&self) -> Option<u32> {
        self.core.batch_size
    }

    /// The same with relative paths of devices taken from `base`. Fails when that is needed and is not UTF-8.
    pub fn relative_to(&mut self, base: &Path) -> Result<(), String> {
        // Only the source may be a URI.
        let source_is_uri = self.source.contains("://");
        let words = [(&mut self.metadata, false), (&mut self.destination, false), (&mut self.source, source_is_uri)];
        for (word, is_uri) in words {
            if is_device_number(word) || is_uri {
                continue;
            }
            let joined = base.join(&*word);
            match joined.to_str() {
                Some(path) => *word = path.into(),
                None => return Err(format!("{} is not UTF-8: give absolute paths", joined.display())),
            }
        }
        Ok(())
    }
}

/// The line, which [`DmTable::from_str`] understands as the same.
impl fmt::Display for DmTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} {TARGET}", self.len)?;
        let devices = [&self.metadata, &self.destination, &self.source];
        devices.into_iter().chain(&self.arguments).try_for_each(|word| write!(f, " {}", escaped(word)))
    }
}

/// The line of a clone that was not given as one. `size` is in bytes; a last sector that is not whole counts, as in the
/// status line. Core arguments are those that were set.
pub struct Line<'a> {
    pub size: u64,
    pub metadata: &'a str,
    pub destination: &'a str,
    pub source: &'a str,
    pub region_size: RegionSize,
    pub no_hydration: bool,
    pub no_discard_passdown: bool,
    pub hydration_threshold: Option<u32>,
    pub hydration_batch_size: Option<u32>,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} {TARGET}", self.size.div_ceil(SECTOR_SIZE))?;
        for device in [self.metadata, self.destination, self.source] {
            write!(f, " {}", escaped(device))?;
        }
        write!(f, " {}", self.region_size.sectors())?;
        let features = [(self.no_hydration, NO_HYDRATION), (self.no_discard_passdown, NO_DISCARD_PASSDOWN)];
        let features: Vec<&str> = features.into_iter().filter_map(|(set, word)| set.then_some(word)).collect();
        let core = [(HYDRATION_THRESHOLD, self.hydration_threshold), (HYDRATION_BATCH_SIZE, self.hydration_batch_size)];
        let core: Vec<(&str, u32)> = core.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        // What stands in between must be there for what follows.
        if !features.is_empty() || !core.is_empty() {
            write!(f, " {}", features.len())?;
            features.iter().try_for_each(|word| write!(f, " {word}"))?;
        }
        if !core.is_empty() {
            write!(f, " {}", core.len() * 2)?;
            core.iter().try_for_each(|(key, value)| write!(f, " {key} {value}"))?;
        }
        Ok(())
    }
}

impl FromStr for DmTable {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        check_one_line(line)?;
        let words = split(line);
        let Some(([start, len, target], arguments)) = words.split_first_chunk::<3>() else {
            return Err(format!(
                "{}: a table is START LEN TYPE and the arguments of the target",
                words::INVALID_FORMAT
            ));
        };
        let (Some(start), Some(len)) = (decimal(start), decimal(len)) else {
            let text = "START and LEN are numbers of sectors";
            return Err(format!("{}: {text}, not {} and {}", words::INVALID_FORMAT, shown(start), shown(len)));
        };
        if len == 0 {
            return Err(format!("{}: LEN is 0", words::ZERO_LENGTH));
        }
        if len > LEN_MAX || start.checked_add(len).is_none_or(|end| end > LEN_MAX) {
            return Err(format!("{}: START and LEN go up to {LEN_MAX} sectors", words::TOO_LARGE));
        }
        if target != TARGET {
            return Err(format!("{}: {} is not {TARGET}", words::UNKNOWN_TARGET, shown(target)));
        }
        if start != 0 {
            return Err(format!("{}: the target must start at 0, not {start}", words::GAP));
        }
        if arguments.len() < ARGUMENTS_MIN {
            let text = "METADATA DESTINATION SOURCE REGION_SIZE are needed";
            return Err(format!("{}: {}: {text}", words::ARGUMENT_COUNT, arguments.len()));
        }
        let [metadata, destination, source, rest @ ..] = arguments else {
            return Err(words::ARGUMENT_COUNT.into());
        };
        let mut arguments = Arguments(rest);
        Ok(Self {
            len,
            metadata: device(metadata, words::OPENING_METADATA)?,
            destination: device(destination, words::OPENING_DESTINATION)?,
            source: device(source, words::OPENING_SOURCE)?,
            region_size: parse_region_size(arguments.next().unwrap_or_default())?,
            features: parse_features(&mut arguments)?,
            core: parse_core(&mut arguments)?,
            arguments: rest.to_vec(),
        })
    }
}

/// Refuses a table of several targets, the second of which would be taken for arguments of the first. Other line breaks
/// are white space.
fn check_one_line(text: &str) -> Result<(), String> {
    let mut escaped = false;
    let lines = text.split(|c: char| {
        let ends = c == '\n' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    for (index, line) in lines.enumerate().skip(1) {
        if let [start, len, _, ..] = split(line).as_slice()
            && [start, len].iter().all(|word| decimal(word).is_some())
        {
            let what = "a table is one line, that of the whole clone";
            return Err(format!("Invalid format on line {} of table: {what}", index + 1));
        }
    }
    Ok(())
}

/// The words that were not looked at yet.
struct Arguments<'a>(&'a [String]);

impl<'a> Arguments<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// A group of at most `max` words, after their number; empty when there is none.
    fn group(&mut self, max: usize, error: &str) -> Result<Arguments<'a>, String> {
        let Some(word) = self.next() else { return Ok(Arguments(&[])) };
        let count = decimal(word).and_then(|count| usize::try_from(count).ok()).filter(|count| *count <= max);
        let Some(count) = count else {
            return Err(format!("{error}: {} is not a number up to {max}", shown(word)));
        };
        let Some((group, rest)) = self.0.split_at_checked(count) else {
            return Err(format!("{error}: {count} are announced, {} are there", self.0.len()));
        };
        self.0 = rest;
        Ok(Arguments(group))
    }
}

/// What can't be a device: the kernel finds none of that name.
fn device(word: &str, error: &str) -> Result<String, String> {
    match word.contains('\0') {
        true => Err(format!("{error}: {} has a NUL", shown(word))),
        false => Ok(word.into()),
    }
}

fn parse_region_size(word: &str) -> Result<RegionSize, String> {
    let (min, max) = (REGION_SIZE_MIN / SECTOR_SIZE, REGION_SIZE_MAX / SECTOR_SIZE);
    let Some(sectors) = decimal(word).filter(|sectors| (min..=max).contains(sectors)) else {
        return Err(format!("{}: {} is not a number of sectors from {min} to {max}", words::REGION_SIZE, shown(word)));
    };
    RegionSize::new(sectors * SECTOR_SIZE).map_err(|_| format!("{}: {sectors} sectors", words::NOT_POWER_OF_2))
}

fn parse_features(arguments: &mut Arguments) -> Result<Features, String> {
    let mut features = Features::default();
    let mut group = arguments.group(FEATURES_MAX, words::FEATURE_COUNT)?;
    while let Some(word) = group.next() {
        match () {
            () if word.eq_ignore_ascii_case(NO_HYDRATION) => features.no_hydration = true,
            () if word.eq_ignore_ascii_case(NO_DISCARD_PASSDOWN) => features.no_discard_passdown = true,
            () => {
                let known = format!("{NO_HYDRATION} and {NO_DISCARD_PASSDOWN} are known");
                return Err(format!("{}: {}: {known}", words::FEATURE, shown(word)));
            }
        }
    }
    Ok(features)
}

fn parse_core(arguments: &mut Arguments) -> Result<Core, String> {
    let mut core = Core::default();
    let mut group = arguments.group(CORE_MAX, words::CORE_COUNT)?;
    if group.0.len() % 2 == 1 {
        return Err(format!("{}: {}", words::CORE_ODD, group.0.len()));
    }
    while let (Some(key), Some(value)) = (group.next(), group.next()) {
        let number = |error: &str| {
            unsigned(value).ok_or_else(|| format!("{error}: {} is not a number from 0 to {}", shown(value), u32::MAX))
        };
        match () {
            () if key.eq_ignore_ascii_case(HYDRATION_THRESHOLD) => core.threshold = Some(number(words::THRESHOLD)?),
            () if key.eq_ignore_ascii_case(HYDRATION_BATCH_SIZE) => core.batch_size = Some(number(words::BATCH_SIZE)?),
            () => {
                let known = format!("{HYDRATION_THRESHOLD} and {HYDRATION_BATCH_SIZE} are known");
                return Err(format!("{}: {}: {known}", words::CORE, shown(key)));
            }
        }
    }
    Ok(core)
}

/// As `sscanf("%u%c")` of the kernel takes it, but without its wrap: decimal digits and nothing else.
fn decimal(word: &str) -> Option<u64> {
    let is_number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| word.parse().ok())?
}

/// As `kstrtouint(word, 10)`: a plus sign before and a newline behind are allowed.
fn unsigned(word: &str) -> Option<u32> {
    let digits = word.strip_prefix('+').unwrap_or(word);
    decimal(digits.strip_suffix('\n').unwrap_or(digits)).and_then(|number| u32::try_from(number).ok())
}

/// The kernel's `isspace`, in ASCII.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r')
}

/// `dm_split_args`. A backslash at the very end stands for itself.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => word.get_or_insert_default().push(chars.next().unwrap_or('\\')),
            c if is_space(c) => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The word so that [`split`] gives it back. A word is not empty.
fn escaped(word: &str) -> String {
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        if c == '\\' || is_space(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn is_device_number(word: &str) -> bool {
    word.split_once(':').is_some_and(|(major, minor)| {
        [major, minor].iter().all(|part| (1..=10).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// Where udev has the devices by their numbers.
const BY_NUMBER: &str = "/dev/block";

/// Where a device is: `MAJOR:MINOR` is in `/dev/block`, if there is udev; see [`device_number`].
fn device_path(word: &str) -> PathBuf {
    match is_device_number(word) {
        true => Path::new(BY_NUMBER).join(word),
        false => word.into(),
    }
}

/// The `MAJOR:MINOR` that `path` was made from.
pub fn device_number(path: &Path) -> Option<&str> {
    path.strip_prefix(BY_NUMBER).ok()?.to_str().filter(|word| is_device_number(word))
}

fn shown(word: &str) -> String {
    let shown: String = word.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    format!("'{shown}{}'", if word.chars().nth(SHOWN_MAX).is_some() { "..." } else { "" })
}

#[cfg(test)]
mod tests;
