//! Recording: counters, and histograms of times and sizes, for one thread. Pure: the clock is an argument.
//!
//! An HDR histogram of latencies takes [`LATENCY_HISTOGRAM_BYTES`], made when its first value comes: a slice that only
//! reads has two or three of its thirteen. Adding a value costs some ten nanoseconds.

use super::schema::{
    Distribution, HydratedBy, IoCount, IoMetrics, LatencyMetrics, PartCount, PathLatency, RouteMetrics,
};
use hdrhistogram::Histogram;
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Longer latencies count as this one: a minute, in microseconds.
pub const LATENCY_US_MAX: u64 = 60_000_000;
/// Larger sizes (regions of a batch, requests of a commit) count as this.
pub const SIZE_MAX: u64 = u32::MAX as u64;
/// Significant decimal digits: buckets are at most 1 % wide.
const DIGITS: u8 = 2;
/// What a histogram of latencies takes: 128 buckets for each doubling from 128 us to [`LATENCY_US_MAX`] and 256 below,
/// each 8 bytes.
pub const LATENCY_HISTOGRAM_BYTES: u64 = 20 << 10;

/// A histogram, made when it is first used.
pub struct Recorder {
    max: u64,
    kept: RefCell<Option<Box<Kept>>>,
}

struct Kept {
    histogram: Histogram<u64>,
    sum: u64,
    min: u64,
    max: u64,
}

impl Recorder {
    /// Of times, in microseconds up to [`LATENCY_US_MAX`].
    pub const fn of_latency() -> Self {
        Self { max: LATENCY_US_MAX, kept: RefCell::new(None) }
    }
    /// Of numbers up to [`SIZE_MAX`].
    pub const fn of_size() -> Self {
        Self { max: SIZE_MAX, kept: RefCell::new(None) }
    }

    pub fn record(&self, value: u64) {
        let mut kept = self.kept.borrow_mut();
        let kept = kept.get_or_insert_with(|| {
            let histogram = Histogram::new_with_bounds(1, self.max, DIGITS).expect("constant bounds");
            Box::new(Kept { histogram, sum: 0, min: u64::MAX, max: 0 })
        });
        kept.histogram.saturating_record(value);
        kept.sum = kept.sum.saturating_add(value);
        kept.min = kept.min.min(value);
        kept.max = kept.max.max(value);
    }
    pub fn record_time(&self, taken: Duration) {
        self.record(u64::try_from(taken.as_micros()).unwrap_or(u64::MAX));
    }

    /// Costs a walk over all buckets: some ten microseconds.
    pub fn snapshot(&self) -> Option<Distribution> {
        let kept = self.kept.borrow();
        let kept = kept.as_ref()?;
        let buckets = kept.histogram.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value()));
        Distribution::new(buckets.collect(), kept.sum, kept.min, kept.max)
    }

    /// What it takes now, by its number of buckets.
    pub fn memory_bytes(&self) -> u64 {
        let kept = self.kept.borrow();
        kept.as_ref().map_or(0, |kept| (kept.histogram.distinct_values() * size_of::<u64>()) as u64)
    }
}

/// Adds to a counter.
pub fn count(cell: &Cell<u64>, by: u64) {
    cell.set(cell.get().wrapping_add(by));
}

/// A number that goes up and down, and the most that it was.
#[derive(Default)]
pub struct Gauge {
    now: Cell<u64>,
    max: Cell<u64>,
}

impl Gauge {
    pub fn up(&self) {
        self.now.set(self.now.get() + 1);
        self.max.set(self.max.get().max(self.now.get()));
    }
    pub fn down(&self) {
        self.now.set(self.now.get().saturating_sub(1));
    }
    pub fn now(&self) -> u64 {
        self.now.get()
    }
    pub fn max(&self) -> u64 {
        self.max.get()
    }
}

/// Enums whose values are fields of the document.
macro_rules! counted {
    ($(#[$doc:meta])* $name:ident, $count:ident, $document:ident { $($value:ident = $field:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($value),* }
        impl $name {
            pub const ALL: &[Self] = &[$(Self::$value),*];
        }
        impl $document {
            pub fn of(&self, which: $name) -> &$count {
                match which { $($name::$value => &self.$field),* }
            }
            pub fn of_mut(&mut self, which: $name) -> &mut $count {
                match which { $($name::$value => &mut self.$field),* }
            }
        }
    };
}

counted! {
    /// The kinds of client requests that slices serve; flushes are the coordinator's.
    Kind, IoCount, IoMetrics {
        Read = read, Write = write, Trim = trim, WriteZeroes = write_zeroes, Cache = cache, Status = status,
    }
}
counted! {
    /// The ways that a part of a request can take.
    Route, PartCount, RouteMetrics {
        ReadDestination = read_destination,
        ReadSourceKept = read_source_kept,
        ReadSourcePast = read_source_past,
        WriteDestination = write_destination,
        WriteWholeRegion = write_whole_region,
        WritePartialRegion = write_partial_region,
        TrimDestination = trim_destination,
        TrimWholeRegion = trim_whole_region,
        TrimIgnored = trim_ignored,
        WriteZeroesDestination = write_zeroes_destination,
        WriteZeroesWholeRegion = write_zeroes_whole_region,
        WriteZeroesPartialRegion = write_zeroes_partial_region,
        CacheHydrated = cache_hydrated,
        CacheCopied = cache_copied,
    }
}
counted! {
    /// What hydrates a region.
    How, u64, HydratedBy {
        Background = background,
        Zeroes = zeroes,
        Read = read,
        Cache = cache,
        PartialWrite = partial_write,
        Overwrite = overwrite,
        Discard = discard,
    }
}

impl LatencyMetrics {
    pub fn of(&self, kind: Kind) -> &PathLatency {
        match kind {
            Kind::Read => &self.read,
            Kind::Write => &self.write,
            Kind::Trim => &self.trim,
            Kind::WriteZeroes => &self.write_zeroes,
            Kind::Cache => &self.cache,
            Kind::Status => &self.status,
        }
    }
    fn of_mut(&mut self, kind: Kind) -> &mut PathLatency {
        match kind {
            Kind::Read => &mut self.read,
            Kind::Write => &mut self.write,
            Kind::Trim => &mut self.trim,
            Kind::WriteZeroes => &mut self.write_zeroes,
            Kind::Cache => &mut self.cache,
            Kind::Status => &mut self.status,
        }
    }
}

/// Requests and bytes of one kind.
#[derive(Default)]
pub struct IoCounter {
    requests: Cell<u64>,
    bytes: Cell<u64>,
    errors: Cell<u64>,
}

impl IoCounter {
    pub fn request(&self, bytes: u64) {
        count(&self.requests, 1);
        count(&self.bytes, bytes);
    }
    pub fn error(&self) {
        count(&self.errors, 1);
    }
    pub fn snapshot(&self) -> IoCount {
        IoCount { requests: self.requests.get(), bytes: self.bytes.get(), errors: self.errors.get() }
    }
}

#[derive(Default)]
struct PartCounter {
    parts: Cell<u64>,
    bytes: Cell<u64>,
}

struct PathRecorder {
    destination: Recorder,
    source: Recorder,
}

/// What one slice counts and times.
pub struct SliceRecorder {
    kinds: [IoCounter; Kind::ALL.len()],
    routes: [PartCounter; Route::ALL.len()],
    hydrated: [Cell<u64>; How::ALL.len()],
    latencies: [PathRecorder; Kind::ALL.len()],
    /// Client requests being served.
    pub in_flight: Gauge,
    pub source_read: IoCounter,
    pub source_read_latency: Recorder,
    pub copy_latency: Recorder,
    pub batch_regions: Recorder,
    /// Of regions that were brought in from the source, its zeros included.
    pub hydrated_bytes: Cell<u64>,
    /// Of them, those that were read and stored.
    pub copied_bytes: Cell<u64>,
    /// Read from the source, for whatever it was and whatever became of it.
    pub source_read_bytes: Cell<u64>,
    /// Of that, for clients and not kept.
    pub read_past_bytes: Cell<u64>,
    /// Of hydrated regions, what was not written as data.
    pub zero_bytes: Cell<u64>,
    pub copy_failures: Cell<u64>,
}

impl Default for SliceRecorder {
    fn default() -> Self {
        let path = || PathRecorder { destination: Recorder::of_latency(), source: Recorder::of_latency() };
        Self {
            kinds: Default::default(),
            routes: Default::default(),
            hydrated: Default::default(),
            latencies: std::array::from_fn(|_| path()),
            in_flight: Gauge::default(),
            source_read: IoCounter::default(),
            source_read_latency: Recorder::of_latency(),
            copy_latency: Recorder::of_latency(),
            batch_regions: Recorder::of_size(),
            hydrated_bytes: Cell::default(),
            copied_bytes: Cell::default(),
            source_read_bytes: Cell::default(),
            read_past_bytes: Cell::default(),
            zero_bytes: Cell::default(),
            copy_failures: Cell::default(),
        }
    }
}

impl SliceRecorder {
    /// A request has come.
    pub fn request(&self, kind: Kind, bytes: u64) {
        self.kinds[kind as usize].request(bytes);
    }
    /// It has failed.
    pub fn error(&self, kind: Kind) {
        self.kinds[kind as usize].error();
    }
    /// It was served, with or without waiting for the source.
    pub fn served(&self, kind: Kind, used_source: bool, taken: Duration) {
        let path = &self.latencies[kind as usize];
        if used_source { &path.source } else { &path.destination }.record_time(taken);
    }
    /// A part of one was.
    pub fn part(&self, route: Route, bytes: u64) {
        let counter = &self.routes[route as usize];
        count(&counter.parts, 1);
        count(&counter.bytes, bytes);
    }
    /// Regions were hydrated.
    pub fn hydrated(&self, how: How, regions: u64) {
        count(&self.hydrated[how as usize], regions);
    }

    pub fn io(&self) -> IoMetrics {
        let mut io = IoMetrics::default();
        Kind::ALL.iter().for_each(|kind| *io.of_mut(*kind) = self.kinds[*kind as usize].snapshot());
        io
    }
    pub fn routes(&self) -> RouteMetrics {
        let mut routes = RouteMetrics::default();
        for route in Route::ALL {
            let counter = &self.routes[*route as usize];
            *routes.of_mut(*route) = PartCount { parts: counter.parts.get(), bytes: counter.bytes.get() };
        }
        routes
    }
    pub fn hydrated_by(&self) -> HydratedBy {
        let mut by = HydratedBy::default();
        How::ALL.iter().for_each(|how| *by.of_mut(*how) = self.hydrated[*how as usize].get());
        by
    }
    pub fn latencies(&self) -> LatencyMetrics {
        let mut latencies = LatencyMetrics::default();
        for kind in Kind::ALL {
            let path = &self.latencies[*kind as usize];
            *latencies.of_mut(*kind) =
                PathLatency { destination: path.destination.snapshot(), source: path.source.snapshot() };
        }
        latencies
    }

    /// What its histograms take.
    pub fn memory_bytes(&self) -> u64 {
        let paths = self.latencies.iter().flat_map(|path| [&path.destination, &path.source]);
        let others = [&self.source_read_latency, &self.copy_latency, &self.batch_regions];
        paths.chain(others).map(Recorder::memory_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_takes_what_is_documented_and_nothing_before_its_first_value() {
        let recorder = Recorder::of_latency();
        assert_eq!((recorder.memory_bytes(), recorder.snapshot()), (0, None));
        recorder.record_time(Duration::from_micros(7));
        assert_eq!(recorder.memory_bytes(), LATENCY_HISTOGRAM_BYTES);
    }

    #[test]
    fn values_are_kept_to_two_digits_and_never_lost() {
        let recorder = Recorder::of_latency();
        for us in 1..=10_000 {
            recorder.record(us);
        }
        let found = recorder.snapshot().unwrap();
        assert_eq!((found.count, found.min, found.max, found.sum), (10_000, 1, 10_000, 50_005_000));
        assert!((found.mean - 5000.5).abs() < 1e-9);
        for (quantile, exact) in [(found.p50, 5_000), (found.p90, 9_000), (found.p99, 9_900), (found.p999, 9_990)] {
            assert!(quantile >= exact && quantile <= exact + exact / 100 + 1, "{quantile}, not {exact}");
        }
        assert!(found.buckets.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(found.buckets.iter().map(|(_, count)| count).sum::<u64>(), 10_000);

        // Beyond the range at both ends.
        recorder.record(0);
        recorder.record(u64::MAX);
        let found = recorder.snapshot().unwrap();
        assert_eq!((found.count, found.min, found.max, found.sum), (10_002, 0, u64::MAX, u64::MAX));
    }

    #[test]
    fn every_value_of_an_enum_is_a_field_of_its_own() {
        let recorder = SliceRecorder::default();
        for (bytes, kind) in (1..).zip(Kind::ALL) {
            recorder.request(*kind, bytes);
            recorder.served(*kind, false, Duration::from_micros(bytes));
        }
        (1..).zip(Route::ALL).for_each(|(bytes, route)| recorder.part(*route, bytes));
        (1..).zip(How::ALL).for_each(|(regions, how)| recorder.hydrated(*how, regions));
        recorder.error(Kind::Status);
        for (bytes, kind) in (1..).zip(Kind::ALL) {
            let errors = u64::from(*kind == Kind::Status);
            assert_eq!(*recorder.io().of(*kind), IoCount { requests: 1, bytes, errors });
            assert_eq!(recorder.latencies().of(*kind).destination.as_ref().unwrap().max, bytes);
            assert_eq!(recorder.latencies().of(*kind).source, None);
        }
        for (bytes, route) in (1..).zip(Route::ALL) {
            assert_eq!(*recorder.routes().of(*route), PartCount { parts: 1, bytes });
        }
        for (regions, how) in (1..).zip(How::ALL) {
            assert_eq!(*recorder.hydrated_by().of(*how), regions);
        }
        assert_eq!(recorder.memory_bytes(), Kind::ALL.len() as u64 * LATENCY_HISTOGRAM_BYTES);
    }

    #[test]
    fn a_gauge_remembers_its_maximum() {
        let gauge = Gauge::default();
        (0..3).for_each(|_| gauge.up());
        gauge.down();
        assert_eq!((gauge.now(), gauge.max()), (2, 3));
    }
}
