//! What to do with a ublk device that is there when a clone starts. Pure.
//!
//! A device of ours has the clone's mark: half of the uuid of its metadata, which the kernel keeps for us. So a clone finds
//! the device that a daemon before it left, whatever its number, and never takes the device of another one.

use super::proto::{DeviceInfo, Features, State};

/// The mark of a clone's device: never 0, which devices of others have.
pub fn mark_of(uuid: &[u8; 16]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *uuid;
    u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1)
}

/// What a device that was found is to this clone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Of somebody else.
    Foreign,
    /// Left by a daemon that ended before it was in use, or after it was stopped: nobody can have it open.
    Remains,
    /// Somebody may have it open: to be gone on with.
    Orphan,
    /// It was made by something that is not like this daemon, and can't be gone on with.
    Unlike,
}

/// Judges a device by what the kernel says of it.
pub fn judge(info: &DeviceInfo, mark: u64) -> Found {
    match info.state {
        _ if info.owner != mark => Found::Foreign,
        State::Dead => Found::Remains,
        _ if !info.flags.contains(Features::NEEDED) => Found::Unlike,
        State::Live | State::Quiesced | State::FailIo | State::Other(_) => Found::Orphan,
    }
}

/// How START_USER_RECOVERY of an orphan went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// Go on: open it.
    Yes,
    /// The kernel has not finished with the daemon before: ask again.
    NotYet,
    Failed,
}

/// Judges the answer: `errno` is 0 or positive, `state` what the device is in after it.
///
/// Linux 6.12 says EINVAL of a device whose daemon ended before it had waited for a first request; the rest works all the same.
pub fn judge_recovery(errno: i32, state: State) -> Taken {
    match (errno, state) {
        (0, _) => Taken::Yes,
        (libc::EBUSY, _) | (libc::EINVAL, State::Live) => Taken::NotYet,
        (libc::EINVAL, State::Quiesced | State::FailIo) => Taken::Yes,
        _ => Taken::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_the_mark_is_taken() {
        let mark = mark_of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9]);
        assert_eq!(mark, 0x0807_0605_0403_0201);
        assert_eq!(mark_of(&[0; 16]), 1);
        let info = |state, owner, flags| DeviceInfo {
            queues: 1,
            depth: 1,
            state,
            io_bytes_max: 4096,
            number: 0,
            pid: 1,
            flags,
            owner,
        };
        let all = Features::all();
        for state in [State::Dead, State::Live, State::Quiesced] {
            assert_eq!(judge(&info(state, 0, all), mark), Found::Foreign);
            assert_eq!(judge(&info(state, mark + 1, all), mark), Found::Foreign);
        }
        assert_eq!(judge(&info(State::Dead, mark, Features::empty()), mark), Found::Remains);
        for state in [State::Live, State::Quiesced, State::FailIo, State::Other(9)] {
            assert_eq!(judge(&info(state, mark, Features::NEEDED), mark), Found::Orphan);
            let flags = Features::NEEDED - Features::USER_COPY;
            assert_eq!(judge(&info(state, mark, flags), mark), Found::Unlike);
        }
    }

    #[test]
    fn recovery_is_asked_for_again_or_not() {
        assert_eq!(judge_recovery(0, State::Quiesced), Taken::Yes);
        assert_eq!(judge_recovery(libc::EBUSY, State::Quiesced), Taken::NotYet);
        assert_eq!(judge_recovery(libc::EBUSY, State::Live), Taken::NotYet);
        assert_eq!(judge_recovery(libc::EINVAL, State::Live), Taken::NotYet);
        assert_eq!(judge_recovery(libc::EINVAL, State::Quiesced), Taken::Yes);
        assert_eq!(judge_recovery(libc::EINVAL, State::Dead), Taken::Failed);
        assert_eq!(judge_recovery(libc::EPERM, State::Quiesced), Taken::Failed);
    }
}
