//! The block map: which address each block of a disk has, chunk by chunk.
//!
//! The map of a state is not one table but the newest entries at or below it: an [`Entry`] is stored under
//! (branch, chunk, epoch) when an epoch changed the chunk, and holds for every later state of the branch until a newer
//! one is stored. So a snapshot copies nothing, and a lookup is one ordered search whatever the number of snapshots.
//!
//! # Rules
//! 1. An entry is a list of pieces (slab base, set of blocks); the sets are disjoint and not empty.
//! 2. An empty entry is a tombstone: it hides older ones. It is stored like any other.
//! 3. Coding is canonical: an entry has one encoding, the shortest, and at most 4 KiB plus a header of three bytes.
//! 4. Nothing here does I/O; `store` reads and writes the rows.
//!
//! Bytes: the entry values of `src/store/FORMAT.md`.

mod block_set;
mod cache;
mod entry;

pub use block_set::BlockSet;
pub use cache::{Cache, Chunk, ChunkGuard, ChunkState};

pub use entry::{Entry, Piece, Run};
