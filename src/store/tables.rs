//! The small tables, in memory: disks, branches, states, segments. Loaded at opening, changed only together with rows.
//!
//! # Rules
//! 1. An [`Edit`] changes the table and queues the row in one step, under the write lock, so the two never differ.
//! 2. Nothing here waits for the disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ledger::Ledger;
use super::past::{Moment, OpeningRow, RetiredRow, decode_stamp, encode_stamp};
use super::rows::{BranchRow, Key, KeyParts, Meta, Row, SegmentRow, Table};
use super::states::{DiskRow, StateRow, Status};
use super::tree::Stretch;
use crate::error::{Error, Result};
use crate::units::{BranchId, DiskId, Epoch, SegmentId, SnapshotId};

/// A place in a tree of states: an ended epoch, or the epoch being written.
pub type StateKey = (BranchId, Epoch);

/// Tables that are loaded whole.
const SMALL: [Table; 7] =
    [Table::Disk, Table::Branch, Table::State, Table::Segment, Table::Retired, Table::Stamp, Table::Opening];

/// All small tables.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// Ids handed out.
    pub meta: Meta,
    disks: BTreeMap<DiskId, DiskRow>,
    disk_names: BTreeMap<String, DiskId>,
    branches: BTreeMap<BranchId, BranchRow>,
    offspring: HashMap<BranchId, BTreeSet<(Epoch, BranchId)>>,
    states: BTreeMap<StateKey, StateRow>,
    /// How often a state has become one that can be read.
    readable_news: u64,
    snapshot_ids: HashMap<SnapshotId, StateKey>,
    snapshot_names: BTreeMap<(DiskId, String), SnapshotId>,
    by_disk: HashMap<DiskId, BTreeSet<(Epoch, BranchId)>>,
    retired: BTreeMap<SnapshotId, RetiredRow>,
    retired_by_disk: HashMap<DiskId, BTreeSet<(Epoch, SnapshotId)>>,
    retired_by_branch: BTreeSet<(BranchId, Epoch, SnapshotId)>,
    stamps: BTreeMap<Epoch, u64>,
    /// The largest stamp that was ever seen, whoever had it.
    last_stamp: u64,
    openings: BTreeMap<u64, OpeningRow>,
    named: HashMap<DiskId, usize>,
    heads: HashMap<BranchId, DiskId>,
    segments: BTreeMap<SegmentId, SegmentRow>,
    held: HashMap<DiskId, u64>,
}

impl Tables {
    /// Loads everything from the ledger.
    ///
    /// # Errors
    /// `Corrupt` when a row makes no sense.
    pub fn load(ledger: &Ledger) -> Result<Self> {
        let mut tables = Self::default();
        let meta = ledger.get(&Key::meta())?;
        tables.meta = Meta::decode(&meta.ok_or_else(|| Error::corrupt("the catalog has no meta row"))?)?;
        for table in SMALL {
            ledger.scan(&Key::first_of(table), &Key::beyond(table), &mut |key, value| tables.take(&key, &value))?;
        }
        tables.check()?;
        Ok(tables)
    }

    fn take(&mut self, key: &Key, value: &[u8]) -> Result<()> {
        match key.parts()? {
            KeyParts::Disk(id) => self.set_disk(id, DiskRow::decode(value)?),
            KeyParts::Branch(id) => self.set_branch(id, BranchRow::decode(value)?),
            KeyParts::State(branch, epoch) => self.set_state((branch, epoch), StateRow::decode(value)?),
            KeyParts::Segment(id) => self.set_segment(id, SegmentRow::decode(value)?),
            KeyParts::Retired(id) => self.set_retired(id, RetiredRow::decode(value)?),
            KeyParts::Stamp(epoch) => self.set_stamp(epoch, decode_stamp(value)?),
            KeyParts::Opening(number) => drop(self.openings.insert(number, OpeningRow::decode(value)?)),
            _ => return Err(Error::corrupt("a row of the catalog is in the wrong table")),
        }
        Ok(())
    }

    /// Checks that the rows fit each other: every id that is named exists and was handed out.
    fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::corrupt(format!("the catalog is damaged: {what}")));
        for (id, disk) in &self.disks {
            if !self.branches.contains_key(&disk.branch) || *id > self.meta.disk || disk.epoch > self.meta.epoch {
                return bad(format!("disk '{}' names a branch or epoch that was never made", disk.name));
            }
        }
        if self.disk_names.len() != self.disks.len() || self.heads.len() != self.disks.len() {
            return bad("two disks share a name or a branch".into());
        }
        for (key, state) in &self.states {
            if !self.branches.contains_key(&key.0) || key.1 > self.meta.epoch {
                return bad(format!("snapshot '{}' names a branch that does not exist", state.name));
            }
        }
        for (id, branch) in &self.branches {
            if branch.parent.is_some_and(|parent| parent.0 >= *id) || branch.depth > 1 << 20 {
                return bad(format!("branch {id} is its own ancestor"));
            }
        }
        if let Some(id) = self.segments.keys().find(|id| **id > self.meta.segment || **id > SegmentId::MAX) {
            return bad(format!("segment {id} was never handed out"));
        }
        if self.branches.keys().next_back().is_some_and(|id| *id > self.meta.branch) {
            return bad("a branch was never handed out".into());
        }
        let retired = self.retired.keys().next_back();
        if self.snapshot_ids.keys().chain(retired).any(|id| *id > self.meta.snapshot) {
            return bad("a snapshot was never handed out".into());
        }
        for (id, row) in &self.retired {
            if row.state.snapshot != *id || !self.disks.contains_key(&row.state.disk) {
                return bad(format!("retired snapshot '{}' is of no disk", row.state.name));
            }
        }
        Ok(())
    }

    fn set_stamp(&mut self, epoch: Epoch, stamp: u64) {
        self.last_stamp = self.last_stamp.max(stamp);
        self.stamps.insert(epoch, stamp);
    }

    fn set_disk(&mut self, id: DiskId, row: DiskRow) {
        self.last_stamp = self.last_stamp.max(row.stamp);
        if let Some(old) = self.disks.get(&id) {
            self.disk_names.remove(&old.name);
            self.heads.remove(&old.branch);
        }
        self.disk_names.insert(row.name.clone(), id);
        self.heads.insert(row.branch, id);
        self.disks.insert(id, row);
    }

    fn set_branch(&mut self, id: BranchId, row: BranchRow) {
        if let Some((parent, epoch)) = row.parent {
            self.offspring.entry(parent).or_default().insert((epoch, id));
        }
        self.branches.insert(id, row);
    }

    fn set_state(&mut self, key: StateKey, row: StateRow) {
        self.last_stamp = self.last_stamp.max(row.stamp);
        self.unset_state(key);
        self.readable_news += u64::from(row.status.readable());
        self.snapshot_ids.insert(row.snapshot, key);
        self.enter_name(&row);
        self.by_disk.entry(row.disk).or_default().insert((key.1, key.0));
        self.states.insert(key, row);
    }

    fn unset_state(&mut self, key: StateKey) {
        let Some(old) = self.states.remove(&key) else { return };
        self.snapshot_ids.remove(&old.snapshot);
        self.strike_name(&old);
        if let Some(list) = self.by_disk.get_mut(&old.disk) {
            list.remove(&(key.1, key.0));
        }
    }

    fn enter_name(&mut self, row: &StateRow) {
        if !row.name.is_empty() {
            self.snapshot_names.insert((row.disk, row.name.clone()), row.snapshot);
            *self.named.entry(row.disk).or_default() += 1;
        }
    }

    fn strike_name(&mut self, row: &StateRow) {
        if self.snapshot_names.remove(&(row.disk, row.name.clone())).is_some()
            && let Some(count) = self.named.get_mut(&row.disk)
        {
            *count -= 1;
        }
    }

    fn set_retired(&mut self, id: SnapshotId, row: RetiredRow) {
        self.last_stamp = self.last_stamp.max(row.state.stamp);
        self.unset_retired(id);
        self.enter_name(&row.state);
        self.retired_by_disk.entry(row.state.disk).or_default().insert((row.epoch, id));
        self.retired_by_branch.insert((row.branch, row.epoch, id));
        self.retired.insert(id, row);
    }

    fn unset_retired(&mut self, id: SnapshotId) {
        let Some(old) = self.retired.remove(&id) else { return };
        self.strike_name(&old.state);
        self.retired_by_branch.remove(&(old.branch, old.epoch, id));
        if let Some(list) = self.retired_by_disk.get_mut(&old.state.disk) {
            list.remove(&(old.epoch, id));
        }
    }

    fn set_segment(&mut self, id: SegmentId, row: SegmentRow) {
        *self.held.entry(row.disk).or_default() += row.mapped;
        if let Some(old) = self.segments.insert(id, row) {
            // It may have been another disk's: what is received changes hands.
            let held = self.held.entry(old.disk).or_default();
            *held = held.checked_sub(old.mapped).expect("what was entered before");
        }
    }

    /// Returns all disks in order of id.
    pub fn disks(&self) -> impl Iterator<Item = (DiskId, &DiskRow)> {
        self.disks.iter().map(|(id, row)| (*id, row))
    }

    /// Returns the ids of all disks in order of name.
    pub fn disks_by_name(&self) -> impl Iterator<Item = (DiskId, &DiskRow)> {
        self.disk_names.values().map(|id| (*id, &self.disks[id]))
    }

    /// Finds a disk by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn disk_id(&self, name: &str) -> Result<DiskId> {
        self.disk_names.get(name).copied().ok_or_else(|| {
            Error::not_found(format!("there is no disk '{name}'")).hint("`afterimage ls` lists the disks of the pool")
        })
    }

    /// Returns a disk.
    ///
    /// # Errors
    /// `NotFound` when it was removed.
    pub fn disk(&self, id: DiskId) -> Result<&DiskRow> {
        self.disks.get(&id).ok_or_else(|| Error::not_found("the disk was removed"))
    }

    /// Tells whether a disk has that name.
    #[must_use]
    pub fn has_disk(&self, name: &str) -> bool {
        self.disk_names.contains_key(name)
    }

    /// Returns a branch.
    ///
    /// # Errors
    /// `Corrupt`: branches are only named by rows that [`Tables::load`] has checked.
    pub fn branch(&self, id: BranchId) -> Result<&BranchRow> {
        self.branches.get(&id).ok_or_else(|| Error::corrupt(format!("branch {id} is missing from the catalog")))
    }

    /// Returns all branches.
    pub fn branches(&self) -> impl Iterator<Item = (BranchId, &BranchRow)> {
        self.branches.iter().map(|(id, row)| (*id, row))
    }

    /// Returns the branches started from states of `branch` at or after `epoch`, with that epoch, in its order.
    pub fn offspring(&self, branch: BranchId, epoch: Epoch) -> impl Iterator<Item = (Epoch, BranchId)> + '_ {
        let list = self.offspring.get(&branch);
        list.into_iter().flat_map(move |list| list.range((epoch, BranchId(0))..).copied())
    }

    /// Returns the disk that writes a branch.
    #[must_use]
    pub fn head_of(&self, branch: BranchId) -> Option<(DiskId, &DiskRow)> {
        self.heads.get(&branch).map(|id| (*id, &self.disks[id]))
    }

    /// Returns an ended epoch.
    #[must_use]
    pub fn state(&self, key: StateKey) -> Option<&StateRow> {
        self.states.get(&key)
    }

    /// Returns all ended epochs.
    pub fn states(&self) -> impl Iterator<Item = (StateKey, &StateRow)> {
        self.states.iter().map(|(key, row)| (*key, row))
    }

    /// Returns a number that grows whenever there is a state to read that was not there before.
    #[must_use]
    pub fn readable_news(&self) -> u64 {
        self.readable_news
    }

    /// Returns the last ended epoch of a branch at or before `epoch`.
    #[must_use]
    pub fn last_state(&self, branch: BranchId, epoch: Epoch) -> Option<StateKey> {
        self.states.range((branch, Epoch(0))..=(branch, epoch)).next_back().map(|(key, _)| *key)
    }

    /// Returns the first ended epoch of a branch after `epoch`.
    #[must_use]
    pub fn next_state(&self, branch: BranchId, epoch: Epoch) -> Option<StateKey> {
        self.states.range((branch, epoch.next())..=(branch, Epoch(u64::MAX))).next().map(|(key, _)| *key)
    }

    /// Returns all ended epochs of a disk, oldest first, of any status.
    pub fn states_of(&self, disk: DiskId) -> impl DoubleEndedIterator<Item = (StateKey, &StateRow)> {
        let list = self.by_disk.get(&disk);
        list.into_iter().flatten().map(|(epoch, branch)| ((*branch, *epoch), &self.states[&(*branch, *epoch)]))
    }

    /// Returns the named snapshots of a disk, retired ones too, oldest first.
    pub fn snapshots_of(&self, disk: DiskId) -> impl DoubleEndedIterator<Item = (StateKey, &StateRow)> {
        let mut all: Vec<_> = self
            .states_of(disk)
            .filter(|(_, row)| matches!(row.status, Status::Live | Status::Retired))
            .chain(self.retired_of(disk).map(|(_, row)| ((row.branch, row.epoch), &row.state)))
            .collect();
        all.sort_by_key(|(key, row)| (key.1, row.snapshot));
        all.into_iter()
    }

    /// Returns how many named snapshots a disk has.
    #[must_use]
    pub fn snapshot_count(&self, disk: DiskId) -> usize {
        self.named.get(&disk).copied().unwrap_or(0)
    }

    /// Finds a snapshot by name. A retired one may be no node of the tree any more.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot(&self, disk: DiskId, name: &str) -> Result<(StateKey, &StateRow)> {
        let id = self.snapshot_names.get(&(disk, name.to_owned())).ok_or_else(|| {
            let of = self.disks.get(&disk).map_or("", |row| &row.name);
            Error::not_found(format!("there is no snapshot '{of}@{name}'"))
                .hint(format!("`afterimage ls {of}` lists the snapshots of the disk"))
        })?;
        self.snapshot_by_id(*id)
    }

    /// Finds a snapshot by id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot_by_id(&self, id: SnapshotId) -> Result<(StateKey, &StateRow)> {
        if let Some(row) = self.retired.get(&id) {
            return Ok(((row.branch, row.epoch), &row.state));
        }
        let key = self.snapshot_ids.get(&id).ok_or_else(|| Error::not_found("the snapshot was removed"))?;
        Ok((*key, &self.states[key]))
    }

    /// Returns a retired snapshot whose record is a file.
    #[must_use]
    pub fn retired(&self, id: SnapshotId) -> Option<&RetiredRow> {
        self.retired.get(&id)
    }

    /// Returns the retired snapshots of a disk whose records are files, oldest first.
    pub fn retired_of(&self, disk: DiskId) -> impl Iterator<Item = (SnapshotId, &RetiredRow)> {
        let list = self.retired_by_disk.get(&disk);
        list.into_iter().flatten().map(|(_, id)| (*id, &self.retired[id]))
    }

    /// Returns the retired snapshots of a stretch whose records are files, oldest first.
    pub fn retired_in_stretch(&self, stretch: Stretch) -> impl Iterator<Item = (SnapshotId, &RetiredRow)> {
        let Stretch { branch, after, upto } = stretch;
        // None is of an epoch after the last one.
        let range = (branch, after.next(), SnapshotId(0))..(branch, upto.next(), SnapshotId(0));
        self.retired_by_branch.range(range).map(|(_, _, id)| (*id, &self.retired[id]))
    }

    /// Returns all retired snapshots whose records are files.
    pub fn all_retired(&self) -> impl Iterator<Item = (SnapshotId, &RetiredRow)> {
        self.retired.iter().map(|(id, row)| (*id, row))
    }

    /// Returns the stamp of an ended epoch: when it ended, in whole seconds, no two alike in a pool. An epoch of which no stamp was kept has its number instead, which is as good for telling epochs apart.
    #[must_use]
    pub fn stamp(&self, epoch: Epoch) -> u64 {
        self.stamps.get(&epoch).copied().unwrap_or(epoch.0)
    }

    /// Returns how many stamps there are, and how many ended epochs and retired snapshots.
    #[must_use]
    pub fn stamp_counts(&self) -> (usize, usize) {
        (self.stamps.len(), self.states.len() + self.retired.len())
    }

    /// Returns all stamps.
    pub fn stamps(&self) -> impl Iterator<Item = (Epoch, u64)> {
        self.stamps.iter().map(|(epoch, stamp)| (*epoch, *stamp))
    }

    /// Returns the stamp of an epoch that ends at `now`, in seconds since 1970: later than every other one of the pool, since
    /// disks are renamed, and a path that showed one of them shows another.
    #[must_use]
    pub fn next_stamp(&self, now: u64) -> u64 {
        now.max(self.last_stamp + 1)
    }

    /// Returns the moment of a snapshot that is taken in this opening.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let opening = self.meta.openings;
        Moment { opening, nonce: self.openings.get(&opening).map_or(0, |row| row.nonce) }
    }

    /// Returns the moment at which a snapshot was taken.
    #[must_use]
    pub fn moment_of(&self, snapshot: SnapshotId) -> Moment {
        let taken_in = self.openings.iter().rev().find(|(_, row)| row.snapshot < snapshot);
        taken_in.map_or(Moment::default(), |(opening, row)| Moment { opening: *opening, nonce: row.nonce })
    }

    /// Tells whether a snapshot of that number was taken at that moment in the past of this pool, and not of a copy that
    /// has gone another way.
    #[must_use]
    pub fn remembers(&self, moment: Moment, snapshot: SnapshotId) -> bool {
        snapshot <= self.meta.snapshot && self.moment_of(snapshot) == moment
    }

    /// Returns a segment.
    ///
    /// # Errors
    /// `Corrupt` when no row has it.
    pub fn segment(&self, id: SegmentId) -> Result<&SegmentRow> {
        self.segments.get(&id).ok_or_else(|| Error::corrupt(format!("segment {id} is not in the catalog")))
    }

    /// Returns all segments.
    pub fn segments(&self) -> impl Iterator<Item = (SegmentId, &SegmentRow)> {
        self.segments.iter().map(|(id, row)| (*id, row))
    }

    /// Returns the blocks that a disk and its snapshots hold.
    #[must_use]
    pub fn held(&self, disk: DiskId) -> u64 {
        self.held.get(&disk).copied().unwrap_or(0)
    }
}

/// Changes of the tables and the rows that make them durable.
#[derive(Debug)]
pub struct Edit<'a> {
    /// The tables, already changed.
    pub tables: &'a mut Tables,
    rows: Vec<Row>,
}

impl<'a> Edit<'a> {
    /// Begins.
    pub fn new(tables: &'a mut Tables) -> Self {
        Self { tables, rows: Vec::new() }
    }

    /// Ends with the rows to submit, while the lock on the tables is still held.
    #[must_use]
    pub fn finish(self) -> Vec<Row> {
        self.rows
    }

    /// Adds a row of the large tables (map, index, free).
    pub fn row(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Changes the ids handed out.
    pub fn meta(&mut self, change: impl FnOnce(&mut Meta)) -> Meta {
        change(&mut self.tables.meta);
        self.rows.push(Row::put(Key::meta(), self.tables.meta.encode()));
        self.tables.meta
    }

    /// Sets a disk.
    pub fn put_disk(&mut self, id: DiskId, row: DiskRow) {
        self.rows.push(Row::put(Key::disk(id), row.encode()));
        self.tables.set_disk(id, row);
    }

    /// Changes a disk in place.
    ///
    /// # Errors
    /// `NotFound` when it was removed.
    pub fn change_disk(&mut self, id: DiskId, change: impl FnOnce(&mut DiskRow)) -> Result<()> {
        let mut row = self.tables.disk(id)?.clone();
        change(&mut row);
        self.put_disk(id, row);
        Ok(())
    }

    /// Removes a disk.
    pub fn delete_disk(&mut self, id: DiskId) {
        if let Some(old) = self.tables.disks.remove(&id) {
            self.tables.disk_names.remove(&old.name);
            self.tables.heads.remove(&old.branch);
            self.rows.push(Row::delete(Key::disk(id)));
        }
    }

    /// Sets a branch.
    pub fn put_branch(&mut self, id: BranchId, row: BranchRow) {
        self.rows.push(Row::put(Key::branch(id), row.encode()));
        self.tables.set_branch(id, row);
    }

    /// Removes a branch.
    pub fn delete_branch(&mut self, id: BranchId) {
        let Some(old) = self.tables.branches.remove(&id) else { return };
        if let Some((parent, epoch)) = old.parent
            && let Some(list) = self.tables.offspring.get_mut(&parent)
        {
            list.remove(&(epoch, id));
        }
        self.rows.push(Row::delete(Key::branch(id)));
    }

    /// Sets an ended epoch.
    pub fn put_state(&mut self, key: StateKey, row: StateRow) {
        self.rows.push(Row::put(Key::state(key.0, key.1), row.encode()));
        self.tables.set_state(key, row);
    }

    /// Changes an ended epoch in place, if it is there.
    pub fn change_state(&mut self, key: StateKey, change: impl FnOnce(&mut StateRow)) {
        if let Some(mut row) = self.tables.states.get(&key).cloned() {
            change(&mut row);
            self.put_state(key, row);
        }
    }

    /// Removes an ended epoch.
    pub fn delete_state(&mut self, key: StateKey) {
        self.tables.unset_state(key);
        self.rows.push(Row::delete(Key::state(key.0, key.1)));
    }

    /// Changes a snapshot in place, wherever its row is, if it is there.
    pub fn change_snapshot(&mut self, id: SnapshotId, change: impl FnOnce(&mut StateRow)) {
        if let Some(mut row) = self.tables.retired.get(&id).cloned() {
            change(&mut row.state);
            self.put_retired(id, row);
        } else if let Some(key) = self.tables.snapshot_ids.get(&id) {
            self.change_state(*key, change);
        }
    }

    /// Sets a retired snapshot.
    pub fn put_retired(&mut self, id: SnapshotId, row: RetiredRow) {
        self.rows.push(Row::put(Key::retired(id), row.encode()));
        self.tables.set_retired(id, row);
    }

    /// Removes a retired snapshot.
    pub fn delete_retired(&mut self, id: SnapshotId) {
        self.tables.unset_retired(id);
        self.rows.push(Row::delete(Key::retired(id)));
    }

    /// Sets the stamp of an epoch.
    pub fn put_stamp(&mut self, epoch: Epoch, stamp: u64) {
        self.rows.push(Row::put(Key::stamp(epoch), encode_stamp(stamp)));
        self.tables.set_stamp(epoch, stamp);
    }

    /// Forgets the stamp of an epoch.
    pub fn delete_stamp(&mut self, epoch: Epoch) {
        self.rows.push(Row::delete(Key::stamp(epoch)));
        self.tables.stamps.remove(&epoch);
    }

    /// Enters an opening. The one before is forgotten if no snapshot was taken in it.
    pub fn put_opening(&mut self, number: u64, row: OpeningRow) {
        let idle = self.tables.openings.last_key_value().filter(|(_, last)| last.snapshot == row.snapshot);
        if let Some(idle) = idle.map(|(number, _)| *number) {
            self.rows.push(Row::delete(Key::opening(idle)));
            self.tables.openings.remove(&idle);
        }
        self.rows.push(Row::put(Key::opening(number), row.encode()));
        self.tables.openings.insert(number, row);
    }

    /// Sets a segment.
    pub fn put_segment(&mut self, id: SegmentId, row: SegmentRow) {
        self.rows.push(Row::put(Key::segment(id), row.encode()));
        self.tables.set_segment(id, row);
    }

    /// Changes a segment in place.
    ///
    /// # Errors
    /// `Corrupt` when no row has it.
    pub fn change_segment(&mut self, id: SegmentId, change: impl FnOnce(&mut SegmentRow)) -> Result<()> {
        let mut row = *self.tables.segment(id)?;
        change(&mut row);
        self.put_segment(id, row);
        Ok(())
    }

    /// Removes a segment.
    pub fn delete_segment(&mut self, id: SegmentId) {
        if let Some(old) = self.tables.segments.remove(&id) {
            let held = self.tables.held.entry(old.disk).or_default();
            *held = held.checked_sub(old.mapped).expect("what was entered before");
            self.rows.push(Row::delete(Key::segment(id)));
        }
    }
}
