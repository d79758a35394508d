//! A save under way, as its threads share it: who captures which page block, and how it is going.
//!
//! # The claim
//! ```text
//!   Clean --one CAS--> Copying ----> Saved        by the sweeper, or by the thread of the faults
//!   Parent, Source                                decided at the cut: not to be captured
//! ```
//! Whoever wins copies 64 KiB out of the file of the memory and says Saved before anything else is done with them. The thread of the
//! faults that loses waits for the winner, and only then lets the write through.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use super::ring::Ring;
use crate::checkpoint::PageBlock;
use crate::clock;
use crate::error::{Error, Result};
use crate::memory::figures::Times;
use crate::memory::restore::Filling;
use crate::memory::watch::Core;
use crate::sync::{Condvar, Mutex};
use crate::units::to_usize;

/// How long the thread of the faults waits for room in the ring before it looks again.
const LOOK: Duration = Duration::from_micros(50);

/// What is known about a page block in this save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Claim {
    /// Protected, and as at the cut.
    Clean = 0,
    /// Somebody copies it.
    Copying = 1,
    /// It is copied.
    Saved = 2,
    /// It is as in the parent.
    Parent = 3,
    /// It was not in memory at the cut: it is taken from where it is restored from.
    Source = 4,
}

impl Claim {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Clean,
            1 => Self::Copying,
            3 => Self::Parent,
            4 => Self::Source,
            _ => Self::Saved,
        }
    }
}

/// How far a save is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Memory is being protected; nothing is captured.
    Arming,
    /// The instant has been; page blocks are captured.
    Cut,
    /// It was given up or has failed.
    Stopped,
}

/// A save under way.
#[derive(Debug)]
pub(in crate::memory) struct Capture {
    claims: Box<[AtomicU8]>,
    pub(super) ring: Ring,
    stage: Mutex<Stage>,
    staged: Condvar,
    /// As the stage, for those who do not wait.
    stopped: AtomicBool,
    error: Mutex<Option<Error>>,
    /// Why the thread of the faults could not read memory: it makes no error of its own.
    unreadable: AtomicI32,
    /// Where page blocks come from that were not in memory at the cut.
    pub(super) source: Mutex<Option<Arc<Filling>>>,
    /// How long those waited who wrote to protected memory.
    pub(in crate::memory) waits: Times,
    /// Times that there was no room in the ring, and how long that lasted.
    pub(super) stalls: AtomicU64,
    pub(super) stalled_us: AtomicU64,
    /// Page blocks done, and those that the guest was about to write.
    pub(super) done: AtomicU64,
    pub(super) caught: AtomicU64,
}

impl Capture {
    pub(super) fn new(core: &Core, ring: usize) -> std::io::Result<Self> {
        Ok(Self {
            claims: (0..core.geometry.page_blocks()).map(|_| AtomicU8::new(Claim::Clean as u8)).collect(),
            ring: Ring::new(ring, core.geometry.page_block())?,
            stage: Mutex::new(Stage::Arming),
            staged: Condvar::new(),
            stopped: AtomicBool::new(false),
            error: Mutex::new(None),
            unreadable: AtomicI32::new(0),
            source: Mutex::new(None),
            waits: Times::default(),
            stalls: AtomicU64::new(0),
            stalled_us: AtomicU64::new(0),
            done: AtomicU64::new(0),
            caught: AtomicU64::new(0),
        })
    }

    fn place(&self, block: PageBlock) -> &AtomicU8 {
        &self.claims[to_usize(block.0)]
    }

    pub(super) fn claim(&self, block: PageBlock) -> Claim {
        Claim::of(self.place(block).load(Ordering::SeqCst))
    }

    /// Decides about a page block at the cut, when nobody else looks.
    pub(super) fn decide(&self, block: PageBlock, claim: Claim) {
        self.place(block).store(claim as u8, Ordering::SeqCst);
    }

    /// Takes a page block to be copied; false when somebody else has.
    pub(super) fn win(&self, block: PageBlock) -> bool {
        let (from, to) = (Claim::Clean as u8, Claim::Copying as u8);
        self.place(block).compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Says that a page block that was taken is copied.
    pub(super) fn saved(&self, block: PageBlock) {
        self.decide(block, Claim::Saved);
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Goes on to a stage; one that is stopped stays so.
    pub(super) fn go_on(&self, to: Stage) {
        let mut stage = self.stage.lock();
        if *stage != Stage::Stopped {
            *stage = to;
        }
        self.stopped.store(*stage == Stage::Stopped, Ordering::SeqCst);
        self.staged.notify_all();
    }

    /// Waits for the cut; false when it is stopped before.
    pub(super) fn wait_for_cut(&self) -> bool {
        let mut stage = self.stage.lock();
        while *stage == Stage::Arming {
            self.staged.wait(&mut stage);
        }
        *stage == Stage::Cut
    }

    /// Gives it up because of an error, of which the first counts.
    pub(in crate::memory) fn fail(&self, error: Error) {
        self.error.lock().get_or_insert(error);
        self.go_on(Stage::Stopped);
    }

    /// Returns an error if it was given up.
    pub(super) fn check(&self) -> Result<()> {
        if !self.is_stopped() {
            return Ok(());
        }
        let unreadable = self.unreadable.load(Ordering::SeqCst);
        if unreadable != 0 {
            let error = std::io::Error::from_raw_os_error(unreadable);
            return Err(Error::io("the memory of the guest cannot be read", error));
        }
        let error = self.error.lock();
        Err(error
            .as_ref()
            .map_or_else(|| Error::new(crate::error::Kind::Cancelled, "the save was given up"), Error::again))
    }

    /// Captures a page block that the guest is about to write. Called by the thread of the faults alone.
    pub(in crate::memory) fn keep(&self, core: &Core, block: PageBlock) {
        let mut waits_since = None;
        loop {
            match self.claim(block) {
                // What is captured is of no more use, and who was to do it may have panicked.
                Claim::Copying | Claim::Clean if self.is_stopped() => break,
                // The winner copies 64 KiB, but may have lost its processor meanwhile.
                Claim::Copying => std::thread::yield_now(),
                Claim::Clean if self.ring.is_full() => {
                    waits_since.get_or_insert_with(clock::now);
                    clock::sleep(LOOK);
                }
                Claim::Clean => {
                    if self.win(block) {
                        self.copy_to_ring(core, block);
                        break;
                    }
                }
                Claim::Saved | Claim::Parent | Claim::Source => break,
            }
        }
        if let Some(since) = waits_since {
            self.stalls.fetch_add(1, Ordering::Relaxed);
            let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.stalled_us.fetch_add(micros, Ordering::Relaxed);
        }
    }

    fn copy_to_ring(&self, core: &Core, block: PageBlock) {
        let span = core.span(block);
        let read = |bytes: &mut [u8]| core.regions[span.region].read(bytes, span.offset);
        if let Err(error) = self.ring.put(block, span.length, read) {
            self.unreadable.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::SeqCst);
            // The threads of the save look at this, and undo it all.
            self.stopped.store(true, Ordering::SeqCst);
            self.ring.close();
        }
        self.caught.fetch_add(1, Ordering::Relaxed);
        self.saved(block);
    }

    /// Hears that a page block is becoming zeros because somebody takes the memory away.
    pub(in crate::memory) fn removed(&self, block: PageBlock) {
        let cut = *self.stage.lock() == Stage::Cut;
        if cut && matches!(self.claim(block), Claim::Clean | Claim::Copying) {
            self.fail(
                Error::failed(format!("memory of the guest (page block {block}) was taken away before it was saved"))
                    .hint("save again when nothing gives memory back to the host"),
            );
        }
    }
}
