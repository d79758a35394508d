//! A disk: virtio-blk (virtio 1.2, section 5.2) over any [`BlockDevice`].
//!
//! # Rules
//! 1. A queue is served as those of guests of other VMMs are ([`crate::vhost_blk::service`]): requests are taken apart, checked,
//!    done many at a time and answered by one thread.
//! 2. There is a queue, and a thread, for each processor of the guest.
//! 3. A request that fails is told to the guest as failed; the log says why, for the first, second, fourth and so on.

use std::sync::Arc;

use super::{Bells, Broken, Crew, Device, Ring, Work};
use crate::budget::Budget;
use crate::disk::BlockDevice;
use crate::error::Result;
use crate::vhost_blk::config;
use crate::vhost_blk::service::Target;

/// The number of a disk among devices.
const KIND: u32 = 2;
/// Entries of a queue: a request of the most segments that are offered fits in.
const QUEUE: u16 = 256;

/// The device.
#[derive(Debug)]
pub(in crate::vmm) struct Block {
    target: Arc<Target>,
    queues: usize,
}

impl Block {
    /// Makes a disk with so many queues. `serial` is cut to 20 bytes.
    pub(in crate::vmm) fn new(device: Arc<dyn BlockDevice>, read_only: bool, serial: &str, queues: usize) -> Self {
        // A machine has a process of its own, and shares with nobody.
        let requests = Budget::new(0).requests;
        Self { target: Arc::new(Target::new(device, read_only, serial, requests)), queues }
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        config::features(self.target.read_only, self.queues) & !config::VHOST_USER_FEATURES
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE; self.queues]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.target.device.size();
        let part = u32::try_from(offset).ok().zip(u32::try_from(data.len()).ok());
        if let Some(bytes) = part.and_then(|(offset, len)| config::space(size, self.queues, offset, len)) {
            data.copy_from_slice(&bytes);
        }
    }

    fn work(&mut self, features: u64) -> Result<Vec<Crew>> {
        let durable = !config::flushes(features);
        let one = |queue| {
            let work = Disk { target: Arc::clone(&self.target), durable };
            (Box::new(work) as Box<dyn Work>, vec![queue])
        };
        Ok((0..self.queues).map(one).collect())
    }
}

/// One queue at work.
struct Disk {
    target: Arc<Target>,
    /// The driver knows of no flushes, so each write has one of its own.
    durable: bool,
}

impl Work for Disk {
    fn live(&mut self, rings: &mut [Ring], bells: &Bells) -> Result<(), Broken> {
        // A disk has a crew for each queue.
        rings
            .iter_mut()
            .enumerate()
            .try_for_each(|(number, ring)| ring.serve(&self.target, self.durable, bells, number))
    }
}
