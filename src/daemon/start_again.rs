//! Which failed starts are tried again without being asked, and when. Pure.
//!
//! A daemon that begins at boot may be there before its network, its file server or the backup server. What only a user can
//! mend is not tried again: it would fail the same way until then, and the user says `hydrant create` when it is mended.

use crate::error::ErrorKind;
use std::time::Duration;

/// Between a failed start and the next try; doubles up to [`DELAY_MAX`].
const DELAY_MIN: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(60);

/// Whether what kept a clone from starting may be over without anything being done about the clone. No start changes
/// anything on disk before all this has been looked at, so a try that fails costs nothing.
pub fn passes_by_itself(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    match kind {
        // A server, a mount, a device or an export that is not there yet, or a lock of something that is just ending.
        SourceLost | NotFound | InUse | Io | NoSpace | Limit | Environment | Protocol | Shutdown => true,
        Usage | Config | InvalidRequest | PermissionDenied | WrongType | TooSmall | ForeignData | Mismatch
        | Damaged | Unsupported | SourceChanged | ReadOnly | Failed | NotSupported => false,
    }
}

/// The delay after so many tries before the last one.
pub fn start_delay(tries: u32) -> Duration {
    DELAY_MIN.saturating_mul(1 << tries.min(16)).min(DELAY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_minute() {
        let seconds: Vec<_> = [0, 1, 2, 5, 6, 7, 40, u32::MAX].map(|tries| start_delay(tries).as_secs()).into();
        assert_eq!(seconds, [1, 2, 4, 32, 60, 60, 60, 60]);
    }
}
