//! How a device calls the guest.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// A queue has answers.
const QUEUE: u32 = 1;
/// The configuration or the state of the device has changed.
const CONFIG: u32 = 2;

/// The interrupt of a device, and the register that says why it came.
#[derive(Debug)]
pub(super) struct Interrupt {
    reasons: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    pub(super) fn new(line: EventFd) -> Self {
        Self { reasons: AtomicU32::new(0), line }
    }

    /// Says that a queue has answers.
    pub(super) fn queue(&self) {
        self.raise(QUEUE);
    }

    /// Says that the configuration or the state has changed.
    pub(super) fn config(&self) {
        self.raise(CONFIG);
    }

    /// Has reasons already, as the one had that this stands for.
    pub(super) fn again(&self, reasons: u32) {
        if reasons != 0 {
            self.raise(reasons);
        }
    }

    fn raise(&self, reason: u32) {
        // Before the line: the guest may look at once.
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            tracing::warn!("the guest missed an interrupt: {error}");
        }
    }

    /// Returns why it came.
    pub(super) fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::SeqCst)
    }

    /// Forgets reasons that the guest has seen.
    pub(super) fn seen(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }
}
