//! The pool directory: its superblock, its lock, the list of exports, and the segments that hold the data.
//!
//! # Rules
//! 1. A segment exists durably (file, header, directory entry) before the first of its addresses is named anywhere.
//! 2. An address is handed out once; freeing it is punching a hole, never putting it on a list for reuse.
//! 3. The superblock is plain text, readable without the program, and is written last when a pool is made: a directory
//!    without it is no pool.
//! 4. One writer process at a time holds the lock on `lock`.
//!
//! # After a crash
//! A segment file that no journal frame names is an orphan; `store` removes it after a clean replay.
//!
#![doc = include_str!("FORMAT.md")]

mod export_list;
mod lock;
mod probe;
mod segment;
mod superblock;
mod text_file;

pub use export_list::{EXPORT_LIST, ExportKind, ExportList, ExportRow, LeaseRow};
pub use lock::PoolLock;
pub use probe::{DirectIo, Probe, probe};
pub use segment::{Segment, SegmentHeader, Segments, segment_dir, segment_path};
pub use superblock::{FORMAT_VERSION, SUPERBLOCK, Superblock};

/// The directory of segments.
pub const SEGMENTS_DIR: &str = "segments";
/// The directory of the records of retired snapshots.
pub const RETIRED_DIR: &str = "retired";
/// The directory of the changes that are written and not flushed yet.
pub const UNFLUSHED_DIR: &str = "unflushed";
/// The preallocated journal.
pub const JOURNAL: &str = "journal";
/// The catalog that the journal is folded into.
pub const CATALOG: &str = "catalog.redb";
/// Room that is given up when metadata itself finds no space.
pub const BALLAST: &str = "ballast";
