//! The thread of a device: lets the device work until it is told to stop, and takes the queues there and back.

use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::Work;
use super::interrupt::Interrupt;
use super::ring::{Broken, Ring};
use crate::error::{Error, Result};
use crate::store::Cancel;
use crate::sys::event::descriptor;
use crate::vmm::memory::Memory;
use crate::vmm::nursery::Nursery;

/// `DEVICE_NEEDS_RESET`.
pub(super) const NEEDS_RESET: u32 = 0x40;

/// What the threads of a device share with its registers.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) memory: Memory,
    pub(super) interrupt: Arc<Interrupt>,
    /// The status register.
    pub(super) status: AtomicU32,
    /// How often the device has stopped; the log tells of the first, second, fourth time and so on.
    pub(super) stops: AtomicU64,
    /// Where its threads come from.
    pub(super) nursery: Arc<Nursery>,
}

impl Shared {
    /// Says that the device does nothing any more until the guest resets it.
    pub(super) fn stop(&self, why: &str) {
        let before = self.stops.fetch_add(1, Ordering::Relaxed);
        if (before + 1).is_power_of_two() {
            tracing::error!("a device of the guest stops until it is reset ({} times so far): {why}", before + 1);
        }
        self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        self.interrupt.config();
    }
}

/// A queue on its way to a thread and back.
#[derive(Debug)]
pub(in crate::vmm) struct Seat {
    /// Its number.
    pub(super) index: usize,
    pub(super) queue: Queue,
    /// Heads of what was taken and not answered.
    pub(super) left: Vec<u16>,
    pub(super) kick: Arc<EventFd>,
}

/// A thread at work.
#[derive(Debug)]
pub(super) struct Worker {
    thread: JoinHandle<Vec<Seat>>,
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    cancel: Arc<Cancel>,
}

impl Worker {
    /// Lets a device work on queues.
    ///
    /// # Errors
    /// When the host has no thread or descriptor.
    pub(super) fn start(name: &str, work: Box<dyn Work>, seats: Vec<Seat>, shared: Arc<Shared>) -> Result<Self> {
        let host = |e| Error::io("no thread for a device of the guest", e);
        let stop = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?);
        let cancel = Arc::new(Cancel::default());
        let (stops, wakes) = (Arc::clone(&stop), Arc::clone(&wake));
        let bells = Bells { stop: stops, wake: wakes, cancel: Arc::clone(&cancel), kicks: Vec::new() };
        let nursery = Arc::clone(&shared.nursery);
        let thread = nursery.start(name, move || live(work, seats, &shared, bells)).map_err(host)?;
        Ok(Self { thread, stop, wake, cancel })
    }

    /// Has it take nothing more and end when it has finished what it took, except what waits on purpose.
    pub(super) fn end(&self) {
        self.stop.store(true, Ordering::Release);
        ring_bell(&self.wake);
        self.cancel.cancel();
    }

    /// Tells whether it has finished.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Finishes what was taken, except what waits on purpose, and returns the queues.
    pub(super) fn stop(self) -> Vec<Seat> {
        self.end();
        self.thread.join().expect("requests that panic are caught")
    }
}

fn ring_bell(event: &EventFd) {
    // Full means that it is rung already.
    if let Err(error) = event.write(1)
        && error.kind() != std::io::ErrorKind::WouldBlock
    {
        tracing::warn!("a thread of a device was not woken: {error}");
    }
}

/// What wakes a thread.
pub(in crate::vmm) struct Bells {
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    cancel: Arc<Cancel>,
    /// Of each ring, in their order.
    kicks: Vec<Arc<EventFd>>,
}

impl Bells {
    /// Tells whether the thread is to stop.
    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Returns what is readable when the thread is to stop.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        descriptor(&self.wake)
    }

    /// Returns what calls back what waits on purpose, when the thread is to stop.
    pub(super) fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// Returns what is readable when the guest has notified a ring.
    pub(super) fn kick(&self, number: usize) -> BorrowedFd<'_> {
        descriptor(&self.kicks[number])
    }

    /// Waits until there may be something to do.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn wait(&self, also: Option<BorrowedFd<'_>>) -> Result<(), Broken> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.wake(), PollFlags::IN)];
        fds.extend(self.kicks.iter().map(|kick| PollFd::from_borrowed_fd(descriptor(kick), PollFlags::IN)));
        fds.extend(also.map(|also| PollFd::from_borrowed_fd(also, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Broken(format!("it cannot wait: {error}"))),
        }
        for kick in &self.kicks {
            // An error says that it was not rung.
            kick.read().ok();
        }
        Ok(())
    }
}

/// The life of a thread; returns the queues.
fn live(mut work: Box<dyn Work>, seats: Vec<Seat>, shared: &Shared, mut bells: Bells) -> Vec<Seat> {
    let (mut rings, mut numbers) = (Vec::new(), Vec::new());
    for Seat { index, queue, left, kick } in seats {
        let (memory, interrupt) = (shared.memory.clone(), Arc::clone(&shared.interrupt));
        rings.push(Ring::new(queue, left, memory, interrupt, Arc::clone(&bells.stop)));
        numbers.push(index);
        bells.kicks.push(kick);
    }
    let lived = catch_unwind(AssertUnwindSafe(|| {
        shared.nursery.confine()?;
        work.live(&mut rings, &bells)
    }));
    if let Err(Broken(why)) = lived.unwrap_or_else(|_| Err(Broken("a mistake in this program".into()))) {
        shared.stop(&why);
    }
    let seat = |((index, ring), kick): ((usize, Ring), Arc<EventFd>)| {
        let (queue, left) = ring.into_queue();
        Seat { index, queue, left, kick }
    };
    numbers.into_iter().zip(rings).zip(bells.kicks).map(seat).collect()
}
