//! One queue at work: a thread that takes requests out of guest memory, has them done and answers them.
//!
//! ```text
//!   available ring --take, many--> flights --> engine --collect, many--> used ring --one notification--> guest
//! ```
//!
//! # Rules
//! 1. A queue works from the moment its front end has said all there is to say, until it says stop, goes away or changes
//!    something; then what was taken is finished first. So nothing is in flight while anything changes.
//! 2. What a guest puts into its rings ends a request, or at worst this queue: its front end is told, and it rests until it
//!    is set up anew.
//! 3. The guest is asked to notify only when there is nothing left to do.
//!
//! # After a crash
//! See [`super::inflight`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::bell::{self, Bell};
use super::config::QUEUE_SIZE_MAX;
use super::flight::Flights;
use super::inflight::Track;
use super::request::{Bounds, Request, SERIAL};
use crate::disk::BlockDevice;
use crate::disk::patience::Patience;

/// The memory of a guest.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Requests under way at most; more stay in their ring.
const IN_FLIGHT_MAX: usize = 256;
/// Bytes of their data at most, or of one request.
const BYTES_MAX: usize = 32 << 20;

/// What the queues of a device share.
pub(super) struct Target {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) serial: [u8; SERIAL],
    pub(super) read_only: bool,
    /// Requests the device failed; a log line is written for the first, second, fourth and so on.
    pub(super) failures: AtomicU64,
}

/// All there is to say about a queue before it can work.
pub(super) struct Setup {
    pub(super) memory: Arc<Memory>,
    /// Entries; a power of two.
    pub(super) size: u16,
    pub(super) descriptors: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
    /// Where in the ring of available requests to go on.
    pub(super) base: u16,
    pub(super) event_index: bool,
    /// The driver knows of flushes, so writes need none of their own.
    pub(super) flushes: bool,
    pub(super) kick: Arc<File>,
    pub(super) bell: Arc<Bell>,
    pub(super) track: Option<Track>,
}

/// A queue that works.
#[derive(Debug)]
pub(super) struct Worker {
    thread: JoinHandle<u16>,
    stop: Arc<Stop>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    event: File,
}

impl Worker {
    /// Lets a queue work.
    ///
    /// # Errors
    /// When what was said about it makes no sense, or the host has no thread.
    pub(super) fn start(setup: Setup, target: Arc<Target>, error: Option<Arc<File>>) -> io::Result<Self> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let stop = Arc::new(Stop { asked: AtomicBool::new(false), event: bell::eventfd()? });
        let (queue, again, track) = prepare(setup.track, &setup.memory, |queue| {
            queue.try_set_size(setup.size)?;
            queue.try_set_desc_table_address(setup.descriptors)?;
            queue.try_set_avail_ring_address(setup.available)?;
            queue.try_set_used_ring_address(setup.used)?;
            queue.set_next_avail(setup.base);
            queue.set_event_idx(setup.event_index);
            queue.set_ready(true);
            Ok(())
        })
        .map_err(bad)?;
        let mut work =
            Loop { queue, again, track, memory: setup.memory, bell: setup.bell, target: Arc::clone(&target) };
        let (kick, durable) = (setup.kick, !setup.flushes);
        let thread = std::thread::Builder::new().name("vhost-queue".into()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                // Made here: the ring of an engine belongs to one thread.
                let served = Flights::new(target, durable)
                    .map_err(text)
                    .and_then(|mut flights| work.serve(&mut flights, &kick, &stop));
                if let Err(reason) = served {
                    tracing::error!("a queue of a guest cannot be used any more: {reason}");
                    error.iter().for_each(|error| bell::ring(error));
                }
                work.queue.next_avail()
            }
        })?;
        Ok(Self { thread, stop })
    }

    /// Finishes what was taken and returns where the ring of available requests goes on.
    pub(super) fn stop(self) -> u16 {
        self.stop.asked.store(true, Ordering::Release);
        bell::ring(&self.stop.event);
        self.thread.join().expect("requests that panic are caught")
    }
}

type Prepared = (Queue, Vec<u16>, Option<Track>);

/// Sets a queue up, and finds what the last server has not answered.
fn prepare(
    mut track: Option<Track>,
    memory: &Memory,
    set: impl FnOnce(&mut Queue) -> Result<(), virtio_queue::Error>,
) -> Result<Prepared, String> {
    let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(text)?;
    set(&mut queue).map_err(text)?;
    if !queue.is_valid(memory) {
        return Err("the rings do not lie in the memory of the guest".into());
    }
    let used = queue.used_idx(memory, Ordering::Acquire).map_err(text)?.0;
    queue.set_next_used(used);
    let mut again = Vec::new();
    if let Some(track) = &mut track
        && let Some(heads) = track.recover(used)?
    {
        let taken = u16::try_from(heads.len()).map_err(|_| "more requests in flight than a queue has")?;
        queue.set_next_avail(used.wrapping_add(taken));
        again = heads;
    }
    Ok((queue, again, track))
}

struct Loop {
    queue: Queue,
    memory: Arc<Memory>,
    /// What the last server has not answered.
    again: Vec<u16>,
    track: Option<Track>,
    bell: Arc<Bell>,
    target: Arc<Target>,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Loop {
    fn serve(&mut self, flights: &mut Flights, kick: &File, stop: &Stop) -> Result<(), String> {
        for head in std::mem::take(&mut self.again) {
            self.begin(flights, head);
        }
        let served = self.go_round(flights, kick, stop);
        // What was taken is finished, whatever happened.
        while flights.count() > 0 {
            flights.engine().wait(None).map_err(text)?;
            flights.collect(&self.memory);
        }
        self.publish(flights).map_err(text)?;
        served
    }

    fn go_round(&mut self, flights: &mut Flights, kick: &File, stop: &Stop) -> Result<(), String> {
        let mut patience = Patience::default();
        while !stop.asked.load(Ordering::Acquire) {
            self.queue.disable_notification(&*self.memory).map_err(text)?;
            let mut busy = self.take(flights)?;
            flights.engine().submit().map_err(text)?;
            busy |= flights.collect(&self.memory);
            self.publish(flights).map_err(text)?;
            if busy && flights.count() == 0 {
                // Look again before going to sleep: that costs less than being woken.
                continue;
            }
            if full(flights) {
                flights.engine().wait(None).map_err(text)?;
            } else if self.look(flights, &patience, stop)? {
                // It came before it was worth sleeping.
            } else if self.queue.enable_notification(&*self.memory).map_err(text)? {
                // There is more already.
            } else if flights.count() > 0 {
                flights.engine().sleep(Some(kick.as_fd())).map_err(text)?;
                bell::silence(kick);
            } else if patience.sleep(|| bell::wait(kick, &stop.event)).map_err(text)? {
                bell::silence(kick);
            }
            flights.collect(&self.memory);
        }
        Ok(())
    }

    /// Looks for something to do without sleeping, for a while; tells whether there is. The guest need not notify
    /// meanwhile.
    fn look(&self, flights: &mut Flights, patience: &Patience, stop: &Stop) -> Result<bool, String> {
        let asked = || {
            let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
            stop.asked.load(Ordering::Relaxed) || index.is_ok_and(|index| index.0 != self.queue.next_avail())
        };
        if flights.count() > 0 { flights.engine().look(asked).map_err(text) } else { Ok(patience.look(asked)) }
    }

    /// Takes what is available, as far as there is room; tells whether there was anything.
    fn take(&mut self, flights: &mut Flights) -> Result<bool, String> {
        let mut any = false;
        while !full(flights) {
            let mut chains = self.queue.iter(&*self.memory).map_err(text)?;
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
        let request = Request::take(&*self.memory, table, self.queue.size(), head, bounds);
        flights.begin(&self.memory, head, request);
    }

    /// Puts what is answered into the used ring, all of it at once.
    fn publish(&mut self, flights: &mut Flights) -> Result<(), virtio_queue::Error> {
        let answered = flights.answered();
        if answered.is_empty() {
            return Ok(());
        }
        let memory = &*self.memory;
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
            self.bell.ring();
        }
        Ok(())
    }
}

/// Tells whether nothing more should be taken before something is finished.
fn full(flights: &Flights) -> bool {
    flights.count() >= IN_FLIGHT_MAX || flights.bytes() >= BYTES_MAX || flights.answered_len() >= IN_FLIGHT_MAX
}

impl Target {
    /// Says in the log that the disk failed a request, if not too often.
    pub(super) fn failed(&self, error: &crate::error::Error) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        if (before + 1).is_power_of_two() {
            tracing::warn!("a request of a guest failed ({} so far): {error}", before + 1);
        }
    }
}
