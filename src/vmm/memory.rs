//! The memory of a guest: files without a name, one per region, and what the guest is told about it.
//!
//! # Rules
//! 1. Each region is one memfd, mapped by this process alone and nowhere else: what saves the memory while the guest runs
//!    sees every write (a second mapping would go unseen).
//! 2. Memory is not reserved on the host and takes none until the guest touches it.
//! 3. A page that the host cannot bring any more ends no process: [`guard`] sees to it that whoever touches it goes on, with
//!    zeros, and the guest does not; nor does a device, which asks whether what it has read was memory.

use std::fs::File;

use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::layout::{BASE_END, HIGH_START, KERNEL, LOW_END};
use crate::error::{Error, Result};
use crate::sys::shared::{self, Shared};
use crate::units::{show_size, to_usize};

/// The memory of a guest.
pub(super) type Memory = GuestMemoryMmap<()>;

impl crate::vhost_blk::service::Memory for Memory {
    fn map(&self) -> &GuestMemoryMmap<()> {
        self
    }

    fn is_lost(&self) -> bool {
        self.iter().any(|region| shared::is_lost(&region.get_mmap()))
    }
}

/// Bytes that memory is counted in.
const PAGE: u64 = 4096;
/// Bytes of the smallest guest, and of the largest.
const MIN: u64 = 4 << 20;
const MAX: u64 = 1 << 40;

/// What a range of addresses is, in the numbers of E820.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Use {
    Usable = 1,
    Reserved = 2,
}

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) what: Use,
}

/// Returns where `bytes` of memory lie.
fn regions(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(LOW_END);
    let mut regions = vec![(GuestAddress(0), low)];
    if bytes > low {
        regions.push((GuestAddress(HIGH_START), bytes - low));
    }
    regions
}

/// Makes the memory.
///
/// # Errors
/// `Usage` for a size that cannot be; any error of the host.
pub(super) fn make(bytes: u64) -> Result<Memory> {
    if !(MIN..=MAX).contains(&bytes) || !bytes.is_multiple_of(PAGE) {
        let (min, max) = (show_size(MIN), show_size(MAX));
        return Err(Error::usage(format!(
            "a guest cannot have {bytes} bytes of memory: it takes {min} to {max}, in whole pages of {PAGE} bytes"
        )));
    }
    let host = |e| Error::io(format!("no {} of memory for the guest", show_size(bytes)), e);
    let mut files = Vec::new();
    for (start, len) in regions(bytes) {
        let file =
            File::from(rustix::fs::memfd_create("afterimage-guest", MemfdFlags::CLOEXEC).map_err(|e| host(e.into()))?);
        file.set_len(len).map_err(host)?;
        files.push((start, to_usize(len), Some(FileOffset::new(file, 0))));
    }
    GuestMemoryMmap::from_ranges_with_files(files).map_err(|e| host(std::io::Error::other(e)))
}

/// Guards the memory of a machine for as long as what is returned lives.
///
/// # Errors
/// Those of the host.
pub(super) fn guard(memory: &Memory) -> Result<Vec<Shared>> {
    let cannot = |e| Error::io("the memory of the guest cannot be guarded", e);
    memory.iter().map(|region| Shared::guard(region.get_mmap()).map_err(cannot)).collect()
}

/// Returns what the guest is told.
pub(super) fn map(bytes: u64) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, len: BASE_END, what: Use::Usable },
        Range { start: BASE_END, len: KERNEL.0 - BASE_END, what: Use::Reserved },
    ];
    for (start, len) in regions(bytes) {
        let from = start.0.max(KERNEL.0);
        map.push(Range { start: from, len: start.0 + len - from, what: Use::Usable });
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::{Address, Bytes, GuestMemoryRegion};

    use super::*;

    #[test]
    fn memory_beyond_three_gigabytes_continues_at_four() {
        let memory = make(LOW_END + (1 << 20)).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().raw_value(), HIGH_START + (1 << 20) - 1);
        assert!(!memory.address_in_range(GuestAddress(LOW_END)));
        memory.write_obj(7_u64, GuestAddress(HIGH_START)).unwrap();
        let total: u64 = map(LOW_END + (1 << 20)).iter().filter(|r| r.what == Use::Usable).map(|r| r.len).sum();
        assert_eq!(total, LOW_END + (1 << 20) - (KERNEL.0 - BASE_END));
    }

    #[test]
    fn a_device_is_told_that_what_it_read_was_no_memory() {
        use crate::vhost_blk::service::Memory as _;
        let (memory, other) = (make(MIN).unwrap(), make(MIN).unwrap());
        let _guards = (guard(&memory).unwrap(), guard(&other).unwrap());
        assert!(!memory.is_lost() && !other.is_lost());
        memory.iter().next().unwrap().file_offset().unwrap().file().set_len(0).unwrap();
        assert_eq!(memory.read_obj::<u64>(KERNEL).unwrap(), 0);
        assert!(memory.is_lost() && !other.is_lost());
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for bytes in [0, MIN - PAGE, MIN + 1, MAX + PAGE, u64::MAX] {
            assert_eq!(make(bytes).unwrap_err().kind(), crate::error::Kind::Usage);
        }
    }
}
