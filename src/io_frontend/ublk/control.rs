//! The control device of ublk: one command at a time, each waited for.
//!
//! Blocks, some commands for long (START_DEV until the first reads of the new device were served): for threads of their
//! own, see [`crate::ring::Ring::on_thread`].

use super::proto::{
    self, CONTROL_COMMAND_BYTES, Control, DEVICE_INFO_BYTES, DeviceInfo, Features, PARAMETERS_BYTES, Parameters,
};
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

const PATH: &str = "/dev/ublk-control";
/// Where the kernel lists the devices there are.
const CLASS: &str = "/sys/class/ublk-char";

/// Device numbers that exist now; none where sysfs does not show them.
pub fn numbers() -> Vec<u32> {
    let entries = std::fs::read_dir(CLASS).into_iter().flatten().flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("ublkc")?.parse().ok();
    let mut numbers: Vec<u32> = entries.filter_map(|entry| number(entry.file_name())).collect();
    numbers.sort_unstable();
    numbers
}

/// Whether this process may make devices. The file alone does not tell: root without CAP_SYS_ADMIN can open it, and would be
/// refused only when a device is made, after the metadata. True when it can't be known: then the kernel says it.
fn may_administer() -> bool {
    /// CAP_SYS_ADMIN of linux/capability.h.
    const SYS_ADMIN: u64 = 1 << 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_none_or(|bits| bits & SYS_ADMIN != 0)
}

fn no_permission() -> Error {
    let text = format!("{PATH}: no permission: block devices need root (CAP_SYS_ADMIN, CAP_DAC_OVERRIDE)");
    Error::new(ErrorKind::PermissionDenied, text)
}

/// An open /dev/ublk-control.
pub struct ControlDevice {
    file: File,
    uring: IoUring<squeue::Entry128, cqueue::Entry>,
}

impl ControlDevice {
    /// Opens it, and makes sure that the kernel can do what is needed.
    pub fn open() -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).open(PATH).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    let text = "there is no ublk here: load it with 'modprobe ublk_drv' (Linux 6.12 or later has it)";
                    Error::new(ErrorKind::Environment, format!("{PATH}: {text}"))
                }
                Some(libc::EACCES | libc::EPERM) => no_permission(),
                _ => Error::from_io(error, PATH),
            })?;
        if !may_administer() {
            return Err(no_permission());
        }
        let uring = IoUring::builder().build(4).map_err(|error| Error::from_io(error, "io_uring for ublk"))?;
        let mut control = Self { file, uring };
        let missing = Features::NEEDED - control.features()?;
        if !missing.is_empty() {
            bail!(Environment, "ublk of this kernel lacks {missing:?}: Linux 6.12 or later has it");
        }
        Ok(control)
    }

    /// Carries a command out. `payload` is what it reads or writes.
    fn command(&mut self, control: Control, number: u32, payload: &mut [u8], data: u64) -> io::Result<()> {
        let len = u16::try_from(payload.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let address = if payload.is_empty() { 0 } else { payload.as_mut_ptr() as u64 };
        let mut command = [0; 80];
        command[..CONTROL_COMMAND_BYTES].copy_from_slice(&proto::control_command(number, address, len, data));
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), control.opcode()).cmd(command).build();
        // SAFETY: the command points to `payload`, which is borrowed until its completion has been seen below; the file
        // is open as long as `self`.
        unsafe { self.uring.submission().push(&entry) }.map_err(io::Error::other)?;
        loop {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    // The kernel may still write to the payload: there is nobody to go back to.
                    log::error!("ublk: {}: io_uring_enter: {error}", control.name());
                    std::process::abort();
                }
            }
            if let Some(completed) = self.uring.completion().next() {
                return match completed.result() {
                    error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                    _ => Ok(()),
                };
            }
        }
    }

    fn failed(control: Control, number: u32, error: io::Error) -> Error {
        let kind = match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => ErrorKind::PermissionDenied,
            Some(libc::ENODEV) => ErrorKind::NotFound,
            Some(libc::EBUSY | libc::EEXIST) => ErrorKind::InUse,
            _ => ErrorKind::Environment,
        };
        Error::new(
            kind,
            format!("ublk device {number}: {} failed: {}", control.name(), Error::from_io(error, "the kernel says")),
        )
    }

    fn simple(&mut self, control: Control, number: u32, data: u64) -> Result<()> {
        self.command(control, number, &mut [], data).map_err(|error| Self::failed(control, number, error))
    }

    /// What this kernel can do.
    pub fn features(&mut self) -> Result<Features> {
        let mut bits = [0; 8];
        self.command(Control::GetFeatures, proto::NUMBER_ANY, &mut bits, 0).map_err(|error| {
            let text = format!("ublk of this kernel is too old (GET_FEATURES: {error}): Linux 6.12 or later is needed");
            Error::new(ErrorKind::Environment, text)
        })?;
        Ok(Features::from_bits_retain(u64::from_ne_bytes(bits)))
    }

    /// Makes a device; returns what it became. `InUse`: the number is taken.
    pub fn add(&mut self, wanted: &DeviceInfo) -> Result<DeviceInfo> {
        let mut bytes = wanted.encode();
        match self.command(Control::AddDevice, wanted.number, &mut bytes, 0) {
            Ok(()) => Ok(DeviceInfo::decode(&bytes)),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let by = match self.info(wanted.number) {
                    Ok(info) if info.pid > 0 => format!(" by process {}", info.pid),
                    _ => String::new(),
                };
                bail!(
                    InUse,
                    "ublk device number {} is taken{by}: choose another one, or leave it to the kernel",
                    wanted.number
                )
            }
            Err(error) if wanted.number == proto::NUMBER_ANY => {
                bail!(Environment, "a ublk device can't be made: ADD_DEV: {}", Error::from_io(error, "the kernel says"))
            }
            Err(error) => Err(Self::failed(Control::AddDevice, wanted.number, error)),
        }
    }

    /// `NotFound` when there is no such device.
    pub fn info(&mut self, number: u32) -> Result<DeviceInfo> {
        let mut bytes = [0; DEVICE_INFO_BYTES];
        self.command(Control::GetDeviceInfo, number, &mut bytes, 0)
            .map_err(|error| Self::failed(Control::GetDeviceInfo, number, error))?;
        Ok(DeviceInfo::decode(&bytes))
    }

    pub fn set_parameters(&mut self, number: u32, parameters: &Parameters) -> Result<()> {
        let mut bytes = parameters.encode();
        self.command(Control::SetParameters, number, &mut bytes, 0)
            .map_err(|error| Self::failed(Control::SetParameters, number, error))
    }

    pub fn parameters(&mut self, number: u32) -> Result<Parameters> {
        let mut bytes: [u8; PARAMETERS_BYTES] = Parameters::question();
        self.command(Control::GetParameters, number, &mut bytes, 0)
            .map_err(|error| Self::failed(Control::GetParameters, number, error))?;
        Ok(Parameters::decode(&bytes))
    }

    /// Makes /dev/ublkbN; every tag of every queue must be fetched, or soon be. Returns when the kernel has looked for
    /// partitions, which it reads from the device.
    pub fn start(&mut self, number: u32) -> Result<()> {
        self.simple(Control::StartDevice, number, std::process::id().into())
    }

    /// Removes /dev/ublkbN, also under who has it open. Waits for requests in flight.
    pub fn stop(&mut self, number: u32) -> Result<()> {
        self.simple(Control::StopDevice, number, 0)
    }

    /// Removes the rest, as soon as nobody has any of it open or mapped: does not wait for that.
    pub fn delete(&mut self, number: u32) -> Result<()> {
        self.simple(Control::DeleteDevice, number, 0)
    }

    /// Begins to take a device over; 0 or an errno, which [`super::takeover::judge_recovery`] judges.
    pub fn start_recovery(&mut self, number: u32) -> i32 {
        match self.command(Control::StartRecovery, number, &mut [], 0) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// As [`Self::start`], of a device that is taken over: its requests come again.
    pub fn end_recovery(&mut self, number: u32) -> Result<()> {
        self.simple(Control::EndRecovery, number, std::process::id().into())
    }

    /// `size` in sectors.
    pub fn update_size(&mut self, number: u32, sectors: u64) -> Result<()> {
        self.simple(Control::UpdateSize, number, sectors)
    }
}
