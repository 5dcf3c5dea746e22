//! On real loop devices, partitions, mounts and swap, where root may make them.

use super::super::sysfs::Sysfs;
use super::*;

/// A loop device, detached at the end.
struct Loop {
    path: PathBuf,
    backing: PathBuf,
}
impl Loop {
    fn attach(backing: &Path, options: &[&str]) -> Self {
        let path = run("losetup", &[&["-f", "--show"], options, &[backing.to_str().unwrap()]].concat());
        Self { path: path.into(), backing: backing.into() }
    }
    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }
    fn kernel_name(&self) -> &str {
        self.name().trim_start_matches("/dev/")
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        drop(Undo::new(&["losetup", "-d", self.name()]));
        // Another test that looks at all loop devices may have it open: then the kernel detaches it a moment later.
        let attribute = format!("/sys/block/{}/loop/backing_file", self.kernel_name());
        for _ in 0..100 {
            if !fs::read_to_string(&attribute).is_ok_and(|text| Path::new(text.trim_end()) == self.backing) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[test]
fn loop_devices_with_both_sector_sizes() {
    if !can("loop_devices_with_both_sector_sizes", &["losetup"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let backing = file(&directory, "backing", 48 * MIB);
    for sector in [512, 4096] {
        let device = Loop::attach(&backing, &["-b", &sector.to_string()]);
        let target = existing(Role::Destination, &device.path);
        assert_eq!((target.kind, target.size, target.block), (DeviceKind::Block, 48 * MIB, sector));
        assert!(target.direct && target.buffered.is_none());
        let mut block = crate::dma_buf::DmaBuf::zeroed(sector as usize);
        assert_eq!(contents(&target).unwrap(), None);
        block.fill(9);
        target.file.write_all_at(&block, 48 * MIB - u64::from(sector)).unwrap();
        let last = format!("data at offset {}", 48 * MIB - u64::from(sector));
        assert_eq!(contents(&target).unwrap().as_deref(), Some(last.as_str()));
        block.fill(0);
        target.file.write_all_at(&block, 48 * MIB - u64::from(sector)).unwrap();

        refused(open_target(Role::Destination, &device.path), ErrorKind::InUse, &["in use", "this process"]);
        refused(open_source(&device.path), ErrorKind::InUse, &["destination or metadata of another clone"]);
        drop(target);
        let source = open_source(&device.path).unwrap();
        assert_eq!(source.file.write_at(&block, 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_ne!(source.fingerprint_id(), [0; 16]);
        let inner = open_source(&backing).unwrap();
        assert_ne!(source.fingerprint_id(), inner.fingerprint_id());
    }
    let empty = Loop::attach(&file(&directory, "empty", 0), &[]);
    refused(open_source(&empty.path), ErrorKind::TooSmall, &["is empty"]);
    refused(open_target(Role::Destination, &empty.path), ErrorKind::TooSmall, &["has size 0"]);
}

#[test]
fn loop_device_over_another_device() {
    if !can("loop_device_over_another_device", &["losetup"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (backing, other) = (file(&directory, "backing", 4 * MIB), file(&directory, "other", 4 * MIB));
    let device = Loop::attach(&backing, &[]);
    let kernel_name = device.kernel_name();
    refused(open_target(Role::Destination, &backing), ErrorKind::InUse, &["attached to the loop device", kernel_name]);
    for (source, destination) in [(&backing, &device.path), (&device.path, &backing)] {
        let error =
            refused(open_devices(Some(source), destination, &other), ErrorKind::InUse, &["source", "destination"]);
        assert!(error.to_string().contains("lies on"), "{error}");
    }
    refused(open_devices(Some(&device.path), &device.path, &other), ErrorKind::InUse, &["same block device"]);
    let node = directory.path().join("node");
    let stat = fs::metadata(&device.path).unwrap();
    let (major, minor) = (libc::major(stat.rdev()).to_string(), libc::minor(stat.rdev()).to_string());
    run("mknod", &[node.to_str().unwrap(), "b", &major, &minor]);
    refused(open_devices(Some(&other), &device.path, &node), ErrorKind::InUse, &["same block device"]);
    // Another node has its own lock, but there is only one claim.
    let target = existing(Role::Destination, &device.path);
    refused(open_target(Role::Destination, &node), ErrorKind::InUse, &["is in use by the kernel or another program"]);
    drop(target);

    // Two windows on one file: apart is fine, overlapping is not.
    let half = (2 * MIB).to_string();
    let first = Loop::attach(&other, &["--sizelimit", &half]);
    let second = Loop::attach(&other, &["--offset", &half]);
    let whole = Loop::attach(&other, &[]);
    drop(open_devices(Some(&first.path), &second.path, &device.path).unwrap());
    let overlap = open_devices(Some(&whole.path), &second.path, &device.path);
    refused(overlap, ErrorKind::InUse, &["loop devices over the same part of one file"]);

    // A file that a clone writes, under a loop device that was attached later.
    drop((first, second, whole));
    let target = existing(Role::Destination, &other);
    let later = Loop::attach(&other, &[]);
    refused(
        open_target(Role::Destination, &later.path),
        ErrorKind::InUse,
        &["over a file that is locked by this process"],
    );
    drop(target);
}

/// Clones that have no device in common, but the data under them.
#[test]
fn loop_devices_of_several_clones() {
    if !can("loop_devices_of_several_clones", &["losetup"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let backing = file(&directory, "backing", 4 * MIB);
    let (one, two) = (Loop::attach(&backing, &[]), Loop::attach(&backing, &[]));
    let on_two = Loop::attach(&two.path, &[]);
    let shared = ["used through another device or file by", "it is being written"];
    let overwritten = ["used through another device or file by", "it would be overwritten"];

    let target = existing(Role::Destination, &one.path);
    let duplicate = target.try_clone().unwrap();
    drop(target);
    refused(open_target(Role::Metadata, &on_two.path), ErrorKind::InUse, &overwritten);
    for path in [&two.path, &on_two.path, &backing] {
        refused(open_source(path), ErrorKind::InUse, &shared);
        refused(open_input(Role::Image, path), ErrorKind::InUse, &[]);
    }
    // What is done with the descriptor alone needs the lock on the file as well.
    let (descriptor, lock) = (duplicate.file.try_clone().unwrap(), duplicate.lock_below().unwrap());
    drop((duplicate, descriptor));
    refused(open_source(&two.path), ErrorKind::InUse, &shared);
    drop(lock);

    // A source may be read by many, in whatever way, and written by none.
    for path in [&backing, &two.path, &on_two.path] {
        let source = open_source(path).unwrap();
        drop([open_source(&one.path).unwrap(), open_source(&backing).unwrap(), open_source(&on_two.path).unwrap()]);
        refused(open_target(Role::Destination, &one.path), ErrorKind::InUse, &overwritten);
        drop(source);
        existing(Role::Destination, &one.path);
    }
    // A file that is gone is nobody's: warned of, and gone on with.
    fs::remove_file(&backing).unwrap();
    existing(Role::Destination, &one.path);
}

#[test]
fn loop_devices_over_parts_of_one_file() {
    if !can("loop_devices_over_parts_of_one_file", &["losetup", "addpart"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let backing = file(&directory, "backing", 64 * MIB);
    let device = Loop::attach(&backing, &["-P", "--offset", &MIB.to_string()]);
    run("addpart", &[device.name(), "1", "2048", "40960"]);
    run("addpart", &[device.name(), "2", "43008", "40960"]);
    let drop_partitions = [Undo::new(&["delpart", device.name(), "1"]), Undo::new(&["delpart", device.name(), "2"])];
    let (one, two) = (PathBuf::from(format!("{}p1", device.name())), PathBuf::from(format!("{}p2", device.name())));
    let target = existing(Role::Destination, &one);
    existing(Role::Destination, &two);
    open_source(&two).unwrap();
    // The first partition is from 2 to 22 MiB of the file.
    let window = |start: u64, size: u64| {
        Loop::attach(&backing, &["--offset", &start.to_string(), "--sizelimit", &size.to_string()])
    };
    for (start, size, free) in [
        (0, 2 * MIB, true),
        (0, 2 * MIB + 512, false),
        (10 * MIB, MIB, false),
        (22 * MIB - 512, MIB, false),
        (22 * MIB, MIB, true),
    ] {
        let part = window(start, size);
        assert_eq!(open_source(&part.path).is_ok(), free, "source {start}+{size}");
        assert_eq!(open_target(Role::Destination, &part.path).is_ok(), free, "destination {start}+{size}");
    }
    refused(open_source(&device.path), ErrorKind::InUse, &["it is being written"]);
    drop((target, drop_partitions));
}

#[test]
fn loop_device_read_only() {
    if !can("loop_device_read_only", &["losetup"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let device = Loop::attach(&file(&directory, "backing", 4 * MIB), &["-r"]);
    refused(
        open_target(Role::Destination, &device.path),
        ErrorKind::PermissionDenied,
        &["is a read-only block device"],
    );
    open_source(&device.path).unwrap();
}

#[test]
fn mounted_device() {
    if !can("mounted_device", &["losetup", "mkfs.ext4", "mount"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let backing = file(&directory, "backing", 32 * MIB);
    let device = Loop::attach(&backing, &["-b", "4096"]);
    run("mkfs.ext4", &["-q", device.name()]);
    assert_eq!(contents(&existing(Role::Destination, &device.path)).unwrap().as_deref(), Some("an ext4 file system"));
    let mount = directory.path().join("mount point");
    fs::create_dir(&mount).unwrap();
    run("mount", &[device.name(), mount.to_str().unwrap()]);
    let unmount = Undo::new(&["umount", mount.to_str().unwrap()]);
    let place = format!("mounted at {}", mount.display());
    refused(open_target(Role::Destination, &device.path), ErrorKind::InUse, &[device.name(), &place]);
    refused(open_target(Role::Metadata, &backing), ErrorKind::InUse, &["attached to the loop device", &place]);

    // A source may be mounted, but a target must not be a file on it. 4096-byte sectors reach the file's alignment.
    let source = open_source(&device.path).unwrap();
    assert_eq!(source.mounted_writable(), Some(mount.clone()));
    let inside = mount.join("inside");
    let elsewhere = directory.path().join("elsewhere");
    let error =
        refused(open_devices(Some(&device.path), &inside, &elsewhere), ErrorKind::InUse, &["file system of source"]);
    assert!(error.to_string().contains("would change the source"), "{error}");
    assert!(!inside.exists());
    let created = create(Role::Destination, &inside, MIB + 1).unwrap();
    assert!(created.direct);
    assert_eq!(created.block, 4096);
    drop((created, source));
    drop(unmount);
    assert_eq!(open_source(&device.path).unwrap().mounted_writable(), None);
    existing(Role::Destination, &device.path);
}

#[test]
fn partitions() {
    if !can("partitions", &["losetup", "addpart", "mkfs.ext4", "mount"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let device = Loop::attach(&file(&directory, "backing", 64 * MIB), &["-P"]);
    run("addpart", &[device.name(), "1", "2048", "40960"]);
    run("addpart", &[device.name(), "2", "43008", "40960"]);
    let (one, two) = (PathBuf::from(format!("{}p1", device.name())), PathBuf::from(format!("{}p2", device.name())));
    let other = file(&directory, "other", MIB);
    let drop_partitions = [Undo::new(&["delpart", device.name(), "1"]), Undo::new(&["delpart", device.name(), "2"])];

    refused(open_devices(Some(&device.path), &one, &other), ErrorKind::InUse, &["lies on", "partition"]);
    refused(open_devices(Some(&two), &device.path, &other), ErrorKind::InUse, &["lies on", "partition"]);
    let devices = open_devices(Some(&one), &two, &other).unwrap();
    let Target::Existing(target) = &devices.destination else { panic!("it exists") };
    assert_ne!(devices.source.as_ref().unwrap().fingerprint_id(), target.fingerprint_id());
    refused(open_target(Role::Destination, &device.path), ErrorKind::InUse, &["is in use"]);
    drop(devices);

    run("mkfs.ext4", &["-q", two.to_str().unwrap()]);
    let mount = directory.path().join("mount");
    fs::create_dir(&mount).unwrap();
    run("mount", &[two.to_str().unwrap(), mount.to_str().unwrap()]);
    let unmount = Undo::new(&["umount", mount.to_str().unwrap()]);
    refused(open_target(Role::Destination, &device.path), ErrorKind::InUse, &["its partition", "p2 is mounted at"]);
    refused(
        open_devices(Some(&device.path), &mount.join("new"), &other),
        ErrorKind::InUse,
        &["would change the source"],
    );
    open_devices(Some(&one), &mount.join("new"), &other).unwrap();
    drop((unmount, drop_partitions));
}

#[test]
fn swap() {
    if !can("swap", &["losetup", "mkswap", "swapon"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let device = Loop::attach(&file(&directory, "backing", 4 * MIB), &[]);
    run("mkswap", &["-q", device.name()]);
    if !Command::new("swapon").arg(device.name()).status().unwrap().success() {
        return skipped("swap", "swapon is not permitted");
    }
    let off = Undo::new(&["swapoff", device.name()]);
    refused(open_target(Role::Destination, &device.path), ErrorKind::InUse, &["is used as swap", "overwritten"]);
    drop(off);
    existing(Role::Destination, &device.path);
}

/// Device-mapper is not everywhere: what sysfs shows of it, as a tree of files. A disk sda with a partition that
/// dm-0 maps, and the file system of the target's file on dm-0.
#[test]
fn mapped_devices() {
    let root = TempDir::new().unwrap();
    let make = |path: &str, number: &str| {
        let directory = root.path().join(path);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("dev"), format!("{number}\n")).unwrap();
        fs::create_dir_all(root.path().join("dev/block")).unwrap();
        symlink(&directory, root.path().join(format!("dev/block/{number}"))).unwrap();
        directory
    };
    let disk = make("devices/sda", "8:0");
    let partition = make("devices/sda/sda1", "8:1");
    let other = make("devices/sda/sda2", "8:2");
    let mapped = make("devices/dm-0", "253:9");
    fs::write(partition.join("partition"), "1\n").unwrap();
    fs::write(other.join("partition"), "2\n").unwrap();
    fs::create_dir_all(mapped.join("slaves")).unwrap();
    fs::create_dir_all(mapped.join("dm")).unwrap();
    fs::write(mapped.join("dm/name"), "vg-root\n").unwrap();
    symlink(&partition, mapped.join("slaves/sda1")).unwrap();
    fs::create_dir_all(partition.join("holders")).unwrap();
    symlink(&mapped, partition.join("holders/dm-0")).unwrap();

    let sysfs = Sysfs::at(root.path());
    let id = |major, minor| DeviceId::Block { major, minor };
    assert_eq!(sysfs.stack(&id(253, 9)), [id(253, 9), id(8, 1), id(8, 0)]);
    assert_eq!(sysfs.node(&id(8, 1)).unwrap().holders()[0].label(), "dm-0 (vg-root)");
    assert_eq!(sysfs.node(&id(8, 0)).unwrap().partitions().len(), 2);
    assert_eq!(holders::kernel_use(&sysfs, &id(8, 1), None).unwrap(), "held by dm-0 (vg-root)");
    assert_eq!(holders::kernel_use(&sysfs, &id(8, 1), Some(&id(253, 9))), None, "by no other one");
    assert!(holders::kernel_use(&sysfs, &id(8, 0), None).unwrap().contains("its partition sda1 is held by dm-0"));
    assert_eq!(holders::kernel_use(&sysfs, &id(253, 9), None), None);

    let block = |role, major, minor| Place {
        role,
        path: format!("/dev/{major}:{minor}").into(),
        id: id(major, minor),
        fs_dev: 1,
    };
    let file = DeviceId::File { dev: libc::makedev(253, 9), ino: 5 };
    let file = Place { role: Role::Metadata, path: "/file".into(), id: file, fs_dev: libc::makedev(253, 9) };
    let check = |places: &[Place]| check_distinct_in(&sysfs, places);
    refused(check(&[block(Role::Source, 8, 1), block(Role::Destination, 253, 9)]), ErrorKind::InUse, &["lies on"]);
    refused(check(&[block(Role::Source, 253, 9), block(Role::Destination, 8, 0)]), ErrorKind::InUse, &["lies on"]);
    refused(check(&[block(Role::Source, 8, 0), file.clone()]), ErrorKind::InUse, &["would change the source"]);
    check(&[block(Role::Source, 8, 2), block(Role::Destination, 253, 9), file.clone()]).unwrap();
    drop(disk);
}
