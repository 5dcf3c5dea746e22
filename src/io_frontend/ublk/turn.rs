//! How many requests with data a shard carries out at a time: so many as there are buffers for in the reserve of
//! [`crate::dma_buf::reserve`], which [`keep_reserve`] fills. The others wait for their turn, first come, first served; they have no memory
//! yet, so there is always some for those that have begun.

use crate::dma_buf::DMA_ALIGN;
use crate::dma_buf::reserve::{self, SMALL_BYTES};
use crate::local::{Permit, Semaphore};
use std::rc::Rc;

/// Requests of a shard whose data fit a small buffer of the reserve, and larger ones, of all its devices together. The first
/// is the depth of a queue.
const SMALL_AT_A_TIME: u64 = 128;
const LARGE_AT_A_TIME: u64 = 16;
/// Of the memory for copies: what was set above it is not kept, and taken from the system.
const COPIES_BYTES_MAX: u64 = 256 << 20;

thread_local! {
    static SMALL: Rc<Semaphore> = Semaphore::new(SMALL_AT_A_TIME);
    static LARGE: Rc<Semaphore> = Semaphore::new(LARGE_AT_A_TIME);
}

/// Waits until `len` bytes at `offset` of a device can be read or written; they can be, as long as what is returned is kept.
pub async fn turn(offset: u64, len: u64) -> Permit {
    let class = if is_small(offset, len) { &SMALL } else { &LARGE };
    let turns = class.with(Rc::clone);
    turns.acquire(1).await
}

/// Whether the data fit a small buffer, with what is before them in their block.
fn is_small(offset: u64, len: u64) -> bool {
    (offset % DMA_ALIGN as u64).saturating_add(len) <= SMALL_BYTES as u64
}

/// Sees to it that there are buffers for so many shards, and for the copies that each may hold beside them, in bytes. May take
/// a while.
pub fn keep_reserve(shards: u16, copies_bytes: u64) {
    let copies = copies_bytes.min(COPIES_BYTES_MAX) / SMALL_BYTES as u64;
    let per_shard = SMALL_AT_A_TIME + copies;
    let small = per_shard.saturating_mul(shards.into());
    let large = LARGE_AT_A_TIME * u64::from(shards);
    let number = |count| usize::try_from(count).unwrap_or(usize::MAX);
    reserve::keep(number(small), number(large));
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    #[test]
    fn requests_beyond_the_reserve_wait() {
        block_on(async {
            let mut small = Vec::new();
            for _ in 0..SMALL_AT_A_TIME {
                small.push(poll_once(turn(4096, SMALL_BYTES as u64)).await.expect("there is one"));
            }
            assert!(poll_once(turn(4096, 512)).await.is_none());
            // Of the other size, as its data begin within a block.
            let mut large: Vec<_> = Vec::new();
            for _ in 0..LARGE_AT_A_TIME {
                large.push(poll_once(turn(512, SMALL_BYTES as u64)).await.expect("there is one"));
            }
            assert!(poll_once(turn(0, 512 << 10)).await.is_none());
            small.pop();
            large.pop();
            assert!(poll_once(turn(0, 512)).await.is_some());
            assert!(poll_once(turn(0, 512 << 10)).await.is_some());
        });
    }
}
