//! All rows as of one instant. They stay as they are while others go on.
//!
//! # Rules
//! 1. What is in memory holds over what the catalog has; a row that memory deletes is not there.
//! 2. The view of the catalog is kept for as long as this lives, and with it pages that folds would use again: nobody
//!    keeps one for longer than a piece of work takes.

use std::iter::Peekable;
use std::sync::Arc;

use imbl::ordmap::RangedIter;
use imbl::shared_ptr::DefaultSharedPtr;
use roaring::RoaringBitmap;

use super::catalog::{Stored, StoredValue, View};
use super::ledger::Layer;
use super::rows::{Key, KeyParts, decode_set};
use super::tree::Stretch;
use crate::error::{Error, Result};
use crate::units::ChunkIndex;

/// All rows as of one instant.
#[derive(Debug)]
pub struct Frozen {
    /// The layers that have any rows, newest first.
    memory: Vec<Layer>,
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

type LayerRows<'a> = Peekable<RangedIter<'a, Key, Option<Arc<[u8]>>, DefaultSharedPtr>>;

/// Rows in order, one after the other.
pub struct Rows<'a> {
    /// Newest first.
    memory: Vec<LayerRows<'a>>,
    stored: Stored,
    next: Option<(Key, StoredValue)>,
}

impl std::fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rows").field("layers", &self.memory.len()).field("next", &self.next).finish_non_exhaustive()
    }
}

impl<'a> Rows<'a> {
    /// Returns the next row.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn step(&mut self) -> Result<Option<(Key, Value<'a>)>> {
        loop {
            let top = self.memory.iter_mut().filter_map(|layer| layer.peek().map(|(key, _)| **key)).min();
            let below = self.next.as_ref().map(|row| row.0);
            let Some(top) = top.filter(|top| below.is_none_or(|below| *top <= below)) else {
                if self.next.is_none() {
                    return Ok(None);
                }
                let ahead = self.stored.step()?;
                let row = std::mem::replace(&mut self.next, ahead);
                return Ok(row.map(|(key, value)| (key, Value::Stored(value))));
            };
            if below == Some(top) {
                self.next = self.stored.step()?;
            }
            let mut newest = None;
            for layer in &mut self.memory {
                let here = layer.next_if(|(key, _)| **key == top);
                newest = newest.or(here);
            }
            if let Some((key, Some(value))) = newest {
                return Ok(Some((*key, Value::Memory(value))));
            }
        }
    }
}

impl Frozen {
    pub(super) fn new(memory: Vec<Layer>, view: Arc<View>) -> Self {
        Self { memory, view }
    }

    /// Tells the host that so many rows are about to be read.
    pub fn expect(&self, rows: u64) {
        self.view.expect(rows);
    }

    /// Returns the rows from `low` to `high`, both included.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn rows(&self, low: &Key, high: &Key) -> Result<Rows<'_>> {
        let mut stored = self.view.walk(low, high)?;
        let next = stored.step()?;
        let layers = if low <= high { &self.memory[..] } else { &[] };
        let memory = layers.iter().map(|layer| layer.range(*low..=*high).peekable()).collect();
        Ok(Rows { memory, stored, next })
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
    pub fn last_in(&self, low: &Key, high: &Key) -> Result<Option<(Key, Value<'_>)>> {
        if low > high {
            return Ok(None);
        }
        let mut high = *high;
        loop {
            // Of equal keys the newest layer wins: it comes first.
            let tops = self.memory.iter().filter_map(|layer| layer.range(*low..=high).next_back());
            let top = tops.reduce(|best, here| if here.0 > best.0 { here } else { best });
            let below = self.view.last_in(low, &high)?;
            match (top, below) {
                (None, below) => return Ok(below.map(|(key, value)| (key, Value::Stored(value)))),
                (Some((key, _)), Some((stored, value))) if stored > *key => {
                    return Ok(Some((stored, Value::Stored(value))));
                }
                (Some((key, Some(value))), _) => return Ok(Some((*key, Value::Memory(value)))),
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
    pub fn indexed_chunks(&self, stretches: &[Stretch]) -> Result<RoaringBitmap> {
        let mut chunks = RoaringBitmap::new();
        for stretch in stretches {
            let low = Key::index(stretch.branch, stretch.after.next(), 0);
            let high = Key::index(stretch.branch, stretch.upto, u32::MAX);
            let mut rows = self.rows(&low, &high)?;
            while let Some((key, value)) = rows.step()? {
                enter_chunks(&key, value.bytes(), &mut |chunk| {
                    chunks.insert(chunk.0);
                })?;
            }
        }
        Ok(chunks)
    }
}

/// Calls `enter` for the chunks that an index row names.
pub(super) fn enter_chunks(key: &Key, value: &[u8], enter: &mut dyn FnMut(ChunkIndex)) -> Result<()> {
    let KeyParts::Index(_, _, group) = key.parts()? else {
        return Err(Error::corrupt("an index key of the catalog is damaged"));
    };
    let first = u64::from(group) * u64::from(super::commit::CHUNKS_PER_GROUP);
    for index in decode_set(value)?.iter() {
        let chunk = u32::try_from(first + index as u64)
            .map_err(|_| Error::corrupt("an index row names a chunk beyond the largest disk"))?;
        enter(ChunkIndex(chunk));
    }
    Ok(())
}
