//! The transmission phase: requests of one connection, many at a time, by one thread.
//!
//! ```text
//!   socket --Receiver--> check --Engine--> finished --Outbox--> socket
//! ```
//!
//! # Rules
//! 1. The thread waits only when there is nothing to do: for a request when none is under way, else for whatever comes
//!    first. It never waits for the client while I/O is under way, which holds on to the disk.
//! 2. What is under way is bounded, in requests and in bytes, replies that the client has not taken included. Beyond that
//!    no request is taken.
//! 3. All memory beyond [`OWN`] comes out of a pot that all connections share, also what is only kept for the next request.
//!    A request for which there is none waits in its socket. Who waits has nothing under way; who has, gives up what it
//!    keeps when somebody waits, and if its client then takes no whole reply, or does not send the rest of a request, for
//!    [`Limits::stall`], it ends, also when some bytes of it come now and then. So small requests always go on, and large
//!    ones do after a while, whatever other clients do; but what waits on purpose keeps its memory as long as it waits. A
//!    client that goes while it waits for memory is not waited for.
//! 4. Everything about a request is checked before it is begun ([`check`]); what is refused is answered, and the
//!    connection goes on.
//! 5. Whatever ends the connection, what was begun is finished first. A client that says goodbye, or whose server ends,
//!    gets the replies to what was begun. What waits on purpose, for room or for a limit, is not waited for: it is answered
//!    with ESHUTDOWN, and was not done. Zeros that are written part after part end after the part that was begun, and are
//!    answered so, too, when the server ends.
//!
//! # Why it never sleeps on something undone
//! With anything in the engine, finished or not, it waits there, and for the client as far as that is wanted. Otherwise it
//! waits for the client to take replies if there are some, for memory if a request needs it, a second at most, and for the
//! next request only when all that was received is begun and all replies are sent.
//!
//! # Order
//! Replies come as requests are finished. A flush, or FUA, covers every write that was answered before it was sent, on any
//! connection.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::handshake::Terms;
use super::link::{Link, Watch};
use super::receive::{Incoming, Receiver};
use super::send::Outbox;
use super::server::Limits;
use super::status::{Context, Extents, extents_bytes};
use super::wire::{Command, Errno, PAYLOAD_MAX, Request, command};
use crate::budget::{Pot, Share};
use crate::clock::{self, Instant};
use crate::disk::engine::{self, Done, Engine, Op};
use crate::disk::{BlockDevice, Buffers};
use crate::error::{Error, Kind, Result};
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// Requests under way at most, with the replies that are not sent.
const REQUESTS_MAX: usize = 256;
/// Bytes of them at most, except that one request is taken if there is no other.
const BYTES_MAX: usize = 64 << 20;
/// Bytes of memory that a connection may always have: small requests never wait for other clients.
const OWN: usize = 512 << 10;
/// Bytes of the shared memory that a connection keeps although it does not need them now.
const SLACK: usize = 4 << 20;
/// How often that is looked at, and whether a connection rests or its client has gone.
const LOOK: Duration = Duration::from_secs(1);
/// Threads for what may wait, at most.
const THREADS_MAX: usize = 8;
/// Bytes of zeros that are written at a time, where a hole is not wanted.
const ZEROS: u64 = 1 << 20;

/// What the engine gives back with a request.
#[derive(Debug)]
struct Tag {
    request: Request,
    command: Command,
    step: Step,
    /// What a BLOCK_STATUS found.
    extents: Vec<(u32, Extents)>,
}

/// Where a request is that takes several steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There is one.
    Only,
    /// Zeros are being written; this many bytes are left behind these.
    Zeros(u64),
    /// All is done and only has to become durable.
    Flush,
}

/// A connection after its handshake.
pub(super) struct Session<'a> {
    link: &'a mut Link,
    stopping: &'a AtomicBool,
    watch: Watch,
    engine: Engine<Tag>,
    receiver: Receiver,
    outbox: Outbox,
    buffers: Buffers,
    /// Bytes that the extents under way may have.
    promised: usize,
    /// What it has of the memory that all share.
    share: Share,
    requests: Arc<Pot>,
    stall: Duration,
    /// What the next request needs of it and could not have.
    blocked: Option<usize>,
    /// Since when it is the client's turn: to take the rest of a reply, or to send that of a request. How many replies it
    /// had taken by then.
    moved: Instant,
    taken: u64,
    /// No more requests are taken.
    ended: bool,
    /// The client sends nothing any more; there may be requests that were not taken yet.
    gone: bool,
    read_only: bool,
    /// Last: what the export keeps is let go when nothing is under way any more.
    terms: Terms,
}

impl<'a> Session<'a> {
    /// Begins with what was agreed on.
    ///
    /// # Errors
    /// When the host has no descriptors.
    pub(super) fn new(link: &'a mut Link, terms: Terms, stopping: &'a AtomicBool, limits: &Limits) -> Result<Self> {
        let requests = &limits.budget.requests;
        let cannot = |e| Error::io("cannot watch a connection", e);
        let watch = Watch::new(link).map_err(cannot)?;
        link.wait_at_most(LOOK).map_err(cannot)?;
        Ok(Self {
            link,
            stopping,
            watch,
            engine: Engine::new("nbd-work", THREADS_MAX, Arc::default())?,
            receiver: Receiver::new(),
            outbox: Outbox::default(),
            buffers: Buffers::default(),
            promised: 0,
            share: requests.nothing(),
            requests: Arc::clone(requests),
            stall: limits.stall,
            blocked: None,
            moved: clock::now(),
            taken: 0,
            ended: false,
            gone: false,
            read_only: terms.export.device.read_only(),
            terms,
        })
    }

    /// Serves until the client goes, or breaks the rules.
    ///
    /// # Errors
    /// When the connection broke, or the ring of the engine.
    pub(super) fn run(mut self) -> Result<()> {
        // What has begun and is not finished then, the engine ends when it is dropped.
        self.serve()
    }

    fn serve(&mut self) -> Result<()> {
        let broke = |e: io::Error| Error::io("the connection broke", e);
        loop {
            let quiet = self.outbox.len() == 0;
            let taken = self.take().map_err(broke)?;
            if taken == 1 && self.engine.in_flight() == 1 {
                // A small request that is alone is done then.
                self.engine.submit()?;
            } else if self.engine.in_flight() > 0 {
                let takes = self.takes();
                let sends = self.outbox.len() > 0 || self.link.must_send();
                let watched = self.watch.on(takes, sends, !self.gone).map_err(broke)?;
                self.engine.wait(watched)?;
                self.look_whether_gone(takes);
            }
            while let Some(done) = self.engine.finished() {
                self.finish(done);
            }
            let sent = self.outbox.send(self.link, &mut self.buffers).map_err(broke)?;
            self.settle(taken, quiet);
            if self.engine.in_flight() > 0 {
                continue;
            }
            if sent && self.ended {
                return Ok(());
            }
            if !sent {
                self.wait_for_client().map_err(broke)?;
            } else if let Some(need) = self.blocked {
                // Nothing is under way, so nobody is held up by this.
                if !self.share.wait(need, clock::now() + LOOK) && self.link.is_gone() {
                    self.ended = true;
                }
                self.moved = clock::now();
            }
        }
    }

    /// Finds out that the client has gone although no request can be taken: they may all wait, for room for instance.
    fn look_whether_gone(&mut self, takes: bool) {
        if !takes && !self.gone && self.link.is_gone() {
            self.gone = true;
            self.engine.cancel();
        }
    }

    /// Tells whether another request would be taken if there were one.
    fn takes(&self) -> bool {
        !self.ended && self.blocked.is_none() && !self.is_full()
    }

    fn is_full(&self) -> bool {
        let bytes = self.buffers.lent() + self.outbox.heads() + self.promised;
        self.engine.in_flight() + self.outbox.len() >= REQUESTS_MAX || bytes >= BYTES_MAX
    }

    /// Returns how much of the shared memory is needed for all there is and `more` bytes.
    fn shared(&self, more: usize) -> usize {
        (self.buffers.total() + self.outbox.heads() + self.promised + more).saturating_sub(OWN)
    }

    /// Returns how much memory a request needs beyond what there is.
    fn need(&self, request: &Request) -> usize {
        let length = request.length as usize;
        match request.command() {
            Some(Command::Read | Command::Write) if request.length <= PAYLOAD_MAX => self.buffers.cost(length),
            Some(Command::WriteZeroes) if request.flags & command::NO_HOLE != 0 => {
                self.buffers.cost(length.min(to_usize(ZEROS)))
            }
            Some(Command::BlockStatus) => promise(request, self.terms.contexts.len()),
            _ => 0,
        }
    }

    /// Sees to it that there is memory for a request; false when it has to wait for that.
    fn make_room(&mut self, request: &Request) -> bool {
        self.blocked = None;
        self.buffers.save(false);
        if self.share.grow(self.shared(self.need(request))) {
            return true;
        }
        self.buffers.trim();
        self.buffers.save(true);
        let needed = self.shared(self.need(request));
        if self.share.grow(needed) {
            return true;
        }
        self.blocked = Some(needed);
        false
    }

    /// Gives back what is not needed, and notes whether the client goes on; `quiet` says that it had all replies before.
    fn settle(&mut self, taken: usize, quiet: bool) {
        let idle = || taken > 0 || self.engine.in_flight() > 0 || !self.receiver.has_part();
        let begins = if self.outbox.len() > 0 { quiet } else { idle() };
        if begins || self.outbox.taken() != self.taken {
            (self.moved, self.taken) = (clock::now(), self.outbox.taken());
        }
        let slack = if self.share.units() > 0 && self.requests.is_wanted() {
            self.buffers.trim();
            0
        } else {
            SLACK
        };
        let needed = self.shared(0);
        if self.share.units() > needed + slack {
            self.share.shrink(needed);
        }
    }

    /// Waits until the client takes more of its replies, or sends more where that is wanted.
    fn wait_for_client(&mut self) -> io::Result<()> {
        match self.link.wait(self.takes(), true, Some(clock::now() + LOOK)) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            other => other?,
        }
        self.refuse_stall()
    }

    /// Fails when the client has kept memory too long for which others wait.
    fn refuse_stall(&self) -> io::Result<()> {
        let stalled = self.share.units() > 0 && self.requests.is_wanted() && self.moved.elapsed() >= self.stall;
        if !stalled {
            return Ok(());
        }
        tracing::warn!(
            "a client of NBD export '{}' is disconnected: it has not gone on for {} s while others wait for memory",
            self.terms.export.name,
            self.stall.as_secs()
        );
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Gives up all memory while the client rests; waits without end unless it has sent a part of something.
    fn rest(&mut self) -> io::Result<()> {
        if self.stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        self.buffers.trim();
        let needed = self.shared(0);
        self.share.shrink(needed);
        if self.receiver.has_part() { self.refuse_stall() } else { self.link.wait(true, false, None) }
    }

    /// Begins what was asked for; waits for it when nothing else is to be done. Returns how many requests there were.
    fn take(&mut self) -> io::Result<usize> {
        let mut taken = 0;
        if self.stopping.load(Ordering::Acquire) {
            self.ended = true;
        }
        self.blocked = None;
        while !self.ended {
            while self.takes() {
                if let Some(coming) = self.receiver.coming()
                    && !self.make_room(&coming)
                {
                    break;
                }
                let Some(incoming) = self.receiver.next(&mut self.buffers)? else { break };
                taken += 1;
                self.begin(incoming);
            }
            if !self.takes() || taken > 0 && !self.link.has_more() {
                break;
            }
            let idle = self.engine.in_flight() == 0 && self.outbox.len() == 0 && !self.link.must_send();
            match self.receiver.fill(self.link, idle)? {
                Some(true) => self.refuse_stall()?,
                Some(false) => self.ended = true,
                None => {
                    if idle {
                        self.rest()?;
                    }
                    break;
                }
            }
        }
        if self.ended && !std::mem::replace(&mut self.gone, true) {
            self.engine.cancel();
        }
        Ok(taken)
    }

    fn begin(&mut self, incoming: Incoming) {
        let Incoming { request, payload } = incoming;
        let checked = self.check(&request, payload.is_some());
        let command = match checked {
            Ok(command) => command,
            Err(errno) => {
                payload.into_iter().for_each(|pages| self.buffers.give_back(pages));
                return self.fail(&request, errno);
            }
        };
        let durable = request.flags & command::FUA != 0;
        let no_hole = request.flags & command::NO_HOLE != 0;
        match command {
            Command::Disconnect => self.ended = true,
            Command::Cache => self.outbox.done(request.cookie),
            Command::Flush => self.start(request, command, Op::Flush, None),
            // An empty request: it is all done.
            _ if request.length == 0 => {
                payload.into_iter().for_each(|pages| self.buffers.give_back(pages));
                if command == Command::Read && self.terms.structured {
                    self.outbox.nothing(request.cookie);
                } else {
                    self.outbox.done(request.cookie);
                }
            }
            Command::Read => match self.buffers.take(request.length as usize) {
                Ok(pages) => self.start(request, command, Op::Read, Some(pages)),
                Err(_) => self.fail(&request, Errno::NoMem),
            },
            Command::Write => self.start(request, command, Op::Write { durable }, payload),
            Command::Trim => self.start(request, command, Op::Discard, None),
            Command::WriteZeroes if no_hole => self.begin_zeros(request),
            Command::WriteZeroes => self.start(request, command, Op::WriteZeroes { durable }, None),
            Command::BlockStatus => self.begin_status(request),
        }
    }

    /// Checks a request as far as it goes without beginning it.
    fn check(&self, request: &Request, payload: bool) -> Result<Command, Errno> {
        let command = request.command().ok_or(Errno::Inval)?;
        if request.flags & !command.flags() != 0 {
            return Err(Errno::Inval);
        }
        let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if writes && self.read_only {
            return Err(Errno::Perm);
        }
        let end = request.offset.checked_add(u64::from(request.length));
        let inside = end.is_some_and(|end| end <= self.terms.export.device.size());
        let structured = self.terms.structured;
        match command {
            Command::Flush | Command::Disconnect => Ok(command),
            Command::Read if request.flags & command::DF != 0 && !structured => Err(Errno::Inval),
            Command::Read if request.length > PAYLOAD_MAX => {
                Err(if request.flags & command::DF != 0 { Errno::Overflow } else { Errno::Inval })
            }
            Command::Write if !payload => Err(Errno::Inval),
            Command::Write | Command::WriteZeroes if !inside => Err(Errno::NoSpc),
            _ if !inside => Err(Errno::Inval),
            Command::BlockStatus if request.length == 0 || self.terms.contexts.is_empty() => Err(Errno::Inval),
            // Zeros without a hole are written like anything else.
            Command::WriteZeroes
                if request.flags & command::NO_HOLE != 0 && request.flags & command::FAST_ZERO != 0 =>
            {
                Err(Errno::NotSup)
            }
            _ => Ok(command),
        }
    }

    fn start(&mut self, request: Request, command: Command, op: Op, pages: Option<Pages>) {
        let len = if op == Op::Flush { 0 } else { u64::from(request.length) };
        let tag = Tag { request, command, step: Step::Only, extents: Vec::new() };
        self.give(request.offset, len, op, pages, tag);
    }

    fn give(&mut self, offset: u64, len: u64, op: Op, pages: Option<Pages>, tag: Tag) {
        let device = Arc::clone(&self.terms.export.device);
        self.engine.begin(engine::Request { op, device, offset, len, pages, at: 0, tag });
    }

    /// Begins to write zeros that are not to become a hole.
    fn begin_zeros(&mut self, request: Request) {
        let whole = u64::from(request.length);
        let Ok(mut pages) = self.buffers.take((request.length as usize).min(to_usize(ZEROS))) else {
            return self.fail(&request, Errno::NoMem);
        };
        pages.fill(0);
        // What comes after the first part begins where it suits the disk.
        let first = (ZEROS - request.offset % ZEROS).min(whole);
        let tag = Tag { request, command: Command::WriteZeroes, step: Step::Zeros(whole - first), extents: Vec::new() };
        self.give(request.offset, first, Op::Write { durable: false }, Some(pages), tag);
    }

    fn begin_status(&mut self, request: Request) {
        self.promised += promise(&request, self.terms.contexts.len());
        let contexts = self.terms.contexts.clone();
        let device = Arc::clone(&self.terms.export.device);
        let tag = Tag { request, command: Command::BlockStatus, step: Step::Only, extents: Vec::new() };
        let ask = engine::Request { op: Op::Read, device, offset: request.offset, len: 0, pages: None, at: 0, tag };
        self.engine.call(ask, move |ask| {
            ask.tag.extents = extents(&contexts, &*ask.device, &ask.tag.request)?;
            Ok(())
        });
    }

    fn fail(&mut self, request: &Request, errno: Errno) {
        let read = matches!(request.command(), Some(Command::Read | Command::BlockStatus));
        self.outbox.fail(request.cookie, errno, read && self.terms.structured);
    }

    /// Answers a request that is finished, or goes on with its next step.
    fn finish(&mut self, done: Done<Tag>) {
        let Done { request: engine::Request { offset, len, pages, tag, .. }, result } = done;
        let request = tag.request;
        if tag.command == Command::BlockStatus {
            self.promised -= promise(&request, self.terms.contexts.len());
        }
        if let Err(error) = result {
            pages.into_iter().for_each(|pages| self.buffers.give_back(pages));
            let errno = errno_of(&error);
            if errno == Errno::Io {
                let name = &self.terms.export.name;
                tracing::warn!("NBD export '{name}': {:?} at {} failed: {error}", tag.command, request.offset);
            }
            return self.fail(&request, errno);
        }
        if let Step::Zeros(left) = tag.step
            && left > 0
        {
            if self.stopping.load(Ordering::Acquire) {
                pages.into_iter().for_each(|pages| self.buffers.give_back(pages));
                return self.fail(&request, Errno::Shutdown);
            }
            let next = left.min(ZEROS);
            let tag = Tag { step: Step::Zeros(left - next), ..tag };
            return self.give(offset + len, next, Op::Write { durable: false }, pages, tag);
        }
        let must_flush = matches!(tag.step, Step::Zeros(_)) || tag.command == Command::Trim && tag.step == Step::Only;
        if must_flush && request.flags & command::FUA != 0 {
            pages.into_iter().for_each(|pages| self.buffers.give_back(pages));
            return self.give(0, 0, Op::Flush, None, Tag { step: Step::Flush, ..tag });
        }
        match (tag.command, pages) {
            (Command::BlockStatus, _) => self.outbox.extents(request.cookie, &tag.extents),
            (Command::Read, Some(pages)) if self.terms.structured => {
                let whole = request.flags & command::DF != 0;
                self.outbox.data_chunks(request.cookie, request.offset, pages, request.length as usize, whole);
            }
            (Command::Read, Some(pages)) => self.outbox.data(request.cookie, pages, request.length as usize),
            (_, pages) => {
                pages.into_iter().for_each(|pages| self.buffers.give_back(pages));
                self.outbox.done(request.cookie);
            }
        }
    }
}

/// Returns how much memory the extents that a request asks for have at most.
fn promise(request: &Request, contexts: usize) -> usize {
    contexts * extents_bytes(request.length)
}

/// Finds the extents of all contexts.
fn extents(contexts: &[(u32, Context)], device: &dyn BlockDevice, request: &Request) -> Result<Vec<(u32, Extents)>> {
    let one = request.flags & command::REQ_ONE != 0;
    let of = |(id, context): &(u32, Context)| Ok((*id, context.extents(device, request.offset, request.length, one)?));
    contexts.iter().map(of).collect()
}

/// Returns what the wire has for an error.
fn errno_of(error: &Error) -> Errno {
    match error.kind() {
        Kind::Usage => Errno::Inval,
        Kind::NoSpace => Errno::NoSpc,
        Kind::ReadOnly | Kind::Denied | Kind::Busy => Errno::Perm,
        Kind::Unsupported => Errno::NotSup,
        Kind::Cancelled => Errno::Shutdown,
        _ => Errno::Io,
    }
}
