//! Restoring the memory of a machine: it runs at once, and memory comes when it is touched.
//!
//! ```text
//! begin     memory is empty and watched; the state of the machine is set after this, which touches memory already
//! event     what the owner is to know: a part that could not be had, or that all is there
//! stop      the machine is gone, or never was
//! ```
//!
//! # Rules
//! 1. A fault finds the storage block, which is read in one I/O; the page block is checked and expanded; the page that was touched is put in
//!    first, then the rest of the page block, then what else the storage block holds.
//! 2. What nobody waits for is filled in the background and yields between two page blocks: first what the last machine touched
//!    that was restored from this checkpoint ([`Touched`]), then what was hot when it was saved, then the rest.
//! 3. Long runs of zeros are left to the kernel and not watched. Short ones are answered page by page: each run costs a mapping,
//!    of which a process has 65,530.
//! 4. A part that cannot be had stays missing, whoever waits for it waits, and the owner is told. It is read again when the owner says so,
//!    or becomes a SIGBUS. Nothing else is ever put in its place.
//! 5. When all is there nothing is watched any more, and the checkpoint is closed.
//!
//! # After a crash
//! There is nothing of a restore on disk but a hint about what was touched.

mod cache;
mod eager;
mod filling;
mod order;
mod status;
mod touched;
mod worker;

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

pub use eager::restore_all;
use filling::parts_of;
pub(super) use filling::{Answer, Filling};
use status::Status;
pub use status::{Event, Failure, RestoreFigures};
pub use touched::Touched;

use super::bits::Bits;
use super::watch::{Core, Run, Watch};
use crate::checkpoint::{Found, PageBlock, Place, Reader};
use crate::error::{Error, Result};
use crate::sys::process;
use crate::sys::userfaultfd::Userfault;
use uuid::Uuid;

/// Bytes of a run of zeros that is left to the kernel.
const ZERO_RUN: u64 = 2 << 20;
/// Runs that are watched at most: each is a mapping, and so is what lies between.
const RUNS_MAX: usize = 8192;
/// Threads that fill memory at most, unless it is said.
const WORKERS_MAX: usize = 8;

/// How memory is restored.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Threads that read, expand and fill.
    pub workers: usize,
    /// Memory is filled that nobody waits for.
    pub background: bool,
    /// What the last machine touched that was restored from this checkpoint.
    pub touched: Option<Touched>,
    /// All memory is protected from the beginning, so that the next checkpoint can be based on this one. Takes time before the guest
    /// runs: some 20 ms for each GiB.
    pub keep_tracking: bool,
    /// Nobody hears of events yet, so what cannot be had is a SIGBUS for who touches it, until [`Restorer::attend`]: for those
    /// who touch memory before they can look after the restore.
    pub unattended: bool,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).clamp(2, WORKERS_MAX);
        Self { workers, background: true, touched: None, keep_tracking: false, unattended: false }
    }
}

/// A restore of a machine that runs. Dropping it stops it, see [`Restorer::stop`].
#[derive(Debug)]
pub struct Restorer {
    core: Arc<Core>,
    // Weak, so that the checkpoint is closed when all is there.
    filling: Weak<Filling>,
    status: Arc<Status>,
    workers: Vec<JoinHandle<()>>,
    checkpoint: Uuid,
    /// Page blocks of the checkpoint in one of the memory.
    parts: u64,
}

impl Restorer {
    /// Begins to restore memory that is empty. From the moment this returns it may be touched by anybody; nothing has come yet.
    ///
    /// # Errors
    /// As [`can_restore_lazily`]; `Usage` for memory that is another than that of the checkpoint, or not empty; `Corrupt` for an index that is
    /// damaged; errors of the host.
    pub fn begin(watch: &Watch, reader: Reader, options: RestoreOptions) -> Result<Self> {
        let core = Arc::clone(watch.core());
        // Who serves another process ends that where a page cannot be poisoned.
        if !core.is_elsewhere() {
            can_restore_lazily(&core.faults)?;
        }
        check(&core, &reader)?;
        let host = |error| Error::io("the memory of the guest cannot be restored", error);
        let present = Bits::new(core.geometry.page_blocks());
        find_zeros(&core, &reader, &present)?;
        let left = core.geometry.page_blocks() - present.count();
        let status = Arc::new(Status::new(&core.geometry, left));
        let checkpoint = reader.header().uuid;
        let parts = parts_of(&core, &reader);
        let filling = Arc::new(Filling::new(&core, reader, Arc::clone(&status), &present, &options));
        core.fill_from(Some(Arc::clone(&filling)));
        let mut restorer =
            Self { core, filling: Arc::downgrade(&filling), status, workers: Vec::new(), checkpoint, parts };
        // From here on dropping it ends it: what is missing is a SIGBUS for who touches it.
        restorer.core.watch_missing(watched(&restorer.core, &present)).map_err(host)?;
        if options.keep_tracking {
            restorer.core.track().map_err(host)?;
            restorer.core.set_since(Some(checkpoint));
        }
        let mut plan = Some(options.touched.filter(|touched| touched.checkpoint() == checkpoint));
        for number in 0..options.workers.max(1) {
            let (core, filling, plan) = (Arc::clone(&restorer.core), Arc::clone(&filling), plan.take());
            let run = move || worker::run(&core, &filling, plan);
            let spawned = std::thread::Builder::new().name(format!("fill-{number}")).spawn(run);
            match spawned {
                Ok(worker) => restorer.workers.push(worker),
                Err(error) if number == 0 => return Err(host(error)),
                Err(error) => tracing::warn!("memory is restored by fewer threads: {error}"),
            }
        }
        Ok(restorer)
    }

    /// Says that somebody waits for events from now on, see [`RestoreOptions::unattended`].
    pub fn attend(&self) {
        if let Some(filling) = self.filling.upgrade() {
            filling.attend();
        }
    }

    /// Waits for something that the owner is to know; a failure is told once, how the restore ended every time.
    #[must_use]
    pub fn event(&self, time: Duration) -> Event {
        self.status.event(time)
    }

    /// Returns all parts that could not be had, also those that nobody waits for.
    #[must_use]
    pub fn failures(&self) -> Vec<Failure> {
        self.status.failures()
    }

    /// Reads again what could not be had. What fails again is told again.
    pub fn retry(&self) {
        if let Some(filling) = self.filling.upgrade() {
            filling.retry();
        }
    }

    /// Makes all that is not in memory a SIGBUS for whoever touches it, and for those who wait: the machine is ending.
    pub fn poison_all(&self) {
        if let Some(filling) = self.filling.upgrade() {
            filling.poison(&self.core);
        }
    }

    /// Makes a part that could not be had a SIGBUS for whoever touches it, for owners who cannot stop their machine. All others go on.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub fn poison(&self, block: PageBlock) -> std::io::Result<()> {
        self.filling.upgrade().map_or(Ok(()), |filling| filling.poison_one(&self.core, block))
    }

    /// Makes all that is missing a SIGBUS, also for those who touch it when nobody serves it any more.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub fn poison_rest(&self) -> std::io::Result<()> {
        self.filling.upgrade().map_or(Ok(()), |filling| filling.poison_rest(&self.core))
    }

    /// Waits until all memory is there.
    ///
    /// # Errors
    /// The first part that could not be had when only such parts are left, and what ended the restore before.
    pub fn wait_filled(&self) -> Result<()> {
        self.status.wait_filled()
    }

    /// Returns how it is going.
    #[must_use]
    pub fn figures(&self) -> RestoreFigures {
        self.status.figures()
    }

    /// Returns what the machine touched so far, for [`Touched::store`].
    #[must_use]
    pub fn touched(&self) -> Touched {
        self.status.touched(self.checkpoint, self.parts)
    }

    /// Stops it. Unless all memory is there, what is missing is poisoned first, and stays so: the machine is over.
    pub fn stop(mut self) -> RestoreFigures {
        self.end();
        self.status.figures()
    }

    fn end(&mut self) {
        if let Some(filling) = self.filling.upgrade() {
            if self.status.left() > 0 {
                filling.poison(&self.core);
            }
            filling.stop();
        }
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                // Each of them catches what it panics of.
                tracing::error!("a thread that fills memory has ended on a mistake in this program");
            }
        }
    }
}

impl Drop for Restorer {
    fn drop(&mut self) {
        self.end();
    }
}

/// Tells whether memory can be restored while its machine runs. Without poison (Linux 6.6) who waits for a page that cannot be
/// had would wait for ever, in the kernel.
///
/// # Errors
/// `Unsupported` that names the kernel.
pub fn can_restore_lazily(faults: &Userfault) -> Result<()> {
    if faults.can_poison() {
        return Ok(());
    }
    let kernel = format!("this kernel, Linux {}, has no poison", process::kernel());
    let what = format!("memory cannot be restored while the guest runs: userfaultfd of {kernel}");
    Err(Error::unsupported(what).hint("Linux 6.6 and later have it; --eager reads all memory before the guest runs"))
}

fn check(core: &Core, reader: &Reader) -> Result<()> {
    let (ours, theirs) = (&core.geometry, reader.geometry());
    let parts = u32::try_from(parts_of(core, reader)).unwrap_or(0);
    let fits = match core.is_elsewhere() {
        // Where the guest sees it is not known of such memory.
        true => theirs.coarser(parts).is_some_and(|theirs| ours.cuts_as(&theirs)),
        false => ours.fits(theirs),
    };
    if !fits {
        let what = "the checkpoint is of a machine with other memory";
        return Err(Error::usage(format!("{what}: {} bytes, not {}", theirs.memory(), ours.memory())));
    }
    if core.filling.read().is_some() {
        return Err(Error::busy("the memory of this machine is being restored already"));
    }
    // What is there already of the memory of another process stays: nothing is put where something is.
    for region in core.regions.iter().filter(|_| !core.is_elsewhere()) {
        let data = region.next_data(0).map_err(|error| Error::io("the memory of the guest cannot be read", error))?;
        if let Some((at, _)) = data {
            let address = region.address() + at;
            return Err(Error::usage(format!(
                "memory that is restored must be empty, and there is something at {address:#x}"
            )));
        }
    }
    Ok(())
}

/// Puts all page blocks of zeros into a set: those of the memory, of which all parts are.
fn find_zeros(core: &Core, reader: &Reader, zeros: &Bits) -> Result<()> {
    let parts = parts_of(core, reader);
    let mut before = 0;
    reader.layers()[0].places(PageBlock(0), reader.geometry().page_blocks(), |block, place| {
        let zero = match place {
            Place::Zero => true,
            Place::Stored(_) => false,
            Place::Parent => reader.place(block)? == Found::Zero,
        };
        before = if zero { before + 1 } else { 0 };
        if (block.0 + 1).is_multiple_of(parts) && before >= parts {
            zeros.insert(block.0 / parts);
        }
        Ok(())
    })
}

/// Returns what is to be watched: everything but long runs of zeros.
fn watched(core: &Core, zeros: &Bits) -> Vec<Run> {
    let mut shortest = ZERO_RUN;
    loop {
        let runs: Vec<Run> = core.whole().flat_map(|whole| watched_of(core, zeros, whole, shortest)).collect();
        if runs.len() <= RUNS_MAX {
            return runs;
        }
        shortest *= 2;
    }
}

fn watched_of(core: &Core, zeros: &Bits, whole: Run, shortest: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let Run { region, len, .. } = whole;
    for number in core.blocks_of(region, 0..len).filter(|number| !zeros.contains(*number)) {
        let span = core.span(PageBlock(number));
        let end = span.offset + span.length as u64;
        match runs.last_mut() {
            Some(last) if span.offset - (last.offset + last.len) < shortest => last.len = end - last.offset,
            // Zeros at the beginning are a run like any other.
            None if span.offset < shortest => runs.push(Run { region, offset: 0, len: end }),
            _ => runs.push(Run { region, offset: span.offset, len: span.length as u64 }),
        }
    }
    if let Some(last) = runs.last_mut()
        && len - (last.offset + last.len) < shortest
    {
        last.len = len - last.offset;
    }
    runs
}
