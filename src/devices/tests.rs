//! On real files; on block devices in `block.rs`.

mod block;

use super::*;
use crate::error::{Error, ErrorKind};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::Command;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn file(directory: &TempDir, name: &str, size: u64) -> PathBuf {
    let path = directory.path().join(name);
    File::create_new(&path).unwrap().set_len(size).unwrap();
    path
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, words: &[&str]) -> Error {
    let error = result.expect_err("should be refused");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
    assert!(!text.contains('\n'), "{text}");
    error
}

fn existing(role: Role, path: &Path) -> Device {
    match open_target(role, path).unwrap() {
        Target::Existing(device) => device,
        Target::Missing { place } => panic!("{place:?} is missing"),
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

fn has_program(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).chain([PathBuf::from("/usr/sbin")]).any(|directory| directory.join(program).exists())
}

/// Says loudly what was not tested, and why.
fn skipped(name: &str, why: &str) {
    println!("skipped: {name}: {why}");
    eprintln!("skipped: {name}: {why}");
}

fn can(test: &str, programs: &[&str]) -> bool {
    if !Path::new("/dev/loop-control").exists() || fs::metadata("/proc/self").unwrap().uid() != 0 {
        skipped(test, "needs root and loop devices");
        return false;
    }
    let missing: Vec<&&str> = programs.iter().filter(|program| !has_program(program)).collect();
    if !missing.is_empty() {
        skipped(test, &format!("needs {missing:?}"));
    }
    missing.is_empty()
}

/// Undoes something when the test ends, also by a panic.
struct Undo(Vec<String>);
impl Undo {
    fn new(command: &[&str]) -> Self {
        Self(command.iter().map(ToString::to_string).collect())
    }
}
impl Drop for Undo {
    fn drop(&mut self) {
        let done = Command::new(&self.0[0]).args(&self.0[1..]).output();
        if !done.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("{:?}: {done:?}", self.0);
        }
    }
}

#[test]
fn missing_and_wrong_types() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    run("mkfifo", &[at("fifo").to_str().unwrap()]);
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    file(&directory, "empty", 0);
    for (name, kind, word) in [
        ("missing", ErrorKind::NotFound, "No such file"),
        (".", ErrorKind::WrongType, "is a directory"),
        ("fifo", ErrorKind::WrongType, "is a FIFO"),
        ("socket", ErrorKind::WrongType, "is a socket"),
        ("empty/under", ErrorKind::WrongType, "Not a directory"),
        ("empty", ErrorKind::TooSmall, "is empty"),
    ] {
        refused(open_source(&at(name)), kind, &["source", name, word]);
        if kind == ErrorKind::WrongType {
            refused(open_target(Role::Destination, &at(name)), kind, &["destination", name, word]);
        }
    }
    refused(open_source(Path::new("/dev/null")), ErrorKind::WrongType, &["/dev/null is a character device"]);
    refused(open_target(Role::Metadata, Path::new("/dev/zero")), ErrorKind::WrongType, &["metadata /dev/zero"]);

    let target = |path: &Path| open_target(Role::Destination, path);
    assert!(matches!(target(&at("missing")).unwrap(), Target::Missing { .. }));
    assert!(!at("missing").exists());
    symlink(at("nowhere"), at("dangling")).unwrap();
    refused(
        target(&at("dangling")),
        ErrorKind::NotFound,
        &["dangling is a symbolic link to a file that does not exist"],
    );
    refused(target(&at("no/such")), ErrorKind::NotFound, &["can't be created in", "No such file"]);
    refused(target(&at("new/")), ErrorKind::NotFound, &["ends with a slash"]);
    refused(target(Path::new("/dev/hydrant-sdz")), ErrorKind::NotFound, &["there is no such device"]);
    refused(target(Path::new("")), ErrorKind::NotFound, &["the path is empty"]);
    refused(target(&at("no").join("line\nbreak")), ErrorKind::NotFound, &[r"line\nbreak"]);
    refused(
        target(Path::new("/proc/hydrant")).and_then(|_| create(Role::Destination, Path::new("/proc/hydrant"), 1)),
        ErrorKind::NotFound,
        &["destination /proc/hydrant"],
    );
}

/// Runs as another user: root may read and write everything.
#[test]
fn unreadable_and_unwritable() {
    let directory = TempDir::new().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = file(&directory, "secret", 4096);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    let new = directory.path().join("new");
    std::thread::spawn(move || {
        // SAFETY: takes no pointers. The system call changes this thread only, unlike the function of the C library.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) } == 0;
        if !changed {
            fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o555)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        }
        refused(open_source(&path), ErrorKind::PermissionDenied, &["source", "secret", "Permission denied"]);
        refused(open_target(Role::Destination, &path), ErrorKind::PermissionDenied, &["destination", "secret"]);
        refused(
            open_target(Role::Destination, &new),
            ErrorKind::PermissionDenied,
            &["new does not exist, and can't be created in"],
        );
        refused(create(Role::Destination, &new, 4096), ErrorKind::PermissionDenied, &["new can't be created"]);
        if !changed {
            fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
        }
    })
    .join()
    .unwrap();
}

#[test]
fn files_open_read_only_and_direct() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "source", 10_000);
    let source = open_source(&path).unwrap();
    assert_eq!((source.size, source.kind), (10_000, DeviceKind::File));
    for opened in [Some(&source.file), source.buffered.as_ref()].into_iter().flatten() {
        assert_eq!(opened.write_at(b"x", 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
    assert!([512, 1024, 2048, 4096].contains(&source.block));
    if source.direct {
        let mut block = crate::dma_buf::DmaBuf::new(source.block as usize);
        assert_eq!(source.file.read_at(&mut block, u64::from(source.block)).unwrap(), source.block as usize);
        assert_eq!(source.buffered.as_ref().unwrap().read_at(&mut [0; 100], 9_990).unwrap(), 10);
    } else {
        skipped("direct I/O", "the file system of the temporary directory has none");
    }

    let target = existing(Role::Destination, &file(&directory, "target", 10_000));
    assert_eq!(target.direct, target.buffered.is_some());
    let mut block = crate::dma_buf::DmaBuf::zeroed(target.block as usize);
    block.fill(7);
    target.file.write_all_at(&block, 0).unwrap();
    check_size(&target, 10_000, "").unwrap();
    let why = "for the source /dev/sda";
    refused(
        check_size(&target, 10_001, why),
        ErrorKind::TooSmall,
        &["too small", "10000 bytes", "10001 are needed for the source /dev/sda"],
    );
}

/// A file system without direct I/O: ramfs has none.
#[test]
fn file_system_without_direct_io() {
    if !can("file_system_without_direct_io", &["mount"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mount = directory.path().to_str().unwrap();
    run("mount", &["-t", "ramfs", "ramfs", mount]);
    let _unmount = Undo::new(&["umount", mount]);
    let path = file(&directory, "source", 10_000);
    let source = open_source(&path).unwrap();
    if source.direct {
        return skipped("file_system_without_direct_io", "this kernel's ramfs has direct I/O");
    }
    assert!(source.buffered.is_none());
    assert_eq!(source.block, 512);
    assert_eq!(source.file.read_at(&mut [0; 100], 9_990).unwrap(), 10);
    let created = create(Role::Destination, &directory.path().join("new"), 12_345).unwrap();
    assert!(!created.direct && created.buffered.is_none());
}

/// ext4 with `data=journal` can't either: what is written there is read back, also by who opens it next.
#[test]
fn file_system_with_journaled_data() {
    const NAME: &str = "file_system_with_journaled_data";
    if !can(NAME, &["mount", "mkfs.ext4"]) {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (image, mount) = (file(&directory, "image", 32 * MIB), directory.path().join("mount"));
    fs::create_dir(&mount).unwrap();
    run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
    run("mount", &["-o", "loop,data=journal", image.to_str().unwrap(), mount.to_str().unwrap()]);
    let _unmount = Undo::new(&["umount", mount.to_str().unwrap()]);
    let path = mount.join("new");
    let created = create(Role::Destination, &path, 12_345).unwrap();
    if created.direct {
        return skipped(NAME, "this kernel has direct I/O there");
    }
    assert!(created.buffered.is_none());
    created.file.write_all_at(&[7; 12_345], 0).unwrap();
    drop(created);
    let mut found = vec![0; 12_345];
    let again = existing(Role::Destination, &path);
    again.file.read_exact_at(&mut found, 0).unwrap();
    assert!(!again.direct && found == [7; 12_345]);
}

/// A failed flush leaves pages that count as clean and are not on the medium: who opens a target gets rid of them.
#[test]
fn clean_pages_of_targets_are_dropped() {
    const NAME: &str = "clean_pages_of_targets_are_dropped";
    if !has_program("fincore") {
        return skipped(NAME, "needs fincore (util-linux)");
    }
    let directory = TempDir::new().unwrap();
    let cached = |path: &Path| run("fincore", &["-nbo", "PAGES", path.to_str().unwrap()]).trim().to_owned();
    for (role, size) in [(Role::Destination, 10_000), (Role::Metadata, 8192)] {
        let path = directory.path().join(role.to_string());
        fs::write(&path, vec![7; size]).unwrap();
        if run("stat", &["-f", "-c", "%T", path.to_str().unwrap()]) == "tmpfs" {
            return skipped(NAME, "a tmpfs is all page cache");
        }
        File::open(&path).unwrap().sync_all().unwrap();
        assert_eq!(cached(&path), size.div_ceil(4096).to_string());
        let device = existing(role, &path);
        assert_eq!(cached(&path), "0", "{role}");
        let mut found = vec![0; size];
        device.any_alignment().read_exact_at(&mut found, 0).unwrap();
        assert!(found.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn create_and_size() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("new");
    let created = create(Role::Destination, &path, 5 * MIB + 1).unwrap();
    let stat = fs::metadata(&path).unwrap();
    assert_eq!((stat.len(), stat.mode() & 0o777, stat.blocks()), (5 * MIB + 1, 0o600, 0));
    assert_eq!(created.size, 5 * MIB + 1);
    assert_eq!(contents(&created).unwrap(), None);
    refused(open_target(Role::Metadata, &path), ErrorKind::InUse, &["metadata", "locked by this process"]);
    refused(create(Role::Destination, &path, 1), ErrorKind::InUse, &["can't be created", "it exists by now"]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 5 * MIB + 1);
    drop(created);
    assert_eq!(existing(Role::Destination, &path).size, 5 * MIB + 1);

    let empty = file(&directory, "empty", 0);
    let mut device = existing(Role::Metadata, &empty);
    assert_eq!(device.size, 0);
    assert_eq!(contents(&device).unwrap(), None);
    set_size(&mut device, 3 * MIB).unwrap();
    assert_eq!((device.size, fs::metadata(&empty).unwrap().len()), (3 * MIB, 3 * MIB));
    refused(set_size(&mut device, 4 * MIB), ErrorKind::TooSmall, &["it is not empty"]);
    assert_eq!(fs::metadata(&empty).unwrap().len(), 3 * MIB);

    // What fails leaves nothing behind: ext4 and others have a largest file.
    let huge = directory.path().join("huge");
    match create(Role::Destination, &huge, crate::units::DEVICE_SIZE_MAX) {
        Err(error) => {
            assert!(error.to_string().contains("huge can't be sized to 9223372036854775807 bytes"), "{error}");
            assert!(!huge.exists());
        }
        Ok(_) => skipped("create fails", "this file system takes the largest file"),
    }
    refused(
        create(Role::Destination, &huge, u64::MAX - 1),
        ErrorKind::NotSupported,
        &["can't have 18446744073709551614 bytes"],
    );
    assert!(!huge.exists());
}

#[test]
fn same_file_by_any_name() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (one, two) = (file(&directory, "one", MIB), file(&directory, "two", MIB));
    fs::hard_link(&one, at("hard")).unwrap();
    symlink(&one, at("soft")).unwrap();
    fs::create_dir(at("sub")).unwrap();
    for other in ["one", "hard", "soft", "sub/../one"] {
        let same = open_devices(Some(&one), &at(other), &two);
        refused(same, ErrorKind::InUse, &["source", "destination", "are the same file", "three different devices"]);
        let same = open_devices(None, &two, &at(other)).map(|_| ());
        same.unwrap();
        refused(
            open_devices(Some(&two), &at(other), &one),
            ErrorKind::InUse,
            &["destination", "metadata", "same file"],
        );
    }
    refused(open_devices(Some(&one), &at("new"), &at("sub/../new")), ErrorKind::InUse, &["same file"]);
    let devices = open_devices(Some(&one), &two, &at("new")).unwrap();
    assert!(matches!(devices.metadata, Target::Missing { .. }));
    assert!(matches!(devices.destination, Target::Existing(_)));
    assert!(!at("new").exists());
}

#[test]
fn locks() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "file", MIB);
    let target = existing(Role::Destination, &path);
    let holder = "locked by this process for another clone";
    refused(open_target(Role::Destination, &path), ErrorKind::InUse, &["destination", "file is in use", holder]);
    refused(
        open_source(&path),
        ErrorKind::InUse,
        &["source", holder, "is the destination or metadata of another clone"],
    );
    // A duplicate, as the shards use it, keeps the lock.
    let duplicate = target.file.try_clone().unwrap();
    drop(target);
    refused(open_source(&path), ErrorKind::InUse, &[holder]);
    drop(duplicate);
    let (one, two) = (open_source(&path).unwrap(), open_source(&path).unwrap());
    refused(open_target(Role::Metadata, &path), ErrorKind::InUse, &["metadata", holder]);
    drop((one, two));

    // By another process, which is named.
    if !has_program("flock") {
        return skipped("locks of another process", "needs flock(1)");
    }
    let mut command = Command::new("flock");
    command.args([path.to_str().unwrap(), "sh", "-c", "echo; read x"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut other = command.spawn().unwrap();
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let pid = format!("locked by process {} (flock)", other.id());
    refused(open_target(Role::Destination, &path), ErrorKind::InUse, &[&pid]);
    refused(open_source(&path), ErrorKind::InUse, &[&pid]);
    drop(other.stdin.take());
    other.wait().unwrap();
    existing(Role::Destination, &path);
}

/// Virtual machine monitors lock their images by record locks of the open file.
#[test]
fn record_locks() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "image", MIB);
    let other = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: every field is an integer.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (libc::F_RDLCK as i16, 100, 1);
    // SAFETY: reads one struct flock64 that outlives the call.
    assert_eq!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, 0);
    refused(open_target(Role::Destination, &path), ErrorKind::InUse, &["image is in use", "virtual machine"]);
    drop(other);
    existing(Role::Destination, &path);
}

#[test]
fn fingerprint_of_files() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, "one", MIB);
    let id = open_source(&path).unwrap().fingerprint_id();
    if id == [0; 16] {
        return skipped("fingerprint_of_files", "no birth time on this file system");
    }
    fs::rename(&path, directory.path().join("moved")).unwrap();
    assert_eq!(open_source(&directory.path().join("moved")).unwrap().fingerprint_id(), id);
    assert_ne!(open_source(&file(&directory, "one", MIB)).unwrap().fingerprint_id(), id);
}

#[test]
fn contents_of_files() {
    let directory = TempDir::new().unwrap();
    let holds = |bytes: &[u8], offset: u64, size: u64| {
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        contents(&open_source(&path).unwrap()).unwrap()
    };
    let is = |expected: &str, bytes: &[u8], offset: u64| {
        assert_eq!(holds(bytes, offset, MIB + 1).as_deref(), Some(expected));
    };
    assert_eq!(holds(&[0; 4096], 4096, MIB), None);
    assert_eq!(holds(b"", 0, 1), None);
    is("data at offset 0", b"x", 0);
    is("data at offset 1048576", b"x", MIB);
    is("data at offset 77777", b"x", 77777);
    is("hydrant metadata", &crate::meta::codec::SUPERBLOCK_MAGIC, 0);
    is("dm-clone metadata", &0x8af2_7f64u64.to_le_bytes(), 32);
    is("an xfs file system", b"XFSB", 0);
    is("a LUKS volume", b"LUKS\xba\xbe\0\x02", 0);
    is("a btrfs file system", b"_BHRfS_M", 0x10040);
    is("a GPT partition table", b"EFI PART", 512);
    is("an MBR boot record", b"\x55\xaa", 510);
    let mut label = [0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[24..32].copy_from_slice(b"LVM2 001");
    is("an LVM physical volume", &label, 512);
    // A large file, mostly a hole: what is allocated is found wherever it is, at no cost for the hole.
    assert_eq!(holds(b"x", 700 << 30, 1 << 40).as_deref(), Some("data at offset 751619276800"));

    for (arguments, expected) in [
        (&["mkfs.ext4", "-q", "-F"][..], "an ext4 file system"),
        (&["mkfs.ext4", "-q", "-F", "-t", "ext3"], "an ext3 file system"),
        (&["mkfs.ext4", "-q", "-F", "-t", "ext2"], "an ext2 file system"),
        (&["mkfs.xfs", "-q", "-f"], "an xfs file system"),
        (&["mkfs.btrfs", "-q", "-f"], "a btrfs file system"),
        (&["mkswap", "-q"], "swap space"),
        (&["qemu-img", "create", "-q", "-f", "qcow2"], "a qcow2 image"),
    ] {
        if !has_program(arguments[0]) {
            skipped("contents_of_files", &format!("no {}", arguments[0]));
            continue;
        }
        let path = directory.path().join("made");
        File::create(&path).unwrap().set_len(512 * MIB).unwrap();
        let mut arguments = [arguments, &[path.to_str().unwrap()]].concat();
        if arguments[0] == "qemu-img" {
            arguments.push("512M");
        }
        run(arguments[0], &arguments[1..]);
        assert_eq!(contents(&open_source(&path).unwrap()).unwrap().as_deref(), Some(expected));
    }
}
