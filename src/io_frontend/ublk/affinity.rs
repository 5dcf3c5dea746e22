//! Which shard serves which hardware queue. Pure.
//!
//! The kernel gives every CPU one queue: requests are put into it where they are made. The executor of a shard stays on its
//! CPU; when that is one of the queue's, the request need not wake another CPU to be seen.

/// CPUs by number, a bit each, as GET_QUEUE_AFFINITY returns them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuMask(pub Vec<u64>);

impl CpuMask {
    fn has(&self, cpu: usize) -> bool {
        let bits = u64::BITS as usize;
        self.0.get(cpu / bits).is_some_and(|word| word >> (cpu % bits) & 1 == 1)
    }
}

/// The shard of each queue, by index: one on a CPU of the queue, if there is one; of several the one with the fewest queues so far, of
/// those the first. Queues without such a shard are spread over those that have the fewest. `cpus`: where each shard is,
/// as far as known; there is at least one.
pub fn shards_of(queues: &[CpuMask], cpus: &[Option<usize>]) -> Vec<usize> {
    let mut loads = vec![0_usize; cpus.len()];
    let mut chosen = vec![None; queues.len()];
    let mut give = |queue: usize, fits: &dyn Fn(usize) -> bool| {
        let shard = (0..cpus.len()).filter(|shard| fits(*shard)).min_by_key(|shard| loads[*shard]);
        if let Some(shard) = shard {
            loads[shard] += 1;
            chosen[queue] = Some(shard);
        }
        shard.is_some()
    };
    let mut others = Vec::new();
    for (queue, mask) in queues.iter().enumerate() {
        if !give(queue, &|shard| cpus[shard].is_some_and(|cpu| mask.has(cpu))) {
            others.push(queue);
        }
    }
    for queue in others {
        give(queue, &|_| true);
    }
    chosen.into_iter().map(|shard| shard.unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masks(cpus: &[&[usize]]) -> Vec<CpuMask> {
        let mask = |cpus: &&[usize]| {
            let mut words = vec![0; 3];
            cpus.iter().for_each(|cpu| words[cpu / 64] |= 1 << (cpu % 64));
            CpuMask(words)
        };
        cpus.iter().map(mask).collect()
    }

    fn at(cpus: &[usize]) -> Vec<Option<usize>> {
        cpus.iter().copied().map(Some).collect()
    }

    #[test]
    fn a_queue_is_served_on_one_of_its_cpus() {
        assert_eq!(shards_of(&masks(&[&[0], &[1], &[2]]), &at(&[0, 1, 2])), [0, 1, 2]);
        // In whatever order shards and queues have their CPUs.
        assert_eq!(shards_of(&masks(&[&[0], &[1], &[2]]), &at(&[1, 2, 0])), [2, 0, 1]);
        assert_eq!(shards_of(&masks(&[&[0, 2], &[1, 3]]), &at(&[3, 2])), [1, 0]);
        assert_eq!(shards_of(&masks(&[&[130], &[63, 64]]), &at(&[64, 130])), [1, 0]);
    }

    #[test]
    fn shards_that_share_a_cpu_share_its_queues() {
        assert_eq!(shards_of(&masks(&[&[0], &[0], &[0]]), &at(&[0, 0])), [0, 1, 0]);
        // More shards than queues: one for each.
        assert_eq!(shards_of(&masks(&[&[0, 1], &[2, 3]]), &at(&[0, 1, 2, 3])), [0, 2]);
    }

    #[test]
    fn other_queues_go_where_there_is_least_to_do() {
        assert_eq!(shards_of(&masks(&[&[5], &[0], &[6], &[1]]), &at(&[0, 1])), [0, 0, 1, 1]);
        assert_eq!(shards_of(&masks(&[&[0], &[1]]), &at(&[7])), [0, 0]);
        assert_eq!(shards_of(&masks(&[&[], &[], &[]]), &at(&[0, 1])), [0, 1, 0]);
        assert_eq!(shards_of(&masks(&[&[0], &[1]]), &[None, None]), [0, 1]);
        assert_eq!(shards_of(&[CpuMask::default()], &at(&[0])), [0]);
        assert!(shards_of(&[], &at(&[0])).is_empty());
    }
}
