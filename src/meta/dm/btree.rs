//! The kernel's B-trees: {u64 -> value} with all values in the leaves.
//!
//! A walk visits the leaves in the order of their keys and believes no node: kind, number and checksum, fill, sizes,
//! keys that rise and stay inside what the parent says, leaves all at one depth, no node twice (which a loop would
//! need), no block outside the device. So a hostile tree costs at most one visit for each of its blocks.
//! The other way, [`Shape`] says which nodes a whole tree has that is built at once from its leaves up.

use super::Refused;
use super::codec::{BLOCK_VALUE, NodeHeader, encode_node, entries_max, u64_at};
use super::space_map::Used;
use crate::meta::check::ReadBlock;
use crate::meta::codec::Block;

/// Levels of a tree at most: with the fewest entries that the kernel leaves in a node a tree of 2^31 regions has 4.
const DEPTH_MAX: usize = 8;

/// Reads and remembers which blocks were used.
pub struct Walk<'a, 'r> {
    pub read_block: &'a mut ReadBlock<'r>,
    pub used: &'a mut Used,
    /// Size of a value in the leaves, in bytes.
    pub leaf_value: usize,
}

/// Is handed the leaf's number, a key and its value.
pub type Visit<'v> = dyn FnMut(&mut ReadBlock<'_>, &mut Used, u64, u64, &[u8]) -> Result<(), Refused> + 'v;

impl Walk<'_, '_> {
    /// Visits every entry of the tree whose root is block `root`; `parent` is the block that names it.
    pub fn run(&mut self, root: u64, parent: u64, visit: &mut Visit<'_>) -> Result<(), Refused> {
        let mut leaf_depth = None;
        self.node(Place { number: root, parent, depth: 0, keys: (0, None) }, &mut leaf_depth, visit)
    }

    fn node(&mut self, place: Place, leaf_depth: &mut Option<usize>, visit: &mut Visit<'_>) -> Result<(), Refused> {
        let Place { number, parent, depth, keys: (low, high) } = place;
        let damaged = |what: String| Err(Refused::damaged(number, what));
        self.used.node(number, parent)?;
        if depth >= DEPTH_MAX {
            return damaged(format!("a tree of more than {DEPTH_MAX} levels"));
        }
        let block = read(self.read_block, number)?;
        let header = NodeHeader::decode(&block, number, self.leaf_value)?;
        if header.entries == 0 && (depth > 0 || !header.is_leaf) {
            return damaged("an empty node inside a tree".into());
        }
        let mut before = None;
        for i in 0..header.entries {
            let key = header.key(&block, i);
            if key < low || high.is_some_and(|high| key >= high) || before.is_some_and(|before| key <= before) {
                return damaged(format!("key {key} is out of order"));
            }
            before = Some(key);
        }
        if header.is_leaf {
            if *leaf_depth.get_or_insert(depth) != depth {
                return damaged("a leaf that is not as deep as the others".into());
            }
            return (0..header.entries).try_for_each(|i| {
                visit(self.read_block, self.used, number, header.key(&block, i), header.value(&block, i))
            });
        }
        for i in 0..header.entries {
            let end = if i + 1 < header.entries { Some(header.key(&block, i + 1)) } else { high };
            let child = u64_at(header.value(&block, i), 0);
            let keys = (header.key(&block, i), end);
            self.node(Place { number: child, parent: number, depth: depth + 1, keys }, leaf_depth, visit)?;
        }
        Ok(())
    }
}

struct Place {
    number: u64,
    parent: u64,
    depth: usize,
    /// From the first to before the second.
    keys: (u64, Option<u64>),
}

/// Reads a block; what the device says is told with its number.
pub(super) fn read(read_block: &mut ReadBlock<'_>, number: u64) -> Result<Block, Refused> {
    read_block(number).map_err(|error| Refused::other(error.kind(), number, error.to_string()))
}

/// The nodes of a tree with the keys 0 to n - 1, level by level from the leaves up.
pub struct Shape {
    /// How many nodes each level has; the last one is the root alone.
    levels: Vec<u64>,
    entries: u64,
}

impl Shape {
    pub fn new(entries: u64) -> Self {
        let fan_out = entries_max(BLOCK_VALUE) as u64;
        let mut levels = vec![entries.div_ceil(fan_out).max(1)];
        while let Some(last) = levels.last().copied().filter(|nodes| *nodes > 1) {
            levels.push(last.div_ceil(fan_out));
        }
        Self { levels, entries }
    }

    pub fn nr_nodes(&self) -> u64 {
        self.levels.iter().sum()
    }

    /// Builds all nodes as the blocks from `first` on, leaves first, the root last. Value `i` is `first_value + i`.
    pub fn build<E>(
        &self,
        first: u64,
        first_value: u64,
        emit: &mut dyn FnMut(u64, &Block) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut number, mut below_first, mut below) = (first, first_value, self.entries);
        // The key from which on the nodes of the level below have theirs.
        let mut key_of: Box<dyn Fn(u64) -> u64> = Box::new(|i| i);
        for (level, nodes) in self.levels.iter().copied().enumerate() {
            let level_first = number;
            for node in 0..nodes {
                // Evenly filled, so that none is less than a third full but the root.
                let (from, to) = (share(below, nodes, node), share(below, nodes, node + 1));
                let entries: Vec<_> = (from..to).map(|i| (key_of(i), below_first + i)).collect();
                emit(number, &encode_node(number, level == 0, BLOCK_VALUE, &entries))?;
                number += 1;
            }
            let (of_below, count) = (key_of, below);
            key_of = Box::new(move |i| of_below(share(count, nodes, i)));
            (below_first, below) = (level_first, nodes);
        }
        Ok(())
    }
}

/// Where the share of the `i`-th of `of` begins, when `all` are divided evenly.
fn share(all: u64, of: u64, i: u64) -> u64 {
    (u128::from(all) * u128::from(i) / u128::from(of)) as u64
}
