//! The files of the log: a header, then records, each with its own checksum. Bytes: the FORMAT page of the store.
//!
//! # Rules
//! 1. A record that is not whole is an error, also at the end: a file is cut to its header when its records are dropped, so
//!    whatever is behind the header belongs to it.
//! 2. Whether a record makes sense in this pool is decided by who replays it.

use uuid::Uuid;

use crate::codec::{Reader, Writer, crc32, unseal};
use crate::error::{Error, Result};
use crate::map::BlockSet;
use crate::pool::UNFLUSHED_DIR;
use crate::units::{BlockAddress, BranchId, CHUNKS_MAX, ChunkIndex, DiskId, Epoch};

/// First eight bytes.
const MAGIC: [u8; 8] = *b"\x89AFTUF\r\n";
const VERSION: u32 = 1;
/// Bytes of the header, and where the first record begins.
pub const LOG_HEADER_LEN: usize = 72;
/// Bytes of the body of a record at most: those of a mapping with the longest set.
const BODY_MAX: usize = 128;

/// What makes a log one of this disk, this opening and this run of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogHeader {
    /// The pool.
    pub pool: Uuid,
    /// As [`crate::media::Media::boot`].
    pub boot: Uuid,
    /// Number of the opening that wrote it.
    pub opening: u64,
    /// The disk.
    pub disk: DiskId,
}

/// A change of the map that no frame has yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapChange {
    /// Blocks of a chunk got new addresses.
    Mapped {
        /// The branch that was written.
        branch: BranchId,
        /// The epoch that was written.
        epoch: Epoch,
        /// The chunk.
        chunk: ChunkIndex,
        /// Slot 0 of the slab.
        base: BlockAddress,
        /// The blocks.
        set: BlockSet,
    },
    /// Blocks of a chunk were unmapped.
    Unmapped {
        /// The branch that was written.
        branch: BranchId,
        /// The epoch that was written.
        epoch: Epoch,
        /// The chunk.
        chunk: ChunkIndex,
        /// The blocks.
        set: BlockSet,
    },
    /// Blocks were overwritten in place of which the journal has an older copy.
    Overwritten {
        /// Slot 0 of the slab.
        base: BlockAddress,
        /// The blocks.
        set: BlockSet,
    },
}

/// A change, and the generation it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRecord {
    /// Flushes of the disk that had begun before, in this opening.
    pub generation: u64,
    /// The change.
    pub change: MapChange,
}

/// Path of one of the two files of a disk.
#[must_use]
pub fn log_path(disk: DiskId, which: usize) -> String {
    format!("{UNFLUSHED_DIR}/{disk}-{which}")
}

/// Takes the name of a file apart; `None` for names that are none of ours.
pub(super) fn disk_of(name: &str) -> Option<DiskId> {
    let (disk, which) = name.split_once('-')?;
    let id = DiskId(disk.parse().ok()?);
    let ours = (0..2).any(|n| log_path(id, n).ends_with(&format!("/{name}")));
    (ours && matches!(which, "0" | "1")).then_some(id)
}

impl LogHeader {
    /// Returns the bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).u32(0).raw(self.pool.as_bytes()).raw(self.boot.as_bytes());
        out.u64(self.opening).u64(self.disk.0).u32(0);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), LOG_HEADER_LEN, "the header has a fixed length");
        bytes
    }

    /// Takes the first bytes of a log apart.
    ///
    /// # Errors
    /// `Corrupt` when they are no header, `Unsupported` for a newer version.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.get(..LOG_HEADER_LEN).unwrap_or(bytes);
        let mut from = Reader::new(what, bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like a log of unflushed changes"));
        }
        let version = from.u32()?;
        if version > VERSION {
            return Err(Error::unsupported(format!("{what} has version {version}, newer than this program")));
        }
        let mut from = Reader::new(what, unseal(what, bytes)?);
        from.raw(8)?;
        if from.u32()? != VERSION || from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        let mut uuid = || Ok::<_, Error>(Uuid::from_slice(from.raw(16)?).expect("16 bytes"));
        let (pool, boot) = (uuid()?, uuid()?);
        let header = Self { pool, boot, opening: from.u64()?, disk: DiskId(from.u64()?) };
        if from.u32()? != 0 {
            return Err(from.corrupt("reserved bytes are set"));
        }
        from.end()?;
        Ok(header)
    }
}

impl LogRecord {
    /// Returns the bytes: length and checksum of the body, then the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::new();
        match &self.change {
            MapChange::Mapped { branch, epoch, chunk, base, set } => {
                body.u8(1).u64(self.generation).u64(branch.0).u64(epoch.0).u32(chunk.0).u64(base.raw());
                set.encode(&mut body);
            }
            MapChange::Unmapped { branch, epoch, chunk, set } => {
                body.u8(2).u64(self.generation).u64(branch.0).u64(epoch.0).u32(chunk.0);
                set.encode(&mut body);
            }
            MapChange::Overwritten { base, set } => {
                body.u8(3).u64(self.generation).u64(base.raw());
                set.encode(&mut body);
            }
        }
        let body = body.finish();
        assert!(body.len() <= BODY_MAX, "a record is short");
        let mut out = Writer::new();
        out.u32(u32::try_from(body.len()).expect("short")).u32(crc32(&body)).raw(&body);
        out.finish()
    }

    fn decode(what: &str, body: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, body);
        let (kind, generation) = (from.u8()?, from.u64()?);
        let place = |from: &mut Reader<'_>| {
            let (branch, epoch, chunk) = (BranchId(from.u64()?), Epoch(from.u64()?), from.u32()?);
            if u64::from(chunk) >= CHUNKS_MAX {
                return Err(from.corrupt("it names a chunk beyond the largest disk"));
            }
            Ok((branch, epoch, ChunkIndex(chunk)))
        };
        let slab = |from: &mut Reader<'_>| {
            let base = BlockAddress::from_raw(from.u64()?).filter(|base| base.index() == 0);
            base.ok_or_else(|| from.corrupt("a slab base is not aligned"))
        };
        let change = match kind {
            1 => {
                let (branch, epoch, chunk) = place(&mut from)?;
                MapChange::Mapped { branch, epoch, chunk, base: slab(&mut from)?, set: BlockSet::decode(&mut from)? }
            }
            2 => {
                let (branch, epoch, chunk) = place(&mut from)?;
                MapChange::Unmapped { branch, epoch, chunk, set: BlockSet::decode(&mut from)? }
            }
            3 => MapChange::Overwritten { base: slab(&mut from)?, set: BlockSet::decode(&mut from)? },
            _ => return Err(from.corrupt("a record has an unknown kind")),
        };
        from.end()?;
        Ok(Self { generation, change })
    }

    /// Takes apart what is behind the header: the records up to the first that is not whole, and what is wrong with that.
    #[must_use]
    pub fn decode_all(what: &str, bytes: &[u8]) -> (Vec<Self>, Option<Error>) {
        let mut from = Reader::new(what, bytes);
        let mut records = Vec::new();
        let mut next = || -> Result<Option<Self>> {
            if from.left() == 0 {
                return Ok(None);
            }
            let (len, crc) = (from.u32()?, from.u32()?);
            let len = usize::try_from(len).ok().filter(|len| *len <= BODY_MAX);
            let body = from.raw(len.ok_or_else(|| from.corrupt("a record is too long"))?)?;
            if crc32(body) != crc {
                return Err(from.corrupt("a record does not match its checksum"));
            }
            Self::decode(what, body).map(Some)
        };
        loop {
            match next() {
                Ok(Some(record)) => records.push(record),
                Ok(None) => return (records, None),
                Err(error) => return (records, Some(error)),
            }
        }
    }
}
