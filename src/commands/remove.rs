//! `hydrant remove`: ends one clone of a daemon, which goes on with the others.

use super::daemons;
use crate::cli::RemoveArgs;
use crate::error::Result;

/// Returns when nothing of the clone runs any more: its devices are free.
pub fn run(args: &RemoveArgs) -> Result<()> {
    daemons::client_of(&args.name, &args.control).remove(&args.name, args.force)
}
