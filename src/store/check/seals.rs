//! Seals: what counts as sealed has a seal that can be read to its end.
//!
//! # Rules
//! 1. The row of a state says `sealed` when the seals of its epoch in every segment and the seal of its map are durable.
//!    One that is missing, damaged or lacks blocks then is a fault, however it came about.
//! 2. A fault is told only if the state is still there, and sealed, after the file was looked at: the pool is in use.
//! 3. A seal is made again from the data as it is now. What can still be read of the old one is kept word for word, so
//!    that damage to those blocks is still found; and a block that is known to be damaged keeps its epoch from it.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckReport, Checker};
use crate::error::{Kind, Result};
use crate::map::Entry;
use crate::store::Store;
use crate::store::seal_file::{SealFile, SealedSlab, seal_path};
use crate::store::tables::{StateKey, Tables};
use crate::units::{Epoch, SegmentId};

/// The seal of an epoch in a segment, as it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealDue {
    /// The segment.
    pub segment: SegmentId,
    /// The state whose epoch it is of.
    pub state: StateKey,
    /// Blocks that it has checksums of.
    pub blocks: u64,
}

/// Which seals of segments there have to be, by what the map says.
#[derive(Debug, Default)]
pub struct SealsDue(BTreeMap<(SegmentId, Epoch), SealDue>);

impl SealsDue {
    /// Takes note of an entry of the map.
    pub fn note(&mut self, tables: &Tables, row: StateKey, entry: &Entry) {
        let Some(state) = tables.state(row).filter(|state| state.sealed && state.status.whole()) else { return };
        for piece in entry.pieces().into_iter().filter(|piece| piece.base.raw() >= state.floor) {
            let segment = piece.base.segment();
            let due = self.0.entry((segment, row.1)).or_insert(SealDue { segment, state: row, blocks: 0 });
            due.blocks += u64::from(piece.set.count());
        }
    }

    /// Returns those that are not among the files there are.
    pub fn missing(&self, there: &[(SegmentId, Epoch)]) -> Vec<SealDue> {
        let there: BTreeSet<_> = there.iter().collect();
        self.0.iter().filter(|(key, _)| !there.contains(key)).map(|(_, due)| *due).collect()
    }
}

/// What is wrong with the seal of an epoch in a segment.
struct Fault {
    file: (SegmentId, Epoch),
    due: Option<SealDue>,
    what: String,
}

/// Checks all of them; `due` are those of segments that there have to be.
pub(super) fn check(checker: &Checker<'_>, due: &SealsDue, report: &mut CheckReport) -> Result<()> {
    let store = checker.store;
    checker.progress.message("reading the seals");
    let there = store.seals_on_disk()?;
    let mut faults: Vec<Fault> = Vec::new();
    for due in due.missing(&there).into_iter().filter(|due| store.is_sealed(due.state)) {
        let path = seal_path(due.segment, due.state.1);
        let what =
            format!("the seal {path} of {} is missing: {}", store.describe(due.state), not_comparable(due.blocks));
        faults.push(Fault { file: (due.segment, due.state.1), due: Some(due), what });
    }
    for file in there.into_iter().filter(|(segment, _)| checker.tables.segment(*segment).is_ok()) {
        checker.refuse_cancelled()?;
        let due = due.0.get(&file).copied();
        if let Some(what) = look(checker, file, due)? {
            faults.push(Fault { file, due, what });
        }
    }
    for Fault { file, due, what } in faults {
        let mended = checker.repair.then(|| match due {
            Some(due) => store.seal_again(due.state).map(|()| "sealed again from the data as it is now"),
            None => store.cut_seal(file.0, file.1).map(|()| "what can be read of it is kept, the rest has no seal now"),
        });
        add(report, &what, mended.as_ref());
    }
    let (faults, waiting) = store.faulty_state_seals()?;
    if waiting > 0 {
        let what = if waiting == 1 { "the map of one snapshot is" } else { "the maps of some snapshots are" };
        report.notes.push(format!("{what} not sealed yet; that is done while a server runs"));
    }
    let mended = (checker.repair && !faults.is_empty())
        .then(|| store.rewrite_state_seals(faults.keys().copied().collect()).map(|()| "made again from the catalog"));
    faults.values().for_each(|what| add(report, what, mended.as_ref()));
    Ok(())
}

/// Reports a fault, and what became of it.
fn add(report: &mut CheckReport, what: &str, mended: Option<&Result<&'static str>>) {
    match mended {
        None => report.wrong(what.to_owned()),
        Some(Ok(how)) => report.add(format!("{what}; {how}"), true),
        Some(Err(error)) => report.wrong(format!("{what}; it could not be mended: {error}")),
    }
}

fn not_comparable(blocks: u64) -> String {
    format!("{blocks} blocks cannot be compared with what was written")
}

/// Reads a seal to its end; returns what is wrong with it.
fn look(checker: &Checker<'_>, (segment, epoch): (SegmentId, Epoch), due: Option<SealDue>) -> Result<Option<String>> {
    let store = checker.store;
    let gone = |due: &SealDue| !store.is_sealed(due.state);
    let (blocks, why) = match count(checker, segment, epoch) {
        Ok(blocks) if due.is_none_or(|due| due.blocks <= blocks) => return Ok(None),
        Ok(blocks) => (blocks, format!("the seal {} lacks blocks", seal_path(segment, epoch))),
        // Removed with its segment meanwhile, or another reason not to be there that `missing` tells.
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => (0, error.to_string()),
        Err(error) => return Err(error),
    };
    Ok(match due {
        Some(due) if gone(&due) => None,
        Some(due) => Some(format!("{why} ({}): {}", store.describe(due.state), not_comparable(due.blocks - blocks))),
        None => Some(format!("{why}: blocks of a deleted snapshot that others share cannot be compared")),
    })
}

/// Counts the blocks that a seal has checksums of.
fn count(checker: &Checker<'_>, segment: SegmentId, epoch: Epoch) -> Result<u64> {
    let (header, records) = SealFile::open(&**checker.store.media(), segment, epoch)?;
    header.require_owner(checker.store.uuid(), checker.tables.segment(segment)?.nonce)?;
    let mut blocks = 0;
    for record in records {
        if let SealedSlab::Written { set, .. } = record? {
            blocks += u64::from(set.count());
        }
    }
    Ok(blocks)
}

impl Store {
    /// Tells whether a state is there with its data, and counts as sealed.
    pub fn is_sealed(&self, state: StateKey) -> bool {
        self.tables.read().state(state).is_some_and(|row| row.sealed && row.status.whole())
    }

    /// Says for people which snapshot a state is.
    pub(in crate::store) fn describe(&self, state: StateKey) -> String {
        let tables = self.tables.read();
        match tables.state(state).filter(|row| !row.name.is_empty()) {
            Some(row) => {
                let disk = tables.disk(row.disk).map_or("?", |disk| &disk.name);
                format!("snapshot '{disk}@{}'", row.name)
            }
            None => format!("the state of epoch {}", state.1),
        }
    }
}
