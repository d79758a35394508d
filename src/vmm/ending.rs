//! How the life of a guest ends.

use std::fmt;

/// Why a guest stands still though nobody paused it: a page of its memory cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Which page, and why.
    pub what: String,
    /// It cannot go on: KVM has taken what it wanted of the page for an access to a device, and would have it answered.
    pub for_good: bool,
}

/// Why the guest runs no more. What happened first counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It switched itself off.
    PowerOff,
    /// It wants to begin anew.
    Reboot,
    /// Whoever runs it stopped it.
    Stopped,
    /// It failed beyond repair; the text says how.
    Crashed(String),
    /// A page of its memory could not be had; the text says which and why.
    MemoryError(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reboot => f.write_str("the guest reboots"),
            Self::Stopped => f.write_str("the guest was stopped"),
            Self::Crashed(how) => write!(f, "the guest crashed: {how}"),
            Self::MemoryError(what) => write!(f, "memory of the guest cannot be had: {what}"),
        }
    }
}
