//! Block devices and small file systems, gone when their guard is, and with the process.

use super::tools::{run, run_for_status, wait_for};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A loop device. It is marked to be detached by the kernel when the last one closes it: also a test that is killed
/// leaves none behind.
pub struct Loop {
    pub path: PathBuf,
    _open: File,
}

impl Loop {
    /// Over a file, with a logical block size of 512 or 4096 bytes.
    pub fn attach(backing: &Path, block: u32) -> Self {
        let path = run("losetup", &["-f", "--show", "-b", &block.to_string(), backing.to_str().unwrap()]);
        let path = PathBuf::from(path.trim());
        let open = File::open(&path).unwrap();
        run("losetup", &["-d", path.to_str().unwrap()]);
        Self { path, _open: open }
    }
}

/// A small file system of its own, mounted.
pub struct FileSystem {
    pub mount: PathBuf,
    device: Loop,
}

impl FileSystem {
    /// An ext4 of `size` bytes in the file `backing`.
    pub fn ext4(backing: &Path, size: u64, mount: &Path) -> Self {
        File::create(backing).unwrap().set_len(size).unwrap();
        let device = Loop::attach(backing, 512);
        run("mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal", device.path.to_str().unwrap()]);
        fs::create_dir_all(mount).unwrap();
        run("mount", &[&device.path, mount]);
        Self { mount: mount.into(), device }
    }
    /// Unmounts it, when nobody has a file open there any more, and mounts it again.
    pub fn mount_again(&self) {
        // The kernel ends what a process that was killed had in flight, and closes its files then.
        let is_unmounted = || run_for_status("umount", &[&self.mount]).0 == 0;
        wait_for("the file system is not in use", std::time::Duration::from_secs(10), is_unmounted);
        run("mount", &[&self.device.path, &self.mount]);
    }
    /// The block device under it.
    pub fn device(&self) -> &Path {
        &self.device.path
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // A daemon that is being killed may still hold it.
        for _ in 0..100 {
            if run_for_status("umount", &[&self.mount]).0 == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        run_for_status("umount", &[Path::new("-l"), &self.mount]);
    }
}
