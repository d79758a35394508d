//! Answers to BLOCK_STATUS: what is allocated, what changed.
//!
//! # Rules
//! 1. Extents lie inside of what was asked for, and begin where it begins; neighbours differ. There may be fewer than
//!    would cover it: the client asks again.

use std::sync::Arc;

use super::contexts::Dirty;
use crate::budget::Share;
use crate::disk::BlockDevice;
use crate::error::Result;
use crate::units::{BLOCK_SIZE, to_usize};

/// The context that tells what is allocated.
pub(super) const ALLOCATION: &str = "base:allocation";
/// What contexts that tell of changes begin with.
pub(super) const BITMAP: &str = "qemu:dirty-bitmap:";

/// Flags of `base:allocation`: not allocated, and reads as zeros.
const HOLE_AND_ZERO: u32 = 3;
/// The flag of a dirty bitmap.
const DIRTY: u32 = 1;
/// Extents of one context at most: 64 KiB of them.
const EXTENTS_MAX: usize = 8192;

/// Extents one after the other: length and flags.
pub(super) type Extents = Vec<(u32, u32)>;

/// A context that was chosen.
#[derive(Debug, Clone)]
pub(super) enum Context {
    Allocation,
    Dirty {
        dirty: Arc<Dirty>,
        /// The memory that it has.
        _share: Arc<Share>,
    },
}

/// Returns how many bytes the extents of a context have at most, for a range of so many bytes.
pub(super) fn extents_bytes(length: u32) -> usize {
    // Half a block at either end.
    let blocks = to_usize(u64::from(length) / BLOCK_SIZE) + 2;
    blocks.min(EXTENTS_MAX) * size_of::<(u32, u32)>()
}

impl Context {
    /// Returns extents from `offset` on, `length` bytes at most.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub(super) fn extents(&self, device: &dyn BlockDevice, offset: u64, length: u32, one: bool) -> Result<Extents> {
        let end = offset + u64::from(length);
        let most = if one { 1 } else { EXTENTS_MAX };
        let mut extents = Extents::new();
        let mut at = offset;
        // The next data that is known of; everything before it is a hole.
        let mut data = (0, 0);
        while at < end {
            let (flags, upto) = match self {
                Self::Allocation => {
                    if data.1 <= at {
                        data = device.next_data(at)?.unwrap_or((u64::MAX, u64::MAX));
                    }
                    if at < data.0 { (HOLE_AND_ZERO, data.0) } else { (0, data.1) }
                }
                Self::Dirty { dirty, .. } => {
                    let (is, upto) = dirty.at(at);
                    (if is { DIRTY } else { 0 }, upto)
                }
            };
            let upto = upto.min(end);
            let len = u32::try_from(upto - at).expect("no longer than what was asked for");
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.1 == flags => last.0 += len,
                _ if count == most => break,
                _ => extents.push((len, flags)),
            }
            at = upto;
        }
        Ok(extents)
    }
}
