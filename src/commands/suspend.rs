//! `hydrant suspend` and `hydrant resume`: hold a clone's I/O, as dmsetup does, and let it go on.

use super::daemons::client_of;
use crate::cli::{ResumeArgs, SuspendArgs};
use crate::error::Result;

/// Returns when requests are held and everything is committed.
pub fn suspend(args: &SuspendArgs) -> Result<()> {
    client_of(&args.name, &args.control).suspend(&args.name, args.timeout)
}

/// Returns when requests go on.
pub fn resume(args: &ResumeArgs) -> Result<()> {
    client_of(&args.name, &args.control).resume(&args.name)
}
