//! Watches over the files of the clones that run: deleted, moved or replaced under the daemon, or cut off.
//!
//! I/O goes on with what is open, whatever name it has, so nothing fails by itself: what was deleted is there until the
//! daemon ends, and gone then. It is told at once (event, log, status), the clone does not end by itself any more, and
//! an end says what was lost. (Of a source only its path is looked at, as long as it is needed.) What is cut off has lost data: the clone takes no more I/O (destination), or no more
//! changes of its metadata.
//!
//! One look at a time, at all clones, on a thread of its own: a file system that hangs costs one thread, and the watch
//! waits for it.

use super::prepare::beside_clients;
use super::registry::Daemon;
use super::running::RunningClone;
use crate::clone_state::Mode;
use crate::devices::presence::{self, Plight};
use crate::devices::{Device, DeviceId, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::meta::codec::metadata_size_needed;
use crate::shard::pool::ShardContext;
use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Between two looks: so a file that comes and goes is told no oftener than [`crate::events::condition`] allows.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the end of a clone waits for a look.
const LAST_LOOK_MAX: Duration = Duration::from_secs(1);
const LOOKING_POLL: Duration = Duration::from_millis(2);

/// Destination, metadata, source.
const WATCHED: usize = 3;
const SOURCE: usize = 2;

/// What a look has seen of each; `None`: nothing can be said of it now.
type Sight = [Option<Option<Plight>>; WATCHED];

/// What was last seen of a clone's files.
#[derive(Default)]
pub struct Watched {
    plights: RefCell<[Option<Plight>; WATCHED]>,
    /// A look has the devices open.
    looking: Cell<bool>,
}

/// What one look is to see.
struct Look {
    devices: [Device; 2],
    used: [u64; 2],
    source: Option<(PathBuf, DeviceId)>,
}

impl Look {
    fn see(self) -> Sight {
        let [destination, metadata] = &self.devices;
        let see = |device: &Device, used| {
            let seen = presence::look(device, used);
            seen.inspect_err(|error| log::debug!("{}: can't be looked at: {error}", device.label())).ok()
        };
        let source = match &self.source {
            Some((path, id)) => presence::look_at_path(path, id).ok(),
            None => Some(None),
        };
        [see(destination, self.used[0]), see(metadata, self.used[1]), source]
    }
}

impl Daemon {
    /// Looks at the devices of all clones again and again, until the daemon stops.
    pub async fn watch_devices(self: Rc<Self>) {
        while !self.is_stopping() {
            let mut looked: Vec<Rc<RunningClone>> = Vec::new();
            let mut looks = Vec::new();
            for running in self.all_running() {
                // A resize changes what is in use; it looks at its devices itself.
                if running.clone.state.is_stopping() || running.clone.resizing.get() {
                    continue;
                }
                if let Ok(look) = running.look() {
                    running.watched.looking.set(true);
                    looked.push(running);
                    looks.push(look);
                }
            }
            let seen = beside_clients(move || Ok(looks.into_iter().map(Look::see).collect::<Vec<_>>())).await;
            looked.iter().for_each(|running| running.watched.looking.set(false));
            for (running, seen) in looked.iter().zip(seen.unwrap_or_default()) {
                if !running.clone.state.is_stopping() && !running.clone.resizing.get() {
                    running.note(seen);
                }
            }
            drop(looked);
            self.context.env.sleep(LOOK_INTERVAL).await;
        }
    }
}

impl RunningClone {
    fn look(&self) -> Result<Look> {
        let devices = self.clone.devices.borrow();
        let geometry = self.clone.state.geometry();
        Ok(Look {
            devices: [devices[0].try_clone()?, devices[1].try_clone()?],
            used: [geometry.size(), metadata_size_needed(&geometry)],
            source: self.source_place(),
        })
    }

    /// As long as it is needed.
    fn source_place(&self) -> Option<(PathBuf, DeviceId)> {
        self.clone.source_place.borrow().clone().filter(|_| !self.clone.state.is_complete())
    }

    /// Of destination, metadata or source: how errors name it.
    fn label_of(&self, index: usize) -> String {
        match self.clone.devices.borrow().get(index) {
            Some(device) => device.label(),
            None => format!("source {}", self.config.source),
        }
    }

    fn note(&self, seen: Sight) {
        for (index, plight) in seen.into_iter().enumerate() {
            let Some(plight) = plight else { continue };
            if self.watched.plights.borrow()[index] == plight {
                continue;
            }
            self.watched.plights.borrow_mut()[index] = plight.clone();
            let state = &self.clone.state;
            let label = self.label_of(index);
            match plight {
                None if index == SOURCE && self.source_place().is_none() => {}
                None => state.events().raise(EventKind::DeviceFound, format!("{label} is at its path again")),
                Some(Plight::Cut { .. }) => {
                    let mode = if index == 0 { Mode::Failed } else { Mode::ReadOnly };
                    let text = self.words(index).unwrap_or_default();
                    state.degrade(mode, &Error::new(ErrorKind::TooSmall, text));
                }
                Some(_) => {
                    let text = self.words(index).unwrap_or_default();
                    log::error!("clone '{}': {text}", state.name);
                    state.events().record(EventKind::DeviceLost, text);
                }
            }
        }
    }

    /// What is wrong with the files of the clone, or not certain of its source, and what to do about it; a line each.
    pub fn warnings(&self) -> Vec<String> {
        (0..WATCHED).filter_map(|index| self.words(index)).chain(self.source_warning()).collect()
    }

    fn words(&self, index: usize) -> Option<String> {
        let plight = self.watched.plights.borrow()[index].clone()?;
        let (devices, name) = (self.clone.devices.borrow(), &self.clone.state.name);
        let label = self.label_of(index);
        let Some(device) = devices.get(index) else {
            self.source_place()?;
            let there = if plight == (Plight::Moved { replaced: true }) { "another file" } else { "nothing" };
            return Some(format!(
                "{label} was deleted or moved, {there} is at its path: the clone goes on with what it has open; let it \
                 complete, or move it back before it is stopped: without its source it can't go on"
            ));
        };
        Some(match plight {
            Plight::Deleted { .. } => format!(
                "{label} {plight}: what it holds is lost when this daemon ends; to save it: hydrant suspend {name}; cp \
                 --sparse=always /proc/{}/fd/{} NEW-FILE; then start the clone with that (--force: it has another id)",
                std::process::id(),
                device.any_alignment().as_raw_fd()
            ),
            Plight::Moved { .. } => {
                format!(
                    "{label} {plight}: the clone goes on with it; move it back, or give its new path at the next start"
                )
            }
            Plight::Cut { .. } if device.role == Role::Metadata => format!(
                "{label} {plight}: read the clone out (nbdcopy) before it is stopped, by its metadata it can't be started \
                 again"
            ),
            Plight::Cut { .. } => format!("{label} {plight}: what was behind is lost"),
        })
    }

    /// Whether an end of the clone would lose data that are in files without a name: it does not end by itself then.
    pub fn holds_deleted_files(&self) -> bool {
        let complete = self.clone.state.is_complete();
        let plights = self.watched.plights.borrow();
        let is_deleted = |plight: &Option<Plight>| matches!(plight, Some(Plight::Deleted { .. }));
        // Of a complete clone nobody needs the metadata.
        is_deleted(&plights[0]) || (!complete && is_deleted(&plights[1]))
    }

    /// One more look, at the end: the error says what goes with this clone. Nothing has its devices open afterwards, unless
    /// their file system hangs.
    pub async fn look_for_the_last_time(&self, context: &Rc<ShardContext>) -> Result<()> {
        let looked = async {
            while self.watched.looking.get() {
                context.env.sleep(LOOKING_POLL).await;
            }
            if let Ok(look) = self.look()
                && let Ok(seen) = beside_clients(move || Ok(look.see())).await
            {
                self.note(seen);
            }
        };
        futures_lite::future::or(looked, context.env.sleep(LAST_LOOK_MAX)).await;
        if !self.holds_deleted_files() {
            return Ok(());
        }
        let devices = self.clone.devices.borrow();
        let plights = self.watched.plights.borrow();
        let lost = devices.iter().zip(plights.iter()).filter_map(|(device, plight)| match plight {
            Some(plight @ Plight::Deleted { .. }) => Some(format!("{} {plight}", device.label())),
            _ => None,
        });
        let text = format!("{} while the clone ran: what it held is lost", lost.collect::<Vec<_>>().join("; "));
        Err(Error::new(ErrorKind::NotFound, text))
    }
}
