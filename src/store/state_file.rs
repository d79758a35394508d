//! The seal of a state: what an ended epoch is, where it stands in the tree, and its map, in a file of its own.
//!
//! A rebuild makes the map of a snapshot again from these files alone. The seals of segments cannot serve for that: they
//! go with their segments, and what an epoch unmapped would go with them while the snapshot lives.
//!
//! # Rules
//! 1. A file holds for every chunk that differs from the state it is based on the whole entry of the chunk; without a
//!    base, every chunk that has anything mapped. So the map of a state is its file over that of its base, and so on.
//! 2. A file is written once. It is only ever replaced by one that says the same with an older base.
//! 3. `<epoch>.seal` is a state whose blocks are all there. It is renamed to `<epoch>.gone`, durably, before the first of
//!    its blocks is given up; from then on it only says what files based on it mean.
//!
//! Bytes: the FORMAT page of `pool`, section Fields. Which files there are is the business of `state_files`.

use uuid::Uuid;

use super::rows::{BranchRow, decode_entry, encode_entry, read_uuid};
use super::seal_file::{Bodies, SealFile};
use super::states::StateRow;
use crate::codec::{Reader, Writer};
use crate::error::{Error, Result};
use crate::map::Entry;
use crate::media::Media;
use crate::units::{BranchId, ChunkIndex, Epoch, SegmentId};

/// The directory of the seals of states.
pub const STATES_DIR: &str = "states";
const KIND_STATE: u8 = 4;
const KIND_BRANCH: u8 = 5;
const KIND_ENTRY: u8 = 6;
/// The longest record: an entry of 512 scattered blocks.
const RECORD_MAX: u32 = 8192;

/// Returns the path of the seal of a state.
#[must_use]
pub fn state_path(epoch: Epoch, gone: bool) -> String {
    format!("{STATES_DIR}/{}.{}", epoch.0, if gone { "gone" } else { "seal" })
}

/// Takes the name of a seal apart: the epoch, and whether the state is gone.
#[must_use]
pub fn parse_name(name: &str) -> Option<(Epoch, bool)> {
    let (epoch, end) = name.split_once('.')?;
    let gone = match end {
        "seal" => false,
        "gone" => true,
        _ => return None,
    };
    let epoch = Epoch(epoch.parse().ok()?);
    (state_path(epoch, gone).ends_with(&format!("/{name}"))).then_some((epoch, gone))
}

/// What a state is, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSeal {
    /// The pool.
    pub pool: Uuid,
    /// The branch.
    pub branch: BranchId,
    /// The epoch that ended.
    pub epoch: Epoch,
    /// The state whose map this one's is laid over.
    pub base: Option<Epoch>,
    /// Identity of the disk.
    pub disk_uuid: Uuid,
    /// Name of the disk when this was written.
    pub disk_name: String,
    /// The state as it was when this was written, without holds.
    pub row: StateRow,
    /// The branch of the state, the one it started from, and so on up to the oldest.
    pub branches: Vec<(BranchId, BranchRow)>,
}

impl StateSeal {
    fn header(&self) -> SealFile {
        let (pool, disk, branch, epoch) = (self.pool, self.row.disk, self.branch, self.epoch);
        SealFile { pool, segment: SegmentId(0), nonce: 0, disk, branch, epoch }
    }

    fn head_record(&self) -> Vec<u8> {
        let mut body = Writer::new();
        body.u8(KIND_STATE).u64(self.base.map_or(0, |base| base.0)).raw(self.disk_uuid.as_bytes());
        body.text(&self.disk_name).raw(&self.row.encode());
        body.finish()
    }

    /// Writes the file durably, in place of one that is there; returns its length. Entries come in order of their chunks.
    ///
    /// # Errors
    /// Any error of the host or of `entries`; a file under a temporary name may stay.
    pub fn write(
        &self,
        media: &dyn Media,
        gone: bool,
        entries: impl Iterator<Item = Result<(ChunkIndex, Entry)>>,
    ) -> Result<u64> {
        let branches = self.branches.iter().map(|(id, row)| {
            let mut body = Writer::new();
            body.u8(KIND_BRANCH).u64(id.0).raw(&row.encode());
            Ok(body.finish())
        });
        let entries = entries.map(|entry| {
            let (chunk, entry) = entry?;
            let mut body = Writer::new();
            body.u8(KIND_ENTRY).u32(chunk.0).raw(&encode_entry(&entry));
            Ok(body.finish())
        });
        let bodies = std::iter::once(Ok(self.head_record())).chain(branches).chain(entries);
        self.header().write_file(media, STATES_DIR, &state_path(self.epoch, gone), bodies)
    }

    /// Opens a file; returns what it says of the state, and a reader of its entries.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, or an error of the host.
    pub fn open(media: &dyn Media, epoch: Epoch, gone: bool) -> Result<(Self, EntryReader)> {
        let (header, mut bodies) = SealFile::open_file(media, &state_path(epoch, gone), RECORD_MAX)?;
        let path = bodies.path().to_owned();
        let bad = |why: &str| Error::corrupt(format!("{path} is damaged: {why}"));
        if header.segment.0 != 0 || header.epoch != epoch {
            return Err(bad("it is the seal of something else"));
        }
        let first = bodies.next().ok_or_else(|| bad("it says nothing"))??;
        let mut from = Reader::new(&path, &first);
        if from.u8()? != KIND_STATE {
            return Err(bad("it does not begin with its state"));
        }
        let base = Some(Epoch(from.u64()?)).filter(|base| base.0 != 0);
        let disk_uuid = read_uuid(&mut from)?;
        let disk_name = from.text()?;
        let row = StateRow::decode(from.raw(from.left())?)?;
        if base.is_some_and(|base| base >= epoch) || row.disk != header.disk {
            return Err(bad("its state makes no sense"));
        }
        let mut branches: Vec<(BranchId, BranchRow)> = Vec::new();
        let mut ahead = None;
        for body in bodies.by_ref() {
            let body = body?;
            if body.first() != Some(&KIND_BRANCH) {
                ahead = Some(body);
                break;
            }
            let mut from = Reader::new(&path, &body[1..]);
            let id = BranchId(from.u64()?);
            let row = BranchRow::decode(from.raw(from.left())?)?;
            let follows = branches.last().map_or(id == header.branch, |last| last.1.parent.map(|p| p.0) == Some(id));
            if !follows || row.parent.is_some_and(|parent| parent.0 >= id) {
                return Err(bad("its branches do not follow each other"));
            }
            branches.push((id, row));
        }
        if branches.last().is_none_or(|last| last.1.parent.is_some()) {
            return Err(bad("branches are missing"));
        }
        let seal = Self { pool: header.pool, branch: header.branch, epoch, base, disk_uuid, disk_name, row, branches };
        Ok((seal, EntryReader { bodies, ahead, last: None }))
    }
}

/// Reads the entries of a seal one after the other, in order of their chunks.
#[derive(Debug)]
pub struct EntryReader {
    bodies: Bodies,
    ahead: Option<Vec<u8>>,
    last: Option<ChunkIndex>,
}

impl EntryReader {
    /// Returns the length of the file.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.bodies.len()
    }

    fn entry(&mut self, body: &[u8]) -> Result<(ChunkIndex, Entry)> {
        let mut from = Reader::new(self.bodies.path(), body);
        if from.u8()? != KIND_ENTRY {
            return Err(from.corrupt("a record has an unknown kind"));
        }
        let chunk = super::rows::checked_chunk(ChunkIndex(from.u32()?))?;
        if self.last.is_some_and(|last| last >= chunk) {
            return Err(from.corrupt("its entries are not in order"));
        }
        let entry = decode_entry(from.raw(from.left())?)?;
        self.last = Some(chunk);
        Ok((chunk, entry))
    }
}

impl Iterator for EntryReader {
    type Item = Result<(ChunkIndex, Entry)>;

    fn next(&mut self) -> Option<Self::Item> {
        let body = self.ahead.take().map(Ok).or_else(|| self.bodies.next())?;
        Some(body.and_then(|body| self.entry(&body)))
    }
}
