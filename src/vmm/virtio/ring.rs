//! A queue in the hands of the thread that works on it.
//!
//! # Rules
//! 1. [`Ring::next`] gives a request as long as there is one. When it gives none, the guest notifies of the next one.
//! 2. What is wrong with a request is for the device; what is wrong with the ring itself is [`Broken`] and stops the queue.
//! 3. The guest is called only when it wants to be: by the index it gives, or by its flag where there is no index.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::interrupt::Interrupt;
use super::worker::Bells;
use crate::vhost_blk::chain::Chain;
use crate::vhost_blk::service::{Service, Target, Wires};
use crate::vmm::memory::Memory;

/// Why a ring cannot be used any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vmm) struct Broken(pub(in crate::vmm) String);

fn broken(error: impl Display) -> Broken {
    Broken(error.to_string())
}

/// A queue and what it takes to use it.
#[derive(Debug)]
pub(in crate::vmm) struct Ring {
    queue: Queue,
    /// Heads of what was taken and not answered.
    left: Vec<u16>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// No more requests are taken.
    stop: Arc<AtomicBool>,
    /// The guest was asked not to notify.
    quiet: bool,
}

impl Ring {
    pub(super) fn new(
        queue: Queue,
        left: Vec<u16>,
        memory: Memory,
        interrupt: Arc<Interrupt>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self { queue, left, memory, interrupt, stop, quiet: false }
    }

    /// Returns the memory that the requests lie in.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Takes the next request and returns the number of its first descriptor.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub(super) fn next(&mut self) -> Result<Option<u16>, Broken> {
        loop {
            if self.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            let mut chains = self.queue.iter(&self.memory).map_err(broken)?;
            let head = chains.next().map(|chain| chain.head_index());
            match head {
                Some(head) if head >= self.queue.size() => {
                    return Err(Broken(format!("it has no descriptor {head}")));
                }
                Some(head) => {
                    if !self.quiet {
                        self.queue.disable_notification(&self.memory).map_err(broken)?;
                        self.quiet = true;
                    }
                    return Ok(Some(head));
                }
                None => {
                    self.quiet = false;
                    if !self.queue.enable_notification(&self.memory).map_err(broken)? {
                        return Ok(None);
                    }
                    // One came just before.
                }
            }
        }
    }

    /// Gives back the last request that was taken: it is the next one again.
    pub(super) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Reads the buffers of a request; `None`, after a word in the log, for one that is broken.
    pub(super) fn chain(&self, head: u16) -> Option<Chain> {
        let table = GuestAddress(self.queue.desc_table());
        match Chain::read(&self.memory, table, self.queue.size(), head) {
            Ok(chain) => Some(chain),
            Err(broken) => {
                tracing::debug!("the guest sent a broken request: {}", broken.0);
                None
            }
        }
    }

    /// Answers a request: `len` bytes were written to its buffers.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub(super) fn answer(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        self.queue.add_used(&self.memory, head, len).map_err(broken)?;
        let wanted = self.queue.needs_notification(&self.memory).map_err(broken)?;
        // Without an index there is a flag, which the crate leaves to us.
        let flags = || self.memory.read_obj::<u16>(GuestAddress(self.queue.avail_ring()));
        let silent = || flags().is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0);
        if wanted && (self.queue.event_idx_enabled() || !silent()) {
            self.interrupt.queue();
        }
        Ok(())
    }

    /// Has the requests of a disk done, many at a time, until it is told to stop. It is number `number` of those of its thread.
    ///
    /// # Errors
    /// When the ring cannot be used any more.
    pub(super) fn serve(
        &mut self,
        target: &Arc<Target>,
        durable: bool,
        bells: &Bells,
        number: usize,
    ) -> Result<(), Broken> {
        let interrupt = Arc::clone(&self.interrupt);
        let call = || interrupt.queue();
        let (kick, wake, cancel) = (bells.kick(number), bells.wake(), bells.cancel());
        let wires = Wires { kick, stop: &self.stop, wake, cancel, call: &call };
        let mut service = Service::new(&mut self.queue, &self.memory, target, wires);
        service.again.extend(self.left.drain(..));
        let served = service.run(durable);
        self.left = service.again.into();
        served.map_err(Broken)
    }

    /// Ends with the queue, and with the heads of what was taken of it and not answered.
    pub(super) fn into_queue(self) -> (Queue, Vec<u16>) {
        (self.queue, self.left)
    }
}
