//! A doorbell: threads ring it, a task of one executor hears it.
//!
//! For what happens rarely. Rings that nobody has heard yet are one ring. (A [`Bell`](super::Bell) wakes a whole shard for
//! its mailbox; a doorbell belongs to whoever hears it.)

use super::Ring;
use super::drive::{eventfd, signal};
use crate::dma_buf::DmaBuf;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The side of those who ring, on any thread.
#[derive(Clone)]
pub struct Doorbell(Arc<OwnedFd>);

/// The side of the task that hears it.
pub struct Hearing(std::rc::Rc<OwnedFd>);

impl Doorbell {
    /// To be called on the executor that hears it.
    pub fn new() -> io::Result<(Self, Hearing)> {
        let event = eventfd()?;
        Ok((Self(Arc::new(event.try_clone()?)), Hearing(std::rc::Rc::new(event))))
    }

    pub fn ring(&self) {
        signal(&self.0);
    }
}

impl Hearing {
    /// Returns when it was rung since the last return; with an error when the executor ends.
    pub async fn heard(&self) -> io::Result<()> {
        loop {
            match Ring::current().read(&self.0, DmaBuf::new(8), u64::MAX).await.0 {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::time::Duration;

    #[test]
    fn is_heard_from_other_threads_and_at_the_end_no_more() {
        glommio::LocalExecutorBuilder::default()
            .io_memory(1 << 20)
            .spawn(|| async {
                let ring = Ring::start().unwrap();
                let (doorbell, hearing) = Doorbell::new().unwrap();
                for pause_ms in [0, 30, 0, 30] {
                    let outside = doorbell.clone();
                    let visitor = std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(pause_ms));
                        outside.ring();
                        outside.ring();
                    });
                    hearing.heard().await.unwrap();
                    visitor.join().unwrap();
                    // The second ring, if it came after the first was heard.
                    doorbell.ring();
                    hearing.heard().await.unwrap();
                }
                let ended = Rc::new(Cell::new(false));
                let end = ended.clone();
                let waiting = glommio::spawn_local(async move {
                    let error = hearing.heard().await.unwrap_err();
                    assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
                    end.set(true);
                });
                ring.sleep(Duration::from_millis(20)).await;
                assert!(!ended.get(), "nobody rang");
                ring.shutdown().await;
                waiting.await;
                assert!(ended.get());
            })
            .unwrap()
            .join()
            .unwrap();
    }
}
