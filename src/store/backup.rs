//! Backups of the catalog: one a day beside it, for a rebuild. `catalog.backup-<n>.redb`, n = days since 1970.
//!
//! # Rules
//! 1. A backup is what the catalog was after one fold, read through a view while others go on, written in batches.
//! 2. It gets its name only when it is whole and durable.
//! 3. It never takes the host's room below the low-water mark, and a failed one harms nothing: it is tried again later.
//! 4. The newest three are kept. `check` reads the newest one, and makes another in the place of a damaged one.
//!
//! # After a crash
//! A file `.new` is what was being written; the next try removes it.

use std::time::Duration;

use super::Store;
use super::catalog::{Catalog, View};
use super::rows::Key;
use crate::clock::{self, Instant};
use crate::error::{Error, Result};
use crate::media::{Media, Open};
use crate::sync::Mutex;

const PREFIX: &str = "catalog.backup-";
const SUFFIX: &str = ".redb";
/// Backups kept.
const KEPT: usize = 3;
/// Rows per transaction: what is not written yet is held in memory.
const BATCH: usize = 8192;
const CACHE: usize = 8 << 20;
pub(super) const DAY: u64 = 86_400;
/// How often it is looked whether one is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How long a failed one is let be.
const RETRY_AFTER: Duration = Duration::from_secs(900);

/// Returns the name of the backup of a day.
#[must_use]
pub fn backup_name(day: u64) -> String {
    format!("{PREFIX}{day}{SUFFIX}")
}

/// Returns the days of which there are backups, oldest first.
///
/// # Errors
/// Any error of the host.
pub fn backups(media: &dyn Media) -> Result<Vec<u64>> {
    let names = media.list("").map_err(|e| Error::io("cannot list the pool directory", e))?;
    let day = |name: &String| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok();
    let mut days: Vec<u64> = names.iter().filter_map(day).filter(|day| names.contains(&backup_name(*day))).collect();
    days.sort_unstable();
    Ok(days)
}

/// What was last tried.
#[derive(Debug, Default)]
pub(super) struct BackupKeeper {
    /// Frames that the last backup of this opening has.
    last: Mutex<Option<u64>>,
    /// When to look again.
    rest: Mutex<Option<Instant>>,
}

impl Store {
    /// Makes a backup when one is due. What goes wrong is logged.
    pub(super) fn back_up_if_due(&self) {
        if self.backups.rest.lock().is_some_and(|until| clock::now() < until) {
            return;
        }
        let rest = match self.back_up_on(clock::wall_seconds() / DAY) {
            Ok(_) => LOOK_EVERY,
            Err(error) => {
                tracing::warn!("no backup of the catalog could be made today; it is tried again later: {error}");
                RETRY_AFTER
            }
        };
        *self.backups.rest.lock() = Some(clock::now() + rest);
    }

    /// Makes the backup of a day, unless there is one, or a newer one, or nothing to lose. Returns whether it was made.
    ///
    /// # Errors
    /// Any error of the host; `NoSpace` also when the host would go below the low-water mark.
    pub fn back_up_on(&self, day: u64) -> Result<bool> {
        let there = backups(&*self.media)?;
        if there.last().is_some_and(|last| *last >= day) || self.tables.read().disks().next().is_none() {
            return Ok(false);
        }
        let view = self.ledger.view();
        let mut last = self.backups.last.lock();
        if !there.is_empty() && *last == Some(view.mark().lsn) {
            return Ok(false);
        }
        let name = backup_name(day);
        let temporary = format!("{name}.new");
        let fail = |e| Error::io(format!("cannot write {name}"), e);
        self.remove_unfinished_backups()?;
        let made = self.write_backup(&view, &temporary);
        if made.is_err() && self.media.remove(&temporary).is_err() {
            tracing::debug!("{temporary} is left; the next try removes it");
        }
        made?;
        self.media.rename(&temporary, &name).map_err(fail)?;
        self.media.sync_dir("").map_err(fail)?;
        *last = Some(view.mark().lsn);
        for old in there.iter().rev().skip(KEPT - 1) {
            self.media.remove(&backup_name(*old)).map_err(fail)?;
        }
        Ok(true)
    }

    /// Makes a backup in the place of one that could not be used.
    ///
    /// # Errors
    /// As [`Store::back_up_on`].
    pub(super) fn replace_backup(&self, damaged: u64, day: u64) -> Result<()> {
        let _turn = self.tidying.lock();
        let name = backup_name(damaged);
        match self.media.remove(&name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {name}"), e));
            }
            _ => {}
        }
        *self.backups.last.lock() = None;
        self.fold()?;
        self.back_up_on(day).map(drop)
    }

    fn remove_unfinished_backups(&self) -> Result<()> {
        let names = self.media.list("").map_err(|e| Error::io("cannot list the pool directory", e))?;
        for name in names.iter().filter(|name| name.starts_with(PREFIX) && name.ends_with(".new")) {
            self.media.remove(name).map_err(|e| Error::io(format!("cannot remove {name}"), e))?;
        }
        Ok(())
    }

    fn write_backup(&self, view: &View, path: &str) -> Result<()> {
        let file = self.media.open(path, Open::New).map_err(|e| Error::io(format!("cannot make {path}"), e))?;
        let copy = Catalog::create(file, CACHE)?;
        let mut at = Key::meta();
        loop {
            self.room_for_backup()?;
            if self.keeper.stopping() {
                return Err(Error::failed("the pool is being closed"));
            }
            let rows = view.page(&at, &Key::last(), BATCH)?;
            copy.fold(&mut rows.iter().map(|(key, value)| (*key, Some(&value[..]))), view.mark())?;
            match rows.last() {
                Some((key, _)) if rows.len() == BATCH => at = key.after(),
                _ => break,
            }
        }
        copy.close()
    }

    /// Fails when the next batch could take the host below its low-water mark.
    fn room_for_backup(&self) -> Result<()> {
        const STEP: u64 = 16 << 20;
        let space = self.space()?;
        let mark = self.low_water(space);
        // A pool that is told to keep nothing free is one of a test, or of somebody who knows.
        if mark > 0 && space.free < mark.saturating_add(STEP) {
            return Err(Error::no_space("the host file system is too full for a backup of the catalog"));
        }
        Ok(())
    }
}
