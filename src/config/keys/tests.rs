use super::*;
use crate::config::fault::Fault;
use crate::config::node::{Table, read};
use crate::config::spec::{CloneSpec, DaemonSpec, MetricsDumpSpec, NbdSpec, UblkSpec};
use crate::runtime_dir::RuntimeDir;
use serde::de::DeserializeOwned;
use std::path::Path;

/// What is wrong with a table of this one key.
fn faults_of(header: &str, line: &str) -> Vec<Fault> {
    fn faults<T: DeserializeOwned + Default>(line: &str) -> Vec<Fault> {
        let mut faults = Vec::new();
        let table = toml::de::DeTable::parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        read::<T>(&Table::of_toml(table.into_inner()), &mut faults);
        faults
    }
    match header {
        "[daemon]" => faults::<DaemonSpec>(line),
        "[daemon.metrics_dump]" => faults::<MetricsDumpSpec>(line),
        "[[clone]]" => faults::<CloneSpec>(line),
        "[clone.nbd]" => faults::<NbdSpec>(line),
        "[clone.ublk]" => faults::<UblkSpec>(line),
        other => panic!("{other}"),
    }
}

fn section(header: &str) -> &'static Section {
    SECTIONS.iter().find(|section| section.header == header).unwrap()
}

#[test]
fn every_field_is_a_key_and_every_key_a_field() {
    for (header, fields, tables) in [
        ("[daemon]", fields_of::<DaemonSpec>(), &["metrics_dump"][..]),
        ("[daemon.metrics_dump]", fields_of::<MetricsDumpSpec>(), &[]),
        ("[[clone]]", fields_of::<CloneSpec>(), &["nbd", "ublk"]),
        ("[clone.nbd]", fields_of::<NbdSpec>(), &[]),
        ("[clone.ublk]", fields_of::<UblkSpec>(), &[]),
    ] {
        let names: Vec<&str> = section(header).keys.iter().map(|key| key.name).chain(tables.iter().copied()).collect();
        assert!(!fields.is_empty());
        assert_eq!(names, fields, "{header}");
    }
    assert_eq!(SECTIONS.len(), 5);
}

#[test]
fn bounds_are_those_of_the_types() {
    let mut tried = 0;
    for (header, key) in SECTIONS.iter().flat_map(|section| section.keys.iter().map(|key| (section.header, key))) {
        let name = key.name;
        let mut check = |value: String, good: bool| {
            let faults = faults_of(header, &format!("{name} = {value}"));
            assert_eq!(faults.is_empty(), good, "{header} {name} = {value}: {faults:?}");
            tried += 1;
        };
        let mut bounds = |min: u64, max: u64, unit: &str| {
            check(format!("'{min}{unit}'"), true);
            check(format!("'{max}{unit}'"), true);
            check(format!("'{}{unit}'", max + 1), false);
            if min > 0 {
                check(format!("'{}{unit}'", min - 1), false);
            }
        };
        match key.kind {
            Size(min, max) => bounds(min, max, ""),
            Time(min, max) => bounds(min, max, "us"),
            PowerOfTwo(min, max) => {
                for (size, good) in [(min, true), (max, true), (min / 2, false), (max * 2, false), (min * 3, false)] {
                    check(size.to_string(), good);
                }
            }
            Number(min, max) => {
                let (min, max) = (i64::from(min), i64::from(max));
                for (number, good) in [(min, true), (max, true), (min - 1, false), (max + 1, false)] {
                    check(number.to_string(), good);
                }
            }
            Boolean => ["true", "false"].iter().for_each(|word| check((*word).into(), true)),
            OneOf(words) => words.iter().for_each(|word| check(format!("'{word}'"), true)),
            Path => check("'/a path'".into(), true),
            Other(_) => {}
        }
        check("{}".into(), false);
        check("1.5".into(), false);
    }
    assert!(tried > 80, "{tried}");
}

#[test]
fn defaults_are_those_of_the_types() {
    let dir = RuntimeDir::of_user();
    let mut tried = 0;
    for section in SECTIONS {
        for key in section.keys {
            let Is(value) = key.default else { continue };
            tried += 1;
            let line = format!("{} = {value}", key.name);
            match section.header {
                "[daemon]" => {
                    let config = |text: &str| -> crate::config::DaemonConfig {
                        let mut faults = Vec::new();
                        let table = Table::of_toml(toml::de::DeTable::parse(text).unwrap().into_inner());
                        let spec: DaemonSpec = read(&table, &mut faults);
                        assert_eq!(faults, []);
                        spec.into_config(&dir).unwrap()
                    };
                    // What to log is not known before the default is, in main.rs.
                    match key.name {
                        "log" => assert!(include_str!("../../main.rs").contains(&format!("unwrap_or({value})"))),
                        _ => assert_eq!(config(&line), config(""), "{line}"),
                    }
                }
                "[[clone]]" => {
                    let config = |text: &str| {
                        let required = "name = 'a'\nsource = 's'\ndestination = 'd'\nmetadata = 'm'\n";
                        let text = format!("{required}{text}");
                        let mut faults = Vec::new();
                        let table = Table::of_toml(toml::de::DeTable::parse(&text).unwrap().into_inner());
                        let spec: CloneSpec = read(&table, &mut faults);
                        assert_eq!(faults, []);
                        spec.into_config(&dir).unwrap()
                    };
                    assert_eq!(config(&line), config(""), "{line}");
                }
                other => panic!("no test for {other}"),
            }
        }
    }
    assert!(tried >= 8, "{tried}");
}

/// What is required is missed when it is not there, and nothing else is.
#[test]
fn required_keys_are_missed() {
    let required: Vec<&str> =
        section("[[clone]]").keys.iter().filter(|key| key.default == Required).map(|key| key.name).collect();
    let faults = CloneSpec::default().into_config(&RuntimeDir::of_user()).unwrap_err();
    let missed: Vec<String> = faults.0.iter().map(|fault| fault.keys.join(".")).collect();
    assert_eq!(missed, required);
    assert_eq!(section("[daemon.metrics_dump]").keys.iter().filter(|key| key.default == Required).count(), 1);
    let spec = DaemonSpec { metrics_dump: Some(MetricsDumpSpec::default()), ..DaemonSpec::default() };
    assert_eq!(spec.into_config(&RuntimeDir::of_user()).unwrap_err().0.len(), 1);
}

#[test]
fn the_page_is_as_written() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/config.md");
    let page = page();
    if std::env::var_os("HYDRANT_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&file, &page).unwrap();
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(found == page, "docs/config.md is not what src/config/keys.rs says: HYDRANT_GOLDEN=write writes it");
}
