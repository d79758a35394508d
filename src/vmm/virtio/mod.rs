//! The virtio devices of a guest (virtio 1.2), each a page of registers in memory ([`Transport`]).
//!
//! ```text
//!   guest --registers--> Transport --starts, stops--> Worker (a thread) --rings in guest memory--> Work
//!   guest --notifies a queue-------(descriptor)-----> Worker
//!   guest <-interrupt--------------(descriptor)------ Worker
//! ```
//!
//! # Shape
//! A device is one file with two types: a [`Device`], which says what it is (kind, features, queues, configuration), and
//! its [`Work`], which takes requests from [`Ring`]s and answers them, one after the other ([`Steps`]) or many at a time.
//! Registers, queues, notifications, threads, pausing and resetting are the same for all and not theirs.
//!
//! # Rules
//! 1. The guest is hostile. What it writes to registers and rings is checked where it is read; what makes no sense does
//!    nothing, or stops the device until the guest resets it. No device ends the program.
//! 2. A device that is paused has answered all that it took, except what waits on purpose, for room or for a limit: that is
//!    begun again when it works again, and is in its state until then.

mod block;
mod interrupt;
mod net;
mod ring;
mod rng;
mod transport;
mod worker;

use std::os::fd::BorrowedFd;

use crate::error::Result;
pub(super) use block::Block;
pub(super) use net::{Net, open_tap};
pub(super) use ring::{Broken, Ring};
pub(super) use rng::Rng;
pub(super) use transport::{NOTIFY, Transport, TransportState};
use worker::Bells;
pub(super) use worker::Seat;

/// One who works, and the numbers of the queues to work on.
pub(super) type Crew = (Box<dyn Work>, Vec<usize>);

/// What a device is.
pub(super) trait Device: Send + std::fmt::Debug {
    /// Returns its number (virtio 1.2, section 5).
    fn kind(&self) -> u32;

    /// Returns the features it offers, beyond those of the transport.
    fn features(&self) -> u64;

    /// Returns how many entries each of its queues can have.
    fn queues(&self) -> Vec<u16>;

    /// Reads its configuration; beyond its end are zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Makes those who work on the queues, with the queues of each. Each gets a thread.
    ///
    /// # Errors
    /// When it cannot work.
    fn work(&mut self, features: u64) -> Result<Vec<Crew>>;
}

/// What a device does, on a thread of its own.
pub(super) trait Work: Send {
    /// Works until it is told to stop, and has answered all it took then, or keeps it with the ring.
    ///
    /// # Errors
    /// When a ring cannot be used any more.
    fn live(&mut self, rings: &mut [Ring], bells: &Bells) -> Result<(), Broken>;
}

/// Work that is done one request after the other.
pub(super) trait Steps: Send {
    /// Returns what, beside the queues, makes it look for work when it is readable.
    fn also(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does all there is to do, or until [`Ring::next`] has nothing more.
    ///
    /// # Errors
    /// When a ring cannot be used any more.
    fn work(&mut self, rings: &mut [Ring]) -> Result<(), Broken>;
}

impl<S: Steps> Work for S {
    fn live(&mut self, rings: &mut [Ring], bells: &Bells) -> Result<(), Broken> {
        while !bells.stops() {
            self.work(rings)?;
            bells.wait(self.also())?;
        }
        Ok(())
    }
}
