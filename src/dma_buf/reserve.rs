//! Buffers that are kept for when the system has no memory to give.
//!
//! A process that carries out the kernel's own writes must not wait for memory: the kernel may be waiting for those writes to
//! have some. (Its threads would stop in the page fault, with everything else that they serve.) So there is a reserve, of all
//! threads together, of buffers that are in memory already. It is asked when a thread's own cache has nothing, before the
//! system is; a buffer that is given back fills the reserve before any cache.
//!
//! There are two sizes, so that who limits how many of each are taken at a time knows that there will be one.

use super::{class_bytes, class_of, layout};
use std::alloc::alloc_zeroed;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Classes of the two sizes: 64 KiB and 1 MiB.
const CLASSES: [usize; 2] = [4, 8];
/// Bytes of a small and a large buffer of the reserve.
pub const SMALL_BYTES: usize = class_bytes(CLASSES[0]);
pub const LARGE_BYTES: usize = class_bytes(CLASSES[1]);

/// A buffer, as it was allocated.
struct Free(NonNull<u8>);
// SAFETY: nobody else has the memory, and it is tied to no thread.
unsafe impl Send for Free {}

struct Reserve {
    free: [Vec<Free>; 2],
    wanted: [usize; 2],
}

static RESERVE: Mutex<Reserve> = Mutex::new(Reserve { free: [const { Vec::new() }; 2], wanted: [0; 2] });
/// Buffers wanted, of both sizes: zero means that there is no reserve, and nobody needs to look.
static WANTED: AtomicUsize = AtomicUsize::new(0);
/// How many of them are not there, of each size.
static MISSING: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

fn locked() -> MutexGuard<'static, Reserve> {
    // Nothing that could panic leaves it half done.
    RESERVE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reserve {
    fn count(&self) {
        for (missing, (free, wanted)) in MISSING.iter().zip(self.free.iter().zip(self.wanted)) {
            missing.store(wanted.saturating_sub(free.len()), Relaxed);
        }
        WANTED.store(self.wanted.iter().sum(), Relaxed);
    }
}

/// From now on so many small and large buffers are kept, at least. They are allocated, and written to, here. It never shrinks.
pub fn keep(small: usize, large: usize) {
    let missing = {
        let mut reserve = locked();
        let missing = [small, large].map(|wanted| wanted as isize).into_iter().zip(reserve.wanted);
        let missing: Vec<isize> = missing.map(|(wanted, had)| wanted - had as isize).collect();
        for (size, wanted) in [small, large].into_iter().enumerate() {
            reserve.wanted[size] = reserve.wanted[size].max(wanted);
            reserve.free[size].reserve_exact(wanted);
        }
        missing
    };
    for (size, class) in CLASSES.into_iter().enumerate() {
        for _ in 0..missing[size].max(0) {
            // SAFETY: the layout has a non-zero size.
            let memory = unsafe { alloc_zeroed(layout(class_bytes(class))) };
            // What can't be had now is filled up by what comes back.
            let Some(memory) = NonNull::new(memory) else { break };
            for page in (0..class_bytes(class)).step_by(super::DMA_ALIGN) {
                // In memory, not only promised. SAFETY: inside the allocation; volatile, so that it happens.
                unsafe { memory.add(page).write_volatile(0) };
            }
            let mut reserve = locked();
            reserve.free[size].push(Free(memory));
            reserve.count();
        }
    }
}

/// A buffer of at least `capacity` bytes, with its capacity.
pub(super) fn take(capacity: usize) -> Option<(NonNull<u8>, usize)> {
    if WANTED.load(Relaxed) == 0 {
        return None;
    }
    let mut reserve = locked();
    let fits = |size: &usize| class_bytes(CLASSES[*size]) >= capacity;
    let (size, Free(memory)) = (0..2).filter(fits).find_map(|size| Some((size, reserve.free[size].pop()?)))?;
    reserve.count();
    Some((memory, class_bytes(CLASSES[size])))
}

/// Takes a buffer that was freed, when the reserve lacks one of its size.
pub(super) fn give_back(memory: NonNull<u8>, capacity: usize) -> bool {
    let Some(size) = class_of(capacity).and_then(|class| CLASSES.iter().position(|known| *known == class)) else {
        return false;
    };
    if MISSING[size].load(Relaxed) == 0 {
        return false;
    }
    let mut reserve = locked();
    if reserve.free[size].len() >= reserve.wanted[size] {
        return false;
    }
    reserve.free[size].push(Free(memory));
    reserve.count();
    true
}

#[cfg(test)]
mod tests {
    use super::super::{DmaBuf, usage};
    use super::*;

    /// The reserve is of the whole process: this runs in one of its own.
    #[test]
    fn what_is_kept_is_taken_before_new_memory_and_comes_back_first() {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let child = command.args(["--exact", "dma_buf::reserve::tests::reserve_child", "--ignored", "--nocapture"]);
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    #[test]
    #[ignore = "run by what_is_kept_is_taken_before_new_memory_and_comes_back_first"]
    fn reserve_child() {
        let there = || {
            let reserve = locked();
            [reserve.free[0].len(), reserve.free[1].len()]
        };
        assert!(take(4096).is_none(), "there is no reserve");
        let unkept = DmaBuf::new(SMALL_BYTES);
        keep(2, 1);
        assert_eq!(there(), [2, 1]);
        keep(1, 1);
        assert_eq!(there(), [2, 1], "it does not shrink");
        let held = [DmaBuf::new(4096), DmaBuf::new(SMALL_BYTES)];
        assert_eq!(there(), [0, 1]);
        let larger = DmaBuf::new(100);
        assert_eq!(there(), [0, 0], "a larger one does as well");
        assert_eq!(usage().in_use as usize, 3 * SMALL_BYTES + LARGE_BYTES);
        assert_eq!(DmaBuf::new(LARGE_BYTES + 1).len(), LARGE_BYTES + 1);
        let beyond = DmaBuf::new(SMALL_BYTES);
        assert_eq!(usage().in_use as usize, 4 * SMALL_BYTES + LARGE_BYTES, "and then the system");
        // Whosever they were, and on whatever thread.
        std::thread::spawn(move || drop([unkept, beyond])).join().unwrap();
        assert_eq!(there(), [2, 0]);
        drop(held);
        assert_eq!(there(), [2, 0], "what it does not lack goes to the cache");
        assert_eq!(usage().cached as usize, 2 * SMALL_BYTES + 2 * LARGE_BYTES);
        drop(larger);
        assert_eq!(there(), [2, 1]);
        keep(3, 1);
        assert_eq!(there(), [3, 1]);
    }
}
