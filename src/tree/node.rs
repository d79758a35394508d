//! What there is in the tree: inode numbers that say what they stand for, and names that say what they name.
//!
//! An inode number is a kind (4 bits) and an id (60 bits). Nothing has to be remembered to understand one, the kernel
//! may forget and ask again in any order, and a number is the same after a remount. A disk keeps its number when it is
//! renamed, because it is made from the disk's id; ids are handed out once, so a number never comes back for
//! something else.
//!
//! # Rules
//! 1. Numbers are for ever: backup programs compare them between mounts. A kind's value never changes.
//! 2. A number from the kernel is outside input: it is decoded by [`Node::from_ino`] and by nothing else.
//! 3. `NAME.raw` is the disk or snapshot `NAME`, also when `NAME` itself ends in `.raw`.
//!
//! # Room for more
//! Kind 0 has the fixed directories (4 and up are free for `retired`, `exports`, `checkpoints`), kinds 4 to 15 are free
//! (an export's extent file is kind, epoch in 36 bits, index in 24).

use std::ffi::OsStr;

use super::errno::{Answer, Errno};
use crate::units::{DiskId, SnapshotId};

const KIND_SHIFT: u32 = 60;
const ID_MASK: u64 = (1 << KIND_SHIFT) - 1;
const KIND_FIXED: u64 = 0;
const KIND_DISK: u64 = 1;
const KIND_SNAPSHOT: u64 = 2;
const KIND_SNAPSHOTS_OF: u64 = 3;
const ROOT: u64 = 1; // FUSE_ROOT_ID
const DISKS: u64 = 2;
const SNAPSHOTS: u64 = 3;

/// The ending of disk and snapshot files.
pub const SUFFIX: &str = ".raw";
/// Bytes of a disk name at most.
pub const DISK_NAME_MAX: usize = 128;
/// Bytes of a snapshot name at most.
pub const SNAPSHOT_NAME_MAX: usize = 120;
/// Bytes of a file name at most, for statfs.
pub const FILE_NAME_MAX: u32 = 132;
const _: () = assert!(FILE_NAME_MAX as usize == DISK_NAME_MAX + SUFFIX.len());

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
            (_, 0) => None,
            (KIND_DISK, id) => Some(Self::Disk(DiskId(id))),
            (KIND_SNAPSHOT, id) => Some(Self::Snapshot(SnapshotId(id))),
            (KIND_SNAPSHOTS_OF, id) => Some(Self::SnapshotsOf(DiskId(id))),
            _ => None,
        }
    }

    /// Tells whether it is a directory.
    #[must_use]
    pub fn is_dir(self) -> bool {
        !matches!(self, Self::Disk(_) | Self::Snapshot(_))
    }
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
        for nothing in [0, 4, 1 << 60, 2 << 60, 3 << 60, (4 << 60) + 1, u64::MAX] {
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
