//! The memory of a checkpoint as one flat file: its regions one behind the other, expanded as they are read.
//!
//! It is exactly as long as the memory. What a VMM maps that wants its guest's memory as a file is this; where in it an
//! address of the guest is, the regions say (a machine without a gap has one, and then they are the same).
//!
//! # Rules
//! 1. What is handed out was compared with its checksum when it was expanded. What cannot be had is an error that names
//!    page block, file and offset, and never zeros.
//! 2. A page block of zeros is a hole, and nothing else is; of a chain that is true of what the newest one has.
//! 3. What is kept of it is within the budget of [`Lately`]; nothing is as large as a file says.

use std::sync::Arc;

use super::geometry::{Geometry, PageBlock};
use super::lately::{Lately, Piece};
use super::layer::Layer;
use super::place::{Place, Stored};
use super::reader::{Found, Reader};
use crate::error::{Error, Result};
use crate::units::to_usize;

/// The memory of a checkpoint that is open.
#[derive(Debug)]
pub struct Image {
    reader: Reader,
    /// Where each region begins in the file, and its first page block.
    regions: Vec<(u64, u64)>,
    size: u64,
    lately: Arc<Lately>,
    /// Its number among those who share what was read lately.
    number: u64,
}

impl Drop for Image {
    fn drop(&mut self) {
        self.lately.leave(self.number);
    }
}

/// Returns where each region begins in the file, and its first page block.
fn regions(geometry: &Geometry) -> Vec<(u64, u64)> {
    let (mut start, mut first) = (0, 0);
    let place = |region: super::Region| {
        let here = (start, first);
        start += region.length;
        first += region.length.div_ceil(u64::from(geometry.sizes().page_block));
        here
    };
    geometry.regions().map(place).collect()
}

impl Image {
    /// Makes one of an open checkpoint.
    #[must_use]
    pub fn new(reader: Reader, lately: &Arc<Lately>) -> Self {
        let geometry = reader.geometry();
        let (regions, size) = (regions(geometry), geometry.memory());
        Self { reader, regions, size, lately: Arc::clone(lately), number: lately.enter() }
    }

    /// Returns the checkpoint.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Returns the bytes of the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the page block that has a byte of the file, and where in it that byte is.
    fn at(&self, offset: u64) -> (PageBlock, usize) {
        let index = self.regions.partition_point(|(start, _)| *start <= offset) - 1;
        let (start, first) = self.regions[index];
        let size = self.reader.geometry().page_block() as u64;
        (PageBlock(first + (offset - start) / size), to_usize((offset - start) % size))
    }

    /// Returns the first byte of a page block in the file.
    fn start(&self, number: PageBlock) -> u64 {
        let index = self.regions.partition_point(|(_, first)| *first <= number.0) - 1;
        let (start, first) = self.regions[index];
        start + (number.0 - first) * self.reader.geometry().page_block() as u64
    }

    fn length(&self, number: PageBlock) -> usize {
        self.reader.geometry().length(number).expect("it was found in the file")
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// `Usage` beyond the end; `Corrupt` for what is damaged, naming it; any error of the host.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Err(Error::usage(format!("{} bytes at {offset} lie beyond the end ({})", buf.len(), self.size)));
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (number, within) = self.at(at);
            let here = rest.len().min(self.length(number) - within);
            let (now, later) = rest.split_at_mut(here);
            self.read_part(number, within, now)?;
            at += here as u64;
            rest = later;
        }
        Ok(())
    }

    /// Reads a part of a page block.
    fn read_part(&self, number: PageBlock, within: usize, out: &mut [u8]) -> Result<()> {
        let (layer, stored) = match self.reader.place(number)? {
            Found::Zero => {
                out.fill(0);
                return Ok(());
            }
            Found::Stored { layer, stored } => (layer, stored),
        };
        let (key, length) = ((self.number, Piece::Page(number)), self.length(number));
        if let Some(kept) = self.lately.find(key)
            && let Some(Ok(page)) = kept.get()
        {
            out.copy_from_slice(&page[within..within + out.len()]);
            return Ok(());
        }
        // A whole one is expanded where it is wanted: who has it will not ask again for a part of it.
        if out.len() == length {
            return self.expand(number, layer, &stored, out);
        }
        let make = |page: &mut [u8]| self.expand(number, layer, &stored, page);
        self.lately.with(key, length, make, |page| {
            out.copy_from_slice(&page[within..within + out.len()]);
            Ok(())
        })
    }

    fn expand(&self, number: PageBlock, layer: usize, stored: &Stored, out: &mut [u8]) -> Result<()> {
        let key = (self.number, Piece::Block(layer, stored.block));
        let length = self.reader.layers()[layer].geometry().storage_block();
        let read = |bytes: &mut [u8]| self.reader.read_block(layer, stored.block, bytes);
        let expand = |block: &[u8]| self.reader.expand(number, layer, stored, block, out);
        // What was read of a damaged one is forgotten: the file may be mended when somebody asks again.
        self.lately.with(key, length, read, expand).inspect_err(|_| self.lately.forget(key))
    }

    /// Returns the first stretch at or after `offset` that is no hole.
    ///
    /// # Errors
    /// `Corrupt` when the index is damaged, any error of the host.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        if offset >= self.size {
            return Ok(None);
        }
        let (mut number, mut begin) = (self.at(offset).0, None);
        let end = self.reader.geometry().page_blocks();
        while number.0 < end {
            match (self.reader.place(number)?, begin) {
                (Found::Stored { .. }, None) => begin = Some(self.start(number).max(offset)),
                (Found::Zero, Some(begin)) => return Ok(Some((begin, self.start(number)))),
                _ => {}
            }
            number.0 += 1;
        }
        Ok(begin.map(|begin| (begin, self.size)))
    }
}

/// Returns the bytes of memory that are in page blocks that are not zeros: what a flat file has that is no hole.
///
/// # Errors
/// `Corrupt` when an index is damaged, any error of the host.
pub fn data(reader: &Reader) -> Result<u64> {
    let (newest, geometry) = (&reader.layers()[0], reader.geometry());
    if newest.footer().inherited == 0 {
        return data_alone(newest);
    }
    let mut bytes = 0;
    newest.places(PageBlock(0), geometry.page_blocks(), |number, place| {
        let zero = match place {
            Place::Zero => true,
            Place::Stored(_) => false,
            Place::Parent => reader.place(number)? == Found::Zero,
        };
        bytes += if zero { 0 } else { geometry.length(number).map_or(0, |length| length as u64) };
        Ok(())
    })?;
    Ok(bytes)
}

/// The same of one that inherits nothing: its footer knows, but for the page blocks that are shorter than the others.
fn data_alone(layer: &Layer) -> Result<u64> {
    let (geometry, size) = (layer.geometry(), layer.geometry().page_block() as u64);
    let mut bytes = layer.footer().stored * size;
    let mut next = 0;
    for region in geometry.regions() {
        next += region.length.div_ceil(size);
        let missing = region.length.next_multiple_of(size) - region.length;
        if missing > 0 && matches!(layer.place(PageBlock(next - 1))?, Place::Stored(_)) {
            bytes = bytes.saturating_sub(missing);
        }
    }
    Ok(bytes)
}
