//! Reading a record: checked whole when it is opened, then walked in the order of chunks.
//!
//! # Rules
//! 1. What is in memory is bounded, whatever the size of the disk: sets of addresses up to a limit, and beyond it they are
//!    read from the file where they are asked for; runs of slabs up to a limit, and beyond it those of one band of chunks
//!    after the other, which are read again from the file.
//! 2. The limits lie far above what a record of a few TiB takes, so that the diff of such a disk reads nothing twice.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::sets::SlotSet;
use super::slabs::{self, SlabRun};
use super::{DirectoryEntry, ENTRY_LEN, HEADER_LEN, Header, RecordIdentity, record_path};
use crate::codec::{Reader, unseal};
use crate::error::{Error, Kind, Result};
use crate::map::Piece;
use crate::media::{File, Media, Open};
use crate::store::Store;
use crate::sync::Mutex;
use crate::units::{BlockAddress, CHUNK_BLOCKS, ChunkIndex, SLOT_BITS, SegmentId, to_usize};

/// How much of a record is kept in memory.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Bytes of sets of addresses.
    pub sets: u64,
    /// Runs of slabs, of 20 bytes each; of two bands, if there are several.
    pub runs: usize,
}

impl Default for Memory {
    fn default() -> Self {
        Self { sets: 128 << 20, runs: 4 << 20 }
    }
}

/// The addresses in one segment.
#[derive(Debug)]
struct Part {
    segment: SegmentId,
    nonce: u64,
    set: SlotSet,
    /// Where its table of slabs is, and how many there are.
    slabs: (u64, u64),
    slab_count: u32,
}

/// Consecutive slabs of one segment.
#[derive(Debug, Clone, Copy)]
struct Placed {
    part: u32,
    run: SlabRun,
}

/// The runs of slabs that have some chunks.
#[derive(Debug, Default)]
struct Band {
    chunks: Range<u32>,
    /// By first chunk.
    runs: Vec<Placed>,
    /// For each run where it and those before it end, at most: so that a walk finds those that reach into it.
    ends: Vec<u32>,
}

impl Band {
    /// Takes what of a run lies in the band.
    fn add(&mut self, part: u32, run: &SlabRun) {
        let (first, end) = (run.chunk.max(self.chunks.start), (run.chunk + run.len).min(self.chunks.end));
        if first < end {
            let run = SlabRun { slab: run.slab + (first - run.chunk), chunk: first, len: end - first };
            self.runs.push(Placed { part, run });
        }
    }

    fn sort(&mut self) {
        self.runs.sort_unstable_by_key(|placed| (placed.run.chunk, placed.part, placed.run.slab));
        let mut end = 0;
        let ends = self.runs.iter().map(|placed| {
            end = end.max(placed.run.chunk + placed.run.len);
            end
        });
        self.ends = ends.collect();
    }

    /// Returns the first run that begins at a chunk or behind it, and those before it that reach it, from there on.
    fn begin(&self, chunk: u32) -> (usize, Vec<Placed>) {
        let first = self.ends.partition_point(|end| *end <= chunk);
        let waiting = first.max(self.runs.partition_point(|placed| placed.run.chunk < chunk));
        let mut active = Vec::new();
        for placed in &self.runs[first..waiting] {
            let mut placed = *placed;
            let gone = (chunk - placed.run.chunk).min(placed.run.len);
            placed.run.slab += gone;
            placed.run.chunk += gone;
            placed.run.len -= gone;
            if placed.run.len > 0 {
                active.push(placed);
            }
        }
        (waiting, active)
    }
}

/// A record that was checked.
#[derive(Debug)]
pub struct Record {
    /// What it is of.
    pub identity: RecordIdentity,
    what: String,
    file: Arc<dyn File>,
    parts: Vec<Part>,
    /// Chunks of a band.
    band: u32,
    /// The last chunk that has a slab.
    last: u32,
    /// The bands that were needed last: all there is, or two of many.
    bands: Mutex<VecDeque<Arc<Band>>>,
}

impl Record {
    /// Opens the record of a snapshot of the pool.
    ///
    /// # Errors
    /// `NotFound` when the file is missing, `Corrupt`, any error of the host.
    pub fn open(media: &dyn Media, snapshot: Uuid) -> Result<Self> {
        Self::open_within(media, snapshot, Memory::default())
    }

    /// As [`Record::open`], with other limits.
    ///
    /// # Errors
    /// As [`Record::open`].
    pub fn open_within(media: &dyn Media, snapshot: Uuid, memory: Memory) -> Result<Self> {
        let (path, file) = find(media, snapshot)?;
        let record = Self::read_within(&path, &file, memory).map_err(hinted)?;
        if record.identity.row.state.uuid == snapshot { Ok(record) } else { Err(record.foreign()) }
    }

    /// Looks at the beginning of the record of a snapshot: whether it is there, of the right length, and of that snapshot.
    ///
    /// # Errors
    /// As [`Record::open`].
    pub fn glance(media: &dyn Media, snapshot: Uuid) -> Result<()> {
        let (path, file) = find(media, snapshot)?;
        let (_, identity) = begin(&path, &*file).map_err(hinted)?;
        if identity.row.state.uuid == snapshot { Ok(()) } else { Err(of_another(&path)) }
    }

    /// Says that this is not the record that was looked for.
    pub fn foreign(&self) -> Error {
        of_another(&self.what)
    }

    /// Reads a record and checks all of it.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` for a newer version, any error of the host.
    pub fn read(what: &str, file: &Arc<dyn File>) -> Result<Self> {
        Self::read_within(what, file, Memory::default())
    }

    /// As [`Record::read`], with other limits.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn read_within(what: &str, file: &Arc<dyn File>, memory: Memory) -> Result<Self> {
        let (header, identity) = begin(what, &**file)?;
        let directory = get(what, &**file, (header.directory, header.directory_len))?;
        let entries = unseal(what, &directory)?.chunks_exact(ENTRY_LEN);
        let entries =
            entries.map(|bytes| DirectoryEntry::decode(&mut Reader::new(what, bytes))).collect::<Result<Vec<_>>>()?;
        let sets = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.set.1));
        let mut record = Self {
            identity,
            what: what.to_owned(),
            file: Arc::clone(file),
            parts: Vec::new(),
            band: u32::MAX,
            last: 0,
            bands: Mutex::default(),
        };
        let (mut blocks, mut count) = (0, 0);
        let mut all = Band { chunks: 0..u32::MAX, ..Band::default() };
        for entry in &entries {
            let runs = record.add_part(entry, sets > memory.sets)?;
            blocks += entry.blocks;
            count += runs.len();
            record.last = runs.iter().map(|run| run.chunk + run.len - 1).max().unwrap_or(0).max(record.last);
            let part = u32::try_from(record.parts.len() - 1).expect("segments are counted in a directory");
            if count > memory.runs {
                all.runs = Vec::new();
            } else {
                runs.iter().for_each(|run| all.add(part, run));
            }
        }
        if blocks != record.identity.row.state.referenced {
            return Err(Error::corrupt(format!("{what} has {blocks} blocks and says that it has another number")));
        }
        if count > memory.runs {
            let bands = u32::try_from(count.div_ceil(memory.runs.max(1))).unwrap_or(u32::MAX);
            record.band = (record.last + 1).div_ceil(bands);
        } else {
            all.sort();
            record.bands.lock().push_back(Arc::new(all));
        }
        Ok(record)
    }

    /// Checks the addresses in one segment; returns its runs of slabs.
    fn add_part(&mut self, entry: &DirectoryEntry, leave: bool) -> Result<Vec<SlabRun>> {
        let what = self.what.as_str();
        let segment = SegmentId(entry.segment);
        let grows = self.parts.last().is_none_or(|last| last.segment < segment);
        if !grows || segment.0 == 0 || segment > SegmentId::MAX {
            return Err(Error::corrupt(format!("{what} has segments that do not grow")));
        }
        let runs = self.slabs(entry.slabs, entry.slab_count)?;
        let mut set = get(what, &*self.file, entry.set)?;
        set.truncate(unseal(what, &set)?.len());
        let mut set = SlotSet::open(what, set)?;
        let mut inside = 0;
        for run in &runs {
            let slots = u64::from(run.slab) * CHUNK_BLOCKS..u64::from(run.slab + run.len) * CHUNK_BLOCKS;
            inside += set.count_between(slots)?;
        }
        if set.len != entry.blocks || inside != set.len {
            return Err(Error::corrupt(format!("{what} has addresses that are in no slab")));
        }
        if leave {
            set.leave_in(&self.file, entry.set.0);
        }
        let (nonce, slabs, slab_count) = (entry.nonce, entry.slabs, entry.slab_count);
        self.parts.push(Part { segment, nonce, set, slabs, slab_count });
        Ok(runs)
    }

    /// Reads a table of slabs.
    fn slabs(&self, place: (u64, u64), count: u32) -> Result<Vec<SlabRun>> {
        let bytes = get(&self.what, &*self.file, place)?;
        let mut from = Reader::new(&self.what, unseal(&self.what, &bytes)?);
        let runs = slabs::decode(&mut from, count)?;
        from.end()?;
        Ok(runs)
    }

    /// Returns the band that a chunk is in, reading it if need be.
    fn band_of(&self, chunk: u32) -> Result<Arc<Band>> {
        let mut bands = self.bands.lock();
        if let Some(band) = bands.iter().find(|band| band.chunks.contains(&chunk)) {
            return Ok(Arc::clone(band));
        }
        let start = chunk / self.band * self.band;
        let end = start.checked_add(self.band).filter(|end| *end <= self.last).unwrap_or(u32::MAX);
        let mut band = Band { chunks: start..end, ..Band::default() };
        let parts = if start > self.last { &[] } else { &self.parts[..] };
        for (n, part) in (0..).zip(parts) {
            self.slabs(part.slabs, part.slab_count)?.iter().for_each(|run| band.add(n, run));
        }
        band.sort();
        let band = Arc::new(band);
        bands.truncate(BANDS - 1);
        bands.push_front(Arc::clone(&band));
        Ok(band)
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
    ///
    /// # Errors
    /// As [`RecordWalk::step`].
    pub fn walk(&self) -> Result<RecordWalk<'_>> {
        self.walk_between(0..u32::MAX)
    }

    /// As [`Record::walk`], of the chunks with these numbers only.
    ///
    /// # Errors
    /// As [`RecordWalk::step`].
    pub fn walk_between(&self, chunks: Range<u32>) -> Result<RecordWalk<'_>> {
        let band = self.band_of(chunks.start)?;
        let (waiting, active) = band.begin(chunks.start);
        Ok(RecordWalk { record: self, band, waiting, active, next: chunks.start, end: chunks.end, pieces: Vec::new() })
    }
}

/// Opens the file of a record.
fn find(media: &dyn Media, snapshot: Uuid) -> Result<(String, Arc<dyn File>)> {
    let path = record_path(snapshot);
    match media.open(&path, Open::ReadOnly) {
        Ok(file) => Ok((path, file)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::not_found(format!("the record {path} is missing")).hint(HINT))
        }
        Err(e) => Err(Error::io(format!("cannot open {path}"), e)),
    }
}

/// Reads header and identity.
fn begin(what: &str, file: &dyn File) -> Result<(Header, RecordIdentity)> {
    let length = file.len().map_err(|e| Error::io(format!("cannot read {what}"), e))?;
    let header = Header::decode(what, &get(what, file, (0, HEADER_LEN as u64))?, length)?;
    let identity = get(what, file, (HEADER_LEN as u64, u64::from(header.identity)))?;
    Ok((header, RecordIdentity::decode(what, &identity)?))
}

const HINT: &str = "if you have a copy of the record, bring it back with `afterimage record import FILE`";

fn hinted(error: Error) -> Error {
    if error.kind() == Kind::Corrupt { error.hint(HINT) } else { error }
}

fn of_another(path: &str) -> Error {
    Error::corrupt(format!("{path} is the record of another snapshot")).hint(HINT)
}

/// Bands in memory at most: those who compare in parallel are at most in two.
const BANDS: usize = 2;

/// Reads a part of the file: first byte, and how many.
fn get(what: &str, file: &dyn File, (at, len): (u64, u64)) -> Result<Vec<u8>> {
    let fail = |e| Error::io(format!("cannot read {what}"), e);
    if at.checked_add(len).is_none_or(|end| file.len().is_ok_and(|length| end > length)) {
        return Err(Error::corrupt(format!("{what} is cut off")));
    }
    let mut bytes = vec![0; to_usize(len)];
    file.read_exact_at(&mut bytes, at).map_err(fail)?;
    Ok(bytes)
}

/// A walk over a record in the order of chunks.
#[derive(Debug)]
pub struct RecordWalk<'a> {
    record: &'a Record,
    band: Arc<Band>,
    waiting: usize,
    /// Runs that have `next`.
    active: Vec<Placed>,
    next: u32,
    end: u32,
    pieces: Vec<Piece>,
}

impl RecordWalk<'_> {
    /// Goes on in the band of a chunk.
    fn enter(&mut self, chunk: u32) -> Result<()> {
        self.band = self.record.band_of(chunk)?;
        (self.waiting, self.active) = self.band.begin(chunk);
        self.next = chunk;
        Ok(())
    }

    /// Returns the pieces of one chunk, in growing order of base; chunks are picked in growing order.
    ///
    /// # Errors
    /// As [`RecordWalk::step`].
    pub fn pick(&mut self, chunk: ChunkIndex) -> Result<&[Piece]> {
        self.pieces.clear();
        if !self.band.chunks.contains(&chunk.0) {
            self.enter(chunk.0)?;
        }
        let runs = &self.band.runs;
        while let Some(placed) = runs.get(self.waiting).filter(|placed| placed.run.chunk <= chunk.0) {
            self.active.push(*placed);
            self.waiting += 1;
        }
        self.active.retain(|placed| placed.run.chunk + placed.run.len > chunk.0);
        for placed in &self.active {
            let part = &self.record.parts[placed.part as usize];
            let slot = (placed.run.slab + chunk.0 - placed.run.chunk) << CHUNK_BLOCKS.trailing_zeros();
            let set = part.set.window(slot)?;
            if !set.is_empty() {
                self.pieces.push(Piece { base: BlockAddress::new(part.segment, slot), set });
            }
        }
        Ok(self.sorted())
    }

    /// Returns the next chunk with its pieces, in growing order of base.
    ///
    /// # Errors
    /// Any error of reading what of a large record is not in memory.
    pub fn step(&mut self) -> Result<Option<(ChunkIndex, &[Piece])>> {
        self.pieces.clear();
        while self.pieces.is_empty() {
            if self.active.is_empty() {
                let next = self.band.runs.get(self.waiting);
                self.next = next.map_or(self.band.chunks.end, |placed| placed.run.chunk);
            }
            if self.next >= self.end {
                return Ok(None);
            }
            if self.next >= self.band.chunks.end {
                self.enter(self.next)?;
                continue;
            }
            let runs = &self.band.runs;
            while let Some(placed) = runs.get(self.waiting).filter(|placed| placed.run.chunk == self.next) {
                self.active.push(*placed);
                self.waiting += 1;
            }
            for placed in &mut self.active {
                let part = &self.record.parts[placed.part as usize];
                let slot = placed.run.slab << CHUNK_BLOCKS.trailing_zeros();
                let set = part.set.window(slot)?;
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
        Ok(Some((chunk, self.sorted())))
    }

    fn sorted(&mut self) -> &[Piece] {
        if self.pieces.len() > 1 {
            self.pieces.sort_unstable_by_key(|piece| piece.base);
        }
        &self.pieces
    }
}

const _: () = assert!(CHUNK_BLOCKS.is_power_of_two() && SLOT_BITS < 32);
