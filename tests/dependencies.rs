//! What hydrant is made of, by the list in deny.toml: licences, crates in two versions, where they come from.
//!
//! As `cargo deny check licenses bans sources`, for machines without cargo-deny: from `cargo metadata`, offline, of all
//! targets and features. Licences are SPDX expressions as crates have them.

use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}
#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}
#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}
#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}
#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    name_and_version: String,
    reason: String,
}
#[derive(Deserialize)]
struct Sources {
    #[serde(rename = "allow-registry")]
    registries: Vec<String>,
}

struct Package {
    name: String,
    version: String,
    license: String,
    /// `None`: hydrant itself.
    source: Option<String>,
}

fn deny() -> Deny {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml")).unwrap();
    let table = DeTable::parse(&text).unwrap().into_inner();
    serde_json::from_value(Value::Object(table.into_iter().map(|(key, value)| entry(key, value)).collect())).unwrap()
}

fn entry<'a>(key: Spanned<Cow<'a, str>>, value: Spanned<DeValue<'a>>) -> (String, Value) {
    (key.into_inner().into_owned(), json(value.into_inner()))
}

/// The kinds of values that deny.toml has.
fn json(value: DeValue) -> Value {
    match value {
        DeValue::String(text) => text.into_owned().into(),
        DeValue::Boolean(is_so) => is_so.into(),
        DeValue::Array(values) => values.into_iter().map(|value| json(value.into_inner())).collect(),
        DeValue::Table(table) => Value::Object(table.into_iter().map(|(key, value)| entry(key, value)).collect()),
        other => panic!("unexpected in deny.toml: {other:?}"),
    }
}

fn packages() -> Vec<Package> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--locked", "--offline", "--all-features", "--format-version", "1"]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |package: &Value, key: &str| package[key].as_str().map(String::from);
    let package = |package: &Value| Package {
        name: text(package, "name").unwrap(),
        version: text(package, "version").unwrap(),
        license: text(package, "license").unwrap_or_default(),
        source: text(package, "source"),
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

/// Whether an SPDX expression is satisfied by licences that are allowed. AND binds more than OR; `/` is an old OR; an
/// exception (WITH) only permits more; `+` is "or later".
fn is_allowed(expression: &str, allow: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_ascii_whitespace().collect();
    let mut at = 0;
    let result = any(&words, &mut at, allow)?;
    if at == words.len() { Ok(result) } else { Err(format!("'{expression}' is not understood at '{}'", words[at])) }
}

fn any(words: &[&str], at: &mut usize, allow: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut result = all(words, at, allow)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        result |= all(words, at, allow)?;
    }
    Ok(result)
}

fn all(words: &[&str], at: &mut usize, allow: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut result = one(words, at, allow)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        result &= one(words, at, allow)?;
    }
    Ok(result)
}

fn one(words: &[&str], at: &mut usize, allow: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let word = *words.get(*at).ok_or("it ends too early")?;
    *at += 1;
    match word {
        "(" => {
            let result = any(words, at, allow)?;
            *at += 1;
            if words.get(*at - 1) == Some(&")") { Ok(result) } else { Err("a ')' is missing".into()) }
        }
        ")" | "AND" | "OR" | "WITH" => Err(format!("'{word}' where a licence should be")),
        licence => {
            if words.get(*at) == Some(&"WITH") {
                *at += 2;
            }
            Ok(allow(licence.trim_end_matches('+')))
        }
    }
}

/// What is wrong, one line each.
fn judge(deny: &Deny, packages: &[Package]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for Package { name, version, license, source } in packages {
        let Some(source) = source else { continue };
        let allow = |licence: &str| {
            let excepted = deny.licenses.exceptions.iter().filter(|exception| exception.name == *name);
            deny.licenses.allow.iter().chain(excepted.flat_map(|e| &e.allow)).any(|allowed| allowed == licence)
        };
        match is_allowed(license, &allow) {
            Ok(true) => {}
            Ok(false) => wrong.push(format!("{name} {version}: licence '{license}' is not in deny.toml")),
            Err(what) => wrong.push(format!("{name} {version}: licence '{license}': {what}")),
        }
        let registry = source.strip_prefix("registry+");
        if !registry.is_some_and(|registry| deny.sources.registries.iter().any(|allowed| allowed == registry)) {
            wrong.push(format!("{name} {version}: comes from {source}, which is not in deny.toml"));
        }
        let skip = deny.bans.skip.iter().any(|skip| skip.name_and_version == format!("{name}@{version}"));
        if !skip {
            versions.entry(name).or_default().push(version);
        }
    }
    let twice = versions.iter().filter(|(_, versions)| versions.len() > 1);
    wrong.extend(
        twice.map(|(name, versions)| format!("{name}: in {} versions: {}", versions.len(), versions.join(", "))),
    );
    // A list that is longer than it need be hides what comes later.
    for Skip { name_and_version, reason } in &deny.bans.skip {
        let is_there = packages.iter().any(|p| format!("{}@{}", p.name, p.version) == *name_and_version);
        if !is_there || reason.is_empty() {
            wrong.push(format!("deny.toml skips {name_and_version}: it is not there any more, or there is no reason"));
        }
    }
    for Exception { name, .. } in &deny.licenses.exceptions {
        if !packages.iter().any(|package| package.name == *name) {
            wrong.push(format!("deny.toml has an exception for {name}, which is not there any more"));
        }
    }
    wrong
}

#[test]
fn licences_versions_and_sources() {
    let packages = packages();
    assert!(packages.len() > 100, "{} packages only", packages.len());
    let wrong = judge(&deny(), &packages);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn it_bites() {
    let (deny, mut packages) = (deny(), packages());
    let index = "registry+https://github.com/rust-lang/crates.io-index";
    let mut add = |name: &str, license: &str, source: &str| {
        let (name, version) = name.split_once('@').unwrap();
        let source = Some(source.into());
        packages.push(Package { name: name.into(), version: version.into(), license: license.into(), source });
    };
    add("a@1.0.0", "GPL-3.0-only", index);
    add("b@1.0.0", "MIT AND GPL-2.0-only", index);
    add("c@1.0.0", "", index);
    add("d@1.0.0", "MIT OR", index);
    add("e@1.0.0", "MIT", "git+https://example.com/e");
    add("libc@9.0.0", "MIT", index);
    add("f@1.0.0", "MPL-2.0", index);
    let wrong = judge(&deny, &packages);
    let names: Vec<&str> = wrong.iter().map(|line| line.split([' ', ':']).next().unwrap()).collect();
    assert_eq!(names, ["a", "b", "c", "d", "e", "f", "libc"], "{wrong:?}");
}

#[test]
fn expressions() {
    let allow = |licence: &str| ["MIT", "Apache-2.0", "Unicode-3.0"].contains(&licence);
    for (expression, expected) in [
        ("MIT", true),
        ("MIT/Apache-2.0", true),
        ("GPL-2.0 OR MIT", true),
        ("GPL-2.0 OR BSD-3-Clause", false),
        ("(MIT OR GPL-2.0) AND Unicode-3.0", true),
        ("MIT OR GPL-2.0 AND Zlib", true),
        ("(MIT OR GPL-2.0) AND Zlib", false),
        ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", true),
        ("MIT+", true),
    ] {
        assert_eq!(is_allowed(expression, &allow), Ok(expected), "{expression}");
    }
    for odd in ["", "OR", "MIT MIT", "(MIT", "MIT)", "MIT AND"] {
        assert!(is_allowed(odd, &allow).is_err(), "{odd}");
    }
}
