//! The thread of a device: waits for notifications, lets the device work, stops between two requests.

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
use crate::sys::event::descriptor;
use crate::vmm::memory::Memory;

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
pub(super) struct Seat {
    /// Its number.
    pub(super) index: usize,
    pub(super) queue: Queue,
    pub(super) kick: Arc<EventFd>,
}

/// A thread at work.
#[derive(Debug)]
pub(super) struct Worker {
    thread: JoinHandle<Vec<(usize, Queue)>>,
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
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
        let mut body = Body { work, shared, wake: Arc::clone(&wake), stop: Arc::clone(&stop) };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || body.live(seats)).map_err(host)?;
        Ok(Self { thread, stop, wake })
    }

    /// Finishes what was taken and returns the queues.
    pub(super) fn stop(self) -> Vec<(usize, Queue)> {
        self.stop.store(true, Ordering::Release);
        ring_bell(&self.wake);
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

struct Body {
    work: Box<dyn Work>,
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
}

impl Body {
    fn live(&mut self, seats: Vec<Seat>) -> Vec<(usize, Queue)> {
        let mut rings = Vec::new();
        let mut kicks = Vec::new();
        for Seat { index, queue, kick } in seats {
            let (memory, interrupt) = (self.shared.memory.clone(), Arc::clone(&self.shared.interrupt));
            rings.push(Ring::new(queue, memory, interrupt, Arc::clone(&self.stop)));
            kicks.push((index, kick));
        }
        while !self.stop.load(Ordering::Acquire) {
            let worked = catch_unwind(AssertUnwindSafe(|| self.work.work(&mut rings)));
            let worked = worked.unwrap_or_else(|_| Err(Broken("a mistake in this program".into())));
            let waited = worked.and_then(|()| self.wait(&kicks));
            if let Err(Broken(why)) = waited {
                self.shared.stop(&why);
                break;
            }
        }
        kicks.iter().map(|(index, _)| *index).zip(rings.into_iter().map(Ring::into_queue)).collect()
    }

    /// Waits until there may be something to do.
    fn wait(&self, kicks: &[(usize, Arc<EventFd>)]) -> Result<(), Broken> {
        let mut fds = vec![PollFd::from_borrowed_fd(descriptor(&self.wake), PollFlags::IN)];
        fds.extend(kicks.iter().map(|(_, kick)| PollFd::from_borrowed_fd(descriptor(kick), PollFlags::IN)));
        fds.extend(self.work.also().map(|also| PollFd::from_borrowed_fd(also, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Broken(format!("it cannot wait: {error}"))),
        }
        for (_, kick) in kicks {
            // An error says that it was not rung.
            kick.read().ok();
        }
        Ok(())
    }
}
