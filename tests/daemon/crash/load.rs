//! The load: several connections with several requests in flight each, checked against one model.

use super::client::{Connection, Verb};
use super::content::{ATOM, Random};
use super::model::{ChangeId, Flushing, Model, Reading};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// NBD_CMD_FLAG_FUA and NBD_CMD_FLAG_NO_HOLE.
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
/// Lengths of requests, in atoms: as often as they are listed.
const LENGTHS: [u64; 12] = [1, 1, 2, 3, 16, 16, 16, 16, 64, 64, 256, 2048];
/// Half of the requests go to the first so many bytes of a window, so that they overlap.
const HOT: u64 = 192 << 10;

/// What was done, of all rounds together.
#[derive(Default)]
pub struct Counts {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub fua: AtomicU64,
    pub trims: AtomicU64,
    pub zeroes: AtomicU64,
    pub caches: AtomicU64,
    pub flushes: AtomicU64,
}

/// How a load behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    pub connections: u64,
    pub depth: usize,
    /// Percents of what is sent; the rest reads.
    pub writes: u64,
    pub zeroes: u64,
    pub trims: u64,
    pub flushes: u64,
    /// Of the changes.
    pub fua: u64,
    /// A pause after each request.
    pub pause: Duration,
}

impl Habits {
    pub fn random(random: &mut Random) -> Self {
        // Flushes hide what FUA does, and the other way round: often there is only one of them.
        let (flushes, fua) = random.pick(&[(0, 0), (0, 3), (0, 25), (1, 0), (3, 0), (10, 0), (4, 2), (10, 20)]);
        Self {
            connections: random.between(1..4),
            depth: random.between(1..9) as usize,
            writes: random.between(20..70),
            zeroes: random.between(0..12),
            trims: random.between(0..8),
            flushes,
            fua,
            pause: Duration::from_micros(random.pick(&[0, 0, 300, 2000])),
        }
    }
}

enum Sent {
    Read { reading: Reading, len: usize },
    Change { id: ChangeId, fua: bool },
    Flush(Flushing),
    Cache,
}

#[derive(Default)]
struct InFlight {
    requests: HashMap<u64, (Sent, String)>,
    /// The connection is at its end.
    closed: bool,
}

struct Lane {
    in_flight: Mutex<InFlight>,
    changed: Condvar,
}

/// A load on one clone while it runs.
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Flushes and FUA requests that were sent.
    pub promises_sent: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    /// Starts it. `may_fail`: from when it is set on, requests may be answered with errors.
    pub fn start(
        connect: impl Fn() -> Connection,
        model: &Arc<Mutex<Model>>,
        habits: &Habits,
        random: &mut Random,
        counts: &Arc<Counts>,
        may_fail: &Arc<AtomicBool>,
    ) -> Self {
        let (stop, promises_sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for _ in 0..habits.connections {
            let (send, receive) = {
                let connection = connect();
                (connection.other_end(), connection)
            };
            let lane = Arc::new(Lane { in_flight: Mutex::default(), changed: Condvar::new() });
            let sender = Sender {
                connection: send,
                lane: lane.clone(),
                model: model.clone(),
                habits: habits.clone(),
                random: random.fork(),
                stop: stop.clone(),
                counts: counts.clone(),
                promises_sent: promises_sent.clone(),
            };
            threads.push(std::thread::spawn(move || sender.run()));
            let (model, may_fail) = (model.clone(), may_fail.clone());
            threads.push(std::thread::spawn(move || receive_all(receive, &lane, &model, &may_fail)));
        }
        Self { stop, promises_sent, threads }
    }

    /// Sends no more, waits for what is in flight, or for the end of a daemon that was killed.
    pub fn end(self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        let results: Vec<_> = self.threads.into_iter().map(|thread| thread.join().expect("no panic there")).collect();
        results.into_iter().collect()
    }
}

struct Sender {
    connection: Connection,
    lane: Arc<Lane>,
    model: Arc<Mutex<Model>>,
    habits: Habits,
    random: Random,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    promises_sent: Arc<AtomicU64>,
}

impl Sender {
    fn run(mut self) -> Result<(), String> {
        let mut cookie = 0;
        while self.has_room() {
            cookie += 1;
            if !self.send_one(cookie) {
                break;
            }
            if !self.habits.pause.is_zero() {
                std::thread::sleep(self.habits.pause);
            }
        }
        // Whoever receives ends when nothing is left.
        let mut in_flight = self.lane.in_flight.lock().unwrap();
        while !in_flight.closed && !in_flight.requests.is_empty() {
            in_flight = self.lane.changed.wait(in_flight).unwrap();
        }
        self.connection.shut();
        Ok(())
    }

    /// Waits until one more may be sent; false at the end.
    fn has_room(&self) -> bool {
        let mut in_flight = self.lane.in_flight.lock().unwrap();
        while !in_flight.closed && !self.stop.load(Ordering::Relaxed) {
            if in_flight.requests.len() < self.habits.depth {
                return true;
            }
            in_flight = self.lane.changed.wait_timeout(in_flight, Duration::from_millis(20)).unwrap().0;
        }
        false
    }

    fn place(&mut self, windows: &[Range<u64>], region: u64) -> Range<u64> {
        let random = &mut self.random;
        let window = windows[random.below(windows.len() as u64) as usize].clone();
        let window = match random.chance(50) {
            true => window.start..window.end.min(window.start + HOT.max(2 * region)),
            false => window,
        };
        let block = match random.below(10) {
            0..3 => region,
            3..6 => 4096,
            _ => ATOM,
        };
        // Of a region that begins before the window, the part that is in it.
        let start = (random.between(window.clone()) / block * block).max(window.start / ATOM * ATOM);
        let len = match block == region && random.chance(70) {
            true => region.min(1 << 20),
            false => (random.pick(&LENGTHS) * ATOM).max(block.min(4096)),
        };
        start..(start + len).min(window.end)
    }

    /// Sends something; false when the connection is gone.
    fn send_one(&mut self, cookie: u64) -> bool {
        let model = self.model.clone();
        let mut model = model.lock().unwrap();
        let windows: Vec<Range<u64>> = {
            let size = self.connection.size.min(model.size);
            let inside = |window: &Range<u64>| window.start..window.end.min(size);
            model.content.windows.iter().map(inside).filter(|window| !window.is_empty()).collect()
        };
        let range = self.place(&windows, model.region);
        let (offset, len) = (range.start, (range.end - range.start) as u32);
        let what = self.random.below(100);
        let habits = &self.habits;
        let fua = self.random.chance(habits.fua);
        let flags = if fua { FUA } else { 0 };
        let bounds = [habits.writes, habits.zeroes, habits.trims, habits.flushes, 2];
        let mut bound = 0;
        let kind = bounds.iter().position(|percent| {
            bound += percent;
            what < bound
        });
        let count = |counter: &AtomicU64| _ = counter.fetch_add(1, Ordering::Relaxed);
        if (fua && kind.is_some_and(|kind| kind < 3)) || kind == Some(3) {
            count(&self.promises_sent);
        }
        if fua && kind.is_some_and(|kind| kind < 3) {
            count(&self.counts.fua);
        }
        let mut data = Vec::new();
        let (verb, flags, sent) = match kind {
            Some(0) => {
                count(&self.counts.writes);
                let value = model.next_write();
                data = vec![0; len as usize];
                model.content.fill_range(offset, value, &mut data);
                (Verb::WRITE, flags, Sent::Change { id: model.sending(range, value, false), fua })
            }
            Some(1) => {
                count(&self.counts.zeroes);
                let no_hole = if self.random.chance(30) { NO_HOLE } else { 0 };
                let id = model.sending(range, super::content::Value::ZERO, false);
                (Verb::WRITE_ZEROES, flags | no_hole, Sent::Change { id, fua })
            }
            Some(2) => {
                count(&self.counts.trims);
                let id = model.sending(range, super::content::Value::ZERO, true);
                (Verb::TRIM, flags, Sent::Change { id, fua })
            }
            Some(3) => {
                count(&self.counts.flushes);
                (Verb::FLUSH, 0, Sent::Flush(model.flushing()))
            }
            Some(4) => {
                count(&self.counts.caches);
                (Verb::CACHE, 0, Sent::Cache)
            }
            _ => {
                count(&self.counts.reads);
                (Verb::READ, 0, Sent::Read { reading: model.reading(range), len: len as usize })
            }
        };
        drop(model);
        let (offset, len) = if verb == Verb::FLUSH { (0, 0) } else { (offset, len) };
        let text = format!("{verb} {offset}+{len} flags {flags}");
        self.lane.in_flight.lock().unwrap().requests.insert(cookie, (sent, text));
        self.connection.send(verb, flags, cookie, offset, len, &data).is_ok()
    }
}

/// Receives until the connection ends, or the sender has shut it.
fn receive_all(
    mut connection: Connection,
    lane: &Lane,
    model: &Mutex<Model>,
    may_fail: &AtomicBool,
) -> Result<(), String> {
    let result = loop {
        let (cookie, error) = match connection.receive() {
            Ok(head) => head,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::InvalidData) => {
                let waiting: Vec<String> = in_flight(lane).requests.values().map(|(_, text)| text.clone()).collect();
                if waiting.is_empty() && error.kind() == std::io::ErrorKind::WouldBlock {
                    continue;
                }
                break Err(format!("{error}; in flight: {}", waiting.join(", ")));
            }
            Err(_) => break Ok(()),
        };
        let Some((sent, text)) = in_flight(lane).requests.remove(&cookie) else {
            break Err(format!("a reply to nothing, cookie {cookie}"));
        };
        let done = match (sent, error) {
            (_, Some(_)) if may_fail.load(Ordering::Relaxed) => Ok(()),
            (_, Some(error)) => Err(format!("answered with {error}")),
            (Sent::Read { reading, len }, None) => {
                let mut bytes = vec![0; len];
                match connection.receive_data(&mut bytes) {
                    Ok(()) => model.lock().unwrap().read(reading, &bytes),
                    Err(_) => break Ok(()),
                }
            }
            (Sent::Change { id, fua }, None) => {
                model.lock().unwrap().done(id, fua);
                Ok(())
            }
            (Sent::Flush(flushing), None) => {
                model.lock().unwrap().flushed(flushing);
                Ok(())
            }
            (Sent::Cache, None) => Ok(()),
        };
        if let Err(error) = done {
            break Err(format!("{text}: {error}"));
        }
        lane.changed.notify_all();
    };
    in_flight(lane).closed = true;
    lane.changed.notify_all();
    connection.shut();
    result
}

fn in_flight(lane: &Lane) -> MutexGuard<'_, InFlight> {
    lane.in_flight.lock().unwrap()
}
