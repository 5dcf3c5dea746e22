//! The kernel's ublk interface as bytes: commands, structures, flags. Pure.
//!
//! Source: `include/uapi/linux/ublk_cmd.h` and `Documentation/block/ublk.rst` of Linux 6.18. Everything is in the byte order
//! of the machine. What a kernel can do is asked with GET_FEATURES; nothing here depends on its version.
//!
//! ```text
//! control command (32 bytes, in an SQE of 128 bytes on /dev/ublk-control)
//!   0 dev_id u32 | 4 queue_id u16 | 6 len u16 | 8 addr u64 | 16 data u64 | 24 path_len u16 | 26 zeros
//! device info (64 bytes)
//!   0 nr_hw_queues u16 | 2 queue_depth u16 | 4 state u16 | 8 max_io_buf_bytes u32 | 12 dev_id u32
//!   16 server's pid i32 | 24 flags u64 | 32 ublksrv_flags u64: the server's own, kept by the kernel | 40 uid, gid, zeros
//! parameters (60 bytes as used here)
//!   0 len u32 | 4 types u32 | 8 basic (32 bytes) | 40 discard (20 bytes)
//! I/O command (16 bytes, in an SQE on /dev/ublkcN)
//!   0 q_id u16 | 2 tag u16 | 4 result i32 | 8 addr u64
//! I/O descriptor (24 bytes, one for each tag, in memory that the kernel shares)
//!   0 op and flags u32 | 4 nr_sectors u32 | 8 start_sector u64 | 16 addr u64
//! ```

use bitflags::bitflags;

/// A device number for ADD_DEV that lets the kernel choose one.
pub const NUMBER_ANY: u32 = u32::MAX;
/// A command that is about no queue.
const QUEUE_NONE: u16 = u16::MAX;

pub const CONTROL_COMMAND_BYTES: usize = 32;
pub const DEVICE_INFO_BYTES: usize = 64;
pub const PARAMETERS_BYTES: usize = 60;
pub const IO_COMMAND_BYTES: usize = 16;
pub const DESCRIPTOR_BYTES: usize = 24;

/// Largest queue depth of the driver.
const QUEUE_DEPTH_MAX: usize = 4096;
/// Positions in /dev/ublkcN, see [`data_position`].
const DATA_POSITION: u64 = 0x8000_0000;
const DATA_QUEUE_SHIFT: u32 = 41;
const DATA_TAG_SHIFT: u32 = 25;

/// A command of the kernel's `_IOC` form.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}
const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// A command to /dev/ublk-control.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// The argument is the queue; the payload becomes a bit for each CPU.
    GetQueueAffinity,
    GetDeviceInfo,
    GetParameters,
    GetFeatures,
    AddDevice,
    /// Does not wait until nobody has the device open.
    DeleteDevice,
    StartDevice,
    StopDevice,
    SetParameters,
    StartRecovery,
    EndRecovery,
    UpdateSize,
}

impl Control {
    /// What goes into `cmd_op` of the SQE.
    pub const fn opcode(self) -> u32 {
        let (direction, number) = match self {
            Control::GetQueueAffinity => (READ, 0x01),
            Control::GetDeviceInfo => (READ, 0x02),
            Control::GetParameters => (READ, 0x09),
            Control::GetFeatures => (READ, 0x13),
            Control::AddDevice => (READ_WRITE, 0x04),
            Control::DeleteDevice => (READ, 0x14),
            Control::StartDevice => (READ_WRITE, 0x06),
            Control::StopDevice => (READ_WRITE, 0x07),
            Control::SetParameters => (READ_WRITE, 0x08),
            Control::StartRecovery => (READ_WRITE, 0x10),
            Control::EndRecovery => (READ_WRITE, 0x11),
            Control::UpdateSize => (READ_WRITE, 0x15),
        };
        ioc(direction, number, CONTROL_COMMAND_BYTES)
    }

    /// As the kernel's header calls it, for errors.
    pub const fn name(self) -> &'static str {
        match self {
            Control::GetQueueAffinity => "GET_QUEUE_AFFINITY",
            Control::GetDeviceInfo => "GET_DEV_INFO",
            Control::GetParameters => "GET_PARAMS",
            Control::GetFeatures => "GET_FEATURES",
            Control::AddDevice => "ADD_DEV",
            Control::DeleteDevice => "DEL_DEV_ASYNC",
            Control::StartDevice => "START_DEV",
            Control::StopDevice => "STOP_DEV",
            Control::SetParameters => "SET_PARAMS",
            Control::StartRecovery => "START_USER_RECOVERY",
            Control::EndRecovery => "END_USER_RECOVERY",
            Control::UpdateSize => "UPDATE_SIZE",
        }
    }
}

/// The bytes of a control command. `len` bytes at `addr` are what it reads or writes; `data` is its one argument.
pub fn control_command(number: u32, addr: u64, len: u16, data: u64) -> [u8; CONTROL_COMMAND_BYTES] {
    let mut bytes = [0; CONTROL_COMMAND_BYTES];
    put(&mut bytes, 0, number.to_ne_bytes());
    put(&mut bytes, 4, QUEUE_NONE.to_ne_bytes());
    put(&mut bytes, 6, len.to_ne_bytes());
    put(&mut bytes, 8, addr.to_ne_bytes());
    put(&mut bytes, 16, data.to_ne_bytes());
    bytes
}

bitflags! {
    /// What a kernel can do, and what a device was made with.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Features: u64 {
        /// A device outlives its server, and another one goes on with it.
        const USER_RECOVERY = 1 << 3;
        /// ... and gets the requests that the first one has not answered.
        const USER_RECOVERY_REISSUE = 1 << 4;
        /// Commands have the form of ioctls.
        const CMD_IOCTL_ENCODE = 1 << 6;
        /// Data by read and write on /dev/ublkcN.
        const USER_COPY = 1 << 7;
        /// Data by reads and writes of other files, with buffers that the kernel registers itself; from Linux 6.16.
        const AUTO_BUF_REG = 1 << 11;
        /// The size of a device can change.
        const UPDATE_SIZE = 1 << 10;
        const _ = !0;
    }
}

impl Features {
    /// What a device of ours is made with: Linux 6.12 has it all.
    pub const NEEDED: Self =
        Self::USER_RECOVERY.union(Self::USER_RECOVERY_REISSUE).union(Self::CMD_IOCTL_ENCODE).union(Self::USER_COPY);
}

/// The state of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It was never started, or has been stopped.
    Dead,
    Live,
    /// Its server is gone; requests wait for another one.
    Quiesced,
    /// Its server is gone; requests fail until there is another one.
    FailIo,
    Other(u16),
}

impl State {
    const fn of(number: u16) -> Self {
        match number {
            0 => State::Dead,
            1 => State::Live,
            2 => State::Quiesced,
            3 => State::FailIo,
            other => State::Other(other),
        }
    }
    const fn number(self) -> u16 {
        match self {
            State::Dead => 0,
            State::Live => 1,
            State::Quiesced => 2,
            State::FailIo => 3,
            State::Other(other) => other,
        }
    }
}

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    pub queues: u16,
    pub depth: u16,
    pub state: State,
    /// Bytes of the largest request.
    pub io_bytes_max: u32,
    pub number: u32,
    /// Process of the server; 0 or -1: none.
    pub pid: i32,
    pub flags: Features,
    /// What the server wrote there when it made the device; the kernel only keeps it.
    pub owner: u64,
}

impl DeviceInfo {
    pub fn encode(&self) -> [u8; DEVICE_INFO_BYTES] {
        let mut bytes = [0; DEVICE_INFO_BYTES];
        put(&mut bytes, 0, self.queues.to_ne_bytes());
        put(&mut bytes, 2, self.depth.to_ne_bytes());
        put(&mut bytes, 4, self.state.number().to_ne_bytes());
        put(&mut bytes, 8, self.io_bytes_max.to_ne_bytes());
        put(&mut bytes, 12, self.number.to_ne_bytes());
        put(&mut bytes, 16, self.pid.to_ne_bytes());
        put(&mut bytes, 24, self.flags.bits().to_ne_bytes());
        put(&mut bytes, 32, self.owner.to_ne_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; DEVICE_INFO_BYTES]) -> Self {
        Self {
            queues: u16::from_ne_bytes(at(bytes, 0)),
            depth: u16::from_ne_bytes(at(bytes, 2)),
            state: State::of(u16::from_ne_bytes(at(bytes, 4))),
            io_bytes_max: u32::from_ne_bytes(at(bytes, 8)),
            number: u32::from_ne_bytes(at(bytes, 12)),
            pid: i32::from_ne_bytes(at(bytes, 16)),
            flags: Features::from_bits_retain(u64::from_ne_bytes(at(bytes, 24))),
            owner: u64::from_ne_bytes(at(bytes, 32)),
        }
    }
}

bitflags! {
    /// `attrs` of `struct ublk_param_basic`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Attributes: u32 {
        const READ_ONLY = 1 << 0;
        const ROTATIONAL = 1 << 1;
        /// Has a cache: the kernel sends FLUSH.
        const VOLATILE_CACHE = 1 << 2;
        const FUA = 1 << 3;
    }
}

/// `struct ublk_params` with its parts `basic` and `discard`. Sizes are exponents of two, of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    pub attributes: Attributes,
    pub logical_block_shift: u8,
    pub physical_block_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    /// Sectors of the largest READ or WRITE.
    pub sectors_max: u32,
    /// Sectors of the device.
    pub sectors: u64,
    /// In bytes; not 0.
    pub discard_granularity: u32,
    /// 0: no discards.
    pub discard_sectors_max: u32,
    /// 0: the kernel writes zeroes itself.
    pub write_zeroes_sectors_max: u32,
}

const TYPES_BASIC_AND_DISCARD: u32 = 1 | 2;

impl Parameters {
    pub fn encode(&self) -> [u8; PARAMETERS_BYTES] {
        let mut bytes = [0; PARAMETERS_BYTES];
        put(&mut bytes, 0, (PARAMETERS_BYTES as u32).to_ne_bytes());
        put(&mut bytes, 4, TYPES_BASIC_AND_DISCARD.to_ne_bytes());
        put(&mut bytes, 8, self.attributes.bits().to_ne_bytes());
        let shifts = [self.logical_block_shift, self.physical_block_shift, self.io_opt_shift, self.io_min_shift];
        put(&mut bytes, 12, shifts);
        put(&mut bytes, 16, self.sectors_max.to_ne_bytes());
        // 20: chunk_sectors, where the kernel would cut requests: shards cut them themselves.
        put(&mut bytes, 24, self.sectors.to_ne_bytes());
        // 32: virt_boundary_mask.
        // 40: discard_alignment.
        put(&mut bytes, 44, self.discard_granularity.to_ne_bytes());
        put(&mut bytes, 48, self.discard_sectors_max.to_ne_bytes());
        put(&mut bytes, 52, self.write_zeroes_sectors_max.to_ne_bytes());
        let segments_max = u16::from(self.discard_sectors_max > 0);
        put(&mut bytes, 56, segments_max.to_ne_bytes());
        bytes
    }

    /// What GET_PARAMS asks for: so many bytes.
    pub fn question() -> [u8; PARAMETERS_BYTES] {
        let mut bytes = [0; PARAMETERS_BYTES];
        put(&mut bytes, 0, (PARAMETERS_BYTES as u32).to_ne_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; PARAMETERS_BYTES]) -> Self {
        let [logical_block_shift, physical_block_shift, io_opt_shift, io_min_shift] = at(bytes, 12);
        Self {
            attributes: Attributes::from_bits_truncate(u32::from_ne_bytes(at(bytes, 8))),
            logical_block_shift,
            physical_block_shift,
            io_opt_shift,
            io_min_shift,
            sectors_max: u32::from_ne_bytes(at(bytes, 16)),
            sectors: u64::from_ne_bytes(at(bytes, 24)),
            discard_granularity: u32::from_ne_bytes(at(bytes, 44)),
            discard_sectors_max: u32::from_ne_bytes(at(bytes, 48)),
            write_zeroes_sectors_max: u32::from_ne_bytes(at(bytes, 52)),
        }
    }
}

/// A command to /dev/ublkcN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// Wait for the first request of a tag.
    Fetch,
    /// Answer a tag's request and wait for the next one.
    CommitAndFetch,
}

impl Io {
    /// What goes into `cmd_op` of the SQE.
    pub const fn opcode(self) -> u32 {
        let number = match self {
            Io::Fetch => 0x20,
            Io::CommitAndFetch => 0x21,
        };
        ioc(READ_WRITE, number, IO_COMMAND_BYTES)
    }
}

/// The bytes of an I/O command: `result` is that of the request, bytes or a negative errno. (With USER_COPY `addr` is 0.)
pub fn io_command(queue: u16, tag: u16, result: i32) -> [u8; IO_COMMAND_BYTES] {
    let mut bytes = [0; IO_COMMAND_BYTES];
    put(&mut bytes, 0, queue.to_ne_bytes());
    put(&mut bytes, 2, tag.to_ne_bytes());
    put(&mut bytes, 4, result.to_ne_bytes());
    bytes
}

/// A place that no ring has: nothing is registered there.
pub const BUFFER_NONE: u16 = u16::MAX;

/// What goes into `addr` of the SQE of an I/O command, with AUTO_BUF_REG: where the buffer of the next request is to be
/// registered. When that fails the request comes without, and says so ([`Descriptor::NEED_REG_BUF`]).
pub const fn buffer_address(buffer: u16) -> u64 {
    const FALLBACK: u64 = 1;
    buffer as u64 | FALLBACK << 16
}

/// `struct ublksrv_io_desc`: a request as the kernel describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// UBLK_IO_OP_*, from 0 to 255.
    pub op: u8,
    /// UBLK_IO_F_*; the low 8 bits are zero.
    pub flags: u32,
    pub sectors: u32,
    pub start_sector: u64,
}

impl Descriptor {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const FLUSH: u8 = 2;
    pub const DISCARD: u8 = 3;
    pub const WRITE_ZEROES: u8 = 5;
    pub const FUA: u32 = 1 << 13;
    pub const NOUNMAP: u32 = 1 << 15;
    /// The buffer of the request could not be registered.
    pub const NEED_REG_BUF: u32 = 1 << 17;

    pub fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let word = u32::from_ne_bytes(at(bytes, 0));
        Self {
            op: (word & 0xff) as u8,
            flags: word & !0xff,
            sectors: u32::from_ne_bytes(at(bytes, 4)),
            start_sector: u64::from_ne_bytes(at(bytes, 8)),
        }
    }
}

/// Where the descriptors of a queue are in the memory of /dev/ublkcN, in bytes; the length is [`descriptors_bytes`].
pub const fn descriptors_offset(queue: u16) -> u64 {
    queue as u64 * (QUEUE_DEPTH_MAX * DESCRIPTOR_BYTES) as u64
}

/// Bytes to be mapped for the descriptors of a queue: whole pages, exactly.
pub const fn descriptors_bytes(depth: u16, page_bytes: usize) -> usize {
    (depth as usize * DESCRIPTOR_BYTES).next_multiple_of(page_bytes)
}

/// Where the data of a tag's request begin in /dev/ublkcN, for pread and pwrite.
pub const fn data_position(queue: u16, tag: u16) -> u64 {
    DATA_POSITION + ((queue as u64) << DATA_QUEUE_SHIFT) + ((tag as u64) << DATA_TAG_SHIFT)
}

fn put<const N: usize>(bytes: &mut [u8], offset: usize, field: [u8; N]) {
    bytes[offset..offset + N].copy_from_slice(&field);
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[offset..offset + N]);
    field
}

#[cfg(test)]
mod tests;
