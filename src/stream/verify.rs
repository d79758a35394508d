//! What the blocks of a snapshot must be: their checksums, from the seals of the epochs that wrote them.
//!
//! The records of a seal lie in the order of the disk, and so do the questions. So every seal that matters is walked once
//! from front to back, a record at a time, beside the stream.
//!
//! # Rules
//! 1. A seal is looked into when the first block of its segment is asked for. At most [`OPEN_MAX`] are open; the others keep
//!    their place.
//! 2. A block without a seal is not verified. A seal that is damaged is logged and counts as none: `scrub` reports it.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::{Error, Result};
use crate::map::{BlockSet, Run};
use crate::store::Store;
use crate::store::seal_file::{SealFile, SealPosition, SealReader, SealedSlab};
use crate::units::{BlockAddress, ChunkIndex, Epoch, SegmentId};

/// Seals open at a time.
const OPEN_MAX: usize = 256;

#[derive(Debug)]
struct Cursor {
    epoch: Epoch,
    /// The file, if it is open.
    reader: Option<SealReader>,
    /// Where it goes on.
    position: Option<SealPosition>,
    /// Chunk of the next record, as far as it is known.
    next: Option<ChunkIndex>,
    ended: bool,
    used: u64,
}

/// The checksums of one snapshot, asked for in the order of the disk.
#[derive(Debug)]
pub(super) struct Verifier<'a> {
    store: &'a Store,
    seals: BTreeMap<SegmentId, Vec<Cursor>>,
    open: usize,
    turn: u64,
    chunk: Option<ChunkIndex>,
    /// Segments whose records of the chunk are in `known`.
    loaded: HashSet<SegmentId>,
    known: HashMap<BlockAddress, (BlockSet, Vec<u32>)>,
}

impl<'a> Verifier<'a> {
    /// Finds the seals of epochs up to `epoch`.
    pub(super) fn new(store: &'a Store, epoch: Epoch) -> Result<Self> {
        let mut seals: BTreeMap<SegmentId, Vec<Cursor>> = BTreeMap::new();
        for (segment, sealed) in store.seals_on_disk()?.into_iter().filter(|(_, sealed)| *sealed <= epoch) {
            let cursor = Cursor { epoch: sealed, reader: None, position: None, next: None, ended: false, used: 0 };
            seals.entry(segment).or_default().push(cursor);
        }
        let (loaded, known) = (HashSet::new(), HashMap::new());
        Ok(Self { store, seals, open: 0, turn: 0, chunk: None, loaded, known })
    }

    /// Returns the checksums of the blocks of some runs of a chunk, in order; chunks are asked for in order.
    pub(super) fn checksums(&mut self, chunk: ChunkIndex, runs: &[Run]) -> Result<Vec<Option<u32>>> {
        if self.chunk != Some(chunk) {
            self.chunk = Some(chunk);
            self.loaded.clear();
            self.known.clear();
        }
        let mut out = Vec::new();
        for run in runs {
            let Some(first) = run.address else {
                out.resize(out.len() + run.len, None);
                continue;
            };
            if self.loaded.insert(first.segment()) {
                self.load(first.segment(), chunk)?;
            }
            let slab = self.known.get(&first.slab());
            let blocks = run.start..run.start + run.len;
            let Some((set, crcs)) = slab else {
                out.extend(blocks.map(|_| None));
                continue;
            };
            let mut known = crcs.iter().skip(set.and(&BlockSet::range(0, run.start)).count() as usize);
            out.extend(blocks.map(|index| if set.has(index) { known.next().copied() } else { None }));
        }
        Ok(out)
    }

    /// Takes in the records of one segment for a chunk.
    fn load(&mut self, segment: SegmentId, chunk: ChunkIndex) -> Result<()> {
        let Some(mut cursors) = self.seals.remove(&segment) else { return Ok(()) };
        for cursor in &mut cursors {
            if cursor.ended || cursor.next.is_some_and(|next| next > chunk) {
                continue;
            }
            self.turn += 1;
            cursor.used = self.turn;
            if let Err(error) = self.walk(segment, cursor, chunk) {
                tracing::warn!("a seal cannot be used, what it covers is sent unverified: {error}");
                cursor.ended = true;
            }
            if cursor.ended && cursor.reader.take().is_some() {
                self.open -= 1;
            }
        }
        self.seals.insert(segment, cursors);
        self.close_some();
        Ok(())
    }

    /// Walks a seal up to the end of its records for a chunk.
    fn walk(&mut self, segment: SegmentId, cursor: &mut Cursor, chunk: ChunkIndex) -> Result<()> {
        if cursor.reader.is_none() {
            cursor.reader = Some(self.open(segment, cursor)?);
            self.open += 1;
        }
        let reader = cursor.reader.as_mut().expect("opened above");
        loop {
            let before = reader.place();
            match reader.next().transpose()? {
                Some(SealedSlab::Written { base, chunk: at, set, crcs }) => {
                    cursor.next = Some(at);
                    if at > chunk {
                        reader.go_to(before);
                        cursor.position = Some(before);
                        return Ok(());
                    }
                    if at == chunk {
                        self.known.insert(base, (set, crcs));
                    }
                }
                // What was unmapped stands behind all that was written.
                Some(SealedSlab::Unmapped { .. }) | None => {
                    cursor.ended = true;
                    return Ok(());
                }
            }
        }
    }

    fn open(&self, segment: SegmentId, cursor: &Cursor) -> Result<SealReader> {
        let (header, mut reader) = SealFile::open(&**self.store.media(), segment, cursor.epoch)?;
        let nonce = self.store.tables.read().segment(segment)?.nonce;
        if header.pool != self.store.uuid() || header.nonce != nonce {
            return Err(Error::corrupt(format!("the seal of segment {segment} belongs to another one")));
        }
        if let Some(position) = cursor.position {
            reader.go_to(position);
        }
        Ok(reader)
    }

    /// Closes the seals that were not used for longest.
    fn close_some(&mut self) {
        while self.open > OPEN_MAX {
            let open = self.seals.values_mut().flatten().filter(|cursor| cursor.reader.is_some());
            let Some(oldest) = open.min_by_key(|cursor| cursor.used) else { return };
            oldest.reader = None;
            self.open -= 1;
        }
    }
}
