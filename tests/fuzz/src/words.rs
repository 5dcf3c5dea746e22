//! Short texts: each in its own grammar, which the first byte chooses.
//!
//! Properties: what is refused is refused in one line; what is taken prints as something that is taken as the same.

use super::input::one_line;
use super::meter::Bound;
use hydrant::config::CloneName;
use hydrant::control::api::Message;
use hydrant::control::query::Query;
use hydrant::io_frontend::nbd::listen::NbdAddress;
use hydrant::source::uri::SourceSpec;
use hydrant::units::{ByteSize, RegionSize};
use std::ffi::OsStr;
use std::fmt::{Debug, Display};
use std::os::unix::ffi::OsStrExt;
use std::str::FromStr;

/// Some texts of the length of the input, its bytes in escapes.
pub const BOUND: Bound = Bound { base: 64 << 10, per_byte: 256 };

pub fn target(data: &[u8]) {
    let Some((grammar, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    match grammar % 8 {
        0 => round_trip::<Message>(&text, whole),
        1 => source(data),
        2 => round_trip::<NbdAddress>(&text, whole),
        3 => round_trip::<ByteSize>(&text, without_unit),
        4 => round_trip::<RegionSize>(&text, without_unit),
        5 => round_trip::<CloneName>(&text, whole),
        6 => query(&text),
        _ => sizes(data),
    }
}

/// `input_of`: what was printed, as it is to be read.
fn round_trip<T: FromStr<Err: Display> + Display + PartialEq + Debug>(text: &str, input_of: fn(&str) -> &str) {
    match text.parse::<T>() {
        Ok(value) => {
            let printed = value.to_string();
            let text = input_of(&printed);
            let again = text.parse::<T>().unwrap_or_else(|why| panic!("{printed:?} is refused: {why}"));
            assert_eq!(again, value, "{printed}");
        }
        Err(why) => one_line("value", &why.to_string()),
    }
}

fn whole(printed: &str) -> &str {
    printed
}

/// A size that is whole in no unit says "bytes", for people.
fn without_unit(printed: &str) -> &str {
    printed.strip_suffix(" bytes").or(printed.strip_suffix(" byte")).unwrap_or(printed)
}

fn source(data: &[u8]) {
    match SourceSpec::parse(OsStr::from_bytes(data)) {
        Ok(spec) if matches!(&spec, SourceSpec::File(path) if path.to_str().is_none()) => {}
        Ok(spec) => {
            let printed = spec.to_string();
            let again = printed.parse::<SourceSpec>().unwrap_or_else(|why| panic!("{printed:?} is refused: {why}"));
            assert_eq!(again, spec, "{printed}");
        }
        Err(why) => one_line("source", &why),
    }
}

fn query(text: &str) {
    let known = ["after", "clone", "timeout", "instance"];
    match Query::parse(Some(text), &known) {
        Ok(query) => {
            for name in known {
                match query.number(name, 0..=25) {
                    Ok(number) => {
                        let is_given = query.text(name).is_some();
                        assert!(number.is_some() == is_given && number.is_none_or(|number| number <= 25));
                    }
                    Err(error) => one_line("parameter", &error.to_string()),
                }
            }
        }
        Err(error) => one_line("query", &error.to_string()),
    }
}

/// What is printed of any number is read as that number.
fn sizes(data: &[u8]) {
    let mut number = [0; 8];
    let len = data.len().min(8);
    number[..len].copy_from_slice(&data[..len]);
    let size = ByteSize(u64::from_le_bytes(number));
    let printed = size.to_string();
    let text = without_unit(&printed);
    assert_eq!(text.parse(), Ok(size), "{printed}");
    for text in [hydrant::human::size(size.0), hydrant::human::count(size.0), hydrant::human::duration(size.0)] {
        one_line("text", &text);
    }
    one_line("text", &hydrant::human::utc(size.0));
    one_line("text", &hydrant::human::latency(size.0));
    one_line("text", &hydrant::human::percent(f64::from_bits(size.0)));
    one_line("text", &hydrant::human::rate(f64::from_bits(size.0)));
}
