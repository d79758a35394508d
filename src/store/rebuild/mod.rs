//! `check --rebuild`: makes the catalog again when it is damaged or lost.
//!
//! # Ways, the better one first
//! 1. [`whole`]: some catalog (the newest backup, or the empty one that every pool begins with) and every frame that came
//!    after it. The ring keeps frames until their room is needed, so a backup of yesterday is often enough. Nothing is
//!    lost then.
//! 2. [`sealed`]: the seals of states. Every snapshot that was sealed is there again with its exact map. A disk becomes
//!    what its newest snapshot is; what was written to it since is lost, and the report says so. Retired snapshots are not
//!    there any more: a record is believed only by a pool that knows its own past, which the catalog did.
//!
//! # Rules
//! 1. Nothing that is there is changed before the new catalog is whole and durable: backups and the damaged catalog are
//!    read through a view that keeps writes to itself.
//! 2. Nothing is deleted: the old catalog is renamed to `catalog.damaged-<n>.redb`, a journal without a header to
//!    `journal.damaged-<n>`, a segment without one to `<id>.seg.damaged`, and the records of retired snapshots that are none
//!    any more go to `retired.damaged-<n>/`.
//! 3. Ids and addresses that might ever have been handed out are not handed out again.
//! 4. What no map names is not punched: it may be the data of an epoch that was never sealed. It stays until somebody who
//!    has looked at the disks says `check --repair`.
//!
//! # After a crash
//! The rename of `catalog.redb.new` commits. Before it the pool is as damaged as it was, and the next rebuild does the same
//! again; an old catalog that was already renamed is looked at in place of the one that is missing.

mod hints;
mod plan;
mod report;
mod scratch;
mod sealed;
mod source;
mod whole;

use std::sync::Arc;

use uuid::Uuid;

use self::source::Source;
use super::catalog::Catalog;
use super::journal::{JOURNAL_MIN, Journal, Mark, Survey};
use super::rows::{Key, Row};
use crate::error::{Error, Kind, Result};
use crate::media::{Media, Open};
use crate::pool::{CATALOG, JOURNAL, Superblock};
use crate::progress::Progress;

pub use report::{RebuildReport, RebuiltDisk};

const NEW: &str = "catalog.redb.new";
const CACHE: usize = 64 << 20;
/// Rows per transaction.
const BATCH: usize = 16 * 1024;

/// What a rebuild works with.
struct Work<'a> {
    media: &'a Arc<dyn Media>,
    pool: Uuid,
    survey: Option<Survey>,
    report: RebuildReport,
    progress: &'a dyn Progress,
}

/// Makes the catalog of a pool again. The caller holds the lock of the pool, and nobody has it open.
///
/// # Errors
/// `NotFound` when there is no pool; any error of the host. What cannot be recovered is in the report.
pub fn rebuild(media: &Arc<dyn Media>, progress: &dyn Progress) -> Result<RebuildReport> {
    let pool = Superblock::read(&**media)?.uuid;
    remove(&**media, NEW)?;
    remove(&**media, scratch::NAME)?;
    let mut work = Work { media, pool, survey: None, report: RebuildReport::default(), progress };
    progress.message("looking at the journal");
    work.survey = work.look_at_journal()?;
    progress.message("looking for a catalog");
    let sources = work.sources()?;
    let found = whole::find(&mut work, &sources)?;
    match found {
        Some(whole::Found::Sound) => return Ok(work.report),
        Some(whole::Found::Source(n)) => whole::write(&mut work, n.map(|n| &sources[n]))?,
        None => {
            work.repair_journal()?;
            sealed::write(&mut work, sources.first())?;
        }
    }
    work.commit()?;
    Ok(work.report)
}

/// Reads a catalog to its end, as a rebuild would.
///
/// # Errors
/// `NotFound`; `Corrupt` when anything in it is damaged; any error of the host.
pub(super) fn look_at(media: &dyn Media, name: &str) -> Result<()> {
    Source::open(media, name).map(drop)
}

impl Work<'_> {
    /// Surveys the journal; `None` when it has no header that can be read.
    fn look_at_journal(&mut self) -> Result<Option<Survey>> {
        let opened = self.media.open(JOURNAL, Open::ReadOnly);
        let surveyed = match opened {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(Error::corrupt("the journal is missing")),
            Err(e) => return Err(Error::io("cannot open the journal", e)),
            Ok(file) => Survey::of(file, self.pool),
        };
        match surveyed {
            Ok(survey) => Ok(Some(survey)),
            Err(error) if error.kind() == Kind::Corrupt => {
                self.report.notes.push(format!("the journal could not be used: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Opens every catalog that can be read whole, the newest first.
    fn sources(&mut self) -> Result<Vec<Source>> {
        let names = self.names()?;
        let mut all = Vec::new();
        if names.iter().any(|name| name == CATALOG) {
            all.push(CATALOG.to_owned());
        } else {
            // A rebuild was cut short between its two renames.
            self.report.notes.push(format!("'{CATALOG}' is missing"));
            let last = (1..).map(damaged_name).take_while(|name| names.contains(name)).last();
            all.extend(last);
        }
        all.extend(super::backups(&**self.media)?.into_iter().rev().map(super::backup_name));
        let mut sources = Vec::new();
        for name in all {
            match Source::open(&**self.media, &name) {
                Ok(source) => sources.push(source),
                Err(error) if matches!(error.kind(), Kind::Unsupported) => return Err(error),
                Err(error) => self.report.notes.push(format!("'{name}' could not be used: {error}")),
            }
        }
        Ok(sources)
    }

    fn names(&self) -> Result<Vec<String>> {
        self.media.list("").map_err(|e| Error::io("cannot list the pool directory", e))
    }

    /// Puts a fresh journal in the place of one that cannot be used.
    fn repair_journal(&mut self) -> Result<()> {
        if self.survey.is_some() {
            return Ok(());
        }
        let fail = |e| Error::io("cannot make a new journal", e);
        let temporary = format!("{JOURNAL}.new");
        remove(&**self.media, &temporary)?;
        let old = self.media.open(JOURNAL, Open::ReadOnly).and_then(|file| file.len()).unwrap_or(64 << 20);
        let len = (old / 4096 * 4096).clamp(JOURNAL_MIN, 64 << 20);
        let file = self.media.open(&temporary, Open::New).map_err(fail)?;
        Journal::create(&file, self.pool, Uuid::new_v4(), len)?;
        let names = self.names()?;
        if names.iter().any(|name| name == JOURNAL) {
            let aside = (1..).map(|n| format!("{JOURNAL}.damaged-{n}")).find(|name| !names.contains(name));
            self.media.rename(JOURNAL, &aside.expect("numbers do not end")).map_err(fail)?;
        }
        self.media.rename(&temporary, JOURNAL).map_err(fail)?;
        self.media.sync_dir("").map_err(fail)?;
        let file = self.media.open(JOURNAL, Open::ReadOnly).map_err(fail)?;
        self.survey = Some(Survey::of(file, self.pool)?);
        Ok(())
    }

    /// Puts the new catalog in the place of the old one.
    fn commit(&mut self) -> Result<()> {
        let fail = |e| Error::io(format!("cannot rename {NEW}"), e);
        let names = self.names()?;
        if names.iter().any(|name| name == CATALOG) {
            let aside = (1..).map(damaged_name).find(|name| !names.contains(name)).expect("numbers do not end");
            self.media.rename(CATALOG, &aside).map_err(fail)?;
            self.media.sync_dir("").map_err(fail)?;
            self.report.kept = Some(aside);
        }
        self.media.rename(NEW, CATALOG).map_err(fail)?;
        self.media.sync_dir("").map_err(fail)?;
        remove(&**self.media, scratch::NAME)?;
        self.report.rebuilt = true;
        Ok(())
    }
}

fn damaged_name(n: u64) -> String {
    format!("catalog.damaged-{n}.redb")
}

fn remove(media: &dyn Media, name: &str) -> Result<()> {
    match media.remove(name) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("cannot remove {name}"), e)),
        _ => Ok(()),
    }
}

/// The catalog that is being made.
struct Output {
    catalog: Catalog,
    mark: Mark,
    rows: Vec<Row>,
}

impl Output {
    fn create(media: &dyn Media, mark: Mark) -> Result<Self> {
        let file = media.open(NEW, Open::New).map_err(|e| Error::io(format!("cannot make {NEW}"), e))?;
        Ok(Self { catalog: Catalog::create(file, CACHE)?, mark, rows: Vec::new() })
    }

    fn put(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        if self.rows.len() >= BATCH { self.write() } else { Ok(()) }
    }

    fn put_value(&mut self, key: Key, value: Vec<u8>) -> Result<()> {
        self.put(Row::put(key, value))
    }

    fn write(&mut self) -> Result<()> {
        let mut rows = self.rows.iter().map(|row| (row.key, row.value.as_deref()));
        self.catalog.fold(&mut rows, self.mark)?;
        self.rows.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.write()?;
        self.catalog.close()
    }
}
