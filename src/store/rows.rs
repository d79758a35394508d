//! Rows: the one language of journal and catalog. A row is a key (table byte, big-endian ids) and a value, or its deletion.
//!
//! # Rules
//! 1. Keys sort as bytes in the order in which they are searched.
//! 2. Every value ends with a CRC32 of itself; map entries too.
//! 3. A decoder checks every field against its limits, and that nothing follows.
//!
//! The layout of each table is in `FORMAT.md`; the golden test `format::rows` pins it.

use uuid::Uuid;

use crate::codec::{Reader, Writer, unseal};
use crate::error::{Error, Result};
use crate::map::{BlockSet, Entry};
use crate::units::{
    BLOCK_SIZE, BlockAddress, BranchId, CHUNKS_MAX, ChunkIndex, DISK_SIZE_MAX, DiskId, Epoch, SegmentId, SnapshotId,
};

/// Longest key: table, branch, chunk, epoch.
const KEY_MAX: usize = 21;
/// Length of a key of each table.
const LENGTHS: [usize; 12] = [1, 9, 9, 17, 9, KEY_MAX, KEY_MAX, 9, 9, 9, 9, 9];

/// Tables, by the first byte of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Table {
    /// One row: ids handed out so far.
    Meta = 1,
    /// Disks by id.
    Disk = 2,
    /// Branches by id.
    Branch = 3,
    /// Ended epochs that are still nodes of a tree: snapshots, ghosts, dying states; by (branch, epoch).
    State = 4,
    /// Segments by id.
    Segment = 5,
    /// Map entries by (branch, chunk, epoch).
    Map = 6,
    /// Which chunks an epoch has entries for, by (branch, epoch, group of 512 chunks).
    Index = 7,
    /// Addresses to punch, by first address; the value is a number of blocks.
    Free = 8,
    /// Copies of blocks that are not synced in their segments, by address; in the journal only.
    Data = 9,
    /// Retired snapshots whose record is in a file of its own, by snapshot.
    Retired = 10,
    /// When an epoch ended, by epoch; for as long as entries of it are left.
    Stamp = 11,
    /// Openings of the pool in which snapshots were taken, by number.
    Opening = 12,
}

/// A key of any table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    len: u8,
    bytes: [u8; KEY_MAX],
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl Key {
    /// Makes a key of a table from parts, each big-endian.
    fn new(table: Table, parts: &[&[u8]]) -> Self {
        let mut key = Self { len: 1, bytes: [0; KEY_MAX] };
        key.bytes[0] = table as u8;
        for part in parts {
            let at = usize::from(key.len);
            key.bytes[at..at + part.len()].copy_from_slice(part);
            key.len += u8::try_from(part.len()).expect("keys are short");
        }
        key
    }

    /// Takes stored bytes as a key.
    ///
    /// # Errors
    /// `Corrupt` when they are too long, empty, or of no table.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > KEY_MAX || !(1..=LENGTHS.len()).contains(&usize::from(bytes[0])) {
            return Err(Error::corrupt("a key of the catalog is damaged"));
        }
        let mut key = Self { len: u8::try_from(bytes.len()).expect("checked"), bytes: [0; KEY_MAX] };
        key.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(key)
    }

    /// Returns the bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The one row of [`Table::Meta`].
    #[must_use]
    pub fn meta() -> Self {
        Self::new(Table::Meta, &[])
    }

    /// A disk.
    #[must_use]
    pub fn disk(id: DiskId) -> Self {
        Self::new(Table::Disk, &[&id.0.to_be_bytes()])
    }

    /// A branch.
    #[must_use]
    pub fn branch(id: BranchId) -> Self {
        Self::new(Table::Branch, &[&id.0.to_be_bytes()])
    }

    /// An ended epoch.
    #[must_use]
    pub fn state(branch: BranchId, epoch: Epoch) -> Self {
        Self::new(Table::State, &[&branch.0.to_be_bytes(), &epoch.0.to_be_bytes()])
    }

    /// A segment.
    #[must_use]
    pub fn segment(id: SegmentId) -> Self {
        Self::new(Table::Segment, &[&id.0.to_be_bytes()])
    }

    /// A map entry.
    #[must_use]
    pub fn map(branch: BranchId, chunk: ChunkIndex, epoch: Epoch) -> Self {
        Self::new(Table::Map, &[&branch.0.to_be_bytes(), &chunk.0.to_be_bytes(), &epoch.0.to_be_bytes()])
    }

    /// A group of the index.
    #[must_use]
    pub fn index(branch: BranchId, epoch: Epoch, group: u32) -> Self {
        Self::new(Table::Index, &[&branch.0.to_be_bytes(), &epoch.0.to_be_bytes(), &group.to_be_bytes()])
    }

    /// A range of addresses to punch.
    #[must_use]
    pub fn free(first: BlockAddress) -> Self {
        Self::new(Table::Free, &[&first.raw().to_be_bytes()])
    }

    /// The copy of a block.
    #[must_use]
    pub fn data(address: BlockAddress) -> Self {
        Self::new(Table::Data, &[&address.raw().to_be_bytes()])
    }

    /// A retired snapshot.
    #[must_use]
    pub fn retired(id: SnapshotId) -> Self {
        Self::new(Table::Retired, &[&id.0.to_be_bytes()])
    }

    /// The stamp of an epoch.
    #[must_use]
    pub fn stamp(epoch: Epoch) -> Self {
        Self::new(Table::Stamp, &[&epoch.0.to_be_bytes()])
    }

    /// An opening of the pool.
    #[must_use]
    pub fn opening(number: u64) -> Self {
        Self::new(Table::Opening, &[&number.to_be_bytes()])
    }

    /// Tells whether the row is of a table.
    #[must_use]
    pub fn is_of(&self, table: Table) -> bool {
        self.bytes[0] == table as u8
    }

    /// The smallest key of a table.
    #[must_use]
    pub fn first_of(table: Table) -> Self {
        Self::new(table, &[])
    }

    /// A key above every key of a table.
    #[must_use]
    pub fn beyond(table: Table) -> Self {
        Self::new(table, &[&[0xff; KEY_MAX - 1]])
    }

    /// A key above every other.
    #[must_use]
    pub fn last() -> Self {
        Self { len: u8::try_from(KEY_MAX).expect("keys are short"), bytes: [0xff; KEY_MAX] }
    }

    /// Returns a key that sorts right behind this one, before every other that follows.
    #[must_use]
    pub fn after(&self) -> Self {
        let mut key = *self;
        if usize::from(key.len) < KEY_MAX {
            key.len += 1;
            return key;
        }
        for byte in key.bytes.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
        key
    }

    /// Returns the largest key of the same length below this one.
    #[must_use]
    pub fn before(&self) -> Option<Self> {
        let mut key = *self;
        for byte in key.bytes[..usize::from(key.len)].iter_mut().rev() {
            *byte = byte.wrapping_sub(1);
            if *byte != 0xff {
                return Some(key);
            }
        }
        None
    }

    /// Takes the ids out of the key again.
    ///
    /// # Errors
    /// `Corrupt` when the length is not the one of its table.
    pub fn parts(&self) -> Result<KeyParts> {
        let bytes = self.as_bytes();
        let long = |at: usize| -> Result<u64> {
            let part = bytes.get(at..at + 8).ok_or_else(|| Error::corrupt("a key of the catalog is too short"))?;
            Ok(u64::from_be_bytes(part.try_into().expect("eight bytes")))
        };
        let short = |at: usize| -> Result<u32> {
            let part = bytes.get(at..at + 4).ok_or_else(|| Error::corrupt("a key of the catalog is too short"))?;
            Ok(u32::from_be_bytes(part.try_into().expect("four bytes")))
        };
        if bytes.len() != LENGTHS[usize::from(bytes[0]) - 1] {
            return Err(Error::corrupt("a key of the catalog has the wrong length"));
        }
        Ok(match bytes[0] {
            1 => KeyParts::Meta,
            2 => KeyParts::Disk(DiskId(long(1)?)),
            3 => KeyParts::Branch(BranchId(long(1)?)),
            4 => KeyParts::State(BranchId(long(1)?), Epoch(long(9)?)),
            5 => KeyParts::Segment(SegmentId(long(1)?)),
            6 => KeyParts::Map(BranchId(long(1)?), ChunkIndex(short(9)?), Epoch(long(13)?)),
            7 => KeyParts::Index(BranchId(long(1)?), Epoch(long(9)?), short(17)?),
            10 => KeyParts::Retired(SnapshotId(long(1)?)),
            11 => KeyParts::Stamp(Epoch(long(1)?)),
            12 => KeyParts::Opening(long(1)?),
            kind => {
                let address = BlockAddress::from_raw(long(1)?);
                let address = address.ok_or_else(|| Error::corrupt("a row of the catalog names no address"))?;
                if kind == Table::Data as u8 { KeyParts::Data(address) } else { KeyParts::Free(address) }
            }
        })
    }
}

/// A key taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyParts {
    /// The meta row.
    Meta,
    /// A disk.
    Disk(DiskId),
    /// A branch.
    Branch(BranchId),
    /// An ended epoch.
    State(BranchId, Epoch),
    /// A segment.
    Segment(SegmentId),
    /// A map entry.
    Map(BranchId, ChunkIndex, Epoch),
    /// An index group.
    Index(BranchId, Epoch, u32),
    /// A free range.
    Free(BlockAddress),
    /// The copy of a block.
    Data(BlockAddress),
    /// A retired snapshot.
    Retired(SnapshotId),
    /// The stamp of an epoch.
    Stamp(Epoch),
    /// An opening of the pool.
    Opening(u64),
}

/// A change of one row: `None` deletes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which row.
    pub key: Key,
    /// Its new value with checksum, or `None`.
    pub value: Option<Vec<u8>>,
}

impl Row {
    /// Sets a row.
    #[must_use]
    pub fn put(key: Key, value: Vec<u8>) -> Self {
        Self { key, value: Some(value) }
    }

    /// Deletes a row.
    #[must_use]
    pub fn delete(key: Key) -> Self {
        Self { key, value: None }
    }
}

/// The last ids handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Disks.
    pub disk: DiskId,
    /// Branches.
    pub branch: BranchId,
    /// Epochs.
    pub epoch: Epoch,
    /// Snapshots.
    pub snapshot: SnapshotId,
    /// Segments.
    pub segment: SegmentId,
    /// How often the pool was opened for writing.
    pub openings: u64,
    /// Whether it was closed in order: nothing follows in the journal.
    pub clean: bool,
}

impl Meta {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.u64(self.disk.0).u64(self.branch.0).u64(self.epoch.0).u64(self.snapshot.0).u64(self.segment.0);
        out.u64(self.openings).u8(u8::from(self.clean));
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "the meta row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let meta = Self {
            disk: DiskId(from.u64()?),
            branch: BranchId(from.u64()?),
            epoch: Epoch(from.u64()?),
            snapshot: SnapshotId(from.u64()?),
            segment: SegmentId(from.u64()?),
            openings: from.u64()?,
            clean: from.flag()?,
        };
        from.end()?;
        Ok(meta)
    }
}

/// A branch: where its look-ups go on when it has no entry of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchRow {
    /// The state it was started from: its place in the tree.
    pub parent: Option<(BranchId, Epoch)>,
    /// Whether look-ups fall through to the parent; `false` once its entries were copied.
    pub inherits: bool,
    /// How many branches a look-up passes at most, this one included.
    pub depth: u32,
    /// Every branch of one lineage names the same, its oldest.
    pub lineage: BranchId,
}

impl BranchRow {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        let (branch, epoch) = self.parent.unwrap_or_default();
        out.u8(u8::from(self.parent.is_some())).u64(branch.0).u64(epoch.0);
        out.u8(u8::from(self.inherits)).u32(self.depth).u64(self.lineage.0);
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a branch row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let has = from.flag()?;
        let parent = (BranchId(from.u64()?), Epoch(from.u64()?));
        let row = Self {
            parent: has.then_some(parent),
            inherits: from.flag()?,
            depth: from.u32()?,
            lineage: BranchId(from.u64()?),
        };
        from.end()?;
        if row.inherits && !has {
            return Err(Error::corrupt(format!("{what} inherits from nothing")));
        }
        if !has && parent != <(BranchId, Epoch)>::default() {
            return Err(Error::corrupt(format!("{what} has a parent and says that it has none")));
        }
        Ok(row)
    }
}

/// A segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRow {
    /// The disk whose slabs it holds.
    pub disk: DiskId,
    /// As in the header of the file.
    pub nonce: u64,
    /// Opening of the pool in which it was made and took new blocks.
    pub opening: u64,
    /// Blocks that entries name and that are not queued for punching.
    pub mapped: u64,
    /// Whether slots that were written but never mapped have been looked for and punched.
    pub swept: bool,
    /// Nothing is left and the file may be unlinked.
    pub removed: bool,
}

impl SegmentRow {
    /// Returns the stored value.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.u64(self.disk.0).u64(self.nonce).u64(self.opening).u64(self.mapped);
        out.u8(u8::from(self.swept)).u8(u8::from(self.removed));
        out.sealed()
    }

    /// Takes a stored value apart.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let what = "a segment row of the catalog";
        let mut from = Reader::new(what, unseal(what, bytes)?);
        let row = Self {
            disk: DiskId(from.u64()?),
            nonce: from.u64()?,
            opening: from.u64()?,
            mapped: from.u64()?,
            swept: from.flag()?,
            removed: from.flag()?,
        };
        if row.mapped > 1 << crate::units::SLOT_BITS {
            return Err(Error::corrupt(format!("{what} counts more blocks than a segment has slots")));
        }
        from.end()?;
        Ok(row)
    }
}

/// The opening of a segment that a rebuild found: data in it that nothing names is not freed, nor is the file removed,
/// before somebody says `check --repair`.
pub const REBUILT: u64 = u64::MAX;

/// Encodes the value of a map row.
#[must_use]
pub fn encode_entry(entry: &Entry) -> Vec<u8> {
    crate::codec::seal(entry.encode())
}

/// Decodes the value of a map row.
///
/// # Errors
/// `Corrupt`.
pub fn decode_entry(bytes: &[u8]) -> Result<Entry> {
    let what = "a map entry of the catalog";
    Entry::decode(what, unseal(what, bytes)?)
}

/// Encodes the value of an index row.
#[must_use]
pub fn encode_set(set: &BlockSet) -> Vec<u8> {
    let mut out = Writer::new();
    set.encode(&mut out);
    out.sealed()
}

/// Decodes the value of an index row.
///
/// # Errors
/// `Corrupt`.
pub fn decode_set(bytes: &[u8]) -> Result<BlockSet> {
    let what = "an index row of the catalog";
    let mut from = Reader::new(what, unseal(what, bytes)?);
    let set = BlockSet::decode(&mut from)?;
    from.end()?;
    Ok(set)
}

/// Encodes the value of a free row: a number of blocks.
#[must_use]
pub fn encode_count(blocks: u64) -> Vec<u8> {
    let mut out = Writer::new();
    out.varint(blocks);
    out.sealed()
}

/// Decodes the value of a free row.
///
/// # Errors
/// `Corrupt`, also when the range would leave the address space of a segment.
pub fn decode_count(first: BlockAddress, bytes: &[u8]) -> Result<u64> {
    let what = "a free row of the catalog";
    let mut from = Reader::new(what, unseal(what, bytes)?);
    let blocks = from.varint()?;
    from.end()?;
    if blocks == 0 || u64::from(first.slot()) + blocks > 1 << crate::units::SLOT_BITS {
        return Err(Error::corrupt(format!("{what} leaves its segment")));
    }
    Ok(blocks)
}

/// Encodes the value of a data row: one block.
#[must_use]
pub fn encode_block(block: &[u8]) -> Vec<u8> {
    assert_eq!(block.len() as u64, BLOCK_SIZE, "a copy is one block");
    crate::codec::seal(block.to_vec())
}

/// Decodes the value of a data row.
///
/// # Errors
/// `Corrupt`.
pub fn decode_block(bytes: &[u8]) -> Result<Vec<u8>> {
    let what = "a block in the journal";
    let block = unseal(what, bytes)?;
    if block.len() as u64 != BLOCK_SIZE {
        return Err(Error::corrupt(format!("{what} has {} bytes", block.len())));
    }
    Ok(block.to_vec())
}

/// Checks a chunk index from a key.
///
/// # Errors
/// `Corrupt` when it lies beyond the largest disk.
pub fn checked_chunk(chunk: ChunkIndex) -> Result<ChunkIndex> {
    if u64::from(chunk.0) < CHUNKS_MAX {
        Ok(chunk)
    } else {
        Err(Error::corrupt("a chunk lies beyond the largest disk"))
    }
}

/// Checks a size from a row.
pub(super) fn checked_size(size: u64) -> Result<u64> {
    if size <= DISK_SIZE_MAX {
        Ok(size)
    } else {
        Err(Error::corrupt(format!("a size of {size} bytes is beyond 64 TiB")))
    }
}

/// Refuses a time that no file can have: stamps go on from the last one, and must not come to their end.
pub(super) fn checked_stamp(stamp: u64) -> Result<u64> {
    if i64::try_from(stamp).is_ok() {
        Ok(stamp)
    } else {
        Err(Error::corrupt(format!("{stamp} seconds since 1970 is no time of a snapshot")))
    }
}

/// Takes 16 bytes as a uuid.
pub(super) fn read_uuid(from: &mut Reader<'_>) -> Result<Uuid> {
    Ok(Uuid::from_slice(from.raw(16)?).expect("16 bytes"))
}
