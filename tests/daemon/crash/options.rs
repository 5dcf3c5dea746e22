//! What may differ between the lives of a daemon, and what it is doing when it is killed.

use super::content::Random;

/// What the daemon is doing when it is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// Starting; the first time of all it formats.
    Start,
    Load,
    Commit,
    Completion,
    Resize,
    Suspend,
    Shutdown,
}

impl Doing {
    pub fn name(self, is_new: bool) -> &'static str {
        match self {
            Self::Start if is_new => "format",
            Self::Start => "start",
            Self::Load => "load",
            Self::Commit => "commit",
            Self::Completion => "completion",
            Self::Resize => "resize",
            Self::Suspend => "suspend",
            Self::Shutdown => "shutdown",
        }
    }
}

/// How the copy goes in one life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hydration {
    On,
    Off,
    Threshold(u64),
    Rate(u64),
}

/// Options that may change between lives.
#[derive(Clone, Copy, Debug)]
pub struct LifeOptions {
    pub shards: u64,
    pub hydration: Hydration,
    pub passdown: bool,
}

impl LifeOptions {
    pub fn random(random: &mut Random) -> Self {
        // Mostly slow: what is hydrated is not as interesting any more.
        let hydration = match random.below(8) {
            0..3 => Hydration::Off,
            3..5 => Hydration::Threshold(random.pick(&[1, 1, 2, 16])),
            5..7 => Hydration::Rate(random.pick(&[256, 1024, 4096]) << 10),
            _ => Hydration::On,
        };
        Self { shards: random.between(1..5), hydration, passdown: random.chance(70) }
    }

    /// As arguments of `hydrant clone`.
    pub fn args(&self) -> String {
        let mut args = format!("--shards {}", self.shards);
        match self.hydration {
            Hydration::On => {}
            Hydration::Off => args += " --no-hydration",
            Hydration::Threshold(regions) => args += &format!(" --hydration-threshold {regions}"),
            Hydration::Rate(bytes) => args += &format!(" --hydration-rate {bytes}"),
        }
        if !self.passdown {
            args += " --no-discard-passdown";
        }
        args
    }

    /// As keys of a `[[clone]]`.
    pub fn keys(&self) -> String {
        let hydration = match self.hydration {
            Hydration::On => String::new(),
            Hydration::Off => "no_hydration = true\n".into(),
            Hydration::Threshold(regions) => format!("hydration_threshold = {regions}\n"),
            Hydration::Rate(bytes) => format!("hydration_rate = {bytes}\n"),
        };
        format!("{hydration}no_discard_passdown = {}\n", !self.passdown)
    }
}
