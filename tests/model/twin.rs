//! The twin: images as plain vectors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

pub const SECTOR: usize = 512;

pub const BLOCK: usize = 4096;

/// What stands for the place of a block: no two writes have the same.
pub type Write = u64;
/// The block is unmapped.
pub const NOTHING: Write = 0;
/// A power cut left it open which write the block has.
pub const UNKNOWN: Write = u64::MAX;

/// Bytes, and of each block the write it has. Shared: the twin is copied for every operation.
#[derive(Clone, Default)]
pub struct Frame {
    pub bytes: Arc<Vec<u8>>,
    pub writes: Arc<Vec<Write>>,
    /// A shrink came before it: what that left may be unmapped at any time, which counts as a change where it may.
    pub shrunk: bool,
}

impl Frame {
    pub fn new(bytes: Vec<u8>, writes: Vec<Write>) -> Self {
        Self { bytes: Arc::new(bytes), writes: Arc::new(writes), shrunk: false }
    }
}

/// How a run of the program ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The power went: what was flushed is there.
    Power,
    /// The process was killed: so is what was acknowledged to a guest.
    Kill,
}

/// What is there for certain, and what may be there instead.
#[derive(Clone, Default)]
struct Base {
    bytes: Arc<Vec<u8>>,
    /// Other versions of sectors since then.
    versions: Arc<HashMap<usize, Vec<Vec<u8>>>>,
}

impl Base {
    fn of(bytes: &Arc<Vec<u8>>) -> Self {
        Self { bytes: Arc::clone(bytes), versions: Arc::default() }
    }

    fn note(&mut self, now: &[u8], sectors: std::ops::Range<usize>) {
        let versions = Arc::make_mut(&mut self.versions);
        for sector in sectors {
            let (start, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(now.len()));
            versions.entry(sector).or_default().push(now[start..end].to_vec());
        }
    }

    fn resize(&mut self, old: usize, size: usize) {
        Arc::make_mut(&mut self.bytes).resize(size, 0);
        // The versions of a last, short sector get longer with the disk.
        if !old.is_multiple_of(SECTOR)
            && let Some(list) = Arc::make_mut(&mut self.versions).get_mut(&(old / SECTOR))
        {
            let len = (size - old / SECTOR * SECTOR).min(SECTOR);
            list.iter_mut().for_each(|version| version.resize(len, 0));
        }
    }

    /// Says which sector cannot be explained.
    fn explain(&self, found: &[u8]) -> Result<(), String> {
        for (sector, bytes) in found.chunks(SECTOR).enumerate() {
            let start = sector * SECTOR;
            let certain = &self.bytes[start..start + bytes.len()];
            let known = bytes == certain || self.versions.get(&sector).is_some_and(|v| v.iter().any(|v| v == bytes));
            if !known {
                let versions = self.versions.get(&sector).map_or(0, Vec::len);
                return Err(format!(
                    "byte {start}: found {:02x?}.., certain {:02x?}.., {versions} versions since",
                    &bytes[..8.min(bytes.len())],
                    &certain[..8.min(certain.len())]
                ));
            }
        }
        Ok(())
    }
}

/// A live disk, with everything that may be found after a power cut or a kill.
#[derive(Clone, Default)]
pub struct Image {
    /// As of now.
    pub now: Arc<Vec<u8>>,
    /// As last flushed.
    durable: Base,
    /// As last flushed, or as last acknowledged to a guest.
    kept: Base,
    /// Of each block the write it has.
    pub writes: Arc<Vec<Write>>,
    /// Blocks that were written or unmapped since the flush.
    unsettled: Arc<BTreeSet<usize>>,
    /// As in a frame.
    pub shrunk: bool,
}

impl Image {
    pub fn new(size: usize) -> Self {
        Self::of(Frame::new(vec![0; size], vec![NOTHING; size.div_ceil(BLOCK)]))
    }

    pub fn of(frame: Frame) -> Self {
        let Frame { bytes, writes, shrunk } = frame;
        Self { durable: Base::of(&bytes), kept: Base::of(&bytes), now: bytes, writes, shrunk, ..Self::default() }
    }

    pub fn frame(&self) -> Frame {
        Frame { bytes: Arc::clone(&self.now), writes: Arc::clone(&self.writes), shrunk: self.shrunk }
    }

    /// Takes a snapshot. Its list of writes is its own, shared with this disk until something changes it: see
    /// [`Image::is_still`].
    pub fn stop(&mut self) -> Frame {
        self.flush();
        self.writes = Arc::new(self.writes.to_vec());
        self.frame()
    }

    /// Tells whether nothing was done to the disk since it was a snapshot; `None` when that is not known.
    pub fn is_still(&self, frame: &Frame) -> Option<bool> {
        match (Arc::ptr_eq(&self.writes, &frame.writes), self.now == frame.bytes) {
            (_, false) => Some(false),
            (true, true) => Some(true),
            (false, true) => None,
        }
    }

    /// What was found after a power cut: of blocks that were not settled it is not known which write they have.
    pub fn found(&self, bytes: Vec<u8>) -> Self {
        let mut writes = self.writes.to_vec();
        writes.resize(bytes.len().div_ceil(BLOCK), UNKNOWN);
        for block in &*self.unsettled {
            if let Some(write) = writes.get_mut(*block) {
                *write = UNKNOWN;
            }
        }
        Self { shrunk: self.shrunk, ..Self::of(Frame::new(bytes, writes)) }
    }

    /// What was found after a kill: as after a power cut, but nothing of it is durable that was not so before.
    pub fn found_by_the_next(&self, bytes: Vec<u8>) -> Self {
        let found = self.found(bytes);
        let (durable, unsettled) = (self.durable.clone(), Arc::clone(&self.unsettled));
        Self { durable, unsettled, ..found }
    }

    /// What is there after an operation that failed, while the program runs on: any version of what it was to change.
    pub fn found_meanwhile(&self, bytes: Vec<u8>) -> Self {
        let found = self.found(bytes);
        let (durable, kept, unsettled) = (self.durable.clone(), self.kept.clone(), Arc::clone(&self.unsettled));
        Self { durable, kept, unsettled, ..found }
    }

    /// A guest has learned that what it did is done.
    pub fn acknowledge(&mut self) {
        self.kept = Base::of(&self.now);
    }

    /// Notes which write blocks have now.
    pub fn settle_on(&mut self, blocks: std::ops::Range<usize>, write: Write) {
        for block in blocks {
            Arc::make_mut(&mut self.writes)[block] = write;
            Arc::make_mut(&mut self.unsettled).insert(block);
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
        Arc::make_mut(&mut self.now)[offset..offset + data.len()].copy_from_slice(data);
        if data.is_empty() {
            return;
        }
        let sectors = offset / SECTOR..(offset + data.len()).div_ceil(SECTOR);
        self.durable.note(&self.now, sectors.clone());
        self.kept.note(&self.now, sectors);
    }

    pub fn flush(&mut self) {
        self.durable = Base::of(&self.now);
        self.kept = self.durable.clone();
        self.unsettled = Arc::default();
    }

    /// What a shrink left in the last block is written over with zeros before the disk grows, if there was one.
    pub fn touch_cut_end(&mut self, size: usize) {
        let old = self.now.len();
        if size > old && !old.is_multiple_of(BLOCK) && self.writes[old / BLOCK] != NOTHING {
            Arc::make_mut(&mut self.writes)[old / BLOCK] = UNKNOWN;
        }
    }

    /// A resize is durable at once; a shrink flushes.
    pub fn resize(&mut self, size: usize) {
        if size < self.now.len() {
            self.flush();
            self.shrunk = true;
        }
        self.touch_cut_end(size);
        let old = self.now.len();
        Arc::make_mut(&mut self.writes).resize(size.div_ceil(BLOCK), NOTHING);
        Arc::make_mut(&mut self.now).resize(size, 0);
        self.durable.resize(old, size);
        self.kept.resize(old, size);
    }

    /// Says which sector cannot be explained.
    pub fn explain(&self, found: &[u8], end: End) -> Result<(), String> {
        if found.len() != self.now.len() {
            return Err(format!("size {} instead of {}", found.len(), self.now.len()));
        }
        match end {
            End::Power => self.durable.explain(found),
            End::Kill => self.kept.explain(found),
        }
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
    /// What the disk began its epoch as, while no snapshot was deleted or retired since.
    pub since: Option<Arc<Vec<Write>>>,
}

impl TwinDisk {
    /// Takes a snapshot.
    pub fn stop(&mut self, name: &str) {
        let frame = self.live.stop();
        self.since = Some(Arc::clone(&frame.writes));
        self.snapshots.insert(name.to_owned(), frame);
    }

    /// Becomes what a snapshot is.
    pub fn become_like(&mut self, frame: Frame) {
        self.since = Some(Arc::clone(&frame.writes));
        self.live = Image::of(frame);
    }
}

/// The whole pool.
#[derive(Clone, Default)]
pub struct Twin {
    pub disks: BTreeMap<String, TwinDisk>,
}

impl Twin {
    /// A snapshot goes, or its data does: who counts what was written in its epoch is for the pool to say.
    pub fn mix_epochs(&mut self) {
        self.disks.values_mut().for_each(|disk| disk.since = None);
    }

    /// Blocks that a revert of a disk drops: at least those that nothing else has, and exactly those of its epoch when no
    /// snapshot was deleted or retired in between.
    pub fn dropped_by_revert(&self, name: &str) -> (usize, Option<usize>) {
        let disk = &self.disks[name];
        let others = self.disks.iter().filter(|(other, _)| *other != name).map(|(_, disk)| &disk.live.writes);
        let snapshots = self.disks.values().flat_map(|disk| disk.snapshots.values()).map(|frame| &frame.writes);
        let others: Vec<_> = others.chain(snapshots).collect();
        let writes = || disk.live.writes.iter().enumerate().filter(|(_, write)| ![NOTHING, UNKNOWN].contains(*write));
        let alone = |block: usize, write: Write| others.iter().all(|other| other.get(block) != Some(&write));
        let least = writes().filter(|(block, write)| alone(*block, **write)).count();
        let known = !disk.live.shrunk && !disk.live.writes.contains(&UNKNOWN);
        let exact = disk
            .since
            .as_ref()
            .filter(|since| known && !since.contains(&UNKNOWN))
            .map(|since| writes().filter(|(block, write)| since.get(*block) != Some(*write)).count());
        (least, exact)
    }
}
