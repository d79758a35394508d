//! A range of a snapshot as a file: extents, and the data files of increment directories.
//!
//! # Rules
//! 1. Who has a window open holds the snapshot, so its data and the rows that lead to it stay until the last one lets go.
//! 2. What is read is compared with its seals, as `send` and `export` do: a backup made of these files has no damaged block.
//! 3. Where the blocks are is found again at each read, unless it was found at opening: a directory may have tens of
//!    thousands of files, and each is read once.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::extent::Cut;
use crate::error::Result;
use crate::map::{Entry, Run};
use crate::snapshot::Verifiers;
use crate::store::Store;
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, SnapshotId, to_usize};

/// A snapshot whose data and rows stay until this goes.
#[derive(Debug)]
pub struct Held {
    store: Arc<Store>,
    id: SnapshotId,
}

impl Held {
    /// Holds a live snapshot.
    ///
    /// # Errors
    /// `NotFound` when it was removed or retired.
    pub fn new(store: &Arc<Store>, id: SnapshotId) -> Result<(Arc<Self>, Cut)> {
        // Held before its status is read, so that it cannot begin to go away in between.
        store.hold_open(id);
        let held = Arc::new(Self { store: Arc::clone(store), id });
        let cut = Cut::live(&store.tables.read(), id)?;
        Ok((held, cut))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.store.let_go(self.id);
    }
}

/// An open range of a snapshot.
#[derive(Debug)]
pub struct Window {
    store: Arc<Store>,
    cut: Cut,
    offset: u64,
    length: u64,
    /// The entries of its chunks, if they were looked up before.
    entries: Vec<Entry>,
    /// What all that is read is compared with.
    verifiers: Option<Arc<Verifiers>>,
    _held: Arc<Held>,
}

impl Window {
    /// Opens `length` bytes at `offset`, which lie inside the snapshot.
    #[must_use]
    pub fn new(store: &Arc<Store>, held: Arc<Held>, cut: Cut, offset: u64, length: u64) -> Self {
        assert!(offset.checked_add(length).is_some_and(|end| end <= cut.size), "a window lies inside its snapshot");
        Self { store: Arc::clone(store), cut, offset, length, entries: Vec::new(), verifiers: None, _held: held }
    }

    /// Sets the entries of its chunks, which were looked up before.
    #[must_use]
    pub fn knowing(self, entries: Vec<Entry>) -> Self {
        Self { entries, ..self }
    }

    /// Has all that is read compared with its seals.
    #[must_use]
    pub fn verified(self, verifiers: &Arc<Verifiers>) -> Self {
        Self { verifiers: Some(Arc::clone(verifiers)), ..self }
    }

    /// Returns the length.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.length
    }

    fn entry(&self, chunk: ChunkIndex) -> Result<Cow<'_, Entry>> {
        let known = self.entries.get((chunk.0 - ChunkIndex::of_byte(self.offset).0) as usize);
        match known {
            Some(entry) => Ok(Cow::Borrowed(entry)),
            None => Ok(Cow::Owned(self.store.resolve(self.cut.key, chunk)?.entry)),
        }
    }

    /// Reads `buf.len()` bytes at `offset`, all below the end.
    ///
    /// # Errors
    /// `Corrupt` for a block that cannot be trusted, any error of the host.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len() as u64;
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.length), "reads are cut at the end before");
        self.store.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.store.counters.read_bytes.fetch_add(len, Ordering::Relaxed);
        let _inside = self.store.fence.enter();
        let mut at = self.offset + offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (chunk, within) = (ChunkIndex::of_byte(at), at % CHUNK_SIZE);
            let here = rest.len().min(to_usize(CHUNK_SIZE - within));
            let (now, later) = rest.split_at_mut(here);
            let end = within + here as u64;
            let (first, last) = (to_usize(within / BLOCK_SIZE), to_usize(end.div_ceil(BLOCK_SIZE)));
            let runs = self.entry(chunk)?.runs(first, last);
            for run in &runs {
                let start = (run.start as u64 * BLOCK_SIZE).max(within);
                let stop = ((run.start + run.len) as u64 * BLOCK_SIZE).min(end);
                let part = &mut now[to_usize(start - within)..to_usize(stop - within)];
                self.store.read_run(run, part, start - run.start as u64 * BLOCK_SIZE).map_err(|error| {
                    let error = self.store.name_bytes(error, run, chunk, (start, stop));
                    self.store.name_snapshot(error, self.cut.id)
                })?;
            }
            self.compare(chunk, &runs, now, within)?;
            at += here as u64;
            rest = later;
        }
        Ok(())
    }

    fn compare(&self, chunk: ChunkIndex, runs: &[Run], bytes: &[u8], within: u64) -> Result<()> {
        let Some(verifiers) = &self.verifiers else { return Ok(()) };
        let verifier = verifiers.of(&self.store, self.cut.key)?;
        let compared = verifier.lock().compare(chunk, runs, bytes, within);
        compared.map(drop).map_err(|error| self.store.name_snapshot(error, self.cut.id))
    }

    /// Returns the first mapped stretch at or after `offset`, clipped to the length.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let limit = self.offset + self.length;
        let mut at = self.offset + offset;
        let mut found: Option<(u64, u64)> = None;
        while at < limit {
            let chunk = ChunkIndex::of_byte(at);
            let mapped = self.entry(chunk)?.mapped();
            let block = to_usize((at - chunk.byte()) / BLOCK_SIZE);
            let byte = |block: usize| chunk.byte() + block as u64 * BLOCK_SIZE;
            match (mapped.next(block), found) {
                (Some(start), None) => found = Some((byte(start).max(at), byte(mapped.next_absent(start)))),
                (Some(start), Some((begin, _))) if start == block => {
                    found = Some((begin, byte(mapped.next_absent(start))));
                }
                (_, Some(_)) => break,
                (None, None) => {}
            }
            at = chunk.byte() + CHUNK_SIZE;
            if found.is_some_and(|(_, end)| end < at) {
                break;
            }
        }
        let clipped = found.map(|(start, end)| (start - self.offset, end.min(limit).saturating_sub(self.offset)));
        Ok(clipped.filter(|(start, end)| start < end))
    }
}
