//! Saving the memory of a machine that runs.
//!
//! ```text
//! begin     everything is protected, in rounds, while the guest runs
//! settle    once more, right before the pause: what was written to since
//! cut       the guest is stopped: what was written to is protected again; this is the instant that is saved
//! wait      the guest runs: the sweeper takes page blocks in order, and what the guest writes to is caught before
//! commit    the state of the devices, and the file is a checkpoint
//! ```
//!
//! # Rules
//! 1. The cut costs what was written to since the last round, not what memory there is.
//! 2. A page block is captured once, by whoever comes first (see `capture`), and not let through before it is captured.
//! 3. What is caught goes into a ring of bounded size. When that is full the guest waits, and that is counted as a stall.
//! 4. Given up or failed, everything is unprotected first, and then it is told.
//! 5. Memory that was given back before the cut is saved as zeros; what is given back after it is saved as it was, or the save fails.
//! 6. With `keep_tracking` memory stays protected behind the save. The first write to each page block is noted then, and the next
//!    save can be based on this one.
//!
//! # After a crash
//! The file that was being written has another name until it is whole (see [`crate::checkpoint`]); memory dies with the machine.

mod capture;
mod ring;
mod stopped;
mod work;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(super) use capture::Capture;
use capture::{Claim, Stage};
pub use stopped::save_stopped;
use work::Work;

use super::figures::Waits;
use super::watch::{Core, Phase, Watch};
use crate::checkpoint::{Cut, Header, PageBlock, Writer, Written};
use crate::clock::{self, Instant};
use crate::error::{Error, Result};

/// Rounds of protecting at most, before the pause.
const ROUNDS_MAX: u32 = 4;
/// Page blocks that may be left after a round: protecting them again takes a tenth of a millisecond.
const FEW: u64 = 64;
/// How long the pause may wait for a copy that is being put in to end.
const SETTLED: Duration = Duration::from_secs(1);

/// How memory is saved.
#[derive(Debug, Clone, Copy)]
pub struct SaveOptions {
    /// Bytes of the ring for what the guest is about to write.
    pub ring: usize,
    /// Memory stays protected behind the save, so that the next one can be based on it. Costs the guest a fault for each page block
    /// that it writes to.
    pub keep_tracking: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { ring: 64 << 20, keep_tracking: false }
    }
}

/// How a save is going.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SaveFigures {
    /// Page blocks that are done, and that there are.
    pub done: u64,
    /// See `done`.
    pub page_blocks: u64,
    /// Page blocks that the guest was about to write when they were captured.
    pub caught: u64,
    /// Page blocks that were protected again in the pause.
    pub rearmed: u64,
    /// How long protecting everything took while the guest ran, in microseconds.
    pub arming_us: u64,
    /// How long the cut took, in microseconds.
    pub cut_us: u64,
    /// How long those waited who wrote to protected memory.
    pub waits: Waits,
    /// Times that the guest waited for room in the ring.
    pub stalls: u64,
    /// How long that lasted in all, in microseconds.
    pub stalled_us: u64,
    /// Storage blocks written: so many writes of data.
    pub writes: u64,
    /// Bytes of page blocks that are stored.
    pub bytes: u64,
    /// Page blocks that are zeros.
    pub zeros: u64,
    /// Page blocks that are as in the parent.
    pub inherited: u64,
}

/// A save of a machine that runs. Dropping it gives it up.
#[derive(Debug)]
pub struct Saver {
    core: Arc<Core>,
    capture: Arc<Capture>,
    writer: Option<Arc<Writer>>,
    sweeper: Option<JoinHandle<()>>,
    taker: Option<JoinHandle<()>>,
    uuid: Uuid,
    based: bool,
    keep_tracking: bool,
    cut: bool,
    rearmed: u64,
    arming: Duration,
    cutting: Duration,
}

impl Saver {
    /// Begins: when this returns memory is protected, but for a few page blocks. The guest runs meanwhile. A writer whose plan has a
    /// parent makes a checkpoint of what was written since that one: it must be the last that was saved of this memory, or the one that it
    /// was restored from, with tracking kept.
    ///
    /// # Errors
    /// `Busy` when this memory is being saved already; `Failed` when nothing is known of what was written since the parent; errors of the host. Nothing is
    /// protected then.
    pub fn begin(watch: &Watch, writer: Writer, options: SaveOptions) -> Result<Self> {
        let core = Arc::clone(watch.core());
        let plan = writer.plan();
        if plan.geometry != core.geometry {
            return Err(Error::usage("a checkpoint of another memory cannot be saved from this one"));
        }
        let (uuid, parent) = (plan.uuid, writer.parent());
        let capture = Arc::new(Capture::new(&core, options.ring).map_err(no_memory)?);
        core.begin_save(&capture, parent)?;
        let work = Work {
            core: Arc::clone(&core),
            capture: Arc::clone(&capture),
            writer: Arc::new(writer),
            keep_tracking: options.keep_tracking,
        };
        let mut saver = Self {
            core,
            capture,
            writer: Some(Arc::clone(&work.writer)),
            sweeper: None,
            taker: None,
            uuid,
            based: parent.is_some(),
            keep_tracking: options.keep_tracking,
            cut: false,
            rearmed: 0,
            arming: Duration::ZERO,
            cutting: Duration::ZERO,
        };
        // From here on dropping it undoes everything.
        let spawn = |name: &str, run: fn(&Work)| {
            let work = work.clone();
            std::thread::Builder::new().name(name.into()).spawn(move || run(&work)).map_err(no_memory)
        };
        saver.taker = Some(spawn("save-caught", work::take)?);
        saver.sweeper = Some(spawn("save-sweep", work::sweep)?);
        let begun = clock::now();
        saver.arm().map_err(|error| Error::io("the memory of the guest cannot be protected", error))?;
        saver.arming = begun.elapsed();
        Ok(saver)
    }

    fn arm(&self) -> std::io::Result<()> {
        if self.core.phase() == Phase::Off {
            self.core.track()?;
        }
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            let count = self.core.protect_open(false)?;
            // A guest that writes to as much as before in that time does not get better.
            if count <= FEW || count > before / 2 {
                break;
            }
            before = count;
        }
        Ok(())
    }

    /// Protects what was written to since; returns how many page blocks that was. Called right before the pause, so that little is left
    /// for it.
    ///
    /// # Errors
    /// What has stopped the save meanwhile; errors of the host.
    pub fn settle(&self) -> Result<u64> {
        self.capture.check()?;
        self.core.protect_open(false).map_err(|error| Error::io("the memory of the guest cannot be protected", error))
    }

    /// Makes this the instant that is saved. Nobody may write to the memory while this runs: processors and devices are stopped. They go on when
    /// it returns, and may read and write memory as they like.
    ///
    /// # Errors
    /// What has stopped the save meanwhile; `Busy` when memory is just being taken away. The guest goes on in any case, and the save is
    /// to be dropped.
    pub fn cut(&mut self) -> Result<()> {
        assert!(!self.cut, "a save has one instant");
        self.capture.check()?;
        let begun = clock::now();
        self.rearmed = self.cut_at(begun)?;
        self.cutting = begun.elapsed();
        self.cut = true;
        self.capture.go_on(Stage::Cut);
        Ok(())
    }

    fn cut_at(&self, begun: Instant) -> Result<u64> {
        let core = &*self.core;
        let host = |error| Error::io("the memory of the guest cannot be protected", error);
        let busy = || Error::busy("memory of the guest is being given back to the host").hint("save again after that");
        let filling = core.filling.read().clone();
        // What is being taken away is gone before the cut, or goes after it.
        let _none_is_taken = core.taking.try_write_until(begun + SETTLED).ok_or_else(busy)?;
        let _outside = core.gate.close();
        let removals = core.removals.load(Ordering::SeqCst);
        // Every page block is in memory as a whole from here on, or not at all.
        let _still = match &filling {
            Some(filling) => Some(filling.stop_whole(begun + SETTLED).ok_or_else(busy)?),
            None => None,
        };
        // Nothing waits for the thread of the faults in here, which waits for us: a message that is in the way ends it.
        let rearmed = core.protect_open(true).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => busy(),
            _ => host(error),
        })?;
        for number in 0..core.geometry.page_blocks() {
            let block = PageBlock(number);
            let claim = match &filling {
                _ if self.based && !core.changed.contains(number) => Claim::Parent,
                Some(filling) if !filling.is_in_memory(block) => Claim::Source,
                _ => Claim::Clean,
            };
            self.capture.decide(block, claim);
        }
        if core.removals.load(Ordering::SeqCst) != removals || filling.as_ref().is_some_and(|f| f.has_parts()) {
            return Err(busy());
        }
        *self.capture.source.lock() = filling.clone();
        core.changed.clear();
        core.set_since(None);
        core.set_phase(Phase::Saving);
        Ok(rearmed)
    }

    /// Returns how it is going.
    #[must_use]
    pub fn figures(&self) -> SaveFigures {
        let written = self.writer.as_ref().map(|writer| writer.written()).unwrap_or_default();
        self.figures_of(&written)
    }

    fn figures_of(&self, written: &Written) -> SaveFigures {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        SaveFigures {
            done: self.capture.done.load(Ordering::Relaxed),
            page_blocks: self.core.geometry.page_blocks(),
            caught: self.capture.caught.load(Ordering::Relaxed),
            rearmed: self.rearmed,
            arming_us: micros(self.arming),
            cut_us: micros(self.cutting),
            waits: self.capture.waits.told(),
            stalls: self.capture.stalls.load(Ordering::Relaxed),
            stalled_us: self.capture.stalled_us.load(Ordering::Relaxed),
            writes: u64::from(written.blocks),
            bytes: written.bytes,
            zeros: written.zeros,
            inherited: written.inherited,
        }
    }

    /// Tells whether all page blocks are captured and written, or it was given up.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let ended = |thread: &Option<JoinHandle<()>>| thread.as_ref().is_none_or(JoinHandle::is_finished);
        ended(&self.sweeper) && ended(&self.taker)
    }

    /// Waits until all page blocks are captured and written.
    ///
    /// # Errors
    /// What has stopped the save; the guest is let go by then.
    pub fn wait(&mut self) -> Result<()> {
        assert!(self.cut, "before the cut nothing is saved");
        self.join();
        self.capture.check()
    }

    fn join(&mut self) {
        for thread in [self.sweeper.take(), self.taker.take()].into_iter().flatten() {
            if thread.join().is_err() {
                // Each of them catches what it panics of.
                tracing::error!("a thread of a save has ended on a mistake in this program");
            }
        }
    }

    /// Makes the file a checkpoint, with the state of the devices.
    ///
    /// # Errors
    /// What has stopped the save; errors of the host. There is no checkpoint then.
    pub fn commit(mut self, cut: &Cut<'_>) -> Result<(Header, SaveFigures)> {
        self.wait()?;
        let writer = self.writer.take().expect("it is taken here");
        let written = writer.written();
        let writer = Arc::into_inner(writer).expect("the threads that had it have ended");
        let header = writer.commit(cut)?;
        if self.keep_tracking {
            self.core.set_since(Some(self.uuid));
        }
        let figures = self.figures_of(&written);
        self.cut = false;
        self.core.end_save();
        // What is left to undo is nothing: the writer is gone.
        Ok((header, figures))
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if self.writer.is_none() && !self.cut {
            return;
        }
        // Given up: the guest is let go before anything else.
        self.capture.fail(Error::new(crate::error::Kind::Cancelled, "the save was given up"));
        self.core.set_since(None);
        self.core.release();
        self.join();
        self.core.end_save();
    }
}

fn no_memory(error: std::io::Error) -> Error {
    Error::io("the host has not what saving the memory of a guest takes", error)
}
