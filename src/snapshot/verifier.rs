//! What the blocks of a snapshot must be: their checksums, from the seals of the epochs that wrote them. Whoever hands the
//! data of a snapshot to a backup compares with them: streams, increment directories, the files of exports in the mount.
//!
//! The records of a seal lie in the order of the disk, and so do the questions, mostly. So every seal that matters is walked
//! from front to back, a record at a time, beside the data. A question that goes back begins at a mark before it.
//!
//! # Rules
//! 1. A seal is looked into when the first block of its segment is asked for. At most [`OPEN_MAX`] are open; the others keep
//!    their place.
//! 2. A block without a seal is not verified. A seal that is damaged is logged and counts as none: `scrub` reports it.
//! 3. A block that is not what was sealed is an error that names it, and reads of it fail from then on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::SnapshotDevice;
use crate::codec::crc32;
use crate::disk::BlockDevice;
use crate::error::{Error, Result};
use crate::map::{BlockSet, Run};
use crate::store::seal_file::{SealFile, SealPosition, SealReader, SealedSlab};
use crate::store::{StateKey, Store};
use crate::sync::Mutex;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_SIZE, ChunkIndex, Epoch, SegmentId, to_usize};

/// Seals open at a time.
const OPEN_MAX: usize = 256;
/// Chunks between two marks of a seal: 512 KiB of it are walked at most for a question that goes back.
const MARK_EVERY: u32 = 256;
/// Snapshots whose checksums are asked for at a time by the readers of a mount.
const READ_MAX: usize = 8;

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
    /// It could not be read on, so it counts as none.
    damaged: bool,
    /// The chunk that was asked for last.
    last: Option<ChunkIndex>,
    /// Places that were passed, in order.
    marks: Vec<(ChunkIndex, SealPosition)>,
    used: u64,
}

impl Cursor {
    fn new(epoch: Epoch) -> Self {
        let (reader, position, next, last, marks) = (None, None, None, None, Vec::new());
        Self { epoch, reader, position, next, ended: false, damaged: false, last, marks, used: 0 }
    }

    /// Goes back so far that the records of a chunk are still to come; returns whether it closed its file for that.
    fn go_back(&mut self, chunk: ChunkIndex) -> bool {
        let before = self.marks.partition_point(|(mark, _)| *mark <= chunk);
        self.position = before.checked_sub(1).map(|n| self.marks[n].1);
        (self.next, self.ended) = (None, false);
        match (&mut self.reader, self.position) {
            (Some(reader), Some(position)) => reader.go_to(position),
            (reader, _) => return reader.take().is_some(),
        }
        false
    }
}

/// The checksums of one snapshot, asked for in the order of the disk at best.
#[derive(Debug)]
pub struct Verifier {
    store: Arc<Store>,
    seals: BTreeMap<SegmentId, Vec<Cursor>>,
    open: usize,
    turn: u64,
    chunk: Option<ChunkIndex>,
    /// Segments whose records of the chunk are in `known`.
    loaded: HashSet<SegmentId>,
    known: HashMap<BlockAddress, (BlockSet, Vec<u32>)>,
}

impl Verifier {
    /// Finds the seals of epochs up to `epoch`.
    ///
    /// # Errors
    /// When the host does not list them.
    pub fn new(store: &Arc<Store>, epoch: Epoch) -> Result<Self> {
        let mut seals: BTreeMap<SegmentId, Vec<Cursor>> = BTreeMap::new();
        for (segment, sealed) in store.seals_on_disk()?.into_iter().filter(|(_, sealed)| *sealed <= epoch) {
            seals.entry(segment).or_default().push(Cursor::new(sealed));
        }
        let (loaded, known) = (HashSet::new(), HashMap::new());
        Ok(Self { store: Arc::clone(store), seals, open: 0, turn: 0, chunk: None, loaded, known })
    }

    /// Returns the checksums of the blocks of some runs of a chunk, in order; `None` where no seal has one.
    ///
    /// # Errors
    /// Any error of the host; a seal that is damaged counts as none.
    pub fn checksums(&mut self, chunk: ChunkIndex, runs: &[Run]) -> Result<Vec<Option<u32>>> {
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
        let mut failed = None;
        for cursor in &mut cursors {
            if cursor.last.replace(chunk).is_some_and(|last| chunk <= last) && cursor.go_back(chunk) {
                self.open -= 1;
            }
            if cursor.damaged || cursor.ended || cursor.next.is_some_and(|next| next > chunk) {
                continue;
            }
            self.turn += 1;
            cursor.used = self.turn;
            if let Err(error) = self.walk(segment, cursor, chunk) {
                if error.lacks_descriptors() {
                    // Nothing is wrong with the seal: it is asked again, and goes back then.
                    self.loaded.remove(&segment);
                    failed = Some(error);
                    break;
                }
                tracing::warn!("a seal cannot be used, what it covers is not verified: {error}");
                (cursor.ended, cursor.damaged) = (true, true);
            }
            if cursor.ended && cursor.reader.take().is_some() {
                self.open -= 1;
            }
        }
        self.seals.insert(segment, cursors);
        self.close_some();
        failed.map_or(Ok(()), Err)
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
                    if cursor.marks.last().is_none_or(|(mark, _)| at.0 >= mark.0 + MARK_EVERY) {
                        cursor.marks.push((at, before));
                    }
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

impl Verifier {
    /// Compares what was read of a chunk from its byte `within` on, which lies in `runs`, with its checksums. Of a block
    /// that was read in part the whole is read again. Returns the bytes of data that no seal covers.
    ///
    /// # Errors
    /// `Corrupt` with the bytes of the disk when a block is not what was sealed; any error of the host.
    pub fn compare(&mut self, chunk: ChunkIndex, runs: &[Run], bytes: &[u8], within: u64) -> Result<u64> {
        let checksums = self.checksums(chunk, runs)?;
        let blocks = runs.iter().flat_map(|run| (run.start..run.start + run.len).map(move |index| (run, index)));
        let mut unknown = 0;
        for ((run, index), checksum) in blocks.zip(checksums) {
            let Some(first) = run.address else { continue };
            let Some(checksum) = checksum else {
                unknown += BLOCK_SIZE;
                continue;
            };
            let at = index as u64 * BLOCK_SIZE;
            let inside = at.checked_sub(within).map(to_usize);
            let found = match inside.and_then(|from| bytes.get(from..from + to_usize(BLOCK_SIZE))) {
                Some(block) => crc32(block),
                None => {
                    let mut block = [0; to_usize(BLOCK_SIZE)];
                    let one = Run { start: index, len: 1, address: Some(first.slab().at(index)) };
                    self.store.read_run(&one, &mut block, 0)?;
                    crc32(&block)
                }
            };
            if found != checksum {
                self.store.mark_bad(first.slab().at(index));
                let why = Error::corrupt("the block does not match the checksum it was sealed with")
                    .hint("`afterimage scrub` lists all damaged blocks; restore the disk, or overwrite the block");
                return Err(self.store.name_bytes(why, run, chunk, (at, at + BLOCK_SIZE)));
            }
        }
        Ok(unknown)
    }
}

/// Reads a snapshot and compares all that is read with its seals.
#[derive(Debug)]
pub struct VerifiedReader<'a> {
    device: &'a SnapshotDevice,
    verifier: Verifier,
    /// Bytes of data that no seal covers.
    pub unverified: u64,
}

impl<'a> VerifiedReader<'a> {
    /// Reads `device`.
    ///
    /// # Errors
    /// As [`Verifier::new`].
    pub fn new(device: &'a SnapshotDevice) -> Result<Self> {
        Ok(Self { device, verifier: Verifier::new(device.store(), device.epoch())?, unverified: 0 })
    }

    /// Reads any range inside the size.
    ///
    /// # Errors
    /// As [`BlockDevice::read`]; `Corrupt` for a block that is not what was sealed.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read(buf, offset)?;
        let (mut at, mut rest) = (offset, &*buf);
        while !rest.is_empty() {
            let (chunk, within) = (ChunkIndex::of_byte(at), at % CHUNK_SIZE);
            let (now, later) = rest.split_at(rest.len().min(to_usize(CHUNK_SIZE - within)));
            let end = within + now.len() as u64;
            let runs = self.device.runs(chunk, to_usize(within / BLOCK_SIZE), to_usize(end.div_ceil(BLOCK_SIZE)))?;
            let name = |error| self.device.store().name_snapshot(error, self.device.id());
            self.unverified += self.verifier.compare(chunk, &runs, now, within).map_err(name)?;
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }
}

/// The verifiers of the snapshots that the readers of a mount read now.
#[derive(Debug, Default)]
pub struct Verifiers {
    /// The one that was used last is last.
    known: Mutex<Vec<Shared>>,
}

#[derive(Debug)]
struct Shared {
    key: StateKey,
    /// Whether everything was sealed when the seals were listed.
    sealed: bool,
    verifier: Arc<Mutex<Verifier>>,
}

impl Verifiers {
    /// Returns the verifier of a snapshot that is held.
    ///
    /// # Errors
    /// As [`Verifier::new`].
    pub fn of(&self, store: &Arc<Store>, key: StateKey) -> Result<Arc<Mutex<Verifier>>> {
        let sealed = store.tables.read().state(key).is_some_and(|row| row.sealed);
        let mut known = self.known.lock();
        let found = known.iter().position(|shared| shared.key == key).map(|at| known.remove(at));
        let shared = match found.filter(|shared| shared.sealed == sealed) {
            Some(shared) => shared,
            None => {
                let verifier = Arc::new(Mutex::new(Verifier::new(store, key.1)?));
                Shared { key, sealed, verifier }
            }
        };
        let verifier = Arc::clone(&shared.verifier);
        if known.len() >= READ_MAX {
            known.remove(0);
        }
        known.push(shared);
        Ok(verifier)
    }
}
