//! Deleting, renaming and holding snapshots. Deleting commits at once; the data goes in the background.

use std::sync::Arc;

use crate::disk::check_snapshot_name;
use crate::error::{Error, Result};
use crate::store::{Change, Edit, StateRow, Status, Store};
use crate::units::SnapshotId;

/// Changes the row of a snapshot durably and returns it as it was.
fn change(
    store: &Arc<Store>,
    disk: &str,
    snapshot: &str,
    check: impl FnOnce(&StateRow, &crate::store::Tables) -> Result<()>,
    change: impl FnOnce(&mut StateRow),
) -> Result<StateRow> {
    let (old, ticket) = {
        let mut tables = store.tables.write();
        let old = tables.snapshot(tables.disk_id(disk)?, snapshot)?.1.clone();
        check(&old, &tables)?;
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        edit.change_snapshot(old.snapshot, change);
        (old, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    Ok(old)
}

/// What the tag of a checkpoint begins with; the name of the checkpoint follows. No user can give such a tag, because it has a
/// `@` in it.
pub const CHECKPOINT_HOLD: &str = "checkpoint ";

/// Refuses to remove or retire a snapshot that something holds.
///
/// # Errors
/// `Busy`, naming all that hold it.
pub(crate) fn refuse_held(row: &StateRow, disk: &str) -> Result<()> {
    let Some(first) = row.holds.first() else { return Ok(()) };
    let held = Error::busy(format!("snapshot '{disk}@{}' is held: {}", row.name, row.holds.join(", ")));
    Err(match first.strip_prefix(CHECKPOINT_HOLD) {
        Some(name) => held.hint(checkpoint_hint(name)),
        None => held.hint("let it go with `afterimage release`"),
    })
}

fn checkpoint_hint(name: &str) -> String {
    format!("the checkpoint cannot be restored without it; `afterimage checkpoint rm {name}` removes the checkpoint")
}

/// Deletes a snapshot; what only it holds is freed in the background.
///
/// # Errors
/// `NotFound`; `Busy` when it is held.
pub fn remove(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<()> {
    let (old, recorded, ticket) = {
        let mut tables = store.tables.write();
        let old = tables.snapshot(tables.disk_id(disk)?, snapshot)?.1.clone();
        refuse_held(&old, disk)?;
        store.ledger.writable()?;
        let recorded = tables.retired(old.snapshot).is_some();
        let mut edit = Edit::new(&mut tables);
        edit.pass_on_written(old.snapshot)?;
        if recorded {
            edit.delete_retired(old.snapshot);
        } else {
            edit.change_snapshot(old.snapshot, |row| {
                row.status = Status::Dying;
                row.name = String::new();
            });
        }
        (old, recorded, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    if recorded {
        store.remove_record(old.uuid)?;
    }
    let (disk, disk_name, id) = (old.disk, disk.to_owned(), old.snapshot);
    let retired = old.status == Status::Retired;
    store.tell(&Change::Snapshot { disk, disk_name, id, name: old.name, was: None, gone: true, retired });
    store.wake_keeper();
    Ok(())
}

/// Deletes a snapshot that the program took for itself.
pub(super) fn remove_hidden(store: &Arc<Store>, id: SnapshotId) -> Result<()> {
    let ticket = {
        let mut tables = store.tables.write();
        let (key, _) = tables.snapshot_by_id(id)?;
        let mut edit = Edit::new(&mut tables);
        edit.pass_on_written(id)?;
        edit.change_state(key, |row| row.status = Status::Dying);
        store.ledger.submit(edit.finish())?
    };
    store.ledger.wait(ticket)
}

/// Renames a snapshot.
///
/// # Errors
/// `NotFound`, `Exists`, `Usage` for a bad name.
pub fn rename(store: &Arc<Store>, disk: &str, old: &str, new: &str) -> Result<()> {
    check_snapshot_name(new)?;
    if old == new {
        return store.snapshot_info(disk, old).map(drop);
    }
    let taken = |row: &StateRow, tables: &crate::store::Tables| match tables.snapshot(row.disk, new) {
        Ok(_) => Err(Error::exists(format!("there is a snapshot '{disk}@{new}' already"))),
        Err(_) => Ok(()),
    };
    let before = change(store, disk, old, taken, |row| row.name = new.to_owned())?;
    let (id, disk_name) = (before.snapshot, disk.to_owned());
    let was = Some(old.to_owned());
    let retired = before.status == Status::Retired;
    store.tell(&Change::Snapshot { disk: before.disk, disk_name, id, name: new.to_owned(), was, gone: false, retired });
    Ok(())
}

/// Keeps a snapshot from being deleted until the tag is released.
///
/// # Errors
/// `NotFound`, `Exists` when it has the tag already, `Usage` for an empty or long tag.
pub fn hold(store: &Arc<Store>, disk: &str, snapshot: &str, tag: &str) -> Result<()> {
    check_snapshot_name(tag).map_err(|e| e.context("the tag of a hold"))?;
    let twice = |row: &StateRow, _: &crate::store::Tables| {
        if row.holds.iter().any(|held| held == tag) {
            return Err(Error::exists(format!("snapshot '{disk}@{snapshot}' has the hold '{tag}' already")));
        }
        if row.holds.iter().filter(|held| !held.starts_with(CHECKPOINT_HOLD)).count() >= HOLDS_MAX {
            return Err(Error::failed(format!("snapshot '{disk}@{snapshot}' has {HOLDS_MAX} holds, and no more fit")));
        }
        Ok(())
    };
    change(store, disk, snapshot, twice, |row| row.holds.push(tag.to_owned())).map(drop)
}

const HOLDS_MAX: usize = 64;

/// Lets go of a hold.
///
/// # Errors
/// `NotFound` when the snapshot or the tag is not there; `Busy` for the tag of a checkpoint.
pub fn release(store: &Arc<Store>, disk: &str, snapshot: &str, tag: &str) -> Result<()> {
    let missing = |row: &StateRow, _: &crate::store::Tables| {
        if row.holds.iter().any(|held| held == tag) {
            return Ok(());
        }
        Err(Error::not_found(format!("snapshot '{disk}@{snapshot}' has no hold '{tag}'")))
    };
    if let Some(name) = tag.strip_prefix(CHECKPOINT_HOLD) {
        return Err(Error::busy(format!("snapshot '{disk}@{snapshot}' belongs to the checkpoint {name}"))
            .hint(checkpoint_hint(name)));
    }
    change(store, disk, snapshot, missing, |row| row.holds.retain(|held| held != tag)).map(drop)
}

/// Returns the bytes that deleting this snapshot alone would free.
///
/// # Errors
/// `NotFound`; `Corrupt` when rows are damaged.
pub fn unique(store: &Arc<Store>, disk: &str, snapshot: &str) -> Result<u64> {
    let key = {
        let tables = store.tables.read();
        let (key, row) = tables.snapshot(tables.disk_id(disk)?, snapshot)?;
        if row.status == Status::Retired {
            return Ok(0);
        }
        key
    };
    store.unique_bytes(key)
}
