//! The record of a retired snapshot: the addresses it held and the blocks of the disk they were, in one portable file.
//!
//! # Rules
//! 1. A record is made from the map entries of the snapshot as of one instant, and is durable before they go.
//! 2. A record is believed by the pool that made it only, and there only if its snapshot lies in the past of that pool as
//!    it is now: in a copy, or a pool taken back to an earlier day, the same addresses may hold other bytes.
//! 3. Every byte of a file is checked when it is opened; later only reading it again can fail, if it is a large one.
//!
//! # After a crash
//! A record is whole or not there; until the catalog names it, the map entries are the record.
//!
#![doc = include_str!("FORMAT.md")]

mod read;
mod sets;
mod slabs;
#[cfg(test)]
mod tests;
mod write;

use uuid::Uuid;

pub use crate::store::record_path;
pub use read::{Memory, Record, RecordWalk};
pub use write::{copy, write};

use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};
use crate::store::{Moment, RetiredRow, StateRow};
use crate::units::{BranchId, DiskId, Epoch, SnapshotId};

const MAGIC: [u8; 8] = *b"\x89AFTAI\r\n";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
const IDENTITY_MAX: usize = 4096;
const ENTRY_LEN: usize = 60;

/// What a record is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordIdentity {
    /// The pool.
    pub pool: Uuid,
    /// When the snapshot was taken, in the course of events of the pool.
    pub moment: Moment,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Name of the disk when the record was written.
    pub disk_name: String,
    /// Everything else.
    pub row: RetiredRow,
}

impl RecordIdentity {
    fn encode(&self) -> Vec<u8> {
        let (row, state) = (&self.row, &self.row.state);
        let mut out = Writer::new();
        out.raw(self.pool.as_bytes()).u64(row.lineage.0).u64(row.branch.0).u64(row.epoch.0);
        out.u64(self.moment.opening).u64(self.moment.nonce);
        out.u64(state.disk.0).raw(self.disk_uuid.as_bytes()).text(&self.disk_name);
        out.u64(state.snapshot.0).raw(state.uuid.as_bytes()).text(&state.name);
        state.write_figures(&mut out);
        out.sealed()
    }

    fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let uuid = |from: &mut Reader<'_>| -> Result<Uuid> { Ok(Uuid::from_slice(from.raw(16)?).expect("16 bytes")) };
        let pool = uuid(&mut from)?;
        let (lineage, branch, epoch) = (BranchId(from.u64()?), BranchId(from.u64()?), Epoch(from.u64()?));
        let moment = Moment { opening: from.u64()?, nonce: from.u64()? };
        let disk = DiskId(from.u64()?);
        let (disk_uuid, disk_name) = (uuid(&mut from)?, from.text()?);
        let (snapshot, snapshot_uuid, name) = (SnapshotId(from.u64()?), uuid(&mut from)?, from.text()?);
        let state = StateRow::read_figures(&mut from, snapshot, disk, name, snapshot_uuid)?;
        from.end()?;
        Ok(Self { pool, moment, disk_uuid, disk_name, row: RetiredRow { branch, epoch, lineage, state } })
    }
}

/// The first 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    identity: u32,
    directory: u64,
    directory_len: u64,
    length: u64,
    segments: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.raw(&MAGIC).u32(VERSION).u32(self.identity).u64(self.directory).u64(self.directory_len);
        out.u64(self.length).u64(self.segments).u64(0).u32(0);
        let bytes = out.sealed();
        assert_eq!(bytes.len(), HEADER_LEN, "the header has a fixed length");
        bytes
    }

    fn decode(what: &str, bytes: &[u8], file: u64) -> Result<Self> {
        let mut from = Reader::new(what, bytes);
        if from.raw(8)? != MAGIC {
            return Err(from.corrupt("it does not begin like a retired record"));
        }
        let version = from.u32()?;
        if version > VERSION {
            return Err(Error::unsupported(format!("{what} has version {version}, newer than this program"))
                .hint("use a newer version of afterimage"));
        }
        let body = unseal(what, bytes)?;
        let mut from = Reader::new(what, &body[12..]);
        let header = Self {
            identity: from.u32()?,
            directory: from.u64()?,
            directory_len: from.u64()?,
            length: from.u64()?,
            segments: from.u64()?,
        };
        let reserved = from.u64()? == 0 && from.u32()? == 0;
        let entries = header.segments.checked_mul(ENTRY_LEN as u64).and_then(|len| len.checked_add(4));
        let fits = header.length == file
            && header.identity as usize <= IDENTITY_MAX
            && entries == Some(header.directory_len)
            && header.directory.checked_add(header.directory_len) == Some(file)
            && header.directory >= HEADER_LEN as u64 + u64::from(header.identity);
        if !reserved || !fits {
            return Err(from.corrupt("its parts do not fit its length; it may have been cut off"));
        }
        Ok(header)
    }
}

/// Where the parts of one segment are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DirectoryEntry {
    segment: u64,
    nonce: u64,
    blocks: u64,
    slab_count: u32,
    slabs: (u64, u64),
    set: (u64, u64),
}

impl DirectoryEntry {
    fn encode(&self, out: &mut Writer) {
        out.u64(self.segment).u64(self.nonce).u64(self.blocks).u32(self.slab_count);
        out.u64(self.slabs.0).u64(self.slabs.1).u64(self.set.0).u64(self.set.1);
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self> {
        Ok(Self {
            segment: from.u64()?,
            nonce: from.u64()?,
            blocks: from.u64()?,
            slab_count: from.u32()?,
            slabs: (from.u64()?, from.u64()?),
            set: (from.u64()?, from.u64()?),
        })
    }
}
