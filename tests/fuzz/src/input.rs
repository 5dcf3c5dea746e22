//! Decisions from the bytes of a fuzzer: what is missing is 0, so that every input means something.

/// Numbers at which arithmetic goes wrong.
const EXTREMES: [u64; 16] = [
    0,
    1,
    7,
    511,
    512,
    4095,
    4096,
    u16::MAX as u64,
    1 << 20,
    (1 << 31) - 1,
    u32::MAX as u64 - 7,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// The rest of an input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A number: small, extreme, near `around`, or any; mostly one that is of use.
    pub fn number(&mut self, around: u64) -> u64 {
        let how = self.u8();
        match how >> 6 {
            0 => u64::from(how & 0x3f),
            1 => around.wrapping_add(u64::from(how & 0x1f)).wrapping_sub(if how & 0x20 == 0 { 0 } else { 16 }),
            2 => EXTREMES[usize::from(how & 0x0f)],
            _ => u64::from_le_bytes(self.array()) >> (how & 0x3f),
        }
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// A short piece: its length, then its bytes.
    pub fn piece(&mut self) -> &'a [u8] {
        let len = usize::from(self.u8());
        self.bytes(len)
    }
}

/// An error is one line for people: nothing in it can forge another line of a log, or move a terminal's cursor.
pub fn one_line(what: &str, text: &str) {
    assert!(!text.chars().any(char::is_control), "{what}: the error is not one plain line: {text:?}");
    assert!(!text.is_empty(), "{what}: an error without words");
}
