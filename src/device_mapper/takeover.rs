//! What to do with a device-mapper device that is there when a clone starts. Pure.
//!
//! A device of ours has a uuid that says which clone it is of, so it is found whatever its name.

use super::proto::{Flags, Info, Number, Target};

/// The uuid of a clone's device: that of its metadata, with a prefix as device-mapper wants it.
pub fn uuid_of(clone: &[u8; 16]) -> String {
    format!("HYDRANT-{}", uuid::Uuid::from_bytes(*clone).simple())
}

/// What the device of a clone is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Its maker ended before it had a table: nobody can have used it.
    Unfinished,
    /// It shows the clone's block device, or showed one that is gone.
    Clone,
    /// It shows the destination: the clone was handed over.
    HandedOver,
    /// It was removed with force, and goes with its last user.
    Going,
    /// Somebody has given it another table.
    Changed,
}

/// Judges a device of the clone by its table in force. `is_ublk` tells of a device whether it is one of ublk.
pub fn judge(info: &Info, live: &[Target], destination: Option<Number>, is_ublk: impl Fn(Number) -> bool) -> Standing {
    if info.flags.contains(Flags::DEFERRED_REMOVE) {
        return Standing::Going;
    }
    match live {
        [] => Standing::Unfinished,
        [target] => match target.whole_linear() {
            Some(shown) if Some(shown) == destination => Standing::HandedOver,
            Some(shown) if is_ublk(shown) => Standing::Clone,
            // Nobody has it: what it showed does not matter.
            Some(_) if info.open_count == 0 => Standing::Clone,
            Some(_) | None => Standing::Changed,
        },
        _ => Standing::Changed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::{Which, decode, encode};
    use super::*;

    #[test]
    fn standings() {
        let info = |flags, open_count| {
            let bytes = encode(Which::Name("n"), flags, 0, &[], 0).unwrap();
            let mut info = decode(&bytes).unwrap();
            info.open_count = open_count;
            info
        };
        let number = |minor| Number { major: 259, minor };
        let said =
            |flags, open, live: &[Target]| judge(&info(flags, open), live, Some(number(1)), |shown| shown == number(2));
        let none = Flags::empty();
        assert_eq!(said(none, 0, &[]), Standing::Unfinished);
        assert_eq!(said(none, 1, &[Target::linear(8, number(1))]), Standing::HandedOver);
        assert_eq!(said(none, 1, &[Target::linear(8, number(2))]), Standing::Clone);
        assert_eq!(said(none, 1, &[Target::linear(8, number(3))]), Standing::Changed);
        assert_eq!(said(none, 0, &[Target::linear(8, number(3))]), Standing::Clone);
        assert_eq!(said(none, 0, &[Target::error(8)]), Standing::Changed);
        let part = Target { parameters: "259:2 8".into(), ..Target::linear(8, number(2)) };
        assert_eq!(said(none, 1, &[part]), Standing::Changed);
        let two = [Target::linear(8, number(2)), Target::linear(8, number(2))];
        assert_eq!(said(none, 1, &two), Standing::Changed);
        assert_eq!(said(Flags::DEFERRED_REMOVE, 1, &[Target::error(8)]), Standing::Going);
        let nowhere = judge(&info(none, 1), &[Target::linear(8, number(1))], None, |_| false);
        assert_eq!(nowhere, Standing::Changed);
        assert_eq!(uuid_of(&[0xab; 16]), format!("HYDRANT-{}", "ab".repeat(16)));
    }
}
