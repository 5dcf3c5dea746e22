//! What a clone may hold: for each atom the values that are allowed now, and after a kill.
//!
//! *While it lives* a read shows the last write that was acknowledged before the read was sent, or one that was in flight
//! with it; of writes in flight at once any may win. A trim may change nothing or make zeros.
//!
//! *After a kill* law 2 promises what was acknowledged before an acknowledged flush was sent, or with FUA. A SIGKILL loses
//! no page cache, so more is known, region by region: either the region's bit is there, and then every acknowledged write
//! of it too (the bit only says where to read); or it is not, and then all of it is the source's. The second is only
//! allowed for a region that nothing promised: no write to it was flushed, and no life before had its bit.

use super::content::{ATOM, Content, Value};
use std::collections::HashMap;
use std::ops::Range;

/// A change of some atoms.
struct Change {
    value: Value,
    atoms: Range<u64>,
    /// When it was sent, and when it was acknowledged, by the model's own clock.
    sent: u64,
    acknowledged: Option<u64>,
    /// A trim, which may do nothing.
    maybe: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChangeId(usize);

/// A read that is on its way: what was allowed when it was sent.
pub struct Reading {
    atoms: Range<u64>,
    allowed: Vec<Vec<Value>>,
    sent: u64,
    changes: usize,
}

/// A flush that is on its way: when it was sent.
#[derive(Clone, Copy)]
pub struct Flushing(u64);

pub struct Model {
    pub content: Content,
    pub size: u64,
    pub region: u64,
    now: u64,
    next_write: u32,
    /// Of this life.
    changes: Vec<Change>,
    /// By atom: the value that it has if no change is listed; `None`: one of the listed ones, certainly.
    settled: Vec<Option<Value>>,
    /// By atom: changes that may show, and are not certain to be over.
    listed: HashMap<u64, Vec<usize>>,
    /// By region: its bit must be found after a kill.
    promised: Vec<bool>,
    /// Regions with acknowledged writes that no flush has promised yet, and since when.
    acknowledged: Vec<(u64, u64)>,
    pub bytes_verified: u64,
}

impl Model {
    pub fn new(content: Content, size: u64, region: u64) -> Self {
        Self {
            content,
            size,
            region,
            now: 0,
            next_write: Value::FIRST_WRITE,
            changes: Vec::new(),
            settled: vec![Some(Value::SOURCE); size.div_ceil(ATOM) as usize],
            listed: HashMap::new(),
            promised: vec![false; size.div_ceil(region) as usize],
            acknowledged: Vec::new(),
            bytes_verified: 0,
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn atoms(range: &Range<u64>) -> Range<u64> {
        range.start / ATOM..range.end.div_ceil(ATOM)
    }

    fn regions(&self, atoms: &Range<u64>) -> Range<u64> {
        atoms.start * ATOM / self.region..((atoms.end * ATOM).min(self.size)).div_ceil(self.region)
    }

    /// A write's number, and so its content.
    pub fn next_write(&mut self) -> Value {
        self.next_write += 1;
        Value(self.next_write - 1)
    }

    /// A change is about to be sent. `range`: whole atoms, but for the end of the device.
    pub fn sending(&mut self, range: Range<u64>, value: Value, maybe: bool) -> ChangeId {
        let (atoms, id, sent) = (Self::atoms(&range), self.changes.len(), self.tick());
        for atom in atoms.clone() {
            self.listed.entry(atom).or_default().push(id);
        }
        self.changes.push(Change { value, atoms, sent, acknowledged: None, maybe });
        ChangeId(id)
    }

    /// It succeeded. `fua`: and is promised.
    pub fn done(&mut self, id: ChangeId, fua: bool) {
        let now = self.tick();
        self.changes[id.0].acknowledged = Some(now);
        let Change { sent, ref atoms, maybe, value, .. } = self.changes[id.0];
        let atoms = atoms.clone();
        for atom in atoms.clone() {
            let listed = self.listed.get_mut(&atom).expect("it was listed when it was sent");
            let changes = &self.changes;
            // What was over before this one began is over for good; a trim only replaces trims.
            let is_over = |other: &Change| other.acknowledged.is_some_and(|end| end < sent);
            listed.retain(|other| *other == id.0 || !is_over(&changes[*other]) || (maybe && !changes[*other].maybe));
            if !maybe {
                self.settled[atom as usize] = None;
                if listed.len() == 1 {
                    self.settled[atom as usize] = Some(value);
                    self.listed.remove(&atom);
                }
            }
        }
        if maybe {
            return;
        }
        for region in self.regions(&atoms) {
            match fua {
                true => self.promised[region as usize] = true,
                false if !self.promised[region as usize] => self.acknowledged.push((region, now)),
                false => {}
            }
        }
    }

    pub fn flushing(&mut self) -> Flushing {
        Flushing(self.tick())
    }

    /// The flush succeeded.
    pub fn flushed(&mut self, flush: Flushing) {
        let promised = &mut self.promised;
        self.acknowledged.retain(|(region, since)| {
            let is_later = *since > flush.0;
            promised[*region as usize] |= !is_later;
            is_later
        });
    }

    pub fn reading(&mut self, range: Range<u64>) -> Reading {
        let atoms = Self::atoms(&range);
        let allowed = atoms.clone().map(|atom| self.allowed(atom)).collect();
        Reading { atoms, allowed, sent: self.tick(), changes: self.changes.len() }
    }

    fn allowed(&self, atom: u64) -> Vec<Value> {
        let listed = self.listed.get(&atom).into_iter().flatten().map(|id| self.changes[*id].value);
        self.settled[atom as usize].into_iter().chain(listed).collect()
    }

    fn atom_len(&self, atom: u64) -> usize {
        ATOM.min(self.size - atom * ATOM) as usize
    }

    /// Which of some values the bytes of an atom are.
    fn find(&self, atom: u64, bytes: &[u8], allowed: &[Value]) -> Option<Value> {
        let mut expected = [0; ATOM as usize];
        let expected = &mut expected[..bytes.len()];
        allowed.iter().copied().find(|value| {
            self.content.fill(atom, *value, expected);
            expected == bytes
        })
    }

    fn wrong(&self, what: &str, atom: u64, bytes: &[u8], allowed: &[Value]) -> String {
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        format!(
            "{what}: offset {} (region {}) holds {}; allowed: {}",
            atom * ATOM,
            atom * ATOM / self.region,
            self.content.describe(bytes),
            allowed.join(", or ")
        )
    }

    /// The read has come back.
    pub fn read(&mut self, reading: Reading, bytes: &[u8]) -> Result<(), String> {
        let (since, sent) = (reading.changes, reading.sent);
        let mut rest = bytes;
        for (atom, mut allowed) in reading.atoms.clone().zip(reading.allowed) {
            // The device may have grown since the client connected.
            let (now, later) = rest.split_at(self.atom_len(atom).min(rest.len()));
            rest = later;
            let others = self.changes[since..].iter().filter(|change| change.atoms.contains(&atom));
            let before = allowed.len();
            allowed.extend(others.map(|change| change.value));
            let Some(found) = self.find(atom, now, &allowed) else {
                return Err(self.wrong("a read", atom, now, &allowed));
            };
            // What it was when nothing else was on its way it stays.
            let is_over = |id: &usize| self.changes[*id].acknowledged.is_some_and(|end| end < sent);
            let is_quiet = self.listed.get(&atom).is_some_and(|all| all.iter().all(is_over));
            if is_quiet && allowed.len() == before {
                self.listed.remove(&atom);
                self.settled[atom as usize] = Some(found);
            }
        }
        self.bytes_verified += bytes.len() as u64;
        Ok(())
    }

    /// Everything acknowledged so far is durable: the clone was stopped, or suspended.
    pub fn committed(&mut self) {
        let flush = self.flushing();
        self.flushed(flush);
    }

    /// The clone has another size from now on: what comes is the source's.
    pub fn grow(&mut self, size: u64) {
        assert!(size >= self.size && self.size.is_multiple_of(ATOM));
        self.size = size;
        self.settled.resize(size.div_ceil(ATOM) as usize, Some(Value::SOURCE));
        self.promised.resize(size.div_ceil(self.region) as usize, false);
    }

    /// Nobody uses the clone any more: `has_bit` tells what its metadata say of a region, `read` reads the destination.
    /// Compares everything in the windows with what is allowed; from now on it is what was found.
    pub fn settle(
        &mut self,
        has_bit: impl Fn(u64) -> bool,
        mut read: impl FnMut(u64, &mut [u8]),
    ) -> Result<(), String> {
        for region in 0..self.promised.len() as u64 {
            let bit = has_bit(region);
            if self.promised[region as usize] && !bit {
                let at = region * self.region;
                return Err(format!("region {region}, at {at}, was promised, but its bit is not in the metadata"));
            }
            self.promised[region as usize] = bit;
            let region = region * self.region..((region + 1) * self.region).min(self.size);
            for window in self.content.windows.clone() {
                let range = window.start.max(region.start)..window.end.min(region.end);
                if range.is_empty() {
                    continue;
                }
                if !bit {
                    self.settled[range.start as usize / ATOM as usize..range.end.div_ceil(ATOM) as usize]
                        .fill(Some(Value::SOURCE));
                    continue;
                }
                let mut bytes = vec![0; (range.end - range.start) as usize];
                read(range.start, &mut bytes);
                for (atom, bytes) in (range.start / ATOM..).zip(bytes.chunks(ATOM as usize)) {
                    let allowed = self.allowed(atom);
                    let Some(found) = self.find(atom, bytes, &allowed) else {
                        return Err(self.wrong("the destination of a hydrated region", atom, bytes, &allowed));
                    };
                    self.settled[atom as usize] = Some(found);
                }
                self.bytes_verified += bytes.len() as u64;
            }
        }
        self.listed.clear();
        self.changes.clear();
        self.acknowledged.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: u64 = 4096;

    fn model() -> Model {
        let content = Content { id: 7, windows: std::iter::once(0..8 * REGION).collect(), holes_percent: 0 };
        Model::new(content, 8 * REGION, REGION)
    }

    fn shown(model: &mut Model, value: Value) -> bool {
        let reading = model.reading(0..ATOM);
        shown_to(model, reading, value)
    }

    fn shown_to(model: &mut Model, reading: Reading, value: Value) -> bool {
        let mut bytes = vec![0; ATOM as usize];
        model.content.fill(0, value, &mut bytes);
        model.read(reading, &bytes).is_ok()
    }

    /// Settles with these bits, when region 0 holds `value` and everything else what the source has.
    fn settles(model: &mut Model, bits: &[u64], value: Value) -> bool {
        let content = model.content.clone();
        let read = |offset: u64, out: &mut [u8]| {
            content.fill_range(offset, Value::SOURCE, out);
            if offset == 0 {
                content.fill(0, value, &mut out[..ATOM as usize]);
            }
        };
        model.settle(|region| bits.contains(&region), read).is_ok()
    }

    fn written(model: &mut Model) -> Value {
        let value = model.next_write();
        let id = model.sending(0..ATOM, value, false);
        model.done(id, false);
        value
    }

    #[test]
    fn a_read_shows_the_last_write_or_one_in_flight() {
        let mut model = model();
        let first = written(&mut model);
        assert!(shown(&mut model, first) && !shown(&mut model, Value::SOURCE));
        let early = model.reading(0..ATOM);
        let second = model.next_write();
        let id = model.sending(0..ATOM, second, false);
        assert!(shown(&mut model, first));
        model.done(id, false);
        assert!(!shown(&mut model, first) && shown(&mut model, second));
        assert!(shown_to(&mut model, early, first), "it was sent before the second write ended");
        // Two at once: any of them, and then only that one.
        let (third, fourth) = (model.next_write(), model.next_write());
        let ids = [model.sending(0..ATOM, third, false), model.sending(0..ATOM, fourth, false)];
        ids.iter().for_each(|id| model.done(*id, false));
        assert!(!shown(&mut model, second) && shown(&mut model, third) && !shown(&mut model, fourth));
    }

    #[test]
    fn a_trim_changes_nothing_or_all_and_stays_so() {
        for value in [Value::ZERO, Value::SOURCE] {
            let mut model = model();
            let id = model.sending(0..ATOM, Value::ZERO, true);
            model.done(id, false);
            assert!(shown(&mut model, value));
            let other = if value == Value::ZERO { Value::SOURCE } else { Value::ZERO };
            assert!(!shown(&mut model, other));
        }
    }

    #[test]
    fn a_kill_leaves_a_region_whole_or_the_sources() {
        let mut lost = model();
        let value = written(&mut lost);
        assert!(settles(&mut lost, &[], value), "not flushed: the bit may be lost");
        assert!(shown(&mut lost, Value::SOURCE) && !shown(&mut lost, value));

        let mut kept = model();
        let value = written(&mut kept);
        assert!(settles(&mut kept, &[0], value));
        assert!(shown(&mut kept, value) && !shown(&mut kept, Value::SOURCE));
        assert!(!settles(&mut kept, &[], value), "a bit that was there is gone");

        let mut wrong = model();
        written(&mut wrong);
        assert!(!settles(&mut wrong, &[0], Value::SOURCE), "the bit is there, the data is not");
    }

    #[test]
    fn what_was_flushed_or_fua_is_promised() {
        let mut early = model();
        let flush = early.flushing();
        let value = written(&mut early);
        early.flushed(flush);
        assert!(settles(&mut early, &[], value), "the flush was sent before the write was acknowledged");

        let mut flushed = model();
        let value = written(&mut flushed);
        flushed.committed();
        assert!(!settles(&mut flushed, &[1], value));

        let mut fua = model();
        let value = fua.next_write();
        let id = fua.sending(0..2 * REGION, value, false);
        fua.done(id, true);
        assert!(!settles(&mut fua, &[0], value), "it touches two regions");
    }
}
