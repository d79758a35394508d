//! A client: an export of a server as a block device, which waits for the server when that goes away and goes on when it is
//! back.
//!
//! ```text
//!   threads that ask --> Session --> server
//!                          ^ made anew by the keeper, which asks `seek` where
//! ```
//!
//! # Rules
//! 1. Who asks waits for the answer. A request whose answer did not come before the connection was lost is sent again, by who
//!    asked, for as long as that takes; all of them may be repeated. So the memory of the client is what those who ask wait
//!    with, a piece of [`PIECE`] each.
//! 2. What was answered is never sent again. That a flush covers what another process of the server had answered is for the
//!    server to hold: it writes down what is not flushed (`store::unflushed`), and where it cannot trust that, the first
//!    flush fails. Such an answer goes to who asked, like any other.
//! 3. On every return `seek` says whether the server still keeps the disk for this client. If it does not, somebody else may
//!    have written to it: the client ends, and every request fails. It never goes on with a disk that is another one.
//! 4. One thread, the keeper, sees that the server is gone and looks for it, also while nobody asks for anything: the disk is
//!    not kept for ever.
//! 5. A client that is cancelled ends all waiting with an error, at once.
//! 6. A server that makes no sense, again and again, is not asked any more.
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
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;

use super::wire::{Command, Errno, Request, command, transmission};
use crate::disk::BlockDevice;
use crate::error::{Error, Kind, Result};
use crate::sync::{Condvar, Mutex};
use crate::units::to_usize;
use session::{Asked, Session};

/// Bytes of one read or write at most.
pub const PIECE: u64 = 1 << 20;
/// Bytes of one discard or write-zeroes at most, so that none takes long.
const SPAN: u64 = 1 << 30;
/// Connections at most.
pub const CONNECTIONS_MAX: usize = 16;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its socket.
    pub path: PathBuf,
    /// The name of the export.
    pub name: String,
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
    changed: Condvar,
    /// Wakes the keeper.
    bell: OwnedFd,
    cookie: AtomicU64,
    size: AtomicU64,
    flags: u16,
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
        let session = Session::open(&place.path, &place.name, connections).map_err(|e| e.context(title))?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("cannot make an eventfd", e.into()))?;
        let shared = Arc::new(Shared {
            seek,
            title: title.to_owned(),
            connections,
            changed: Condvar::new(),
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
        self.shared.ring();
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
        self.changed.notify_all();
        self.ring();
    }

    /// Waits for the server.
    fn session(&self) -> Result<Arc<Session>> {
        let mut now = self.now.lock();
        loop {
            match &*now {
                Now::Connected(session) if !session.is_broken() => return Ok(Arc::clone(session)),
                Now::Ended(error) => return Err(error.again()),
                // The keeper sees it soon, and sooner when told.
                Now::Connected(_) => self.ring(),
                Now::Waiting => {}
            }
            self.changed.wait(&mut now);
        }
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

    /// Asks until there is an answer.
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
        loop {
            let session = self.session()?;
            let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
            let request = Request { flags, kind: command as u16, cookie, offset, length };
            match session.ask(&request, data, into.as_ref().map(|into| into.len())) {
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
            self.ring();
        }
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
