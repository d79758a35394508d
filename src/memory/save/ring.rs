//! The ring in which page blocks wait that the guest was about to write: one thread fills it, one empties it.
//!
//! # Rules
//! 1. Who fills it never waits for a lock and allocates nothing: whose a slot is follows from two counters, so the lock of a slot,
//!    which the compiler wants, is always free.
//! 2. All its memory is there before the first page block comes ([`Ring::warm`]): the guest waits for no page of ours.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;

use crate::checkpoint::PageBlock;
use crate::sync::Mutex;
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// A place for one page block.
#[derive(Debug)]
struct Slot {
    number: PageBlock,
    len: usize,
    bytes: Pages,
}

/// The ring.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Box<[Mutex<Slot>]>,
    /// Slots filled, and emptied, since the beginning.
    filled: AtomicU64,
    emptied: AtomicU64,
    closed: AtomicBool,
    /// Who empties it.
    taker: OnceLock<Thread>,
}

impl Ring {
    /// Makes one of `bytes`, in slots of `page_block` bytes; at least two.
    ///
    /// # Errors
    /// When the host has no memory.
    pub(super) fn new(bytes: usize, page_block: usize) -> io::Result<Self> {
        let count = (bytes / page_block).max(2);
        let mut rest = Pages::new(count * page_block)?;
        let mut slots = Vec::with_capacity(count);
        for index in (0..count).rev() {
            let bytes = if index == 0 {
                std::mem::replace(&mut rest, Pages::new(1)?)
            } else {
                rest.split_off(index * page_block)
            };
            slots.push(Mutex::new(Slot { number: PageBlock(0), len: 0, bytes }));
        }
        let (filled, emptied) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { slots: slots.into(), filled, emptied, closed: AtomicBool::new(false), taker: OnceLock::new() })
    }

    /// Takes the memory of all slots. Called once by who empties it, before anybody fills it.
    pub(super) fn warm(&self) {
        for slot in &self.slots {
            if self.filled.load(Ordering::Acquire) == 0 {
                slot.lock().bytes.fill(0);
            }
        }
    }

    /// Says that the calling thread empties it.
    pub(super) fn taken_by_this_thread(&self) {
        self.taker.get_or_init(std::thread::current);
    }

    fn slot(&self, index: u64) -> &Mutex<Slot> {
        &self.slots[to_usize(index % self.slots.len() as u64)]
    }

    /// Tells whether there is no room.
    pub(super) fn is_full(&self) -> bool {
        self.filled.load(Ordering::Acquire) - self.emptied.load(Ordering::Acquire) >= self.slots.len() as u64
    }

    /// Fills a slot, for which there must be room, with `len` bytes that `fill` writes.
    ///
    /// # Errors
    /// Those of `fill`; the slot stays empty then.
    pub(super) fn put(
        &self,
        number: PageBlock,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        assert!(!self.is_full(), "there is room: only this thread fills it");
        let index = self.filled.load(Ordering::Acquire);
        let mut slot = self.slot(index).lock();
        fill(&mut slot.bytes[..len])?;
        (slot.number, slot.len) = (number, len);
        drop(slot);
        self.filled.store(index + 1, Ordering::Release);
        self.wake();
        Ok(())
    }

    /// Says that nothing is put in any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(taker) = self.taker.get() {
            taker.unpark();
        }
    }

    /// Waits for a page block and calls `each` with it; `None` when it is closed and empty.
    pub(super) fn take<T>(&self, each: impl FnOnce(PageBlock, &[u8]) -> T) -> Option<T> {
        loop {
            // Before the counter is looked at: what was put in before it was closed is seen.
            let closed = self.closed.load(Ordering::SeqCst);
            let index = self.emptied.load(Ordering::Acquire);
            if self.filled.load(Ordering::Acquire) > index {
                let slot = self.slot(index).lock();
                let done = each(slot.number, &slot.bytes[..slot.len]);
                drop(slot);
                self.emptied.store(index + 1, Ordering::Release);
                return Some(done);
            }
            if closed {
                return None;
            }
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order() {
        for slots in [1, 3, 64] {
            let ring = Ring::new(slots * 4096, 4096).unwrap();
            std::thread::scope(|scope| {
                let taking = scope.spawn(|| {
                    ring.taken_by_this_thread();
                    let mut seen = 0;
                    while let Some(fits) = ring.take(|number, bytes| {
                        number.0 == seen
                            && bytes.len() == 4096 - to_usize(seen % 7)
                            && bytes.iter().all(|b| u64::from(*b) == seen % 251)
                    }) {
                        assert!(fits, "page block {seen}");
                        seen += 1;
                    }
                    seen
                });
                for number in 0..5000 {
                    while ring.is_full() {
                        std::thread::yield_now();
                    }
                    let fill = |bytes: &mut [u8]| {
                        bytes.fill((number % 251) as u8);
                        Ok(())
                    };
                    ring.put(PageBlock(number), 4096 - to_usize(number % 7), fill).unwrap();
                }
                ring.close();
                assert_eq!(taking.join().unwrap(), 5000);
            });
        }
    }

    #[test]
    fn what_failed_leaves_the_slot_empty() {
        let ring = Ring::new(8192, 4096).unwrap();
        ring.put(PageBlock(1), 10, |_| Err(io::ErrorKind::Other.into())).unwrap_err();
        ring.close();
        assert!(ring.take(|_, _| ()).is_none());
    }
}
