//! `check`, with the records of retired snapshots; and what is known of those records in between.
//!
//! # Rules
//! 1. `check` reads every record to its end, and asks whether the pool believes it: one that could not be the base of a
//!    diff is a fault, told before a backup needs it.
//! 2. `ls` and `info` look at the beginning of each record of one disk; metrics and `doctor` only whether the files are
//!    there. What a check or a diff has found stays known until the pool is closed, or a record is imported.
//! 3. A row that is gone when its record cannot be read says nothing: the pool is in use.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::record::{Memory, Record};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::store::{CheckReport, RecordFault, RetiredRow, Store};
use crate::units::{DiskId, SnapshotId};

/// What a record may keep in memory while it is checked: nothing of it is used afterwards.
const MEMORY: Memory = Memory { sets: 8 << 20, runs: 1 << 16 };

/// Checks the pool, records of retired snapshots included; see [`crate::store::check`].
///
/// # Errors
/// Any error of the host; `Failed` when cancelled. What is merely wrong is in the report.
pub fn check(store: &Arc<Store>, repair: bool, progress: &dyn Progress) -> Result<CheckReport> {
    let mut report = crate::store::check(store, repair, progress)?;
    progress.message("reading the records of retired snapshots");
    let rows: Vec<_> = store.tables.read().all_retired().map(|(id, row)| (id, row.clone())).collect();
    for (id, row) in rows {
        if progress.cancelled() {
            return Err(Error::failed("the check was cancelled"));
        }
        let Err(error) = prove(store, &row) else {
            store.note_record(id, None);
            continue;
        };
        let Some(name) = name_of(store, id) else { continue };
        store.note_record(id, Some(fault_of(&error)));
        let hint = error.next_step().map(|hint| format!("; {hint}")).unwrap_or_default();
        report.wrong(format!("the retired snapshot '{name}' cannot be the base of a diff: {error}{hint}"));
    }
    store.unwritten_records().for_each(|what| report.wrong(what));
    Ok(report)
}

/// Fails unless a record is whole, is the one of its row, and is believed.
fn prove(store: &Store, row: &RetiredRow) -> Result<()> {
    let record = Record::open_within(&**store.media(), row.state.uuid, MEMORY)?;
    let said = &record.identity.row;
    let same = (said.branch, said.epoch, said.lineage) == (row.branch, row.epoch, row.lineage);
    if !same || (said.state.snapshot, said.state.disk) != (row.state.snapshot, row.state.disk) {
        return Err(record.foreign());
    }
    record.require_trust(store)
}

fn fault_of(error: &Error) -> RecordFault {
    if error.kind() == Kind::NotFound { RecordFault::Missing } else { RecordFault::Damaged }
}

/// Returns `DISK@SNAPSHOT`, unless it is gone.
fn name_of(store: &Store, id: SnapshotId) -> Option<String> {
    let info = store.snapshot_info_by_id(id).ok()?;
    store.tables.read().retired(id)?;
    Some(format!("{}@{}", info.disk, info.name))
}

/// Returns which retired snapshots of a disk have records that are missing or damaged, as far as a quick look shows it.
#[must_use]
pub fn record_faults(store: &Store, disk: DiskId) -> BTreeMap<SnapshotId, RecordFault> {
    let mut faults = store.known_record_faults();
    let rows: Vec<_> = store.tables.read().retired_of(disk).map(|(id, row)| (id, row.state.uuid)).collect();
    faults.retain(|id, _| rows.iter().any(|(row, _)| row == id));
    for (id, uuid) in rows {
        if let Err(error) = Record::glance(&**store.media(), uuid) {
            faults.insert(id, fault_of(&error));
        }
    }
    faults
}

/// Keeps what the opening of a record has shown, and passes it on.
pub(super) fn noted<T>(store: &Store, id: SnapshotId, opened: Result<T>) -> Result<T> {
    match &opened {
        Ok(_) => store.note_record(id, None),
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Corrupt) => {
            store.note_record(id, Some(fault_of(error)));
        }
        Err(_) => {}
    }
    opened
}
