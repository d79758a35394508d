//! Resizes leave a trace in the block map: the extent files at the old and at the new end of the disk get another length,
//! so they must get another time, also where nothing is written.
//!
//! The time of an extent file follows from the newest row of its chunks. A touch stores the entry of one chunk of the
//! extent again, unchanged, as a row of the current epoch.
//!
//! # Rules
//! 1. The rows are durable before the size is. A crash between the two leaves an extent with a newer time than it needs,
//!    never one of another length with the same time.
//! 2. Touch and resize fall into one epoch: the caller keeps others from ending it, or looks and touches again.
//! 3. An end between two extents needs no touch: no file changes there. A disk that had no snapshot yet needs none either.
//!
//! # Why not a field of the disk
//! The length of an extent that was the last one once may have changed many resizes ago, and the snapshots between may be
//! gone. The map remembers per chunk, and its rows live as long as any state needs them.

use super::Store;
use super::head::Head;
use super::rows::Key;
use crate::error::Result;
use crate::units::{ChunkIndex, Epoch};

/// What a touch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// The epoch that has the rows.
    pub epoch: Epoch,
    /// Whether there is something to flush before the resize.
    pub unsaved: bool,
}

impl Store {
    /// Touches the extents whose length changes when the size of a disk changes from `old` to `new`.
    ///
    /// # Errors
    /// `NotFound` when the disk was removed, `ReadOnly`, `Corrupt` when rows are damaged.
    pub fn touch_ends(&self, head: &Head, old: u64, new: u64) -> Result<Touched> {
        self.ledger.writable()?;
        let _gate = head.gate.read();
        let line = head.line();
        let mut touched = Touched { epoch: line.epoch, unsaved: false };
        let (fresh, extent) = {
            let tables = self.tables.read();
            let row = tables.disk(head.id)?;
            (row.base.is_none(), row.settings.extent_size)
        };
        for end in [old, new].into_iter().filter(|end| !fresh && !end.is_multiple_of(extent)) {
            let index = ChunkIndex::of_byte(end - 1);
            if self.ledger.get(&Key::map(line.branch, index, line.epoch))?.is_some() {
                continue;
            }
            let chunk = self.chunk(&line.source(), index)?;
            let mut state = chunk.lock();
            head.begin_change(&line, index, &mut state);
            state.marked = true;
            touched.unsaved = true;
        }
        Ok(touched)
    }
}
