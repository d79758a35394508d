//! The twin: images as plain vectors.

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub const SECTOR: usize = 512;

pub const BLOCK: usize = 4096;

/// What stands for the place of a block: no two writes have the same.
pub type Write = u64;
/// The block is unmapped.
pub const NOTHING: Write = 0;
/// A power cut left it open which write the block has.
pub const UNKNOWN: Write = u64::MAX;

/// Bytes, and of each block the write it has.
#[derive(Clone, Default)]
pub struct Frame {
    pub bytes: Vec<u8>,
    pub writes: Vec<Write>,
}

/// A live disk, with everything that may be found after a power cut.
#[derive(Clone, Default)]
pub struct Image {
    /// As last flushed.
    pub durable: Vec<u8>,
    /// As of now.
    pub now: Vec<u8>,
    /// Other versions of sectors since the flush.
    versions: HashMap<usize, Vec<Vec<u8>>>,
    /// Of each block the write it has.
    pub writes: Vec<Write>,
    /// Blocks that were written or unmapped since the flush.
    unsettled: BTreeSet<usize>,
}

impl Image {
    pub fn new(size: usize) -> Self {
        Self::of(Frame { bytes: vec![0; size], writes: vec![NOTHING; size.div_ceil(BLOCK)] })
    }

    pub fn of(frame: Frame) -> Self {
        let Frame { bytes, writes } = frame;
        Self { durable: bytes.clone(), now: bytes, writes, ..Self::default() }
    }

    pub fn frame(&self) -> Frame {
        Frame { bytes: self.now.clone(), writes: self.writes.clone() }
    }

    /// What was found after a power cut: of blocks that were not settled it is not known which write they have.
    pub fn found(&self, bytes: Vec<u8>) -> Self {
        let mut writes = self.writes.clone();
        writes.resize(bytes.len().div_ceil(BLOCK), UNKNOWN);
        for block in &self.unsettled {
            if let Some(write) = writes.get_mut(*block) {
                *write = UNKNOWN;
            }
        }
        Self::of(Frame { bytes, writes })
    }

    /// Notes which write blocks have now.
    pub fn settle_on(&mut self, blocks: std::ops::Range<usize>, write: Write) {
        for block in blocks {
            self.writes[block] = write;
            self.unsettled.insert(block);
        }
    }

    /// Writes with a number of its own.
    pub fn write(&mut self, offset: usize, data: &[u8], write: Write) {
        if !data.is_empty() {
            self.settle_on(offset / BLOCK..(offset + data.len()).div_ceil(BLOCK), write);
        }
        self.put(offset, data);
    }

    /// Unmaps whole blocks; of those that are covered in part, and mapped, the part is written.
    pub fn zero(&mut self, from: usize, upto: usize, write: Write) {
        for block in from / BLOCK..upto.div_ceil(BLOCK) {
            let whole = from <= block * BLOCK && upto >= (block + 1) * BLOCK;
            if whole {
                self.settle_on(block..block + 1, NOTHING);
            } else if self.writes[block] != NOTHING {
                self.settle_on(block..block + 1, if self.writes[block] == UNKNOWN { UNKNOWN } else { write });
            }
        }
        self.put(from, &vec![0; upto - from]);
    }

    /// Unmaps whole blocks, where the last one may be cut by the end of the disk.
    pub fn discard(&mut self, from: usize, upto: usize) {
        self.settle_on(from / BLOCK..upto.div_ceil(BLOCK), NOTHING);
        self.put(from, &vec![0; upto - from]);
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        self.now[offset..offset + data.len()].copy_from_slice(data);
        if data.is_empty() {
            return;
        }
        for sector in offset / SECTOR..(offset + data.len()).div_ceil(SECTOR) {
            let (start, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(self.now.len()));
            self.versions.entry(sector).or_default().push(self.now[start..end].to_vec());
        }
    }

    pub fn flush(&mut self) {
        self.durable = self.now.clone();
        self.versions.clear();
        self.unsettled.clear();
    }

    /// A resize is durable at once; a shrink flushes.
    pub fn resize(&mut self, size: usize) {
        if size < self.now.len() {
            self.flush();
        }
        let old = self.now.len();
        self.writes.resize(size.div_ceil(BLOCK), NOTHING);
        if size > old && !old.is_multiple_of(BLOCK) && self.writes[old / BLOCK] != NOTHING {
            // What a shrink left in the block is written over with zeros, if there was one.
            self.writes[old / BLOCK] = UNKNOWN;
        }
        self.now.resize(size, 0);
        self.durable.resize(size, 0);
        // The versions of a last, short sector get longer with the disk.
        if !old.is_multiple_of(SECTOR)
            && let Some(list) = self.versions.get_mut(&(old / SECTOR))
        {
            let len = (size - old / SECTOR * SECTOR).min(SECTOR);
            list.iter_mut().for_each(|version| version.resize(len, 0));
        }
    }

    /// Says which sector cannot be explained.
    pub fn explain(&self, found: &[u8]) -> Result<(), String> {
        if found.len() != self.now.len() {
            return Err(format!("size {} instead of {}", found.len(), self.now.len()));
        }
        for (sector, bytes) in found.chunks(SECTOR).enumerate() {
            let start = sector * SECTOR;
            let durable = &self.durable[start..start + bytes.len()];
            let known = bytes == durable || self.versions.get(&sector).is_some_and(|v| v.iter().any(|v| v == bytes));
            if !known {
                let versions = self.versions.get(&sector).map_or(0, Vec::len);
                return Err(format!(
                    "byte {start}: found {:02x?}.., flushed {:02x?}.., {versions} versions since",
                    &bytes[..8.min(bytes.len())],
                    &durable[..8.min(durable.len())]
                ));
            }
        }
        Ok(())
    }
}

/// A disk and its snapshots.
#[derive(Clone, Default)]
pub struct TwinDisk {
    pub live: Image,
    pub snapshots: BTreeMap<String, Frame>,
    /// What retired snapshots were.
    pub retired: BTreeMap<String, Frame>,
    /// Disks with the same number stem from one.
    pub lineage: u64,
}

/// The whole pool.
#[derive(Clone, Default)]
pub struct Twin {
    pub disks: BTreeMap<String, TwinDisk>,
}
