//! The newest backup of the catalog: whether it could be used, and whether it is as new as it should be.
//!
//! A damaged one is a fault. One that is old is only told: a backup is made on a day on which something changed and the pool
//! was open long enough, and not when the host had no room for it.

use super::{CheckReport, Checker};
use crate::clock;
use crate::error::{Kind, Result};
use crate::store::backup::{DAY, backup_name, backups};
use crate::store::rebuild;

/// Checks it.
pub(super) fn check(checker: &Checker<'_>, report: &mut CheckReport) -> Result<()> {
    let store = checker.store;
    let changed = last_change(checker);
    let today = clock::wall_seconds() / DAY;
    let Some(newest) = backups(&**store.media())?.last().copied() else {
        if changed.is_some_and(|day| day < today) {
            report.notes.push("there is no backup of the catalog; one is made while a server runs".to_owned());
        }
        return Ok(());
    };
    checker.progress.message("reading the backup of the catalog");
    let name = backup_name(newest);
    match rebuild::look_at(&**store.media(), &name) {
        // Replaced by a newer one meanwhile.
        Err(error) if error.kind() == Kind::NotFound => {}
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported | Kind::Io) => {
            let what = format!("the newest backup of the catalog, {name}, could not be used: {error}");
            match checker.repair.then(|| store.replace_backup(newest, today)) {
                Some(Ok(())) => report.add(format!("{what}; another one is made"), true),
                Some(Err(error)) => report.wrong(format!("{what}; another one could not be made: {error}")),
                None => report.wrong(what),
            }
        }
        other => {
            other?;
            if changed.is_some_and(|day| day > newest.saturating_add(1)) {
                let days = today.saturating_sub(newest);
                report.notes.push(format!(
                    "the newest backup of the catalog, {name}, is {days} days old, and disks have changed since; one a day \
                     is made while a server runs and the host has room"
                ));
            }
        }
    }
    Ok(())
}

/// Returns the last day, since 1970, on which a disk changed.
fn last_change(checker: &Checker<'_>) -> Option<u64> {
    let disks = checker.tables.disks().map(|(_, row)| row.modified.max(row.created));
    let states = checker.tables.states().map(|(_, row)| row.created);
    disks.chain(states).max().map(|seconds| seconds / DAY)
}
