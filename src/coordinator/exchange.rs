//! Exchanging the open file of the destination under a complete clone, while it is used: the device is the same.
//!
//! The clone is held, as for a suspend: nothing is in flight, all is durable. Every shard gets a slice with the new file
//! (as when it grows, by nothing), the old ones end, and with them their file. Then something else is done that needs the
//! old file gone, and the requests that waited go on, whether that succeeded or not.

use super::grow::Stage;
use super::suspend::Doing;
use super::{Coordinator, SUSPEND_TIME_MAX};
use crate::bail;
use crate::disk::Disk;
use crate::error::Result;
use crate::local::join_all;
use crate::shard::ShardRequest;
use crate::units::ShardIndex;
use std::future::Future;
use std::rc::Rc;

/// What the edges have prepared for an exchange.
pub struct ExchangeParts {
    /// The new file, for the coordinator.
    pub destination: Rc<dyn Disk>,
    /// And for the shards.
    pub stage: Stage,
}

impl Coordinator {
    /// Puts another file of the destination in the place of the one there is, then does `then`, before requests go on; its
    /// error is returned. Runs to its end even if nobody waits for it. Refused with InUse while the clone is suspended, being
    /// suspended or grown, or not complete.
    pub async fn exchange_destination<Fut>(
        self: &Rc<Self>,
        parts: ExchangeParts,
        then: impl FnOnce() -> Fut + 'static,
    ) -> Result<()>
    where
        Fut: Future<Output = Result<()>> + 'static,
    {
        let begun = self.begin(Doing::HandingOver)?;
        self.in_turn(Some(begun), move |this| async move {
            this.state.check_mode(true)?;
            let name = &this.state.name;
            if !this.state.is_complete() {
                bail!(InUse, "clone '{name}' is not hydrated completely");
            }
            if this.state.is_suspended() {
                bail!(InUse, "clone '{name}' is suspended: 'hydrant resume {name}' first");
            }
            this.hold(SUSPEND_TIME_MAX).await?;
            let result = async {
                this.exchange_held(parts).await?;
                then().await
            };
            let result = result.await;
            this.release().await;
            result
        })
        .await
    }

    async fn exchange_held(&self, parts: ExchangeParts) -> Result<()> {
        let staged = join_all((0..self.mesh.shards()).map(|shard| (parts.stage)(ShardIndex(shard))).collect()).await;
        if let Err(error) = staged.into_iter().collect::<Result<()>>() {
            let unstaged = self.on_all_shards(|clone| ShardRequest::Unstage { clone }).await;
            unstaged.into_iter().for_each(drop);
            return Err(error);
        }
        self.destination.replace(parts.destination);
        for exchanged in self.on_all_shards(|clone| ShardRequest::Grow { clone }).await {
            // A shard that is lost.
            exchanged.map_err(|error| self.degrade(error))?;
        }
        Ok(())
    }
}
