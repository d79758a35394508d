//! Pieces of checkpoints that were read lately, within a budget that all who read share.
//!
//! A piece is a storage block as it was read, or a page block as it was expanded. One read is for all who want the same
//! piece at the same time.
//!
//! # Rules
//! 1. The pieces that are kept never take more than the budget, but for the last one: that is there while it is worked with.
//! 2. What could not be had is not remembered: the next one who wants it tries again.
//! 3. No lock is held while a piece is made.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::geometry::{PageBlock, StorageBlock};
use crate::error::{Error, Result};
use crate::sync::Mutex;
use crate::sys::pages::Pages;

/// Buffers that are kept for later: new ones would be a fault of ours for each page.
const SPARE_MAX: usize = 4;

/// What is kept of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Piece {
    /// A storage block of a layer, as it is stored.
    Block(usize, StorageBlock),
    /// A page block, expanded.
    Page(PageBlock),
}

/// The number of who reads, and the piece.
type Key = (u64, Piece);
type Entry = Arc<OnceLock<Result<Pages>>>;

/// Pieces that were read lately.
#[derive(Debug)]
pub struct Lately {
    state: Mutex<State>,
    budget: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Each piece with its length and when it was last wanted.
    pieces: HashMap<Key, (Entry, usize, u64)>,
    bytes: usize,
    now: u64,
    readers: u64,
    spare: Vec<Pages>,
}

impl Lately {
    /// Makes one that keeps so many bytes at most.
    #[must_use]
    pub fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), budget })
    }

    /// Returns a number for one who reads.
    pub(super) fn enter(&self) -> u64 {
        let mut state = self.state.lock();
        state.readers += 1;
        state.readers
    }

    /// Forgets the pieces of one who reads no more.
    pub(super) fn leave(&self, reader: u64) {
        let mut state = self.state.lock();
        let State { pieces, bytes, .. } = &mut *state;
        pieces.retain(|(of, _), (_, length, _)| {
            let stays = *of != reader;
            *bytes -= if stays { 0 } else { *length };
            stays
        });
    }

    /// Calls `work` with a piece of `length` bytes, which `make` makes if it is not there.
    ///
    /// # Errors
    /// Those of `make` and `work`; when there is no memory.
    pub(super) fn with<T>(
        &self,
        key: Key,
        length: usize,
        make: impl FnOnce(&mut [u8]) -> Result<()>,
        work: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<T> {
        let entry = self.entry(key, length);
        let made = entry.get_or_init(|| {
            let mut pages = self.buffer(length)?;
            make(&mut pages).map(|()| pages)
        });
        match made {
            Ok(bytes) => work(bytes),
            Err(error) => {
                let error = error.again();
                self.state.lock().remove(&key, Some(&entry));
                Err(error)
            }
        }
    }

    /// Forgets a piece.
    pub(super) fn forget(&self, key: Key) {
        self.state.lock().remove(&key, None);
    }

    /// Returns what is kept of a piece, if it is there.
    pub(super) fn find(&self, key: Key) -> Option<Entry> {
        let entry = self.state.lock().touch(&key)?;
        matches!(entry.get(), Some(Ok(_))).then_some(entry)
    }

    fn buffer(&self, length: usize) -> Result<Pages> {
        let spare = {
            let mut state = self.state.lock();
            let at = state.spare.iter().position(|pages| pages.len() == length);
            at.map(|at| state.spare.swap_remove(at))
        };
        let made = spare.map_or_else(|| Pages::new(length), Ok);
        made.map_err(|error| Error::io("there is no memory to read a checkpoint into", error))
    }

    fn entry(&self, key: Key, length: usize) -> Entry {
        let mut state = self.state.lock();
        if let Some(entry) = state.touch(&key) {
            return entry;
        }
        while !state.pieces.is_empty() && state.bytes + length > self.budget {
            let oldest = state.pieces.iter().min_by_key(|(_, (_, _, wanted))| *wanted).map(|(key, _)| *key);
            oldest.iter().for_each(|key| state.remove(key, None));
        }
        let entry = Entry::default();
        let now = state.now;
        state.bytes += length;
        state.pieces.insert(key, (Arc::clone(&entry), length, now));
        entry
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.state.lock().bytes
    }
}

impl State {
    /// Finds a piece and notes that it is wanted.
    fn touch(&mut self, key: &Key) -> Option<Entry> {
        self.now += 1;
        let (entry, _, wanted) = self.pieces.get_mut(key)?;
        *wanted = self.now;
        Some(Arc::clone(entry))
    }

    /// Removes a piece; with `only`, if it is still that one.
    fn remove(&mut self, key: &Key, only: Option<&Entry>) {
        if let Some(only) = only
            && self.pieces.get(key).is_some_and(|(entry, ..)| !Arc::ptr_eq(entry, only))
        {
            return;
        }
        let Some((entry, length, _)) = self.pieces.remove(key) else { return };
        self.bytes -= length;
        if self.spare.len() < SPARE_MAX
            && let Some(Ok(pages)) = Arc::into_inner(entry).and_then(OnceLock::into_inner)
        {
            self.spare.push(pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> Key {
        (1, Piece::Page(PageBlock(number)))
    }

    fn ask(lately: &Lately, number: u64, fill: u8) -> u8 {
        let make = |out: &mut [u8]| {
            out.fill(fill);
            Ok(())
        };
        lately.with(key(number), 4096, make, |bytes| Ok(bytes[4095])).unwrap()
    }

    #[test]
    fn the_budget_is_kept_and_what_was_wanted_last_stays() {
        let lately = Lately::new(4 * 4096);
        for number in 0..4 {
            assert_eq!(ask(&lately, number, 1), 1);
        }
        assert_eq!(ask(&lately, 0, 2), 1, "it is there");
        for number in 4..7 {
            assert_eq!(ask(&lately, number, 1), 1);
            assert_eq!(lately.bytes(), 4 * 4096);
        }
        assert_eq!((ask(&lately, 0, 3), ask(&lately, 1, 3)), (1, 3), "the others were older");
        lately.with((1, Piece::Block(0, StorageBlock(0))), 9 * 4096, |_| Ok(()), |_| Ok(())).unwrap();
        assert_eq!(lately.bytes(), 9 * 4096, "the last one is there whatever its length");
        ask(&lately, 1, 4);
        assert_eq!(lately.bytes(), 4096);
        lately.leave(2);
        assert!(lately.find(key(1)).is_some());
        lately.leave(1);
        assert!(lately.find(key(1)).is_none() && lately.bytes() == 0);
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let lately = Lately::new(1 << 20);
        let fail = |_: &mut [u8]| Err(Error::failed("not now"));
        lately.with(key(1), 4096, fail, |_| Ok(())).unwrap_err();
        assert!(lately.find(key(1)).is_none() && lately.bytes() == 0);
        assert_eq!(ask(&lately, 1, 7), 7);
    }

    #[test]
    fn one_read_is_for_all() {
        let (lately, made) = (Lately::new(1 << 20), std::sync::atomic::AtomicU32::new(0));
        let make = |out: &mut [u8]| {
            made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            std::thread::sleep(std::time::Duration::from_millis(20));
            out.fill(5);
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(lately.with(key(1), 4096, make, |bytes| Ok(bytes[0])).unwrap(), 5));
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
