//! `hydrant finish`: hands a complete clone over to its destination.

use super::daemons::client_of;
use super::wait;
use crate::cli::FinishArgs;
use crate::error::{ErrorKind, Result};

/// Returns when the device is the destination and the clone is gone.
pub fn run(args: &FinishArgs) -> Result<()> {
    let (client, name) = (client_of(&args.name, &args.control), &args.name);
    if args.wait {
        match wait::until_hydrated(&client, name) {
            // It may have been finished before.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            waited => waited?,
        }
    }
    client.finish(name)
}
