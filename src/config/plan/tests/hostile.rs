//! Whatever a file holds: no panic, and every problem is one line that begins with its place.

use super::*;
use crate::config::file::{Text, parse};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use std::path::Path;
use std::rc::Rc;

/// The examples, and everything at once.
const SEEDS: [&str; 5] = [
    include_str!("../../../../configs/appliance.toml"),
    include_str!("../../../../configs/local-to-nvme.toml"),
    include_str!("../../../../configs/metadata-on-another-disk.toml"),
    include_str!("../../../../configs/nbd-to-nvme.toml"),
    "[daemon]\nshards = 3\ncpus = '0-2,5'\ncontrol = 'c'\nio_memory = '64MiB'\nspin = '50us'\nlog = 'info'\n\
     [daemon.metrics_dump]\npath = 'p'\ninterval = 10\n[[clone]]\nname = 'vm'\nforce = true\nsource_timeout = '5min'\n\
     table = '0 2048 clone m 254:16 nbd://backup/vm2 8 1 no_hydration 2 hydration_threshold 5'\n\
     nbd = { address = 'unix:s', export = 'disk' }\n",
];

/// What replaces a part of a text.
fn piece() -> impl Strategy<Value = String> {
    let known = [
        "",
        "\n",
        "\"",
        "'",
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        "=",
        ".",
        ",",
        "#",
        "\\",
        "\0",
        "\u{feff}",
        "ä",
        "\u{202e}",
        "-1",
        "0",
        "1e9",
        "0x10",
        "99999999999999999999999999999999999999999999",
        "true",
        "inf",
        "nan",
        "1979-05-27T07:32:00Z",
        "daemon",
        "clone",
        "[[clone]]\n",
        "[clone.nbd]\n",
        "[daemon]\n",
        "name",
        "table",
        "size = 0\n",
        "cpus = [[[[]]]]\n",
        "nbd = []\n",
        "'64KiB'",
        "'0-8191'",
        "\"\"\"",
        "'''",
    ];
    prop_oneof![4 => select(known.to_vec()).prop_map(String::from), 1 => any::<String>()]
}

fn mutate(seed: &str, changes: Vec<(Index, Index, String)>) -> String {
    let mut text: Vec<char> = seed.chars().collect();
    for (at, len, piece) in changes {
        let start = at.index(text.len() + 1);
        let end = (start + len.index(12)).min(text.len());
        text.splice(start..end, piece.chars());
    }
    text.into_iter().collect()
}

fn check(text: String) -> std::result::Result<(), TestCaseError> {
    let mut problems = Vec::new();
    let contents = parse(Rc::new(Text::new(Path::new("f.toml"), text)), Path::new("/base"), &mut problems);
    let dir = RuntimeDir::of_user();
    match merge(&[contents], true, &dir, problems) {
        Ok(plan) => {
            for clone in plan.clones {
                prop_assert!(clone.destination.is_absolute() && clone.metadata.is_absolute());
            }
        }
        Err(problems) => {
            prop_assert!(!problems.lines.is_empty() && problems.lines.len() <= PROBLEMS_MAX);
            for line in &problems.lines {
                prop_assert!(line.starts_with("f.toml:") && !line.chars().any(|c| c.is_control()), "{line:?}");
                prop_assert!(line.len() < 3000, "{line}");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn changed_examples(
        seed in select(SEEDS.to_vec()),
        changes in proptest::collection::vec((any::<Index>(), any::<Index>(), piece()), 1..6),
    ) {
        check(mutate(seed, changes))?;
    }

    #[test]
    fn any_values(
        key in select(["region_size", "name", "table", "source", "nbd", "nbd.address", "on_hydrated", "priority", "force"].to_vec()),
        value in prop_oneof![any::<i64>().prop_map(|n| n.to_string()), any::<f64>().prop_map(|n| format!("{n:?}")), any::<String>().prop_map(|t| format!("{t:?}")), piece()],
    ) {
        check(format!("[[clone]]\n{key} = {value}\n"))?;
    }

    #[test]
    fn any_body(body in any::<Vec<u8>>(), seed in select(SEEDS.to_vec())) {
        let _ = CloneSpec::from_json(&body);
        let _ = CloneSpec::from_json(seed.as_bytes());
    }
}

/// Many mistakes are counted, and cost no more than reading the file.
#[test]
fn a_file_full_of_mistakes() {
    let text: String = (0..4_000).map(|n| format!("[[clone]]\nnaem = 'vm{n}'\n")).collect();
    let mut problems = Vec::new();
    let contents = parse(Rc::new(Text::new(Path::new("f.toml"), text)), Path::new("/"), &mut problems);
    let Err(problems) = merge(&[contents], true, &RuntimeDir::of_user(), problems) else { panic!("accepted") };
    assert_eq!((problems.lines.len(), problems.count()), (PROBLEMS_MAX, 16_000));
}
