//! What a disk was cloned from, as its row keeps it: the name it had then, and the number that never changes.
//!
//! # Rules
//! 1. The text is `DISK@SNAPSHOT#ID` with the number of the snapshot, or `DISK#ID` with that of the disk; no name has a `#`.
//!    Both stay through renames, and are never given to anything else.
//! 2. So the name that is shown is the one it has now, and what is gone is called gone, also if its name came back.
//! 3. A row of an older program has the name alone, which is all that can be looked for then.

use super::{StateRow, Status, Tables};
use crate::units::{DiskId, SnapshotId};

/// What a disk was cloned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `DISK@SNAPSHOT`, or `DISK` if that was cloned as it was: the name now, or else the last one that is known.
    pub name: String,
    /// It is not there any more.
    pub gone: bool,
}

/// Returns the text for a clone of a snapshot.
#[must_use]
pub fn of_snapshot(disk: &str, state: &StateRow) -> String {
    format!("{disk}@{}#{}", state.name, state.snapshot.0)
}

/// Returns the text for a clone of a disk.
#[must_use]
pub fn of_disk(name: &str, id: DiskId) -> String {
    format!("{name}#{}", id.0)
}

/// Finds what the text means now.
pub(super) fn find(tables: &Tables, text: &str) -> Origin {
    let (name, id) = match text.rsplit_once('#') {
        Some((name, id)) => (name, id.parse::<u64>().ok()),
        None => (text, None),
    };
    let snapshot = name.split_once('@');
    let now = match (snapshot, id) {
        (Some(_), Some(id)) => tables.snapshot_by_id(SnapshotId(id)).ok().and_then(|(_, row)| {
            let disk = tables.disk(row.disk).ok()?;
            let listed = matches!(row.status, Status::Live | Status::Retired);
            listed.then(|| format!("{}@{}", disk.name, row.name))
        }),
        (None, Some(id)) => tables.disk(DiskId(id)).ok().map(|row| row.name.clone()),
        (Some((disk, snapshot)), None) => {
            let found = tables.disk_id(disk).and_then(|id| tables.snapshot(id, snapshot));
            found.is_ok().then(|| name.to_owned())
        }
        (None, None) => tables.has_disk(name).then(|| name.to_owned()),
    };
    let gone = now.is_none();
    Origin { name: now.unwrap_or_else(|| name.to_owned()), gone }
}
