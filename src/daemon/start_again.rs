//! Which failed starts are tried again without being asked, and when. Pure.
//!
//! A daemon that begins at boot may be there before its network, its file server or the backup server. What only a user can
//! mend is not tried again: it would fail the same way until then, and the user says `hydrant create` when it is mended.

use crate::error::ErrorKind;
use std::time::Duration;

/// Between a failed start and the next try; doubles up to [`DELAY_MAX`].
const DELAY_MIN: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(60);

/// A lock is waited for so often, about a minute: that of a daemon that is just ending. Whoever holds one for longer uses the
/// device, and it is not for us to take when they are done.
const IN_USE_TRIES_MAX: u32 = 6;

/// Whether what kept a clone from starting, after so many tries before, may be over without anything being done about the
/// clone. Tries are without `force`: what was allowed to be overwritten once may be somebody's by then.
pub fn passes_by_itself(kind: ErrorKind, tries: u32) -> bool {
    use ErrorKind::*;
    match kind {
        // A server, a mount, a device or an export that is not there yet.
        SourceLost | NotFound | Io | NoSpace | Limit | Environment | Protocol | Shutdown => true,
        InUse => tries < IN_USE_TRIES_MAX,
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
    fn what_a_user_has_to_mend_is_not_tried_again() {
        for kind in [ErrorKind::SourceLost, ErrorKind::NotFound, ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Protocol]
        {
            assert!(passes_by_itself(kind, 0) && passes_by_itself(kind, u32::MAX), "{kind:?}");
        }
        for kind in [
            ErrorKind::ForeignData,
            ErrorKind::Mismatch,
            ErrorKind::Damaged,
            ErrorKind::SourceChanged,
            ErrorKind::TooSmall,
            ErrorKind::WrongType,
            ErrorKind::PermissionDenied,
            ErrorKind::Usage,
        ] {
            assert!(!passes_by_itself(kind, 0), "{kind:?}");
        }
        let waited: Duration =
            (0..20).take_while(|tries| passes_by_itself(ErrorKind::InUse, *tries)).map(start_delay).sum();
        assert_eq!(waited.as_secs(), 63);
    }

    #[test]
    fn delays_double_up_to_a_minute() {
        let seconds: Vec<_> = [0, 1, 2, 5, 6, 7, 40, u32::MAX].map(|tries| start_delay(tries).as_secs()).into();
        assert_eq!(seconds, [1, 2, 4, 32, 60, 60, 60, 60]);
    }
}
