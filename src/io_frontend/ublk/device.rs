//! The life of a ublk device from outside its queues: made or taken over, started, removed. Everything here blocks.

use super::affinity::CpuMask;
use super::control::{self, ControlDevice};
use super::proto::{self, DeviceInfo, Features, State};
use super::shape::Shape;
use super::takeover::{Found, Taken, judge, judge_recovery};
use crate::bail;
use crate::error::{Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Largest device number: the kernel's minors (UBLK_MINORS is 1 << 20).
pub const NUMBER_MAX: u32 = (1 << 20) - 1;
/// Requests of a queue that are in flight at a time.
const QUEUE_DEPTH: u16 = 128;
/// The largest READ or WRITE, in bytes: with a full queue it bounds the memory for payloads, 64 MiB for each shard.
const IO_BYTES_MAX: u32 = 512 << 10;
/// How long the kernel may take to finish with a daemon that is gone. 6.12 was seen to take 30 s.
const GONE_WAIT_MAX: Duration = Duration::from_secs(90);
/// The same, of a daemon whose process is still there: perhaps it is just ending.
const ALIVE_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long the device file may take to appear with its permissions.
const NODE_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long the end of a device that is not in use may take.
const DELETE_WAIT_MAX: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// /dev/ublkbN.
pub fn block_path(number: u32) -> PathBuf {
    format!("/dev/ublkb{number}").into()
}

fn char_path(number: u32) -> PathBuf {
    format!("/dev/ublkc{number}").into()
}

/// What a clone wants.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// `None`: any that is free.
    pub number: Option<u32>,
    /// See [`super::takeover::mark_of`].
    pub mark: u64,
    /// One for each shard; the kernel makes no more than it has CPUs.
    pub queues: u16,
    pub shape: Shape,
}

impl Wanted {
    /// `shape` without its largest request.
    pub fn new(number: Option<u32>, mark: u64, queues: u16, shape: Shape) -> Self {
        Self { number, mark, queues, shape: Shape { io_bytes_max: IO_BYTES_MAX, ..shape } }
    }
}

/// A device that waits for its queues.
#[derive(Debug)]
pub struct Attached {
    pub info: DeviceInfo,
    /// /dev/ublkcN: the only time that it is opened.
    pub file: File,
    /// It was left by a daemon before this one, and may be in use.
    pub taken_over: bool,
    /// The CPUs of each queue.
    pub affinity: Vec<CpuMask>,
}

/// Makes a device, or takes over the one that a daemon before this one left. What cannot be in use is removed.
pub fn attach(wanted: &Wanted) -> Result<Attached> {
    let parameters = wanted.shape.parameters()?;
    let mut control = ControlDevice::open()?;
    if let Some(info) = take_over(&mut control, wanted.mark)? {
        if let Some(number) = wanted.number.filter(|number| *number != info.number) {
            let found = info.number;
            log::warn!("ublk: the device of this clone is {found}, as it may be in use, and not {number}");
        }
        let file = open_queues(info.number, GONE_WAIT_MAX)?;
        let affinity = affinity_of(&mut control, &info);
        return Ok(Attached { info, file, taken_over: true, affinity });
    }
    let flags = Features::NEEDED | control.features()? & Features::AUTO_BUF_REG;
    let made = control.add(&DeviceInfo {
        queues: wanted.queues,
        depth: QUEUE_DEPTH,
        state: State::Dead,
        io_bytes_max: IO_BYTES_MAX,
        number: wanted.number.unwrap_or(proto::NUMBER_ANY),
        pid: 0,
        flags,
        owner: wanted.mark,
    })?;
    let prepared = (|| {
        let lacking = Features::NEEDED - made.flags;
        if !lacking.is_empty() {
            bail!(Environment, "ublk of this kernel does not give {lacking:?}");
        }
        control.set_parameters(made.number, &parameters)?;
        open_queues(made.number, NODE_WAIT_MAX)
    })();
    match prepared {
        Ok(file) => {
            let affinity = affinity_of(&mut control, &made);
            Ok(Attached { info: made, file, taken_over: false, affinity })
        }
        Err(error) => {
            tell(delete_with(&mut control, made.number));
            Err(error)
        }
    }
}

/// Where the kernel does not tell, a queue has no CPU: any shard is as good for it.
fn affinity_of(control: &mut ControlDevice, info: &DeviceInfo) -> Vec<CpuMask> {
    let mask = |queue| {
        control.queue_affinity(info.number, queue).unwrap_or_else(|error| {
            log::debug!("{error}");
            CpuMask::default()
        })
    };
    (0..info.queues).map(mask).collect()
}

/// The device with the mark that may be in use, if there is one.
pub fn orphan(mark: u64) -> Result<Option<PathBuf>> {
    let mut control = ControlDevice::open()?;
    let found = control::numbers().into_iter().find(|number| {
        control.info(*number).is_ok_and(|info| matches!(judge(&info, mark), Found::Orphan | Found::Unlike))
    });
    Ok(found.map(block_path))
}

/// Removes what is left of devices with the mark, which nobody uses any more.
pub fn discard(mark: u64) -> Result<()> {
    let mut control = ControlDevice::open()?;
    for number in control::numbers() {
        let Ok(info) = control.info(number) else { continue };
        if judge(&info, mark) == Found::Foreign {
            continue;
        }
        log::info!("{}: removing it, a daemon before this one left it", block_path(number).display());
        if info.state != State::Dead {
            control.stop(number)?;
        }
        delete_with(&mut control, number)?;
    }
    Ok(())
}

/// Whether there is ublk, with all that is needed.
pub fn check() -> Result<()> {
    ControlDevice::open().map(drop)
}

fn tell(result: Result<()>) {
    if let Err(error) = result {
        log::warn!("{error}");
    }
}

/// Looks for devices with the mark; removes what remains of them, and begins to take over the one that may be in use.
fn take_over(control: &mut ControlDevice, mark: u64) -> Result<Option<DeviceInfo>> {
    let mut taken = None;
    for number in control::numbers() {
        // Gone meanwhile, or of another user.
        let Ok(info) = control.info(number) else { continue };
        match judge(&info, mark) {
            Found::Foreign => {}
            Found::Remains => {
                log::info!("ublk: removing device {number}, which a daemon before this one left");
                delete_with(control, number)?;
            }
            Found::Unlike => {
                bail!(
                    Unsupported,
                    "{}: it is of this clone, but was made by something else",
                    block_path(number).display()
                )
            }
            Found::Orphan if taken.is_some() => {
                log::warn!("ublk: device {number} is of this clone too: it is left alone")
            }
            Found::Orphan => taken = begin_recovery(control, &info)?,
        }
    }
    Ok(taken)
}

/// `None`: it is not there any more.
fn begin_recovery(control: &mut ControlDevice, found: &DeviceInfo) -> Result<Option<DeviceInfo>> {
    let (number, began) = (found.number, Instant::now());
    let path = block_path(number);
    log::info!("{}: taking it over from a daemon before this one", path.display());
    loop {
        let errno = control.start_recovery(number);
        let info = match control.info(number) {
            Ok(info) => info,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match judge_recovery(errno, info.state) {
            Taken::Yes => return Ok(Some(info)),
            Taken::NotYet => {
                let is_alive = info.pid > 0 && std::path::Path::new(&format!("/proc/{}", info.pid)).exists();
                if is_alive && began.elapsed() > ALIVE_WAIT_MAX {
                    bail!(InUse, "{}: it is of this clone, but process {} serves it", path.display(), info.pid);
                }
                if began.elapsed() > GONE_WAIT_MAX {
                    bail!(InUse, "{}: the kernel has not finished with the daemon before this one", path.display());
                }
                std::thread::sleep(PAUSE);
            }
            Taken::Failed => {
                let error = io::Error::from_raw_os_error(errno);
                return Err(Error::from_io(error, format!("{} can't be taken over", path.display())));
            }
        }
    }
}

/// Opens /dev/ublkcN, which only one can have open.
fn open_queues(number: u32, wait_max: Duration) -> Result<File> {
    let (path, began) = (char_path(number), Instant::now());
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            // Not there yet, without its permissions yet, not closed yet.
            Err(error)
                if began.elapsed() < wait_max
                    && matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES | libc::EBUSY)) =>
            {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(Error::from_io(error, path.display().to_string())),
        }
    }
}

/// Makes /dev/ublkbN of an attached device whose queues are served; `sectors` is what it is to have. Returns what it has.
pub fn start(info: &DeviceInfo, taken_over: bool, sectors: u64) -> Result<u64> {
    let mut control = ControlDevice::open()?;
    if !taken_over {
        control.start(info.number)?;
        return Ok(sectors);
    }
    control.end_recovery(info.number)?;
    let has = control.parameters(info.number)?.sectors;
    if has == sectors {
        return Ok(has);
    }
    // The clone has grown since; its size counts.
    match resize_with(&mut control, info.number, sectors) {
        Ok(()) => Ok(sectors),
        Err(error) => {
            log::warn!("{error}");
            Ok(has)
        }
    }
}

/// Removes /dev/ublkbN, also under who has it open; its requests in flight are waited for.
pub fn stop(number: u32) -> Result<()> {
    ControlDevice::open()?.stop(number)
}

/// Removes what is left of a device after [`stop`], when nobody serves its queues any more.
pub fn delete(number: u32) -> Result<()> {
    delete_with(&mut ControlDevice::open()?, number)
}

/// Who had it open when it was stopped keeps it until that ends. Otherwise its number is free when this returns.
fn delete_with(control: &mut ControlDevice, number: u32) -> Result<()> {
    control.delete(number)?;
    let began = Instant::now();
    while began.elapsed() < DELETE_WAIT_MAX && control::numbers().contains(&number) {
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// `NotSupported` where the kernel can't change it.
pub fn resize(number: u32, sectors: u64) -> Result<()> {
    resize_with(&mut ControlDevice::open()?, number, sectors)
}

fn resize_with(control: &mut ControlDevice, number: u32, sectors: u64) -> Result<()> {
    if !control.features()?.contains(Features::UPDATE_SIZE) {
        let path = block_path(number);
        bail!(
            NotSupported,
            "{} keeps its size (Linux 6.16 or later can change it): it has the new one when it is made anew, by a daemon \
             that starts after it was stopped while nobody used it",
            path.display()
        );
    }
    control.update_size(number, sectors)
}
