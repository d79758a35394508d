//! Quantities with their own types: block addresses, epochs, branches, sizes.
//!
//! Two numbers that mean different things never share a type, so an epoch cannot be passed where a branch is
//! wanted and a byte offset cannot be used as a block index. The geometry of the whole project is fixed here:
//! a block is 4096 bytes, a chunk is 512 blocks, and an address packs a segment (36 bits) and a slot (28 bits).
//!
//! # Rules
//! 1. A [`BlockAddress`] is never zero; zero on disk means "unmapped" and is an `Option` in memory.
//! 2. Within one slab (512 consecutive, aligned slots) block `i` of the chunk lives in slot `base + i`. So the low nine
//!    bits of an address *are* the index of the block in its chunk; every decoder checks it.
//! 3. Ids are handed out once, in growing order, pool-wide.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes of a block, the unit of mapping, tracking and incremental backup.
pub const BLOCK_SIZE: u64 = 4096;
/// Blocks of a chunk, the unit of the block map; also the slots of a slab.
pub const CHUNK_BLOCKS: u64 = 512;
/// Bytes of a chunk.
pub const CHUNK_SIZE: u64 = BLOCK_SIZE * CHUNK_BLOCKS;
/// The largest disk: 64 TiB.
pub const DISK_SIZE_MAX: u64 = 64 << 40;
/// Bits of an address that number the slot.
pub const SLOT_BITS: u32 = 28;
/// Bytes of a segment file at most (apparent size): 1 TiB.
pub const SEGMENT_SIZE_MAX: u64 = BLOCK_SIZE << SLOT_BITS;
/// Chunks of the largest disk.
pub const CHUNKS_MAX: u64 = DISK_SIZE_MAX / CHUNK_SIZE;

const _: () = assert!(CHUNK_SIZE == 2 << 20);
const _: () = assert!(usize::BITS == 64, "lengths of buffers and of files are the same numbers here");

/// Returns a number of bytes or blocks as a length or index in memory.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits: asserted above")]
pub const fn to_usize(number: u64) -> usize {
    number as usize
}
const _: () = assert!(CHUNKS_MAX <= u32::MAX as u64);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);
        impl $name {
            /// Returns the id that follows this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("64-bit ids do not run out"))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(
    /// A disk of the pool, from 1.
    DiskId
);
id!(
    /// A line of epochs, from 1. A clone or a revert starts one.
    BranchId
);
id!(
    /// The time between two snapshots of a disk, from 1, pool-wide and monotonic.
    Epoch
);
id!(
    /// A snapshot (live, retired or hidden), from 1.
    SnapshotId
);
id!(
    /// A segment file, from 1; 36 bits.
    SegmentId
);

impl SegmentId {
    /// The largest id an address has room for.
    pub const MAX: Self = Self((1 << 36) - 1);
}

/// Index of a chunk in a disk: byte offset / 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkIndex(pub u32);

impl ChunkIndex {
    /// Returns the chunk that holds byte `offset` of a disk; the offset must lie below [`DISK_SIZE_MAX`].
    #[must_use]
    pub fn of_byte(offset: u64) -> Self {
        assert!(offset < DISK_SIZE_MAX, "byte offset {offset} lies beyond the largest disk");
        Self(u32::try_from(offset / CHUNK_SIZE).expect("checked above"))
    }

    /// Returns the byte offset at which the chunk begins.
    #[must_use]
    pub fn byte(self) -> u64 {
        u64::from(self.0) * CHUNK_SIZE
    }
}

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Where one block of data lives: segment id (36 bits) and slot (28 bits). Handed out once, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockAddress(u64);

impl BlockAddress {
    /// Packs a segment and a slot.
    #[must_use]
    pub fn new(segment: SegmentId, slot: u32) -> Self {
        assert!(segment.0 >= 1 && segment <= SegmentId::MAX, "segment id {segment} does not fit an address");
        assert!(slot < 1 << SLOT_BITS, "slot {slot} does not fit an address");
        Self(segment.0 << SLOT_BITS | u64::from(slot))
    }

    /// Unpacks a raw value; `None` for values that name no segment.
    #[must_use]
    pub fn from_raw(raw: u64) -> Option<Self> {
        (raw >> SLOT_BITS != 0).then_some(Self(raw))
    }

    /// Returns the value stored on disk.
    #[must_use]
    pub fn raw(self) -> u64 {
        self.0
    }

    /// Returns the segment.
    #[must_use]
    pub fn segment(self) -> SegmentId {
        SegmentId(self.0 >> SLOT_BITS)
    }

    /// Returns the slot in the segment.
    #[must_use]
    pub fn slot(self) -> u32 {
        u32::try_from(self.0 & ((1 << SLOT_BITS) - 1)).expect("28 bits")
    }

    /// Returns the byte offset of the block in its segment file.
    #[must_use]
    pub fn byte(self) -> u64 {
        u64::from(self.slot()) * BLOCK_SIZE
    }

    /// Returns the index of the block in its chunk (rule 2).
    #[must_use]
    pub fn index(self) -> usize {
        (self.0 & (CHUNK_BLOCKS - 1)) as usize
    }

    /// Returns the base of the slab that holds the address.
    #[must_use]
    pub fn slab(self) -> Self {
        Self(self.0 & !(CHUNK_BLOCKS - 1))
    }

    /// Returns the address of block `index` of the slab whose base this is.
    #[must_use]
    pub fn at(self, index: usize) -> Self {
        assert!(self.index() == 0 && index < to_usize(CHUNK_BLOCKS), "not a slab base, or an index beyond the slab");
        Self(self.0 + index as u64)
    }
}

impl fmt::Display for BlockAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment(), self.slot())
    }
}

/// Parses a size such as `512`, `4K`, `1.5G` or `64T` (binary units, optional `iB`).
///
/// # Errors
/// `Kind::Usage` when the text is no size or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::usage(format!("'{text}' is not a size")).hint("give a number with an optional K, M, G or T, such as 10G")
    };
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(bad)?;
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
    if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).expect("at most 9"));
    let part: u128 = fraction.parse::<u128>().map_err(|_| bad())?;
    let bytes = ((u128::from(whole) * scale + part) << shift) / scale;
    u64::try_from(bytes).map_err(|_| bad())
}

/// Formats a number of bytes for people: `0`, `512 B`, `4.0 KiB`, `1.5 GiB`.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    if bytes < 1024 {
        return if bytes == 0 { "0".into() } else { format!("{bytes} B") };
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_bounded() {
        assert_eq!(parse_size("512").unwrap(), 512);
        assert_eq!(parse_size("4K").unwrap(), 4096);
        assert_eq!(parse_size("1.5G").unwrap(), 3 << 29);
        assert_eq!(parse_size("64TiB").unwrap(), 64 << 40);
        assert_eq!(parse_size(" 2 MB").unwrap(), 2 << 20);
        for bad in ["", "G", "-1", "1X", "1e3", "1.", "99999999999T", "0x10"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_pack_and_unpack() {
        let a = BlockAddress::new(SegmentId(7), 513);
        assert_eq!((a.segment(), a.slot(), a.index()), (SegmentId(7), 513, 1));
        assert_eq!(a.slab().slot(), 512);
        assert_eq!(a.slab().at(1), a);
        assert_eq!(BlockAddress::from_raw(a.raw()), Some(a));
        assert_eq!(BlockAddress::from_raw(12), None);
        assert_eq!(BlockAddress::new(SegmentId::MAX, (1 << 28) - 1).raw(), u64::MAX);
    }

    #[test]
    fn sizes_print_with_one_decimal() {
        assert_eq!(show_size(0), "0");
        assert_eq!(show_size(1023), "1023 B");
        assert_eq!(show_size(1536), "1.5 KiB");
        assert_eq!(show_size(64 << 40), "64.0 TiB");
    }
}
