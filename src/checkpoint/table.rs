//! Index and contents: cells of a fixed size in pages that carry their number and checksum, read one at a time when a cell of
//! them is wanted.
//!
//! # Rules
//! 1. A page is checked before a cell of it is used: checksum, number, table.
//! 2. A page that was read stays in memory: all of them are a 4,000th of the memory that the checkpoint is of. Opening a table reads nothing.
//! 3. A page that could not be read, or was damaged, is read again by the next one who asks.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use crate::codec::crc32;
use crate::error::{Error, Result};
use crate::media::File;
use crate::sync::RwLock;
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// Bytes at the end of each page.
pub(super) const TRAILER: usize = 16;

/// What sort of table it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sort {
    /// Bytes of a cell.
    pub(super) cell: usize,
    /// Its number in the trailer of each page.
    pub(super) number: u32,
    name: &'static str,
}

/// Where the page blocks are.
pub(super) const INDEX: Sort = Sort { cell: super::place::CELL, number: 1, name: "index" };
/// What is in the storage blocks.
pub(super) const CONTENTS: Sort = Sort { cell: 4, number: 2, name: "contents" };

/// Returns how many cells a page has.
fn cells_in(page: usize, cell: usize) -> usize {
    (page - TRAILER) / cell
}

/// Returns the number of pages of so many cells.
fn page_count(cells: u64, cell: usize, page: usize) -> u64 {
    cells.div_ceil(cells_in(page, cell) as u64)
}

/// Returns the bytes of a table.
#[must_use]
pub(super) fn length(cells: u64, cell: usize, page: usize) -> u64 {
    page_count(cells, cell, page) * page as u64
}

/// Writes a table at `offset`; `fill` puts the cells from the one with that number on, until the bytes are full or there are no more.
/// `page` is aligned memory of one page.
///
/// # Errors
/// Those of the host.
pub(super) fn write(
    file: &dyn File,
    sort: Sort,
    offset: u64,
    cells: u64,
    page: &mut [u8],
    mut fill: impl FnMut(u64, &mut [u8]),
) -> io::Result<()> {
    let per_page = cells_in(page.len(), sort.cell);
    for number in 0..page_count(cells, sort.cell, page.len()) {
        let first = number * per_page as u64;
        let here = per_page.min(to_usize(cells - first));
        page.fill(0);
        fill(first, &mut page[..here * sort.cell]);
        let body = page.len() - 4;
        let trailer = body + 4 - TRAILER;
        page[trailer..trailer + 8].copy_from_slice(&number.to_le_bytes());
        page[trailer + 8..body].copy_from_slice(&sort.number.to_le_bytes());
        let crc = crc32(&page[..body]);
        page[body..].copy_from_slice(&crc.to_le_bytes());
        file.write_at(page, offset + number * page.len() as u64)?;
    }
    Ok(())
}

/// A table of a file.
#[derive(Debug)]
pub(super) struct Table {
    file: Arc<dyn File>,
    sort: Sort,
    offset: u64,
    cells: u64,
    page: usize,
    read: RwLock<HashMap<u64, Arc<Pages>>>,
}

impl Table {
    /// Names a table of `cells` cells in pages of `page` bytes, which begins at `offset`.
    pub(super) fn new(file: &Arc<dyn File>, sort: Sort, offset: u64, cells: u64, page: usize) -> Self {
        Self { file: Arc::clone(file), sort, offset, cells, page, read: RwLock::default() }
    }

    /// Calls `each` with runs of cells that lie in one page, from cell `first` on and `count` in all.
    ///
    /// # Errors
    /// `Corrupt` when there are not so many cells or a page is damaged, any error of the host, and those of `each`.
    pub(super) fn runs(
        &self,
        what: &str,
        first: u64,
        count: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let end = first.checked_add(count).filter(|end| *end <= self.cells).ok_or_else(|| {
            Error::corrupt(format!("{what} is damaged: its {} has fewer cells than it should", self.sort.name))
        })?;
        let per_page = cells_in(self.page, self.sort.cell) as u64;
        let mut at = first;
        while at < end {
            let number = at / per_page;
            let stop = end.min((number + 1) * per_page);
            let page = self.page(what, number)?;
            let within = |cell: u64| to_usize(cell - number * per_page) * self.sort.cell;
            each(at, &page[within(at)..within(stop)])?;
            at = stop;
        }
        Ok(())
    }

    /// Returns one cell.
    ///
    /// # Errors
    /// As [`Self::runs`].
    pub(super) fn cell<const N: usize>(&self, what: &str, number: u64) -> Result<[u8; N]> {
        assert_eq!(N, self.sort.cell, "cells of a table have one size");
        let mut cell = [0; N];
        self.runs(what, number, 1, |_, bytes| {
            cell.copy_from_slice(bytes);
            Ok(())
        })?;
        Ok(cell)
    }

    /// Returns a page, from memory or from the file.
    fn page(&self, what: &str, number: u64) -> Result<Arc<Pages>> {
        if let Some(page) = self.read.read().get(&number) {
            return Ok(Arc::clone(page));
        }
        let name = self.sort.name;
        let fail = |e| Error::io(format!("cannot read page {number} of the {name} of {what}"), e);
        let mut page = Pages::new(self.page).map_err(fail)?;
        self.file.read_exact_at(&mut page, self.offset + number * self.page as u64).map_err(fail)?;
        self.check(&page, number).map_err(|why| {
            Error::corrupt(format!("{what} is damaged: page {number} of its {name} {why}"))
                .hint("what is in other pages can still be used; restore the file from a copy for the rest")
        })?;
        // Somebody else may have read it meanwhile: the same bytes.
        Ok(Arc::clone(self.read.write().entry(number).or_insert_with(|| Arc::new(page))))
    }

    fn check(&self, page: &[u8], number: u64) -> Result<(), &'static str> {
        let (body, crc) = page.split_last_chunk::<4>().expect("a page has a trailer");
        let (rest, table) = body.split_last_chunk::<4>().expect("a page has a trailer");
        let (_, own) = rest.split_last_chunk::<8>().expect("a page has a trailer");
        if crc32(body) != u32::from_le_bytes(*crc) {
            return Err("does not match its checksum");
        }
        if u64::from_le_bytes(*own) != number || u32::from_le_bytes(*table) != self.sort.number {
            return Err("is another one");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::{Media, Open, SimMedia};

    const PAGE: usize = 4096;

    #[test]
    fn cells_come_back_across_pages_and_damage_stays_in_its_page() {
        let media = SimMedia::new(1);
        let file = media.open("f", Open::New).unwrap();
        let cells = 2500;
        let mut page = vec![0; PAGE];
        let fill = |first: u64, bytes: &mut [u8]| {
            for (cell, n) in bytes.chunks_exact_mut(4).zip(first..) {
                cell.copy_from_slice(&u32::try_from(n * 3).unwrap().to_le_bytes());
            }
        };
        write(&*file, CONTENTS, 8192, cells, &mut page, fill).unwrap();
        assert_eq!(file.len().unwrap(), 8192 + length(cells, 4, PAGE));
        assert_eq!(length(cells, 4, PAGE), 3 * 4096, "1020 cells to a page");
        let table = || Table::new(&file, CONTENTS, 8192, cells, PAGE);
        let all = table();
        for n in [0, 1019, 1020, 2499] {
            assert_eq!(all.cell::<4>("it", n).unwrap(), u32::try_from(n * 3).unwrap().to_le_bytes());
        }
        all.cell::<4>("it", 2500).unwrap_err();
        all.cell::<4>("it", u64::MAX).unwrap_err();
        let mut runs = Vec::new();
        all.runs("it", 1000, 1200, |first, bytes| {
            runs.push((first, bytes.len() / 4));
            Ok(())
        })
        .unwrap();
        assert_eq!(runs, [(1000, 20), (1020, 1020), (2040, 160)]);
        media.flip_bit("f", 8192 + 4096, 3).unwrap();
        let damaged = table();
        damaged.cell::<4>("it", 1019).unwrap();
        let error = damaged.cell::<4>("it", 1020).unwrap_err();
        assert!(error.to_string().contains("page 1 of its contents"), "{error}");
        media.flip_bit("f", 8192 + 4096, 3).unwrap();
        damaged.cell::<4>("it", 1020).unwrap();
        // A page in the place of another one.
        let mut second = vec![0; PAGE];
        file.read_exact_at(&mut second, 8192 + 4096).unwrap();
        file.write_at(&second, 8192).unwrap();
        table().cell::<4>("it", 0).unwrap_err();
        Table::new(&file, INDEX, 8192 + 4096, 200, PAGE).cell::<16>("it", 0).unwrap_err();
    }
}
