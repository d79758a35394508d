//! The map, lineage by lineage and chunk by chunk: who resolves to what, and what the index says.
//!
//! # Rules
//! 1. The rows of all branches of a lineage are read at once, each in order; of each chunk all versions come together.
//! 2. For each chunk the slow rule is used: the newest entry of a branch that is not younger than a state holds for it,
//!    else one of the branches below. States between two entries of a branch have the same answer and are counted together.
//! 3. Index rows are looked up as their chunks come by, and kept for the 512 chunks that they are about.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use super::addresses::Walked;
use super::{CheckReport, Checker};
use crate::error::{Error, Result};
use crate::map::{BlockSet, Entry};
use crate::store::commit::CHUNKS_PER_GROUP;
use crate::store::frozen::{Rows, Value, enter_chunks};
use crate::store::rows::{Key, KeyParts, Table, checked_chunk, decode_entry, decode_set};
use crate::store::states::Status;
use crate::store::tables::{StateKey, Tables};
use crate::units::{BranchId, ChunkIndex, DiskId, Epoch, SnapshotId};

/// A state that resolves to entries.
#[derive(Debug, Clone, Copy)]
enum Who {
    Disk(DiskId),
    Snapshot(SnapshotId),
    /// Deleted, and not gone yet.
    Dying,
}

/// The states of one branch, the oldest first.
#[derive(Debug, Default)]
struct Nodes {
    epochs: Vec<Epoch>,
    who: Vec<Who>,
    /// Blocks mapped: of each state how many more than of the one before it.
    steps: Vec<i64>,
}

impl Nodes {
    fn add(&mut self, from: usize, upto: usize, blocks: i64) {
        self.steps[from] += blocks;
        self.steps[upto] -= blocks;
    }
}

/// The rows of a branch that come next.
struct Cursor<'a> {
    branch: BranchId,
    rows: Rows<'a>,
    next: Option<(ChunkIndex, Epoch, Value<'a>)>,
}

impl Cursor<'_> {
    fn advance(&mut self) -> Result<()> {
        self.next = match self.rows.step()? {
            None => None,
            Some((key, value)) => match key.parts()? {
                KeyParts::Map(_, chunk, epoch) => Some((checked_chunk(chunk)?, epoch, value)),
                _ => return Err(Error::corrupt("a map key of the catalog is damaged")),
            },
        };
        Ok(())
    }
}

/// A lineage: its branches, and the states in them that resolve to anything.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// The oldest first.
    branches: Vec<BranchId>,
    nodes: BTreeMap<BranchId, Nodes>,
}

/// Returns all lineages.
pub(super) fn lineages(tables: &Tables) -> BTreeMap<BranchId, Lineage> {
    let mut all: BTreeMap<BranchId, Lineage> = BTreeMap::new();
    for (id, row) in tables.branches() {
        all.entry(row.lineage).or_default().branches.push(id);
    }
    let mut nodes: Vec<(StateKey, Who)> = Vec::new();
    for (key, row) in tables.states().filter(|(_, row)| row.status != Status::Ghost) {
        nodes.push((key, if row.status.readable() { Who::Snapshot(row.snapshot) } else { Who::Dying }));
    }
    nodes.extend(tables.disks().map(|(id, disk)| ((disk.branch, disk.epoch), Who::Disk(id))));
    nodes.sort_unstable_by_key(|(key, _)| *key);
    for ((branch, epoch), who) in nodes {
        let Ok(row) = tables.branch(branch) else { continue };
        let of = all.entry(row.lineage).or_default().nodes.entry(branch).or_default();
        of.epochs.push(epoch);
        of.who.push(who);
        of.steps.resize(of.epochs.len() + 1, 0);
    }
    all
}

/// What is done with each entry.
type Each<'a> = dyn FnMut(&Walked<'_>, &mut CheckReport) -> Result<()> + 'a;

/// The walk over all of them.
pub(super) struct Lineages<'a> {
    checker: &'a Checker<'a>,
    /// Index rows of the chunks that come by, as far as they did not.
    index: HashMap<StateKey, BlockSet>,
    group: u32,
    index_rows: u64,
}

impl<'a> Lineages<'a> {
    pub(super) fn new(checker: &'a Checker<'a>) -> Self {
        Self { checker, index: HashMap::new(), group: 0, index_rows: 0 }
    }

    /// Walks over the entries of one lineage, calls `each` for every one, and compares with what its states say.
    ///
    /// # Errors
    /// `Corrupt` when rows are damaged; what `each` returns.
    pub(super) fn walk(
        &mut self,
        id: BranchId,
        lineage: Lineage,
        report: &mut CheckReport,
        each: &mut Each<'_>,
    ) -> Result<()> {
        let tables = self.checker.tables;
        let Lineage { branches, mut nodes } = lineage;
        let mut cursors = Vec::with_capacity(branches.len());
        let mut order = BinaryHeap::new();
        for branch in branches {
            let low = Key::map(branch, ChunkIndex(0), Epoch(0));
            let high = Key::map(branch, ChunkIndex(u32::MAX), Epoch(u64::MAX));
            let mut cursor = Cursor { branch, rows: self.checker.rows.rows(&low, &high)?, next: None };
            cursor.advance()?;
            if let Some((chunk, _, _)) = &cursor.next {
                order.push(Reverse((*chunk, cursors.len())));
                cursors.push(cursor);
            }
        }
        let mut rows: Vec<(StateKey, Entry)> = Vec::new();
        while let Some(Reverse((chunk, n))) = order.pop() {
            let cursor = &mut cursors[n];
            while let Some((_, epoch, value)) = cursor.next.take_if(|next| next.0 == chunk) {
                rows.push(((cursor.branch, epoch), decode_entry(value.bytes())?));
                cursor.advance()?;
            }
            order.extend(cursor.next.as_ref().map(|next| Reverse((next.0, n))));
            if order.peek().is_none_or(|next| next.0.0 != chunk) {
                // Cursors of one chunk come in order of their branches.
                for (row, entry) in &rows {
                    self.look_in_index(*row, chunk, report)?;
                    each(&Walked { lineage: id, row: *row, chunk, entry }, report)?;
                }
                compare(tables, &mut nodes, chunk, &rows, report);
                rows.clear();
            }
        }
        self.end_group(report);
        compare_counts(tables, &nodes, report);
        Ok(())
    }

    /// Takes a chunk with an entry out of the index.
    fn look_in_index(&mut self, row: StateKey, chunk: ChunkIndex, report: &mut CheckReport) -> Result<()> {
        let (group, at) = (chunk.0 / CHUNKS_PER_GROUP, (chunk.0 % CHUNKS_PER_GROUP) as usize);
        if group != self.group {
            self.end_group(report);
            self.group = group;
        }
        if !self.index.contains_key(&row) {
            let key = Key::index(row.0, row.1, group);
            let found = self.checker.rows.last_in(&key, &key)?;
            self.index_rows += u64::from(found.is_some());
            let set = found.map_or(Ok(BlockSet::EMPTY), |(_, value)| decode_set(value.bytes()))?;
            self.index.insert(row, set);
        }
        let set = self.index.get_mut(&row).expect("entered above");
        if !set.has(at) {
            report.wrong(format!("the index lacks chunk {chunk} of branch {} epoch {}", row.0, row.1));
        }
        *set = set.minus(&BlockSet::range(at, at + 1));
        Ok(())
    }

    /// What is left of the index rows of a group names chunks that have no entry.
    fn end_group(&mut self, report: &mut CheckReport) {
        let mut left: Vec<_> = self.index.drain().filter(|(_, set)| !set.is_empty()).collect();
        left.sort_unstable_by_key(|(row, _)| *row);
        for ((branch, epoch), set) in left {
            for at in set.iter() {
                let chunk = u64::from(self.group) * u64::from(CHUNKS_PER_GROUP) + at as u64;
                report.wrong(no_entry(branch, epoch, chunk));
            }
        }
    }

    /// Looks for rows that no lineage has: of branches that are gone, and of the index alone.
    ///
    /// # Errors
    /// `Corrupt` when rows are damaged.
    pub(super) fn finish(self, report: &mut CheckReport) -> Result<()> {
        let (rows, tables) = (self.checker.rows, self.checker.tables);
        let mut low = Key::first_of(Table::Map);
        while let Some((key, _)) = rows.rows(&low, &Key::beyond(Table::Map))?.step()? {
            let KeyParts::Map(branch, _, _) = key.parts()? else { break };
            if tables.branch(branch).is_err() {
                report.wrong(format!("entries of branch {branch} are left, which does not exist"));
            }
            low = Key::map(branch.next(), ChunkIndex(0), Epoch(0));
        }
        let mut there = 0;
        let (low, high) = (Key::first_of(Table::Index), Key::beyond(Table::Index));
        let mut index = rows.rows(&low, &high)?;
        while index.step()?.is_some() {
            there += 1;
        }
        if there == self.index_rows {
            return Ok(());
        }
        // Some came by with no entry at all.
        let mut index = rows.rows(&low, &high)?;
        while let Some((key, value)) = index.step()? {
            let KeyParts::Index(branch, epoch, _) = key.parts()? else { continue };
            let mut chunks = Vec::new();
            enter_chunks(&key, value.bytes(), &mut |chunk| chunks.push(chunk))?;
            let mut any = false;
            for chunk in &chunks {
                let entry = Key::map(branch, *chunk, epoch);
                any = any || rows.last_in(&entry, &entry)?.is_some();
            }
            if !any {
                chunks.into_iter().for_each(|chunk| report.wrong(no_entry(branch, epoch, u64::from(chunk.0))));
            }
        }
        Ok(())
    }
}

fn no_entry(branch: BranchId, epoch: Epoch, chunk: u64) -> String {
    format!("the index names chunk {chunk} of branch {branch} epoch {epoch}, which has no entry")
}

/// Finds what a look-up in a branch finds that has no entry of its own: which of `rows`.
fn inherited(tables: &Tables, rows: &[(StateKey, Entry)], branch: BranchId) -> Option<usize> {
    let mut at = branch;
    loop {
        let row = tables.branch(at).ok().filter(|row| row.inherits)?;
        let (parent, upto) = row.parent?;
        let end = rows.partition_point(|(key, _)| *key <= (parent, upto));
        if let Some(n) = end.checked_sub(1).filter(|n| rows[*n].0.0 == parent) {
            return Some(n);
        }
        at = parent;
    }
}

/// The slow rule, for one chunk.
fn compare(
    tables: &Tables,
    nodes: &mut BTreeMap<BranchId, Nodes>,
    chunk: ChunkIndex,
    rows: &[(StateKey, Entry)],
    report: &mut CheckReport,
) {
    let blocks = |n: usize| i64::from(rows[n].1.mapped().count());
    let mut needed = vec![false; rows.len()];
    for (branch, of) in nodes {
        let own = rows.partition_point(|(key, _)| key.0 < *branch)..rows.partition_point(|(key, _)| key.0 <= *branch);
        let from = |n: usize| of.epochs.partition_point(|epoch| *epoch < rows[n].0.1);
        let mut holds = Vec::with_capacity(own.len() + 1);
        let first = if own.is_empty() { of.epochs.len() } else { from(own.start) };
        if first > 0
            && let Some(n) = inherited(tables, rows, *branch)
        {
            holds.push((n, 0, first));
        }
        for n in own.clone() {
            let upto = if n + 1 < own.end { from(n + 1) } else { of.epochs.len() };
            holds.push((n, from(n), upto));
        }
        for (n, from, upto) in holds.into_iter().filter(|(_, from, upto)| from < upto) {
            needed[n] = true;
            of.add(from, upto, blocks(n));
        }
    }
    for ((row, _), _) in rows.iter().zip(needed).filter(|(_, needed)| !needed) {
        report.wrong(format!("no state needs the entry of chunk {chunk} in branch {} epoch {}", row.0, row.1));
    }
}

/// Compares what was counted with what the rows of disks and snapshots say.
fn compare_counts(tables: &Tables, nodes: &BTreeMap<BranchId, Nodes>, report: &mut CheckReport) {
    for of in nodes.values() {
        let mut blocks = 0;
        for (who, step) in of.who.iter().zip(&of.steps) {
            blocks += step;
            let (what, said) = match who {
                Who::Dying => continue,
                Who::Disk(id) => match tables.disk(*id) {
                    Ok(disk) => (format!("disk '{}'", disk.name), disk.referenced),
                    Err(_) => continue,
                },
                Who::Snapshot(id) => match tables.snapshot_by_id(*id) {
                    Ok((_, row)) => {
                        let disk = tables.disk(row.disk).map_or("?", |disk| &disk.name);
                        (format!("snapshot '{disk}@{}'", row.name), row.referenced)
                    }
                    Err(_) => continue,
                },
            };
            if i64::try_from(said) != Ok(blocks) {
                report.wrong(format!("{what} maps {blocks} blocks, and its row says {said}"));
            }
        }
    }
}
