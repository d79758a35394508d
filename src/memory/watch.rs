//! The memory of a running machine, watched: what save and restore share for as long as the machine lives.
//!
//! # Rules
//! 1. One userfaultfd for one memory: the kernel allows no second one on the same range. It is made before the process gives its
//!    rights up, and nothing is registered while nobody saves, tracks or restores.
//! 2. A page block that is not protected is in `open`, or nobody tracks. To protect: out of `open`, then the call. To let writes
//!    through: the call, then into `open`. So whatever way the two meet, a page block outside `open` is protected.
//! 3. What is written to is in `changed` before a cut looks at it: the thread of the faults lets nobody write meanwhile ([`Gate`]). It
//!    goes on to read messages, and what it hears of removals then makes the cut fail.
//! 4. Memory that somebody takes away counts as written. If a save has not captured it yet, the save fails.
//! 5. The kernel tells that memory is about to be taken away, and not when it is gone. So there is no cut between the two: who takes
//!    memory away, and who cuts, keep each other out ([`Watch::give_back`]).
//! 6. Memory of another process is registered by that process, and only unregistered here. Nothing is protected there.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use uuid::Uuid;
use vm_memory::GuestMemoryMmap;

use super::bits::Bits;
use super::gate::Gate;
use super::handler::{self, Bell};
use super::restore::Filling;
use super::save::Capture;
use crate::checkpoint::{Geometry, PageBlock, Region, Sizes, Span};
use crate::clock;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard, RwLock};
use crate::sys::guest::{GuestRegion, PAGE};
use crate::sys::userfaultfd::{Messages, Userfault, Watched};
use crate::units::to_usize;

/// Bytes that are protected in one call: it keeps those out who change the mappings of the process.
const CALL: u64 = 64 << 20;
/// How long to wait before a call is tried again that a message stands in the way of, which somebody else reads.
const AGAIN: Duration = Duration::from_micros(20);

/// What happens when a protected page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nobody tracks: the write is let through.
    Off = 0,
    /// It is let through and remembered.
    Tracking = 1,
    /// What was there is captured before.
    Saving = 2,
}

/// A run of bytes of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) region: usize,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What is registered.
#[derive(Debug, Default)]
struct Registered {
    /// Where missing pages are reported.
    missing: Vec<Run>,
    /// A restore is not done with those.
    restoring: bool,
    /// All memory is registered for protection.
    protected: bool,
    /// Nobody answers faults any more: nothing is ever watched again.
    over: bool,
}

/// What is known of saves.
#[derive(Debug, Default)]
struct Saves {
    under_way: bool,
    /// The checkpoint since which `changed` has all that was written.
    since: Option<Uuid>,
}

/// What the threads share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) faults: Userfault,
    pub(super) regions: Vec<GuestRegion>,
    /// How it is cut into what comes at once: page blocks of the checkpoint, or several of them where a page is larger than one.
    pub(super) geometry: Geometry,
    /// Bytes of a page.
    pub(super) page: u64,
    /// It is the memory of another process, which has registered all of it for missing pages.
    elsewhere: bool,
    /// It is known what missing pages are to have.
    begun: AtomicBool,
    /// Page blocks that may be written unseen, while somebody tracks.
    pub(super) open: Bits,
    /// Page blocks written since the last cut, or since tracking began.
    pub(super) changed: Bits,
    /// Shared by those who take memory away, had alone by who cuts.
    pub(super) taking: RwLock<()>,
    /// Times that memory was taken away.
    pub(super) removals: AtomicU64,
    /// Pages that are put in are protected.
    pub(super) protect: AtomicBool,
    pub(super) gate: Gate,
    phase: AtomicU8,
    registered: Mutex<Registered>,
    saves: Mutex<Saves>,
    // Changed while the gate is closed, so the thread of the faults never waits for them.
    pub(super) capture: RwLock<Option<Arc<Capture>>>,
    pub(super) filling: RwLock<Option<Arc<Filling>>>,
}

impl Core {
    fn ours(faults: Userfault, memory: &GuestMemoryMmap<()>, sizes: Sizes) -> Result<Self> {
        let regions = GuestRegion::all(memory).map_err(|error| Error::usage(error.to_string()))?;
        let list: Vec<Region> =
            regions.iter().map(|region| Region { address: region.address(), length: region.len() }).collect();
        let geometry = Geometry::new(sizes, &list)?;
        Ok(Self::new(faults, regions, geometry, PAGE, false))
    }

    fn new(faults: Userfault, regions: Vec<GuestRegion>, geometry: Geometry, page: u64, elsewhere: bool) -> Self {
        assert_eq!(geometry.regions().len(), regions.len(), "a region for each");
        let blocks = geometry.page_blocks();
        Self {
            faults,
            regions,
            geometry,
            page,
            elsewhere,
            begun: AtomicBool::new(!elsewhere),
            open: Bits::new(blocks),
            changed: Bits::new(blocks),
            taking: RwLock::new(()),
            removals: AtomicU64::new(0),
            protect: AtomicBool::new(false),
            gate: Gate::default(),
            phase: AtomicU8::new(Phase::Off as u8),
            registered: Mutex::default(),
            saves: Mutex::default(),
            capture: RwLock::new(None),
            filling: RwLock::new(None),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            1 => Phase::Tracking,
            2 => Phase::Saving,
            _ => Phase::Off,
        }
    }

    /// Changes what happens to writes; the gate is closed.
    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// Returns where a page block is.
    pub(super) fn span(&self, block: PageBlock) -> Span {
        self.geometry.span(block).expect("page blocks in the program are those of its memory")
    }

    /// Returns the region and the offset of an address of this process.
    pub(super) fn locate(&self, mapped: u64) -> Option<(usize, u64)> {
        self.regions.iter().enumerate().find_map(|(index, region)| Some((index, region.offset_of(mapped)?)))
    }

    /// Returns the page of a region that an offset is in.
    pub(super) fn page_of(&self, offset: u64) -> u64 {
        offset / self.page * self.page
    }

    /// Tells whether messages may be read. Those of another process come before it is known what its memory is to have: a page would be
    /// answered with zeros, and a removal forgotten.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// Tells whether it is the memory of another process.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.elsewhere
    }

    /// Returns the page blocks that a range of a region touches.
    pub(super) fn blocks_of(&self, region: usize, range: Range<u64>) -> Range<u64> {
        let number = |offset| self.geometry.of_region(region, offset).map_or(0, |block| block.0);
        if range.is_empty() { 0..0 } else { number(range.start)..number(range.end - 1) + 1 }
    }

    /// Lets writes to a page block through, and wakes who waits.
    ///
    /// # Errors
    /// `WouldBlock`: messages are to be read first.
    pub(super) fn let_through(&self, block: PageBlock) -> io::Result<()> {
        let span = self.span(block);
        match self.faults.protect(&self.regions[span.region], span.offset, span.length as u64, false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            // It is not registered any more.
            Err(error) => {
                tracing::debug!("a page block is not protected any more: {error}");
                self.wake(span.region, span.offset, span.length as u64);
            }
            Ok(()) => {}
        }
        self.open.insert(block.0);
        self.changed.insert(block.0);
        Ok(())
    }

    /// Wakes who waits in a range of a region.
    pub(super) fn wake(&self, region: usize, offset: u64, len: u64) {
        if let Err(error) = self.faults.wake(&self.regions[region], offset, len) {
            tracing::debug!("nobody can be woken in memory that is not watched: {error}");
        }
    }

    /// Protects, or ends that for, bytes of a region. Not for the thread of the faults.
    pub(super) fn protect(&self, run: Run, on: bool) -> io::Result<()> {
        let region = &self.regions[run.region];
        let end = run.offset + run.len;
        let mut at = run.offset;
        while at < end {
            let len = (end - at).min(CALL);
            match self.faults.protect(region, at, len, on) {
                Ok(()) => at += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => clock::sleep(AGAIN),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Protects all page blocks again that are open; returns how many those were. When it fails the last of them is nowhere.
    ///
    /// # Errors
    /// With `now`, `WouldBlock` when a message waits to be read; errors of the host.
    pub(super) fn protect_open(&self, now: bool) -> io::Result<u64> {
        let (mut count, mut from) = (0, 0);
        while let Some(first) = self.open.next(from) {
            let span = self.span(PageBlock(first));
            let mut run = Run { region: span.region, offset: span.offset, len: 0 };
            let mut next = first;
            while next < self.geometry.page_blocks() {
                let span = self.span(PageBlock(next));
                if span.region != run.region || run.len >= CALL || !self.open.remove(next) {
                    break;
                }
                run.len += span.length as u64;
                next += 1;
            }
            match now {
                true => self.faults.protect(&self.regions[run.region], run.offset, run.len, true)?,
                false => self.protect(run, true)?,
            }
            count += next - first;
            // Should another thread have taken the first one out, there is nothing here.
            from = next.max(first + 1);
        }
        Ok(count)
    }

    /// Returns each region as a run.
    pub(super) fn whole(&self) -> impl Iterator<Item = Run> {
        self.regions.iter().enumerate().map(|(region, memory)| Run { region, offset: 0, len: memory.len() })
    }

    /// Begins a save, which is based on `parent` if there is one.
    pub(super) fn begin_save(&self, capture: &Arc<Capture>, parent: Option<Uuid>) -> Result<()> {
        let mut saves = self.saves.lock();
        if saves.under_way {
            return Err(Error::busy("the memory of this machine is being saved already"));
        }
        if parent.is_some() && (parent != saves.since || self.phase() != Phase::Tracking) {
            return Err(Error::failed("what was written since the checkpoint that this one is based on is not known")
                .hint("make one that is based on nothing, and the next on that"));
        }
        saves.under_way = true;
        let _outside = self.gate.close();
        *self.capture.write() = Some(Arc::clone(capture));
        Ok(())
    }

    /// Ends a save.
    pub(super) fn end_save(&self) {
        let mut saves = self.saves.lock();
        let _outside = self.gate.close();
        *self.capture.write() = None;
        saves.under_way = false;
    }

    /// Says since which checkpoint all that was written is known.
    pub(super) fn set_since(&self, checkpoint: Option<Uuid>) {
        self.saves.lock().since = checkpoint;
    }

    /// Says what page blocks that are missing are filled from; the gate keeps the thread of the faults out meanwhile.
    pub(super) fn fill_from(&self, filling: Option<Arc<Filling>>) {
        let _outside = self.gate.close();
        *self.filling.write() = filling;
        self.begun.store(true, Ordering::SeqCst);
    }

    /// Returns what is registered, for whoever is about to register more.
    fn registered(&self) -> io::Result<MutexGuard<'_, Registered>> {
        let registered = self.registered.lock();
        if registered.over {
            return Err(io::Error::other("a mistake in this program has ended the thread that answers faults"));
        }
        Ok(registered)
    }

    fn register(&self, run: Run, missing: bool, protected: bool) -> io::Result<()> {
        let watched = Watched { missing, protected };
        self.faults.register(&self.regions[run.region], run.offset, run.len, watched)
    }

    /// Has missing pages of these runs reported, which are in order.
    pub(super) fn watch_missing(&self, runs: Vec<Run>) -> io::Result<()> {
        let mut registered = self.registered()?;
        if self.elsewhere {
            self.whole().try_for_each(|whole| self.leave_out(whole, &runs))?;
        } else {
            runs.iter().try_for_each(|run| self.register(*run, true, false))?;
        }
        (registered.missing, registered.restoring) = (runs, true);
        Ok(())
    }

    /// Ends watching what is not in any of the runs.
    fn leave_out(&self, whole: Run, runs: &[Run]) -> io::Result<()> {
        let mut at = 0;
        let end = Run { region: whole.region, offset: whole.len, len: 0 };
        for run in runs.iter().filter(|run| run.region == whole.region).chain([&end]) {
            if run.offset > at {
                self.faults.unregister(&self.regions[whole.region], at, run.offset - at)?;
            }
            at = run.offset + run.len;
        }
        Ok(())
    }

    /// Says that no page is missing any more that somebody knows something about.
    pub(super) fn filled(&self) {
        let mut registered = self.registered.lock();
        registered.restoring = false;
        if !registered.protected {
            self.forget(&mut registered);
        }
    }

    /// Begins to track: all memory is protected when this returns, and what was written meanwhile is open.
    pub(super) fn track(&self) -> io::Result<()> {
        let mut registered = self.registered()?;
        for run in self.whole() {
            // Where pages are missing that has to stay so; the rest is only protected.
            let mut at = 0;
            for missing in registered.missing.iter().filter(|missing| missing.region == run.region) {
                if missing.offset > at {
                    self.register(Run { offset: at, len: missing.offset - at, ..run }, false, true)?;
                }
                self.register(*missing, true, true)?;
                at = missing.offset + missing.len;
            }
            if at < run.len {
                self.register(Run { offset: at, len: run.len - at, ..run }, false, true)?;
            }
        }
        registered.protected = true;
        drop(registered);
        let filling = self.filling.read().clone();
        {
            let _outside = self.gate.close();
            let _still = filling.as_ref().map(|filling| filling.stop_copies());
            self.open.clear();
            self.changed.clear();
            self.protect.store(true, Ordering::SeqCst);
            self.set_phase(Phase::Tracking);
        }
        self.whole().try_for_each(|run| self.protect(run, true))
    }

    /// Ends tracking: nothing is protected when this returns, and nobody waits.
    pub(super) fn release(&self) {
        if self.elsewhere {
            // Nothing is ever protected there, and what it is to have when nobody serves it any more was decided before.
            return;
        }
        let filling = self.filling.read().clone();
        {
            let _outside = self.gate.close();
            let _still = filling.as_ref().map(|filling| filling.stop_copies());
            self.protect.store(false, Ordering::SeqCst);
            self.set_phase(Phase::Off);
        }
        let mut registered = self.registered.lock();
        let protected = std::mem::take(&mut registered.protected);
        if !registered.restoring {
            return self.forget(&mut registered);
        }
        for run in self.whole().filter(|_| protected) {
            if let Err(error) = self.protect(run, false) {
                tracing::error!("the memory of a guest stays protected, which slows it down: {error}");
            }
        }
    }

    /// Ends all watching because nobody answers faults any more; `poison` is called before missing pages would be zeros again.
    pub(super) fn end_watching(&self, poison: impl FnOnce()) {
        self.protect.store(false, Ordering::SeqCst);
        self.set_phase(Phase::Off);
        let mut registered = self.registered.lock();
        registered.over = true;
        poison();
        self.forget(&mut registered);
    }

    /// Makes missing pages of a range a SIGBUS when nobody reads messages any more.
    pub(super) fn poison_unheard(&self, region: usize, offset: u64, len: u64) {
        let mut unread = Messages::new(16);
        let mut poison = |offset, len| loop {
            match self.faults.poison(&self.regions[region], offset, len) {
                // Removed memory would become zeros, and becomes a SIGBUS: it cannot be had either way.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.faults.read(&mut unread).unwrap_or(false) {
                        clock::sleep(AGAIN);
                    }
                }
                done => break done,
            }
        };
        // A range that has some pages already is done page by page; one that is not watched has no missing ones.
        if poison(offset, len).is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            for page in (offset..offset + len).step_by(to_usize(self.page)) {
                poison(page, self.page).ok();
            }
        }
    }

    fn forget(&self, registered: &mut Registered) {
        registered.missing.clear();
        for run in self.whole() {
            if let Err(error) = self.faults.unregister(&self.regions[run.region], 0, run.len) {
                if self.elsewhere {
                    // Its process has ended, as a rule.
                    tracing::debug!("the memory of another process stays watched: {error}");
                    continue;
                }
                tracing::error!("the memory of a guest stays watched, which slows it down: {error}");
            }
            // The kernel itself wakes those who wait for missing pages, and not those who wait to write.
            self.wake(run.region, 0, run.len);
        }
    }
}

/// The memory of a machine, watched. Whoever runs the machine keeps it until no thread touches the memory any more.
#[derive(Debug)]
pub struct Watch {
    core: Arc<Core>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Makes one for a memory of ordinary memfds, which nobody else has mapped, and starts the thread that answers faults. Nothing
    /// is watched yet. `sizes` are those of the checkpoints that are made and read.
    ///
    /// # Errors
    /// `Unsupported` when the kernel lacks something, `Denied` when it is not given to this process, `Usage` for another kind of memory.
    pub fn new(faults: Userfault, memory: &GuestMemoryMmap<()>, sizes: Sizes) -> Result<Self> {
        Self::start(Core::ours(faults, memory, sizes)?)
    }

    /// Makes one for the memory of another process, which has sent its userfaultfd and has all of it registered for missing pages of
    /// `page` bytes. It can be restored and not saved.
    ///
    /// # Errors
    /// Errors of the host.
    pub(super) fn elsewhere(
        faults: Userfault,
        regions: Vec<GuestRegion>,
        geometry: Geometry,
        page: u64,
    ) -> Result<Self> {
        Self::start(Core::new(faults, regions, geometry, page, true))
    }

    fn start(core: Core) -> Result<Self> {
        let core = Arc::new(core);
        let host = |error| Error::io("the memory of the guest cannot be watched", error);
        let bell = Arc::new(Bell::new().map_err(host)?);
        let (of, heard) = (Arc::clone(&core), Arc::clone(&bell));
        let thread = std::thread::Builder::new().name("faults".into()).spawn(move || handler::run(&of, &heard));
        Ok(Self { core, bell, thread: Some(thread.map_err(host)?) })
    }

    /// Makes the userfaultfd that [`Watch::new`] takes. It takes `/dev/userfaultfd` or CAP_SYS_PTRACE, so it is made before rights
    /// are given up.
    ///
    /// # Errors
    /// `Unsupported` when the kernel lacks something, `Denied` when it is not given to this process.
    pub fn open() -> Result<Userfault> {
        Userfault::new().map_err(|error| {
            let kind = error.kind();
            let what = format!("the memory of a guest cannot be watched: {error}");
            match kind {
                io::ErrorKind::Unsupported => Error::unsupported(what).hint("Linux 6.1 and later can do it"),
                io::ErrorKind::PermissionDenied => Error::new(crate::error::Kind::Denied, what)
                    .hint("give the user access to /dev/userfaultfd, or run it as root"),
                _ => Error::failed(what),
            }
        })
    }

    /// Returns how the memory is cut up.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.core.geometry
    }

    /// Gives memory back to the host, as a balloon does: `len` bytes from a guest address on, in whole pages, are zeros after.
    /// Memory is taken away in no other way while it is saved.
    ///
    /// # Errors
    /// `Usage` for a range that is not in one region; errors of the host.
    pub fn give_back(&self, address: u64, len: u64) -> Result<()> {
        let mut regions = self.core.regions.iter();
        let region = regions.find(|region| (region.address()..region.address() + region.len()).contains(&address));
        let region = region.ok_or_else(|| Error::usage(format!("there is no memory of the guest at {address:#x}")))?;
        let _no_cut = self.core.taking.read();
        let host = |error| Error::io("memory of the guest cannot be given back", error);
        region.give_back(address - region.address(), len).map_err(host)
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Ends the thread, as if it had died.
    #[cfg(test)]
    pub(super) fn deafen(&mut self) {
        self.bell.ring();
        self.thread.take().expect("it is ended once").join().expect("it has not panicked");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Whoever still waits goes on; with a restore that is not done, that is the owner's to decide before.
        self.core.release();
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that answers faults has ended on a mistake in this program");
        }
    }
}
