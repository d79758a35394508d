//! Making, naming and removing disks.

use std::sync::Arc;

use uuid::Uuid;

use crate::clock;
use crate::error::{Error, Result};
use crate::store::rows::BranchRow;
use crate::store::{Change, DiskInfo, DiskRow, Edit, Settings, Status, Store};
use crate::units::{BlockAddress, BranchId, DISK_SIZE_MAX, DiskId, Epoch};

const DISK_NAME_MAX: usize = 128;
const SNAPSHOT_NAME_MAX: usize = 120;

fn check_name(kind: &str, name: &str, most: usize) -> Result<()> {
    let why = if name.is_empty() {
        "it is empty".to_owned()
    } else if name.len() > most {
        format!("it has {} bytes, and {most} are allowed", name.len())
    } else if let Some(c) = name.chars().find(|c| c.is_control() || ['/', '@', '#'].contains(c)) {
        format!("it contains {c:?}")
    } else if name.starts_with(['-', '.']) {
        "it begins with '-' or '.'".to_owned()
    } else if name.contains("..") {
        "it contains '..'".to_owned()
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(40).collect();
    Err(Error::usage(format!("{shown:?} cannot be the name of a {kind}: {why}")))
}

/// Checks the name of a disk.
///
/// # Errors
/// `Usage` with the reason.
pub fn check_disk_name(name: &str) -> Result<()> {
    check_name("disk", name, DISK_NAME_MAX)
}

/// Checks the name of a snapshot.
///
/// # Errors
/// `Usage` with the reason.
pub fn check_snapshot_name(name: &str) -> Result<()> {
    check_name("snapshot", name, SNAPSHOT_NAME_MAX)
}

/// Rounds a size a person gave up to 512 bytes, and checks it.
///
/// # Errors
/// `Usage` for 0 and for more than 64 TiB.
pub fn round_size(size: u64) -> Result<u64> {
    if size == 0 {
        return Err(Error::usage("a disk of 0 bytes makes no sense").hint("give a size such as 10G"));
    }
    match size.checked_next_multiple_of(512) {
        Some(size) if size <= DISK_SIZE_MAX => Ok(size),
        _ => Err(Error::usage(format!("{size} bytes is more than the largest disk, 64 TiB"))),
    }
}

/// Makes a thin disk.
///
/// # Errors
/// `Usage` for a bad name or size, `Exists`, `ReadOnly`.
pub fn create(store: &Arc<Store>, name: &str, size: u64) -> Result<DiskInfo> {
    let size = round_size(size)?;
    make(store, name, size)
}

/// Makes a disk of 0 bytes, as a mount does between create and truncate.
///
/// # Errors
/// As [`create`].
pub fn create_empty(store: &Arc<Store>, name: &str) -> Result<DiskInfo> {
    make(store, name, 0)
}

fn make(store: &Arc<Store>, name: &str, size: u64) -> Result<DiskInfo> {
    check_disk_name(name)?;
    let (id, ticket) = {
        let mut tables = store.tables.write();
        if tables.has_disk(name) {
            return Err(Error::exists(format!("there is a disk '{name}' already")));
        }
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        let meta = edit.meta(|meta| {
            meta.disk = meta.disk.next();
            meta.branch = meta.branch.next();
            meta.epoch = meta.epoch.next();
        });
        let branch = BranchRow { parent: None, inherits: false, depth: 1, lineage: meta.branch };
        edit.put_branch(meta.branch, branch);
        let floor = BlockAddress::new(meta.segment.next(), 0).raw();
        edit.put_disk(meta.disk, new_row(name, size, meta.branch, meta.epoch, floor));
        (meta.disk, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    let info = store.disk_info_by_id(id)?;
    store.tell(&Change::Disk { id, name: name.to_owned(), was: None, gone: false, resized: false, data: false });
    Ok(info)
}

/// Returns the row of a fresh disk.
pub(crate) fn new_row(name: &str, size: u64, branch: BranchId, epoch: Epoch, floor: u64) -> DiskRow {
    let fresh = DiskRow::fresh(name.to_owned(), Uuid::new_v4(), size, clock::wall_seconds());
    DiskRow { branch, epoch, floor, ..fresh }
}

/// Renames a disk; its snapshots follow.
///
/// # Errors
/// `NotFound`, `Exists`, `Usage` for a bad name, `ReadOnly`.
pub fn rename(store: &Arc<Store>, old: &str, new: &str) -> Result<()> {
    check_disk_name(new)?;
    let (id, ticket) = {
        let mut tables = store.tables.write();
        let id = tables.disk_id(old)?;
        if old == new {
            return Ok(());
        }
        if tables.has_disk(new) {
            return Err(Error::exists(format!("there is a disk '{new}' already")));
        }
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        edit.change_disk(id, |row| row.name = new.to_owned())?;
        (id, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    let was = Some(old.to_owned());
    store.tell(&Change::Disk { id, name: new.to_owned(), was, gone: false, resized: false, data: false });
    Ok(())
}

/// Removes a disk, and with `recursive` all its snapshots; their blocks are freed in the background unless clones hold them.
///
/// # Errors
/// `NotFound`; `Busy` when it has snapshots, is attached to something or somebody writes to it.
pub fn remove(store: &Arc<Store>, name: &str, recursive: bool) -> Result<()> {
    let id = store.tables.read().disk_id(name)?;
    let head = store.head(id)?;
    store.refuse_attached(&head)?;
    store.wait_unleased(&head)?;
    let mut order = head.order();
    let gate = store.flush_and_stop(&head, &mut order)?;
    let line = head.line();
    let (ticket, records) = {
        // Until the disk is marked as gone.
        let _removal = store.begin_removal(&head)?;
        store.refuse_leased(&head)?;
        // A write may have come between: what it handed out must be known before the disk goes.
        if head.dirty_chunks() > 0 {
            return Err(Error::busy(format!("disk '{name}' is being written to")));
        }
        let mut tables = store.tables.write();
        let row = tables.disk(id)?.clone();
        let named: Vec<_> = tables.snapshots_of(id).map(|(_, row)| row.clone()).collect();
        if !named.is_empty() && !recursive {
            return Err(Error::busy(format!("disk '{name}' has {} snapshots", named.len()))
                .hint(format!("delete them first, or all at once with `afterimage rm {name} --recursive`")));
        }
        for row in &named {
            crate::snapshot::refuse_held(row, name)?;
        }
        let mut edit = Edit::new(&mut tables);
        Store::abandon_head(&mut edit, &line, id, &row);
        let records: Vec<_> = edit.tables.retired_of(id).map(|(_, row)| row.state.uuid).collect();
        end_snapshots(&mut edit, id, &row)?;
        keep_last_stamp(&mut edit, id, &row)?;
        edit.delete_disk(id);
        head.set_gone();
        (store.ledger.submit(edit.finish())?, records)
    };
    drop(gate);
    drop(order);
    store.ledger.wait(ticket)?;
    store.forget_head(id);
    for record in records {
        // One that stays is removed at the next opening: nothing names it.
        if let Err(error) = store.remove_record(record) {
            tracing::warn!("a record of the removed disk '{name}' stays for now: {error}");
        }
    }
    store.tell(&Change::Disk { id, name: name.to_owned(), was: None, gone: true, resized: false, data: false });
    store.wake_keeper();
    Ok(())
}

/// Ends every snapshot of a disk that goes, retired ones too.
fn end_snapshots(edit: &mut Edit<'_>, id: DiskId, disk: &DiskRow) -> Result<()> {
    let lineage = edit.tables.branch(disk.branch)?.lineage;
    let of_lineage = |branch| edit.tables.branch(branch).is_ok_and(|row| row.lineage == lineage);
    let has_clones = edit.tables.disks().any(|(other, row)| other != id && of_lineage(row.branch));
    let states = edit.tables.states_of(id).filter(|(_, row)| row.status != Status::Ghost);
    let states = states.map(|(key, row)| (key.1, row.snapshot, Some(key)));
    let mut all: Vec<_> = states.chain(edit.tables.retired_of(id).map(|(id, row)| (row.epoch, id, None))).collect();
    // The oldest first: each leaves its count to the next, and the last ones to the clones.
    all.sort_unstable();
    for (_, snapshot, node) in all {
        if has_clones {
            edit.pass_on_written(snapshot)?;
        }
        match node {
            Some(key) => edit.change_state(key, |row| {
                row.status = Status::Dying;
                row.name = String::new();
            }),
            None => edit.delete_retired(snapshot),
        }
    }
    Ok(())
}

/// Leaves the last stamp of a lineage to another disk of it, when the one that has it goes.
fn keep_last_stamp(edit: &mut Edit<'_>, id: DiskId, row: &DiskRow) -> Result<()> {
    let lineage = edit.tables.branch(row.branch)?.lineage;
    let same = |branch| edit.tables.branch(branch).is_ok_and(|branch| branch.lineage == lineage);
    let heir = edit.tables.disks().find(|(other, disk)| *other != id && same(disk.branch)).map(|(other, _)| other);
    match heir {
        Some(heir) => edit.change_disk(heir, |disk| disk.stamp = disk.stamp.max(row.stamp)),
        None => Ok(()),
    }
}

/// Changes one setting of a disk.
///
/// # Errors
/// As [`set_all`].
pub fn set(store: &Arc<Store>, name: &str, key: &str, value: &str) -> Result<Settings> {
    set_all(store, name, [(key, value)])
}

/// Changes settings of a disk, given as keys and values: all of them or none.
///
/// # Errors
/// `NotFound`, `Usage` for an unknown key or a value that makes no sense, `Failed` for one that cannot be changed any more.
pub fn set_all<'a>(
    store: &Arc<Store>,
    name: &str,
    changes: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<Settings> {
    let (id, settings, ticket) = {
        let mut tables = store.tables.write();
        let id = tables.disk_id(name)?;
        let row = tables.disk(id)?;
        let mut settings = row.settings.clone();
        for (key, value) in changes {
            settings.set(key, value)?;
        }
        if settings.extent_size != row.settings.extent_size && row.base.is_some() {
            return Err(Error::failed(format!("the extent size of disk '{name}' is fixed since its first snapshot"))
                .hint("copies made of its extent files go by it; a new disk can have another one"));
        }
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        edit.change_disk(id, |row| row.settings = settings.clone())?;
        (id, settings, store.ledger.submit(edit.finish())?)
    };
    store.settings_changed(id);
    store.ledger.wait(ticket)?;
    Ok(settings)
}

/// Returns the bytes that only the live disk holds.
///
/// # Errors
/// `NotFound`; `Corrupt` when rows are damaged.
pub fn unique(store: &Arc<Store>, name: &str) -> Result<u64> {
    let id = store.tables.read().disk_id(name)?;
    store.flush(&*store.head(id)?)?;
    let node = {
        let tables = store.tables.read();
        let row = tables.disk(id)?;
        (row.branch, row.epoch)
    };
    store.unique_bytes(node)
}

impl Store {
    /// Tells everybody that the size of a disk changed.
    pub(crate) fn tell_resized(&self, id: DiskId) {
        let name = self.tables.read().disk(id).map(|row| row.name.clone()).unwrap_or_default();
        self.tell(&Change::Disk { id, name, was: None, gone: false, resized: true, data: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "vm-1.root", "\u{fc}ml\u{e4}ut", "with space", &"x".repeat(128)] {
            check_disk_name(good).unwrap();
        }
        for bad in ["", "a/b", "a@b", "a#b", "a\nb", "..", "a..b", "-x", ".x", &"x".repeat(129)] {
            assert!(check_disk_name(bad).is_err(), "{bad:?}");
        }
        check_snapshot_name(&"x".repeat(121)).unwrap_err();
    }

    #[test]
    fn sizes_are_rounded_and_bounded() {
        assert_eq!(round_size(1).unwrap(), 512);
        assert_eq!(round_size(64 << 40).unwrap(), 64 << 40);
        round_size(0).unwrap_err();
        round_size((64 << 40) + 1).unwrap_err();
        round_size(u64::MAX).unwrap_err();
    }
}
