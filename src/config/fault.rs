//! What is wrong with a configuration: which key, where, what was expected and what is there instead.
//!
//! A [`Fault`] is serde's error type here, so that the types of a configuration say what they expect once, in their
//! `Deserialize`. Pure: names no file; [`super::file`] adds where the key stands.

use crate::error::{Error, ErrorKind};
use serde::de::{Expected, Unexpected};
use std::fmt;
use std::ops::Range;

/// How much of a wrong text is repeated, in characters.
const SHOWN_MAX: usize = 60;
/// A name is suggested when at most this share of it has to be changed, in percent.
const NEAR_PERCENT: usize = 40;

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The path of the key, from the table that was read; empty for the table itself.
    pub keys: Vec<String>,
    /// Where in the text, in bytes, when there is a text.
    pub span: Option<Range<usize>>,
    pub text: String,
    /// For a key that is not known: the known one beside it that is probably meant.
    pub meant: Option<&'static str>,
}

impl Fault {
    pub fn new(text: impl Into<String>) -> Self {
        Self { keys: Vec::new(), span: None, text: text.into(), meant: None }
    }

    /// About the key `path`, whose parts are separated by dots.
    pub fn of(path: &str, text: impl Into<String>) -> Self {
        Self { keys: path.split('.').map(String::from).collect(), ..Self::new(text) }
    }

    /// The path of the key that it was meant to be about, as far as that can be guessed.
    pub fn meant_keys(&self) -> Vec<&str> {
        self.keys.iter().map(String::as_str).chain(self.meant).collect()
    }

    /// The same inside `key`.
    pub fn under(mut self, key: &str) -> Self {
        self.keys.insert(0, key.into());
        self
    }

    /// The same with a place, unless it has one already.
    pub fn at(mut self, span: &Range<usize>) -> Self {
        self.span.get_or_insert_with(|| span.clone());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.keys.is_empty() {
            write!(f, "{}: ", self.keys.join("."))?;
        }
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fault {}

/// All that is wrong with one table; never empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Faults(pub Vec<Fault>);

impl From<Faults> for Error {
    fn from(faults: Faults) -> Self {
        let more = match faults.0.len() {
            0 | 1 => String::new(),
            more => format!(" (and {} more)", more - 1),
        };
        let first = faults.0.first().map_or(String::new(), Fault::to_string);
        Self::new(ErrorKind::Config, first + &more)
    }
}

/// The first characters of `text`, in quotes, without what could confuse a terminal.
pub fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_MAX).is_some() {
        shown.push_str("...");
    }
    format!("'{shown}'")
}

/// The one of `known` that `given` is probably meant to be.
pub fn nearest<'k>(given: &str, known: &[&'k str]) -> Option<&'k str> {
    let plain = |name: &str| name.chars().take(SHOWN_MAX).collect::<String>().to_lowercase().replace('-', "_");
    let given = plain(given);
    let distance = |name: &str| strsim::osa_distance(&given, &plain(name));
    let best = known.iter().map(|name| (distance(name), *name)).min()?;
    (best.0 * 100 <= best.1.len() * NEAR_PERCENT).then_some(best.1)
}

/// "'a', 'b' or 'c'".
pub fn alternatives(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, before)) => format!("{} or {last}", before.join(", ")),
        None => "nothing".into(),
    }
}

/// A value as it is told to people.
fn found(value: &Unexpected) -> String {
    match value {
        Unexpected::Str(text) => format!("the text {}", shown(text)),
        Unexpected::Bool(value) => format!("{value}"),
        Unexpected::Unsigned(value) => format!("{value}"),
        Unexpected::Signed(value) => format!("{value}"),
        Unexpected::Seq => "an array".into(),
        Unexpected::Map => "a table".into(),
        Unexpected::Unit | Unexpected::Option => "nothing".into(),
        Unexpected::Other(what) => (*what).into(),
        other => other.to_string(),
    }
}

impl serde::de::Error for Fault {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::new(text.to_string())
    }
    fn invalid_type(value: Unexpected, expected: &dyn Expected) -> Self {
        Self::new(format!("expected {expected}, found {}", found(&value)))
    }
    fn invalid_value(value: Unexpected, expected: &dyn Expected) -> Self {
        Self::invalid_type(value, expected)
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!("expected {}, found {}", alternatives(expected), shown(variant)))
    }
    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let meant = nearest(field, expected);
        let advice = match meant {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!("known are {}", expected.join(", ")),
        };
        Self { meant, ..Self::new(format!("unknown key {}, {advice}", shown(field))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_what_is_near() {
        let known = ["region_size", "size", "source", "source_timeout", "hydration_rate"];
        for (given, near) in [
            ("regionsize", Some("region_size")),
            ("region-size", Some("region_size")),
            ("REGION_SIZE", Some("region_size")),
            ("siez", Some("size")),
            ("sorce", Some("source")),
            ("hydration_rat", Some("hydration_rate")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(given, &known), near, "{given}");
        }
        assert_eq!(nearest("x", &[]), None);
        assert_eq!(alternatives(&["a", "b", "c"]), "'a', 'b' or 'c'");
    }

    #[test]
    fn shows_no_control_characters_and_no_novels() {
        assert_eq!(shown("a\nb\u{1b}"), r"'a\nb\u{1b}'");
        assert_eq!(shown(&"x".repeat(1000)).len(), SHOWN_MAX + 5);
    }
}
