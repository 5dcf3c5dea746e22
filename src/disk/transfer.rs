//! One transfer between memory and a file, which the kernel may carry out in pieces.
//!
//! Pure: says what to ask the kernel for, and is told what came of it. Invariants:
//! * What is asked for begins at a block boundary, counted from the start of the transfer, and goes to its end: a part of a
//!   block is transferred again, because direct I/O can't go on in the midst of one.
//! * A transfer is done only when every byte of it was; anything else ends in a reason.
//! * It ends: what makes no progress is repeated at most [`REPEATS_MAX`] times in a row.

use crate::units::align_down;

/// So often in a row an interrupted transfer, or one that got no whole block, is asked for again.
pub const REPEATS_MAX: u32 = 1000;

/// Why a transfer can't be completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    Errno(i32),
    /// A read found the end of the device so many bytes after the transfer's start.
    End(u64),
}

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct Transfer {
    len: u64,
    block: u64,
    done: u64,
    repeats: u32,
}

impl Transfer {
    /// Of `len` bytes, which begin at a boundary of `block`.
    pub fn new(len: u64, block: u32) -> Self {
        Self { len, block: u64::from(block), done: 0, repeats: 0 }
    }

    /// How many bytes are there already: to be asked for is the rest. `None` when that is nothing.
    pub fn next(&self) -> Option<u64> {
        (self.done < self.len).then_some(self.done)
    }

    /// A read of the rest has returned: bytes, or an errno.
    pub fn has_read(&mut self, result: Result<u32, i32>) -> Result<(), Stop> {
        match result {
            Ok(count) if self.done + u64::from(count) < self.len && u64::from(count) < self.block => {
                Err(Stop::End(self.done + u64::from(count)))
            }
            result => self.has_moved(result),
        }
    }

    /// A write of the rest has returned: bytes, or an errno.
    pub fn has_written(&mut self, result: Result<u32, i32>) -> Result<(), Stop> {
        match result {
            Ok(0) => Err(Stop::Errno(libc::ENOSPC)),
            result => self.has_moved(result),
        }
    }

    fn has_moved(&mut self, result: Result<u32, i32>) -> Result<(), Stop> {
        let before = self.done;
        let reason = match result {
            Ok(count) => {
                let now = (self.done + u64::from(count)).min(self.len);
                self.done = if now == self.len { now } else { align_down(now, self.block) };
                libc::EIO
            }
            Err(errno @ (libc::EINTR | libc::EAGAIN)) => errno,
            Err(errno) => return Err(Stop::Errno(errno)),
        };
        self.repeats = if self.done > before { 0 } else { self.repeats + 1 };
        if self.repeats > REPEATS_MAX { Err(Stop::Errno(reason)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel does with one call.
    #[derive(Clone, Copy, Debug)]
    enum Kernel {
        /// At most so many bytes.
        Moves(u32),
        Fails(i32),
    }

    fn kernel() -> impl Strategy<Value = Kernel> {
        prop_oneof![
            4 => (0u32..20_000).prop_map(Kernel::Moves),
            2 => (0u32..40).prop_map(|blocks| Kernel::Moves(blocks * 512)),
            1 => Just(Kernel::Moves(0)),
            2 => prop::sample::select(vec![libc::EINTR, libc::EAGAIN]).prop_map(Kernel::Fails),
            1 => prop::sample::select(vec![libc::EIO, libc::ENOSPC, libc::ENODEV]).prop_map(Kernel::Fails),
        ]
    }

    /// How it ended, what was moved, and what the kernel said each time.
    type Driven = (Result<(), Stop>, Vec<u8>, Vec<Result<u32, i32>>);

    /// Drives a transfer as the ring does, against a kernel that does what the script says, and all after its end.
    fn drive(len: usize, block: u32, script: &[Kernel], writes: bool) -> Driven {
        let from: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8 | 1).collect();
        let mut to = vec![0; len];
        let mut transfer = Transfer::new(len as u64, block);
        let (mut script, mut results) = (script.iter(), Vec::new());
        while let Some(at) = transfer.next() {
            let at = at as usize;
            assert!(at < len && at.is_multiple_of(block as usize), "asks for {at} of {len}");
            let result = match script.next().copied().unwrap_or(Kernel::Moves(u32::MAX)) {
                Kernel::Fails(errno) => Err(errno),
                Kernel::Moves(max) => {
                    let count = (len - at).min(max as usize);
                    to[at..at + count].copy_from_slice(&from[at..at + count]);
                    Ok(count as u32)
                }
            };
            results.push(result);
            assert!(results.len() < 100_000, "it does not end");
            let step = if writes { transfer.has_written(result) } else { transfer.has_read(result) };
            if let Err(stop) = step {
                return (Err(stop), to, results);
            }
        }
        assert_eq!(to, from, "done, but not all of it");
        (Ok(()), to, results)
    }

    proptest! {
        /// Whatever the kernel returns: done means that every byte was moved, a failure is the kernel's own first one that
        /// can't be repeated, and nothing is asked for twice after such a failure.
        #[test]
        fn done_is_all_of_it_and_else_there_is_a_reason(
            len in 1usize..40_000, block in prop::sample::select(vec![1u32, 512, 4096]),
            script in prop::collection::vec(kernel(), 0..40), writes in any::<bool>(),
        ) {
            let (result, _, results) = drive(len, block, &script, writes);
            let is_final = |result: &Result<u32, i32>| match result {
                Err(errno) => !matches!(*errno, libc::EINTR | libc::EAGAIN),
                Ok(count) => *count == 0 && writes,
            };
            let first = results.iter().position(is_final);
            match result {
                Ok(()) => prop_assert_eq!(first, None),
                Err(Stop::Errno(errno)) => {
                    prop_assert_eq!(first, Some(results.len() - 1), "it goes on after {:?}", results);
                    let expected = results.last().copied().unwrap().map_or_else(|errno| errno, |_| libc::ENOSPC);
                    prop_assert_eq!(errno, expected);
                }
                Err(Stop::End(at)) => {
                    prop_assert!(!writes && at < len as u64);
                    let last = results.last().copied().unwrap().unwrap();
                    prop_assert!(last < block, "{} bytes are a whole block", last);
                }
            }
        }
    }

    #[test]
    fn a_kernel_that_never_gets_anywhere_is_given_up() {
        for errno in [libc::EINTR, libc::EAGAIN] {
            for writes in [false, true] {
                let (result, _, results) = drive(5000, 512, &[Kernel::Fails(errno); 3000], writes);
                assert_eq!((result, results.len()), (Err(Stop::Errno(errno)), REPEATS_MAX as usize + 1));
            }
        }
        // Less than a block at a time is no progress of a direct write, and no end of the device.
        let (result, _, results) = drive(5000, 512, &[Kernel::Moves(100); 3000], true);
        assert_eq!((result, results.len()), (Err(Stop::Errno(libc::EIO)), REPEATS_MAX as usize + 1));
        let (result, ..) = drive(5000, 512, &[Kernel::Moves(1000), Kernel::Moves(100)], false);
        assert_eq!(result, Err(Stop::End(612)));
        // Progress begins the count anew.
        let script: Vec<Kernel> = (0..9)
            .flat_map(|_| std::iter::repeat_n(Kernel::Fails(libc::EINTR), 900).chain([Kernel::Moves(512)]))
            .collect();
        assert_eq!(drive(5000, 512, &script, true).0, Ok(()));
    }
}
