//! Seal files: what one epoch wrote into one segment, with the CRC32 of every block.
//!
//! Written once, in the background, when the epoch has ended. Scrub compares data with it; a rebuild makes the map again
//! from it. Records stream in both directions: a file of a fully written terabyte is never held in memory.
//!
//! Two kinds of file share header and framing: the seal of a segment (version 1, here) and the seal of a state
//! (version 2, in [`super::state_file`]), whose header names no segment.

use std::sync::Arc;

use uuid::Uuid;

use crate::codec::{Reader, Writer, crc32, unseal};
use crate::error::{Error, Result};
use crate::map::BlockSet;
use crate::media::{File, Media, Open};
use crate::pool::segment_dir;
use crate::units::{BlockAddress, BranchId, ChunkIndex, DiskId, Epoch, SegmentId};

const MAGIC: [u8; 8] = *b"\x89AFTSL\r\n";
const VERSION_SEGMENT: u32 = 1;
const VERSION_STATE: u32 = 2;
const HEADER_LEN: usize = 80;
const KIND_SLAB: u8 = 1;
const KIND_UNMAPPED: u8 = 2;
const KIND_END: u8 = 3;
/// The longest record of a segment's seal: a slab of 512 blocks.
const RECORD_MAX: u32 = 4096;
const BUFFER: usize = 256 * 1024;

/// Path of the seal of an epoch in a segment.
#[must_use]
pub fn seal_path(segment: SegmentId, epoch: Epoch) -> String {
    format!("{}/{}-{}.seal", segment_dir(segment), segment.0, epoch.0)
}

/// One record of a seal file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SealedSlab {
    /// Blocks that the epoch wrote, with their checksums in order of the set.
    Written {
        /// Slab base.
        base: BlockAddress,
        /// The chunk the slab belongs to.
        chunk: ChunkIndex,
        /// Blocks of the chunk.
        set: BlockSet,
        /// CRC32 of each block of `set`, in order.
        crcs: Vec<u32>,
    },
    /// Blocks that the epoch unmapped.
    Unmapped {
        /// The chunk.
        chunk: ChunkIndex,
        /// Blocks of the chunk.
        set: BlockSet,
    },
}

/// What the header of a seal file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealFile {
    /// The pool.
    pub pool: Uuid,
    /// The segment; 0 in the seal of a state.
    pub segment: SegmentId,
    /// Its nonce.
    pub nonce: u64,
    /// The disk.
    pub disk: DiskId,
    /// The branch of the epoch.
    pub branch: BranchId,
    /// The epoch.
    pub epoch: Epoch,
}

impl SealFile {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        let version = if self.segment.0 == 0 { VERSION_STATE } else { VERSION_SEGMENT };
        out.raw(&MAGIC).u32(version).u32(0).raw(self.pool.as_bytes());
        out.u64(self.segment.0).u64(self.nonce).u64(self.disk.0).u64(self.branch.0).u64(self.epoch.0).u32(0);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), HEADER_LEN, "the header has a fixed length");
        bytes
    }

    fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like a seal file"));
        }
        let version = from.u32()?;
        if version > VERSION_STATE {
            return Err(Error::unsupported(format!("{what} is of a newer version than this program knows")));
        }
        let body = unseal(what, bytes)?;
        let mut from = Reader::new(what, &body[12..]);
        let reserved = from.u32()?;
        let pool = Uuid::from_slice(from.raw(16)?).expect("16 bytes");
        let found = Self {
            pool,
            segment: SegmentId(from.u64()?),
            nonce: from.u64()?,
            disk: DiskId(from.u64()?),
            branch: BranchId(from.u64()?),
            epoch: Epoch(from.u64()?),
        };
        if reserved != 0 || from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        if (version == VERSION_STATE) != (found.segment.0 == 0) {
            return Err(from.corrupt("its version does not fit what it seals"));
        }
        Ok(found)
    }

    /// Fails unless the seal is of this segment of this pool.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn require_owner(&self, pool: Uuid, nonce: u64) -> Result<()> {
        if (self.pool, self.nonce) == (pool, nonce) {
            return Ok(());
        }
        let path = seal_path(self.segment, self.epoch);
        Err(Error::corrupt(format!("{path} is the seal of another segment, or of one in another pool")))
    }

    /// Writes the file durably: temporary name, records, end record, sync, rename, sync of the directory.
    ///
    /// # Errors
    /// Any error of the host or of `records`; the temporary file may stay and is replaced by the next try.
    pub fn write(&self, media: &dyn Media, records: impl Iterator<Item = Result<SealedSlab>>) -> Result<()> {
        let path = seal_path(self.segment, self.epoch);
        let bodies = records.map(|record| record.map(|record| encode_record(&record)));
        self.write_file(media, &segment_dir(self.segment), &path, bodies).map(drop)
    }

    /// Writes a file with these bodies of records; returns its length.
    pub(super) fn write_file(
        &self,
        media: &dyn Media,
        dir: &str,
        path: &str,
        bodies: impl Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<u64> {
        let temporary = format!("{path}.new");
        let fail = |e| Error::io(format!("cannot write {path}"), e);
        match media.remove(&temporary) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        let file = media.open(&temporary, Open::New).map_err(fail)?;
        let mut out = self.encode();
        let (mut at, mut count) = (0u64, 0u64);
        for body in bodies {
            frame(&body?, &mut out);
            count += 1;
            if out.len() >= BUFFER {
                file.write_at(&out, at).map_err(fail)?;
                at += out.len() as u64;
                out.clear();
            }
        }
        let mut end = Writer::new();
        end.u8(KIND_END).u64(count);
        frame(&end.finish(), &mut out);
        file.write_at(&out, at).map_err(fail)?;
        file.sync().map_err(fail)?;
        media.rename(&temporary, path).map_err(fail)?;
        media.sync_dir(dir).map_err(fail)?;
        Ok(at + out.len() as u64)
    }

    /// Opens any seal file; returns its header and a reader of the bodies of its records.
    pub(super) fn open_file(media: &dyn Media, path: &str, record_max: u32) -> Result<(Self, Bodies)> {
        let file = media.open(path, Open::ReadOnly).map_err(|e| Error::io(format!("cannot open {path}"), e))?;
        let mut bytes = [0; HEADER_LEN];
        let damaged = |e| Error::corrupt(format!("the header of {path} cannot be read: {e}"));
        file.read_exact_at(&mut bytes, 0).map_err(damaged)?;
        let header = Self::decode(path, &bytes)?;
        let len = file.len().map_err(|e| Error::io(format!("cannot look at {path}"), e))?;
        let at = HEADER_LEN as u64;
        Ok((header, Bodies { file, path: path.to_owned(), record_max, at, len, count: 0, ended: false }))
    }

    /// Opens a seal file; returns its header and a reader of its records.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, or an error of the host.
    pub fn open(media: &dyn Media, segment: SegmentId, epoch: Epoch) -> Result<(Self, SealReader)> {
        let path = seal_path(segment, epoch);
        let (header, bodies) = Self::open_file(media, &path, RECORD_MAX)?;
        if (header.segment, header.epoch) != (segment, epoch) {
            return Err(Error::corrupt(format!("{path} belongs to another segment or epoch")));
        }
        Ok((header, SealReader { bodies, segment }))
    }
}

/// Appends a record: length, CRC32, body.
fn frame(body: &[u8], out: &mut Vec<u8>) {
    let len = u32::try_from(body.len()).expect("records are short");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&crc32(body).to_le_bytes());
    out.extend_from_slice(body);
}

fn encode_record(record: &SealedSlab) -> Vec<u8> {
    let mut body = Writer::new();
    match record {
        SealedSlab::Written { base, chunk, set, crcs } => {
            assert_eq!(crcs.len(), set.count() as usize, "one checksum per block");
            body.u8(KIND_SLAB).u64(base.raw()).u32(chunk.0);
            set.encode(&mut body);
            crcs.iter().for_each(|crc| {
                body.u32(*crc);
            });
        }
        SealedSlab::Unmapped { chunk, set } => {
            body.u8(KIND_UNMAPPED).u32(chunk.0);
            set.encode(&mut body);
        }
    }
    body.finish()
}

/// Reads the bodies of the records of a file one after the other, and makes sure that none is missing at its end.
#[derive(Debug)]
pub(super) struct Bodies {
    file: Arc<dyn File>,
    path: String,
    record_max: u32,
    at: u64,
    len: u64,
    count: u64,
    ended: bool,
}

impl Bodies {
    /// Returns the path of the file, for messages.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Returns the length of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn step(&mut self) -> Result<Option<Vec<u8>>> {
        let short = |e| Error::corrupt(format!("{} ends early or cannot be read: {e}", self.path));
        let mut head = [0; 8];
        self.file.read_exact_at(&mut head, self.at).map_err(short)?;
        let mut from = Reader::new(&self.path, &head);
        let (len, crc) = (from.u32()?, from.u32()?);
        if len > self.record_max {
            return Err(from.corrupt("a record is too long"));
        }
        let mut body = vec![0; len as usize];
        self.file.read_exact_at(&mut body, self.at + 8).map_err(short)?;
        if crc32(&body) != crc {
            return Err(from.corrupt("a record does not match its checksum"));
        }
        self.at += 8 + u64::from(len);
        if body.first() == Some(&KIND_END) {
            let mut from = Reader::new(&self.path, &body[1..]);
            if from.u64()? != self.count {
                return Err(from.corrupt("records are missing"));
            }
            from.end()?;
            return Ok(None);
        }
        self.count += 1;
        Ok(Some(body))
    }
}

impl Iterator for Bodies {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let result = self.step();
        self.ended = !matches!(result, Ok(Some(_)));
        result.transpose()
    }
}

/// Reads the records of a seal file one after the other.
#[derive(Debug)]
pub struct SealReader {
    bodies: Bodies,
    segment: SegmentId,
}

/// A place between two records of a seal file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealPosition {
    at: u64,
    count: u64,
}

impl SealReader {
    /// Returns where the next record begins.
    #[must_use]
    pub fn place(&self) -> SealPosition {
        SealPosition { at: self.bodies.at, count: self.bodies.count }
    }

    /// Goes to a place that [`SealReader::place`] gave, of a reader of the same file.
    pub fn go_to(&mut self, position: SealPosition) {
        let bodies = &mut self.bodies;
        (bodies.at, bodies.count, bodies.ended) = (position.at, position.count, false);
    }

    fn record(&self, body: &[u8]) -> Result<SealedSlab> {
        let mut from = Reader::new(self.bodies.path(), body);
        let record = match from.u8()? {
            KIND_SLAB => self.slab(&mut from)?,
            KIND_UNMAPPED => SealedSlab::Unmapped { chunk: ChunkIndex(from.u32()?), set: BlockSet::decode(&mut from)? },
            _ => return Err(from.corrupt("a record has an unknown kind")),
        };
        from.end()?;
        Ok(record)
    }

    fn slab(&self, from: &mut Reader<'_>) -> Result<SealedSlab> {
        let base = BlockAddress::from_raw(from.u64()?)
            .filter(|a| a.index() == 0 && a.segment() == self.segment)
            .ok_or_else(|| from.corrupt("a slab base is not one of this segment"))?;
        let chunk = ChunkIndex(from.u32()?);
        let set = BlockSet::decode(from)?;
        let crcs = (0..set.count()).map(|_| from.u32()).collect::<Result<Vec<_>>>()?;
        Ok(SealedSlab::Written { base, chunk, set, crcs })
    }
}

impl Iterator for SealReader {
    type Item = Result<SealedSlab>;

    fn next(&mut self) -> Option<Self::Item> {
        let body = self.bodies.next()?;
        let record = body.and_then(|body| self.record(&body));
        self.bodies.ended |= record.is_err();
        Some(record)
    }
}
