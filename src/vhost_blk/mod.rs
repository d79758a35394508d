//! Disks for virtual machines of any VMM that speaks vhost-user: QEMU, Cloud Hypervisor, libkrun and others.
//!
//! The guest sees a virtio block device. Its requests and their data are in its memory, which the VMM (the front end)
//! shares with this program over a Unix socket; from then on the VMM is not involved.
//!
//! ```text
//!   VMM --messages--> server, session       set up: memory, queues, descriptors to wake each other
//!   guest --rings in its memory--> queue    one thread each: request -> BlockDevice -> answer
//! ```
//!
//! # Rules
//! 1. What a guest or a front end says is checked before it is used: a bad request ends that request, a bad ring that queue,
//!    a bad message that connection; none ends the server.
//! 2. A flush is answered when every write answered before it is durable.
//! 3. Before a queue stops, what it took is finished. What could not be, because the server was killed or the request waits
//!    on purpose (for room, for a limit), is done again by the next one (see `inflight`).
//! 4. Guest memory is only ever copied from and to. No descriptor of a front end makes anybody wait: see `sent`.
//! 5. What front ends take of memory for requests and of descriptors is paid out of what all clients of the process share
//!    ([`crate::budget`]); beyond that a queue does one part of a request after another, and a front end is refused.
//! 6. The end of a server waits for what is under way, but not for ever: what the host does not end within ten seconds
//!    can still write, so it keeps its lease until it cannot, and the log says so.
//!
//! # After a crash
//! The disk is as after a power cut; a VMM that reconnects (QEMU: `reconnect-ms`) resumes where it was.
//!
//! [`chain`], [`request`] and `service` serve devices of other kinds, too: those of a VMM of our own.

mod bell;
pub mod chain;
pub(crate) mod config;
mod flight;
mod inflight;
mod memory;
mod queue;
pub mod request;
mod sent;
mod server;
pub(crate) mod service;
mod session;

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::budget::Budget;
use crate::clock;
use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::media::socket::Socket;
use server::Shared;
use service::Target;

/// Front ends that may wait to be accepted.
const BACKLOG: i32 = 16;
/// How long the end of a server waits for I/O under way.
const STOP_TIME: Duration = Duration::from_secs(10);
/// Queues of a device at most.
const QUEUES_MAX: usize = 64;

/// How a disk is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where front ends connect.
    pub socket: PathBuf,
    /// Queues that are offered, 1 to 64; more than the guest has processors are of no use.
    pub queues: usize,
    /// What the guest sees as the serial number; cut to 20 bytes.
    pub serial: String,
    /// What its queues share with other clients of the process.
    pub budget: Budget,
}

/// A disk that is served, until this is dropped.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("queues", &self.shared.queues).finish_non_exhaustive()
    }
}

/// Serves a disk: listens at once, answers from threads of its own. `keep`, such as a lease, is dropped when it is
/// all over.
///
/// # Errors
/// `Usage` for a number of queues that cannot be; `Busy` or `Exists` when the path is taken; any error of the host.
pub fn start(options: Options, device: Arc<dyn BlockDevice>, keep: Box<dyn Any + Send + Sync>) -> Result<Server> {
    if !(1..=QUEUES_MAX).contains(&options.queues) {
        return Err(Error::usage(format!("{} queues cannot be: a device has 1 to {QUEUES_MAX}", options.queues)));
    }
    let target = Arc::new(Target::new(device, false, &options.serial, options.budget.requests));
    let host = |e| Error::io("cannot serve a disk over vhost-user", e);
    let shared = Arc::new(Shared::new(target, options.queues, options.budget.descriptors).map_err(host)?);
    let socket = Socket::listen(&options.socket, BACKLOG)?;
    socket.listener().set_nonblocking(true).map_err(host)?;
    let thread = server::run(socket, Arc::clone(&shared), keep).map_err(host)?;
    Ok(Server { shared, thread: Some(thread) })
}

impl Server {
    /// Tells the guest, if there is one, that the size of the disk has changed.
    pub fn resized(&self) {
        self.shared.tell_changed();
    }

    /// Tells whether a front end is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.shared.connected()
    }

    /// Finishes what is in flight and stops; what takes too long is left to end by itself.
    pub fn stop(self) {
        drop(self);
    }

    /// As [`Self::stop`], and this long is not too long. When that was not enough, returns what waits until it was.
    pub fn stop_within(mut self, patience: Duration) -> Option<Box<dyn FnOnce() + Send>> {
        if self.end(patience) {
            return None;
        }
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || while !shared.wait_for_end(clock::now() + STOP_TIME) {}))
    }

    /// Ends it; tells whether everything is let go.
    fn end(&mut self, patience: Duration) -> bool {
        let Some(thread) = self.thread.take() else { return true };
        self.shared.stop();
        let ended = self.shared.wait_for_end(clock::now() + patience);
        if !ended {
            tracing::warn!(
                "a vhost-user server does not end: its I/O is under way, and it keeps its disk until that ends"
            );
        } else if thread.join().is_err() {
            tracing::error!("the server of a disk failed on a mistake in this program");
        }
        ended
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(STOP_TIME);
    }
}
