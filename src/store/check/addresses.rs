//! What is known of addresses: which are mapped, which are queued, and which chunk each slab belongs to.
//!
//! # Rules
//! 1. It is kept for a part of the segments at a time, as many as fit into the budget of the map cache; one at least. What
//!    a segment takes is reckoned from the length of its file, as if every other block of it were mapped.
//! 2. A segment that takes new blocks may have some that came after the rows were read: it is not searched for leaks.
//! 3. Leaks are queued where they are found, a batch at a time.

use std::collections::BTreeMap;

use roaring::RoaringBitmap;

use super::{CheckReport, Checker};
use crate::error::Result;
use crate::map::Entry;
use crate::store::Store;
use crate::store::rows::{Key, KeyParts, REBUILT, Row, SegmentRow, decode_count, encode_count};
use crate::store::tables::{StateKey, Tables};
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, CHUNK_BLOCKS, ChunkIndex, SLOT_BITS, SegmentId, to_usize};

const LEAK: &str = "named by nothing";
/// Rows of the queue in one frame.
const BATCH: usize = 4096;
const SLOT_LAST: u32 = (1 << SLOT_BITS) - 1;

/// An entry that comes by.
pub(super) struct Walked<'a> {
    pub(super) lineage: BranchId,
    pub(super) row: StateKey,
    pub(super) chunk: ChunkIndex,
    pub(super) entry: &'a Entry,
}

/// One segment.
#[derive(Debug, Default)]
struct Known {
    mapped: RoaringBitmap,
    queued: RoaringBitmap,
    /// For each slab the lineage and the chunk that named it; lineage 0 is none.
    slabs: Vec<(BranchId, ChunkIndex)>,
}

/// The segments of one part.
pub(super) struct Addresses<'a> {
    checker: &'a Checker<'a>,
    segments: BTreeMap<SegmentId, Known>,
}

impl<'a> Addresses<'a> {
    /// Cuts the segments of a pool into parts that fit into the budget.
    pub(super) fn parts(store: &Store, tables: &Tables) -> Vec<Vec<SegmentId>> {
        let budget = store.options.cache_bytes;
        let mut parts: Vec<Vec<SegmentId>> = Vec::new();
        let mut room = 0u64;
        for (id, row) in tables.segments() {
            let len = store.segment(id).and_then(|segment| segment.len());
            let blocks = len.map_or(row.mapped, |len| len / BLOCK_SIZE);
            // A bit for each of two sets, rounded up to containers, and 16 bytes for a slab of 512.
            let takes = blocks / 4 + blocks / 32 + (32 << 10);
            if parts.is_empty() || takes > room {
                parts.push(Vec::new());
                room = budget;
            }
            room = room.saturating_sub(takes);
            parts.last_mut().expect("pushed above").push(id);
        }
        parts
    }

    /// Begins with a part: reads what is queued of it.
    ///
    /// # Errors
    /// `Corrupt` when rows are damaged.
    pub(super) fn begin(checker: &'a Checker<'a>, part: Vec<SegmentId>) -> Result<Self> {
        let mut segments = BTreeMap::new();
        for id in part {
            let mut known = Known::default();
            let (low, high) = (Key::free(BlockAddress::new(id, 0)), Key::free(BlockAddress::new(id, SLOT_LAST)));
            let mut rows = checker.rows.rows(&low, &high)?;
            while let Some((key, value)) = rows.step()? {
                if let KeyParts::Free(first) = key.parts()? {
                    let count = u32::try_from(decode_count(first, value.bytes())?).expect("within a segment");
                    known.queued.insert_range(first.slot()..first.slot() + count);
                }
            }
            segments.insert(id, known);
        }
        Ok(Self { checker, segments })
    }

    /// Enters the addresses of an entry, as far as they are of this part. In the `first` of several walks it also says what
    /// lies in no segment.
    pub(super) fn enter(&mut self, walked: &Walked<'_>, first: bool, report: &mut CheckReport) {
        let Walked { lineage, row, chunk, entry } = walked;
        for piece in entry.pieces() {
            let base = piece.base;
            let out = u64::from(base.slot()) < CHUNK_BLOCKS || self.checker.tables.segment(base.segment()).is_err();
            if out && first {
                report.wrong(format!("chunk {chunk} of branch {} names address {base}, which no segment has", row.0));
            }
            let Some(known) = self.segments.get_mut(&base.segment()).filter(|_| !out) else { continue };
            let slab = to_usize(u64::from(base.slot()) / CHUNK_BLOCKS);
            if known.slabs.len() <= slab {
                known.slabs.resize(slab + 1, (BranchId(0), ChunkIndex(0)));
            }
            match known.slabs[slab] {
                (BranchId(0), _) => known.slabs[slab] = (*lineage, *chunk),
                (_, other) if other != *chunk => {
                    report.wrong(format!("the slab at {base} is named by chunk {chunk} and by another one"));
                }
                (other, _) if other != *lineage => report.wrong(format!(
                    "the slab at {base} is named by chunk {chunk} of two disks that have nothing in common"
                )),
                _ => {}
            }
            let mut hit = 0;
            for (start, end) in piece.set.runs() {
                let slots = piece.base.at(start).slot()..=piece.base.at(end - 1).slot();
                hit += known.queued.range_cardinality(slots.clone());
                known.mapped.insert_range(slots);
            }
            if hit > 0 {
                let branch = row.0;
                report.wrong(format!("{hit} mapped blocks of chunk {chunk} (branch {branch}) are queued for punching"));
            }
        }
    }

    /// Compares with the rows of the segments, and with their files.
    ///
    /// # Errors
    /// Any error of the host.
    pub(super) fn finish(self, report: &mut CheckReport) -> Result<()> {
        for (id, known) in &self.segments {
            let row = *self.checker.tables.segment(*id)?;
            let mapped = known.mapped.len();
            report.blocks += mapped;
            if mapped != row.mapped {
                report.wrong(format!("{mapped} blocks of segment {id} are mapped, and its row says {}", row.mapped));
            }
            if !row.removed {
                self.compare(*id, known, row, report)?;
            }
        }
        Ok(())
    }

    fn compare(&self, id: SegmentId, known: &Known, row: SegmentRow, report: &mut CheckReport) -> Result<()> {
        let store = self.checker.store;
        let segment = match store.segment(id) {
            Ok(segment) => segment,
            // That says nothing about the segment.
            Err(error) if error.lacks_descriptors() => return Err(error),
            Err(error) => {
                report.wrong(format!("{error}; {} blocks of disks or snapshots were in it", row.mapped));
                return Ok(());
            }
        };
        let blocks = segment.len()? / BLOCK_SIZE;
        if let Ok(end) = u32::try_from(blocks) {
            let beyond = known.mapped.range_cardinality(end..);
            if beyond > 0 {
                report.wrong(format!("{beyond} mapped blocks lie beyond the end of segment {id}"));
            }
        }
        if row.opening == store.opening || !row.swept {
            return Ok(());
        }
        let leaked = self.find_leaks(id, known)?;
        report.leaked += leaked * BLOCK_SIZE;
        if row.opening == REBUILT {
            report.kept += leaked * BLOCK_SIZE;
        } else if leaked > 0 {
            report.add(format!("{leaked} blocks of segment {id} are {LEAK}"), self.checker.repair);
        }
        Ok(())
    }

    /// Finds runs of data in a segment that nothing names, and queues them if it is to be mended.
    fn find_leaks(&self, id: SegmentId, known: &Known) -> Result<u64> {
        let segment = self.checker.store.segment(id)?;
        let mut run: Option<(u64, u64)> = None;
        let (mut leaked, mut mend) = (0, Vec::new());
        let mut at = CHUNK_BLOCKS * BLOCK_SIZE;
        while let Some((start, stop)) = segment.next_data(at)? {
            for block in (start / BLOCK_SIZE).max(CHUNK_BLOCKS)..stop.div_ceil(BLOCK_SIZE) {
                let slot = u32::try_from(block).unwrap_or(u32::MAX);
                if known.mapped.contains(slot) || known.queued.contains(slot) {
                    continue;
                }
                leaked += 1;
                match &mut run {
                    Some((first, count)) if *first + *count == block => *count += 1,
                    _ => self.queue(id, run.replace((block, 1)), &mut mend)?,
                }
            }
            at = stop;
        }
        self.queue(id, run, &mut mend)?;
        self.commit(&mut mend)?;
        Ok(leaked)
    }

    fn queue(&self, id: SegmentId, run: Option<(u64, u64)>, mend: &mut Vec<Row>) -> Result<()> {
        let Some((first, count)) = run.filter(|_| self.checker.repair) else { return Ok(()) };
        let Ok(slot) = u32::try_from(first) else { return Ok(()) };
        mend.push(Row::put(Key::free(BlockAddress::new(id, slot)), encode_count(count)));
        if mend.len() < BATCH { Ok(()) } else { self.commit(mend) }
    }

    fn commit(&self, mend: &mut Vec<Row>) -> Result<()> {
        if mend.is_empty() { Ok(()) } else { self.checker.store.ledger.commit(std::mem::take(mend)) }
    }
}
