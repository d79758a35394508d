//! Gives freed addresses back to the host: holes in segments, and whole segments when nothing is left.
//!
//! # Rules
//! 1. A hole is punched only after the frame that queued its addresses is durable, and after every read that began
//!    before has ended.
//! 2. Rows leave the queue only after their punches are synced. Addresses are never handed out again, so punching twice, after a crash, is harmless.
//! 3. A segment is marked removed in a durable frame before its file is unlinked.
//! 4. In the background a punch is followed by a pause as long as the punches took, times [`PAUSE`]: punching keeps the
//!    writers of a file out, 0.2-0.3 ms a time on some hosts.
//!
//! # After a crash
//! The queue is a table; what was punched and not taken off it is punched again. Slots that were written but never mapped
//! are found by comparing the holes of a segment with the map ([`Store::sweep`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use roaring::RoaringBitmap;
use serde::Serialize;

use super::Store;
use super::rows::{Key, KeyParts, REBUILT, Row, SegmentRow, Table, decode_count, decode_entry};
use super::tables::Edit;
use crate::clock;
use crate::error::{Error, Result};
use crate::pool::Segment;
use crate::progress::Progress;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_BLOCKS, ChunkIndex, Epoch, SegmentId};

/// Rows per step.
const STEP: usize = 256;
/// Share of the time that punching in the background takes: one part in four.
const PAUSE: u32 = 3;

/// What `reclaim --wait` did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ReclaimReport {
    /// Bytes given back to the host.
    pub freed: u64,
}

impl Store {
    /// Punches a batch of the queue. Returns how many blocks; 0 when the queue is empty.
    ///
    /// # Errors
    /// Any error of the host; the rows stay queued.
    pub fn punch_step(&self, pause: bool) -> Result<u64> {
        let queued = self.next_queued()?;
        let Some((last, _)) = queued.last() else { return Ok(0) };
        let last = *last;
        self.ledger.wait(self.ledger.latest())?;
        self.fence.wait();
        let mut ranges: Vec<(BlockAddress, u64)> = Vec::new();
        let mut rows = Vec::with_capacity(queued.len());
        for (key, value) in &queued {
            let KeyParts::Free(first) = key.parts()? else { return Err(Error::corrupt("a free key is damaged")) };
            let count = decode_count(first, value)?;
            rows.push(Row::delete(*key));
            match ranges.last_mut() {
                Some((start, len)) if start.raw() + *len == first.raw() => *len += count,
                _ => ranges.push((first, count)),
            }
        }
        self.sweep_later(ranges.iter().map(|(first, _)| first.segment()))?;
        let mut blocks = 0;
        let mut punched = BTreeMap::new();
        for (first, count) in ranges {
            if let Some(segment) = self.punch_range(first, count, pause)? {
                punched.insert(segment.id(), segment);
            }
            blocks += count;
        }
        // A punch that a power cut undoes must still be in the queue after it.
        for segment in punched.values() {
            segment.sync_punches().inspect_err(|error| self.ledger.poison(error))?;
        }
        let _ticket = self.ledger.submit(rows)?;
        *self.punched.lock() = Some(last);
        Ok(blocks)
    }

    /// Notes that segments whose files are missing are to be swept when they are there again: their queued blocks are not
    /// waited for.
    fn sweep_later(&self, segments: impl Iterator<Item = SegmentId>) -> Result<()> {
        let lost: BTreeSet<_> = segments.filter(|id| self.segments.is_lost(*id)).collect();
        if lost.is_empty() {
            return Ok(());
        }
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        for id in lost {
            if edit.tables.segment(id).is_ok_and(|row| row.swept && !row.removed) {
                edit.change_segment(id, |row| row.swept = false)?;
            }
        }
        // While the tables are locked, as every row of theirs: in the order in which they changed.
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(())
    }

    /// Returns the next rows of the queue, behind those that were taken last, and from the front again after the end: what
    /// was taken stays in memory as deleted until the next fold, and is not to be gone over each time.
    fn next_queued(&self) -> Result<Vec<(Key, Vec<u8>)>> {
        let (low, high) = (Key::first_of(Table::Free), Key::beyond(Table::Free));
        let behind = self.punched.lock().take().map(|key| key.after());
        let rows = match behind {
            Some(behind) => self.ledger.first_rows(&behind, &high, STEP)?,
            None => Vec::new(),
        };
        if rows.is_empty() { self.ledger.first_rows(&low, &high, STEP) } else { Ok(rows) }
    }

    fn punch_range(&self, first: BlockAddress, count: u64, pause: bool) -> Result<Option<Arc<Segment>>> {
        let known = self.tables.read().segment(first.segment()).is_ok_and(|row| !row.removed);
        if !known || self.segments.is_lost(first.segment()) {
            return Ok(None);
        }
        let segment = self.segment(first.segment())?;
        let begun = clock::now();
        segment.punch(first, count)?;
        self.counters.punches.fetch_add(1, Ordering::Relaxed);
        self.counters.punched_blocks.fetch_add(count, Ordering::Relaxed);
        self.bad.write().remove_range(first.raw()..first.raw() + count);
        if pause {
            clock::sleep((begun.elapsed() * PAUSE).min(Duration::from_millis(100)));
        }
        Ok(Some(segment))
    }

    /// Removes the files of segments in which nothing is mapped and nothing will be. Returns how many.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn remove_empty_segments(&self) -> Result<usize> {
        let empty: Vec<_> = {
            let tables = self.tables.read();
            let empty = |row: &SegmentRow| row.removed || (row.mapped == 0 && row.opening != REBUILT);
            tables.segments().filter(|(_, row)| empty(row)).map(|(id, row)| (id, *row)).collect()
        };
        let mut removed = 0;
        for (id, row) in empty {
            if row.removed || (row.opening != self.opening || self.done_filling(id, row.disk)?) {
                self.remove_segment(id)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Makes sure that no unsaved or future block lies in a segment of this opening.
    fn done_filling(&self, id: SegmentId, disk: crate::units::DiskId) -> Result<bool> {
        let Some(head) = self.heads.lock().get(&disk).cloned() else { return Ok(true) };
        if head.fills(id) {
            return Ok(false);
        }
        self.flush(&head)?;
        Ok(!head.fills(id) && self.tables.read().segment(id).is_ok_and(|row| row.mapped == 0))
    }

    fn remove_segment(&self, id: SegmentId) -> Result<()> {
        let ticket = {
            let mut tables = self.tables.write();
            let mut edit = Edit::new(&mut tables);
            edit.change_segment(id, |row| row.removed = true)?;
            self.ledger.submit(edit.finish())?
        };
        self.ledger.wait(ticket)?;
        self.fence.wait();
        self.segments.remove(id)?;
        // Its queued rows go first: a row that names no segment would be punched in vain for ever.
        let (low, high) = (BlockAddress::new(id, 0), BlockAddress::new(id, (1 << 28) - 1));
        let mut rows = Vec::new();
        self.ledger.scan(&Key::free(low), &Key::free(high), &mut |key, _| {
            rows.push(Row::delete(key));
            Ok(())
        })?;
        for part in rows.chunks(4096) {
            let _ticket = self.ledger.submit(part.to_vec())?;
        }
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.delete_segment(id);
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(())
    }

    /// Looks for slots of one earlier segment that were written but are not mapped, and queues them. Returns false when
    /// there is no segment left to look at.
    ///
    /// # Errors
    /// Any error of the host or of the catalog.
    pub fn sweep(&self) -> Result<bool> {
        let next = {
            let tables = self.tables.read();
            tables
                .segments()
                .find(|(id, row)| {
                    let old = ![self.opening, REBUILT].contains(&row.opening);
                    old && !row.swept && !row.removed && !self.segments.is_lost(*id)
                })
                .map(|(id, _)| id)
        };
        let Some(id) = next else { return Ok(false) };
        let segment = self.segment(id)?;
        let mut written = RoaringBitmap::new();
        let header = CHUNK_BLOCKS * BLOCK_SIZE;
        let mut at = header;
        while let Some((start, end)) = segment.next_data(at)? {
            let (first, last) = (start.max(header) / BLOCK_SIZE, end.div_ceil(BLOCK_SIZE));
            let slot = |n: u64| u32::try_from(n).map_err(|_| Error::corrupt(format!("segment {id} is too long")));
            written.insert_range(slot(first)?..slot(last)?);
            at = end;
        }
        // Old segments get no new blocks, so what is mapped now is a superset of what will be.
        if !written.is_empty() {
            written -= self.mapped_slots(id)?;
        }
        let mut rows = Vec::new();
        for run in slot_runs(&written) {
            let key = Key::free(BlockAddress::new(id, run.0));
            rows.push(Row::put(key, super::rows::encode_count(u64::from(run.1))));
        }
        for part in rows.chunks(4096) {
            let _ticket = self.ledger.submit(part.to_vec())?;
        }
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.change_segment(id, |row| row.swept = true)?;
        let _ticket = self.ledger.submit(edit.finish())?;
        Ok(true)
    }

    /// Returns the slots of a segment that any stored entry names.
    fn mapped_slots(&self, id: SegmentId) -> Result<RoaringBitmap> {
        let lineage = {
            let tables = self.tables.read();
            let disk = tables.segment(id)?.disk;
            let branch = tables.disk(disk).ok().map(|row| row.branch);
            branch.and_then(|b| tables.branch(b).ok()).map(|row| row.lineage)
        };
        let branches: Vec<_> = {
            let tables = self.tables.read();
            // A removed disk has no branch to ask: look at all of them.
            tables.branches().filter(|(_, row)| lineage.is_none_or(|l| row.lineage == l)).map(|(b, _)| b).collect()
        };
        let mut slots = RoaringBitmap::new();
        for branch in branches {
            let low = Key::map(branch, ChunkIndex(0), Epoch(0));
            let high = Key::map(branch, ChunkIndex(u32::MAX), Epoch(u64::MAX));
            self.ledger.scan(&low, &high, &mut |_, value| {
                for piece in decode_entry(&value)?.pieces().iter().filter(|p| p.base.segment() == id) {
                    for (start, end) in piece.set.runs() {
                        let first = piece.base.at(start).slot();
                        slots.insert_range(first..first + u32::try_from(end - start).expect("at most 512"));
                    }
                }
                Ok(())
            })?;
        }
        Ok(slots)
    }

    /// Frees everything that can be freed now: dying states, swept segments, the whole queue, empty segments.
    ///
    /// # Errors
    /// Any error of the host; `Failed` when cancelled.
    pub fn reclaim_wait(&self, progress: &dyn Progress) -> Result<ReclaimReport> {
        progress.message("freeing what nothing holds");
        let mut freed = 0;
        self.flush_all()?;
        loop {
            if progress.cancelled() {
                return Err(Error::failed("reclaiming was cancelled; it goes on in the background"));
            }
            let turn = self.tidying.lock();
            let mut more = self.trim_one()? | self.reclaim_one()? | self.sweep()?;
            let blocks = self.punch_step(false)?;
            // After all that gives room: a record on a full host may need it.
            more |= (!more && blocks == 0) && self.record_one()?;
            drop(turn);
            freed += blocks * BLOCK_SIZE;
            progress.advance(blocks * BLOCK_SIZE);
            if !more && blocks == 0 {
                break;
            }
        }
        let turn = self.tidying.lock();
        self.remove_empty_segments()?;
        drop(turn);
        self.ledger.wait(self.ledger.latest())?;
        Ok(ReclaimReport { freed })
    }

    /// Returns the blocks that are queued for punching.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn queued_blocks(&self) -> Result<u64> {
        let mut blocks = 0;
        self.ledger.scan(&Key::first_of(Table::Free), &Key::beyond(Table::Free), &mut |key, value| {
            if let KeyParts::Free(first) = key.parts()? {
                blocks += decode_count(first, &value)?;
            }
            Ok(())
        })?;
        Ok(blocks)
    }
}

/// Splits a bitmap into runs of `(first, count)`.
fn slot_runs(slots: &RoaringBitmap) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for slot in slots {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == slot => *count += 1,
            _ => runs.push((slot, 1)),
        }
    }
    runs
}
