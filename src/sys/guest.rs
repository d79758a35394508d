//! Regions of guest memory as those see them who save and restore it: a memfd each, and where it is mapped. Of the memory of
//! another process there is only where it is mapped there.
//!
//! # Rules
//! 1. A region of this process is all of one memfd, mapped shared and once, for reading and writing: what is written through the mapping is in the
//!    file and the other way round, and a page that the file has not is a hole that reads as zeros.
//! 2. It keeps the mapping and the file alive. It gives nobody a reference into the memory, which guests write at any time: bytes go
//!    in and out by pread, pwrite and userfaultfd ([`super::userfaultfd`]).
//! 3. What is mapped elsewhere is reached by userfaultfd alone, through the one that its process has sent.
//! 4. Reading never makes memory: a pread of a hole gives zeros and leaves it a hole, where a load through the mapping would fill it.

#![expect(unsafe_code, reason = "advice about mapped memory")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::hole;
use crate::units::to_usize;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A region of guest memory. Clones are the same region.
#[derive(Debug, Clone)]
pub struct GuestRegion {
    place: Place,
    address: u64,
}

/// Where a region is mapped.
#[derive(Debug, Clone)]
enum Place {
    /// In this process.
    Here { map: Arc<MmapRegion<()>>, file: Arc<File> },
    /// In another one: its address there, and its bytes.
    Elsewhere { at: u64, len: u64 },
}

impl GuestRegion {
    /// Returns the regions of a memory, in order of their addresses.
    ///
    /// # Errors
    /// `InvalidInput` for a region that breaks the first rule; errors of the host.
    pub fn all(memory: &GuestMemoryMmap<()>) -> io::Result<Vec<Self>> {
        memory.iter().map(|region| Self::of(region.get_mmap(), region.start_addr().raw_value())).collect()
    }

    fn of(map: Arc<MmapRegion<()>>, address: u64) -> io::Result<Self> {
        let bad = |why: &str| {
            let what = format!("the memory at guest address {address:#x} cannot be saved or restored: {why}");
            Err(io::Error::new(io::ErrorKind::InvalidInput, what))
        };
        let Some(part) = map.file_offset() else { return bad("it is no file") };
        let file = Arc::clone(part.arc());
        if rustix::fs::fstatfs(&*file)?.f_type != libc::TMPFS_MAGIC {
            return bad("its file is no memfd of ordinary pages");
        }
        let len = map.size() as u64;
        if part.start() != 0 || file.metadata()?.len() != len || !len.is_multiple_of(PAGE) || len == 0 {
            return bad("it is not all of its file, in whole pages");
        }
        if map.flags() & libc::MAP_SHARED == 0 || map.prot() != libc::PROT_READ | libc::PROT_WRITE {
            return bad("it is not mapped shared, for reading and writing");
        }
        Ok(Self { place: Place::Here { map, file }, address })
    }

    /// Makes one of memory of another process, `len` bytes that are mapped there at `at`. Nothing is known of what is there.
    ///
    /// # Errors
    /// `InvalidInput` for what is not of whole pages, or not in the addresses that there are.
    pub fn elsewhere(at: u64, len: u64, address: u64) -> io::Result<Self> {
        let whole = [at, len, address].iter().all(|bytes| bytes.is_multiple_of(PAGE));
        if !whole || len == 0 || at.checked_add(len).is_none() || address.checked_add(len).is_none() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(Self { place: Place::Elsewhere { at, len }, address })
    }

    /// Tells whether it is mapped in another process.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        matches!(self.place, Place::Elsewhere { .. })
    }

    fn here(&self) -> io::Result<(&MmapRegion<()>, &File)> {
        match &self.place {
            Place::Here { map, file } => Ok((map, file)),
            Place::Elsewhere { .. } => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "it is the memory of another process"))
            }
        }
    }

    /// Returns the guest address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match &self.place {
            Place::Here { map, .. } => map.size() as u64,
            Place::Elsewhere { len, .. } => *len,
        }
    }

    /// Tells whether it has none, which is never so.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the address of its first byte in the process that has it mapped.
    pub(super) fn mapped_at(&self) -> u64 {
        match &self.place {
            Place::Here { map, .. } => map.as_ptr().addr() as u64,
            Place::Elsewhere { at, .. } => *at,
        }
    }

    /// Returns where in the region an address of the process lies that has it mapped.
    #[must_use]
    pub fn offset_of(&self, mapped: u64) -> Option<u64> {
        mapped.checked_sub(self.mapped_at()).filter(|offset| *offset < self.len())
    }

    /// Returns which part of the region lies in a range of addresses of the process that has it mapped; `None` when none does.
    #[must_use]
    pub fn part_of(&self, start: u64, end: u64) -> Option<Range<u64>> {
        let at = self.mapped_at();
        let range = start.max(at)..end.min(at + self.len());
        (!range.is_empty()).then(|| range.start - at..range.end - at)
    }

    /// Reads what is there now from `offset` on; holes read as zeros.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end: the file was cut. Errors of the host.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.here()?.1.read_exact_at(buf, offset)
    }

    /// Writes through the file. The memory must not be registered for missing pages there: who waits for them is not woken.
    ///
    /// # Errors
    /// `InvalidInput` beyond the end; errors of the host.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > self.len()) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.here()?.1.write_all_at(data, offset)
    }

    /// Gives pages back to the host, as a balloon does: they are holes and zeros after. Who watches the memory is told before.
    ///
    /// # Errors
    /// `InvalidInput` beyond the end or for parts of pages; errors of the host.
    pub fn give_back(&self, offset: u64, len: u64) -> io::Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        if !inside || !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let at = self.here()?.0.as_ptr().wrapping_add(to_usize(offset));
        // SAFETY: the range is mapped as long as `self` lives, and its bytes may change at any time.
        Ok(unsafe { rustix::mm::madvise(at.cast(), to_usize(len), rustix::mm::Advice::LinuxRemove) }?)
    }

    /// Returns the first extent of pages that the file has at or after `offset`, as `(start, end)`; `None` when only holes follow.
    ///
    /// # Errors
    /// Errors of the host.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        hole::next_data(self.here()?.1, offset)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion};

    use super::*;

    fn memfd(len: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("region", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn what_is_written_through_the_mapping_is_read_and_holes_stay() {
        let ranges = [(0, 64 * PAGE), (1 << 32, 16 * PAGE)].map(|(start, len)| {
            let file = FileOffset::new(memfd(len), 0);
            (GuestAddress(start), usize::try_from(len).unwrap(), Some(file))
        });
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let regions = GuestRegion::all(&memory).unwrap();
        assert_eq!(
            regions.iter().map(|r| (r.address(), r.len())).collect::<Vec<_>>(),
            [(0, 64 * PAGE), (1 << 32, 16 * PAGE)]
        );
        memory.write_slice(&[7; 100], GuestAddress((1 << 32) + 3 * PAGE)).unwrap();
        let mut bytes = vec![1; to_usize(5 * PAGE)];
        regions[1].read(&mut bytes, 0).unwrap();
        let at = to_usize(3 * PAGE);
        assert!(bytes[at..at + 100] == [7; 100] && bytes[..at].iter().chain(&bytes[at + 100..]).all(|byte| *byte == 0));
        assert_eq!(regions[1].next_data(0).unwrap(), Some((3 * PAGE, 4 * PAGE)));
        assert_eq!(regions[1].next_data(4 * PAGE).unwrap(), None);
        assert_eq!(regions[0].next_data(0).unwrap(), None);
        regions[0].read(&mut bytes, 60 * PAGE).unwrap_err();
        regions[0].write(&bytes, 60 * PAGE).unwrap_err();
        let mapped = regions[0].mapped_at();
        assert_eq!(regions[0].offset_of(mapped + 5), Some(5));
        let part = |start, end| regions[0].part_of(mapped + start, mapped + end);
        assert_eq!(
            (part(10, 20), part(64 * PAGE, 65 * PAGE), part(0, 90 * PAGE)),
            (Some(10..20), None, Some(0..64 * PAGE))
        );
        assert_eq!(regions[0].part_of(mapped - 10, mapped + 5), Some(0..5));
        assert_eq!((regions[0].offset_of(mapped - 1), regions[0].offset_of(mapped + 64 * PAGE)), (None, None));
    }

    #[test]
    fn memory_of_another_process_is_only_a_place() {
        let region = GuestRegion::elsewhere(1 << 40, 4 * PAGE, 8 * PAGE).unwrap();
        assert_eq!((region.len(), region.address(), region.mapped_at()), (4 * PAGE, 8 * PAGE, 1 << 40));
        assert_eq!(region.part_of((1 << 40) + PAGE, u64::MAX), Some(PAGE..4 * PAGE));
        let unsupported = |error: io::Error| assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        unsupported(region.read(&mut [0], 0).unwrap_err());
        unsupported(region.write(&[0], 0).unwrap_err());
        unsupported(region.give_back(0, PAGE).unwrap_err());
        unsupported(region.next_data(0).unwrap_err());
        let end = u64::MAX - PAGE + 1;
        for (at, len, address) in [(1, PAGE, 0), (0, 1, 0), (0, PAGE, 1), (0, 0, 0), (end, PAGE, 0), (0, PAGE, end)] {
            GuestRegion::elsewhere(at, len, address).unwrap_err();
        }
    }

    #[test]
    fn what_writes_could_bypass_is_refused() {
        let of = |map: MmapRegion<()>| GuestRegion::of(Arc::new(map), 0).unwrap_err().to_string();
        let len = usize::try_from(8 * PAGE).unwrap();
        let file = || FileOffset::new(memfd(8 * PAGE), 0);
        assert!(of(MmapRegion::new(len).unwrap()).contains("no file"));
        assert!(of(MmapRegion::from_file(file(), len / 2).unwrap()).contains("all of its file"));
        let (access, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        assert!(of(MmapRegion::build(Some(file()), len, access, private).unwrap()).contains("shared"));
        let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        disk.set_len(8 * PAGE).unwrap();
        assert!(of(MmapRegion::from_file(FileOffset::new(disk, 0), len).unwrap()).contains("no memfd"));
    }
}
