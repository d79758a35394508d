//! The map cache: decoded chunks of live disks and of opened snapshots, under one budget for the whole pool.
//!
//! A [`Chunk`] is also the place where writers of the same blocks meet: its lock guards the entry, and its `busy` set
//! names the blocks that somebody is writing right now, so that a long pwrite is never done under a lock.
//!
//! # Rules
//! 1. A chunk with changes that are not in a journal frame yet, or that anybody holds, is never evicted.
//! 2. What is not cached has no unsaved changes: the stored rows are the whole truth about it.
//! 3. Eviction is by a clock (second chance) per shard and stops when the budget is met.
//!
//! Chunks belong to an owner: a number handed out per live head and per opened snapshot, never reused, so that a
//! revert simply goes on with a new one.

use std::collections::{HashMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{BlockSet, Entry, Piece};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::units::{BranchId, ChunkIndex, Epoch};

const SHARDS: usize = 64;
/// Looked at per insertion at most, so that no single look-up pays for the whole cache.
const EVICT_TRIES: usize = 32;
/// Bytes of a chunk besides its entries: the allocation, the map slot and the ring slot.
const CHUNK_WEIGHT: usize = size_of::<Chunk>() + 16 + 40 + 24;

/// One chunk of one state.
#[derive(Debug)]
pub struct Chunk {
    state: Mutex<ChunkState>,
    idle: Condvar,
    touched: AtomicBool,
    weight: AtomicUsize,
    dirty: AtomicBool,
    used: Arc<AtomicUsize>,
}

/// What is known about a chunk; reached through [`Chunk::lock`].
#[derive(Debug, Default)]
pub struct ChunkState {
    /// Whether the fields below were filled from the stored rows.
    pub loaded: bool,
    /// The addresses as of now, acknowledged writes included.
    pub entry: Entry,
    /// The stored row the entry came from, or was last saved to.
    pub row: Option<(BranchId, Epoch)>,
    /// The epoch in which the unsaved changes were made.
    pub epoch: Epoch,
    /// `Some` while there are unsaved changes: the entry as it is stored.
    pub saved: Option<Entry>,
    /// Addresses that were handed out and dropped again since the last save; no row ever named them.
    pub dropped: Vec<Piece>,
    /// Blocks that got an address since the last save, whatever became of them.
    pub fresh: u64,
    /// Whether the next save stores the entry even if nothing is mapped and nothing was.
    pub marked: bool,
    /// Blocks that somebody is writing.
    pub busy: BlockSet,
    waiting: bool,
}

impl ChunkState {
    /// Tells whether there are changes that no journal frame has.
    #[must_use]
    pub fn dirty(&self) -> bool {
        self.saved.is_some()
    }
}

/// The lock of a chunk; keeps the books of the cache when it is let go.
#[derive(Debug)]
pub struct ChunkGuard<'a> {
    chunk: &'a Chunk,
    state: MutexGuard<'a, ChunkState>,
}

impl Deref for ChunkGuard<'_> {
    type Target = ChunkState;
    fn deref(&self) -> &ChunkState {
        &self.state
    }
}

impl DerefMut for ChunkGuard<'_> {
    fn deref_mut(&mut self) -> &mut ChunkState {
        &mut self.state
    }
}

impl Drop for ChunkGuard<'_> {
    fn drop(&mut self) {
        let weight = CHUNK_WEIGHT
            + self.state.entry.weight()
            + self.state.saved.as_ref().map_or(0, Entry::weight)
            + self.state.dropped.capacity() * size_of::<Piece>();
        let before = self.chunk.weight.swap(weight, Ordering::Relaxed);
        if weight >= before {
            self.chunk.used.fetch_add(weight - before, Ordering::Relaxed);
        } else {
            self.chunk.used.fetch_sub(before - weight, Ordering::Relaxed);
        }
        self.chunk.dirty.store(self.state.dirty(), Ordering::Relaxed);
    }
}

impl ChunkGuard<'_> {
    /// Waits until nobody writes any block of `set`; the lock is given up meanwhile.
    pub fn wait_idle(&mut self, set: &BlockSet) {
        while self.state.busy.meets(set) {
            self.state.waiting = true;
            self.chunk.idle.wait(&mut self.state);
        }
    }

    /// Marks the blocks of `set` as being written.
    pub fn claim(&mut self, set: &BlockSet) {
        assert!(!self.state.busy.meets(set), "two writers claim one block");
        self.state.busy = self.state.busy.or(set);
    }

    /// Ends a claim.
    pub fn release(&mut self, set: &BlockSet) {
        self.state.busy = self.state.busy.minus(set);
        if std::mem::take(&mut self.state.waiting) {
            self.chunk.idle.notify_all();
        }
    }
}

impl Chunk {
    fn new(used: &Arc<AtomicUsize>) -> Self {
        Self {
            state: Mutex::new(ChunkState::default()),
            idle: Condvar::new(),
            touched: AtomicBool::new(true),
            weight: AtomicUsize::new(0),
            dirty: AtomicBool::new(false),
            used: Arc::clone(used),
        }
    }

    /// Locks the chunk, unless somebody has.
    pub fn try_lock(&self) -> Option<ChunkGuard<'_>> {
        Some(ChunkGuard { chunk: self, state: self.state.try_lock()? })
    }

    /// Locks the chunk.
    pub fn lock(&self) -> ChunkGuard<'_> {
        ChunkGuard { chunk: self, state: self.state.lock() }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.used.fetch_sub(self.weight.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

type Key = (u64, ChunkIndex);

#[derive(Debug, Default)]
struct Shard {
    chunks: HashMap<Key, Arc<Chunk>>,
    ring: VecDeque<Key>,
}

/// All cached chunks of a pool.
#[derive(Debug)]
pub struct Cache {
    shards: Vec<Mutex<Shard>>,
    used: Arc<AtomicUsize>,
    budget: usize,
}

impl Cache {
    /// Makes an empty cache that tries to stay under `budget` bytes.
    #[must_use]
    pub fn new(budget: usize) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), used: Arc::default(), budget }
    }

    fn shard(&self, key: Key) -> &Mutex<Shard> {
        let mixed = (key.0.wrapping_mul(31).wrapping_add(u64::from(key.1.0))).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.shards[(mixed >> 58) as usize]
    }

    /// Returns the chunk, made empty and not `loaded` if it was not there.
    pub fn get(&self, owner: u64, chunk: ChunkIndex) -> Arc<Chunk> {
        let key = (owner, chunk);
        let mut shard = self.shard(key).lock();
        if let Some(found) = shard.chunks.get(&key) {
            found.touched.store(true, Ordering::Relaxed);
            return Arc::clone(found);
        }
        let made = Arc::new(Chunk::new(&self.used));
        drop(made.lock()); // enters its weight
        shard.chunks.insert(key, Arc::clone(&made));
        shard.ring.push_back(key);
        if self.used.load(Ordering::Relaxed) > self.budget {
            shard.evict(&self.used, self.budget);
        }
        made
    }

    /// Returns the chunk if it is cached.
    pub fn peek(&self, owner: u64, chunk: ChunkIndex) -> Option<Arc<Chunk>> {
        self.shard((owner, chunk)).lock().chunks.get(&(owner, chunk)).map(Arc::clone)
    }

    /// Drops every chunk of an owner, changed or not.
    pub fn forget(&self, owner: u64) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.chunks.retain(|key, _| key.0 != owner);
            shard.ring.retain(|key| key.0 != owner);
        }
    }

    /// Returns the bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

impl Shard {
    fn evict(&mut self, used: &AtomicUsize, budget: usize) {
        for _ in 0..EVICT_TRIES.min(self.ring.len()) {
            if used.load(Ordering::Relaxed) <= budget {
                return;
            }
            let Some(key) = self.ring.pop_front() else { return };
            let Some(chunk) = self.chunks.get(&key) else { continue };
            let busy = Arc::strong_count(chunk) > 1 || chunk.dirty.load(Ordering::Relaxed);
            if busy || chunk.touched.swap(false, Ordering::Relaxed) {
                self.ring.push_back(key);
            } else {
                self.chunks.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockAddress, SegmentId};

    #[test]
    fn stays_near_its_budget_and_keeps_what_is_dirty() {
        let cache = Cache::new(100 * CHUNK_WEIGHT);
        for chunk in 0..10_000 {
            let made = cache.get(1, ChunkIndex(chunk));
            let mut state = made.lock();
            state.loaded = true;
            if chunk == 7 {
                state.saved = Some(Entry::EMPTY);
                state.entry.assign(BlockAddress::new(SegmentId(1), 512), &BlockSet::FULL);
            }
        }
        assert!(cache.used() < 300 * CHUNK_WEIGHT, "{} used", cache.used() / CHUNK_WEIGHT);
        assert!(cache.peek(1, ChunkIndex(7)).is_some_and(|c| c.lock().loaded));
        cache.forget(1);
        assert_eq!(cache.used(), 0);
    }

    #[test]
    fn writers_of_one_block_take_turns() {
        let cache = Cache::new(1 << 20);
        let chunk = cache.get(1, ChunkIndex(0));
        let set = BlockSet::range(3, 5);
        let mut guard = chunk.lock();
        guard.claim(&set);
        drop(guard);
        let other = Arc::clone(&chunk);
        let waiter = std::thread::spawn(move || {
            let mut guard = other.lock();
            guard.wait_idle(&BlockSet::range(4, 8));
            guard.claim(&BlockSet::range(4, 8));
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        let mut guard = chunk.lock();
        assert!(guard.busy == set, "the waiter has not claimed yet");
        guard.release(&set);
        drop(guard);
        waiter.join().unwrap();
        assert!(chunk.lock().busy == BlockSet::range(4, 8));
    }
}
