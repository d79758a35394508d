//! What is known of the records of retired snapshots, without reading them: which files are not there, and which were
//! found to be damaged since the pool was opened.
//!
//! Records are of a higher layer, which says what it finds; here it is kept for `ls`, metrics and `doctor`. Nothing of it
//! is stored: after an opening it is found again by a check, or by the diff that needs the record.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Status, Store};
use crate::error::{Error, Result};
use crate::pool::RETIRED_DIR;
use crate::units::SnapshotId;

/// Why a record cannot be the base of a diff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordFault {
    /// Its file is not there.
    Missing,
    /// It cannot be read, or is another one.
    Damaged,
}

/// Returns the path of a record below the pool.
#[must_use]
pub fn record_path(snapshot: Uuid) -> String {
    format!("{RETIRED_DIR}/{snapshot}.aimg")
}

impl Store {
    /// Removes the record of a snapshot that is gone; a file that is gone too is no error.
    ///
    /// # Errors
    /// Any error of the host; nothing names the file, and the next opening removes it.
    pub fn remove_record(&self, snapshot: Uuid) -> Result<()> {
        let path = record_path(snapshot);
        match self.media.remove(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("cannot remove {path}"), e)),
            _ => Ok(()),
        }
    }

    /// Notes what was found about a record; `None` when it was whole.
    pub fn note_record(&self, id: SnapshotId, fault: Option<RecordFault>) {
        let mut faults = self.record_faults.lock();
        match fault {
            Some(fault) => drop(faults.insert(id, fault)),
            None => drop(faults.remove(&id)),
        }
    }

    /// Returns the records that were found to be faulty, of snapshots that are still there.
    pub fn known_record_faults(&self) -> BTreeMap<SnapshotId, RecordFault> {
        let tables = self.tables.read();
        let mut faults = self.record_faults.lock();
        faults.retain(|id, _| tables.retired(*id).is_some());
        faults.clone()
    }

    /// Notes why the record of a retired snapshot could not be written: it keeps its data, and the others go on.
    pub fn note_unrecorded(&self, id: SnapshotId, why: String) {
        self.unrecorded.lock().insert(id, why);
    }

    /// Forgets which records could not be written: all are tried again.
    pub fn try_records_again(&self) {
        self.unrecorded.lock().clear();
    }

    /// Returns the retired snapshots whose records could not be written, and why; they keep their data until they are.
    pub fn unrecorded(&self) -> BTreeMap<SnapshotId, String> {
        let tables = self.tables.read();
        let mut all = self.unrecorded.lock();
        all.retain(|id, _| tables.snapshot_by_id(*id).is_ok_and(|(_, row)| row.status == Status::Retired));
        all.clone()
    }

    /// As [`Store::known_record_faults`], with those whose files are not there now.
    ///
    /// # Errors
    /// When the host does not list the directory.
    pub fn all_record_faults(&self) -> Result<BTreeMap<SnapshotId, RecordFault>> {
        let there: BTreeSet<String> = match self.media.list(RETIRED_DIR) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
            other => other.map_err(|e| Error::io(format!("cannot list {RETIRED_DIR}"), e))?.into_iter().collect(),
        };
        let mut faults = self.known_record_faults();
        for (id, row) in self.tables.read().all_retired() {
            let is_there = there.contains(&format!("{}.aimg", row.state.uuid));
            // What was missing when it was looked for may have been put back since.
            match faults.get(&id) {
                _ if !is_there => drop(faults.insert(id, RecordFault::Missing)),
                Some(RecordFault::Missing) => drop(faults.remove(&id)),
                _ => {}
            }
        }
        Ok(faults)
    }

    /// Says of each record that could not be written why.
    pub fn unwritten_records(&self) -> impl Iterator<Item = String> {
        self.unrecorded().into_iter().filter_map(|(id, why)| {
            let info = self.snapshot_info_by_id(id).ok()?;
            Some(format!("the record of the retired snapshot '{}@{}' cannot be written: {why}", info.disk, info.name))
        })
    }

    /// Says which records are missing, damaged, or could not be written, if any is.
    #[must_use]
    pub fn record_damage(&self) -> Option<String> {
        if let Some(first) = self.unwritten_records().next() {
            return Some(first);
        }
        let faults = match self.all_record_faults() {
            Ok(faults) => faults,
            Err(error) => return Some(error.to_string()),
        };
        let (first, fault) = faults.iter().next()?;
        let info = self.snapshot_info_by_id(*first).ok()?;
        let name = format!("{}@{}", info.disk, info.name);
        let how = match fault {
            RecordFault::Missing => "missing",
            RecordFault::Damaged => "damaged",
        };
        Some(match faults.len() {
            1 => format!("the record of the retired snapshot '{name}' is {how}"),
            n => format!("the records of {n} retired snapshots are missing or damaged; '{name}' is the first of them"),
        })
    }
}
