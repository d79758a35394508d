//! One file of a chain: what it says of itself, and its parts.
//!
//! # Rules
//! 1. Opening reads the header, the footer and the length, whatever the size of the memory. Everything else is read when it is wanted.
//! 2. A place that leaves this module fits the file: its storage block is one of the file, its bytes lie in it.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::geometry::{Geometry, PAGE, PageBlock, StorageBlock};
use super::header::{Footer, HEADER_MAX, Header, Layout, Prefix, STATE_MAX, crc_of, state_crc};
use super::place::{CELL, Place};
use super::table::{CONTENTS, INDEX, Table};
use crate::error::{Error, Result};
use crate::media::File;
use crate::sys::pages::Pages;
use crate::units::to_usize;

/// Where storage blocks come from.
pub trait Source: Send + Sync + fmt::Debug {
    /// Reads a whole storage block into `out`, which has its length.
    ///
    /// # Errors
    /// Any error of the host; `UnexpectedEof` when the file ends before.
    fn read_block(&self, block: StorageBlock, out: &mut [u8]) -> io::Result<()>;
}

/// Storage blocks of a file.
#[derive(Debug)]
struct FileSource {
    file: Arc<dyn File>,
    layout: Layout,
}

impl Source for FileSource {
    fn read_block(&self, block: StorageBlock, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, self.layout.block(block))
    }
}

/// A file of a chain.
#[derive(Debug)]
pub struct Layer {
    what: String,
    header: Header,
    footer: Footer,
    layout: Layout,
    file: Arc<dyn File>,
    source: Arc<dyn Source>,
    index: Table,
    contents: Table,
}

impl Layer {
    /// Opens a file; `what` names it in errors.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` for a newer format, any error of the host.
    pub fn open(what: &str, file: &Arc<dyn File>) -> Result<Self> {
        let fail = |e| Error::io(format!("cannot read {what}"), e);
        let length = file.len().map_err(fail)?;
        let mut bytes = Pages::new(HEADER_MAX).map_err(fail)?;
        let got = file.read_at(&mut bytes, 0).map_err(fail)?;
        let header = Header::decode(what, &bytes[..got])?;
        let header_crc = crc_of(&bytes[..Prefix::decode(what, &bytes[..got])?.length]);
        let end = &mut bytes[..PAGE as usize];
        let from = length.checked_sub(u64::from(PAGE)).ok_or_else(|| {
            Error::corrupt(format!("{what} is damaged: it is shorter than any checkpoint; it may have been cut off"))
        })?;
        file.read_exact_at(end, from).map_err(fail)?;
        let footer = Footer::decode(what, end, &header, header_crc, length)?;
        let layout = Layout::of(&header.geometry, &footer);
        let page = header.geometry.sizes().table_page as usize;
        let index = Table::new(file, INDEX, layout.index, header.geometry.page_blocks(), page);
        let contents = Table::new(file, CONTENTS, layout.contents, footer.cells(), page);
        let source = Arc::new(FileSource { file: Arc::clone(file), layout });
        let (what, file) = (what.to_owned(), Arc::clone(file));
        Ok(Self { what, header, footer, layout, file, source, index, contents })
    }

    /// Puts something between the file and who reads its storage blocks.
    pub fn wrap(&mut self, wrap: impl FnOnce(Arc<dyn Source>) -> Arc<dyn Source>) {
        self.source = wrap(Arc::clone(&self.source));
    }

    /// Returns what it is called in errors.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Returns what it says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns what it says at its end.
    #[must_use]
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Returns the memory.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    /// Returns the bytes that the file takes on the host.
    ///
    /// # Errors
    /// Those of the host.
    pub fn allocated(&self) -> Result<u64> {
        self.file.allocated().map_err(|e| Error::io(format!("cannot look at {}", self.what), e))
    }

    /// Returns where a page block is.
    ///
    /// # Errors
    /// `Corrupt` when the index is damaged or there is no such page block, any error of the host.
    pub fn place(&self, number: PageBlock) -> Result<Place> {
        let cell = self.index.cell::<CELL>(&self.what, number.0)?;
        self.checked(number, &cell)
    }

    /// Calls `each` with the places of page blocks in order, from `first` on and `count` in all.
    ///
    /// # Errors
    /// As [`Self::place`], and those of `each`.
    pub fn places(
        &self,
        first: PageBlock,
        count: u64,
        mut each: impl FnMut(PageBlock, Place) -> Result<()>,
    ) -> Result<()> {
        self.index.runs(&self.what, first.0, count, |from, cells| {
            for (number, cell) in (from..).zip(cells.as_chunks::<CELL>().0) {
                each(PageBlock(number), self.checked(PageBlock(number), cell)?)?;
            }
            Ok(())
        })
    }

    fn checked(&self, number: PageBlock, cell: &[u8; CELL]) -> Result<Place> {
        let place = Place::decode(cell).map_err(|why| self.bad(number, None, &why))?;
        match place {
            Place::Stored(stored) => {
                let plain = self.geometry().length(number).expect("the index has a cell for each page block");
                let fits = stored.check(self.geometry().storage_block(), plain);
                fits.map_err(|why| self.bad(number, None, &why))?;
                if stored.block.0 >= self.footer.blocks {
                    let why = format!("it is in storage block {}, which is not there", stored.block);
                    return Err(self.bad(number, None, &why));
                }
            }
            Place::Parent if self.header.parent.is_none() => {
                return Err(self.bad(number, None, "it is as in the parent, and there is none"));
            }
            Place::Parent | Place::Zero => {}
        }
        Ok(place)
    }

    /// Calls `each` with the page blocks that a storage block holds, in the order in which they lie in it.
    ///
    /// # Errors
    /// `Corrupt` when the contents are damaged or there is no such storage block, any error of the host, and those of `each`.
    pub fn contents(&self, block: StorageBlock, mut each: impl FnMut(PageBlock) -> Result<()>) -> Result<()> {
        let wrong = |why: &str| Error::corrupt(format!("{} is damaged: its contents {why}", self.what));
        if block.0 >= self.footer.blocks {
            return Err(wrong("have no such storage block"));
        }
        let start = |cell| self.contents.cell::<4>(&self.what, cell).map(u32::from_le_bytes);
        let (first, end) = (start(u64::from(block.0))?, start(u64::from(block.0) + 1)?);
        if first >= end || u64::from(end) > self.footer.stored {
            return Err(wrong("are not in order"));
        }
        let from = self.footer.numbers() + u64::from(first);
        self.contents.runs(&self.what, from, u64::from(end - first), |_, cells| {
            for cell in cells.as_chunks::<4>().0 {
                let number = u64::from(u32::from_le_bytes(*cell));
                if number >= self.geometry().page_blocks() {
                    return Err(wrong("name a page block that is none"));
                }
                each(PageBlock(number))?;
            }
            Ok(())
        })
    }

    /// Returns the hot storage blocks, in the order in which they were written.
    ///
    /// # Errors
    /// `Corrupt` when the contents are damaged, any error of the host.
    pub fn hot(&self) -> Result<Vec<StorageBlock>> {
        let mut hot = Vec::new();
        self.contents.runs(&self.what, self.footer.hot_cells(), u64::from(self.footer.hot), |_, cells| {
            hot.extend(cells.as_chunks::<4>().0.iter().map(|cell| StorageBlock(u32::from_le_bytes(*cell))));
            Ok(())
        })?;
        let mut sorted = hot.clone();
        sorted.sort_unstable();
        if hot.iter().any(|block| block.0 >= self.footer.blocks) || sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::corrupt(format!(
                "{} is damaged: its list of hot storage blocks makes no sense",
                self.what
            )));
        }
        Ok(hot)
    }

    /// Returns the state of the devices; its version is in the footer, and who made it in the header.
    ///
    /// # Errors
    /// `Corrupt` when it does not match its checksum, any error of the host.
    pub fn state(&self) -> Result<Vec<u8>> {
        let fail = |e| Error::io(format!("cannot read the state of the devices in {}", self.what), e);
        assert!(self.footer.state_length <= STATE_MAX, "checked when the footer was decoded");
        let mut state = vec![0; to_usize(self.footer.state_length)];
        self.file.read_exact_at(&mut state, self.layout.state).map_err(fail)?;
        if state_crc(&state) != self.footer.state_crc {
            return Err(Error::corrupt(format!(
                "the state of the devices in {} does not match its checksum",
                self.what
            ))
            .hint("restore the file from a copy"));
        }
        Ok(state)
    }

    /// Reads a storage block into `out`, which has its length.
    ///
    /// # Errors
    /// Any error of the host.
    pub fn read_block(&self, block: StorageBlock, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), self.geometry().storage_block(), "a storage block is read whole");
        self.source.read_block(block, out).map_err(|e| {
            Error::io(
                format!("cannot read storage block {block} (byte {}) of {}", self.layout.block(block), self.what),
                e,
            )
        })
    }

    /// Makes the error about a page block: with the address the guest has it at, and where it is in the file.
    pub(super) fn bad(&self, number: PageBlock, block: Option<(StorageBlock, u32)>, why: &str) -> Error {
        let address = self.geometry().span(number).map_or(0, |span| span.address);
        let place = block.map_or_else(String::new, |(block, offset)| {
            let at = self.layout.block(block) + u64::from(offset);
            format!(" in storage block {block} at byte {offset} (byte {at} of the file)")
        });
        Error::corrupt(format!(
            "{} is damaged: page block {number} (guest address {address:#x}){place}: {why}",
            self.what
        ))
        .hint("restore the file from a copy; 'afterimage checkpoint verify' names all that is damaged")
    }
}
