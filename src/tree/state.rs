//! What a mounted tree keeps: the pool, who owns the files, what is open, and when directories last changed.
//!
//! Names and sizes are never kept here: each is asked of the store when the kernel asks, and cached by the kernel until
//! [`super::stale`] tells it to forget. What is kept is what only this mount knows: its open handles.
//!
//! # Rules
//! 1. Inode numbers and handles from the kernel are looked up, never trusted.
//! 2. The locks here are leaves: none is held over a call into the store, but [`super::file::DiskFile`]'s own.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::about::About;
use super::checkpoints::Checkpoints;
use super::errno::{Answer, Errno};
use super::extent::{Cut, Extents};
use super::file::{DiskFile, Handle};
use super::increment::Increments;
use super::node::{self, Node, Sort};
use super::stale::{self, Stale};
use super::waits::Halt;
use super::window::Held;
use crate::clock;
use crate::disk::{self, BlockDevice, Disk};
use crate::error::{Error, Kind};
use crate::snapshot::{self, Verifiers};
use crate::store::{Change, DiskInfo, Need, Room, SnapshotInfo, SnapshotState, Store};
use crate::sync::{Mutex, RwLock};
use crate::units::{DiskId, SnapshotId};

/// The name this mount takes leases under.
pub(super) const HOLDER: &str = disk::MOUNT;

/// What stat(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The inode number.
    pub ino: u64,
    /// What kind of file it is.
    pub sort: Sort,
    /// Bytes.
    pub size: u64,
    /// Bytes mapped, in units of 512.
    pub blocks: u64,
    /// Unix seconds of the last change.
    pub mtime: u64,
    /// Permission bits.
    pub perm: u16,
    /// Links: 0 for a disk that was removed while open.
    pub nlink: u32,
    /// Whether the kernel may keep this until it is told otherwise. Not while somebody else writes the disk.
    pub keep: bool,
}

/// Who the files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A mounted tree, without the mount.
#[derive(Debug)]
pub struct Tree {
    /// The pool.
    pub(super) store: Arc<Store>,
    /// Who owns every file.
    pub owner: Owner,
    pub(super) started: u64,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    disks: Mutex<HashMap<DiskId, Weak<DiskFile>>>,
    times: Mutex<HashMap<u64, u64>>,
    doubtful: Mutex<HashSet<DiskId>>,
    /// What is known of extent files.
    pub(super) extents: Extents,
    /// The increment directories that were looked up.
    pub(super) increments: Increments,
    /// The checkpoints that were looked up.
    pub(super) checkpoints: Checkpoints,
    /// The checksums of what is read of exports.
    pub(super) verifiers: Arc<Verifiers>,
    /// The one snapshot whose extent files are the whole tree, if it shows no more.
    pub(super) only: Option<(Arc<Held>, Cut)>,
    /// What stands in `snapshot.json` then.
    pub(super) about: Option<About>,
}

impl Tree {
    /// Makes the tree of a pool.
    #[must_use]
    pub fn new(store: Arc<Store>, owner: Owner) -> Self {
        Self {
            store,
            owner,
            started: clock::wall_seconds(),
            handles: RwLock::default(),
            next_handle: AtomicU64::new(1),
            disks: Mutex::default(),
            times: Mutex::default(),
            doubtful: Mutex::default(),
            extents: Extents::default(),
            increments: Increments::default(),
            checkpoints: Checkpoints::default(),
            verifiers: Arc::default(),
            only: None,
            about: None,
        }
    }

    /// Makes the tree of the extent files of one snapshot, which is held for as long.
    ///
    /// # Errors
    /// `NotFound` when there is no such live snapshot.
    pub fn of_extents(store: Arc<Store>, owner: Owner, snapshot: SnapshotId) -> Result<Self, Error> {
        let only = Held::new(&store, snapshot)?;
        let about = Some(About::of(&store, &only.1)?);
        Ok(Self { only: Some(only), about, ..Self::new(store, owner) })
    }

    /// Takes notice of a change of the pool and returns what the kernel has to forget; `ours` when one of this mount's
    /// own operations made it.
    pub fn changed(&self, change: &Change, ours: bool) -> Vec<Stale> {
        let now = clock::wall_seconds();
        let (dirs, doubtful) = match change {
            Change::Disk { id, resized, data, .. } => {
                let names = !resized && !data;
                let all = [Node::Disks, Node::Snapshots, Node::Retired, Node::Exports];
                let dirs = if names { all.to_vec() } else { Vec::new() };
                if names {
                    // Their texts name the disk.
                    let tables = self.store.tables.read();
                    self.increments
                        .forget(|snapshot| tables.snapshot_by_id(snapshot).map_or(true, |(_, row)| row.disk == *id));
                }
                (dirs, (!names && !ours).then_some(*id))
            }
            Change::Written { disk } => (Vec::new(), (!ours).then_some(*disk)),
            Change::Snapshot { disk, id, gone, retired, was, .. } => {
                if *gone || *retired {
                    self.extents.forget(*id);
                }
                if *gone || *retired || was.is_some() {
                    self.increments.forget(|snapshot| snapshot == *id);
                }
                (vec![Node::SnapshotsOf(*disk), Node::RetiredOf(*disk), Node::ExportsOf(*disk)], None)
            }
        };
        self.times.lock().extend(dirs.iter().map(|dir| (dir.ino(), now)));
        if let Some(id) = doubtful {
            self.doubtful.lock().insert(id);
        }
        stale::after(change, ours)
    }

    /// Returns whether the kernel may keep the cached bytes of a disk over an open: not at the first open after its
    /// content was changed from outside (which was announced too; this holds if an announcement was lost) or past the
    /// cache.
    pub(super) fn trust_cache(&self, id: DiskId) -> bool {
        !self.doubtful.lock().remove(&id)
    }

    /// Decodes an inode number.
    pub(super) fn node(&self, ino: u64) -> Answer<Node> {
        let node = Node::from_ino(ino).ok_or(Errno::ESTALE)?;
        match &self.only {
            None => Ok(node),
            Some((_, cut)) => match node {
                Node::Root => Ok(Node::Extents(cut.id)),
                Node::Extent { .. } | Node::Untouched { .. } | Node::About => Ok(node),
                _ => Err(Errno::ESTALE),
            },
        }
    }

    /// Returns what stat(2) shows of an inode.
    ///
    /// # Errors
    /// ESTALE when it is gone.
    pub fn attr(&self, ino: u64) -> Answer<Attr> {
        let answer = match self.node(ino)? {
            node @ (Node::Root | Node::Disks | Node::Snapshots | Node::Retired | Node::Exports) => {
                Ok(self.dir_attr(node, self.started))
            }
            Node::SnapshotsOf(id) => self.store.disk_info_by_id(id).map(|info| self.snapshots_of_attr(&info)),
            Node::Snapshot(id) => self.store.snapshot_info_by_id(id).map(|info| Self::snapshot_attr(&info)),
            Node::Disk(id) => match self.store.disk_info_by_id(id) {
                Ok(info) => Ok(self.disk_attr(&info)),
                Err(error) if error.kind() == Kind::NotFound => return self.removed_attr(id),
                Err(error) => Err(error),
            },
            node if node.is_of_checkpoints() => return self.checkpoint_attr(node),
            node => return self.export_attr(node),
        };
        answer.map_err(|error| Errno::from(error).stale())
    }

    /// Sets attributes: the size of a disk. Times are accepted and ignored, since those of a disk say when its content
    /// changed; mode and owner may only be set to what they are.
    ///
    /// # Errors
    /// EPERM for another mode or owner, and those of [`Tree::truncate`].
    pub fn set_attr(
        &self,
        ino: u64,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
    ) -> Answer<Attr> {
        let attr = self.attr(ino)?;
        let same_mode = mode.is_none_or(|mode| mode & 0o7777 == u32::from(attr.perm));
        let same_owner = uid.is_none_or(|uid| uid == self.owner.uid) && gid.is_none_or(|gid| gid == self.owner.gid);
        if !same_mode || !same_owner {
            return Err(Errno::EPERM);
        }
        let Some(size) = size else { return Ok(attr) };
        self.truncate(ino, size)?;
        self.attr(ino)
    }

    /// Returns the attributes of a directory that has last changed at `since`, or later as far as this mount knows.
    pub(super) fn dir_attr(&self, node: Node, since: u64) -> Attr {
        let ino = node.ino();
        let mtime = self.times.lock().get(&ino).copied().unwrap_or(since);
        let perm = if node.is_exported() { 0o555 } else { 0o755 };
        Attr { ino, sort: Sort::Dir, size: 0, blocks: 0, mtime, perm, nlink: 2, keep: true }
    }

    /// Returns the attributes of `snapshots/NAME/`.
    pub(super) fn snapshots_of_attr(&self, info: &DiskInfo) -> Attr {
        let newest = self.store.latest(info.id).map_or(info.created, |snapshot| snapshot.created);
        self.dir_attr(Node::SnapshotsOf(info.id), newest)
    }

    /// Returns the attributes of a disk.
    pub(super) fn disk_attr(&self, info: &DiskInfo) -> Attr {
        // A copy under way shows what was copied so far.
        let size = self.opened(info.id).map_or(info.size, |file| file.size());
        let keep = info.holder.as_deref().is_none_or(|holder| holder == HOLDER);
        let ino = Node::Disk(info.id).ino();
        Attr {
            ino,
            sort: Sort::File,
            size,
            blocks: info.referenced / 512,
            mtime: info.modified,
            perm: 0o600,
            nlink: 1,
            keep,
        }
    }

    /// Returns the attributes of a disk that was removed while somebody has it open.
    fn removed_attr(&self, id: DiskId) -> Answer<Attr> {
        let file = self.opened(id).ok_or(Errno::ESTALE)?;
        let (ino, size) = (Node::Disk(id).ino(), file.size());
        let mtime = clock::wall_seconds();
        Ok(Attr {
            ino,
            sort: Sort::File,
            size,
            blocks: file.disk().mapped() / 512,
            mtime,
            perm: 0o600,
            nlink: 0,
            keep: false,
        })
    }

    /// Returns the attributes of a snapshot.
    pub(super) fn snapshot_attr(info: &SnapshotInfo) -> Attr {
        let (ino, blocks) = (Node::Snapshot(info.id).ino(), info.referenced / 512);
        Attr { ino, sort: Sort::File, size: info.size, blocks, mtime: info.created, perm: 0o400, nlink: 1, keep: true }
    }

    /// Returns room on the host.
    ///
    /// # Errors
    /// What the store says.
    pub fn room(&self) -> Answer<Room> {
        Ok(self.store.room()?)
    }

    /// Enters a handle into the table.
    pub(super) fn enter(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.write().insert(number, Arc::new(handle));
        number
    }

    /// Finds an open handle.
    ///
    /// # Errors
    /// EBADF for a number never given out or released.
    pub(super) fn handle(&self, number: u64) -> Answer<Arc<Handle>> {
        self.handles.read().get(&number).cloned().ok_or(Errno::EBADF)
    }

    /// Takes the turn of a read or write through a handle, by the limits of the disk. Returns what has to be waited for
    /// first, if anything.
    pub fn take_turn(&self, number: u64, bytes: u64) -> Option<(Arc<Disk>, Need)> {
        match self.handle(number).ok()?.take_turn(bytes) {
            Err(Halt::Waits(disk, need)) => Some((disk, need)),
            _ => None,
        }
    }

    /// Takes a handle out of the table; the last I/O on it drops it.
    pub fn release(&self, number: u64) {
        let handle = self.handles.write().remove(&number);
        if let Some(Handle::Disk(disk)) = handle.as_deref()
            && let Some(id) = disk.wrote_direct()
        {
            self.doubtful.lock().insert(id);
        }
        drop(handle);
    }

    /// Releases everything, as when the mount is gone.
    pub fn release_all(&self) {
        let all = std::mem::take(&mut *self.handles.write());
        drop(all);
    }

    /// Returns the open state of a disk, if it is open here.
    pub(super) fn opened(&self, id: DiskId) -> Option<Arc<DiskFile>> {
        self.disks.lock().get(&id).and_then(Weak::upgrade)
    }

    /// Returns the open state of a disk, shared by all its handles.
    ///
    /// # Errors
    /// ESTALE when the disk is gone.
    pub(super) fn disk_file(&self, id: DiskId) -> Answer<Arc<DiskFile>> {
        if let Some(file) = self.opened(id) {
            return Ok(file);
        }
        let disk = disk::open_by_id(&self.store, id).map_err(|error| Errno::from(error).stale())?;
        let mut disks = self.disks.lock();
        if let Some(file) = disks.get(&id).and_then(Weak::upgrade) {
            return Ok(file);
        }
        disks.retain(|_, file| file.strong_count() > 0);
        let file = Arc::new(DiskFile::new(disk));
        disks.insert(id, Arc::downgrade(&file));
        Ok(file)
    }

    /// Opens a snapshot's data.
    pub(super) fn snapshot_device(&self, node: Node) -> Answer<Arc<snapshot::SnapshotDevice>> {
        let Node::Snapshot(id) = node else { return Err(Errno::EISDIR) };
        let retired = || self.store.snapshot_info_by_id(id).is_ok_and(|info| info.state == SnapshotState::Retired);
        snapshot::open_by_id(&self.store, id).map_err(|error| {
            // The kernel may still know a file under its new name in `retired/` by the number it had: it looks again then.
            if retired() { Errno::ESTALE } else { Errno::from(error).stale() }
        })
    }

    /// Returns the live snapshots of a disk.
    pub(super) fn live_snapshots(&self, id: DiskId) -> Answer<Vec<SnapshotInfo>> {
        let mut all = self.store.snapshots_by_id(id).map_err(|error| Errno::from(error).stale())?;
        all.retain(|snapshot| snapshot.state == SnapshotState::Live);
        Ok(all)
    }

    /// Finds a live snapshot by the name of its file in `snapshots/NAME/`.
    pub(super) fn snapshot_named(&self, id: DiskId, file: &OsStr) -> Answer<SnapshotInfo> {
        let name = node::named(file).ok_or(Errno::ENOENT)?;
        let disk = self.store.disk_info_by_id(id).map_err(|error| Errno::from(error).stale())?.name;
        let info = self.store.snapshot_info(&disk, name)?;
        // The disk may have been renamed between the two questions.
        if info.disk_id == id && info.state == SnapshotState::Live { Ok(info) } else { Err(Errno::ENOENT) }
    }
}
