//! The metadata of a clone: which regions are hydrated, on a device of their own, crash-safe without a journal.
//!
//! * [`codec`]: the format, drawn there. * [`region_map`]: the bits in core, sliced by shard.
//! * [`runs`]: those bits as runs of regions. * [`commit`]: what two superblock copies amount to.
//! * [`store`]: reads and writes them on a [`crate::disk::Disk`]. * [`check`]: judges an image offline.
//! * [`repair`]: what can be mended, and what has to be assumed for it.
//! * [`dump`]: what a dump in JSON says. * [`dm`]: the metadata of the kernel's dm-clone, read and written.
//! * [`growth`]: what the size of a clone may become.
//!
//! # The fault model
//!
//! What may happen, and what the metadata owe then (docs/reliability.md has all of hydrant, with the tests):
//!
//! | who | may | then |
//! |---|---|---|
//! | media | lose, tear between sectors, reorder what is not flushed | nothing acknowledged is lost: argued below |
//! | media | fail any read, write or flush | the first failed write or flush is latched: `ro`. A failed read refuses the start |
//! | media | damage sectors, lose one superblock copy | refused by name; one good copy serves, and the bad one is written again |
//! | media | keep an old, valid sector instead of a flushed write | can't be seen but in a complete clone: assumption 2 excludes it |
//! | kernel | kill the process anywhere; keep its writes in caches for the next one | opening flushes, see below |
//! | kernel | end a transfer early (short, EINTR) | gone on with below the `Disk` trait: here an operation is whole or failed |
//! | peers | answer late, wrongly, never | no bit is set but after a completed write to the destination: nothing a source does is in here |
//! | operators | bring other devices, two daemons, a smaller device | uuid, source fingerprint, destination id, sizes; locks |
//! | operators | bring back an older copy of the metadata, with a destination that went on | can't be seen: do not |
//!
//! # Why a crash loses nothing
//!
//! **Assumptions about the media.** (1) A 512-byte sector is written whole or not at all; a larger write may be torn
//! between any two sectors. (2) A write whose completion was followed by a successful flush is durable. (3) What is
//! not flushed may reach the medium in any order, or not at all. Nothing else is assumed: not that 4096 bytes are
//! atomic, not that writes keep their order.
//!
//! **A bit only goes from 0 to 1, and each bit is true alone.** A durable bit says "the data of this region is durable
//! in the destination", whatever the other bits say. So any mixture of old and new sectors is a right state, as long
//! as no bit of it was written before its data was durable. A commit is therefore, in this order:
//!
//! 1. Take the snapshot of the dirty zones ([`region_map::RegionMap::take_dirty`]): bits whose data writes *completed*.
//! 2. Flush the destination. Now the data behind every bit of the snapshot is durable.
//! 3. Write the blocks of the snapshot ([`store::Store::write_zones`]), never the live map, which has gone on.
//! 4. Flush the metadata ([`store::Store::flush`]).
//! 5. Say so: [`region_map::RegionMap::committed`], and acknowledge who waits.
//!
//! | crash | what is on the medium | why it is right |
//! |---|---|---|
//! | before or in 1, 2 | the old bits | nothing was written; nothing of this commit was acknowledged |
//! | in 3, before 4 ended | each sector old or new (assumption 1) | both valid; new bits have durable data (2 came first) |
//! | after 4 | the new bits | as acknowledged |
//!
//! **A killed process** leaves its writes in caches, where the next one reads them as if they were durable. It would
//! acknowledge a flush for such a region with a flush of the destination alone, and a power cut would then take the bit
//! back. So opening flushes the metadata before it reads them ([`store::Store::load`]): every bit that is loaded is durable.
//!
//! A commit rewrites bits that were durable already with the same value, so a torn write can't lose them, and no block
//! holds bits of two shards or is written by two commits at once: [`store::Store`] refuses a second write while one is
//! in flight, and latches a failure when a write is abandoned (it may still land, over a newer one).
//!
//! **A bad checksum is therefore damage, never a crash**, and is refused with the sector's name: guessing 0 would serve
//! old source data for what a client wrote, guessing 1 would serve what was never copied.
//!
//! **Format**: (a) zero both superblock copies, flush; (b) write every bitmap block, flush; (c) write copy A, flush;
//! (d) write copy B, flush. All fields of a superblock are in its first sector and the rest is zero, so each copy is old
//! or new, never torn.
//!
//! | crash | copies | verdict |
//! |---|---|---|
//! | in (a) | each old or zero | the old clone, complete: its bitmap was not touched. Or never formatted |
//! | in (b) | zero, zero | never formatted; sectors of the old bitmap have the old uuid and would not pass |
//! | in (c) | new or zero, zero | never formatted, or the new clone: its bitmap is durable and empty |
//! | in (d) | new, new or zero | the new clone |
//!
//! What (b) has left in a new device is no foreign data: no bit of it was ever set
//! ([`codec::is_of_unfinished_format`]), so the next start formats it again without a word of `--force`.
//!
//! So metadata must be formatted *before* the destination is touched: until (a) is over the old clone may come back.
//!
//! **The superblock's state** changes from active to complete by writing copy A, flush, copy B, flush, after the bits were
//! flushed: at every moment one copy is intact even if the medium breaks assumption 1 for the sector in flight. Between
//! two valid copies the higher generation counts, with equal ones copy A, which is always written first. Safety never
//! depends on the state: the bits say what is hydrated, and a complete clone with a missing bit is refused as damaged.
//!
//! **Growth** changes nothing of what is there: zones keep their regions, so every old block stays valid, and the block of a
//! last zone that was short only has room for more bits. While nothing is in flight and everything is committed:
//!
//! 1. Make both devices large enough, durably. Larger ones than the superblock says are right at any time.
//! 2. If the last region is short and hydrated, its bit will stand for more bytes: write those to the destination.
//! 3. Flush the destination.
//! 4. Write the blocks of new zones, all bits 0, and flush ([`store::Store::grow`]).
//! 5. Write copy A with the new size and a higher generation, flush, copy B, flush.
//!
//! | crash | copies | verdict |
//! |---|---|---|
//! | before 5 | old, old | the old clone; what lies behind its end in either device means nothing |
//! | in 5 | new or old, old | each a whole clone: new blocks are durable and empty (4), the tail's bytes are durable (3) |
//! | in 5, after A | new, new or old | the new clone: the higher generation counts |
//!
//! No bit is written between the two copies, and a start that finds them different writes copy B anew
//! ([`store::Store::mend`]), so an old copy never stands beside bits of new regions. Copies that differ in size are of one
//! clone only if the larger one is the newer one.
//!
//! **Failures.** The first failed write or flush is latched: every later one fails with the same error, and nothing is
//! retried, because a flush that failed once may have dropped the data it failed on, and its repetition succeeds without
//! them. The bits on the medium stay a right state; the clone accepts no new metadata (`ro`).

pub mod check;
pub mod codec;
pub mod commit;
pub mod dm;
pub mod dump;
pub mod growth;
pub mod hydrated_bits;
pub mod region_map;
pub mod repair;
pub mod runs;
pub mod store;
