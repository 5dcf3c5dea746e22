//! The metadata format: bytes <-> superblock and bitmap blocks.
//!
//! A metadata device is a row of 4096-byte blocks; all integers are little-endian.
//!
//! ```text
//! block    0   superblock, copy A
//!          1   superblock, copy B
//!        2+z   bitmap of zone z, for every zone of the geometry; nothing behind the last one is ours
//!
//! superblock: everything is in the first 512-byte sector, so that a torn write leaves the old or the new one
//!     0  magic                  8 bytes  "hydrant\n"
//!     8  crc32c                 u32      of all 4096 bytes, with this field 0
//!    12  version                u32      1; the fields up to here stay where they are in every version
//!    16  compatible features    u64      unknown bits are ignored, and dropped when the superblock is rewritten
//!    24  incompatible features  u64      an unknown bit makes the metadata unsupported
//!    32  uuid                  16 bytes  new with every format
//!    48  generation             u64      of the commit that wrote this copy
//!    56  state                  u32      1 active, 2 complete
//!    60  zero                   u32
//!    64  size                   u64      of the device, in bytes
//!    72  region size            u64      in bytes
//!    80  regions per zone       u64      1 to 30720
//!    88  created                u64      seconds since 1970
//!    96  source size            u64      in bytes
//!   104  source samples         u32      how many samples are in the digest; 0: the source is not known yet, or
//!   108  zero                   u32
//!   112  source digest         16 bytes  not needed any more: then the digest is all ones
//!   128  destination id        16 bytes  all 0: not known; all ones: there is no destination yet
//!   144  zero to the end
//!
//! bitmap block: 8 sectors of 512 bytes, each complete in itself
//!     0  crc32c                 u32      of: uuid, absolute sector number (u64), bytes 4..512 of the sector
//!     4  magic                  4 bytes  "hyBM"
//!     8  generation             u64      of the commit that wrote this sector
//!    16  zone                   u64
//!    24  first region           u64      the region of the first bit; may be past the end of the device
//!    32  bits                480 bytes   60 words of u64; bit i of word w is region `first + 64 w + i`
//! ```
//!
//! The absolute sector number counts 512-byte sectors from the start of the metadata device. The bits of a zone
//! are spread over the 8 sectors in whole words: with `n` regions per zone a sector holds `ceil(n / 512)` words,
//! so that a bad sector costs about an eighth of a zone. All bits without a region are 0; one that is set is damage.
//!
//! Nothing here trusts its input: whatever the bytes are, decoding gives a verdict, in constant memory, and never
//! panics. What to do with a verdict is decided in [`super::commit`].

use crate::bail;
use crate::error::Result;
use crate::signatures::identify;
use crate::units::{ByteSize, Generation, Geometry, RegionIndex, RegionRange, RegionSize, ZoneIndex};
use std::fmt;

/// A metadata block, in bytes: superblock copy or bitmap of a zone. The unit of every metadata write.
pub const BLOCK_SIZE: usize = 4096;
/// The unit that the media are assumed to write whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_SIZE / SECTOR_BYTES;
/// Blocks in front of the bitmap: the two superblock copies.
pub const SUPERBLOCK_COPIES: u64 = 2;
/// Words of bits in one sector.
const WORDS_PER_SECTOR_MAX: usize = (SECTOR_BYTES - BITS_AT) / 8;
/// Regions that one bitmap block can hold at most.
pub const REGIONS_PER_ZONE_MAX: u64 = (WORDS_PER_SECTOR_MAX * 64 * SECTORS_PER_BLOCK) as u64;
/// Regions of one clone at most: 32 GiB of bits in memory, 1 PiB of data at the smallest region size.
pub const REGIONS_MAX: u64 = 1 << 38;
/// Zones of one clone at most: 64 GiB of metadata. No geometry made by [`geometry_for`] comes near it.
pub const ZONES_MAX: u64 = 1 << 24;
/// A zone covers at most this much data, in bytes, or 1/4096 of a large device, so that small devices spread too.
const ZONE_BYTES_MAX: u64 = 256 << 20;
const ZONE_FRACTION: u64 = 4096;

/// The first bytes of both superblock copies.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"hydrant\n";
/// The format this build writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Incompatible features that this build knows: none yet.
const INCOMPATIBLE_KNOWN: u64 = 0;
const SECTOR_MAGIC: [u8; 4] = *b"hyBM";

const CRC_AT: usize = 8;
const VERSION_AT: usize = 12;
const INCOMPATIBLE_AT: usize = 24;
const UUID_AT: usize = 32;
const GENERATION_AT: usize = 48;
const STATE_AT: usize = 56;
const SIZE_AT: usize = 64;
const REGION_SIZE_AT: usize = 72;
const REGIONS_PER_ZONE_AT: usize = 80;
const CREATED_AT: usize = 88;
const SOURCE_SIZE_AT: usize = 96;
const SOURCE_SAMPLES_AT: usize = 104;
const SOURCE_DIGEST_AT: usize = 112;
const DESTINATION_ID_AT: usize = 128;
const BITS_AT: usize = 32;

/// A whole metadata block.
pub type Block = [u8; BLOCK_SIZE];

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
fn bytes16_at(bytes: &[u8], at: usize) -> [u8; 16] {
    bytes[at..at + 16].try_into().expect("16 bytes")
}
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// How many regions share one bitmap block: as many as fit, but a zone covers at most 256 MiB or 1/4096 of the
/// device, whichever is more; at least 1, and a multiple of 8 from 8 on.
pub fn regions_per_zone_for(size: u64, region_size: RegionSize) -> u64 {
    let bytes = ZONE_BYTES_MAX.max(size / ZONE_FRACTION);
    let regions = (bytes >> region_size.shift()).clamp(1, REGIONS_PER_ZONE_MAX);
    if regions >= 8 { regions / 8 * 8 } else { regions }
}

/// The geometry of a new clone of a device of `size` bytes. Fails with Limit when there would be more than
/// [`REGIONS_MAX`] regions, with Usage when the size is 0 or more than any device has.
pub fn geometry_for(size: u64, region_size: RegionSize) -> Result<Geometry> {
    let Some(geometry) = Geometry::new(size, region_size, regions_per_zone_for(size, region_size)) else {
        bail!(Usage, "a device of {} can't be cloned", ByteSize(size));
    };
    if let Err(what) = check_limits(&geometry) {
        bail!(Limit, "{what}: use larger regions than {region_size}");
    }
    Ok(geometry)
}

pub(super) fn check_limits(geometry: &Geometry) -> Result<(), String> {
    if geometry.nr_regions() > REGIONS_MAX {
        return Err(format!("{} regions, at most {REGIONS_MAX} are supported", geometry.nr_regions()));
    }
    if geometry.nr_zones() > ZONES_MAX {
        return Err(format!("{} zones, at most {ZONES_MAX} are supported", geometry.nr_zones()));
    }
    Ok(())
}

/// How large a metadata device must be for this geometry, in bytes.
pub fn metadata_size_needed(geometry: &Geometry) -> u64 {
    (SUPERBLOCK_COPIES + geometry.nr_zones()) * BLOCK_SIZE as u64
}

/// The block that holds the bits of `zone`.
pub fn zone_block(zone: ZoneIndex) -> u64 {
    SUPERBLOCK_COPIES + zone.0
}

/// How many words hold the bits of one zone in core, the last zone of the device included.
pub fn words_per_zone(geometry: &Geometry) -> usize {
    geometry.regions_per_zone().div_ceil(64) as usize
}

/// Which source a clone was made from: catches mistakes, proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceFingerprint {
    /// In bytes.
    pub size: u64,
    /// How many places of the source went into the digest.
    pub samples: u32,
    pub digest: [u8; 16],
}

impl SourceFingerprint {
    /// Nobody has looked at the source yet: any one that is large enough fits, and is recorded at the first use.
    pub const UNKNOWN: Self = Self { size: 0, samples: 0, digest: [0; 16] };

    /// No source is needed: what is not hydrated reads as zeros. Of a complete clone that was grown without its source.
    pub const NONE: Self = Self { size: 0, samples: 0, digest: [0xff; 16] };

    pub fn is_known(&self) -> bool {
        self.samples != 0 || self.is_none()
    }
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

/// Nothing tells the destination from others: it fits any.
pub const DESTINATION_UNKNOWN: [u8; 16] = [0; 16];
/// Formatted ahead of the first use, which takes a destination as a new clone does, and records it.
pub const DESTINATION_NONE_YET: [u8; 16] = [0xff; 16];

/// How far a clone has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CloneState {
    /// Source, destination and metadata are all needed.
    Active,
    /// Everything is hydrated and durable: the destination is the copy.
    Complete,
}

impl CloneState {
    pub const fn name(self) -> &'static str {
        match self {
            CloneState::Active => "active",
            CloneState::Complete => "complete",
        }
    }
}

/// A superblock whose bytes were verified, or that was made here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// New with every format: sectors of an older format of the same device never pass for ours.
    pub uuid: [u8; 16],
    pub geometry: Geometry,
    pub source: SourceFingerprint,
    /// Identifies the destination; what goes into it is the caller's business, but for [`DESTINATION_UNKNOWN`] and
    /// [`DESTINATION_NONE_YET`].
    pub destination_id: [u8; 16],
    pub state: CloneState,
    pub generation: Generation,
    /// Seconds since 1970.
    pub created_unix_s: u64,
}

impl Superblock {
    /// How many bytes of its source the clone is about; the fingerprint is of so many.
    pub fn source_len(&self) -> u64 {
        if self.source.is_known() { self.source.size } else { self.geometry.size() }
    }
    /// Whether the first use has source and destination to record.
    pub fn lacks_devices(&self) -> bool {
        !self.source.is_known() || self.destination_id == DESTINATION_NONE_YET
    }

    /// The 4096 bytes of either copy.
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_SIZE];
        let state: u32 = match self.state {
            CloneState::Active => 1,
            CloneState::Complete => 2,
        };
        put(&mut block, 0, &SUPERBLOCK_MAGIC);
        put(&mut block, VERSION_AT, &FORMAT_VERSION.to_le_bytes());
        put(&mut block, UUID_AT, &self.uuid);
        put(&mut block, GENERATION_AT, &self.generation.0.to_le_bytes());
        put(&mut block, STATE_AT, &state.to_le_bytes());
        put(&mut block, SIZE_AT, &self.geometry.size().to_le_bytes());
        put(&mut block, REGION_SIZE_AT, &self.geometry.region_size().bytes().to_le_bytes());
        put(&mut block, REGIONS_PER_ZONE_AT, &self.geometry.regions_per_zone().to_le_bytes());
        put(&mut block, CREATED_AT, &self.created_unix_s.to_le_bytes());
        put(&mut block, SOURCE_SIZE_AT, &self.source.size.to_le_bytes());
        put(&mut block, SOURCE_SAMPLES_AT, &self.source.samples.to_le_bytes());
        put(&mut block, SOURCE_DIGEST_AT, &self.source.digest);
        put(&mut block, DESTINATION_ID_AT, &self.destination_id);
        seal_superblock(&mut block);
        block
    }
}

fn superblock_crc(block: &Block) -> u32 {
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &block[CRC_AT + 4..])
}

fn seal_superblock(block: &mut Block) {
    let crc = superblock_crc(block);
    put(block, CRC_AT, &crc.to_le_bytes());
}

/// What [`Classified::Foreign`] says of bytes that nobody knows: garbage, or what a damaged copy of ours looks like.
pub const UNKNOWN_DATA: &str = "unknown data";

/// What the 4096 bytes at the place of a superblock copy are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Classified {
    /// All zero: never formatted, or made invalid by a format that did not finish.
    Empty,
    Valid(Superblock),
    /// Ours, but it fails its checks; says which.
    Damaged(String),
    /// Ours and intact, but of a version or with features that this build does not know; says which.
    Unsupported(String),
    /// Not ours; says what it looks like, or [`UNKNOWN_DATA`].
    Foreign(&'static str),
}

/// Bytes from the place of a superblock copy that nobody has looked at: nothing can be read from them before
/// [`Self::classify`] has judged all of them.
pub struct UnverifiedSuperblock<'a>(&'a Block);

impl<'a> UnverifiedSuperblock<'a> {
    pub fn new(block: &'a Block) -> Self {
        Self(block)
    }

    /// Judges the bytes: magic, checksum, version, features, then every field.
    pub fn classify(&self) -> Classified {
        let block = self.0;
        if crate::dma_buf::is_zero(block) {
            return Classified::Empty;
        }
        if block[..8] != SUPERBLOCK_MAGIC {
            return Classified::Foreign(identify(block).unwrap_or(UNKNOWN_DATA));
        }
        let (stored, computed) = (u32_at(block, CRC_AT), superblock_crc(block));
        if stored != computed {
            return Classified::Damaged(format!("checksum is {stored:#010x}, its bytes give {computed:#010x}"));
        }
        let version = u32_at(block, VERSION_AT);
        if version != FORMAT_VERSION {
            return Classified::Unsupported(format!("format version {version}, this hydrant knows {FORMAT_VERSION}"));
        }
        let unknown = u64_at(block, INCOMPATIBLE_AT) & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return Classified::Unsupported(format!("incompatible features {unknown:#x}, unknown to this hydrant"));
        }
        match Self::fields(block) {
            Ok(superblock) => Classified::Valid(superblock),
            Err(what) => Classified::Damaged(what),
        }
    }

    fn fields(block: &Block) -> Result<Superblock, String> {
        let region_size = RegionSize::new(u64_at(block, REGION_SIZE_AT))?;
        let regions_per_zone = u64_at(block, REGIONS_PER_ZONE_AT);
        if !(1..=REGIONS_PER_ZONE_MAX).contains(&regions_per_zone) {
            return Err(format!("{regions_per_zone} regions per zone, outside 1 to {REGIONS_PER_ZONE_MAX}"));
        }
        let size = u64_at(block, SIZE_AT);
        let geometry = Geometry::new(size, region_size, regions_per_zone)
            .ok_or_else(|| format!("a device size of {size} bytes is impossible"))?;
        check_limits(&geometry)?;
        let state = match u32_at(block, STATE_AT) {
            1 => CloneState::Active,
            2 => CloneState::Complete,
            other => return Err(format!("state {other} is neither 1 (active) nor 2 (complete)")),
        };
        Ok(Superblock {
            uuid: bytes16_at(block, UUID_AT),
            geometry,
            source: SourceFingerprint {
                size: u64_at(block, SOURCE_SIZE_AT),
                samples: u32_at(block, SOURCE_SAMPLES_AT),
                digest: bytes16_at(block, SOURCE_DIGEST_AT),
            },
            destination_id: bytes16_at(block, DESTINATION_ID_AT),
            state,
            generation: Generation(u64_at(block, GENERATION_AT)),
            created_unix_s: u64_at(block, CREATED_AT),
        })
    }
}

/// What is wrong with a bitmap sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SectorFault {
    /// All zero: formatting writes every sector, so what was written here is lost.
    Lost,
    /// The checksum does not fit the bytes, the clone or the place.
    Checksum { stored: u32, computed: u32 },
    /// The checksum fits, a field does not: written by something that is not right.
    Field(&'static str),
}

impl fmt::Display for SectorFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SectorFault::Lost => f.write_str("all zero, what was written is lost"),
            SectorFault::Checksum { stored, computed } => {
                write!(f, "checksum is {stored:#010x}, its bytes and place give {computed:#010x}")
            }
            SectorFault::Field(what) => write!(f, "wrong {what} under a right checksum"),
        }
    }
}

/// A bitmap sector that can't be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadSector {
    /// In 512-byte sectors from the start of the metadata device.
    pub sector: u64,
    pub fault: SectorFault,
    /// The regions whose bits it holds; `None` when it holds none.
    pub regions: Option<RegionRange>,
}

impl fmt::Display for BadSector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {} (byte offset {}): {}; ", self.sector, self.sector * SECTOR_BYTES as u64, self.fault)?;
        match self.regions {
            Some(regions) => write!(f, "it covers regions {} to {}", regions.first(), regions.end().0 - 1),
            None => f.write_str("it covers no regions"),
        }
    }
}

/// The bits of a zone as found, with the verdict on each sector.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecodedZone {
    /// [`words_per_zone`] words; those of bad sectors are 0 here and mean nothing.
    pub bits: Box<[u64]>,
    /// The newest of the good sectors.
    pub generation: Generation,
    /// Empty when all of the block is good.
    pub bad: Vec<BadSector>,
}

/// Whether a block is as a format leaves it that is interrupted before it writes a superblock: `index` counts blocks from
/// the start of the device. The superblock copies are zero, other sectors are zero or have no bits and generation 0. Nothing
/// was ever committed there, so there is nothing to lose. The checksum can't be judged: the uuid is not known.
pub fn is_of_unfinished_format(index: u64, block: &Block) -> bool {
    let is_fresh = |sector: &[u8]| {
        sector[4..8] == SECTOR_MAGIC
            && u64_at(sector, 8) == 0
            && index.checked_sub(SUPERBLOCK_COPIES) == Some(u64_at(sector, 16))
            && crate::dma_buf::is_zero(&sector[BITS_AT..])
    };
    block.chunks_exact(SECTOR_BYTES).all(|sector| crate::dma_buf::is_zero(sector) || is_fresh(sector))
}

/// Encodes and decodes the bitmap blocks of one clone.
#[derive(Clone, Copy, Debug)]
pub struct ZoneCodec {
    geometry: Geometry,
    uuid_crc: u32,
}

impl ZoneCodec {
    pub fn new(superblock: &Superblock) -> Self {
        let geometry = superblock.geometry;
        assert!(geometry.regions_per_zone() <= REGIONS_PER_ZONE_MAX, "a zone must fit a block");
        Self { geometry, uuid_crc: crc32c::crc32c(&superblock.uuid) }
    }

    fn words_per_sector(&self) -> usize {
        self.geometry.regions_per_zone().div_ceil(64 * SECTORS_PER_BLOCK as u64) as usize
    }

    fn sector_crc(&self, sector: u64, bytes: &[u8]) -> u32 {
        let seed = crc32c::crc32c_append(self.uuid_crc, &sector.to_le_bytes());
        crc32c::crc32c_append(seed, &bytes[4..])
    }

    fn first_region(&self, zone: ZoneIndex, index: usize) -> u64 {
        zone.0 * self.geometry.regions_per_zone() + (index * self.words_per_sector() * 64) as u64
    }

    /// The regions whose bits are in sector `index` (0 to 7) of the block of `zone`.
    pub fn sector_regions(&self, zone: ZoneIndex, index: usize) -> Option<RegionRange> {
        let first = self.first_region(zone, index);
        let end = first + (self.words_per_sector() * 64) as u64;
        let end = end.min(self.geometry.zone_regions(zone).end().0);
        RegionRange::between(RegionIndex(first), RegionIndex(end))
    }

    /// The bits of word `word` of `zone` that have a region.
    fn valid_mask(&self, zone: ZoneIndex, word: usize) -> u64 {
        let regions = self.geometry.zone_regions(zone).count();
        match regions.saturating_sub(word as u64 * 64) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            _ => u64::MAX,
        }
    }

    /// Writes the block of `zone` to `out`. Panics when `bits` is not exactly the zone's: writing it would be damage.
    pub fn encode(&self, zone: ZoneIndex, generation: Generation, bits: &[u64], out: &mut Block) {
        assert!(zone.0 < self.geometry.nr_zones(), "zone {zone} is outside the device");
        assert_eq!(bits.len(), words_per_zone(&self.geometry), "the words of zone {zone}");
        let stray = bits.iter().enumerate().find(|(i, word)| **word & !self.valid_mask(zone, *i) != 0);
        assert!(stray.is_none(), "zone {zone} has bits without a region");
        out.fill(0);
        let (per_sector, first_sector) = (self.words_per_sector(), zone_block(zone) * SECTORS_PER_BLOCK as u64);
        for (index, sector) in out.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            put(sector, 4, &SECTOR_MAGIC);
            put(sector, 8, &generation.0.to_le_bytes());
            put(sector, 16, &zone.0.to_le_bytes());
            put(sector, 24, &self.first_region(zone, index).to_le_bytes());
            let words = bits.iter().skip(index * per_sector).take(per_sector);
            for (place, word) in sector[BITS_AT..].chunks_exact_mut(8).zip(words) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            let crc = self.sector_crc(first_sector + index as u64, sector);
            put(sector, 0, &crc.to_le_bytes());
        }
    }

    /// Judges every sector of the block of `zone` (which must be inside the device) and collects the bits.
    pub fn decode(&self, zone: ZoneIndex, block: &Block) -> DecodedZone {
        assert!(zone.0 < self.geometry.nr_zones(), "zone {zone} is outside the device");
        let per_sector = self.words_per_sector();
        let first_sector = zone_block(zone) * SECTORS_PER_BLOCK as u64;
        let mut decoded = DecodedZone {
            bits: vec![0; words_per_zone(&self.geometry)].into_boxed_slice(),
            generation: Generation(0),
            bad: Vec::new(),
        };
        for (index, sector) in block.chunks_exact(SECTOR_BYTES).enumerate() {
            let number = first_sector + index as u64;
            if let Err(fault) = self.check_sector(zone, index, number, sector) {
                decoded.bad.push(BadSector { sector: number, fault, regions: self.sector_regions(zone, index) });
                continue;
            }
            decoded.generation = decoded.generation.max(Generation(u64_at(sector, 8)));
            let words = decoded.bits.iter_mut().skip(index * per_sector).take(per_sector);
            for (i, word) in words.enumerate() {
                *word = u64_at(sector, BITS_AT + i * 8);
            }
        }
        decoded
    }

    /// Puts right what is known of the damaged sectors of a block, whatever they hold: their magic, zone, first region, and
    /// the zeros where there are no regions. Where the stored checksum fits then, only such bytes were damaged, and the
    /// bits are as well proven as those of any good sector; other sectors are left as they are.
    pub fn restore(&self, zone: ZoneIndex, block: &mut Block) {
        let per_sector = self.words_per_sector();
        let first_sector = zone_block(zone) * SECTORS_PER_BLOCK as u64;
        for (index, sector) in block.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            let number = first_sector + index as u64;
            if self.check_sector(zone, index, number, sector).is_ok() {
                continue;
            }
            let mut tried: [u8; SECTOR_BYTES] = (&*sector).try_into().expect("a whole sector");
            put(&mut tried, 4, &SECTOR_MAGIC);
            put(&mut tried, 16, &zone.0.to_le_bytes());
            put(&mut tried, 24, &self.first_region(zone, index).to_le_bytes());
            for (i, word) in tried[BITS_AT..].chunks_exact_mut(8).enumerate() {
                let valid = if i < per_sector { self.valid_mask(zone, index * per_sector + i) } else { 0 };
                let bits = u64_at(word, 0) & valid;
                word.copy_from_slice(&bits.to_le_bytes());
            }
            if self.check_sector(zone, index, number, &tried).is_ok() {
                sector.copy_from_slice(&tried);
            }
        }
    }

    fn check_sector(&self, zone: ZoneIndex, index: usize, number: u64, sector: &[u8]) -> Result<(), SectorFault> {
        let (stored, computed) = (u32_at(sector, 0), self.sector_crc(number, sector));
        if stored != computed || sector[4..8] != SECTOR_MAGIC {
            if crate::dma_buf::is_zero(sector) {
                return Err(SectorFault::Lost);
            }
            if stored != computed {
                return Err(SectorFault::Checksum { stored, computed });
            }
            return Err(SectorFault::Field("magic"));
        }
        if u64_at(sector, 16) != zone.0 {
            return Err(SectorFault::Field("zone"));
        }
        if u64_at(sector, 24) != self.first_region(zone, index) {
            return Err(SectorFault::Field("first region"));
        }
        let per_sector = self.words_per_sector();
        for (i, word) in sector[BITS_AT..].chunks_exact(8).enumerate() {
            let valid = if i < per_sector { self.valid_mask(zone, index * per_sector + i) } else { 0 };
            if u64_at(word, 0) & !valid != 0 {
                return Err(SectorFault::Field("bits (some without a region are set)"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests;
