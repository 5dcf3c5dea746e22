//! Damage under right checksums: each is refused, with the block and the reason.

use super::*;

/// 70000 regions: three array blocks. Blocks: 1 index, 2 counts, 3 bitmap, 4 to 6 arrays, 7 root.
fn sample() -> Vec<u8> {
    let target = target(70_000 * 8, 8);
    image_of(target, 1 << 20, &bits_of(&target, &[(10, 20), (40_000, 5000)]))
}

/// The sample with a block changed, and sealed again.
fn changed(number: u64, kind: Kind, change: impl FnOnce(&mut Block)) -> Vec<u8> {
    let mut image = sample();
    change(block_of(&mut image, number));
    seal(block_of(&mut image, number), kind, number);
    image
}

#[track_caller]
fn refused(image: &[u8], words: &str) {
    let said = refusal(image);
    assert!(said.contains(words), "'{words}' is not in: {said}");
    assert!(!said.contains('\n'), "{said}");
}

#[test]
fn superblock() {
    let with = |at: usize, value: u64| changed(0, Kind::Superblock, |block| put_u64(block, at, value));
    let with32 = |at: usize, value: u32| changed(0, Kind::Superblock, |block| put_u32(block, at, value));
    refused(&with(32, 27_022_010), "block 0: holds dm-thin metadata");
    refused(&with32(40, 2), "block 0: dm-clone metadata of version 2, this hydrant knows 1");
    refused(&with32(40, 0), "version 0");
    refused(&with32(4, 1), "block 0: flags 0x1 are set");
    refused(&with(172, 0), "block 0: a region size of 0 sectors: region size 0 bytes is outside 4KiB to 1GiB");
    refused(&with(172, 4), "outside 4KiB to 1GiB");
    refused(&with(172, 24), "not a power of two");
    refused(&with(172, 1 << 22), "outside 4KiB to 1GiB");
    refused(&with(172, u64::MAX), "too large");
    refused(&with(180, 0), "a target size of 0 sectors is impossible");
    refused(&with(180, u64::MAX), "is impossible");
    refused(&with(180, (1 << 31) * 8 + 1), "2147483649 regions of 4KiB, dm-clone takes at most 2147483648");
    // A target of another size has another number of array blocks, of words, or bits past its end.
    refused(&with(180, 8 << 30), "block 6: an array block of 76 words, it should have 509");
    refused(&with(180, 8 * 60_000), "block 5: an array block of 509 words, it should have 429");
    refused(&with(180, 8 * 69_000), "block 6: an array block of 76 words, it should have");
    refused(&with(44, 0), "a space map of 0 blocks");
    refused(&with(44, 257), "the metadata have 257 blocks, the image ends after 256");
    refused(&with(44, BLOCKS_MAX + 1), "a space map of 4161601 blocks");
}

#[test]
fn roots_outside_or_twice() {
    for at in [60, 68, 188] {
        for (number, words) in
            [(0, "block 0: it refers to block 0, outside 1 to 255"), (256, "block 256, outside"), (u64::MAX, "outside")]
        {
            refused(&changed(0, Kind::Superblock, |block| put_u64(block, at, number)), words);
        }
    }
    refused(
        &changed(0, Kind::Superblock, |block| put_u64(block, 188, 2)),
        "block 2: used twice, the second time by block 0",
    );
    refused(&changed(0, Kind::Superblock, |block| put_u64(block, 188, 4)), "block 4: checksum is");
    refused(
        &changed(0, Kind::Superblock, |block| put_u64(block, 60, 100)),
        "block 100: all zero, it should be a space map index",
    );
}

#[test]
fn space_map() {
    let index = |at: usize, value: u32| changed(1, Kind::Index, |block| put_u32(block, at, value));
    refused(&index(16, 0), "block 1: it refers to block 0");
    refused(&index(16, 300), "block 1: it refers to block 300, outside 1 to 255");
    refused(&index(16, 1), "block 1: used twice");
    refused(&index(24, 5), "block 1: it says that 5 entries of bitmap block 3 are free, 16312 are");
    refused(&index(28, 16_321), "block 1: a hint past the end of bitmap block 3");
    let bitmap = |change: &dyn Fn(&mut Block)| changed(3, Kind::Bitmap, |block| change(block));
    // Block 7, in use, becomes free; the counts say so.
    refused(
        &bitmap(&|block| block[17] &= 0x3f),
        "block 1: it says that 16312 entries of bitmap block 3 are free, 16313 are",
    );
    let mut image = bitmap(&|block| block[17] &= 0x3f);
    put_u32(block_of(&mut image, 1), 24, 16_313);
    seal(block_of(&mut image, 1), Kind::Index, 1);
    refused(&image, "block 0: it says that 8 blocks are allocated, 7 are");
    put_u64(block_of(&mut image, 0), 52, 7);
    seal(block_of(&mut image, 0), Kind::Superblock, 0);
    refused(&image, "block 7: in use, but free by the space map");
    refused(&bitmap(&|block| block[16 + 64] = 2), "block 3: it counts references of block 256, the device has 256");
    refused(
        &bitmap(&|block| block[17] |= 0xc0),
        "block 2: 1 blocks have their count in this tree by the bitmaps, it has 0",
    );
}

#[test]
fn tree() {
    let root = |change: &dyn Fn(&mut Block)| changed(7, Kind::Node, |block| change(block));
    refused(&root(&|b| put_u32(b, 4, 3)), "block 7: node flags 0x3 are neither");
    refused(&root(&|b| put_u32(b, 4, 0)), "block 7: node flags 0x0");
    refused(&root(&|b| put_u32(b, 16, 253)), "block 7: 253 entries in a node of up to 252");
    refused(&root(&|b| put_u32(b, 20, 251)), "block 7: a node of up to 251 entries, it should be 252");
    refused(&root(&|b| put_u32(b, 20, u32::MAX)), "block 7: a node of up to");
    refused(&root(&|b| put_u32(b, 24, 4)), "block 7: a node with values of 4 bytes, they should have 8");
    refused(&root(&|b| put_u32(b, 16, 0)), "block 7: the bitset has 0 array blocks");
    refused(&root(&|b| put_u32(b, 16, 2)), "block 7: the bitset has 2 array blocks, 70000 regions need 3");
    refused(&root(&|b| put_u64(b, 32 + 8, 0)), "block 7: key 0 is out of order");
    let one_more = root(&|b| {
        put_u32(b, 16, 4);
        put_u64(b, 32 + 24, 3);
    });
    refused(&one_more, "block 7: array block 3 where 3 of 3 should be");
    refused(&root(&|b| put_u64(b, 32 + 16, 3)), "block 7: array block 3 where 2 of 3 should be");
    let value = |i: usize| 32 + 8 * 252 + 8 * i;
    refused(&root(&|b| put_u64(b, value(1), 999)), "block 7: it refers to block 999, outside 1 to 255");
    refused(&root(&|b| put_u64(b, value(1), 7)), "block 7: checksum is");
    refused(&root(&|b| put_u64(b, value(1), 4)), "block 4: used 2 times, but its reference count is 1");
    // Internal: its child is itself, or an array block.
    refused(&root(&|b| put_u32(b, 4, 1)), "block 4: checksum is");
    let looped = root(&|b| {
        put_u32(b, 4, 1);
        put_u64(b, value(0), 7);
    });
    refused(&looped, "block 7: used twice, the second time by block 7");
    let mut moved = sample();
    put_u64(block_of(&mut moved, 0), 188, 9);
    seal(block_of(&mut moved, 0), Kind::Superblock, 0);
    let root = *block_of(&mut moved, 7);
    block_of(&mut moved, 9).copy_from_slice(&root);
    refused(&moved, "block 9: this tree node says that it is block 7");
}

/// What a walk through these nodes finds: the keys in order, or why not. Block 1 is the root.
fn walk(nodes: &[Block]) -> Result<Vec<u64>, String> {
    let mut used = Used::new(100);
    let mut read_block = |number: u64| Ok(nodes[number as usize - 1]);
    let mut keys = Vec::new();
    let mut walk = Walk { read_block: &mut read_block, used: &mut used, leaf_value: BLOCK_VALUE };
    let walked = walk.run(1, 0, &mut |_, _, _, key, _| {
        keys.push(key);
        Ok(())
    });
    walked.map(|()| keys).map_err(|refused| Error::from(refused).to_string())
}

/// Every node is held against what its parent says of it.
#[test]
fn nodes_below_the_root() {
    let leaf = |number: u64, keys: &[u64]| {
        let entries: Vec<_> = keys.iter().map(|key| (*key, 50)).collect();
        encode_node(number, true, BLOCK_VALUE, &entries)
    };
    let inner = |number: u64, children: &[(u64, u64)]| encode_node(number, false, BLOCK_VALUE, children);
    let root = inner(1, &[(5, 2), (10, 3)]);
    let refused = |nodes: &[Block], words: &str| {
        let said = walk(nodes).unwrap_err();
        assert!(said.contains(words), "'{words}' is not in: {said}");
    };
    assert_eq!(walk(&[root, leaf(2, &[5, 9]), leaf(3, &[10, 99])]), Ok(vec![5, 9, 10, 99]));
    assert_eq!(walk(&[leaf(1, &[])]), Ok(vec![]), "an empty tree");
    refused(&[root, leaf(2, &[4]), leaf(3, &[10])], "block 2: key 4 is out of order");
    refused(&[root, leaf(2, &[5, 10]), leaf(3, &[10])], "block 2: key 10 is out of order");
    refused(&[root, leaf(2, &[5]), leaf(3, &[9])], "block 3: key 9 is out of order");
    refused(&[root, leaf(2, &[5, 5]), leaf(3, &[10])], "block 2: key 5 is out of order");
    refused(&[root, leaf(2, &[]), leaf(3, &[10])], "block 2: an empty node inside a tree");
    refused(&[inner(1, &[])], "block 1: an empty node inside a tree");
    refused(&[root, leaf(2, &[5]), inner(3, &[(10, 4)]), leaf(4, &[10])], "block 4: a leaf that is not as deep");
}

#[test]
fn references_past_the_end_in_the_second_bitmap() {
    let target = target(800, 8);
    let blocks = ENTRIES_PER_BITMAP + 5;
    let mut image = image_of(target, blocks * BLOCK_SIZE as u64, &bits_of(&target, &[(3, 4)]));
    assert!(read(&image).is_ok());
    // Blocks: 1 index, 2 counts, then the bitmaps.
    let bitmap = 4;
    block_of(&mut image, bitmap)[16 + 1] |= 2 << 2;
    seal(block_of(&mut image, bitmap), Kind::Bitmap, bitmap);
    refused(&image, "block 4: it counts references of block 16325, the device has 16325");
}

#[test]
fn arrays() {
    let array = |number, change: &dyn Fn(&mut Block)| changed(number, Kind::Array, |block| change(block));
    refused(&array(4, &|b| put_u32(b, 8, 508)), "block 4: an array block of 508 words, it should have 509");
    refused(&array(6, &|b| put_u32(b, 8, 509)), "block 6: an array block of 509 words, it should have 76");
    refused(&array(5, &|b| put_u32(b, 4, 510)), "block 5: an array block of up to 510 values of 8 bytes");
    refused(&array(5, &|b| put_u32(b, 12, 4)), "block 5: an array block of up to 509 values of 4 bytes");
    // 70000 regions are 1093 words and 48 bits.
    let last = |bit: u32| array(6, &|b| put_u64(b, 24 + 8 * 75, 1 << bit));
    assert!(read(&last(47)).is_ok());
    refused(&last(48), "block 6: bits are set past the last region, 69999");
    // Words past the last one do not exist.
    assert!(read(&array(6, &|b| put_u64(b, 24 + 8 * 76, 1))).is_ok());
}

/// Deeper, and less filled, than the writer makes them: one child each.
#[test]
fn deep_trees_are_walked_to_a_limit() {
    for levels in 1..=9u64 {
        let target = target(800, 8);
        let mut image = image_of(target, 1 << 20, &bits_of(&target, &[(3, 4)]));
        // Blocks 4 array, 5 leaf; the internal nodes follow.
        for level in 1..levels {
            block_of(&mut image, 5 + level).copy_from_slice(&encode_node(5 + level, false, 8, &[(0, 4 + level)]));
        }
        let used = 6 + levels - 1;
        for block in 0..used {
            block_of(&mut image, 3)[16 + (block / 4) as usize] |= 2 << (block % 4 * 2);
        }
        seal(block_of(&mut image, 3), Kind::Bitmap, 3);
        put_u32(block_of(&mut image, 1), 24, (ENTRIES_PER_BITMAP - used) as u32);
        seal(block_of(&mut image, 1), Kind::Index, 1);
        put_u64(block_of(&mut image, 0), 52, used);
        put_u64(block_of(&mut image, 0), 188, 4 + levels);
        seal(block_of(&mut image, 0), Kind::Superblock, 0);
        match levels {
            9 => refused(&image, "block 5: a tree of more than 8 levels"),
            _ => assert_eq!(read(&image).unwrap().bits.runs().collect::<Vec<_>>(), [(3, 7)], "{levels}"),
        }
    }
}

#[test]
fn counts_of_three_and_more_are_in_the_tree() {
    // All three array blocks are one, which is legal when it is counted so.
    let target = target(3 * WORDS_PER_ARRAY * 64 * 8, 8);
    let mut image = image_of(target, 1 << 20, &bits_of(&target, &[(0, 9)]));
    let value = |i: usize| 32 + 8 * 252 + 8 * i;
    for i in 0..3 {
        put_u64(block_of(&mut image, 7), value(i), 5);
    }
    seal(block_of(&mut image, 7), Kind::Node, 7);
    refused(&image, "block 5: used 3 times, but its reference count is 1");
    // Entry 5 of the bitmap: 3.
    block_of(&mut image, 3)[17] |= 0x0c;
    seal(block_of(&mut image, 3), Kind::Bitmap, 3);
    refused(&image, "block 2: 1 blocks have their count in this tree");
    let mut with_count = |key: u64, count: u32| {
        let block = block_of(&mut image, 2);
        put_u32(block, 16, 1);
        put_u64(block, 32, key);
        put_u32(block, 32 + 8 * 336, count);
        seal(block, Kind::Node, 2);
        image.clone()
    };
    let good = read(&with_count(5, 3)).unwrap_or_else(|refused| panic!("{}", Error::from(refused)));
    assert_eq!((good.nr_leaked, good.bits.hydrated_count()), (2, 0), "arrays 4 and 6 are counted, and not in use");
    refused(&with_count(5, 2), "block 2: it counts 2 references of block 5, the bitmap says otherwise");
    refused(&with_count(6, 3), "block 2: it counts 3 references of block 6, the bitmap says otherwise");
    refused(&with_count(u64::MAX, 3), "the bitmap says otherwise");
}

#[test]
fn what_is_short() {
    let image = sample();
    refused(&image[..image.len() - 1], "block 0: the metadata have 256 blocks, the image ends after 255");
    refused(&image[..4095], "block 0: the image has 4095 bytes, not one block");
    refused(&[], "the image has 0 bytes");
    refused(&[0; 8192], "block 0: all zero where dm-clone metadata begin: never formatted");
    refused(&[1; 8192], "block 0: holds unknown data, no dm-clone metadata");
    let mut longer = sample();
    longer.extend_from_slice(&[7; 5000]);
    assert!(read(&longer).is_ok(), "a device may be larger");
}

#[test]
fn a_block_that_can_not_be_read_is_named() {
    let image = sample();
    let mut read_block = |number: u64| -> CrateResult<Block> {
        if number == 5 {
            return Err(Error::io(libc::EIO, "can't read 4096 bytes at offset 20480"));
        }
        Ok(image[number as usize * BLOCK_SIZE..][..BLOCK_SIZE].try_into().unwrap())
    };
    let error = Error::from(read_image(&mut read_block, image.len() as u64).err().unwrap());
    assert_eq!(error.to_string(), "block 5: can't read 4096 bytes at offset 20480: Input/output error");
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn a_bad_checksum_names_what_the_block_should_be() {
    let said = |block: &Block, kind| Error::from(codec::verify(block, kind, 7).unwrap_err()).to_string();
    assert!(said(&[1; BLOCK_SIZE], Kind::Array).ends_with(" for an array block"));
    assert!(said(&[1; BLOCK_SIZE], Kind::Node).ends_with(" for a tree node"));
    assert_eq!(said(&[0; BLOCK_SIZE], Kind::Array), "damaged: block 7: all zero, it should be an array block");
}
