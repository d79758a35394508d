//! Extent files: a snapshot cut into files of one size, whose numbers and times say whether their content changed.
//!
//! An extent file is known by the newest epoch that touched any of its chunks, as the look-ups of the snapshot see it,
//! tombstones and touches of a resize included. Two snapshots for which that epoch is the same have the same bytes there,
//! because both descend from the state that ended it and neither has anything newer. So the epoch is in the inode number, and
//! its stamp, unique in the pool, is the time: also where another disk comes to the same path, by a rename or by what
//! `mount --export` shows there, size and time differ from those of the one before.
//!
//! # Rules
//! 1. Nothing is read but the map: length, time and mapped bytes of all extents come from one walk over it.
//! 2. What a snapshot shows never changes, so what was found out is kept; `KNOWN_MAX` bounds it, not the number or the
//!    size of snapshots. A page covers 16 GiB of a disk.
//! 3. A walk holds its snapshot, so that no row it resolves to is dropped on the way.
//! 4. An extent that nothing ever touched is known by its place and length alone ([`NEVER`] is its time): it reads as
//!    zeros, whoever shows it.
//!
//! # Why not remember which numbers the kernel holds
//! Any live snapshot in which the extent has that epoch will do, and which ones there are, the tables say. A remembered
//! snapshot would have to be replaced when it goes.

use std::collections::HashMap;
use std::sync::Arc;

use super::errno::{Answer, Errno};
use super::window::{Held, Window};
use crate::error::{Error, Result};
use crate::map::{BlockSet, Entry};
use crate::store::{StateKey, Status, Store, Tables};
use crate::sync::Mutex;
use crate::units::{BLOCK_SIZE, CHUNK_BLOCKS, CHUNK_SIZE, ChunkIndex, Epoch, SnapshotId, to_usize};

/// The ending of extent files.
const SUFFIX: &str = ".img";
/// Hexadecimal digits of their names.
const DIGITS: usize = 16;
/// The time of an extent that nothing ever touched, in seconds since 1970. No stamp is as small.
pub const NEVER: u64 = 1;
/// Bytes of a disk that one page of known extents covers.
const PAGE_BYTES: u64 = 16 << 30;
/// Extents that are known at a time, of all snapshots: 16 bytes each.
const KNOWN_MAX: usize = 4 << 20;

/// The smallest and the largest extent, as binary logarithms.
const SHIFTS: std::ops::RangeInclusive<u32> = 21..=30;
/// A disk has 2 to the power of this bytes at most.
const DISK_SHIFT: u32 = 46;

/// A place in a disk that is cut into extents of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Binary logarithm of the extent size.
    shift: u32,
    /// Which of them.
    index: u32,
}

impl Slot {
    /// Returns a number of 26 bits for size and place together: a one, then as many bits as there may be extents.
    #[must_use]
    pub fn code(self) -> u64 {
        1 << (DISK_SHIFT - self.shift) | u64::from(self.index)
    }

    /// Reads such a number.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        let shift = DISK_SHIFT.checked_sub(code.checked_ilog2()?)?;
        if !SHIFTS.contains(&shift) {
            return None;
        }
        let index = code ^ 1 << (DISK_SHIFT - shift);
        Some(Self { shift, index: u32::try_from(index).ok()? })
    }

    /// Returns the first byte.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.index) << self.shift
    }
}

/// How an open or listed snapshot is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The snapshot.
    pub id: SnapshotId,
    /// Where its look-ups begin.
    pub key: StateKey,
    /// Bytes.
    pub size: u64,
    /// Seconds since 1970 when it was taken.
    pub created: u64,
    shift: u32,
}

/// What the map says of one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Known {
    /// The newest epoch that touched it; 0 when none did.
    pub epoch: Epoch,
    /// Blocks mapped.
    pub blocks: u32,
}

impl Cut {
    fn of(tables: &Tables, key: StateKey) -> Result<Self> {
        let gone = || Error::not_found("the snapshot was removed");
        let row = tables.state(key).ok_or_else(gone)?;
        let shift = tables.disk(row.disk)?.settings.extent_size.trailing_zeros();
        Ok(Self { id: row.snapshot, key, size: row.size, created: row.created, shift })
    }

    /// Finds a live snapshot.
    ///
    /// # Errors
    /// `NotFound` when it was removed or retired.
    pub fn live(tables: &Tables, id: SnapshotId) -> Result<Self> {
        let (key, row) = tables.snapshot_by_id(id)?;
        if row.status != Status::Live {
            return Err(Error::not_found(format!("snapshot {} has no data any more", tables.called_snapshot(row))));
        }
        Self::of(tables, key)
    }

    /// Returns how many extents there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.shift)
    }

    /// Returns the bytes of every extent but the last.
    #[must_use]
    pub fn extent_size(&self) -> u64 {
        1 << self.shift
    }

    /// Returns an extent by its number.
    #[must_use]
    pub fn slot(&self, index: u64) -> Option<Slot> {
        let index = u32::try_from(index).ok().filter(|index| u64::from(*index) < self.count())?;
        Some(Slot { shift: self.shift, index })
    }

    /// Tells whether an extent is one of this snapshot.
    #[must_use]
    pub fn has(&self, slot: Slot) -> bool {
        slot.shift == self.shift && u64::from(slot.index) < self.count()
    }

    /// Returns the length of an extent.
    #[must_use]
    pub fn length(&self, slot: Slot) -> u64 {
        self.size.saturating_sub(slot.offset()).min(1 << self.shift)
    }

    /// Returns the extent with a name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Slot> {
        let digits = name.strip_suffix(SUFFIX).filter(|digits| digits.len() == DIGITS)?;
        if !digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return None;
        }
        let offset = u64::from_str_radix(digits, 16).ok()?;
        self.slot(offset >> self.shift).filter(|slot| slot.offset() == offset)
    }

    fn page_of(&self, slot: Slot) -> (u64, usize) {
        let per_page = PAGE_BYTES >> self.shift;
        (u64::from(slot.index) / per_page, to_usize(u64::from(slot.index) % per_page))
    }
}

/// Returns the name of an extent.
#[must_use]
pub fn name(slot: Slot) -> String {
    format!("{:016x}{SUFFIX}", slot.offset())
}

/// Returns the blocks of a chunk that lie below the end of a disk.
fn inside(size: u64, chunk: ChunkIndex) -> BlockSet {
    let blocks = size.saturating_sub(chunk.byte()).div_ceil(BLOCK_SIZE).min(CHUNK_BLOCKS);
    BlockSet::range(0, to_usize(blocks))
}

/// One page: the extents of 16 GiB of a snapshot.
#[derive(Debug)]
struct Page {
    /// Empty when nothing in it was ever touched.
    extents: Vec<Known>,
    used: u64,
}

#[derive(Debug, Default)]
struct Pages {
    pages: HashMap<(SnapshotId, u64), Page>,
    known: usize,
    clock: u64,
}

/// What is known about extents.
#[derive(Debug, Default)]
pub struct Extents(Mutex<Pages>);

impl Pages {
    fn get(&mut self, id: SnapshotId, page: u64, at: usize) -> Option<Known> {
        self.clock += 1;
        let found = self.pages.get_mut(&(id, page))?;
        found.used = self.clock;
        Some(found.extents.get(at).copied().unwrap_or_default())
    }

    fn put(&mut self, id: SnapshotId, page: u64, extents: Vec<Known>) {
        while self.known + extents.len() > KNOWN_MAX
            && let Some(oldest) = self.pages.iter().min_by_key(|(_, page)| page.used).map(|(key, _)| *key)
        {
            self.drop_page(oldest);
        }
        // A page that knows nothing weighs something too.
        self.known += extents.len().max(1);
        self.clock += 1;
        let used = self.clock;
        if let Some(old) = self.pages.insert((id, page), Page { extents, used }) {
            self.known -= old.extents.len().max(1);
        }
    }

    fn drop_page(&mut self, key: (SnapshotId, u64)) {
        if let Some(page) = self.pages.remove(&key) {
            self.known -= page.extents.len().max(1);
        }
    }
}

impl Extents {
    /// Returns what the map says of an extent of a snapshot. The snapshot is live, or the caller
    /// holds it.
    ///
    /// # Errors
    /// ESTALE when it has gone, EIO when the map cannot be read.
    pub fn known(&self, store: &Arc<Store>, cut: &Cut, slot: Slot, held: bool) -> Answer<Known> {
        assert!(cut.has(slot), "an extent is asked of the snapshot that has it");
        let (page, at) = cut.page_of(slot);
        if let Some(known) = self.0.lock().get(cut.id, page, at) {
            return Ok(known);
        }
        let own = if held { None } else { Some(Held::new(store, cut.id).map_err(|error| Errno::from(error).stale())?) };
        let extents = read_page(store, cut, page)?;
        drop(own);
        let known = extents.get(at).copied().unwrap_or_default();
        self.0.lock().put(cut.id, page, extents);
        Ok(known)
    }

    /// Returns it if it is known already.
    fn peek(&self, cut: &Cut, slot: Slot) -> Option<Known> {
        let (page, at) = cut.page_of(slot);
        self.0.lock().get(cut.id, page, at)
    }

    /// Forgets a snapshot that is gone.
    pub fn forget(&self, id: SnapshotId) {
        let mut pages = self.0.lock();
        let gone: Vec<_> = pages.pages.keys().filter(|key| key.0 == id).copied().collect();
        gone.into_iter().for_each(|key| pages.drop_page(key));
    }
}

/// Walks over the map of one page.
fn read_page(store: &Store, cut: &Cut, page: u64) -> Result<Vec<Known>> {
    let begin = page * PAGE_BYTES;
    let end = (begin + PAGE_BYTES).min(cut.size);
    let map = store.map_of(cut.key);
    let mut walk = map.walk(ChunkIndex::of_byte(begin))?;
    let mut extents = Vec::new();
    while let Some(found) = walk.step()?.filter(|found| found.chunk.byte() < end) {
        if extents.is_empty() {
            extents.resize(to_usize((end - begin).div_ceil(1 << cut.shift)), Known::default());
        }
        let known: &mut Known = &mut extents[to_usize((found.chunk.byte() - begin) >> cut.shift)];
        known.epoch = known.epoch.max(found.epoch);
        known.blocks += found.entry.mapped().and(&inside(cut.size, found.chunk)).count();
    }
    Ok(extents)
}

/// One extent, from the rows of its own chunks: what the map says, and the entries.
fn read_extent(store: &Store, cut: &Cut, slot: Slot) -> Result<(Known, Vec<Entry>)> {
    let path = store.tables.read().lookup_path(cut.key.0, cut.key.1);
    let first = ChunkIndex::of_byte(slot.offset());
    let count = u32::try_from(cut.length(slot).div_ceil(CHUNK_SIZE)).expect("512 chunks at most");
    let mut known = Known::default();
    let mut entries = Vec::with_capacity(count as usize);
    for chunk in (first.0..first.0 + count).map(ChunkIndex) {
        let found = store.resolve_on(&path, chunk)?;
        known.epoch = known.epoch.max(found.row.map_or(Epoch(0), |row| row.1));
        known.blocks += found.entry.mapped().and(&inside(cut.size, chunk)).count();
        entries.push(found.entry);
    }
    Ok((known, entries))
}

/// Opens the extent of a snapshot if it has the epoch that is looked for.
///
/// # Errors
/// `NotFound` when the snapshot is gone or shows something else there.
pub fn open(store: &Arc<Store>, held: Arc<Held>, cut: Cut, slot: Slot, epoch: Epoch) -> Result<Window> {
    let (known, entries) = read_extent(store, &cut, slot)?;
    if known.epoch != epoch {
        return Err(Error::not_found("the snapshot has other bytes there"));
    }
    Ok(Window::new(store, held, cut, slot.offset(), cut.length(slot)).knowing(entries))
}

/// Finds a live snapshot that shows an extent as an epoch left it, and holds it. The states that do descend from the one
/// that ended the epoch; the nearest ones come first.
///
/// # Errors
/// ESTALE when there is none any more; EIO when the map cannot be read.
pub fn find(store: &Arc<Store>, extents: &Extents, slot: Slot, epoch: Epoch) -> Answer<(Arc<Held>, Cut)> {
    let mut near: Vec<(Epoch, SnapshotId)> = {
        let tables = store.tables.read();
        let live = tables.states().filter(|((_, ended), row)| row.status == Status::Live && *ended >= epoch);
        live.filter(|(key, _)| Cut::of(&tables, *key).is_ok_and(|cut| cut.has(slot)))
            .map(|((_, ended), row)| (ended, row.snapshot))
            .collect()
    };
    near.sort_unstable();
    for (_, id) in near {
        let Ok((held, cut)) = Held::new(store, id) else { continue };
        if !cut.has(slot) {
            continue;
        }
        let known = match extents.peek(&cut, slot) {
            Some(known) => known,
            None => read_extent(store, &cut, slot)?.0,
        };
        if known.epoch == epoch {
            return Ok((held, cut));
        }
    }
    Err(Errno::ESTALE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_over_all_sizes() {
        for shift in SHIFTS {
            let last = u32::try_from((1_u64 << (DISK_SHIFT - shift)) - 1).unwrap();
            for index in [0, 1, 511, last] {
                let slot = Slot { shift, index };
                assert!(slot.code() < 1 << 26);
                assert_eq!(Slot::from_code(slot.code()), Some(slot));
            }
        }
        for nothing in [0, 1, (1 << 16) - 1, 1 << 26, u64::MAX] {
            assert_eq!(Slot::from_code(nothing), None);
        }
    }

    #[test]
    fn names_are_offsets() {
        let key = StateKey::default();
        let cut = Cut { id: SnapshotId(1), key, size: (9 << 20) + 512, created: 0, shift: 22 };
        assert_eq!(cut.count(), 3);
        let names: Vec<String> = (0..3).map(|index| name(cut.slot(index).unwrap())).collect();
        assert_eq!(names, ["0000000000000000.img", "0000000000400000.img", "0000000000800000.img"]);
        for (index, name) in names.iter().enumerate() {
            assert_eq!(cut.named(name), cut.slot(index as u64));
        }
        assert_eq!(cut.length(cut.slot(2).unwrap()), (1 << 20) + 512);
        for bad in
            ["0000000000c00000.img", "0000000000000001.img", "0000000000400000", "400000.img", "+000000000400000.img"]
        {
            assert_eq!(cut.named(bad), None, "{bad}");
        }
        assert_eq!(cut.named("000000000080000A.img"), None);
        assert_eq!(Cut { size: 0, ..cut }.count(), 0);
    }
}
