//! The buffer in which page blocks become one storage block.
//!
//! # Rules
//! 1. A page block that was pushed is taken: it is compressed in place, behind those that are there. One that does not fit
//!    any more stays behind the end of the storage block and is the first of the next one, so nothing is compressed twice.
//! 2. When a push says [`Pushed::Full`] the storage block is written ([`super::Writer::write`]) before the next push.
//! 3. At the end it is written until it is empty: what stayed behind the end makes a second storage block.
//! 4. All memory is taken when it is made. A thread that has one never allocates.
//!
//! Each thread has its own; the two of a live save are a hot one, for what the guest writes to while it is saved, and a cold
//! one for the rest.

use std::io;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::geometry::{Geometry, PAGE, PageBlock, StorageBlock};
use super::place::{Codec, Stored};
use crate::codec::crc32;
use crate::sys::pages::Pages;

/// Most page blocks in one storage block.
pub const ITEMS_MAX: usize = 8192;

/// Whether more can be pushed.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// There is room for another page block, or a part of it.
    Room,
    /// The storage block is full: write it.
    Full,
}

/// A page block in the buffer.
#[derive(Debug, Clone, Copy)]
struct Item {
    number: PageBlock,
    length: u32,
    codec: Codec,
    crc: u32,
}

/// The buffer.
pub struct Staging {
    geometry: Geometry,
    /// A storage block, and room behind it for the largest page block that does not fit any more.
    buffer: Pages,
    /// The page blocks of the storage block, end to end from its first byte on.
    items: Vec<Item>,
    /// Bytes of the items.
    used: usize,
    /// The page block that did not fit; its bytes are behind the storage block.
    behind: Option<Item>,
    table: CompressTable,
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Staging").field("used", &self.used).field("items", &self.items.len()).finish_non_exhaustive()
    }
}

impl Staging {
    /// Makes an empty one.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new(geometry: &Geometry) -> io::Result<Self> {
        let most = get_maximum_output_size(geometry.page_block());
        let length = (geometry.storage_block() + most).next_multiple_of(PAGE as usize);
        let mut buffer = Pages::new(length)?;
        // So that no push meets a page of ours that is not there yet.
        buffer.fill(0);
        let (items, table) = (Vec::with_capacity(ITEMS_MAX), CompressTable::large());
        Ok(Self { geometry: geometry.clone(), buffer, items, used: 0, behind: None, table })
    }

    /// Tells whether nothing waits to be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Tells whether it must be written before the next push.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.behind.is_some() || self.used == self.geometry.storage_block() || self.items.len() == ITEMS_MAX
    }

    /// Takes a page block: its bytes are `plain`, as many as [`Geometry::length`] says. Zeros are better entered with
    /// [`super::Writer::set`], which takes no room.
    ///
    /// # Panics
    /// When it is full, or the bytes are not of the length of that page block.
    pub fn push(&mut self, number: PageBlock, plain: &[u8]) -> Pushed {
        assert_eq!(self.geometry.length(number), Some(plain.len()), "page block {number} has another length");
        assert!(!self.is_full(), "a full storage block is written first");
        // Whoever reads it pays for the decompression, so it must be worth something.
        let worth = plain.len() - plain.len().div_ceil(16);
        let place = &mut self.buffer[self.used..];
        match compress_into_with_table(plain, place, &mut self.table) {
            Ok(length) if length <= worth => self.take(number, length, Codec::Lz4),
            _ => {
                place[..plain.len()].copy_from_slice(plain);
                self.take(number, plain.len(), Codec::Raw)
            }
        }
    }

    /// Takes a page block as it is stored in another file, whose bytes the caller has compared with their checksum.
    ///
    /// # Panics
    /// When it is full, or the bytes cannot be those of that page block.
    pub fn push_stored(&mut self, number: PageBlock, codec: Codec, stored: &[u8]) -> Pushed {
        let plain = self.geometry.length(number).expect("the page block is one of the memory");
        assert!(!self.is_full(), "a full storage block is written first");
        assert!(stored.len() <= plain && (codec == Codec::Lz4 || stored.len() == plain), "a place that was checked");
        self.buffer[self.used..self.used + stored.len()].copy_from_slice(stored);
        self.take(number, stored.len(), codec)
    }

    /// Enters a page block whose bytes are behind the others.
    fn take(&mut self, number: PageBlock, length: usize, codec: Codec) -> Pushed {
        let (begin, end, block) = (self.used, self.used + length, self.geometry.storage_block());
        let crc = crc32(&self.buffer[begin..end]);
        let item = Item { number, length: u32::try_from(length).expect("a page block has at most 1 MiB"), codec, crc };
        if end > block {
            self.buffer.copy_within(begin..end, block);
            self.behind = Some(item);
        } else {
            self.items.push(item);
            self.used = end;
        }
        if self.is_full() { Pushed::Full } else { Pushed::Room }
    }

    /// Returns the bytes of the storage block, with zeros up to a multiple of [`PAGE`].
    pub(super) fn bytes(&mut self) -> &[u8] {
        let end = self.used.next_multiple_of(PAGE as usize);
        self.buffer[self.used..end].fill(0);
        &self.buffer[..end]
    }

    /// Calls `each` with the page blocks of the storage block, and where they are if it is number `block`.
    pub(super) fn places(&self, block: StorageBlock, mut each: impl FnMut(PageBlock, Stored)) {
        let mut offset = 0;
        for item in &self.items {
            let Item { number, length, codec, crc } = *item;
            each(number, Stored { block, offset, length, codec, crc });
            offset += length;
        }
    }

    /// Forgets the storage block after it was written; the page block that did not fit becomes the first one of the next.
    pub(super) fn written(&mut self) {
        self.items.clear();
        self.used = 0;
        if let Some(item) = self.behind.take() {
            let (block, length) = (self.geometry.storage_block(), item.length as usize);
            self.buffer.copy_within(block..block + length, 0);
            self.items.push(item);
            self.used = length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Region, Sizes};

    const P: usize = 16 << 10;

    fn staging() -> Staging {
        let sizes = Sizes { page_block: 16 << 10, storage_block: 64 << 10, table_page: 4096 };
        let geometry = Geometry::new(sizes, &[Region { address: 0, length: (1 << 20) + 4096 }]).unwrap();
        Staging::new(&geometry).unwrap()
    }

    /// Bytes of which `random` do not compress.
    fn bytes(seed: u64, random: usize, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let mut bytes: Vec<u8> = (0..random).map(&mut next).collect();
        bytes.resize(length, 7);
        bytes
    }

    fn places(staging: &Staging) -> Vec<(u64, Stored)> {
        let mut all = Vec::new();
        staging.places(StorageBlock(5), |number, stored| all.push((number.0, stored)));
        all
    }

    #[test]
    fn what_does_not_compress_fills_a_storage_block_exactly() {
        let mut staging = staging();
        let plain: Vec<_> = (0..4).map(|n| bytes(n, P, P)).collect();
        for (n, plain) in (0..).zip(&plain) {
            let expected = if n == 3 { Pushed::Full } else { Pushed::Room };
            assert_eq!(staging.push(PageBlock(n), plain), expected);
        }
        assert_eq!(staging.bytes(), plain.concat());
        assert!(places(&staging).iter().all(|(_, stored)| stored.codec == Codec::Raw));
        staging.written();
        assert!(staging.is_empty() && !staging.is_full());
    }

    #[test]
    fn what_does_not_fit_is_the_first_of_the_next() {
        let mut staging = staging();
        let plain = |n: u64| bytes(n, 10_000, P);
        let mut n = 0;
        while staging.push(PageBlock(n), &plain(n)) == Pushed::Room {
            n += 1;
        }
        let first = places(&staging);
        assert_eq!(first.len() as u64, n, "the last one did not fit");
        let block = staging.bytes().to_vec();
        assert!(block.len() <= 64 << 10 && block.len().is_multiple_of(4096));
        assert!(block[first.iter().map(|(_, stored)| stored.length as usize).sum()..].iter().all(|byte| *byte == 0));
        staging.written();
        let second = places(&staging);
        assert_eq!(second.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [n]);
        let rest = staging.bytes().to_vec();
        for (block, list) in [(block, first), (rest, second)] {
            for (number, stored) in list {
                assert_eq!((stored.codec, stored.block), (Codec::Lz4, StorageBlock(5)));
                let mut out = vec![0; P];
                let at = stored.offset as usize;
                stored.expand(&block[at..at + stored.length as usize], &mut out).unwrap();
                assert_eq!(out, plain(number));
            }
        }
        staging.written();
        assert!(staging.is_empty());
    }

    #[test]
    fn a_sixteenth_decides_and_the_last_page_block_may_be_short() {
        for (random, codec) in [(15_200, Codec::Lz4), (15_400, Codec::Raw)] {
            let mut staging = staging();
            let _room = staging.push(PageBlock(0), &bytes(1, random, P));
            assert_eq!(places(&staging)[0].1.codec, codec, "{random} of {P} bytes");
        }
        let mut staging = staging();
        let plain = bytes(2, 4096, 4096);
        let _room = staging.push(PageBlock(64), &plain);
        let stored = places(&staging)[0].1;
        assert_eq!((stored.length, stored.codec), (4096, Codec::Raw));
        let bytes = staging.bytes().to_vec();
        let _room = staging.push_stored(PageBlock(64), stored.codec, &bytes);
        assert_eq!(places(&staging)[1].1, Stored { offset: 4096, ..stored });
    }
}
