//! Which daemon to ask: by the control sockets in the runtime directory, unless the user says which.
//!
//! A clone NAME is looked for at its own daemon (`hydrant clone`) first, then at the daemon of many (`hydrant serve`).

use crate::bail;
use crate::cli::ControlArgs;
use crate::config::CloneName;
use crate::control::api::Status;
use crate::control::client::{self, Client};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime_dir::RuntimeDir;
use std::path::PathBuf;

/// Whom to ask about the clone `name`.
pub fn client_of(name: &CloneName, control: &ControlArgs) -> Client {
    if let Some(path) = &control.control {
        return Client::new(path);
    }
    let dir = RuntimeDir::of_user();
    let (own, many) = (Client::new(dir.control_socket(name)), Client::new(dir.daemon_control_socket()));
    // Without any daemon the error is to name the clone's own socket.
    if !own.is_there() && many.is_there() { many } else { own }
}

/// The daemon of many clones.
pub fn daemon_of(control: &ControlArgs) -> Client {
    match &control.control {
        Some(path) => Client::new(path),
        None => Client::new(RuntimeDir::of_user().daemon_control_socket()),
    }
}

/// Every daemon that may run here, by what to call it.
fn all(dir: &RuntimeDir) -> Result<Vec<(String, PathBuf)>> {
    let many = dir.daemon_control_socket();
    let many = many.exists().then(|| ("the daemon of many clones".to_owned(), many));
    let own = dir.clones()?.into_iter().map(|(name, path)| (name.to_string(), path));
    Ok(many.into_iter().chain(own).collect())
}

/// The daemon that is meant, or every one that may run here, by what to call it.
pub fn daemons(control: &ControlArgs) -> Result<Vec<(String, Client)>> {
    if let Some(path) = &control.control {
        return Ok(vec![(path.display().to_string(), Client::new(path))]);
    }
    Ok(all(&RuntimeDir::of_user())?.into_iter().map(|(name, path)| (name, Client::new(path))).collect())
}

fn nobody(dir: &RuntimeDir) -> Error {
    let text = format!("no daemon is listening in {}; give NAME or --control", dir.path().display());
    Error::new(ErrorKind::NotFound, text)
}

/// All daemons that run here, at least one.
pub fn running() -> Result<Vec<Client>> {
    let dir = RuntimeDir::of_user();
    let clients = all(&dir)?.into_iter().map(|(_, path)| Client::new(path));
    let running: Vec<_> = clients.filter(Client::is_there).collect();
    if running.is_empty() {
        return Err(nobody(&dir));
    }
    Ok(running)
}

/// The one daemon that runs here.
pub fn only_one() -> Result<Client> {
    let dir = RuntimeDir::of_user();
    let mut running = all(&dir)?;
    running.retain(|(_, path)| Client::new(path).status_of_all().is_ok());
    match running.as_slice() {
        [(_, path)] => Ok(Client::new(path)),
        [] => Err(nobody(&dir)),
        several => {
            let names: Vec<_> = several.iter().map(|(name, _)| name.as_str()).collect();
            bail!(Usage, "several daemons run ({}): say which one is meant, by NAME or --control", names.join(", "))
        }
    }
}

/// The clones that are meant, each with its daemon: that of a name, or all of a daemon, or all that run here.
pub fn find(name: Option<&CloneName>, control: &ControlArgs) -> Result<Vec<(Client, Status)>> {
    let all_of = |client: Client| -> Result<Vec<_>> {
        Ok(client.status_of_all()?.into_iter().map(|status| (client.clone(), status)).collect())
    };
    if let Some(name) = name {
        let client = client_of(name, control);
        let status = client.status(name)?;
        return Ok(vec![(client, status)]);
    }
    if let Some(path) = &control.control {
        return all_of(Client::new(path));
    }
    let dir = RuntimeDir::of_user();
    let (mut found, mut daemons) = (Vec::new(), 0);
    for (name, path) in all(&dir)? {
        let client = Client::new(path);
        match all_of(client.clone()) {
            Ok(clones) => {
                daemons += 1;
                found.extend(clones);
            }
            // Its socket is left over; or it ends just now.
            Err(error) if client::is_gone(&client, &error) => log::info!("{name}: {error}"),
            Err(error) => log::warn!("{name}: {error}"),
        }
    }
    if daemons == 0 {
        return Err(nobody(&dir));
    }
    Ok(found)
}
