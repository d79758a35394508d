//! What there is in the tree: inode numbers that say what they stand for, and names that say what they name.
//!
//! An inode number is a kind (4 bits) and an id (60 bits). Nothing has to be remembered to understand one, the kernel
//! may forget and ask again in any order, and a number is the same after a remount. A disk keeps its number when it is
//! renamed, because it is made from the disk's id; ids are handed out once, so a number never comes back for
//! something else.
//!
//! An extent file has the epoch that last touched it and its place instead of an id: the same number in every snapshot
//! in which it has the same content ([`super::extent`]).
//!
//! # Rules
//! 1. Numbers are for ever: backup programs compare them between mounts. A kind's value never changes.
//! 2. A number from the kernel is outside input: it is decoded by [`Node::from_ino`] and by nothing else.
//! 3. `NAME.raw` is the disk or snapshot `NAME`, also when `NAME` itself ends in `.raw`.
//!
//! # Room for more
//! Kind 0 has the fixed directories (8 and up are free), kinds 11 to 15 are free.
//!
//! ```text
//! 4  extent file: epoch (34 bits), size and place (26)      7  of a snapshot: what (4), id (56)
//! 5  extent that nothing touched: chunk (29), length (31)   8  increment directory: number (60)
//! 6  of a disk: what (4), id (56)                           9  file of one: number of the directory (32), of the file (28)
//! 10 of checkpoints: what (4), number (56)
//! ```
//!
//! The extent size is in the number because two disks with blocks in common could be cut differently. Numbers of increment
//! directories hold for one mount, those of checkpoints come from what is saved ([`super::checkpoints`]).

use std::ffi::OsStr;

use super::checkpoints::Part;
use super::errno::{Answer, Errno};
use super::extent::Slot;
use crate::units::{CHUNK_SIZE, CHUNKS_MAX, DISK_SIZE_MAX, DiskId, Epoch, SnapshotId};

const KIND_SHIFT: u32 = 60;
const ID_MASK: u64 = (1 << KIND_SHIFT) - 1;
const KIND_FIXED: u64 = 0;
const KIND_DISK: u64 = 1;
const KIND_SNAPSHOT: u64 = 2;
const KIND_SNAPSHOTS_OF: u64 = 3;
const ROOT: u64 = 1; // FUSE_ROOT_ID
const DISKS: u64 = 2;
const SNAPSHOTS: u64 = 3;
const RETIRED: u64 = 4;
const EXPORTS: u64 = 5;
const ABOUT: u64 = 6;
const CHECKPOINTS: u64 = 7;
const KIND_EXTENT: u64 = 4;
const KIND_UNTOUCHED: u64 = 5;
const KIND_OF_DISK: u64 = 6;
const KIND_OF_SNAPSHOT: u64 = 7;
const KIND_INCREMENT: u64 = 8;
const KIND_MEMBER: u64 = 9;
const KIND_CHECKPOINT: u64 = 10;
const RETIRED_OF: u64 = 1;
const EXPORTS_OF: u64 = 2;
const LATEST: u64 = 3;
const RECORD: u64 = 1;
const EXTENTS: u64 = 2;
const CHECKPOINTS_OF: u64 = 1;
const CHECKPOINT: u64 = 2;
const PARTS: [(Part, u64); 4] = [(Part::Memory, 3), (Part::Devices, 4), (Part::State, 5), (Part::File, 6)];
const SLOT_BITS: u32 = 26;
const LENGTH_BITS: u32 = 31;
const WHAT_SHIFT: u32 = 56;
const MEMBER_BITS: u32 = 28;

/// The ending of disk and snapshot files.
pub const SUFFIX: &str = ".raw";
/// The ending of retired records.
pub const RECORD_SUFFIX: &str = ".aimg";
/// Bytes of a disk name at most.
pub const DISK_NAME_MAX: usize = 128;
/// Bytes of a snapshot name at most.
pub const SNAPSHOT_NAME_MAX: usize = 120;
/// Bytes of a file name at most, for statfs.
pub const FILE_NAME_MAX: u32 = 242;
const _: () = assert!(FILE_NAME_MAX as usize == 2 * SNAPSHOT_NAME_MAX + 2);

/// A thing in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    /// The mount point.
    Root,
    /// `disks/`
    Disks,
    /// `snapshots/`
    Snapshots,
    /// `snapshots/NAME/`
    SnapshotsOf(DiskId),
    /// `disks/NAME.raw`
    Disk(DiskId),
    /// `snapshots/NAME/SNAP.raw`
    Snapshot(SnapshotId),
    /// `retired/`
    Retired,
    /// `retired/NAME/`
    RetiredOf(DiskId),
    /// `retired/NAME/SNAP.aimg`
    Record(SnapshotId),
    /// `exports/`
    Exports,
    /// `exports/NAME/`
    ExportsOf(DiskId),
    /// `exports/NAME/latest`
    Latest(DiskId),
    /// `exports/NAME/SNAP/`
    Extents(SnapshotId),
    /// `exports/NAME/SNAP/OFFSET.img`: as `epoch` left it.
    Extent {
        /// The newest epoch that touched it.
        epoch: Epoch,
        /// Where it is.
        slot: Slot,
    },
    /// `exports/NAME/SNAP/OFFSET.img`: zeros that nothing ever touched.
    Untouched {
        /// Its first chunk.
        chunk: u32,
        /// Its length.
        length: u32,
    },
    /// `snapshot.json` in a tree of one snapshot.
    About,
    /// `exports/NAME/OLD..NEW/`
    Increment(u32),
    /// A file in it.
    Member {
        /// The directory.
        increment: u32,
        /// Which file.
        index: u32,
    },
    /// `checkpoints/`
    Checkpoints,
    /// `checkpoints/MACHINE/`
    CheckpointsOf(u64),
    /// `checkpoints/MACHINE/NAME/`
    Checkpoint(u64),
    /// A file in it.
    CheckpointPart {
        /// The checkpoint.
        number: u64,
        /// Which file.
        part: Part,
    },
}

/// What kind of file a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// A directory.
    Dir,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

impl Node {
    /// Returns the inode number.
    #[must_use]
    pub fn ino(self) -> u64 {
        let (kind, id) = match self {
            Self::Root => (KIND_FIXED, ROOT),
            Self::Disks => (KIND_FIXED, DISKS),
            Self::Snapshots => (KIND_FIXED, SNAPSHOTS),
            Self::Disk(id) => (KIND_DISK, id.0),
            Self::Snapshot(id) => (KIND_SNAPSHOT, id.0),
            Self::SnapshotsOf(id) => (KIND_SNAPSHOTS_OF, id.0),
            Self::Retired => (KIND_FIXED, RETIRED),
            Self::Exports => (KIND_FIXED, EXPORTS),
            Self::About => (KIND_FIXED, ABOUT),
            Self::Checkpoints => (KIND_FIXED, CHECKPOINTS),
            Self::RetiredOf(id) => (KIND_OF_DISK, of(RETIRED_OF, id.0)),
            Self::ExportsOf(id) => (KIND_OF_DISK, of(EXPORTS_OF, id.0)),
            Self::Latest(id) => (KIND_OF_DISK, of(LATEST, id.0)),
            Self::Record(id) => (KIND_OF_SNAPSHOT, of(RECORD, id.0)),
            Self::Extents(id) => (KIND_OF_SNAPSHOT, of(EXTENTS, id.0)),
            Self::Extent { epoch, slot } => {
                assert!(epoch.0 <= ID_MASK >> SLOT_BITS, "epoch {epoch} does not fit an inode number");
                (KIND_EXTENT, epoch.0 << SLOT_BITS | slot.code())
            }
            Self::Untouched { chunk, length } => (KIND_UNTOUCHED, u64::from(chunk) << LENGTH_BITS | u64::from(length)),
            Self::Increment(number) => (KIND_INCREMENT, u64::from(number)),
            Self::Member { increment, index } => (KIND_MEMBER, u64::from(increment) << MEMBER_BITS | u64::from(index)),
            Self::CheckpointsOf(number) => (KIND_CHECKPOINT, of(CHECKPOINTS_OF, number)),
            Self::Checkpoint(number) => (KIND_CHECKPOINT, of(CHECKPOINT, number)),
            Self::CheckpointPart { number, part } => {
                let what = PARTS.iter().find(|(of, _)| *of == part).map(|(_, what)| *what);
                (KIND_CHECKPOINT, of(what.expect("each part has a number"), number))
            }
        };
        assert!(id <= ID_MASK, "id {id} does not fit an inode number");
        kind << KIND_SHIFT | id
    }

    /// Reads an inode number; `None` if it stands for nothing.
    #[must_use]
    pub fn from_ino(ino: u64) -> Option<Self> {
        let id = ino & ID_MASK;
        match (ino >> KIND_SHIFT, id) {
            (KIND_FIXED, ROOT) => Some(Self::Root),
            (KIND_FIXED, DISKS) => Some(Self::Disks),
            (KIND_FIXED, SNAPSHOTS) => Some(Self::Snapshots),
            (KIND_FIXED, RETIRED) => Some(Self::Retired),
            (KIND_FIXED, EXPORTS) => Some(Self::Exports),
            (KIND_FIXED, ABOUT) => Some(Self::About),
            (KIND_FIXED, CHECKPOINTS) => Some(Self::Checkpoints),
            (_, 0) => None,
            (KIND_DISK, id) => Some(Self::Disk(DiskId(id))),
            (KIND_SNAPSHOT, id) => Some(Self::Snapshot(SnapshotId(id))),
            (KIND_SNAPSHOTS_OF, id) => Some(Self::SnapshotsOf(DiskId(id))),
            (KIND_EXTENT, id) => {
                let (epoch, slot) = (Epoch(id >> SLOT_BITS), Slot::from_code(id & ((1 << SLOT_BITS) - 1))?);
                (epoch.0 > 0).then_some(Self::Extent { epoch, slot })
            }
            (KIND_UNTOUCHED, id) => {
                let (chunk, length) = (id >> LENGTH_BITS, id & ((1 << LENGTH_BITS) - 1));
                let fits = chunk < CHUNKS_MAX && length > 0 && length <= DISK_SIZE_MAX - chunk * CHUNK_SIZE;
                let (chunk, length) = (u32::try_from(chunk).ok()?, u32::try_from(length).ok()?);
                (fits && length <= 1 << 30).then_some(Self::Untouched { chunk, length })
            }
            (KIND_OF_DISK | KIND_OF_SNAPSHOT | KIND_CHECKPOINT, id) => Self::from_what(ino >> KIND_SHIFT, id),
            (KIND_INCREMENT, id) => Some(Self::Increment(u32::try_from(id).ok()?)),
            (KIND_MEMBER, id) => {
                let index = u32::try_from(id & ((1 << MEMBER_BITS) - 1)).ok()?;
                Some(Self::Member { increment: u32::try_from(id >> MEMBER_BITS).ok()?, index })
            }
            _ => None,
        }
    }

    fn from_what(kind: u64, id: u64) -> Option<Self> {
        let (what, id) = (id >> WHAT_SHIFT, id & ((1 << WHAT_SHIFT) - 1));
        match (kind, what) {
            (_, _) if id == 0 => None,
            (KIND_OF_DISK, RETIRED_OF) => Some(Self::RetiredOf(DiskId(id))),
            (KIND_OF_DISK, EXPORTS_OF) => Some(Self::ExportsOf(DiskId(id))),
            (KIND_OF_DISK, LATEST) => Some(Self::Latest(DiskId(id))),
            (KIND_OF_SNAPSHOT, RECORD) => Some(Self::Record(SnapshotId(id))),
            (KIND_OF_SNAPSHOT, EXTENTS) => Some(Self::Extents(SnapshotId(id))),
            (KIND_CHECKPOINT, CHECKPOINTS_OF) => Some(Self::CheckpointsOf(id)),
            (KIND_CHECKPOINT, CHECKPOINT) => Some(Self::Checkpoint(id)),
            (KIND_CHECKPOINT, what) => {
                let (part, _) = PARTS.iter().find(|(_, known)| *known == what)?;
                Some(Self::CheckpointPart { number: id, part: *part })
            }
            _ => None,
        }
    }

    /// Tells what kind of file it is.
    #[must_use]
    pub fn sort(self) -> Sort {
        match self {
            Self::Disk(_) | Self::Snapshot(_) | Self::Record(_) | Self::About => Sort::File,
            Self::Extent { .. } | Self::Untouched { .. } | Self::Member { .. } | Self::CheckpointPart { .. } => {
                Sort::File
            }
            Self::Latest(_) => Sort::Link,
            _ => Sort::Dir,
        }
    }

    /// Tells whether it is in `checkpoints/`.
    #[must_use]
    pub fn is_of_checkpoints(self) -> bool {
        matches!(self, Self::Checkpoints | Self::CheckpointsOf(_) | Self::Checkpoint(_) | Self::CheckpointPart { .. })
    }

    /// Tells whether it is in `exports/` or `checkpoints/`, where nothing is made, changed or removed by name.
    #[must_use]
    pub fn is_exported(self) -> bool {
        matches!(self, Self::Exports | Self::ExportsOf(_) | Self::Latest(_) | Self::Extents(_) | Self::Increment(_))
            || matches!(self, Self::Extent { .. } | Self::Untouched { .. } | Self::Member { .. } | Self::About)
            || self.is_of_checkpoints()
    }
}

/// Puts what a node is of a disk or snapshot before the id.
fn of(what: u64, id: u64) -> u64 {
    assert!(id < 1 << WHAT_SHIFT, "id {id} does not fit an inode number");
    what << WHAT_SHIFT | id
}

/// Returns the file name of a disk or snapshot.
#[must_use]
pub fn file_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// Returns which disk or snapshot a file name stands for, if it can stand for one.
#[must_use]
pub fn named(file: &OsStr) -> Option<&str> {
    file.to_str()?.strip_suffix(SUFFIX).filter(|name| !name.is_empty())
}

/// Returns the file name of a retired record.
#[must_use]
pub fn record_name(name: &str) -> String {
    format!("{name}{RECORD_SUFFIX}")
}

/// Returns which retired snapshot a file name stands for, if it can stand for one.
#[must_use]
pub fn record_named(file: &OsStr) -> Option<&str> {
    file.to_str()?.strip_suffix(RECORD_SUFFIX).filter(|name| !name.is_empty())
}

/// Reads the file name of something that is to be made: `max` is the longest name of its kind.
///
/// # Errors
/// ENAMETOOLONG, or EINVAL for a name without the suffix or not in UTF-8. What else is wrong with it, the store says.
pub fn new_name(file: &OsStr, max: usize) -> Answer<&str> {
    if file.len() > max + SUFFIX.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    named(file).ok_or_else(|| {
        tracing::warn!("{} is refused: names of disks and snapshots end in {SUFFIX}", file.display());
        Errno::EINVAL
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn numbers_mean_what_they_meant() {
        let all = [
            (Node::Root, 1),
            (Node::Disks, 2),
            (Node::Snapshots, 3),
            (Node::Disk(DiskId(7)), 0x1000_0000_0000_0007),
            (Node::Snapshot(SnapshotId(7)), 0x2000_0000_0000_0007),
            (Node::SnapshotsOf(DiskId(7)), 0x3000_0000_0000_0007),
            (Node::Disk(DiskId(ID_MASK)), 0x1fff_ffff_ffff_ffff),
        ];
        for (node, ino) in all {
            assert_eq!(node.ino(), ino);
            assert_eq!(Node::from_ino(ino), Some(node));
        }
        for nothing in [0, 8, 1 << 60, 2 << 60, 3 << 60, (4 << 60) + 1, u64::MAX] {
            assert_eq!(Node::from_ino(nothing), None, "{nothing:#x}");
        }
    }

    #[test]
    fn numbers_of_exports_mean_what_they_meant() {
        let slot = Slot::from_code(1 << 24 | 5).unwrap();
        let last = Slot::from_code((1 << 26) - 1).unwrap();
        let all = [
            (Node::Retired, 4),
            (Node::Exports, 5),
            (Node::About, 6),
            (Node::Extent { epoch: Epoch(9), slot }, 0x4000_0000_2500_0005),
            (Node::Extent { epoch: Epoch((1 << 34) - 1), slot: last }, 0x4fff_ffff_ffff_ffff),
            (Node::Untouched { chunk: 2, length: 4 << 20 }, 0x5000_0001_0040_0000),
            (Node::RetiredOf(DiskId(7)), 0x6100_0000_0000_0007),
            (Node::ExportsOf(DiskId(7)), 0x6200_0000_0000_0007),
            (Node::Latest(DiskId(7)), 0x6300_0000_0000_0007),
            (Node::Record(SnapshotId(7)), 0x7100_0000_0000_0007),
            (Node::Extents(SnapshotId(7)), 0x7200_0000_0000_0007),
            (Node::Increment(7), 0x8000_0000_0000_0007),
            (Node::Member { increment: 7, index: 1 }, 0x9000_0000_7000_0001),
            (Node::Checkpoints, 7),
            (Node::CheckpointsOf(7), 0xa100_0000_0000_0007),
            (Node::Checkpoint((1 << 56) - 1), 0xa2ff_ffff_ffff_ffff),
            (Node::CheckpointPart { number: 7, part: Part::Memory }, 0xa300_0000_0000_0007),
            (Node::CheckpointPart { number: 7, part: Part::Devices }, 0xa400_0000_0000_0007),
            (Node::CheckpointPart { number: 7, part: Part::State }, 0xa500_0000_0000_0007),
            (Node::CheckpointPart { number: 7, part: Part::File }, 0xa600_0000_0000_0007),
        ];
        for (node, ino) in all {
            assert_eq!(node.ino(), ino, "{node:?}");
            assert_eq!(Node::from_ino(ino), Some(node));
        }
        for nothing in [
            4 << 60 | 1 << 24,
            4 << 60 | 1 << 26,
            5 << 60 | 1 << 31,
            6 << 60 | 7,
            7 << 60 | 1 << 56,
            10 << 60 | 1,
            10 << 60 | 7 << 56 | 1,
            11 << 60 | 1,
        ] {
            assert_eq!(Node::from_ino(nothing), None, "{nothing:#x}");
        }
    }

    #[test]
    fn names_are_taken_as_they_are() {
        for name in ["a", "a.raw", "ein name mit \u{e4}", "a:b*?\\'\"$%", "x=1,2"] {
            assert_eq!(named(OsStr::new(&file_name(name))), Some(name));
        }
        for none in [&b".raw"[..], b"", b"a", b"a.RAW", b"a.raw ", b"\xff.raw"] {
            assert_eq!(named(OsStr::from_bytes(none)), None);
        }
        assert_eq!(new_name(OsStr::new("a"), 128), Err(Errno::EINVAL));
        assert_eq!(new_name(OsStr::new(&file_name(&"x".repeat(129))), 128), Err(Errno::ENAMETOOLONG));
        assert_eq!(new_name(OsStr::new(&file_name(&"x".repeat(128))), 128), Ok("x".repeat(128).as_str()));
    }
}
