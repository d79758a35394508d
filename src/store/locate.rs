//! Finding where a range lies without reading it and without waiting, for callers with many reads under way at once.
//!
//! # Rules
//! 1. Nothing here waits for the disk, nor for a lock that is held while somebody else does: a chunk that is not cached,
//!    or whose lock is held, is for [`Store::read`].
//! 2. What was found stays readable while the [`Located`] lives: it is inside the fence.

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Source, Store};
use crate::error::Result;
use crate::sync::InsideOwned;
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, to_usize};

/// Consecutive bytes of a host file.
#[derive(Debug)]
pub struct Extent {
    /// The file, opened for direct I/O.
    pub file: Arc<fs::File>,
    /// Where in the file.
    pub offset: u64,
    /// Where in the range that was asked for.
    pub from: usize,
    /// Bytes.
    pub len: usize,
}

/// Where a range lies.
#[derive(Debug)]
pub struct Located {
    /// What is to be read. All of it must be there: the end of a file is a damage.
    pub extents: Vec<Extent>,
    /// What reads as zeros.
    pub holes: Vec<Range<usize>>,
    _inside: InsideOwned,
}

impl Store {
    /// Finds where a range of whole blocks lies; `None` for what only [`Store::read`] can do.
    ///
    /// # Errors
    /// None of its own: what is wrong is for [`Store::read`] to say.
    pub fn locate(&self, source: &Source, len: usize, offset: u64) -> Result<Option<Located>> {
        let end = offset.saturating_add(len as u64);
        let whole = offset.is_multiple_of(BLOCK_SIZE) && (len as u64).is_multiple_of(BLOCK_SIZE);
        if !whole || end > source.size || !self.bad.read().is_empty() {
            return Ok(None);
        }
        let mut found = Located { extents: Vec::new(), holes: Vec::new(), _inside: self.fence.enter_owned() };
        let mut at = offset;
        while at < end {
            let index = ChunkIndex::of_byte(at);
            let upto = end.min(index.byte() + CHUNK_SIZE);
            if !self.locate_in(source, index, (at, upto), offset, &mut found) {
                return Ok(None);
            }
            at = upto;
        }
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(len as u64, Ordering::Relaxed);
        Ok(Some(found))
    }

    /// Adds the part `bytes` of the disk, which lies in one chunk.
    fn locate_in(
        &self,
        source: &Source,
        index: ChunkIndex,
        bytes: (u64, u64),
        offset: u64,
        found: &mut Located,
    ) -> bool {
        let block = |byte: u64| to_usize((byte - index.byte()) / BLOCK_SIZE);
        let chunk = self.cache.get(source.owner, index);
        let runs = match chunk.try_lock() {
            Some(state) if state.loaded => state.entry.runs(block(bytes.0), block(bytes.1)),
            _ => return false,
        };
        for run in runs {
            let from = to_usize(index.byte() + run.start as u64 * BLOCK_SIZE - offset);
            let len = run.len * to_usize(BLOCK_SIZE);
            let Some(address) = run.address else {
                found.holes.push(from..from + len);
                continue;
            };
            let Some(file) = self.segments.opened(address.segment()).and_then(|segment| segment.direct()) else {
                return false;
            };
            match found.extents.last_mut() {
                Some(last)
                    if Arc::ptr_eq(&last.file, &file)
                        && last.from + last.len == from
                        && last.offset + last.len as u64 == address.byte() =>
                {
                    last.len += len;
                }
                _ => found.extents.push(Extent { file, offset: address.byte(), from, len }),
            }
        }
        true
    }
}
