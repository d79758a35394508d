//! Retiring: the data of a snapshot goes, the list of its addresses stays.
//!
//! ```text
//! commit      the state's row says "retired": it is not read any more; its map entries are the record
//! background  seal its epoch; write retired/<uuid>.aimg durably
//! commit      one frame: the row moves to the table of retired snapshots, the state begins to die
//! background  what only it held is freed, as after a delete
//! ```
//!
//! # Rules
//! 1. Retiring copies nothing and needs no room but that of a small file; on a full host the ballast is given up for it.
//! 2. Nothing of the snapshot is freed before its record is durable and the catalog names it.
//! 3. Who still reads the snapshot keeps its data until the last one lets go.
//! 4. A record needs addresses, not data: an epoch that cannot be sealed because a block of it is lost is retired like any
//!    other. A snapshot whose record cannot be written is passed by, keeps its data, and is named; the others go on.
//!
//! # After a crash
//! Between the two commits the work starts over. A record that the catalog does not name is removed.

use std::sync::Arc;

use uuid::Uuid;

use super::record::{self, Record, RecordIdentity};
use crate::error::{Error, Kind, Result};
use crate::media::File;
use crate::pool::RETIRED_DIR;
use crate::progress::Progress;
use crate::store::{Change, Edit, RetiredRow, SnapshotInfo, StateKey, StateRow, Status, Store, Tables};

/// Retires snapshots, all or none. One that is retired already stays so.
///
/// # Errors
/// `NotFound`; `Busy` when one is held; `ReadOnly`.
pub fn retire(store: &Arc<Store>, targets: &[(String, String)]) -> Result<Vec<SnapshotInfo>> {
    let (changed, ticket) = {
        let mut tables = store.tables.write();
        let mut changed = Vec::new();
        for (disk, name) in targets {
            let (key, row) = tables.snapshot(tables.disk_id(disk)?, name)?;
            if row.status == Status::Retired {
                continue;
            }
            super::remove::refuse_held(row, disk)?;
            refuse_twin(&tables, row, disk)?;
            if changed.iter().any(|(other, _, twin): &(StateKey, _, StateRow)| *other != key && twin.uuid == row.uuid) {
                return Err(Error::failed(format!("'{disk}@{name}' and another one of these are the same state"))
                    .hint("retire one of them and delete the other"));
            }
            changed.push((key, disk.clone(), row.clone()));
        }
        store.ledger.writable()?;
        let mut edit = Edit::new(&mut tables);
        for (key, _, _) in &changed {
            edit.change_state(*key, |row| row.status = Status::Retired);
        }
        (changed, store.ledger.submit(edit.finish())?)
    };
    store.ledger.wait(ticket)?;
    attend(store);
    for (_, disk_name, row) in changed {
        let (disk, id, name) = (row.disk, row.snapshot, row.name);
        store.tell(&Change::Snapshot { disk, disk_name, id, name, was: None, gone: false, retired: true });
    }
    store.wake_keeper();
    targets.iter().map(|(disk, name)| store.snapshot_info(disk, name)).collect()
}

/// Records are named after the identity of a snapshot, so only one of several with the same can be retired.
fn refuse_twin(tables: &Tables, row: &StateRow, disk: &str) -> Result<()> {
    let states = tables.states().map(|(_, state)| state).filter(|state| state.status == Status::Retired);
    let all = states.chain(tables.all_retired().map(|(_, retired)| &retired.state));
    let mut twins = all.filter(|other| other.uuid == row.uuid && other.snapshot != row.snapshot);
    let Some(twin) = twins.next() else { return Ok(()) };
    let other = tables.disk(twin.disk).map_or("?", |disk| &disk.name);
    let name = &row.name;
    Err(Error::failed(format!(
        "'{disk}@{name}' is the same state as '{other}@{}', which is retired already",
        twin.name
    ))
    .hint("one record serves both; delete one of the two"))
}

/// Returns when the records of all retired snapshots are durable and their data is freed, but for what somebody holds open
/// and for snapshots whose records cannot be written ([`Store::unrecorded`]): these are tried once more and passed by.
///
/// # Errors
/// Any error of freeing, and of writing a record that is not about the one snapshot.
pub fn wait_retired(store: &Arc<Store>, progress: &dyn Progress) -> Result<()> {
    attend(store);
    store.try_records_again();
    store.reclaim_wait(progress).map(drop)
}

/// Lets the background of a store write records, and removes what a crash left of them. Whoever opens a pool calls it.
pub fn attend(store: &Store) {
    // Before the first record is written: one that is in its place and not named yet must not pass for an orphan.
    store.set_recorder(record_one, || {
        if let Err(error) = remove_orphans(store) {
            tracing::warn!("cannot look for records that nothing names: {error}");
        }
    });
}

/// Removes records that the catalog does not name, and half-written ones.
fn remove_orphans(store: &Store) -> Result<()> {
    let names = match store.media().list(RETIRED_DIR) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| Error::io(format!("cannot list {RETIRED_DIR}"), e))?,
    };
    let tables = store.tables.read();
    let mut known: Vec<Uuid> = tables.all_retired().map(|(_, row)| row.state.uuid).collect();
    drop(tables);
    known.sort_unstable();
    let is_known = |name: &str| {
        let uuid = name.strip_suffix(".aimg").and_then(|stem| stem.parse::<Uuid>().ok());
        uuid.is_some_and(|uuid| known.binary_search(&uuid).is_ok())
    };
    for name in names.iter().filter(|name| !is_known(name)) {
        store.media().remove(&format!("{RETIRED_DIR}/{name}")).map_err(|e| Error::io("cannot remove a record", e))?;
    }
    Ok(())
}

/// Writes the record of one retired snapshot and lets its data go. Returns false when there is none to write.
fn record_one(store: &Store) -> Result<bool> {
    let passed_by = store.unrecorded();
    let next = {
        let tables = store.tables.read();
        let found =
            tables.states().find(|(_, row)| row.status == Status::Retired && !passed_by.contains_key(&row.snapshot));
        found.map(|(key, row)| (key, row.snapshot, row.name.clone()))
    };
    let Some((key, id, name)) = next else { return Ok(false) };
    // Blocks that other states share stay, and their checksums are in this seal only. Without room for it, or when a
    // block of it cannot be read, retiring still goes on.
    match store.seal_state(key) {
        Err(error) if error.kind() == Kind::NoSpace => {}
        Err(error) if is_of_one(&error) => store.note_unsealable(id, &name, &error),
        other => other?,
    }
    match write_record(store, key) {
        Err(error) if is_of_one(&error) => {
            tracing::error!("the record of the retired snapshot '{name}' cannot be written: {error}");
            store.note_unrecorded(id, error.to_string());
        }
        other => other?,
    }
    Ok(true)
}

/// Tells whether an error is about what one snapshot has, so that others may have better luck.
fn is_of_one(error: &Error) -> bool {
    matches!(error.kind(), Kind::Corrupt | Kind::Io) && !error.lacks_descriptors()
}

/// Writes the record of a retired snapshot and lets its data go, unless it was deleted meanwhile.
fn write_record(store: &Store, key: StateKey) -> Result<()> {
    let Some(identity) = identity(store, key)? else { return Ok(()) };
    let map = store.map_of(key);
    let nonce = |segment| store.tables.read().segment(segment).map(|row| row.nonce);
    let write = || record::write(&**store.media(), &identity, &map, &nonce);
    match write() {
        Err(error) if error.kind() == Kind::NoSpace && store.give_up_ballast(&error) => write()?,
        other => other?,
    }
    replace_state(store, key, identity.row)
}

/// Describes a retired snapshot; `None` when it was deleted meanwhile.
fn identity(store: &Store, key: StateKey) -> Result<Option<RecordIdentity>> {
    let tables = store.tables.read();
    let Some(state) = tables.state(key).filter(|row| row.status == Status::Retired).cloned() else { return Ok(None) };
    let disk = tables.disk(state.disk)?;
    Ok(Some(RecordIdentity {
        pool: store.uuid(),
        moment: tables.moment_of(state.snapshot),
        disk_uuid: disk.uuid,
        disk_name: disk.name.clone(),
        row: RetiredRow { branch: key.0, epoch: key.1, lineage: tables.branch(key.0)?.lineage, state },
    }))
}

/// The record is durable: it takes the place of the state, which begins to die.
fn replace_state(store: &Store, key: StateKey, row: RetiredRow) -> Result<()> {
    let ticket = {
        let mut tables = store.tables.write();
        let now = tables.state(key).filter(|now| now.status == Status::Retired).cloned();
        let Some(now) = now.filter(|now| now.snapshot == row.state.snapshot) else {
            drop(tables);
            return store.remove_record(row.state.uuid);
        };
        let mut edit = Edit::new(&mut tables);
        edit.change_state(key, |state| {
            state.status = Status::Dying;
            state.name = String::new();
            state.holds.clear();
        });
        // As it is now: it may have been renamed or held while the record was written.
        edit.put_retired(now.snapshot, RetiredRow { state: now, ..row });
        store.ledger.submit(edit.finish())?
    };
    store.ledger.wait(ticket)?;
    store.wake_keeper();
    Ok(())
}

/// Brings a record that the pool has lost back from a copy. A snapshot that was deleted comes back as a retired one.
///
/// # Errors
/// `Corrupt` when the file is no whole record; `Failed` when it is not of this pool's own past or of a disk that is not
/// here; `Exists` when it is known under a row that has its data, or its name is taken.
pub fn import_record(store: &Arc<Store>, what: &str, file: &Arc<dyn File>) -> Result<SnapshotInfo> {
    let record = Record::read(what, file)?;
    record.require_trust(store)?;
    let identity = &record.identity;
    let id = identity.row.state.snapshot;
    // In turn with the background, which removes the records that nothing names.
    let turn = store.tidying.lock();
    let missing = is_missing(&store.tables.read(), what, identity)?;
    record::copy(&**store.media(), identity.row.state.uuid, &**file)?;
    store.note_record(id, None);
    if missing {
        let ticket = {
            let mut tables = store.tables.write();
            // Asked again: names were free for others while the file was copied.
            if !is_missing(&tables, what, identity).inspect_err(|_| forget_copy(store, &tables, identity))? {
                drop(tables);
                return store.snapshot_info_by_id(id);
            }
            let mut edit = Edit::new(&mut tables);
            edit.put_retired(id, identity.row.clone());
            store.ledger.submit(edit.finish())?
        };
        store.ledger.wait(ticket)?;
        drop(turn);
        let (disk, name) = (identity.row.state.disk, identity.row.state.name.clone());
        let disk_name = store.disk_info_by_id(disk)?.name;
        store.tell(&Change::Snapshot { disk, disk_name, id, name, was: None, gone: false, retired: true });
    }
    store.snapshot_info_by_id(id)
}

/// Tells whether the row of a record is missing from the catalog, so that it has to be entered.
fn is_missing(tables: &Tables, what: &str, identity: &RecordIdentity) -> Result<bool> {
    let state = &identity.row.state;
    let Some(disk) = tables.disk(state.disk).ok().filter(|disk| disk.uuid == identity.disk_uuid) else {
        return Err(Error::failed(format!("{what} is of disk '{}', which is not in the pool", identity.disk_name)));
    };
    if tables.retired(state.snapshot).is_some_and(|row| row.state.uuid == state.uuid) {
        return Ok(false);
    }
    let name = &state.name;
    if tables.snapshots_of(state.disk).any(|(_, row)| row.snapshot == state.snapshot) {
        return Err(Error::exists(format!("snapshot '{}@{name}' has its data and needs no record", disk.name)));
    }
    refuse_twin(tables, state, &disk.name)?;
    if tables.snapshot(state.disk, name).is_ok() {
        return Err(Error::exists(format!("there is a snapshot '{}@{name}' already", disk.name))
            .hint("rename or delete it first"));
    }
    Ok(true)
}

/// Removes the copy of a record that was not entered after all, unless it is that of another row.
fn forget_copy(store: &Store, tables: &Tables, identity: &RecordIdentity) {
    let uuid = identity.row.state.uuid;
    if tables.all_retired().any(|(_, row)| row.state.uuid == uuid) {
        return;
    }
    if let Err(error) = store.remove_record(uuid) {
        tracing::warn!("the record of a snapshot that was not brought back stays: {error}");
    }
}
