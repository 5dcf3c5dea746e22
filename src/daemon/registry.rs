//! The clones of a daemon, by name: started together or one by one, removed, and looked up. On shard 0.
//!
//! Every clone lives on its own: one that can't start, or fails, leaves the others alone. A name is taken from the
//! moment its clone is asked for until nothing of it runs any more, so that no two of one name ever meet. How a clone gets
//! to run is in [`start`].

mod start;

pub use start::Started;

use super::listeners::Listeners;
use super::running::RunningClone;
use crate::bail;
use crate::config::{CloneConfig, CloneName, DaemonConfig, OnHydrated};
use crate::control::api::{
    CloneRunState, HydrationStatus, MetadataMode, MetadataStatus, NbdStatus, SourceState, SourceStatus, Status,
};
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::{CloneEvents, Feed};
use crate::events::EventKind;
use crate::hydration_budget::HydrationBudget;
use crate::hydration_share::HydrationRate;
use crate::local::latch::Latch;
use crate::local::{Notify, Raised, join_some};
use crate::shard::Mesh;
use crate::shard::pool::ShardContext;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most clones of one daemon: bounds memory, and what a hostile owner of the control socket can ask for.
pub const CLONES_MAX: usize = 1024;
/// Clones that start, or end, at the same time.
const AT_A_TIME: usize = 16;
/// How often the daemon looks whether clones are done, and samples the rate of hydration.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// Who asked how it goes within this time is watching: `on_hydrated` gives them the time to see the end.
const WATCHER_WINDOW: Duration = Duration::from_secs(2);
/// How long an end waits for requests and copies in flight, say from a source that does not answer.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// Between two looks whether something that goes on has ended.
const BUSY_POLL: Duration = Duration::from_millis(2);

/// A name that was taken for a new clone.
struct Claim {
    /// Nobody asked for it.
    again: bool,
    /// It was that of a clone that could not be started.
    replaced: Option<Failed>,
    events: Arc<CloneEvents>,
    give_up: Rc<Latch>,
}

/// What is known of one name.
enum Entry {
    /// The latch is opened to give the start up, as long as nothing was changed. One that is tried again by itself is
    /// told as failed until it has succeeded: how the last try went.
    Starting(Rc<CloneConfig>, Rc<Latch>, Option<Failed>),
    Running(Rc<RunningClone>),
    Failed(Failed),
    /// It is draining.
    Removing(Rc<RunningClone>),
}

impl Entry {
    fn failed(&self) -> Option<&Failed> {
        match self {
            Self::Failed(failed) | Self::Starting(_, _, Some(failed)) => Some(failed),
            _ => None,
        }
    }
}

/// A clone that could not be started.
#[derive(Clone)]
struct Failed {
    config: Rc<CloneConfig>,
    error: Error,
    /// How often that was tried.
    tries: u32,
    /// When it is tried again; `None` when only a user can mend what is wrong.
    next_try: Option<Duration>,
}

/// A daemon and its clones.
pub struct Daemon {
    pub context: Rc<ShardContext>,
    pub config: DaemonConfig,
    /// The hydration bandwidth that all clones share.
    pub budget: Arc<HydrationBudget>,
    listeners: Listeners,
    entries: RefCell<BTreeMap<CloneName, Entry>>,
    /// The events of all clones.
    pub feed: Rc<Feed>,
    /// Those of each entry.
    events: RefCell<BTreeMap<CloneName, Arc<CloneEvents>>>,
    next_id: Cell<u32>,
    /// Notified when the daemon is to end.
    pub stop: Rc<Notify>,
    /// Opened when it does.
    stopping: Latch,
    /// Starts and removals that are going on.
    busy: Cell<u64>,
    /// When somebody last asked how it goes.
    pub last_asked: Cell<Option<Instant>>,
}

impl Daemon {
    /// `Usage` when a number of the configuration is out of bounds.
    pub fn new(context: Rc<ShardContext>, config: DaemonConfig, stop: Rc<Notify>, feed: Rc<Feed>) -> Result<Rc<Self>> {
        let total = config.hydration_rate.map(HydrationRate::new).transpose()?;
        Ok(Rc::new(Self {
            budget: HydrationBudget::new(total),
            context,
            config,
            listeners: Listeners::default(),
            entries: RefCell::default(),
            feed,
            events: RefCell::default(),
            next_id: Cell::new(0),
            stop,
            stopping: Latch::default(),
            busy: Cell::new(0),
            last_asked: Cell::new(None),
        }))
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.is_open()
    }

    fn set(&self, name: &CloneName, entry: Entry) {
        self.entries.borrow_mut().insert(name.clone(), entry);
    }

    fn set_events(&self, name: &CloneName, events: Arc<CloneEvents>) {
        self.events.borrow_mut().insert(name.clone(), events);
    }

    /// Nothing of a clone runs any more.
    fn forget(&self, name: &CloneName) {
        self.entries.borrow_mut().remove(name);
        self.events.borrow_mut().remove(name);
    }

    /// The events of a clone that starts, runs or ends. `NotFound` when there is none of that name, the reason when it could
    /// not be started.
    pub fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>> {
        let entries = self.entries.borrow();
        let known: Option<CloneName> = name.parse().ok().filter(|name| entries.contains_key(name));
        if known.as_ref().and_then(|name| entries.get(name)).is_some_and(|entry| entry.failed().is_some()) {
            return Err(self.running(name).err().unwrap_or_else(|| self.no_clone_in(name, &entries)));
        }
        let events = known.and_then(|name| self.events.borrow().get(&name).cloned());
        events.ok_or_else(|| self.no_clone_in(name, &entries))
    }

    /// Takes the name. `again`: nobody asked for that.
    fn claim(&self, config: &Rc<CloneConfig>, again: bool) -> Result<Claim> {
        if self.is_stopping() {
            bail!(Shutdown, "the daemon is stopping");
        }
        let mut entries = self.entries.borrow_mut();
        let failed = match entries.get(&config.name) {
            None if entries.len() >= CLONES_MAX => {
                bail!(Limit, "the daemon has {CLONES_MAX} clones, the most it can have")
            }
            None => None,
            Some(Entry::Failed(failed)) => Some(failed.clone()),
            Some(Entry::Removing(_)) => bail!(InUse, "clone '{}' is being removed: try again", config.name),
            Some(_) => bail!(InUse, "there is a clone '{}' already", config.name),
        };
        let give_up = Rc::<Latch>::default();
        let shown = failed.clone().filter(|_| again);
        entries.insert(config.name.clone(), Entry::Starting(config.clone(), give_up.clone(), shown));
        let events = CloneEvents::new(self.feed.log(), config.name.to_string());
        if !again {
            self.set_events(&config.name, events.clone());
        }
        Ok(Claim { again, replaced: failed, events, give_up })
    }

    /// Ends a clone and forgets it; its devices are free then. One that NBD clients use is refused unless `force`.
    pub async fn remove(self: &Rc<Self>, name: &str, force: bool) -> Result<()> {
        if self.config.one_clone {
            self.running(name)?;
            bail!(NotSupported, "this daemon is for clone '{name}' alone: end it with 'hydrant stop {name}'");
        }
        let was_starting = self.give_up(name).await;
        let running = {
            let mut entries = self.entries.borrow_mut();
            let found = name.parse().ok().and_then(|name: CloneName| entries.remove_entry(&name));
            let (name, entry) = match found {
                Some(found) => found,
                // It was starting, and has been given up.
                None if was_starting => return Ok(()),
                None => return Err(self.no_clone_in(name, &entries)),
            };
            match entry {
                Entry::Failed(..) => {
                    self.tell_removed(&name);
                    return Ok(());
                }
                Entry::Running(running) => {
                    entries.insert(name, Entry::Removing(running.clone()));
                    running
                }
                starting @ Entry::Starting(..) => {
                    entries.insert(name.clone(), starting);
                    bail!(InUse, "clone '{name}' is starting again: try again");
                }
                Entry::Removing(running) => {
                    entries.insert(name.clone(), Entry::Removing(running));
                    bail!(InUse, "clone '{name}' is being removed already");
                }
            }
        };
        let _busy = Raised::new(&self.busy);
        let name = running.config.name.clone();
        // Nobody new comes in while it is decided.
        running.exported.set_hidden(&self.context, true).await;
        let connections = running.exported.connections();
        if connections > 0 && !force {
            running.exported.set_hidden(&self.context, false).await;
            self.entries.borrow_mut().insert(name.clone(), Entry::Running(running));
            let clients = match connections {
                1 => "1 connection): an NBD client uses it".into(),
                more => format!("{more} connections): NBD clients use it"),
            };
            bail!(InUse, "clone '{name}' is in use ({clients}; disconnect, or use --force");
        }
        if !force
            && let Some(node) = running.node()
            && let Some(user) = node.used_by_now().await
        {
            running.exported.set_hidden(&self.context, false).await;
            self.entries.borrow_mut().insert(name.clone(), Entry::Running(running));
            let path = node.path();
            bail!(InUse, "clone '{name}' is in use ({} is {user}; end that, or use --force)", path.display());
        }
        let deadline = self.context.env.now() + DRAIN_MAX;
        let ended = running.end(&self.context, &self.listeners, deadline).await;
        self.tell_removed(&name);
        self.forget(&name);
        ended.map_err(|error| error.within(format!("clone '{name}': removed")))
    }

    /// Gives the start of a clone up, as long as it has changed nothing, and waits until it has ended one way or the
    /// other. Returns whether it was starting.
    async fn give_up(&self, name: &str) -> bool {
        let starting = |latch: Option<&Rc<Latch>>| {
            let entries = self.entries.borrow();
            let found = name.parse().ok().and_then(|name: CloneName| entries.get(&name));
            match found {
                Some(Entry::Starting(_, now, _)) if latch.is_none_or(|latch| Rc::ptr_eq(latch, now)) => {
                    Some(now.clone())
                }
                _ => None,
            }
        };
        let Some(latch) = starting(None) else { return false };
        latch.open();
        while starting(Some(&latch)).is_some() {
            self.context.env.sleep(BUSY_POLL).await;
        }
        true
    }

    fn tell_removed(&self, name: &CloneName) {
        let events = self.events.borrow_mut().remove(name);
        if let Some(events) = events {
            events.raise(EventKind::Removed, "removed");
        }
    }

    fn no_clone_in(&self, name: &str, entries: &BTreeMap<CloneName, Entry>) -> Error {
        let known: Vec<_> = entries.keys().map(CloneName::as_str).take(8).collect();
        let text = match (known.as_slice(), entries.len() - known.len()) {
            ([], _) => "the daemon has no clones".into(),
            ([only], 0) => format!("only '{only}'"),
            (known, 0) => format!("there are {}", known.join(", ")),
            (known, more) => format!("there are {} and {more} more", known.join(", ")),
        };
        Error::new(ErrorKind::NotFound, format!("no clone '{}' here, {text}", name.escape_debug()))
    }

    /// A clone that runs. `NotFound` when there is none of that name, the reason when it could not be started.
    pub fn running(&self, name: &str) -> Result<Rc<RunningClone>> {
        let entries = self.entries.borrow();
        match name.parse().ok().and_then(|name: CloneName| entries.get(&name)) {
            None => Err(self.no_clone_in(name, &entries)),
            Some(Entry::Running(running)) => Ok(running.clone()),
            Some(Entry::Starting(_, _, None)) => bail!(InUse, "clone '{name}' is starting: try again"),
            Some(Entry::Removing(_)) => bail!(Shutdown, "clone '{name}' is being removed"),
            Some(Entry::Failed(Failed { error, .. }) | Entry::Starting(_, _, Some(Failed { error, .. }))) => {
                Err(error.clone().within(format!("clone '{name}' does not run, it could not be started")))
            }
        }
    }

    /// All that run now.
    pub fn all_running(&self) -> Vec<Rc<RunningClone>> {
        let entries = self.entries.borrow();
        entries
            .values()
            .filter_map(|entry| if let Entry::Running(r) = entry { Some(r.clone()) } else { None })
            .collect()
    }

    /// The status of one clone, or of all, by name.
    pub async fn status(self: &Rc<Self>, name: Option<&str>) -> Result<Vec<Status>> {
        let names: Vec<CloneName> = match name {
            None => self.entries.borrow().keys().cloned().collect(),
            Some(name) => {
                let entries = self.entries.borrow();
                let known = name.parse().ok().filter(|name| entries.contains_key(name));
                vec![known.ok_or_else(|| self.no_clone_in(name, &entries))?]
            }
        };
        let mut all = Vec::new();
        for name in names {
            // Gone meanwhile: not there.
            if let Some(status) = self.status_of(&name).await? {
                all.push(status);
            }
        }
        Ok(all)
    }

    async fn status_of(&self, name: &CloneName) -> Result<Option<Status>> {
        let (running, run_state) = match self.entries.borrow().get(name) {
            None => return Ok(None),
            Some(Entry::Starting(config, _, None)) => return Ok(Some(self.idle_status(config, None))),
            Some(Entry::Failed(failed) | Entry::Starting(_, _, Some(failed))) => {
                return Ok(Some(self.idle_status(&failed.config, Some(failed))));
            }
            Some(Entry::Running(running)) => (running.clone(), CloneRunState::Running),
            Some(Entry::Removing(running)) => (running.clone(), CloneRunState::Removing),
        };
        match running.status(&self.context).await {
            Ok(status) => Ok(Some(Status { state: run_state, ..status })),
            // Its shards have let go of it while they were asked.
            Err(error) if error.kind() == ErrorKind::Shutdown => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Of a clone that does not run.
    fn idle_status(&self, config: &CloneConfig, failed: Option<&Failed>) -> Status {
        let now = self.context.env.now();
        let state = if failed.is_some() { CloneRunState::Failed } else { CloneRunState::Starting };
        let events = self.events.borrow().get(&config.name).map(|events| events.count()).unwrap_or_default();
        Status {
            name: config.name.to_string(),
            state,
            error: failed.map(|failed| failed.error.to_string()),
            retry_in_seconds: failed
                .and_then(|failed| failed.next_try)
                .map(|at| at.saturating_sub(now).as_millis().div_ceil(1000) as u64),
            event_nr: events.dm,
            events: events.all,
            last_event: events.last.map(|event| event.text),
            region_size: config.region_size.map_or(0, |size| size.bytes()),
            hydration: HydrationStatus { enabled: config.hydration, priority: config.priority, ..Default::default() },
            metadata: MetadataStatus {
                path: config.metadata.display().to_string(),
                mode: MetadataMode::Unopened,
                ..Default::default()
            },
            source: SourceStatus { spec: config.source.clone(), state: SourceState::Unopened, ..Default::default() },
            destination: config.destination.display().to_string(),
            nbd: NbdStatus {
                address: config.nbd.address.to_string(),
                export: config.nbd.export.to_string(),
                connections: 0,
            },
            shards: u32::from(self.context.mesh.shards()),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            ..Default::default()
        }
    }

    /// Whether a clone that could not be started is tried again.
    fn tries_again(&self, name: &CloneName) -> bool {
        let entries = self.entries.borrow();
        entries.get(name).and_then(Entry::failed).is_some_and(|failed| failed.next_try.is_some())
    }

    /// Whether one of those that could not be started waits for the server of its source, and is tried again.
    pub fn awaits_a_source(&self) -> bool {
        let waits = |failed: &Failed| failed.next_try.is_some() && failed.error.kind() == ErrorKind::SourceLost;
        self.entries.borrow().values().filter_map(Entry::failed).any(waits)
    }

    /// Those that could not be started, and why.
    pub fn failures(&self) -> Vec<(CloneName, Error)> {
        let entries = self.entries.borrow();
        entries.iter().filter_map(|(name, entry)| Some((name.clone(), entry.failed()?.error.clone()))).collect()
    }

    /// Samples the rates, and does what clones want when they are hydrated. Until the daemon stops.
    pub async fn watch(self: Rc<Self>) {
        while !self.is_stopping() {
            let now = self.context.env.now();
            for running in self.all_running() {
                let state = &running.clone.state;
                let bytes = state.hydrated() * state.geometry().region_size().bytes();
                running.rate.borrow_mut().sample(now, bytes);
                if !state.is_complete() {
                    // Not any more, when it has grown.
                    running.complete_since.set(None);
                } else if running.complete_since.get().is_none() {
                    running.complete_since.set(Some(Instant::now()));
                }
                if state.is_complete()
                    && running.config.on_hydrated != OnHydrated::Stay
                    && let Some(node) = running.node()
                {
                    node.used_by(&self.context).await;
                }
                if running.config.on_hydrated == OnHydrated::Remove && !self.config.one_clone && self.is_done(&running)
                {
                    log::info!("clone '{}': hydrated, and the last client is gone: removing it", state.name);
                    let (daemon, name) = (self.clone(), state.name.clone());
                    self.context.env.spawn(Box::pin(async move {
                        if let Err(error) = daemon.remove(&name, false).await {
                            // A client came in between, or somebody else removes it.
                            log::debug!("clone '{name}': not removed: {error}");
                        }
                    }));
                }
            }
            if self.has_done_all() {
                self.stop.notify();
                return;
            }
            self.context.env.sleep(WATCH_INTERVAL).await;
        }
    }

    /// Whether a clone is hydrated, nobody uses it, and whoever watches has seen that.
    fn is_done(&self, running: &RunningClone) -> bool {
        let watched = self.last_asked.get().is_some_and(|asked| asked.elapsed() < WATCHER_WINDOW);
        let since = running.complete_since.get();
        let seen = since.is_some_and(|since| !watched || since.elapsed() >= WATCHER_WINDOW);
        // Who has suspended it is not done with it. A block device that nobody has looked at may be in use.
        let node_in_use = running.node().is_some_and(|node| !node.is_idle());
        let is_in_use = running.exported.connections() > 0 || running.clone.state.is_suspended() || node_in_use;
        // Nor who can still save a file that was deleted.
        seen && !is_in_use && !running.holds_deleted_files()
    }

    /// Whether a clone that is done keeps the daemon no longer.
    fn ends_with(&self, running: &RunningClone) -> bool {
        match running.config.on_hydrated {
            OnHydrated::Stay => false,
            OnHydrated::Exit => true,
            OnHydrated::Remove => self.config.one_clone,
        }
    }

    /// Whether every clone has said `exit`, and is done.
    fn has_done_all(&self) -> bool {
        let entries = self.entries.borrow();
        let mut clones = 0;
        for entry in entries.values() {
            match entry {
                entry if entry.failed().is_some() => {}
                Entry::Running(running) if self.ends_with(running) && self.is_done(running) => clones += 1,
                _ => return false,
            }
        }
        if clones > 0 {
            let names: Vec<_> = entries.keys().map(|name| format!("'{name}'")).collect();
            log::info!("clone {}: hydrated, and the last client is gone: ending", names.join(", "));
        }
        clones > 0
    }

    /// The end of the daemon: no new clients or clones, what is in flight is finished, everything is committed. The first
    /// failure is returned, after all clones have ended.
    pub async fn end(self: &Rc<Self>) -> Result<()> {
        self.stopping.open();
        // Who waits for an event of a clone is told at once, however long clients take.
        self.events.borrow().values().for_each(|events| events.set_ending());
        let deadline = self.context.env.now() + DRAIN_MAX;
        // Requests that a suspended clone holds would keep their connections.
        for running in self.all_running() {
            running.begin_end(&self.context).await;
        }
        self.listeners.stop(&self.context, deadline).await;
        // Who has begun to change something finishes; then it is ended like the others.
        while self.busy.get() > 0 {
            self.context.env.sleep(BUSY_POLL).await;
        }
        // What has only just started.
        for running in self.all_running() {
            running.begin_end(&self.context).await;
        }
        let ends = self.all_running().into_iter().map(|running| {
            let daemon = self.clone();
            async move {
                let ended = running.end(&daemon.context, &daemon.listeners, deadline).await;
                let name = &running.config.name;
                daemon.forget(name);
                ended.map_err(|error| error.within(format!("clone '{name}': stopped")))
            }
        });
        join_some(ends, AT_A_TIME).await.into_iter().collect()
    }
}
