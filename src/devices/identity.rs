//! What identifies a device across reboots: part of a clone's source fingerprint.
//!
//! A mistake-catcher, not a proof: it tells a replaced file or another disk under the same name. All zeros means
//! "not known" and matches anything.

use super::sysfs::{Node, Sysfs};
use super::{Device, DeviceId, DeviceKind, sys};
use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// Where sysfs keeps what names a disk for good, best first: device-mapper, RAID, NVMe, SCSI, virtio, MMC.
const DISK_ATTRIBUTES: [&str; 9] =
    ["dm/uuid", "md/uuid", "wwid", "uuid", "nguid", "device/wwid", "serial", "device/serial", "device/cid"];

pub(super) fn fingerprint_id(device: &Device) -> [u8; 16] {
    let id = match device.kind {
        DeviceKind::File => file_id(&device.file),
        DeviceKind::Block => {
            let sysfs = Sysfs::system();
            sysfs.node(&device.id).and_then(|node| block_id(&node, &|id| loop_file_id(&sysfs, id)))
        }
    };
    id.unwrap_or_default()
}

/// Inode and birth time, both as 8 bytes little-endian; `None` without a birth time: inode numbers are used again.
fn file_id(file: &File) -> Option<[u8; 16]> {
    let birth_ns = sys::birth_time(file).ok()??;
    let inode = file.metadata().ok()?.ino();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&inode.to_le_bytes());
    id[8..].copy_from_slice(&birth_ns.to_le_bytes());
    Some(id)
}

/// The file under a loop device, when its path still leads to it.
fn loop_file_id(sysfs: &Sysfs, id: &DeviceId) -> Option<[u8; 16]> {
    let node = sysfs.node(id)?;
    let file = File::open(node.attribute("loop/backing_file")?).ok()?;
    (DeviceId::of(&file.metadata().ok()?) == node.loop_backing()?.file).then(|| file_id(&file))?
}

fn block_id(node: &Node, loop_file: &dyn Fn(&DeviceId) -> Option<[u8; 16]>) -> Option<[u8; 16]> {
    if node.is_partition() {
        // The disk and where on it: a partition's number may change, its place can't without moving the data.
        let disk = block_id(&node.whole()?, loop_file)?;
        return Some(hash(&[&disk, b"partition at", node.attribute("start")?.as_bytes()]));
    }
    if let Some(file) = loop_file(&node.id) {
        return Some(hash(&[&file, b"loop at", node.attribute("loop/offset")?.as_bytes()]));
    }
    let (name, value) = DISK_ATTRIBUTES.iter().find_map(|name| Some((name, node.attribute(name)?)))?;
    Some(hash(&[name.as_bytes(), b"=", value.as_bytes()]))
}

/// FNV-1a, 128 bits (draft-eastlake-fnv): spreads names over 16 bytes; stored, so it must never change.
fn hash(parts: &[&[u8]]) -> [u8; 16] {
    const OFFSET_BASIS: u128 = 0x6c62272e07bb014262b821756295c58d;
    const PRIME: u128 = 0x0000000001000000000000000000013b;
    let fold = |hash: u128, byte: &u8| (hash ^ u128::from(*byte)).wrapping_mul(PRIME);
    parts.iter().copied().flatten().fold(OFFSET_BASIS, fold).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of the FNV reference: the empty string, "a" and "foobar".
    #[test]
    fn hash_is_fnv1a() {
        let value = |parts: &[&[u8]]| u128::from_le_bytes(hash(parts));
        assert_eq!(value(&[]), 0x6c62272e07bb014262b821756295c58d);
        assert_eq!(value(&[b"a"]), 0xd228cb696f1a8caf78912b704e4a8964);
        assert_eq!(value(&[b"foo", b"bar"]), 0x343e1662793c64bf6f0d3597ba446f18);
    }
}
