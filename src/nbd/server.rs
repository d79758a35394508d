//! The server: who is connected, and the end of it.
//!
//! # Rules
//! 1. One thread for each connection, and no more connections than allowed, nor than there are descriptors for: one too many
//!    is closed at once. So clients leave the pool the descriptors that it needs for its files.
//! 2. A connection that fails, or whose thread panics, takes nothing with it but itself.
//! 3. The end: no new connections; what is under way is finished and answered; then connections are closed, also those
//!    whose clients do not take their replies within [`STOP_TIME`]. When it returns, everything exported is let go, except
//!    by a connection whose I/O the host does not end within that time once more: it can still write, so it keeps its lease
//!    until it cannot, and the log says so.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::Shutdown;

use super::Exports;
use super::handshake::Handshake;
use super::link::Link;
use super::listen::{Listen, Listener};
use super::serve::Session;
use super::tls::Tls;
use crate::budget::Budget;
use crate::clock;
use crate::error::{Error, Result, lacks_descriptors};
use crate::sync::{Condvar, Mutex};

/// How long the end of the server waits for clients to take their replies, and then for I/O under way.
const STOP_TIME: Duration = Duration::from_secs(10);
/// How long a handshake takes at most. The longest is that of a program that asks about each of a thousand exports.
const HANDSHAKE: Duration = Duration::from_secs(60);
/// How long a client keeps others waiting for memory at most.
const STALL: Duration = Duration::from_secs(30);
/// Descriptors of a connection: its socket, and what its engine and its waiting need.
const DESCRIPTORS: usize = 4;
/// How long accepting rests when the host has no descriptor or thread left.
const REST: Duration = Duration::from_millis(100);

/// How to serve.
#[derive(Debug)]
pub struct Options {
    /// Where.
    pub listen: Listen,
    /// TLS, which is then forced.
    pub tls: Option<Tls>,
    /// How much.
    pub limits: Limits,
}

/// What clients may take of the server.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// How long a client may take for the whole handshake.
    pub handshake: Duration,
    /// How long a client may keep memory for which others wait without taking a reply or sending a request.
    pub stall: Duration,
    /// What it shares with other servers of the process.
    pub budget: Budget,
}

impl Limits {
    /// Allows so many connections, out of this budget.
    #[must_use]
    pub fn new(connections: usize, budget: Budget) -> Self {
        Self { connections, handshake: HANDSHAKE, stall: STALL, budget }
    }
}

/// A running server; it ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    listener: Listener,
    tls: Option<Tls>,
    limits: Limits,
    exports: Arc<dyn Exports>,
    stopping: AtomicBool,
    /// By a number that is theirs alone.
    connections: Mutex<HashMap<u64, Arc<OwnedFd>>>,
    left: Condvar,
    /// Connections that were one too many; a log line is written for the first, second, fourth and so on.
    refused: AtomicU64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// Binds, and serves from then on.
///
/// # Errors
/// `Busy` when somebody else listens there; any error of the host.
pub fn start(options: Options, exports: Arc<dyn Exports>) -> Result<Server> {
    let shared = Arc::new(Shared {
        listener: Listener::bind(&options.listen)?,
        tls: options.tls,
        limits: options.limits,
        exports,
        stopping: AtomicBool::new(false),
        connections: Mutex::default(),
        left: Condvar::new(),
        refused: AtomicU64::new(0),
    });
    let accepting = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name("nbd-accept".into())
        .spawn(move || accept(&accepting))
        .map_err(|e| Error::io("cannot start the NBD server", e))?;
    Ok(Server { shared, thread: Some(thread) })
}

impl Server {
    /// Returns where it listens: a path, or an address with its port.
    #[must_use]
    pub fn address(&self) -> String {
        self.shared.listener.address.clone()
    }

    /// Returns how many clients are connected.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().len()
    }

    /// Parts with who is connected, for what was agreed on with them is out of date: what is under way is finished and
    /// answered, and they may connect again. Returns at once.
    pub fn part(&self) {
        for socket in self.shared.connections.lock().values() {
            // A thread that waits for a request finds the end instead.
            rustix::net::shutdown(socket, Shutdown::Read).ok();
        }
    }

    /// Ends it: no new connections, what is under way is finished and answered, everything is let go.
    pub fn stop(self) {
        drop(self);
    }

    /// As [`Self::stop`], with so much time for clients to take their replies, and then for I/O under way. When that was not
    /// enough, returns what waits until it was.
    pub fn stop_within(mut self, patience: Duration) -> Option<Box<dyn FnOnce() + Send>> {
        if self.end(patience) {
            return None;
        }
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || {
            let mut connections = shared.connections.lock();
            while !connections.is_empty() {
                shared.left.wait(&mut connections);
            }
        }))
    }

    /// Ends it; tells whether everything is let go.
    fn end(&mut self, patience: Duration) -> bool {
        let Some(thread) = self.thread.take() else { return true };
        let shared = &self.shared;
        shared.stopping.store(true, Ordering::Release);
        shared.listener.close();
        if thread.join().is_err() {
            tracing::error!("the thread that accepts NBD connections panicked");
        }
        // A thread that waits for a request finds the end instead.
        for (how, late) in [(Shutdown::Read, "take their replies"), (Shutdown::Both, "end: their I/O is under way")] {
            let mut connections = shared.connections.lock();
            for socket in connections.values() {
                // One that is closed already needs it no more.
                rustix::net::shutdown(socket, how).ok();
            }
            let deadline = clock::now() + patience;
            while !connections.is_empty() && !shared.left.wait_until(&mut connections, deadline).timed_out() {}
            if connections.is_empty() {
                return true;
            }
            tracing::warn!("{} NBD connections do not {late}", connections.len());
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(STOP_TIME);
    }
}

fn accept(shared: &Arc<Shared>) {
    let mut told = false;
    for number in 0.. {
        let accepted = shared.listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok(socket) => {
                told = false;
                begin(shared, number, socket);
            }
            Err(error) => {
                if lacks_descriptors(&error) && !std::mem::replace(&mut told, true) {
                    tracing::error!(
                        "no NBD client can connect now, for this process has no more descriptors: {error}; raise the limit of \
                         open files: LimitNOFILE=, ulimit -n"
                    );
                }
                tracing::debug!("no NBD connection was accepted: {error}");
                // Out of descriptors, or the client has gone again.
                clock::sleep(REST);
            }
        }
    }
}

fn begin(shared: &Arc<Shared>, number: u64, socket: OwnedFd) {
    let socket = Arc::new(socket);
    let Some(descriptors) = shared.limits.budget.descriptors.take(DESCRIPTORS) else {
        return shared.refuse("there are no descriptors for it");
    };
    {
        let mut connections = shared.connections.lock();
        if connections.len() >= shared.limits.connections {
            drop(connections);
            return shared.refuse(&format!("there are {} already", shared.limits.connections));
        }
        connections.insert(number, Arc::clone(&socket));
    }
    let own = Arc::clone(shared);
    let serve = move || {
        if catch_unwind(AssertUnwindSafe(|| serve(&own, socket))).is_err() {
            tracing::error!("an NBD connection ended on a mistake in this program");
        }
        drop(descriptors);
        own.forget(number);
    };
    if let Err(error) = std::thread::Builder::new().name(format!("nbd-{number}")).spawn(serve) {
        tracing::error!("the host has no thread for an NBD connection: {error}");
        shared.forget(number);
    }
}

impl Shared {
    /// Counts a connection that is closed at once.
    fn refuse(&self, why: &str) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            tracing::warn!("an NBD connection was closed, for {why} ({refused} so far)");
        }
    }

    fn forget(&self, number: u64) {
        self.connections.lock().remove(&number);
        self.left.notify_all();
    }
}

/// Serves a connection to its end.
fn serve(shared: &Shared, socket: Arc<OwnedFd>) {
    let mut link = Link::new(socket);
    let handshake = Handshake::new(&mut link, &*shared.exports, shared.tls.as_ref(), &shared.stopping, &shared.limits);
    let ended = handshake.run().map_err(|e: io::Error| Error::io("the handshake failed", e)).and_then(|terms| {
        let Some(terms) = terms else { return Ok(()) };
        tracing::debug!("an NBD client uses '{}'", terms.export.name);
        Session::new(&mut link, terms, &shared.stopping, &shared.limits)?.run()
    });
    if let Err(error) = ended {
        tracing::debug!("an NBD connection ended: {error}");
    }
    link.end();
}
