//! Checkpoints: the memory of a virtual machine and the state of its devices as one file, with the snapshots of its disks that
//! were taken at the same instant.
//!
//! # Parts
//! [`Geometry`] cuts the memory into page blocks; [`Staging`] packs them into storage blocks, which a [`Writer`] writes one pwrite
//! each; a [`Reader`] finds and expands them again, through all the checkpoints that one is based on, and [`Image`] makes one
//! file of them. [`Folder`] is where the files are. Nothing here knows how memory is trapped while it is saved or filled: that is what is above.
//!
//! ```text
//! save      Writer::create; each thread has a Staging: push page blocks, write when it is full; set those of zeros;
//!           write what is left; commit
//! pack      what another program has saved, in one call
//! restore   Reader::open; place, read_block, expand for a page block; contents for what else is in the storage block; hot
//! ```
//!
//! # Rules
//! 1. A checkpoint is whole under its name, or it is not there: see [`Writer`].
//! 2. Every byte that is used was compared with a checksum that is kept elsewhere. No number of a file becomes an index, a length
//!    or an allocation before it was checked.
//! 3. Opening costs the same whatever the size of the memory.
//! 4. What a checkpoint needs, its parent and its disk snapshots, cannot be removed before it.
//!
//! # After a crash
//! The old file, the new one, or none, as it was before; what an interrupted save has left is removed at the next opening
//! of the pool.
//!
#![doc = include_str!("FORMAT.md")]

mod flat;
mod flatten;
mod folder;
mod geometry;
pub mod header;
mod image;
mod lately;
mod layer;
mod list;
mod pack;
mod place;
mod reader;
mod remove;
mod staging;
mod table;
mod verify;
mod writer;

pub use flatten::flatten;
pub use folder::{Access, CHECKPOINTS_DIR, Folder, Name};
pub use geometry::{Geometry, PAGE, PAGE_BLOCKS_MAX, PageBlock, REGIONS_MAX, Region, Sizes, Span, StorageBlock};
pub use header::{DiskSnapshot, Footer, Header, Layout, Parent};
pub use image::{Image, data};
pub use lately::Lately;
pub use layer::{Layer, Source};
pub use list::{Checkpoint, DiskInfo, RegionInfo, describe, info, list};
pub use pack::{ANOTHER_PROGRAM, Packing, pack};
pub use place::{Codec, Place, Stored, is_zero};
pub use reader::{CHAIN_MAX, Found, Reader};
pub use remove::{attend, forget, hold, let_go, remove, snapshot};
pub use staging::{ITEMS_MAX, Pushed, Staging};
pub use verify::{FAULTS_MAX, Fault, VerifyReport, verify, verify_chain};
pub use writer::{Cut, Plan, Writer, Written};
