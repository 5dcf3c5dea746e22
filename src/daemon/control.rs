//! The daemon as the control interface sees it.

use super::registry::{Daemon, Started};
use crate::bail;
use crate::config::CloneConfig;
use crate::config::spec::CloneSpec;
use crate::control::Controlled;
use crate::control::api::{Message, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::event_log::{CloneEvents, Feed};
use crate::io_frontend::nbd::listen::NbdAddress;
use crate::io_frontend::request::LocalBoxFuture;
use crate::meta::growth::Wanted;
use crate::metrics::collect::collect;
use crate::metrics::schema::MetricsDocument;
use crate::runtime_dir::RuntimeDir;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A handle that is shared with the control server.
pub struct Handle(pub Rc<Daemon>);

impl Handle {
    /// What a clone is made from at run time.
    fn config_of(&self, spec: CloneSpec) -> Result<CloneConfig> {
        if self.0.config.one_clone {
            bail!(NotSupported, "this daemon is for its one clone alone: 'hydrant serve' runs one that takes more");
        }
        let dir = RuntimeDir::of_user();
        let config = spec.into_config(&dir)?;
        if matches!(&config.nbd.address, NbdAddress::Unix(path) if dir.holds(path)) {
            dir.create_for_created()?;
        }
        Ok(config)
    }
}

fn stopping() -> Error {
    Error::new(ErrorKind::Shutdown, "the daemon is stopping")
}

impl Controlled for Handle {
    fn status(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<Vec<Status>>> {
        self.0.last_asked.set(Some(Instant::now()));
        let (daemon, name) = (self.0.clone(), name.map(String::from));
        Box::pin(async move { daemon.status(name.as_deref()).await })
    }

    fn table(&self, name: &str) -> Result<String> {
        self.0.running(name).map(|running| running.table())
    }

    fn metrics(&self, name: Option<&str>) -> LocalBoxFuture<'static, Result<MetricsDocument>> {
        let running = name.map(|name| self.0.running(name)).transpose();
        let (daemon, name) = (self.0.clone(), name.map(str::to_owned));
        Box::pin(async move {
            running?;
            collect(&daemon.context, name.as_deref(), super::frontend_metrics).await
        })
    }

    fn message(&self, name: &str, message: &Message) -> LocalBoxFuture<'static, Result<()>> {
        let (daemon, running, message) = (self.0.clone(), self.0.running(name), *message);
        Box::pin(async move {
            let running = running?;
            if daemon.is_stopping() {
                return Err(stopping());
            }
            running.apply(&daemon.context, message).await
        })
    }

    fn create(&self, spec: CloneSpec) -> LocalBoxFuture<'static, Result<()>> {
        let started = self.config_of(spec).map(|config| self.0.start(config, false));
        let daemon = self.0.clone();
        Box::pin(async move {
            match started?.await? {
                Started::Serving => Ok(()),
                Started::HandedOver(text) => Err(Error::new(ErrorKind::InUse, text)),
                Started::GivenUp if daemon.is_stopping() => Err(stopping()),
                Started::GivenUp => Err(Error::new(ErrorKind::Shutdown, "given up before it was served: removed")),
            }
        })
    }

    fn remove(&self, name: &str, force: bool) -> LocalBoxFuture<'static, Result<()>> {
        let (daemon, name) = (self.0.clone(), name.to_owned());
        Box::pin(async move {
            if daemon.is_stopping() {
                return Err(stopping());
            }
            daemon.remove(&name, force).await
        })
    }

    fn finish(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        let (daemon, name) = (self.0.clone(), name.to_owned());
        Box::pin(async move {
            if daemon.is_stopping() {
                return Err(stopping());
            }
            daemon.finish(&name).await
        })
    }

    fn suspend(&self, name: &str, time_max: Duration) -> LocalBoxFuture<'static, Result<()>> {
        let running = self.0.running(name);
        Box::pin(async move { running?.clone.coordinator.suspend(time_max).await })
    }

    fn resume(&self, name: &str) -> LocalBoxFuture<'static, Result<()>> {
        let running = self.0.running(name);
        Box::pin(async move { running?.clone.coordinator.resume().await })
    }

    fn resize(&self, name: &str, wanted: Wanted) -> LocalBoxFuture<'static, Result<()>> {
        let (daemon, running) = (self.0.clone(), self.0.running(name));
        Box::pin(async move {
            let running = running?;
            if daemon.is_stopping() {
                return Err(stopping());
            }
            running.resize(&daemon.context, wanted).await.map(drop)
        })
    }

    fn feed(&self) -> Rc<Feed> {
        self.0.feed.clone()
    }

    fn events_of(&self, name: &str) -> Result<Arc<CloneEvents>> {
        // Whoever waits for the end of a clone is watching it, too.
        self.0.last_asked.set(Some(Instant::now()));
        self.0.events_of(name)
    }

    fn stop(&self) -> Result<()> {
        self.0.stop.notify();
        Ok(())
    }
}
