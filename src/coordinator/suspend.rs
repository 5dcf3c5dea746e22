//! Suspending and resuming a clone, as `dmsetup suspend` and `resume` do, and the orderly begin of its end.
//!
//! To suspend is: hydration begins no new copies; the gates of all shards close, so that clients' requests wait
//! (they are not failed); what is in flight ends; then one commit. Afterwards nothing reaches destination or metadata,
//! and whatever was acknowledged, flushed or not, is durable.
//!
//! It is all or nothing: when what is in flight does not end in time (a source that does not answer), or the commit
//! fails, or somebody resumes the clone meanwhile, the clone goes on as before and the caller gets the reason. A clone whose metadata mode is not `rw` any
//! more has nothing left to commit: it is suspended without a commit, and the log says so.
//!
//! Nothing queues behind a suspend that waits: another suspend or a growth is refused at once. Nor does one of these
//! behind a growth, or an exchange of the destination. Whoever asked for a suspend may be gone; resuming always helps.

use super::Coordinator;
use crate::clone_state::Mode;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::io_frontend::request::LocalBoxFuture;
use crate::local::{join_all, oneshot};
use crate::shard::ShardRequest;
use crate::units::{CloneId, ShardIndex};
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// How long suspending waits for what is in flight, unless it is told otherwise.
pub const SUSPEND_TIME_MAX: Duration = Duration::from_secs(30);
/// How often it looks whether it is to be given up.
const POLL: Duration = Duration::from_millis(2);

/// What may take long, and of which there is only one at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doing {
    Suspending,
    Growing,
    HandingOver,
}

/// Something that is being done, until this is dropped.
pub(super) struct Begun(Rc<Coordinator>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.doing.set(None);
    }
}

impl Coordinator {
    /// Whether it can be suspended or grown now; fails with InUse when either is going on, with Shutdown at its end.
    pub fn check_idle(&self) -> Result<()> {
        if self.state.is_stopping() {
            return Err(self.stopping());
        }
        let doing = match self.doing.get() {
            None => return Ok(()),
            Some(Doing::Suspending) => "being suspended: wait until it is, or resume it, which gives that up",
            Some(Doing::Growing) => "being resized: wait until it is",
            Some(Doing::HandingOver) => "being handed over: wait until it is",
        };
        Err(Error::new(ErrorKind::InUse, format!("clone '{}' is {doing}", self.state.name)))
    }

    pub(super) fn begin(self: &Rc<Self>, what: Doing) -> Result<Begun> {
        self.check_idle()?;
        self.doing.set(Some(what));
        self.given_up.set(false);
        Ok(Begun(self.clone()))
    }

    /// On its way to be suspended, and not there yet.
    pub fn is_suspending(&self) -> bool {
        self.doing.get() == Some(Doing::Suspending) && !self.state.is_suspended()
    }

    /// Suspends the clone within `time_max`; see the head of this file. Succeeds at once when it is suspended. Fails with
    /// Limit when the time is over, with InUse when it is resumed meanwhile, with Shutdown when the clone is stopping, as
    /// the commit fails; then it goes on. Fails with InUse at once while it is being suspended or grown.
    pub async fn suspend(self: &Rc<Self>, time_max: Duration) -> Result<()> {
        let begun = self.begin(Doing::Suspending)?;
        self.in_turn(Some(begun), move |this| async move {
            if this.state.is_suspended() {
                return Ok(());
            }
            this.hold(time_max).await?;
            this.state.set_suspended(true);
            this.state.events().raise(EventKind::Suspended, "suspended");
            Ok(())
        })
        .await
    }

    /// Lets requests and hydration go on; a suspend that is on its way is given up. Waits for a growth of a suspended clone.
    /// Succeeds at once when the clone is neither suspended nor on its way there.
    pub async fn resume(self: &Rc<Self>) -> Result<()> {
        match self.doing.get() {
            Some(Doing::Suspending) => self.given_up.set(true),
            // The growth lets it go on.
            Some(Doing::Growing | Doing::HandingOver) if !self.state.is_suspended() && !self.state.is_stopping() => {
                return Ok(());
            }
            Some(Doing::Growing | Doing::HandingOver) | None => {}
        }
        self.in_turn(None, |this| async move {
            if this.state.is_suspended() {
                this.release().await;
                this.state.events().raise(EventKind::Resumed, "resumed");
            }
            Ok(())
        })
        .await
    }

    /// The clone is going: marks it as stopping, ends what suspends or grows it, and fails the requests that are held.
    /// Clients may still finish what is in flight; draining and the last commit are the caller's next steps.
    pub async fn begin_stop(self: &Rc<Self>) {
        self.state.set_stopping();
        if self.last_turn.borrow().is_some() {
            return;
        }
        let turn = self.turn.acquire(1).await;
        *self.last_turn.borrow_mut() = Some(turn);
        if self.state.is_held() {
            self.on_all_shards(|clone| ShardRequest::Shut { clone }).await.into_iter().for_each(drop);
        }
    }

    /// Runs `work` when nothing else of its kind is going on. It runs to its end even if nobody waits for it: half of
    /// it would leave a clone that holds requests for ever. `begun` ends with it.
    pub(super) async fn in_turn<T, F, Fut>(self: &Rc<Self>, begun: Option<Begun>, work: F) -> Result<T>
    where
        T: 'static,
        F: FnOnce(Rc<Self>) -> Fut + 'static,
        Fut: Future<Output = Result<T>> + 'static,
    {
        let (sender, receiver) = oneshot();
        let this = self.clone();
        self.env.spawn(Box::pin(async move {
            let result = match this.state.is_stopping() {
                true => Err(this.stopping()),
                false => {
                    let _turn = this.turn.acquire(1).await;
                    match this.state.is_stopping() {
                        true => Err(this.stopping()),
                        false => work(this.clone()).await,
                    }
                }
            };
            drop(begun);
            sender.send(result);
        }));
        receiver.await.unwrap_or_else(|| Err(self.stopping()))
    }

    pub(super) fn stopping(&self) -> Error {
        Error::new(ErrorKind::Shutdown, format!("clone '{}' is stopping", self.state.name))
    }

    /// One request to every shard.
    pub(super) async fn on_all_shards(&self, request: impl Fn(CloneId) -> ShardRequest) -> Vec<Result<()>> {
        let calls = (0..self.mesh.shards()).map(|shard| {
            let call = self.mesh.call(ShardIndex(shard), request(self.state.id));
            Box::pin(async move { call.await.map(drop) }) as LocalBoxFuture<'_, Result<()>>
        });
        join_all(calls.collect()).await
    }

    /// Holds requests and hydration, waits until nothing is in flight, commits; or undoes all of it.
    pub(super) async fn hold(&self, time_max: Duration) -> Result<()> {
        self.state.set_held(true);
        let doing = Cell::new("requests in flight did not end");
        let held = async {
            for result in self.on_all_shards(|clone| ShardRequest::Hold { clone }).await {
                result?;
            }
            // Whose requester has gone away.
            while self.state.foreground_in_flight() > 0 {
                self.env.sleep(POLL).await;
            }
            doing.set("copies in flight did not end");
            for result in self.on_all_shards(|clone| ShardRequest::Drain { clone }).await {
                result?;
            }
            if self.state.mode() != Mode::ReadWrite {
                let (name, mode) = (&self.state.name, self.state.mode().word());
                log::warn!("clone '{name}': suspended in metadata mode {mode}: nothing was committed");
                return Ok(());
            }
            doing.set("the commit did not end");
            self.commit().await
        };
        let deadline = self.env.now() + time_max;
        let given_up = async {
            loop {
                self.env.sleep(POLL.min(time_max)).await;
                if self.state.is_stopping() {
                    return Err(self.stopping());
                }
                if self.given_up.get() {
                    return Err(Error::new(ErrorKind::InUse, "given up: it was resumed meanwhile"));
                }
                if self.env.now() >= deadline {
                    let text = format!(
                        "{} within {} seconds (see whether the source answers)",
                        doing.get(),
                        time_max.as_secs_f32()
                    );
                    return Err(Error::new(ErrorKind::Limit, text));
                }
            }
        };
        let result = futures_lite::future::or(held, given_up).await;
        if result.is_err() {
            self.release().await;
        }
        result.map_err(|error| error.within(format!("clone '{}' goes on, it was not suspended", self.state.name)))
    }

    /// Opens the gates and wakes hydration.
    pub(super) async fn release(&self) {
        self.state.set_suspended(false);
        self.state.set_held(false);
        // Fails only when the clone is gone.
        self.on_all_shards(|clone| ShardRequest::Open { clone }).await.into_iter().for_each(drop);
    }
}
