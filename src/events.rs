//! What happens to clones: the kinds of events, one event, and which of them are kept. Pure: no clock, no lock.
//!
//! Names and numbers are part of the control interface. `seq` counts the events of a daemon over all clones, `nr` those
//! of one clone; both begin with 1 when the daemon (the clone) starts. What dm-clone itself would raise is a part of
//! them: [`EventKind::is_dm`].

pub mod condition;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// Events kept of one clone; older ones are only counted.
pub const EVENTS_PER_CLONE_MAX: usize = 256;
/// Events kept of all clones together, those that are gone included.
pub const EVENTS_MAX: usize = 4096;
/// Longest text of an event, in bytes; what is longer is cut.
pub const EVENT_TEXT_MAX: usize = 1024;
/// Events in one answer; the rest comes with the next.
pub const EVENTS_PER_PAGE_MAX: usize = 256;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $name:literal),* $(,)?) => {
        /// What kind of thing happened.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum EventKind {
            $($(#[$doc])* #[serde(rename = $name)] $kind,)*
            /// Of a daemon that knows more kinds than this build; the text says what it is.
            #[serde(other, rename = "other")]
            Other,
        }
        impl EventKind {
            /// All that this build raises.
            pub const ALL: &[EventKind] = &[$(EventKind::$kind),*];

            /// The stable name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(EventKind::$kind => $name,)*
                    EventKind::Other => "other",
                }
            }
        }
    };
}

kinds! {
    /// The clone was started: new, or going on with what its metadata hold.
    Created "created",
    /// The clone could not be started.
    StartFailed "start_failed",
    /// The background copy begins, or goes on after it was paused or failed.
    HydrationStarted "hydration_started",
    /// The background copy was switched off by the user.
    HydrationPaused "hydration_paused",
    /// Copies fail: it backs off and tries again.
    HydrationFailed "hydration_failed",
    /// So many copies failed in a row that it has stopped, until the user says otherwise.
    HydrationStopped "hydration_stopped",
    /// No region is left that could not be copied alone: all of them were copied or overwritten.
    BadRegionsHealed "bad_regions_healed",
    /// Everything is hydrated, and that is durable.
    HydrationCompleted "hydration_completed",
    /// A commit has failed: the metadata mode is `ro`.
    ReadOnly "read_only",
    /// The metadata mode is `Fail`: no I/O is permitted.
    Failed "failed",
    /// The source can't be reached.
    SourceLost "source_lost",
    /// It can be reached again.
    SourceFound "source_found",
    /// It came back as another one: nothing more is read from it.
    SourceChanged "source_changed",
    /// A file of the clone was deleted, moved or replaced under the daemon.
    DeviceLost "device_lost",
    /// It is at its path again.
    DeviceFound "device_found",
    /// Its device-mapper device shows the destination now, and the clone is not needed any more.
    HandedOver "handed_over",
    /// I/O is held.
    Suspended "suspended",
    /// I/O goes on.
    Resumed "resumed",
    /// The clone has another size.
    Resized "resized",
    /// The clone was stopped in order; started again it goes on.
    Stopped "stopped",
    /// The clone was taken out of the running daemon.
    Removed "removed",
}

impl EventKind {
    /// Whether dm-clone raises an event for this, so that it counts in dm's event number. It would like to for a
    /// hydration that has stopped (known issue 3 of dm-clone.rst).
    pub const fn is_dm(self) -> bool {
        use EventKind::{Failed, HydrationCompleted, HydrationStopped, ReadOnly};
        matches!(self, HydrationStopped | HydrationCompleted | ReadOnly | Failed)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something that happened to a clone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Among all events of the daemon, from 1.
    pub seq: u64,
    /// Name of the clone.
    pub clone: String,
    /// Among the events of the clone, from 1.
    pub nr: u64,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub time_unix_ms: u64,
    pub kind: EventKind,
    /// One line for people.
    pub text: String,
}

/// What follows an event.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Page {
    pub events: Vec<Event>,
    /// To be asked for next: the last event that this page has looked at.
    pub last: u64,
    /// Events up to `last`, of any clone, that are not kept any more.
    pub lost: u64,
}

/// The newest events.
#[derive(Default, Debug)]
pub struct Kept {
    last: u64,
    events: VecDeque<Event>,
    per_clone: BTreeMap<String, usize>,
}

impl Kept {
    /// The number of the last event ever, 0 before the first.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Gives an event its number and keeps it. When its clone has too many, the oldest of the kind that it has most of
    /// goes: a source that comes and goes does not push out what happened once.
    pub fn push(&mut self, mut event: Event) -> u64 {
        self.last += 1;
        event.seq = self.last;
        truncate(&mut event.text);
        let of_clone = self.per_clone.entry(event.clone.clone()).or_default();
        *of_clone += 1;
        let full = *of_clone > EVENTS_PER_CLONE_MAX;
        let clone = full.then(|| event.clone.clone());
        self.events.push_back(event);
        if let Some(clone) = clone {
            self.forget_one_of(&clone);
        } else if self.events.len() > EVENTS_MAX {
            self.forget(0);
        }
        self.last
    }

    fn forget_one_of(&mut self, clone: &str) {
        let mut kinds: BTreeMap<EventKind, (usize, usize)> = BTreeMap::new();
        for (at, event) in self.events.iter().enumerate().filter(|(_, event)| event.clone == clone) {
            kinds.entry(event.kind).or_insert((0, at)).0 += 1;
        }
        if let Some((_, at)) = kinds.into_values().max_by_key(|(count, _)| *count) {
            self.forget(at);
        }
    }

    fn forget(&mut self, at: usize) {
        let Some(event) = self.events.remove(at) else { return };
        if let Some(left) = self.per_clone.get_mut(&event.clone) {
            *left -= 1;
            if *left == 0 {
                self.per_clone.remove(&event.clone);
            }
        }
    }

    /// Whether there are events of this clone.
    pub fn knows(&self, clone: &str) -> bool {
        self.per_clone.contains_key(clone)
    }

    /// The events after number `after`, of one clone or of all, the oldest first.
    pub fn after(&self, after: u64, clone: Option<&str>) -> Page {
        let mut page = Page { last: self.last.max(after), ..Page::default() };
        let from = self.events.partition_point(|event| event.seq <= after);
        let mut looked_at = 0;
        for event in self.events.range(from..) {
            if clone.is_none_or(|clone| clone == event.clone) {
                if page.events.len() == EVENTS_PER_PAGE_MAX {
                    page.last = page.events.last().map_or(after, |last| last.seq);
                    looked_at = self.events.partition_point(|event| event.seq <= page.last) - from;
                    break;
                }
                page.events.push(event.clone());
            }
            looked_at += 1;
        }
        page.lost = page.last - after - looked_at as u64;
        page
    }
}

fn truncate(text: &mut String) {
    if text.len() > EVENT_TEXT_MAX {
        const END: &str = "...";
        let fits = (0..=EVENT_TEXT_MAX - END.len()).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(fits.unwrap_or(0));
        text.push_str(END);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(clone: &str, kind: EventKind) -> Event {
        Event { seq: 0, clone: clone.into(), nr: 1, time_unix_ms: 7, kind, text: "text".into() }
    }

    #[test]
    fn names_are_pinned() {
        let names: Vec<_> = EventKind::ALL.iter().map(|kind| kind.name()).collect();
        let pinned = "created start_failed hydration_started hydration_paused hydration_failed \
                      hydration_stopped bad_regions_healed hydration_completed read_only failed source_lost source_found \
                      source_changed device_lost device_found handed_over suspended resumed resized stopped removed";
        assert_eq!(names.join(" "), pinned);
        for kind in EventKind::ALL {
            let json = serde_json::to_string(kind).unwrap();
            assert_eq!(json, format!("\"{kind}\""));
            assert_eq!(serde_json::from_str::<EventKind>(&json).unwrap(), *kind);
        }
        assert_eq!(serde_json::from_str::<EventKind>("\"of_tomorrow\"").unwrap(), EventKind::Other);
        let dm: Vec<_> = EventKind::ALL.iter().filter(|kind| kind.is_dm()).map(|kind| kind.name()).collect();
        assert_eq!(dm, ["hydration_stopped", "hydration_completed", "read_only", "failed"], "what dm-clone raises");
    }

    #[test]
    fn the_document_has_them_all() {
        let text = include_str!("../docs/events.md");
        let rows: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | ")).collect();
        let kinds = EventKind::ALL.iter().map(|kind| (kind.name(), kind.is_dm()));
        let documented = rows.iter().map(|(name, rest)| (*name, rest.ends_with("| yes |")));
        assert!(documented.take(EventKind::ALL.len()).eq(kinds), "{rows:?}");
        let bounds = [
            format!("last {EVENTS_PER_CLONE_MAX} events of a clone and {EVENTS_MAX} in all"),
            format!("at most {EVENTS_PER_PAGE_MAX} events are in one answer"),
            format!("told {} times within {}\nseconds", condition::TOLD_MAX, condition::WINDOW.as_secs()),
        ];
        for words in bounds {
            assert!(text.contains(&words), "{words}");
        }
    }

    #[test]
    fn json_of_an_event_is_pinned() {
        let mut kept = Kept::default();
        kept.push(event("vm", EventKind::ReadOnly));
        let json = serde_json::to_string(&kept.after(0, None)).unwrap();
        let pinned = r#"{"events":[{"seq":1,"clone":"vm","nr":1,"time_unix_ms":7,"kind":"read_only","text":"text"}],"last":1,"lost":0}"#;
        assert_eq!(json, pinned);
    }

    #[test]
    fn what_follows_a_number() {
        let mut kept = Kept::default();
        assert_eq!(kept.after(0, None), Page::default());
        for clone in ["a", "b", "a", "b"] {
            kept.push(event(clone, EventKind::Created));
        }
        let seqs = |page: &Page| page.events.iter().map(|event| event.seq).collect::<Vec<_>>();
        let page = kept.after(1, None);
        assert_eq!((seqs(&page), page.last, page.lost), (vec![2, 3, 4], 4, 0));
        let page = kept.after(1, Some("a"));
        assert_eq!((seqs(&page), page.last, page.lost), (vec![3], 4, 0), "others were looked at too");
        assert_eq!(kept.after(4, None), Page { last: 4, ..Page::default() });
        assert_eq!(kept.after(9, None), Page { last: 9, ..Page::default() });
        assert!(kept.knows("a") && !kept.knows("c"));
    }

    #[test]
    fn one_clone_keeps_so_many_and_what_happened_once_the_longest() {
        let mut kept = Kept::default();
        kept.push(event("quiet", EventKind::Created));
        kept.push(event("a", EventKind::Created));
        for round in 0..EVENTS_PER_CLONE_MAX {
            kept.push(event("a", EventKind::SourceLost));
            kept.push(event("a", EventKind::SourceFound));
            assert_eq!(kept.last(), 2 * round as u64 + 4);
        }
        let page = kept.after(0, Some("a"));
        assert_eq!(page.events.len(), EVENTS_PER_CLONE_MAX);
        assert_eq!(page.events[0].kind, EventKind::Created);
        assert_eq!(page.events.last().unwrap().seq, page.last);
        assert!(page.events.is_sorted_by_key(|event| event.seq));
        assert_eq!(page.lost, page.last - 1 - EVENTS_PER_CLONE_MAX as u64);
        assert_eq!(kept.after(0, Some("quiet")).events.len(), 1);
    }

    #[test]
    fn all_clones_keep_so_many_in_pages_that_miss_nothing() {
        let mut kept = Kept::default();
        let clones = 3 * EVENTS_MAX / EVENTS_PER_CLONE_MAX;
        for round in 0..EVENTS_PER_CLONE_MAX {
            for clone in 0..clones {
                let number = kept.push(event(&format!("{clone}"), EventKind::Resized));
                assert_eq!(number as usize, round * clones + clone + 1);
            }
        }
        let (mut at, mut seen, mut lost, mut pages) = (0, 0, 0, 0);
        while at < kept.last() {
            let page = kept.after(at, None);
            assert!(page.events.len() <= EVENTS_PER_PAGE_MAX && page.last > at);
            (at, seen, lost, pages) = (page.last, seen + page.events.len(), lost + page.lost, pages + 1);
        }
        assert_eq!(seen, EVENTS_MAX);
        assert_eq!(seen as u64 + lost, kept.last(), "each is seen or said to be lost");
        assert_eq!(pages, EVENTS_MAX / EVENTS_PER_PAGE_MAX);
        assert!(kept.per_clone.values().sum::<usize>() == EVENTS_MAX);
        // Those of one clone, in pages that skip the others.
        let page = kept.after(0, Some("5"));
        assert_eq!((page.events.len(), page.last), (EVENTS_MAX / clones, kept.last()));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut kept = Kept::default();
        kept.push(Event { text: "ü".repeat(EVENT_TEXT_MAX), ..event("a", EventKind::Failed) });
        let text = &kept.after(0, None).events[0].text;
        assert!(text.len() <= EVENT_TEXT_MAX && text.len() > EVENT_TEXT_MAX - 8 && text.ends_with("ü..."), "{text}");
    }
}
