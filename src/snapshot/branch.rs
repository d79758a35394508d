//! New branches: clones and reverts. Both are one frame, whatever the size of the disk.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::{check_disk_name, check_snapshot_name};
use crate::error::{Error, Result};
use crate::store::rows::BranchRow;
use crate::store::{Change, DiskInfo, DiskRow, Edit, Line, StateKey, StateRow, Status, Store, origin};
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, DiskId, Epoch};

/// What a revert did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevertReport {
    /// Bytes written since the last snapshot with data that are gone.
    pub dropped: u64,
    /// It may have been less: a snapshot in between was removed or retired, and a block written before and after it counts
    /// twice.
    pub at_most: bool,
    /// Name of the snapshot that keeps them instead.
    pub kept: Option<String>,
}

/// Makes a disk that begins as a snapshot.
///
/// # Errors
/// `NotFound`, `Exists`, `Failed` when the snapshot is retired, `ReadOnly`.
pub fn clone(store: &Arc<Store>, disk: &str, snapshot: &str, new: &str) -> Result<DiskInfo> {
    check_disk_name(new)?;
    let (id, ticket) = {
        let mut tables = store.tables.write();
        if tables.has_disk(new) {
            return Err(Error::exists(format!("there is a disk '{new}' already")));
        }
        let (key, state) = readable(&tables, disk, snapshot)?;
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        let (branch, epoch) = start_branch(&mut edit, key)?;
        let id = edit.meta(|meta| meta.disk = meta.disk.next()).disk;
        let floor = fresh_floor(&edit);
        let settings = edit.tables.disk(state.disk)?.settings.clone();
        let row = crate::disk::new_row(new, state.size, branch, epoch, floor);
        edit.put_disk(id, DiskRow { settings, ..cloned(row, key, &state, origin::of_snapshot(disk, &state)) });
        (id, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    store.tell(&Change::Disk { id, name: new.to_owned(), was: None, gone: false, resized: false, data: false });
    store.wake_keeper();
    store.disk_info_by_id(id)
}

pub(super) fn cloned(row: DiskRow, key: StateKey, state: &StateRow, origin: String) -> DiskRow {
    DiskRow {
        size: state.size,
        trim: state.trim,
        base: Some(key),
        referenced: state.referenced,
        written: 0,
        stamp: row.stamp.max(state.stamp),
        origin: Some(origin),
        touched: true,
        ..row
    }
}

/// No address handed out so far is at or above it.
pub(super) fn fresh_floor(edit: &Edit<'_>) -> u64 {
    BlockAddress::new(edit.tables.meta.segment.next(), 0).raw()
}

fn readable(tables: &crate::store::Tables, disk: &str, snapshot: &str) -> Result<(StateKey, StateRow)> {
    let (key, row) = tables.snapshot(tables.disk_id(disk)?, snapshot)?;
    if row.status == Status::Retired {
        return Err(Error::failed(format!("snapshot '{disk}@{snapshot}' is retired: its data is gone"))
            .hint("it can only be the base of a diff; choose a live snapshot"));
    }
    Ok((key, row.clone()))
}

/// Starts a branch at an ended epoch.
pub(super) fn start_branch(edit: &mut Edit<'_>, at: StateKey) -> Result<(BranchId, Epoch)> {
    let parent = *edit.tables.branch(at.0)?;
    let meta = edit.meta(|meta| {
        meta.branch = meta.branch.next();
        meta.epoch = meta.epoch.next();
    });
    let row = BranchRow { parent: Some(at), inherits: true, depth: parent.depth + 1, lineage: parent.lineage };
    edit.put_branch(meta.branch, row);
    Ok((meta.branch, meta.epoch))
}

/// Makes a disk that was never written a clone: of a snapshot, or of a live disk through a hidden snapshot.
///
/// # Errors
/// `Failed` when the target was written to; as [`clone`] otherwise.
pub fn clone_into(store: &Arc<Store>, disk: &str, snapshot: Option<&str>, target: DiskId) -> Result<()> {
    let source = store.tables.read().disk_id(disk)?;
    if source == target {
        return Err(Error::failed("a disk cannot become a clone of itself"));
    }
    let head = store.head(target)?;
    let hidden = match snapshot {
        Some(_) => None,
        None => Some(super::take::take_hidden(store, source)?),
    };
    let order = head.order();
    let gate = head.gate.write();
    let result = (|| {
        let line = head.line();
        let mut tables = store.tables.write();
        if tables.disk(target)?.touched || head.dirty_chunks() > 0 {
            return Err(Error::failed("only a disk that was never written can become a clone"));
        }
        let (key, state) = match (snapshot, hidden) {
            (Some(name), _) => readable(&tables, disk, name)?,
            (None, Some(id)) => tables.snapshot_by_id(id).map(|(key, row)| (key, row.clone()))?,
            (None, None) => return Err(Error::failed("nothing to clone from")),
        };
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        let (branch, epoch) = start_branch(&mut edit, key)?;
        let floor = fresh_floor(&edit);
        let old = edit.tables.disk(target)?.clone();
        let origin = if snapshot.is_some() { origin::of_snapshot(disk, &state) } else { origin::of_disk(disk, source) };
        let mut row = DiskRow { branch, epoch, floor, ..cloned(old, key, &state, origin) };
        // Disks that share blocks cut them alike.
        row.settings.extent_size = edit.tables.disk(state.disk)?.settings.extent_size;
        edit.put_disk(target, row);
        edit.delete_branch(line.branch);
        let ticket = store.ledger.submit(edit.finish())?;
        drop(tables);
        let next = Line { owner: store.new_owner(), branch, epoch, floor, size: state.size };
        drop(head.switch(next));
        head.thawed();
        head.forget_segment();
        head.referenced
            .store(i64::try_from(state.referenced).unwrap_or(i64::MAX), std::sync::atomic::Ordering::Relaxed);
        Ok((ticket, line.owner))
    })();
    drop(gate);
    drop(order);
    if let Some(id) = hidden {
        // The clone has it as its parent now; by itself it is not needed.
        super::remove::remove_hidden(store, id)?;
    }
    let (ticket, owner) = result?;
    store.ledger.wait(ticket)?;
    store.cache.forget(owner);
    store.tell_resized(target);
    store.wake_keeper();
    Ok(())
}

/// Makes the live disk what a snapshot is. Newer snapshots stay; what was written since the last one is dropped, or kept
/// under a name.
///
/// # Errors
/// `Busy` while somebody has the disk open for writing; `NotFound`; `Failed` when the snapshot is retired.
pub fn revert(store: &Arc<Store>, disk: &str, snapshot: &str, keep: Option<&str>) -> Result<RevertReport> {
    let id = store.tables.read().disk_id(disk)?;
    let head = store.head(id)?;
    // First: who waits for the writer, or sends it away, is not to find out then that there is nothing to go back to.
    readable(&store.tables.read(), disk, snapshot)?;
    store.wait_unleased(&head)?;
    if let Some(name) = keep {
        check_snapshot_name(name)?;
        super::take(store, &[(disk.to_owned(), name.to_owned())])?;
    }
    let mut order = head.order();
    let gate = store.flush_and_stop(&head, &mut order)?;
    let result = switch_branch(store, disk, snapshot, id, &head);
    drop(gate);
    drop(order);
    let (ticket, owner, (blocks, exact)) = result?;
    store.ledger.wait(ticket)?;
    store.cache.forget(owner);
    let name = disk.to_owned();
    store.tell(&Change::Disk { id, name, was: None, gone: false, resized: true, data: true });
    store.wake_keeper();
    let dropped = if keep.is_some() { 0 } else { blocks * BLOCK_SIZE };
    Ok(RevertReport { dropped, at_most: dropped > 0 && !exact, kept: keep.map(str::to_owned) })
}

fn switch_branch(
    store: &Arc<Store>,
    disk: &str,
    snapshot: &str,
    id: DiskId,
    head: &crate::store::Head,
) -> Result<(crate::store::ledger::Ticket, u64, (u64, bool))> {
    store.refuse_leased(head)?;
    if head.dirty_chunks() > 0 {
        return Err(Error::busy(format!("disk '{disk}' is being written to")));
    }
    let line = head.line();
    let floor = head.next_address(store);
    let mut tables = store.tables.write();
    let (key, state) = readable(&tables, disk, snapshot)?;
    store.ledger.writable()?;
    let mut edit = Edit::new(&mut tables);
    let old = edit.tables.disk(id)?.clone();
    let dropped = edit.tables.unsaved_since(id)?;
    let (branch, epoch) = start_branch(&mut edit, key)?;
    let row = DiskRow {
        branch,
        epoch,
        floor,
        base: Some(key),
        size: state.size,
        trim: state.trim,
        referenced: state.referenced,
        written: 0,
        touched: true,
        ..old.clone()
    };
    edit.put_disk(id, row);
    // The epoch that was being written goes away like a deleted snapshot.
    Store::abandon_head(&mut edit, &line, id, &old);
    let ticket = store.ledger.submit(edit.finish())?;
    drop(tables);
    drop(head.switch(Line { owner: store.new_owner(), branch, epoch, floor, size: state.size }));
    head.thawed();
    head.referenced.store(i64::try_from(state.referenced).unwrap_or(i64::MAX), std::sync::atomic::Ordering::Relaxed);
    Ok((ticket, line.owner, dropped))
}
