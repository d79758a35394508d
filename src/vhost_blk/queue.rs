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
//! 4. What the last server has left to be done again is taken like anything else: no more at a time than there is room for.
//! 5. A bell that rings again and again for nothing is answered less often.
//!
//! # After a crash
//! See [`super::inflight`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::bell::{self, Bell};
use super::config::QUEUE_SIZE_MAX;
use super::flight::Flights;
use super::inflight::Track;
use super::memory::Memory;
use super::request::{Bounds, Request, SERIAL};
use super::server::Line;
use crate::clock;
use crate::disk::BlockDevice;

/// Requests under way at most; more stay in their ring.
const IN_FLIGHT_MAX: usize = 256;
/// Bytes of their data at most, or of one request.
const BYTES_MAX: usize = 32 << 20;
/// How long it looks for a request before sleeping, at most: what QEMU takes.
const PATIENCE_MAX: Duration = Duration::from_micros(32);
/// Looks between two looks at the clock.
const LOOKS: u32 = 16;
/// So many bells in a row for nothing are a mistake of the front end; ...
const FALSE_BELLS: u32 = 64;
/// ... each of those to come is answered after a rest.
const REST: Duration = Duration::from_millis(1);

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
    /// The connection to the front end.
    pub(super) line: Arc<Line>,
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
        let (memory, bell) = (setup.memory, setup.bell);
        let mut work = Loop { queue, again, track, memory, bell, target: Arc::clone(&target), false_bells: 0 };
        let (kick, durable, line) = (setup.kick, !setup.flushes, setup.line);
        let thread = std::thread::Builder::new().name("vhost-queue".into()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                // Made here: the ring of an engine belongs to one thread.
                let served = Flights::new(target, durable)
                    .map_err(text)
                    .and_then(|mut flights| work.serve(&mut flights, &kick, &stop));
                if work.look_at_memory().is_err() {
                    tracing::warn!("a front end is disconnected, for it has taken memory of its guest away");
                    line.cut();
                } else if let Err(reason) = served {
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

type Prepared = (Queue, VecDeque<u16>, Option<Track>);

/// Sets a queue up, and finds what the last server has not answered.
fn prepare(
    mut track: Option<Track>,
    memory: &Memory,
    set: impl FnOnce(&mut Queue) -> Result<(), virtio_queue::Error>,
) -> Result<Prepared, String> {
    let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(text)?;
    set(&mut queue).map_err(text)?;
    if !queue.is_valid(&**memory) {
        return Err("the rings do not lie in the memory of the guest".into());
    }
    let used = queue.used_idx(&**memory, Ordering::Acquire).map_err(text)?.0;
    queue.set_next_used(used);
    let mut again = VecDeque::new();
    if let Some(track) = &mut track
        && let Some(heads) = track.recover(used)?
    {
        // The region may be of a larger queue.
        let taken = u16::try_from(heads.len()).ok().filter(|taken| *taken <= queue.size());
        let taken = taken.ok_or("more requests in flight than the queue has")?;
        if let Some(head) = heads.iter().find(|head| **head >= queue.size()) {
            return Err(format!("a request in flight begins with descriptor {head}, which the queue does not have"));
        }
        queue.set_next_avail(used.wrapping_add(taken));
        again = heads.into();
    }
    if memory.is_lost() || track.as_ref().is_some_and(Track::is_lost) {
        return Err("memory that was shared is gone".into());
    }
    Ok((queue, again, track))
}

struct Loop {
    queue: Queue,
    memory: Arc<Memory>,
    /// What the last server has not answered.
    again: VecDeque<u16>,
    track: Option<Track>,
    bell: Arc<Bell>,
    target: Arc<Target>,
    /// Bells in a row that were for nothing.
    false_bells: u32,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Loop {
    fn serve(&mut self, flights: &mut Flights, kick: &File, stop: &Stop) -> Result<(), String> {
        let served = self.go_round(flights, kick, stop);
        // What was taken is finished, whatever happened; what is to be done again counts as taken.
        while flights.count() > 0 || !self.again.is_empty() {
            while !full(flights)
                && let Some(head) = self.again.pop_front()
            {
                self.begin(flights, head);
            }
            if flights.count() > 0 {
                flights.engine().wait(None).map_err(text)?;
            }
            flights.collect(&self.memory);
            self.publish(flights).map_err(text)?;
        }
        self.publish(flights).map_err(text)?;
        served
    }

    fn go_round(&mut self, flights: &mut Flights, kick: &File, stop: &Stop) -> Result<(), String> {
        let mut patience = Patience::default();
        while !stop.asked.load(Ordering::Acquire) {
            self.look_at_memory()?;
            self.queue.disable_notification(&**self.memory).map_err(text)?;
            let mut busy = self.take(flights)?;
            flights.engine().submit().map_err(text)?;
            busy |= flights.collect(&self.memory);
            self.publish(flights).map_err(text)?;
            self.false_bells = if busy { 0 } else { self.false_bells };
            if busy && flights.count() == 0 {
                // Look again before going to sleep: that costs less than being woken.
                continue;
            }
            if full(flights) {
                flights.engine().wait(None).map_err(text)?;
            } else if flights.count() == 0 && self.look(&patience, stop) {
                // It came before it was worth sleeping.
            } else if self.queue.enable_notification(&**self.memory).map_err(text)? {
                // There is more already.
            } else if flights.count() > 0 {
                flights.engine().wait(Some(kick.as_fd())).map_err(text)?;
                self.silence(kick, stop)?;
            } else {
                // What has just been looked at may be gone, and nobody may ever kick again.
                self.look_at_memory()?;
                let begun = clock::now();
                if bell::wait(kick, &stop.event).map_err(text)? {
                    self.silence(kick, stop)?;
                }
                patience.slept(clock::now().duration_since(begun));
            }
            if flights.collect(&self.memory) {
                self.false_bells = 0;
            }
        }
        Ok(())
    }

    /// Takes what made the bell ring; rests when that was for nothing too often.
    fn silence(&mut self, kick: &File, stop: &Stop) -> Result<(), String> {
        if stop.asked.load(Ordering::Acquire) {
            // It may have rung for who has the queue next.
            return Ok(());
        }
        let rung = bell::silence(kick).map_err(|e| format!("it cannot be kicked any more: {e}"))?;
        self.false_bells = self.false_bells.saturating_add(rung.into());
        if rung && self.false_bells > FALSE_BELLS {
            clock::sleep(REST);
        }
        Ok(())
    }

    /// Fails when what was read is no memory any more.
    fn look_at_memory(&self) -> Result<(), String> {
        let lost = self.memory.is_lost() || self.track.as_ref().is_some_and(Track::is_lost);
        if lost { Err("memory that was shared is gone".into()) } else { Ok(()) }
    }

    /// Looks for the next request without sleeping, for a while; tells whether there is one. The guest need not notify
    /// meanwhile.
    fn look(&self, patience: &Patience, stop: &Stop) -> bool {
        let until = clock::now() + patience.0;
        while clock::now() < until && !stop.asked.load(Ordering::Relaxed) {
            for _ in 0..LOOKS {
                let index = self.queue.avail_idx(&**self.memory, Ordering::Acquire);
                if index.is_ok_and(|index| index.0 != self.queue.next_avail()) {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
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
            let mut chains = self.queue.iter(&**self.memory).map_err(text)?;
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
        let request = Request::take(&**self.memory, table, self.queue.size(), head, bounds);
        flights.begin(&self.memory, head, request);
    }

    /// Puts what is answered into the used ring, all of it at once.
    fn publish(&mut self, flights: &mut Flights) -> Result<(), virtio_queue::Error> {
        let answered = flights.answered();
        if answered.is_empty() {
            return Ok(());
        }
        let memory = &**self.memory;
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

/// How long it is worth looking for the next request before sleeping: as long as it would have found one lately, so that
/// a guest that rests costs nothing.
#[derive(Debug, Default)]
struct Patience(Duration);

impl Patience {
    /// Learns from a sleep that came after it had looked.
    fn slept(&mut self, slept: Duration) {
        self.0 = if self.0 + slept > PATIENCE_MAX { Duration::ZERO } else { PATIENCE_MAX.min((self.0 + slept) * 2) };
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
