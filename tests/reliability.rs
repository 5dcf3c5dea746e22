//! docs/reliability.md promises things and names the tests that show them, docs/dm-clone-tests.md those for what dm-clone's own tests
//! try: each test that they name must be there, and run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each page, how many names its tables have at least, and the headings of the tables of which each row must name a test.
const PAGES: [(&str, usize, &[&str]); 2] = [
    ("docs/reliability.md", 60, &["Faults and promises"]),
    ("docs/dm-clone-tests.md", 30, &["The scenarios of dm-clone's suite", "What it leaves out"]),
];

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The names of all tests: functions under `#[test]`, and those that a `test_each!`-like macro is given. `#[ignore]`d ones
/// are none.
fn tests_of(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    for (at, _) in lines.iter().enumerate().filter(|(_, line)| **line == "#[test]") {
        let attributes = lines[at + 1..].iter().take_while(|line| line.starts_with("#["));
        let ignored = attributes.clone().any(|line| line.starts_with("#[ignore"));
        let name = lines.get(at + 1 + attributes.count()).and_then(|line| line.strip_prefix("fn "));
        if let Some((name, _)) = name.and_then(|name| name.split_once('('))
            && !ignored
        {
            names.insert(name.to_string());
        }
    }
    names
}

/// Words in backticks of the page's tables, in the last column: `name`, without a path.
fn named(page: &str) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    for (number, line) in page.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let last = line.trim_end().trim_end_matches('|').rsplit(" | ").next().unwrap_or_default();
        let quoted = last.split('`').skip(1).step_by(2);
        let tests = quoted.filter(|word| {
            word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        });
        names.extend(tests.map(|word| (number + 1, word.to_string())));
    }
    names
}

fn all_tests() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    ["src", "tests"].iter().for_each(|directory| rust_files(&root.join(directory), &mut files));
    files.iter().flat_map(|file| tests_of(&fs::read_to_string(file).unwrap())).collect()
}

fn read(page: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap()
}

#[test]
fn every_test_that_is_named_is_there() {
    let tests = all_tests();
    let fuzz_targets: BTreeSet<_> = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for (page, count_min, _) in PAGES {
        let named = named(&read(page));
        assert!(named.len() > count_min, "only {} tests are named: is {page} read as it is written?", named.len());
        let missing: Vec<_> = named
            .iter()
            .filter(|(_, name)| !tests.contains(name) && !fuzz_targets.contains(name))
            .map(|(line, name)| format!("{page}:{line}: there is no test `{name}`"))
            .collect();
        assert!(missing.is_empty(), "{}", missing.join("\n"));
    }
}

#[test]
fn every_promise_names_what_shows_it() {
    for (page, _, headings) in PAGES {
        let text = read(page);
        let mut count = 0;
        for heading in headings {
            let (_, promises) = text.split_once(&format!("\n## {heading}\n")).unwrap();
            let (promises, _) = promises.split_once("\n## ").unwrap_or((promises, ""));
            let rows = promises.lines().filter(|line| line.starts_with("| ") && line.matches(" | ").count() == 2);
            let heads = ["| fault", "| mistake", "| scenario |"];
            let rows: Vec<_> = rows.filter(|line| !heads.iter().any(|head| line.starts_with(head))).collect();
            for row in &rows {
                assert!(row.rsplit(" | ").next().unwrap().contains('`'), "{page}: nothing shows this: {row}");
            }
            count += rows.len();
        }
        assert!(count > 25, "{page}: {count} rows");
    }
}

#[test]
fn tests_are_told_from_what_is_none() {
    let source = "#[test]\nfn one() {}\n#[test]\n#[ignore = \"slow\"]\nfn two() {}\n  #[test]\n  #[cfg(x)]\n  fn three(\n) {}\nfn four() {}";
    assert_eq!(tests_of(source), BTreeSet::from(["one".to_string(), "three".to_string()]));
    assert_eq!(
        named("| a | b | sim `a_b`, `c-d`, `x::y_z` and `e_f` |"),
        [(1, "a_b".to_string()), (1, "e_f".to_string())]
    );
}
