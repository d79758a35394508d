//! Firecracker: the memory of one of its machines comes from a checkpoint, over its protocol for userfaultfd.
//!
//! ```text
//! open the checkpoint -> listen -> one connection: regions and userfaultfd -> fill, and answer faults -> its process has ended
//! ```
//!
//! # Rules
//! 1. One connection is served, and nobody else can connect after it. One that says nothing and hangs up is none: somebody looked
//!    whether there is a socket.
//! 2. Each side sees the end of the other: this one watches the process that connected (by its pidfd), and keeps the connection
//!    open, so that who watches that sees it close when this process ends, however it does.
//! 3. A part that cannot be had becomes a SIGBUS for whoever touches it, and is logged with the reason; all else goes on. Where the host
//!    cannot do that the machine is killed: it would wait for ever, or go on with something else.
//! 4. Memory that the machine gives back (its balloon) is zeros from then on, never what the checkpoint has.
//! 5. When all memory is there the checkpoint is closed, and nothing is watched any more. This process stays until the machine ends.
//! 6. Asked to end ([`Stop`]) before all is there, it ends when all is that can be had; asked twice, at once. What is missing is a
//!    SIGBUS then.
//!
//! Memory of another process is reached by the userfaultfd that it sent and by nothing else: see [`crate::sys::userfaultfd`].
//!
//! # After a crash
//! There is nothing on disk. The machine waits for what it touches until somebody ends it: rule 2 is for that.

mod handshake;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;

pub use handshake::{Layout, decode};

use super::restore::{Event, Failure, RestoreFigures, RestoreOptions, Restorer, Touched};
use super::watch::Watch;
use crate::checkpoint::{Access, Folder, Name, PageBlock, Reader};
use crate::clock::{self, Instant};
use crate::error::{Error, Kind, Result};
use crate::media::socket::Socket;
use crate::sys::peer::Process;
use crate::sys::userfaultfd::Userfault;
use handshake::Message;

/// How often it is looked whether this is to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long a process may take to end that has no memory any more.
const LAST_BREATH: Duration = Duration::from_secs(1);
/// How long a connection may take to say what it has to.
const PATIENCE: Duration = Duration::from_secs(10);

/// How urgently it was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It was not.
    No,
    /// When that harms nobody.
    Soon,
    /// Now.
    Now,
}

/// What happens, as it does.
#[derive(Debug)]
pub enum News<'a> {
    /// The socket is there.
    Listens,
    /// A machine is served.
    Connected {
        /// The number of its process, if that can be seen from here.
        pid: Option<i32>,
        /// Its memory.
        layout: &'a Layout,
    },
    /// A part could not be had.
    Failed(&'a Failure),
    /// All its memory is there.
    Filled,
    /// It was asked to end, and does when all is there.
    Ending(RestoreFigures),
}

/// What is served, and how it is told.
pub struct Serve<'a> {
    /// Where the checkpoint is.
    pub folder: &'a Folder,
    /// Its name.
    pub name: &'a Name,
    /// Where to listen.
    pub socket: &'a Path,
    /// How urgently it is asked to end.
    pub stop: &'a dyn Fn() -> Stop,
    /// Hears what happens.
    pub news: &'a dyn Fn(&News<'_>),
}

impl std::fmt::Debug for Serve<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serve").field("name", self.name).field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Served {
    /// The process of the machine; `null` when it could not be seen.
    pub pid: Option<i32>,
    /// Bytes of a page of its memory.
    pub page_size: u64,
    /// Regions of its memory.
    pub regions: usize,
    /// The machine was ended because its memory could not be had.
    pub killed: bool,
    /// How its memory came.
    #[serde(flatten)]
    pub figures: RestoreFigures,
}

/// Serves one machine until it has ended.
///
/// # Errors
/// Those of the checkpoint and of the socket; `Failed` for a connection that is not understood, and when it was ended
/// before all memory was there; `Cancelled` when it was asked to end before somebody connected.
pub fn serve(order: &Serve<'_>) -> Result<Served> {
    // Before anybody can connect: who does has no way back.
    let reader = Reader::open(order.folder, order.name, Access::Cached)?;
    for layer in reader.layers() {
        // All of the index: a machine that has connected could not be served without it.
        layer.places(PageBlock(0), layer.geometry().page_blocks(), |_, _| Ok(()))?;
    }
    let touched = Touched::load(order.folder, order.name, reader.header());
    let socket = Socket::listen(order.socket, 1)?;
    (order.news)(&News::Listens);
    let (link, message) = accept(order, &socket)?;
    drop(socket);
    let host = |error| Error::io("the process that connected cannot be watched", error);
    let peer = Peer { process: Process::of_peer(&link).map_err(host)?, link };
    let (layout, descriptor) = message.take(reader.geometry())?;
    let faults = Userfault::sent(descriptor).map_err(|error| Error::io("what connected is not served", error))?;
    (order.news)(&News::Connected { pid: peer.number(), layout: &layout });
    let (page_size, regions) = (layout.page, layout.regions.len());
    let options = RestoreOptions { touched, ..RestoreOptions::default() };
    let begun = Watch::elsewhere(faults, layout.regions, layout.geometry, layout.page)
        .and_then(|watch| Restorer::begin(&watch, reader, options).map(|restorer| (watch, restorer)));
    let mut served =
        Served { pid: peer.number(), page_size, regions, killed: false, figures: RestoreFigures::default() };
    let (_watch, restorer) = match begun {
        Ok(begun) => begun,
        // Of a process that is gone the kernel says that it has no memory.
        Err(_) if peer.has_ended(LAST_BREATH) => return Ok(served),
        // It cannot do without its memory any more, and nobody else can give it.
        Err(error) => return Err(peer.kill(&error.to_string()).err().unwrap_or(error)),
    };
    let ended = attend(order, &peer, &restorer, &mut served.killed);
    if let Err(error) = restorer.touched().store(order.folder, order.name) {
        tracing::debug!("what the machine touched first is not noted: {error}");
    }
    served.figures = restorer.figures();
    ended.map(|()| served)
}

/// Waits for a connection that says something, all of it.
fn accept(order: &Serve<'_>, socket: &Socket) -> Result<(UnixStream, Message)> {
    let host = |error| Error::io(format!("cannot accept connections on {}", order.socket.display()), error);
    loop {
        wait_for_bytes(order, socket, None)?;
        let (link, _) = socket.listener().accept().map_err(host)?;
        let until = clock::now() + PATIENCE;
        let mut message = Message::default();
        while !message.is_whole() {
            wait_for_bytes(order, &link, Some(until))?;
            if !message.receive(&link)? {
                break;
            }
        }
        if !message.is_empty() {
            return Ok((link, message));
        }
    }
}

fn wait_for_bytes(order: &Serve<'_>, from: &impl std::os::fd::AsFd, until: Option<Instant>) -> Result<()> {
    while !is_ready(from, LOOK).map_err(|error| Error::io("cannot wait for Firecracker", error))? {
        if (order.stop)() != Stop::No {
            return Err(Error::new(Kind::Cancelled, "nobody had connected when it was asked to end"));
        }
        if until.is_some_and(|until| clock::now() >= until) {
            return Err(Error::failed(format!("what connected said too little in {} seconds", PATIENCE.as_secs())));
        }
    }
    Ok(())
}

/// Waits until there is something to read, or the end of it, for so long at most.
fn is_ready(what: &impl std::os::fd::AsFd, time: Duration) -> io::Result<bool> {
    let time = Timespec::try_from(time).expect("it is short");
    match rustix::event::poll(&mut [PollFd::new(what, PollFlags::IN)], Some(&time)) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        found => Ok(found? > 0),
    }
}

/// The machine.
struct Peer {
    /// Its process, if that can be seen.
    process: Option<Process>,
    link: UnixStream,
}

impl Peer {
    fn number(&self) -> Option<i32> {
        self.process.as_ref().map(Process::number)
    }

    /// Tells whether it has ended, after so long at most.
    fn has_ended(&self, wait: Duration) -> bool {
        let ended = match &self.process {
            Some(process) => is_ready(process, wait),
            // It says nothing more, so this is the end of the connection, which it keeps open since version 1.12.
            None => is_ready(&self.link, wait),
        };
        ended.unwrap_or_else(|error| {
            tracing::error!("whether the machine has ended cannot be told: {error}");
            true
        })
    }

    /// Ends it.
    fn kill(&self, why: &str) -> Result<()> {
        let told = format!("the machine was ended, for memory that cannot be had would hold it up for ever: {why}");
        match self.process.as_ref().map(Process::kill) {
            Some(Ok(())) => {
                tracing::error!("{told}");
                Ok(())
            }
            other => {
                let error = other.and_then(Result::err).map_or("it cannot be seen".to_owned(), |e| e.to_string());
                Err(Error::failed(format!("the machine waits for memory that cannot be had: {why}"))
                    .hint(format!("end its process; this one could not ({error})")))
            }
        }
    }
}

/// Attends to the machine until it has ended, or this is to end.
fn attend(order: &Serve<'_>, peer: &Peer, restorer: &Restorer, killed: &mut bool) -> Result<()> {
    let (mut filled, mut ending) = (false, false);
    while !peer.has_ended(if filled { LOOK } else { Duration::ZERO }) {
        match (order.stop)() {
            Stop::No => {}
            _ if filled => return Ok(()),
            // What could not be had does not come any more.
            Stop::Soon if ending && !is_coming(restorer) => return Err(cut_off(peer, restorer)?),
            Stop::Now => return Err(cut_off(peer, restorer)?),
            Stop::Soon if ending => {}
            Stop::Soon => {
                ending = true;
                (order.news)(&News::Ending(restorer.figures()));
            }
        }
        if filled {
            continue;
        }
        match restorer.event(LOOK) {
            Event::Nothing => {}
            Event::Filled => {
                filled = true;
                (order.news)(&News::Filled);
            }
            Event::Failed(failure) => {
                (order.news)(&News::Failed(&failure));
                if let Err(error) = restorer.poison(failure.block) {
                    peer.kill(&format!("{} ({error})", failure.error))?;
                    *killed = true;
                }
            }
            Event::Broken(error) => {
                cut_off(peer, restorer)?;
                return Err(error);
            }
            Event::Stopped => return Err(Error::failed("memory is not filled any more")),
        }
    }
    Ok(())
}

/// Tells whether there is memory that is missing and may still come.
fn is_coming(restorer: &Restorer) -> bool {
    let figures = restorer.figures();
    figures.left > figures.failed
}

/// Lets go of a machine of which not all memory is there; returns what to say of that.
fn cut_off(peer: &Peer, restorer: &Restorer) -> Result<Error> {
    let left = restorer.figures().left;
    if let Err(error) = restorer.poison_rest() {
        peer.kill(&error.to_string())?;
    }
    Ok(Error::failed(format!("it was ended before all memory was there: {left} page blocks are missing for good")))
}
