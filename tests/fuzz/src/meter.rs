//! How much memory an input costs: a global allocator that counts, per thread, while [`measure`] runs.
//!
//! Freed buffers of `hydrant::dma_buf` stay in its cache, so a second input may cost less than the first, never more.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

/// What was allocated on this thread since [`measure`] began.
#[derive(Clone, Copy, Default, Debug)]
pub struct Usage {
    /// In bytes; below 0 when more was freed than allocated.
    live: isize,
    /// The most bytes that were allocated at a time.
    pub peak: isize,
    /// The largest single allocation, in bytes.
    pub largest: usize,
}

thread_local! {
    static USAGE: Cell<Option<Usage>> = const { Cell::new(None) };
}

fn note(freed: usize, taken: usize) {
    // While a thread ends there is nothing to count with, or for.
    let _ = USAGE.try_with(|cell| {
        if let Some(mut usage) = cell.get() {
            usage.live += taken as isize - freed as isize;
            usage.peak = usage.peak.max(usage.live);
            usage.largest = usage.largest.max(taken);
            cell.set(Some(usage));
        }
    });
}

// SAFETY: everything is passed on to the system's allocator as it came; counting touches no memory of the heap.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(0, layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(0, layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        note(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(layout.size(), new_size);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// Runs `work` and counts what it allocates on this thread.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Usage) {
    begin();
    let result = work();
    (result, end())
}

/// From here on it is counted, on this thread.
pub fn begin() {
    USAGE.set(Some(Usage::default()));
}

/// What was counted since [`begin`].
pub fn end() -> Usage {
    USAGE.take().unwrap_or_default()
}

/// Counts what another thread allocated for this one.
pub fn charge(usage: Usage) {
    if let Some(mut own) = USAGE.get() {
        own.peak = own.peak.max(own.live + usage.peak);
        own.largest = own.largest.max(usage.largest);
        USAGE.set(Some(own));
    }
}

/// The most memory that an input may cost: a part that any input may cost, and one for each of its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// In bytes.
    pub base: usize,
    pub per_byte: usize,
}

impl Bound {
    /// Panics when `usage` is more than an input of `len` bytes may cost.
    pub fn check(&self, len: usize, usage: Usage) {
        let allowed = self.base + self.per_byte * len;
        assert!(
            usage.peak <= allowed as isize && usage.largest <= allowed,
            "an input of {len} bytes cost {} bytes of memory (the largest piece {}), {allowed} are allowed",
            usage.peak,
            usage.largest
        );
    }
}
