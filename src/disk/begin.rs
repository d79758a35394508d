//! Writes in two halves, for callers with many under way at once: [`BlockDevice::begin_write`] chooses where the data goes, the
//! caller brings it there, [`BlockDevice::end_write`] maps it. In between the write is under way as in [`Disk::write_upto`].
//!
//! # Rules
//! 1. Beginning never waits: not for the gate, a claim, the lock of a chunk, a new segment or room. What would have to
//!    wait, is not whole blocks or is best left to the page cache is written by [`BlockDevice::write`] instead.
//! 2. So a thread may have many writes begun: none of them can wait for another.
//! 3. What was begun must be ended, whatever became of it: claims and the gate are held until then.
//!
//! [`BlockDevice::begin_write`]: super::BlockDevice::begin_write
//! [`BlockDevice::end_write`]: super::BlockDevice::end_write
//! [`BlockDevice::write`]: super::BlockDevice::write

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Disk;
use super::write::{FLUSH_AT, Part, Plan, Stretch, checksums};
use crate::error::{Error, Result};
use crate::map::BlockSet;
use crate::store::{Extent, Line};
use crate::sync::{InsideOwned, OwnedReadGuard};
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, to_usize};

/// A write that has begun.
#[derive(Debug)]
pub struct Writing {
    line: Line,
    plan: Plan,
    crcs: Vec<Vec<u32>>,
    /// Let go in this order: first what the write protects, then who may end its epoch.
    _inside: InsideOwned,
    _gate: OwnedReadGuard<()>,
}

impl Disk {
    /// Chooses where whole blocks go; `None` when that needs waiting.
    pub(super) fn plan_write(&self, len: usize, offset: u64) -> Option<Writing> {
        let whole = offset.is_multiple_of(BLOCK_SIZE) && (len as u64).is_multiple_of(BLOCK_SIZE) && len > 0;
        // What the mount has cached has to be forgotten after the write, and that takes a while.
        // So has what has to be flushed before it is answered.
        let waits = self.head.tenancy.is_watched() || self.head.unflushed.is_strict();
        if !whole || self.store.ledger.writable().is_err() || waits {
            return None;
        }
        let gate = self.head.gate.try_read_arc()?;
        let line = self.head.line();
        if self.head.refuse_ended().is_err() || offset.checked_add(len as u64).is_none_or(|end| end > line.size) {
            return None;
        }
        let mut plan = Plan::default();
        let mut at = offset;
        let end = offset + len as u64;
        while at < end {
            let index = ChunkIndex::of_byte(at);
            let upto = end.min(index.byte() + CHUNK_SIZE);
            if !self.plan_now(&line, index, (at, upto), offset, &mut plan) {
                self.enter(&line, plan, false);
                return None;
            }
            at = upto;
        }
        self.store.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.store.counters.written_bytes.fetch_add(len as u64, Ordering::Relaxed);
        let inside = self.store.fence.enter_owned();
        Some(Writing { line, plan, crcs: Vec::new(), _inside: inside, _gate: gate })
    }

    /// Claims the blocks `bytes` of the disk, which lie in one chunk, and chooses where they go; false when that needs
    /// waiting. What was claimed is in the plan.
    fn plan_now(&self, line: &Line, index: ChunkIndex, bytes: (u64, u64), offset: u64, plan: &mut Plan) -> bool {
        let block = |byte: u64| to_usize((byte - index.byte()) / BLOCK_SIZE);
        let claim = BlockSet::range(block(bytes.0), block(bytes.1));
        let chunk = self.store.cache.get(line.owner, index);
        let runs = {
            let Some(mut state) = chunk.try_lock() else { return false };
            if !state.loaded || state.busy.meets(&claim) {
                return false;
            }
            state.claim(&claim);
            state.entry.runs(block(bytes.0), block(bytes.1))
        };
        plan.parts.push(Part { index, chunk, claim, fresh: Vec::new() });
        let from = |i: usize| to_usize(index.byte() + i as u64 * BLOCK_SIZE - offset);
        let mut missing = BlockSet::EMPTY;
        for run in runs {
            let Some(address) = run.address.filter(|address| address.raw() >= line.floor) else {
                missing = missing.or(&BlockSet::range(run.start, run.start + run.len));
                continue;
            };
            let Some(segment) = self.store.segments.opened(address.segment()) else { return false };
            if segment.direct().is_none() {
                return false;
            }
            plan.push(Stretch { segment, address, from: from(run.start), len: run.len * to_usize(BLOCK_SIZE) });
        }
        if missing.is_empty() {
            return true;
        }
        let fresh = u64::from(missing.count()) * BLOCK_SIZE;
        if self.head.small.would_copy(to_usize(fresh)) || self.store.room_for(self.head.id, fresh).is_err() {
            return false;
        }
        plan.allowed += fresh;
        let Some(slab) = self.head.hand_out_now(index, &missing) else { return false };
        plan.parts.last_mut().expect("pushed above").fresh.push((slab.base, missing));
        for (start, end) in missing.runs() {
            let (address, len) = (slab.base.at(start), (end - start) * to_usize(BLOCK_SIZE));
            plan.push(Stretch { segment: Arc::clone(&slab.segment), address, from: from(start), len });
        }
        slab.segment.direct().is_some()
    }

    /// Maps what was written, if all of it was; see [`super::BlockDevice::end_write`].
    pub(super) fn finish_write(
        &self,
        mut writing: Writing,
        data: &[u8],
        written: &[io::Result<usize>],
    ) -> Result<bool> {
        writing.checksum(data);
        let mut result = Ok(());
        for ((stretch, crcs), written) in writing.plan.stretches.iter().zip(&writing.crcs).zip(written) {
            let part = &data[stretch.from..stretch.from + stretch.len];
            let done = match written {
                Ok(len) if *len == part.len() => {
                    stretch.segment.wrote();
                    Ok(())
                }
                // Cut short: once more, in the way that goes on until all is written.
                Ok(_) => stretch.segment.write(part, stretch.address, false),
                Err(error)
                    if error.kind() == io::ErrorKind::Interrupted || error.kind() == io::ErrorKind::WouldBlock =>
                {
                    stretch.segment.write(part, stretch.address, false)
                }
                Err(error) => {
                    stretch.segment.wrote();
                    let again = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
                    Err(Error::io(format!("cannot write segment {}", stretch.segment.id()), again))
                }
            };
            let crcs = done.is_ok().then_some(crcs);
            self.note_write(&stretch.segment, part, stretch.address, crcs);
            result = result.and(done);
        }
        let Writing { line, plan, .. } = writing;
        self.enter(&line, plan, result.is_ok());
        if let Err(error) = result {
            self.store.poison_unless_full(&error);
            return Err(error);
        }
        // A flush also makes the mount forget what it has read since the beginning, which takes too long here.
        let must = self.head.dirty_chunks() >= FLUSH_AT || self.head.unflushed.must_flush();
        Ok(must || self.head.tenancy.is_watched())
    }
}

impl Writing {
    /// Returns where the data goes: the extents to write.
    #[must_use]
    pub fn extents(&self) -> Vec<Extent> {
        let extent = |stretch: &Stretch| Extent {
            file: stretch.segment.direct().expect("asked for before it was chosen"),
            offset: stretch.address.byte(),
            from: stretch.from,
            len: stretch.len,
        };
        self.plan.stretches.iter().map(extent).collect()
    }

    /// Computes the checksums of the data, while it is on its way or after.
    pub fn checksum(&mut self, data: &[u8]) {
        if self.crcs.is_empty() {
            let of = |stretch: &Stretch| checksums(&data[stretch.from..stretch.from + stretch.len]);
            self.crcs = self.plan.stretches.iter().map(of).collect();
        }
    }
}
