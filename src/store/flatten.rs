//! Keeps look-ups short: a branch that began deep inside others gets copies of the entries it inherits, and is cut loose.
//!
//! Only metadata is copied. The branch keeps its place in the tree - its states still share addresses with their
//! ancestors - but its look-ups end in itself.
//!
//! # Rules
//! 1. A copied entry keeps its epoch: it is below every epoch of the branch, no state of the branch has it, and the time
//!    of extent files follows from it.
//! 2. An entry is not copied where every look-up finds a newer one first.
//! 3. Entries that only this branch could see in the branches above are removed before it is cut loose, after their
//!    copies were made; so at every moment a look-up finds the one or the other.
//!
//! # After a crash
//! Copies without the last step are harmless: they say what the look-up would have found anyway. The work starts over.

use super::commit::IndexChanges;
use super::rows::{Key, KeyParts, Row, encode_entry};
use super::tables::{Edit, StateKey};
use super::view::Source;
use super::{Status, Store};
use crate::error::Result;
use crate::units::{BranchId, ChunkIndex, Epoch};

const STEP: usize = 128;

impl Store {
    /// Cuts one branch loose that lies too deep. Returns false when there is none.
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes; any error of reading the catalog.
    pub fn flatten_one(&self) -> Result<bool> {
        let deep = {
            let tables = self.tables.read();
            let mut deep = tables.branches().filter(|(_, row)| row.inherits && row.depth > self.options.depth_max);
            deep.next().map(|(id, row)| (id, *row))
        };
        let Some((branch, row)) = deep else { return Ok(false) };
        let Some(parent) = row.parent else { return Ok(false) };
        let source = Source { owner: self.new_owner(), branch: parent.0, upto: parent.1, size: u64::MAX };
        let mut from = Some(ChunkIndex(0));
        while let Some(at) = from {
            from = self.copy_entries(branch, parent, &source, at)?;
        }
        self.drop_private_rows(branch)?;
        let _reclaim = self.reclaim.lock();
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.put_branch(branch, super::rows::BranchRow { inherits: false, depth: 1, ..row });
        // Branches above this one are as deep as they were; the ones below are measured anew.
        let mut todo: Vec<(BranchId, u32)> = vec![(branch, 1)];
        while let Some((at, depth)) = todo.pop() {
            let below: Vec<BranchId> = edit.tables.offspring(at, Epoch(0)).map(|(_, id)| id).collect();
            for id in below {
                let child = *edit.tables.branch(id)?;
                if child.inherits {
                    edit.put_branch(id, super::rows::BranchRow { depth: depth + 1, ..child });
                    todo.push((id, depth + 1));
                }
            }
        }
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(true)
    }

    /// Removes the rows above a branch that only it could see: those after the last state before it began that is no ghost,
    /// as far as nobody on another side of a ghost resolves to them.
    fn drop_private_rows(&self, branch: BranchId) -> Result<()> {
        let Some(node) = self.first_nodes(branch).first().copied() else { return Ok(()) };
        let (private, near) = {
            let tables = self.tables.read();
            let mut private = tables.stretches_to_holder(node);
            // Those of branches on the way down to the node keep what they have.
            let above = private.iter().position(|stretch| stretch.branch == branch).map_or(0, |at| at + 1);
            private.drain(..above);
            (private, tables.neighbours(node))
        };
        for stretch in private {
            let chunks: Vec<ChunkIndex> = self.indexed_chunks(&[stretch])?.into_iter().collect();
            for batch in chunks.chunks(STEP) {
                let _reclaim = self.reclaim.lock();
                let mut rows = Vec::new();
                let mut index = IndexChanges::default();
                for chunk in batch {
                    let needed: Vec<_> =
                        near.iter().map(|other| self.resolve(*other, *chunk)).collect::<Result<_>>()?;
                    let low = Key::map(stretch.branch, *chunk, stretch.after.next());
                    let high = Key::map(stretch.branch, *chunk, stretch.upto);
                    self.ledger.scan(&low, &high, &mut |key, _| {
                        if let KeyParts::Map(above, chunk, epoch) = key.parts()?
                            && needed.iter().all(|other| other.row != Some((above, epoch)))
                        {
                            rows.push(Row::delete(key));
                            index.remove(above, epoch, chunk);
                        }
                        Ok(())
                    })?;
                }
                index.rows(&self.ledger, &mut rows)?;
                let _ticket = self.ledger.submit(rows)?;
            }
        }
        Ok(())
    }

    /// Returns the first nodes whose look-ups come through a branch, its own or those of branches that began in it.
    fn first_nodes(&self, branch: BranchId) -> Vec<StateKey> {
        self.tables.read().children((branch, Epoch(0)))
    }

    /// Returns the same without ghosts, which read nothing: what comes below them instead.
    fn first_readers(&self, branch: BranchId) -> Vec<StateKey> {
        let tables = self.tables.read();
        let mut todo = tables.children((branch, Epoch(0)));
        let mut readers = Vec::new();
        while let Some(node) = todo.pop() {
            if tables.state(node).is_some_and(|row| row.status == Status::Ghost) {
                todo.extend(tables.children(node));
            } else {
                readers.push(node);
            }
        }
        readers
    }

    /// Copies the inherited entries of a batch of chunks; returns where to go on.
    fn copy_entries(
        &self,
        branch: BranchId,
        parent: (BranchId, Epoch),
        source: &Source,
        from: ChunkIndex,
    ) -> Result<Option<ChunkIndex>> {
        let _reclaim = self.reclaim.lock();
        let nodes = self.first_readers(branch);
        let mut rows = Vec::new();
        let mut index = IndexChanges::default();
        let mut next = Some(from);
        for _ in 0..STEP {
            let Some(chunk) = self.next_chunk(source, None, next.expect("set below"))? else {
                next = None;
                break;
            };
            next = Some(ChunkIndex(chunk.0 + 1));
            let low = Key::map(branch, chunk, Epoch(0));
            let there = self.ledger.first_rows(&low, &Key::map(branch, chunk, parent.1), 1)?;
            let copied = there.first().is_some_and(|(key, _)| matches!(key.parts(), Ok(KeyParts::Map(..))));
            let found = self.resolve(parent, chunk)?;
            let mut needed = false;
            for node in &nodes {
                needed = needed || self.resolve(*node, chunk)?.row == found.row;
            }
            if let (false, true, Some((_, epoch))) = (copied, needed, found.row) {
                rows.push(Row::put(Key::map(branch, chunk, epoch), encode_entry(&found.entry)));
                index.add(branch, epoch, chunk);
            }
        }
        index.rows(&self.ledger, &mut rows)?;
        let _ticket = self.ledger.submit(rows)?;
        Ok(next)
    }
}
