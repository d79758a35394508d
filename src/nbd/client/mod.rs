//! A client: an export of a server as a block device, which waits for the server when that goes away and goes on when it is
//! back.
//!
//! ```text
//!   threads that ask --> Session --> server
//!                          ^ made anew by the keeper, which asks `seek` where
//! ```
//!
//! # Rules
//! 1. Who asks waits for the answer of a server that is there. A request whose answer did not come before the connection was
//!    lost fails as busy, and so does one while there is no server; it is asked again when the waiting is over
//!    ([`BlockDevice::waits_for`], [`BlockDevice::wait`]), as a disk has it that waits for room. All may be repeated.
//! 2. What was answered is never sent again. That a flush covers what another process of the server had answered is for the
//!    server to hold: it writes down what is not flushed (`store::unflushed`), and where it cannot trust that, the first
//!    flush fails. Such an answer goes to who asked, like any other.
//! 3. On every return `seek` says whether the server still keeps the disk for this client. If it does not, somebody else may
//!    have written to it: the client ends, and every request fails. It never goes on with a disk that is another one.
//! 4. One thread, the keeper, sees that the server is gone and looks for it, also while nobody asks for anything: the disk is
//!    not kept for ever.
//! 5. A client that is cancelled ends all waiting with an error, at once. Who calls requests back ([`BlockDevice::heed`]) gets
//!    them at once where they wait here, and after half a second where the server has not answered by then: it may let them
//!    wait on purpose. The connections are broken for that, and what was under way for others is asked again.
//! 6. A server that makes no sense, again and again, is not asked any more.
//! 7. A request that the server lets wait keeps a thread here, and there are enough for all ([`BlockDevice::threads`]): what
//!    comes after it goes on.
//!
//! # Why not a crate
//! See [`crate::nbd`]; none of those clients survives its server.
//!
//! # After a crash
//! The server sees its connections end, and lets go of what it kept for them.

mod answer;
mod greet;
mod keeper;
mod reader;
mod session;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::wire::{Command, Errno, Request, command, transmission};
use crate::disk::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::store::{Cancel, Go, Lobby, Need};
use crate::sync::Mutex;
use crate::units::to_usize;
pub use session::connect;
use session::{Asked, Session};

/// Bytes of one read or write at most.
pub const PIECE: u64 = 1 << 20;
/// Bytes of one discard or write-zeroes at most, so that none takes long.
const SPAN: u64 = 1 << 30;
/// Connections at most.
pub const CONNECTIONS_MAX: usize = 16;
/// Threads that wait for answers at most: as many as a queue of a guest has requests.
const THREADS: usize = 256;

/// Makes a connection to a server.
type Connect = dyn Fn() -> Result<OwnedFd> + Send + Sync;

/// Where a server is.
#[derive(Clone)]
pub struct Place {
    /// The name of the export.
    name: String,
    connect: Arc<Connect>,
}

impl Place {
    /// An export of the server that listens on a socket.
    #[must_use]
    pub fn at(socket: &Path, name: &str) -> Self {
        let socket = socket.to_owned();
        Self::through(name.to_owned(), move || connect(&socket))
    }

    /// An export of a server that is reached in some other way; `connect` makes a connection, a stream.
    #[must_use]
    pub fn through(name: String, connect: impl Fn() -> Result<OwnedFd> + Send + Sync + 'static) -> Self {
        Self { name, connect: Arc::new(connect) }
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What was found when a server was looked for.
#[derive(Debug)]
pub enum Sought {
    /// It is here.
    At(Place),
    /// It is not there yet.
    Later(Error),
    /// What was used is not there any more, or is another one.
    Never(Error),
}

/// How long the server may take for what was called back.
const CALL_TIME: Duration = Duration::from_millis(500);

/// Looks for the server; told whether it was there before, so that it has to be the same disk.
pub type Seek = dyn Fn(bool) -> Sought + Send + Sync;

/// The state of a client.
#[derive(Debug)]
enum Now {
    Connected(Arc<Session>),
    Waiting,
    Ended(Error),
}

/// What the keeper and those who ask share.
struct Shared {
    seek: Box<Seek>,
    /// For the log.
    title: String,
    connections: usize,
    now: Mutex<Now>,
    /// Those who wait for the server. Taken before `now`.
    waiting: Mutex<Vec<Waiter>>,
    /// What calls back requests.
    calls: Mutex<Vec<Weak<Cancel>>>,
    /// Requests that were asked and not answered.
    under_way: AtomicUsize,
    /// The keeper asks somebody who may never answer.
    seeking: AtomicBool,
    /// Wakes the keeper.
    bell: OwnedFd,
    cookie: AtomicU64,
    size: AtomicU64,
    flags: u16,
}

/// Somebody who waits for the server.
struct Waiter {
    cancel: Arc<Cancel>,
    go: Go,
}

/// The client.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("title", &self.title).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects, up to `connections` times. `title` is what the log calls it.
    ///
    /// # Errors
    /// What keeps it from being used now.
    pub fn open(title: &str, connections: usize, seek: Box<Seek>) -> Result<Self> {
        let place = match seek(false) {
            Sought::At(place) => place,
            Sought::Later(error) | Sought::Never(error) => return Err(error),
        };
        let connections = connections.clamp(1, CONNECTIONS_MAX);
        let session = Session::open(&place, connections).map_err(|e| e.context(title))?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("cannot make an eventfd", e.into()))?;
        let shared = Arc::new(Shared {
            seek,
            title: title.to_owned(),
            connections,
            waiting: Mutex::default(),
            calls: Mutex::default(),
            under_way: AtomicUsize::new(0),
            seeking: AtomicBool::new(false),
            bell,
            cookie: AtomicU64::new(1),
            size: AtomicU64::new(session.terms().size),
            flags: session.terms().flags,
            now: Mutex::new(Now::Connected(Arc::new(session))),
        });
        let kept = Arc::clone(&shared);
        let keeper = std::thread::Builder::new()
            .name("nbd-keeper".into())
            .spawn(move || keeper::keep(&kept))
            .map_err(|e| Error::io("cannot start a thread", e))?;
        Ok(Self { shared, keeper: Some(keeper) })
    }

    /// Tells whether the server is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(&*self.shared.now.lock(), Now::Connected(session) if !session.is_broken())
    }

    /// Tells whether requests wait until it is there again.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.shared.is_away()
    }

    /// Ends it: every request fails from now on, also those that wait.
    pub fn cancel(&self) {
        self.shared.end(Error::failed(format!("{} is not used any more", self.shared.title)));
    }

    /// As a write that is flushed before it returns.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    pub fn write_durable(&self, data: &[u8], offset: u64) -> Result<()> {
        if self.shared.has(transmission::SEND_FUA) {
            return self.put(data, offset, command::FUA);
        }
        self.put(data, offset, 0)?;
        self.flush()
    }

    fn put(&self, data: &[u8], offset: u64, flags: u16) -> Result<()> {
        self.check(offset, data.len() as u64, true)?;
        let mut at = 0;
        while at < data.len() {
            let len = self.shared.piece(offset + at as u64).min(data.len() - at);
            let part = &data[at..at + len];
            self.shared.ask(Command::Write, flags, offset + at as u64, len as u64, part, None)?;
            at += len;
        }
        Ok(())
    }

    /// Sends a request for a range in parts.
    fn span(&self, command: Command, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = ((at / SPAN + 1) * SPAN).min(end);
            self.shared.ask(command, 0, at, next - at, &[], None)?;
            at = next;
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64, writes: bool) -> Result<()> {
        if writes && self.read_only() {
            return Err(Error::read_only(format!("{} is only read", self.shared.title)));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(Error::usage(format!("bytes {offset} to {offset}+{len} are beyond {}", self.shared.title)));
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let now = std::mem::replace(&mut *self.shared.now.lock(), Now::Ended(Error::failed("it is closed")));
        if let Now::Connected(session) = now {
            session.disconnect();
        }
        self.shared.look();
        // Who asks somebody that never answers keeps nobody from ending.
        let seeks = self.shared.seeking.load(Ordering::SeqCst);
        if seeks {
            return;
        }
        if self.keeper.take().is_some_and(|keeper| keeper.join().is_err()) {
            tracing::error!("the thread that looks for the server of {} panicked", self.shared.title);
        }
    }
}

impl Shared {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn ring(&self) {
        // Any number but none; full means that it is rung already.
        rustix::io::write(&self.bell, &[1; size_of::<u64>()]).ok();
    }

    /// Ends all waiting.
    fn end(&self, error: Error) {
        let mut now = self.now.lock();
        match &*now {
            Now::Ended(_) => return,
            Now::Connected(session) => session.end(),
            Now::Waiting => {}
        }
        *now = Now::Ended(error);
        drop(now);
        self.look();
    }

    /// Returns the session with the server.
    fn session(&self) -> Result<Arc<Session>> {
        match &*self.now.lock() {
            Now::Connected(session) if !session.is_broken() => return Ok(Arc::clone(session)),
            Now::Ended(error) => return Err(error.again()),
            // The keeper sees it soon, and sooner when told.
            Now::Connected(_) => self.ring(),
            Now::Waiting => {}
        }
        Err(self.away())
    }

    fn away(&self) -> Error {
        Error::busy(format!("{} waits for its server", self.title))
    }

    /// Tells whether it is worth waiting for the server.
    fn is_away(&self) -> bool {
        match &*self.now.lock() {
            Now::Connected(session) => session.is_broken(),
            Now::Waiting => true,
            Now::Ended(_) => false,
        }
    }

    /// Lets those go who need not wait, or were called back.
    fn release(&self) {
        let (called_back, free) = {
            let mut waiting = self.waiting.lock();
            let called_back: Vec<_> = waiting.extract_if(.., |waiter| waiter.cancel.holds(true)).collect();
            let free = if self.is_away() { Vec::new() } else { std::mem::take(&mut *waiting) };
            (called_back, free)
        };
        for Waiter { go, .. } in called_back {
            go(Err(Error::new(Kind::Cancelled, "the request was called back")));
        }
        free.into_iter().for_each(|Waiter { go, .. }| go(Ok(())));
    }

    /// Tells whether somebody wants requests back that the server has not answered.
    fn is_called(&self) -> bool {
        let mut calls = self.calls.lock();
        calls.retain(|cancel| cancel.strong_count() > 0);
        let called = calls.iter().filter_map(Weak::upgrade).any(|cancel| cancel.holds(false));
        called && self.under_way.load(Ordering::SeqCst) > 0
    }

    /// Returns how much of a range is read or written at once, from here.
    fn piece(&self, offset: u64) -> usize {
        let largest = match &*self.now.lock() {
            Now::Connected(session) => u64::from(session.terms().largest),
            Now::Waiting | Now::Ended(_) => PIECE,
        };
        let piece = PIECE.min(largest);
        to_usize(piece - offset % piece)
    }

    /// Asks, and waits for the answer of a server that is there.
    fn ask(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
        data: &[u8],
        into: Option<&mut [u8]>,
    ) -> Result<()> {
        let length = u32::try_from(len).expect("requests are cut into pieces");
        let session = self.session()?;
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let request = Request { flags, kind: command as u16, cookie, offset, length };
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let asked = session.ask(&request, data, into.as_ref().map(|into| into.len()));
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        match asked {
            Asked::Done(Ok(read)) => {
                if let Some(into) = into {
                    into.copy_from_slice(&read);
                }
                return Ok(());
            }
            // It does no more of this kind: the next one will.
            Asked::Done(Err(Errno::Shutdown)) => session.end(),
            Asked::Done(Err(errno)) => return Err(self.failed(command, offset, errno)),
            Asked::Lost => {}
        }
        // One that has ended says why.
        self.session().and(Err(self.away()))
    }

    fn failed(&self, command: Command, offset: u64, errno: Errno) -> Error {
        let kind = match errno {
            Errno::Perm => Kind::ReadOnly,
            Errno::NoSpc => Kind::NoSpace,
            Errno::Inval | Errno::Overflow => Kind::Usage,
            Errno::NotSup => Kind::Unsupported,
            Errno::Io | Errno::NoMem | Errno::Shutdown => Kind::Io,
        };
        Error::new(kind, format!("{}: the server answers {errno:?} to {command:?} at {offset}", self.title))
    }
}

impl Lobby for Shared {
    fn look(&self) {
        self.release();
        self.ring();
    }
}

impl BlockDevice for Client {
    fn size(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64, false)?;
        let mut at = 0;
        while at < buf.len() {
            let len = self.shared.piece(offset + at as u64).min(buf.len() - at);
            let part = &mut buf[at..at + len];
            self.shared.ask(Command::Read, 0, offset + at as u64, len as u64, &[], Some(part))?;
            at += len;
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.put(data, offset, 0)
    }

    fn waits_for(&self, error: &Error) -> Option<Need> {
        // Who has come back meanwhile is asked again at once.
        let ended = || matches!(*self.shared.now.lock(), Now::Ended(_));
        (error.kind() == Kind::Busy && !ended()).then_some(Need::Server)
    }

    fn wait(&self, _need: Need, cancel: &Arc<Cancel>, go: Go) {
        // Before it is asked whether it holds.
        self.heed(cancel);
        self.shared.waiting.lock().push(Waiter { cancel: Arc::clone(cancel), go });
        self.shared.release();
    }

    fn threads(&self) -> usize {
        THREADS
    }

    fn heed(&self, cancel: &Arc<Cancel>) {
        let mut calls = self.shared.calls.lock();
        if !calls.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(cancel))) {
            calls.push(Arc::downgrade(cancel));
            cancel.enter(Arc::downgrade(&self.shared) as Weak<dyn Lobby>);
        }
    }

    fn flush(&self) -> Result<()> {
        if !self.shared.has(transmission::SEND_FLUSH) {
            // Only where nothing is written.
            return Ok(());
        }
        self.shared.ask(Command::Flush, 0, 0, 0, &[], None)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len, true)?;
        // A discard is a wish.
        if self.shared.has(transmission::SEND_TRIM) { self.span(Command::Trim, offset, len) } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len, true)?;
        if self.shared.has(transmission::SEND_WRITE_ZEROES) {
            return self.span(Command::WriteZeroes, offset, len);
        }
        let zeros = vec![0; to_usize(PIECE.min(len))];
        let mut at = offset;
        while at < offset + len {
            let part = to_usize((offset + len - at).min(PIECE));
            self.put(&zeros[..part], at, 0)?;
            at += part as u64;
        }
        Ok(())
    }

    /// The server is not asked: all of it may be data.
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let size = self.size();
        Ok((offset < size).then_some((offset, size)))
    }

    fn mapped(&self) -> u64 {
        self.size()
    }

    fn read_only(&self) -> bool {
        self.shared.has(transmission::READ_ONLY)
    }
}
