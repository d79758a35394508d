//! Segment files: sparse, append-only in addresses, at most 512 of them open, or fewer where the host allows few files.
//!
//! # Rules
//! 1. Slots 0..512 are the header's; the first slab has base 512.
//! 2. A header is checked whenever the file is opened: pool, id and nonce must be the ones the catalog has.
//! 3. A segment with writes that no sync has covered stays open (its `Arc` is held by the list of dirty segments).
//! 4. A file that was missing when the pool was opened counts as lost until the next opening, also when it is put back: what
//!    the journal has for it is brought into it only then.
//! 5. When the host has no descriptor, segments that nobody uses are closed, those first that were not used longest, and
//!    it is tried again. When there are none either, that request fails, and nothing else does.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use uuid::Uuid;

use super::SEGMENTS_DIR;
use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result, lacks_descriptors};
use crate::media::{File, Media, Open};
use crate::sync::{Mutex, RwLock};
use crate::sys::process;
use crate::units::{BLOCK_SIZE, BlockAddress, CHUNK_SIZE, DiskId, SegmentId};

/// First eight bytes of a segment; a non-ASCII byte, and CR LF against text transfers.
const MAGIC: [u8; 8] = *b"\x89AFTSG\r\n";
const VERSION: u32 = 1;
/// Bytes of the header that are used, checksum included.
const HEADER_LEN: usize = 64;
const OPEN_MAX: usize = 512;
/// Segments that are closed at a time when the host has no more descriptors: each has two.
const CLOSED_AT_ONCE: usize = 4;

/// Path of a segment below the pool.
#[must_use]
pub fn segment_path(id: SegmentId) -> String {
    format!("{}/{}.seg", segment_dir(id), id.0)
}

/// Directory of a segment: the last two hex digits of its id.
#[must_use]
pub fn segment_dir(id: SegmentId) -> String {
    format!("{SEGMENTS_DIR}/{:02x}", id.0 & 0xff)
}

/// What the first 64 bytes of a segment say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The pool it belongs to.
    pub pool: Uuid,
    /// Its id.
    pub id: SegmentId,
    /// Random; tells this segment from one of the same id in a rolled-back copy of the pool.
    pub nonce: u64,
    /// The disk whose slabs it holds.
    pub disk: DiskId,
}

impl SegmentHeader {
    /// Returns the 64 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).u32(0).raw(self.pool.as_bytes());
        out.u64(self.id.0).u64(self.nonce).u64(self.disk.0).u32(0);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), HEADER_LEN, "the header has a fixed length");
        bytes
    }

    /// Takes the 64 bytes apart.
    ///
    /// # Errors
    /// `Corrupt` when they are no header, `Unsupported` for a newer version.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like a segment"));
        }
        let version = from.u32()?;
        if version > VERSION {
            return Err(Error::unsupported(format!("{what} has version {version}, newer than this program")));
        }
        let body = unseal(what, bytes)?;
        let mut from = Reader::new(what, &body[12..]);
        if from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        let pool = Uuid::from_slice(from.raw(16)?).expect("16 bytes");
        let header = Self { pool, id: SegmentId(from.u64()?), nonce: from.u64()?, disk: DiskId(from.u64()?) };
        if from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        from.end()?;
        Ok(header)
    }
}

/// An open segment.
#[derive(Debug)]
pub struct Segment {
    id: SegmentId,
    file: Arc<dyn File>,
    dirty: AtomicBool,
    /// Last use, for closing the one that was not needed longest.
    used: AtomicU64,
}

impl Segment {
    /// Returns the id.
    #[must_use]
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Reads blocks from `address` on, plus `skip` bytes into the first.
    ///
    /// # Errors
    /// `Corrupt` when the file ends before the blocks do: a mapped block is always inside its segment.
    pub fn read(&self, buf: &mut [u8], address: BlockAddress, skip: u64) -> Result<()> {
        assert_eq!(address.segment(), self.id, "an address is read from its own segment");
        let offset = address.byte() + skip;
        let got =
            self.file.read_at(buf, offset).map_err(|e| Error::io(format!("cannot read segment {}", self.id), e))?;
        if got < buf.len() {
            return Err(Error::corrupt(format!(
                "segment {} ends at byte {}, before a block that is mapped at byte {offset}",
                self.id,
                offset + got as u64
            ))
            .hint("run `afterimage check` to see what is affected"));
        }
        Ok(())
    }

    /// Writes whole blocks at `address`, and remembers that a sync is owed. `cached` leaves the data in the page cache:
    /// right for what is logged and synced much later.
    ///
    /// # Errors
    /// Any error of the host; what was written is undefined then.
    pub fn write(&self, data: &[u8], address: BlockAddress, cached: bool) -> Result<()> {
        assert_eq!(address.segment(), self.id, "an address is written in its own segment");
        assert!((data.len() as u64).is_multiple_of(BLOCK_SIZE), "segments are written in whole blocks");
        let result = if cached {
            self.file.write_cached_at(data, address.byte())
        } else {
            self.file.write_at(data, address.byte())
        };
        // Also after an error: part of the data may be in the page cache.
        self.wrote();
        result.map_err(|e| Error::io(format!("cannot write segment {}", self.id), e))
    }

    /// Remembers that a sync is owed, after a write through [`Self::direct`].
    pub fn wrote(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Returns the host file, see [`File::direct`].
    #[must_use]
    pub fn direct(&self) -> Option<Arc<std::fs::File>> {
        self.file.direct()
    }

    /// Makes every write that returned before durable.
    ///
    /// # Errors
    /// Any error of the host. The caller must stop writing to the pool then: what was lost is unknown.
    pub fn sync(&self) -> Result<()> {
        // Cleared first: a write that comes during the sync owes another one.
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync().map_err(|e| Error::io(format!("cannot sync segment {}", self.id), e))
    }

    /// Makes punches durable. Writes that are owed a sync stay owed.
    ///
    /// # Errors
    /// As [`Segment::sync`].
    pub fn sync_punches(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::io(format!("cannot sync segment {}", self.id), e))
    }

    /// Frees the blocks; they read as zeros after.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn punch(&self, address: BlockAddress, blocks: u64) -> Result<()> {
        let what = || format!("cannot punch {blocks} blocks at {address}");
        self.file.punch(address.byte(), blocks * BLOCK_SIZE).map_err(|e| Error::io(what(), e))
    }

    /// Returns the first extent of data at or after a byte.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.file.next_data(offset).map_err(|e| Error::io(format!("cannot walk segment {}", self.id), e))
    }

    /// Returns the bytes allocated on the host.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn allocated(&self) -> Result<u64> {
        self.file.allocated().map_err(|e| Error::io(format!("cannot stat segment {}", self.id), e))
    }

    /// Returns the length of the file.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn len(&self) -> Result<u64> {
        self.file.len().map_err(|e| Error::io(format!("cannot stat segment {}", self.id), e))
    }

    /// Tells whether the file has no bytes, which a segment never has.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// The open segments of a pool.
#[derive(Debug)]
pub struct Segments {
    media: Arc<dyn Media>,
    pool: Uuid,
    open: Mutex<HashMap<SegmentId, Arc<Segment>>>,
    lost: RwLock<BTreeSet<SegmentId>>,
    clock: AtomicU64,
    open_max: usize,
}

impl Segments {
    /// Makes the empty table.
    #[must_use]
    pub fn new(media: Arc<dyn Media>, pool: Uuid) -> Self {
        let open_max = OPEN_MAX.min(process::share_of_open_files(4) / 2).max(1);
        Self { media, pool, open: Mutex::default(), lost: RwLock::default(), clock: AtomicU64::new(0), open_max }
    }

    /// Makes a segment, durable with its directory entry when this returns.
    ///
    /// # Errors
    /// Any error of the host; `Exists` if a file of that id is there, which must not happen.
    pub fn create(&self, id: SegmentId, nonce: u64, disk: DiskId) -> Result<Arc<Segment>> {
        let what = |e| Error::io(format!("cannot make segment {id}"), e);
        let dir = segment_dir(id);
        match self.media.make_dir(&dir) {
            Ok(()) => self.with_descriptor(|| self.media.sync_dir(SEGMENTS_DIR)).map_err(what)?,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(what(e)),
        }
        let path = segment_path(id);
        let made = self.with_descriptor(|| {
            let made = self.media.open_direct(&path, Open::New);
            if made.as_ref().is_err_and(lacks_descriptors) {
                // There was one for the file and none for direct I/O: it is in the way of the next try, and of nothing else.
                self.media.remove(&path).ok();
            }
            made
        });
        let file = made.map_err(what)?;
        file.will_be_overwritten();
        let header = SegmentHeader { pool: self.pool, id, nonce, disk };
        file.write_at(&header.encode(), 0).map_err(what)?;
        file.set_len(CHUNK_SIZE).map_err(what)?;
        file.sync().map_err(what)?;
        if let Err(error) = self.with_descriptor(|| self.media.sync_dir(&dir)) {
            // No row names the file. What is left of it the next opening removes.
            self.media.remove(&path).ok();
            return Err(what(error));
        }
        let segment = Arc::new(Segment { id, file, dirty: AtomicBool::new(false), used: self.tick() });
        self.insert(&segment);
        Ok(segment)
    }

    /// Does what needs a descriptor; closes segments that nobody uses as long as there is none.
    fn with_descriptor<T>(&self, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
        loop {
            match open() {
                Err(error) if lacks_descriptors(&error) && self.close_idle() => {
                    tracing::debug!("segments were closed, for the host has no more descriptors");
                }
                done => return done,
            }
        }
    }

    /// Closes some segments that nobody uses; tells whether there were any.
    fn close_idle(&self) -> bool {
        let mut open = self.open.lock();
        let mut closed = 0;
        while closed < CLOSED_AT_ONCE
            && let Some(id) = idle_longest(&open)
        {
            open.remove(&id);
            closed += 1;
        }
        closed > 0
    }

    /// Says which files were missing when the pool was opened.
    pub fn set_lost(&self, ids: BTreeSet<SegmentId>) {
        *self.lost.write() = ids;
    }

    /// Tells whether the file of a segment was missing when the pool was opened.
    pub fn is_lost(&self, id: SegmentId) -> bool {
        self.lost.read().contains(&id)
    }

    /// Returns the segments whose files were missing when the pool was opened.
    pub fn lost(&self) -> BTreeSet<SegmentId> {
        self.lost.read().clone()
    }

    /// Returns the segment if it is open.
    pub fn opened(&self, id: SegmentId) -> Option<Arc<Segment>> {
        let open = self.open.lock();
        let found = open.get(&id)?;
        found.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        Some(Arc::clone(found))
    }

    /// Returns the segment, opening and checking it if need be.
    ///
    /// # Errors
    /// `Corrupt` when the file is missing or is not the one the catalog names.
    pub fn get(&self, id: SegmentId, nonce: u64) -> Result<Arc<Segment>> {
        if let Some(found) = self.opened(id) {
            return Ok(found);
        }
        let path = segment_path(id);
        let missing = || {
            Error::corrupt(format!("segment file {path} is missing"))
                .hint("put it back from a copy of the pool, with the pool closed; until then nothing in it can be read")
        };
        if self.is_lost(id) {
            return Err(missing());
        }
        let opened = self.with_descriptor(|| self.media.open_direct(&path, Open::Existing));
        let file = opened.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => missing(),
            _ => Error::io(format!("cannot open {path}"), e),
        })?;
        let mut bytes = [0; HEADER_LEN];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|e| Error::corrupt(format!("the header of {path} cannot be read: {e}")))?;
        let header = SegmentHeader::decode(&path, &bytes)?;
        if (header.pool, header.id, header.nonce) != (self.pool, id, nonce) {
            return Err(Error::corrupt(format!("{path} is not the segment that the catalog names"))
                .hint("it comes from another pool or an older copy of this one; put the right file back"));
        }
        let segment = Arc::new(Segment { id, file, dirty: AtomicBool::new(false), used: self.tick() });
        Ok(self.insert(&segment))
    }

    fn tick(&self) -> AtomicU64 {
        AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed))
    }

    /// Enters a segment, unless somebody was faster; closes the one not needed longest beyond the limit.
    fn insert(&self, segment: &Arc<Segment>) -> Arc<Segment> {
        let mut open = self.open.lock();
        let kept = Arc::clone(open.entry(segment.id).or_insert_with(|| Arc::clone(segment)));
        if open.len() > self.open_max
            && let Some(oldest) = idle_longest(&open)
        {
            open.remove(&oldest);
        }
        kept
    }

    /// Removes the file of a segment (and its seals), durably. A file that is gone already is no error.
    ///
    /// # Errors
    /// Any other error of the host.
    pub fn remove(&self, id: SegmentId) -> Result<()> {
        self.open.lock().remove(&id);
        let what = |e| Error::io(format!("cannot remove segment {id}"), e);
        let dir = segment_dir(id);
        let prefix = format!("{}-", id.0);
        let names = match self.media.list(&dir) {
            Ok(names) => names,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(what(e)),
        };
        let own = format!("{}.seg", id.0);
        for name in names.iter().filter(|n| **n == own || n.starts_with(&prefix)) {
            match self.media.remove(&format!("{dir}/{name}")) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(what(e)),
                _ => {}
            }
        }
        self.media.sync_dir(&dir).map_err(what)
    }

    /// Lists the ids of all segment files there are.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn on_disk(&self) -> Result<Vec<SegmentId>> {
        Self::ids(&*self.media)
    }

    /// As [`Segments::on_disk`], of a pool that is not open.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn ids(media: &dyn Media) -> Result<Vec<SegmentId>> {
        let what = |e| Error::io(format!("cannot list {SEGMENTS_DIR}"), e);
        let mut ids = Vec::new();
        for dir in media.list(SEGMENTS_DIR).map_err(what)? {
            for name in media.list(&format!("{SEGMENTS_DIR}/{dir}")).map_err(what)? {
                if let Some(id) = name.strip_suffix(".seg").and_then(|n| n.parse().ok()) {
                    ids.push(SegmentId(id));
                }
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }
}

/// Finds the segment that was not needed longest among those that nobody uses and no sync is owed to.
fn idle_longest(open: &HashMap<SegmentId, Arc<Segment>>) -> Option<SegmentId> {
    let idle = open.values().filter(|s| Arc::strong_count(s) == 1 && !s.dirty.load(Ordering::Relaxed));
    idle.min_by_key(|s| s.used.load(Ordering::Relaxed)).map(|s| s.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_header_is_seen() {
        let header = SegmentHeader { pool: Uuid::from_u128(7), id: SegmentId(1), nonce: 9, disk: DiskId(2) };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode("x", &bytes).unwrap(), header);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode("x", &bad).is_err(), "bit {bit}");
        }
    }
}
