//! dm-clone's table line.
//!
//! Properties: what is refused is refused in one line; a line that is taken prints as one that is taken as the same,
//! and relative paths made absolute keep it so.

use super::input::one_line;
use super::meter::Bound;
use hydrant::dm_table::{DmTable, device_number};
use std::path::Path;

/// Each word is a string of its own.
pub const BOUND: Bound = Bound { base: 64 << 10, per_byte: 256 };

pub fn target(data: &[u8]) {
    let line = String::from_utf8_lossy(data);
    let table = match line.parse::<DmTable>() {
        Ok(table) => table,
        Err(why) => return one_line("table", &why),
    };
    let printed = table.to_string();
    let again = printed.parse::<DmTable>().unwrap_or_else(|why| panic!("{printed:?} is refused: {why}"));
    assert_eq!(again, table);
    assert_eq!(again.to_string(), printed);
    assert!(table.size() > 0 && table.is_len_of(table.size()) && !table.is_len_of(table.size() + 1));
    assert!(table.grown_to(table.size()) == table);
    for path in [table.metadata(), table.destination()] {
        assert!(!path.as_os_str().is_empty());
        let _ = device_number(&path);
    }
    let mut absolute = table.clone();
    absolute.relative_to(Path::new("/base dir/\\x")).expect("all of it is UTF-8");
    assert_eq!(absolute.to_string().parse::<DmTable>().as_ref(), Ok(&absolute));
    assert!(absolute.metadata().is_absolute() && absolute.destination().is_absolute());
}
