//! The fast way through a mount: one thread takes requests off the device, many at a time, and has their I/O done by an
//! io_uring; what may block goes to other threads, and what is neither read, write nor sync goes to fuser. What waits on
//! purpose has no thread ([`super::waits`]).
//!
//! ```text
//!   /dev/fuse --read--> loop --ring--> host files --> loop --answer--> /dev/fuse
//!                        |  \--may block-> workers -----answer-------> /dev/fuse
//!                        \--all others--> socket -> fuser -> socket -> /dev/fuse
//! ```
//!
//! # Rules
//! 1. The thread of the loop never waits while it has I/O under way, except for that I/O or a request. A small request
//!    that comes alone it does itself; what comes meanwhile is then taken together.
//! 2. A read or write is answered when its I/O is done and, for a write, mapped ([`crate::disk::Writing`]).
//! 3. What the fast way finds wrong or unusual it does not answer: it is done again in the ordinary way, which knows.
//! 4. A handler that panics is answered with EIO and takes nothing else with it. A panic elsewhere ends the mount.
//!
//! # Why it never sleeps on something undone
//! It waits for the kernel's next request alone only when the ring has no job, finished or not; else in the ring, which does
//! not wait while it has a finished one. Whatever other threads have they answer themselves.
//!
//! # Why
//! fuser's threads each wait for the I/O of one request, so sixteen requests are sixteen threads that take turns on the
//! CPUs: `tests/bench/disk` at depth 16 spent more time switching than working. One thread that submits all it finds with
//! one system call needs none of that.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::SendFlags;

use super::begin::BegunWrite;
use super::errno::{Answer, Errno};
use super::fuse_ahead::{Ahead, Found};
use super::fuse_device::{DATA, Device};
use super::fuse_wire::{self as wire, Header, Transfer};
use super::stale;
use super::state::Tree;
use super::waits::{Asker, Errand, Halt, Waits};
use crate::clock;
use crate::disk::pieces;
use crate::store::Located;
use crate::sys::pages::Pages;
use crate::sys::ring::{Job, Piece, Ring};

/// Requests that are under way in the ring at most; more stay with the kernel until one is done.
const IN_FLIGHT_MAX: usize = 64;
/// Requests that are taken before their I/O is begun.
const BATCH: usize = 16;
/// A request that is there so soon after the last answer was there before it.
const QUICK: Duration = Duration::from_micros(4);
/// After so many requests that came one at a time the next is expected to be alone.
const SINGLES: u32 = 8;
/// Bytes of a write whose checksums are computed while it is on its way.
const LARGE: usize = 64 << 10;

/// A request whose I/O is under way.
#[derive(Debug)]
pub(super) struct Flight {
    unique: u64,
    transfer: Transfer,
    what: What,
}

#[derive(Debug)]
enum What {
    /// So many bytes are there; the guard keeps them readable.
    Read(usize, Located),
    Write(BegunWrite),
    /// Read before it was asked for, see [`super::fuse_ahead`]; the number says for which stretch.
    Ahead(u64, Located),
}

/// A read or write that is done by another thread. One that is dropped is answered with EIO: who asked waits for an answer.
struct Move {
    device: Arc<Device>,
    unique: u64,
    transfer: Transfer,
    /// Gone with the answer.
    pages: Option<Pages>,
}

impl Move {
    fn data(&mut self) -> &mut [u8] {
        let len = self.transfer.size as usize;
        &mut self.pages.as_mut().expect("not answered yet")[DATA..DATA + len]
    }

    /// Takes the memory, to answer now.
    fn take_pages(&mut self) -> Pages {
        self.pages.take().expect("answered once")
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        if let Some(pages) = self.pages.take() {
            self.device.fail(self.unique, libc::EIO);
            self.device.give_back(pages);
        }
    }
}

struct Reading(Move);

struct Writing(Move);

impl Errand for Reading {
    type Done = usize;

    fn attempt(&mut self, tree: &Tree, _had_turn: bool) -> Result<usize, Halt> {
        let transfer = self.0.transfer;
        Ok(tree.read(transfer.handle, self.0.data(), transfer.offset)?)
    }

    fn answer(mut self, answer: Answer<usize>) {
        let mut pages = self.0.take_pages();
        let Move { device, unique, .. } = &self.0;
        match answer {
            Ok(len) => device.send_data(*unique, &mut pages, len),
            Err(errno) => device.fail(*unique, errno.0),
        }
        device.give_back(pages);
    }
}

impl Errand for Writing {
    type Done = usize;

    fn attempt(&mut self, tree: &Tree, _had_turn: bool) -> Result<usize, Halt> {
        let transfer = self.0.transfer;
        tree.write(transfer.handle, self.0.data(), transfer.offset, transfer.flags)
    }

    fn answer(mut self, answer: Answer<usize>) {
        let pages = self.0.take_pages();
        let Move { device, unique, .. } = &self.0;
        match answer {
            Ok(len) => device.send(&wire::written(*unique, u32::try_from(len).expect("no request is longer"))),
            Err(errno) => device.fail(*unique, errno.0),
        }
        device.give_back(pages);
    }
}

impl Header {
    fn asker(&self) -> Asker {
        Asker { unique: self.unique, thread: self.thread }
    }
}

/// How requests came lately.
#[derive(Debug, Default)]
struct Habit {
    /// So many times in a row there was one at a time.
    singles: u32,
}

impl Habit {
    /// Tells whether it is not worth a system call to ask for another request before the one job is done.
    fn alone(&self, ring: &Ring<Flight>) -> bool {
        self.singles >= SINGLES && ring.in_flight() == 1
    }

    fn ran_alone(&mut self) {
        self.singles = self.singles.saturating_add(1);
    }
}

/// The loop of one mount.
pub(super) struct Loop {
    pub(super) tree: Arc<Tree>,
    pub(super) device: Arc<Device>,
    pub(super) waits: Arc<Waits>,
    /// Where fuser reads requests.
    pub(super) fuser: Arc<OwnedFd>,
    /// Marks the thread, see [`stale::enter_handler`].
    pub(super) number: u64,
    pub(super) ahead: RefCell<Ahead>,
}

impl Loop {
    /// Serves until the file system is unmounted.
    ///
    /// # Errors
    /// When the device or the ring fails.
    pub(super) fn run(&self, ring: &mut Ring<Flight>) -> io::Result<()> {
        stale::enter_handler(self.number);
        let served = self.serve(ring);
        // What has begun is ended, whatever happened: claims and gates are held by it.
        while ring.in_flight() > 0 {
            ring.wait()?;
            self.end_finished(ring)?;
        }
        match served {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    fn serve(&self, ring: &mut Ring<Flight>) -> io::Result<()> {
        let mut habit = Habit::default();
        loop {
            let mut taken = 0;
            if ring.in_flight() == 0 {
                self.take_next(ring, &mut habit)?;
                taken = 1;
            }
            while taken < BATCH && ring.in_flight() < IN_FLIGHT_MAX && !habit.alone(ring) {
                let mut pages = self.device.buffer()?;
                let len = self.device.receive(&mut pages)?;
                if len == 0 {
                    self.device.give_back(pages);
                    break;
                }
                taken += 1;
                self.take(ring, pages, len)?;
            }
            if ring.run_alone() {
                // One request at a time is done quickest like that.
                habit.ran_alone();
            } else if ring.pending() == 0 {
                // All answered, or about to be.
            } else if taken < BATCH && ring.in_flight() < IN_FLIGHT_MAX {
                habit = Habit::default();
                ring.watch(0, self.device.file().as_fd())?;
                ring.wait()?;
            } else if ring.in_flight() < IN_FLIGHT_MAX {
                ring.submit()?;
            } else {
                ring.wait()?;
            }
            self.end_finished(ring)?;
        }
    }

    /// Takes the next request, waiting for it. (To look for it for 20 us before going to sleep gained nothing.)
    fn take_next(&self, ring: &mut Ring<Flight>, habit: &mut Habit) -> io::Result<()> {
        let mut pages = self.device.buffer()?;
        let begun = clock::now();
        let len = self.device.wait(&mut pages)?;
        if clock::now() < begun + QUICK {
            // It was there already: there is more than one at a time.
            habit.singles = 0;
        }
        self.take(ring, pages, len)
    }

    /// Begins what was asked for.
    fn take(&self, ring: &mut Ring<Flight>, pages: Pages, len: usize) -> io::Result<()> {
        let message = Device::message(&pages, len);
        let header = wire::header(message);
        match header.map_or(0, |header| header.opcode) {
            wire::READ | wire::WRITE => {
                let (Some(header), Some(transfer)) = (header, wire::transfer(message)) else {
                    return self.pass_on(pages, len);
                };
                let data = len - wire::TRANSFER;
                let size = transfer.size as usize;
                if header.opcode == wire::WRITE && size == data {
                    return self.write(ring, header, transfer, pages);
                } else if header.opcode == wire::READ && size <= pages.len() - DATA {
                    return self.read(ring, header, transfer, pages);
                }
                self.pass_on(pages, len)
            }
            wire::FSYNC => {
                let (Some(header), Some(handle)) = (header, wire::handle(message)) else {
                    return self.pass_on(pages, len);
                };
                self.device.give_back(pages);
                let (tree, device) = (Arc::clone(&self.tree), Arc::clone(&self.device));
                self.waits.workers.run(move || answer_empty(&device, header.unique, || tree.sync(handle)));
                Ok(())
            }
            wire::RELEASE => {
                if let Some(handle) = wire::handle(message) {
                    self.ahead.borrow_mut().forget(handle);
                }
                self.pass_on(pages, len)
            }
            wire::INTERRUPT => {
                if let Some(unique) = wire::handle(message) {
                    self.waits.interrupt(unique);
                }
                self.device.give_back(pages);
                Ok(())
            }
            wire::FORGET | wire::BATCH_FORGET => {
                self.device.give_back(pages);
                Ok(())
            }
            wire::DESTROY => {
                self.device.give_back(pages);
                self.device.fail(header.map_or(0, |header| header.unique), 0);
                Ok(())
            }
            _ => self.pass_on(pages, len),
        }
    }

    /// Gives a request to fuser.
    fn pass_on(&self, pages: Pages, len: usize) -> io::Result<()> {
        let message = Device::message(&pages, len);
        match rustix::net::send(&self.fuser, message, SendFlags::DONTWAIT) {
            Ok(_) => self.device.give_back(pages),
            // All of fuser's threads are busy, and many requests wait already.
            Err(rustix::io::Errno::AGAIN) => {
                let (fuser, device) = (Arc::clone(&self.fuser), Arc::clone(&self.device));
                self.waits.workers.run(move || {
                    if let Err(error) = rustix::net::send(&fuser, Device::message(&pages, len), SendFlags::empty()) {
                        tracing::debug!("a request was not passed on: {error}");
                    }
                    device.give_back(pages);
                });
            }
            // Too long for the socket: no request of a program that means well is.
            Err(rustix::io::Errno::MSGSIZE) => {
                let unique = wire::header(message).map_or(0, |header| header.unique);
                self.device.fail(unique, libc::EINVAL);
                self.device.give_back(pages);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn read(&self, ring: &mut Ring<Flight>, header: Header, transfer: Transfer, mut pages: Pages) -> io::Result<()> {
        let asker = header.asker();
        if let Some(need) = self.tree.take_turn(transfer.handle, u64::from(transfer.size)) {
            self.waits.after(asker, need, Reading(self.errand(asker.unique, transfer, pages)));
            return Ok(());
        }
        let stamp = if Ahead::worth_it(&transfer) { self.tree.stamp(transfer.handle) } else { None };
        // With more requests under way the host has enough to do.
        let alone = ring.in_flight() == 0;
        let found =
            stamp.map_or(Found::Nothing(false), |stamp| self.ahead.borrow_mut().ask(&transfer, stamp, header.unique));
        let goes_on = match found {
            Found::Ready(mut ready) => {
                self.device.give_back(pages);
                self.read_ahead(ring, &transfer)?;
                self.device.send_data(header.unique, &mut ready, transfer.size as usize);
                self.device.give_back(ready);
                return Ok(());
            }
            Found::UnderWay => {
                self.device.give_back(pages);
                return Ok(());
            }
            Found::Nothing(goes_on) => goes_on,
        };
        let begin = || self.tree.begin_read(transfer.handle, transfer.size as usize, transfer.offset);
        let Some((located, len)) = catch_unwind(AssertUnwindSafe(begin)).ok().flatten() else {
            self.read_aside(asker, transfer, pages);
            return Ok(());
        };
        for hole in &located.holes {
            pages[DATA + hole.start..DATA + hole.end].fill(0);
        }
        if located.extents.is_empty() {
            self.device.send_data(header.unique, &mut pages, len);
            self.device.give_back(pages);
            return Ok(());
        }
        let pieces = pieces(&located.extents, DATA);
        let tag = Flight { unique: header.unique, transfer, what: What::Read(len, located) };
        ring.push(Job { pages, write: false, pieces, tag });
        if goes_on && alone { self.read_ahead(ring, &transfer) } else { Ok(()) }
    }

    /// Begins to read what a stretch that was just asked for is followed by.
    fn read_ahead(&self, ring: &mut Ring<Flight>, last: &Transfer) -> io::Result<()> {
        let next = Transfer { offset: last.offset + u64::from(last.size), ..*last };
        let Some(stamp) = self.tree.stamp(next.handle) else { return Ok(()) };
        let begin = || self.tree.begin_read(next.handle, next.size as usize, next.offset);
        let Some((located, len)) = catch_unwind(AssertUnwindSafe(begin)).ok().flatten() else { return Ok(()) };
        if len < next.size as usize || located.extents.is_empty() {
            return Ok(());
        }
        let mut pages = self.device.buffer()?;
        for hole in &located.holes {
            pages[DATA + hole.start..DATA + hole.end].fill(0);
        }
        let number = self.ahead.borrow_mut().begin(&next, stamp);
        let pieces = pieces(&located.extents, DATA);
        let tag = Flight { unique: 0, transfer: next, what: What::Ahead(number, located) };
        ring.push(Job { pages, write: false, pieces, tag });
        ring.submit()
    }

    /// Keeps what was read ahead, or answers who asked for it meanwhile.
    fn end_ahead(
        &self,
        ring: &mut Ring<Flight>,
        number: u64,
        transfer: &Transfer,
        mut pages: Pages,
        whole: bool,
    ) -> io::Result<()> {
        let asked = self.ahead.borrow_mut().done(number, transfer.handle);
        match asked {
            Some(Some(asked)) if whole => {
                if asked.go_on {
                    self.read_ahead(ring, transfer)?;
                }
                self.device.send_data(asked.unique, &mut pages, transfer.size as usize);
                self.device.give_back(pages);
            }
            // Who asked is not known any more, and need not be: it has had its turn, and a read waits for nothing else.
            Some(Some(asked)) => self.read_aside(Asker { unique: asked.unique, thread: 0 }, *transfer, pages),
            Some(None) if whole => {
                let left = self.ahead.borrow_mut().keep(transfer.handle, pages);
                left.into_iter().for_each(|pages| self.device.give_back(pages));
            }
            Some(None) | None => self.device.give_back(pages),
        }
        Ok(())
    }

    fn errand(&self, unique: u64, transfer: Transfer, pages: Pages) -> Move {
        Move { device: Arc::clone(&self.device), unique, transfer, pages: Some(pages) }
    }

    fn read_aside(&self, asker: Asker, transfer: Transfer, pages: Pages) {
        self.waits.aside(asker, Reading(self.errand(asker.unique, transfer, pages)));
    }

    fn write(&self, ring: &mut Ring<Flight>, header: Header, transfer: Transfer, pages: Pages) -> io::Result<()> {
        let (asker, len) = (header.asker(), transfer.size as usize);
        if let Some(need) = self.tree.take_turn(transfer.handle, len as u64) {
            self.waits.after(asker, need, Writing(self.errand(asker.unique, transfer, pages)));
            return Ok(());
        }
        let begin = || self.tree.begin_write(transfer.handle, len, transfer.offset, transfer.flags);
        let Some(begun) = catch_unwind(AssertUnwindSafe(begin)).ok().flatten() else {
            self.waits.aside(asker, Writing(self.errand(asker.unique, transfer, pages)));
            return Ok(());
        };
        let pieces = pieces(&begun.writing.extents(), DATA);
        let tag = Flight { unique: header.unique, transfer, what: What::Write(begun) };
        let job = ring.push(Job { pages, write: true, pieces, tag });
        if len >= LARGE {
            ring.submit()?;
        }
        if let Some((flight, memory)) = ring.written(job)
            && let What::Write(begun) = &mut flight.what
        {
            begun.writing.checksum(&memory[DATA..DATA + len]);
        }
        Ok(())
    }

    fn end_finished(&self, ring: &mut Ring<Flight>) -> io::Result<()> {
        while let Some(Job { mut pages, pieces, tag, .. }) = ring.finished() {
            let Flight { unique, transfer, what } = tag;
            let whole = pieces.iter().all(|piece| piece.transferred().is_ok_and(|got| got == piece.len));
            match what {
                What::Read(len, located) => {
                    drop(located);
                    if whole {
                        self.device.send_data(unique, &mut pages, len);
                        self.device.give_back(pages);
                    } else {
                        self.read_aside(Asker { unique, thread: 0 }, transfer, pages);
                    }
                }
                What::Write(begun) => {
                    let written: Vec<_> = pieces.iter().map(Piece::transferred).collect();
                    let data = &pages[DATA..DATA + transfer.size as usize];
                    self.answer_write(unique, transfer.size, guarded(|| self.tree.end_write(begun, data, &written)));
                    self.device.give_back(pages);
                }
                What::Ahead(number, located) => {
                    drop(located);
                    self.end_ahead(ring, number, &transfer, pages, whole)?;
                }
            }
        }
        Ok(())
    }

    fn answer_write(&self, unique: u64, len: u32, ended: Answer<Option<Arc<super::file::Handle>>>) {
        match ended {
            Ok(None) => self.device.send(&wire::written(unique, len)),
            Ok(Some(handle)) => {
                let device = Arc::clone(&self.device);
                self.waits.workers.run(move || match guarded(|| Tree::settle_write(&handle)) {
                    Ok(()) => device.send(&wire::written(unique, len)),
                    Err(errno) => device.fail(unique, errno.0),
                });
            }
            Err(errno) => self.device.fail(unique, errno.0),
        }
    }
}

/// Passes what fuser answers on to the kernel until fuser is gone.
pub(super) fn pass_answers(device: &Device, fuser: &Arc<OwnedFd>) {
    let _cut = Cut(Arc::clone(fuser));
    let mut answer = vec![0; 256 << 10];
    while let Ok((len, _)) = rustix::net::recv(fuser, &mut answer[..], rustix::net::RecvFlags::empty()) {
        if len == 0 {
            return;
        }
        device.send(&answer[..len]);
    }
}

/// Cuts fuser off when it is dropped, however that comes about. Whoever reads from it or passes requests on to it notices
/// then, and the mount ends for everybody; with a thread missing, programs would wait for ever for answers nobody gives.
pub(super) struct Cut(pub(super) Arc<OwnedFd>);

impl Drop for Cut {
    fn drop(&mut self) {
        // It fails for one that has no other end any more.
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both).ok();
    }
}

/// Runs a handler; a panic is EIO.
fn guarded<T>(handler: impl FnOnce() -> Answer<T>) -> Answer<T> {
    catch_unwind(AssertUnwindSafe(handler)).unwrap_or_else(|_| {
        tracing::error!("the operation failed on a mistake in this program; it was answered with EIO");
        Err(Errno::EIO)
    })
}

fn answer_empty(device: &Device, unique: u64, handler: impl FnOnce() -> Answer<()>) {
    device.fail(unique, guarded(handler).map_or_else(|errno| errno.0, |()| 0));
}
