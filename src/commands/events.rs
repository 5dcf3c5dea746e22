//! `hydrant events`: what happened to clones, and what happens to them now.

use super::daemons;
use super::output_error;
use crate::bail;
use crate::cli::EventsArgs;
use crate::control::api::{EventPage, WAIT_SECONDS_MAX};
use crate::control::client::{Client, patiently};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Event;
use crate::human::utc;
use std::io::{Write, stderr};
use std::time::Duration;

pub fn run(args: &EventsArgs, out: &mut dyn Write) -> Result<()> {
    let clients = daemons(args)?;
    if !args.follow {
        let mut events = Vec::new();
        for client in &clients {
            events.extend(all_of(client, args)?);
        }
        events.sort_by_key(|event| event.time_unix_ms);
        return events.iter().try_for_each(|event| print(event, args.json, out));
    }
    match clients.as_slice() {
        [client] => follow(client, args, out),
        several => {
            let paths: Vec<_> = several.iter().map(|client| client.path().display().to_string()).collect();
            bail!(Usage, "--follow is for one daemon: say which clone, or --control with one of {}", paths.join(", "))
        }
    }
}

/// Whom to ask, at least one.
fn daemons(args: &EventsArgs) -> Result<Vec<Client>> {
    match (&args.name, &args.control.control) {
        (Some(name), _) => Ok(vec![daemons::client_of(name, &args.control)]),
        (None, Some(path)) => Ok(vec![Client::new(path)]),
        (None, None) => daemons::running(),
    }
}

/// Everything that a daemon has kept.
fn all_of(client: &Client, args: &EventsArgs) -> Result<Vec<Event>> {
    let (mut events, mut at) = (Vec::new(), EventPage::default());
    loop {
        let next = client.events(at.page.last, args.name.as_ref(), &at.instance, Duration::ZERO)?;
        say_lost(&next, args);
        if next.page.last == at.page.last && next.instance == at.instance {
            return Ok(events);
        }
        events.extend(next.page.events.iter().cloned());
        at = next;
    }
}

/// Returns with an error when the daemon ends.
fn follow(client: &Client, args: &EventsArgs, out: &mut dyn Write) -> Result<()> {
    let mut at = EventPage::default();
    loop {
        // The first question does not wait: a daemon that is not there says so in its own words.
        let was_there = !at.instance.is_empty();
        let time_max = Duration::from_secs(if was_there { WAIT_SECONDS_MAX } else { 0 });
        let ask = || client.events(at.page.last, args.name.as_ref(), &at.instance, time_max);
        let next = patiently(ask).map_err(|error| match error.kind() {
            ErrorKind::Shutdown | ErrorKind::NotFound if was_there => {
                Error::new(error.kind(), format!("the daemon at {} ended: {error}", client.path().display()))
            }
            _ => error,
        })?;
        say_lost(&next, args);
        next.page.events.iter().try_for_each(|event| print(event, args.json, out))?;
        out.flush().map_err(output_error)?;
        at = next;
    }
}

/// To standard error: it is no event.
fn say_lost(page: &EventPage, args: &EventsArgs) {
    // Of all clones; who asked for one can count its numbers.
    if page.page.lost > 0 && args.name.is_none() {
        let _ = writeln!(stderr(), "hydrant: {} events before this are not kept any more", page.page.lost);
    }
}

fn print(event: &Event, json: bool, out: &mut dyn Write) -> Result<()> {
    let line = match json {
        true => serde_json::to_string(event)
            .map_err(|error| Error::new(ErrorKind::InvalidRequest, format!("event as JSON: {error}")))?,
        false => line_of(event),
    };
    writeln!(out, "{line}").map_err(output_error)
}

/// For people.
fn line_of(event: &Event) -> String {
    let (time, kind) = (utc(event.time_unix_ms), event.kind);
    // The text is one line whatever a server put into an error.
    let text: String = event.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("{time} {} {kind:<19} {text}", event.clone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventKind;

    #[test]
    fn a_line_per_event() {
        let event = Event {
            seq: 7,
            clone: "vm1".into(),
            nr: 3,
            time_unix_ms: 1_795_372_207_042,
            kind: EventKind::SourceLost,
            text: "source lost: the server says \u{1b}[2J\nBOO".into(),
        };
        let line = "2026-11-22T18:30:07.042Z vm1 source_lost         source lost: the server says  [2J BOO";
        assert_eq!(line_of(&event), line);
        let mut out = Vec::new();
        print(&event, true, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    }
}
