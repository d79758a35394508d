//! A server that is there: one connection to it, or several, from the handshake until one of them is lost.
//!
//! # Rules
//! 1. Who asks sends its request and waits for its answer. Of those who wait on a connection one reads, for all: no thread
//!    stands between the socket and who asked. It wakes who has its answer, and when it goes, one that reads on: any number
//!    may wait without being woken for each other.
//! 2. When one connection is lost all are: what is asked again then finds a server that has ended what it was doing for the
//!    old ones, so an old write never comes after a new one.
//! 3. Each wait ends when the session breaks.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use super::Place;
use super::answer::Answer;
use super::greet::{Terms, greet, senseless};
use super::reader::{Broken, Reader};
use crate::error::{Error, Result};
use crate::media::socket::ShortPath;
use crate::nbd::link::Link;
use crate::nbd::wire::{Command, Errno, Reply, Request, transmission};
use crate::sync::{Mutex, MutexGuard};

/// What comes of asking.
#[derive(Debug)]
pub(super) enum Asked {
    /// What was read, or what the server says against it.
    Done(Result<Vec<u8>, Errno>),
    /// The session broke before the answer: nobody knows whether it was done.
    Lost,
}

/// The session.
#[derive(Debug)]
pub(super) struct Session {
    terms: Terms,
    wires: Vec<Wire>,
    turn: AtomicUsize,
    broken: AtomicBool,
    /// Why, and whether what came made no sense.
    why: Mutex<Option<Broken>>,
}

/// One connection.
#[derive(Debug)]
struct Wire {
    socket: Arc<OwnedFd>,
    sending: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// By cookie: what is waited for, but for the one that is being read.
    waits: HashMap<u64, Wait>,
    /// `None` while somebody reads.
    reader: Option<Box<Reader>>,
    broken: bool,
}

#[derive(Debug)]
struct Wait {
    answer: Answer,
    asker: Thread,
    /// It has sent its request, and sleeps until it is woken.
    sleeps: bool,
}

impl State {
    fn sleeps(&mut self, cookie: u64, sleeps: bool) {
        if let Some(wait) = self.waits.get_mut(&cookie) {
            wait.sleeps = sleeps;
        }
    }

    fn wake_all(&self) {
        self.waits.values().for_each(|wait| wait.asker.unpark());
    }

    /// Has somebody else read, who sleeps. Who still sends looks by itself, and must not be counted on: the server may take
    /// nothing more until its replies are read.
    fn pass_on(&self) {
        if self.reader.is_some()
            && let Some(next) = self.waits.values().find(|wait| wait.sleeps && !wait.answer.is_done())
        {
            next.asker.unpark();
        }
    }
}

impl Session {
    /// Connects `count` times to a server, or once if the server does not promise that this makes no difference.
    ///
    /// # Errors
    /// Those of the host and of the handshake.
    pub(super) fn open(place: &Place, count: usize) -> Result<Self> {
        let (first, terms) = Wire::open(place)?;
        let mut wires = vec![first];
        if terms.has(transmission::CAN_MULTI_CONN) {
            for _ in 1..count {
                let (wire, others) = Wire::open(place)?;
                if (others.flags, others.structured) != (terms.flags, terms.structured) {
                    return Err(senseless("it is different on each connection"));
                }
                wires.push(wire);
            }
        }
        Ok(Self { terms, wires, turn: AtomicUsize::new(0), broken: AtomicBool::new(false), why: Mutex::new(None) })
    }

    /// Returns what was agreed on.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Returns the sockets, for who looks whether the server has gone.
    pub(super) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.wires.iter().map(|wire| wire.socket.as_fd())
    }

    /// Tells whether it is over.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Returns why it broke, and whether what came made no sense.
    pub(super) fn reason(&self) -> (String, bool) {
        self.why.lock().as_ref().map_or_else(
            || ("the server closed the connection".to_owned(), false),
            |broken| (broken.why.clone(), broken.senseless),
        )
    }

    /// Ends it: who waits is told that its request is lost.
    pub(super) fn end(&self) {
        self.broken.store(true, Ordering::Release);
        self.wires.iter().for_each(Wire::end);
    }

    /// Says goodbye, without waiting, and ends it.
    pub(super) fn disconnect(&self) {
        let goodbye = Request { flags: 0, kind: Command::Disconnect as u16, cookie: 0, offset: 0, length: 0 };
        for wire in &self.wires {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            // The end of the connection says the same.
            rustix::net::send(&wire.socket, &goodbye.encode(), flags).ok();
        }
        self.end();
    }

    /// Asks, and waits for the answer; `read` is the bytes that come back.
    pub(super) fn ask(&self, request: &Request, data: &[u8], read: Option<usize>) -> Asked {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let wire = &self.wires[turn % self.wires.len()];
        match wire.ask(request, data, Answer::new(request.offset, read, self.terms.structured)) {
            Ok(Some(answer)) => Asked::Done(answer.finish()),
            Ok(None) => Asked::Lost,
            Err(broken) => {
                self.why.lock().get_or_insert(broken);
                self.end();
                Asked::Lost
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

/// Connects to a socket in the file system.
///
/// # Errors
/// Those of the host.
pub fn connect(path: &Path) -> Result<OwnedFd> {
    let cannot = |e: io::Error| Error::io(format!("cannot connect to {}", path.display()), e);
    let short = ShortPath::of(path).map_err(cannot)?;
    let connect = || -> io::Result<OwnedFd> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(short.path())?)?;
        Ok(socket)
    };
    connect().map_err(cannot)
}

impl Wire {
    fn open(place: &Place) -> Result<(Self, Terms)> {
        let socket = Arc::new((place.connect)()?);
        let terms = greet(&mut Link::new(Arc::clone(&socket)), &place.name)?;
        let reader = Some(Box::new(Reader::new(Arc::clone(&socket))));
        let state = State { waits: HashMap::new(), reader, broken: false };
        Ok((Self { socket, sending: Mutex::new(()), state: Mutex::new(state) }, terms))
    }

    fn end(&self) {
        let mut state = self.state.lock();
        state.broken = true;
        // Whoever sends or reads finds the end; one that is over already is not connected.
        rustix::net::shutdown(&self.socket, Shutdown::Both).ok();
        state.wake_all();
    }

    /// Returns the answer; `None` when somebody else found that the connection is lost.
    fn ask(&self, request: &Request, data: &[u8], answer: Answer) -> Result<Option<Answer>, Broken> {
        let cookie = request.cookie;
        {
            let mut state = self.state.lock();
            if state.broken {
                return Ok(None);
            }
            state.waits.insert(cookie, Wait { answer, asker: std::thread::current(), sleeps: false });
        }
        self.send(&request.encode(), data).map_err(|error| Broken::io(&error))?;
        let mut state = self.state.lock();
        loop {
            if state.waits.get(&cookie).is_some_and(|wait| wait.answer.is_done()) {
                state.pass_on();
                return Ok(state.waits.remove(&cookie).map(|wait| wait.answer));
            }
            if state.broken {
                return Ok(None);
            }
            let Some(mut reader) = state.reader.take() else {
                // It is not there while somebody reads the answer, who wakes this one then.
                state.sleeps(cookie, true);
                // Woken in between, it returns at once.
                MutexGuard::unlocked(&mut state, std::thread::park);
                state.sleeps(cookie, false);
                continue;
            };
            let read = MutexGuard::unlocked(&mut state, || self.read(&mut reader));
            state.reader = Some(reader);
            if read.is_err() {
                state.broken = true;
                state.wake_all();
            }
            read?;
        }
    }

    /// Reads a reply and gives it to who waits for it.
    fn read(&self, reader: &mut Reader) -> Result<(), Broken> {
        let reply = reader.header()?;
        let (Reply::Simple { cookie, .. } | Reply::Chunk { cookie, .. }) = reply;
        // Taken out meanwhile: only who reads touches it.
        let taken = {
            let mut state = self.state.lock();
            let waits = state.waits.get(&cookie).is_some_and(|wait| !wait.answer.is_done());
            if waits { state.waits.remove(&cookie) } else { None }
        };
        let mut wait = taken.ok_or_else(|| Broken::senseless("it answers what nobody asked"))?;
        let took = wait.answer.take(reply, reader);
        let mut state = self.state.lock();
        // Under the lock: woken before its answer is there, it would sleep again.
        wait.asker.unpark();
        state.waits.insert(cookie, wait);
        took
    }

    fn send(&self, header: &[u8], data: &[u8]) -> io::Result<()> {
        let _turn = self.sending.lock();
        let (mut sent, all) = (0, header.len() + data.len());
        while sent < all {
            let (head, body) = (&header[sent.min(header.len())..], &data[sent.saturating_sub(header.len())..]);
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            let now = rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(&self.socket, &parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
            })?;
            sent += now;
        }
        Ok(())
    }
}
