//! Unmapping: discard, write-zeroes and shrink all come down to taking blocks out of entries.
//!
//! # Rules
//! 1. Only chunks that have something mapped are visited: discarding 64 TiB of an empty disk costs nothing.
//! 2. Memory is bounded: when many chunks are changed, they are flushed on the way.
//! 3. A shrink commits one row (size and `trim`); blocks beyond the size are unmapped after it, and before any regrow.

use super::Store;
use super::head::{Head, Line};
use super::tables::Edit;
use super::unflushed::MapChange;
use super::view::Source;
use crate::error::Result;
use crate::map::{BlockSet, ChunkGuard, Piece};
use crate::units::{BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, DISK_SIZE_MAX};

/// Changed chunks at which a long unmapping flushes.
const FLUSH_AT: usize = 8192;

impl Line {
    /// Returns what to read of the live disk.
    #[must_use]
    pub fn source(&self) -> Source {
        Source { owner: self.owner, branch: self.branch, upto: crate::units::Epoch(u64::MAX), size: self.size }
    }
}

/// Remembers what an entry that [`Head::begin_change`] saved has lost, as far as it was never stored: no flush would see it
/// missing.
pub(super) fn note_dropped(state: &mut ChunkGuard<'_>, gone: Vec<Piece>) {
    let saved = state.saved.clone().expect("begin_change saved it");
    for mut piece in gone {
        for known in saved.pieces().iter().filter(|known| known.base == piece.base) {
            piece.set = piece.set.minus(&known.set);
        }
        if !piece.set.is_empty() {
            state.dropped.push(piece);
        }
    }
}

impl Store {
    /// Unmaps the whole blocks of `from..upto` (block-aligned bytes) of a live disk.
    ///
    /// # Errors
    /// `ReadOnly` when the pool refuses writes; `Corrupt` when rows are damaged.
    pub fn unmap(&self, head: &Head, from: u64, upto: u64) -> Result<()> {
        self.unmap_range(head, from, upto, false)
    }

    /// Unmaps the whole blocks of a live disk from its end up to `upto`. Where the disk grows meanwhile, its new blocks
    /// are left alone.
    ///
    /// # Errors
    /// As [`Store::unmap`].
    pub fn unmap_beyond(&self, head: &Head, upto: u64) -> Result<()> {
        self.unmap_range(head, head.line().size.next_multiple_of(BLOCK_SIZE), upto, true)
    }

    fn unmap_range(&self, head: &Head, from: u64, upto: u64, beyond: bool) -> Result<()> {
        assert!(from.is_multiple_of(BLOCK_SIZE) && upto.is_multiple_of(BLOCK_SIZE), "whole blocks are unmapped");
        let mut at = from;
        while at < upto {
            self.ledger.writable()?;
            {
                let _gate = head.gate.read();
                let line = head.line();
                if beyond {
                    // The size does not change under the gate, and what lies below it may have been written since.
                    at = at.max(line.size.next_multiple_of(BLOCK_SIZE));
                }
                if at >= upto {
                    break;
                }
                let Some(next) = self.next_chunk(&line.source(), Some(head), ChunkIndex::of_byte(at))? else { break };
                let start = at.max(next.byte());
                let end = upto.min(next.byte() + CHUNK_SIZE);
                if start >= upto {
                    break;
                }
                let block = |byte: u64| ((byte - next.byte()) / BLOCK_SIZE) as usize;
                self.unmap_chunk(head, &line, next, &BlockSet::range(block(start), block(end)))?;
                head.changed();
                at = next.byte() + CHUNK_SIZE;
            }
            if head.dirty_chunks() >= FLUSH_AT || head.unflushed.must_flush() {
                self.flush(head)?;
            }
            if at >= DISK_SIZE_MAX {
                break;
            }
        }
        Ok(())
    }

    fn unmap_chunk(&self, head: &Head, line: &Line, index: ChunkIndex, set: &BlockSet) -> Result<()> {
        let chunk = self.chunk(&line.source(), index)?;
        let mut state = chunk.lock();
        state.wait_idle(set);
        if !state.entry.mapped().meets(set) {
            return Ok(());
        }
        head.begin_change(line, index, &mut state);
        let gone = state.entry.remove(set);
        let count: i64 = gone.iter().map(|piece| i64::from(piece.set.count())).sum();
        head.count(-count);
        note_dropped(&mut state, gone);
        let gone = *set;
        head.write_down(|| MapChange::Unmapped { branch: line.branch, epoch: line.epoch, chunk: index, set: gone });
        Ok(())
    }

    /// Unmaps what lies beyond the size of one disk that was shrunk. Returns false when there is none.
    ///
    /// # Errors
    /// As [`Store::unmap`].
    pub fn trim_one(&self) -> Result<bool> {
        let shrunk: Vec<_> = self.tables.read().disks().filter(|(_, row)| row.trim).map(|(id, _)| id).collect();
        for id in shrunk {
            let head = self.head(id)?;
            let end = head.line().size.next_multiple_of(BLOCK_SIZE);
            let all = Source { size: DISK_SIZE_MAX, ..head.line().source() };
            let aligned = head.line().size == end;
            if aligned || self.next_data(&all, Some(&head), end)?.is_some() {
                self.trim(&head)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Unmaps what lies beyond the size of a disk, durably.
    ///
    /// # Errors
    /// As [`Store::unmap`].
    pub fn trim(&self, head: &Head) -> Result<()> {
        let size = head.line().size;
        self.unmap_beyond(head, DISK_SIZE_MAX)?;
        self.flush(head)?;
        let ticket = {
            let mut tables = self.tables.write();
            let mut edit = Edit::new(&mut tables);
            // Shrunk once more meanwhile: there is more to do.
            // And of a last block that is cut by the end, the rest is zeroed when the disk grows.
            edit.change_disk(head.id, |row| {
                row.trim = row.trim && (row.size < size || !row.size.is_multiple_of(BLOCK_SIZE));
            })?;
            self.ledger.submit(edit.finish())?
        };
        self.ledger.wait(ticket)
    }
}
