//! A disk: virtio-blk (virtio 1.2, section 5.2) over any [`BlockDevice`].
//!
//! # Rules
//! 1. Requests are taken apart, checked and done by [`crate::vhost_blk::request`], as for guests of other VMMs.
//! 2. Each queue has a thread, which does one request at a time.
//! 3. A request that fails is told to the guest as failed; the log says why, for the first, second, fourth and so on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Broken, Crew, Device, Ring, Work};
use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::vhost_blk::config;
use crate::vhost_blk::request::{Bounds, Request, SERIAL, Status, What};

/// The number of a disk among devices.
const KIND: u32 = 2;
/// Entries of a queue: a request of the most segments that are offered fits in.
const QUEUE: u16 = 256;
/// Bytes that are read or written at a time.
const PIECE: usize = 1 << 20;

/// The device.
#[derive(Debug)]
pub(in crate::vmm) struct Block {
    target: Arc<Target>,
    queues: usize,
}

/// What the threads of a disk share.
#[derive(Debug)]
struct Target {
    device: Arc<dyn BlockDevice>,
    serial: [u8; SERIAL],
    read_only: bool,
    failures: AtomicU64,
}

impl Block {
    /// Makes a disk with so many queues. `serial` is cut to 20 bytes.
    pub(in crate::vmm) fn new(device: Arc<dyn BlockDevice>, read_only: bool, serial: &str, queues: usize) -> Self {
        let mut bytes = [0; SERIAL];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let read_only = read_only || device.read_only();
        let target = Target { device, serial: bytes, read_only, failures: AtomicU64::new(0) };
        Self { target: Arc::new(target), queues }
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
        let flushes = config::flushes(features);
        let one = |queue| {
            let work = Disk { target: Arc::clone(&self.target), flushes, buffer: vec![0; PIECE] };
            (Box::new(work) as Box<dyn Work>, vec![queue])
        };
        Ok((0..self.queues).map(one).collect())
    }
}

/// One queue at work.
struct Disk {
    target: Arc<Target>,
    /// The driver knows of flushes, so writes need none of their own.
    flushes: bool,
    buffer: Vec<u8>,
}

impl Work for Disk {
    fn work(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            while let Some(head) = ring.next()? {
                let written = self.run(ring, head);
                ring.answer(head, written)?;
            }
        }
        Ok(())
    }
}

impl Disk {
    /// Does a request and writes its status; returns how many bytes were written.
    fn run(&mut self, ring: &Ring, head: u16) -> u32 {
        let (memory, target) = (ring.memory(), &*self.target);
        let bounds = Bounds::of(&*target.device, target.read_only);
        let (table, size) = ring.table();
        let request = Request::take(memory, table, size, head, bounds);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let ran = request.run(memory, &*target.device, &target.serial, &mut self.buffer)?;
            if !self.flushes && matches!(request.what, What::Write(_) | What::Discard(_) | What::WriteZeroes(_)) {
                target.device.flush()?;
            }
            Ok(ran)
        }));
        let (status, data) =
            ran.unwrap_or_else(|_| Err(Error::failed("a mistake in this program"))).unwrap_or_else(|e| {
                target.failed(&e);
                (Status::Failed, 0)
            });
        request.answer(memory, status, data)
    }
}

impl Target {
    fn failed(&self, error: &Error) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        if (before + 1).is_power_of_two() {
            tracing::warn!("a request of the guest failed ({} so far): {error}", before + 1);
        }
    }
}
