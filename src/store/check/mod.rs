//! `check`: proves, from the rows and the files alone, that the invariants of the pool hold.
//!
//! It works on all rows as of one instant, so the pool may be in use meanwhile. Where the program keeps books (counts of
//! mapped blocks, an index, neighbours in the tree) the check counts again by the slow and obvious rule.
//!
//! # What it proves
//! 1. Every map entry decodes; its pieces are disjoint; every address lies in a listed segment, inside the file.
//! 2. No slab belongs to two chunks, and none to two lineages.
//! 3. No mapped address is queued for punching.
//! 4. Every entry is what some state resolves to, and every mapped address is held by some state (no leak).
//! 5. The counts of segments and disks, and the index, say what the entries say.
//! 6. Data in segments that nothing names is queued, or is still to be swept, or is what a rebuild keeps.
//! 7. What counts as sealed has its seals, and each can be read to its end; so does the newest backup of the catalog.
//!
//! Records of retired snapshots are of a higher layer: [`crate::snapshot::check`] adds them.
//!
//! # Memory
//! The map is read in one walk, lineage by lineage and chunk by chunk ([`lineages`]): all versions of one chunk are in
//! memory at a time. What is known of addresses ([`addresses`]) stays below the budget of the map cache: of more segments
//! than fit, the rest is looked at in further walks over the map.
//!
//! # Mending
//! `--repair` queues leaked blocks for punching, seals again what lost its seal ([`seals`]), and makes a new backup in the
//! place of a damaged one. It never changes what a disk or snapshot shows.

mod addresses;
mod backup;
mod lineages;
mod seals;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::addresses::{Addresses, Walked};
use self::lineages::Lineages;
pub use self::seals::{SealDue, SealsDue};
use super::Store;
use super::frozen::Frozen;
use super::rows::{Key, KeyParts, REBUILT, Table, decode_entry};
use super::tables::{Edit, Tables};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What, on what.
    pub what: String,
    /// Whether `--repair` mended it.
    pub fixed: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// What is wrong, the first [`LISTED_MAX`] of it; what is not mended takes the place of what is.
    pub problems: Vec<Problem>,
    /// How much was found to be wrong, listed or not.
    #[serde(default)]
    pub found: u64,
    /// How much of it is not mended: 0 when the pool is sound now.
    #[serde(default)]
    pub unmended: u64,
    /// Disks looked at.
    pub disks: u64,
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Segments looked at.
    pub segments: u64,
    /// Blocks mapped.
    pub blocks: u64,
    /// Bytes on the host that nothing names.
    pub leaked: u64,
    /// Of them, bytes that a rebuild keeps; they are no problem.
    #[serde(default)]
    pub kept: u64,
    /// What is not wrong, and good to know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Problems that are listed at most.
pub const LISTED_MAX: usize = 1000;

impl CheckReport {
    /// Adds something that is wrong; it is listed unless very much is.
    pub fn wrong(&mut self, what: String) {
        self.add(what, false);
    }

    /// As [`CheckReport::wrong`], of something that may have been mended.
    pub fn add(&mut self, what: String, fixed: bool) {
        self.found += 1;
        self.unmended += u64::from(!fixed);
        if self.problems.len() >= LISTED_MAX {
            let mended = self.problems.iter().rposition(|problem| problem.fixed).filter(|_| !fixed);
            let Some(place) = mended else { return };
            self.problems.remove(place);
        }
        self.problems.push(Problem { what, fixed });
    }

    /// Returns how much is wrong now; a server of an older version counts only what it lists.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.unmended.max(self.problems.iter().filter(|problem| !problem.fixed).count() as u64)
    }

    /// Returns how much was found to be wrong and is not listed.
    #[must_use]
    pub fn more(&self) -> u64 {
        self.found.saturating_sub(self.problems.len() as u64)
    }
}

/// What a check looks at, as of one instant.
struct Checker<'a> {
    store: &'a Store,
    rows: &'a Frozen,
    tables: &'a Tables,
    repair: bool,
    progress: &'a dyn Progress,
}

/// Checks the pool; with `repair` it also mends what can be mended without touching what disks and snapshots show.
///
/// # Errors
/// Any error of the host; `Failed` when cancelled. What is merely wrong is in the report.
pub fn check(store: &Arc<Store>, repair: bool, progress: &dyn Progress) -> Result<CheckReport> {
    store.flush_all()?;
    let (rows, tables) = {
        // Nobody submits while the tables are locked, except steps of `flatten`, which change no answer.
        let _reclaim = store.reclaim.lock();
        let tables = store.tables.write();
        (store.ledger.frozen(), tables.clone())
    };
    let checker = Checker { store, rows: &rows, tables: &tables, repair, progress };
    let mut report = CheckReport {
        disks: tables.disks().count() as u64,
        snapshots: tables.states().filter(|(_, row)| !row.name.is_empty()).count() as u64,
        segments: tables.segments().count() as u64,
        ..CheckReport::default()
    };
    let due = checker.check_map(&mut report)?;
    seals::check(&checker, &due, &mut report)?;
    backup::check(&checker, &mut report)?;
    if repair {
        store.give_up_kept()?;
    }
    Ok(report)
}

impl Checker<'_> {
    fn refuse_cancelled(&self) -> Result<()> {
        if self.progress.cancelled() { Err(Error::failed("the check was cancelled")) } else { Ok(()) }
    }

    /// Checks map, index, queue, counts and segments; returns which seals there have to be.
    fn check_map(&self, report: &mut CheckReport) -> Result<SealsDue> {
        let mut parts = Addresses::parts(self.store, self.tables).into_iter();
        self.progress.message("reading the block map");
        let mut addresses = Addresses::begin(self, parts.next().unwrap_or_default())?;
        let mut due = SealsDue::default();
        let mut lineages = Lineages::new(self);
        for (id, lineage) in lineages::lineages(self.tables) {
            lineages.walk(id, lineage, report, &mut |walked, report| {
                due.note(self.tables, walked.row, walked.entry);
                addresses.enter(walked, true, report);
                self.refuse_cancelled()
            })?;
        }
        lineages.finish(report)?;
        addresses.finish(report)?;
        for part in parts {
            let mut addresses = Addresses::begin(self, part)?;
            let (low, high) = (Key::first_of(Table::Map), Key::beyond(Table::Map));
            let mut rows = self.rows.rows(&low, &high)?;
            while let Some((key, value)) = rows.step()? {
                let KeyParts::Map(branch, chunk, epoch) = key.parts()? else { continue };
                let Ok(known) = self.tables.branch(branch) else { continue };
                let entry = decode_entry(value.bytes())?;
                let walked = Walked { lineage: known.lineage, row: (branch, epoch), chunk, entry: &entry };
                addresses.enter(&walked, false, report);
                self.refuse_cancelled()?;
            }
            addresses.finish(report)?;
        }
        Ok(due)
    }
}

impl Store {
    /// Treats segments that a rebuild found like all others from now on.
    fn give_up_kept(&self) -> Result<()> {
        let ticket = {
            let mut tables = self.tables.write();
            let kept: Vec<_> = tables.segments().filter(|(_, row)| row.opening == REBUILT).map(|(id, _)| id).collect();
            let mut edit = Edit::new(&mut tables);
            for id in kept {
                edit.change_segment(id, |row| row.opening = 0)?;
            }
            self.ledger.submit(edit.finish())?
        };
        self.ledger.wait(ticket)
    }
}
