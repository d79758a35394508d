//! The pool as files: disks to read and write, snapshots to read, and file operations that mean what they say.
//!
//! ```text
//! MNT/
//!   disks/NAME.raw               read-write: a disk
//!   snapshots/NAME/SNAP.raw      read-only: a snapshot of it
//!   retired/NAME/SNAP.aimg       read-only: the record of a retired snapshot
//!   exports/NAME/SNAP/OFFSET.img read-only: a snapshot cut into extent files
//!   exports/NAME/OLD..NEW/       read-only: what leads from one snapshot to another
//!   exports/NAME/latest          a link to the newest live snapshot
//!   checkpoints/VM/CP/memory     read-only: the memory of a machine, and beside it what else a checkpoint has
//! ```
//!
//! `truncate` makes, grows and cuts a disk, `touch` in `snapshots/NAME/` takes a snapshot, `rm` and `mv` remove and
//! rename, `cp` of a whole disk or snapshot into a new disk is a clone. What has no meaning is refused.
//!
//! # Rules
//! 1. Nothing here decides what a disk is: every operation is one or two calls of the storage core.
//! 2. What is answered is done. A write that was answered is in the next snapshot; one that was synced survives power
//!    loss.
//! 3. A change made elsewhere (command line, API, NBD) shows here before the one who made it is answered ([`stale`]).
//! 4. A disk has one writer ([`crate::disk::Lease`]). All files of the mount that are open for writing are one; an open for
//!    writing while another front end has the lease is EBUSY.
//! 5. Only the `fuse` files know fuser. The rest can be tested, and served over another transport, without it.
//!
//! # While another front end writes a disk
//! Reading goes on. When that one takes the lease, the kernel forgets all pages of the disk before it may write. A file
//! opened from then on goes past the cache (FOPEN_DIRECT_IO). A file that was open, and any mapping, is still read
//! through pages, as the kernel fixes that at open; so each read through the mount leaves a mark, and the next write of
//! the other front end that finds one makes the kernel forget the pages again before it is acknowledged. So what was
//! acknowledged there is seen here by whoever asks after that, through old and new files and through mappings (shared
//! and private ones, in pages that were not written to), and a disk that nobody reads here costs its writer nothing.
//! Attributes are not cached meanwhile. A file that is open or mapped for writing keeps the lease, so no other front end
//! can have it: the kernel writes what a mapping changed before it releases the file.
//!
//! # What a crash leaves
//! Nothing of its own. A killed server leaves a dead mount, which the next one on the same pool takes away.
//!
//! The ways in: [`mount`], and [`mount_extents`] for the extent files of one snapshot alone. The parts: [`node`] (inode
//! numbers and names), [`state`] (the tree and stat), [`names`] (directories), [`extent`] (extent files), [`checkpoints`], [`mod@file`]
//! (open files), [`begin`] (their fast way), [`copy`] (copy_file_range), [`stale`] (what the kernel must forget), [`waits`]
//! (what waits on purpose), [`errno`].

mod about;
pub mod begin;
pub mod checkpoints;
pub mod copy;
pub mod errno;
mod exports;
pub mod extent;
pub mod file;
mod fixed;
mod fuse;
mod fuse_ahead;
mod fuse_device;
mod fuse_loop;
mod fuse_session;
mod fuse_split;
mod fuse_wire;
mod increment;
pub mod names;
pub mod node;
pub mod stale;
pub mod state;
pub mod waits;
mod window;

pub use fuse_session::{Mounted, mount, mount_extents};

/// How a tree is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Lets users other than the one who mounts in (root must have allowed it in /etc/fuse.conf). Files keep their
    /// modes, so this opens the tree to root and the owner only, unless the owner is somebody else.
    pub allow_other: bool,
    /// What `findmnt` shows as the source: `afterimage:` and the pool's path.
    pub fs_name: String,
    /// Threads that serve requests; `None` for the number that measured best.
    pub threads: Option<usize>,
    /// Use io_uring where the host has it. Without, nothing is different but the speed.
    pub ring: bool,
    /// Owner of all files.
    pub uid: u32,
    /// Group of all files.
    pub gid: u32,
}

impl MountOptions {
    /// Returns the options for a pool at `pool`, owned by this process's user.
    #[must_use]
    pub fn of_pool(pool: &std::path::Path) -> Self {
        Self {
            allow_other: false,
            fs_name: format!("afterimage:{}", pool.display()),
            threads: None,
            ring: true,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }
}
