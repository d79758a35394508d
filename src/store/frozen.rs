//! All rows as of one instant. They stay as they are while others go on.
//!
//! # Rules
//! 1. What is in memory holds over what the catalog has; a row that memory deletes is not there.
//! 2. The view of the catalog is kept for as long as this lives, and with it pages that folds would use again: nobody
//!    keeps one for longer than a piece of work takes.

use std::collections::{BTreeSet, btree_map};
use std::iter::Peekable;
use std::sync::Arc;

use super::catalog::{Stored, StoredValue, View};
use super::ledger::Layer;
use super::rows::{Key, KeyParts, decode_set};
use super::tree::Stretch;
use crate::error::{Error, Result};
use crate::units::ChunkIndex;

/// All rows as of one instant.
#[derive(Debug)]
pub struct Frozen {
    memory: Layer,
    view: Arc<View>,
}

/// A value, wherever it is.
#[derive(Debug)]
pub enum Value<'a> {
    /// Not folded yet.
    Memory(&'a [u8]),
    /// In the catalog.
    Stored(StoredValue),
}

impl Value<'_> {
    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Stored(value) => value.bytes(),
        }
    }
}

/// Rows in order, one after the other.
#[derive(Debug)]
pub struct Rows<'a> {
    memory: Peekable<btree_map::Range<'a, Key, Option<Arc<[u8]>>>>,
    stored: Stored,
    next: Option<(Key, StoredValue)>,
}

impl<'a> Rows<'a> {
    /// Returns the next row.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn step(&mut self) -> Result<Option<(Key, Value<'a>)>> {
        loop {
            let top = self.memory.peek().map(|(key, _)| **key);
            let below = self.next.as_ref().map(|row| row.0);
            match (top, below) {
                (None, None) => return Ok(None),
                (Some(top), below) if below.is_none_or(|below| top <= below) => {
                    if below == Some(top) {
                        self.next = self.stored.step()?;
                    }
                    if let Some((key, Some(value))) = self.memory.next() {
                        return Ok(Some((*key, Value::Memory(value))));
                    }
                }
                _ => {
                    let ahead = self.stored.step()?;
                    let row = std::mem::replace(&mut self.next, ahead);
                    return Ok(row.map(|(key, value)| (key, Value::Stored(value))));
                }
            }
        }
    }
}

impl Frozen {
    pub(super) fn new(memory: Layer, view: Arc<View>) -> Self {
        Self { memory, view }
    }

    /// Returns the rows from `low` to `high`, both included.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn rows(&self, low: &Key, high: &Key) -> Result<Rows<'_>> {
        let mut stored = self.view.walk(low, high)?;
        let next = stored.step()?;
        let memory = if low <= high { self.memory.range(*low..=*high) } else { btree_map::Range::default() };
        Ok(Rows { memory: memory.peekable(), stored, next })
    }

    /// Calls `each` for every row from `low` to `high`, in order.
    ///
    /// # Errors
    /// When the catalog cannot be read, or what `each` returns.
    pub fn scan(&self, low: &Key, high: &Key, each: &mut dyn FnMut(Key, Vec<u8>) -> Result<()>) -> Result<()> {
        let mut rows = self.rows(low, high)?;
        while let Some((key, value)) = rows.step()? {
            each(key, value.bytes().to_vec())?;
        }
        Ok(())
    }

    /// Returns the last row from `low` to `high`, both included.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn last_in(&self, low: &Key, high: &Key) -> Result<Option<(Key, Vec<u8>)>> {
        if low > high {
            return Ok(None);
        }
        let mut high = *high;
        loop {
            let top = self.memory.range(*low..=high).next_back();
            let below = self.view.last_in(low, &high)?;
            match (top, below) {
                (None, below) => return Ok(below),
                (Some((key, _)), Some((stored, value))) if stored > *key => return Ok(Some((stored, value))),
                (Some((key, Some(value))), _) => return Ok(Some((*key, value.to_vec()))),
                // Deleted in memory: look below it.
                (Some((key, None)), _) => match key.before() {
                    Some(lower) if lower >= *low => high = lower,
                    _ => return Ok(None),
                },
            }
        }
    }

    /// Returns the chunks that have rows in the stretches, by the index.
    ///
    /// # Errors
    /// `Corrupt` when an index row is damaged.
    pub fn indexed_chunks(&self, stretches: &[Stretch]) -> Result<BTreeSet<ChunkIndex>> {
        let mut chunks = BTreeSet::new();
        for stretch in stretches {
            let low = Key::index(stretch.branch, stretch.after.next(), 0);
            let high = Key::index(stretch.branch, stretch.upto, u32::MAX);
            self.scan(&low, &high, &mut |key, value| enter_chunks(&key, &value, &mut chunks))?;
        }
        Ok(chunks)
    }
}

/// Adds the chunks that an index row names.
pub(super) fn enter_chunks(key: &Key, value: &[u8], chunks: &mut BTreeSet<ChunkIndex>) -> Result<()> {
    let KeyParts::Index(_, _, group) = key.parts()? else {
        return Err(Error::corrupt("an index key of the catalog is damaged"));
    };
    let first = u64::from(group) * u64::from(super::commit::CHUNKS_PER_GROUP);
    for index in decode_set(value)?.iter() {
        let chunk = u32::try_from(first + index as u64)
            .map_err(|_| Error::corrupt("an index row names a chunk beyond the largest disk"))?;
        chunks.insert(ChunkIndex(chunk));
    }
    Ok(())
}
