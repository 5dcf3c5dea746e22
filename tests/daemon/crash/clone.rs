//! One clone under test: its files, its source, its model, and what its files are compared with after a kill.

use super::client::{Connection, Verb};
use super::content::{ATOM, Content, Random};
use super::model::Model;
use super::options::LifeOptions;
use super::place::Place;
use crate::harness::*;
use crate::load::ZONE;
use serde_json::Value as Json;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// From the kill until nothing is locked any more.
const UNLOCKED_TIME_MAX: Duration = Duration::from_secs(10);

/// What a clone's metadata say.
struct Bits {
    size: u64,
    /// Runs of hydrated regions, first and last.
    runs: Vec<(u64, u64)>,
    complete: bool,
}

impl Bits {
    fn has(&self, region: u64) -> bool {
        let after = self.runs.partition_point(|(first, _)| *first <= region);
        after > 0 && region <= self.runs[after - 1].1
    }
    fn count(&self) -> u64 {
        self.runs.iter().map(|(first, last)| last - first + 1).sum()
    }
}

/// Around the borders of zones, and where the clone ends now and later.
fn around_zones(size: u64, size_max: u64) -> Vec<Range<u64>> {
    let borders = (0..=size / ZONE).map(|nr| (nr * ZONE).saturating_sub(MIB)..(nr * ZONE + MIB).min(size_max));
    let mut windows: Vec<Range<u64>> = Vec::new();
    let end = size.saturating_sub(MIB) / ATOM * ATOM..size_max;
    for window in borders.chain(std::iter::once(end)) {
        match windows.last_mut() {
            Some(last) if last.end >= window.start => last.end = window.end,
            _ => windows.push(window),
        }
    }
    windows
}

/// One clone, with its own directories.
pub struct Clone {
    pub name: String,
    /// Keeps its files.
    _bench: Bench,
    pub place: Place,
    pub source: PathBuf,
    pub server: Option<(Nbdkit, String)>,
    pub model: Arc<Mutex<Model>>,
    pub region: u64,
    /// What the source has by now.
    pub source_size: u64,
    pub size_max: u64,
    /// By the metadata that were last seen.
    pub hydrated: u64,
    pub complete: bool,
    pub formatted: bool,
    /// A growth was begun, and may have been interrupted.
    pub growing: bool,
}

impl Clone {
    pub fn new(name: &str, random: &mut Random) -> Self {
        let bench = Bench::new();
        let many_zones = random.chance(20);
        let can_grow = random.chance(40);
        let region = match many_zones {
            true => 4096,
            false => random.pick(&[4, 4, 8, 16, 64, 64, 64, 128, 512, 1024, 2048]) << 10,
        };
        let body = match many_zones {
            // Growing, it gets another zone.
            true if can_grow => ZONE * random.between(1..3) - random.below(2 * MIB),
            true => ZONE * random.between(1..3) + random.below(3 * MIB),
            false => region.max(random.between(MIB..10 * MIB)) + random.below(region),
        };
        let size = match random.below(4) {
            _ if can_grow => body / ATOM * ATOM,
            0 => body / 4096 * 4096,
            _ => body,
        };
        let size_max = if can_grow { size + random.between(1..5) * MIB } else { size };
        let windows = if many_zones { around_zones(size, size_max) } else { std::iter::once(0..size_max).collect() };
        let content = Content { id: random.next() as u32, windows, holes_percent: random.pick(&[0, 15, 45]) };
        let source = bench.path("source");
        content.write_source(&source, 0, size);
        let server = random.chance(50).then(|| {
            let delay = random.pick(&["", "", "rdelay=1ms", "rdelay=8ms"]);
            let filter = if delay.is_empty() { "" } else { "--filter=delay" };
            let args = format!("-r {filter} file {} {delay}", source.display());
            (Nbdkit::start(&bench, &args), args)
        });
        let place = Place::random(&bench, size_max, !can_grow, random);
        let model = Arc::new(Mutex::new(Model::new(content, size, region)));
        Self {
            name: name.into(),
            _bench: bench,
            place,
            source,
            server,
            model,
            region,
            source_size: size,
            size_max,
            hydrated: 0,
            complete: false,
            formatted: false,
            growing: false,
        }
    }

    pub fn describe(&self) -> String {
        let size = self.model.lock().unwrap_or_else(PoisonError::into_inner).size;
        let from = self.server.as_ref().map_or("a file", |(_, args)| args.as_str());
        let (name, region, place, size_max) = (&self.name, self.region, self.place.kind, self.size_max);
        format!("{name}: {size} bytes in regions of {region} from {from} to {place}, up to {size_max} bytes")
    }

    pub fn source_address(&self) -> String {
        match &self.server {
            Some((server, _)) => server.uri(),
            None => self.source.display().to_string(),
        }
    }

    pub fn table(&self, options: &LifeOptions) -> String {
        format!(
            "[[clone]]\nname = \"{}\"\nsource = \"{}\"\ndestination = \"{}\"\nmetadata = \"{}\"\nregion_size = {}\n{}",
            self.name,
            self.source_address(),
            self.place.destination.display(),
            self.place.metadata.display(),
            self.region,
            options.keys()
        )
    }

    /// Reads all windows through the daemon.
    pub fn read_all(&self, connection: &mut Connection) -> Result<(), String> {
        let windows = self.model.lock().unwrap().content.windows.clone();
        for window in windows {
            let mut at = window.start;
            while at < window.end.min(connection.size) {
                let end = (at + MIB).min(window.end).min(connection.size);
                let reading = self.model.lock().unwrap().reading(at..end);
                let mut bytes = vec![0; (end - at) as usize];
                connection.ask(Verb::READ, at, &mut bytes).map_err(|error| format!("READ at {at}: {error}"))?;
                self.model.lock().unwrap().read(reading, &bytes)?;
                at = end;
            }
        }
        Ok(())
    }

    /// What its metadata say; `None` when they were never made.
    fn bits(&self) -> Option<Bits> {
        let meta = &self.place.metadata;
        let (status, text) = run_for_status(
            env!("CARGO_BIN_EXE_hydrant"),
            &["meta".as_ref(), "dump".as_ref(), "--json".as_ref(), meta.as_os_str()],
        );
        if status != 0 {
            let never = ["No such file or directory", "never formatted"];
            assert!(
                !self.formatted && never.iter().any(|words| text.contains(words)),
                "{}: its metadata can't be read: {text}",
                self.describe()
            );
            return None;
        }
        let json: Json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let number = |value: &Json| value.as_u64().expect("a number");
        let runs = json["hydrated"].as_array().expect("an array");
        Some(Bits {
            size: number(&json["size"]),
            runs: runs.iter().map(|run| (number(&run[0]), number(&run[1]))).collect(),
            complete: json["state"] == "complete",
        })
    }

    /// It has its source's size from now on.
    pub fn grown(&mut self) {
        self.model.lock().unwrap().grow(self.source_size);
        // New regions have everything still to do.
        self.complete = false;
    }

    /// Nobody uses it: compares its files with the model. Returns how long they stayed locked.
    pub fn settle(&mut self) -> Duration {
        let began = Instant::now();
        for path in [&self.place.destination, &self.place.metadata] {
            if path.exists() {
                let seconds = UNLOCKED_TIME_MAX.as_secs().to_string();
                run("flock", &["-x".as_ref(), "-w".as_ref(), seconds.as_ref(), path.as_os_str(), "true".as_ref()]);
            }
        }
        let unlocked = began.elapsed();
        let Some(bits) = self.bits() else { return unlocked };
        let what = self.describe();
        let mut model = self.model.lock().unwrap();
        self.formatted = true;
        if self.growing {
            // New regions have everything still to do.
            self.complete = false;
        }
        if bits.size != model.size {
            assert!(self.growing && bits.size == self.source_size, "{what}: it has {} bytes", bits.size);
            model.grow(bits.size);
        }
        assert!(bits.count() >= self.hydrated, "{what}: {} regions after {}", bits.count(), self.hydrated);
        assert!(bits.complete || !self.complete, "{what}: it was complete");
        assert!(
            !bits.complete || bits.count() == model.size.div_ceil(self.region),
            "{what}: complete without all bits"
        );
        (self.hydrated, self.complete) = (bits.count(), bits.complete);
        let copy = File::open(&self.place.bytes).unwrap_or_else(|error| panic!("{what}: its destination: {error}"));
        let read = |at: u64, out: &mut [u8]| {
            copy.read_exact_at(out, at).unwrap_or_else(|error| panic!("its destination at {at}: {error}"));
        };
        model.settle(|region| bits.has(region), read).unwrap_or_else(|error| panic!("{what}: {error}"));
        unlocked
    }
}
