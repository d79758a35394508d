//! A restore under way, as its threads share it: what is in memory, what is wanted, and what could not be had.
//!
//! # A page block
//! ```text
//!   Absent --one CAS--> Loading ---> Filling ---> Present
//!      ^                   |            |
//!      +----- retry ---- Failed <-------+
//!                          +--- poison ---> Poisoned
//! ```
//! It is one of the memory ([`Core::geometry`]): of one page block of the checkpoint, or where pages are larger of as many as one
//! page has, which come all at once. Loading is reading, checking and expanding: nothing of it is in memory. Filling is putting it in, page by page. What is Present is the
//! memory's own: a page of it that is missing was taken away by somebody and is zeros.
//!
//! # Rules
//! 1. Two faults on one page block are one read: who does not win the CAS has nothing to do, for the winner wakes everybody.
//! 2. Pages are put in with `copies` shared, and messages about removals are read with it exclusive. So a page that somebody takes
//!    away is either put in before, and goes, or known to be removed, and not put in.
//! 3. A fault that finds its page block Failed, and a failure that finds its page block wanted, are reported. One of the two sees the
//!    other: each writes before it looks.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use super::RestoreOptions;
use super::cache::{Cache, Key};
use super::order::Order;
use super::status::{Failure, Status};
use crate::checkpoint::{Found, PageBlock, Reader};
use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::memory::bits::Bits;
use crate::memory::watch::Core;
use crate::sync::{Condvar, Mutex, RwLock, RwLockWriteGuard};
use crate::sys::userfaultfd::How;
use crate::units::to_usize;

/// How long to wait before a page is put in again that a message stands in the way of, which another thread reads.
const AGAIN: Duration = Duration::from_micros(20);

/// Where a page block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Where {
    Absent = 0,
    Loading = 1,
    Filling = 2,
    Present = 3,
    Failed = 4,
    Poisoned = 5,
}

/// What a fault on a missing page is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::memory) enum Answer {
    /// A page of zeros.
    Zeros,
    /// Nothing now: somebody is at it, or will be.
    Later,
    /// A page that nobody can touch.
    Poison,
}

/// A page block that somebody waits for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    pub(super) block: PageBlock,
    /// The page that was touched, from the beginning of its region; none when it was no fault.
    pub(super) page: Option<(u64, Instant)>,
}

/// The rest of a storage block.
#[derive(Debug, Clone)]
pub(super) struct Rest {
    pub(super) blocks: Arc<[PageBlock]>,
    pub(super) next: usize,
}

/// What is to be done.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) demands: VecDeque<Demand>,
    /// The latest first.
    pub(super) rests: VecDeque<Rest>,
    pub(super) order: Order,
    pub(super) stop: bool,
}

/// A restore under way.
#[derive(Debug)]
pub(in crate::memory) struct Filling {
    pub(super) reader: Reader,
    pub(super) status: Arc<Status>,
    states: Box<[AtomicU8]>,
    /// Pages that were taken away while their page block was not in memory: pages of page block n from n times those of one.
    removed: Bits,
    any_removed: AtomicBool,
    pages: u64,
    /// Bytes of a page of the memory.
    page: u64,
    /// Page blocks of the checkpoint in one of the memory.
    parts: u64,
    /// Page blocks that somebody asked for.
    wanted: Bits,
    /// Page blocks that are being put in.
    putting: AtomicU64,
    /// Some pages of a page block are in memory, and the rest could not be put in.
    torn: AtomicBool,
    poison: AtomicBool,
    /// Nobody hears yet that somebody waits for what cannot be had.
    unattended: AtomicBool,
    finished: AtomicBool,
    copies: RwLock<()>,
    pub(super) queue: Mutex<Queue>,
    pub(super) changed: Condvar,
    /// As the queue, for those who only look whether somebody waits.
    pub(super) demanded: AtomicU64,
    pub(super) cache: Cache,
    /// Memory is filled that nobody waits for.
    pub(super) background: bool,
}

impl Filling {
    /// Makes one of a checkpoint; `present` has the page blocks that there is nothing to bring of.
    pub(super) fn new(
        core: &Core,
        reader: Reader,
        status: Arc<Status>,
        present: &Bits,
        options: &RestoreOptions,
    ) -> Self {
        let geometry = &core.geometry;
        let (blocks, pages) = (geometry.page_blocks(), geometry.page_block() as u64 / core.page);
        let parts = parts_of(core, &reader);
        let state = |number| if present.contains(number) { Where::Present } else { Where::Absent };
        let states = (0..blocks).map(|number| AtomicU8::new(state(number) as u8)).collect();
        Self {
            reader,
            status,
            states,
            removed: Bits::new(blocks * pages),
            any_removed: AtomicBool::new(false),
            pages,
            page: core.page,
            parts,
            wanted: Bits::new(blocks),
            putting: AtomicU64::new(0),
            torn: AtomicBool::new(false),
            poison: AtomicBool::new(false),
            unattended: AtomicBool::new(options.unattended),
            finished: AtomicBool::new(false),
            copies: RwLock::new(()),
            queue: Mutex::default(),
            changed: Condvar::new(),
            demanded: AtomicU64::new(0),
            cache: Cache::new(options.workers * 2 + 4),
            background: options.background,
        }
    }

    fn place(&self, block: PageBlock) -> &AtomicU8 {
        &self.states[to_usize(block.0)]
    }

    pub(super) fn at(&self, block: PageBlock) -> Where {
        match self.place(block).load(Ordering::SeqCst) {
            0 => Where::Absent,
            1 => Where::Loading,
            2 => Where::Filling,
            3 => Where::Present,
            4 => Where::Failed,
            _ => Where::Poisoned,
        }
    }

    fn set(&self, block: PageBlock, to: Where) {
        self.place(block).store(to as u8, Ordering::SeqCst);
    }

    fn change(&self, block: PageBlock, from: Where, to: Where) -> bool {
        self.place(block).compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Tells whether a page block is the memory's own.
    pub(in crate::memory) fn is_in_memory(&self, block: PageBlock) -> bool {
        self.at(block) == Where::Present
    }

    /// Keeps pages from being put in as long as what it returns lives.
    pub(in crate::memory) fn stop_copies(&self) -> RwLockWriteGuard<'_, ()> {
        self.copies.write()
    }

    /// As [`Self::stop_copies`], when no page block is in memory in part; `None` when that does not come about in time.
    pub(in crate::memory) fn stop_whole(&self, until: Instant) -> Option<RwLockWriteGuard<'_, ()>> {
        loop {
            let still = self.copies.write();
            if self.putting.load(Ordering::SeqCst) == 0 {
                return Some(still);
            }
            drop(still);
            if clock::now() >= until {
                return None;
            }
            clock::sleep(AGAIN);
        }
    }

    /// Tells whether there is a page block of which neither memory nor the checkpoint has all.
    pub(in crate::memory) fn has_parts(&self) -> bool {
        let mut page = 0;
        if self.torn.load(Ordering::SeqCst) {
            return true;
        }
        if !self.any_removed.load(Ordering::SeqCst) {
            return false;
        }
        while let Some(number) = self.removed.next(page) {
            if !self.is_in_memory(PageBlock(number / self.pages)) {
                return true;
            }
            page = (number / self.pages + 1) * self.pages;
        }
        false
    }

    /// Returns the page block of the memory that one of the checkpoint belongs to.
    pub(super) fn whole_of(&self, part: PageBlock) -> PageBlock {
        PageBlock(part.0 / self.parts)
    }

    /// Returns the page blocks of the checkpoint that one of the memory is made of.
    pub(super) fn parts(&self, block: PageBlock) -> impl Iterator<Item = PageBlock> {
        (block.0 * self.parts..(block.0 + 1) * self.parts).map(PageBlock)
    }

    /// Tells whether a page, at this offset of its page block, was taken away.
    fn is_removed(&self, block: PageBlock, at: u64) -> bool {
        self.any_removed.load(Ordering::SeqCst) && self.removed.contains(block.0 * self.pages + at / self.page)
    }

    /// Hears that somebody touches a page that is missing, at this offset of its region.
    pub(in crate::memory) fn asked(&self, core: &Core, block: PageBlock, page: u64, since: Instant) -> Answer {
        self.status.faulted(block);
        let was_wanted = self.wanted.insert(block.0);
        let now = self.at(block);
        // A page that was taken away is zeros, whatever becomes of the rest.
        if now == Where::Present || self.is_removed(block, page - core.span(block).offset) {
            return Answer::Zeros;
        }
        if now == Where::Poisoned || self.poison.load(Ordering::SeqCst) {
            return Answer::Poison;
        }
        match now {
            Where::Failed => {
                self.status.is_waited_for(block);
                if self.unattended.load(Ordering::SeqCst) {
                    return Answer::Poison;
                }
            }
            _ if was_wanted => {}
            _ => self.push(Demand { block, page: Some((page, since)) }),
        }
        Answer::Later
    }

    fn push(&self, demand: Demand) {
        let mut queue = self.queue.lock();
        queue.demands.push_back(demand);
        self.demanded.fetch_add(1, Ordering::SeqCst);
        drop(queue);
        self.changed.notify_one();
    }

    /// Hears that pages are becoming zeros because somebody takes memory away; `copies` is held.
    pub(in crate::memory) fn removed(&self, core: &Core, region: usize, range: Range<u64>) {
        for number in core.blocks_of(region, range.clone()) {
            let block = PageBlock(number);
            if self.at(block) == Where::Present {
                continue;
            }
            let span = core.span(block);
            let (first, end) = (range.start.max(span.offset), range.end.min(span.offset + span.length as u64));
            self.any_removed.store(true, Ordering::SeqCst);
            for page in (first..end).step_by(to_usize(self.page)) {
                self.removed.insert(number * self.pages + (page - span.offset) / self.page);
            }
            let all = (0..span.length as u64 / self.page).all(|page| self.removed.contains(number * self.pages + page));
            // Nothing is left to bring. One that is being brought finds that out itself.
            let could_not = |from| self.change(block, from, Where::Present);
            let failed = all && (could_not(Where::Failed) || could_not(Where::Poisoned));
            if failed {
                self.status.forget(block);
            }
            if failed || all && self.change(block, Where::Absent, Where::Present) {
                self.status.present();
                // A worker that has just seen that something is left waits by now.
                drop(self.queue.lock());
                self.changed.notify_all();
            } else if !all && !self.wanted.insert(number) {
                // The rest is brought soon: until then no checkpoint can be made.
                self.push(Demand { block, page: None });
            }
        }
    }

    /// Takes a page block to be brought; false when somebody else has, or it is there.
    pub(super) fn win(&self, block: PageBlock) -> bool {
        self.change(block, Where::Absent, Where::Loading)
    }

    /// Says that a page block could not be had.
    pub(super) fn failed(&self, core: &Core, block: PageBlock, error: Error) {
        self.set(block, Where::Failed);
        let waited_for = self.wanted.contains(block.0);
        tracing::error!("a part of the memory of a guest could not be restored: {error}");
        self.status.failed(Failure { block, address: core.span(block).address, waited_for, error });
        if waited_for && self.unattended.load(Ordering::SeqCst) {
            self.poison(core);
        }
    }

    /// Hears that the owner looks after it from now on.
    pub(super) fn attend(&self) {
        self.unattended.store(false, Ordering::SeqCst);
    }

    /// Puts a page block into memory that was taken, the page that somebody waits for first.
    pub(super) fn put(&self, core: &Core, block: PageBlock, data: &[u8], first: Option<(u64, Instant)>) {
        let span = core.span(block);
        {
            let _shared = self.copies.read();
            self.putting.fetch_add(1, Ordering::SeqCst);
            self.set(block, Where::Filling);
        }
        let put = |from: u64, to: u64, wake| self.put_pages(core, block, data, from..to, wake);
        let whole = span.length as u64;
        let done = match first {
            None => put(0, whole, true),
            Some((page, since)) => {
                let page = page - span.offset;
                put(page, page + self.page, true).and_then(|()| {
                    self.status.waited(since.elapsed());
                    put(0, page, false)?;
                    put(page + self.page, whole, false)
                })
            }
        };
        match done {
            Ok(()) => {
                self.set(block, Where::Present);
                self.putting.fetch_sub(1, Ordering::SeqCst);
                self.status.present();
            }
            Err(error) => {
                self.torn.store(true, Ordering::SeqCst);
                self.putting.fetch_sub(1, Ordering::SeqCst);
                self.failed(core, block, Error::io("the host has no memory for the guest", error));
            }
        }
        // Whoever waits for any page of it, also for one that was there already.
        core.wake(span.region, span.offset, whole);
    }

    fn put_pages(
        &self,
        core: &Core,
        block: PageBlock,
        data: &[u8],
        range: Range<u64>,
        wake: bool,
    ) -> std::io::Result<()> {
        let span = core.span(block);
        let region = &core.regions[span.region];
        let mut at = range.start;
        while at < range.end {
            let shared = self.copies.read();
            let end = self.end_of_kept(block, at, range.end);
            if end == at {
                at += self.page;
                continue;
            }
            let how = How { wake, protect: core.protect.load(Ordering::SeqCst) };
            let copied = core.faults.copy(region, span.offset + at, &data[to_usize(at)..to_usize(end)], how);
            drop(shared);
            at += copied.bytes as u64;
            match copied.stopped.map(|error| (error.kind(), error)) {
                None => {}
                Some((std::io::ErrorKind::WouldBlock, _)) => clock::sleep(AGAIN),
                Some((std::io::ErrorKind::AlreadyExists, _)) => at += self.page,
                // Nobody watches this memory any more, so nobody waits for it.
                Some((std::io::ErrorKind::NotFound, _)) => return Ok(()),
                Some((_, error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns where the run of pages ends, from `at` on, that nobody has taken away: at `at` itself if that one is.
    fn end_of_kept(&self, block: PageBlock, at: u64, end: u64) -> u64 {
        if !self.any_removed.load(Ordering::SeqCst) {
            return end;
        }
        let first = block.0 * self.pages;
        let next = self.removed.next(first + at / self.page);
        next.map_or(end, |number| end.min((number - first) * self.page))
    }

    /// Reads a page block out of the checkpoint, whatever memory has; returns the last storage block that it was in.
    pub(in crate::memory) fn fetch(&self, block: PageBlock, out: &mut [u8]) -> Result<Option<Key>> {
        let mut last = None;
        let size = self.reader.geometry().page_block();
        for (part, out) in self.parts(block).zip(out.chunks_mut(size)) {
            match self.reader.place(part)? {
                Found::Zero => out.fill(0),
                Found::Stored { layer, stored } => {
                    let key = (layer, stored.block);
                    let expand = |bytes: &[u8]| self.reader.expand(part, layer, &stored, bytes, &mut *out);
                    self.cache.with(&self.reader, key, expand)?;
                    last = Some(key);
                }
            }
        }
        Ok(last)
    }

    /// Waits until a page block is in memory.
    ///
    /// # Errors
    /// Why it could not be had.
    pub(in crate::memory) fn bring(&self, block: PageBlock) -> Result<()> {
        if self.is_in_memory(block) {
            return Ok(());
        }
        if !self.wanted.insert(block.0) {
            self.push(Demand { block, page: None });
        }
        self.status.wait_for(|| match self.at(block) {
            Where::Present => Some(Ok(())),
            Where::Failed | Where::Poisoned => self.status.why(block).map(Err),
            _ if self.poison.load(Ordering::SeqCst) || self.queue.lock().stop => {
                Some(Err(Error::failed("the restore has ended before it was done")))
            }
            _ => None,
        })
    }

    /// Has page blocks that could not be had read again.
    pub(super) fn retry(&self) {
        self.cache.clear();
        for failure in self.status.take_failures() {
            if self.change(failure.block, Where::Failed, Where::Absent) && self.wanted.contains(failure.block.0) {
                self.push(Demand { block: failure.block, page: None });
            }
        }
        self.queue.lock().order.again();
        self.changed.notify_all();
    }

    /// Makes what is missing a SIGBUS for whoever touches it, and for who waits.
    pub(super) fn poison(&self, core: &Core) {
        self.poison.store(true, Ordering::SeqCst);
        let mut next = 0;
        while let Some(number) = self.wanted.next(next) {
            next = number + 1;
            let block = PageBlock(number);
            if self.at(block) == Where::Present {
                continue;
            }
            if let Err(error) = self.poison_missing(core, block) {
                tracing::error!("somebody waits for memory that will not come: {error}");
            }
        }
    }

    /// Makes a page block that could not be had a SIGBUS for whoever touches it, and for who waits.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub(super) fn poison_one(&self, core: &Core, block: PageBlock) -> std::io::Result<()> {
        // First, for those who touch it from now on and are not seen below.
        self.change(block, Where::Failed, Where::Poisoned);
        self.poison_missing(core, block)
    }

    /// As [`Self::poison_one`] for all that is not there, also what nobody waits for: nobody will answer any more.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub(super) fn poison_rest(&self, core: &Core) -> std::io::Result<()> {
        self.poison.store(true, Ordering::SeqCst);
        let blocks = (0..core.geometry.page_blocks()).map(PageBlock);
        blocks.filter(|block| self.at(*block) != Where::Present).try_for_each(|block| self.poison_missing(core, block))
    }

    fn poison_missing(&self, core: &Core, block: PageBlock) -> std::io::Result<()> {
        let span = core.span(block);
        let region = &core.regions[span.region];
        for page in (span.offset..span.offset + span.length as u64).step_by(to_usize(self.page)) {
            loop {
                // Looked at each time, as where pages are put: what is taken away meanwhile has to be zeros.
                let shared = self.copies.read();
                if self.is_removed(block, page - span.offset) {
                    break;
                }
                let poisoned = core.faults.poison(region, page, self.page);
                drop(shared);
                let Err(error) = poisoned else { break };
                match error.kind() {
                    std::io::ErrorKind::WouldBlock => clock::sleep(AGAIN),
                    // It is there, or not watched.
                    std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotFound => {
                        core.wake(span.region, page, self.page);
                        break;
                    }
                    _ => {
                        core.wake(span.region, page, self.page);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends it because of a mistake in this program: who waits, and whoever touches what is missing, goes on with a SIGBUS.
    pub(in crate::memory) fn break_down(&self, core: &Core, why: &str) {
        self.status.break_down(Error::failed(why));
        self.poison(core);
    }

    /// As [`Self::break_down`], when nobody answers faults any more: all that is missing becomes a SIGBUS by itself.
    pub(in crate::memory) fn break_down_unheard(&self, core: &Core, why: &str) {
        self.poison.store(true, Ordering::SeqCst);
        self.status.break_down(Error::failed(why));
        for number in 0..self.states.len() as u64 {
            let block = PageBlock(number);
            if self.at(block) != Where::Present {
                let span = core.span(block);
                core.poison_unheard(span.region, span.offset, span.length as u64);
            }
        }
    }

    /// Returns the first page block from one on that nobody has begun to bring.
    pub(super) fn absent(&self, from: u64) -> Option<PageBlock> {
        let first = usize::try_from(from).unwrap_or(usize::MAX).min(self.states.len());
        let found =
            self.states[first..].iter().position(|state| state.load(Ordering::SeqCst) == Where::Absent as u8)?;
        Some(PageBlock((first + found) as u64))
    }

    /// Tells whether somebody waits for something, or all is to end.
    pub(super) fn is_urgent(&self) -> bool {
        self.demanded.load(Ordering::SeqCst) > 0
    }

    /// Says that all memory is there. Nobody watches it any more then, unless a save does.
    pub(super) fn finish(&self, core: &Core) {
        if !self.finished.swap(true, Ordering::SeqCst) {
            core.filled();
            core.fill_from(None);
            self.status.filled();
        }
    }

    /// Ends the workers.
    pub(super) fn stop(&self) {
        self.queue.lock().stop = true;
        // Who goes on with a storage block as long as nobody waits sees that.
        self.demanded.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_all();
        self.status.stop();
    }
}

/// Returns how many page blocks of a checkpoint are in one of the memory.
pub(super) fn parts_of(core: &Core, reader: &Reader) -> u64 {
    (core.geometry.page_block() / reader.geometry().page_block()) as u64
}
