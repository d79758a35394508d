//! What was written since the previous snapshot, when that snapshot is deleted: it counts for those that came after it.
//!
//! # Rules
//! 1. A count is of an epoch: the blocks born in it that its end still had. When a snapshot is deleted, its count passes to
//!    the next listed ones after it on every way down - snapshots, retired ones too, and disks.
//! 2. Retiring passes nothing: the snapshot is listed as before. What of it would be lost with a disk is added up only
//!    where that is asked ([`Tables::unsaved_since`]).
//! 3. A block that several of the epochs wrote counts in each. So the figure is never less than what a revert drops, which
//!    says then that it is the most it can be; it is shown as no more than what is mapped.
//!
//! # After a crash
//! The counts change in the frame that deletes the snapshot. A rebuild from seals has them as they were when each state
//! was sealed.

use std::collections::BTreeSet;

use super::states::Status;
use super::tables::{Edit, StateKey, Tables};
use super::tree::Stretch;
use crate::error::Result;
use crate::units::{BranchId, DiskId, SnapshotId};

/// Who counts what was written in an epoch that is not listed any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Heir {
    Snapshot(SnapshotId),
    Disk(DiskId),
}

impl Tables {
    /// Returns the retired snapshots that lie in some stretches, oldest first. They are nodes of the tree no more.
    fn retired_in(&self, lineage: BranchId, stretches: &[Stretch]) -> Vec<SnapshotId> {
        let rows = stretches.iter().flat_map(|stretch| self.retired_in_stretch(*stretch));
        let mut found: Vec<_> =
            rows.filter(|(_, row)| row.lineage == lineage).map(|(id, row)| (row.epoch, id)).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// Finds the next listed ones below a place in the tree, on every way down.
    fn heirs(&self, at: StateKey) -> Result<BTreeSet<Heir>> {
        let lineage = self.branch(at.0)?.lineage;
        let mut heirs = BTreeSet::new();
        let mut todo = vec![at];
        while let Some(node) = todo.pop() {
            for child in self.children(node) {
                // A child's stretches reach up to the node above it, which may lie above this place.
                let way: Vec<_> = self.stretches(child).into_iter().filter(|s| s.upto > at.1).collect();
                let mut below = self.retired_in(lineage, &way).into_iter();
                let below = below.find(|id| self.retired(*id).is_some_and(|row| row.epoch > at.1));
                match self.state(child) {
                    _ if below.is_some() => heirs.extend(below.map(Heir::Snapshot)),
                    Some(row) if matches!(row.status, Status::Dying | Status::Ghost) => todo.push(child),
                    Some(row) => drop(heirs.insert(Heir::Snapshot(row.snapshot))),
                    None => heirs.extend(self.head_of(child.0).map(|(id, _)| Heir::Disk(id))),
                }
            }
        }
        Ok(heirs)
    }

    /// Returns the blocks that a disk counts as written since the previous snapshot that is listed.
    ///
    /// # Errors
    /// `NotFound` when the disk was removed.
    pub fn written_since(&self, disk: DiskId) -> Result<u64> {
        let row = self.disk(disk)?;
        let mut blocks = row.written;
        let mut at = (row.branch, row.epoch);
        while let Some(parent) = self.parent(at)
            && let Some(hidden) = self.state(parent).filter(|row| row.status == Status::Hidden)
        {
            blocks = blocks.saturating_add(hidden.written);
            at = parent;
        }
        Ok(blocks)
    }

    /// Returns the blocks of a disk that may be in no snapshot with data: those written since the nearest one above it,
    /// in epochs of retired snapshots too. Never less than what would be lost if the disk became another state now; and
    /// whether it is just that: no other epoch lies in between, so no block counts twice.
    ///
    /// # Errors
    /// `NotFound` when the disk was removed.
    pub fn unsaved_since(&self, disk: DiskId) -> Result<(u64, bool)> {
        let row = self.disk(disk)?;
        let lineage = self.branch(row.branch)?.lineage;
        let mut blocks = row.written;
        let mut at = (row.branch, row.epoch);
        loop {
            let retired = self.retired_in(lineage, &self.stretches(at));
            let passed = retired.iter().filter_map(|id| self.retired(*id)).map(|row| row.state.written);
            blocks = passed.fold(blocks, u64::saturating_add);
            let Some(parent) = self.parent(at) else { break };
            match self.state(parent) {
                Some(state) if state.status == Status::Live => break,
                // One that the program took for itself goes when it is not needed any more.
                Some(state) if state.status.whole() => blocks = blocks.saturating_add(state.written),
                _ => {}
            }
            at = parent;
        }
        let exact = row.base.is_none_or(|base| self.state(base).is_some_and(|state| state.status == Status::Live));
        Ok((blocks.min(row.referenced), exact))
    }
}

impl Edit<'_> {
    /// Lets those that come after a snapshot count what was written in its epoch: it is about to be listed no more.
    ///
    /// # Errors
    /// `Corrupt` when its branch is missing.
    pub fn pass_on_written(&mut self, snapshot: SnapshotId) -> Result<()> {
        let Ok((key, row)) = self.tables.snapshot_by_id(snapshot) else { return Ok(()) };
        let written = row.written;
        // One that is being deleted has passed its count on. The branch of a retired one may be gone, with all below it.
        if written == 0 || !row.status.whole() || self.tables.branch(key.0).is_err() {
            return Ok(());
        }
        for heir in self.tables.heirs(key)? {
            match heir {
                Heir::Snapshot(id) => self.change_snapshot(id, |row| row.written = row.written.saturating_add(written)),
                Heir::Disk(id) => self.change_disk(id, |row| row.written = row.written.saturating_add(written))?,
            }
        }
        Ok(())
    }
}
