//! Many requests to disks under way at once, by one thread: what stands between the storage core and the protocols that
//! guests and clients speak.
//!
//! ```text
//!   request -> Engine::begin --ring------> host files --\
//!               |      ^     \--may block-> workers -----> Engine::finished -> answer
//!               |      |                     |
//!               \-----waiting room <--------/  no room, and the disk waits for it
//! ```
//!
//! # Rules
//! 1. Whoever uses an engine never waits for one request: reads and writes of whole blocks go to an io_uring
//!    ([`BlockDevice::begin_read`], [`BlockDevice::begin_write`]), whatever may block goes to other threads, of which there
//!    are few. What waits on purpose, for room or for a limit, takes no thread; all that comes after it goes on.
//! 2. What the fast way finds unusual or wrong it does not answer: it is done again in the ordinary way, which knows.
//! 3. A request has been done when it is finished, in no particular order, and a write is durable after a flush that was
//!    begun after the write was finished.
//! 4. The thread does nothing beside that waits for writes to end (a snapshot, a resize, a flush): its own would have to.
//! 5. An engine that is dropped, for whatever reason, ends what is under way first, and calls back what waits on purpose.
//!    Its user can do that earlier, and gets those requests back as [`crate::error::Kind::Cancelled`]: they were not done.
//! 6. A mistake of ours (a panic) fails its request and nothing else.
//!
//! # Why it never sleeps on something undone
//! A request is under way until [`Engine::finished`] has returned it. What is finished is looked for before each sleep, and
//! the ring itself does not wait while it has a finished job or has seen a watched descriptor readable. Whenever
//! other threads have anything their bell is watched, from before the sleep on; they ring it after they have put something
//! back, and it is silenced before that is taken.
//!
//! # Why
//! A thread for each request takes turns with the others on the CPUs; `tests/bench/disk` at depth 16 spent more time
//! switching than working. One thread that gives the host all it has with one system call needs none of that.
//!
//! # After a crash
//! What was not finished was done, or not, block by block.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags};

use super::patience::Patience;
use super::{BlockDevice, Writing};
use crate::error::{Error, Result};
use crate::store::{Cancel, Extent, Located, Need};
use crate::sync::Mutex;
use crate::sys::pages::Pages;
use crate::sys::ring::{ALONE_MAX, Job, Piece, Ring};
use crate::units::to_usize;
use crate::workers::Workers;

/// Entries of the ring: pieces that the host has at a time before it has to be asked to take more.
const RING_ENTRIES: u32 = 256;
/// Bytes of a write whose checksums are computed while it is on its way.
const LARGE: usize = 64 << 10;
/// Numbers of watched descriptors.
const RETURNED: u32 = 0;
const CALLER: u32 = 1;

/// What is asked of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Reads into the memory.
    Read,
    /// Writes what is in the memory; with `durable` it is flushed before it is finished.
    Write {
        /// As with FUA.
        durable: bool,
    },
    /// Makes all that was finished before durable.
    Flush,
    /// Unmaps whole blocks.
    Discard,
    /// Makes the range read as zeros; with `durable` it is flushed before it is finished.
    WriteZeroes {
        /// As with FUA.
        durable: bool,
    },
}

/// A request.
#[derive(Debug)]
pub struct Request<T> {
    /// What is to be done,
    pub op: Op,
    /// to what,
    pub device: Arc<dyn BlockDevice>,
    /// where, in bytes,
    pub offset: u64,
    /// and how far, in bytes; 0 for a flush.
    pub len: u64,
    /// The memory of a read or write; `at + len` bytes at least.
    pub pages: Option<Pages>,
    /// Where in the memory the data begins: on a page, or direct I/O is not possible.
    pub at: usize,
    /// What the caller has to remember.
    pub tag: T,
}

/// A request that is finished.
#[derive(Debug)]
pub struct Done<T> {
    /// The request, with its memory.
    pub request: Request<T>,
    /// How it went.
    pub result: Result<()>,
}

#[derive(Debug)]
struct Flight<T> {
    request: Request<T>,
    what: What,
}

#[derive(Debug)]
enum What {
    /// The guard keeps what is read readable.
    Read(Located),
    Write(Writing),
}

/// What comes back from other threads.
#[derive(Debug)]
struct Back<T> {
    done: Vec<Done<T>>,
    /// What has waited, and is to be attempted.
    again: Vec<Request<T>>,
}

/// What the engine shares with the other threads.
#[derive(Debug)]
struct Shared<T> {
    workers: Workers,
    back: Mutex<Back<T>>,
    bell: OwnedFd,
    cancel: Arc<Cancel>,
}

/// The engine; used by the thread that made it.
#[derive(Debug)]
pub struct Engine<T: Send + 'static> {
    /// `None` where the host allows none: then the other threads do everything.
    ring: Option<Ring<Flight<T>>>,
    shared: Arc<Shared<T>>,
    /// Requests that the other threads have, or that wait.
    aside: usize,
    /// One that is small, for a device to which it is one system call ([`BlockDevice::is_prompt`]): done by the thread itself if
    /// no other comes before the next [`Self::submit`].
    alone: Option<Request<T>>,
    done: VecDeque<Done<T>>,
    patience: Patience,
}

impl<T> Request<T> {
    fn range(&self) -> std::ops::Range<usize> {
        self.at..self.at + to_usize(self.len)
    }

    fn data(&self) -> &[u8] {
        self.pages.as_ref().map_or(&[], |pages| &pages[self.range()])
    }

    /// Does it in the ordinary way.
    fn run(&mut self) -> Result<()> {
        let (device, offset, len) = (Arc::clone(&self.device), self.offset, self.len);
        let durable = match self.op {
            Op::Read => {
                let range = self.range();
                let pages = self.pages.as_mut().map_or(&mut [][..], |pages| &mut pages[range]);
                device.read(pages, offset)?;
                false
            }
            Op::Write { durable } => {
                device.write(self.data(), offset)?;
                durable
            }
            Op::Flush => true,
            Op::Discard => {
                device.discard(offset, len)?;
                false
            }
            Op::WriteZeroes { durable } => {
                device.write_zeroes(offset, len)?;
                durable
            }
        };
        if durable { device.flush() } else { Ok(()) }
    }
}

/// Runs it; a panic is an error.
fn guarded<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::failed("the request failed on a mistake in this program")))
}

impl<T: Send + 'static> Engine<T> {
    /// Makes an engine with at most `threads` other threads for what may block; all but one are started when they are needed.
    /// `cancel` calls back what waits on purpose.
    ///
    /// # Errors
    /// When the host has no more descriptors or threads.
    pub fn new(name: &'static str, threads: usize, cancel: Arc<Cancel>) -> Result<Self> {
        let fail = |e: rustix::io::Errno| Error::io("cannot make an eventfd", e.into());
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fail)?;
        let ring =
            Ring::new(RING_ENTRIES).inspect_err(|e| tracing::info!("no io_uring ({e}): threads do its work")).ok();
        Ok(Self {
            ring,
            shared: Arc::new(Shared {
                workers: Workers::new(name, threads, |_| (), 0).map_err(|e| Error::io("cannot start a thread", e))?,
                back: Mutex::new(Back { done: Vec::new(), again: Vec::new() }),
                bell,
                cancel,
            }),
            aside: 0,
            alone: None,
            done: VecDeque::new(),
            patience: Patience::default(),
        })
    }

    /// Returns how many requests are under way, or finished and not yet taken.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let alone = usize::from(self.alone.is_some());
        self.ring.as_ref().map_or(0, Ring::in_flight) + self.aside + alone + self.done.len()
    }

    /// Begins a request. It goes to the host with the next [`Self::submit`] or [`Self::wait`].
    ///
    /// # Panics
    /// When the memory of a read or write is missing or too short: that is for the caller to check.
    pub fn begin(&mut self, request: Request<T>) {
        let moves = matches!(request.op, Op::Read | Op::Write { .. });
        let enough = request.pages.as_ref().is_some_and(|pages| {
            usize::try_from(request.len)
                .is_ok_and(|len| request.at.checked_add(len).is_some_and(|end| end <= pages.len()))
        });
        assert!(!moves || enough, "a read or write has memory for its data");
        if moves && let Some(need) = request.device.take_turn(request.len) {
            self.aside += 1;
            return self.shared.wait(request, need);
        }
        self.start(request);
    }

    /// Calls back what waits on purpose, now and later; it comes back as `Cancelled`.
    pub fn cancel(&self) {
        self.shared.cancel.cancel();
    }

    /// Begins a request that has had its turn.
    fn start(&mut self, request: Request<T>) {
        let refused = match request.op {
            Op::Read => self.begin_read(request),
            Op::Write { durable: false } => self.begin_write(request),
            _ => Some(request),
        };
        let Some(request) = refused else { return };
        let moves = matches!(request.op, Op::Read | Op::Write { durable: false });
        let small = moves && request.len <= ALONE_MAX as u64 && request.device.is_prompt();
        if small && self.in_flight() == 0 {
            self.alone = Some(request);
        } else {
            self.company();
            self.run_aside(request);
        }
    }

    /// Lets the one that was alone go aside: it has company, or is waited for.
    fn company(&mut self) {
        if let Some(alone) = self.alone.take() {
            self.run_aside(alone);
        }
    }

    /// Gives a request to another thread.
    fn run_aside(&mut self, mut request: Request<T>) {
        self.aside += 1;
        self.shared.run(move |shared| {
            let result = guarded(|| request.run());
            shared.end(request, result);
        });
    }

    /// Begins a read in the ring, or gives it back.
    fn begin_read(&mut self, mut request: Request<T>) -> Option<Request<T>> {
        let Some(ring) = &mut self.ring else { return Some(request) };
        let begin = || request.device.begin_read(to_usize(request.len), request.offset);
        let Some(located) = guarded(begin).ok().flatten() else { return Some(request) };
        let range = request.range();
        let pages = request.pages.as_mut().expect("checked by the caller");
        for hole in &located.holes {
            pages[range.start + hole.start..range.start + hole.end].fill(0);
        }
        if located.extents.is_empty() {
            self.done.push_back(Done { request, result: Ok(()) });
            return None;
        }
        let pieces = pieces(&located.extents, request.at);
        push(ring, request, false, pieces, What::Read(located));
        None
    }

    /// Begins a write in the ring, or gives it back.
    fn begin_write(&mut self, request: Request<T>) -> Option<Request<T>> {
        let Some(ring) = &mut self.ring else { return Some(request) };
        let begin = || request.device.begin_write(to_usize(request.len), request.offset);
        let Some(writing) = guarded(begin).ok().flatten() else { return Some(request) };
        let (pieces, range) = (pieces(&writing.extents(), request.at), request.range());
        let large = range.len() >= LARGE;
        let job = push(ring, request, true, pieces, What::Write(writing));
        if large && ring.submit().is_ok() {
            // The device is at work meanwhile.
            if let Some((flight, memory)) = ring.written(job)
                && let What::Write(writing) = &mut flight.what
            {
                writing.checksum(&memory[range]);
            }
        }
        None
    }

    /// Has another thread do `work` instead of what the request says; what it finds goes into the tag.
    pub fn call(&mut self, mut request: Request<T>, work: impl FnOnce(&mut Request<T>) -> Result<()> + Send + 'static) {
        self.aside += 1;
        self.shared.run(move |shared| {
            let result = guarded(|| work(&mut request));
            shared.put(Done { request, result });
        });
    }

    /// Gives the host what was begun. A small request that is alone is done here and now: that is the quickest.
    ///
    /// # Errors
    /// When the ring fails; what is under way cannot be finished any more then.
    pub fn submit(&mut self) -> Result<()> {
        if let Some(mut request) = self.alone.take() {
            let result = guarded(|| request.run());
            self.done.push_back(Done { request, result });
        }
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let alone = self.aside == 0 && ring.run_alone();
        if !alone && ring.pending() > 0 {
            ring.submit().map_err(ring_failed)?;
        }
        self.harvest();
        Ok(())
    }

    /// Gives the host what was begun and waits until something is finished or `readable` can be read, whichever is first.
    /// May return for no reason.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn wait(&mut self, readable: Option<BorrowedFd<'_>>) -> Result<()> {
        self.watch(readable)?;
        let ready = self.ring.as_mut().is_some_and(Ring::is_ready);
        if !ready {
            self.look(|| false)?;
        }
        if self.done.is_empty() { self.sleep(readable) } else { Ok(()) }
    }

    /// Gives the host what was begun and looks for something finished, or what `other` finds, as long as that was quicker
    /// than [`Self::sleep`] lately; tells whether there is something.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn look(&mut self, mut other: impl FnMut() -> bool) -> Result<bool> {
        self.watch(None)?;
        if let Some(ring) = &mut self.ring {
            ring.submit().map_err(ring_failed)?;
        }
        self.harvest();
        if !self.done.is_empty() {
            return Ok(true);
        }
        let Some(ring) = &mut self.ring else { return Ok(false) };
        Ok(self.patience.look(|| ring.has_completions() || other()))
    }

    /// Waits as [`Self::wait`] does, without looking first.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn sleep(&mut self, readable: Option<BorrowedFd<'_>>) -> Result<()> {
        self.watch(readable)?;
        match &mut self.ring {
            Some(ring) => {
                let ready = ring.is_ready();
                let waited = if ready { ring.wait() } else { self.patience.sleep(|| ring.wait()) };
                waited.map_err(ring_failed)?;
            }
            None => self.poll(readable)?,
        }
        self.harvest();
        Ok(())
    }

    /// Makes the ring tell of `readable` and of the other threads.
    fn watch(&mut self, readable: Option<BorrowedFd<'_>>) -> Result<()> {
        self.company();
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if self.aside > 0 {
            ring.watch(RETURNED, self.shared.bell.as_fd()).map_err(ring_failed)?;
        }
        if let Some(fd) = readable {
            ring.watch(CALLER, fd).map_err(ring_failed)?;
        }
        Ok(())
    }

    /// As [`Self::wait`], without a ring.
    fn poll(&self, readable: Option<BorrowedFd<'_>>) -> Result<()> {
        let bell = PollFd::new(&self.shared.bell, PollFlags::IN);
        let mut fds: Vec<_> =
            std::iter::once(bell).chain(readable.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))).collect();
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::io("cannot wait for requests", error.into())),
        }
    }

    /// Returns a request that is finished.
    pub fn finished(&mut self) -> Option<Done<T>> {
        self.done.pop_front()
    }

    /// Ends what the ring and the other threads have finished.
    fn harvest(&mut self) {
        while let Some(job) = self.ring.as_mut().and_then(Ring::finished) {
            self.end(job);
        }
        if self.aside > 0 {
            let Back { done, again } = self.shared.take();
            self.aside -= done.len() + again.len();
            self.done.extend(done);
            again.into_iter().for_each(|request| self.start(request));
        }
    }

    fn end(&mut self, job: Job<Flight<T>>) {
        let Job { pages, pieces, tag: Flight { mut request, what }, .. } = job;
        request.pages = Some(pages);
        match what {
            What::Read(located) => {
                drop(located);
                if pieces.iter().all(|piece| piece.transferred().is_ok_and(|got| got == piece.len)) {
                    self.done.push_back(Done { request, result: Ok(()) });
                } else {
                    self.run_aside(request);
                }
            }
            What::Write(writing) => {
                let written: Vec<_> = pieces.iter().map(Piece::transferred).collect();
                match guarded(|| request.device.end_write(writing, request.data(), &written)) {
                    Ok(true) => self.settle(request),
                    ended => self.done.push_back(Done { request, result: ended.map(drop) }),
                }
            }
        }
    }

    /// Flushes a disk that has too many changes before the write is finished.
    fn settle(&mut self, request: Request<T>) {
        self.aside += 1;
        self.shared.run(move |shared| {
            let result = guarded(|| request.device.flush());
            shared.put(Done { request, result });
        });
    }
}

impl<T: Send + 'static> Drop for Engine<T> {
    /// Ends what is under way: claims and gates of the disks are held by it.
    fn drop(&mut self) {
        self.cancel();
        while self.in_flight() > 0 {
            if let Err(error) = self.wait(None) {
                tracing::error!("requests to a disk cannot be ended: {error}");
                return;
            }
            self.done.clear();
        }
    }
}

impl<T: Send + 'static> Shared<T> {
    /// Has another thread do something.
    fn run(self: &Arc<Self>, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let shared = Arc::clone(self);
        self.workers.run(move || work(&shared));
    }

    /// Ends an attempt: a write that found no room may have to wait for it.
    fn end(self: &Arc<Self>, request: Request<T>, result: Result<()>) {
        match result.as_ref().err().and_then(|error| request.device.waits_for(error)) {
            Some(need) => self.wait(request, need),
            None => self.put(Done { request, result }),
        }
    }

    /// Lets a request wait and come back to the engine then.
    fn wait(self: &Arc<Self>, request: Request<T>, need: Need) {
        let (shared, device) = (Arc::clone(self), Arc::clone(&request.device));
        let go = move |turn: Result<()>| match turn {
            Ok(()) => {
                shared.back.lock().again.push(request);
                shared.ring_bell();
            }
            Err(error) => shared.put(Done { request, result: Err(error) }),
        };
        device.wait(need, &self.cancel, Box::new(go));
    }

    fn put(&self, done: Done<T>) {
        self.back.lock().done.push(done);
        self.ring_bell();
    }

    fn ring_bell(&self) {
        // It fails only when it counts to 2^64: then it is readable anyway.
        rustix::io::write(&self.bell, &1u64.to_le_bytes()).ok();
    }

    fn take(&self) -> Back<T> {
        // In this order: what is put in between rings again.
        rustix::io::read(&self.bell, &mut [0; 8]).ok();
        let mut back = self.back.lock();
        Back { done: std::mem::take(&mut back.done), again: std::mem::take(&mut back.again) }
    }
}

fn ring_failed(error: io::Error) -> Error {
    Error::io("the io_uring of the host failed", error)
}

/// Queues a job with the memory of its request; returns its number.
fn push<T>(ring: &mut Ring<Flight<T>>, mut request: Request<T>, write: bool, pieces: Vec<Piece>, what: What) -> usize {
    let pages = request.pages.take().expect("checked by the caller");
    ring.push(Job { pages, write, pieces, tag: Flight { request, what } })
}

/// Returns the pieces of a job whose data begins at `at` in its memory.
pub(crate) fn pieces(extents: &[Extent], at: usize) -> Vec<Piece> {
    let piece = |extent: &Extent| Piece {
        file: Arc::clone(&extent.file),
        offset: extent.offset,
        at: at + extent.from,
        len: extent.len,
        result: 0,
    };
    extents.iter().map(piece).collect()
}
