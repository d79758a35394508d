//! Decides which addresses no state holds any more. `punch` gives them back to the host.
//!
//! Two events make addresses free: a state goes away, and a newer entry of a head becomes durable. Both ask the same
//! question - does a neighbour of the state that lost the address have it? - because the states that hold one address are
//! connected in the tree (rule 1 of `tree`). So the cost is that of the change, whatever the number of states.
//!
//! # Rules
//! 1. A decision and the submit of its rows happen under `Store::reclaim`, one after the other.
//! 2. A state that goes away does so chunk by chunk. For chunks below the cursor it counts as a ghost, for the others it
//!    still holds what it held; a head that overwrites meanwhile asks with the same cursor.
//! 3. Who is asked is asked one after the other, until somebody has what was lost: below a ghost there may be thousands, and
//!    the first is mostly answer enough. What was born in the epoch of a state is with those below it or with nobody.
//! 4. A row that no state resolves to is dropped in the frame that queues its last addresses.
//!
//! # After a crash
//! The row of the state still says `Dying`; the work starts over. Chunks that are done have no rows left to look at.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::Store;
use super::commit::{Capture, IndexChanges, free_rows};
use super::frozen::enter_chunks;
use super::head::Line;
use super::rows::{Key, KeyParts, Row, decode_entry};
use super::states::{DiskRow, Status};
use super::tables::{Edit, StateKey, Tables};
use super::tree::{Around, Stretch};
use super::view::Resolved;
use crate::error::Result;
use crate::map::{Entry, Piece};
use crate::units::{BranchId, ChunkIndex, Epoch};

/// The state that is going away, and how far that is.
#[derive(Debug, Default)]
pub(super) struct Progressing {
    node: Option<StateKey>,
    /// Chunks below are done.
    cursor: u32,
}

impl Progressing {
    fn passed(&self, node: StateKey, chunk: ChunkIndex) -> bool {
        self.node == Some(node) && chunk.0 < self.cursor
    }
}

/// What a head's change sets free.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Addresses that nobody holds.
    pub free: Vec<Piece>,
    /// A row that nobody resolves to.
    pub stale: Option<StateKey>,
}

/// Chunks per step, so that flushes never wait long for the lock.
const STEP: usize = 64;

/// Takes from `pieces` what `entry` has.
fn subtract(pieces: &mut Vec<Piece>, entry: &Entry) {
    for theirs in entry.pieces() {
        for piece in pieces.iter_mut().filter(|piece| piece.base == theirs.base) {
            piece.set = piece.set.minus(&theirs.set);
        }
    }
    pieces.retain(|piece| !piece.set.is_empty());
}

fn within(stretches: &[Stretch], row: StateKey) -> bool {
    stretches.iter().any(|s| s.branch == row.0 && row.1 > s.after && row.1 <= s.upto)
}

impl Store {
    /// Tells whether the state that a head's epoch began as still holds everything the head had then. If so, nothing a
    /// head loses from before its epoch can be free.
    pub(super) fn base_holds(&self, disk: &DiskRow, reclaim: &Progressing) -> bool {
        disk.base.is_some_and(|base| {
            reclaim.node != Some(base) && self.tables.read().state(base).is_some_and(|row| row.status != Status::Ghost)
        })
    }

    /// Finds what becomes free when a head's chunk changes from what is stored to what is captured.
    pub(super) fn lost_by_head(
        &self,
        disk: &DiskRow,
        capture: &Capture,
        mut old: Vec<Piece>,
        reclaim: &Progressing,
    ) -> Result<Lost> {
        let Some(row) = capture.row else { return Ok(Lost::default()) };
        let node = (disk.branch, disk.epoch.max(capture.epoch));
        let chunk = capture.chunk;
        let (mut around, mine) = {
            let tables = self.tables.read();
            let mine = self.stretches_of_holder(&tables, node, reclaim, chunk);
            (Around::below(node).and_beyond(&tables), mine)
        };
        // A row of its own, or of somebody above that has it still, is needed whoever else resolves to it.
        let needed = row == (disk.branch, capture.epoch) || !within(&mine, row);
        let mut shared = false;
        while !(old.is_empty() && (needed || shared)) {
            let Some(theirs) = self.look_around(&mut around, chunk, |n| reclaim.passed(n, chunk))? else { break };
            shared |= theirs.row == Some(row);
            subtract(&mut old, &theirs.entry);
        }
        Ok(Lost { free: old, stale: (!needed && !shared).then_some(row) })
    }

    /// Returns what the next node of a walk resolves to.
    fn look_around(
        &self,
        around: &mut Around,
        chunk: ChunkIndex,
        through: impl Fn(StateKey) -> bool,
    ) -> Result<Option<Resolved>> {
        let next = around.next(&self.tables.read(), through);
        let Some(other) = next else { return Ok(None) };
        self.counters.looks_around.fetch_add(1, Ordering::Relaxed);
        self.resolve(other, chunk).map(Some)
    }

    /// As [`Tables::stretches_to_holder`], with the state that is going away counted as a ghost where it is done.
    fn stretches_of_holder(
        &self,
        tables: &Tables,
        node: StateKey,
        reclaim: &Progressing,
        chunk: ChunkIndex,
    ) -> Vec<Stretch> {
        let mut out = tables.stretches_to_holder(node);
        let mut at = node;
        while let Some(parent) = tables.parent(at) {
            if reclaim.passed(parent, chunk) {
                out.extend(tables.stretches_to_holder(parent));
            }
            if !reclaim.passed(parent, chunk) && tables.state(parent).is_some_and(|row| row.status != Status::Ghost) {
                break;
            }
            at = parent;
        }
        out
    }

    /// Frees what one dying state holds alone, and takes it out of the tree. Returns false when there is none to do.
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes; `Corrupt` when rows are damaged.
    pub fn reclaim_one(&self) -> Result<bool> {
        let next = {
            let tables = self.tables.read();
            let mut dying = tables.states().filter(|(_, row)| row.status == Status::Dying);
            dying.find(|(_, row)| !self.is_held_open(row.snapshot)).map(|(key, _)| key)
        };
        let Some(node) = next else { return Ok(false) };
        self.bury(node)?;
        *self.reclaim.lock() = Progressing { node: Some(node), cursor: 0 };
        let result = self.reclaim_state(node);
        if result.is_err() {
            // What is done is done: rows of the passed chunks are gone. The state stays `Dying` and is taken up again.
            self.reclaim.lock().node = None;
        }
        result.map(|()| true)
    }

    fn reclaim_state(&self, node: StateKey) -> Result<()> {
        let stretches = self.tables.read().stretches_to_holder(node);
        let mut todo = self.indexed_chunks(&stretches)?.into_iter();
        loop {
            let batch: Vec<ChunkIndex> = todo.by_ref().take(STEP).collect();
            if batch.is_empty() {
                break;
            }
            self.ledger.writable()?;
            let mut reclaim = self.reclaim.lock();
            self.reclaim_chunks(node, &stretches, &batch)?;
            reclaim.cursor = batch.last().expect("not empty").0 + 1;
        }
        let mut reclaim = self.reclaim.lock();
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        leave_tree(&mut edit, node);
        let _ticket = self.ledger.submit(edit.finish())?;
        reclaim.node = None;
        Ok(())
    }

    /// Returns the chunks that have rows in the stretches, by the index.
    ///
    /// # Errors
    /// `Corrupt` when an index row is damaged.
    pub fn indexed_chunks(&self, stretches: &[Stretch]) -> Result<BTreeSet<ChunkIndex>> {
        let mut chunks = BTreeSet::new();
        for stretch in stretches {
            let low = Key::index(stretch.branch, stretch.after.next(), 0);
            let high = Key::index(stretch.branch, stretch.upto, u32::MAX);
            self.ledger.scan(&low, &high, &mut |key, value| {
                enter_chunks(&key, &value, &mut |chunk| {
                    chunks.insert(chunk);
                })
            })?;
        }
        Ok(chunks)
    }

    /// Frees what `node` holds alone in some chunks. The caller holds the reclaim lock.
    fn reclaim_chunks(&self, node: StateKey, stretches: &[Stretch], chunks: &[ChunkIndex]) -> Result<()> {
        let mut free = Vec::new();
        let mut index = IndexChanges::default();
        let mut rows = Vec::new();
        for chunk in chunks {
            let (pieces, stale) = self.held_alone(node, stretches, *chunk)?;
            free.extend(pieces);
            for (branch, epoch) in stale {
                rows.push(Row::delete(Key::map(branch, *chunk, epoch)));
                index.remove(branch, epoch, *chunk);
            }
        }
        index.rows(&self.ledger, &mut rows)?;
        self.submit_freed(&free, rows)
    }

    /// Submits rows together with freed addresses: queues them, and takes them off their segments' counts.
    ///
    /// # Errors
    /// As [`super::ledger::Ledger::submit`].
    pub fn submit_freed(&self, free: &[Piece], mut rows: Vec<Row>) -> Result<()> {
        free_rows(free, &mut rows);
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        for piece in free {
            edit.change_segment(piece.base.segment(), |row| {
                let count = u64::from(piece.set.count());
                row.mapped = row.mapped.checked_sub(count).expect("no more is freed than was mapped");
            })?;
        }
        rows.into_iter().for_each(|row| edit.row(row));
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(())
    }

    /// Returns the addresses of a chunk that only `node` holds, and the rows that only it resolves to.
    ///
    /// # Errors
    /// `Corrupt` when a row is damaged.
    fn held_alone(
        &self,
        node: StateKey,
        stretches: &[Stretch],
        chunk: ChunkIndex,
    ) -> Result<(Vec<Piece>, Vec<StateKey>)> {
        let mine = self.resolve(node, chunk)?;
        // Its own entry, and entries of its stretches that are hidden below it.
        let mut rows = Vec::new();
        let mut free: Vec<Piece> = mine.entry.pieces();
        for (row, entry) in self.rows_in(stretches, chunk)? {
            if mine.row == Some(row) {
                rows.push(row);
            } else if self.hidden_from_all(row, stretches, chunk)? {
                rows.push(row);
                free.extend(entry.pieces());
            }
        }
        let mut below = Around::below(node);
        while !(rows.is_empty() && free.is_empty()) {
            let Some(theirs) = self.look_around(&mut below, chunk, |_| false)? else { break };
            rows.retain(|row| theirs.row != Some(*row));
            subtract(&mut free, &theirs.entry);
        }
        // Beyond its parent nobody has what was born in its epoch, or resolves to a row between the parent and it.
        let (mut beyond, own, floor) = {
            let tables = self.tables.read();
            (Around::beyond(node, &tables), tables.stretches(node), tables.floor_of(node))
        };
        let (mut stale, mut rows): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| within(&own, *row));
        let (mut born, mut old): (Vec<_>, Vec<_>) = free.into_iter().partition(|piece| piece.base.raw() >= floor);
        while !(rows.is_empty() && old.is_empty()) {
            let Some(theirs) = self.look_around(&mut beyond, chunk, |_| false)? else { break };
            rows.retain(|row| theirs.row != Some(*row));
            subtract(&mut old, &theirs.entry);
        }
        stale.extend(rows);
        born.extend(old);
        let mut free = born;
        free.sort_by_key(|piece| piece.base);
        free.dedup_by(|b, a| {
            let same = a.base == b.base;
            if same {
                a.set = a.set.or(&b.set);
            }
            same
        });
        Ok((free, stale))
    }

    /// Returns the rows of a chunk in some stretches.
    fn rows_in(&self, stretches: &[Stretch], chunk: ChunkIndex) -> Result<Vec<(StateKey, Entry)>> {
        let mut out = Vec::new();
        for stretch in stretches {
            let low = Key::map(stretch.branch, chunk, stretch.after.next());
            let high = Key::map(stretch.branch, chunk, stretch.upto);
            self.ledger.scan(&low, &high, &mut |key, value| {
                if let KeyParts::Map(branch, _, epoch) = key.parts()? {
                    out.push(((branch, epoch), decode_entry(&value)?));
                }
                Ok(())
            })?;
        }
        Ok(out)
    }

    /// Tells whether a newer row of the same stretch hides a row from every state.
    fn hidden_from_all(&self, row: StateKey, stretches: &[Stretch], chunk: ChunkIndex) -> Result<bool> {
        let Some(stretch) = stretches.iter().find(|s| within(std::slice::from_ref(s), row)) else { return Ok(false) };
        let low = Key::map(row.0, chunk, row.1.next());
        Ok(self.ledger.last_in(&low, &Key::map(row.0, chunk, stretch.upto))?.is_some())
    }

    /// Returns the bytes that only this state holds: what deleting it alone would free.
    ///
    /// # Errors
    /// `Corrupt` when rows are damaged.
    pub fn unique_bytes(&self, node: StateKey) -> Result<u64> {
        let stretches = self.tables.read().stretches_to_holder(node);
        let mut blocks = 0;
        for chunk in self.indexed_chunks(&stretches)? {
            let (free, _) = self.held_alone(node, &stretches, chunk)?;
            blocks += free.iter().map(|piece| u64::from(piece.set.count())).sum::<u64>();
        }
        Ok(blocks * crate::units::BLOCK_SIZE)
    }

    /// Turns the epoch that a disk is writing into a dying state, as a revert or a removal of the disk does. Everything is
    /// flushed. Nothing to do when the epoch has changed nothing.
    pub fn abandon_head(edit: &mut Edit<'_>, line: &Line, disk: crate::units::DiskId, row: &DiskRow) {
        let id = edit.meta(|meta| meta.snapshot = meta.snapshot.next()).snapshot;
        let dying = super::StateRow {
            status: Status::Dying,
            snapshot: id,
            disk,
            name: String::new(),
            uuid: uuid::Uuid::nil(),
            size: row.size,
            trim: row.trim,
            created: row.modified,
            stamp: row.stamp,
            referenced: row.referenced,
            written: row.written,
            floor: row.floor,
            sealed: true,
            holds: Vec::new(),
        };
        edit.put_state((line.branch, line.epoch), dying);
    }
}

/// Takes a state that holds nothing any more out of the tree: it becomes a ghost while it has two children, and ghosts
/// above it that are left with one child go with it; so do branches that nothing needs.
fn leave_tree(edit: &mut Edit<'_>, node: StateKey) {
    if edit.tables.children(node).len() >= 2 {
        edit.change_state(node, |row| {
            row.status = Status::Ghost;
            row.name = String::new();
            row.holds.clear();
        });
        return;
    }
    let parent = edit.tables.parent(node);
    edit.delete_state(node);
    drop_empty_branches(edit, node.0);
    let ghost = parent.filter(|p| edit.tables.state(*p).is_some_and(|row| row.status == Status::Ghost));
    if let Some(ghost) = ghost
        && edit.tables.children(ghost).len() < 2
    {
        leave_tree(edit, ghost);
    }
}

/// Removes a branch without states, head and branches of its own, and then its parents likewise.
fn drop_empty_branches(edit: &mut Edit<'_>, branch: BranchId) {
    let mut at = Some(branch);
    while let Some(id) = at {
        let used = edit.tables.head_of(id).is_some()
            || edit.tables.last_state(id, Epoch(u64::MAX)).is_some()
            || edit.tables.offspring(id, Epoch(0)).next().is_some();
        let Some(row) = (!used).then(|| edit.tables.branch(id).ok().copied()).flatten() else { return };
        edit.delete_branch(id);
        at = row.parent.map(|parent| parent.0);
    }
}
