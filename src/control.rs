//! The control interface: what a running daemon tells about its clones, and how they are steered.
//!
//! HTTP/1.1 with JSON over a unix socket that only its owner may open (mode 0600). [`api`] is what is said (types, pure),
//! [`server`] serves connections on the daemon's executor, [`routes`] is what can be asked there; [`client`] asks,
//! blocking, from the command line; [`http_io`] is what lets `hyper` run on both.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | `{"clones": [Status, ...]}` |
//! | `GET /v1/clones/NAME/status` | [`api::Status`] |
//! | `GET /v1/clones/NAME/table` | `{"table": "0 2048 clone ..."}` |
//! | `GET /v1/version` | [`api::VersionInfo`] |
//! | `POST /v1/clones/NAME/message` with `{"message": "hydration_threshold 16"}` | `{}` |
//! | `GET /v1/events?after=SEQ&clone=NAME&timeout=SECONDS&instance=ID` | [`api::EventPage`] |
//! | `GET /v1/clones/NAME/wait?event=N&timeout=SECONDS` | [`api::Status`] |
//! | `POST /v1/clones` with what a `[[clone]]` of a configuration file has, as JSON; paths are absolute | `{}`, when it is served |
//! | `POST /v1/clones/NAME/remove` with `{"force": false}` | `{}`, when its devices are free |
//! | `POST /v1/clones/NAME/finish` | `{}`, when its `/dev/mapper/NAME` is the destination and the clone is gone; also when it has been finished before |
//! | `POST /v1/clones/NAME/suspend` with `{"timeout": null}` | `{}`, when requests are held and everything is committed; 409 `in_use` while it is being suspended or resized, or when it was resumed meanwhile |
//! | `POST /v1/clones/NAME/resume` | `{}`, when requests go on |
//! | `POST /v1/clones/NAME/resize` with `{"size": null, "zeros": false}` | `{}`, when the clone has the new size |
//! | `GET /v1/metrics` | [`crate::metrics::schema::MetricsDocument`] |
//! | `GET /v1/clones/NAME/metrics` | the same, with this clone only |
//! | `POST /v1/stop` | `{}`; the daemon then drains, commits and exits |
//!
//! The two that wait are long polls: they answer as soon as there is something to tell, at last after their timeout (at
//! most [`api::WAIT_SECONDS_MAX`]), and are then asked again. All their parameters may be left out. `events` tells
//! what follows event number `after` (0: everything that is kept), of one clone or of all, and does not wait without a
//! `timeout`; numbers count from 1 in each daemon, whose `instance` is in the answer, and a question with another
//! `instance` begins anew. `wait` is `dmsetup wait`: it answers when dm's event number (`event_nr` of the status) is
//! greater than `event`, or the clone is complete.
//!
//! An error is `{"error": {"kind": "not_found", "message": "..."}}` with the fitting HTTP status; kinds are those of
//! [`crate::error::ErrorKind::name`].

pub mod api;
pub mod client;
pub mod feed;
pub mod http_io;
pub mod query;
pub mod routes;
pub mod server;
#[cfg(test)]
mod tests;
mod waiters;

use crate::config::spec::CloneSpec;
use crate::error::Result;
use crate::event_log::{CloneEvents, Feed};
use crate::io_frontend::request::LocalBoxFuture;
use crate::meta::growth::Wanted;
use crate::metrics::schema::MetricsDocument;
use api::{Message, Status};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// What the server steers: the daemon, on the executor that serves the control socket.
pub trait Controlled {
    /// The status of the clone `name`, or of all clones, by name. `NotFound` when there is no such clone.
    fn status(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<Vec<Status>>>;
    /// dm-clone's table line of a clone that runs: what it was started with, whatever messages said since.
    fn table(&self, name: &str) -> Result<String>;
    /// The metrics of the clone `name`, or of all clones. `NotFound` when there is no such clone.
    fn metrics(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<MetricsDocument>>;
    /// Carries a message out on every shard; returns when it is in force. It runs to its end even when the client
    /// that sent it is gone.
    fn message(&self, name: &str, message: &Message) -> LocalBoxFuture<'static, Result<()>>;
    /// The events of all clones, as they are waited for on this executor.
    fn feed(&self) -> Rc<Feed>;
    /// The events of the clone `name`, to wait for one. `NotFound` when there is no such clone.
    fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>>;
    /// Starts a clone; returns when it is served.
    fn create(&self, spec: CloneSpec) -> LocalBoxFuture<'static, Result<()>>;
    /// Ends a clone and forgets it; one that is in use only when `force` says so.
    fn remove(&self, name: &str, force: bool) -> LocalBoxFuture<'static, Result<()>>;
    /// Hands the device-mapper device of a complete clone over to the destination, and ends the clone.
    fn finish(&self, name: &str) -> LocalBoxFuture<'static, Result<()>>;
    /// Suspends a clone, waiting up to `time_max` for what is in flight; or leaves it as it was.
    fn suspend(&self, name: &str, time_max: Duration) -> LocalBoxFuture<'static, Result<()>>;
    /// Lets a suspended clone go on.
    fn resume(&self, name: &str) -> LocalBoxFuture<'static, Result<()>>;
    /// Grows a clone; it may have the wanted size already.
    fn resize(&self, name: &str, wanted: Wanted) -> LocalBoxFuture<'static, Result<()>>;
    /// Asks the daemon to drain, commit and exit; returns at once. Asking again changes nothing.
    fn stop(&self) -> Result<()>;
}
