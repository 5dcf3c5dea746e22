//! Signatures: what the first bytes of a device say of its content, as their formats document it. Pure.

use crate::meta::codec::SUPERBLOCK_MAGIC;

/// dm-clone's `SUPERBLOCK_MAGIC` (drivers/md/dm-clone-metadata.c), a le64 at byte 32 as in all its siblings.
const DM_CLONE_MAGIC: u64 = 0x8af2_7f64;
/// dm-thin's `THIN_SUPERBLOCK_MAGIC`.
const DM_THIN_MAGIC: u64 = 27_022_010;
/// dm-cache's `CACHE_SUPERBLOCK_MAGIC`: octal in its source, as here.
const DM_CACHE_MAGIC: u64 = 0o6142003;

/// Signatures that are plain bytes at a fixed offset: what is most specific comes first.
/// From the formats' own documentation and headers; the same places as blkid(8) looks at.
const SIGNATURES: &[(u64, &[u8], &str)] = &[
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"XFSB", "an xfs file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a bcache device"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "a bcachefs file system"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs file system"),
    (0, b"hsqs", "a squashfs file system"),
    (32769, b"CD001", "an ISO 9660 file system"),
    (0, b"\xfc\x4e\x2b\xa9", "a RAID member (md)"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID member (md)"),
    (0, b"bluestore block device", "a Ceph OSD (bluestore)"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (16374, b"SWAPSPACE2", "swap space"),
    (65526, b"SWAPSPACE2", "swap space"),
    (0, b"\x7fELF", "an ELF program"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (82, b"FAT32   ", "a FAT file system"),
    (54, b"FAT16   ", "a FAT file system"),
    (54, b"FAT12   ", "a FAT file system"),
];
/// How far from the start the signatures reach, in bytes.
pub const SIGNATURES_END: u64 = 0x11000;

/// What the first bytes say, by the signatures. `head` is up to [`SIGNATURES_END`] bytes.
pub fn identify(head: &[u8]) -> Option<&'static str> {
    let at = |offset: u64, bytes: &[u8]| {
        usize::try_from(offset).ok().and_then(|o| head.get(o..)).is_some_and(|rest| rest.starts_with(bytes))
    };
    let le = |offset: usize, len: usize| {
        let bytes = head.get(offset..offset + len)?;
        Some(bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    if at(0, &SUPERBLOCK_MAGIC) {
        return Some("hydrant metadata");
    }
    match le(32, 8) {
        Some(DM_CLONE_MAGIC) => return Some("dm-clone metadata"),
        Some(DM_THIN_MAGIC) => return Some("dm-thin metadata"),
        Some(DM_CACHE_MAGIC) => return Some("dm-cache metadata"),
        _ => {}
    }
    // The label is in one of the first four 512-byte sectors.
    if (0..4).any(|sector| at(sector * 512, b"LABELONE") && at(sector * 512 + 24, b"LVM2 001")) {
        return Some("an LVM physical volume");
    }
    // ext2, 3 and 4 differ in feature bits: has_journal (compatible 0x4); extents, 64bit, flex_bg (incompatible).
    if le(0x438, 2) == Some(0xef53) {
        let (compatible, incompatible) = (le(0x45c, 4)?, le(0x460, 4)?);
        return Some(match () {
            () if incompatible & (0x40 | 0x80 | 0x200) != 0 => "an ext4 file system",
            () if compatible & 0x4 != 0 => "an ext3 file system",
            () => "an ext2 file system",
        });
    }
    if let Some((_, _, found)) = SIGNATURES.iter().find(|(offset, bytes, _)| at(*offset, bytes)) {
        return Some(found);
    }
    // Last: file systems and partition tables carry a boot record too.
    at(510, &[0x55, 0xaa]).then_some("an MBR boot record")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any bytes at all are looked at without a panic, from none to all that is read.
    #[test]
    fn identify_short_heads() {
        let mut head = vec![0xef; SIGNATURES_END as usize];
        (head[0x438], head[0x439]) = (0x53, 0xef);
        for len in (0..2048).chain(SIGNATURES_END as usize - 8..=SIGNATURES_END as usize) {
            identify(&head[..len]);
        }
    }
}
