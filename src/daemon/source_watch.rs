//! Finds out whether the source of a clone is the one it was made from, as long as that could not be seen: some samples of
//! its fingerprint were on bad sectors, or the server that came back let none be read.
//!
//! It looks again and again. Once all samples are known the fingerprint is recorded, if it was not yet; when they are those
//! of another source, nothing more is read from it. Until then `status` has a warning.

use super::activate::SourceCheck;
use super::running::RunningClone;
use crate::error::{Error, ErrorKind, Result};
use crate::shard::pool::ShardContext;
use crate::source::fingerprint::sample;
use crate::source::identity::Verdict;
use crate::source::padded::PaddedSource;
use futures_lite::future::or;
use std::rc::Rc;
use std::time::Duration;

/// The first and the longest pause between two looks.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How soon an end of the clone is noticed.
const END_POLL: Duration = Duration::from_millis(100);

impl RunningClone {
    /// Looks after its source until the clone ends or needs it no more.
    pub fn watch_source(self: &Rc<Self>, context: &Rc<ShardContext>) {
        let (weak, context_) = (Rc::downgrade(self), context.clone());
        context.env.spawn_background(Box::pin(async move {
            let mut pause = PAUSE_MIN;
            let mut slept = Duration::ZERO;
            loop {
                context_.env.sleep(PAUSE_MIN).await;
                let Some(running) = weak.upgrade() else { return };
                let state = &running.clone.state;
                if state.is_stopping() || state.source_refusal().is_some() {
                    return;
                }
                slept += PAUSE_MIN;
                let check = running.clone.source_check.borrow().clone();
                let Some(check) = check.filter(|_| !state.is_complete()) else { continue };
                if check.identity.doubt().is_some() {
                    if slept < pause {
                        continue;
                    }
                    pause = (pause * 2).min(PAUSE_MAX);
                    slept = Duration::ZERO;
                    let ended = async {
                        while !state.is_stopping() && !state.is_complete() {
                            context_.env.sleep(END_POLL).await;
                        }
                    };
                    or(running.look_at_source(&context_, &check), ended).await;
                } else {
                    pause = PAUSE_MIN;
                }
                if let Err(error) = running.record_source(&check).await {
                    log::warn!("clone '{}': its source can't be recorded: {error}", state.name);
                }
            }
        }));
    }

    async fn look_at_source(&self, context: &Rc<ShardContext>, check: &SourceCheck) {
        let state = &self.clone.state;
        let Ok(source) = context.shard.slice(state.id).and_then(|slice| slice.source()) else { return };
        let len = check.identity.size();
        match sample(&*PaddedSource::view(source, len, len)).await {
            Ok(seen) if check.identity.check(&seen.samples) == Verdict::Another => {
                let text = format!(
                    "source {}: now that it can be read, it is not the one the clone was made from; regions copied from it \
                     since the start may be wrong",
                    self.config.source
                );
                let error = Error::new(ErrorKind::SourceChanged, text);
                state.refuse_source(error.clone());
                state.source_changed(&error, context.env.now());
            }
            Ok(_) => {}
            Err(error) => log::debug!("clone '{}': its source can't be looked at: {error}", state.name),
        }
    }

    /// What is known now and was not, once.
    async fn record_source(&self, check: &SourceCheck) -> Result<()> {
        if check.identity.doubt().is_some() || check.recorded.get() {
            return Ok(());
        }
        let Some(fingerprint) = check.identity.fingerprint() else { return Ok(()) };
        check.recorded.set(true);
        self.clone.coordinator.record_source(fingerprint).await?;
        log::info!(
            "clone '{}': source {}: all of its samples can be read, it is known now",
            self.config.name,
            self.config.source
        );
        Ok(())
    }

    /// What is not certain of its source.
    pub(super) fn source_warning(&self) -> Option<String> {
        let (state, source) = (&self.clone.state, &self.config.source);
        let check = self.clone.source_check.borrow().clone()?;
        if state.is_complete() || state.source_refusal().is_some() {
            return None;
        }
        if let Some((read, all)) = check.identity.doubt() {
            return Some(format!(
                "source {source}: {read} of {all} samples of its content could be read: it is not certain that it is the \
                 source of this clone; make sure yourself (it is looked at again and again)"
            ));
        }
        let before = check.copied_before?;
        Some(format!(
            "source {source}: {before} regions were hydrated before it was known what the source is; this one is taken for \
             it: make sure yourself"
        ))
    }
}
