//! The registers of a device in memory (virtio 1.2, section 4.2).
//!
//! # Rules
//! 1. Registers are 32 bits wide and accessed whole; the configuration behind them in any width. Everything else reads as
//!    zeros and writes nothing.
//! 2. Queues are set up between "features are fine" and "driver is ready", and at no other time: while threads work on
//!    them, the guest cannot change what they are.
//! 3. "Driver is ready" starts the threads. Zero in the status stops them, waits for them, and all is as at the beginning.
//! 4. A device that the guest has set up wrongly says that it needs a reset, and does nothing until then.
//! 5. A device can be drained while the guest runs: what it took is finished and it takes nothing more, whatever the guest
//!    does to its registers, until the machine says that it may work again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::Device;
use super::interrupt::Interrupt;
use super::worker::{NEEDS_RESET, Seat, Shared, Worker};
use crate::error::{Error, Result};
use crate::vmm::memory::Memory;
use crate::vmm::nursery::Nursery;

/// What stands in the first register: "virt".
const MAGIC: u32 = 0x7472_6976;
/// Registers that are not from before there was a standard.
const VERSION: u32 = 2;
/// "AFTI".
const VENDOR: u32 = 0x4954_4641;
/// Where a queue is notified, and where the configuration begins.
pub(in crate::vmm) const NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;
/// Bits of the status.
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const STATUS_BITS: u32 = 0x8f;

/// The registers of a device as plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(in crate::vmm) struct TransportState {
    kind: u32,
    status: u32,
    reasons: u32,
    features: u64,
    offered_half: u32,
    chosen_half: u32,
    selected: u32,
    queues: Vec<QueueRow>,
}

/// A queue as plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QueueRow {
    size: u16,
    ready: bool,
    next_available: u16,
    next_used: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Heads of what was taken and not answered, for it waited on purpose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    left: Vec<u16>,
}

/// A device and its registers.
#[derive(Debug)]
pub(in crate::vmm) struct Transport {
    device: Box<dyn Device>,
    name: String,
    shared: Arc<Shared>,
    queues: Vec<Queue>,
    /// Of each queue the heads of what was taken and not answered.
    left: Vec<Vec<u16>>,
    kicks: Vec<Arc<EventFd>>,
    workers: Vec<Worker>,
    /// Features the driver has chosen.
    features: u64,
    /// Which half of the features is meant.
    offered_half: u32,
    chosen_half: u32,
    /// Which queue is meant.
    selected: u32,
    /// Threads are to work when the machine runs.
    ready: bool,
    /// None is to be started now: the device is drained, or is about to be.
    held: bool,
    /// Another one whenever the configuration is; a driver that reads parts of it looks before and after.
    generation: u32,
}

impl Transport {
    /// Makes the registers of a device, which calls the guest through `line` and is notified of its queues, in order,
    /// through `kicks`. Its threads come from `nursery`.
    ///
    /// # Errors
    /// When the device has queues that cannot be.
    pub(in crate::vmm) fn new(
        device: Box<dyn Device>,
        name: String,
        memory: Memory,
        line: EventFd,
        kicks: Vec<EventFd>,
        nursery: Arc<Nursery>,
    ) -> Result<Self> {
        let queues = device.queues().into_iter().map(make).collect::<Result<Vec<_>>>()?;
        assert_eq!(queues.len(), kicks.len(), "each queue has a notification");
        let interrupt = Arc::new(Interrupt::new(line));
        Ok(Self {
            device,
            name,
            shared: Arc::new(Shared {
                memory,
                interrupt,
                status: AtomicU32::new(0),
                stops: AtomicU64::new(0),
                nursery,
            }),
            left: vec![Vec::new(); queues.len()],
            queues,
            kicks: kicks.into_iter().map(Arc::new).collect(),
            workers: Vec::new(),
            features: 0,
            offered_half: 0,
            chosen_half: 0,
            selected: 0,
            ready: false,
            held: false,
            generation: 0,
        })
    }

    /// Reads a register or the configuration.
    pub(in crate::vmm) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            return self.device.read_config(at, data);
        }
        if let Ok(whole) = <&mut [u8; 4]>::try_from(data) {
            *whole = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.selected as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.kind(),
            0x0c => VENDOR,
            0x10 => half(self.offered(), self.offered_half),
            0x34 => queue.map_or(0, |queue| u32::from(queue.max_size())),
            0x44 => queue.map_or(0, |queue| u32::from(queue.ready())),
            0x60 => self.shared.interrupt.reasons(),
            0x70 => self.shared.status.load(Ordering::SeqCst),
            0xfc => self.generation,
            // There is no shared memory: its length is told as all ones.
            0xb0..0xc0 => u32::MAX,
            _ => 0,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Writes a register. The configuration of none of our devices can be written.
    pub(in crate::vmm) fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(value);
        let status = self.shared.status.load(Ordering::SeqCst);
        match offset {
            0x14 => self.offered_half = value,
            0x20 if status & FEATURES_OK == 0 => self.choose(value),
            0x24 => self.chosen_half = value,
            0x30 => self.selected = value,
            // Notifications come through descriptors; what comes here names a queue that is not there.
            NOTIFY => tracing::debug!("the guest notified queue {value} of {}, which has no such", self.name),
            0x64 => self.shared.interrupt.seen(value),
            0x70 => self.set_status(status, value),
            0x38 | 0x44 | 0x80..=0xa4 if status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK => {
                self.set_up_queue(offset, value);
            }
            _ => tracing::debug!("the guest wrote {value:#x} to register {offset:#x} of {} in vain", self.name),
        }
    }

    fn choose(&mut self, value: u32) {
        let value = u64::from(value);
        match self.chosen_half {
            0 => self.features = self.features & !0xffff_ffff | value,
            1 => self.features = self.features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.selected as usize) else { return };
        match offset {
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, before: u32, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // The driver only ever adds to it.
        let mut status = before | value & STATUS_BITS;
        let features_fine = self.features & !self.offered() == 0 && self.features & 1 << VIRTIO_F_VERSION_1 != 0;
        if before & FEATURES_OK == 0 && !features_fine {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.shared.status.fetch_or(status, Ordering::SeqCst);
        if status & DRIVER_OK != 0 && before & (DRIVER_OK | NEEDS_RESET) == 0 {
            self.ready = true;
            self.begin_work();
        }
    }

    fn reset(&mut self) {
        self.pause();
        self.ready = false;
        self.queues.iter_mut().for_each(QueueT::reset);
        self.left.iter_mut().for_each(Vec::clear);
        (self.features, self.offered_half, self.chosen_half, self.selected) = (0, 0, 0, 0);
        self.shared.interrupt.seen(u32::MAX);
        self.shared.status.store(0, Ordering::SeqCst);
    }

    /// Says that the configuration has changed.
    pub(in crate::vmm) fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.ready {
            self.shared.interrupt.config();
        }
    }

    /// Returns the state of a device that is paused.
    pub(in crate::vmm) fn state(&self) -> TransportState {
        assert!(self.workers.is_empty(), "the device is paused");
        let row = |(queue, left): (&Queue, &Vec<u16>)| QueueRow {
            size: queue.size(),
            ready: queue.ready(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            left: left.clone(),
        };
        TransportState {
            kind: self.device.kind(),
            status: self.shared.status.load(Ordering::SeqCst),
            reasons: self.shared.interrupt.reasons(),
            features: self.features,
            offered_half: self.offered_half,
            chosen_half: self.chosen_half,
            selected: self.selected,
            queues: self.queues.iter().zip(&self.left).map(row).collect(),
        }
    }

    /// Sets the state of a device that no driver has seen yet. It works when it is resumed.
    ///
    /// # Errors
    /// `Corrupt` for a state that such a device cannot have.
    pub(in crate::vmm) fn restore(&mut self, state: &TransportState) -> Result<()> {
        let bad = |what: &str| Error::corrupt(format!("the state of {} is damaged: {what}", self.name));
        if state.kind != self.device.kind() || state.queues.len() != self.queues.len() {
            return Err(bad("it is that of another device"));
        }
        if state.features & !self.offered() != 0 || state.status & !(STATUS_BITS | NEEDS_RESET) != 0 {
            return Err(bad("its features or its status cannot be"));
        }
        for (queue, row) in self.queues.iter_mut().zip(&state.queues) {
            let saved = QueueState {
                max_size: queue.max_size(),
                next_avail: row.next_available,
                next_used: row.next_used,
                event_idx_enabled: false,
                size: row.size,
                ready: row.ready,
                desc_table: row.descriptors,
                avail_ring: row.available,
                used_ring: row.used,
            };
            *queue = Queue::try_from(saved)
                .map_err(|e| Error::corrupt(format!("the state of {} is damaged", self.name)).because(e))?;
            if row.left.len() > row.size.into() || row.left.iter().any(|head| *head >= row.size) {
                return Err(bad("it lists requests that cannot be"));
            }
        }
        self.left = state.queues.iter().map(|row| row.left.clone()).collect();
        self.features = state.features;
        (self.offered_half, self.chosen_half, self.selected) = (state.offered_half, state.chosen_half, state.selected);
        self.ready = state.status & DRIVER_OK != 0;
        self.shared.status.store(state.status, Ordering::SeqCst);
        self.shared.interrupt.again(state.reasons);
        Ok(())
    }

    /// Stops the threads, after what they took is answered; what waits on purpose is begun again when they next work.
    pub(in crate::vmm) fn pause(&mut self) {
        for worker in self.workers.drain(..) {
            for Seat { index, queue, left, .. } in worker.stop() {
                self.queues[index] = queue;
                self.left[index] = left;
            }
        }
    }

    /// Has the threads finish what they took and take nothing more. Nobody waits for that here: see [`Self::is_drained`].
    pub(in crate::vmm) fn drain(&mut self) {
        self.held = true;
        self.workers.iter().for_each(Worker::end);
    }

    /// Tells whether nothing is under way any more in a device that is drained.
    pub(in crate::vmm) fn is_drained(&self) -> bool {
        self.workers.iter().all(Worker::has_ended)
    }

    /// Lets the threads work again if what was to be drained is; tells whether they do, or have all along.
    pub(in crate::vmm) fn work_on(&mut self) -> bool {
        let can = self.can_work();
        if can {
            self.resume();
        }
        can
    }

    /// Tells whether [`Self::resume`] would wait for nothing.
    pub(in crate::vmm) fn can_work(&self) -> bool {
        !self.held || self.is_drained()
    }

    /// Lets the threads work, if the driver is ready; those that were to end and have not are waited for.
    pub(in crate::vmm) fn resume(&mut self) {
        if std::mem::take(&mut self.held) {
            self.pause();
        }
        self.begin_work();
    }

    fn begin_work(&mut self) {
        let needs_reset = self.shared.status.load(Ordering::SeqCst) & NEEDS_RESET != 0;
        if !self.ready || self.held || !self.workers.is_empty() || needs_reset {
            return;
        }
        if let Err(error) = self.start() {
            self.pause();
            self.shared.stop(&error.to_string());
        }
    }

    fn start(&mut self) -> Result<()> {
        let event_index = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, queue) in self.queues.iter_mut().enumerate().filter(|(_, queue)| queue.ready()) {
            if !queue.is_valid(&self.shared.memory) {
                return Err(Error::usage(format!("queue {index} does not lie in the memory of the guest")));
            }
            queue.set_event_idx(event_index);
        }
        for (work, queues) in self.device.work(self.features)? {
            // A driver need not use all queues there are.
            let mut seats = Vec::new();
            for index in queues {
                if self.queues[index].ready() {
                    let queue = std::mem::replace(&mut self.queues[index], placeholder()?);
                    let left = std::mem::take(&mut self.left[index]);
                    seats.push(Seat { index, queue, left, kick: Arc::clone(&self.kicks[index]) });
                }
            }
            if !seats.is_empty() {
                self.workers.push(Worker::start(&self.name, work, seats, Arc::clone(&self.shared))?);
            }
        }
        Ok(())
    }
}

/// Stands where a queue was that is with its thread.
fn placeholder() -> Result<Queue> {
    make(1)
}

fn make(size: u16) -> Result<Queue> {
    virtio_queue::QueueT::new(size).map_err(|e| Error::failed(format!("a queue cannot have {size} entries: {e}")))
}

fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => u32::try_from(features & 0xffff_ffff).expect("half of it"),
        1 => u32::try_from(features >> 32).expect("half of it"),
        _ => 0,
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(test)]
mod tests;
