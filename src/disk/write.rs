//! The write path.
//!
//! ```text
//! gate (shared) -> per chunk, in order: claim blocks, choose slots -> one pwrite per run of addresses
//!               -> per chunk: enter the new addresses, end the claims
//! ```
//! The chunk's lock is held only while choosing and while entering. Nothing is mapped before its pwrite has returned, so
//! a flush that copies the entry in between copies only what its sync will cover.

use std::sync::Arc;

use super::{BlockDevice, Disk};
use crate::error::Result;
use crate::map::{BlockSet, Chunk, Piece};
use crate::pool::Segment;
use crate::store::Line;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_SIZE, ChunkIndex, to_usize};

/// Changed chunks at which a writer makes the flush itself, so that no frame grows without bound.
const FLUSH_AT: usize = 16 * 1024;
const ZEROS: [u8; to_usize(BLOCK_SIZE)] = [0; to_usize(BLOCK_SIZE)];

/// One pwrite: consecutive bytes of the data at consecutive bytes of a segment.
#[derive(Debug)]
struct Stretch {
    segment: Arc<Segment>,
    address: BlockAddress,
    skip: u64,
    from: usize,
    len: usize,
}

/// A block that is written in part and has to be made whole first.
#[derive(Debug)]
struct Merged {
    address: BlockAddress,
    segment: Arc<Segment>,
    block: Box<[u8]>,
}

/// What was claimed and chosen in one chunk.
#[derive(Debug)]
struct Part {
    index: ChunkIndex,
    chunk: Arc<Chunk>,
    claim: BlockSet,
    /// Blocks that get a new address: slab base and blocks.
    fresh: Vec<(BlockAddress, BlockSet)>,
}

#[derive(Debug, Default)]
struct Plan {
    parts: Vec<Part>,
    stretches: Vec<Stretch>,
    merged: Vec<Merged>,
}

impl Disk {
    /// Writes; `end` is the end of the disk, or of its last block.
    pub(super) fn write_upto(&self, data: &[u8], offset: u64, end: u64) -> Result<()> {
        self.store.ledger.writable()?;
        let inside = |line: &Line| {
            let size = if end > line.size { line.size.next_multiple_of(BLOCK_SIZE) } else { line.size };
            self.inside(&Line { size, ..*line }, "a write", offset, data.len() as u64)
        };
        inside(&self.head.line())?;
        if data.is_empty() {
            return Ok(());
        }
        self.store.counters.writes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.store.counters.written_bytes.fetch_add(data.len() as u64, std::sync::atomic::Ordering::Relaxed);
        self.ask_for_room(data.len() as u64, offset)?;
        {
            let _gate = self.head.gate.read();
            let line = self.head.line();
            // Again: the disk may have been shrunk meanwhile.
            inside(&line)?;
            let mut plan = Plan::default();
            let result = self.plan(&line, data, offset, &mut plan).and_then(|()| self.carry_out(&plan, data));
            self.enter(&line, plan, result.is_ok());
            if let Err(error) = result {
                self.store.poison_unless_full(&error);
                return Err(error);
            }
        }
        if self.head.dirty_chunks() >= FLUSH_AT {
            self.flush()?;
        }
        Ok(())
    }

    /// Takes room on the host for as many blocks as may become new. Overwriting in place needs none.
    fn ask_for_room(&self, len: u64, offset: u64) -> Result<()> {
        let line = self.head.line();
        let mut fresh = 0;
        let (mut at, end) = (offset / BLOCK_SIZE * BLOCK_SIZE, offset + len);
        while at < end {
            let index = ChunkIndex::of_byte(at);
            let upto = end.min(index.byte() + CHUNK_SIZE);
            let chunk = self.store.chunk(&line.source(), index)?;
            let first = ((at - index.byte()) / BLOCK_SIZE) as usize;
            let last = to_usize((upto - index.byte()).div_ceil(BLOCK_SIZE));
            for run in chunk.lock().entry.runs(first, last) {
                if run.address.is_none_or(|address| address.raw() < line.floor) {
                    fresh += run.len as u64 * BLOCK_SIZE;
                }
            }
            at = index.byte() + CHUNK_SIZE;
        }
        if fresh == 0 { Ok(()) } else { self.store.room_for(self.head.id, fresh) }
    }

    fn plan(&self, line: &Line, data: &[u8], offset: u64, plan: &mut Plan) -> Result<()> {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let index = ChunkIndex::of_byte(at);
            let upto = end.min(index.byte() + CHUNK_SIZE);
            self.plan_chunk(line, index, offset, at, upto, plan, data)?;
            at = upto;
        }
        Ok(())
    }

    /// Claims the blocks of `at..upto` and chooses where each run of them goes.
    #[expect(clippy::too_many_arguments, reason = "the range, the whole write it is part of, and the plan")]
    fn plan_chunk(
        &self,
        line: &Line,
        index: ChunkIndex,
        offset: u64,
        at: u64,
        upto: u64,
        plan: &mut Plan,
        data: &[u8],
    ) -> Result<()> {
        let first = ((at - index.byte()) / BLOCK_SIZE) as usize;
        let last = to_usize((upto - index.byte()).div_ceil(BLOCK_SIZE));
        let claim = BlockSet::range(first, last);
        let chunk = self.store.chunk(&line.source(), index)?;
        let mut state = chunk.lock();
        state.wait_idle(&claim);
        state.claim(&claim);
        let owned: BlockSet =
            claim.iter().filter(|i| state.entry.get(*i).is_some_and(|a| a.raw() >= line.floor)).collect();
        let old = state.entry.clone();
        drop(state);
        let at_part = plan.parts.len();
        plan.parts.push(Part { index, chunk, claim, fresh: Vec::new() });
        for run in old.runs(first, last) {
            let Some(address) = run.address.filter(|_| owned.has(run.start)) else { continue };
            let segment = self.store.segment(address.segment())?;
            let start = (index.byte() + run.start as u64 * BLOCK_SIZE).max(at);
            let end = (index.byte() + (run.start + run.len) as u64 * BLOCK_SIZE).min(upto);
            let skip = start - index.byte() - run.start as u64 * BLOCK_SIZE;
            let from = usize::try_from(start - offset).expect("inside the data");
            plan.push(Stretch { segment, address, skip, from, len: to_usize(end - start) });
        }
        let missing = claim.minus(&owned);
        if missing.is_empty() {
            return Ok(());
        }
        for (slab, set) in self.head.hand_out(&self.store, index, &missing)? {
            plan.parts[at_part].fresh.push((slab.base, set));
            for (run_start, run_end) in set.runs() {
                let start = index.byte() + run_start as u64 * BLOCK_SIZE;
                let end = index.byte() + run_end as u64 * BLOCK_SIZE;
                let whole = (start.max(at).next_multiple_of(BLOCK_SIZE), end.min(upto) / BLOCK_SIZE * BLOCK_SIZE);
                // At most the first and the last block are written in part.
                for block in [start, end - BLOCK_SIZE] {
                    let part = block < at || block + BLOCK_SIZE > upto;
                    let i = ((block - index.byte()) / BLOCK_SIZE) as usize;
                    let address = slab.base.at(i);
                    if part && !plan.merged.iter().any(|m| m.address == address) {
                        let block = self.merge(&old, i, block, data, offset)?;
                        plan.merged.push(Merged { address, segment: Arc::clone(&slab.segment), block });
                    }
                }
                if whole.0 < whole.1 {
                    let i = ((whole.0 - index.byte()) / BLOCK_SIZE) as usize;
                    plan.push(Stretch {
                        segment: Arc::clone(&slab.segment),
                        address: slab.base.at(i),
                        skip: 0,
                        from: usize::try_from(whole.0 - offset).expect("inside the data"),
                        len: to_usize(whole.1 - whole.0),
                    });
                }
            }
        }
        Ok(())
    }

    /// Returns a block as it will be: the old one, or zeros, with the written part over it.
    fn merge(&self, old: &crate::map::Entry, i: usize, block: u64, data: &[u8], offset: u64) -> Result<Box<[u8]>> {
        let mut whole = vec![0; to_usize(BLOCK_SIZE)].into_boxed_slice();
        let _inside = self.store.fence.enter();
        for run in old.runs(i, i + 1) {
            self.store.read_run(&run, &mut whole, 0)?;
        }
        let start = offset.max(block);
        let end = (offset + data.len() as u64).min(block + BLOCK_SIZE);
        let part = &data[to_usize(start - offset)..to_usize(end - offset)];
        whole[to_usize(start - block)..to_usize(end - block)].copy_from_slice(part);
        Ok(whole)
    }

    fn carry_out(&self, plan: &Plan, data: &[u8]) -> Result<()> {
        let _inside = self.store.fence.enter();
        for merged in &plan.merged {
            self.pwrite(&merged.segment, &merged.block, merged.address, 0)?;
        }
        for stretch in &plan.stretches {
            let part = &data[stretch.from..stretch.from + stretch.len];
            self.pwrite(&stretch.segment, part, stretch.address, stretch.skip)?;
        }
        Ok(())
    }

    fn pwrite(&self, segment: &Arc<Segment>, data: &[u8], address: BlockAddress, skip: u64) -> Result<()> {
        let result = segment.write(data, address, skip);
        // Also after a failure: what was written is owed a sync, or at least must not be trusted.
        if !matches!(result, Ok(false)) {
            self.head.owe(segment);
        }
        self.note_checksums(data, address, skip, result.is_ok());
        result.map(drop)
    }

    /// Notes the checksums of the whole blocks of a write, and drops those of partial ones and of failed writes.
    fn note_checksums(&self, data: &[u8], address: BlockAddress, skip: u64, written: bool) {
        let at = |byte: u64| BlockAddress::from_raw(address.raw() + byte / BLOCK_SIZE).expect("of the same segment");
        let (start, end) = (skip, skip + data.len() as u64);
        let (first, last) = (start.next_multiple_of(BLOCK_SIZE), end / BLOCK_SIZE * BLOCK_SIZE);
        if !written {
            (start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE))
                .for_each(|block| self.head.crcs.drop_one(at(block * BLOCK_SIZE)));
            return;
        }
        if start < first {
            self.head.crcs.drop_one(at(start));
        }
        if end > last && last >= first {
            self.head.crcs.drop_one(at(last));
        }
        let mut byte = first;
        while byte < last {
            let here = at(byte);
            let in_slab = (512 - here.index() as u64) * BLOCK_SIZE;
            let upto = last.min(byte + in_slab);
            self.head.crcs.note(here, &data[to_usize(byte - start)..to_usize(upto - start)]);
            byte = upto;
        }
    }

    /// Maps what was written, or drops the slots of a failed write, and ends the claims.
    fn enter(&self, line: &Line, plan: Plan, written: bool) {
        for part in plan.parts {
            let mut state = part.chunk.lock();
            for (base, set) in &part.fresh {
                self.head.begin_change(line, part.index, &mut state);
                if written {
                    let before = state.entry.mapped().and(set).count();
                    let lost = state.entry.assign(*base, set);
                    self.head.count(i64::from(set.count()) - i64::from(before));
                    // What was mapped before is older than the epoch: the stored entry has it.
                    assert!(
                        lost.iter().all(|p| p.base.raw() < line.floor),
                        "blocks of this epoch are overwritten in place"
                    );
                } else {
                    state.dropped.push(Piece { base: *base, set: *set });
                }
            }
            state.release(&part.claim);
        }
    }

    /// Writes zeros over part of a block, unless it is unmapped and reads as zeros anyway.
    pub(super) fn zero_part(&self, from: u64, upto: u64) -> Result<()> {
        if from >= upto {
            return Ok(());
        }
        assert!(upto - from <= BLOCK_SIZE, "only parts of one block are zeroed by writing");
        let mapped = self.next_data(from)?.is_some_and(|(start, _)| start < upto);
        if mapped { self.write_upto(&ZEROS[..to_usize(upto - from)], from, self.size()) } else { Ok(()) }
    }
}

impl Plan {
    /// Adds a pwrite, as part of the one before where addresses and data go on.
    fn push(&mut self, next: Stretch) {
        if let Some(last) = self.stretches.last_mut() {
            let end = last.address.byte() + last.skip + last.len as u64;
            let goes_on = last.segment.id() == next.segment.id() && end == next.address.byte() + next.skip;
            if goes_on && last.from + last.len == next.from {
                last.len += next.len;
                return;
            }
        }
        self.stretches.push(next);
    }
}
