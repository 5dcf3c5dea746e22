//! Units: the quantities of a clone, as types that do not mix.
//!
//! A byte position, a region index and a count of regions are different things; mixing them is how block
//! storage loses data. Rounding is two functions, never a flag: [`Geometry::touched`] rounds outward (every
//! region that a byte range touches), [`Geometry::covered`] rounds inward (only regions it fully covers).
//!
//! Plain `std`: no I/O, nothing that can block.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// The kernel's sector, in bytes: the unit of dm-clone's table and status lines.
pub const SECTOR_SIZE: u64 = 512;
/// Smallest region: 4 KiB (dm-clone: 8 sectors).
pub const REGION_SIZE_MIN: u64 = 4 << 10;
/// Largest region: 1 GiB (dm-clone: 2097152 sectors).
pub const REGION_SIZE_MAX: u64 = 1 << 30;
/// Region size when none is given.
pub const REGION_SIZE_DEFAULT: u64 = 64 << 10;
/// Largest device: 8 EiB - 1, the largest offset that the kernel's `loff_t` and NBD clients accept.
pub const DEVICE_SIZE_MAX: u64 = i64::MAX as u64;

/// Rounds `value` down to a multiple of `align`, a power of two.
pub const fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// Rounds `value` up to a multiple of `align`, a power of two. `value` must be at most [`DEVICE_SIZE_MAX`].
pub const fn align_up(value: u64, align: u64) -> u64 {
    align_down(value + (align - 1), align)
}

/// Whether `value` is a multiple of `align`, a power of two.
pub const fn is_aligned(value: u64, align: u64) -> bool {
    value & (align - 1) == 0
}

/// A non-empty range of bytes of a device. Its end never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The `len` bytes from `start`; `None` when empty or when the end exceeds [`DEVICE_SIZE_MAX`].
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (len > 0 && end <= DEVICE_SIZE_MAX).then_some(Self { start, len })
    }

    /// The bytes from `start` to before `end`; `None` when empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        Self::new(start, end.checked_sub(start)?)
    }

    pub const fn start(self) -> u64 {
        self.start
    }
    pub const fn len(self) -> u64 {
        self.len
    }
    /// Always false: a range is never empty. Here because `len` is.
    pub const fn is_empty(self) -> bool {
        false
    }
    /// The first byte after the range.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }
    /// The bytes both ranges have; `None` when they are disjoint.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }
    /// The smallest range of whole `align`-byte blocks that holds this one (outward).
    pub fn aligned_outward(self, align: u64) -> Self {
        let start = align_down(self.start, align);
        Self { start, len: align_up(self.end(), align) - start }
    }
    /// The largest range of whole `align`-byte blocks inside this one (inward); `None` when there is none.
    pub fn aligned_inward(self, align: u64) -> Option<Self> {
        Self::between(align_up(self.start, align), align_down(self.end(), align))
    }
    /// Cuts the range at every multiple of `unit` bytes (a power of two).
    pub fn split_at_multiples(self, unit: u64) -> impl Iterator<Item = ByteRange> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            let end = self.end().min(align_down(at, unit).saturating_add(unit));
            let piece = Self::between(at, end)?;
            at = end;
            Some(piece)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {}", self.len, self.start)
    }
}

macro_rules! index_type {
    ($(#[$doc:meta])* $name:ident($repr:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $repr);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
    };
}
index_type!(
    /// The position of a region in the device, from 0.
    RegionIndex(u64)
);
index_type!(
    /// The position of a zone in the device, from 0. A zone is what one 4 KiB metadata block covers.
    ZoneIndex(u64)
);
index_type!(
    /// A shard, from 0. Shard 0 is the coordinator.
    ShardIndex(u16)
);
index_type!(
    /// A clone of this process; never reused.
    CloneId(u32)
);
index_type!(
    /// Counts commits; grows by one with each.
    Generation(u64)
);

/// A non-empty run of regions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RegionRange {
    first: RegionIndex,
    count: u64,
}

impl RegionRange {
    /// The regions from `first` to before `end`; `None` when there are none.
    pub fn between(first: RegionIndex, end: RegionIndex) -> Option<Self> {
        (first < end).then(|| Self { first, count: end.0 - first.0 })
    }
    pub fn single(region: RegionIndex) -> Self {
        Self { first: region, count: 1 }
    }
    pub const fn first(self) -> RegionIndex {
        self.first
    }
    /// The first region after the run.
    pub const fn end(self) -> RegionIndex {
        RegionIndex(self.first.0 + self.count)
    }
    /// How many regions there are; at least 1.
    pub const fn count(self) -> u64 {
        self.count
    }
    pub fn contains(self, region: RegionIndex) -> bool {
        self.first <= region && region < self.end()
    }
    pub fn iter(self) -> impl DoubleEndedIterator<Item = RegionIndex> {
        (self.first.0..self.end().0).map(RegionIndex)
    }
    /// As a plain range of indices.
    pub const fn indices(self) -> Range<u64> {
        self.first.0..self.first.0 + self.count
    }
}

/// A region size: a power of two from [`REGION_SIZE_MIN`] to [`REGION_SIZE_MAX`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionSize {
    shift: u8,
}

impl RegionSize {
    pub fn new(bytes: u64) -> Result<Self, String> {
        if !(REGION_SIZE_MIN..=REGION_SIZE_MAX).contains(&bytes) {
            return Err(format!("region size {} is outside 4KiB to 1GiB", ByteSize(bytes)));
        }
        if !bytes.is_power_of_two() {
            return Err(format!("region size {} is not a power of two", ByteSize(bytes)));
        }
        Ok(Self { shift: bytes.trailing_zeros() as u8 })
    }
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }
    pub const fn sectors(self) -> u64 {
        self.bytes() / SECTOR_SIZE
    }
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }
}

impl Default for RegionSize {
    fn default() -> Self {
        Self { shift: REGION_SIZE_DEFAULT.trailing_zeros() as u8 }
    }
}
impl fmt::Debug for RegionSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ByteSize(self.bytes()).fmt(f)
    }
}
impl fmt::Display for RegionSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ByteSize(self.bytes()).fmt(f)
    }
}
impl FromStr for RegionSize {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Self::new(s.parse::<ByteSize>()?.0)
    }
}

/// A size in bytes as people write it: `4096`, `64KiB`, `1.5 GiB` is not accepted (whole numbers only).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ByteSize(pub u64);

const SIZE_SUFFIXES: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "'{}' is not a size: write bytes as a number, or a number with KiB, MiB, GiB or TiB",
                s.escape_debug()
            )
        };
        let (digits, shift) = SIZE_SUFFIXES
            .iter()
            .find_map(|(suffix, shift)| s.strip_suffix(suffix).map(|d| (d, *shift)))
            .unwrap_or((s, 0));
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let number: u64 = digits.parse().map_err(|_| format!("'{s}' is too large"))?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(|| format!("'{s}' is too large"))
    }
}

/// Exact when the size is whole in a unit (`64KiB`), else bytes.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, shift) in SIZE_SUFFIXES.iter().rev() {
            if self.0 > 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{} byte{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}

/// How a device is divided: its size, the regions of the copy, the zones of the metadata, the owners of both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    size: u64,
    region_size: RegionSize,
    regions_per_zone: u64,
}

impl Geometry {
    /// `size` is in bytes, 1 to [`DEVICE_SIZE_MAX`]; `regions_per_zone` is at least 1.
    pub fn new(size: u64, region_size: RegionSize, regions_per_zone: u64) -> Option<Self> {
        let ok = size > 0
            && size <= DEVICE_SIZE_MAX - REGION_SIZE_MAX
            && (1..=u64::from(u32::MAX)).contains(&regions_per_zone);
        ok.then_some(Self { size, region_size, regions_per_zone })
    }
    /// The same division of a device of another size.
    pub fn with_size(&self, size: u64) -> Option<Self> {
        Self::new(size, self.region_size, self.regions_per_zone)
    }
    /// Size of the device in bytes: not necessarily a multiple of anything.
    pub const fn size(&self) -> u64 {
        self.size
    }
    pub const fn region_size(&self) -> RegionSize {
        self.region_size
    }
    pub const fn regions_per_zone(&self) -> u64 {
        self.regions_per_zone
    }
    /// The whole device.
    pub fn whole(&self) -> ByteRange {
        ByteRange { start: 0, len: self.size }
    }
    /// How many regions there are, the last (perhaps shorter) one included.
    pub const fn nr_regions(&self) -> u64 {
        self.size.div_ceil(self.region_size.bytes())
    }
    pub const fn nr_zones(&self) -> u64 {
        self.nr_regions().div_ceil(self.regions_per_zone)
    }
    pub fn region_of(&self, offset: u64) -> RegionIndex {
        debug_assert!(offset < self.size);
        RegionIndex(offset >> self.region_size.shift())
    }
    pub fn zone_of(&self, region: RegionIndex) -> ZoneIndex {
        ZoneIndex(region.0 / self.regions_per_zone)
    }
    /// The regions of a zone.
    pub fn zone_regions(&self, zone: ZoneIndex) -> RegionRange {
        let first = zone.0 * self.regions_per_zone;
        let end = (first + self.regions_per_zone).min(self.nr_regions());
        RegionRange::between(RegionIndex(first), RegionIndex(end)).expect("zone is inside the device")
    }
    /// The shard that owns a zone when there are `shards` of them: zone z belongs to shard z mod N.
    pub fn owner_of(&self, zone: ZoneIndex, shards: u16) -> ShardIndex {
        ShardIndex((zone.0 % u64::from(shards)) as u16)
    }
    /// The bytes of a run of regions; the last region of the device may be short.
    pub fn bytes_of(&self, regions: RegionRange) -> ByteRange {
        let start = regions.first().0 << self.region_size.shift();
        let end = (regions.end().0 << self.region_size.shift()).min(self.size);
        ByteRange::between(start, end).expect("regions are inside the device")
    }
    /// Every region that `range` touches (outward).
    pub fn touched(&self, range: ByteRange) -> RegionRange {
        debug_assert!(range.end() <= self.size);
        let shift = self.region_size.shift();
        RegionRange::between(RegionIndex(range.start() >> shift), RegionIndex(((range.end() - 1) >> shift) + 1))
            .expect("range is not empty")
    }
    /// The regions that `range` fully covers (inward); the short last region counts when all of it is covered.
    pub fn covered(&self, range: ByteRange) -> Option<RegionRange> {
        debug_assert!(range.end() <= self.size);
        let shift = self.region_size.shift();
        let first = align_up(range.start(), self.region_size.bytes()) >> shift;
        let end = if range.end() == self.size { self.nr_regions() } else { range.end() >> shift };
        RegionRange::between(RegionIndex(first), RegionIndex(end))
    }
    /// Cuts `range` where the owner changes: one piece per zone touched, in order.
    pub fn split_at_zones(&self, range: ByteRange) -> impl Iterator<Item = (ZoneIndex, ByteRange)> + use<> {
        let geometry = *self;
        let mut at = range.start();
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let zone = geometry.zone_of(geometry.region_of(at));
            let zone_end = geometry.bytes_of(geometry.zone_regions(zone)).end();
            let piece = ByteRange::between(at, range.end().min(zone_end))?;
            at = piece.end();
            Some((zone, piece))
        })
    }
}

#[cfg(test)]
mod tests;
