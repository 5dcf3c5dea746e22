//! The parameters of a request: what follows the `?`. Pure.
//!
//! Every parameter is known, given once, and of the right form, or the request is refused with a word about what is
//! wrong. Values are names and numbers, which need no escapes: there are none.

use crate::bail;
use crate::error::Result;
use std::fmt::Display;
use std::ops::RangeInclusive;

/// More parameters than any request has.
const PARAMETERS_MAX: usize = 16;

/// The parameters of one request.
#[derive(Debug, Default)]
pub struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    /// `known`: the parameters that the request takes. `Usage` for any other one and for one that is given twice.
    pub fn parse(query: Option<&'a str>, known: &[&str]) -> Result<Self> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in query.unwrap_or("").split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            if !known.contains(&name) || pairs.len() == PARAMETERS_MAX {
                let hint = match known {
                    [] => "there are none here".into(),
                    known => format!("use {}", known.join(", ")),
                };
                bail!(Usage, "unknown parameter '{}': {hint}", name.escape_debug());
            }
            if pairs.iter().any(|(other, _)| *other == name) {
                bail!(Usage, "parameter {name} is given twice");
            }
            pairs.push((name, value));
        }
        Ok(Self(pairs))
    }

    /// As it was given.
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// A number in decimal digits, `None` when it is not given. `Usage` when it is something else or out of `range`.
    pub fn number(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse() {
            Ok(number) if digits && range.contains(&number) => Ok(Some(number)),
            _ => bail!(Usage, "{name}={} is not a number {}", text.escape_debug(), Bounds(range)),
        }
    }
}

struct Bounds(RangeInclusive<u64>);

impl Display for Bounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.end() {
            &u64::MAX => write!(f, "from {}", self.0.start()),
            end => write!(f, "from {} to {end}", self.0.start()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn known_parameters_once_and_well_formed() {
        let known = ["after", "clone"];
        let query = Query::parse(Some("after=17&clone=vm.1"), &known).unwrap();
        assert_eq!((query.number("after", 0..=u64::MAX).unwrap(), query.text("clone")), (Some(17), Some("vm.1")));
        let query = Query::parse(None, &known).unwrap();
        assert_eq!((query.number("after", 0..=9).unwrap(), query.text("clone")), (None, None));
        assert!(Query::parse(Some("&"), &[]).is_ok());
        let bad = [
            ("since=1", "unknown parameter 'since': use after, clone"),
            ("after=1&after=1", "parameter after is given twice"),
            ("after=1&x\u{1}", "unknown parameter 'x\\u{1}'"),
        ];
        for (text, part) in bad {
            let error = Query::parse(Some(text), &known).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
        assert!(Query::parse(Some("a=1"), &[]).unwrap_err().to_string().contains("there are none here"));
        for text in ["", "x", "-1", "+1", "1.5", "%31", " 1", "26", "99999999999999999999"] {
            let given = format!("after={text}");
            let error = Query::parse(Some(&given), &known).unwrap().number("after", 1..=25).unwrap_err();
            assert!(error.to_string().contains("is not a number from 1 to 25"), "{error}");
        }
        let error = Query::parse(Some("after=x"), &known).unwrap().number("after", 0..=u64::MAX).unwrap_err();
        assert_eq!(error.to_string(), "after=x is not a number from 0");
    }
}
