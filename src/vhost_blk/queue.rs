//! One queue of a front end at work: set up, served by a thread ([`Service`]), stopped.
//!
//! # Rules
//! 1. A queue works from the moment its front end has said all there is to say, until it says stop, goes away or changes
//!    something; then what was taken is finished first. So nothing is in flight while anything changes.
//!    Only what waits on purpose, for room or for a limit, is not waited for: it is begun again when the queue next works,
//!    here or in another server ([`super::inflight`]). A front end that asks where the queue stands counts it as taken.
//! 2. What a guest puts into its rings ends a request, or at worst this queue: its front end is told, and it rests until it
//!    is set up anew.
//!
//! # After a crash
//! See [`super::inflight`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::bell::{self, Bell};
use super::config::QUEUE_SIZE_MAX;
use super::inflight::Track;
use super::memory::Memory;
use super::server::Line;
use super::service::{Service, Target, Wires, look_at, text};
use crate::store::Cancel;

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
    /// What was taken before that and is not answered, as far as this server knows.
    pub(super) left: Vec<u16>,
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
    thread: JoinHandle<Stopped>,
    stop: Arc<Stop>,
}

/// Where a queue stands that has stopped.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    /// Where in the ring of available requests to go on.
    pub(super) base: u16,
    /// What was taken before that and was called back.
    pub(super) left: Vec<u16>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    event: File,
    /// Calls back what waits on purpose.
    cancel: Arc<Cancel>,
}

impl Worker {
    /// Lets a queue work.
    ///
    /// # Errors
    /// When what was said about it makes no sense, or the host has no thread.
    pub(super) fn start(setup: Setup, target: Arc<Target>, error: Arc<Bell>) -> io::Result<Self> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let stop = Arc::new(Stop { asked: AtomicBool::new(false), event: bell::eventfd()?, cancel: Arc::default() });
        let (mut queue, again, track) = prepare(setup.track, setup.left, &setup.memory, |queue| {
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
        let (memory, kick, bell, durable) = (setup.memory, setup.kick, setup.bell, !setup.flushes);
        let line = setup.line;
        let thread = std::thread::Builder::new().name("vhost-queue".into()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                let call = || bell.ring();
                let (kick, wake) = (kick.as_fd(), stop.event.as_fd());
                let wires = Wires { kick, stop: &stop.asked, wake, cancel: &stop.cancel, call: &call };
                let mut service = Service::new(&mut queue, &*memory, &target, wires);
                (service.track, service.again) = (track, again);
                let served = service.run(durable);
                let left = std::mem::take(&mut service.again).into();
                if service.has_lost_memory() {
                    tracing::warn!("a front end is disconnected, for it has taken memory of its guest away");
                    line.cut();
                } else if let Err(reason) = served {
                    tracing::error!("a queue of a guest cannot be used any more: {reason}");
                    error.ring();
                }
                Stopped { base: queue.next_avail(), left }
            }
        })?;
        Ok(Self { thread, stop })
    }

    /// Says that it is to stop, without waiting for it.
    pub(super) fn ask_to_stop(&self) {
        self.stop.asked.store(true, Ordering::Release);
        bell::ring(&self.stop.event);
        self.stop.cancel.cancel();
    }

    /// Finishes what was taken, except what waits on purpose, and returns where the queue stands.
    ///
    /// # Errors
    /// When the thread has ended on a mistake in this program: nobody knows then.
    pub(super) fn stop(self) -> io::Result<Stopped> {
        self.ask_to_stop();
        self.thread.join().map_err(|_| io::Error::other("the thread of a queue failed on a mistake in this program"))
    }
}

type Prepared = (Queue, VecDeque<u16>, Option<Track>);

/// Sets a queue up, and finds what was taken before and is not answered: by this server, which is `left`, or by another one.
fn prepare(
    mut track: Option<Track>,
    left: Vec<u16>,
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
    let (mut again, size) = (VecDeque::new(), queue.size());
    let found = match &mut track {
        Some(track) => track.recover(used)?,
        None => None,
    };
    if let Some(heads) = found {
        // The region may be of a larger queue.
        let taken = u16::try_from(heads.len()).ok().filter(|taken| *taken <= size);
        let taken = taken.ok_or("more requests in flight than the queue has")?;
        if let Some(head) = heads.iter().find(|head| **head >= size) {
            return Err(format!("a request in flight begins with descriptor {head}, which the queue does not have"));
        }
        queue.set_next_avail(used.wrapping_add(taken));
        again = heads.into();
    } else if usize::from(queue.next_avail().wrapping_sub(used)) == left.len() && left.iter().all(|head| *head < size) {
        // Otherwise the queue is not the one that they were taken from: the guest has begun anew.
        if let Some(track) = &mut track {
            left.iter().for_each(|head| track.begin(*head));
        }
        again = left.into();
    }
    look_at(memory, track.as_ref())?;
    Ok((queue, again, track))
}
