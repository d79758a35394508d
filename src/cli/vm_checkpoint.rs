//! `vm checkpoint` and `vm restore`.
//!
//! # Rules
//! 1. A restore is the process of the machine from then on, as `vm start` is: in the foreground, or with --detach in the
//!    background.
//! 2. In place, the disks are taken back to the instant of the checkpoint, with the words of `revert` about what that drops.
//!    With --as they are cloned and nothing of the old machine is touched, and the addresses of its network cards are new: two
//!    machines with the same would take each other's frames.
//! 3. Disks are found by what identifies them, whatever they are called by now.
//! 4. If the new machine cannot be made its clones go again. Disks that were taken back stay so: what they had is dropped or
//!    kept as the command said.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::Global;
use super::bar::{Bar, Units};
use super::screen::Screen;
use super::show::{self, Style};
use super::vm::{Life, does_not_run, start};
use super::vm_parts::new_address;
use crate::api::answer::Snapshot;
use crate::api::machine::{Act, Order, ask_machine, checkpoint_machine};
use crate::api::{Request, Response, Way};
use crate::checkpoint::{DiskSnapshot, Folder, Name};
use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::media::{HostMedia, Media};
use crate::progress::{Progress, Silent};
use crate::sync::Mutex;
use crate::units::show_size;
use crate::vmm::{Definition, Home, Restore as From, Saved};

/// How often it is looked how a checkpoint is going.
const LOOK: Duration = Duration::from_millis(250);

/// Make a checkpoint of a virtual machine that runs: its memory, its devices and its disks, all of one instant
///
/// The guest stands still for a few milliseconds; its memory is written while it runs on. Snapshots of its disks are taken at
/// the same instant, under the name of the checkpoint, and cannot be removed before it. A disk that is a file has no snapshots:
/// machines with such a one, unless it is only read, have no checkpoints.
#[derive(Debug, Args)]
pub(super) struct Checkpoint {
    /// Name of the machine
    name: String,
    /// Name of the checkpoint
    #[arg(long = "as", value_name = "NAME")]
    checkpoint: String,
    /// Save only what was written since the last checkpoint, which is needed from then on
    #[arg(long)]
    incremental: bool,
}

/// Let a virtual machine go on from a checkpoint
///
/// The guest runs at once; its memory is read when it is touched, and in the background. The machine must not run. Its disks
/// are taken back to the instant of the checkpoint, and what was written to them since is gone unless --keep says otherwise. With
/// --as another machine begins there, beside the first or instead of it: on clones of the disks, named NEW-DISK, and with
/// other addresses of its network cards.
///
/// A guest is told that it is another life of itself (VM generation ID), and its clocks are right. Connections that it had are
/// not its any more; what it keeps beyond that, such as leases of addresses and names, is its own matter. So is the address
/// of a network card: a guest reads it when its driver begins, and goes on with the one it knows until then.
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// The checkpoint
    #[arg(value_name = "NAME@CHECKPOINT")]
    checkpoint: String,
    /// Make another machine of this name
    #[arg(long = "as", value_name = "NEW")]
    new: Option<String>,
    /// Read all memory before the guest runs
    #[arg(long)]
    eager: bool,
    /// Keep what was written to the disks since their last snapshots as snapshots of this name
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "new")]
    keep: Option<String>,
    /// Run in the background and return when the guest runs
    #[arg(long)]
    pub(super) detach: bool,
}

impl Checkpoint {
    pub(super) fn run(self, pool: &Path, screen: &Screen) -> Result<u8> {
        let home = Home::of(pool, &self.name)?;
        let order = Order { name: self.checkpoint, incremental: self.incremental };
        let bar = Bar::new(Units::Bytes, screen.shows_progress());
        let over = Mutex::new(false);
        let saved = std::thread::scope(|scope| {
            if screen.shows_progress() {
                scope.spawn(|| watch(&home, &bar, &over));
            }
            let saved = checkpoint_machine(&home, &order);
            *over.lock() = true;
            saved
        });
        bar.finish();
        let Some(saved) = saved? else { return Err(does_not_run(&home)?) };
        let value = serde_json::json!({ "answer": "vm-checkpoint", "vm": home.name(), "checkpoint": saved });
        screen.confirm(&value, &line(home.name(), &saved));
        Ok(0)
    }
}

fn line(vm: &str, saved: &Saved) -> String {
    let (bytes, pause) = (show_size(saved.memory.bytes), saved.pause_us.div_ceil(1000));
    format!("{vm}@{}: {bytes} of memory written, the guest stood still for {pause} ms\n", saved.name)
}

/// Draws how a checkpoint is going.
fn watch(home: &Home, bar: &Bar, over: &Mutex<bool>) {
    let mut done = 0;
    while !*over.lock() {
        if let Ok(Some(info)) = ask_machine(home, Act::Tell)
            && let Some(figures) = info.saving
        {
            let unit = u64::from(crate::checkpoint::Sizes::USUAL.page_block);
            bar.total(figures.page_blocks * unit);
            bar.advance((figures.done * unit).saturating_sub(done));
            done = figures.done * unit;
        }
        crate::clock::sleep(LOOK);
    }
}

/// How long it is tried to remove clones of a machine that came to nothing, and how often.
const UNDO_TIME_MAX: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(20);

/// The pool, asked for what the disks of a machine take to be what they were.
struct Disks<'a> {
    pool: &'a Path,
    screen: &'a Screen,
}

impl Disks<'_> {
    fn ask(&self, request: Request) -> Result<Response> {
        let mut way = Way::find(self.pool)?;
        let answer = way.ask(request, &Silent);
        let closed = way.close();
        let answer = answer?;
        closed?;
        Ok(answer)
    }

    /// Finds a snapshot of a checkpoint, whatever it and its disk are called now.
    fn find(&self, wanted: &DiskSnapshot) -> Result<Snapshot> {
        let strange = || Error::failed("the pool gave an answer that makes no sense");
        let gone =
            || Error::not_found(format!("there is no snapshot {}@{} any more", wanted.disk_name, wanted.snapshot_name));
        let Response::Disks { disks, .. } = self.ask(Request::Ls { disk: None })? else { return Err(strange()) };
        let disk = disks.into_iter().find(|disk| disk.uuid == wanted.disk).ok_or_else(gone)?;
        let Response::Snapshots { snapshots, .. } = self.ask(Request::Ls { disk: Some(disk.name) })? else {
            return Err(strange());
        };
        let is = |snapshot: &Snapshot| snapshot.uuid == wanted.snapshot && snapshot.state == "live";
        snapshots.into_iter().find(is).ok_or_else(gone)
    }

    /// Takes the disks back.
    fn revert(&self, snapshots: &[Snapshot], keep: Option<&str>) -> Result<()> {
        for Snapshot { disk, name, .. } in snapshots {
            let request = Request::Revert { snapshot: format!("{disk}@{name}"), keep: keep.map(str::to_owned) };
            let report = self.ask(request)?;
            self.screen.note(show::show(&report, Style::Brief).trim_end());
        }
        Ok(())
    }

    /// Clones the disks for a machine; none is left if one cannot be.
    fn clone(&self, snapshots: &[Snapshot], vm: &str) -> Result<()> {
        for (count, Snapshot { disk, name, .. }) in snapshots.iter().enumerate() {
            let request = Request::Clone { snapshot: format!("{disk}@{name}"), disk: clone_of(vm, disk) };
            self.ask(request).inspect_err(|_| self.remove(&snapshots[..count], vm))?;
        }
        Ok(())
    }

    /// Removes clones. A server that had them for the machine may still be about to miss it, or to end.
    fn remove(&self, snapshots: &[Snapshot], vm: &str) {
        let begun = clock::now();
        for Snapshot { disk, .. } in snapshots {
            let name = clone_of(vm, disk);
            while let Err(error) = self.ask(Request::Rm { name: name.clone(), recursive: false }) {
                match error.kind() {
                    Kind::NotFound => break,
                    _ if begun.elapsed() < UNDO_TIME_MAX => clock::sleep(AGAIN),
                    _ => {
                        tracing::warn!("the disk {name} stays: {error}");
                        break;
                    }
                }
            }
        }
    }
}

/// Names the clone of a disk.
fn clone_of(vm: &str, disk: &str) -> String {
    format!("{vm}-{disk}")
}

impl Restore {
    /// Returns the home of the machine that will run.
    pub(super) fn home(&self, pool: &Path) -> Result<Home> {
        let name = Name::parse(&self.checkpoint)?;
        Home::of(pool, self.new.as_deref().unwrap_or(name.machine()))
    }

    pub(super) fn run(self, pool: &Path, global: &Global, screen: &Screen) -> Result<u8> {
        let home = self.home(pool)?;
        start(&home, Life::Restored(self), pool, global, screen)
    }

    /// Opens the checkpoint, and says what the machine is made of now; its disks are found and not yet what they were.
    pub(super) fn open<'a>(&'a self, pool: &'a Path, home: &'a Home, screen: &'a Screen) -> Result<Opened<'a>> {
        let name = Name::parse(&self.checkpoint)?;
        if self.new.is_some() && home.exists() {
            return Err(Error::exists(format!("there is a virtual machine {} already", home.name())));
        }
        let cannot = |e| Error::io(format!("cannot open {}", pool.display()), e);
        let media: Arc<dyn Media> = Arc::new(HostMedia::new(pool).map_err(cannot)?);
        let (from, mut definition) = From::open(&Folder::of_pool(&media), name, self.eager)?;
        let disks = Disks { pool, screen };
        let snapshots = from.reader.header().disks.iter().map(|disk| disks.find(disk)).collect::<Result<Vec<_>>>()?;
        for disk in definition.disks.iter_mut().filter(|disk| !disk.read_only) {
            let Some(name) = &mut disk.disk else { continue };
            let wanted = from.reader.header().disks.iter().position(|known| known.disk_name == *name);
            let wanted =
                wanted.ok_or_else(|| Error::corrupt(format!("the checkpoint says nothing of the disk {name}")))?;
            let disk = &snapshots[wanted].disk;
            *name = if self.new.is_some() { clone_of(home.name(), disk) } else { disk.clone() };
        }
        if self.new.is_some() {
            for net in &mut definition.nets {
                net.mac = new_address()?;
            }
        }
        let undo = Arc::new(Mutex::new(false));
        let ready = {
            let (undo, snapshots) = (Arc::clone(&undo), snapshots.clone());
            let (disks, vm) = (Disks { pool, screen }, home.name());
            move || match &self.new {
                Some(_) => disks.clone(&snapshots, vm).map(|()| *undo.lock() = true),
                None => disks.revert(&snapshots, self.keep.as_deref()),
            }
        };
        let from = From { ready: Box::new(ready), ..from };
        Ok(Opened { from, definition, disks, snapshots, undo })
    }
}

/// A checkpoint that is open, and what it takes to undo what is done for it.
pub(super) struct Opened<'a> {
    pub(super) from: From<'a>,
    pub(super) definition: Definition,
    disks: Disks<'a>,
    snapshots: Vec<Snapshot>,
    undo: Arc<Mutex<bool>>,
}

impl<'a> Opened<'a> {
    /// Parts with the checkpoint, which the machine needs, and keeps the rest.
    pub(super) fn split(self) -> (From<'a>, Definition, Undo<'a>) {
        let Self { from, definition, disks, snapshots, undo } = self;
        (from, definition, Undo { disks, snapshots, undo })
    }
}

/// What is done for a machine that may come to nothing.
pub(super) struct Undo<'a> {
    disks: Disks<'a>,
    snapshots: Vec<Snapshot>,
    undo: Arc<Mutex<bool>>,
}

impl Undo<'_> {
    /// Removes clones that were made.
    pub(super) fn undo(&self, vm: &str) {
        if std::mem::take(&mut *self.undo.lock()) {
            self.disks.remove(&self.snapshots, vm);
        }
    }
}
