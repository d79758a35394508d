//! The two threads of a save: the sweeper, which takes page blocks in order, and the taker, which empties the ring.
//!
//! # Rules
//! 1. A page block is Saved as soon as its bytes are in memory of ours. Compressing and writing come after: nobody waits for them.
//! 2. A hole of the file is never read: a page that was a hole at any time since the cut, in a page block that nobody has been let
//!    through to, was zeros at the cut.
//! 3. When one of them fails everything is unprotected before anything is reported; so it is when it panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::capture::{Capture, Claim};
use crate::checkpoint::{PageBlock, Place, Pushed, Span, Staging, Writer, is_zero};
use crate::error::{Error, Result};
use crate::memory::watch::{Core, Phase};
use crate::sys::pages::Pages;

/// What both threads work with.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) core: Arc<Core>,
    pub(super) capture: Arc<Capture>,
    pub(super) writer: Arc<Writer>,
    /// Memory stays protected behind the save, for the next one.
    pub(super) keep_tracking: bool,
}

/// Page blocks on their way into the file.
pub(super) struct Out<'a> {
    writer: &'a Writer,
    staging: Staging,
    hot: bool,
}

impl<'a> Out<'a> {
    pub(super) fn new(writer: &'a Writer, hot: bool) -> Result<Self> {
        let staging = Staging::new(&writer.plan().geometry);
        let staging = staging.map_err(|e| Error::io("there is no memory for what is saved", e))?;
        Ok(Self { writer, staging, hot })
    }

    pub(super) fn push(&mut self, block: PageBlock, bytes: &[u8]) -> Result<()> {
        if is_zero(bytes) {
            return self.writer.set(block, Place::Zero);
        }
        if self.staging.push(block, bytes) == Pushed::Full {
            self.writer.write(&mut self.staging, self.hot)?;
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<()> {
        while !self.staging.is_empty() {
            self.writer.write(&mut self.staging, self.hot)?;
        }
        Ok(())
    }
}

/// What is known of the holes of a memory that is gone through in order.
pub(super) struct Holes<'a> {
    core: &'a Core,
    region: usize,
    /// The next pages that are there; `None` when none follow.
    data: Option<(u64, u64)>,
}

impl<'a> Holes<'a> {
    pub(super) fn new(core: &'a Core) -> Self {
        Self { core, region: usize::MAX, data: None }
    }

    /// Forgets what it knows: holes may be data by now.
    pub(super) fn forget(&mut self) {
        self.region = usize::MAX;
    }

    /// Tells whether nothing of a page block is there, which is not before those that it was asked about.
    pub(super) fn has(&mut self, span: &Span) -> Result<bool> {
        if span.region != self.region {
            (self.region, self.data) = (span.region, Some((0, 0)));
        }
        if self.data.is_some_and(|(_, end)| end <= span.offset) {
            let data = self.core.regions[span.region].next_data(span.offset);
            self.data = data.map_err(|e| Error::io("the memory of the guest cannot be read", e))?;
        }
        Ok(self.data.is_none_or(|(start, _)| start >= span.offset + span.length as u64))
    }
}

/// Does the work of a thread; when it fails or panics the guest is let go first.
fn guarded(work: &Work, what: impl FnOnce() -> Result<()>) {
    let done = catch_unwind(AssertUnwindSafe(what));
    let error = match done {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(_) => Error::failed("the save ended on a mistake in this program"),
    };
    work.capture.fail(error);
    work.core.release();
}

/// Runs the sweeper.
pub(super) fn sweep(work: &Work) {
    guarded(work, || {
        if !work.capture.wait_for_cut() {
            return work.capture.check();
        }
        let mut out = Out::new(&work.writer, false)?;
        sweep_all(work, &mut out)?;
        // Nobody captures anything any more.
        if work.keep_tracking {
            let _outside = work.core.gate.close();
            work.core.set_phase(Phase::Tracking);
        } else {
            work.core.release();
        }
        work.capture.ring.close();
        out.finish()
    });
    work.capture.ring.close();
}

fn sweep_all(work: &Work, out: &mut Out<'_>) -> Result<()> {
    let Work { core, capture, writer, .. } = work;
    let host = |e| Error::io("the memory of the guest cannot be read", e);
    let mut raw = Pages::new(core.geometry.page_block()).map_err(host)?;
    let mut holes = Holes::new(core);
    for number in 0..core.geometry.page_blocks() {
        capture.check()?;
        let block = PageBlock(number);
        let span = core.span(block);
        match capture.claim(block) {
            Claim::Saved | Claim::Copying => continue,
            Claim::Parent => {
                writer.set(block, Place::Parent)?;
                capture.done.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Claim::Source => {
                take_from_source(capture, block, &mut raw[..span.length], out)?;
                continue;
            }
            Claim::Clean => {}
        }
        let hole = holes.has(&span)?;
        if !capture.win(block) {
            continue;
        }
        if hole {
            capture.saved(block);
            writer.set(block, Place::Zero)?;
            continue;
        }
        let read = core.regions[span.region].read(&mut raw[..span.length], span.offset);
        capture.saved(block);
        read.map_err(host)?;
        out.push(block, &raw[..span.length])?;
    }
    Ok(())
}

/// Enters a page block that was not in memory at the cut: what it would have become is still where it is restored from.
fn take_from_source(capture: &Capture, block: PageBlock, bytes: &mut [u8], out: &mut Out<'_>) -> Result<()> {
    let source = capture.source.lock().clone().expect("there is one if there is such a page block");
    source.fetch(block, bytes)?;
    capture.done.fetch_add(1, Ordering::Relaxed);
    out.push(block, bytes)
}

/// Runs the taker.
pub(super) fn take(work: &Work) {
    let ring = &work.capture.ring;
    ring.taken_by_this_thread();
    guarded(work, || {
        ring.warm();
        let mut out = Out::new(&work.writer, true)?;
        while let Some(pushed) = ring.take(|block, bytes| out.push(block, bytes)) {
            pushed?;
            work.capture.check()?;
        }
        work.capture.check()?;
        out.finish()
    });
}
