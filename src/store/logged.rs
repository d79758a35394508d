//! Small synchronous writes: their data goes into the journal, and one sync makes data and map durable together.
//!
//! The first write of a block after a snapshot gets a new place in its segment. To make that durable the host has to
//! allocate and commit its own metadata, and then we sync the journal: two or three turns of the disk where an
//! overwrite in place needs one. So a flush that covers only a few new blocks puts copies of them into the frame that
//! names them (as ZFS does with its intent log) and leaves the segment unsynced. Measured with fdatasync after every
//! 4 KiB write: see `tests/bench/disk`, row "first write".
//!
//! # Rules
//! 1. The data is in the segment too, written by the write itself; readers never look into the journal.
//! 2. A copy in the journal is newer than, or the same as, what the segment has on disk, or it is deleted by the flush
//!    that made the segment newer: an overwrite of a logged block is logged again, or its copy is deleted.
//! 3. A fold syncs the segments first and then drops the copies; they do not reach the catalog. Those of a segment whose file
//!    is missing do, for the opening that finds it again: nothing can have overwritten them meanwhile.
//!
//! # After a crash
//! Opening writes the copies to their segments (unless a trusted log of `unflushed` says that the block was overwritten since), syncs, and deletes them durably before anything else is written.

use std::collections::{BTreeMap, BTreeSet};

use super::Store;
use super::head::Head;
use super::rows::{Key, KeyParts, Row, Table, decode_block, encode_block};
use crate::error::Result;
use crate::sync::Mutex;
use crate::units::{BLOCK_SIZE, BlockAddress, SegmentId, to_usize};

/// Blocks that a flush takes into the journal at most.
const BLOCKS_MAX: usize = 16;
/// Bytes of the rows of so many copies.
pub(super) const COPIES_MAX: usize = BLOCKS_MAX * (4096 + 64);
/// Logged addresses that are remembered before those that a fold has dropped are looked for.
const LOGGED_MAX: usize = 20_000;

#[derive(Debug, Default)]
struct Inner {
    /// Copies of blocks written since the last flush.
    blocks: BTreeMap<BlockAddress, Box<[u8]>>,
    /// More was written since then than is copied, or a write failed.
    spoiled: bool,
    /// Addresses of which the journal may have a copy.
    logged: BTreeSet<BlockAddress>,
    /// Of them, those written again since the last flush.
    overwritten: BTreeSet<BlockAddress>,
}

/// What a disk wrote since its last flush, as far as it is little.
#[derive(Debug, Default)]
pub struct SmallWrites {
    inner: Mutex<Inner>,
}

/// What a flush has to do with the copies.
#[derive(Debug)]
pub(super) enum Plan {
    /// Put these rows into the frame; the segments need no sync.
    Log(Vec<Row>),
    /// Sync the segments; then these copies are out of date.
    Sync(Vec<Row>),
}

impl SmallWrites {
    /// Tells whether a write of so many bytes would still be copied: then a flush that comes next logs it, and its place
    /// in the segment is best written through the page cache.
    pub fn would_copy(&self, len: usize) -> bool {
        let inner = self.inner.lock();
        !inner.spoiled && inner.blocks.len() + len / to_usize(BLOCK_SIZE) <= BLOCKS_MAX
    }

    /// Notes a write of whole blocks at consecutive addresses that has just returned. Returns the addresses of which the
    /// journal has an older copy.
    pub fn note(&self, first: BlockAddress, data: &[u8]) -> Vec<BlockAddress> {
        let mut stale = Vec::new();
        let mut inner = self.inner.lock();
        if inner.blocks.len() + data.len() / to_usize(BLOCK_SIZE) > BLOCKS_MAX {
            inner.spoiled = true;
            inner.blocks.clear();
        }
        if inner.spoiled && inner.logged.is_empty() {
            return stale;
        }
        for (n, block) in data.chunks_exact(to_usize(BLOCK_SIZE)).enumerate() {
            let address = BlockAddress::from_raw(first.raw() + n as u64).expect("of one segment");
            if inner.logged.contains(&address) {
                inner.overwritten.insert(address);
                stale.push(address);
            }
            if !inner.spoiled {
                inner.blocks.insert(address, block.into());
            }
        }
        stale
    }

    /// Notes that a write failed: nothing is known of its blocks.
    pub fn spoil(&self) {
        let mut inner = self.inner.lock();
        inner.spoiled = true;
        inner.blocks.clear();
    }

    /// Begins anew and says what the flush of everything noted so far has to do. A flush that changes the map logs if it
    /// may; one that does not is a sync of the segment anyway, and logs only what is logged already.
    pub(super) fn take(&self, map_changes: bool, may_log: bool) -> Plan {
        let mut inner = self.inner.lock();
        let blocks = std::mem::take(&mut inner.blocks);
        let overwritten = std::mem::take(&mut inner.overwritten);
        let spoiled = std::mem::take(&mut inner.spoiled);
        let worth_it = map_changes || !overwritten.is_empty();
        if worth_it && may_log && !spoiled && !blocks.is_empty() {
            inner.logged.extend(blocks.keys());
            return Plan::Log(
                blocks.into_iter().map(|(at, block)| Row::put(Key::data(at), encode_block(&block))).collect(),
            );
        }
        inner.logged.retain(|address| !overwritten.contains(address));
        Plan::Sync(overwritten.into_iter().map(|address| Row::delete(Key::data(address))).collect())
    }
}

impl Store {
    /// Forgets logged addresses whose copies a fold has dropped, when there are many.
    pub(super) fn tidy_logged(&self, head: &Head) {
        let mut inner = head.small.inner.lock();
        if inner.logged.len() > LOGGED_MAX {
            inner.logged.retain(|address| self.ledger.copy_counts(&Key::data(*address)));
        }
    }

    /// Syncs segments whose logged blocks a fold is about to drop from the journal. Returns those that cannot have them,
    /// because their files are missing.
    ///
    /// # Errors
    /// Any error of the host.
    pub(super) fn settle_segments(&self, ids: &BTreeSet<SegmentId>) -> Result<BTreeSet<SegmentId>> {
        let mut lost = BTreeSet::new();
        for id in ids {
            let there = self.tables.read().segment(*id).is_ok_and(|row| !row.removed);
            if there && self.segments.is_lost(*id) {
                lost.insert(*id);
            } else if there && let Some(segment) = self.segments.opened(*id) {
                // One that is not open has no writes that no sync has covered, and is not opened for it: there may be no
                // descriptor, and then what the caller has captured would be lost.
                // Whatever the error says: which writes a failed sync lost is unknown, and a second one would not tell.
                segment.sync_punches().inspect_err(|error| self.ledger.poison(error))?;
            }
        }
        Ok(lost)
    }

    /// Brings the logged blocks of an interrupted opening to their segments, except those of which the segment is known to have
    /// something newer. Returns the rows that delete their copies, and
    /// the segments: a copy may be of a block that was freed and punched since, so they have to be swept. Copies whose
    /// segment is missing stay.
    ///
    /// # Errors
    /// Any error of the host.
    pub(super) fn replay_logged(&self, newer: &BTreeSet<BlockAddress>) -> Result<(Vec<Row>, BTreeSet<SegmentId>)> {
        let mut copies: BTreeMap<BlockAddress, Vec<u8>> = BTreeMap::new();
        self.ledger.scan(&Key::first_of(Table::Data), &Key::beyond(Table::Data), &mut |key, value| {
            if let KeyParts::Data(address) = key.parts()? {
                copies.insert(address, decode_block(&value)?);
            }
            Ok(())
        })?;
        copies.retain(|address, _| !self.segments.is_lost(address.segment()));
        let mut touched = BTreeSet::new();
        for (address, block) in &copies {
            // A segment that was removed since had nothing mapped.
            if self.tables.read().segment(address.segment()).is_ok_and(|row| !row.removed) {
                if !newer.contains(address) {
                    self.segment(address.segment())?.write(block, *address, false)?;
                }
                touched.insert(address.segment());
            }
        }
        for id in &touched {
            // Also what an earlier process wrote, and of which this one does not know that a sync is owed.
            let segment = self.segment(*id)?;
            segment.wrote();
            segment.sync()?;
        }
        Ok((copies.into_keys().map(|address| Row::delete(Key::data(address))).collect(), touched))
    }
}
