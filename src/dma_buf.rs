//! Memory for direct I/O: owned, page-aligned, zero-initialised, and `Send`, so that a block can be read on one
//! shard and sent to a client by another without a copy.
//!
//! A buffer keeps a window (`start..start + len`) into its allocation. A request that is not aligned is read
//! with its alignment around it and then narrowed; a payload that was received at the same offset modulo
//! [`DMA_ALIGN`] as its place on the device can be written as it is.
//!
//! Freed buffers go to a small per-thread cache: large allocations would otherwise be mapped, faulted and
//! unmapped for every I/O. A process with block devices has a reserve beside it, see [`reserve`].

pub mod reserve;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every buffer, in bytes: the largest logical block size that Linux block devices use here.
pub const DMA_ALIGN: usize = 4096;
/// Per thread, how many bytes of freed buffers are kept.
const CACHE_BYTES_MAX: usize = 32 << 20;
/// Size classes are powers of two from 4 KiB; larger buffers than the last class are not cached.
const CACHE_CLASSES: usize = 10; // 4 KiB ... 2 MiB

struct Cache {
    free: [Vec<NonNull<u8>>; CACHE_CLASSES],
    bytes: usize,
    /// Capacity of the buffers taken on this thread, less that of those given back here.
    in_use: isize,
}

impl Drop for Cache {
    fn drop(&mut self) {
        for (class, list) in self.free.iter_mut().enumerate() {
            for ptr in list.drain(..) {
                // SAFETY: every pointer in class `class` was allocated with exactly this layout.
                unsafe { dealloc(ptr.as_ptr(), layout(class_bytes(class))) }
            }
        }
    }
}

thread_local! {
    static CACHE: RefCell<Cache> = const { RefCell::new(Cache { free: [const { Vec::new() }; CACHE_CLASSES], bytes: 0, in_use: 0 }) };
}

const fn class_bytes(class: usize) -> usize {
    DMA_ALIGN << class
}

fn class_of(capacity: usize) -> Option<usize> {
    let class = (capacity / DMA_ALIGN).trailing_zeros() as usize;
    (class < CACHE_CLASSES && class_bytes(class) == capacity).then_some(class)
}

/// Of an allocation. Those that are not cached are aligned by their window instead: the allocator gets zeroed memory with
/// such a small alignment from the kernel as it is, while it overwrites memory of a larger one with zeros by itself, all
/// of which a payload is then written over.
fn layout(capacity: usize) -> Layout {
    let align = if class_of(capacity).is_some() { DMA_ALIGN } else { align_of::<usize>() };
    Layout::from_size_align(capacity, align).expect("capacity is a small multiple of the alignment")
}

/// An owned buffer for direct I/O. Its bytes are always initialised (old data of this process at worst).
pub struct DmaBuf {
    ptr: NonNull<u8>,
    capacity: usize,
    start: usize,
    len: usize,
}

// SAFETY: the buffer owns its allocation exclusively; nothing in it is tied to a thread.
unsafe impl Send for DmaBuf {}
// SAFETY: shared access only reads plain bytes.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// A buffer of `len` bytes. Its content is unspecified (but initialised): overwrite it or use [`Self::zeroed`].
    pub fn new(len: usize) -> Self {
        let capacity = len.max(1).next_multiple_of(DMA_ALIGN);
        let is_cached = capacity <= class_bytes(CACHE_CLASSES - 1);
        let capacity = if is_cached { capacity.next_power_of_two() } else { capacity + DMA_ALIGN };
        let cached = CACHE.try_with(|cache| {
            let mut cache = cache.borrow_mut();
            let ptr = cache.free[class_of(capacity)?].pop()?;
            cache.bytes -= capacity;
            Some((ptr, capacity))
        });
        let kept = cached.ok().flatten().or_else(|| reserve::take(capacity));
        let (ptr, capacity) = kept.unwrap_or_else(|| {
            // SAFETY: the layout has a non-zero size.
            let ptr = unsafe { alloc_zeroed(layout(capacity)) };
            (NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout(capacity))), capacity)
        });
        let _ = CACHE.try_with(|cache| cache.borrow_mut().in_use += capacity as isize);
        let start = ptr.as_ptr().addr().next_multiple_of(DMA_ALIGN) - ptr.as_ptr().addr();
        assert!(start + len <= capacity, "{start}+{len} of {capacity}");
        Self { ptr, capacity, start, len }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A buffer whose window begins `head` bytes (less than [`DMA_ALIGN`]) after an aligned address, so that data
    /// for device offset `o` with `o % DMA_ALIGN == head` needs no copy to be written directly.
    pub fn with_head(head: usize, len: usize) -> Self {
        assert!(head < DMA_ALIGN);
        let mut buf = Self::new(head + len);
        buf.narrow(head, len);
        buf
    }

    /// Shrinks the window to `len` bytes from `offset` within the present window.
    pub fn narrow(&mut self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset, "window {offset}+{len} of {}", self.len);
        self.start += offset;
        self.len = len;
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        is_zero(self)
    }

    /// Start of the window, for the kernel. Stable while the buffer lives, wherever the value moves.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.deref_mut().as_mut_ptr()
    }
}

/// What buffers take on this thread, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufferUsage {
    /// Of buffers taken here, less those given back here: they move between threads, so only the sum over all is what
    /// is in use.
    pub in_use: i64,
    /// Of buffers that were given back and are kept for the next ones.
    pub cached: u64,
}

/// See [`BufferUsage`].
pub fn usage() -> BufferUsage {
    CACHE.with(|cache| {
        let cache = cache.borrow();
        BufferUsage { in_use: cache.in_use as i64, cached: cache.bytes as u64 }
    })
}

/// Whether every byte is zero; reads eight at a time.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Comparing a slice with itself shifted by one lets memcmp do the work: all equal, and the first is zero.
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..bytes.len() - 1],
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the window is inside the allocation, whose bytes are initialised.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().add(self.start), self.len) }
    }
}
impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().add(self.start), self.len) }
    }
}
impl AsRef<[u8]> for DmaBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
impl From<DmaBuf> for bytes::Bytes {
    /// Shares the buffer without a copy.
    fn from(buf: DmaBuf) -> Self {
        bytes::Bytes::from_owner(buf)
    }
}

impl std::fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DmaBuf({} bytes)", self.len)
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        let kept = CACHE.try_with(|cache| {
            let mut cache = cache.borrow_mut();
            cache.in_use -= self.capacity as isize;
            if reserve::give_back(self.ptr, self.capacity) {
                return true;
            }
            match class_of(self.capacity) {
                Some(class) if cache.bytes + self.capacity <= CACHE_BYTES_MAX => {
                    cache.bytes += self.capacity;
                    cache.free[class].push(self.ptr);
                    true
                }
                _ => false,
            }
        });
        if !kept.unwrap_or(false) {
            // SAFETY: allocated with this layout, freed once.
            unsafe { dealloc(self.ptr.as_ptr(), layout(self.capacity)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_windows_and_reuse() {
        for len in [1, 4095, 4096, 4097, 1 << 20, 2 << 20, (2 << 20) + 1, 32 << 20] {
            let buf = DmaBuf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % DMA_ALIGN, 0);
            assert!(buf.is_zero());
        }
        let mut buf = DmaBuf::with_head(512, 5000);
        assert_eq!(buf.as_ptr() as usize % DMA_ALIGN, 512);
        buf.fill(7);
        buf.narrow(88, 10);
        assert_eq!(&buf[..], &[7; 10]);
        let elsewhere = std::thread::spawn(move || bytes::Bytes::from(buf)).join().unwrap();
        assert_eq!(&elsewhere[..], &[7; 10]);
    }

    #[test]
    fn usage_follows_buffers_from_thread_to_thread() {
        let (kept, moved) = (DmaBuf::new(5000), DmaBuf::new(3 << 20));
        let large = (3 << 20) + DMA_ALIGN as i64;
        assert_eq!(usage(), BufferUsage { in_use: 8192 + large, cached: 0 });
        let there = std::thread::spawn(move || {
            drop(moved);
            usage()
        });
        assert_eq!(there.join().unwrap(), BufferUsage { in_use: -large, cached: 0 }, "too large to be kept");
        drop(kept);
        assert_eq!(usage(), BufferUsage { in_use: large, cached: 8192 });
    }

    /// What is going to be overwritten is not written before: no page of a large buffer is there until it is used.
    #[test]
    fn a_large_buffer_costs_nothing_before_it_is_used() {
        // Of this thread: minor faults, the tenth field.
        let faults = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
            fields.skip(7).map(|field| field.parse::<u64>().unwrap()).next().unwrap()
        };
        let before = faults();
        let mut buf = DmaBuf::new(32 << 20);
        let made = faults();
        assert!(made - before < 100, "{} pages were touched", made - before);
        // It is measured indeed.
        buf.fill(1);
        assert!(faults() > made);
    }

    #[test]
    fn zero_detection() {
        assert!(is_zero(&[]));
        for len in 1..64 {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes));
                bytes[at] = 0;
            }
        }
    }
}
