//! The memory of a guest, which its front end shares and can take away again.
//!
//! # Rules
//! 1. Only what makes nobody wait is mapped ([`Kind::Memory`]). A region that its file does not have is refused, and one of
//!    parts of huge pages. A front end that shortens the file later loses its session and nothing else: what was there
//!    reads as zeros, and `is_lost` says so.
//! 2. Who has read or written asks that before it acts on it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use super::sent::Kind;
use super::session::failed;
use crate::budget::{Pot, Share};
use crate::sys::shared::Shared;

/// Regions of guest memory at most, as with vhost in the kernel.
pub(super) const REGIONS_MAX: u64 = 509;

/// Where a region of guest memory is for the front end.
#[derive(Debug, Clone)]
struct Mapping {
    theirs: u64,
    guest: u64,
    len: u64,
    shared: Arc<Shared>,
    /// Its descriptor, of those that all share.
    _paid: Arc<Share>,
}

/// The memory of a guest.
#[derive(Debug, Default)]
pub(super) struct Memory {
    map: GuestMemoryMmap<()>,
    mappings: Vec<Mapping>,
}

impl Deref for Memory {
    type Target = GuestMemoryMmap<()>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}

impl Memory {
    /// Maps all regions of a guest; their descriptors are paid out of `descriptors`.
    ///
    /// # Errors
    /// When one is not in its file, or two overlap; when there are no descriptors.
    pub(super) fn of(regions: &[VhostUserMemoryRegion], files: Vec<File>, descriptors: &Arc<Pot>) -> Result<Self> {
        let map = |(region, file)| map(region, file, descriptors);
        let mapped = regions.iter().zip(files).map(map).collect::<Result<Vec<_>>>()?;
        let (regions, mappings): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
        let map = GuestMemoryMmap::from_regions(regions).map_err(|e| failed(io::Error::other(e)))?;
        Ok(Self { map, mappings })
    }

    /// Returns the memory with one region more.
    ///
    /// # Errors
    /// As [`Memory::of`]; when there are too many.
    pub(super) fn with(&self, region: &VhostUserMemoryRegion, file: File, descriptors: &Arc<Pot>) -> Result<Self> {
        if self.map.num_regions() as u64 >= REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        let (region, mapping) = map(region, file, descriptors)?;
        let map = self.map.insert_region(Arc::new(region)).map_err(|e| failed(io::Error::other(e)))?;
        let mut mappings = self.mappings.clone();
        mappings.push(mapping);
        Ok(Self { map, mappings })
    }

    /// Returns the memory without a region.
    ///
    /// # Errors
    /// When there is no such region.
    pub(super) fn without(&self, guest: u64, len: u64) -> Result<Self> {
        let removed = self.map.remove_region(GuestAddress(guest), len);
        let (map, _) = removed.map_err(|e| failed(io::Error::other(e)))?;
        let mappings = self.mappings.iter().filter(|mapping| mapping.guest != guest).cloned().collect();
        Ok(Self { map, mappings })
    }

    /// Finds where the guest has what the front end has at an address.
    pub(super) fn guest_address(&self, theirs: u64) -> Result<GuestAddress> {
        let inside = |mapping: &&Mapping| theirs.checked_sub(mapping.theirs).is_some_and(|at| at < mapping.len);
        let mapping = self.mappings.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(GuestAddress(theirs - mapping.theirs + mapping.guest))
    }
}

impl super::service::Memory for Memory {
    fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    fn is_lost(&self) -> bool {
        self.mappings.iter().any(|mapping| mapping.shared.is_lost())
    }
}

/// Says that all descriptors that clients may have are taken.
pub(super) fn no_descriptors() -> Error {
    failed(io::Error::other("there are no descriptors for it: other clients of this process have them"))
}

/// Maps a region of guest memory.
fn map(region: &VhostUserMemoryRegion, file: File, pot: &Arc<Pot>) -> Result<(GuestRegionMmap<()>, Mapping)> {
    let paid = Arc::new(pot.take(1).ok_or_else(no_descriptors)?);
    let end = region.mmap_offset.checked_add(region.memory_size).ok_or(Error::InvalidParam)?;
    Kind::Memory.check(&file).map_err(failed)?;
    let data = file.metadata().map_err(failed)?;
    if data.len() < end {
        return Err(failed(io::Error::other("a region of guest memory is larger than its file")));
    }
    // The front end sees it there, and is asked for addresses of it.
    region.user_addr.checked_add(region.memory_size).ok_or(Error::InvalidParam)?;
    let len = usize::try_from(region.memory_size).map_err(|_| Error::InvalidParam)?;
    let shared = Arc::new(Shared::of(file, region.mmap_offset, len).map_err(failed)?);
    let map = Arc::clone(shared.map());
    let place = GuestRegionMmap::with_arc(map, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)?;
    let (theirs, guest, len) = (region.user_addr, region.guest_phys_addr, region.memory_size);
    Ok((place, Mapping { theirs, guest, len, shared, _paid: paid }))
}
