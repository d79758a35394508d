//! What a client can ask about ranges beside whether they are allocated: what changed since a snapshot.
//!
//! `qemu:dirty-bitmap:NAME` is named after QEMU's bitmaps, so that the backup programs for QEMU read it. NAME is a
//! snapshot of the disk, live or retired, or `DISK@SNAPSHOT` for one of another disk of its lineage.
//!
//! # Rules
//! 1. What is dirty is what differs between NAME and what is exported ([`crate::snapshot::diff`]): more may be told than
//!    differs, never less. For a live disk it is as of the moment when the client chose the context; who wants data and
//!    changes of one instant exports a snapshot.
//! 2. It is computed once, when it is chosen, and kept in bounded memory ([`Asked`]): where there are too many ranges, those
//!    with the smallest gaps between them become one. It is broken off when nobody wants it any more.
//! 3. A base that cannot be used is an error, not an answer that all or nothing changed.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::snapshot::diff::{self, StateName};
use crate::store::{StateKey, StateRow, Store, Tables};
use crate::units::{BLOCK_SIZE, BranchId, DiskId, SnapshotId};

/// Ranges that are kept of one context at most.
const RANGES_MAX: usize = 4 << 20;
/// Bytes of a range.
const RANGE: usize = size_of::<u64>();
/// Bytes of as many as there may be.
pub(super) const DIRTY_MAX: usize = RANGES_MAX * RANGE;
/// Blocks of one range at most; longer ones are several.
const BLOCKS_MAX: u64 = (1 << LENGTH_BITS) - 1;
const LENGTH_BITS: u32 = 29;

/// The ranges of an export that changed, in whole blocks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// First block and number of blocks, packed; sorted and disjoint.
    ranges: Vec<u64>,
    /// Gaps shorter than this many blocks are not kept.
    gap: u64,
}

fn unpack(range: u64) -> (u64, u64) {
    let (start, len) = (range >> LENGTH_BITS, range & BLOCKS_MAX);
    (start, start + len)
}

impl Dirty {
    /// Adds a range of bytes, which must not begin before the one added last ends.
    ///
    /// # Panics
    /// When it begins beyond 128 TiB: no disk is so large.
    pub fn add(&mut self, bytes: Range<u64>) {
        self.add_within(bytes, RANGES_MAX);
    }

    /// Returns how much memory it has.
    pub(super) fn bytes(&self) -> usize {
        self.ranges.capacity() * RANGE
    }

    fn add_within(&mut self, bytes: Range<u64>, ranges_max: usize) {
        let (start, end) = (bytes.start / BLOCK_SIZE, bytes.end.div_ceil(BLOCK_SIZE));
        assert!(start < 1 << (64 - LENGTH_BITS), "an export has at most 2^35 blocks");
        self.put(start, end);
        while self.ranges.len() > ranges_max {
            self.gap = (self.gap * 2).max(2);
            for range in std::mem::take(&mut self.ranges) {
                let (start, end) = unpack(range);
                self.put(start, end);
            }
        }
    }

    fn put(&mut self, mut start: u64, end: u64) {
        if let Some(last) = self.ranges.last_mut() {
            let (before, upto) = unpack(*last);
            if start < upto + self.gap.max(1) && end.saturating_sub(before) <= BLOCKS_MAX {
                *last = before << LENGTH_BITS | (end.max(upto) - before);
                return;
            }
            // What is already there is not told again; a gap that is not kept is filled by what follows it.
            start = if start < upto + self.gap.max(1) { upto } else { start };
        }
        while start < end {
            let len = (end - start).min(BLOCKS_MAX);
            self.ranges.push(start << LENGTH_BITS | len);
            start += len;
        }
    }

    /// Tells whether the byte at `offset` is in a range, and the offset up to which that holds; `u64::MAX` behind the last.
    #[must_use]
    pub fn at(&self, offset: u64) -> (bool, u64) {
        let block = offset / BLOCK_SIZE;
        let mut next = self.ranges.partition_point(|range| unpack(*range).1 <= block);
        let Some(range) = self.ranges.get(next) else { return (false, u64::MAX) };
        let (start, mut end) = unpack(*range);
        if block < start {
            return (false, start * BLOCK_SIZE);
        }
        while let Some((start, upto)) = self.ranges.get(next + 1).map(|range| unpack(*range))
            && start == end
        {
            (next, end) = (next + 1, upto);
        }
        (true, end * BLOCK_SIZE)
    }
}

/// How something is asked for that may take long and be large.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// Bytes the answer may have; 16 at least.
    pub bytes: usize,
    /// Tells whether nobody wants it any more.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl std::fmt::Debug for Asked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Asked<'static> {
    /// Asks for as much as there may be, and waits for it.
    #[must_use]
    pub fn patiently() -> Self {
        Self { bytes: DIRTY_MAX, cancelled: &|| false }
    }
}

/// What changed since when, for an export.
pub trait Contexts: Send + Sync {
    /// Returns the names that are listed; others may be known, too.
    fn names(&self) -> Vec<String>;
    /// Finds what changed since `name`.
    ///
    /// # Errors
    /// `NotFound` when there is no such name; any other when it is there and cannot be used, or was cancelled.
    fn dirty(&self, name: &str, asked: &Asked<'_>) -> Result<Arc<Dirty>>;
}

/// No contexts.
#[derive(Debug, Clone, Copy)]
pub struct NoContexts;

impl Contexts for NoContexts {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn dirty(&self, name: &str, _asked: &Asked<'_>) -> Result<Arc<Dirty>> {
        Err(Error::not_found(format!("there is no '{name}' to compare with")))
    }
}

/// A state of a pool that is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exported {
    /// A disk as it is.
    Disk(DiskId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// Returns the contexts of a disk or a snapshot: the snapshots of its lineage, live or retired.
#[must_use]
pub fn contexts_of(store: &Arc<Store>, exported: Exported) -> Arc<dyn Contexts> {
    Arc::new(Snapshots { store: Arc::clone(store), exported })
}

struct Snapshots {
    store: Arc<Store>,
    exported: Exported,
}

fn lineage_of(tables: &Tables, key: StateKey, row: &StateRow) -> Option<BranchId> {
    let retired = tables.retired(row.snapshot).map(|retired| retired.lineage);
    retired.or_else(|| tables.branch(key.0).ok().map(|branch| branch.lineage))
}

impl Snapshots {
    /// Returns the disk, and the lineage.
    fn place(&self, tables: &Tables) -> Result<(DiskId, Option<BranchId>)> {
        match self.exported {
            Exported::Disk(id) => Ok((id, Some(tables.branch(tables.disk(id)?.branch)?.lineage))),
            Exported::Snapshot(id) => {
                let (key, row) = tables.snapshot_by_id(id)?;
                Ok((row.disk, lineage_of(tables, key, row)))
            }
        }
    }

    fn names_in(&self, tables: &Tables) -> Result<Vec<String>> {
        let (own, lineage) = self.place(tables)?;
        let mut names = Vec::new();
        let mut disks: Vec<_> = tables.disks_by_name().collect();
        disks.sort_by_key(|(id, _)| *id != own);
        for (disk, row) in disks {
            for (key, state) in tables.snapshots_of(disk) {
                let itself = self.exported == Exported::Snapshot(state.snapshot);
                if itself || lineage_of(tables, key, state) != lineage {
                    continue;
                }
                let prefix = if disk == own { String::new() } else { format!("{}@", row.name) };
                names.push(format!("{prefix}{}", state.name));
            }
        }
        Ok(names)
    }

    /// Returns the two sides of the comparison.
    fn sides(&self, name: &str) -> Result<(StateName, StateName)> {
        let tables = self.store.tables.read();
        let (own, _) = self.place(&tables)?;
        let (disk, snapshot) = match name.split_once('@') {
            Some((disk, snapshot)) => (tables.disk_id(disk)?, snapshot),
            None => (own, name),
        };
        let from = StateName::Hidden(tables.snapshot(disk, snapshot)?.1.snapshot);
        let to = match self.exported {
            Exported::Disk(id) => StateName::Disk(tables.disk(id)?.name.clone()),
            Exported::Snapshot(id) => StateName::Hidden(id),
        };
        Ok((from, to))
    }
}

impl Contexts for Snapshots {
    fn names(&self) -> Vec<String> {
        // What is gone has no names.
        self.names_in(&self.store.tables.read()).unwrap_or_default()
    }

    fn dirty(&self, name: &str, asked: &Asked<'_>) -> Result<Arc<Dirty>> {
        let (from, to) = self.sides(name)?;
        let mut dirty = Dirty::default();
        let ranges_max = (asked.bytes / RANGE).clamp(2, RANGES_MAX);
        let each = &mut |extent: diff::Extent| {
            dirty.add_within(extent.offset..extent.offset + extent.length, ranges_max);
            Ok(())
        };
        let found = diff::open(&self.store, &from, &to).and_then(|diff| diff.each_until(asked.cancelled, each));
        // Found a moment ago: that it is not found now is no sign of a name that never was.
        let gone = |e: Error| match e.kind() {
            Kind::NotFound => Error::failed(format!("'{name}' went away: {e}")),
            _ => e.context(format!("cannot compare with '{name}'")),
        };
        found.map_err(gone)?;
        dirty.ranges.shrink_to_fit();
        Ok(Arc::new(dirty))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: u64 = BLOCK_SIZE;

    fn runs(dirty: &Dirty, size: u64) -> Vec<(u64, u64)> {
        let (mut at, mut runs) = (0, Vec::new());
        while at < size {
            let (is, upto) = dirty.at(at);
            if is {
                runs.push((at / B, upto / B));
            }
            at = upto;
        }
        runs
    }

    #[test]
    fn ranges_come_back_joined_where_they_touch() {
        let mut dirty = Dirty::default();
        for range in [0..B, B..2 * B, 5 * B..6 * B, 7 * B..8 * B + 1, (60 << 40)..(64 << 40)] {
            dirty.add(range);
        }
        let last = (60 << 40) / B;
        assert_eq!(runs(&dirty, 64 << 40), [(0, 2), (5, 6), (7, 9), (last, (64 << 40) / B)]);
        assert_eq!(dirty.at(2 * B - 1), (true, 2 * B));
        assert_eq!(dirty.at(2 * B), (false, 5 * B));
        assert_eq!(dirty.at(64 << 40), (false, u64::MAX));
        assert_eq!(Dirty::default().at(7), (false, u64::MAX));
    }

    #[test]
    fn too_many_ranges_become_fewer_and_none_is_lost() {
        let mut dirty = Dirty::default();
        let mut added = Vec::new();
        let mut at = 0;
        for n in 0..1000u64 {
            at += 1 + n * n % 7;
            added.push(at);
            dirty.add_within(at * B..(at + 1) * B, 50);
        }
        assert!(dirty.ranges.len() <= 50 && dirty.gap > 1);
        let runs = runs(&dirty, 1 << 40);
        assert!(added.iter().all(|block| runs.iter().any(|(start, end)| (start..end).contains(&block))));
        assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0));
        // Also where a range is as long as one can be.
        let mut dirty = Dirty { ranges: Vec::new(), gap: 4 };
        dirty.add(0..BLOCKS_MAX * B);
        dirty.add((BLOCKS_MAX + 2) * B..(BLOCKS_MAX + 3) * B);
        assert_eq!(dirty.at(0), (true, (BLOCKS_MAX + 3) * B));
    }
}
