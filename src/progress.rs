//! How long work tells its caller how far it is, and learns that it should stop.

/// Receives the progress of long work. Units are whatever the work counts: bytes, blocks, snapshots.
pub trait Progress: Sync {
    /// Says how many units there are in all, as soon as that is known.
    fn total(&self, units: u64);
    /// Says that so many more units are done.
    fn advance(&self, done: u64);
    /// Says what is being done now.
    fn message(&self, text: &str);
    /// Says that the instant has been that the work is about: what happens from now on is not in it. The rest may take long.
    fn instant(&self) {}
    /// Tells the work to stop early.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Keeps quiet and never cancels.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn total(&self, _units: u64) {}
    fn advance(&self, _done: u64) {}
    fn message(&self, _text: &str) {}
}
