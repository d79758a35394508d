//! A machine that goes on from a checkpoint: it runs before its memory has been read.
//!
//! ```text
//!   nothing is in the way --ready: disks are taken back, or cloned--> disks are opened
//!   memory is empty and watched --state is set, which touches it already--> the guest runs, its memory comes
//! ```
//!
//! # Rules
//! 1. What is only looked at comes first: whether this host can have the state at all, whether network cards are free. Then
//!    the disks become what they were ([`Restore::ready`]), and then nothing but the host itself can be in the way.
//! 2. Setting the state touches memory already, and nobody could be asked then what is to be done: what cannot be had is a
//!    bus error until the machine is made ([`RestoreOptions::unattended`]), and the restore is refused with its place.
//! 3. A page that cannot be had makes the guest stand still ([`super::cpus`], rule 6), with the page, the file and the reason
//!    in what is told about the machine. It is read again when somebody says so.
//! 4. To end such a guest, what is missing is made a bus error first: so whoever waits for it in the kernel comes out.
//!
//! # After a crash
//! The checkpoint is as it was. Of the machine there is nothing but its disks, as after a power cut.

use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::frozen::Frozen;
use super::means::Means;
use super::runner::Runner;
use super::{Definition, Machine, MachineState, Settings, Stuck};
use crate::checkpoint::{Access, Folder, Name, Reader};
use crate::clock;
use crate::error::{Error, Result};
use crate::memory::{
    Event, Failure, RestoreFigures, RestoreOptions, Restorer, Touched, Watch, can_restore_lazily, restore_all,
};
use crate::progress::Silent;
use crate::sys::userfaultfd::Userfault;

/// How often it is looked whether a restore is to be attended to any more.
const LOOK: Duration = Duration::from_millis(100);
/// How often whoever ends a restore looks whether others have let go of it.
const LET_GO: Duration = Duration::from_millis(1);

/// A checkpoint that a machine goes on from.
pub struct Restore<'a> {
    /// Its name.
    pub name: Name,
    /// The checkpoint.
    pub reader: Reader,
    /// The state in it.
    pub state: MachineState,
    /// All memory is read before the guest runs.
    pub eager: bool,
    /// What the last machine touched that went on from it.
    pub touched: Option<Touched>,
    /// Makes the disks what they were; called when nothing that can be looked at is in the way.
    pub ready: Box<dyn FnOnce() -> Result<()> + 'a>,
}

impl std::fmt::Debug for Restore<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restore").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Restore<'_> {
    /// Opens a checkpoint; returns also what its machine was made of.
    ///
    /// # Errors
    /// Those of the checkpoint, and of the state in it.
    pub fn open(folder: &Folder, name: Name, eager: bool) -> Result<(Self, Definition)> {
        let reader = Reader::open(folder, &name, Access::Cached)?;
        let Frozen { definition, state } = Frozen::read(&reader)?;
        let touched = Touched::load(folder, &name, reader.header());
        Ok((Self { name, reader, state, eager, touched, ready: Box::new(|| Ok(())) }, definition))
    }

    /// Finds what is in the way, as far as that can be looked at.
    ///
    /// # Errors
    /// What this host lacks.
    pub(super) fn check(&self, settings: &Settings, means: &Means, faults: &Result<Userfault>) -> Result<()> {
        let faults = faults.as_ref().map_err(Error::again)?;
        if !self.eager {
            can_restore_lazily(faults)?;
        }
        means.check_host(&self.state, settings)
    }

    /// Makes the machine, whose memory is watched from then on.
    pub(super) fn begin(self: Box<Self>, settings: &Settings, means: &Means, faults: Userfault) -> Result<Begun> {
        let Self { reader, state, eager, touched, name, .. } = *self;
        let (mut watch, mut restorer) = (None, None);
        let machine = Machine::go_on(settings, means, &state, |memory| {
            let watched = watch.insert(Watch::new(faults, memory, reader.geometry().sizes())?);
            let options = RestoreOptions { touched, unattended: true, ..RestoreOptions::default() };
            if eager {
                return restore_all(watched, &reader, options.workers, &Silent);
            }
            restorer = Some(Arc::new(Restorer::begin(watched, reader, options)?));
            Ok(())
        });
        let machine = machine.map_err(|error| restorer.as_deref().map_or(error.again(), |it| why(it, error)))?;
        if let Some(restorer) = &restorer {
            restorer.attend();
        }
        let machine = Arc::new(machine);
        let filling = restorer.map(|restorer| Filling { restorer, name, machine: Arc::downgrade(&machine) });
        Ok(Begun { machine, watch: Arc::new(watch.expect("memory was filled")), filling })
    }
}

/// A machine whose memory comes.
pub(super) struct Begun {
    // In the order in which they are dropped, if nobody takes them: who waits for memory is let go before the watch.
    pub(super) filling: Option<Filling>,
    pub(super) machine: Arc<Machine>,
    pub(super) watch: Arc<Watch>,
}

/// Memory that comes.
#[derive(Debug, Clone)]
pub(super) struct Filling {
    pub(super) restorer: Arc<Restorer>,
    /// The checkpoint.
    pub(super) name: Name,
    pub(super) machine: Weak<Machine>,
}

/// What is told about the memory of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryInfo {
    /// The checkpoint that it comes from.
    pub checkpoint: String,
    /// How that goes.
    #[serde(flatten)]
    pub figures: RestoreFigures,
}

impl Filling {
    pub(super) fn info(&self) -> MemoryInfo {
        MemoryInfo { checkpoint: self.name.to_string(), figures: self.restorer.figures() }
    }

    /// Makes the guest stand still: not by way of the state of the runner, for whoever has that may wait for just this memory.
    fn stick(&self, stuck: Stuck) {
        if let Some(machine) = self.machine.upgrade() {
            machine.stick(stuck);
        }
    }
}

/// Returns why a machine could not be made: what it took of its memory could not be had, or else `error`.
fn why(restorer: &Restorer, error: Error) -> Error {
    match restorer.event(LOOK) {
        Event::Failed(failure) => failure
            .error
            .again()
            .context(format!("the guest cannot go on: it takes the page block at {:#x} to begin", failure.address)),
        Event::Broken(error) => error,
        Event::Filled | Event::Stopped | Event::Nothing => error,
    }
}

fn told(failure: &Failure) -> String {
    format!("the page block at {:#x} of the guest: {}", failure.address, failure.error)
}

impl Runner {
    /// Attends to memory that comes, until all is there or the machine has ended.
    pub(super) fn attend(&self) {
        let Some(filling) = self.filling.lock().clone() else { return };
        loop {
            let stuck = match filling.restorer.event(LOOK) {
                Event::Failed(failure) => Stuck { what: told(&failure), for_good: false },
                Event::Broken(error) => {
                    filling.stick(Stuck { what: error.to_string(), for_good: true });
                    break;
                }
                Event::Filled => {
                    tracing::info!("all memory of the guest has come from the checkpoint {}", filling.name);
                    break;
                }
                Event::Stopped => break,
                Event::Nothing if self.filling.lock().is_none() => break,
                Event::Nothing => continue,
            };
            filling.stick(stuck);
        }
        self.note_touched(&filling);
    }

    /// Keeps what the guest touched, for the next one that goes on from this checkpoint.
    fn note_touched(&self, filling: &Filling) {
        if filling.name.machine() == self.home.name()
            && let Err(error) = filling.restorer.touched().store(&self.folder, &filling.name)
        {
            tracing::debug!("what the guest touched first is not noted: {error}");
        }
    }

    /// Ends what brings memory that nobody wants any more.
    pub(super) fn end_filling(&self) {
        let Some(filling) = self.filling.lock().take() else { return };
        filling.restorer.poison_all();
        // Whoever attends to it notices, and it is to end here.
        while Arc::strong_count(&filling.restorer) > 1 {
            clock::sleep(LET_GO);
        }
    }

    /// Lets go of whoever waits for memory that has not come: the guest is to end. One that is not stuck and has time to
    /// switch itself off is let be.
    pub(super) fn poison(&self, at_once: bool) {
        if let Some(filling) = &*self.filling.lock()
            && (at_once || filling.machine.upgrade().is_some_and(|machine| machine.stuck().is_some()))
        {
            filling.restorer.poison_all();
        }
    }
}
