//! Flush: from changed chunks to rows in a durable frame.
//!
//! # Order of a flush
//! 1. The first flush of a disk after a kill: sync the segments that the killed process may have written to.
//! 2. Copy the changed entries. Every block in the copies has had its pwrite return.
//! 3. Sync the segments that were written (this covers at least those blocks).
//! 4. Submit map, index, disk, segment and free rows; wait for their frame. No changed entries: no frame.
//!
//! # Rules
//! 1. Requests that come while a flush runs share the next one.
//! 2. An address that an entry lost is queued for punching in the same frame, if no other state holds it.
//! 3. What was written down of the changes (`unflushed`) goes to a new generation before step 2 and is dropped after step 4.
//! 4. A flush that finds no room on a full host fails before anything is taken, or is waited for by the next one: none says
//!    that it is done before its frame is durable.
//! 5. A failed sync poisons the pool: which writes it lost is unknown. Want of a descriptor does not: files are opened in
//!    step 1 only, when nothing has been taken yet that the next flush would miss.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::head::{Head, Line, Order};
use super::ledger::{Ledger, Ticket, row_size};
use super::logged::Plan;
use super::rows::{Key, Row, decode_set, encode_count, encode_entry, encode_set};
use super::tables::Edit;
use super::{DiskRow, Store};
use crate::clock;
use crate::error::{Kind, Result};
use crate::map::{BlockSet, ChunkGuard, Entry, Piece};
use crate::sync::RwLockWriteGuard;
use crate::units::{BLOCK_SIZE, BlockAddress, BranchId, ChunkIndex, DiskId, Epoch, SegmentId};

/// A changed chunk, copied for a frame.
#[derive(Debug, Clone)]
pub struct Capture {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// The epoch in which it changed.
    pub epoch: Epoch,
    /// Its entry as it is to be stored.
    pub entry: Entry,
    /// Its entry as it is stored.
    pub saved: Entry,
    /// Where that is stored.
    pub row: Option<(BranchId, Epoch)>,
    /// Addresses handed out and dropped in between.
    pub dropped: Vec<Piece>,
    /// As [`crate::map::ChunkState::fresh`].
    pub fresh: u64,
    /// As [`crate::map::ChunkState::marked`].
    pub marked: bool,
}

impl Capture {
    /// Copies a changed chunk, which counts as saved from then on.
    pub fn take(branch: BranchId, chunk: ChunkIndex, state: &mut ChunkGuard<'_>) -> Self {
        let saved = state.saved.take().expect("only changed chunks are captured");
        let epoch = state.epoch;
        let row = state.row.replace((branch, epoch));
        let dropped = std::mem::take(&mut state.dropped);
        let (fresh, marked) = (std::mem::take(&mut state.fresh), std::mem::take(&mut state.marked));
        Self { chunk, epoch, entry: state.entry.clone(), saved, row, dropped, fresh, marked }
    }
}

/// Chunks of which a flush logs the data at most: each brings a row of up to 4 KiB.
const LOG_CHUNKS_MAX: usize = 16;
/// Flushes before a disk counts as one that is being written to.
const STOPS_MAX: usize = 8;
/// Bytes of the rows that a changed chunk brings at most, about: its entry, and its part of those of index, disk and segments.
const CHUNK_ROWS_MAX: usize = 4096 + 512;

/// Blocks per segment, for its row.
type Tally = BTreeMap<SegmentId, i64>;

/// What one batch of captures adds up to.
#[derive(Debug, Default)]
struct Sums {
    mapped: Tally,
    referenced: i64,
    written: i64,
    free: Vec<Piece>,
    index: IndexChanges,
    fresh: u64,
}

/// Chunks to enter into the index and to take out of it.
#[derive(Debug, Default)]
pub(super) struct IndexChanges(BTreeMap<(BranchId, Epoch, u32), [BlockSet; 2]>);

impl IndexChanges {
    fn slot(&mut self, branch: BranchId, epoch: Epoch, chunk: ChunkIndex, which: usize) {
        let group = chunk.0 / CHUNKS_PER_GROUP;
        self.0.entry((branch, epoch, group)).or_default()[which].add((chunk.0 % CHUNKS_PER_GROUP) as usize);
    }

    /// Enters a chunk for which the epoch has an entry now.
    pub(super) fn add(&mut self, branch: BranchId, epoch: Epoch, chunk: ChunkIndex) {
        self.slot(branch, epoch, chunk, 0);
    }

    /// Takes out a chunk for which it has none any more.
    pub(super) fn remove(&mut self, branch: BranchId, epoch: Epoch, chunk: ChunkIndex) {
        self.slot(branch, epoch, chunk, 1);
    }

    /// Appends the rows; the caller keeps others from changing them until they are submitted.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub(super) fn rows(&self, ledger: &Ledger, rows: &mut Vec<Row>) -> Result<()> {
        for ((branch, epoch, group), [added, removed]) in &self.0 {
            let key = Key::index(*branch, *epoch, *group);
            let known = ledger.get(&key)?.map_or(Ok(BlockSet::EMPTY), |value| decode_set(&value))?;
            let now = known.or(added).minus(removed);
            if now == known {
                continue;
            }
            rows.push(if now.is_empty() { Row::delete(key) } else { Row::put(key, encode_set(&now)) });
        }
        Ok(())
    }
}

/// Chunks of one index row.
pub(super) const CHUNKS_PER_GROUP: u32 = 512;

impl Store {
    /// Makes every write of the disk that was acknowledged before durable.
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes, now or since a failure in this very flush.
    pub fn flush(&self, head: &Head) -> Result<()> {
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        let mine = head.requested.fetch_add(1, Ordering::AcqRel) + 1;
        let mut order = head.order();
        if order.completed >= mine {
            return Ok(());
        }
        self.flush_ordered(head, &mut order)
    }

    /// As [`Store::flush`], for a caller that holds the order.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush_ordered(&self, head: &Head, order: &mut Order) -> Result<()> {
        self.ledger.writable()?;
        head.refuse_gone()?;
        self.sync_earlier(head)?;
        self.ledger.make_room(head.dirty_chunks().saturating_mul(CHUNK_ROWS_MAX).saturating_add(self.copies_max()))?;
        let closed = self.switch_log(head);
        let covered = head.requested.load(Ordering::Acquire);
        let row = *head.owed_row.lock();
        let line = head.line();
        let mut captures = Vec::new();
        for chunk in head.take_dirty() {
            let cached = self.cache.peek(line.owner, chunk).expect("changed chunks stay cached");
            captures.push(Capture::take(line.branch, chunk, &mut cached.lock()));
        }
        // All copies are one submit, and leave room for the rows that name them.
        let may_log = captures.len() <= LOG_CHUNKS_MAX && self.copies_max() > 0;
        let copies = match head.small.take(!captures.is_empty(), may_log) {
            Plan::Log(copies) => copies,
            Plan::Sync(stale) => {
                self.sync_owed(head)?;
                stale
            }
        };
        let ticket = self.submit_changes(head, &line, captures, copies)?.max(row);
        // Should there be no room for their frame, the changes count as taken all the same, and the next flush finds none: it
        // has to wait for this ticket.
        {
            let mut owed = head.owed_row.lock();
            *owed = ticket.max(*owed);
        }
        self.ledger.wait(ticket)?;
        self.drop_log(head, closed)?;
        self.tidy_logged(head);
        order.completed = covered;
        Ok(())
    }

    /// Flushes a disk and stops its writers; the caller holds the order. What comes between is flushed as well, such as what the
    /// background unmaps; only where it does not end there are changes when this returns.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush_and_stop<'a>(&self, head: &'a Head, order: &mut Order) -> Result<RwLockWriteGuard<'a, ()>> {
        let gates = self.flush_and_stop_all([(head, order)])?;
        let [gate] = gates;
        Ok(gate)
    }

    /// As [`Store::flush_and_stop`], of disks in the order of their ids: none is stopped while another one is flushed.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush_and_stop_all<'a, const N: usize>(
        &self,
        mut disks: [(&'a Head, &mut Order); N],
    ) -> Result<[RwLockWriteGuard<'a, ()>; N]> {
        let mut tries = 0;
        loop {
            for (head, order) in &mut disks {
                self.flush_ordered(head, order)?;
            }
            let gates = disks.each_ref().map(|(head, _)| head.gate.write());
            tries += 1;
            if tries == STOPS_MAX || disks.iter().all(|(head, _)| head.dirty_chunks() == 0) {
                return Ok(gates);
            }
        }
    }

    /// Returns how many bytes of copies a flush submits at most; 0 where the journal is too small for that.
    fn copies_max(&self) -> usize {
        let most = super::logged::COPIES_MAX;
        if most <= self.ledger.submit_max() / 2 { most } else { 0 }
    }

    /// Submits captures, with copies of blocks in the same frame or before.
    fn submit_changes(&self, head: &Head, line: &Line, captures: Vec<Capture>, copies: Vec<Row>) -> Result<Ticket> {
        let mut ticket = Ticket::default();
        // First, or in one frame with the last of them: a map entry is never durable without its data. What the ledger
        // has dropped by a fold needs no deletion.
        let copies: Vec<Row> =
            copies.into_iter().filter(|row| row.value.is_some() || self.ledger.copy_counts(&row.key)).collect();
        if !copies.is_empty() {
            // What was captured counts as saved: it must not be forgotten silently.
            ticket = self.ledger.submit(copies).inspect_err(|error| self.ledger.poison(error))?;
        }
        if !captures.is_empty() {
            ticket = self.submit_captures(head.id, line, captures)?;
        }
        Ok(ticket)
    }

    /// Syncs what a disk wrote since a flush of it, and submits that copies in the journal are out of date.
    ///
    /// # Errors
    /// Any error of the host; the pool refuses writes then. As [`Ledger::submit`].
    ///
    /// # Panics
    /// When the disk was not flushed before.
    pub fn sync_and_settle(&self, head: &Head) -> Result<()> {
        assert!(head.earlier.lock().is_empty(), "the first flush synced what an earlier process left");
        let (Plan::Sync(stale) | Plan::Log(stale)) = head.small.take(false, false);
        self.sync_owed(head)?;
        self.submit_changes(head, &head.line(), Vec::new(), stale).map(drop)
    }

    /// Syncs the segments that a process before this one, that was killed, may have written to and not synced. It opens
    /// them, one after the other, so it comes before anything is taken: what finds no descriptor is to be tried again.
    ///
    /// # Errors
    /// Any error of the host; the pool refuses writes then, except after want of a descriptor.
    pub fn sync_earlier(&self, head: &Head) -> Result<()> {
        let mut earlier = head.earlier.lock();
        while let Some(id) = earlier.last() {
            // One that was removed since had nothing mapped; it may go at this very moment.
            let is_there = || self.tables.read().segment(*id).is_ok_and(|row| !row.removed);
            let synced = match is_there().then(|| self.segment(*id)) {
                None => Ok(()),
                Some(Err(error)) if error.lacks_descriptors() => return Err(error),
                Some(opened) => opened.and_then(|segment| segment.sync_punches()),
            };
            if let Err(error) = synced
                && is_there()
            {
                self.ledger.poison(&error);
                return Err(error);
            }
            earlier.pop();
        }
        Ok(())
    }

    /// Syncs the segments a disk wrote to in this process; they are open.
    ///
    /// # Errors
    /// Any error of the host; the pool refuses writes then.
    fn sync_owed(&self, head: &Head) -> Result<()> {
        for segment in head.take_owed() {
            if let Err(error) = segment.sync() {
                self.ledger.poison(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Flushes every disk that is in use.
    ///
    /// # Errors
    /// The first one; the others are flushed all the same.
    pub fn flush_all(&self) -> Result<()> {
        let heads = self.open_heads();
        let results: Vec<_> = heads.iter().filter(|h| h.refuse_gone().is_ok()).map(|head| self.flush(head)).collect();
        results.into_iter().collect()
    }

    /// Submits captures of one epoch of a disk, in as many frames as they need; the data they name is synced. Returns the
    /// ticket of the last.
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes; any error of reading the catalog, which poisons the pool.
    pub fn submit_captures(&self, id: DiskId, line: &Line, mut captures: Vec<Capture>) -> Result<Ticket> {
        captures.sort_by_key(|capture| capture.chunk);
        let mut ticket = self.ledger.latest();
        let mut rest = captures.into_iter().peekable();
        while rest.peek().is_some() {
            let result = self.submit_batch(id, line, &mut rest);
            // What was captured counts as saved: it must not be forgotten silently.
            ticket = result.inspect_err(|error| self.ledger.poison(error))?;
        }
        Ok(ticket)
    }

    fn submit_batch(
        &self,
        id: DiskId,
        line: &Line,
        captures: &mut std::iter::Peekable<std::vec::IntoIter<Capture>>,
    ) -> Result<Ticket> {
        let most = self.ledger.submit_max() / 4;
        let head = self.head(id)?;
        let reclaim = self.reclaim.lock();
        let mut sums = Sums::default();
        let mut rows = Vec::new();
        let mut size = 0;
        let Some(epoch) = captures.peek().map(|first| first.epoch) else { return Ok(self.ledger.latest()) };
        let disk = self.tables.read().disk(id)?.clone();
        while size < most
            && let Some(mut capture) = captures.next()
        {
            assert_eq!(capture.epoch, epoch, "captures of one epoch go together");
            let before = rows.len();
            sums.fresh += capture.fresh;
            // What was inherited may have been copied into the branch since the chunk was loaded, see `flatten`.
            let inherited = capture.row.is_some_and(|row| row.0 != line.branch);
            if inherited {
                capture.row = self.resolve((line.branch, capture.epoch), capture.chunk)?.row;
            }
            self.capture_rows(&disk, line.branch, &capture, &reclaim, &mut sums, &mut rows)?;
            size += rows[before..].iter().map(row_size).sum::<usize>() + 64;
        }
        sums.index.rows(&self.ledger, &mut rows)?;
        free_rows(&sums.free, &mut rows);
        let mut tables = self.tables.write();
        let mut edit = Edit::new(&mut tables);
        for (segment, change) in &sums.mapped {
            edit.change_segment(*segment, |row| {
                row.mapped = row.mapped.checked_add_signed(*change).expect("no more is unmapped than was mapped");
            })?;
        }
        edit.change_disk(id, |row| {
            row.referenced = row.referenced.checked_add_signed(sums.referenced).expect("counted block by block");
            row.written = row.written.checked_add_signed(sums.written).expect("counted block by block");
            row.modified = clock::wall_seconds();
            row.touched = true;
        })?;
        // Under the lock of the tables: nobody sees it counted twice, or not at all.
        head.settle(sums.fresh * BLOCK_SIZE, 0);
        rows.into_iter().for_each(|row| edit.row(row));
        self.ledger.submit(edit.finish())
    }

    /// Rows and sums of one chunk.
    fn capture_rows(
        &self,
        disk: &DiskRow,
        branch: BranchId,
        capture: &Capture,
        reclaim: &super::reclaim::Progressing,
        sums: &mut Sums,
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        let key = Key::map(branch, capture.chunk, capture.epoch);
        let own_row = capture.row == Some((branch, capture.epoch));
        for piece in capture.entry.minus(&capture.saved) {
            let count = i64::from(piece.set.count());
            *sums.mapped.entry(piece.base.segment()).or_default() += count;
            sums.referenced += count;
            sums.written += count;
        }
        let mut old = Vec::new();
        for piece in capture.saved.minus(&capture.entry) {
            let count = i64::from(piece.set.count());
            sums.referenced -= count;
            if disk.owns(piece.base) {
                *sums.mapped.entry(piece.base.segment()).or_default() -= count;
                sums.written -= count;
                sums.free.push(piece);
            } else {
                old.push(piece);
            }
        }
        sums.free.extend(capture.dropped.iter().copied());
        let mut stale = None;
        // The base has the addresses; but a copy of its entry that `flatten` made below it is none of its own.
        let above = disk.base.map(|base| self.tables.read().lookup_path(base.0, base.1)).unwrap_or_default();
        let copy = !own_row && capture.row.is_some_and(|row| above.iter().all(|(at, _)| *at != row.0));
        if (!old.is_empty() || !own_row) && (copy || !self.base_holds(disk, reclaim)) {
            let answer = self.lost_by_head(disk, capture, old, reclaim)?;
            for piece in &answer.free {
                *sums.mapped.entry(piece.base.segment()).or_default() -= i64::from(piece.set.count());
            }
            sums.free.extend(answer.free);
            stale = answer.stale;
        }
        if let Some((stale_branch, stale_epoch)) = stale {
            rows.push(Row::delete(Key::map(stale_branch, capture.chunk, stale_epoch)));
            sums.index.remove(stale_branch, stale_epoch, capture.chunk);
        }
        // A tombstone is stored where something was mapped before, also when nobody needs that any more: the time of an
        // extent file follows from its newest entry, and it did change. Where nothing was, nothing is stored, unless the
        // extent file got another length (`touch`).
        let shown = own_row || capture.marked || !capture.entry.is_empty();
        if !shown && !self.older_shows(branch, capture.chunk, capture.epoch)? {
            return Ok(());
        }
        rows.push(Row::put(key, encode_entry(&capture.entry)));
        // Also for an own row: the index is compared before it is written.
        sums.index.add(branch, capture.epoch, capture.chunk);
        Ok(())
    }

    /// Tells whether a look-up would find an older entry if the branch had none of this epoch.
    fn older_shows(&self, branch: BranchId, chunk: ChunkIndex, epoch: Epoch) -> Result<bool> {
        let path = self.tables.read().lookup_path(branch, Epoch(epoch.0.saturating_sub(1)));
        Ok(self.resolve_on(&path, chunk)?.row.is_some())
    }

    /// Refuses further writes after an error that leaves it unknown what is on the disk. Want of room does not, nor want of
    /// a descriptor: nothing was written then.
    pub fn poison_unless_full(&self, error: &crate::error::Error) {
        if error.kind() != Kind::NoSpace && !error.lacks_descriptors() {
            self.ledger.poison(error);
        }
    }
}

/// Queues addresses for punching: neighbouring ones as one row.
pub(super) fn free_rows(pieces: &[Piece], rows: &mut Vec<Row>) {
    let mut runs: Vec<(u64, u64)> = pieces
        .iter()
        .flat_map(|piece| piece.set.runs().map(|(start, end)| (piece.base.at(start).raw(), (end - start) as u64)))
        .collect();
    runs.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, count) in runs {
        match merged.last_mut() {
            // A run never crosses into another segment: slot 0 of a segment is never data.
            Some(last) if last.0 + last.1 == first => last.1 += count,
            _ => merged.push((first, count)),
        }
    }
    for (first, count) in merged {
        let first = BlockAddress::from_raw(first).expect("taken from an address");
        rows.push(Row::put(Key::free(first), encode_count(count)));
    }
}
