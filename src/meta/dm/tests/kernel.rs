//! The images that the kernel made: `tests/fixtures/dm-clone`, each with a JSON of what is in it.

use super::*;
use serde_json::Value;
use std::path::Path;

/// The kernel's image, unpacked.
pub(in crate::meta::dm) fn image(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/dm-clone/{name}.img.xz"));
    let output = Command::new("xz").arg("-dc").arg(&path).output().expect("needs xz");
    assert!(output.status.success() && !output.stdout.is_empty(), "{}", path.display());
    output.stdout
}

fn facts(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/dm-clone/{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn images_of_the_kernel_are_read() {
    for name in ["fresh-r8", "full-r8", "one-region", "partial-r8", "tiny-meta-12blocks"] {
        let (bytes, facts) = (image(name), facts(name));
        assert_eq!(facts["metadata_bytes"], bytes.len(), "{name}");
        let facts = &facts["facts"];
        let read = read(&bytes).unwrap_or_else(|refused| panic!("{name}: {}", Error::from(refused)));
        let target = &read.superblock.target;
        let space_map = &read.superblock.space_map;
        assert_eq!(facts["region_size"], target.region_size().sectors(), "{name}");
        assert_eq!(facts["target_size"], target.sectors(), "{name}");
        assert_eq!(facts["nr_regions"], target.nr_regions(), "{name}");
        assert_eq!(facts["hydrated_count"], read.bits.hydrated_count(), "{name}");
        assert_eq!(facts["sm_nr_blocks"], space_map.nr_blocks, "{name}");
        assert_eq!(facts["sm_nr_allocated"], space_map.nr_allocated, "{name}");
        let runs: Vec<_> = read.bits.runs().map(|(first, last)| vec![first, last]).collect();
        assert_eq!(facts["hydrated"], serde_json::json!(runs), "{name}");
        assert_eq!(read.nr_leaked, 0, "{name}");
    }
}

#[test]
fn what_is_written_has_the_kernels_sizes() {
    // The same target and device: the same number of blocks in use, and the same bytes where there is no choice.
    let kernels = image("partial-r8");
    let read = read(&kernels).unwrap();
    let mut ours = image_of(read.superblock.target, kernels.len() as u64, &read.bits);
    let written = super::read(&ours).unwrap().superblock;
    assert_eq!(written.space_map.nr_allocated, read.superblock.space_map.nr_allocated);
    assert_eq!(written.space_map.nr_blocks, read.superblock.space_map.nr_blocks);
    // Blocks of one kind differ by their numbers and what refers to others.
    let mut of_kernel = kernels;
    let bitset = |superblock: &Superblock| superblock.bitset_root;
    let array = |image: &mut [u8], root: u64| u64_at(&block_of(image, root)[..], 32 + 8 * 252);
    let (kernels_array, our_array) =
        (array(&mut of_kernel, bitset(&read.superblock)), array(&mut ours, bitset(&written)));
    for at in [4, 8, 12, 20] {
        let (a, b) = (block_of(&mut of_kernel, kernels_array)[at..].to_vec(), block_of(&mut ours, our_array));
        assert_eq!(a[..4], b[at..at + 4], "{at}");
    }
    assert_eq!(block_of(&mut of_kernel, kernels_array)[24..], block_of(&mut ours, our_array)[24..]);
    let counts = read.superblock.space_map.counts_root;
    assert_eq!(counts, written.space_map.counts_root);
    assert_eq!(block_of(&mut of_kernel, counts), block_of(&mut ours, counts), "the empty tree, to the last byte");
}

#[test]
fn a_flipped_bit_in_the_kernels_image_is_found() {
    let image = image("partial-r8");
    for block in [0u64, 2, 42, 43, 44, 45] {
        for at in [0, 5, 8, 16, 40, 200, 2047, 4095] {
            let mut damaged = image.clone();
            damaged[block as usize * BLOCK_SIZE + at] ^= 0x10;
            let said = refusal(&damaged);
            assert!(said.contains(&format!("block {block}: ")), "{block} {at}: {said}");
        }
    }
    // What is not in use may hold anything.
    let mut other = image.clone();
    other[41 * BLOCK_SIZE] ^= 1;
    assert!(read(&other).is_ok());
}
