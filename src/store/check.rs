//! `check`: proves, from the rows and the files alone, that the invariants of the pool hold.
//!
//! It works on all rows as of one instant, so the pool may be in use meanwhile. Where the program keeps books (counts of
//! mapped blocks, an index, neighbours in the tree) the check counts again by the slow and obvious rule.
//!
//! # What it proves
//! 1. Every map entry decodes; its pieces are disjoint; every address lies in a listed segment, inside the file.
//! 2. No slab belongs to two chunks, and none to two disks.
//! 3. No mapped address is queued for punching.
//! 4. Every entry is what some state resolves to, and every mapped address is held by some state (no leak).
//! 5. The counts of segments and disks, and the index, say what the entries say.
//! 6. Data in segments that nothing names is queued, or is still to be swept, or is what a rebuild keeps.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};

use super::Store;
use super::frozen::Frozen;
use super::rows::{Key, KeyParts, REBUILT, Row, Table, checked_chunk, decode_count, decode_entry, decode_set};
use super::states::Status;
use super::tables::{Edit, StateKey, Tables};
use crate::error::Result;
use crate::map::Entry;
use crate::progress::Progress;
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, CHUNK_BLOCKS, ChunkIndex, DiskId, SegmentId, SnapshotId};

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
    /// What is wrong.
    pub problems: Vec<Problem>,
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
}

struct Checker<'a> {
    store: &'a Store,
    rows: Frozen,
    tables: Tables,
    mapped: RoaringTreemap,
    queued: RoaringTreemap,
    slabs: HashMap<BlockAddress, ChunkIndex>,
    index: BTreeSet<(StateKey, ChunkIndex)>,
    report: CheckReport,
    mend: Vec<Row>,
}

/// Checks the pool; with `repair` it also queues leaked blocks for punching.
///
/// # Errors
/// Any error of the host. What is merely wrong is in the report.
pub fn check(store: &Arc<Store>, repair: bool, progress: &dyn Progress) -> Result<CheckReport> {
    store.flush_all()?;
    let (rows, tables) = {
        // Nobody submits while the tables are locked, except steps of `flatten`, which change no answer.
        let _reclaim = store.reclaim.lock();
        let tables = store.tables.write();
        (store.ledger.frozen(), tables.clone())
    };
    let mut checker = Checker {
        store,
        rows,
        tables,
        mapped: RoaringTreemap::new(),
        queued: RoaringTreemap::new(),
        slabs: HashMap::new(),
        index: BTreeSet::new(),
        report: CheckReport::default(),
        mend: Vec::new(),
    };
    checker.run(progress)?;
    let Checker { mut report, mend, .. } = checker;
    if repair {
        for part in mend.chunks(4096) {
            store.ledger.commit(part.to_vec())?;
        }
        report.problems.iter_mut().for_each(|problem| problem.fixed |= problem.what.contains(LEAK));
        store.give_up_kept()?;
    }
    Ok(report)
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

const LEAK: &str = "named by nothing";

impl Checker<'_> {
    fn wrong(&mut self, what: String) {
        if self.report.problems.len() < 1000 {
            self.report.problems.push(Problem { what, fixed: false });
        }
    }

    fn run(&mut self, progress: &dyn Progress) -> Result<()> {
        self.report.disks = self.tables.disks().count() as u64;
        self.report.snapshots = self.tables.states().filter(|(_, row)| !row.name.is_empty()).count() as u64;
        self.report.segments = self.tables.segments().count() as u64;
        progress.total(4);
        progress.message("reading the queue and the index");
        self.read_queue()?;
        self.read_index()?;
        progress.advance(1);
        progress.message("reading the block map");
        let entries = self.read_map()?;
        progress.advance(1);
        progress.message("comparing with the states");
        self.compare_states(&entries);
        progress.advance(1);
        progress.message("comparing with the segments");
        self.compare_segments()?;
        progress.advance(1);
        self.report.blocks = self.mapped.len();
        Ok(())
    }

    fn read_queue(&mut self) -> Result<()> {
        let mut queued = RoaringTreemap::new();
        self.rows.scan(&Key::first_of(Table::Free), &Key::beyond(Table::Free), &mut |key, value| {
            if let KeyParts::Free(first) = key.parts()? {
                let count = decode_count(first, &value)?;
                queued.insert_range(first.raw()..first.raw() + count);
            }
            Ok(())
        })?;
        self.queued = queued;
        Ok(())
    }

    fn read_index(&mut self) -> Result<()> {
        let mut index = BTreeSet::new();
        self.rows.scan(&Key::first_of(Table::Index), &Key::beyond(Table::Index), &mut |key, value| {
            if let KeyParts::Index(branch, epoch, group) = key.parts()? {
                for i in decode_set(&value)?.iter() {
                    let chunk = group.saturating_mul(512).saturating_add(u32::try_from(i).expect("below 512"));
                    index.insert(((branch, epoch), checked_chunk(ChunkIndex(chunk))?));
                }
            }
            Ok(())
        })?;
        self.index = index;
        Ok(())
    }

    /// Reads every entry; returns them by lineage and chunk.
    fn read_map(&mut self) -> Result<Entries> {
        let mut entries: Entries = BTreeMap::new();
        let mut list = Vec::new();
        self.rows.scan(&Key::first_of(Table::Map), &Key::beyond(Table::Map), &mut |key, value| {
            if let KeyParts::Map(branch, chunk, epoch) = key.parts()? {
                list.push(((branch, epoch), checked_chunk(chunk)?, decode_entry(&value)?));
            }
            Ok(())
        })?;
        for (row, chunk, entry) in list {
            self.check_entry(row, chunk, &entry);
            if !self.index.remove(&(row, chunk)) {
                self.wrong(format!("the index lacks chunk {chunk} of branch {} epoch {}", row.0, row.1));
            }
            let Ok(branch) = self.tables.branch(row.0) else {
                self.wrong(format!("entries of branch {} are left, which does not exist", row.0));
                continue;
            };
            entries.entry((branch.lineage, chunk)).or_default().insert(row, entry);
        }
        for ((branch, epoch), chunk) in std::mem::take(&mut self.index) {
            let group = Key::index(branch, epoch, chunk.0 / 512);
            self.wrong(format!(
                "the index names chunk {chunk} of branch {branch} epoch {epoch}, which has no entry ({group:?})"
            ));
        }
        Ok(entries)
    }

    fn check_entry(&mut self, row: StateKey, chunk: ChunkIndex, entry: &Entry) {
        for piece in entry.pieces() {
            let base = piece.base;
            if self.tables.segment(base.segment()).is_err() || u64::from(base.slot()) < CHUNK_BLOCKS {
                self.wrong(format!("chunk {chunk} of branch {} names address {base}, which no segment has", row.0));
            }
            if *self.slabs.entry(base).or_insert(chunk) != chunk {
                self.wrong(format!("the slab at {base} is named by chunk {chunk} and by another one"));
            }
            for (start, end) in piece.set.runs() {
                let (first, last) = (base.raw() + start as u64, base.raw() + end as u64);
                self.mapped.insert_range(first..last);
                let hit = self.queued.range_cardinality(first..last);
                if hit > 0 {
                    self.wrong(format!(
                        "{hit} mapped blocks of chunk {chunk} (branch {}) are queued for punching",
                        row.0
                    ));
                }
            }
        }
    }

    /// The slow rule: who resolves to what, state by state and chunk by chunk.
    fn compare_states(&mut self, entries: &Entries) {
        let mut nodes: BTreeMap<BranchId, Vec<(StateKey, Option<DiskId>)>> = BTreeMap::new();
        let lineage = |branch| self.tables.branch(branch).map_or(BranchId(0), |row| row.lineage);
        for (key, _) in self.tables.states().filter(|(_, row)| row.status != Status::Ghost) {
            nodes.entry(lineage(key.0)).or_default().push((key, None));
        }
        for (id, disk) in self.tables.disks() {
            nodes.entry(lineage(disk.branch)).or_default().push(((disk.branch, disk.epoch), Some(id)));
        }
        let mut referenced: HashMap<DiskId, u64> = HashMap::new();
        let mut by_state: HashMap<SnapshotId, u64> = HashMap::new();
        let mut wrong = Vec::new();
        for ((line, chunk), rows) in entries {
            let mut needed = BTreeSet::new();
            let mut held: Vec<&Entry> = Vec::new();
            for (node, disk) in nodes.get(line).into_iter().flatten() {
                let Some((row, entry)) = resolve(&self.tables, rows, *node) else { continue };
                if needed.insert(row) {
                    held.push(entry);
                }
                let count = u64::from(entry.mapped().count());
                match (disk, self.tables.state(*node)) {
                    (Some(disk), _) => *referenced.entry(*disk).or_default() += count,
                    (None, Some(state)) => *by_state.entry(state.snapshot).or_default() += count,
                    _ => {}
                }
            }
            for row in rows.keys().filter(|row| !needed.contains(*row)) {
                wrong.push(format!("no state needs the entry of chunk {chunk} in branch {} epoch {}", row.0, row.1));
            }
        }
        for (id, disk) in self.tables.disks() {
            let count = referenced.get(&id).copied().unwrap_or(0);
            if count != disk.referenced {
                wrong.push(format!("disk '{}' maps {count} blocks, and its row says {}", disk.name, disk.referenced));
            }
        }
        for (_, row) in self.tables.states().filter(|(_, row)| row.status.readable()) {
            let count = by_state.get(&row.snapshot).copied().unwrap_or(0);
            if count != row.referenced {
                wrong.push(format!("snapshot '{}' maps {count} blocks, and its row says {}", row.name, row.referenced));
            }
        }
        wrong.into_iter().for_each(|what| self.wrong(what));
    }

    fn compare_segments(&mut self) -> Result<()> {
        let segments: Vec<_> = self.tables.segments().map(|(id, row)| (id, *row)).collect();
        for (id, row) in segments {
            let (first, last) = (BlockAddress::new(id, 0).raw(), BlockAddress::new(id, (1 << 28) - 1).raw());
            let mapped = self.mapped.range_cardinality(first..=last);
            if mapped != row.mapped {
                self.wrong(format!("{mapped} blocks of segment {id} are mapped, and its row says {}", row.mapped));
            }
            if !row.removed {
                self.compare_segment(id, row.swept || row.opening == self.store.opening, row.opening)?;
            }
        }
        Ok(())
    }

    /// Finds runs of data in a segment that nothing names, and notes how to free them.
    fn find_leaks(&mut self, id: SegmentId) -> Result<u64> {
        let segment = self.store.segment(id)?;
        let base = BlockAddress::new(id, 0).raw();
        let mut leaks: Vec<(u64, u64)> = Vec::new();
        let mut at = CHUNK_BLOCKS * BLOCK_SIZE;
        while let Some((start, stop)) = segment.next_data(at)? {
            for block in (start / BLOCK_SIZE).max(CHUNK_BLOCKS)..stop.div_ceil(BLOCK_SIZE) {
                let raw = base + block;
                if self.mapped.contains(raw) || self.queued.contains(raw) {
                    continue;
                }
                match leaks.last_mut() {
                    Some((first, count)) if *first + *count == raw => *count += 1,
                    _ => leaks.push((raw, 1)),
                }
            }
            at = stop;
        }
        for (first, count) in &leaks {
            let first = BlockAddress::from_raw(*first).expect("of a segment");
            self.mend.push(Row::put(Key::free(first), super::rows::encode_count(*count)));
        }
        Ok(leaks.iter().map(|(_, count)| count).sum())
    }

    fn compare_segment(&mut self, id: SegmentId, swept: bool, opening: u64) -> Result<()> {
        let segment = match self.store.segment(id) {
            Ok(segment) => segment,
            Err(error) => {
                let mapped = self.tables.segment(id).map_or(0, |row| row.mapped);
                self.wrong(format!("{error}; {mapped} blocks of disks or snapshots were in it"));
                return Ok(());
            }
        };
        let last = BlockAddress::new(id, (1 << 28) - 1).raw();
        let blocks = segment.len()? / BLOCK_SIZE;
        let end = BlockAddress::new(id, 0).raw() + blocks;
        if blocks <= last - BlockAddress::new(id, 0).raw() {
            let beyond = self.mapped.range_cardinality(end..=last);
            if beyond > 0 {
                self.wrong(format!("{beyond} mapped blocks lie beyond the end of segment {id}"));
            }
        }
        // A segment that takes new blocks may have some that came after the rows were read.
        if !swept || opening == self.store.opening {
            return Ok(());
        }
        let leaked = self.find_leaks(id)?;
        self.report.leaked += leaked * BLOCK_SIZE;
        if opening == REBUILT {
            self.report.kept += leaked * BLOCK_SIZE;
        } else if leaked > 0 {
            self.wrong(format!("{leaked} blocks of segment {id} are {LEAK}"));
        }
        Ok(())
    }
}

type Entries = BTreeMap<(BranchId, ChunkIndex), BTreeMap<StateKey, Entry>>;

/// Finds what a state resolves to among all rows of a chunk.
fn resolve<'a>(tables: &Tables, rows: &'a BTreeMap<StateKey, Entry>, node: StateKey) -> Option<(StateKey, &'a Entry)> {
    tables.lookup_path(node.0, node.1).into_iter().find_map(|(branch, upto)| {
        rows.range((branch, crate::units::Epoch(0))..=(branch, upto)).next_back().map(|(row, entry)| (*row, entry))
    })
}
