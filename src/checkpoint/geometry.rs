//! How the memory of a machine is cut up: regions, page blocks, and the sizes of what a file is made of.
//!
//! # Rules
//! 1. A [`Geometry`] that exists has been checked: sizes are powers of two within their limits, regions are in order, disjoint and
//!    whole pages, and the number of page blocks is within its limit. Nothing that comes from a file is used before.
//! 2. A page block ends with its region: the last one of a region may be shorter than the others. Its length is
//!    [`Geometry::length`], and so much is given to a writer and comes back from a reader.

use std::fmt;

use crate::error::{Error, Result};
use crate::units::to_usize;

/// Bytes that regions, tables and storage blocks are multiples of: what direct I/O wants, and a page of the guest.
pub const PAGE: u32 = 4096;
/// Most regions of memory.
pub const REGIONS_MAX: usize = 1024;
/// Most page blocks.
pub const PAGE_BLOCKS_MAX: u64 = 1 << 30;
/// The largest page block and the largest page of a table.
const PAGE_BLOCK_MAX: u32 = 1 << 20;
/// The largest storage block: offsets in it have 24 bits.
const STORAGE_BLOCK_MAX: u32 = 1 << 24;

/// Number of a page block, from 0 over all regions in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageBlock(pub u64);

impl fmt::Display for PageBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Number of a storage block of a file, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorageBlock(pub u32);

impl fmt::Display for StorageBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A region of the memory of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest address of its first byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// Sizes of the parts of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// What is compressed and checked at once.
    pub page_block: u32,
    /// What is written and read at once.
    pub storage_block: u32,
    /// A page of index and contents.
    pub table_page: u32,
}

impl Sizes {
    /// 64 KiB, 1 MiB and 64 KiB.
    ///
    /// LZ4 looks back 64 KiB, so larger page blocks compress no better, and one costs a fault 70 us; smaller ones compress worse
    /// and cost more calls for each byte. A page of the index is of 256 MiB of memory then.
    pub const USUAL: Self = Self { page_block: 64 << 10, storage_block: 1 << 20, table_page: 64 << 10 };

    /// Checks them.
    fn check(self) -> Result<(), String> {
        let power = |what: &str, value: u32, least: u32, most: u32| {
            if value.is_power_of_two() && (least..=most).contains(&value) {
                return Ok(());
            }
            Err(format!("{what} of {value} bytes is no power of two from {least} to {most}"))
        };
        power("a page block", self.page_block, PAGE, PAGE_BLOCK_MAX)?;
        power("a storage block", self.storage_block, self.page_block, STORAGE_BLOCK_MAX)?;
        power("a page of a table", self.table_page, PAGE, PAGE_BLOCK_MAX)
    }
}

/// The memory of a machine, cut into page blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    sizes: Sizes,
    /// Each region with the number of its first page block.
    regions: Vec<(Region, u64)>,
    page_blocks: u64,
}

/// Where a page block is in the memory of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of its region.
    pub region: usize,
    /// First byte, from the beginning of the region.
    pub offset: u64,
    /// Guest address of the first byte.
    pub address: u64,
    /// Bytes.
    pub length: usize,
}

impl Geometry {
    /// Cuts up regions, which are in growing order of their addresses.
    ///
    /// # Errors
    /// `Usage` that says which size or region cannot be.
    pub fn new(sizes: Sizes, regions: &[Region]) -> Result<Self> {
        Self::checked(sizes, regions).map_err(|why| Error::usage(format!("memory cannot be saved like this: {why}")))
    }

    /// As [`Self::new`]; the error is what is wrong.
    pub(super) fn checked(sizes: Sizes, regions: &[Region]) -> Result<Self, String> {
        sizes.check()?;
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(format!("it has {} regions, and from 1 to {REGIONS_MAX} are possible", regions.len()));
        }
        let (mut end, mut page_blocks) = (0, 0);
        let mut list = Vec::with_capacity(regions.len());
        for region in regions {
            let Region { address, length } = *region;
            let whole = |bytes: u64| bytes.is_multiple_of(u64::from(PAGE));
            let next = address.checked_add(length);
            let (Some(next), true) = (next, whole(address) && whole(length) && length > 0 && address >= end) else {
                return Err(format!(
                    "the region of {length} bytes at {address:#x} is not of whole pages behind the one before it"
                ));
            };
            list.push((*region, page_blocks));
            page_blocks += length.div_ceil(u64::from(sizes.page_block));
            if page_blocks > PAGE_BLOCKS_MAX {
                return Err(format!("it has more than {PAGE_BLOCKS_MAX} page blocks"));
            }
            end = next;
        }
        Ok(Self { sizes, regions: list, page_blocks })
    }

    /// Returns the sizes.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Returns bytes of a page block as a length in memory.
    #[must_use]
    pub fn page_block(&self) -> usize {
        self.sizes.page_block as usize
    }

    /// Returns bytes of a storage block as a length in memory.
    #[must_use]
    pub fn storage_block(&self) -> usize {
        self.sizes.storage_block as usize
    }

    /// Returns the regions in order.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = Region> {
        self.regions.iter().map(|(region, _)| *region)
    }

    /// Returns the number of page blocks.
    #[must_use]
    pub fn page_blocks(&self) -> u64 {
        self.page_blocks
    }

    /// Returns the bytes of memory.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.regions().map(|region| region.length).sum()
    }

    /// Returns where a page block is; `None` beyond the last one.
    #[must_use]
    pub fn span(&self, number: PageBlock) -> Option<Span> {
        if number.0 >= self.page_blocks {
            return None;
        }
        let index = self.regions.partition_point(|(_, first)| *first <= number.0) - 1;
        let (region, first) = self.regions[index];
        let offset = (number.0 - first) * u64::from(self.sizes.page_block);
        let length = to_usize((region.length - offset).min(u64::from(self.sizes.page_block)));
        Some(Span { region: index, offset, address: region.address + offset, length })
    }

    /// Returns the bytes of a page block; `None` beyond the last one.
    #[must_use]
    pub fn length(&self, number: PageBlock) -> Option<usize> {
        self.span(number).map(|span| span.length)
    }

    /// Returns the page block that has a guest address; `None` where there is no memory.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<PageBlock> {
        let index = self.regions.partition_point(|(region, _)| region.address <= address).checked_sub(1)?;
        let (region, first) = self.regions[index];
        let offset = address - region.address;
        (offset < region.length).then(|| PageBlock(first + offset / u64::from(self.sizes.page_block)))
    }

    /// Returns the page block at an offset of a region; `None` where there is no memory.
    #[must_use]
    pub fn of_region(&self, region: usize, offset: u64) -> Option<PageBlock> {
        let (region, first) = self.regions.get(region)?;
        (offset < region.length).then(|| PageBlock(first + offset / u64::from(self.sizes.page_block)))
    }

    /// Cuts the same regions into larger page blocks, `times` as large, for memory that comes in larger pages; no file is made of
    /// those. `None` unless each new one is made of whole ones: number n of those `times * n` and on.
    #[must_use]
    pub fn coarser(&self, times: u32) -> Option<Self> {
        let page_block = self.sizes.page_block.checked_mul(times).filter(|bytes| bytes.is_power_of_two())?;
        let (mut page_blocks, mut regions) = (0, Vec::with_capacity(self.regions.len()));
        for region in self.regions() {
            if times > 1 && !region.length.is_multiple_of(u64::from(page_block)) {
                return None;
            }
            regions.push((region, page_blocks));
            page_blocks += region.length.div_ceil(u64::from(page_block));
        }
        Some(Self { sizes: Sizes { page_block, ..self.sizes }, regions, page_blocks })
    }

    /// Tells whether page blocks of the same numbers have the same lengths, wherever the regions are that they are cut from.
    #[must_use]
    pub fn cuts_as(&self, other: &Self) -> bool {
        let short = |geometry: &Self| -> Vec<(u64, u64)> {
            let size = u64::from(geometry.sizes.page_block);
            let last =
                geometry.regions.iter().map(|(region, first)| (first + region.length / size, region.length % size));
            last.filter(|(_, length)| *length > 0).collect()
        };
        self.sizes.page_block == other.sizes.page_block
            && self.page_blocks == other.page_blocks
            && short(self) == short(other)
    }

    /// Tells whether page blocks of the two mean the same memory, so that one can be the parent of the other.
    #[must_use]
    pub fn fits(&self, other: &Self) -> bool {
        self.sizes.page_block == other.sizes.page_block && self.regions == other.regions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Sizes = Sizes { page_block: 16_384, storage_block: 65_536, table_page: 4096 };

    fn region(address: u64, length: u64) -> Region {
        Region { address, length }
    }

    #[test]
    fn page_blocks_are_numbered_over_regions() {
        let geometry = Geometry::new(SMALL, &[region(0, 40_960), region(1 << 32, 16_384)]).unwrap();
        assert_eq!((geometry.page_blocks(), geometry.memory()), (4, 57_344));
        let span = |number| geometry.span(PageBlock(number));
        assert_eq!(span(0), Some(Span { region: 0, offset: 0, address: 0, length: 16_384 }));
        assert_eq!(span(2), Some(Span { region: 0, offset: 32_768, address: 32_768, length: 8192 }));
        assert_eq!(span(3), Some(Span { region: 1, offset: 0, address: 1 << 32, length: 16_384 }));
        assert_eq!(span(4), None);
        assert_eq!(span(u64::MAX), None);
        for (address, number) in [(0, Some(0)), (40_959, Some(2)), (40_960, None), (1 << 32, Some(3)), (u64::MAX, None)]
        {
            assert_eq!(geometry.at(address), number.map(PageBlock), "{address:#x}");
        }
        assert_eq!(geometry.of_region(1, 16_383), Some(PageBlock(3)));
        assert_eq!((geometry.of_region(1, 16_384), geometry.of_region(2, 0)), (None, None));
    }

    #[test]
    fn the_same_memory_in_other_regions_and_larger_page_blocks() {
        let of = |regions: &[(u64, u64)]| {
            let regions: Vec<_> = regions.iter().map(|(address, length)| region(*address, *length)).collect();
            Geometry::new(SMALL, &regions).unwrap()
        };
        let flat = of(&[(0, 131_072 + 4096)]);
        assert!(flat.cuts_as(&of(&[(0, 65_536), (1 << 32, 65_536 + 4096)])));
        assert!(flat.cuts_as(&flat) && !flat.cuts_as(&of(&[(0, 131_072)])));
        // As many bytes and page blocks, and another one of them is short.
        assert!(!flat.cuts_as(&of(&[(0, 65_536 + 4096), (1 << 32, 65_536)])));
        assert_eq!(flat.coarser(1), Some(flat.clone()));
        assert_eq!((flat.coarser(4), flat.coarser(3), flat.coarser(1 << 20)), (None, None, None));
        let coarse = of(&[(0, 65_536), (1 << 32, 131_072)]).coarser(4).unwrap();
        assert_eq!((coarse.page_blocks(), coarse.page_block(), coarse.memory()), (3, 65_536, 196_608));
        assert_eq!(coarse.at((1 << 32) + 65_536), Some(PageBlock(2)));
        assert_eq!(coarse.span(PageBlock(1)).unwrap().address, 1 << 32);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let one = [region(0, 1 << 20)];
        let bad = [
            Sizes { page_block: 2048, ..Sizes::USUAL },
            Sizes { page_block: 65_537, ..Sizes::USUAL },
            Sizes { page_block: 2 << 20, storage_block: 2 << 20, ..Sizes::USUAL },
            Sizes { storage_block: 32 << 10, ..Sizes::USUAL },
            Sizes { storage_block: 32 << 20, ..Sizes::USUAL },
            Sizes { table_page: 0, ..Sizes::USUAL },
        ];
        for sizes in bad {
            Geometry::new(sizes, &one).unwrap_err();
        }
        let bad: [&[Region]; 8] = [
            &[],
            &[region(0, 0)],
            &[region(1, 4096)],
            &[region(0, 4095)],
            &[region(0, 8192), region(4096, 4096)],
            &[region(8192, 4096), region(0, 4096)],
            &[region(u64::MAX - 4095, 4096)],
            &[region(0, 1 << 47)],
        ];
        for regions in bad {
            Geometry::new(Sizes::USUAL, regions).unwrap_err();
        }
        Geometry::new(Sizes::USUAL, &vec![region(0, 4096); REGIONS_MAX + 1]).unwrap_err();
        Geometry::new(Sizes::USUAL, &[region(0, 1 << 46)]).unwrap();
    }
}
