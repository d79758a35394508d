//! What is in flight, in memory that the front end keeps: after the server was killed, the next one reads there which
//! requests were taken and not answered, and does them again (vhost-user protocol, "Inflight I/O tracking").
//!
//! ```text
//! of each queue, 64-byte aligned:
//!  0 features u64 | 8 version u16 | 10 entries u16 | 12 last_batch_head u16 | 14 used_idx u16
//! 16 + 16 * head: inflight u8 | padding | 6 next u16 | 8 counter u64
//! ```
//!
//! # Rules
//! 1. A head is marked before the request is begun, and the mark goes after the request is in the used ring.
//! 2. What is about to go into the used ring is first listed, in that order, from `last_batch_head` on. `used_idx` follows
//!    when all the marks are gone. So if they differ, as many as differ from the beginning of the list are answered.
//! 3. The front end could write anything here, or take the memory away: every index is checked, and who has read asks
//!    [`Track::is_lost`].
//!
//! # After a crash
//! A request that was done and not answered is done again. That is harmless: the guest was not told, so it neither counts
//! on the blocks nor uses them for anything else, and requests that are under way together have no order among them.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{AtomicAccess, Bytes};

use super::sent::Kind;
use crate::sys::shared::Shared;

const VERSION: u16 = 1;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGN: usize = 64;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Why there can be no tracking.
pub(super) type Refused = &'static str;

/// The memory, of all queues.
#[derive(Debug)]
pub(super) struct Region {
    shared: Shared,
    queues: u16,
    size: u16,
}

/// Bytes of one queue of `size` entries.
fn stride(size: u16) -> usize {
    (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGN)
}

impl Region {
    /// Makes memory for `queues` queues of `size` entries, and the file through which the front end keeps it.
    ///
    /// # Errors
    /// When the host has no memory.
    pub(super) fn make(queues: u16, size: u16) -> io::Result<(u64, File)> {
        let len = (stride(size) * usize::from(queues)) as u64;
        let file =
            File::from(rustix::fs::memfd_create("vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(len)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((len, file))
    }

    /// Takes what the front end kept.
    ///
    /// # Errors
    /// When it is no memory, too small, or cannot be mapped; also when it is of huge pages: what is needed of it is no whole ones.
    pub(super) fn open(file: File, offset: u64, len: u64, queues: u16, size: u16) -> io::Result<Self> {
        let bad = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let needed = stride(size) * usize::from(queues);
        Kind::Memory.check(&file)?;
        if len < needed as u64 {
            return Err(bad("the inflight region is too small for its queues"));
        }
        // Beyond the end of a file its pages are no memory: touching them would end the server.
        if offset.checked_add(needed as u64).is_none_or(|end| file.metadata().is_ok_and(|data| end > data.len())) {
            return Err(bad("the inflight region is larger than its file"));
        }
        Ok(Self { shared: Shared::of(file, offset, needed)?, queues, size })
    }

    /// Returns the tracking of one queue of `size` entries.
    ///
    /// # Errors
    /// When the region has no room for it.
    pub(super) fn track(self: &Arc<Self>, queue: usize, size: u16) -> Result<Track, Refused> {
        if queue >= usize::from(self.queues) || size > self.size {
            return Err("the inflight region has no room for the queue");
        }
        Ok(Track { region: Arc::clone(self), begin: queue * stride(self.size), size: self.size, counter: 0 })
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        self.shared.map().as_volatile_slice().load(at, Ordering::Acquire).expect("an aligned place inside the region")
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        self.shared
            .map()
            .as_volatile_slice()
            .store(value, at, Ordering::Release)
            .expect("an aligned place inside the region");
    }
}

/// The tracking of one queue.
#[derive(Debug)]
pub(crate) struct Track {
    region: Arc<Region>,
    begin: usize,
    /// Entries of the region, no fewer than the queue has.
    size: u16,
    /// Of the next request: requests are done again in this order.
    counter: u64,
}

impl Track {
    /// Tells whether the memory was found to be gone.
    pub(super) fn is_lost(&self) -> bool {
        self.region.shared.is_lost()
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.size, "heads are checked where they come from");
        self.begin + HEADER + ENTRY * usize::from(head)
    }

    /// Reads what was in flight when the last server ended; `used` is the index in the used ring. Returns the heads in the
    /// order in which they were taken; `None` when nobody has used the region before.
    ///
    /// # Errors
    /// When the region makes no sense.
    pub(super) fn recover(&mut self, used: u16) -> Result<Option<Vec<u16>>, Refused> {
        let region = Arc::clone(&self.region);
        match region.load::<u16>(self.begin + VERSION_AT) {
            0 => {
                region.store(self.begin + ENTRIES_AT, self.size);
                region.store(self.begin + USED_AT, used);
                region.store(self.begin + VERSION_AT, VERSION);
                return Ok(None);
            }
            VERSION => {}
            _ => return Err("the inflight region is of a version that this program does not know"),
        }
        let answered = used.wrapping_sub(region.load::<u16>(self.begin + USED_AT));
        if answered > self.size {
            return Err("the inflight region belongs to another used ring");
        }
        let mut head = region.load::<u16>(self.begin + LAST_BATCH_AT);
        for _ in 0..answered {
            if head >= self.size {
                return Err("the inflight region lists a request that cannot be");
            }
            region.store(self.entry(head), 0_u8);
            head = region.load(self.entry(head) + NEXT);
        }
        region.store(self.begin + USED_AT, used);
        let marked = |head: &u16| region.load::<u8>(self.entry(*head)) != 0;
        let mut left: Vec<_> =
            (0..self.size).filter(marked).map(|head| (region.load::<u64>(self.entry(head) + COUNTER), head)).collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(left.into_iter().map(|(_, head)| head).collect()))
    }

    /// Marks a request that was taken.
    pub(super) fn begin(&mut self, head: u16) {
        self.region.store(self.entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.store(self.entry(head), 1_u8);
    }

    /// Lists requests that go into the used ring now, in this order.
    pub(super) fn ending(&self, heads: impl DoubleEndedIterator<Item = u16>) {
        let mut next = None;
        for head in heads.rev() {
            if let Some(next) = next {
                self.region.store::<u16>(self.entry(head) + NEXT, next);
            }
            next = Some(head);
        }
        if let Some(first) = next {
            self.region.store(self.begin + LAST_BATCH_AT, first);
        }
        fence(Ordering::SeqCst);
    }

    /// Takes the marks of requests that are in the used ring, whose index is `used` now.
    pub(super) fn ended(&self, heads: impl Iterator<Item = u16>, used: u16) {
        fence(Ordering::SeqCst);
        for head in heads {
            self.region.store(self.entry(head), 0_u8);
        }
        self.region.store(self.begin + USED_AT, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Arc<Region> {
        let (len, file) = Region::make(2, 8).unwrap();
        assert_eq!(len, 384);
        Arc::new(Region::open(file, 0, len, 2, 8).unwrap())
    }

    #[test]
    fn what_was_taken_and_not_answered_is_found_again_in_order() {
        let region = region();
        let mut track = region.track(1, 8).unwrap();
        assert_eq!(track.recover(65_534), Ok(None), "a new one");
        for head in [5, 2, 7, 0] {
            track.begin(head);
        }
        track.ending([2, 7].into_iter());
        track.ended([2, 7].into_iter(), 0);
        let mut again = region.track(1, 8).unwrap();
        assert_eq!(again.recover(0), Ok(Some(vec![5, 0])));
        again.begin(1);
        assert_eq!(region.track(1, 8).unwrap().recover(0), Ok(Some(vec![5, 0, 1])));
        assert_eq!(region.track(0, 8).unwrap().recover(3), Ok(None), "the other queue has its own");
    }

    #[test]
    fn a_batch_that_got_into_the_used_ring_in_part_is_answered_in_part() {
        for answered in 0..=3_u16 {
            let region = region();
            let mut track = region.track(0, 8).unwrap();
            track.recover(10).unwrap();
            for head in [3, 6, 1, 4] {
                track.begin(head);
            }
            track.ending([6, 1, 3].into_iter());
            // Killed when so many were in the ring.
            let left = [vec![3, 6, 1, 4], vec![3, 1, 4], vec![3, 4], vec![4]];
            let found = region.track(0, 8).unwrap().recover(10 + answered).unwrap();
            assert_eq!(found.as_ref(), Some(&left[usize::from(answered)]));
            assert_eq!(region.track(0, 8).unwrap().recover(10 + answered), Ok(found), "and once more");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let region = region();
        assert!(region.track(2, 8).is_err() && region.track(0, 9).is_err());
        let mut track = region.track(0, 8).unwrap();
        track.recover(0).unwrap();
        assert!(region.track(0, 8).unwrap().recover(9).is_err(), "more answers than entries");
        region.store(LAST_BATCH_AT, 8_u16);
        assert!(region.track(0, 8).unwrap().recover(1).is_err(), "a head beyond the end");
        region.store(VERSION_AT, 2_u16);
        track.recover(0).unwrap_err();
        let (len, file) = Region::make(1, 8).unwrap();
        let copy = || file.try_clone().unwrap();
        Region::open(copy(), 0, len - 1, 1, 8).unwrap_err();
        Region::open(copy(), 0, len + 64, 1, 12).expect_err("larger than its file");
        Region::open(copy(), u64::MAX, len, 1, 8).unwrap_err();
        Region::open(copy(), 1, len - 1, 1, 4).expect_err("not on a page");
    }
}
