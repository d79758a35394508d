//! Reading a record: checked whole when it is opened, then walked in the order of chunks.

use std::ops::Range;

use uuid::Uuid;

use super::sets::SlotSet;
use super::slabs::{self, SlabRun};
use super::{DirectoryEntry, ENTRY_LEN, HEADER_LEN, Header, RecordIdentity, record_path};
use crate::codec::{Reader, unseal};
use crate::error::{Error, Kind, Result};
use crate::map::Piece;
use crate::media::{File, Media, Open};
use crate::store::Store;
use crate::units::{BlockAddress, CHUNK_BLOCKS, ChunkIndex, SLOT_BITS, SegmentId, to_usize};

/// The addresses in one segment.
#[derive(Debug)]
struct Part {
    segment: SegmentId,
    nonce: u64,
    set: SlotSet,
}

/// Consecutive slabs of one segment.
#[derive(Debug, Clone, Copy)]
struct Placed {
    part: u32,
    run: SlabRun,
}

/// A record, in memory.
#[derive(Debug)]
pub struct Record {
    /// What it is of.
    pub identity: RecordIdentity,
    parts: Vec<Part>,
    /// By first chunk.
    runs: Vec<Placed>,
    /// For each run where it and those before it end, at most: so that a walk finds those that reach into it.
    ends: Vec<u32>,
}

impl Record {
    /// Opens the record of a snapshot of the pool.
    ///
    /// # Errors
    /// `NotFound` when the file is missing, `Corrupt`, any error of the host.
    pub fn open(media: &dyn Media, snapshot: Uuid) -> Result<Self> {
        let path = record_path(snapshot);
        let hint = "if you have a copy of the record, bring it back with `afterimage record import FILE`";
        let file = media.open(&path, Open::ReadOnly).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::not_found(format!("the record {path} is missing")).hint(hint),
            _ => Error::io(format!("cannot open {path}"), e),
        })?;
        let record = Self::read(&path, &*file).map_err(|e| if e.kind() == Kind::Corrupt { e.hint(hint) } else { e })?;
        if record.identity.row.state.uuid != snapshot {
            return Err(Error::corrupt(format!("{path} is the record of another snapshot")).hint(hint));
        }
        Ok(record)
    }

    /// Reads a record and checks all of it.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` for a newer version, any error of the host.
    pub fn read(what: &str, file: &dyn File) -> Result<Self> {
        let fail = |e| Error::io(format!("cannot read {what}"), e);
        let length = file.len().map_err(fail)?;
        let get = |at: u64, len: u64| -> Result<Vec<u8>> {
            if at.checked_add(len).is_none_or(|end| end > length) {
                return Err(Error::corrupt(format!("{what} is cut off")));
            }
            let mut bytes = vec![0; to_usize(len)];
            file.read_exact_at(&mut bytes, at).map_err(fail)?;
            Ok(bytes)
        };
        let header = Header::decode(what, &get(0, HEADER_LEN as u64)?, length)?;
        let identity = RecordIdentity::decode(what, &get(HEADER_LEN as u64, u64::from(header.identity))?)?;
        let directory = get(header.directory, header.directory_len)?;
        let entries = unseal(what, &directory)?;
        let mut record = Self { identity, parts: Vec::new(), runs: Vec::new(), ends: Vec::new() };
        let mut blocks = 0;
        for bytes in entries.chunks_exact(ENTRY_LEN) {
            let entry = DirectoryEntry::decode(&mut Reader::new(what, bytes))?;
            record.add_part(what, &entry, &get)?;
            blocks += entry.blocks;
        }
        if blocks != record.identity.row.state.referenced {
            return Err(Error::corrupt(format!("{what} has {blocks} blocks and says that it has another number")));
        }
        record.runs.sort_unstable_by_key(|placed| (placed.run.chunk, placed.part, placed.run.slab));
        let mut end = 0;
        let ends = record.runs.iter().map(|placed| {
            end = end.max(placed.run.chunk + placed.run.len);
            end
        });
        record.ends = ends.collect();
        Ok(record)
    }

    fn add_part(
        &mut self,
        what: &str,
        entry: &DirectoryEntry,
        get: &dyn Fn(u64, u64) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let segment = SegmentId(entry.segment);
        let grows = self.parts.last().is_none_or(|last| last.segment < segment);
        if !grows || segment.0 == 0 || segment > SegmentId::MAX {
            return Err(Error::corrupt(format!("{what} has segments that do not grow")));
        }
        let bytes = get(entry.slabs.0, entry.slabs.1)?;
        let mut from = Reader::new(what, unseal(what, &bytes)?);
        let runs = slabs::decode(&mut from, entry.slab_count)?;
        from.end()?;
        let mut set = get(entry.set.0, entry.set.1)?;
        set.truncate(unseal(what, &set)?.len());
        let set = SlotSet::open(what, set)?;
        let mut inside = 0;
        for run in &runs {
            let slots = u64::from(run.slab) * CHUNK_BLOCKS..u64::from(run.slab + run.len) * CHUNK_BLOCKS;
            inside += set.count_between(slots);
        }
        if set.len != entry.blocks || inside != set.len {
            return Err(Error::corrupt(format!("{what} has addresses that are in no slab")));
        }
        let part = u32::try_from(self.parts.len()).expect("segments are counted in a directory");
        self.runs.extend(runs.into_iter().map(|run| Placed { part, run }));
        self.parts.push(Part { segment, nonce: entry.nonce, set });
        Ok(())
    }

    /// Fails unless the pool can believe the record: it is of this pool's own past, and its segments are the ones it knows.
    ///
    /// # Errors
    /// `Failed` with the reason.
    pub fn require_trust(&self, store: &Store) -> Result<()> {
        let state = &self.identity.row.state;
        let name = format!("{}@{}", self.identity.disk_name, state.name);
        let refuse = |why: &str| {
            Err(Error::failed(format!("the retired snapshot '{name}' cannot be a base: {why}"))
                .hint("take the next backup without it, in full"))
        };
        if self.identity.pool != store.uuid() {
            return refuse("its record is of another pool");
        }
        let tables = store.tables.read();
        if !tables.remembers(self.identity.moment, state.snapshot) {
            return refuse("it was taken in a copy of this pool, or before the pool was taken back to an earlier day");
        }
        for part in &self.parts {
            // A segment that is gone has no address any more that could be taken for another.
            if tables.segment(part.segment).is_ok_and(|row| row.nonce != part.nonce) {
                return refuse(&format!("segment {} is another one today", part.segment));
            }
        }
        Ok(())
    }

    /// Walks over the chunks that have blocks.
    #[must_use]
    pub fn walk(&self) -> RecordWalk<'_> {
        self.walk_between(0..u32::MAX)
    }

    /// As [`Record::walk`], of the chunks with these numbers only.
    #[must_use]
    pub fn walk_between(&self, chunks: Range<u32>) -> RecordWalk<'_> {
        let first = self.ends.partition_point(|end| *end <= chunks.start);
        let waiting = first.max(self.runs.partition_point(|placed| placed.run.chunk < chunks.start));
        let mut active = Vec::new();
        for placed in &self.runs[first..waiting] {
            let mut placed = *placed;
            let gone = (chunks.start - placed.run.chunk).min(placed.run.len);
            placed.run.slab += gone;
            placed.run.chunk += gone;
            placed.run.len -= gone;
            if placed.run.len > 0 {
                active.push(placed);
            }
        }
        RecordWalk { record: self, waiting, active, next: chunks.start, end: chunks.end, pieces: Vec::new() }
    }
}

/// A walk over a record in the order of chunks.
#[derive(Debug)]
pub struct RecordWalk<'a> {
    record: &'a Record,
    waiting: usize,
    /// Runs that have `next`.
    active: Vec<Placed>,
    next: u32,
    end: u32,
    pieces: Vec<Piece>,
}

impl RecordWalk<'_> {
    /// Returns the pieces of one chunk, in growing order of base; chunks are picked in growing order.
    pub fn pick(&mut self, chunk: ChunkIndex) -> &[Piece] {
        self.pieces.clear();
        let runs = &self.record.runs;
        while let Some(placed) = runs.get(self.waiting).filter(|placed| placed.run.chunk <= chunk.0) {
            self.active.push(*placed);
            self.waiting += 1;
        }
        self.active.retain(|placed| placed.run.chunk + placed.run.len > chunk.0);
        for placed in &self.active {
            let part = &self.record.parts[placed.part as usize];
            let slot = (placed.run.slab + chunk.0 - placed.run.chunk) << CHUNK_BLOCKS.trailing_zeros();
            let set = part.set.window(slot);
            if !set.is_empty() {
                self.pieces.push(Piece { base: BlockAddress::new(part.segment, slot), set });
            }
        }
        self.sorted()
    }

    /// Returns the next chunk with its pieces, in growing order of base.
    pub fn step(&mut self) -> Option<(ChunkIndex, &[Piece])> {
        self.pieces.clear();
        let runs = &self.record.runs;
        while self.pieces.is_empty() {
            if self.active.is_empty() {
                self.next = runs.get(self.waiting)?.run.chunk;
            }
            if self.next >= self.end {
                return None;
            }
            while let Some(placed) = runs.get(self.waiting).filter(|placed| placed.run.chunk == self.next) {
                self.active.push(*placed);
                self.waiting += 1;
            }
            for placed in &mut self.active {
                let part = &self.record.parts[placed.part as usize];
                let slot = placed.run.slab << CHUNK_BLOCKS.trailing_zeros();
                let set = part.set.window(slot);
                if !set.is_empty() {
                    self.pieces.push(Piece { base: BlockAddress::new(part.segment, slot), set });
                }
                placed.run.slab += 1;
                placed.run.chunk += 1;
                placed.run.len -= 1;
            }
            self.active.retain(|placed| placed.run.len > 0);
            self.next += 1;
        }
        let chunk = ChunkIndex(self.next - 1);
        Some((chunk, self.sorted()))
    }

    fn sorted(&mut self) -> &[Piece] {
        if self.pieces.len() > 1 {
            self.pieces.sort_unstable_by_key(|piece| piece.base);
        }
        &self.pieces
    }
}

const _: () = assert!(CHUNK_BLOCKS.is_power_of_two() && SLOT_BITS < 32);
