//! A checkpoint of a machine that runs: its memory, the state of its parts, and snapshots of its disks, all of one instant.
//!
//! ```text
//!   guest runs   memory is protected, in rounds; disks are flushed; devices are drained
//!   stands still processors stop; snapshots of the disks are asked for; what was written to meanwhile is protected again;
//!                the state is read; the snapshots have been cut
//!   guest runs   memory is written, by whoever comes first: the guest or the sweeper; the snapshots become durable
//!   commit       the file gets its name
//! ```
//!
//! # Rules
//! 1. The guest stands still for as short a time as can be: nothing is written, and nothing is waited for but what
//!    cannot be helped. What takes too long, as a request to a disk, ends the checkpoint and not the guest.
//! 2. Whatever fails, the guest runs on, and there is no checkpoint and none of its snapshots.
//! 3. One at a time. A machine that is paused stays so.
//! 4. The disks are those of the pool. A file that the guest writes to has no snapshots, so there is no checkpoint of such a
//!    machine.
//!
//! # After a crash
//! The file has its name or has it not ([`crate::checkpoint`]). Snapshots of one that has it not are removed when the pool is
//! opened the next time, when a checkpoint of that name is made, or with `checkpoint rm`.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::frozen::{self, Frozen};
use super::home::DiskSource;
use super::instant::{Taken, Taking};
use super::runner::{Runner, State};
use super::{Machine, MachineState};
use crate::checkpoint::{Cut, DiskSnapshot, Name, Plan, Writer};
use crate::clock;
use crate::error::{Error, Result};
use crate::memory::{SaveFigures, SaveOptions, Saver};

/// How long requests to disks may take before the checkpoint is given up.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is noted how a checkpoint is going.
const LOOK: Duration = Duration::from_millis(50);

/// A checkpoint that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Saved {
    /// Its name, without the machine.
    pub name: String,
    /// The checkpoint that it is based on.
    pub parent: Option<String>,
    /// `DISK@SNAPSHOT` of the same instant.
    pub disks: Vec<String>,
    /// How long the guest stood still, in microseconds; 0 for one that was paused before.
    pub pause_us: u64,
    /// How the memory was saved.
    pub memory: SaveFigures,
}

/// What was taken while the guest stood still.
struct Instant {
    state: MachineState,
    disks: Option<Box<dyn Taking>>,
    created: u64,
}

impl Runner {
    /// Makes a checkpoint; an incremental one has what was written since the last of this life of the machine, which it needs
    /// from then on.
    ///
    /// # Errors
    /// `Busy` when one is being made already, or a disk takes too long; `Exists`; what the disks and the host say. The guest
    /// runs on, and nothing is left.
    pub fn checkpoint(&self, name: &str, incremental: bool) -> Result<Saved> {
        let Some(mut last) = self.last.try_lock() else {
            return Err(Error::busy(format!("a checkpoint of the virtual machine {} is being made", self.home.name())));
        };
        let name = Name::new(self.home.name(), name)?;
        let disks = self.disks_to_snapshot()?;
        let machine = self.machine()?;
        if let Some(stuck) = machine.stuck() {
            return Err(self.cannot_be_had(&stuck));
        }
        let watch = self.watched(&machine)?;
        let mut plan = Plan::new(name.clone(), frozen::MAKER, watch.geometry().clone());
        if incremental {
            plan.parent.clone_from(&last);
            if plan.parent.is_none() {
                return Err(Error::failed("there is no checkpoint of this life of the machine to base it on").hint(
                    "make one without --incremental first; nor was it noted what is written to since a restore",
                ));
            }
        }
        let parent = plan.parent.as_ref().map(|parent| parent.name().to_owned());
        let writer = Writer::create(&self.folder, plan)?;
        let options = SaveOptions { keep_tracking: true, ..SaveOptions::default() };
        let mut saver = Saver::begin(&watch, writer, options)?;
        let (instant, pause) = self.stand_still(&machine, &mut saver, &disks, &name)?;
        let taken = instant.disks.map_or_else(|| Ok(Vec::new()), Taking::durable)?;
        while !saver.is_done() {
            *self.saving.lock() = Some(saver.figures());
            clock::sleep(LOOK);
        }
        *self.saving.lock() = None;
        let made = self.commit(saver, instant.state, instant.created, &taken);
        let memory = made.inspect_err(|_| {
            if !taken.is_empty() {
                self.disks.forget(&name.to_string());
            }
        })?;
        *last = Some(name.clone());
        let disks = taken.iter().map(|taken| format!("{}@{}", taken.disk, taken.name)).collect();
        let pause_us = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        tracing::info!("the checkpoint {name} is made; the guest stood still for {pause_us} us");
        Ok(Saved { name: name.name().to_owned(), parent, disks, pause_us, memory })
    }

    /// Returns the names of the disks that the guest writes to.
    fn disks_to_snapshot(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for disk in self.definition.disks.iter().filter(|disk| !disk.read_only) {
            match disk.source()? {
                DiskSource::Pool(name) if !name.contains('@') => names.push(name.to_owned()),
                DiskSource::Pool(_) => {}
                DiskSource::File(file) => {
                    let what = format!("the disk {} is a file, of which there are no snapshots", file.display());
                    return Err(Error::unsupported(what).hint("import it into the pool, and give it as --disk NAME"));
                }
            }
        }
        Ok(names)
    }

    /// Takes all that is of one instant. The guest runs when this returns, if it did before.
    fn stand_still(
        &self,
        machine: &Arc<Machine>,
        saver: &mut Saver,
        disks: &[String],
        name: &Name,
    ) -> Result<(Instant, Duration)> {
        for disk in self.settings.disks.iter().filter(|disk| !disk.read_only) {
            disk.device.flush()?;
        }
        // Nobody pauses, resumes or ends it meanwhile.
        let now = self.now.lock();
        let runs = match now.state {
            State::Running => true,
            State::Paused => false,
            _ => return Err(Error::busy("the virtual machine is about to end")),
        };
        if !now.machine.as_ref().is_some_and(|current| Arc::ptr_eq(current, machine)) {
            return Err(Error::busy("the guest reboots").hint("try again"));
        }
        if runs {
            machine.drain(PATIENCE)?;
        }
        let go_on = || {
            if runs {
                machine.resume();
            }
        };
        saver.settle().inspect_err(|_| go_on())?;
        let begun = clock::now();
        let mut taking = None;
        let taken = self.pause_and_take(machine, saver, runs, (disks, name), &mut taking);
        let pause = if runs { begun.elapsed() } else { Duration::ZERO };
        go_on();
        drop(now);
        // Should it have failed, what was taken of the disks is forgotten now: the guest does not wait for that.
        let (state, created) = taken?;
        Ok((Instant { state, disks: taking, created }, pause))
    }

    fn pause_and_take(
        &self,
        machine: &Machine,
        saver: &mut Saver,
        runs: bool,
        (disks, name): (&[String], &Name),
        taking: &mut Option<Box<dyn Taking>>,
    ) -> Result<(MachineState, u64)> {
        if runs {
            machine.pause_unless_stuck().map_err(|stuck| self.cannot_be_had(&stuck))?;
        }
        // On its way while the rest is done.
        *taking = (!disks.is_empty()).then(|| self.disks.snapshot(disks, &name.to_string())).transpose()?;
        saver.cut()?;
        let (state, created) = (machine.state()?, clock::wall_seconds());
        if let Some(taking) = taking {
            taking.instant()?;
        }
        Ok((state, created))
    }

    fn commit(&self, saver: Saver, state: MachineState, created: u64, taken: &[Taken]) -> Result<SaveFigures> {
        let state = Frozen { definition: self.definition.clone(), state }.encode()?;
        let snapshot = |taken: &Taken| DiskSnapshot {
            disk: taken.disk_uuid,
            disk_name: taken.disk.clone(),
            snapshot: taken.uuid,
            snapshot_name: taken.name.clone(),
        };
        let disks = taken.iter().map(snapshot).collect();
        let cut = Cut { created, disks, state_version: frozen::VERSION, state: &state };
        saver.commit(&cut).map(|(_, figures)| figures)
    }
}
