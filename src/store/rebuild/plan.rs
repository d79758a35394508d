//! The small tables of a rebuilt catalog: states, branches, ghosts, disks, ids.
//!
//! # Rules
//! 1. Branches and epochs are what they were, so the tree is what it was, less what is gone.
//! 2. Where a branch began at a state that is gone there is a ghost while two or more states hang on it: they may share
//!    addresses, and only the tree tells. (Rule 1 of `tree`.)
//! 3. Every disk writes a new branch in a new epoch, which begins as its newest state.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use uuid::Uuid;

use super::super::rows::{BranchRow, Key, Meta, Row};
use super::super::states::{DiskRow, StateRow, Status};
use super::super::tables::{Edit, StateKey, Tables};
use super::RebuiltDisk;
use super::hints::{Hints, most};
use super::sealed::{Found, Sealed, branch_at};
use crate::clock;
use crate::error::Result;
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, DiskId, Epoch, SegmentId, SnapshotId};

/// Ids that may have been handed out since what is known was written.
const JUMP: u64 = 1 << 20;
/// Segments likewise: each takes a file, so there are fewer.
const SEGMENT_JUMP: u64 = 1 << 16;

/// A state, and the nearest one above it that is there.
type Node = (StateKey, Option<Epoch>);

/// What is to be there.
#[derive(Default)]
pub(super) struct Plan {
    tables: Tables,
    nodes: BTreeMap<BranchId, Vec<Node>>,
    /// For the report, in order of id.
    pub(super) disks: Vec<RebuiltDisk>,
    /// The state each of them begins as.
    bases: Vec<Option<Epoch>>,
}

/// Makes the name of something whose own is not known, or taken.
fn recovered(id: u64) -> String {
    format!("recovered-{id}")
}

impl Plan {
    pub(super) fn make(found: &Found, hints: &Hints, last_segment: SegmentId) -> Result<Self> {
        let mut plan = Self::default();
        plan.tables.meta = jump(found, hints, last_segment);
        let mut edit = Edit::new(&mut plan.tables);
        for sealed in found.live() {
            put_branches(&mut edit, sealed);
            put_state(&mut edit, hints, sealed);
        }
        put_ghosts(&mut edit);
        let _rows = edit.finish();
        for sealed in found.live() {
            let key = (sealed.seal.branch, sealed.seal.epoch);
            let above = plan.above(key);
            plan.nodes.entry(sealed.lineage).or_default().push((key, above));
        }
        let mut ids: BTreeSet<DiskId> = hints.disks.keys().copied().collect();
        ids.extend(found.live().map(|sealed| sealed.seal.row.disk));
        for id in ids {
            plan.put_disk(id, found, hints)?;
        }
        Ok(plan)
    }

    /// Returns the nearest state above one that is there, ghosts left out.
    fn above(&self, key: StateKey) -> Option<Epoch> {
        let mut at = key;
        loop {
            at = self.tables.parent(at)?;
            if self.tables.state(at).is_some_and(|row| row.status != Status::Ghost) {
                return Some(at.1);
            }
        }
    }

    /// Returns the states of a lineage.
    pub(super) fn nodes(&self, lineage: BranchId) -> &[Node] {
        self.nodes.get(&lineage).map_or(&[], Vec::as_slice)
    }

    fn put_disk(&mut self, id: DiskId, found: &Found, hints: &Hints) -> Result<()> {
        let mine: Vec<&Sealed> = found.live().filter(|sealed| sealed.seal.row.disk == id).collect();
        let known = hints.disks.get(&id);
        // What the journal says was so in the end; a backup may be older than the newest state.
        let there = |base: &StateKey| self.tables.state(*base).is_some_and(|row| row.status != Status::Ghost);
        let said = known.and_then(|row| row.base).filter(there);
        let newest = mine.last().map(|sealed| (sealed.seal.branch, sealed.seal.epoch));
        let base = if hints.current.contains(&id) { said.or(newest) } else { newest.or(said) };
        let mut row = known.cloned().unwrap_or_else(|| fresh_row(mine.last().copied()));
        let mut edit = Edit::new(&mut self.tables);
        let meta = edit.meta(|meta| {
            meta.branch = meta.branch.next();
            meta.epoch = meta.epoch.next();
        });
        let branch = match base {
            Some(key) => {
                let parent = *edit.tables.branch(key.0)?;
                branch_at(key, parent.depth + 1, parent.lineage)
            }
            None => BranchRow { parent: None, inherits: false, depth: 1, lineage: meta.branch },
        };
        edit.put_branch(meta.branch, branch);
        if row.name.is_empty() || edit.tables.has_disk(&row.name) {
            row.name = recovered(id.0);
        }
        let state = base.and_then(|key| edit.tables.state(key)).cloned();
        let stamp = mine.iter().map(|sealed| sealed.seal.row.stamp).max().unwrap_or(0);
        row = DiskRow {
            branch: meta.branch,
            epoch: meta.epoch,
            base,
            floor: BlockAddress::new(meta.segment.next(), 0).raw(),
            stamp: row.stamp.max(stamp).max(state.as_ref().map_or(0, |state| state.stamp)),
            modified: clock::wall_seconds(),
            referenced: 0,
            written: 0,
            touched: base.is_some(),
            trim: state.as_ref().is_some_and(|state| state.trim),
            size: size_of_disk(&row, state.as_ref(), hints.current.contains(&id)),
            ..row
        };
        let lost = lost_of(id, hints, found, state.as_ref());
        let snapshots = edit.tables.snapshot_count(id) as u64;
        let live = state.map(|state| state.name);
        self.disks.push(RebuiltDisk { disk: row.name.clone(), snapshots, referenced: 0, live, lost });
        self.bases.push(base.map(|base| base.1));
        edit.put_disk(id, row);
        let _rows = edit.finish();
        Ok(())
    }

    /// Ends the plan with the number of blocks of each state: the rows, and what the report says of the disks.
    pub(super) fn finish(mut self, referenced: &HashMap<Epoch, u64>) -> Result<(Vec<Row>, Vec<RebuiltDisk>)> {
        let count = |epoch: &Epoch| referenced.get(epoch).copied().unwrap_or(0);
        let keys: Vec<StateKey> = self.tables.states().map(|(key, _)| key).collect();
        let ids: Vec<DiskId> = self.tables.disks().map(|(id, _)| id).collect();
        let mut edit = Edit::new(&mut self.tables);
        for key in keys {
            edit.change_state(key, |row| row.referenced = count(&key.1));
            // Extent files keep their times where an entry is still of the epoch that made it.
            let stamp = edit.tables.state(key).map_or(0, |row| row.stamp);
            edit.put_stamp(key.1, stamp);
        }
        for (n, id) in ids.into_iter().enumerate() {
            let blocks = self.bases[n].as_ref().map_or(0, count);
            edit.change_disk(id, |row| row.referenced = blocks)?;
            self.disks[n].referenced = blocks * BLOCK_SIZE;
        }
        let mut rows = edit.finish();
        rows.extend(self.tables.branches().map(|(id, row)| Row::put(Key::branch(id), row.encode())));
        rows.push(Row::put(Key::meta(), self.tables.meta.encode()));
        Ok((rows, self.disks))
    }
}

/// Ids well above everything that was ever seen.
fn jump(found: &Found, hints: &Hints, last_segment: SegmentId) -> Meta {
    let mut meta = most(&hints.meta, &Meta { segment: last_segment, ..Meta::default() });
    for (id, row) in &hints.disks {
        meta = most(&meta, &Meta { disk: *id, branch: row.branch, epoch: row.epoch, ..Meta::default() });
    }
    for sealed in found.all() {
        let (seal, row) = (&sealed.seal, &sealed.seal.row);
        let floor = BlockAddress::from_raw(row.floor).map_or(SegmentId(0), BlockAddress::segment);
        meta = most(
            &meta,
            &Meta {
                disk: row.disk,
                branch: seal.branch,
                epoch: seal.epoch,
                snapshot: row.snapshot,
                segment: floor,
                ..Meta::default()
            },
        );
    }
    let room = SegmentId::MAX.0.saturating_sub(meta.segment.0) / 2;
    Meta {
        disk: DiskId(meta.disk.0 + JUMP),
        branch: BranchId(meta.branch.0 + JUMP),
        epoch: Epoch(meta.epoch.0 + JUMP),
        snapshot: SnapshotId(meta.snapshot.0 + JUMP),
        segment: SegmentId(meta.segment.0 + SEGMENT_JUMP.min(room)),
        openings: meta.openings + JUMP,
        clean: true,
    }
}

/// Enters the branch of a state and those it came from, the oldest first.
fn put_branches(edit: &mut Edit<'_>, sealed: &Sealed) {
    for (depth, (id, row)) in (1..).zip(sealed.seal.branches.iter().rev()) {
        let there = edit.tables.branch(*id).is_ok();
        if !there {
            let inherits = row.parent.is_some();
            edit.put_branch(*id, BranchRow { parent: row.parent, inherits, depth, lineage: sealed.lineage });
        }
    }
}

fn put_state(edit: &mut Edit<'_>, hints: &Hints, sealed: &Sealed) {
    let seal = &sealed.seal;
    let known = hints.states.get(&seal.epoch).filter(|row| row.uuid == seal.row.uuid);
    let named = known.map_or(&seal.row.name, |row| &row.name);
    let taken = named.is_empty() || edit.tables.snapshot(seal.row.disk, named).is_ok();
    let row = StateRow {
        // A snapshot the program took for itself is shown now: nobody else would ever delete it.
        status: Status::Live,
        name: if taken { recovered(seal.epoch.0) } else { named.clone() },
        // What is there of its seals is kept; what lacks is added.
        sealed: false,
        holds: known.map_or_else(Vec::new, |row| row.holds.clone()),
        ..seal.row.clone()
    };
    edit.put_state((seal.branch, seal.epoch), row);
}

/// Enters a ghost wherever a branch began at a state that is gone, and takes those out again that tie nothing.
fn put_ghosts(edit: &mut Edit<'_>) {
    let starts: BTreeSet<StateKey> = edit.tables.branches().filter_map(|(_, row)| row.parent).collect();
    let mut ghosts: Vec<StateKey> = starts.into_iter().filter(|at| edit.tables.state(*at).is_none()).collect();
    for key in &ghosts {
        let id = edit.meta(|meta| meta.snapshot = meta.snapshot.next()).snapshot;
        edit.put_state(*key, ghost(id));
    }
    // From the leaves up: one that goes leaves its child to the one above.
    loop {
        let before = ghosts.len();
        ghosts.retain(|key| {
            let ties = edit.tables.children(*key).len() >= 2;
            if !ties {
                edit.delete_state(*key);
            }
            ties
        });
        if ghosts.len() == before {
            return;
        }
    }
}

fn ghost(snapshot: SnapshotId) -> StateRow {
    StateRow {
        status: Status::Ghost,
        snapshot,
        disk: DiskId(0),
        name: String::new(),
        uuid: Uuid::nil(),
        size: 0,
        trim: false,
        created: 0,
        stamp: 0,
        referenced: 0,
        written: 0,
        floor: 0,
        sealed: true,
        holds: Vec::new(),
    }
}

/// The row of a disk of which only a state is known.
fn fresh_row(state: Option<&Sealed>) -> DiskRow {
    match state.map(|sealed| &sealed.seal) {
        Some(seal) => DiskRow::fresh(seal.disk_name.clone(), seal.disk_uuid, seal.row.size, seal.row.created),
        None => DiskRow::fresh(String::new(), Uuid::new_v4(), 0, 0),
    }
}

/// A disk that is known to have grown since its newest state stays that large, unless old blocks could show there.
fn size_of_disk(row: &DiskRow, state: Option<&StateRow>, current: bool) -> u64 {
    match state {
        Some(state) if current && !state.trim => state.size.max(row.size),
        Some(state) => state.size,
        None => row.size,
    }
}

/// Says what a disk lost.
fn lost_of(id: DiskId, hints: &Hints, found: &Found, state: Option<&StateRow>) -> Vec<String> {
    let mut lost = vec![match state {
        Some(state) => format!("what was written to it since snapshot '{}'", state.name),
        None => "all its data: no snapshot of it was sealed".to_owned(),
    }];
    for (epoch, row) in hints.states.iter().filter(|(_, row)| row.disk == id && row.status == Status::Live) {
        if !found.live().any(|sealed| sealed.seal.epoch == *epoch) {
            lost.push(format!("snapshot '{}'", row.name));
        }
    }
    for row in hints.states.values().filter(|row| row.disk == id && row.status == Status::Retired) {
        lost.push(format!("the retired snapshot '{}'", row.name));
    }
    lost
}
