//! The block map of one state from chunk to chunk, as of one instant: for diffs, records, and the times of extent files.
//!
//! # Rules
//! 1. For each chunk the newest entry holds that is not younger than the state, in its branch, else in the branches
//!    below. Unsaved entries of a live disk hold over all of them.
//! 2. Rows are read once, in order. A chunk with very many versions is skipped over with a look-up, so that the number
//!    of snapshots does not matter.

use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;
use std::sync::Arc;

use super::frozen::{Frozen, Rows, Value};
use super::rows::{Key, KeyParts, checked_chunk, decode_entry};
use super::tables::{StateKey, Tables};
use super::{Head, Line, Store};
use crate::error::{Error, Result};
use crate::map::Entry;
use crate::units::{BranchId, ChunkIndex, Epoch};

/// Entries that no row has yet, with the epoch that changes them.
pub type Unsaved = BTreeMap<ChunkIndex, (Epoch, Entry)>;

/// Versions of a chunk that are read one by one.
const VERSIONS_MAX: usize = 16;

/// The map of a state as of one instant.
#[derive(Debug, Clone)]
pub struct MapView {
    frozen: Arc<Frozen>,
    /// Branches with the newest epoch to see in each.
    path: Vec<StateKey>,
    /// Entries that no row has yet, with the epoch that changes them.
    unsaved: Arc<Unsaved>,
}

/// The entry that holds for a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// The epoch that last changed it.
    pub epoch: Epoch,
    /// Its addresses; none when the chunk was unmapped.
    pub entry: Entry,
}

impl MapView {
    /// Makes the view of an ended epoch.
    #[must_use]
    pub fn of_state(frozen: Arc<Frozen>, tables: &Tables, state: StateKey) -> Self {
        Self { frozen, path: tables.lookup_path(state.0, state.1), unsaved: Arc::default() }
    }

    /// Returns the rows behind the view.
    #[must_use]
    pub fn frozen(&self) -> &Arc<Frozen> {
        &self.frozen
    }

    /// Returns the chunks whose entries no row has yet.
    pub fn unsaved_chunks(&self) -> impl Iterator<Item = ChunkIndex> + '_ {
        self.unsaved.keys().copied()
    }

    /// Finds the entry of one chunk.
    ///
    /// # Errors
    /// `Corrupt` when the row is damaged; any error of reading the catalog.
    pub fn entry(&self, chunk: ChunkIndex) -> Result<Entry> {
        if let Some((_, entry)) = self.unsaved.get(&chunk) {
            return Ok(entry.clone());
        }
        for (branch, upto) in &self.path {
            let (low, high) = (Key::map(*branch, chunk, Epoch(0)), Key::map(*branch, chunk, *upto));
            if let Some((_, value)) = self.frozen.last_in(&low, &high)? {
                return decode_entry(value.bytes());
            }
        }
        Ok(Entry::EMPTY)
    }

    /// Walks over the chunks that have entries, from `from` on. Tombstones are among them.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn walk(&self, from: ChunkIndex) -> Result<MapWalk<'_>> {
        self.walk_between(from, ChunkIndex(u32::MAX))
    }

    /// As [`MapView::walk`], of the chunks below `end` only.
    ///
    /// # Errors
    /// As [`MapView::walk`].
    pub fn walk_between(&self, from: ChunkIndex, end: ChunkIndex) -> Result<MapWalk<'_>> {
        let frozen = &*self.frozen;
        let mut cursors = Vec::with_capacity(self.path.len());
        for (branch, upto) in &self.path {
            let mut cursor = Cursor { frozen, branch: *branch, upto: *upto, end, rows: None, next: None };
            cursor.seek(from)?;
            cursors.push(cursor);
        }
        Ok(MapWalk { cursors, unsaved: self.unsaved.range(from..end.max(from)).peekable() })
    }

    /// Returns the epoch that last changed anything in the chunks `first..last`; `None` when nothing ever did.
    ///
    /// # Errors
    /// As [`MapView::walk`].
    pub fn touched(&self, first: ChunkIndex, last: ChunkIndex) -> Result<Option<Epoch>> {
        let mut walk = self.walk(first)?;
        let mut newest = None;
        while let Some(found) = walk.step()?.filter(|found| found.chunk < last) {
            newest = newest.max(Some(found.epoch));
        }
        Ok(newest)
    }
}

/// A walk over the entries of a state.
pub struct MapWalk<'a> {
    cursors: Vec<Cursor<'a>>,
    unsaved: Peekable<btree_map::Range<'a, ChunkIndex, (Epoch, Entry)>>,
}

impl std::fmt::Debug for MapWalk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MapWalk").field("branches", &self.cursors.len()).finish_non_exhaustive()
    }
}

impl MapWalk<'_> {
    /// Returns the next chunk that has an entry.
    ///
    /// # Errors
    /// `Corrupt` when a row is damaged; any error of reading the catalog.
    pub fn step(&mut self) -> Result<Option<Found>> {
        loop {
            let stored = self.cursors.iter().filter_map(|cursor| cursor.next.as_ref().map(|row| row.chunk)).min();
            let unsaved = self.unsaved.peek().map(|(chunk, _)| **chunk);
            let Some(chunk) = stored.into_iter().chain(unsaved).min() else { return Ok(None) };
            let mut found = None;
            for cursor in &mut self.cursors {
                let here = cursor.take(chunk)?;
                found = found.or(here);
            }
            if let Some((_, (epoch, entry))) = self.unsaved.next_if(|(at, _)| **at == chunk) {
                return Ok(Some(Found { chunk, epoch: *epoch, entry: entry.clone() }));
            }
            if let Some((epoch, value)) = found {
                return Ok(Some(Found { chunk, epoch, entry: decode_entry(value.bytes())? }));
            }
        }
    }
}

/// A row of the map, read and not used yet.
struct Version<'a> {
    chunk: ChunkIndex,
    epoch: Epoch,
    value: Value<'a>,
}

/// The rows of one branch.
struct Cursor<'a> {
    frozen: &'a Frozen,
    branch: BranchId,
    upto: Epoch,
    /// Where it ends.
    end: ChunkIndex,
    rows: Option<Rows<'a>>,
    next: Option<Version<'a>>,
}

impl<'a> Cursor<'a> {
    fn seek(&mut self, chunk: ChunkIndex) -> Result<()> {
        (self.rows, self.next) = (None, None);
        if chunk >= self.end {
            return Ok(());
        }
        let low = Key::map(self.branch, chunk, Epoch(0));
        self.rows = Some(self.frozen.rows(&low, &Key::map(self.branch, self.end, Epoch(0)))?);
        self.advance()
    }

    fn advance(&mut self) -> Result<()> {
        self.next = match self.rows.as_mut().map(Rows::step).transpose()?.flatten() {
            None => None,
            Some((key, value)) => {
                let KeyParts::Map(_, chunk, epoch) = key.parts()? else {
                    return Err(Error::corrupt("a map key of the catalog is damaged"));
                };
                (chunk < self.end).then_some(Version { chunk: checked_chunk(chunk)?, epoch, value })
            }
        };
        Ok(())
    }

    /// Goes beyond a chunk, and returns the version of it that holds.
    fn take(&mut self, chunk: ChunkIndex) -> Result<Option<(Epoch, Value<'a>)>> {
        let mut holds = None;
        let mut versions = 0;
        while let Some(version) = self.next.take_if(|version| version.chunk == chunk) {
            versions += 1;
            if version.epoch <= self.upto {
                holds = Some((version.epoch, version.value));
            }
            if versions < VERSIONS_MAX {
                self.advance()?;
                continue;
            }
            let (low, high) = (Key::map(self.branch, chunk, Epoch(0)), Key::map(self.branch, chunk, self.upto));
            if let Some((key, value)) = self.frozen.last_in(&low, &high)?
                && let KeyParts::Map(_, _, epoch) = key.parts()?
            {
                holds = Some((epoch, value));
            }
            self.seek(ChunkIndex(chunk.0 + 1))?;
        }
        Ok(holds)
    }
}

impl Store {
    /// Returns the map of an ended epoch as of now.
    pub fn map_of(&self, state: StateKey) -> MapView {
        let tables = self.tables.read();
        MapView::of_state(Arc::new(self.ledger.frozen()), &tables, state)
    }

    /// Fixes the entries that a live disk has and no row shows. The caller holds its order, and keeps it until the rows
    /// are frozen: so nothing that is copied here gets a row in between. Returns them with the line of that instant.
    ///
    /// # Errors
    /// `NotFound` when the disk was removed.
    pub fn unsaved_of(&self, head: &Head) -> Result<(Line, Unsaved)> {
        let _gate = head.gate.write();
        head.refuse_gone()?;
        let line = head.line();
        let mut unsaved = BTreeMap::new();
        let mut from = ChunkIndex(0);
        while let Some(chunk) = head.first_unsaved(from) {
            let cached = self.cache.peek(line.owner, chunk).expect("changed chunks stay cached");
            unsaved.insert(chunk, (line.epoch, cached.lock().entry.clone()));
            from = ChunkIndex(chunk.0 + 1);
        }
        Ok((line, unsaved))
    }
}

impl MapView {
    /// Makes the view of a live disk from what [`Store::unsaved_of`] has fixed.
    #[must_use]
    pub fn of_head(frozen: Arc<Frozen>, tables: &Tables, node: StateKey, unsaved: Unsaved) -> Self {
        Self { unsaved: Arc::new(unsaved), ..Self::of_state(frozen, tables, node) }
    }
}
