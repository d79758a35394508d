//! What changed between two states, found from their addresses; no data is read.
//!
//! An address is handed out once, to one block in one epoch, and what a snapshot can reach is never written again. So a
//! block that has the same address in both states is the same, and every other one may differ.
//!
//! # Rules
//! 1. An address in TO and not in FROM is data; a block mapped in FROM and no longer in TO is zeros.
//! 2. What lies beyond the end of FROM is new: data where it is mapped, zeros elsewhere. From nothing, that is all of it.
//! 3. More may be told than differs, never less. A base that cannot be trusted is an error that says why.
//! 4. Extents come sorted, disjoint, as long as they can be, and end at the size of TO.
//! 5. Both sides are taken at one instant. The live side of a disk is what was acknowledged by then.

use serde::{Deserialize, Serialize};

/// A range of bytes that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096 but for the last block of a disk.
    pub length: u64,
    /// Whether it reads as zeros now, all of it; data otherwise.
    pub zero: bool,
}
