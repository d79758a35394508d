//! What is remembered of the past: retired snapshots, the stamps of epochs, and the openings of the pool.
//!
//! # Rules
//! 1. A retired snapshot has a row here from the frame on that makes its record (`retired/<uuid>.aimg`) take the place of
//!    its map entries. It is no node of the tree any more; branch and epoch only say where it was.
//! 2. The stamp of an epoch stays while any map entry has that epoch, whatever became of its snapshot: extent files have
//!    it as their time.
//! 3. An opening is remembered if snapshots were taken in it. A record is of this pool's own past only if its opening is
//!    known here with the same nonce, and its snapshot was numbered before the next opening began. A copy of the pool, or
//!    one that was taken back to an earlier day, goes on with another opening; addresses and in-place writes of the other
//!    course of events are then never taken for its own.

use std::collections::BTreeSet;

use super::Store;
use super::rows::{Key, KeyParts, Table};
use super::states::{StateRow, Status};
use super::tables::Edit;
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};
use crate::units::{BranchId, Epoch, SnapshotId};

/// When a snapshot was taken, in terms that only this course of events has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moment {
    /// Number of the opening of the pool.
    pub opening: u64,
    /// Its nonce.
    pub nonce: u64,
}

/// A retired snapshot whose record is a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetiredRow {
    /// The branch it was in.
    pub branch: BranchId,
    /// The epoch it ended.
    pub epoch: Epoch,
    /// Its lineage.
    pub lineage: BranchId,
    /// Everything else, as when it was live; the status is [`Status::Retired`].
    pub state: StateRow,
}

impl RetiredRow {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.u64(self.branch.0).u64(self.epoch.0).u64(self.lineage.0);
        self.state.write(&mut out);
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a retired row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let (branch, epoch) = (BranchId(from.u64()?), Epoch(from.u64()?));
        let lineage = BranchId(from.u64()?);
        let state = StateRow::read(what, &mut from)?;
        from.end()?;
        if state.status != Status::Retired {
            return Err(Error::corrupt(format!("{what} has another status")));
        }
        Ok(Self { branch, epoch, lineage, state })
    }
}

/// An opening of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpeningRow {
    /// Random.
    pub nonce: u64,
    /// The last snapshot id that was handed out before.
    pub snapshot: SnapshotId,
    /// Seconds since 1970 when it began.
    pub begun: u64,
}

impl OpeningRow {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.u64(self.nonce).u64(self.snapshot.0).u64(self.begun);
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "an opening row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let row = Self { nonce: from.u64()?, snapshot: SnapshotId(from.u64()?), begun: from.u64()? };
        from.end()?;
        Ok(row)
    }
}

/// Stamps beyond twice those of the states that are dropped at a time at least: looking for them reads the whole index.
const STAMPS_SPARE: usize = 1000;

impl Store {
    /// Forgets the stamps of epochs of which no entry is left, when there are many. Returns false when there are not.
    ///
    /// # Errors
    /// When the catalog cannot be read; `ReadOnly` when the pool refuses writes.
    pub fn drop_stamps(&self) -> Result<bool> {
        let (stamps, states) = self.tables.read().stamp_counts();
        if stamps < 2 * states.max(self.stamps_needed.load(std::sync::atomic::Ordering::Relaxed)) + STAMPS_SPARE {
            return Ok(false);
        }
        let mut needed = BTreeSet::new();
        self.ledger.scan(&Key::first_of(Table::Index), &Key::beyond(Table::Index), &mut |key, _| {
            if let KeyParts::Index(_, epoch, _) = key.parts()? {
                needed.insert(epoch);
            }
            Ok(())
        })?;
        // An entry that is made meanwhile is of an epoch that is still written or was just ended: above all that is asked.
        let mut tables = self.tables.write();
        needed.extend(tables.states().map(|(key, _)| key.1));
        // And the last stamp, after which the next one comes, whoever had it.
        needed.extend(tables.stamps().max_by_key(|(_, stamp)| *stamp).map(|(epoch, _)| epoch));
        let newest = needed.last().copied().unwrap_or_default();
        let idle: Vec<Epoch> = tables
            .stamps()
            .map(|(epoch, _)| epoch)
            .filter(|epoch| *epoch < newest && !needed.contains(epoch))
            .collect();
        self.stamps_needed.store(stamps - idle.len(), std::sync::atomic::Ordering::Relaxed);
        for part in idle.chunks(4096) {
            let mut edit = Edit::new(&mut tables);
            part.iter().for_each(|epoch| edit.delete_stamp(*epoch));
            let _ticket = self.ledger.submit(edit.finish())?;
        }
        Ok(false)
    }
}

/// Encodes the value of a stamp row: seconds since 1970.
#[must_use]
pub fn encode_stamp(stamp: u64) -> Vec<u8> {
    let mut out = Writer::new();
    out.u64(stamp);
    out.sealed()
}

/// Decodes the value of a stamp row.
///
/// # Errors
/// `Corrupt`.
pub fn decode_stamp(bytes: &[u8]) -> Result<u64> {
    let what = "a stamp row of the catalog";
    let mut from = Reader::new(what, unseal(what, bytes)?);
    let stamp = from.u64()?;
    from.end()?;
    Ok(stamp)
}
