//! One queue at work: a thread that takes requests out of guest memory, does them and answers them.
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
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::bell::{self, Bell};
use super::config::QUEUE_SIZE_MAX;
use super::inflight::Track;
use super::request::{Bounds, Request, SERIAL, Status, What};
use crate::disk::BlockDevice;

/// The memory of a guest.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Bytes that are read or written at a time.
const PIECE: usize = 1 << 20;

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
        let mut work = Loop {
            queue,
            again,
            track,
            memory: setup.memory,
            flushes: setup.flushes,
            bell: setup.bell,
            target,
            done: Vec::new(),
            buffer: vec![0; PIECE],
        };
        let kick = setup.kick;
        let thread = std::thread::Builder::new().name("vhost-queue".into()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                if let Err(reason) = work.serve(&kick, &stop) {
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
    let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(|e| e.to_string())?;
    set(&mut queue).map_err(|e| e.to_string())?;
    if !queue.is_valid(memory) {
        return Err("the rings do not lie in the memory of the guest".into());
    }
    let used = queue.used_idx(memory, Ordering::Acquire).map_err(|e| e.to_string())?.0;
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
    flushes: bool,
    bell: Arc<Bell>,
    target: Arc<Target>,
    /// Answered and not yet in the used ring: heads, and how many bytes were written.
    done: Vec<(u16, u32)>,
    buffer: Vec<u8>,
}

impl Loop {
    fn serve(&mut self, kick: &File, stop: &Stop) -> Result<(), String> {
        for head in std::mem::take(&mut self.again) {
            self.run(head)?;
        }
        loop {
            self.queue.disable_notification(&*self.memory).map_err(|e| e.to_string())?;
            while !stop.asked.load(Ordering::Acquire) {
                let Some(head) = self.next()? else { break };
                if let Some(track) = &mut self.track {
                    track.begin(head);
                }
                self.run(head)?;
            }
            if stop.asked.load(Ordering::Acquire) {
                return Ok(());
            }
            if self.queue.enable_notification(&*self.memory).map_err(|e| e.to_string())? {
                continue;
            }
            if bell::wait(kick, &stop.event).map_err(|e| e.to_string())? {
                bell::silence(kick);
            }
        }
    }

    /// Takes the next request.
    fn next(&mut self) -> Result<Option<u16>, String> {
        let mut chains = self.queue.iter(&*self.memory).map_err(|e| e.to_string())?;
        let Some(head) = chains.next().map(|chain| chain.head_index()) else { return Ok(None) };
        if head >= self.queue.size() {
            return Err(format!("it has no descriptor {head}"));
        }
        Ok(Some(head))
    }

    fn run(&mut self, head: u16) -> Result<(), String> {
        let (memory, target) = (&*self.memory, &*self.target);
        let bounds = Bounds::of(&*target.device, target.read_only);
        let table = GuestAddress(self.queue.desc_table());
        let request = Request::take(memory, table, self.queue.size(), head, bounds);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let ran = request.run(memory, &*target.device, &target.serial, &mut self.buffer)?;
            if !self.flushes && matches!(request.what, What::Write(_) | What::Discard(_) | What::WriteZeroes(_)) {
                target.device.flush()?;
            }
            Ok(ran)
        }));
        let (status, data) = match ran {
            Ok(Ok(ran)) => ran,
            Ok(Err(error)) => {
                target.failed(&error);
                (Status::Failed, 0)
            }
            Err(_) => {
                tracing::error!("a request failed on a mistake in this program; the guest was told so");
                (Status::Failed, 0)
            }
        };
        self.done.push((head, request.answer(memory, status, data)));
        self.publish().map_err(|e| e.to_string())
    }

    /// Puts what is done into the used ring.
    fn publish(&mut self) -> Result<(), virtio_queue::Error> {
        let memory = &*self.memory;
        let heads = || self.done.iter().map(|(head, _)| *head);
        if let Some(track) = &self.track {
            track.ending(heads());
        }
        for (head, len) in &self.done {
            self.queue.add_used(memory, *head, *len)?;
        }
        if let Some(track) = &self.track {
            track.ended(heads(), self.queue.next_used());
        }
        self.done.clear();
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

impl Target {
    /// Says in the log that the disk failed a request, if not too often.
    fn failed(&self, error: &crate::error::Error) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        if (before + 1).is_power_of_two() {
            tracing::warn!("a request of a guest failed ({} so far): {error}", before + 1);
        }
    }
}
