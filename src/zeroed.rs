//! Memory that is zero, and costs nothing before it is used: the pages of a large allocation come from the kernel when they
//! are touched.

use std::sync::atomic::AtomicU64;

/// So many words, all 0.
pub fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    // SAFETY: an AtomicU64 has the representation of a u64, for which all bits zero is a value.
    unsafe { Box::<[AtomicU64]>::new_zeroed_slice(len).assume_init() }
}
