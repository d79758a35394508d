//! Look-ups: where the blocks of any state are, and reading them.
//!
//! # Rules
//! 1. The entry that holds for a state is the newest one not younger than it, in its branch, else in the branches below.
//! 2. Who reads is inside the fence from the look-up to the end of the pread, so that nothing it found is punched.
//! 3. A mapped block is data or an error, never silently zeros: a segment that ends early is `Corrupt`, and a block that
//!    a scrub found damaged stays an error until it is overwritten or freed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Store;
use super::head::Head;
use super::rows::{Key, KeyParts, decode_entry};
use super::tables::StateKey;
use crate::error::{Error, Result};
use crate::map::{Chunk, Entry, Run};
use crate::pool::Segment;
use crate::units::{
    BLOCK_SIZE, BlockAddress, BranchId, CHUNK_SIZE, ChunkIndex, Epoch, SegmentId, SnapshotId, to_usize,
};

/// The entry that holds for a chunk of a state, and the row it is stored in.
#[derive(Debug, Clone, Default)]
pub struct Resolved {
    /// Branch and epoch of the row; `None` when nothing is stored.
    pub row: Option<StateKey>,
    /// The addresses.
    pub entry: Entry,
}

/// One state to read: its cached chunks, where its look-ups go, its size.
#[derive(Debug, Clone)]
pub struct Source {
    /// Owner of the cached chunks.
    pub owner: u64,
    /// Branch to begin look-ups in.
    pub branch: BranchId,
    /// Newest epoch to see; the largest of all for a live disk.
    pub upto: Epoch,
    /// Bytes; beyond is nothing.
    pub size: u64,
}

impl Store {
    /// Finds the entry along a look-up path.
    ///
    /// # Errors
    /// `Corrupt` when the row is damaged; any error of reading the catalog.
    pub fn resolve_on(&self, path: &[StateKey], chunk: ChunkIndex) -> Result<Resolved> {
        for (branch, upto) in path {
            let (low, high) = (Key::map(*branch, chunk, Epoch(0)), Key::map(*branch, chunk, *upto));
            if let Some((key, value)) = self.ledger.last_in(&low, &high)? {
                let KeyParts::Map(_, _, epoch) = key.parts()? else {
                    return Err(Error::corrupt("a map key of the catalog is damaged"));
                };
                return Ok(Resolved { row: Some((*branch, epoch)), entry: decode_entry(&value)? });
            }
        }
        Ok(Resolved::default())
    }

    /// Finds the entry that holds for a state, as the rows have it.
    ///
    /// # Errors
    /// As [`Store::resolve_on`].
    pub fn resolve(&self, state: StateKey, chunk: ChunkIndex) -> Result<Resolved> {
        let path = self.tables.read().lookup_path(state.0, state.1);
        self.resolve_on(&path, chunk)
    }

    /// Returns a segment, open and checked.
    ///
    /// # Errors
    /// `Corrupt` when it is not in the catalog or the file is not the right one.
    pub fn segment(&self, id: SegmentId) -> Result<Arc<Segment>> {
        if let Some(open) = self.segments.opened(id) {
            return Ok(open);
        }
        let nonce = self.tables.read().segment(id)?.nonce;
        self.segments.get(id, nonce)
    }

    /// Returns a cached chunk of a source, loaded.
    ///
    /// # Errors
    /// As [`Store::resolve_on`].
    pub fn chunk(&self, source: &Source, index: ChunkIndex) -> Result<Arc<Chunk>> {
        let chunk = self.cache.get(source.owner, index);
        let mut state = chunk.lock();
        if !state.loaded {
            let path = self.tables.read().lookup_path(source.branch, source.upto);
            let found = self.resolve_on(&path, index)?;
            state.entry = found.entry;
            state.row = found.row;
            state.loaded = true;
        }
        drop(state);
        Ok(chunk)
    }

    /// Reads `buf.len()` bytes at `offset`; unmapped blocks are zeros.
    ///
    /// # Errors
    /// `Usage` beyond the size, `Corrupt` for a block that cannot be trusted, any error of the host.
    pub fn read(&self, source: &Source, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > source.size) {
            return Err(Error::usage(format!("{len} bytes at {offset} lie beyond the end ({} bytes)", source.size)));
        }
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(len, Ordering::Relaxed);
        let _inside = self.fence.enter();
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let chunk = ChunkIndex::of_byte(at);
            let here = usize::try_from((chunk.byte() + CHUNK_SIZE - at).min(rest.len() as u64)).expect("at most 2 MiB");
            let (now, later) = rest.split_at_mut(here);
            self.read_chunk(source, chunk, now, at)?;
            at += here as u64;
            rest = later;
        }
        Ok(())
    }

    fn read_chunk(&self, source: &Source, index: ChunkIndex, buf: &mut [u8], at: u64) -> Result<()> {
        let within = at - index.byte();
        let first = (within / BLOCK_SIZE) as usize;
        let last = to_usize((within + buf.len() as u64).div_ceil(BLOCK_SIZE));
        let runs = {
            let chunk = self.chunk(source, index)?;
            let state = chunk.lock();
            state.entry.runs(first, last)
        };
        for run in runs {
            let start = (run.start as u64 * BLOCK_SIZE).max(within);
            let end = ((run.start + run.len) as u64 * BLOCK_SIZE).min(within + buf.len() as u64);
            let part = &mut buf[to_usize(start - within)..to_usize(end - within)];
            self.read_run(&run, part, start - run.start as u64 * BLOCK_SIZE)
                .map_err(|error| self.name_bytes(error, &run, index, (start, end)))?;
        }
        Ok(())
    }

    /// Reads a run, beginning `skip` bytes into it. The caller is inside the fence.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub fn read_run(&self, run: &Run, buf: &mut [u8], skip: u64) -> Result<()> {
        let Some(first) = run.address else {
            buf.fill(0);
            return Ok(());
        };
        self.refuse_bad(first, run.len as u64)?;
        self.segment(first.segment())?.read(buf, first, skip)
    }

    /// Says which bytes of its disk could not be read: the first damaged block, or the bytes `within` the chunk.
    pub fn name_bytes(&self, error: Error, run: &Run, index: ChunkIndex, within: (u64, u64)) -> Error {
        let bad = run.address.and_then(|first| Some(self.first_bad(first, run.len as u64)?.raw() - first.raw()));
        let (from, upto) = bad.map_or(within, |n| {
            let at = (run.start as u64 + n) * BLOCK_SIZE;
            (at, at + BLOCK_SIZE)
        });
        error.context(format_args!("bytes {} to {}", index.byte() + from, index.byte() + upto))
    }

    /// Says of data that could not be had which snapshot it is of.
    pub fn name_snapshot(&self, error: Error, id: SnapshotId) -> Error {
        match self.snapshot_info_by_id(id) {
            Ok(info) if error.is_of_data() => error.context(format_args!("snapshot '{}@{}'", info.disk, info.name)),
            _ => error,
        }
    }

    fn first_bad(&self, first: BlockAddress, blocks: u64) -> Option<BlockAddress> {
        let bad = self.bad.read();
        if bad.is_empty() {
            return None;
        }
        // Members below, and the next one after them.
        let next = bad.select(bad.rank(first.raw() - 1))?;
        (next < first.raw() + blocks).then(|| BlockAddress::from_raw(next).expect("it was marked as one"))
    }

    fn refuse_bad(&self, first: BlockAddress, blocks: u64) -> Result<()> {
        let Some(address) = self.first_bad(first, blocks) else { return Ok(()) };
        Err(Error::corrupt(format!("the block at address {address} does not match its checksum"))
            .hint("restore the disk or overwrite the block; `afterimage scrub` lists damaged blocks"))
    }

    /// Remembers that a block is damaged, so that reads of it fail.
    pub fn mark_bad(&self, address: BlockAddress) {
        self.bad.write().insert(address.raw());
    }

    /// Finds the first mapped extent at or after `from`, as bytes `(start, end)` clipped to the size. `unsaved` are the
    /// chunks that rows do not show yet.
    ///
    /// # Errors
    /// As [`Store::resolve_on`].
    pub fn next_data(&self, source: &Source, head: Option<&Head>, from: u64) -> Result<Option<(u64, u64)>> {
        let mut at = from;
        let mut found: Option<(u64, u64)> = None;
        while at < source.size {
            let index = ChunkIndex::of_byte(at);
            let Some(index) = self.next_chunk(source, head, index)? else { break };
            if index.byte() >= source.size || found.is_some_and(|(_, end)| index.byte() > end) {
                break;
            }
            at = at.max(index.byte());
            let mapped = self.chunk(source, index)?.lock().entry.mapped();
            let block = ((at - index.byte()) / BLOCK_SIZE) as usize;
            match (mapped.next(block), found) {
                (Some(start), None) => {
                    let byte = index.byte() + start as u64 * BLOCK_SIZE;
                    let end = index.byte() + mapped.next_absent(start) as u64 * BLOCK_SIZE;
                    found = Some((byte.max(at), end));
                }
                (Some(start), Some((begin, _))) if start == block => {
                    found = Some((begin, index.byte() + mapped.next_absent(start) as u64 * BLOCK_SIZE));
                }
                (_, Some(_)) => break,
                (None, None) => {}
            }
            // Goes on only while the extent touches the end of the chunk; long extents are cut for the caller's sake.
            if found.is_some_and(|(begin, end)| end < index.byte() + CHUNK_SIZE || end - begin >= LONG_EXTENT) {
                break;
            }
            at = index.byte() + CHUNK_SIZE;
        }
        Ok(found.map(|(start, end)| (start, end.min(source.size))).filter(|(start, end)| start < end))
    }

    /// Returns the first chunk at or after `from` that may have something mapped.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn next_chunk(&self, source: &Source, head: Option<&Head>, from: ChunkIndex) -> Result<Option<ChunkIndex>> {
        let unsaved = head.and_then(|head| head.first_unsaved(from));
        let path = self.tables.read().lookup_path(source.branch, source.upto);
        let mut nearest = unsaved;
        for (branch, _) in path {
            let high = Key::map(branch, nearest.unwrap_or(ChunkIndex(u32::MAX)), Epoch(u64::MAX));
            let rows = self.ledger.first_rows(&Key::map(branch, from, Epoch(0)), &high, 1)?;
            if let Some((key, _)) = rows.first()
                && let KeyParts::Map(_, chunk, _) = key.parts()?
                && nearest.is_none_or(|n| chunk < n)
            {
                nearest = Some(chunk);
            }
        }
        Ok(nearest)
    }

    /// Returns every chunk from `from` up to `upto` (left out) that may have something mapped.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn chunks_between(
        &self,
        source: &Source,
        head: Option<&Head>,
        from: u64,
        upto: u64,
    ) -> Result<BTreeSet<ChunkIndex>> {
        let mut all = BTreeSet::new();
        let mut at = ChunkIndex::of_byte(from);
        while let Some(found) = self.next_chunk(source, head, at)?.filter(|chunk| chunk.byte() < upto) {
            all.insert(found);
            at = ChunkIndex(found.0 + 1);
        }
        Ok(all)
    }
}

const LONG_EXTENT: u64 = 1 << 30;
