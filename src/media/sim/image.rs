//! One image of a file: a length and the pages that are not holes.
//!
//! # Rules
//! 1. Pages are shared between images by `Arc` and copied when one side writes, so a fork costs pointers, not bytes.
//! 2. No page lies wholly past the length, and the bytes of the last page past the length are zero: a file that grows
//!    again shows zeros there.
//! 3. A page that is there is allocated, even when it holds only zeros; a hole is a page that is not there.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page: the unit of allocation.
pub(super) const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

type Page = Arc<[u8; PAGE_BYTES]>;

/// The bytes of a file as one observer sees them.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

/// Splits a byte range at multiples of `unit` (a power of two) into `(offset, range within the buffer)`.
pub(super) fn split(offset: u64, len: usize, unit: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let room = usize::try_from(unit - at % unit).expect("units are small");
        let piece = done..len.min(done + room);
        done = piece.end;
        Some((at, piece))
    })
}

/// Returns where in its page an offset lies.
fn in_page(offset: u64) -> usize {
    usize::try_from(offset % PAGE).expect("less than a page")
}

impl Image {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Returns how many pages are allocated.
    pub(super) fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Returns how many pages a write would have to allocate.
    pub(super) fn missing(&self, offset: u64, len: usize) -> u64 {
        if len == 0 {
            return 0;
        }
        let (first, last) = (offset / PAGE, (offset + len as u64 - 1) / PAGE);
        last - first + 1 - self.pages.range(first..=last).count() as u64
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let there = self.len.saturating_sub(offset);
        let len = buf.len().min(usize::try_from(there).unwrap_or(usize::MAX));
        for (at, piece) in split(offset, len, PAGE) {
            let start = in_page(at);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => buf[piece.clone()].copy_from_slice(&page[start..start + piece.len()]),
                None => buf[piece].fill(0),
            }
        }
        len
    }

    pub(super) fn write(&mut self, data: &[u8], offset: u64) {
        for (at, piece) in split(offset, data.len(), PAGE) {
            let data = &data[piece];
            if let Ok(whole) = <[u8; PAGE_BYTES]>::try_from(data) {
                self.pages.insert(at / PAGE, Arc::new(whole));
            } else {
                let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE_BYTES]));
                let start = in_page(at);
                Arc::make_mut(page)[start..start + data.len()].copy_from_slice(data);
            }
        }
        if !data.is_empty() {
            self.len = self.len.max(offset + data.len() as u64);
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.forget(len.div_ceil(PAGE), u64::MAX);
            self.zero(len, len.next_multiple_of(PAGE));
        }
        self.len = len;
    }

    /// Frees the whole pages of the range and zeroes the rest; the length stays.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let mut end = offset + len;
        if end >= self.len {
            // The page that the file ends in goes as a whole, as on ext4 and XFS.
            end = end.next_multiple_of(PAGE);
        }
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first > last {
            return self.zero(offset, end);
        }
        self.zero(offset, first * PAGE);
        self.zero(last * PAGE, end);
        self.forget(first, last);
    }

    /// Returns the first run of pages at or after `offset`, cut to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        if offset >= self.len {
            return None;
        }
        let mut run = self.pages.range(offset / PAGE..).map(|(&index, _)| index);
        let first = run.next()?;
        let mut end = first + 1;
        while run.next() == Some(end) {
            end += 1;
        }
        Some((offset.max(first * PAGE), self.len.min(end * PAGE)))
    }

    /// Turns one bit over; the page becomes allocated if it was a hole.
    pub(super) fn flip(&mut self, byte: u64, bit: u8) {
        let mut one = [0];
        if self.read(&mut one, byte) == 1 {
            self.write(&[one[0] ^ (1 << (bit % 8))], byte);
        }
    }

    /// Drops the pages `first..last`.
    pub(super) fn forget(&mut self, first: u64, last: u64) {
        if first >= last {
            return;
        }
        let gone: Vec<u64> = self.pages.range(first..last).map(|(&index, _)| index).collect();
        for index in gone {
            self.pages.remove(&index);
        }
    }

    /// Makes one page what it is in `other`, sharing it.
    pub(super) fn share_page(&mut self, index: u64, other: &Self) {
        match other.pages.get(&index) {
            Some(page) => self.pages.insert(index, Arc::clone(page)),
            None => self.pages.remove(&index),
        };
    }

    /// Zeroes part of one page, if it is there.
    fn zero(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let Some(page) = self.pages.get_mut(&(start / PAGE)) {
            let stop = in_page(end - 1) + 1;
            Arc::make_mut(page)[in_page(start)..stop].fill(0);
        }
    }
}
