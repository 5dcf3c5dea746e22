//! Holds the layers of `src/lib.rs`: a file uses only its own layer and the ones below.
//!
//! Reads the sources as text: every path that begins with `crate::` or `super::`, in `use` lines and elsewhere, but
//! not in comments and not in test modules. Every file must have a layer here; so a new one fails this test until
//! somebody has thought about where it belongs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Files by layer, without `.rs`; `dir/*` is all of a directory, where a file has no line of its own.
const LAYERS: [&str; 5] = [
    // 0, vocabulary.
    "units version error dma_buf zeroed dma_buf/* io_frontend/request",
    // 1, pure decisions: no I/O, no async, no clock.
    "meta/mod meta/codec meta/region_map meta/hydrated_bits meta/runs meta/commit meta/growth meta/check meta/dm meta/dm/* meta/dump meta/repair
     shard/plan shard/inflight shard/direct_writes disk/transfer hydration_failures hydration_sched hydration_share events events/* log_limit signatures human
     dm_table
     daemon/rate control/api control/query
     source/uri source/nbd/assembly
     metrics metrics/schema metrics/record metrics/text
     io_frontend/nbd/proto io_frontend/nbd/proto/* io_frontend/nbd/limits io_frontend/nbd/stats
     io_frontend/nbd/handshake io_frontend/nbd/admit io_frontend/nbd/reply
     io_frontend/ublk/proto io_frontend/ublk/shape io_frontend/ublk/takeover io_frontend/ublk/admit io_frontend/ublk/stats io_frontend/ublk/affinity
     device_mapper/proto device_mapper/takeover",
    // 2, generic async, over the traits Disk, Source, Env and Mesh.
    "disk env source local local/* event_log hydration_budget clone_state clone_state/* coordinator coordinator/*
     meta/store meta/store/sim shard shard/slice shard/slice/* shard/copy shard/copy_pool shard/hydrator
     shard/dispatch shard/gate shard/locks
     source/file source/padded source/remote source/fingerprint source/identity source/nbd/status_cache
     sim sim/*",
    // 3, edges: the kernel, sockets, glommio.
    "ring ring/* kept_bits net metrics/* disk/ring disk/blocking env/glommio shard/pool device_mapper device_mapper/* environment locked_memory service_manager unix_socket devices devices/*
     source/nbd source/nbd/* io_frontend io_frontend/nbd io_frontend/nbd/* io_frontend/ublk io_frontend/ublk/*",
    // 4, product.
    "lib main cli targets cli/* metrics/dump config config/* runtime_dir commands commands/* commands/meta/* control control/* daemon daemon/* daemon/registry/*
     demo demo/*",
];

/// What a layer has nothing to do with, as it would be written in the code.
const FOREIGN: [(usize, &[&str]); 3] = [
    (0, &["glommio", "io_uring::", "std::fs", "std::net", "std::thread", "Instant::", "SystemTime::", "async "]),
    (1, &["glommio", "io_uring::", "std::fs", "std::net", "std::thread", "Instant::", "SystemTime::", "async "]),
    (2, &["glommio", "io_uring::", "std::fs", "std::net", "std::thread", "Instant::now"]),
];

/// A source file of the library.
struct Source {
    /// As in [`LAYERS`].
    name: String,
    /// Its module: `["shard", "plan"]`.
    module: Vec<String>,
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let is_test = |name: &Path| name.iter().any(|part| part == "tests");
    let named = found.into_iter().map(|path| (path.strip_prefix(&root).unwrap().with_extension(""), path));
    let mut sources: Vec<_> =
        named.filter(|(name, _)| !is_test(name)).map(|(name, path)| source(&name, &path)).collect();
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    sources
}

fn source(name: &Path, path: &PathBuf) -> Source {
    let name = name.to_str().unwrap().to_owned();
    let mut module: Vec<String> = name.split('/').map(String::from).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    let text = without_comments(&fs::read_to_string(path).unwrap());
    Source { name, module, code: without_declarations(&without_tests(&text)) }
}

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// `mod x;` names a module, but does not use it.
fn without_declarations(code: &str) -> String {
    let declares = |line: &&str| line.trim_start_matches("pub ").starts_with("mod ") && line.ends_with(';');
    code.lines().filter(|line| !declares(line)).collect::<Vec<_>>().join("\n")
}

/// Cuts out every item under `#[cfg(test)]`: to its semicolon, or to the end of its braces.
fn without_tests(code: &str) -> String {
    let (mut rest, mut kept) = (code, String::new());
    while let Some((before, after)) = rest.split_once("#[cfg(test)]") {
        kept.push_str(before);
        let end = after.find([';', '{']).unwrap_or(after.len());
        rest = match after[end..].starts_with('{') {
            // rustfmt puts the closing brace of a top-level item at the start of a line.
            true => after.find("\n}").map_or("", |end| &after[end + 2..]),
            false => after.get(end + 1..).unwrap_or(""),
        };
    }
    kept + rest
}

/// The paths from the root of the crate that a file names.
fn paths(source: &Source) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for (at, _) in source.code.match_indices("::") {
        let before = &source.code[..at];
        let word =
            |text: &str| text.rsplit(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or("").to_owned();
        let rest = &source.code[at + 2..];
        match word(before).as_str() {
            "crate" => tree(rest, &[], &mut paths),
            // Of a chain of them, the first one: it knows how many follow.
            "super" if !before.ends_with("::super") => {
                let ups = 1 + rest.split("::").take_while(|part| *part == "super").count();
                let base = source.module.len().saturating_sub(ups);
                tree(&rest["super::".len() * (ups - 1)..], &source.module[..base], &mut paths);
            }
            _ => {}
        }
    }
    paths
}

/// Reads `a::b`, `a::{b, c::d}`; returns what is left.
fn tree(text: &str, base: &[String], paths: &mut Vec<Vec<String>>) {
    fn read<'a>(text: &'a str, base: &[String], paths: &mut Vec<Vec<String>>) -> &'a str {
        let text = text.trim_start();
        if let Some(mut inside) = text.strip_prefix('{') {
            loop {
                inside = inside.trim_start();
                if let Some(after) = inside.strip_prefix('}') {
                    return after;
                }
                let after = read(inside, base, paths);
                // ` as name`, then a comma or the end.
                inside =
                    after.find([',', '}']).map_or("", |end| after[end..].strip_prefix(',').unwrap_or(&after[end..]));
                if inside.is_empty() {
                    return inside;
                }
            }
        }
        let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
        let mut path = base.to_vec();
        if end > 0 && &text[..end] != "self" {
            path.push(text[..end].to_owned());
        }
        match text[end..].strip_prefix("::") {
            Some(rest) if end > 0 => read(rest, &path, paths),
            _ => {
                paths.push(path);
                &text[end..]
            }
        }
    }
    read(text, base, paths);
}

fn layer_of(name: &str) -> Option<usize> {
    let find = |entry: &str| LAYERS.iter().position(|entries| entries.split_ascii_whitespace().any(|e| e == entry));
    find(name).or_else(|| find(&format!("{}/*", name.rsplit_once('/')?.0)))
}

#[test]
fn no_layer_reaches_up() {
    let sources = sources();
    assert!(sources.len() > 60, "the sources are found");
    let modules: BTreeMap<&[String], &str> =
        sources.iter().filter(|s| s.name != "main").map(|s| (&s.module[..], s.name.as_str())).collect();
    let mut wrong = Vec::new();
    let mut uses = 0;
    for source in &sources {
        let Some(layer) = layer_of(&source.name) else {
            wrong.push(format!("src/{}.rs has no layer: give it one in tests/layers.rs", source.name));
            continue;
        };
        for path in paths(source) {
            // The longest part of it that is a module; what is at the root is a macro of `error`.
            let used = (1..=path.len()).rev().find_map(|len| modules.get(&path[..len])).copied().unwrap_or("error");
            uses += 1;
            if let Some(other) = layer_of(used)
                && other > layer
            {
                let path = path.join("::");
                wrong.push(format!(
                    "src/{}.rs (layer {layer}) uses {path} of src/{used}.rs (layer {other})",
                    source.name
                ));
            }
        }
        for (_, words) in FOREIGN.iter().filter(|(of, _)| *of == layer) {
            let found = words.iter().filter(|word| source.code.contains(**word));
            wrong.extend(found.map(|word| format!("src/{}.rs (layer {layer}) has '{word}'", source.name)));
        }
    }
    assert!(uses > 300, "the paths are found: {uses}");
    wrong.dedup();
    assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_line_of_the_table_is_of_use() {
    let names: Vec<String> = sources().into_iter().map(|source| source.name).collect();
    for entry in LAYERS.iter().flat_map(|entries| entries.split_ascii_whitespace()) {
        let is_there = match entry.strip_suffix('*') {
            Some(directory) => names.iter().any(|name| name.starts_with(directory)),
            None => names.iter().any(|name| name == entry),
        };
        assert!(is_there, "there is no src/{entry}.rs");
    }
}

#[test]
fn paths_are_read() {
    let code = "use crate::{a::b, c::{self, d as e, f::*}};\nuse super::{g, super_name};\nfn x() { crate::h!(); super::super::i::j(); }";
    let source = Source { name: "m/n/o".into(), module: ["m", "n", "o"].map(String::from).to_vec(), code: code.into() };
    let found: Vec<String> = paths(&source).into_iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a::b", "c", "c::d", "c::f", "m::n::g", "m::n::super_name", "h", "m::i::j"]);
    let tests = "use a;\n#[cfg(test)]\nmod tests;\nuse b;\n#[cfg(test)]\nmod tests {\n    use c;\n}\nuse d;";
    let kept = without_tests(tests);
    assert!(!kept.contains("use c") && kept.contains("use b") && kept.contains("use d"), "{kept}");
}
