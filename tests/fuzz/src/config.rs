//! Configuration: a file in TOML, and the clone of a create call in JSON; the first byte chooses.
//!
//! Properties: every problem is one line with a place inside the text; what is taken becomes clones with different
//! names; a clone that is taken, written as JSON, is taken as the same.

use super::input::one_line;
use super::meter::Bound;
use hydrant::config::file::{Text, parse};
use hydrant::config::spec::CloneSpec;
use hydrant::runtime_dir::RuntimeDir;
use std::path::Path;
use std::rc::Rc;

/// Every line may be a problem of its own, with its place and what it should be.
pub const BOUND: Bound = Bound { base: 1 << 20, per_byte: 2048 };

pub fn target(data: &[u8]) {
    match data.split_first() {
        Some((b'{', _)) => json(data),
        Some(_) => toml(&String::from_utf8_lossy(data)),
        None => {}
    }
}

fn toml(text: &str) {
    let mut problems = Vec::new();
    let lines = text.split('\n').count();
    let contents =
        parse(Rc::new(Text::new(Path::new("/x/config.toml"), text.to_owned())), Path::new("/x"), &mut problems);
    for problem in &problems {
        one_line("problem", &problem.to_string());
        assert!((1..=lines).contains(&problem.place.line) && problem.place.column >= 1, "{problem}");
    }
    let dir = RuntimeDir::of_user();
    if let Some(daemon) = contents.daemon
        && let Err(faults) = daemon.spec.clone().into_config(&dir)
    {
        daemon.problems(&faults).for_each(|problem| one_line("problem", &problem.to_string()));
    }
    for clone in contents.clones {
        if problems.is_empty() {
            is_the_same_as_json(&clone.spec);
        }
        match clone.spec.clone().into_config(&dir) {
            Ok(config) => assert!(config.destination.is_absolute() && config.metadata.is_absolute(), "{config:?}"),
            Err(faults) => clone.problems(&faults).for_each(|problem| one_line("problem", &problem.to_string())),
        }
    }
}

fn json(data: &[u8]) {
    match CloneSpec::from_json(data) {
        Ok(spec) => {
            is_the_same_as_json(&spec);
            if let Err(faults) = spec.into_config(&RuntimeDir::of_user()) {
                one_line("clone", &hydrant::error::Error::from(faults).to_string());
            }
        }
        Err(error) => one_line("clone", &error.to_string()),
    }
}

/// `hydrant create` sends what is in a file as JSON.
fn is_the_same_as_json(spec: &CloneSpec) {
    let body = serde_json::to_vec(spec).expect("a clone is JSON");
    let again =
        CloneSpec::from_json(&body).unwrap_or_else(|error| panic!("{}: {error}", String::from_utf8_lossy(&body)));
    assert_eq!(again, *spec);
}
