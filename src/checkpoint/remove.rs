//! Removing a checkpoint, and what it keeps from being removed: its parent and the snapshots of its disks.
//!
//! A snapshot is kept by a tag among the holds of its row in the catalog, `checkpoint MACHINE@NAME`: so every way of removing or
//! retiring it is refused, and every list says why. No user can give or release such a tag. A parent is kept by the file itself: who wants
//! to remove one looks into the others.
//!
//! # Rules
//! 1. The files are the truth. Tags are set before the file has its name, and go after the file is durably gone; so there may be a
//!    tag too many, and never one too few.
//!    Snapshots that somebody has named for a checkpoint have another tag until it is there: they are never removed with it.
//! 2. At the opening of a pool ([`attend`]) tags of checkpoints that are not there, and are not being saved, go; and a checkpoint
//!    without tags, as after a rebuild of the catalog, gets them.
//! 3. Snapshots that were taken for a checkpoint have its name. They are removed with it only if it never was: what tells that is
//!    its unfinished file, which is there before they are, and goes after them. A file that is merely gone, as with a folder that
//!    is not mounted, lets go of snapshots and removes none.
//!
//! # After a crash
//! Rule 2.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::folder::{Folder, Name};
use super::header::DiskSnapshot;
use super::list;
use crate::clock;
use crate::error::{Error, Kind, Result};
use crate::media::File;
use crate::snapshot::{self, CHECKPOINT_HOLD};
use crate::store::{Edit, SnapshotInfo, Store, Tables};
use crate::units::SnapshotId;

/// How long a removal waits for who reads: of a file that was closed the kernel tells its mount a moment later.
const LET_GO: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(5);

/// Locks a file that nobody may begin to read from then on; `None` when somebody still reads it.
fn take_alone(folder: &Folder, path: &str) -> std::io::Result<Option<Arc<dyn File>>> {
    let until = clock::now() + LET_GO;
    loop {
        let taken = folder.take_alone(path)?;
        if taken.is_some() || clock::now() >= until {
            return Ok(taken);
        }
        clock::sleep(POLL);
    }
}

/// Removes a checkpoint; what it needed can be removed after that.
///
/// # Errors
/// `NotFound`; `Busy` when another one is based on it, or somebody reads it; any error of the host.
pub fn remove(store: &Arc<Store>, name: &Name) -> Result<()> {
    let folder = Folder::of_pool(store.media());
    let fail = |e| Error::io(format!("cannot remove the checkpoint {name}"), e);
    let taken = match take_alone(&folder, &folder.whole(name)) {
        Ok(taken) => taken,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return remove_rest(store, &folder, name),
        Err(e) => return Err(fail(e)),
    };
    // While it is locked nobody begins to read it, or to base another one on it.
    let Some(_file) = taken else {
        return Err(Error::busy(format!("the checkpoint {name} is being read")).hint(
            "a machine that was restored from it, or is served by serve-uffd, has not all of its memory yet, it is being \
             verified, or a file of it is open in a mount (`fuser` says by whom)",
        ));
    };
    let children = list::children_for_sure(&folder, name)?;
    if !children.is_empty() {
        return Err(Error::busy(format!("the checkpoint {name} is needed: {} is based on it", children.join(", ")))
            .hint("flatten that with 'afterimage checkpoint flatten', or remove it first"));
    }
    folder.remove_file(&folder.whole(name))?;
    folder.remove_beside(name)?;
    folder.media().sync_dir(&folder.of_machine(name.machine())).map_err(fail)?;
    let_go(store, name)
}

/// Removes what a checkpoint has left that was never made: whoever was to make it has died.
fn remove_rest(store: &Arc<Store>, folder: &Folder, name: &Name) -> Result<()> {
    if folder.remove_leftover_after(name, || forget(store, name))? {
        return Ok(());
    }
    if is_holding(store, name) && !folder.is_being_saved(name)? {
        forget(store, name)
    } else {
        Err(folder.missing(name))
    }
}

/// Tells whether a checkpoint, be it there or not, holds any snapshot.
fn is_holding(store: &Arc<Store>, name: &Name) -> bool {
    let tag = tag(name);
    rows(&store.tables.read()).any(|(_, holds)| holds.contains(&tag))
}

fn tag(name: &Name) -> String {
    format!("{CHECKPOINT_HOLD}{name}")
}

/// Ends the tag of snapshots that somebody has named for a checkpoint that is still being packed: none of [`tag`], so that they
/// never pass for such as were taken for it. No checkpoint can have such a name.
const PACKING: &str = " #packing";

fn packing_tag(name: &Name) -> String {
    format!("{CHECKPOINT_HOLD}{name}{PACKING}")
}

/// As [`hold`], for as long as a checkpoint is packed and not there: [`let_go_packing`] ends it, or the next opening.
///
/// # Errors
/// As [`hold`].
pub(super) fn hold_packing(store: &Arc<Store>, name: &Name, disks: &[DiskSnapshot]) -> Result<()> {
    hold_by(store, name, &packing_tag(name), disks)
}

/// Ends [`hold_packing`].
///
/// # Errors
/// As [`let_go`].
pub(super) fn let_go_packing(store: &Arc<Store>, name: &Name) -> Result<()> {
    let_go_of(store, |held| *held == packing_tag(name))
}

/// Keeps the snapshots of the disks of a checkpoint from being removed and retired, durably. Called before the
/// checkpoint is committed; once more does nothing.
///
/// # Errors
/// `NotFound` when one of them is not there, or is retired; `ReadOnly`. None is held then.
pub fn hold(store: &Arc<Store>, name: &Name, disks: &[DiskSnapshot]) -> Result<()> {
    hold_by(store, name, &tag(name), disks)
}

fn hold_by(store: &Arc<Store>, name: &Name, tag: &str, disks: &[DiskSnapshot]) -> Result<()> {
    change(
        store,
        |tables| {
            let mut ids = Vec::new();
            for disk in disks {
                let id = find(tables, disk).ok_or_else(|| {
                    let DiskSnapshot { disk_name, snapshot_name, .. } = disk;
                    Error::not_found(format!(
                        "the snapshot {disk_name}@{snapshot_name} of the checkpoint {name} is gone"
                    ))
                })?;
                ids.push(id);
            }
            Ok(ids)
        },
        |holds| {
            if !holds.iter().any(|held| held == tag) {
                holds.push(tag.to_owned());
            }
        },
    )
}

/// Takes snapshots of disks for a checkpoint that is being made, under its name, and holds them. The instant comes at once and
/// is told; the rest takes as long as it takes.
///
/// # Errors
/// `NotFound`, `Exists`, `Usage` for a disk that is named twice, `ReadOnly`. Nothing is left then.
pub fn snapshot(store: &Arc<Store>, name: &Name, disks: &[String], instant: &dyn Fn()) -> Result<Vec<SnapshotInfo>> {
    if is_holding(store, name) {
        // Whoever asks has the unfinished file for itself now: these are of one that was killed.
        forget(store, name)?;
    }
    let targets: Vec<_> = disks.iter().map(|disk| (disk.clone(), name.name().to_owned())).collect();
    snapshot::take_at_once(store, &targets, &tag(name), instant)
}

/// Removes the snapshots that were taken for a checkpoint that came to nothing.
///
/// # Errors
/// `Busy` for a checkpoint that is there, `ReadOnly`; any error of the host.
pub fn forget(store: &Arc<Store>, name: &Name) -> Result<()> {
    if Folder::of_pool(store.media()).exists(name)? {
        return Err(Error::busy(format!("the checkpoint {name} is there")));
    }
    let tag = tag(name);
    let ids: Vec<_> = {
        let tables = store.tables.read();
        rows(&tables).filter(|(_, holds)| holds.contains(&tag)).map(|(id, _)| id).collect()
    };
    let_go(store, name)?;
    let infos = ids.into_iter().filter_map(|id| store.snapshot_info_by_id(id).ok());
    let infos: Vec<_> = infos.filter(|info| info.name == name.name()).collect();
    remove_all(store, &infos);
    Ok(())
}

fn remove_all(store: &Arc<Store>, snapshots: &[SnapshotInfo]) {
    for SnapshotInfo { disk, name, .. } in snapshots {
        if let Err(error) = snapshot::remove(store, disk, name) {
            tracing::warn!("the snapshot {disk}@{name} of a checkpoint that came to nothing stays: {error}");
        }
    }
}

/// Lets go of what a checkpoint has held that is not there any more, or was not committed.
///
/// # Errors
/// `ReadOnly`; any error of the host.
pub fn let_go(store: &Arc<Store>, name: &Name) -> Result<()> {
    let_go_of(store, |held| *held == tag(name))
}

fn let_go_of(store: &Arc<Store>, which: impl Fn(&String) -> bool) -> Result<()> {
    let held = |tables: &Tables| {
        let rows = rows(tables).filter(|(_, holds)| holds.iter().any(&which));
        Ok(rows.map(|(id, _)| id).collect())
    };
    change(store, held, |holds| holds.retain(|held| !which(held)))
}

/// All snapshots that can be held, with what holds them.
fn rows(tables: &Tables) -> impl Iterator<Item = (SnapshotId, &Vec<String>)> {
    let states = tables.states().map(|(_, row)| row).chain(tables.all_retired().map(|(_, row)| &row.state));
    states.map(|row| (row.snapshot, &row.holds))
}

/// Finds a snapshot that has its data.
fn find(tables: &Tables, disk: &DiskSnapshot) -> Option<SnapshotId> {
    let (id, _) = tables.disks().find(|(_, row)| row.uuid == disk.disk)?;
    let mut states = tables.states_of(id).filter(|(_, row)| row.uuid == disk.snapshot);
    states.find(|(_, row)| row.status.readable()).map(|(_, row)| row.snapshot)
}

/// Changes the holds of some snapshots in one frame.
fn change(
    store: &Arc<Store>,
    which: impl FnOnce(&Tables) -> Result<Vec<SnapshotId>>,
    mut change: impl FnMut(&mut Vec<String>),
) -> Result<()> {
    let ticket = {
        let mut tables = store.tables.write();
        let ids = which(&tables)?;
        if ids.is_empty() {
            return Ok(());
        }
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        for id in ids {
            edit.change_snapshot(id, |row| change(&mut row.holds));
        }
        store.ledger.submit(edit.finish())?
    };
    store.ledger.wait(ticket)
}

/// Sets right what an interrupted save, removal or rebuild has left. Whoever opens a pool calls it.
pub fn attend(store: &Arc<Store>) {
    if let Err(error) = set_right(store) {
        tracing::warn!("what checkpoints hold cannot be compared with what there is: {error}");
    }
}

fn set_right(store: &Arc<Store>) -> Result<()> {
    let folder = Folder::of_pool(store.media());
    for name in folder.unfinished_names()? {
        let first = || if folder.exists(&name)? { Ok(()) } else { forget(store, &name) };
        if folder.remove_leftover_after(&name, first)? {
            tracing::info!("what was saved of the checkpoint {name} when its machine ended is removed");
        }
    }
    folder.sweep()?;
    let names: BTreeSet<Name> = folder.names()?.into_iter().collect();
    let held: BTreeSet<String> = {
        let tables = store.tables.read();
        let tags = rows(&tables).flat_map(|(_, holds)| holds.iter());
        tags.filter_map(|tag| tag.strip_prefix(CHECKPOINT_HOLD)).map(str::to_owned).collect()
    };
    for name in held.iter().filter_map(|text| Name::parse(text).ok()) {
        // In this order: a save that ends meanwhile has put its file there before it is over.
        if !names.contains(&name) && !folder.is_being_saved(&name)? && !folder.exists(&name)? {
            tracing::info!("the checkpoint {name} is not there; what it held is let go");
            let_go(store, &name)?;
        }
    }
    for name in names.iter().filter(|name| !held.contains(&name.to_string())) {
        // One that cannot be read can not be restored either.
        let Ok(layer) = list::open_alone(&folder, name) else { continue };
        match hold(store, name, &layer.header().disks) {
            Err(error) if error.kind() == Kind::NotFound => tracing::warn!("{error}"),
            other => other?,
        }
    }
    // Nothing is packed while a pool is opened, and what was has its own tags now, or is not there.
    let_go_of(store, |held| held.starts_with(CHECKPOINT_HOLD) && held.ends_with(PACKING))
}
