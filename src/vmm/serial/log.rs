//! The last MiB of what a guest said, numbered from its first byte.
//!
//! # Rules
//! 1. Bytes are numbered from zero since the guest began; [`Log::part`] says which number its first byte has.
//! 2. Writers never wait. Readers wait until there is something they have not seen, or the log is closed.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use crate::sync::{Condvar, Mutex};

/// Bytes that are kept.
const KEEP: usize = 1 << 20;

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// The number of the first byte that is kept.
    start: u64,
    closed: bool,
}

/// What a guest said.
#[derive(Debug, Default)]
pub struct Log {
    kept: Mutex<Kept>,
    more: Condvar,
}

/// Consecutive bytes of a [`Log`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The number of the first of them.
    pub start: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Log {
    /// Makes an empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the numbers of the first byte that is kept and of the next that will come.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        let kept = self.kept.lock();
        (kept.start, kept.start + kept.bytes.len() as u64)
    }

    /// Returns all that is kept from byte `from` on, or from the first that is kept if that is later. Waits until there is
    /// one; `None` when there will be none.
    #[must_use]
    pub fn part(&self, from: u64) -> Option<Part> {
        self.part_while(from, || true)
    }

    /// As [`Log::part`], but gives up when `wanted` says no; it is asked at first and whenever [`Log::wake`] is called.
    #[must_use]
    pub(super) fn part_while(&self, from: u64, wanted: impl Fn() -> bool) -> Option<Part> {
        let mut kept = self.kept.lock();
        while wanted() {
            let end = kept.start + kept.bytes.len() as u64;
            if from < end {
                let start = from.max(kept.start);
                let skip = usize::try_from(start - kept.start).expect("less than is kept");
                return Some(Part { start, bytes: kept.bytes.range(skip..).copied().collect() });
            }
            if kept.closed {
                return None;
            }
            self.more.wait(&mut kept);
        }
        None
    }

    /// Lets those who wait think again.
    pub(super) fn wake(&self) {
        let _kept = self.kept.lock();
        self.more.notify_all();
    }

    /// Says that nothing more will come.
    pub(in crate::vmm) fn close(&self) {
        self.kept.lock().closed = true;
        self.more.notify_all();
    }

    fn add(&self, bytes: &[u8]) {
        let mut kept = self.kept.lock();
        kept.bytes.extend(bytes);
        let over = kept.bytes.len().saturating_sub(KEEP);
        kept.bytes.drain(..over);
        kept.start += over as u64;
        self.more.notify_all();
    }
}

/// Writes to a log.
#[derive(Debug)]
pub(super) struct Writer(pub(super) Arc<Log>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_are_kept_with_their_numbers() {
        let log = Log::new();
        log.add(&vec![1; KEEP]);
        log.add(&[2, 3]);
        assert_eq!(log.range(), (2, KEEP as u64 + 2));
        let part = log.part(0).unwrap();
        assert_eq!((part.start, part.bytes.len()), (2, KEEP));
        assert_eq!(log.part(KEEP as u64 + 1).unwrap(), Part { start: KEEP as u64 + 1, bytes: vec![3] });
    }

    #[test]
    fn a_reader_waits_for_more_and_for_the_end() {
        let log = Arc::new(Log::new());
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut all = Vec::new();
                while let Some(part) = log.part(all.len() as u64) {
                    all.extend(part.bytes);
                }
                all
            }
        });
        log.add(b"more");
        log.add(b" and more");
        log.close();
        assert_eq!(reader.join().unwrap(), b"more and more");
    }
}
