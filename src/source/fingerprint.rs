//! The fingerprint of a source: its size and a digest of samples of its content.
//!
//! A mistake-catcher, not security: it notices that another disk, another backup or another size stands where
//! the clone's source was. It reads [`SAMPLES`] x 4 KiB whatever the size, so a change between two samples goes
//! unnoticed, and anybody can forge one (the digest is made of CRCs).
//!
//! # Format (part of the metadata: changing it makes every clone refuse its source)
//! `n` samples of up to 4096 bytes each. A source of at most 64 x 4096 bytes is read whole: `n` is the number of
//! its 4 KiB blocks, the last one may be short. Of a larger one n = 64: sample `i` begins at
//! `(size - 4096) * i / 63`, rounded down to 4096 except for the last, which ends where the source ends.
//! The digest is four crc32c values, each stored little-endian. Lane `k` covers the size (8 bytes, little-endian)
//! and the k-th quarter of every sample, in order; a sample of L bytes is quartered at `L*k/4`.

use crate::dma_buf::DmaBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::join_all;
use crate::meta::codec::SourceFingerprint;
use crate::source::Source;
use crate::units::ByteRange;
use std::cell::{Cell, RefCell};

/// How many places of a large source are read.
pub const SAMPLES: u64 = 64;
/// Length of a sample in bytes.
pub const SAMPLE_LEN: u64 = 4096;
/// How many samples are read at the same time.
const SAMPLES_IN_FLIGHT: usize = 16;

/// So many samples that can't be read, and no more are tried: each may take a bad disk many seconds.
const FAILED_SAMPLES_MAX: usize = 16;

/// The checksums of the samples that could be read; they can be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Samples {
    size: u64,
    /// The crc32c of each quarter.
    found: Vec<Option<[u32; 4]>>,
    /// Of all of them, when they were read at one time.
    digest: Option<[u8; 16]>,
}

/// What a look at a source found.
pub struct Sampled {
    pub samples: Samples,
    /// Why some are missing: the first error.
    pub error: Option<Error>,
}

impl Sampled {
    /// The fingerprint, when every sample was read; else why one could not be.
    pub fn complete(self) -> Result<(SourceFingerprint, Samples)> {
        match (self.error, self.samples.fingerprint()) {
            (None, Some(fingerprint)) => Ok((fingerprint, self.samples)),
            (Some(error), _) => Err(error),
            (None, None) => unreachable!("what is missing has an error"),
        }
    }
}

impl Samples {
    /// In bytes: so many of the source, from its start.
    pub fn size(&self) -> u64 {
        self.size
    }
    pub fn count(&self) -> usize {
        self.found.len()
    }
    pub fn read_count(&self) -> usize {
        self.found.iter().flatten().count()
    }
    pub fn is_complete(&self) -> bool {
        self.read_count() == self.count()
    }

    /// How many samples both know; `None` when one of them differs.
    pub fn agrees(&self, other: &Samples) -> Option<usize> {
        if self.size != other.size {
            return None;
        }
        let both = self.found.iter().zip(&other.found).filter_map(|(a, b)| Some((a.as_ref()?, b.as_ref()?)));
        let mut compared = 0;
        for (a, b) in both {
            if a != b {
                return None;
            }
            compared += 1;
        }
        Some(compared)
    }

    /// What `other` has and this has not. They agree.
    pub fn add(&mut self, other: &Samples) {
        for (mine, theirs) in self.found.iter_mut().zip(&other.found) {
            *mine = mine.or(*theirs);
        }
        self.digest = self.digest.or(other.digest);
    }

    /// `None` as long as one is missing.
    pub fn fingerprint(&self) -> Option<SourceFingerprint> {
        let found = self.found.iter().copied().collect::<Option<Vec<_>>>()?;
        let digest = self.digest.unwrap_or_else(|| {
            let mut lanes = [crc32c::crc32c(&self.size.to_le_bytes()); 4];
            for (place, quarters) in sample_places(self.size).iter().zip(&found) {
                let len = place.len() as usize;
                for (k, lane) in lanes.iter_mut().enumerate() {
                    *lane = crc32c::crc32c_combine(*lane, quarters[k], len * (k + 1) / 4 - len * k / 4);
                }
            }
            digest_of(lanes)
        });
        Some(SourceFingerprint { size: self.size, samples: found.len() as u32, digest })
    }
}

/// Reads the samples of `source`, 16 at a time, and digests them. Fails as the reads fail.
pub async fn fingerprint(source: &dyn Source) -> Result<SourceFingerprint> {
    sample(source).await?.complete().map(|(fingerprint, _)| fingerprint)
}

/// Reads the samples of `source`, 16 at a time. One that fails by itself (`Io`: a bad sector) is left out; fails as the
/// reads fail for any other reason.
pub async fn sample(source: &dyn Source) -> Result<Sampled> {
    let size = source.size();
    let places = sample_places(size);
    let read: RefCell<Vec<Option<DmaBuf>>> = RefCell::new(places.iter().map(|_| None).collect());
    let (next, failed, first) = (Cell::new(0), Cell::new(0), RefCell::new(None));
    let readers = (0..SAMPLES_IN_FLIGHT.min(places.len())).map(|_| {
        let (places, read, next, failed, first) = (&places, &read, &next, &failed, &first);
        Box::pin(async move {
            while failed.get() < FAILED_SAMPLES_MAX
                && let Some(place) = places.get(next.replace(next.get() + 1))
            {
                let index = next.get() - 1;
                match source.read(*place).await {
                    Ok(sample) => read.borrow_mut()[index] = Some(sample),
                    Err(error) if error.kind() == ErrorKind::Io => {
                        failed.set(failed.get() + 1);
                        first.borrow_mut().get_or_insert(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        }) as LocalBoxFuture<'_, Result<()>>
    });
    join_all(readers.collect()).await.into_iter().collect::<Result<Vec<()>>>()?;
    let read = read.into_inner();
    let all = read.iter().all(Option::is_some);
    let digest = all.then(|| digest(size, read.iter().flatten().map(|sample| &sample[..])));
    let found = read.iter().map(|sample| sample.as_ref().map(|sample| quarters(sample).map(crc32c::crc32c))).collect();
    Ok(Sampled { samples: Samples { size, found, digest }, error: first.into_inner() })
}

fn quarters(sample: &[u8]) -> [&[u8]; 4] {
    std::array::from_fn(|k| &sample[sample.len() * k / 4..sample.len() * (k + 1) / 4])
}

/// Where the samples of a source of `size` bytes are.
fn sample_places(size: u64) -> Vec<ByteRange> {
    let whole = size <= SAMPLES * SAMPLE_LEN;
    let count = if whole { size.div_ceil(SAMPLE_LEN) } else { SAMPLES };
    (0..count)
        .filter_map(|i| {
            let start = match i {
                _ if whole => i * SAMPLE_LEN,
                _ if i == SAMPLES - 1 => size - SAMPLE_LEN,
                _ => {
                    let exact = u128::from(size - SAMPLE_LEN) * u128::from(i) / u128::from(SAMPLES - 1);
                    exact as u64 / SAMPLE_LEN * SAMPLE_LEN
                }
            };
            ByteRange::between(start, size.min(start + SAMPLE_LEN))
        })
        .collect()
}

fn digest<'a>(size: u64, samples: impl Iterator<Item = &'a [u8]>) -> [u8; 16] {
    let mut lanes = [crc32c::crc32c(&size.to_le_bytes()); 4];
    for sample in samples {
        for (lane, quarter) in lanes.iter_mut().zip(quarters(sample)) {
            *lane = crc32c::crc32c_append(*lane, quarter);
        }
    }
    digest_of(lanes)
}

fn digest_of(lanes: [u32; 4]) -> [u8; 16] {
    let mut digest = [0; 16];
    for (place, lane) in digest.chunks_exact_mut(4).zip(lanes) {
        place.copy_from_slice(&lane.to_le_bytes());
    }
    digest
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bail;
    use crate::io_frontend::request::{Allocation, Extent};
    use crate::units::DEVICE_SIZE_MAX;
    use futures_lite::future::{block_on, yield_now};
    use proptest::prelude::*;

    /// Content by a function of the offset; every read yields a few times and counts how many are going on.
    struct Pattern<'a> {
        size: u64,
        byte: &'a dyn Fn(u64) -> u8,
        going_on: Cell<usize>,
        most: Cell<usize>,
        fails_at: Option<u64>,
    }

    impl Source for Pattern<'_> {
        fn size(&self) -> u64 {
            self.size
        }
        fn read(&self, range: ByteRange) -> LocalBoxFuture<'_, Result<DmaBuf>> {
            assert!(range.end() <= self.size);
            Box::pin(async move {
                self.going_on.set(self.going_on.get() + 1);
                self.most.set(self.most.get().max(self.going_on.get()));
                for _ in 0..1 + range.start() % 5 {
                    yield_now().await;
                }
                self.going_on.set(self.going_on.get() - 1);
                if self.fails_at.is_some_and(|at| range.start() <= at && at < range.end()) {
                    bail!(Io, "bad sector");
                }
                let mut buf = DmaBuf::new(range.len() as usize);
                buf.iter_mut().zip(range.start()..).for_each(|(b, at)| *b = (self.byte)(at));
                Ok(buf)
            })
        }
        fn allocation(&self, _: ByteRange) -> LocalBoxFuture<'_, Result<Vec<Extent<Allocation>>>> {
            Box::pin(async { bail!(Failed, "not asked for") })
        }
    }

    fn pattern(size: u64, byte: &dyn Fn(u64) -> u8) -> Pattern<'_> {
        Pattern { size, byte, going_on: Cell::new(0), most: Cell::new(0), fails_at: None }
    }
    fn of(size: u64, byte: &dyn Fn(u64) -> u8) -> SourceFingerprint {
        block_on(fingerprint(&pattern(size, byte))).unwrap()
    }

    /// The format is part of the metadata: these values never change.
    #[test]
    fn golden() {
        let byte = |at: u64| (at ^ (at >> 8) ^ (at >> 16)) as u8;
        let hex = |f: SourceFingerprint| f.digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let cases = GOLDEN;
        for (size, samples, digest) in cases {
            let print = of(size, &byte);
            assert_eq!((print.size, print.samples, hex(print).as_str()), (size, samples, digest));
        }
    }
    // Computed by an independent implementation of the format above.
    const GOLDEN: [(u64, u32, &str); 3] = [
        (1, 1, "adcf14c5adcf14c5adcf14c5ebbedb4f"),
        (100_001, 25, "21db97126d0bbfcf51653bfd85ad6929"),
        (1 << 40, 64, "84781b8563260d31bbb3dbe85cedcd5c"),
    ];

    #[test]
    fn notices_what_it_samples() {
        for size in [1, 4095, 4096, 4097, 262_144, 262_145, 1 << 30, DEVICE_SIZE_MAX] {
            let base = of(size, &|_| 7);
            assert_eq!(base, of(size, &|_| 7));
            assert_ne!(base, of(size, &|_| 8));
            assert_ne!(base, of(size, &|at| if at == 0 { 6 } else { 7 }), "first byte of {size}");
            assert_ne!(base, of(size, &|at| if at == size - 1 { 6 } else { 7 }), "last byte of {size}");
            assert_ne!(base.digest, of(size + 1 - size / 2, &|_| 7).digest, "half of {size}");
        }
        // Two samples exchanged: order counts.
        assert_ne!(of(8192, &|at| (at < 4096) as u8), of(8192, &|at| (at >= 4096) as u8));
    }

    #[test]
    fn reads_in_parallel_within_its_bound_and_reports_errors() {
        let mut source = pattern(1 << 30, &|_| 1);
        block_on(fingerprint(&source)).unwrap();
        assert_eq!(source.most.get(), SAMPLES_IN_FLIGHT);
        source.fails_at = Some((1 << 30) - 1);
        assert_eq!(block_on(fingerprint(&source)).unwrap_err().to_string(), "bad sector");
    }

    /// What a source of 1 GiB of `byte` has: those samples of it.
    pub fn of_parts(byte: u8, parts: std::ops::Range<usize>) -> Samples {
        let Sampled { mut samples, .. } = block_on(sample(&pattern(1 << 30, &|at| byte ^ (at >> 20) as u8))).unwrap();
        samples.digest = None;
        samples.found.iter_mut().enumerate().filter(|(i, _)| !parts.contains(i)).for_each(|(_, one)| *one = None);
        samples
    }
    pub fn whole(byte: u8) -> SourceFingerprint {
        of(1 << 30, &|at| byte ^ (at >> 20) as u8)
    }

    #[test]
    fn what_was_read_in_parts_has_the_same_digest() {
        let mut parts = of_parts(7, 0..20);
        assert_eq!(parts.fingerprint(), None);
        parts.add(&of_parts(7, 20..64));
        assert_eq!(parts.fingerprint(), Some(whole(7)));
        let mut source = pattern(100_001, &|at| at as u8);
        source.fails_at = Some(100_000);
        let Sampled { mut samples, error } = block_on(sample(&source)).unwrap();
        assert_eq!((samples.read_count(), error.unwrap().to_string().as_str()), (24, "bad sector"));
        source.fails_at = Some(5000);
        samples.add(&block_on(sample(&source)).unwrap().samples);
        assert_eq!(samples.fingerprint(), Some(of(100_001, &|at| at as u8)), "the last sample is short");
    }

    proptest! {
        #[test]
        fn places_are_inside_ordered_and_reach_both_ends(size in prop_oneof![1u64..600_000, 1u64..=DEVICE_SIZE_MAX]) {
            let places = sample_places(size);
            prop_assert!(!places.is_empty() && places.len() as u64 <= SAMPLES);
            prop_assert_eq!(places[0].start(), 0);
            prop_assert_eq!(places.last().unwrap().end(), size);
            prop_assert!(places.windows(2).all(|w| w[0].start() < w[1].start()));
            prop_assert!(places.iter().all(|p| p.len() <= SAMPLE_LEN && p.end() <= size));
            if size <= SAMPLES * SAMPLE_LEN {
                prop_assert_eq!(places.iter().map(|p| p.len()).sum::<u64>(), size);
            }
        }
    }
}
