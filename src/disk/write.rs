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
use crate::codec::crc32;
use crate::error::Result;
use crate::map::{BlockSet, Chunk, Entry, Piece};
use crate::pool::Segment;
use crate::store::Line;
use crate::store::unflushed::MapChange;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_SIZE, ChunkIndex, to_usize};

/// Changed chunks at which a writer makes the flush itself, so that no frame grows without bound.
pub(super) const FLUSH_AT: usize = 16 * 1024;
const ZEROS: [u8; to_usize(BLOCK_SIZE)] = [0; to_usize(BLOCK_SIZE)];

/// One pwrite: consecutive bytes of the data at consecutive bytes of a segment.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) segment: Arc<Segment>,
    pub(super) address: BlockAddress,
    pub(super) from: usize,
    pub(super) len: usize,
}

/// What is to be written, and where.
#[derive(Debug, Clone, Copy)]
struct Bytes<'a> {
    data: &'a [u8],
    offset: u64,
}

impl Bytes<'_> {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    /// Returns the part that lies in a chunk, as bytes of the disk.
    fn within(&self, index: ChunkIndex) -> (u64, u64) {
        (self.offset.max(index.byte()), self.end().min(index.byte() + CHUNK_SIZE))
    }
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
pub(super) struct Part {
    pub(super) index: ChunkIndex,
    pub(super) chunk: Arc<Chunk>,
    pub(super) claim: BlockSet,
    /// Blocks that get a new address: slab base and blocks.
    pub(super) fresh: Vec<(BlockAddress, BlockSet)>,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) stretches: Vec<Stretch>,
    merged: Vec<Merged>,
    /// Bytes of new blocks that were allowed for it.
    pub(super) allowed: u64,
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
        let mut plan = Plan { allowed: self.ask_for_room(data.len() as u64, offset)?, ..Plan::default() };
        {
            let _gate = self.head.gate.read();
            let line = self.head.line();
            // Again: the disk may have been shrunk or removed meanwhile.
            let still = self.head.refuse_ended().and_then(|()| inside(&line));
            let result = still
                .and_then(|()| self.plan(&line, &Bytes { data, offset }, &mut plan))
                .and_then(|()| self.carry_out(&plan, data).inspect_err(|error| self.store.poison_unless_full(error)));
            self.enter(&line, plan, result.is_ok());
            result.map_err(|error| self.name(error))?;
        }
        if self.head.dirty_chunks() >= FLUSH_AT || self.head.unflushed.must_flush() {
            self.flush_own()?;
        }
        Ok(())
    }

    /// Takes room on the host for as many blocks as may become new, and returns their bytes. Overwriting in place needs none.
    fn ask_for_room(&self, len: u64, offset: u64) -> Result<u64> {
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
        if fresh > 0 {
            self.store.room_for(self.head.id, fresh)?;
        }
        Ok(fresh)
    }

    fn plan(&self, line: &Line, source: &Bytes<'_>, plan: &mut Plan) -> Result<()> {
        let mut at = source.offset;
        while at < source.end() {
            let index = ChunkIndex::of_byte(at);
            self.plan_chunk(line, index, source, plan)?;
            at = index.byte() + CHUNK_SIZE;
        }
        Ok(())
    }

    /// Claims the blocks of one chunk that the write touches, and chooses where each run of them goes.
    fn plan_chunk(&self, line: &Line, index: ChunkIndex, source: &Bytes<'_>, plan: &mut Plan) -> Result<()> {
        let (at, upto) = source.within(index);
        let first = ((at - index.byte()) / BLOCK_SIZE) as usize;
        let last = to_usize((upto - index.byte()).div_ceil(BLOCK_SIZE));
        let claim = BlockSet::range(first, last);
        let chunk = self.store.chunk(&line.source(), index)?;
        let mut state = chunk.lock();
        state.wait_idle(&claim);
        state.claim(&claim);
        let old = state.entry.clone();
        drop(state);
        plan.parts.push(Part { index, chunk, claim, fresh: Vec::new() });
        let mut missing = BlockSet::EMPTY;
        for run in old.runs(first, last) {
            match run.address.filter(|address| address.raw() >= line.floor) {
                Some(address) => {
                    let segment = self.store.segment(address.segment())?;
                    self.place(source, &old, &segment, address, (run.start, run.start + run.len), index, plan)?;
                }
                None => missing = missing.or(&BlockSet::range(run.start, run.start + run.len)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        // Until here nothing was written: a block that cannot be read concerns nobody but who writes a part of it.
        let slabs = self.head.hand_out(&self.store, index, &missing);
        for (slab, set) in slabs.inspect_err(|error| self.store.poison_unless_full(error))? {
            plan.parts.last_mut().expect("pushed above").fresh.push((slab.base, set));
            for (start, end) in set.runs() {
                self.place(source, &old, &slab.segment, slab.base.at(start), (start, end), index, plan)?;
            }
        }
        Ok(())
    }

    /// Plans the pwrites of a run of blocks at consecutive addresses. Only whole blocks are ever written: what a write
    /// covers in part, its first and its last block at most, is merged with the block as it is.
    #[expect(clippy::too_many_arguments, reason = "a run of blocks, where it comes from, where it goes")]
    fn place(
        &self,
        source: &Bytes<'_>,
        old: &Entry,
        segment: &Arc<Segment>,
        address: BlockAddress,
        run: (usize, usize),
        index: ChunkIndex,
        plan: &mut Plan,
    ) -> Result<()> {
        let (at, upto) = source.within(index);
        let byte = |block: usize| index.byte() + block as u64 * BLOCK_SIZE;
        let address_of = |block: usize| {
            BlockAddress::from_raw(address.raw() + (block - run.0) as u64).expect("a run stays in its slab")
        };
        let (mut first, mut last) = run;
        let in_part = |block: usize| byte(block) < at || byte(block + 1) > upto;
        if in_part(first) {
            let block = self.merge(source, old, first, byte(first))?;
            plan.merged.push(Merged { address: address_of(first), segment: Arc::clone(segment), block });
            first += 1;
        }
        if last > first && in_part(last - 1) {
            last -= 1;
            let block = self.merge(source, old, last, byte(last))?;
            plan.merged.push(Merged { address: address_of(last), segment: Arc::clone(segment), block });
        }
        if first < last {
            plan.push(Stretch {
                segment: Arc::clone(segment),
                address: address_of(first),
                from: usize::try_from(byte(first) - source.offset).expect("inside the data"),
                len: (last - first) * to_usize(BLOCK_SIZE),
            });
        }
        Ok(())
    }

    /// Returns a block as it will be: the old one, or zeros, with the written part over it.
    fn merge(&self, source: &Bytes<'_>, old: &Entry, i: usize, block: u64) -> Result<Box<[u8]>> {
        let mut whole = vec![0; to_usize(BLOCK_SIZE)].into_boxed_slice();
        let _inside = self.store.fence.enter();
        for run in old.runs(i, i + 1) {
            self.store.read_run(&run, &mut whole, 0)?;
        }
        let start = source.offset.max(block);
        let end = source.end().min(block + BLOCK_SIZE);
        let part = &source.data[to_usize(start - source.offset)..to_usize(end - source.offset)];
        whole[to_usize(start - block)..to_usize(end - block)].copy_from_slice(part);
        Ok(whole)
    }

    fn carry_out(&self, plan: &Plan, data: &[u8]) -> Result<()> {
        let _inside = self.store.fence.enter();
        for merged in &plan.merged {
            self.pwrite(&merged.segment, &merged.block, merged.address, plan.is_fresh(merged.address))?;
        }
        for stretch in &plan.stretches {
            let part = &data[stretch.from..stretch.from + stretch.len];
            self.pwrite(&stretch.segment, part, stretch.address, plan.is_fresh(stretch.address))?;
        }
        Ok(())
    }

    fn pwrite(&self, segment: &Arc<Segment>, data: &[u8], address: BlockAddress, fresh: bool) -> Result<()> {
        // New space: the host allocates it now for direct I/O, or with many others when the page cache is written back.
        let cached = fresh && self.head.small.would_copy(data.len());
        let result = segment.write(data, address, cached);
        let crcs = if result.is_ok() { checksums(data) } else { Vec::new() };
        self.note_write(segment, data, address, result.is_ok().then_some(&crcs));
        result
    }

    /// Enters a write that has returned into the books; `crcs` are the checksums of its blocks unless it failed.
    pub(super) fn note_write(
        &self,
        segment: &Arc<Segment>,
        data: &[u8],
        address: BlockAddress,
        crcs: Option<&Vec<u32>>,
    ) {
        // Each write by itself: another one may have been first to leave something to sync, and not be here yet. Also after
        // a failure: part of the data may be in the page cache.
        self.head.owe(segment);
        let at =
            |byte: usize| BlockAddress::from_raw(address.raw() + byte as u64 / BLOCK_SIZE).expect("of one segment");
        match crcs {
            Some(_) => self.write_down_stale(self.head.small.note(address, data)),
            None => self.head.small.spoil(),
        }
        let mut byte = 0;
        while byte < data.len() {
            let here = at(byte);
            let upto = data.len().min(byte + (512 - here.index()) * to_usize(BLOCK_SIZE));
            match crcs {
                Some(crcs) => {
                    let blocks = byte / to_usize(BLOCK_SIZE)..upto / to_usize(BLOCK_SIZE);
                    self.head.crcs.note(here, &crcs[blocks]);
                }
                None => self.head.crcs.forget(here.slab()),
            }
            byte = upto;
        }
    }

    /// Writes down which blocks must not be had from their copies in the journal any more.
    fn write_down_stale(&self, addresses: Vec<BlockAddress>) {
        let mut slabs: Vec<(BlockAddress, BlockSet)> = Vec::new();
        for address in addresses {
            match slabs.last_mut() {
                Some((base, set)) if *base == address.slab() => set.add(address.index()),
                _ => slabs.push((address.slab(), BlockSet::range(address.index(), address.index() + 1))),
            }
        }
        for (base, set) in slabs {
            self.head.write_down(|| MapChange::Overwritten { base, set });
        }
    }

    /// Maps what was written, or drops the slots of a failed write, and ends the claims.
    pub(super) fn enter(&self, line: &Line, plan: Plan, written: bool) {
        let mut used = 0;
        for part in plan.parts {
            let mut state = part.chunk.lock();
            for (base, set) in &part.fresh {
                self.head.begin_change(line, part.index, &mut state);
                if written {
                    let before = state.entry.mapped().and(set).count();
                    let lost = state.entry.assign(*base, set);
                    state.fresh += u64::from(set.count());
                    used += u64::from(set.count()) * BLOCK_SIZE;
                    self.head.count(i64::from(set.count()) - i64::from(before));
                    // What was mapped before is older than the epoch: the stored entry has it.
                    assert!(
                        lost.iter().all(|p| p.base.raw() < line.floor),
                        "blocks of this epoch are overwritten in place"
                    );
                    let (branch, epoch, chunk) = (line.branch, line.epoch, part.index);
                    self.head.write_down(|| MapChange::Mapped { branch, epoch, chunk, base: *base, set: *set });
                } else {
                    state.dropped.push(Piece { base: *base, set: *set });
                }
            }
            state.release(&part.claim);
        }
        self.head.settle(plan.allowed, used);
        // Last: who has read the blocks before must not give them out any more, who reads them from here on may.
        self.head.changed();
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

/// Returns the checksums of whole blocks.
pub(super) fn checksums(data: &[u8]) -> Vec<u32> {
    data.chunks_exact(to_usize(BLOCK_SIZE)).map(crc32).collect()
}

impl Plan {
    /// Tells whether an address was handed out for this write.
    fn is_fresh(&self, address: BlockAddress) -> bool {
        let mut fresh = self.parts.iter().flat_map(|part| &part.fresh);
        fresh.any(|(base, set)| *base == address.slab() && set.has(address.index()))
    }

    /// Adds a pwrite, as part of the one before where addresses and data go on.
    pub(super) fn push(&mut self, next: Stretch) {
        if let Some(last) = self.stretches.last_mut() {
            let end = last.address.byte() + last.len as u64;
            let goes_on = last.segment.id() == next.segment.id() && end == next.address.byte();
            if goes_on && last.from + last.len == next.from {
                last.len += next.len;
                return;
            }
        }
        self.stretches.push(next);
    }
}
