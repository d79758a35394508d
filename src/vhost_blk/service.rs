//! One queue being served: requests are taken out of guest memory, done many at a time, and answered.
//!
//! ```text
//!   available ring --take, many--> flights --> engine --collect, many--> used ring --one notification--> guest
//! ```
//!
//! Knows nothing of who owns the queue: threads of vhost-user serve theirs with it, and the disks of a VMM of our own do.
//!
//! # Rules
//! 1. It is served by one thread, which never waits for one request while there are others.
//! 2. When it is told to stop, what was taken is finished and answered first. So nothing is in flight while anything changes.
//!    Only what waits on purpose, for room or for a limit, is called back instead: it is left in [`Service::again`], and
//!    whoever owns the queue keeps it for the next service. So is the rest of a long request when the device is served no
//!    more: nobody keeps a disk by asking for 4 GiB of it.
//! 3. What a guest puts into its rings ends a request, or at worst the service of this queue.
//! 4. The guest is asked to notify only when there is nothing left to do. Notifications again and again for nothing are
//!    answered less often.
//! 5. What the last service has left to be done again is taken like anything else: no more at a time than there is room for.
//!
//! # Why it never sleeps on something undone
//! What is answered is published before each sleep, and what is to be done again is begun as soon as there is room. While
//! anything is under way it sleeps in the engine, for which a request is under way until it was collected, be it
//! finished, called back or waiting. With nothing under way it sleeps only after the guest was asked to notify and the ring
//! was looked at once more. A stop wakes it: by a descriptor when nothing is under way, else with what is called back
//! or ends.
//!
//! # After a crash
//! See [`super::inflight`].

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::bell;
use super::flight::Flights;
use super::inflight::Track;
use super::request::{Bounds, Request, SERIAL};
use crate::budget::Pot;
use crate::clock;
use crate::disk::BlockDevice;
use crate::disk::patience::Patience;
use crate::store::Cancel;

/// The memory of a guest.
pub(crate) trait Memory {
    /// Returns it.
    fn map(&self) -> &GuestMemoryMmap<()>;

    /// Tells whether any of it was found to be gone, so that what was read is not what the guest has written.
    fn is_lost(&self) -> bool;
}

/// Requests under way at most; more stay in their ring.
const IN_FLIGHT_MAX: usize = 256;
/// Bytes of their data at most, or of one request.
const BYTES_MAX: usize = 32 << 20;
/// So many bells in a row for nothing are a mistake of whoever rings; ...
const FALSE_BELLS: u32 = 64;
/// ... each of those to come is answered after a rest.
const REST: Duration = Duration::from_millis(1);
/// After so long without a request a queue gives up the memory that it keeps.
const IDLE: Duration = Duration::from_secs(1);

/// What the queues of a device share.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) device: Arc<dyn BlockDevice>,
    serial: [u8; SERIAL],
    pub(crate) read_only: bool,
    /// Requests the device failed; a log line is written for the first, second, fourth and so on.
    failures: AtomicU64,
    /// It is served no more: of what is under way only the parts that were begun are finished.
    ended: AtomicBool,
    /// Memory for requests that its queues share, with whom else there is.
    pub(super) requests: Arc<Pot>,
}

/// What whoever owns a queue and its thread call each other through.
pub(crate) struct Wires<'a> {
    /// Readable when the guest notifies.
    pub(crate) kick: BorrowedFd<'a>,
    /// Set when the thread is to stop,
    pub(crate) stop: &'a AtomicBool,
    /// and readable then.
    pub(crate) wake: BorrowedFd<'a>,
    /// Given when the thread is to stop, too: calls back what waits on purpose.
    pub(crate) cancel: &'a Arc<Cancel>,
    /// Tells the guest that requests are answered.
    pub(crate) call: &'a dyn Fn(),
}

/// A queue and what it takes to serve it.
pub(crate) struct Service<'a> {
    pub(crate) queue: &'a mut Queue,
    pub(crate) memory: &'a dyn Memory,
    pub(crate) target: &'a Arc<Target>,
    pub(crate) wires: Wires<'a>,
    /// Where a front end keeps what is under way.
    pub(crate) track: Option<Track>,
    /// What was taken and not answered: before, and when it has stopped.
    pub(crate) again: VecDeque<u16>,
    /// Bells in a row that were for nothing.
    false_bells: u32,
}

/// Tells why a queue cannot be served.
pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn is_lost(memory: &dyn Memory, track: Option<&Track>) -> bool {
    memory.is_lost() || track.is_some_and(Track::is_lost)
}

/// Fails when what was read is no memory any more.
pub(super) fn look_at(memory: &dyn Memory, track: Option<&Track>) -> Result<(), String> {
    if is_lost(memory, track) { Err("memory that was shared is gone".into()) } else { Ok(()) }
}

impl<'a> Service<'a> {
    /// Makes it of what it takes.
    pub(crate) fn new(queue: &'a mut Queue, memory: &'a dyn Memory, target: &'a Arc<Target>, wires: Wires<'a>) -> Self {
        Self { queue, memory, target, wires, track: None, again: VecDeque::new(), false_bells: 0 }
    }

    /// Serves it until told to stop. `durable` says that each write is flushed before it is answered, for the driver knows of
    /// no flushes.
    ///
    /// # Errors
    /// Why it cannot be served any more.
    pub(crate) fn run(&mut self, durable: bool) -> Result<(), String> {
        // Made here: the ring of an engine belongs to one thread.
        let mut flights =
            Flights::new(Arc::clone(self.target), durable, Arc::clone(self.wires.cancel)).map_err(text)?;
        self.target.device.heed(self.wires.cancel);
        let served = self.go_round(&mut flights);
        if served.is_err() {
            self.wires.cancel.cancel();
        }
        let ended = self.end(&mut flights);
        self.again.extend(flights.left());
        served.and(ended)
    }

    /// Finishes what was taken, whatever happened; what is to be done again counts as taken.
    fn end(&mut self, flights: &mut Flights) -> Result<(), String> {
        while flights.count() > 0 || !self.again.is_empty() {
            while !full(flights)
                && let Some(head) = self.again.pop_front()
            {
                self.begin(flights, head);
            }
            if flights.count() > 0 {
                flights.engine().wait(None).map_err(text)?;
            }
            flights.collect(self.memory);
            self.publish(flights).map_err(text)?;
        }
        self.publish(flights).map_err(text)
    }

    fn go_round(&mut self, flights: &mut Flights) -> Result<(), String> {
        let mut patience = Patience::default();
        let (kick, wake) = (self.wires.kick, self.wires.wake);
        while !self.wires.stop.load(Ordering::Acquire) && !self.target.has_ended() {
            self.look_at_memory()?;
            self.queue.disable_notification(self.memory.map()).map_err(text)?;
            let mut busy = self.take(flights)?;
            flights.engine().submit().map_err(text)?;
            busy |= flights.collect(self.memory);
            self.publish(flights).map_err(text)?;
            self.false_bells = if busy { 0 } else { self.false_bells };
            if busy && flights.count() == 0 {
                // Look again before going to sleep: that costs less than being woken.
                continue;
            }
            if full(flights) {
                flights.engine().wait(None).map_err(text)?;
            } else if !self.again.is_empty() {
                // There is room by now, and the guest does not notify of these: what is under way may wait for long.
            } else if self.look(flights, &patience)? {
                // It came before it was worth sleeping.
            } else if self.queue.enable_notification(self.memory.map()).map_err(text)? {
                // There is more already.
            } else if flights.count() > 0 {
                flights.engine().sleep(Some(kick)).map_err(text)?;
                self.silence()?;
            } else {
                // What has just been looked at may be gone, and nobody may ever kick again.
                self.look_at_memory()?;
                let sleep = || match bell::wait(kick, wake, Some(IDLE))? {
                    None => {
                        flights.rest();
                        bell::wait(kick, wake, None)
                    }
                    woken => Ok(woken),
                };
                if patience.sleep(sleep).map_err(text)? == Some(true) {
                    self.silence()?;
                }
            }
            if flights.collect(self.memory) {
                self.false_bells = 0;
            }
        }
        Ok(())
    }

    /// Takes what made the bell ring; rests when that was for nothing too often.
    fn silence(&mut self) -> Result<(), String> {
        if self.wires.stop.load(Ordering::Acquire) {
            // It may have rung for who has the queue next.
            return Ok(());
        }
        let rung = bell::silence(self.wires.kick).map_err(|e| format!("it cannot be kicked any more: {e}"))?;
        self.false_bells = self.false_bells.saturating_add(rung.into());
        if rung && self.false_bells > FALSE_BELLS {
            clock::sleep(REST);
        }
        Ok(())
    }

    /// Tells whether what was read is no memory any more.
    pub(crate) fn has_lost_memory(&self) -> bool {
        is_lost(self.memory, self.track.as_ref())
    }

    fn look_at_memory(&self) -> Result<(), String> {
        look_at(self.memory, self.track.as_ref())
    }

    /// Looks for something to do without sleeping, for a while; tells whether there is. The guest need not notify
    /// meanwhile.
    fn look(&self, flights: &mut Flights, patience: &Patience) -> Result<bool, String> {
        let asked = || {
            let index = self.queue.avail_idx(self.memory.map(), Ordering::Acquire);
            let stop = self.wires.stop.load(Ordering::Relaxed);
            stop || index.is_ok_and(|index| index.0 != self.queue.next_avail())
        };
        if flights.count() > 0 { flights.engine().look(asked).map_err(text) } else { Ok(patience.look(asked)) }
    }

    /// Takes what is available, as far as there is room; tells whether there was anything.
    fn take(&mut self, flights: &mut Flights) -> Result<bool, String> {
        let mut any = false;
        while !full(flights) {
            if let Some(head) = self.again.pop_front() {
                self.begin(flights, head);
                any = true;
                continue;
            }
            let mut chains = self.queue.iter(self.memory.map()).map_err(text)?;
            let Some(head) = chains.next().map(|chain| chain.head_index()) else { break };
            if head >= self.queue.size() {
                return Err(format!("it has no descriptor {head}"));
            }
            if let Some(track) = &mut self.track {
                track.begin(head);
            }
            self.begin(flights, head);
            any = true;
        }
        Ok(any)
    }

    fn begin(&self, flights: &mut Flights, head: u16) {
        let bounds = Bounds::of(&*self.target.device, self.target.read_only);
        let table = GuestAddress(self.queue.desc_table());
        let request = Request::take(self.memory.map(), table, self.queue.size(), head, bounds);
        flights.begin(self.memory, head, request);
    }

    /// Puts what is answered into the used ring, all of it at once.
    fn publish(&mut self, flights: &mut Flights) -> Result<(), virtio_queue::Error> {
        let answered = flights.answered();
        if answered.is_empty() {
            return Ok(());
        }
        let memory = self.memory.map();
        let heads = || answered.iter().map(|(head, _)| *head);
        if let Some(track) = &self.track {
            track.ending(heads());
        }
        for (head, len) in &*answered {
            self.queue.add_used(memory, *head, *len)?;
        }
        if let Some(track) = &self.track {
            track.ended(heads(), self.queue.next_used());
        }
        answered.clear();
        let wanted = self.queue.needs_notification(memory)?;
        // Without an index there is a flag, which the crate leaves to us.
        let flag = || memory.read_obj::<u16>(GuestAddress(self.queue.avail_ring()));
        let silent = || flag().is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0);
        if wanted && (self.queue.event_idx_enabled() || !silent()) {
            (self.wires.call)();
        }
        Ok(())
    }
}

/// Tells whether nothing more should be taken before something is finished.
fn full(flights: &Flights) -> bool {
    flights.wait_for_memory()
        || flights.count() >= IN_FLIGHT_MAX
        || flights.bytes() >= BYTES_MAX
        || flights.answered_len() >= IN_FLIGHT_MAX
}

impl Target {
    /// Makes a device of a disk. `serial` is what the guest sees as its serial number; cut to 20 bytes. Memory beyond what each
    /// queue may always have comes out of `requests`.
    pub(crate) fn new(device: Arc<dyn BlockDevice>, read_only: bool, serial: &str, requests: Arc<Pot>) -> Self {
        let mut bytes = [0; SERIAL];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let read_only = read_only || device.read_only();
        let (failures, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { device, serial: bytes, read_only, failures, ended, requests }
    }

    /// Ends it: nothing is begun any more, be it a request or the rest of one.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Tells whether it was ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Returns the serial number.
    pub(super) fn serial(&self) -> &[u8; SERIAL] {
        &self.serial
    }

    /// Says in the log that the disk failed a request, if not too often.
    pub(super) fn failed(&self, error: &crate::error::Error) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        if (before + 1).is_power_of_two() {
            tracing::warn!("a request of a guest failed ({} so far): {error}", before + 1);
        }
    }
}
