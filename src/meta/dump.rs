//! What `hydrant meta dump --json` prints, understood again, for `hydrant meta restore`.
//!
//! A dump may have been edited: every key is checked by itself and against the others, and what is wrong is told by its
//! name. Nothing is guessed and nothing is ignored: a key that is not known is refused.

use super::codec::{Classified, CloneState, FORMAT_VERSION, SourceFingerprint, Superblock, UnverifiedSuperblock};
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteSize, Generation, Geometry, RegionSize};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// A dump that checked out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dump {
    pub superblock: Superblock,
    /// First and last region, inclusive; they rise and do not overlap, and are inside the device.
    pub runs: Vec<(u64, u64)>,
}

/// The keys, as they come.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    format: Option<Value>,
    version: Option<Value>,
    uuid: Option<Value>,
    state: Option<Value>,
    generation: Option<Value>,
    created_unix_s: Option<Value>,
    size: Option<Value>,
    region_size: Option<Value>,
    nr_regions: Option<Value>,
    regions_per_zone: Option<Value>,
    nr_zones: Option<Value>,
    hydrated_count: Option<Value>,
    source: Option<Value>,
    destination_id: Option<Value>,
    hydrated: Option<Runs>,
    // Of a dump of dm-clone's metadata, to be told from a mistyped key.
    #[serde(rename = "metadata_blocks")]
    _metadata_blocks: Option<Value>,
    #[serde(rename = "metadata_blocks_allocated")]
    _metadata_blocks_allocated: Option<Value>,
    #[serde(rename = "metadata_blocks_leaked")]
    _metadata_blocks_leaked: Option<Value>,
}

/// Runs that rise and do not overlap.
struct Runs(Vec<(u64, u64)>);

impl<'de> Deserialize<'de> for Runs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Runs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of [first, last] for 'hydrated'")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Runs, A::Error> {
                let mut runs: Vec<(u64, u64)> = Vec::new();
                while let Some(entry) = list.next_element::<Value>()? {
                    let index = runs.len();
                    let wrong = |what: String| de::Error::custom(format!("hydrated[{index}], {entry}: {what}"));
                    let pair = entry.as_array().filter(|pair| pair.len() == 2);
                    let pair = pair.and_then(|pair| Some((pair[0].as_u64()?, pair[1].as_u64()?)));
                    let (first, last) = pair.ok_or_else(|| wrong("not [first, last], two region numbers".into()))?;
                    if first > last {
                        return Err(wrong("its first region is after its last".into()));
                    }
                    if let Some((_, before)) = runs.last()
                        && *before >= first
                    {
                        return Err(wrong(format!(
                            "it overlaps what is before it, or is out of order: that ends at {before}"
                        )));
                    }
                    runs.push((first, last));
                }
                Ok(Runs(runs))
            }
        }
        deserializer.deserialize_seq(InOrder)
    }
}

fn bad(key: &str, what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidRequest, format!("key '{key}': {what}"))
}

fn there<T>(key: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| bad(key, "missing"))
}

fn number(key: &str, value: Option<Value>) -> Result<u64> {
    let value = there(key, value)?;
    value.as_u64().ok_or_else(|| bad(key, format!("{value} is not a number from 0 to 2^64-1")))
}

fn text(key: &str, value: Option<Value>) -> Result<String> {
    match there(key, value)? {
        Value::String(text) => Ok(text),
        other => Err(bad(key, format!("{other} is not a text"))),
    }
}

fn bytes16(key: &str, value: Option<Value>) -> Result<[u8; 16]> {
    let text = text(key, value)?;
    let digit = |i: usize| (text.as_bytes()[i] as char).to_digit(16);
    if text.len() != 32 || (0..32).any(|i| digit(i).is_none()) {
        return Err(bad(key, format!("\"{}\" is not 32 hexadecimal digits", text.escape_debug())));
    }
    Ok(std::array::from_fn(|i| (digit(2 * i).unwrap_or(0) << 4 | digit(2 * i + 1).unwrap_or(0)) as u8))
}

fn source(value: Option<Value>) -> Result<SourceFingerprint> {
    let Value::Object(mut map) = there("source", value)? else { return Err(bad("source", "not an object")) };
    let samples = number("source.samples", map.remove("samples"))?;
    let source = SourceFingerprint {
        size: number("source.size", map.remove("size"))?,
        samples: u32::try_from(samples).map_err(|_| bad("source.samples", format!("{samples} is too large")))?,
        digest: bytes16("source.digest", map.remove("digest"))?,
    };
    match map.keys().next() {
        Some(key) => Err(bad(&format!("source.{key}"), "not known")),
        None => Ok(source),
    }
}

/// That a number is the one that follows from others.
fn follows(key: &str, value: Option<Value>, expected: u64, why: &str) -> Result<()> {
    match number(key, value)? {
        found if found == expected => Ok(()),
        found => Err(bad(key, format!("{found}, but {why} give {expected}"))),
    }
}

impl Dump {
    /// Understands a dump.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let keys: Keys = serde_json::from_slice(json)
            .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("not a dump: {error}")))?;
        match text("format", keys.format)?.as_str() {
            "hydrant" => {}
            "dm-clone" => bail!(
                Unsupported,
                "a dump of dm-clone's metadata: make hydrant's with `hydrant meta import-dm`, from the metadata"
            ),
            other => return Err(bad("format", format!("\"{}\" is not known", other.escape_debug()))),
        }
        let version = number("version", keys.version)?;
        if version != u64::from(FORMAT_VERSION) {
            bail!(Unsupported, "key 'version': {version}, this hydrant knows {FORMAT_VERSION}");
        }
        let uuid = text("uuid", keys.uuid)?;
        let uuid = uuid::Uuid::try_parse(&uuid).map_err(|error| bad("uuid", error))?;
        let state = match text("state", keys.state)?.as_str() {
            "active" => CloneState::Active,
            "complete" => CloneState::Complete,
            other => return Err(bad("state", format!("\"{}\" is neither active nor complete", other.escape_debug()))),
        };
        let size = number("size", keys.size)?;
        let region_size =
            RegionSize::new(number("region_size", keys.region_size)?).map_err(|what| bad("region_size", what))?;
        let regions_per_zone = number("regions_per_zone", keys.regions_per_zone)?;
        let geometry = Geometry::new(size, region_size, regions_per_zone).ok_or_else(|| {
            let size = ByteSize(size);
            bad(
                "size",
                format!("{size} in zones of {regions_per_zone} regions (key 'regions_per_zone') are impossible"),
            )
        })?;
        follows("nr_regions", keys.nr_regions, geometry.nr_regions(), "size and region_size")?;
        follows("nr_zones", keys.nr_zones, geometry.nr_zones(), "nr_regions and regions_per_zone")?;
        let superblock = Superblock {
            uuid: uuid.into_bytes(),
            geometry,
            source: source(keys.source)?,
            destination_id: bytes16("destination_id", keys.destination_id)?,
            state,
            generation: Generation(number("generation", keys.generation)?),
            created_unix_s: number("created_unix_s", keys.created_unix_s)?,
        };
        if superblock.generation.0 == u64::MAX {
            return Err(bad("generation", "too large: no commit could follow"));
        }
        // The limits of the format are the codec's.
        if let Classified::Damaged(what) = UnverifiedSuperblock::new(&superblock.encode()).classify() {
            return Err(bad("regions_per_zone", what));
        }
        let Runs(runs) = there("hydrated", keys.hydrated)?;
        let end = geometry.nr_regions() - 1;
        if let Some(index) = runs.iter().position(|(_, last)| *last > end) {
            let (first, last) = runs[index];
            return Err(bad("hydrated", format!("[{index}], [{first},{last}]: past the last region, {end}")));
        }
        let hydrated = runs.iter().map(|(first, last)| last - first + 1).sum();
        follows("hydrated_count", keys.hydrated_count, hydrated, "the runs of 'hydrated'")?;
        if state == CloneState::Complete && hydrated != geometry.nr_regions() {
            let all = geometry.nr_regions();
            return Err(bad("state", format!("complete, but {hydrated} of {all} regions are hydrated")));
        }
        Ok(Self { superblock, runs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn sample() -> Value {
        json!({
            "format": "hydrant", "version": 1, "uuid": "30313233-3435-3637-3839-616263646566", "state": "active",
            "generation": 9, "created_unix_s": 1_700_000_000, "size": (1 << 30) - 100, "region_size": 65536,
            "nr_regions": 16384, "regions_per_zone": 1000, "nr_zones": 17, "hydrated_count": 1022,
            "source": { "size": (1 << 30) - 100, "samples": 64, "digest": "5a".repeat(16) },
            "destination_id": "d1".repeat(16), "hydrated": [[0, 9], [990, 2000], [16383, 16383]],
        })
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut serde_json::Map<String, Value>), words: &str) {
        let mut dump = sample();
        change(dump.as_object_mut().unwrap());
        let said = Dump::parse(dump.to_string().as_bytes()).unwrap_err().to_string();
        assert!(said.contains(words) && !said.contains('\n'), "'{words}' is not in: {said}");
    }

    #[test]
    fn a_dump_is_understood() {
        let dump = Dump::parse(sample().to_string().as_bytes()).unwrap();
        assert_eq!(dump.runs, [(0, 9), (990, 2000), (16383, 16383)]);
        assert_eq!(dump.superblock, crate::meta::check::tests::sample_of_generation(9));
    }

    #[test]
    fn every_key_is_needed_and_checked() {
        for key in sample().as_object().unwrap().keys() {
            refused(|map| drop(map.remove(key)), &format!("key '{key}': missing"));
            refused(|map| drop(map.insert(key.clone(), json!(true))), key);
            refused(|map| drop(map.insert(key.clone(), json!({}))), key);
            refused(|map| drop(map.insert(key.clone(), json!("?"))), key);
            if key != "generation" && key != "created_unix_s" {
                refused(|map| drop(map.insert(key.clone(), json!(7))), key);
            }
        }
        let set = |key: &'static str, value: Value| {
            move |map: &mut serde_json::Map<String, Value>| {
                map.insert(key.into(), value);
            }
        };
        refused(set("bogus", json!(1)), "unknown field `bogus`");
        refused(set("format", json!("dm-clone")), "hydrant meta import-dm");
        refused(set("version", json!(2)), "key 'version': 2, this hydrant knows 1");
        refused(set("generation", json!(-1)), "key 'generation': -1 is not a number");
        refused(set("generation", json!(u64::MAX)), "too large");
        refused(set("size", json!(u64::MAX)), "key 'size'");
        refused(set("size", json!(0)), "key 'size'");
        refused(set("region_size", json!(12288)), "key 'region_size': region size 12KiB is not a power of two");
        refused(set("nr_regions", json!(16385)), "key 'nr_regions': 16385, but size and region_size give 16384");
        refused(set("regions_per_zone", json!(0)), "regions_per_zone");
        refused(set("hydrated_count", json!(1021)), "key 'hydrated_count': 1021, but the runs of 'hydrated' give 1022");
        refused(set("state", json!("complete")), "key 'state': complete, but 1022 of 16384 regions are hydrated");
        refused(set("destination_id", json!("d1")), "32 hexadecimal digits");
        refused(set("destination_id", json!("ä".repeat(16))), "32 hexadecimal digits");
        refused(|map| map["source"]["x"] = json!(1), "key 'source.x': not known");
        refused(|map| map["source"]["samples"] = json!(1u64 << 32), "key 'source.samples': 4294967296 is too large");
        let large = |map: &mut serde_json::Map<String, Value>| {
            map.insert("regions_per_zone".into(), json!(30_721));
            map.insert("nr_zones".into(), json!(1));
        };
        refused(large, "key 'regions_per_zone': 30721 regions per zone, outside 1 to 30720");
    }

    #[test]
    fn every_run_is_checked() {
        let runs = |runs: Value| {
            move |map: &mut serde_json::Map<String, Value>| {
                map.insert("hydrated".into(), runs);
            }
        };
        refused(runs(json!([[0, 9], [9, 12]])), "hydrated[1], [9,12]: it overlaps what is before it");
        refused(
            runs(json!([[20, 30], [5, 6]])),
            "hydrated[1], [5,6]: it overlaps what is before it, or is out of order",
        );
        refused(runs(json!([[9, 0]])), "hydrated[0], [9,0]: its first region is after its last");
        refused(runs(json!([[0, 16384]])), "key 'hydrated': [0], [0,16384]: past the last region, 16383");
        refused(runs(json!([[1, 2], [16380, 16390], [20000, 20001]])), "[1], [16380,16390]: past the last region");
        refused(runs(json!([[0, u64::MAX]])), "past the last region");
        for odd in
            [json!([1]), json!([[1]]), json!([[1, 2, 3]]), json!([[1, "2"]]), json!([[-1, 2]]), json!([[0.5, 2]])]
        {
            refused(runs(odd), "hydrated[0]");
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        let whole = sample().to_string();
        for len in (0..whole.len()).step_by(7) {
            assert!(Dump::parse(&whole.as_bytes()[..len]).is_err());
        }
        for text in ["", "[]", "1", "{}", "{\"size\":1,\"size\":2}", "\u{0}"] {
            assert!(!Dump::parse(text.as_bytes()).unwrap_err().to_string().contains('\n'));
        }
        assert!(Dump::parse(format!("{whole}{whole}").as_bytes()).is_err());
        assert!(Dump::parse("[".repeat(100_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_edit_gets_a_verdict(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = sample().to_string().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Dump::parse(&bytes);
        }
    }
}
