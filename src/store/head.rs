//! The live side of a disk: the epoch it writes, what changed since the last frame, and where new blocks go.
//!
//! # Rules
//! 1. Writers hold the gate (shared) from look-up to the end of their pwrite, and read the [`Line`] under it. So an epoch
//!    switch, which holds it exclusively, finds nothing in flight, and does no I/O itself.
//! 2. A slot is written by one block in one life: a block that was discarded and is written again gets a new slot, in a
//!    new slab if need be. So nothing ever has to call a queued punch back.
//! 3. A chunk is in `dirty` exactly when its state says so; after a switch the old list is in `freezing` until its frame
//!    is submitted, and a chunk that a writer of the new epoch needs is copied to `frozen` first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use super::commit::Capture;
use super::ledger::Ticket;
use super::rows::SegmentRow;
use super::tables::Edit;
use super::tenancy::Tenancy;
use super::{DiskRow, Store};
use crate::error::{Error, Result};
use crate::map::{BlockSet, ChunkGuard};
use crate::pool::Segment;
use crate::sync::{Mutex, MutexGuard, RwLock};
use crate::units::{BlockAddress, BranchId, CHUNK_BLOCKS, ChunkIndex, DiskId, Epoch, SLOT_BITS, SegmentId};

/// What a writer needs to know of its disk; fixed while the gate is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Owner of its cached chunks; another one after a revert.
    pub owner: u64,
    /// The branch.
    pub branch: BranchId,
    /// The epoch being written.
    pub epoch: Epoch,
    /// Addresses below were born in earlier epochs.
    pub floor: u64,
    /// Bytes.
    pub size: u64,
}

/// The slab of a chunk that takes new blocks.
#[derive(Debug, Clone)]
pub struct Slab {
    /// Slot 0.
    pub base: BlockAddress,
    /// Its segment.
    pub segment: Arc<Segment>,
    /// Slots that were handed out, whatever became of them.
    pub used: BlockSet,
}

#[derive(Debug, Default)]
struct Alloc {
    segment: Option<Arc<Segment>>,
    next_slot: u32,
}

/// Order of frames of one disk.
#[derive(Debug, Default)]
pub struct Order {
    /// Flush requests up to this one are done.
    pub completed: u64,
}

/// The live side of a disk.
#[derive(Debug)]
pub struct Head {
    /// The disk.
    pub id: DiskId,
    /// Shared by writers; exclusive for switching the line.
    pub gate: Arc<RwLock<()>>,
    /// Held while frames of this disk are made.
    pub commit: Mutex<Order>,
    /// Flush requests so far.
    pub requested: AtomicU64,
    line: Mutex<Line>,
    dirty: Mutex<BTreeSet<ChunkIndex>>,
    freezing: Mutex<BTreeSet<ChunkIndex>>,
    frozen: Mutex<HashMap<ChunkIndex, Capture>>,
    slabs: Mutex<HashMap<ChunkIndex, Slab>>,
    alloc: Mutex<Alloc>,
    owed: Mutex<BTreeMap<SegmentId, Arc<Segment>>>,
    /// Segments in which an earlier process, that was killed, may have overwritten blocks in place and not synced them. A
    /// flush and a snapshot of this process hold for that, too.
    pub(super) earlier: Mutex<Vec<SegmentId>>,
    /// Checksums of blocks written whole in epochs that are not sealed yet.
    pub crcs: super::seal::Checksums,
    /// Blocks mapped now, unsaved changes included.
    pub referenced: AtomicI64,
    /// Bytes of new blocks that were allowed, or written, and that the tables do not count yet. Below 0 for a moment only.
    pub granted: AtomicI64,
    /// Who may write.
    pub tenancy: Tenancy,
    /// What of the changes is written down for who outlives this process.
    pub unflushed: super::unflushed::Unflushed,
    /// Set when the disk was removed; nothing is written or flushed any more.
    gone: AtomicBool,
    /// Set when the pool is being closed; nothing is written any more.
    closed: AtomicBool,
    /// The last change of the disk's row that a flush has to wait for.
    pub owed_row: Mutex<Ticket>,
    /// What was written since the last flush, as far as it is little.
    pub small: super::logged::SmallWrites,
    /// Changes of the content that have been made, whatever they were. Counted before they are acknowledged.
    changes: AtomicU64,
    /// How fast users of the disk may be.
    pub(super) limits: super::limits::Limits,
    /// How many requests wait on purpose.
    pub waiters: super::waiting::Waiters,
}

/// How long the writes that are under way are waited for when a pool is closed.
const PATIENCE: Duration = Duration::from_secs(10);

impl Head {
    pub(super) fn new(id: DiskId, row: &DiskRow, owner: u64) -> Self {
        let line = Line { owner, branch: row.branch, epoch: row.epoch, floor: row.floor, size: row.size };
        Self {
            id,
            gate: Arc::default(),
            commit: Mutex::default(),
            requested: AtomicU64::new(0),
            line: Mutex::new(line),
            dirty: Mutex::default(),
            freezing: Mutex::default(),
            frozen: Mutex::default(),
            slabs: Mutex::default(),
            alloc: Mutex::default(),
            owed: Mutex::default(),
            earlier: Mutex::default(),
            crcs: super::seal::Checksums::default(),
            referenced: AtomicI64::new(i64::try_from(row.referenced).unwrap_or(i64::MAX)),
            granted: AtomicI64::new(0),
            tenancy: Tenancy::default(),
            unflushed: super::unflushed::Unflushed::default(),
            gone: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            owed_row: Mutex::default(),
            small: super::logged::SmallWrites::default(),
            changes: AtomicU64::new(0),
            limits: super::limits::Limits::new(&row.settings),
            waiters: super::waiting::Waiters::default(),
        }
    }

    /// Marks the disk as removed; the caller holds the gate exclusively.
    pub fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
        self.changed();
    }

    /// Fails when the disk was removed.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn refuse_gone(&self) -> Result<()> {
        if self.gone.load(Ordering::Acquire) { Err(Error::not_found("the disk was removed")) } else { Ok(()) }
    }

    /// Ends writing for good. Returns whether every write that had begun has ended, too; it does not wait for long.
    pub fn shut(&self) -> bool {
        self.closed.store(true, Ordering::Release);
        self.gate.try_write_for(PATIENCE).is_some()
    }

    /// Fails when nothing is to be written any more; the caller holds the gate.
    ///
    /// # Errors
    /// `NotFound` when the disk was removed, `ReadOnly` when the pool is being closed.
    pub fn refuse_ended(&self) -> Result<()> {
        self.refuse_gone()?;
        if self.closed.load(Ordering::Acquire) { Err(Error::read_only("the pool is closed")) } else { Ok(()) }
    }

    /// Returns the line as of now. Without the gate it may change at any moment.
    pub fn line(&self) -> Line {
        *self.line.lock()
    }

    /// Changes the line; the caller holds the gate exclusively.
    pub fn set_line(&self, line: Line) {
        *self.line.lock() = line;
        self.changed();
    }

    /// Counts a change of the content, made and not acknowledged yet.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns a number that is another one after every change of the content.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Remembers that a segment is owed a sync.
    pub fn owe(&self, segment: &Arc<Segment>) {
        self.owed.lock().entry(segment.id()).or_insert_with(|| Arc::clone(segment));
    }

    /// Takes the segments that are owed a sync.
    pub fn take_owed(&self) -> Vec<Arc<Segment>> {
        std::mem::take(&mut *self.owed.lock()).into_values().collect()
    }

    /// Prepares a chunk for a change in the current epoch; the caller holds the gate, shared.
    pub fn begin_change(&self, line: &Line, chunk: ChunkIndex, state: &mut ChunkGuard<'_>) {
        if state.dirty() && state.epoch != line.epoch {
            let frozen = Capture::take(line.branch, chunk, state);
            self.frozen.lock().insert(chunk, frozen);
        }
        if !state.dirty() {
            state.saved = Some(state.entry.clone());
            state.epoch = line.epoch;
            self.dirty.lock().insert(chunk);
        }
    }

    /// Returns how many chunks have unsaved changes.
    pub fn dirty_chunks(&self) -> usize {
        self.dirty.lock().len()
    }

    /// Takes the list of changed chunks.
    pub fn take_dirty(&self) -> BTreeSet<ChunkIndex> {
        std::mem::take(&mut *self.dirty.lock())
    }

    /// Returns the first chunk from `from` on with changes that no submitted row shows yet.
    pub fn first_unsaved(&self, from: ChunkIndex) -> Option<ChunkIndex> {
        // Under both locks: a switch moves a list from one to the other.
        let dirty = self.dirty.lock();
        let freezing = self.freezing.lock();
        dirty.range(from..).next().into_iter().chain(freezing.range(from..).next()).min().copied()
    }

    /// Ends the epoch: the caller holds the gate exclusively and the commit lock. Returns the slabs of the ended epoch,
    /// to be dropped outside of the stop.
    pub fn switch(&self, line: Line) -> HashMap<ChunkIndex, Slab> {
        {
            let mut dirty = self.dirty.lock();
            let mut freezing = self.freezing.lock();
            assert!(freezing.is_empty(), "one switch at a time");
            *freezing = std::mem::take(&mut *dirty);
        }
        self.set_line(line);
        std::mem::take(&mut *self.slabs.lock())
    }

    /// Takes the changes of the ended epoch `epoch`, for the frame of its snapshot.
    pub fn take_frozen(&self, store: &Store, line: &Line, epoch: Epoch) -> Vec<Capture> {
        let list = self.freezing.lock().clone();
        let mut out = Vec::with_capacity(list.len());
        for chunk in list {
            let cached = store.cache.peek(line.owner, chunk).expect("changed chunks stay cached");
            let mut state = cached.lock();
            if state.dirty() && state.epoch == epoch {
                out.push(Capture::take(line.branch, chunk, &mut state));
            } else {
                drop(state);
                out.push(self.frozen.lock().remove(&chunk).expect("a chunk changed anew was frozen first"));
            }
        }
        out
    }

    /// Ends [`Head::switch`]: the changes of the ended epoch are submitted.
    pub fn thawed(&self) {
        self.freezing.lock().clear();
        assert!(self.frozen.lock().is_empty(), "every frozen chunk was taken");
    }

    /// Returns the address below which nothing will be handed out to this disk any more.
    pub fn next_address(&self, store: &Store) -> u64 {
        let alloc = self.alloc.lock();
        match &alloc.segment {
            Some(segment) if alloc.next_slot < 1 << SLOT_BITS => BlockAddress::new(segment.id(), alloc.next_slot).raw(),
            _ => BlockAddress::new(store.tables.read().meta.segment.next(), 0).raw(),
        }
    }

    /// Goes on in a new segment when the current one is well filled.
    pub fn roll_segment_if_full(&self, store: &Store) {
        let mut alloc = self.alloc.lock();
        let Some(segment) = &alloc.segment else { return };
        if store.tables.read().segment(segment.id()).is_ok_and(|row| row.mapped >= store.options.segment_blocks) {
            alloc.segment = None;
        }
    }

    /// Makes the next new block begin a segment.
    pub fn forget_segment(&self) {
        self.alloc.lock().segment = None;
    }

    /// Tells whether new blocks may still go to a segment.
    pub fn fills(&self, id: crate::units::SegmentId) -> bool {
        let alloc = self.alloc.lock();
        alloc.segment.as_ref().is_some_and(|s| s.id() == id)
            || self.slabs.lock().values().any(|slab| slab.base.segment() == id)
    }

    /// Hands out slots for the blocks of `set`, one slab per element of the answer; the caller has claimed the blocks.
    ///
    /// # Errors
    /// Any error of making a segment.
    pub fn hand_out(&self, store: &Store, chunk: ChunkIndex, set: &BlockSet) -> Result<Vec<(Slab, BlockSet)>> {
        let mut out = Vec::new();
        let mut rest = *set;
        if let Some(slab) = self.slabs.lock().get_mut(&chunk) {
            let fits = rest.minus(&slab.used);
            if !fits.is_empty() {
                slab.used = slab.used.or(&fits);
                rest = rest.minus(&fits);
                out.push((slab.clone(), fits));
            }
        }
        if !rest.is_empty() {
            let slab = self.new_slab(store, rest)?;
            self.slabs.lock().insert(chunk, slab.clone());
            out.push((slab, rest));
        }
        Ok(out)
    }

    /// As [`Head::hand_out`], for a caller that must not wait: from one slab, and only if no segment has to be made.
    pub fn hand_out_now(&self, chunk: ChunkIndex, set: &BlockSet) -> Option<Slab> {
        if let Some(slab) = self.slabs.lock().get_mut(&chunk) {
            if slab.used.meets(set) {
                return None;
            }
            slab.used = slab.used.or(set);
            return Some(slab.clone());
        }
        let slab = {
            let mut alloc = self.alloc.try_lock()?;
            let segment = Arc::clone(alloc.segment.as_ref().filter(|_| alloc.next_slot < 1 << SLOT_BITS)?);
            let base = BlockAddress::new(segment.id(), alloc.next_slot);
            alloc.next_slot += u32::try_from(CHUNK_BLOCKS).expect("512");
            Slab { base, segment, used: *set }
        };
        self.slabs.lock().insert(chunk, slab.clone());
        Some(slab)
    }

    fn new_slab(&self, store: &Store, used: BlockSet) -> Result<Slab> {
        let mut alloc = self.alloc.lock();
        if alloc.segment.is_none() || alloc.next_slot >= 1 << SLOT_BITS {
            alloc.segment = Some(self.new_segment(store)?);
            alloc.next_slot = u32::try_from(CHUNK_BLOCKS).expect("512");
        }
        let segment = Arc::clone(alloc.segment.as_ref().expect("made above"));
        let base = BlockAddress::new(segment.id(), alloc.next_slot);
        alloc.next_slot += u32::try_from(CHUNK_BLOCKS).expect("512");
        Ok(Slab { base, segment, used })
    }

    /// Makes a segment: its id is durably taken first, so that it is never handed out again, then the file, then its row.
    fn new_segment(&self, store: &Store) -> Result<Arc<Segment>> {
        let (id, ticket) = {
            let mut tables = store.tables.write();
            let mut edit = Edit::new(&mut tables);
            let id = edit.meta(|meta| meta.segment = meta.segment.next()).segment;
            (id, store.ledger.submit(edit.finish())?)
        };
        if id > crate::units::SegmentId::MAX {
            return Err(Error::failed("the pool has used up its segment ids"));
        }
        store.ledger.wait(ticket)?;
        let nonce = getrandom::u64().map_err(|e| Error::failed(format!("the host gives no random numbers: {e}")))?;
        let segment = store.segments.create(id, nonce, self.id)?;
        let row = SegmentRow { disk: self.id, nonce, opening: store.opening, mapped: 0, swept: false, removed: false };
        let mut tables = store.tables.write();
        let mut edit = Edit::new(&mut tables);
        edit.put_segment(id, row);
        let ticket = store.ledger.submit(edit.finish())?;
        drop(tables);
        // An opening removes a file that no row names, whatever was written to it.
        store.ledger.wait(ticket)?;
        Ok(segment)
    }

    /// Counts blocks that became mapped or unmapped.
    pub fn count(&self, change: i64) {
        self.referenced.fetch_add(change, Ordering::Relaxed);
    }

    /// Counts `now` bytes as granted in the place of `before`: what was written for what was allowed, nothing for what
    /// was not written or is in the tables.
    pub fn settle(&self, before: u64, now: u64) {
        let signed = |bytes: u64| i64::try_from(bytes).expect("a disk ends at 64 TiB");
        self.granted.fetch_add(signed(now) - signed(before), Ordering::AcqRel);
    }

    /// Locks the order of frames.
    pub fn order(&self) -> MutexGuard<'_, Order> {
        self.commit.lock()
    }
}

impl Store {
    /// Returns the live side of a disk, the same for everybody. The caller does not have the tables locked.
    ///
    /// # Errors
    /// `NotFound` when there is no such disk.
    pub fn head(&self, id: DiskId) -> Result<Arc<Head>> {
        if let Some(head) = self.heads.lock().get(&id) {
            return Ok(Arc::clone(head));
        }
        // The tables first, as everywhere; and until the head is in the list, so that the disk is not removed in between.
        let tables = self.tables.read();
        let row = tables.disk(id)?;
        let mut heads = self.heads.lock();
        let head = heads.entry(id).or_insert_with(|| {
            let head = Head::new(id, row, self.new_owner());
            if self.unclean {
                // What was born before the floor was synced for a snapshot, and is not overwritten.
                let oldest = BlockAddress::from_raw(row.floor).map_or(SegmentId(0), BlockAddress::segment);
                let mine =
                    tables.segments().filter(|(at, segment)| segment.disk == id && *at >= oldest && !segment.removed);
                *head.earlier.lock() = mine.map(|(at, _)| at).filter(|at| !self.segments.is_lost(*at)).collect();
            }
            if self.keeper.stopping() {
                head.shut();
            }
            Arc::new(head)
        });
        Ok(Arc::clone(head))
    }

    /// Returns the live sides that were used since the pool was opened.
    pub fn open_heads(&self) -> Vec<Arc<Head>> {
        let mut all: Vec<_> = self.heads.lock().values().map(Arc::clone).collect();
        all.sort_by_key(|head| head.id);
        all
    }

    /// Forgets the live side of a removed disk.
    pub fn forget_head(&self, id: DiskId) {
        if let Some(head) = self.heads.lock().remove(&id) {
            self.cache.forget(head.line().owner);
        }
    }
}
